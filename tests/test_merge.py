"""merge: unions and weighted sums, entry by entry in a dictionary."""

import numpy as np
import oracles
import pytest
import torch
from oracles import DTYPES, MODELS, n_tiles, numels, random_support, rng, tensors

from sparse_ft_kernels import merge


def lengths_of(sizes):
    out = [n for s in sizes for n in [65536] * (s // 65536) + ([s % 65536] if s % 65536 else [])]
    return torch.tensor(out, dtype=torch.int32)


def entries(idx, ptr):
    counts = (ptr[1:] - ptr[:-1]).numpy()
    return (
        np.repeat(np.arange(len(counts)), counts) * 65536 + idx.numpy().astype(np.int64)
    ).tolist()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["empty", "no-elements", "one", "65537", "many"])
def test_against_a_dictionary(backend, name, dtype, count):
    generator = rng(name, dtype, count)
    sizes = numels(tensors(MODELS[name], generator))
    alphas = [1.0, -0.3, 0.7, 1.5][:count]
    parts = []
    expected: dict[int, np.float32] = {}
    for alpha in alphas:
        idx, ptr, _ = random_support(sizes, 0.02, generator)
        val = torch.randn(len(idx), generator=generator).to(dtype)
        parts.append((idx, ptr, val))
        for at, v in zip(entries(idx, ptr), val.float().numpy(), strict=True):
            expected[at] = expected.get(at, np.float32(0)) + np.float32(alpha) * v
    idx, ptr, val = merge(lengths_of(sizes), *map(list, zip(*parts, strict=True)), alphas)
    assert entries(idx, ptr) == sorted(expected)
    assert len(ptr) == n_tiles(sizes) + 1
    oracles.assert_bits(
        val, torch.tensor([expected[at] for at in sorted(expected)], dtype=torch.float32)
    )


def test_what_cancels_stays_as_zero(backend):
    idx, ptr = torch.tensor([1, 5], dtype=torch.int16).view(torch.uint16), torch.tensor([0, 2])
    val = torch.tensor([0.5, -2.0])
    out = merge(
        torch.tensor([10], dtype=torch.int32), [idx, idx], [ptr, ptr], [val, val], [1.0, -1.0]
    )
    assert out[0].tolist() == [1, 5]
    assert out[2].tolist() == [0.0, 0.0]


def test_one_delta_is_itself(backend):
    generator = rng("identity")
    idx, ptr, _ = random_support([200_003], 0.1, generator)
    val = torch.randn(len(idx), generator=generator)
    out = merge(lengths_of([200_003]), [idx], [ptr], [val], [1.0])
    oracles.assert_bits(out[0], idx)
    oracles.assert_bits(out[1], ptr)
    oracles.assert_bits(out[2], val)


def test_no_deltas(backend):
    idx, ptr, val = merge(torch.tensor([10, 3], dtype=torch.int32), [], [], [], [])
    assert len(idx) == len(val) == 0
    assert ptr.tolist() == [0, 0, 0]


def test_values_of_several_types_in_scattered_tiles(backend):
    generator = rng("several")
    sizes = [1 + 7 * i % 50 for i in range(300)] + [66_000]
    alphas = [1.0, -0.3, 0.7, 1e-3]
    parts, expected = [], {}
    for alpha, density, dtype in zip(
        alphas, (0.001, 0.05, 0.0, 0.3), (*DTYPES, *DTYPES), strict=False
    ):
        idx, ptr, _ = random_support(sizes, density, generator)
        val = torch.randn(len(idx), generator=generator).to(dtype)
        parts.append((idx, ptr, val))
        for at, v in zip(entries(idx, ptr), val.float().numpy(), strict=True):
            expected[at] = expected.get(at, np.float32(0)) + np.float32(alpha) * v
    idx, ptr, val = merge(lengths_of(sizes), *map(list, zip(*parts, strict=True)), alphas)
    assert entries(idx, ptr) == sorted(expected)
    oracles.assert_bits(val, torch.tensor([expected[at] for at in sorted(expected)]))
