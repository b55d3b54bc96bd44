"""merge: the weighted sum of sparse deltas as one sparse delta.

    idx, ptr = the union of the supports
    val = acc = fl(acc + fl(alpha_i * val_i)) from +0, in the order of the deltas; a sum of 0 stays

As in compose_, an entry that several deltas hold belongs to the first of them, its owner, and is
looked up in the others by binary search among the entries of the same tile. Let P_i(x) be the
number of entries that delta i owns among its first x. Of the union, exactly Σ_i P_i(x_i) entries
come before a position, where x_i entries of delta i do; so an owner finds its place in the result
by the same searches that find its terms, and ptr[t] = Σ_i P_i(ptr_i[t]).

Three launches, each flat over the entries (the last over the tiles), without atomics:
    count   who owns what: a running count inside each block (int16 an entry) and the count of each
            block; torch.cumsum makes the counts of blocks the starts of blocks
    ptr     after it the host waits for nnz, once, to allocate the result
    fill    terms and places of the owners

Scratch: 2 bytes an entry and 8 a block. Moves an entry: idx twice, its running count twice, its
value once, and 6 bytes of the result for each owner; the searches stay in the caches.
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
    PTR,
    UNDO,
    DeltaTable,
    block_for,
    deal,
    look_up,
    not_in,
    own_entries,
    present,
    term,
)

TILES = 256  # tiles a program of the ptr kernel


@triton.jit
def owned_before(table_ptr, starts_ptr, width, delta, x, mask, BLOCK: tl.constexpr):
    """Entries that a delta owns among its first x."""
    running_ptr = tl.load(table_ptr + delta * FIELDS + UNDO).to(tl.pointer_type(tl.int16))
    some = mask & (x > 0)
    last = x - 1
    inside = tl.load(running_ptr + last, mask=some, other=0).to(tl.int64)
    starts_ptr += delta.to(tl.int64) * width
    return inside + tl.load(starts_ptr + last // BLOCK, mask=some, other=0)


@triton.jit
def _count_block(
    table_ptr,
    delta,
    block,
    nnz,
    counts_ptr,
    MANY: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table_ptr + delta * FIELDS
    e = block * BLOCK + tl.arange(0, BLOCK)
    mine = present(e, nnz, MASKED, BLOCK)
    running_ptr = tl.load(row + UNDO).to(tl.pointer_type(tl.int16))
    if ALIGNED:
        running_ptr = tl.multiple_of(running_ptr, 16)
    tile, offset = own_entries(row, block, e, mine, ALIGNED)
    there = mine
    if MANY:
        mine = not_in(table_ptr, 0, delta, tile, offset, there)
    running = tl.cumsum(mine.to(tl.int32), axis=0)
    tl.store(running_ptr + e, running.to(tl.int16), mask=there)
    tl.store(counts_ptr + block, tl.max(running, axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["count", "most"])
def _count_kernel(
    table_ptr,
    count,
    most,
    counts_ptr,
    MANY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    delta, block, nnz, some = deal(table_ptr, count, most, MANY, BLOCK)
    # The first column stays 0, so that the sum up to a column is the start of a block.
    counts_ptr += delta.to(tl.int64) * (most + 1) + 1
    if some and (block + 1) * BLOCK <= nnz:
        _count_block(table_ptr, delta, block, nnz, counts_ptr, MANY, ALIGNED, False, BLOCK)
    elif some:
        _count_block(table_ptr, delta, block, nnz, counts_ptr, MANY, ALIGNED, True, BLOCK)


@triton.jit(do_not_specialize=["count", "most", "tiles"])
def _ptr_kernel(
    table_ptr, count, most, starts_ptr, out_ptr, tiles, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    mask = tile <= tiles
    before = tile * 0
    i = count * 0
    while i < count:
        ptr_ptr = tl.load(table_ptr + i * FIELDS + PTR).to(tl.pointer_type(tl.int64))
        x = tl.load(ptr_ptr + tile, mask=mask, other=0)
        before += owned_before(table_ptr, starts_ptr, most + 1, i, x, mask, BLOCK)
        i += 1
    tl.store(out_ptr + tile, before, mask=mask)


@triton.jit
def own_place(row, start_ptr, e, mine, ALIGNED: tl.constexpr):
    """Where in the result a delta's entries stand, those of it alone counted."""
    running_ptr = tl.load(row + UNDO).to(tl.pointer_type(tl.int16))
    if ALIGNED:
        running_ptr = tl.multiple_of(running_ptr, 16)
    return tl.load(running_ptr + e, mask=mine, other=1).to(tl.int64) - 1 + tl.load(start_ptr)


@triton.jit
def _fill_block(
    table_ptr,
    count,
    most,
    delta,
    block,
    nnz,
    starts_ptr,
    out_idx_ptr,
    out_val_ptr,
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
    # + 0 turns a term of -0 into +0, as a sum that starts from +0 is.
    acc = term(row, e, mine, CODES, ALIGNED) + 0.0
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
                    value = term(table_ptr + i * FIELDS, at, found, CODES, False)
                    acc = tl.where(found, acc + value, acc)
            i += 1
    tl.store(out_idx_ptr + place, offset.to(tl.uint16), mask=mine)
    tl.store(out_val_ptr + place, acc, mask=mine)


@triton.jit(do_not_specialize=["count", "most"])
def _fill_kernel(
    table_ptr,
    count,
    most,
    starts_ptr,
    out_idx_ptr,
    out_val_ptr,
    CODES: tl.constexpr,
    MANY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    delta, block, nnz, some = deal(table_ptr, count, most, MANY, BLOCK)
    if some and (block + 1) * BLOCK <= nnz:
        _fill_block(
            *(table_ptr, count, most, delta, block, nnz, starts_ptr, out_idx_ptr, out_val_ptr),
            *(CODES, MANY, ALIGNED, False, BLOCK),
        )
    elif some:
        _fill_block(
            *(table_ptr, count, most, delta, block, nnz, starts_ptr, out_idx_ptr, out_val_ptr),
            *(CODES, MANY, ALIGNED, True, BLOCK),
        )


class Union:
    """The union of the supports of some deltas: who owns what, counted.

    Args:
        lengths: int32 [tiles].
        idx: uint16 [nnz] of each delta.
        ptr: int64 [tiles + 1] of each.
        val: Values of each.
        alphas: Weight of each.

    Attributes:
        ptr: int64 [tiles + 1], of the union.
        nnz: Its entries.
        programs: Programs that deal() serves.
        arguments: The first arguments of a kernel that fills results in, up to `starts_ptr`.
        shape: Its constants, but CODES.
        codes: CODES.
    """

    def __init__(
        self, lengths: Tensor, idx: Tensors, ptr: Tensors, val: Tensors, alphas: Sequence[float]
    ) -> None:
        device, tiles = lengths.device, lengths.shape[0]
        block = block_for(idx)
        # Kernels know these by their addresses alone: they must live until the last launch.
        self._running = [torch.empty(i.shape[0], dtype=torch.int16, device=device) for i in idx]
        self._deltas = deltas = DeltaTable(idx, ptr, val, alphas, self._running, block, device)
        starts = torch.zeros(max(1, len(idx)), deltas.most + 1, dtype=torch.int64, device=device)
        table = (deltas.rows, len(idx), deltas.most)
        self.programs, self.codes = deltas.programs, deltas.codes
        self.shape = {"MANY": len(idx) > 1, "ALIGNED": deltas.aligned, "BLOCK": block}
        launch(
            *(_count_kernel, deltas.programs, *table, starts),
            num_warps=NUM_WARPS_MANY,
            **self.shape,
        )
        starts = torch.cumsum(starts, 1)
        self.arguments = (*table, starts)
        self.ptr = torch.empty(tiles + 1, dtype=torch.int64, device=device)
        launch(
            _ptr_kernel,
            *(tiles // TILES + 1, *self.arguments, self.ptr, tiles),
            BLOCK=block,
            TILES=TILES,
        )
        self.nnz = int(self.ptr[-1])


def merge(
    lengths: Tensor, idx: Tensors, ptr: Tensors, val: Tensors, alphas: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The union of the supports, with the fp32 sum of alpha * val in the order given."""
    union = Union(lengths, idx, ptr, val, alphas)
    out_idx = torch.empty(union.nnz, dtype=torch.uint16, device=lengths.device)
    out_val = torch.empty(union.nnz, dtype=torch.float32, device=lengths.device)
    launch(
        *(_fill_kernel, union.programs, *union.arguments, out_idx, out_val),
        num_warps=NUM_WARPS_MANY,
        CODES=union.codes,
        **union.shape,
    )
    return out_idx, union.ptr, out_val


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time."""
    table = {"table_ptr": "*i64", "count": "i32", "most": "i32"}
    unaligned = ("count", "most", "tiles")
    found = [
        Variant(
            "merge ptr",
            _ptr_kernel,
            {**table, "starts_ptr": "*i64", "out_ptr": "*i64", "tiles": "i32"},
            {"BLOCK": BLOCK, "TILES": TILES},
            hot=False,
            unaligned=unaligned,
        )
    ]
    for kind, many in (("one", False), ("many", True)):
        shape = {"MANY": many, "ALIGNED": True, "BLOCK": BLOCK}
        found.append(
            Variant(
                f"merge count {kind}",
                _count_kernel,
                {**table, "counts_ptr": "*i64"},
                shape,
                NUM_WARPS_MANY,
                hot=False,
                unaligned=unaligned,
            )
        )
        for name, codes in (("f32", 1), ("bf16", 2), ("mixed", 7)):
            found.append(
                Variant(
                    f"merge fill {name} {kind}",
                    _fill_kernel,
                    {**table, "starts_ptr": "*i64", "out_idx_ptr": "*u16", "out_val_ptr": "*fp32"},
                    {"CODES": codes, **shape},
                    NUM_WARPS_MANY,
                    hot=False,
                    unaligned=unaligned,
                )
            )
    return found
