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


@dataclass(frozen=True)
class Target:
    """What a GPU should reach; a statement of intent until a stored line says that it does.

    Args:
        kind: "floor": our time is at most 1 / value of the floor, the time to move the bytes at the
            measured copy bandwidth. "peer": ours is faster than `peer` by value. "memory": ours
            needs at most value of the extra memory of `peer`.
        value: The number.
        peer: The provider compared with.
    """

    kind: str
    value: float
    peer: str = ""


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
        captured: Providers that never wait for the device, so a CUDA graph can replay them.
        targets: What a GPU should reach.
    """

    name: str
    conditions: str
    bytes_moved: int
    providers: dict[str, Callable[[], object]]
    verify: Callable[[], None]
    reset: Callable[[], None] = field(default=lambda: None)
    captured: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()


CPU = torch.device("cpu")
CASES: dict[str, Callable[..., Case]] = {}


def _case(function: Callable[..., Case]) -> Callable[..., Case]:
    CASES[function.__name__] = function
    return function


def _model(
    shape: str, dtype: torch.dtype, seed: int, device: torch.device, spread: float = 0.02
) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    sizes = [MODELS[shape][name] for name in sorted(MODELS[shape])]
    return [
        torch.empty(s, device=device).normal_(0, spread, generator=generator).to(dtype)
        for s in sizes
    ]


def _normal(n: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(n, device=device).normal_(0, 1e-3, generator=generator)


def _numels(model: list[Tensor]) -> list[int]:
    return [t.numel() for t in model]


def _words(shape: str, density: float, dtype: torch.dtype, numel: int) -> str:
    return f"{shape} ({numel / 1e6:.0f}M parameters), density {density:.1%}, {str(dtype)[6:]}"


@_case
def select_topk(shape: str, density: float, dtype: torch.dtype, device: torch.device = CPU) -> Case:
    """The k most changed of all parameters."""
    a, b = (_model(shape, dtype, seed, device) for seed in (0, 1))
    n = sum(_numels(a))
    k = max(1, int(density * n))

    def ours() -> object:
        return ops.select_topk(a, b, k=k)

    def scores() -> Tensor:
        return torch.cat(
            [(x.float() - y.float()).abs().view(-1) for x, y in zip(a, b, strict=True)]
        )

    def partition() -> object:
        """numpy.partition on |a − b|, then the entries that reach the threshold."""
        score = np.concatenate(
            [(x.float() - y.float()).abs().view(-1).numpy() for x, y in zip(a, b, strict=True)]
        )
        return np.partition(score, n - k)[n - k]

    def topk() -> object:
        """torch.topk on the concatenated |a − b|."""
        return torch.topk(scores(), k, sorted=False)

    def verify() -> None:
        """Every entry: those above the threshold, and of those at it the first."""
        idx, ptr, info = ops.select_topk(a, b, k=k)
        threshold = float(info[:1].to(torch.int32).view(torch.float32))
        tied = k - int(info[2])
        above = 0
        for x, y, found in zip(a, b, _flat(a, idx, ptr), strict=True):
            score = (x.float() - y.float()).abs().view(-1)
            wanted = score > threshold
            above += int(wanted.sum())
            equal = (score == threshold).nonzero().view(-1)[:tied]
            tied -= len(equal)
            wanted[equal] = True
            assert torch.equal(wanted.nonzero().view(-1), found)
        assert above == int(info[2]) < k == len(idx)
        assert tied == 0

    peers = {"numpy.partition": partition} if device.type == "cpu" else {}
    return Case(
        "select_topk",
        _words(shape, density, dtype, n),
        OPS["select_topk"].bytes_moved(a, b, k, None, None, False),
        {"sparse_ft": ours, **peers, "torch.topk": topk},
        verify,
        targets=(
            Target("floor", 1 / 1.5),
            Target("peer", 5, "torch.topk"),
            Target("memory", 0.01, "torch.topk"),
        ),
    )


@_case
def masked_adamw(
    shape: str, density: float, dtype: torch.dtype, device: torch.device = CPU
) -> Case:
    """One optimizer step of the selected entries."""
    weights, grads = (_model(shape, dtype, seed, device) for seed in (0, 1))
    n = sum(_numels(weights))
    idx, ptr = ops.select_random(weights, k=int(density * n), seed=0)
    state = [torch.zeros(len(idx), device=device) for _ in range(3)]
    ours_weights = [w.clone() for w in weights]
    theta0 = _gather(weights, idx, ptr).to(dtype)
    step = torch.zeros((), device=device)
    lr = torch.tensor(1e-3, dtype=torch.float64).to(device)
    masks = _masks(weights, idx, ptr)

    dense = [torch.nn.Parameter(w) for w in weights]
    for parameter, gradient in zip(dense, grads, strict=True):
        parameter.grad = gradient
    on_gpu = device.type != "cpu"
    optimizer = torch.optim.AdamW(dense, lr=1e-3, weight_decay=0.0, fused=True, capturable=on_gpu)

    def dense_step(*, fused: bool, masked: bool) -> Callable[[], object]:
        def run() -> object:
            # One optimizer serves all peers: all kinds of step have the same state.
            optimizer.param_groups[0].update(fused=fused, foreach=on_gpu and not fused)
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
        small = [torch.zeros(100, device=device) for _ in range(3)]
        parameter = torch.nn.Parameter(start[0].clone())
        parameter.grad = gradient * _masks(start, few_idx, few_ptr)[0]
        peer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0)
        first, count = _gather(start, few_idx, few_ptr), torch.zeros((), device=device)
        for _ in range(3):
            peer.step()
            ops.masked_adamw_(mine, few_idx, few_ptr, [gradient], *small, first, count, lr=1e-3)
        assert torch.allclose(mine[0], parameter.detach(), rtol=1e-6, atol=1e-8)

    unfused = "gradient × mask, foreach AdamW" if on_gpu else "gradient × mask, default AdamW"
    targets = [Target("floor", 0.6)] if n >= 1e9 and density >= 0.01 else []
    if density <= 0.01:
        targets.append(Target("peer", 10, "gradient × mask, fused AdamW"))
    return Case(
        "masked_adamw",
        _words(shape, density, dtype, n),
        OPS["masked_adamw_"].bytes_moved(ours_weights, idx, ptr, None, grads),
        {
            "sparse_ft": ours,
            "fused AdamW, unmasked": dense_step(fused=True, masked=False),
            "gradient × mask, fused AdamW": dense_step(fused=True, masked=True),
            unfused: dense_step(fused=False, masked=True),
        },
        verify,
        captured=("sparse_ft", "gradient × mask, fused AdamW"),
        targets=tuple(targets),
    )


@_case
def dense_adamw(shape: str, density: float, dtype: torch.dtype, device: torch.device = CPU) -> Case:
    """One optimizer step of every parameter; bf16 weights with the low halves of a split master.

    The density does not matter.
    """
    weights, grads = (_model(shape, dtype, seed, device) for seed in (0, 1))
    anchors = [w.clone() for w in weights]
    n = sum(_numels(weights))
    moments = [[torch.zeros(w.shape, device=device) for w in weights] for _ in range(2)]
    split = dtype == torch.bfloat16
    master = [torch.zeros(w.shape, dtype=torch.int16, device=device) for w in weights if split]
    step = torch.zeros((), device=device)
    lr = torch.tensor(1e-3, dtype=torch.float64).to(device)
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    for parameter, gradient in zip(parameters, grads, strict=True):
        parameter.grad = gradient
    on_gpu = device.type != "cpu"
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-3, weight_decay=0.01, fused=True, capturable=on_gpu
    )

    def ours(l1: float) -> Callable[[], object]:
        return lambda: ops.dense_adamw_(
            *(weights, grads, *moments, master, anchors if l1 else [], step),
            lr=lr,
            weight_decay=0.01,
            l1=l1,
        )

    def torchs(fused: bool) -> Callable[[], object]:
        def run() -> object:
            optimizer.param_groups[0].update(fused=fused, foreach=not fused)
            return optimizer.step()

        return run

    def verify() -> None:
        """Three steps of 10,000 entries beside torch's, in fp32."""
        mine = [weights[0].view(-1)[:10_000].float().clone()]
        gradient = grads[0].view(-1)[:10_000].float().clone()
        peer = torch.nn.Parameter(mine[0].clone())
        peer.grad = gradient
        small = [[torch.zeros_like(mine[0])] for _ in range(2)]
        count, adamw = torch.zeros((), device=device), torch.optim.AdamW([peer], lr=1e-3)
        for _ in range(3):
            adamw.step()
            ops.dense_adamw_(mine, [gradient], *small, [], [], count, lr=1e-3, weight_decay=0.01)
        assert torch.allclose(mine[0], peer.detach(), rtol=1e-6, atol=1e-7)

    name = "sparse_ft, split master" if split else "sparse_ft"
    bytes_moved = OPS["dense_adamw_"].bytes_moved(
        *(weights, grads, *moments, master, [], step, lr, 0.9, 0.999, 1e-8, 0.01, 0.0)
    )
    beside = "bf16 moments, no master" if split else "the same state"
    return Case(
        "dense_adamw",
        _words(shape, 1.0, dtype, n),
        bytes_moved,
        {
            name: ours(0.0),
            f"{name}, with L1": ours(1e-6),
            f"torch fused AdamW, {beside}": torchs(fused=True),
            f"torch foreach AdamW, {beside}": torchs(fused=False),
        },
        verify,
        captured=(name, f"{name}, with L1", f"torch fused AdamW, {beside}"),
        targets=(Target("floor", 0.85),),
    )


class _Deltas:
    """Sparse fine-tunings of a model, and the same as per-parameter positions and values."""

    def __init__(
        self, model: list[Tensor], density: float, count: int, first_seed: int = 0
    ) -> None:
        n, device = sum(_numels(model)), model[0].device
        supports = [
            ops.select_random(model, k=int(density * n), seed=first_seed + j) for j in range(count)
        ]
        self.idx, self.ptr = ([s[i] for s in supports] for i in range(2))
        self.val = [_normal(len(i), 2 + first_seed + j, device) for j, i in enumerate(self.idx)]
        self.alphas = [1.0] * count
        self.undo = [torch.empty(len(i), dtype=model[0].dtype, device=device) for i in self.idx]
        self.flat = [_flat(model, i, p) for i, p in zip(self.idx, self.ptr, strict=True)]
        self.pieces = [
            [x.to(model[0].dtype) for x in torch.split(v, [len(f) for f in flat])]
            for v, flat in zip(self.val, self.flat, strict=True)
        ]

    @property
    def new(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float], list[Tensor]]:
        return self.idx, self.ptr, self.val, self.alphas, self.undo

    @property
    def old(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.idx, self.ptr, self.undo

    def each(self, call: Callable[[Tensor, Tensor, Tensor], object], views: list[Tensor]) -> None:
        """Calls with (parameter, positions, values), for each parameter of each delta."""
        for flat, pieces in zip(self.flat, self.pieces, strict=True):
            for view, at, v in zip(views, flat, pieces, strict=True):
                call(view, at, v)

    def expected(self, start: list[Tensor]) -> list[Tensor]:
        """The model with all of them on it: one fp32 sum, one rounding."""
        out = []
        for i, w in enumerate(start):
            total = torch.zeros(w.numel(), device=w.device)
            for flat, v in zip(self.flat, self.val, strict=True):
                first = sum(len(f) for f in flat[:i])
                total[flat[i]] += v[first : first + len(flat[i])]
            moved = (w.view(-1).float() + total).to(w.dtype)
            out.append(torch.where(total == 0, w.view(-1), moved).view(w.shape))
        return out


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _composition(
    shape: str, density: float, dtype: torch.dtype, device: torch.device, count: int
) -> Case:
    weights = _model(shape, dtype, 0, device)
    start = [w.clone() for w in weights]
    deltas = _Deltas(weights, density, count)
    views = [w.view(-1) for w in weights]

    def ours() -> object:
        return ops.compose_(weights, *deltas.new)

    def index_add() -> object:
        """index_add_ per parameter, no undo."""
        return deltas.each(lambda view, at, v: view.index_add_(0, at, v), views)

    def scatter_add() -> object:
        """scatter_add_ per parameter, no undo."""
        return deltas.each(lambda view, at, v: view.scatter_add_(0, at, v), views)

    def index_put() -> object:
        """index_put_(accumulate=True) per parameter, no undo."""
        return deltas.each(lambda view, at, v: view.index_put_((at,), v, accumulate=True), views)

    def reset() -> None:
        for w, s in zip(weights, start, strict=True):
            w.copy_(s)

    def verify() -> None:
        ours()
        assert _equal(weights, deltas.expected(start))
        ops.restore_(weights, *deltas.old)
        assert _equal(weights, start)

    targets = (Target("floor", 1 / 3), Target("peer", 10, "index_add_"))
    return Case(
        "compose" if count == 1 else f"compose_{count}",
        _words(shape, density, dtype, sum(_numels(weights)))
        + ("" if count == 1 else f", {count} deltas"),
        OPS["compose_"].bytes_moved(weights, deltas.idx),
        {
            "sparse_ft, with undo": ours,
            "index_add_": index_add,
            "scatter_add_": scatter_add,
            "index_put_(accumulate)": index_put,
        },
        verify,
        reset,
        captured=("sparse_ft, with undo", "index_add_"),
        targets=targets if count == 2 and shape == "xlmr-base" else (),
    )


@_case
def compose(shape: str, density: float, dtype: torch.dtype, device: torch.device = CPU) -> Case:
    """Putting one sparse fine-tuning on a model, ready to be taken off again exactly."""
    return _composition(shape, density, dtype, device, 1)


@_case
def compose_2(shape: str, density: float, dtype: torch.dtype, device: torch.device = CPU) -> Case:
    """Putting a language and a task on a model at once, ready to be taken off again exactly."""
    return _composition(shape, density, dtype, device, 2)


@_case
def restore(shape: str, density: float, dtype: torch.dtype, device: torch.device = CPU) -> Case:
    """Taking a sparse fine-tuning off again."""
    case = compose(shape, density, dtype, device)
    weights = _model(shape, dtype, 0, device)
    start = [w.clone() for w in weights]
    n = sum(_numels(weights))
    idx, ptr = ops.select_random(weights, k=int(density * n), seed=0)
    undo = _gather(weights, idx, ptr).to(dtype)

    def ours() -> object:
        return ops.restore_(weights, [idx], [ptr], [undo])

    def verify() -> None:
        for w, at in zip(weights, _flat(weights, idx, ptr), strict=True):
            w.view(-1)[at] = 7.0
        ours()
        assert _equal(weights, start)

    return Case(
        "restore",
        case.conditions,
        case.bytes_moved,
        {
            "sparse_ft, exact": ours,
            "index_add_ of the negative, inexact": case.providers["index_add_"],
        },
        verify,
        captured=("sparse_ft, exact", "index_add_ of the negative, inexact"),
    )


@_case
def swap(shape: str, density: float, dtype: torch.dtype, device: torch.device = CPU) -> Case:
    """Exchanging the sparse fine-tuning that is on a model for another one."""
    start = _model(shape, dtype, 0, device)
    pair = [_Deltas(start, density, 1, first_seed=10 * j) for j in range(2)]
    fused, apart, peer = ([w.clone() for w in start] for _ in range(3))
    logs = {id(w): [[torch.empty_like(u) for u in d.undo] for d in pair] for w in (fused, apart)}
    saved: list[Tensor] = []
    # Which of the two is on each model; every call exchanges them.
    on = {"fused": 0, "apart": 0, "peer": 0}
    views = [w.view(-1) for w in peer]

    def arguments(weights: list[Tensor], key: str) -> tuple[tuple, tuple]:
        old, new = pair[on[key]], pair[1 - on[key]]
        mine = logs[id(weights)]
        was = (old.idx, old.ptr, mine[on[key]])
        on[key] = 1 - on[key]
        return was, (new.idx, new.ptr, new.val, new.alphas, mine[on[key]])

    def ours() -> object:
        was, new = arguments(fused, "fused")
        return ops.swap_(fused, *was, *new)

    def two() -> object:
        was, new = arguments(apart, "apart")
        ops.restore_(apart, *was)
        return ops.compose_(apart, *new)

    def put_on(delta: _Deltas) -> None:
        """Saves what is there, then index_add_, per parameter."""
        saved[:] = [view[at] for view, at in zip(views, delta.flat[0], strict=True)]
        delta.each(lambda view, at, v: view.index_add_(0, at, v), views)

    def indexed() -> object:
        """index_copy_ of the saved values, then index_add_, per parameter."""
        for view, at, v in zip(views, pair[on["peer"]].flat[0], saved, strict=True):
            view.index_copy_(0, at, v)
        on["peer"] = 1 - on["peer"]
        return put_on(pair[on["peer"]])

    for weights in (fused, apart):
        ops.compose_(weights, *pair[0].new[:4], logs[id(weights)][0])
    put_on(pair[0])

    def verify() -> None:
        ours()
        two()
        assert _equal(fused, pair[1].expected(start))
        assert _equal(apart, fused)
        ours()
        two()
        assert _equal(fused, pair[0].expected(start))
        assert _equal(apart, fused)

    return Case(
        "swap",
        _words(shape, density, dtype, sum(_numels(start))),
        OPS["swap_"].bytes_moved(start, pair[0].idx, [], [], pair[1].idx),
        {
            "sparse_ft, one pass": ours,
            "sparse_ft, restore_ and compose_": two,
            "index_copy_ and index_add_": indexed,
        },
        verify,
    )


def _flat(model: list[Tensor], idx: Tensor, ptr: Tensor) -> list[Tensor]:
    """Positions of the selected entries in each tensor, int64."""
    counts = ptr[1:] - ptr[:-1]
    ends = ptr.tolist()
    out, tile = [], 0
    for tensor in model:
        tiles = -(-tensor.numel() // ops.TILE)
        bases = torch.arange(tiles, device=idx.device) * ops.TILE
        base = torch.repeat_interleave(bases, counts[tile : tile + tiles])
        out.append(idx[ends[tile] : ends[tile + tiles]].to(torch.int64) + base)
        tile += tiles
    return out


def _gather(model: list[Tensor], idx: Tensor, ptr: Tensor) -> Tensor:
    return torch.cat(
        [t.view(-1)[at].float() for t, at in zip(model, _flat(model, idx, ptr), strict=True)]
    )


def _masks(model: list[Tensor], idx: Tensor, ptr: Tensor) -> list[Tensor]:
    masks = []
    for tensor, at in zip(model, _flat(model, idx, ptr), strict=True):
        mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
        mask[at] = True
        masks.append(mask.view(tensor.shape))
    return masks
