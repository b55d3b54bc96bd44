"""reduce: what several sparse deltas say of each entry of their union.

With x_i = fl(alpha_i * val_i) of the deltas that have the entry, in their order:
    total, positive, negative = sums in fp32 from +0 of all x_i, of those > 0, of those < 0
    largest = the x_i of largest magnitude; of x and -x the positive one
    n_present, n_positive, n_negative = how many there are

The union, who owns an entry and where it goes are those of merge, and so are its launches; the last
one fills seven vectors in.

Moves an entry: idx twice, its running count twice, its value once, and 26 bytes of the result for
each owner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Tensors
from .triton_common import Variant, launch
from .triton_compose import (
    BLOCK,
    FIELDS,
    NUM_WARPS_MANY,
    deal,
    look_up,
    own_entries,
    present,
    term,
)
from .triton_merge import Union, own_place, owned_before


@triton.jit
def _larger(most, x):
    """Of two values the one of larger magnitude, the larger one among equals; NaN is none."""
    size = tl.abs(x)
    most_size = tl.abs(most)
    return tl.where((size > most_size) | ((size == most_size) & (x > most)), x, most)


@triton.jit
def _reduce_block(
    table_ptr,
    count,
    most,
    delta,
    block,
    nnz,
    starts_ptr,
    out_idx_ptr,
    total_ptr,
    positive_ptr,
    negative_ptr,
    largest_ptr,
    n_present_ptr,
    n_positive_ptr,
    n_negative_ptr,
    CODES: tl.constexpr,
    MANY: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table_ptr + delta * FIELDS
    e = block * BLOCK + tl.arange(0, BLOCK)
    mine = present(e, nnz, MASKED, BLOCK)
    tile, offset = own_entries(row, block, e, mine, ALIGNED)
    x = term(row, e, mine, CODES, ALIGNED)
    # + 0 turns a term of -0 into +0, as a sum that starts from +0 is.
    total = x + 0.0
    positive = tl.where(x > 0, x, 0.0)
    negative = tl.where(x < 0, x, 0.0)
    largest = _larger(tl.zeros([BLOCK], tl.float32), x)
    n_present = tl.full([BLOCK], 1, tl.int16)
    n_positive = (x > 0).to(tl.int16)
    n_negative = (x < 0).to(tl.int16)
    place = own_place(row, starts_ptr + delta.to(tl.int64) * (most + 1) + block, e, mine, ALIGNED)
    if MANY:
        i = delta * 0
        while i < count:
            if i != delta:
                at, found = look_up(table_ptr, i, tile, offset, mine)
                place += owned_before(table_ptr, starts_ptr, most + 1, i, at, mine, BLOCK)
                if i < delta:
                    mine = mine & (found == 0)
                else:
                    x = term(table_ptr + i * FIELDS, at, found, CODES, False)
                    total = tl.where(found, total + x, total)
                    up = found & (x > 0)
                    down = found & (x < 0)
                    positive = tl.where(up, positive + x, positive)
                    negative = tl.where(down, negative + x, negative)
                    largest = tl.where(found, _larger(largest, x), largest)
                    n_present += found.to(tl.int16)
                    n_positive += up.to(tl.int16)
                    n_negative += down.to(tl.int16)
            i += 1
    tl.store(out_idx_ptr + place, offset.to(tl.uint16), mask=mine)
    tl.store(total_ptr + place, total, mask=mine)
    tl.store(positive_ptr + place, positive, mask=mine)
    tl.store(negative_ptr + place, negative, mask=mine)
    tl.store(largest_ptr + place, largest, mask=mine)
    tl.store(n_present_ptr + place, n_present, mask=mine)
    tl.store(n_positive_ptr + place, n_positive, mask=mine)
    tl.store(n_negative_ptr + place, n_negative, mask=mine)


@triton.jit(do_not_specialize=["count", "most"])
def _reduce_kernel(
    table_ptr,
    count,
    most,
    starts_ptr,
    out_idx_ptr,
    total_ptr,
    positive_ptr,
    negative_ptr,
    largest_ptr,
    n_present_ptr,
    n_positive_ptr,
    n_negative_ptr,
    CODES: tl.constexpr,
    MANY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    delta, block, nnz, some = deal(table_ptr, count, most, MANY, BLOCK)
    if some and (block + 1) * BLOCK <= nnz:
        _reduce_block(
            *(table_ptr, count, most, delta, block, nnz, starts_ptr, out_idx_ptr),
            *(total_ptr, positive_ptr, negative_ptr, largest_ptr),
            *(n_present_ptr, n_positive_ptr, n_negative_ptr),
            *(CODES, MANY, ALIGNED, False, BLOCK),
        )
    elif some:
        _reduce_block(
            *(table_ptr, count, most, delta, block, nnz, starts_ptr, out_idx_ptr),
            *(total_ptr, positive_ptr, negative_ptr, largest_ptr),
            *(n_present_ptr, n_positive_ptr, n_negative_ptr),
            *(CODES, MANY, ALIGNED, True, BLOCK),
        )


def reduce(
    lengths: Tensor, idx: Tensors, ptr: Tensors, val: Tensors, alphas: Sequence[float]
) -> tuple[Tensor, ...]:
    """The union of the supports; of alpha * val there: sums of all, of the positive, of the
    negative, the largest magnitude; how many, how many positive, how many negative."""
    union = Union(lengths, idx, ptr, val, alphas)
    device = lengths.device
    out_idx = torch.empty(union.nnz, dtype=torch.uint16, device=device)
    sums = [torch.empty(union.nnz, dtype=torch.float32, device=device) for _ in range(4)]
    counts = [torch.empty(union.nnz, dtype=torch.int16, device=device) for _ in range(3)]
    launch(
        *(_reduce_kernel, union.programs, *union.arguments, out_idx, *sums, *counts),
        num_warps=NUM_WARPS_MANY,
        CODES=union.codes,
        **union.shape,
    )
    return (out_idx, union.ptr, *sums, *counts)


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time."""
    table = {"table_ptr": "*i64", "count": "i32", "most": "i32", "starts_ptr": "*i64"}
    sums = dict.fromkeys(("total_ptr", "positive_ptr", "negative_ptr", "largest_ptr"), "*fp32")
    counts = dict.fromkeys(("n_present_ptr", "n_positive_ptr", "n_negative_ptr"), "*i16")
    signature = {**table, "out_idx_ptr": "*u16", **sums, **counts}
    return [
        Variant(
            f"reduce {name} {kind}",
            _reduce_kernel,
            signature,
            {"CODES": codes, "MANY": many, "ALIGNED": True, "BLOCK": BLOCK},
            NUM_WARPS_MANY,
            hot=False,
            unaligned=("count", "most"),
        )
        for kind, many in (("one", False), ("many", True))
        for name, codes in (("f32", 1), ("bf16", 2), ("mixed", 7))
    ]
