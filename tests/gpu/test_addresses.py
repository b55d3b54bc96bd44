"""Tensors that begin at odd addresses give the same bits."""

import pytest
import torch
from gpu_oracles import (
    Twins,
    model_and_support,
    moved,
    off_by,
    select_topk,
)
from oracles import DTYPES, numels, take

import sparse_ft_kernels as ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_at_odd_addresses_give_the_same_bits(dtype):
    """Views that begin one element after an aligned address, compact arrays among them."""
    model, idx, ptr, chosen, generator = model_and_support("large", dtype, 0.1, "odd")
    grads = [torch.randn(t.shape, generator=generator).to(dtype) for t in model]
    n = len(idx)
    cases = [
        (
            ops.masked_adamw_,
            {
                "weights": model,
                "idx": idx,
                "ptr": ptr,
                "grad": grads,
                "exp_avg": torch.zeros(n),
                "exp_avg_sq": torch.zeros(n),
                "delta": torch.zeros(n),
                "theta0": take(model, chosen),
                "step": torch.zeros(()),
                "lr": torch.tensor(1e-2, dtype=torch.float64),
            },
        ),
        (
            ops.gather,
            {
                "grads": grads,
                "numels": numels(model),
                "idx": idx,
                "ptr": ptr,
                "out": torch.zeros(n),
            },
        ),
        (
            ops.dense_adamw_,
            {
                "weights": model,
                "grads": grads,
                "exp_avg": [torch.zeros(t.shape) for t in model],
                "exp_avg_sq": [torch.zeros(t.shape) for t in model],
                "master": [t.float() for t in model],
                "anchors": [],
                "step": torch.zeros(()),
                "lr": torch.tensor(1e-2, dtype=torch.float64),
            },
        ),
        (ops.anchor_l1_, {"grads": grads, "weights": model, "anchors": model, "coeff": 0.5}),
        (ops.digest, {"weights": model, "idx": idx, "ptr": ptr}),
        (select_topk, {"a": model, "b": grads, "k": n}),
        (
            ops.compose_,
            {
                "weights": model,
                "idx": [idx],
                "ptr": [ptr],
                "val": [torch.randn(n, generator=generator)],
                "alphas": [1.0],
                "undo": [torch.zeros(n, dtype=dtype)],
            },
        ),
    ]
    for op, arguments in cases:
        # The CPU's copies must not change: the next case begins from the same values.
        twins = Twins(**moved_all(arguments))
        twins.gpu = {name: odd(value) for name, value in twins.gpu.items()}
        twins.run(op)


def moved_all(arguments):
    return {name: moved(value, torch.device("cpu")) for name, value in arguments.items()}


def odd(value):
    if isinstance(value, torch.Tensor):
        return off_by(value, 1) if value.dim() else value
    return [odd(v) for v in value] if isinstance(value, list) else value
