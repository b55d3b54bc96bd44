"""The contract of every op: schema, argument checks, fake version and bytes moved.

A backend may rely on everything that a check has established. What an op computes is defined by
`reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tile_table import DTYPE_CODES, n_tiles

NAMESPACE = "sparse_ft"

# Of hash_pieces: the bytes of a piece, and of its hash.
HASH_PIECE = 65536
HASH_BYTES = 32

Tensors = Sequence[Tensor]


class NonFiniteError(ValueError):
    """A score is NaN or infinite.

    Args:
        tile: The first tile that holds one.
        ordinal: The position of its tensor in the list.
    """

    def __init__(self, tile: int, ordinal: int) -> None:
        self.tile = tile
        self.ordinal = ordinal
        super().__init__(
            f"select_topk: tensor {ordinal} (tile {tile}) holds NaN or infinity, so its entries "
            "cannot be ranked; "
            "repair or exclude it"
        )


class TooFewError(ValueError):
    """More entries are wanted than are eligible."""

    def __init__(self, op: str, k: int, eligible: int) -> None:
        self.k = k
        self.eligible = eligible
        super().__init__(f"{op}: k = {k} entries wanted, but only {eligible} are eligible; lower k")


@dataclass(frozen=True)
class Op:
    """One op of the kernel layer.

    Args:
        name: Its name, in torch.ops and in every backend.
        schema: Its torch schema; `(x!)` marks what it changes in place.
        check: Raises TypeError or ValueError on arguments that no backend may see.
        fake: Results of the right shape and type without data.
        bytes_moved: Bytes that it must read and write at least, from its arguments.
        mutates: Names of the arguments changed in place.
        on_host: It works on the CPU alone, wherever models lie; to force a backend that serves
            other devices does not concern it.
    """

    name: str
    schema: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    bytes_moved: Callable[..., int]
    mutates: tuple[str, ...]
    on_host: bool = False


OPS: dict[str, Op] = {}


def _mutated(schema: str) -> tuple[str, ...]:
    arguments = torch._C.parse_schema(f"{NAMESPACE}::{schema}").arguments
    return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _op(
    schema: str,
    *,
    fake: Callable[..., Any],
    bytes_moved: Callable[..., int],
    on_host: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(check: Callable[..., None]) -> Callable[..., None]:
        name = schema.split("(", 1)[0]
        OPS[name] = Op(name, schema, check, fake, bytes_moved, _mutated(schema), on_host)
        return check

    return register


# --- argument checks ------------------------------------------------------------------------------


def describe_unusable(tensor: object) -> str | None:
    """Why the kernels cannot work on a tensor, with what would help; None where they can."""
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype}); dequantise it first"
    if tensor.layout is not torch.strided:
        return (
            f"has layout {tensor.layout}; only dense (strided) tensors work: call to_dense() first"
        )
    if tensor.dtype not in DTYPE_CODES:
        return f"has dtype {tensor.dtype}; float32, bfloat16 and float16 work"
    if tensor.device.type == "meta":
        return "is on the meta device and holds no data; materialise it first"
    if not tensor.is_contiguous():
        return (
            f"is not contiguous (shape {tuple(tensor.shape)}, stride {tensor.stride()}); "
            "call contiguous() first"
        )
    return None


def _check_tensors(op: str, name: str, tensors: Tensors) -> None:
    for i, tensor in enumerate(tensors):
        if reason := describe_unusable(tensor):
            raise ValueError(f"{op}: {name}[{i}] {reason}")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{op}: {name}[0] is on {tensors[0].device} and {name}[{i}] on {tensor.device}; "
                "one call works on one device"
            )


def _check_alike(op: str, name: str, tensors: Tensors, like_name: str, like: Tensors) -> None:
    if len(tensors) != len(like):
        raise ValueError(
            f"{op}: {name} has {len(tensors)} tensors and {like_name} {len(like)}; they go in pairs"
        )
    for i, (tensor, other) in enumerate(zip(tensors, like, strict=True)):
        if tensor.shape != other.shape:
            raise ValueError(
                f"{op}: {name}[{i}] has shape {tuple(tensor.shape)}, {like_name}[{i}] has "
                f"{tuple(other.shape)}"
            )
        if tensor.device != other.device:
            raise ValueError(
                f"{op}: {name}[{i}] is on {tensor.device}, {like_name}[{i}] on {other.device}; "
                "one call works on one device"
            )


def _check_one_dtype(op: str, tensors: Tensors) -> torch.dtype:
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        raise ValueError(
            f"{op}: the weights mix {sorted(map(str, dtypes))}; make one call for each data type"
        )
    return dtypes.pop() if dtypes else torch.float32


def _check_vector(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, length: int | None, device: torch.device
) -> None:
    if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be a contiguous {dtype} vector, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
    if length is not None and tensor.shape[0] != length:
        raise ValueError(f"{op}: {name} must hold {length} values, got {tensor.shape[0]}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the other arguments on {device}")


def _check_scalar(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.dtype != dtype or tensor.numel() != 1:
        raise ValueError(
            f"{op}: {name} must be one {dtype} value, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the other arguments on {device}")


def _check_support(
    op: str, idx: Tensor, ptr: Tensor, tiles: int, device: torch.device, prefix: str = ""
) -> None:
    _check_vector(op, f"{prefix}idx", idx, torch.uint16, None, device)
    _check_vector(op, f"{prefix}ptr", ptr, torch.int64, tiles + 1, device)


def _numels(tensors: Tensors) -> list[int]:
    return [t.numel() for t in tensors]


def _device(tensors: Tensors, fallback: Tensor | None = None) -> torch.device:
    if tensors:
        return tensors[0].device
    return fallback.device if fallback is not None else torch.device("cpu")


def _dense_bytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def touched_bytes(numel: int, nnz: int, width: int, line: int = 64) -> int:
    """Bytes of the memory lines that nnz of numel values, chosen at random, touch on average."""
    if not numel:
        return 0
    return round(numel * width * (1.0 - (1.0 - min(1.0, nnz / numel)) ** (line // width)))


def line_bytes(tensor: Tensor) -> int:
    """Bytes that memory moves at once: a line of a CPU, a sector of a GPU."""
    return 64 if tensor.device.type == "cpu" else 32


# --- selection ------------------------------------------------------------------------------------


def _check_exclude(
    op: str,
    exclude_idx: Tensor | None,
    exclude_ptr: Tensor | None,
    tiles: int,
    device: torch.device,
) -> None:
    if (exclude_idx is None) != (exclude_ptr is None):
        raise ValueError(f"{op}: exclude_idx and exclude_ptr go together; one of them is missing")
    if exclude_idx is not None and exclude_ptr is not None:
        _check_support(op, exclude_idx, exclude_ptr, tiles, device, "exclude_")


def _check_k(op: str, k: int, numel: int, exclude_idx: Tensor | None) -> None:
    if k < 0:
        raise ValueError(f"{op}: k must not be negative, got {k}")
    eligible = numel - (exclude_idx.numel() if exclude_idx is not None else 0)
    if k > eligible:
        raise TooFewError(op, k, eligible)


def _fake_select(a: Tensors, k: int, ties_all: bool) -> tuple[Tensor, Tensor, Tensor]:
    device = _device(a)
    size: Any = torch.library.get_ctx().new_dynamic_size() if ties_all else k
    return (
        torch.empty(size, dtype=torch.uint16, device=device),
        torch.empty(n_tiles(_numels(a)) + 1, dtype=torch.int64, device=device),
        torch.empty(8, dtype=torch.int64, device="cpu"),
    )


@_op(
    "select_topk(Tensor[] a, Tensor[] b, int k, Tensor? exclude_idx, Tensor? exclude_ptr, bool "
    "ties_all)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda a, b, k, exclude_idx, exclude_ptr, ties_all: _fake_select(a, k, ties_all),
    bytes_moved=lambda a, b, k, *_: _dense_bytes(a) + _dense_bytes(b) + 2 * k,
)
def _select_topk(
    a: Tensors,
    b: Tensors,
    k: int,
    exclude_idx: Tensor | None,
    exclude_ptr: Tensor | None,
    ties_all: bool,
) -> None:
    _check_tensors("select_topk", "a", a)
    if b:
        _check_tensors("select_topk", "b", b)
        _check_alike("select_topk", "b", b, "a", a)
    numels = _numels(a)
    _check_exclude("select_topk", exclude_idx, exclude_ptr, n_tiles(numels), _device(a))
    _check_k("select_topk", k, sum(numels), exclude_idx)


@_op(
    "select_random(Tensor[] like, int k, int seed, Tensor? exclude_idx, Tensor? exclude_ptr)"
    " -> (Tensor, Tensor)",
    fake=lambda like, k, seed, exclude_idx, exclude_ptr: _fake_select(like, k, False)[:2],
    bytes_moved=lambda like, k, *_: 2 * k,
)
def _select_random(
    like: Tensors, k: int, seed: int, exclude_idx: Tensor | None, exclude_ptr: Tensor | None
) -> None:
    _check_tensors("select_random", "like", like)
    numels = _numels(like)
    _check_exclude("select_random", exclude_idx, exclude_ptr, n_tiles(numels), _device(like))
    _check_k("select_random", k, sum(numels), exclude_idx)


# --- the optimizer step ---------------------------------------------------------------------------


def _check_grads(op: str, grads: Tensors, numels: Sequence[int]) -> None:
    _check_tensors(op, "grads", grads)
    if len(grads) != len(numels):
        raise ValueError(f"{op}: {len(grads)} gradients for {len(numels)} tensors")
    for i, (grad, numel) in enumerate(zip(grads, numels, strict=True)):
        if grad.numel() not in (0, numel):
            raise ValueError(
                f"{op}: grads[{i}] has {grad.numel()} elements, its tensor {numel}; "
                "pass an empty tensor for a missing gradient"
            )


@_op(
    "gather(Tensor[] grads, int[] numels, Tensor idx, Tensor ptr, Tensor(a!) out,"
    " Tensor? grad_scale, bool accumulate, Tensor? delta, float l1) -> (Tensor, Tensor)",
    fake=lambda grads, numels, idx, ptr, out, *_: (
        torch.empty(1, dtype=torch.float64, device=out.device),
        torch.empty(1, dtype=torch.float32, device=out.device),
    ),
    bytes_moved=lambda grads, numels, idx, ptr, out, grad_scale, accumulate, delta, l1: (
        sum(
            touched_bytes(
                g.numel(),
                idx.numel() * g.numel() // max(1, sum(numels)),
                g.element_size(),
                line_bytes(idx),
            )
            for g in grads
        )
        + idx.numel() * (2 + 4 + 4 * accumulate + 4 * (l1 != 0))
    ),
)
def _gather(
    grads: Tensors,
    numels: Sequence[int],
    idx: Tensor,
    ptr: Tensor,
    out: Tensor,
    grad_scale: Tensor | None,
    accumulate: bool,
    delta: Tensor | None,
    l1: float,
) -> None:
    device = out.device
    if grads:
        _check_grads("gather", grads, numels)
        if grads[0].device != device:
            raise ValueError(f"gather: the gradients are on {grads[0].device}, out on {device}")
    _check_support("gather", idx, ptr, n_tiles(numels), device)
    _check_vector("gather", "out", out, torch.float32, idx.shape[0], device)
    if grad_scale is not None:
        _check_scalar("gather", "grad_scale", grad_scale, torch.float32, device)
    if delta is not None:
        _check_vector("gather", "delta", delta, torch.float32, idx.shape[0], device)
    elif l1 != 0:
        raise ValueError(f"gather: l1 = {l1} needs delta")
    _check_number("gather", "l1", l1, 0.0)


def _check_number(op: str, name: str, value: float, low: float, below: float = math.inf) -> None:
    if not low <= value < below:
        raise ValueError(f"{op}: {name} must be in [{low}, {below}), got {value}")


def _check_step(
    op: str,
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
    device: torch.device,
) -> None:
    _check_scalar(op, "step", step, torch.float32, device)
    _check_scalar(op, "lr", lr, torch.float64, device)
    for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf), ("clip", clip)):
        if scalar is not None:
            _check_scalar(op, name, scalar, torch.float32, device)


def _check_hyperparameters(
    op: str, beta1: float, beta2: float, eps: float, weight_decay: float, l1: float
) -> None:
    _check_number(op, "beta1", beta1, 0.0, 1.0)
    _check_number(op, "beta2", beta2, 0.0, 1.0)
    _check_number(op, "eps", eps, 0.0)
    _check_number(op, "weight_decay", weight_decay, 0.0)
    _check_number(op, "l1", l1, 0.0)


@_op(
    "masked_adamw_(Tensor(a!)[] weights, Tensor idx, Tensor ptr, Tensor? grad, Tensor[] grads,"
    " Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) delta, Tensor theta0, Tensor(e!) step,"
    " Tensor lr, float beta1, float beta2, float eps, float weight_decay, float l1,"
    " Tensor? grad_scale, Tensor? found_inf, Tensor? clip) -> ()",
    fake=lambda *_: None,
    bytes_moved=lambda weights, idx, ptr, grad, grads, *_: (
        idx.numel() * (2 + 6 * 4 + (weights[0].element_size() if weights else 0))
        + 2
        * touched_bytes(
            sum(_numels(weights)),
            idx.numel(),
            weights[0].element_size() if weights else 4,
            line_bytes(idx),
        )
        + (
            4 * idx.numel()
            if grad is not None
            else touched_bytes(
                sum(_numels(weights)),
                idx.numel(),
                grads[0].element_size() if grads else 4,
                line_bytes(idx),
            )
        )
    ),
)
def _masked_adamw(
    weights: Tensors,
    idx: Tensor,
    ptr: Tensor,
    grad: Tensor | None,
    grads: Tensors,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    delta: Tensor,
    theta0: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    l1: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
) -> None:
    op = "masked_adamw_"
    _check_tensors(op, "weights", weights)
    dtype = _check_one_dtype(op, weights)
    device = _device(weights, idx)
    nnz = idx.shape[0]
    _check_support(op, idx, ptr, n_tiles(_numels(weights)), device)
    if (grad is None) == (not grads):
        raise ValueError(f"{op}: give either grad (compact) or grads (dense), not both or neither")
    if grad is not None:
        _check_vector(op, "grad", grad, torch.float32, nnz, device)
    else:
        _check_grads(op, grads, _numels(weights))
        if grads[0].device != device:
            raise ValueError(
                f"{op}: the gradients are on {grads[0].device}, the weights on {device}"
            )
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("delta", delta)):
        _check_vector(op, name, state, torch.float32, nnz, device)
    _check_vector(op, "theta0", theta0, dtype, nnz, device)
    _check_step(op, step, lr, grad_scale, found_inf, clip, device)
    _check_hyperparameters(op, beta1, beta2, eps, weight_decay, l1)


def _check_master(op: str, master: Tensors, weights: Tensors, dtype: torch.dtype) -> None:
    _check_alike(op, "master", master, "weights", weights)
    for i, tensor in enumerate(master):
        if tensor.dtype != master[0].dtype or tensor.dtype not in (torch.float32, torch.int16):
            raise ValueError(
                f"{op}: master[{i}] has dtype {tensor.dtype}, master[0] {master[0].dtype}; all "
                "must be float32, or all int16 (the low halves beside bfloat16 weights)"
            )
        if tensor.layout is not torch.strided or not tensor.is_contiguous():
            raise ValueError(f"{op}: master[{i}] is not contiguous; call contiguous() first")
    if master[0].dtype == torch.int16 and dtype != torch.bfloat16:
        raise ValueError(
            f"{op}: an int16 master holds the low halves of bfloat16 weights, but these are {dtype}"
        )


def _dense_adamw_bytes(
    weights: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    master: Tensors,
    anchors: Tensors,
    *rest: Any,
) -> int:
    l1 = rest[6]
    total = _dense_bytes(grads)
    for i, grad in enumerate(grads):
        if not grad.numel():
            continue
        total += 2 * _dense_bytes([exp_avg[i], exp_avg_sq[i]])
        if master:
            total += 2 * _dense_bytes([master[i]])
        # Beside an fp32 master the weights are only written.
        once = bool(master) and master[i].dtype == torch.float32
        total += (1 if once else 2) * _dense_bytes([weights[i]])
        if l1 != 0:
            total += _dense_bytes([anchors[i]])
    return total


@_op(
    "dense_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avg,"
    " Tensor(c!)[] exp_avg_sq, Tensor(d!)[] master, Tensor[] anchors, Tensor(e!) step, Tensor lr,"
    " float beta1, float beta2, float eps, float weight_decay, float l1, Tensor? grad_scale,"
    " Tensor? found_inf, Tensor? clip) -> ()",
    fake=lambda *_: None,
    bytes_moved=_dense_adamw_bytes,
)
def _dense_adamw(
    weights: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    master: Tensors,
    anchors: Tensors,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    l1: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
) -> None:
    op = "dense_adamw_"
    _check_tensors(op, "weights", weights)
    dtype = _check_one_dtype(op, weights)
    device = _device(weights, step)
    _check_grads(op, grads, _numels(weights))
    if grads and grads[0].device != device:
        raise ValueError(f"{op}: the gradients are on {grads[0].device}, the weights on {device}")
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_tensors(op, name, state)
        _check_alike(op, name, state, "weights", weights)
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        for i, moment in enumerate(state):
            if moment.dtype == torch.float16 or moment.dtype != exp_avg[0].dtype:
                raise ValueError(
                    f"{op}: {name}[{i}] has dtype {moment.dtype}, exp_avg[0] {exp_avg[0].dtype}; "
                    "the moments must all be float32 or all bfloat16"
                )
    if master:
        _check_master(op, master, weights, dtype)
    if anchors:
        _check_tensors(op, "anchors", anchors)
        _check_alike(op, "anchors", anchors, "weights", weights)
    elif l1 != 0 and weights:
        raise ValueError(f"{op}: l1 = {l1} needs anchors")
    _check_step(op, step, lr, grad_scale, found_inf, clip, device)
    _check_hyperparameters(op, beta1, beta2, eps, weight_decay, l1)


@_op(
    "anchor_l1_(Tensor(a!)[] grads, Tensor[] weights, Tensor[] anchors, float coeff) -> Tensor",
    fake=lambda grads, weights, *_: torch.empty(1, dtype=torch.float64, device=_device(weights)),
    bytes_moved=lambda grads, weights, anchors, coeff: (
        2 * _dense_bytes(grads) + _dense_bytes(weights) + _dense_bytes(anchors)
    ),
)
def _anchor_l1(grads: Tensors, weights: Tensors, anchors: Tensors, coeff: float) -> None:
    _check_tensors("anchor_l1_", "weights", weights)
    _check_tensors("anchor_l1_", "anchors", anchors)
    _check_alike("anchor_l1_", "anchors", anchors, "weights", weights)
    if grads:
        _check_grads("anchor_l1_", grads, _numels(weights))
        if grads[0].device != weights[0].device:
            raise ValueError(
                f"anchor_l1_: the gradients are on {grads[0].device}, the weights on "
                f"{weights[0].device}"
            )
    _check_number("anchor_l1_", "coeff", coeff, 0.0)


# --- composition ----------------------------------------------------------------------------------


def _check_deltas(
    op: str,
    idx: Tensors,
    ptr: Tensors,
    tiles: int,
    device: torch.device,
    val: Tensors | None = None,
    alphas: Sequence[float] | None = None,
    prefix: str = "",
) -> None:
    if len(idx) != len(ptr):
        raise ValueError(f"{op}: {len(idx)} {prefix}idx and {len(ptr)} ptr; one of each per delta")
    for j, (i, p) in enumerate(zip(idx, ptr, strict=True)):
        _check_support(op, i, p, tiles, device, f"{prefix}delta {j} ")
    if val is not None:
        if len(val) != len(idx):
            raise ValueError(f"{op}: {len(val)} val for {len(idx)} deltas")
        for j, (i, v) in enumerate(zip(idx, val, strict=True)):
            if reason := describe_unusable(v):
                raise ValueError(f"{op}: val[{j}] {reason}")
            _check_vector(op, f"val[{j}]", v, v.dtype, i.shape[0], device)
    if alphas is not None:
        if len(alphas) != len(idx):
            raise ValueError(f"{op}: {len(alphas)} alphas for {len(idx)} deltas")
        for j, alpha in enumerate(alphas):
            if not math.isfinite(alpha):
                raise ValueError(f"{op}: alphas[{j}] must be finite, got {alpha}")


def _check_undo(
    op: str,
    undo: Tensors,
    idx: Tensors,
    dtype: torch.dtype,
    device: torch.device,
    prefix: str = "",
) -> None:
    if len(undo) != len(idx):
        raise ValueError(f"{op}: {len(undo)} {prefix}undo arrays for {len(idx)} deltas")
    for j, (u, i) in enumerate(zip(undo, idx, strict=True)):
        _check_vector(op, f"{prefix}undo[{j}]", u, dtype, i.shape[0], device)


def _compose_bytes(weights: Tensors, idx: Tensors, *_: Any) -> int:
    width = weights[0].element_size() if weights else 4
    nnz = sum(i.numel() for i in idx)
    numel = sum(_numels(weights))
    line = line_bytes(weights[0]) if weights else 64
    return nnz * (2 + 4 + width) + 2 * touched_bytes(numel, nnz, width, line)


@_op(
    "compose_(Tensor(a!)[] weights, Tensor[] idx, Tensor[] ptr, Tensor[] val, float[] alphas, "
    "Tensor(b!)[] undo)"
    " -> Tensor",
    fake=lambda weights, *_: torch.empty(2, dtype=torch.int64, device=_device(weights)),
    bytes_moved=_compose_bytes,
)
def _compose(
    weights: Tensors,
    idx: Tensors,
    ptr: Tensors,
    val: Tensors,
    alphas: Sequence[float],
    undo: Tensors,
) -> None:
    _check_tensors("compose_", "weights", weights)
    dtype = _check_one_dtype("compose_", weights)
    device = _device(weights)
    _check_deltas("compose_", idx, ptr, n_tiles(_numels(weights)), device, val, alphas)
    if undo:
        _check_undo("compose_", undo, idx, dtype, device)


@_op(
    "restore_(Tensor(a!)[] weights, Tensor[] idx, Tensor[] ptr, Tensor[] undo) -> ()",
    fake=lambda *_: None,
    # As composing, but there are no values to be read.
    bytes_moved=lambda weights, idx, *_: (
        _compose_bytes(weights, idx) - 4 * sum(i.numel() for i in idx)
    ),
)
def _restore(weights: Tensors, idx: Tensors, ptr: Tensors, undo: Tensors) -> None:
    _check_tensors("restore_", "weights", weights)
    dtype = _check_one_dtype("restore_", weights)
    device = _device(weights)
    _check_deltas("restore_", idx, ptr, n_tiles(_numels(weights)), device)
    _check_undo("restore_", undo, idx, dtype, device)


@_op(
    "swap_(Tensor(a!)[] weights, Tensor[] old_idx, Tensor[] old_ptr, Tensor[] old_undo,"
    " Tensor[] idx, Tensor[] ptr, Tensor[] val, float[] alphas, Tensor(b!)[] undo) -> Tensor",
    fake=lambda weights, *_: torch.empty(2, dtype=torch.int64, device=_device(weights)),
    # Lines that both touch move once.
    bytes_moved=lambda weights, old_idx, old_ptr, old_undo, idx, *_: (
        _compose_bytes(weights, [*old_idx, *idx]) - 4 * sum(i.numel() for i in old_idx)
    ),
)
def _swap(
    weights: Tensors,
    old_idx: Tensors,
    old_ptr: Tensors,
    old_undo: Tensors,
    idx: Tensors,
    ptr: Tensors,
    val: Tensors,
    alphas: Sequence[float],
    undo: Tensors,
) -> None:
    _check_tensors("swap_", "weights", weights)
    dtype = _check_one_dtype("swap_", weights)
    device = _device(weights)
    tiles = n_tiles(_numels(weights))
    _check_deltas("swap_", old_idx, old_ptr, tiles, device, prefix="old ")
    _check_undo("swap_", old_undo, old_idx, dtype, device, prefix="old_")
    _check_deltas("swap_", idx, ptr, tiles, device, val, alphas)
    if undo:
        _check_undo("swap_", undo, idx, dtype, device)


def _fake_merge(lengths: Tensor, idx: Tensors, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    size: Any = torch.library.get_ctx().new_dynamic_size()
    return (
        torch.empty(size, dtype=torch.uint16, device=lengths.device),
        torch.empty(lengths.shape[0] + 1, dtype=torch.int64, device=lengths.device),
        torch.empty(size, dtype=torch.float32, device=lengths.device),
    )


@_op(
    "merge(Tensor lengths, Tensor[] idx, Tensor[] ptr, Tensor[] val, float[] alphas) -> (Tensor, "
    "Tensor, Tensor)",
    fake=_fake_merge,
    bytes_moved=lambda lengths, idx, ptr, val, alphas: 2 * sum(i.numel() * 6 for i in idx),
)
def _merge(
    lengths: Tensor, idx: Tensors, ptr: Tensors, val: Tensors, alphas: Sequence[float]
) -> None:
    _check_vector("merge", "lengths", lengths, torch.int32, None, lengths.device)
    _check_deltas("merge", idx, ptr, lengths.shape[0], lengths.device, val, alphas)


def _fake_reduce(lengths: Tensor, idx: Tensors, *_: Any) -> tuple[Tensor, ...]:
    out_idx, out_ptr, total = _fake_merge(lengths, idx)
    sums = [torch.empty_like(total) for _ in range(3)]
    counts = [torch.empty_like(total, dtype=torch.int16) for _ in range(3)]
    return (out_idx, out_ptr, total, *sums, *counts)


@_op(
    "reduce(Tensor lengths, Tensor[] idx, Tensor[] ptr, Tensor[] val, float[] alphas) -> (Tensor, "
    "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_reduce,
    bytes_moved=lambda lengths, idx, ptr, val, alphas: sum(i.numel() * (6 + 24) for i in idx),
)
def _reduce(
    lengths: Tensor, idx: Tensors, ptr: Tensors, val: Tensors, alphas: Sequence[float]
) -> None:
    _check_vector("reduce", "lengths", lengths, torch.int32, None, lengths.device)
    _check_deltas("reduce", idx, ptr, lengths.shape[0], lengths.device, val, alphas)
    if len(idx) > torch.iinfo(torch.int16).max:
        raise ValueError(f"reduce: {len(idx)} deltas; at most 32767, which its counts can hold")


@_op(
    "overlap(Tensor idx_a, Tensor ptr_a, Tensor val_a, Tensor idx_b, Tensor ptr_b, Tensor val_b) "
    "-> (Tensor, Tensor)",
    fake=lambda idx_a, ptr_a, *_: (
        torch.empty(ptr_a.shape[0] - 1, 2, dtype=torch.int64, device=idx_a.device),
        torch.empty(ptr_a.shape[0] - 1, 3, dtype=torch.float64, device=idx_a.device),
    ),
    bytes_moved=lambda idx_a, ptr_a, val_a, idx_b, ptr_b, val_b: (
        6 * (idx_a.numel() + idx_b.numel())
    ),
)
def _overlap(
    idx_a: Tensor, ptr_a: Tensor, val_a: Tensor, idx_b: Tensor, ptr_b: Tensor, val_b: Tensor
) -> None:
    if ptr_a.shape[0] < 1:
        raise ValueError("overlap: ptr_a must hold at least one value")
    tiles = ptr_a.shape[0] - 1
    _check_deltas("overlap", [idx_a, idx_b], [ptr_a, ptr_b], tiles, idx_a.device, [val_a, val_b])


# --- identity and validity ------------------------------------------------------------------------


@_op(
    "digest(Tensor[] weights, Tensor idx, Tensor ptr) -> Tensor",
    fake=lambda weights, idx, ptr: torch.empty(2, dtype=torch.int64, device=idx.device),
    bytes_moved=lambda weights, idx, ptr: (
        2 * idx.numel()
        + touched_bytes(
            sum(_numels(weights)),
            idx.numel(),
            weights[0].element_size() if weights else 4,
            line_bytes(idx),
        )
    ),
)
def _digest(weights: Tensors, idx: Tensor, ptr: Tensor) -> None:
    _check_tensors("digest", "weights", weights)
    _check_support("digest", idx, ptr, n_tiles(_numels(weights)), _device(weights, idx))


@_op(
    "check_support(Tensor lengths, Tensor idx, Tensor ptr, Tensor? val) -> Tensor",
    fake=lambda lengths, *_: torch.empty(4, dtype=torch.int64, device="cpu"),
    bytes_moved=lambda lengths, idx, ptr, val: (
        2 * idx.numel() + (val.numel() * val.element_size() if val is not None else 0)
    ),
)
def _check_support_op(lengths: Tensor, idx: Tensor, ptr: Tensor, val: Tensor | None) -> None:
    _check_vector("check_support", "lengths", lengths, torch.int32, None, lengths.device)
    _check_support("check_support", idx, ptr, lengths.shape[0], lengths.device)
    if val is not None:
        if reason := describe_unusable(val):
            raise ValueError(f"check_support: val {reason}")
        _check_vector("check_support", "val", val, val.dtype, idx.shape[0], lengths.device)


def _pieces(data: Tensor) -> int:
    return -(-data.shape[0] // HASH_PIECE)


@_op(
    "hash_pieces(Tensor data) -> Tensor",
    fake=lambda data: torch.empty(_pieces(data), HASH_BYTES, dtype=torch.uint8, device="cpu"),
    bytes_moved=lambda data: data.shape[0] + HASH_BYTES * _pieces(data),
    on_host=True,
)
def _hash_pieces(data: Tensor) -> None:
    if data.device.type != "cpu":
        raise ValueError(
            f"hash_pieces: data is on {data.device}, but is hashed on the CPU; pass data.cpu()"
        )
    _check_vector("hash_pieces", "data", data, torch.uint8, None, data.device)
