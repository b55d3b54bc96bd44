"""masked_adamw_: one AdamW step (Loshchilov and Hutter, 2019) of the selected entries of a model.

    g = grad / grad_scale;   g = g + l1 * sign(delta);   g = g * clip
    m = m + (1 - beta1) * (g - m);   v = beta2 * v + ((1 - beta2) * g) * g
    delta = delta - d * (theta0 + delta)                       d = lr * weight_decay
    delta = delta + (-a * m) / (sqrt(v) / c2 + eps)            a = lr / c1
    w = round(theta0 + delta);   step = step + 1

One launch for the model. Program p takes entries p·BLOCK … of the compact state, in whole vectors,
and finds their tiles through `ptr`; so a dense tile and a thousand nearly empty ones are the same
work. Weights and dense gradients are reached as int64 base + 16-bit offset. Entries outside the
support are never written.

Two bodies: where the entries of a block are consecutive weights (heads, whole rows, tiles selected
entirely), weights and gradients are streams too, and idx is not read; otherwise they are gathered
and scattered. Nothing lies between: an ascending gather touches each memory sector once, as a sweep
of the tile would, so a sweep would read no less and write more.

Step count, rate, scale, clip factor and overflow flag are read on the device; the last program to
finish writes the new step count. So a step waits for nothing and can be captured in a CUDA graph.

Moves an entry: 2 bytes of idx, 24 of state, one element of theta0, and the sectors of g (read) and
w (filled and written) that hold it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .contract import Tensors
from .tile_table import tile_table
from .triton_common import (
    Variant,
    block_size,
    code_of,
    constants,
    finish,
    first_tiles,
    from_f32,
    launch,
    load,
    load_any,
    raw,
    scalar,
    sign,
    store,
    ticket_of,
    tile_of,
    to_f32,
    typed,
)

BLOCK = 512
NUM_WARPS = 4


@triton.jit
def power(beta, t):
    """beta^t by squaring, in fp64: the same bits on every machine."""
    p = beta * 0 + 1
    while t > 0:
        p = tl.where((t & 1) != 0, p * beta, p)
        beta = beta * beta
        t = t >> 1
    return p


@triton.jit
def adam_scalars(step_ptr, lr_ptr, hyper_ptr):
    """The scalars of a step, formed in fp64 and rounded once.

    Args:
        step_ptr: fp32, steps taken.
        lr_ptr: fp64.
        hyper_ptr: fp64 [5]: beta1, beta2, eps, weight_decay, l1.

    Returns:
        1 − beta1, beta2, 1 − beta2, −lr / c1, c2, eps, lr, weight_decay, l1.
    """
    rounds = (tl.load(step_ptr).to(tl.float64) + 1).to(tl.int64)
    lr = tl.load(lr_ptr)
    beta1 = tl.load(hyper_ptr)
    beta2 = tl.load(hyper_ptr + 1)
    minus_a = -(lr / (1 - power(beta1, rounds)))
    c2 = tl.sqrt(1 - power(beta2, rounds))
    return (
        (1 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1 - beta2).to(tl.float32),
        minus_a.to(tl.float32),
        c2.to(tl.float32),
        tl.load(hyper_ptr + 2).to(tl.float32),
        lr,
        tl.load(hyper_ptr + 3),
        tl.load(hyper_ptr + 4).to(tl.float32),
    )


@triton.jit
def moments(g, m, v, beta1_rest, beta2, beta2_rest):
    """The first and second moment after gradient g."""
    return m + (g - m) * beta1_rest, v * beta2 + (g * beta2_rest) * g


@triton.jit
def _update(
    e,
    mask,
    block,
    tables,
    gradient,
    state,
    scalars,
    CODE: tl.constexpr,
    COMPACT: tl.constexpr,
    GRAD_CODES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_L1: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    MASKED: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    weights_ptr, first_ptr, idx_ptr, ptr_ptr = tables
    grad_ptr, grads_ptr, grads_code_ptr = gradient
    exp_avg_ptr, exp_avg_sq_ptr, delta_ptr, theta0_ptr = state
    beta1_rest, beta2, beta2_rest, minus_a, c2, eps, decay, l1, grad_scale, clip = scalars
    if DENSE:
        tile = tl.load(first_ptr + block)
        start = tl.load(idx_ptr + block * BLOCK).to(tl.int32)
        offset = tl.multiple_of(start, 8) + tl.arange(0, BLOCK)
        weights = typed(tl.load(weights_ptr + tile), CODE, True) + offset
    else:
        tile = tile_of(e, first_ptr, ptr_ptr, block)
        offset = load(idx_ptr + e, mask, MASKED).to(tl.int32)
        weights = typed(tl.load(weights_ptr + tile), CODE) + offset

    if COMPACT:
        g = load(grad_ptr + e, mask, MASKED)
    else:
        base = tl.load(grads_ptr + tile)
        code = tl.load(grads_code_ptr + tile)
        g = load_any(base, offset, code, mask, GRAD_CODES, DENSE)
    m = load(exp_avg_ptr + e, mask, MASKED)
    v = load(exp_avg_sq_ptr + e, mask, MASKED)
    delta = load(delta_ptr + e, mask, MASKED)
    theta0 = to_f32(load(theta0_ptr + e, mask, MASKED), CODE)

    if HAS_SCALE:
        g = tl.div_rn(g, grad_scale)
    if HAS_L1:
        g = g + sign(delta) * l1
    g = g * clip
    m, v = moments(g, m, v, beta1_rest, beta2, beta2_rest)
    if HAS_DECAY:
        delta = delta - (theta0 + delta) * decay
    delta = delta + tl.div_rn(m * minus_a, tl.div_rn(tl.sqrt_rn(v), c2) + eps)

    store(exp_avg_ptr + e, m, mask, MASKED)
    store(exp_avg_sq_ptr + e, v, mask, MASKED)
    store(delta_ptr + e, delta, mask, MASKED)
    store(weights, from_f32(theta0 + delta, CODE), mask, MASKED)


@triton.jit
def _masked_adamw_kernel(
    weights_ptr,
    first_ptr,
    idx_ptr,
    ptr_ptr,
    grad_ptr,
    grads_ptr,
    grads_code_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    delta_ptr,
    theta0_ptr,
    step_ptr,
    ticket_ptr,
    lr_ptr,
    hyper_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    clip_ptr,
    nnz,
    CODE: tl.constexpr,
    COMPACT: tl.constexpr,
    GRAD_CODES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_L1: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(found_inf_ptr) == 0:
        block = tl.program_id(0).to(tl.int64)
        first = block * BLOCK
        e = first + tl.arange(0, BLOCK)
        beta1_rest, beta2, beta2_rest, minus_a, c2, eps, lr, weight_decay, l1 = adam_scalars(
            step_ptr, lr_ptr, hyper_ptr
        )
        decay = (lr * weight_decay).to(tl.float32)
        grad_scale = tl.load(grad_scale_ptr)
        clip = tl.load(clip_ptr)
        full = first + BLOCK <= nnz

        dense = False
        if ALIGNED and full:
            start = tl.load(idx_ptr + first).to(tl.int32)
            last = tl.load(idx_ptr + first + BLOCK - 1).to(tl.int32)
            end = tl.load(ptr_ptr + tl.load(first_ptr + block) + 1)
            # Ascending offsets of one tile that span BLOCK are consecutive.
            dense = (last - start == BLOCK - 1) & (end >= first + BLOCK) & (start % 8 == 0)

        tables = (weights_ptr, first_ptr, idx_ptr, ptr_ptr)
        gradient = (grad_ptr, grads_ptr, grads_code_ptr)
        state = (exp_avg_ptr, exp_avg_sq_ptr, delta_ptr, theta0_ptr)
        scalars = (beta1_rest, beta2, beta2_rest, minus_a, c2, eps, decay, l1, grad_scale, clip)
        if dense:
            _update(
                *(e, True, block, tables, gradient, state, scalars),
                *(CODE, COMPACT, GRAD_CODES, HAS_SCALE, HAS_L1, HAS_DECAY, False, True, BLOCK),
            )
        elif full:
            _update(
                *(e, True, block, tables, gradient, state, scalars),
                *(CODE, COMPACT, GRAD_CODES, HAS_SCALE, HAS_L1, HAS_DECAY, False, False, BLOCK),
            )
        else:
            _update(
                *(e, e < nnz, block, tables, gradient, state, scalars),
                *(CODE, COMPACT, GRAD_CODES, HAS_SCALE, HAS_L1, HAS_DECAY, True, False, BLOCK),
            )
        finish(step_ptr, ticket_ptr)


def masked_adamw_(
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
    """One AdamW step of the selected entries; w = round(theta0 + delta)."""
    device, nnz = idx.device, idx.shape[0]
    if not nnz:
        step.add_(1 if found_inf is None else (found_inf.reshape(step.shape) == 0).to(step.dtype))
        return
    table = tile_table(weights)
    grad_table = tile_table(grads, [w.numel() for w in weights]) if grad is None else table
    block = block_size(BLOCK)
    one = scalar(1.0, device)
    launch(
        _masked_adamw_kernel,
        -(-nnz // block),
        *(table.base, first_tiles(ptr, nnz, block), idx, ptr),
        *(grad if grad is not None else delta, grad_table.base, grad_table.dtype),
        *(exp_avg, exp_avg_sq, delta, raw(theta0), step, ticket_of(step), lr),
        constants((beta1, beta2, eps, weight_decay, l1), device),
        grad_scale if grad_scale is not None else one,
        found_inf if found_inf is not None else scalar(0.0, device),
        clip if clip is not None else one,
        nnz,
        num_warps=NUM_WARPS,
        CODE=code_of(weights),
        COMPACT=grad is not None,
        GRAD_CODES=grad_table.codes,
        HAS_SCALE=grad_scale is not None,
        HAS_L1=l1 != 0,
        HAS_DECAY=weight_decay != 0,
        ALIGNED=table.aligned and grad_table.aligned,
        BLOCK=block,
    )


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time."""
    found = []
    for name, code, element in (("f32", 0, "*fp32"), ("bf16", 1, "*i16"), ("f16", 2, "*fp16")):
        for compact in (True, False):
            found.append(
                Variant(
                    f"masked_adamw {name} {'compact' if compact else 'dense'} grad",
                    _masked_adamw_kernel,
                    {
                        "weights_ptr": "*i64",
                        "first_ptr": "*i32",
                        "idx_ptr": "*u16",
                        "ptr_ptr": "*i64",
                        "grad_ptr": "*fp32",
                        "grads_ptr": "*i64",
                        "grads_code_ptr": "*i32",
                        "exp_avg_ptr": "*fp32",
                        "exp_avg_sq_ptr": "*fp32",
                        "delta_ptr": "*fp32",
                        "theta0_ptr": element,
                        "step_ptr": "*fp32",
                        "ticket_ptr": "*i32",
                        "lr_ptr": "*fp64",
                        "hyper_ptr": "*fp64",
                        "grad_scale_ptr": "*fp32",
                        "found_inf_ptr": "*fp32",
                        "clip_ptr": "*fp32",
                        "nnz": "i64",
                    },
                    {
                        "CODE": code,
                        "COMPACT": compact,
                        "GRAD_CODES": 1 << code,
                        "HAS_SCALE": not compact,
                        "HAS_L1": True,
                        "HAS_DECAY": True,
                        "ALIGNED": True,
                        "BLOCK": BLOCK,
                    },
                    NUM_WARPS,
                    unaligned=("nnz",),
                )
            )
    return found
