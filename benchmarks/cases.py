"""The cases: for each op its inputs, our way and the ways it is compared with.

A provider is a function that does the whole job once; what must be renewed before the next run is
its `reset`. The peers are written from their documentation; each says what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import sparse_ft_kernels as ops
from sparse_ft_kernels.contract import OPS

from .shapes import MODELS


@dataclass
class Case:
    """One op on one model.

    Args:
        name: Its name.
        conditions: Shape, density and data type in words.
        bytes_moved: Bytes that the op must move at least.
        providers: Name → the job. The first is ours.
        verify: Raises AssertionError where our result differs from an independent one.
        reset: Puts the inputs back before each run.
    """

    name: str
    conditions: str
    bytes_moved: int
    providers: dict[str, Callable[[], object]]
    verify: Callable[[], None]
    reset: Callable[[], None] = field(default=lambda: None)


CASES: dict[str, Callable[[str, float, torch.dtype], Case]] = {}


def _case(function: Callable[[str, float, torch.dtype], Case]) -> Callable[..., Case]:
    CASES[function.__name__] = function
    return function


def _model(shape: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [MODELS[shape][name] for name in sorted(MODELS[shape])]
    return [torch.empty(s).normal_(0, 0.02, generator=generator).to(dtype) for s in sizes]


def _numels(model: list[Tensor]) -> list[int]:
    return [t.numel() for t in model]


def _words(shape: str, density: float, dtype: torch.dtype, numel: int) -> str:
    return f"{shape} ({numel / 1e6:.0f}M parameters), density {density:.1%}, {str(dtype)[6:]}"


@_case
def select_topk(shape: str, density: float, dtype: torch.dtype) -> Case:
    """The k most changed of all parameters."""
    a, b = _model(shape, dtype, 0), _model(shape, dtype, 1)
    n = sum(_numels(a))
    k = max(1, int(density * n))

    def ours() -> object:
        return ops.select_topk(a, b, k=k)

    def partition() -> object:
        """numpy.partition on |a − b|, then the entries that reach the threshold."""
        score = np.concatenate(
            [(x.float() - y.float()).abs().view(-1).numpy() for x, y in zip(a, b, strict=True)]
        )
        return np.partition(score, n - k)[n - k]

    def topk() -> object:
        """torch.topk on the concatenated |a − b|."""
        score = torch.cat(
            [(x.float() - y.float()).abs().view(-1) for x, y in zip(a, b, strict=True)]
        )
        return torch.topk(score, k, sorted=False)

    def verify() -> None:
        info = ops.select_topk(a, b, k=k)[2]
        threshold = info[:1].to(torch.int32).view(torch.float32)
        assert float(threshold) == float(partition())

    return Case(
        "select_topk",
        _words(shape, density, dtype, n),
        OPS["select_topk"].bytes_moved(a, b, k, None, None, False),
        {"sparse_ft": ours, "numpy.partition": partition, "torch.topk": topk},
        verify,
    )


@_case
def masked_adamw(shape: str, density: float, dtype: torch.dtype) -> Case:
    """One optimizer step of the selected entries."""
    weights, grads = _model(shape, dtype, 0), _model(shape, dtype, 1)
    n = sum(_numels(weights))
    idx, ptr = ops.select_random(weights, k=int(density * n), seed=0)
    state = [torch.zeros(len(idx)) for _ in range(3)]
    ours_weights = [w.clone() for w in weights]
    theta0 = _gather(weights, idx, ptr).to(dtype)
    step, lr = torch.zeros(()), torch.tensor(1e-3, dtype=torch.float64)
    masks = _masks(weights, idx, ptr)

    dense = [torch.nn.Parameter(w.clone()) for w in weights]
    for parameter, gradient in zip(dense, grads, strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.AdamW(dense, lr=1e-3, weight_decay=0.0, fused=True)

    def dense_step(*, fused: bool, masked: bool) -> Callable[[], object]:
        def run() -> object:
            # One optimizer serves all peers: both kinds of step have the same state.
            optimizer.param_groups[0].update(fused=fused, foreach=False)
            if masked:
                for p, mask in zip(dense, masks, strict=True):
                    assert p.grad is not None
                    p.grad.mul_(mask)
            return optimizer.step()

        return run

    def ours() -> object:
        return ops.masked_adamw_(ours_weights, idx, ptr, grads, *state, theta0, step, lr=lr)

    def verify() -> None:
        """Three steps of 1,000 entries beside torch's AdamW on masked gradients."""
        start = [weights[0].view(-1)[:1000].float().clone()]
        mine, gradient = [start[0].clone()], grads[0].view(-1)[:1000].float().clone()
        few_idx, few_ptr = ops.select_random(start, k=100, seed=1)
        small = [torch.zeros(100) for _ in range(3)]
        parameter = torch.nn.Parameter(start[0].clone())
        parameter.grad = gradient * _masks(start, few_idx, few_ptr)[0]
        peer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0)
        first, count = _gather(start, few_idx, few_ptr), torch.zeros(())
        for _ in range(3):
            peer.step()
            ops.masked_adamw_(mine, few_idx, few_ptr, [gradient], *small, first, count, lr=1e-3)
        assert torch.allclose(mine[0], parameter.detach(), rtol=1e-6, atol=1e-8)

    bytes_moved = OPS["masked_adamw_"].bytes_moved(ours_weights, idx, ptr, None, grads)
    return Case(
        "masked_adamw",
        _words(shape, density, dtype, n),
        bytes_moved,
        {
            "sparse_ft": ours,
            "fused AdamW, unmasked": dense_step(fused=True, masked=False),
            "gradient × mask, fused AdamW": dense_step(fused=True, masked=True),
            "gradient × mask, default AdamW": dense_step(fused=False, masked=True),
        },
        verify,
    )


@_case
def compose(shape: str, density: float, dtype: torch.dtype) -> Case:
    """Putting one sparse fine-tuning on a model, ready to be taken off again exactly."""
    weights = _model(shape, dtype, 0)
    start = [w.clone() for w in weights]
    n = sum(_numels(weights))
    idx, ptr = ops.select_random(weights, k=int(density * n), seed=0)
    val = torch.empty(len(idx)).normal_(0, 1e-3, generator=torch.Generator().manual_seed(2))
    undo = torch.empty(len(idx), dtype=dtype)
    flat = _flat(weights, idx, ptr)
    pieces = [v.to(dtype) for v in torch.split(val, [len(f) for f in flat])]
    views = [w.view(-1) for w in weights]

    def ours() -> object:
        return ops.compose_(weights, [idx], [ptr], [val], [1.0], [undo])

    def index_add() -> object:
        """index_add_ per parameter, no undo."""
        for view, at, v in zip(views, flat, pieces, strict=True):
            view.index_add_(0, at, v)
        return None

    def scatter_add() -> object:
        """scatter_add_ per parameter, no undo."""
        for view, at, v in zip(views, flat, pieces, strict=True):
            view.scatter_add_(0, at, v)
        return None

    def index_put() -> object:
        """index_put_(accumulate=True) per parameter, no undo."""
        for view, at, v in zip(views, flat, pieces, strict=True):
            view.index_put_((at,), v, accumulate=True)
        return None

    def reset() -> None:
        for w, s in zip(weights, start, strict=True):
            w.copy_(s)

    def verify() -> None:
        ours()
        for w, s, at, v in zip(
            weights, start, flat, torch.split(val, [len(f) for f in flat]), strict=True
        ):
            expected = (s.view(-1)[at].float() + v).to(dtype)
            assert torch.equal(w.view(-1)[at], expected)
        ops.restore_(weights, [idx], [ptr], [undo])
        assert all(torch.equal(w, s) for w, s in zip(weights, start, strict=True))

    return Case(
        "compose",
        _words(shape, density, dtype, n),
        OPS["compose_"].bytes_moved(weights, [idx]),
        {
            "sparse_ft, with undo": ours,
            "index_add_": index_add,
            "scatter_add_": scatter_add,
            "index_put_(accumulate)": index_put,
        },
        verify,
        reset,
    )


@_case
def restore(shape: str, density: float, dtype: torch.dtype) -> Case:
    """Taking a sparse fine-tuning off again."""
    case = compose(shape, density, dtype)
    weights = _model(shape, dtype, 0)
    n = sum(_numels(weights))
    idx, ptr = ops.select_random(weights, k=int(density * n), seed=0)
    undo = _gather(weights, idx, ptr).to(dtype)

    def ours() -> object:
        return ops.restore_(weights, [idx], [ptr], [undo])

    return Case(
        "restore",
        case.conditions,
        case.bytes_moved,
        {
            "sparse_ft, exact": ours,
            "index_add_ of the negative, inexact": case.providers["index_add_"],
        },
        lambda: None,
    )


def _flat(model: list[Tensor], idx: Tensor, ptr: Tensor) -> list[Tensor]:
    counts = (ptr[1:] - ptr[:-1]).tolist()
    offsets = idx.to(torch.int64)
    out, tile, entry = [], 0, 0
    for tensor in model:
        tiles = -(-tensor.numel() // ops.TILE)
        mine = torch.tensor(counts[tile : tile + tiles], dtype=torch.int64)
        count = int(mine.sum())
        base = torch.repeat_interleave(torch.arange(tiles) * ops.TILE, mine)
        out.append(offsets[entry : entry + count] + base)
        tile, entry = tile + tiles, entry + count
    return out


def _gather(model: list[Tensor], idx: Tensor, ptr: Tensor) -> Tensor:
    return torch.cat(
        [t.view(-1)[at].float() for t, at in zip(model, _flat(model, idx, ptr), strict=True)]
    )


def _masks(model: list[Tensor], idx: Tensor, ptr: Tensor) -> list[Tensor]:
    masks = []
    for tensor, at in zip(model, _flat(model, idx, ptr), strict=True):
        mask = torch.zeros(tensor.numel(), dtype=torch.bool)
        mask[at] = True
        masks.append(mask.view(tensor.shape))
    return masks
