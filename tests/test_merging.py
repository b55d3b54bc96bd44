"""merge and overlap of deltas: merging then applying is composing; sets are counted as numpy
does.
"""

import copy
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from oracles import DTYPES, assert_bits
from torch import nn

import sparse_ft as sf

SHAPES = {"a": (300, 257), "b": (65_536,), "c": (), "d": (0, 2), "e": (65_537,)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small for more: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for n, s in SHAPES.items():
            self.register_parameter(n, nn.Parameter(torch.randn(s, generator=g).to(dtype)))
        self.head = nn.Linear(2, 3, dtype=dtype)


@torch.no_grad()
def made(model: nn.Module, seed: int, names="abcde", **meta) -> sf.SparseDelta:
    g = torch.Generator().manual_seed(seed)
    base = {n: p.detach() for n, p in model.named_parameters() if n in names}
    tuned = {
        n: (t + torch.randn(t.shape, generator=g) * (torch.rand(t.shape, generator=g) < 0.1)).to(
            t.dtype
        )
        for n, t in base.items()
    }
    heads = {n: p + seed for n, p in model.named_parameters() if n.startswith("head")}
    return sf.SparseDelta.between(base, tuned, heads=heads, **meta)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def entries(delta: sf.SparseDelta) -> dict[tuple[str, int], float]:
    return {
        (n, i): v
        for n, flat, val in delta
        for i, v in zip(flat.tolist(), val.tolist(), strict=True)
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [None, [1.0, -0.5, 2.0]], ids=str)
def test_merging_then_applying_is_composing(dtype, weights):
    model = Model(dtype)
    before = values(model)
    deltas = [made(model, 1), made(model, 2, "ab"), made(model, 3, "bce")]
    with sf.compose(model, deltas, weights):
        composed = values(model)
    first = None
    for order in itertools.permutations(range(3)):
        merged = sf.merge([deltas[j] for j in order], weights and [weights[j] for j in order])
        first = first or merged
        assert merged == first
        with sf.compose(model, merged):
            for n, p in model.named_parameters():
                assert_bits(p.detach(), composed[n], n)
        for n, p in model.named_parameters():
            assert_bits(p.detach(), before[n], n)
    union = set().union(*(entries(d).keys() for d in deltas))
    assert entries(merged).keys() == union
    assert merged.val.dtype is torch.float32
    assert merged.heads == {}
    sources = {s["id"]: s["alpha"] for s in merged.meta["recipe"]["merged_from"]}
    assert sources == {d.content_id: a for d, a in zip(deltas, weights or [1.0] * 3, strict=True)}


def test_one_delta_is_itself():
    delta = made(Model(), 1)
    for one in (sf.merge([delta]), sf.merge(delta), sf.merge([delta], [1.0])):
        assert one.support == delta.support
        assert_bits(one.val, delta.val)
    half = delta.astype(torch.bfloat16)
    assert_bits(sf.merge([half]).val, half.val.float())
    assert_bits(sf.merge([delta], [0.5]).val, delta.val * 0.5)


def test_merging_in_groups_agrees_where_sums_are_exact():
    """Small integers add exactly, so the result must not depend on how the sum is bracketed."""
    layout = sf.Layout.of(SHAPES)
    g = torch.Generator().manual_seed(1)

    def whole(n):
        support = sf.Support.from_masks(
            {m: torch.rand(s, generator=g) < 0.1 for m, s in SHAPES.items()}
        )
        assert support.layout == layout
        return sf.SparseDelta(support, torch.randint(-50, 50, (support.nnz,), generator=g).float())

    a, b, c = whole(1), whole(2), whole(3)
    both = sf.merge([sf.merge([a, b]), c])
    assert both.support == sf.merge([a, sf.merge([b, c])]).support
    assert_bits(both.val, sf.merge([a, b, c]).val)


def test_what_a_merged_delta_says_of_itself():
    model = Model()
    base = {"id": "org/model", "revision": "1"}
    a = made(model, 1, base=base, role="task")
    b = made(model, 2, base={**base, "revision": "2"})
    assert "digest_f32" in a.meta["base"]
    merged = sf.merge([a, b])
    assert merged.meta["base"] == {"id": "org/model"}
    assert merged.meta["dtypes"] == a.meta["dtypes"]
    assert "role" not in merged.meta
    with_heads = sf.merge([a, b], heads=b)
    assert set(with_heads.heads) == {"head.weight", "head.bias"}
    for n, head in with_heads.heads.items():
        assert_bits(head, b.heads[n], n)
    with pytest.raises(ValueError, match="heads is not among"):
        sf.merge([a], heads=b)


def test_tied_names_survive_and_are_not_merged_apart():
    tied = nn.ModuleDict({"x": nn.Linear(9, 9, bias=False), "y": nn.Linear(9, 9, bias=False)})
    tied["y"].weight = tied["x"].weight
    tuned = copy.deepcopy(tied)
    with torch.no_grad():
        tuned["x"].weight[3] += 1
    delta = sf.SparseDelta.between(tied, tuned)
    merged = sf.merge([delta, delta])
    assert merged.meta["aliases"] == {"x.weight": ["y.weight"]}
    with sf.compose(tied, merged):
        pass
    other = sf.SparseDelta(
        sf.Support.from_indices(sf.Layout.of({"y.weight": (9, 9)}), {"y.weight": [1]}),
        torch.ones(1),
    )
    with pytest.raises(sf.SFTError, match=r"'x\.weight' and 'y\.weight' are one tied tensor"):
        sf.merge([delta, other])


def test_merge_refuses():
    model = Model()
    delta = made(model, 1)
    replace = sf.SparseDelta(delta.support, delta.val, meta={"kind": "replace"})
    wide = sf.SparseDelta(
        sf.Support.from_indices(sf.Layout.of({"a": (7,)}), {"a": [1]}), torch.ones(1)
    )
    for kind, args, more, message in [
        (ValueError, ([],), {}, "no deltas given"),
        (ValueError, ([delta],), {"rule": "best"}, "unknown rule 'best'; there are sum"),
        (ValueError, ([delta], [1.0, 2.0]), {}, "2 weights for 1 deltas"),
        (ValueError, ([delta], [float("nan")]), {}, r"weights\[0\] must be a finite"),
        (ValueError, ([delta], [1e300]), {}, r"weights\[0\] must be a finite"),
        (TypeError, ([delta, "b"],), {}, r"deltas\[1\] must be a SparseDelta, got str"),
        (sf.SFTError, ([delta, replace],), {}, r"deltas\[1\] is of kind 'replace'"),
        (sf.SFTError, ([delta, wide],), {}, r"'a' has shape \(300, 257\).*\(7,\) in deltas\[1\]"),
        (sf.SFTError, ([delta, delta], [3e38, 3e38]), {}, "must be finite"),
    ]:
        with pytest.raises(kind, match=message):
            sf.merge(*args, **more)


def test_overlap_against_sets():
    model = Model()
    deltas = [made(model, 1), made(model, 2, "ab"), made(model, 3, "bce").astype(torch.bfloat16)]
    deltas.append(-deltas[0])
    found = sf.overlap(deltas)
    maps = [entries(d) for d in deltas]
    assert found.names == tuple(SHAPES)
    assert found.numel == sum(int(np.prod(s)) for s in SHAPES.values())
    assert found.nnz.tolist() == [len(m) for m in maps]
    for i, j in itertools.product(range(4), repeat=2):
        common = maps[i].keys() & maps[j].keys()
        a, b = (np.array([m[c] for c in sorted(common)]) for m in (maps[i], maps[j]))
        assert found.both[i, j] == len(common)
        assert found.either[i, j] == len(maps[i].keys() | maps[j].keys())
        assert found.same_sign[i, j] == int((np.sign(a) == np.sign(b)).sum())
        assert found.dot[i, j] == pytest.approx((a * b).sum(), rel=1e-12, abs=1e-9)
        assert found.energy[i, j] == pytest.approx((a * a).sum(), rel=1e-12)
        assert found.jaccard[i, j] == len(common) / len(maps[i].keys() | maps[j].keys())
        assert found.share[i, j] == len(common) / len(maps[i])
        assert found.expected_share[i, j] == len(maps[j]) / found.numel
        by_tensor = [sum(n == m for n, _ in common) for m in found.names]
        assert found.by_tensor[i, j].tolist() == by_tensor
    assert found.cosine[0, 0] == pytest.approx(1.0)
    assert found.cosine[0, 3] == pytest.approx(-1.0)
    assert np.array_equal(found.cosine, found.cosine.T)
    assert "Overlap of 4 deltas over 208,174 entries" in repr(found)


def test_random_supports_overlap_by_chance():
    model = Model()
    n = sum(p.numel() for name, p in model.named_parameters() if name in SHAPES)
    supports = [
        sf.select(model, density=0.1, criterion="random", seed=s, eligible=set(SHAPES))
        for s in (1, 2)
    ]
    found = sf.overlap([sf.SparseDelta(s, torch.ones(s.nnz)) for s in supports])
    expected = found.expected_share[0, 1]
    sigma = (expected * (1 - expected) / found.nnz[0]) ** 0.5
    assert found.nnz[0] == int(0.1 * n)
    assert abs(found.share[0, 1] - expected) < 5 * sigma
    assert found.share[0, 0] == found.jaccard[1, 1] == 1.0


def test_overlap_of_nothing_and_of_what_does_not_fit():
    layout = sf.Layout.of({"a": (5,)})
    empty = sf.SparseDelta(sf.Support.from_indices(layout, {}), torch.zeros(0))
    found = sf.overlap([empty, empty])
    assert found.both.tolist() == [[0, 0], [0, 0]]
    assert found.jaccard.tolist() == found.share.tolist() == [[0, 0], [0, 0]]
    assert found.cosine.tolist() == [[0, 0], [0, 0]]
    assert sf.overlap(empty).nnz.tolist() == [0]
    with pytest.raises(ValueError, match="overlap: no deltas given"):
        sf.overlap([])
    with pytest.raises(TypeError, match=r"overlap: deltas\[0\] must be a SparseDelta, got int"):
        sf.overlap([1])
    other = sf.SparseDelta(sf.Support.from_indices(sf.Layout.of({"a": (6,)}), {}), torch.zeros(0))
    with pytest.raises(sf.SFTError, match=r"'a' has shape \(5,\)"):
        sf.overlap([empty, other])
