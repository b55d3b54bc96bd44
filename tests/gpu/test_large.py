"""Past 2³¹ elements, in one tensor and in many, against torch on slices small enough for it."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from gpu_oracles import DEVICE, REAL, TILE, forced
from torch import Tensor

import sparse_ft_kernels as ops

EDGE = 1 << 31 if REAL else 1 << 16
SLICE = 1 << 26 if REAL else 1 << 14
NEEDED = 60e9

MODELS = {
    "one": [EDGE + 70_001],
    # More tiles than one, none of them a whole number of slices.
    "many": [EDGE // 8 + 12_345 * j for j in range(9)],
}


class Slice(NamedTuple):
    """A piece of one tensor of a model.

    Attributes:
        tensor: Its ordinal.
        start: Its first element in the tensor.
        end: Behind its last element.
        first: Its first element in the numbering by tiles (tile · 65,536 + offset).
    """

    tensor: int
    start: int
    end: int
    first: int


def slices(sizes: list[int]) -> Iterator[Slice]:
    tile = 0
    for i, n in enumerate(sizes):
        for start in range(0, n, SLICE):
            yield Slice(i, start, min(n, start + SLICE), tile * TILE + start)
        tile += -(-n // TILE)


def random_model(sizes: list[int], seed: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    model = [torch.zeros(n, dtype=dtype, device=DEVICE) for n in sizes]
    for at in slices(sizes):
        model[at.tensor][at.start : at.end].normal_(generator=generator)
    return model


def positions(idx: Tensor, ptr: Tensor) -> Tensor:
    """Selected entries as tile · 65,536 + offset, int64, ascending."""
    tiles = torch.arange(len(ptr) - 1, device=idx.device)
    return torch.repeat_interleave(tiles, ptr[1:] - ptr[:-1]) * TILE + idx.to(torch.int64)


def own(at: Slice, chosen: Tensor) -> tuple[slice, Tensor]:
    """Which selected entries lie in a slice, and where in it."""
    edges = torch.tensor([at.first, at.first + at.end - at.start], device=chosen.device)
    low, high = torch.searchsorted(chosen, edges).tolist()
    return slice(low, high), chosen[low:high] - at.first


def read(model: list[Tensor], sizes: list[int], chosen: Tensor) -> Tensor:
    """The selected entries of a model."""
    pieces = []
    for at in slices(sizes):
        _, inside = own(at, chosen)
        pieces.append(model[at.tensor][at.start : at.end][inside])
    return torch.cat(pieces)


def assert_only(
    model: list[Tensor], before: list[Tensor], sizes: list[int], chosen: Tensor, values: Tensor
) -> None:
    """The model is what it was, with `values` at the selected entries, bit for bit."""
    for at in slices(sizes):
        mine, inside = own(at, chosen)
        expected = before[at.tensor][at.start : at.end].clone()
        expected[inside] = values[mine]
        found = model[at.tensor][at.start : at.end]
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), at


@pytest.fixture(scope="module", params=MODELS)
def sizes(request):
    if REAL and (free := torch.cuda.mem_get_info()[0]) < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of device memory, {free / 1e9:.0f} GB are free")
    assert sum(MODELS[request.param]) > EDGE
    return MODELS[request.param]


def test_select_topk_and_what_uses_its_entries(sizes):
    """Selection by count and by entry; then gather, a step, composition and the way back."""
    a, b = random_model(sizes, 0), random_model(sizes, 1)
    k = sum(sizes) // 100
    with forced():
        idx, ptr, info = ops.select_topk(a, b, k=k)
    threshold = info[:1].to(torch.int32).view(torch.float32).item()
    chosen = positions(idx, ptr)
    assert len(idx) == k == int(info[1])
    quota = k - int(info[2])  # of those tied at the threshold, the first
    assert 0 < quota == int(info[4])
    above = tied = 0
    for at in slices(sizes):
        score = a[at.tensor][at.start : at.end].float() - b[at.tensor][at.start : at.end].float()
        score = score.abs()
        equal = (score == threshold).nonzero().view(-1)
        wanted = score > threshold
        above += int(wanted.sum())
        wanted[equal[: max(0, quota - tied)]] = True
        tied += len(equal)
        assert torch.equal(own(at, chosen)[1], wanted.nonzero().view(-1)), at
    assert above == int(info[2])
    assert tied == int(info[3])
    del score, equal, wanted

    # The same step on a small model that is nothing but the selected entries.
    theta0, compact = read(a, sizes, chosen), read(b, sizes, chosen).float()
    before = [t.clone() for t in a]
    whole, part = ([torch.zeros(k, device=DEVICE) for _ in range(3)] for _ in range(2))
    counts = [torch.zeros((), device=DEVICE) for _ in range(2)]
    small = [theta0.clone()]
    every = torch.arange(k, device=DEVICE) % TILE
    every = every.to(torch.int32).to(torch.int16).view(torch.uint16)
    ends = torch.arange(-(-k // TILE) + 1, device=DEVICE) * TILE
    ends[-1] = k
    rate = torch.tensor(1e-2, dtype=torch.float64).to(DEVICE)
    with forced():
        out = torch.empty(k, device=DEVICE)
        norm_sq, _ = ops.gather(b, sizes, idx, ptr, out)
        small_out = torch.empty(k, device=DEVICE)
        small_norm, _ = ops.gather([compact], [k], every, ends, small_out)
        for _ in range(2):
            ops.masked_adamw_(
                a, idx, ptr, b, *whole, theta0, counts[0], lr=rate, l1=0.1, weight_decay=0.1
            )
            ops.masked_adamw_(
                *(small, every, ends, compact, *part, theta0, counts[1]),
                lr=rate,
                l1=0.1,
                weight_decay=0.1,
            )
    assert torch.equal(out, compact)
    assert torch.equal(small_out, compact)
    assert torch.equal(norm_sq, small_norm)
    for x, y in zip(whole, part, strict=True):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))
    assert_only(a, before, sizes, chosen, small[0])
    assert not torch.equal(small[0], theta0)

    # Composition of two deltas that overlap, and back.
    for t, s in zip(a, before, strict=True):
        t.copy_(s)
    value = torch.randn(k, device=DEVICE)
    undo = [torch.empty(k, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    with forced():
        ops.compose_(a, [idx, idx], [ptr, ptr], [value, value], [1.0, -0.25], undo)
    total = value + value * -0.25
    moved = (theta0.float() + total).to(torch.bfloat16)
    assert_only(a, before, sizes, chosen, torch.where(total == 0, theta0, moved))
    with forced():
        ops.restore_(a, [idx, idx], [ptr, ptr], undo)
    assert_only(a, before, sizes, chosen, theta0)


def test_dense_adamw(sizes):
    """Around the edge and at the end as on small tensors of the same values."""
    weights, grads = random_model(sizes, 2), random_model(sizes, 3)
    moments = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    last = len(sizes) - 1
    places = {(0, 0), (last, max(0, sizes[last] - 70_000)), (last, min(EDGE, sizes[last]) - 35_000)}
    pieces = [(i, slice(at, at + 70_000)) for i, at in sorted(places)]
    small = [weights[i][at].clone() for i, at in pieces]
    small_moments = [[torch.zeros_like(w) for w in small] for _ in range(2)]
    steps = [torch.zeros((), device=DEVICE) for _ in range(2)]
    rate = torch.tensor(1e-2, dtype=torch.float64).to(DEVICE)
    with forced():
        ops.dense_adamw_(weights, grads, *moments, [], [], steps[0], lr=rate, weight_decay=0.1)
        small_grads = [grads[i][at].clone() for i, at in pieces]
        ops.dense_adamw_(
            small, small_grads, *small_moments, [], [], steps[1], lr=rate, weight_decay=0.1
        )
    for whole, part in ((weights, small), *zip(moments, small_moments, strict=True)):
        for (i, at), piece in zip(pieces, part, strict=True):
            assert torch.equal(whole[i][at].view(torch.int16), piece.view(torch.int16)), (i, at)
    # Nowhere was an element left out: a second moment of a gradient that is not 0 is not 0.
    for at in slices(sizes):
        here = slice(at.start, at.end)
        missed = (moments[1][at.tensor][here] == 0) & (grads[at.tensor][here].abs() > 1e-3)
        assert not missed.any(), at
