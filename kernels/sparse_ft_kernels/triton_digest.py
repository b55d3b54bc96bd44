"""digest: what identifies the values of the selected weights of a model.

    out[0] = Σ mix((t * 65536 + i + 1) * 0x9E3779B97F4A7C15 + bits * 0xD1342543DE82EF95)  mod 2^64
    out[1] = the same with the 16 bits of the weight rounded to bfloat16

over the entries (tile t, offset i), bits the 32 bits of the weight as fp32.

One launch. Program p takes entries p·BLOCK … of the support, and adds the sums of its block to the
result by two integer atomics: integers that wrap around have the same sum in every order.

Moves an entry: 2 bytes of idx and the sector of w that holds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Tensors
from .tile_table import TILE, tile_table
from .triton_common import (
    BF16,
    Variant,
    block_size,
    first_tiles,
    from_f32,
    launch,
    load,
    load_any,
    mix,
    tile_of,
)

BLOCK = 1024

_TILE = tl.constexpr(TILE)
_POSITION = tl.constexpr(0x9E3779B97F4A7C15)
_PAYLOAD = tl.constexpr(0xD1342543DE82EF95)


@triton.jit
def _digest_block(
    e,
    mask,
    block,
    idx_ptr,
    ptr_ptr,
    first_ptr,
    base_ptr,
    code_ptr,
    out_ptr,
    CODES: tl.constexpr,
    MASKED: tl.constexpr,
):
    tile = tile_of(e, first_ptr, ptr_ptr, block)
    offset = load(idx_ptr + e, mask, MASKED).to(tl.int32)
    code = tl.load(code_ptr + tile)
    x = load_any(tl.load(base_ptr + tile), offset, code, mask, CODES)
    at = (tile.to(tl.int64) * _TILE + offset + 1).to(tl.uint64) * _POSITION
    full = x.to(tl.uint32, bitcast=True).to(tl.uint64)
    half = (from_f32(x, BF16).to(tl.int32) & 0xFFFF).to(tl.uint64)
    sum_full = mix(at + full * _PAYLOAD).to(tl.int64, bitcast=True)
    sum_half = mix(at + half * _PAYLOAD).to(tl.int64, bitcast=True)
    if MASKED:
        sum_full = tl.where(mask, sum_full, 0)
        sum_half = tl.where(mask, sum_half, 0)
    tl.atomic_add(out_ptr, tl.sum(sum_full, axis=0), sem="relaxed")
    tl.atomic_add(out_ptr + 1, tl.sum(sum_half, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["nnz"])
def _digest_kernel(
    idx_ptr,
    ptr_ptr,
    first_ptr,
    base_ptr,
    code_ptr,
    out_ptr,
    nnz,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    e = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= nnz:
        _digest_block(
            *(e, tl.full([BLOCK], 1, tl.int1), block, idx_ptr, ptr_ptr, first_ptr, base_ptr),
            *(code_ptr, out_ptr, CODES, False),
        )
    else:
        _digest_block(
            *(e, e < nnz, block, idx_ptr, ptr_ptr, first_ptr, base_ptr),
            *(code_ptr, out_ptr, CODES, True),
        )


def digest(weights: Tensors, idx: Tensor, ptr: Tensor) -> Tensor:
    """Sums mod 2^64 over (position, bits) of the selected weights: fp32 bits, bf16 bits."""
    nnz = idx.shape[0]
    out = torch.zeros(2, dtype=torch.int64, device=idx.device)
    table = tile_table(weights)
    block = block_size(BLOCK)
    launch(
        _digest_kernel,
        *(-(-nnz // block), idx, ptr, first_tiles(ptr, nnz, block), table.base, table.dtype, out),
        nnz,
        CODES=table.codes,
        BLOCK=block,
    )
    return out


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time."""
    return [
        Variant(
            f"digest {name}",
            _digest_kernel,
            {
                "idx_ptr": "*u16",
                "ptr_ptr": "*i64",
                "first_ptr": "*i32",
                "base_ptr": "*i64",
                "code_ptr": "*i32",
                "out_ptr": "*i64",
                "nnz": "i64",
            },
            {"CODES": codes, "BLOCK": BLOCK},
            unaligned=("nnz",),
        )
        for name, codes in (("f32", 1), ("bf16", 2), ("mixed", 7))
    ]
