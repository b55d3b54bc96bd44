"""gather: compact gradients, their norm and finiteness, against numpy."""

import numpy as np
import oracles
import pytest
import torch
from oracles import DTYPES, MODELS, numels, random_support, rng, take, tensors

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
    assert float(norm_sq) == pytest.approx(float(expected.double().square().sum()), rel=1e-12)
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


def test_the_norm_has_one_order_of_summation(monkeypatch, native_library):
    generator = rng("order")
    grads = tensors([(300_000,), (7,), (65536,)], generator)
    idx, ptr, _ = random_support(numels(grads), 0.3, generator)
    found = set()
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
    monkeypatch.setenv("SPARSE_FT_BACKEND", "reference")
    found.add(float(gather(grads, numels(grads), idx, ptr, torch.empty(len(idx)))[0]))
    assert len(found) == 1
