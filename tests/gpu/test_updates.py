"""gather, the optimizer steps and the L1 term on the GPU against the CPU, bit for bit: results,
and all that they change in place.
"""

import pytest
import torch
from gpu_oracles import (
    DENSITIES,
    REAL,
    SHAPES,
    Twins,
    model_and_support,
    same,
)
from oracles import DTYPES, flat_support, numels, rng, take, tensors

import sparse_ft_kernels as ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gather(name, dtype):
    for density in DENSITIES if name == "large" else (0.1,):
        model, idx, ptr, _, generator = model_and_support(name, dtype, density)
        twins = Twins(
            grads=model, numels=numels(model), idx=idx, ptr=ptr, out=torch.randn(len(idx))
        )
        twins.run(ops.gather)
        twins.run(ops.gather, accumulate=True)
        twins.run(
            ops.gather,
            grad_scale=torch.tensor(1024.0),
            delta=torch.randn(len(idx), generator=generator).round(),
            l1=0.125,
        )


def test_gather_of_missing_gradients_and_infinities():
    model, idx, ptr, chosen, _ = model_and_support("large", torch.float32)
    sizes = numels(model)
    missing = [torch.empty(0), *model[1:]]
    twins = Twins(numels=sizes, idx=idx, ptr=ptr, out=torch.zeros(len(idx)))
    twins.run(ops.gather, grads=missing)
    twins.run(ops.gather, grads=[], grad_scale=torch.tensor(4.0), accumulate=True)
    model[0].view(-1)[int(chosen[0][-1])] = float("inf")
    _, found_inf = twins.run(ops.gather, grads=model)
    assert float(found_inf) == 1


class Step:
    """The arguments of masked_adamw_ for some model, with its gradients left to each call."""

    def __init__(self, name, dtype, density=0.1):
        self.model, idx, ptr, self.chosen, self.generator = model_and_support(name, dtype, density)
        self.dtype, self.n = dtype, len(idx)
        state = {part: torch.zeros(self.n) for part in ("exp_avg", "exp_avg_sq", "delta")}
        theta0 = take(self.model, self.chosen)
        self.twins = Twins(
            weights=self.model, idx=idx, ptr=ptr, **state, theta0=theta0, step=torch.zeros(())
        )

    def gradients(self, compact, dtype=None):
        grads = [
            torch.randn(t.shape, generator=self.generator).to(dtype or self.dtype)
            for t in self.model
        ]
        return take(grads, self.chosen).float() if compact else grads


FULL = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "l1": 0.01}


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_masked_adamw(name, dtype, compact):
    step = Step(name, dtype)
    scale, clip, lr = (torch.tensor(x) for x in (8.0, 0.5, 1e-3))
    for _ in range(2):
        step.twins.run(
            ops.masked_adamw_,
            grad=step.gradients(compact),
            lr=lr.double(),
            grad_scale=scale,
            clip=clip,
            **FULL,
        )


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_steps_of_masked_adamw(dtype, density):
    step = Step("large", dtype, density)
    lr = torch.tensor(1e-3, dtype=torch.float64)
    for i in range(20 if REAL else 3):
        if i % 5 == 3:  # an overflow: nothing may change
            step.twins.run(
                ops.masked_adamw_,
                grad=torch.full((step.n,), float("inf")),
                lr=lr,
                found_inf=torch.tensor(1.0),
            )
        step.twins.run(
            ops.masked_adamw_,
            grad=step.gradients(i % 3 == 0, DTYPES[i % 2]),
            lr=lr * (20 - i) / 20,
            found_inf=torch.tensor(0.0),
            **(FULL if i % 2 else {}),
        )
    assert float(step.twins.gpu["step"]) == (20 if REAL else 3)


def test_masked_adamw_with_missing_and_mixed_gradients():
    step = Step("large", torch.bfloat16)
    grads = step.gradients(False)
    grads[0] = torch.empty(0)
    grads[1] = grads[1].float()
    for _ in range(2):
        step.twins.run(ops.masked_adamw_, grad=grads, lr=torch.tensor(1e-2, dtype=torch.float64))


def test_masked_adamw_of_consecutive_entries():
    """Heads and whole rows, which begin at any offset, take the body of dense blocks."""
    shapes = [(300_000,), (5, 1000), (65536,)]
    model = tensors(shapes, rng("rows"))
    chosen = [torch.zeros(n, dtype=torch.bool) for n in numels(model)]
    chosen[0][1000:9000] = True
    chosen[0][20_001:30_001] = True
    chosen[0][65_000:140_000] = True
    chosen[1][:] = True
    chosen[2][8:] = True
    flat = [c.nonzero().view(-1).numpy() for c in chosen]
    idx, ptr = flat_support(numels(model), flat)
    for dtype in DTYPES:
        weights = [t.to(dtype) for t in model]
        twins = Twins(
            weights=weights,
            idx=idx,
            ptr=ptr,
            exp_avg=torch.zeros(len(idx)),
            exp_avg_sq=torch.zeros(len(idx)),
            delta=torch.zeros(len(idx)),
            theta0=take(weights, flat),
            step=torch.zeros(()),
        )
        for i in range(3):
            grads = tensors(shapes, rng("g", i), dtype)
            twins.run(ops.masked_adamw_, grad=grads, lr=torch.tensor(1e-2, dtype=torch.float64))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("dtype", "master"),
    [
        *((dtype, kind) for dtype in DTYPES for kind in ("none", "fp32")),
        (torch.bfloat16, "split"),
    ],
    ids=str,
)
def test_dense_adamw(dtype, master, moments):
    for name in ("many", "large") if REAL else ("65537",):
        generator = rng(name, dtype, master)
        model = tensors(SHAPES[name], generator, dtype)
        kept = {
            "none": [],
            "fp32": [t.float().clone() for t in model],
            "split": [torch.zeros(t.shape, dtype=torch.int16) for t in model],
        }[master]
        twins = Twins(
            weights=model,
            exp_avg=[torch.zeros(t.shape, dtype=moments) for t in model],
            exp_avg_sq=[torch.zeros(t.shape, dtype=moments) for t in model],
            master=kept,
            step=torch.zeros(()),
        )
        start = [t.clone() for t in model]
        for i in range(5 if REAL else 2):
            grads = tensors(SHAPES[name], generator, dtype)
            if i == 1:
                grads[0] = torch.empty(0, dtype=dtype)
            twins.run(
                ops.dense_adamw_,
                grads=grads,
                anchors=start if i % 2 else [],
                lr=torch.tensor(1e-2, dtype=torch.float64),
                betas=(0.9, 0.99),
                weight_decay=0.1 * (i % 2),
                l1=0.01 * (i % 2),
                grad_scale=torch.tensor(2.0) if i % 2 else None,
                clip=torch.tensor(0.7) if i % 2 else None,
                found_inf=torch.tensor(float(i == 3)),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_anchor_l1(name, dtype):
    generator = rng(name, dtype)
    weights, anchors, grads = (tensors(SHAPES[name], generator, dtype) for _ in range(3))
    for w, a in zip(weights, anchors, strict=True):
        w.view(-1)[::3] = a.view(-1)[::3]
    same(ops.anchor_l1_, grads=grads, weights=weights, anchors=anchors, coeff=0.25)
    same(ops.anchor_l1_, grads=[], weights=weights, anchors=anchors, coeff=0.25)
