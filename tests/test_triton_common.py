"""What Triton's kernels share: rounding, random rounding, keys, sums, the search for a tile."""

import numpy as np
import oracles
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from sparse_ft_kernels import triton_backend
from sparse_ft_kernels.triton_common import (
    find,
    first_tiles,
    from_f32,
    halve,
    launch,
    magnitude_key,
    stochastic_bf16,
    ticket_of,
    tile_of,
    tree_sum,
)

if why := triton_backend.unavailable(torch.device("cpu")):
    pytest.skip(why, allow_module_level=True)


@triton.jit
def _round(x_ptr, out_ptr, n, CODE: tl.constexpr, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + e, from_f32(tl.load(x_ptr + e, mask=e < n), CODE), mask=e < n)


@triton.jit
def _stochastic(x_ptr, out_ptr, seed, n, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + e, mask=e < n, other=0.0)
    tl.store(out_ptr + e, stochastic_bf16(x, seed, e), mask=e < n)


@triton.jit
def _key(x_ptr, out_ptr, BLOCK: tl.constexpr):
    e = tl.arange(0, BLOCK)
    tl.store(out_ptr + e, magnitude_key(tl.load(x_ptr + e)))


@triton.jit
def _tiles(first_ptr, ptr_ptr, out_ptr, n, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    e = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + e, tile_of(e, first_ptr, ptr_ptr, block), mask=e < n)


@triton.jit
def _find(idx_ptr, offset_ptr, out_ptr, low, high, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.int64)
    offset = tl.load(offset_ptr + lane)
    found = find(idx_ptr, zero + low, zero + high, offset, lane < BLOCK, high - low)
    tl.store(out_ptr + lane, found)


@triton.jit
def _halve(x_ptr, out_ptr, BLOCK: tl.constexpr):
    sums = halve(tl.load(x_ptr + tl.arange(0, BLOCK)), BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK // 1024), sums)


def edges() -> torch.Tensor:
    """Every bfloat16 with the values halfway to the next, and a step beside each."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = (high[:, None] | low[None, :]).reshape(-1).view(np.float32)
    return torch.from_numpy(values[~np.isnan(values)].copy())


def test_bf16_is_rounded_as_torch_rounds_it():
    x = edges()
    out = torch.empty(len(x), dtype=torch.int16)
    launch(_round, -(-len(x) // 65536), x, out, len(x), CODE=1, BLOCK=65536)
    assert torch.equal(out, x.to(torch.bfloat16).view(torch.int16))
    nan = torch.full((2,), float("nan"))
    launch(_round, 1, nan, out, 2, CODE=1, BLOCK=2)
    assert out[:2].tolist() == [0x7FC0, 0x7FC0]


def test_fp16_is_rounded_as_torch_rounds_it():
    x = torch.cat([edges()[::7], torch.tensor([65519.9, 65520.0, 6e-8, 2.9e-8])])
    out = torch.empty(len(x), dtype=torch.float16)
    with np.errstate(over="ignore"):
        launch(_round, -(-len(x) // 65536), x, out, len(x), CODE=2, BLOCK=65536)
    oracles.assert_bits(out, x.to(torch.float16))


def stochastic(x: torch.Tensor, seed: int) -> torch.Tensor:
    out = torch.empty(len(x), dtype=torch.int16)
    launch(_stochastic, -(-len(x) // 16384), x, out, seed, len(x), BLOCK=16384)
    return out.view(torch.bfloat16)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("value", [1.0, -3.0, 1e-30])
def test_stochastic_rounding_is_right_on_average(share, value):
    low = torch.tensor(value).to(torch.bfloat16)
    high = (low.view(torch.int16) + 1).view(torch.bfloat16)
    n = 100_000
    between = (low.float() + share * (high.float() - low.float())).expand(n).contiguous()
    found = stochastic(between, 7)
    up = found == high
    assert torch.all(up | (found == low)), "a value that is no neighbour"
    # Five standard deviations of a binomial share.
    assert abs(float(up.double().mean()) - share) < 5 * (share * (1 - share) / n) ** 0.5
    # No pattern: neighbouring positions are independent.
    pairs = float((up[1:] & up[:-1]).double().mean())
    assert abs(pairs - share**2) < 5 * (1 / n) ** 0.5


def test_stochastic_rounding_repeats_itself_and_keeps_what_is_exact():
    x = torch.randn(20_000, generator=oracles.rng("stochastic"))
    oracles.assert_bits(stochastic(x, 3), stochastic(x, 3))
    assert not torch.equal(stochastic(x, 3), stochastic(x, 4))
    exact = torch.cat([x.to(torch.bfloat16).float(), torch.tensor([0.0, float("inf")])])
    assert torch.equal(stochastic(exact, 3).float(), exact)
    assert stochastic(torch.tensor([float("nan")]), 3).isnan().all()


def test_keys_order_as_magnitudes_do():
    x = torch.randn(4096, generator=oracles.rng("keys")) * torch.logspace(-44, 38, 4096)
    x[:2] = torch.tensor([0.0, -0.0])
    key = torch.empty(4096, dtype=torch.int32)
    launch(_key, 1, x, key, BLOCK=4096)
    assert key[:2].tolist() == [0, 0]
    order = x.abs().argsort(stable=True)
    assert torch.equal(order, key.argsort(stable=True))


@pytest.mark.parametrize("block", [64, 1024])
@pytest.mark.parametrize(
    "counts",
    [[5], [0, 5, 0, 0, 7, 0], [1] * 300, [3000, 0, 1, 64, 0], [0] * 500 + [1] + [0] * 500 + [100]],
    ids=["one", "gaps", "singles", "mixed", "deserts"],
)
def test_every_entry_finds_its_tile(counts, block):
    ptr = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int64)
    nnz = int(ptr[-1])
    tile = torch.empty(nnz, dtype=torch.int32)
    launch(_tiles, -(-nnz // block), first_tiles(ptr, nnz, block), ptr, tile, nnz, BLOCK=block)
    expected = np.repeat(np.arange(len(counts)), counts)
    assert tile.tolist() == expected.tolist()


def test_first_tiles_are_kept_until_ptr_changes():
    ptr = torch.tensor([0, 10, 2000, 3000])
    first = first_tiles(ptr, 3000, 1024)
    assert first.tolist() == [0, 1, 2, 2]
    assert first_tiles(ptr, 3000, 1024) is first
    # Ops that take turns have blocks of different sizes.
    small = first_tiles(ptr, 3000, 512)
    assert first_tiles(ptr, 3000, 1024) is first
    assert first_tiles(ptr, 3000, 512) is small
    ptr[1] = 1500
    assert first_tiles(ptr, 3000, 1024).tolist() == [0, 0, 2, 2]


def test_a_ticket_belongs_to_one_step_count():
    a, b = torch.zeros(1), torch.zeros(1)
    assert ticket_of(a) is ticket_of(a)
    assert ticket_of(a) is not ticket_of(b)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (3, 3), (0, 1), (5, 900), (0, 1000)])
def test_find_is_a_lower_bound(low, high):
    generator = torch.Generator().manual_seed(low + high)
    idx = np.sort(torch.randperm(65536, generator=generator)[:1000].numpy())
    offsets = torch.randint(0, 65536, (512,), generator=generator, dtype=torch.int32)
    offsets[:200] = torch.from_numpy(idx[:200].astype(np.int32))
    found = torch.empty(512, dtype=torch.int64)
    launch(_find, 1, torch.from_numpy(idx.astype(np.uint16)), offsets, found, low, high, BLOCK=512)
    assert found.tolist() == (low + np.searchsorted(idx[low:high], offsets.numpy())).tolist()


@pytest.mark.parametrize("runs", [1, 2, 8])
def test_halving_adds_in_the_defined_order(runs):
    x = torch.randn(1024 * runs, dtype=torch.float64, generator=oracles.rng(runs))
    out = torch.empty(runs, dtype=torch.float64)
    launch(_halve, 1, x, out, BLOCK=1024 * runs)
    expected = x.view(runs, 1024).numpy()
    while expected.shape[1] > 1:
        half = expected.shape[1] // 2
        expected = expected[:, :half] + expected[:, half:]
    assert out.tolist() == expected[:, 0].tolist()


@pytest.mark.parametrize("n", [0, 1, 1024, 1025, 1_050_000])
def test_tree_sum(n):
    x = torch.randn(n, dtype=torch.float64, generator=oracles.rng(n))
    found_inf = torch.full((1,), 5.0)
    assert float(tree_sum(x, found_inf)) == oracles.tree_sum(x.numpy())
    assert float(found_inf) == 0
    if n:
        x[-1] = float("inf")
        tree_sum(x, found_inf)
        assert float(found_inf) == 1
