"""dense_adamw_: phase 1 of LT-SFT: one AdamW step (Loshchilov and Hutter, 2019) of every entry.

    x = master, or fp32(w)
    g = grad / grad_scale;   g = g + l1 * sign(x - anchor);   g = g * clip
    m = m + (1 - beta1) * (g - m);   v = beta2 * v + ((1 - beta2) * g) * g
    x = x * (1 - lr * weight_decay);   x = x + (-a * m) / (sqrt(v) / c2 + eps);   w = round(x)

One launch for the model, a program for each 1024 elements of a tile, whole tiles without masks.
Tiles of a tensor without a gradient are left alone. A split master keeps the low 16 bits of x
beside the bfloat16 weight, which is x rounded to the nearest, ties away from zero: so the two
together are x exactly, for 2 bytes instead of 4.

Moves an entry: g, the weight, the moments and the master once in (the weight only where it is or
holds the master) and all but g once out, the anchor once in where there is an L1 term: 28 bytes in
fp32, 32 with L1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Tensors
from .tile_table import TILE, tile_table
from .triton_common import (
    Variant,
    block_size,
    code_of,
    constants,
    finish,
    from_f32,
    launch,
    load,
    load_any,
    scalar,
    sign,
    store,
    ticket_of,
    to_f32,
    typed,
)
from .triton_masked_adamw import adam_scalars, moments

BLOCK = 1024
NUM_WARPS = {0: 8, 1: 4}  # by the type of the moments: four fp32 or eight bf16 values a thread

NO_MASTER = tl.constexpr(0)
FULL_MASTER = tl.constexpr(1)
SPLIT_MASTER = tl.constexpr(2)


@triton.jit
def _update(
    tile,
    offset,
    mask,
    tables,
    scalars,
    CODE: tl.constexpr,
    GRAD_CODES: tl.constexpr,
    MOMENT_CODE: tl.constexpr,
    MASTER: tl.constexpr,
    ANCHOR_CODES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_L1: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    (
        weights_ptr,
        grads_ptr,
        grads_code_ptr,
        exp_avg_ptr,
        exp_avg_sq_ptr,
        master_ptr,
        anchors_ptr,
        anchors_code_ptr,
    ) = tables
    beta1_rest, beta2, beta2_rest, minus_a, c2, eps, kept, l1, grad_scale, clip = scalars
    weights = typed(tl.load(weights_ptr + tile), CODE, ALIGNED) + offset
    exp_avg = typed(tl.load(exp_avg_ptr + tile), MOMENT_CODE, ALIGNED) + offset
    exp_avg_sq = typed(tl.load(exp_avg_sq_ptr + tile), MOMENT_CODE, ALIGNED) + offset
    grads = tl.load(grads_ptr + tile)
    g = load_any(grads, offset, tl.load(grads_code_ptr + tile), mask, GRAD_CODES, ALIGNED)
    m = to_f32(load(exp_avg, mask, MASKED), MOMENT_CODE)
    v = to_f32(load(exp_avg_sq, mask, MASKED), MOMENT_CODE)
    if MASTER == FULL_MASTER:
        master = typed(tl.load(master_ptr + tile), 0, ALIGNED) + offset
        x = load(master, mask, MASKED)
    elif MASTER == SPLIT_MASTER:
        master = typed(tl.load(master_ptr + tile), 1, ALIGNED) + offset
        high = load(weights, mask, MASKED).to(tl.int32) << 16
        x = (high + load(master, mask, MASKED).to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        x = to_f32(load(weights, mask, MASKED), CODE)

    if HAS_SCALE:
        g = tl.div_rn(g, grad_scale)
    if HAS_L1:
        anchors = tl.load(anchors_ptr + tile)
        code = tl.load(anchors_code_ptr + tile)
        g = g + sign(x - load_any(anchors, offset, code, mask, ANCHOR_CODES, ALIGNED)) * l1
    g = g * clip
    m, v = moments(g, m, v, beta1_rest, beta2, beta2_rest)
    if HAS_DECAY:
        x = x * kept
    x = x + tl.div_rn(m * minus_a, tl.div_rn(tl.sqrt_rn(v), c2) + eps)

    store(exp_avg, from_f32(m, MOMENT_CODE), mask, MASKED)
    store(exp_avg_sq, from_f32(v, MOMENT_CODE), mask, MASKED)
    if MASTER == SPLIT_MASTER:
        bits = x.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        store(master, (bits - (high << 16)).to(tl.int16), mask, MASKED)
        store(weights, high.to(tl.int16), mask, MASKED)
    else:
        if MASTER == FULL_MASTER:
            store(master, x, mask, MASKED)
        store(weights, from_f32(x, CODE), mask, MASKED)


@triton.jit
def _dense_adamw_kernel(
    weights_ptr,
    length_ptr,
    grads_ptr,
    grads_code_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    master_ptr,
    anchors_ptr,
    anchors_code_ptr,
    step_ptr,
    ticket_ptr,
    lr_ptr,
    hyper_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    clip_ptr,
    CODE: tl.constexpr,
    GRAD_CODES: tl.constexpr,
    MOMENT_CODE: tl.constexpr,
    MASTER: tl.constexpr,
    ANCHOR_CODES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_L1: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(found_inf_ptr) == 0:
        program = tl.program_id(0).to(tl.int64)
        tile = program // (65536 // BLOCK)
        first = (program % (65536 // BLOCK)).to(tl.int32) * BLOCK
        offset = first + tl.arange(0, BLOCK)
        length = tl.load(length_ptr + tile)
        beta1_rest, beta2, beta2_rest, minus_a, c2, eps, lr, weight_decay, l1 = adam_scalars(
            step_ptr, lr_ptr, hyper_ptr
        )
        tables = (
            weights_ptr,
            grads_ptr,
            grads_code_ptr,
            exp_avg_ptr,
            exp_avg_sq_ptr,
            master_ptr,
            anchors_ptr,
            anchors_code_ptr,
        )
        kept = (1 - lr * weight_decay).to(tl.float32)
        grad_scale = tl.load(grad_scale_ptr)
        clip = tl.load(clip_ptr)
        scalars = (beta1_rest, beta2, beta2_rest, minus_a, c2, eps, kept, l1, grad_scale, clip)
        if tl.load(grads_ptr + tile) != 0:
            if first + BLOCK <= length:
                _update(
                    *(tile, offset, True, tables, scalars),
                    *(CODE, GRAD_CODES, MOMENT_CODE, MASTER, ANCHOR_CODES),
                    *(HAS_SCALE, HAS_L1, HAS_DECAY, ALIGNED, False),
                )
            elif first < length:
                _update(
                    *(tile, offset, offset < length, tables, scalars),
                    *(CODE, GRAD_CODES, MOMENT_CODE, MASTER, ANCHOR_CODES),
                    *(HAS_SCALE, HAS_L1, HAS_DECAY, ALIGNED, True),
                )
        finish(step_ptr, ticket_ptr)


def dense_adamw_(
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
    """One AdamW step of every tensor that has a gradient."""
    device = step.device
    table = tile_table(weights)
    if not table.n:
        step.add_(1 if found_inf is None else (found_inf.reshape(step.shape) == 0).to(step.dtype))
        return
    grad_table = tile_table(grads, [w.numel() for w in weights])
    averages, squares = tile_table(exp_avg), tile_table(exp_avg_sq)
    split = bool(master) and master[0].dtype is torch.int16
    # The table knows floating types; 16 bits are 16 bits.
    low = [t.view(torch.bfloat16) for t in master] if split else master
    masters = tile_table(low) if master else table
    anchor_table = tile_table(anchors) if anchors else table
    block = block_size(BLOCK)
    one = scalar(1.0, device)
    launch(
        _dense_adamw_kernel,
        table.n * (TILE // block),
        *(table.base, table.length, grad_table.base, grad_table.dtype),
        *(averages.base, squares.base, masters.base, anchor_table.base, anchor_table.dtype),
        *(step, ticket_of(step), lr),
        constants((beta1, beta2, eps, weight_decay, l1), device),
        grad_scale if grad_scale is not None else one,
        found_inf if found_inf is not None else scalar(0.0, device),
        clip if clip is not None else one,
        num_warps=NUM_WARPS[code_of(exp_avg)],
        CODE=code_of(weights),
        GRAD_CODES=grad_table.codes,
        MOMENT_CODE=code_of(exp_avg),
        MASTER=(2 if split else 1) if master else 0,
        ANCHOR_CODES=anchor_table.codes,
        HAS_SCALE=grad_scale is not None,
        HAS_L1=l1 != 0,
        HAS_DECAY=weight_decay != 0,
        ALIGNED=all(
            t.aligned for t in (table, grad_table, averages, squares, masters, anchor_table)
        ),
        BLOCK=block,
    )


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time."""
    return [
        Variant(
            f"dense_adamw {name}",
            _dense_adamw_kernel,
            {
                "weights_ptr": "*i64",
                "length_ptr": "*i32",
                "grads_ptr": "*i64",
                "grads_code_ptr": "*i32",
                "exp_avg_ptr": "*i64",
                "exp_avg_sq_ptr": "*i64",
                "master_ptr": "*i64",
                "anchors_ptr": "*i64",
                "anchors_code_ptr": "*i32",
                "step_ptr": "*fp32",
                "ticket_ptr": "*i32",
                "lr_ptr": "*fp64",
                "hyper_ptr": "*fp64",
                "grad_scale_ptr": "*fp32",
                "found_inf_ptr": "*fp32",
                "clip_ptr": "*fp32",
            },
            {
                "CODE": code,
                "GRAD_CODES": 1 << code,
                "MOMENT_CODE": moment,
                "MASTER": master,
                "ANCHOR_CODES": 1 << code,
                "HAS_SCALE": False,
                "HAS_L1": True,
                "HAS_DECAY": True,
                "ALIGNED": True,
                "BLOCK": BLOCK,
            },
            NUM_WARPS[moment],
        )
        for name, code, moment, master in (
            ("f32", 0, 0, 0),
            ("bf16", 1, 0, 0),
            ("bf16 f32 master", 1, 0, 1),
            ("bf16 split master", 1, 0, 2),
            ("bf16 split master bf16 moments", 1, 1, 2),
        )
    ]
