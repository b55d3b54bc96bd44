"""anchor_l1_: the L1 term toward an anchor, for dense gradients (Ansell et al., 2022, section 3.2).

    g = round(g + coeff * sign(w - anchor));   total = the sum of |w - anchor| in fp64

One launch over all elements, a program for each piece of a tile, and short ones for the sum: runs
of 1024 elements are halved, a tile's runs are added in order, tiles are summed in runs of 1024.

Moves: w and anchor once; g once in and once out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Tensors
from .tile_table import TILE, tile_table
from .triton_common import (
    RUN,
    Variant,
    block_size,
    constants,
    from_f32,
    halve,
    launch,
    load_any,
    sign,
    tree_sum,
    typed,
)

BLOCK = 1024
NUM_WARPS = 4
RUNS = TILE // RUN  # of a tile


@triton.jit
def _store_any(base, offset, code, mask, x, CODES: tl.constexpr, ALIGNED: tl.constexpr):
    """The counterpart of load_any for one tile, whose type is a scalar."""
    if (CODES & 1) != 0:
        tl.store(typed(base, 0, ALIGNED) + offset, x, mask=mask & (code == 0))
    if (CODES & 2) != 0:
        tl.store(typed(base, 1, ALIGNED) + offset, from_f32(x, 1), mask=mask & (code == 1))
    if (CODES & 4) != 0:
        tl.store(typed(base, 2, ALIGNED) + offset, from_f32(x, 2), mask=mask & (code == 2))


@triton.jit
def _pull(
    tile,
    offset,
    mask,
    tables,
    coeff_ptr,
    CODES: tl.constexpr,
    ANCHOR_CODES: tl.constexpr,
    HAS_GRADS: tl.constexpr,
    GRAD_CODES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    weights_ptr, code_ptr, anchors_ptr, anchor_code_ptr, grads_ptr, grad_code_ptr = tables
    weights = tl.load(weights_ptr + tile)
    anchors = tl.load(anchors_ptr + tile)
    w = load_any(weights, offset, tl.load(code_ptr + tile), mask, CODES, ALIGNED)
    anchor_code = tl.load(anchor_code_ptr + tile)
    moved = w - load_any(anchors, offset, anchor_code, mask, ANCHOR_CODES, ALIGNED)
    if HAS_GRADS:
        grads = tl.load(grads_ptr + tile)
        code = tl.load(grad_code_ptr + tile)
        g = load_any(grads, offset, code, mask, GRAD_CODES, ALIGNED)
        g = g + sign(moved) * tl.load(coeff_ptr).to(tl.float32)
        _store_any(grads, offset, code, mask & (grads != 0), g, GRAD_CODES, ALIGNED)
    return tl.abs(moved).to(tl.float64)


@triton.jit
def _anchor_l1_kernel(
    weights_ptr,
    code_ptr,
    anchors_ptr,
    anchor_code_ptr,
    grads_ptr,
    grad_code_ptr,
    length_ptr,
    coeff_ptr,
    sums_ptr,
    CODES: tl.constexpr,
    ANCHOR_CODES: tl.constexpr,
    HAS_GRADS: tl.constexpr,
    GRAD_CODES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile = program // (65536 // BLOCK)
    first = (program % (65536 // BLOCK)).to(tl.int32) * BLOCK
    offset = first + tl.arange(0, BLOCK)
    length = tl.load(length_ptr + tile)
    tables = (weights_ptr, code_ptr, anchors_ptr, anchor_code_ptr, grads_ptr, grad_code_ptr)
    if first + BLOCK <= length:
        distance = _pull(
            *(tile, offset, True, tables, coeff_ptr),
            *(CODES, ANCHOR_CODES, HAS_GRADS, GRAD_CODES, ALIGNED),
        )
    else:
        mask = offset < length
        distance = _pull(
            *(tile, offset, mask, tables, coeff_ptr),
            *(CODES, ANCHOR_CODES, HAS_GRADS, GRAD_CODES, ALIGNED),
        )
        distance = tl.where(mask, distance, 0.0)
    run = tile * 64 + first // 1024 + tl.arange(0, BLOCK // 1024)
    tl.store(sums_ptr + run, halve(distance, BLOCK))


@triton.jit
def _tile_sums_kernel(sums_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """The 64 runs of each tile, added in order."""
    tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = tile < n
    total = tl.zeros((BLOCK,), tl.float64)
    for run in range(64):
        total += tl.load(sums_ptr + (tile * 64 + run), mask=mask, other=0.0)
    tl.store(out_ptr + tile, total, mask=mask)


def anchor_l1_(grads: Tensors, weights: Tensors, anchors: Tensors, coeff: float) -> Tensor:
    """g += coeff * sign(w - anchor); the sum of |w - anchor|."""
    table, anchor_table = tile_table(weights), tile_table(anchors)
    device = table.base.device
    grad_table = tile_table(grads, [w.numel() for w in weights]) if grads else table
    block = block_size(BLOCK)
    sums = torch.empty(table.n * RUNS, dtype=torch.float64, device=device)
    tile_sums = torch.empty(table.n, dtype=torch.float64, device=device)
    launch(
        _anchor_l1_kernel,
        table.n * (TILE // block),
        *(table.base, table.dtype, anchor_table.base, anchor_table.dtype),
        *(grad_table.base, grad_table.dtype, table.length, constants((coeff,), device), sums),
        num_warps=NUM_WARPS,
        CODES=table.codes,
        ANCHOR_CODES=anchor_table.codes,
        HAS_GRADS=bool(grads),
        GRAD_CODES=grad_table.codes,
        ALIGNED=table.aligned and anchor_table.aligned and grad_table.aligned,
        BLOCK=block,
    )
    tiles = block_size(128)
    launch(_tile_sums_kernel, -(-table.n // tiles), sums, tile_sums, table.n, BLOCK=tiles)
    return tree_sum(tile_sums)


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time."""
    found = [
        Variant(
            f"anchor_l1 {name}",
            _anchor_l1_kernel,
            {
                "weights_ptr": "*i64",
                "code_ptr": "*i32",
                "anchors_ptr": "*i64",
                "anchor_code_ptr": "*i32",
                "grads_ptr": "*i64",
                "grad_code_ptr": "*i32",
                "length_ptr": "*i32",
                "coeff_ptr": "*fp64",
                "sums_ptr": "*fp64",
            },
            {
                "CODES": codes,
                "ANCHOR_CODES": codes,
                "HAS_GRADS": True,
                "GRAD_CODES": codes,
                "ALIGNED": True,
                "BLOCK": BLOCK,
            },
            NUM_WARPS,
        )
        for name, codes in (("f32", 1), ("bf16", 2))
    ]
    signature = {"sums_ptr": "*fp64", "out_ptr": "*fp64", "n": "i64"}
    found.append(
        Variant("anchor_l1 tile sums", _tile_sums_kernel, signature, {"BLOCK": 128}, hot=False)
    )
    return found
