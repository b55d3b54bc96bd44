"""TopK: tensor by tensor it selects what one selection over everything would."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random_support, rng

from sparse_ft import topk
from sparse_ft.topk import TopK
from sparse_ft_kernels import TILE, NonFiniteError, select_topk


def everything(tensors, k, tie, exclude, start=()):
    return select_topk(tensors, start, k=k, tie=tie, exclude=exclude)


def piecewise(tensors, k, tie, exclude, start=()):
    top = TopK(k, tie, exclude)
    for i, tensor in enumerate(tensors):
        top.add(tensor, start[i] if start else None)
    return top.result()


def same(found, expected):
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert a.dtype == b.dtype
        assert a.tolist() == b.tolist()
    # Threshold, entries, above, tied, tied and selected, eligible; not whether a fallback ran.
    assert found[2][[0, 1, 2, 3, 4, 7]].tolist() == expected[2][[0, 1, 2, 3, 4, 7]].tolist()


@settings(deadline=None, max_examples=300)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 63, 400, TILE, TILE + 1, 200_003]), max_size=6),
    values=st.sampled_from([1, 2, 7, 1000, 10**9]),
    share=st.floats(0, 1),
    excluded=st.sampled_from([0.0, 0.0, 0.3, 0.95]),
    tie=st.sampled_from(["index", "all"]),
    paired=st.booleans(),
    growing=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_what_one_selection_gives(
    sizes, values, share, excluded, tie, paired, growing, seed, small_chunks
):
    """Few distinct values make ties everywhere, at every floor and every cut."""
    g = rng(seed)

    def draw(i, n):
        scores = torch.randint(-values, values + 1, (n,), generator=g).float()
        # Floors that rise late, and floors that are high at once.
        return scores * (1 + i if growing else 1)

    tensors = [draw(i, n) for i, n in enumerate(sizes)]
    start = [draw(i, n) for i, n in enumerate(sizes)] if paired else ()
    exclude = random_support(sizes, excluded, g)[:2] if excluded else None
    eligible = sum(sizes) - (len(exclude[0]) if exclude else 0)
    if not eligible:
        return
    k = max(1, int(share * share * eligible))
    same(piecewise(tensors, k, tie, exclude, start), everything(tensors, k, tie, exclude, start))


@pytest.fixture(scope="module")
def small_chunks():
    """Chunks of one tile, so that tensors of a few tiles have several."""
    before, topk.CHUNK = topk.CHUNK, TILE
    yield
    topk.CHUNK = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 999, 100_000])
def test_many_tensors_of_other_types_and_shapes(dtype, k):
    g = rng(dtype, k)
    tensors = [
        torch.randn(s, generator=g).to(dtype)
        for s in [(), (300, 700), (0, 3), (5, 6, 7), (90_000,)]
    ]
    same(
        piecewise(tensors, k, "index", None),
        everything([t.float() for t in tensors], k, "index", None),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_placed_unless_it_is_excluded(bad):
    tensors = [torch.ones(5), torch.ones(3 * TILE), torch.ones(4)]
    tensors[1][TILE + 7] = bad
    with pytest.raises(NonFiniteError) as caught:
        piecewise(tensors, 3, "index", None)
    assert (caught.value.tile, caught.value.ordinal) == (2, 1)
    ptr = torch.tensor([0, 0, 0, 1, 1, 1])
    exclude = (torch.tensor([7], dtype=torch.uint16), ptr)
    same(piecewise(tensors, 6, "index", exclude), everything(tensors, 6, "index", exclude))


def test_few_candidates_are_held():
    g = rng(1)
    top = TopK(1000)
    for _ in range(40):
        top.add(torch.rand(TILE, generator=g))
        assert top._held < 1250
        assert sum(piece.size.numel() for piece in top._pieces) == top._held
