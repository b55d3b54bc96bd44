"""gather: compact gradients, their norm and finiteness, against numpy."""

import numpy as np
import oracles
import pytest
import torch
from oracles import DTYPES, MODELS, flat_support, numels, random_support, rng, take, tensors

from sparse_ft_kernels import gather, native


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_reads_the_selected_entries(backend, name, dtype):
    generator = rng(name, dtype)
    grads = tensors(MODELS[name], generator, dtype)
    idx, ptr, chosen = random_support(numels(grads), 0.1, generator)
    out = torch.full((len(idx),), float("nan"))
    norm_sq, found_inf = gather(grads, numels(grads), idx, ptr, out)
    expected = take(grads, chosen).float()
    oracles.assert_bits(out, expected)
    squares = expected.double().square().numpy()
    assert float(norm_sq) == oracles.tree_sum(squares)
    assert float(norm_sq) == pytest.approx(squares.sum(), rel=1e-12)
    assert float(found_inf) == 0


def test_accumulate_unscale_and_l1(backend):
    generator = rng("l1")
    grads = tensors(MODELS["many"], generator)
    idx, ptr, chosen = random_support(numels(grads), 0.05, generator)
    before = torch.randn(len(idx), generator=generator)
    delta = torch.randn(len(idx), generator=generator)
    delta[::3] = 0.0
    delta[1::3] *= -0.0
    out = before.clone()
    scale = torch.tensor(1024.0)
    gather(
        grads,
        numels(grads),
        idx,
        ptr,
        out,
        grad_scale=scale,
        accumulate=True,
        delta=delta,
        l1=0.125,
    )
    summed = before.numpy() + take(grads, chosen).numpy()
    expected = summed / np.float32(1024) + np.float32(0.125) * np.sign(delta.numpy())
    oracles.assert_bits(out, torch.from_numpy(expected))


def test_no_gradients_only_finishes(backend):
    idx, ptr, _ = random_support([100], 0.5, rng("finish"))
    out = torch.ones(len(idx))
    norm_sq, _ = gather([], [100], idx, ptr, out, grad_scale=torch.tensor(4.0), accumulate=True)
    assert torch.equal(out, torch.full_like(out, 0.25))
    assert float(norm_sq) == len(idx) / 16


def test_a_missing_gradient_counts_as_zero(backend):
    generator = rng("missing")
    grads = tensors([(70_000,), (500,), (65536,)], generator)
    idx, ptr, chosen = random_support(numels(grads), 0.02, generator)
    sizes = numels(grads)
    grads[0], grads[2] = torch.empty(0), torch.empty(0)
    out = torch.full((len(idx),), float("nan"))
    gather(grads, sizes, idx, ptr, out)
    zeros = [torch.zeros(70_000), grads[1], torch.zeros(65536)]
    oracles.assert_bits(out, take(zeros, chosen))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_flags_what_is_not_finite(backend, value):
    grads = [torch.randn(70_000)]
    idx, ptr, chosen = random_support([70_000], 0.01, rng("inf"))
    unselected = np.setdiff1d(np.arange(70_000), chosen[0])[0]
    grads[0][unselected] = value
    out = torch.empty(len(idx))
    assert float(gather(grads, [70_000], idx, ptr, out)[1]) == 0
    grads[0][chosen[0][-1]] = value
    assert float(gather(grads, [70_000], idx, ptr, out)[1]) == 1


@pytest.mark.parametrize("nnz", [0, 1, 2, 3, 1023, 1024, 1025, 4095, 4096, 4097, 10_000])
def test_the_norm_at_the_edges_of_runs(backend, nnz):
    generator = rng("runs", nnz)
    grads = tensors([(5000,), (3,), (9000,)], generator)
    left, chosen = nnz, []
    for grad in grads:
        chosen.append(np.arange(min(left, grad.numel())))
        left -= len(chosen[-1])
    idx, ptr = flat_support(numels(grads), chosen)
    norm_sq, _ = gather(grads, numels(grads), idx, ptr, torch.empty(nnz))
    assert float(norm_sq) == oracles.tree_sum(take(grads, chosen).double().square().numpy())


def test_the_norm_of_the_largest_numbers_is_finite(backend):
    largest = torch.full((3000,), torch.finfo(torch.float32).max)
    idx, ptr, _ = random_support([3000], 1.1, rng("largest"))
    norm_sq, found_inf = gather([largest], [3000], idx, ptr, torch.empty(3000))
    assert float(norm_sq) == pytest.approx(3000 * torch.finfo(torch.float32).max ** 2)
    assert float(found_inf) == 0


def test_the_norm_has_one_order_of_summation(monkeypatch, native_library, other_backends):
    generator = rng("order")
    # More than 1024 runs, so that the tree has three levels.
    grads = tensors([(1_000_000,), (7,), (65536,)], generator)
    idx, ptr, chosen = random_support(numels(grads), 0.99, generator)
    assert len(idx) > 1024 * 1024
    found = {oracles.tree_sum(take(grads, chosen).double().square().numpy())}
    monkeypatch.setenv("SPARSE_FT_BACKEND", "cpu")
    best = native.isa()
    for isa in ("avx512", "avx2", "portable"):
        try:
            native.set_isa(isa)
        except ValueError:
            continue
        for threads in (1, 2, 5):
            monkeypatch.setattr(native, "_threads", lambda n=threads: n)
            found.add(float(gather(grads, numels(grads), idx, ptr, torch.empty(len(idx)))[0]))
    native.set_isa(best)
    for name in other_backends:
        monkeypatch.setenv("SPARSE_FT_BACKEND", name)
        found.add(float(gather(grads, numels(grads), idx, ptr, torch.empty(len(idx)))[0]))
    assert len(found) == 1
