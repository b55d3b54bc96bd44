"""gather: the compact fp32 gradient of the selected entries, and its squared norm.

    out = g[idx], or out + g[idx];   out = out / grad_scale;   out = out + l1 * sign(delta)
    norm_sq = the sum of out^2 in fp64, in runs of 1024 (csrc/sparse_ft.h, tree_sum)

One launch for the model and one for each level of the sum. A program takes whole runs of the
compact array, so its sums of squares are the first level; a norm that is not finite says that an
entry is not, since squares of fp32 cannot overflow fp64.

Moves an entry: the sector of g that holds it, 2 bytes of idx, 4 of out (8 when it accumulates), and
4 of delta where there is an L1 term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Tensors
from .tile_table import tile_table
from .triton_common import (
    RUN,
    Variant,
    block_size,
    constants,
    first_tiles,
    halve,
    launch,
    load,
    load_any,
    scalar,
    sign,
    store,
    tile_of,
    tree_sum,
)

BLOCK = 1024
NUM_WARPS = 8


@triton.jit
def _gather(
    e,
    mask,
    block,
    tables,
    out_ptr,
    grad_scale_ptr,
    delta_ptr,
    l1_ptr,
    HAS_GRADS: tl.constexpr,
    CODES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_L1: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    grads_ptr, code_ptr, first_ptr, idx_ptr, ptr_ptr = tables
    if HAS_GRADS:
        tile = tile_of(e, first_ptr, ptr_ptr, block)
        offset = load(idx_ptr + e, mask, MASKED).to(tl.int32)
        x = load_any(tl.load(grads_ptr + tile), offset, tl.load(code_ptr + tile), mask, CODES)
        if ACCUMULATE:
            x = load(out_ptr + e, mask, MASKED) + x
    elif ACCUMULATE:
        x = load(out_ptr + e, mask, MASKED)
    else:
        x = tl.zeros((BLOCK,), tl.float32)
    if HAS_SCALE:
        x = tl.div_rn(x, tl.load(grad_scale_ptr))
    if HAS_L1:
        x = x + sign(load(delta_ptr + e, mask, MASKED)) * tl.load(l1_ptr).to(tl.float32)
    store(out_ptr + e, x, mask, MASKED)
    if MASKED:
        x = tl.where(mask, x, 0.0)
    wide = x.to(tl.float64)
    return halve(wide * wide, BLOCK)


@triton.jit
def _gather_kernel(
    grads_ptr,
    code_ptr,
    first_ptr,
    idx_ptr,
    ptr_ptr,
    out_ptr,
    grad_scale_ptr,
    delta_ptr,
    l1_ptr,
    sums_ptr,
    nnz,
    HAS_GRADS: tl.constexpr,
    CODES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_L1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK
    e = first + tl.arange(0, BLOCK)
    tables = (grads_ptr, code_ptr, first_ptr, idx_ptr, ptr_ptr)
    if first + BLOCK <= nnz:
        sums = _gather(
            *(e, True, block, tables, out_ptr, grad_scale_ptr, delta_ptr, l1_ptr),
            *(HAS_GRADS, CODES, ACCUMULATE, HAS_SCALE, HAS_L1, False, BLOCK),
        )
    else:
        sums = _gather(
            *(e, e < nnz, block, tables, out_ptr, grad_scale_ptr, delta_ptr, l1_ptr),
            *(HAS_GRADS, CODES, ACCUMULATE, HAS_SCALE, HAS_L1, True, BLOCK),
        )
    run = first // 1024 + tl.arange(0, BLOCK // 1024)
    tl.store(sums_ptr + run, sums, mask=run * 1024 < nnz)


def gather(
    grads: Tensors,
    numels: Sequence[int],
    idx: Tensor,
    ptr: Tensor,
    out: Tensor,
    grad_scale: Tensor | None,
    accumulate: bool,
    delta: Tensor | None,
    l1: float,
) -> tuple[Tensor, Tensor]:
    """Compact gradient of the selected entries, its squared norm, and its finiteness."""
    device, nnz = out.device, out.shape[0]
    table = tile_table(grads, numels) if grads else None
    block = block_size(BLOCK)
    sums = torch.empty(-(-nnz // RUN), dtype=torch.float64, device=device)
    found_inf = torch.empty(1, dtype=torch.float32, device=device)
    if nnz:
        launch(
            _gather_kernel,
            -(-nnz // block),
            table.base if table is not None else ptr,
            table.dtype if table is not None else ptr,
            *(first_tiles(ptr, nnz, block), idx, ptr, out),
            grad_scale if grad_scale is not None else scalar(1.0, device),
            delta if delta is not None else out,
            *(constants((l1,), device), sums, nnz),
            num_warps=NUM_WARPS,
            HAS_GRADS=table is not None,
            CODES=table.codes if table is not None else 1,
            ACCUMULATE=accumulate,
            HAS_SCALE=grad_scale is not None,
            HAS_L1=l1 != 0,
            BLOCK=block,
        )
    return tree_sum(sums, found_inf), found_inf


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time."""
    return [
        Variant(
            f"gather {name}{' scale l1' if rich else ''}",
            _gather_kernel,
            {
                "grads_ptr": "*i64",
                "code_ptr": "*i32",
                "first_ptr": "*i32",
                "idx_ptr": "*u16",
                "ptr_ptr": "*i64",
                "out_ptr": "*fp32",
                "grad_scale_ptr": "*fp32",
                "delta_ptr": "*fp32",
                "l1_ptr": "*fp64",
                "sums_ptr": "*fp64",
                "nnz": "i64",
            },
            {
                "HAS_GRADS": True,
                "CODES": codes,
                "ACCUMULATE": rich,
                "HAS_SCALE": rich,
                "HAS_L1": rich,
                "BLOCK": BLOCK,
            },
            NUM_WARPS,
            unaligned=("nnz",),
        )
        for name, codes in (("f32", 1), ("bf16", 2), ("f16", 4), ("mixed", 7))
        for rich in (False, True)
    ]
