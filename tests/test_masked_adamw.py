"""masked_adamw_ against fp64 arithmetic and torch's own AdamW; what is not selected keeps its
bits.
"""

import math

import numpy as np
import oracles
import pytest
import torch
from oracles import DTYPES, MODELS, numels, random_support, rng, take, tensors, ulps

from sparse_ft_kernels import masked_adamw_, native, reference


class State:
    """The compact state of a model's selected entries."""

    def __init__(self, weights, density, generator):
        self.weights = weights
        self.idx, self.ptr, self.chosen = random_support(numels(weights), density, generator)
        n = len(self.idx)
        dtype = weights[0].dtype if weights else torch.float32
        self.theta0 = take(weights, self.chosen).clone() if weights else torch.empty(0, dtype=dtype)
        self.exp_avg, self.exp_avg_sq, self.delta = (torch.zeros(n) for _ in range(3))
        self.step = torch.zeros(())

    def update(self, grad, **hyper):
        hyper.setdefault("lr", 1e-3)
        masked_adamw_(
            *(self.weights, self.idx, self.ptr, grad, self.exp_avg, self.exp_avg_sq),
            *(self.delta, self.theta0, self.step),
            **hyper,
        )


def reference64(m, v, d, theta0, g, t, lr, betas, eps, decay, l1=0.0, clip=1.0):
    """One step in float64."""
    g = (g + l1 * np.sign(d)) * clip
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    d = d - lr * decay * (theta0 + d)
    d = d - lr / (1 - betas[0] ** t) * m / (np.sqrt(v) / math.sqrt(1 - betas[1] ** t) + eps)
    return m, v, d


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_against_float64(backend, name, dtype, compact):
    generator = rng(name, dtype, compact)
    model = tensors(MODELS[name], generator, dtype)
    if not model and not compact:
        pytest.skip("no dense gradients without tensors")
    state = State([t.clone() for t in model], 0.1, generator)
    m = v = d = np.zeros(len(state.idx))
    hyper = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "l1": 0.01}
    for t in range(1, 4):
        grads = tensors(MODELS[name], generator, dtype)
        grad = take(grads, state.chosen).float() if model else torch.empty(0)
        # Each step from the same state, so that the bound is for one step.
        m, v, d = (x.double().numpy() for x in (state.exp_avg, state.exp_avg_sq, state.delta))
        before = state.delta.clone()
        state.update(grad if compact else grads, lr=1e-3, clip=torch.tensor(0.5), **hyper)
        m, v, d = reference64(
            *(m, v, d, state.theta0.double().numpy(), grad.double().numpy()),
            *(t, 1e-3, hyper["betas"], 1e-6, 0.1, 0.01, 0.5),
        )
        scale = np.abs(grad.numpy()) * 0.5 + np.abs(m)
        assert (np.abs(state.exp_avg.numpy() - m) <= 4 * np.spacing(np.float32(1)) * scale).all()
        assert (ulps(state.exp_avg_sq, v) <= 4).all()
        moved = (
            np.abs(d - before.double().numpy())
            + np.abs(d)
            + 1e-3 * 0.1 * np.abs(state.theta0.double().numpy())
        )
        assert (np.abs(state.delta.numpy() - d) <= 8 * np.spacing(np.float32(1)) * moved).all()
        assert float(state.step) == t
        expected = (state.theta0.float() + state.delta).to(dtype)
        oracles.assert_bits(take(state.weights, state.chosen) if model else expected, expected)
    for weight, start, flat in zip(state.weights, model, state.chosen, strict=True):
        untouched = np.setdiff1d(np.arange(start.numel()), flat)
        oracles.assert_bits(weight.reshape(-1)[untouched], start.reshape(-1)[untouched])


def test_all_backends_give_the_same_bits(monkeypatch, native_library, other_backends):
    results = []
    best = native.isa()
    for name, isa, threads in [
        *(("cpu", isa, n) for isa in ("avx512", "avx2", "portable") for n in (1, 2, 5)),
        *((name, best, 1) for name in other_backends),
    ]:
        monkeypatch.setenv("SPARSE_FT_BACKEND", name)
        monkeypatch.setattr(native, "_threads", lambda n=threads: n)
        try:
            native.set_isa(isa)
        except ValueError:
            continue
        generator = rng("same")
        for dtype in DTYPES:
            state = State(tensors(MODELS["many"], generator, dtype), 0.2, generator)
            for _ in range(3):
                state.update(
                    tensors(MODELS["many"], generator, dtype),
                    weight_decay=0.01,
                    l1=1e-4,
                    grad_scale=torch.tensor(8.0),
                    clip=torch.tensor(0.7),
                )
            results.append(
                torch.cat(
                    [
                        oracles.bits(x).long()
                        for x in (*state.weights, state.delta, state.exp_avg_sq)
                    ]
                )
            )
    native.set_isa(best)
    for i, found in enumerate(results[3:]):
        assert torch.equal(found, results[i % 3])


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.999, 0.9999, 0.999999])
def test_powers_by_squaring_are_powers(beta):
    for t in (1, 2, 3, 10, 100, 999, 1000, 4095, 65536, 123_457, 999_999, 1_000_000):
        found = reference._power(beta, t)
        # t - 1 multiplications, each with half an ulp; `**` has one ulp at most.
        assert found == pytest.approx(beta**t, rel=(t + 1) * 2.0**-53, abs=1e-300)
        # t·βᵗ/(1 − βᵗ) ≤ 1/(1 − β), so the corrections lose no more at large t than at t = 1.
        bound = 4 * 2.0**-53 / (1 - beta)
        assert 1 - found == pytest.approx(1 - beta**t, rel=bound)
        assert bound < 2.0**-24 / 100  # nothing beside the rounding to fp32 that follows


@pytest.mark.parametrize("step", [0, 1, 6, 999, 123_456, 999_999])
def test_bias_correction_at_any_step(backend, step):
    """Zero moments and an even gradient: the step is lr·m/(1 − β₁ᵗ)/(√v/√(1 − β₂ᵗ) + ε)."""
    betas = (0.99, 0.999)
    state = State([torch.zeros(16)], 1.1, rng("steps"))
    state.step.fill_(step)
    state.update(torch.ones(16), lr=1.0, betas=betas, eps=0.0)
    corrections = [1 - reference._power(beta, step + 1) for beta in betas]
    m, v = np.float32(1 - betas[0]), np.float32(1 - betas[1])
    a, c2 = np.float32(-1 / corrections[0]), np.float32(math.sqrt(corrections[1]))
    expected = torch.full((16,), float((a * m) / (np.sqrt(v) / c2)))
    oracles.assert_bits(state.delta, expected)
    assert float(state.step) == step + 1


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_torch_adamw_with_masked_gradients(backend, weight_decay):
    """Ten steps beside torch.optim.AdamW run densely on masked gradients."""
    generator = rng("torch", weight_decay)
    shapes = [(300, 211), (65537,), (5,)]
    start = tensors(shapes, generator)
    state = State([t.clone() for t in start], 0.05, generator)
    dense = [torch.nn.Parameter(t.clone()) for t in start]
    optimizer = torch.optim.AdamW(dense, lr=1e-3, weight_decay=weight_decay, foreach=False)
    masks = [torch.zeros(t.numel(), dtype=torch.bool) for t in start]
    for mask, flat in zip(masks, state.chosen, strict=True):
        mask[flat] = True
    for _ in range(10):
        grads = tensors(shapes, generator)
        for p, g, mask in zip(dense, grads, masks, strict=True):
            p.grad = g * mask.view(g.shape)
        optimizer.step()
        state.update(grads, lr=1e-3, weight_decay=weight_decay)
    found = take(state.weights, state.chosen)
    expected = take([p.detach() for p in dense], state.chosen)
    # torch rounds the weight itself ten times, we round the distance: a few ulps of the weight.
    distance = (found - expected).abs().numpy()
    assert (distance <= 16 * np.spacing(np.maximum(np.abs(expected.numpy()), 1e-2))).all()
    # torch may fuse the multiplication and addition of the second moment: one rounding less, ten
    # times.
    second = take([optimizer.state[p]["exp_avg_sq"] for p in dense], state.chosen)
    assert (ulps(state.exp_avg_sq, second.double().numpy()) <= 10).all()


def test_found_inf_freezes_everything(backend):
    generator = rng("inf")
    state = State(tensors(MODELS["many"], generator), 0.1, generator)
    state.update(tensors(MODELS["many"], generator))
    before = [
        t.clone()
        for t in (*state.weights, state.delta, state.exp_avg, state.exp_avg_sq, state.step)
    ]
    grads = tensors(MODELS["many"], generator)
    grads[3][:] = float("inf")
    state.update(grads, found_inf=torch.tensor(1.0), weight_decay=0.1)
    after = [*state.weights, state.delta, state.exp_avg, state.exp_avg_sq, state.step]
    for x, y in zip(before, after, strict=True):
        oracles.assert_bits(x, y)
    state.update(tensors(MODELS["many"], generator), found_inf=torch.tensor(0.0))
    assert float(state.step) == 2


def test_l1_is_silent_at_the_start_and_pulls_back_later(backend):
    state = State([torch.randn(1000, generator=rng("l1"))], 0.5, rng("l1"))
    zero = torch.zeros(len(state.idx))
    start = state.weights[0].clone()
    state.update(zero, l1=0.5)
    oracles.assert_bits(state.weights[0], start)
    state.delta[:] = torch.where(torch.arange(len(state.idx)) % 2 == 0, 1.0, -1.0)
    distance = state.delta.abs().sum()
    state.update(zero, l1=0.5)
    assert (state.delta.abs() < 1).all()
    assert state.delta.abs().sum() < distance


def test_a_tile_with_every_entry_selected(backend):
    generator = rng("full")
    state = State(tensors([(65536,), (131, 7)], generator), 1.1, generator)
    assert len(state.idx) == 65536 + 917
    grads = tensors([(65536,), (131, 7)], generator)
    state.update(grads)
    direct = take(grads, state.chosen)
    assert torch.allclose(state.delta, -1e-3 * direct.sign(), atol=1e-6)


def test_missing_gradient_is_zero(backend):
    generator = rng("missing")
    state = State(tensors([(70_000,), (65,)], generator), 0.1, generator)
    start = [w.clone() for w in state.weights]
    state.update([torch.empty(0), torch.ones(65)])
    oracles.assert_bits(state.weights[0], start[0])
    assert not torch.equal(state.weights[1], start[1])
