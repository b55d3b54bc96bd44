"""A small model and small data for the tests of training."""

import random

import numpy as np
import torch
from oracles import assert_bits
from torch import Tensor, nn

import sparse_ft as sf

ELIGIBLE = ("body.0.bias", "body.0.weight", "body.4.bias", "body.4.weight")


class Net(nn.Module):
    """A backbone with dropout and a norm that keeps running statistics, and a head.

    `head` seeds the head: two processes need not draw the same one.
    """

    base_model_prefix = "body"

    def __init__(self, dtype: torch.dtype = torch.float32, head: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(20, 50), nn.BatchNorm1d(50), nn.Tanh(), nn.Dropout(0.1), nn.Linear(50, 30)
        )
        if head is not None:
            torch.manual_seed(head)
        self.head = nn.Linear(30, 4)
        self.to(dtype)
        sf.freeze_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> None:
    for n, t in model.state_dict().items():
        if t.is_floating_point():
            assert_bits(t, before[n], n)
        else:
            assert torch.equal(t, before[n]), n


def rows(count: int = 38) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(20, generator=g), torch.randint(4, (), generator=g)) for _ in range(count)]


def noisy(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collates, and draws from every generator, as collators for masked language models do."""
    x, y = (torch.stack(parts) for parts in zip(*items, strict=True))
    x = x * (torch.rand_like(x) > 0.2) + random.random() / 10 + np.random.rand() / 10  # noqa: NPY002
    return x, y


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(x.to(dtype)).float(), y)
