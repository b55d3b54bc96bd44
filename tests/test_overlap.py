"""overlap: counts against numpy sets, products against numpy."""

import numpy as np
import oracles
import pytest
import torch
from oracles import DTYPES, MODELS, numels, random_support, rng, tensors

from sparse_ft_kernels import overlap


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_against_numpy(backend, name, dtype):
    generator = rng(name, dtype)
    sizes = numels(tensors(MODELS[name], generator))
    (idx_a, ptr_a, _), (idx_b, ptr_b, _) = (random_support(sizes, d, generator) for d in (0.3, 0.1))
    a, b = (torch.randn(len(i), generator=generator) for i in (idx_a, idx_b))
    b = b.to(dtype)
    a[::7] = 0
    counts, dots = overlap(idx_a, ptr_a, a, idx_b, ptr_b, b)
    assert counts.shape == (len(ptr_a) - 1, 2)
    for tile in range(len(ptr_a) - 1):
        in_a, in_b = (slice(int(p[tile]), int(p[tile + 1])) for p in (ptr_a, ptr_b))
        _, at_a, at_b = np.intersect1d(
            idx_a.numpy()[in_a], idx_b.numpy()[in_b], return_indices=True
        )
        x = a[in_a].numpy()[at_a].astype(np.float64)
        y = b[in_b].float().numpy()[at_b].astype(np.float64)
        assert counts[tile].tolist() == [len(x), int((x * y > 0).sum())]
        assert dots[tile].numpy() == pytest.approx([x @ y, x @ x, y @ y], rel=1e-12, abs=1e-12)
        # Bits: a's entries in runs of 1024, with zeros where b lacks one.
        for column, product in enumerate((x * y, x * x, y * y)):
            spread = np.zeros(in_a.stop - in_a.start)
            spread[at_a] = product
            exact = np.float64(sum(oracles.run_sums(spread), 0.0))
            assert dots[tile, column].numpy().tobytes() == exact.tobytes()


def test_products_of_minus_zero_sum_to_zero(backend):
    idx, ptr = torch.tensor([3, 7]).to(torch.uint16), torch.tensor([0, 2])
    minus, plus = torch.tensor([-0.0, -0.0]), torch.tensor([1.0, 2.0])
    counts, dots = overlap(idx, ptr, minus, idx, ptr, plus)
    assert counts.tolist() == [[2, 0]]
    assert dots.numpy().tobytes() == np.array([[0.0, 0.0, 5.0]]).tobytes()


def test_with_itself(backend):
    generator = rng("self")
    idx, ptr, _ = random_support([200_003], 0.1, generator)
    val = torch.randn(len(idx), generator=generator)
    counts, dots = overlap(idx, ptr, val, idx, ptr, val)
    assert int(counts[:, 0].sum()) == int(counts[:, 1].sum()) == len(idx)
    assert torch.equal(dots[:, 0], dots[:, 1])
    assert torch.equal(dots[:, 0], dots[:, 2])


@pytest.mark.parametrize("spread", [48, 400, 65_536])
def test_lists_of_every_length(backend, spread):
    """Ends of lists, whatever they are compared in blocks of: all lengths, both ends of a tile."""
    draw = np.random.default_rng(spread)
    lengths = [(m, n) for m in range(0, 41, 2 if backend == "triton" else 1) for n in (1, 7, 8, 40)]
    lists = [
        [np.sort(draw.choice(spread, k, replace=False)) + 65_536 - spread for k in pair]
        for pair in lengths
    ]
    idx_a, idx_b = (
        torch.from_numpy(np.concatenate(side).astype(np.uint16))
        for side in zip(*lists, strict=True)
    )
    ptr_a, ptr_b = (torch.tensor([0, *side]).cumsum(0) for side in zip(*lengths, strict=True))
    a, b = (torch.from_numpy(draw.standard_normal(len(x))).float() for x in (idx_a, idx_b))
    counts, dots = overlap(idx_a, ptr_a, a, idx_b, ptr_b, b)
    for tile, (x, y) in enumerate(lists):
        _, at_x, at_y = np.intersect1d(x, y, return_indices=True)
        p = a[ptr_a[tile] : ptr_a[tile + 1]].numpy()[at_x].astype(np.float64)
        q = b[ptr_b[tile] : ptr_b[tile + 1]].numpy()[at_y].astype(np.float64)
        assert counts[tile].tolist() == [len(p), int((p * q > 0).sum())]
        assert dots[tile].numpy() == pytest.approx([p @ q, p @ p, q @ q], rel=1e-12, abs=1e-12)
