"""overlap: what two supports have in common, per tile.

    counts[t] = entries in both; of those, with the same sign (both > 0 or both < 0)
    dots[t] = Σ a·b, Σ a², Σ b² over the entries in both, in binary64

A program works on one tile. It takes the entries of a in the tile in runs of 1024, looks each up in
b by binary search among b's entries of the tile, halves the products of the run (+0 where b lacks
the entry) and adds the sums of the runs in order from +0: the order that csrc/sparse_ft.h defines.
The products are exact in binary64. A run without common entries is passed over: it would add +0.

One launch; the host waits for nothing. Moves an entry of a: idx, and its value where b has it; of
b: what the searches touch, from the first-level cache but for the first time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile_table import DTYPE_CODES
from .triton_common import RUN, Variant, halve, launch, raw, to_f32
from .triton_compose import smaller

_RUN = tl.constexpr(RUN)


@triton.jit
def _overlap_kernel(
    idx_a_ptr,
    ptr_a_ptr,
    val_a_ptr,
    idx_b_ptr,
    ptr_b_ptr,
    val_b_ptr,
    counts_ptr,
    dots_ptr,
    CODE_A: tl.constexpr,
    CODE_B: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    first = tl.load(ptr_a_ptr + tile)
    end_a = tl.load(ptr_a_ptr + tile + 1)
    first_b = tl.load(ptr_b_ptr + tile)
    length_b = (tl.load(ptr_b_ptr + tile + 1) - first_b).to(tl.int32)
    both = tile * 0
    same_sign = tile * 0
    ab = tl.full([1], 0, tl.float64)
    aa = tl.full([1], 0, tl.float64)
    bb = tl.full([1], 0, tl.float64)
    while (first < end_a) & (length_b > 0):
        e = first + tl.arange(0, _RUN)
        mask = e < end_a
        offset = tl.load(idx_a_ptr + e, mask=mask, other=0).to(tl.int32)
        before = smaller(idx_b_ptr + first_b, length_b, length_b, offset)
        inside = mask & (before < length_b)
        at = first_b + before
        there = tl.load(idx_b_ptr + at, mask=inside, other=0).to(tl.int32)
        found = inside & (there == offset)
        n = tl.sum(found.to(tl.int64), axis=0)
        if n > 0:
            a = to_f32(tl.load(val_a_ptr + e, mask=found, other=0), CODE_A)
            b = to_f32(tl.load(val_b_ptr + at, mask=found, other=0), CODE_B)
            same = ((a > 0) & (b > 0)) | ((a < 0) & (b < 0))
            same_sign += tl.sum(same.to(tl.int64), axis=0)
            a = a.to(tl.float64)
            b = b.to(tl.float64)
            ab += halve(a * b, _RUN)
            aa += halve(a * a, _RUN)
            bb += halve(b * b, _RUN)
        both += n
        first += _RUN
    tl.store(counts_ptr + 2 * tile, both)
    tl.store(counts_ptr + 2 * tile + 1, same_sign)
    one = tl.arange(0, 1)
    tl.store(dots_ptr + 3 * tile + one, ab)
    tl.store(dots_ptr + 3 * tile + 1 + one, aa)
    tl.store(dots_ptr + 3 * tile + 2 + one, bb)


def overlap(
    idx_a: Tensor, ptr_a: Tensor, val_a: Tensor, idx_b: Tensor, ptr_b: Tensor, val_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Per tile: entries in both and with equal sign; a.b, a.a and b.b over the entries in both."""
    tiles = ptr_a.shape[0] - 1
    counts = torch.empty(tiles, 2, dtype=torch.int64, device=idx_a.device)
    dots = torch.empty(tiles, 3, dtype=torch.float64, device=idx_a.device)
    launch(
        _overlap_kernel,
        *(tiles, idx_a, ptr_a, raw(val_a), idx_b, ptr_b, raw(val_b), counts, dots),
        CODE_A=DTYPE_CODES[val_a.dtype],
        CODE_B=DTYPE_CODES[val_b.dtype],
    )
    return counts, dots


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time."""
    elements = {"f32": (0, "*fp32"), "bf16": (1, "*i16"), "f16": (2, "*fp16")}
    found = []
    for name_a, name_b in (("f32", "f32"), ("f32", "bf16"), ("bf16", "bf16"), ("f16", "f16")):
        (code_a, type_a), (code_b, type_b) = elements[name_a], elements[name_b]
        found.append(
            Variant(
                f"overlap {name_a} {name_b}",
                _overlap_kernel,
                {
                    "idx_a_ptr": "*u16",
                    "ptr_a_ptr": "*i64",
                    "val_a_ptr": type_a,
                    "idx_b_ptr": "*u16",
                    "ptr_b_ptr": "*i64",
                    "val_b_ptr": type_b,
                    "counts_ptr": "*i64",
                    "dots_ptr": "*fp64",
                },
                {"CODE_A": code_a, "CODE_B": code_b},
                hot=False,
            )
        )
    return found
