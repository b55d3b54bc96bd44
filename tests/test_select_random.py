"""select_random: exact counts, uniform, seeded, the same on every backend."""

import numpy as np
import oracles
import pytest
import torch
from oracles import MODELS, flat_support, numels, tensors

from sparse_ft_kernels import TooFewError, reference, select_random


def _key(seed: int, tile: int, offset: int) -> int:
    mask = (1 << 64) - 1
    z = (seed * 0xD1342543DE82EF95 + (tile * 65536 + offset + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 33


def test_is_the_top_k_of_the_stated_hash(backend):
    sizes = [3, 70_000]
    model = [torch.zeros(n) for n in sizes]
    seed = (1 << 63) + 12345
    keys = {(0, i): _key(seed, 0, i) for i in range(3)}
    keys |= {
        (1 + i // 65536, i % 65536): _key(seed, 1 + i // 65536, i % 65536) for i in range(70_000)
    }
    best = sorted(keys, key=lambda at: (-keys[at], at))[:500]
    idx, ptr = select_random(model, k=500, seed=seed)
    found = [
        (tile, int(i))
        for tile in range(3)
        for i in idx.numpy()[int(ptr[tile]) : int(ptr[tile + 1])]
    ]
    assert found == sorted(best)


@pytest.mark.parametrize("name", MODELS)
def test_exactly_k(backend, name):
    model = tensors(MODELS[name], oracles.rng(name))
    total = sum(numels(model))
    for k in sorted({0, total // 50, total // 2, total}):
        idx, ptr = select_random(model, k=k, seed=1)
        assert len(idx) == int(ptr[-1]) == k


def test_uniform_over_tensors_and_offsets(backend):
    model = [torch.zeros(400_000), torch.zeros(100_000)]
    idx, ptr = select_random(model, k=50_000, seed=7)
    share = int(ptr[7]) / 50_000
    assert abs(share - 0.8) < 4 * (0.8 * 0.2 / 50_000) ** 0.5
    first = idx.numpy()[: int(ptr[6])].astype(np.float64) / 65536
    assert abs(first.mean() - 0.5) < 4 * (1 / 12 / len(first)) ** 0.5


def test_seeds_differ_and_repeat(backend):
    model = [torch.zeros(100_000)]
    first, again, other = (select_random(model, k=1000, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(first.int(), again.int())
    common = np.intersect1d(first.numpy(), other.numpy()).size
    assert common < 60  # about 10 are expected by chance


def test_exclude(backend):
    model = [torch.zeros(1000)]
    out = flat_support([1000], [np.arange(0, 1000, 2)])
    idx, _ = select_random(model, k=500, seed=0, exclude=out)
    assert np.array_equal(idx.numpy(), np.arange(1, 1000, 2, dtype=np.uint16))
    with pytest.raises(TooFewError, match="only 500"):
        select_random(model, k=501, seed=0, exclude=out)


@pytest.mark.parametrize("low", [0x7FFFFFF0, -1, 0x40000000])
def test_any_bound_gives_the_same_result_in_triton(monkeypatch, low):
    pytest.importorskip("triton")
    from sparse_ft_kernels import triton_backend, triton_select_random, triton_select_topk

    if why := triton_backend.unavailable(torch.device("cpu")):
        pytest.skip(why)
    model = [torch.zeros(66_000), torch.zeros(300)]
    exclude = flat_support([66_000, 300], [np.arange(0, 66_000, 3), np.arange(300)])
    eligible = 66_000 - 22_000
    expected = reference.select_random(model, 15_000, -5, *exclude)
    monkeypatch.setattr(
        triton_select_random,
        "random_bound",
        lambda k, *_: triton_select_topk.Bound(eligible + 22_300, low),
    )
    monkeypatch.setenv("SPARSE_FT_BACKEND", "triton")
    idx, ptr = select_random(model, k=15_000, seed=-5, exclude=exclude)
    oracles.assert_bits(idx, expected[0])
    assert torch.equal(ptr, expected[1])
