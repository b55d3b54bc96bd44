"""check_support: are idx and ptr well formed, and the values finite?

A program checks one tile: its step of `ptr`, then its entries. It clamps what it reads of `ptr` to
the arrays, so one launch can check ptr, idx and values together and still reads nothing beyond
them; what entries say is looked at only where ptr turned out to be well formed.

The first fault is found by integer maxima of NONE − fault, in any order of programs: 0 is none. One
launch, and one transfer to the host, a second one where there is a fault of ptr. Moves idx, ptr and
the values, once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile_table import DTYPE_CODES
from .triton_common import Variant, block_size, launch, raw, to_f32

BLOCK = 1024

NONE = 1 << 62
_NONE = tl.constexpr(NONE)

# What the kernel reports.
STEP = tl.constexpr(0)  # NONE - the first tile whose step of ptr is wrong
TILE = tl.constexpr(1)  # NONE - the first tile that has a faulty entry
ENTRY = tl.constexpr(2)  # NONE - (8 * the first faulty entry + its fault)
ZEROS = tl.constexpr(3)
FIRST = tl.constexpr(4)  # ptr[0]
LAST = tl.constexpr(5)  # ptr[n_tiles]


@triton.jit(do_not_specialize=["tiles", "nnz"])
def _check_kernel(
    length_ptr,
    idx_ptr,
    ptr_ptr,
    val_ptr,
    report_ptr,
    tiles,
    nnz,
    HAS_VAL: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    none = tile * 0 + _NONE
    if tile == 0:
        tl.store(report_ptr + FIRST, tl.load(ptr_ptr))
        tl.store(report_ptr + LAST, tl.load(ptr_ptr + tiles))
    if tile < tiles:
        first = tl.load(ptr_ptr + tile)
        end = tl.load(ptr_ptr + tile + 1)
        length = tl.load(length_ptr + tile)
        if (end < first) | (end - first > length):
            tl.atomic_max(report_ptr + STEP, none - tile, sem="relaxed")
        first = tl.minimum(tl.maximum(first, 0), nnz)
        end = tl.minimum(tl.maximum(end, first), tl.minimum(first + length, nnz))
        zeros = tile * 0
        at = first
        while at < end:
            e = at + tl.arange(0, BLOCK)
            mask = e < end
            offset = tl.load(idx_ptr + e, mask=mask, other=0).to(tl.int32)
            behind = mask & (e > first)
            before = tl.load(idx_ptr + e - 1, mask=behind, other=0).to(tl.int32)
            fault = tl.where(mask & (offset >= length), 4, 0)
            fault = tl.where(behind & (offset <= before), 3, fault)
            if HAS_VAL:
                x = to_f32(tl.load(val_ptr + e, mask=mask, other=1), CODE)
                # NaN - NaN and inf - inf are NaN.
                fault = tl.where((fault == 0) & mask & (x - x != 0), 5, fault)
                zeros += tl.sum((mask & (x == 0)).to(tl.int64), axis=0)
            worst = tl.max(tl.where(fault > 0, none - (8 * e + fault), 0), axis=0)
            if worst > 0:
                tl.atomic_max(report_ptr + TILE, none - tile, sem="relaxed")
                tl.atomic_max(report_ptr + ENTRY, worst, sem="relaxed")
            at += BLOCK
        if zeros > 0:
            tl.atomic_add(report_ptr + ZEROS, zeros, sem="relaxed")


def check_support(lengths: Tensor, idx: Tensor, ptr: Tensor, val: Tensor | None) -> Tensor:
    """First fault of a support: code (as in csrc/sparse_ft.h), tile, entry, explicit zeros."""
    tiles, nnz = lengths.shape[0], idx.shape[0]
    report = torch.zeros(6, dtype=torch.int64, device=idx.device)
    launch(
        _check_kernel,
        max(1, tiles),
        *(lengths, idx, ptr, raw(val) if val is not None else idx, report, tiles, nnz),
        HAS_VAL=val is not None,
        CODE=DTYPE_CODES[val.dtype] if val is not None else 0,
        BLOCK=block_size(BLOCK),
    )
    step, tile, entry, zeros, first, last = report.tolist()
    if first != 0:
        return torch.tensor([1, 0, 0, 0])
    if last != nnz:
        return torch.tensor([1, max(0, tiles - 1), 0, 0])
    if step:
        wrong = NONE - step
        return torch.tensor([2, wrong, int(ptr[wrong]), 0])
    if entry:
        where, code = divmod(NONE - entry, 8)
        return torch.tensor([code, NONE - tile, where, 0])
    return torch.tensor([0, 0, 0, zeros])


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time."""
    found = []
    for name, code, element in (
        ("no values", None, "*u16"),
        ("f32", 0, "*fp32"),
        ("bf16", 1, "*i16"),
        ("f16", 2, "*fp16"),
    ):
        found.append(
            Variant(
                f"check_support {name}",
                _check_kernel,
                {
                    "length_ptr": "*i32",
                    "idx_ptr": "*u16",
                    "ptr_ptr": "*i64",
                    "val_ptr": element,
                    "report_ptr": "*i64",
                    "tiles": "i32",
                    "nnz": "i64",
                },
                {"HAS_VAL": code is not None, "CODE": code or 0, "BLOCK": BLOCK},
                hot=False,
                unaligned=("tiles", "nnz"),
            )
        )
    return found
