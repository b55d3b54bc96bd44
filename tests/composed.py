"""What the tests of composition share: a model with everything that can go wrong, deltas of it, and
what their sum must be."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from oracles import assert_bits
from torch import Tensor, nn

import sparse_ft as sf

HEADS = ("head.weight", "head.bias")


class Model(nn.Module):
    """Two tiles of embedding tied to an output, further shapes, a head and a buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(700, 100)
        self.lin = nn.Linear(100, 30)
        self.out = nn.Linear(100, 700, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.head = nn.Linear(30, 3)
        self.register_buffer("steps", torch.tensor([1.0, 2.0]))
        if tied:
            self.out.weight = self.emb.weight
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lin(self.emb(x).mean(1))) * self.scale


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def pristine(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for n, t in model.state_dict().items():
        assert_bits(t, before[n], n)


@torch.no_grad()
def made(model: nn.Module, seed: int, share: float = 0.1, size: float = 0.1) -> sf.SparseDelta:
    tuned = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    for p in tuned.parameters():
        step = torch.randn(p.shape, generator=g) * (torch.rand(p.shape, generator=g) < share)
        p.add_((step * size).to(p.dtype))
    return sf.SparseDelta.between(model, tuned, heads=HEADS, role="task")


def wanted(
    before: Mapping[str, Tensor],
    deltas: Sequence[sf.SparseDelta],
    alphas: Sequence[float],
    names: Iterable[str],
) -> dict[str, Tensor]:
    """In the canonical order, in numpy's float32, rounded once."""
    order = sorted(range(len(deltas)), key=lambda j: deltas[j].content_id)
    out = {}
    for n in names:
        acc = np.zeros(before[n].numel(), np.float32)
        for j in order:
            acc[deltas[j].indices(n).numpy()] += np.float32(alphas[j]) * deltas[j].values(n).numpy()
        flat = before[n].reshape(-1)
        after = (flat.float() + torch.from_numpy(acc)).to(flat.dtype)
        out[n] = torch.where(torch.from_numpy(acc != 0), after, flat).view(before[n].shape)
    return out
