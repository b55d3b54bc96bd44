"""compose_, restore_, swap_: weighted sums of deltas added to a model, and taken back bit for bit.

    compose_   w = round(fp32(w) + acc),   acc = fl(acc + fl(alpha_i * val_i)) from +0, in the order
               of the deltas; where acc = 0 the weight keeps its bits; undo_i = w before
    restore_   w = undo_i
    swap_      restore_ of some deltas, then compose_ of others

One launch each, for the whole model and any number of deltas, without atomics on values, and with
the same bits in whatever order programs run. A program takes BLOCK consecutive entries of one
delta, in whole vectors, and finds their tiles through `ptr`.

Who writes. An entry that several deltas hold belongs to the first of them, its owner. For each of
its entries a program looks it up in the other deltas by binary search in the entries of the same
tile. An entry that an earlier delta holds is left to that one; the owner alone reads the weight,
sums the deltas that hold the entry, writes their undo values and then the weight. So every weight
and every undo value has one writer, and no program reads what another writes. With one delta there
is nothing to look up. In swap_, an old entry that a new delta holds too is left to its owner among
the new ones, which takes the untouched weight from the old log; the other old entries are written
back. Only in restore_, and among the old logs of swap_, can an entry have several writers: where
supports overlap their logs hold the same value (compose_ wrote them), so any may come last.

The blocks of all deltas are dealt out in proportion, so that programs that run together work on the
same part of the model, and a line of weights that two deltas touch is read from memory once.

Moves an entry: 2 bytes of idx, one value, one undo value, and the sectors of w that hold it (read
and written). The searches stay in the first-level cache: a tile's entries are a few kilobytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Tensors
from .tile_table import DTYPE_CODES, tile_table
from .triton_common import (
    F16,
    F32,
    Variant,
    addresses,
    block_size,
    code_of,
    first_tiles,
    from_f32,
    launch,
    tile_of,
    to_f32,
    typed,
)

BLOCK = 1024
NUM_WARPS = 4
NUM_WARPS_MANY = 8  # searches need registers: 4 entries a thread, not 8

_BITS = (tl.int32, tl.int16, tl.int16)  # the integers as wide as an element of each type code

# What a kernel knows of a delta: one row of a DeltaTable.
IDX = tl.constexpr(0)
PTR = tl.constexpr(1)
FIRST = tl.constexpr(2)  # tiles of its blocks, as first_tiles() gives them
VAL = tl.constexpr(3)
CODE = tl.constexpr(4)  # of the values
UNDO = tl.constexpr(5)
ALPHA = tl.constexpr(6)  # the bits of an fp64 number
NNZ = tl.constexpr(7)
FIELDS = tl.constexpr(8)


# --- several deltas -------------------------------------------------------------------------------


@triton.jit
def deal(table_ptr, count, most, MANY: tl.constexpr, BLOCK: tl.constexpr):
    """The delta and block of this program, entries of the delta, and whether there is work for it.

    The blocks of every delta are spread evenly over `most` rounds, one program a delta and round.

    Args:
        table_ptr: Rows of `count` deltas.
        count: Deltas.
        most: int64, blocks of the delta that has most.
        MANY: There is more than one delta.
    """
    program = tl.program_id(0)
    if MANY:
        delta = program % count
        turn = (program // count).to(tl.int64)
        nnz = tl.load(table_ptr + delta * FIELDS + NNZ)
        blocks = (nnz + (BLOCK - 1)) // BLOCK
        block = turn * blocks // most
        fresh = (turn == 0) | ((turn - 1) * blocks // most != block)
        return delta, block, nnz, fresh & (blocks > 0)
    else:
        return program * 0, program.to(tl.int64), tl.load(table_ptr + NNZ), program >= 0


@triton.jit
def smaller(idx_ptr, length, longest, offset):
    """How many of some ascending offsets are smaller than others, by binary search.

    Args:
        idx_ptr: uint16, where the offsets to search begin.
        length: int32, how many there are; 0: nothing is read.
        longest: int32, the largest length.
        offset: int32 [BLOCK], what to look for.

    Returns:
        int32 [BLOCK].
    """
    before = offset * 0
    step = 1 + longest * 0
    while step <= longest:
        step = step << 1
    step = step >> 1
    while step > 0:
        probe = before + step
        inside = probe <= length
        here = tl.load(idx_ptr + (probe - 1).to(tl.int64), mask=inside, other=0).to(tl.int32)
        before = tl.where(inside & (here < offset), probe, before)
        step = step >> 1
    return before


@triton.jit
def look_up(table_ptr, delta, tile, offset, mask):
    """Where a delta has some entries.

    Args:
        tile: int32, tile of each.
        offset: int32, offset of each in its tile.
        mask: What to look for.

    Returns:
        int64 [BLOCK]: the first entry of the delta that is not before it; whether it is the same.
    """
    row = table_ptr + delta * FIELDS
    ptr_ptr = tl.load(row + PTR).to(tl.pointer_type(tl.int64))
    low = tl.load(ptr_ptr + tile)
    length = tl.where(mask, (tl.load(ptr_ptr + tile + 1) - low).to(tl.int32), 0)
    tile_idx = tl.load(row + IDX).to(tl.pointer_type(tl.uint16)) + low
    before = smaller(tile_idx, length, tl.max(length, axis=0), offset)
    inside = before < length
    here = tl.load(tile_idx + before, mask=inside, other=0).to(tl.int32)
    return low + before, inside & (here == offset)


@triton.jit
def not_in(table_ptr, first, end, tile, offset, mask):
    """Narrows a mask to the entries that none of the deltas first … end - 1 has."""
    i = first
    while i < end:
        _at, found = look_up(table_ptr, i, tile, offset, mask)
        mask = mask & (found == 0)
        i += 1
    return mask


@triton.jit
def present(e, nnz, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The mask of a block. A full block has a constant one, which keeps its accesses wide."""
    if MASKED:
        return e < nnz
    else:
        return tl.full([BLOCK], 1, tl.int1)


@triton.jit
def own_entries(row, block, e, mask, ALIGNED: tl.constexpr):
    """Tiles and offsets, int32, of a block of the delta that a row describes."""
    first_ptr = tl.load(row + FIRST).to(tl.pointer_type(tl.int32))
    tile = tile_of(e, first_ptr, tl.load(row + PTR).to(tl.pointer_type(tl.int64)), block)
    idx_ptr = tl.load(row + IDX).to(tl.pointer_type(tl.uint16))
    if ALIGNED:
        idx_ptr = tl.multiple_of(idx_ptr, 16)
    return tile, tl.load(idx_ptr + e, mask=mask, other=0).to(tl.int32)


@triton.jit
def term(row, e, mask, CODES: tl.constexpr, ALIGNED: tl.constexpr):
    """fl32(alpha * val) of some entries of the delta that a row describes."""
    address = tl.load(row + VAL)
    alpha = tl.load(row + ALPHA).to(tl.float64, bitcast=True).to(tl.float32)
    if CODES == 1:
        val = tl.load(typed(address, 0, ALIGNED) + e, mask=mask, other=0)
    elif CODES == 2:
        val = to_f32(tl.load(typed(address, 1, ALIGNED) + e, mask=mask, other=0), 1)
    elif CODES == 4:
        val = to_f32(tl.load(typed(address, 2, ALIGNED) + e, mask=mask, other=0), 2)
    else:
        code = tl.load(row + CODE)
        if code == 0:
            val = tl.load(typed(address, 0, ALIGNED) + e, mask=mask, other=0)
        elif code == 1:
            val = to_f32(tl.load(typed(address, 1, ALIGNED) + e, mask=mask, other=0), 1)
        else:
            val = to_f32(tl.load(typed(address, 2, ALIGNED) + e, mask=mask, other=0), 2)
    return val * alpha


class DeltaTable:
    """The rows of some deltas on their device, and how many programs go over them.

    Args:
        idx: uint16 [nnz] of each delta.
        ptr: int64 [tiles + 1] of each.
        val: Values of each, or nothing.
        alphas: Weight of each, or nothing.
        undo: Undo log of each, or None.
        block: Entries a program.

    Attributes:
        rows: int64 [deltas, FIELDS].
        most: Blocks of the delta that has most.
        programs: Programs that deal() serves.
        codes: Bit c is set where values of type code c occur.
        aligned: Every array starts at a multiple of 16 bytes.
    """

    def __init__(
        self,
        idx: Tensors,
        ptr: Tensors,
        val: Tensors,
        alphas: Sequence[float],
        undo: Sequence[Tensor | None],
        block: int,
        device: torch.device,
    ) -> None:
        # The kernels know these by their addresses alone: they must live until the launch.
        self._first = [first_tiles(p, i.shape[0], block) for i, p in zip(idx, ptr, strict=True)]
        numbers: list[int] = []
        for j, (i, p, log) in enumerate(zip(idx, ptr, undo, strict=True)):
            numbers += [i.data_ptr(), p.data_ptr(), self._first[j].data_ptr()]
            numbers += [val[j].data_ptr(), DTYPE_CODES[val[j].dtype]] if j < len(val) else [0, 0]
            numbers.append(0 if log is None else log.data_ptr())
            alpha = alphas[j] if j < len(alphas) else 0.0
            numbers.append(struct.unpack("<q", struct.pack("<d", alpha))[0])
            numbers.append(i.shape[0])
        self.rows = addresses(tuple(numbers), device)
        self.most = max((-(-i.shape[0] // block) for i in idx), default=0)
        self.programs = self.most * len(idx)
        self.codes = sum({1 << DTYPE_CODES[v.dtype] for v in val})
        self.aligned = all(t.data_ptr() % 16 == 0 for t in (*idx, *val, *undo) if t is not None)


def block_for(idx: Tensors) -> int:
    """Entries a program; in the interpreter, where blocks are large, no more than there are."""
    most = max((i.shape[0] for i in idx), default=0)
    return min(block_size(BLOCK), max(BLOCK, 1 << max(0, most - 1).bit_length()))


# --- composition ----------------------------------------------------------------------------------


@triton.jit
def _added(before, acc, ELEMENT: tl.constexpr):
    """The stored element nearest to before + acc. A NaN stays the same NaN, as on CPUs."""
    x = to_f32(before, ELEMENT)
    after = from_f32(x + acc, ELEMENT)
    if ELEMENT == F32:
        quiet = (before.to(tl.int32, bitcast=True) | 0x00400000).to(tl.float32, bitcast=True)
        after = tl.where(x != x, quiet, after)
    elif ELEMENT == F16:
        quiet = (before.to(tl.int16, bitcast=True) | 0x0200).to(tl.float16, bitcast=True)
        after = tl.where(x != x, quiet, after)
    return after


@triton.jit
def _compose_block(
    table_ptr,
    new,
    count,
    delta,
    block,
    nnz,
    base_ptr,
    stats_ptr,
    ELEMENT: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    MANY: tl.constexpr,
    OLD: tl.constexpr,
    LOG: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Composes the entries of a block that its delta owns.

    Args:
        new: Deltas to add: the first rows.
        count: All deltas: those after `new` are taken back.
        ELEMENT: Type code of the weights.
        BITS: The integers as wide as a weight.
    """
    row = table_ptr + delta * FIELDS
    e = block * BLOCK + tl.arange(0, BLOCK)
    there = present(e, nnz, MASKED, BLOCK)
    tile, offset = own_entries(row, block, e, there, ALIGNED)
    mine = there
    if MANY:
        mine = not_in(table_ptr, 0, delta, tile, offset, there)

    weights = typed(tl.load(base_ptr + tile), ELEMENT) + offset
    before = tl.load(weights, mask=mine, other=0)
    restored = tl.full([BLOCK], 0, tl.int1)
    if OLD:
        i = new
        while i < count:
            at, found = look_up(table_ptr, i, tile, offset, mine & (restored == 0))
            log_ptr = typed(tl.load(table_ptr + i * FIELDS + UNDO), ELEMENT)
            before = tl.where(found, tl.load(log_ptr + at, mask=found, other=0), before)
            restored = restored | found
            i += 1

    if LOG:
        log_ptr = typed(tl.load(row + UNDO), ELEMENT, ALIGNED)
        if delta == 0:
            tl.store(log_ptr + e, before, mask=there)  # it owns all: whole vectors
        else:
            tl.store(log_ptr + e, before, mask=mine)
    # + 0 turns a term of -0 into +0, as a sum that starts from +0 is.
    acc = term(row, e, there, CODES, ALIGNED) + 0.0
    if MANY:
        i = delta + 1
        while i < new:
            at, found = look_up(table_ptr, i, tile, offset, mine)
            other = table_ptr + i * FIELDS
            acc = tl.where(found, acc + term(other, at, found, CODES, False), acc)
            if LOG:
                tl.store(typed(tl.load(other + UNDO), ELEMENT) + at, before, mask=found)
            i += 1

    moves = mine & (acc != 0)
    after = tl.where(moves, _added(before, acc, ELEMENT), before)
    if MANY or OLD:
        # Formed anew: kept through the searches, they would take 8 registers of a thread.
        weights = typed(tl.load(base_ptr + tile), ELEMENT) + offset
    tl.store(weights, after, mask=moves | restored)
    still = moves & (before.to(BITS, bitcast=True) == after.to(BITS, bitcast=True))
    # Both counts in one sum: a block has fewer than 2^20 entries.
    counts = tl.sum(moves.to(tl.int64) + (still.to(tl.int64) << 32), axis=0)
    tl.atomic_add(stats_ptr, counts & 0xFFFFFFFF, sem="relaxed")
    if counts > 0xFFFFFFFF:
        tl.atomic_add(stats_ptr + 1, counts >> 32, sem="relaxed")


@triton.jit
def _restore_block(
    table_ptr,
    new,
    delta,
    block,
    nnz,
    base_ptr,
    ELEMENT: tl.constexpr,
    OWNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes back the entries of a block that none of the first `new` deltas has.

    Args:
        OWNED: There are such deltas.
    """
    row = table_ptr + delta * FIELDS
    e = block * BLOCK + tl.arange(0, BLOCK)
    there = present(e, nnz, MASKED, BLOCK)
    tile, offset = own_entries(row, block, e, there, ALIGNED)
    before = tl.load(typed(tl.load(row + UNDO), ELEMENT, ALIGNED) + e, mask=there, other=0)
    weights = typed(tl.load(base_ptr + tile), ELEMENT) + offset
    if OWNED:
        there = not_in(table_ptr, 0, new, tile, offset, there)
    tl.store(weights, before, mask=there)


@triton.jit(do_not_specialize=["new", "count", "most"])
def _compose_kernel(
    table_ptr,
    new,
    count,
    most,
    base_ptr,
    stats_ptr,
    ELEMENT: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    MANY: tl.constexpr,
    OLD: tl.constexpr,
    LOG: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    delta, block, nnz, some = deal(table_ptr, count, most, MANY or OLD, BLOCK)
    full = (block + 1) * BLOCK <= nnz
    if OLD and delta >= new:
        if some and full:
            _restore_block(
                *(table_ptr, new, delta, block, nnz, base_ptr),
                *(ELEMENT, True, ALIGNED, False, BLOCK),
            )
        elif some:
            _restore_block(
                *(table_ptr, new, delta, block, nnz, base_ptr),
                *(ELEMENT, True, ALIGNED, True, BLOCK),
            )
    elif some and full:
        _compose_block(
            *(table_ptr, new, count, delta, block, nnz, base_ptr, stats_ptr),
            *(ELEMENT, BITS, CODES, MANY, OLD, LOG, ALIGNED, False, BLOCK),
        )
    elif some:
        _compose_block(
            *(table_ptr, new, count, delta, block, nnz, base_ptr, stats_ptr),
            *(ELEMENT, BITS, CODES, MANY, OLD, LOG, ALIGNED, True, BLOCK),
        )


@triton.jit(do_not_specialize=["count", "most"])
def _restore_kernel(
    table_ptr,
    count,
    most,
    base_ptr,
    ELEMENT: tl.constexpr,
    MANY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    delta, block, nnz, some = deal(table_ptr, count, most, MANY, BLOCK)
    full = (block + 1) * BLOCK <= nnz
    if some and full:
        _restore_block(
            *(table_ptr, 0, delta, block, nnz, base_ptr),
            *(ELEMENT, False, ALIGNED, False, BLOCK),
        )
    elif some:
        _restore_block(
            *(table_ptr, 0, delta, block, nnz, base_ptr),
            *(ELEMENT, False, ALIGNED, True, BLOCK),
        )


def compose_(
    weights: Tensors,
    idx: Tensors,
    ptr: Tensors,
    val: Tensors,
    alphas: Sequence[float],
    undo: Tensors,
) -> Tensor:
    """w = round(w + sum of alpha * val), the sum in fp32 from +0 in the order given; undo first."""
    return swap_(weights, [], [], [], idx, ptr, val, alphas, undo)


def restore_(weights: Tensors, idx: Tensors, ptr: Tensors, undo: Tensors) -> None:
    """Write the logged values back, bit for bit."""
    if not weights:
        return
    block = block_for(idx)
    deltas = DeltaTable(idx, ptr, [], [], undo, block, weights[0].device)
    launch(
        _restore_kernel,
        deltas.programs,
        *(deltas.rows, len(idx), deltas.most, tile_table(weights).base),
        num_warps=NUM_WARPS,
        ELEMENT=code_of(weights),
        MANY=len(idx) > 1,
        ALIGNED=deltas.aligned,
        BLOCK=block,
    )


def _share_memory(a: Tensors, b: Tensors) -> bool:
    """Does a byte belong to a tensor of both lists?"""
    ranges = [
        [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel()]
        for tensors in (a, b)
    ]
    return any(
        start < other_end and other < end
        for start, end in ranges[0]
        for other, other_end in ranges[1]
    )


def swap_(
    weights: Tensors,
    old_idx: Tensors,
    old_ptr: Tensors,
    old_undo: Tensors,
    idx: Tensors,
    ptr: Tensors,
    val: Tensors,
    alphas: Sequence[float],
    undo: Tensors,
) -> Tensor:
    """restore_ of the old deltas, then compose_ of the new ones."""
    device = weights[0].device if weights else torch.device("cpu")
    stats = torch.zeros(2, dtype=torch.int64, device=device)
    if not weights:
        return stats
    if _share_memory(old_undo, undo):
        # A new log would be written while an old one is read: in two launches it is not.
        restore_(weights, old_idx, old_ptr, old_undo)
        old_idx, old_ptr, old_undo = [], [], []
    none: list[Tensor | None] = [None] * len(idx)
    logs = [*(undo or none), *old_undo]
    block = block_for([*idx, *old_idx])
    deltas = DeltaTable(
        [*idx, *old_idx], [*ptr, *old_ptr], val, alphas, logs, block, weights[0].device
    )
    launch(
        _compose_kernel,
        deltas.programs,
        *(deltas.rows, len(idx), len(idx) + len(old_idx), deltas.most),
        *(tile_table(weights).base, stats),
        num_warps=NUM_WARPS_MANY if len(idx) > 1 or old_idx else NUM_WARPS,
        ELEMENT=code_of(weights),
        BITS=_BITS[code_of(weights)],
        CODES=deltas.codes,
        MANY=len(idx) > 1,
        OLD=bool(old_idx),
        LOG=bool(undo),
        ALIGNED=deltas.aligned,
        BLOCK=block,
    )
    return stats


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time."""
    table = {"table_ptr": "*i64"}
    rest = {"base_ptr": "*i64", "stats_ptr": "*i64"}
    found = []
    for name, code in (("f32", 0), ("bf16", 1), ("f16", 2)):
        both = {"ELEMENT": code, "ALIGNED": True, "BLOCK": BLOCK}
        for kind, many, old in (
            ("one", False, False),
            ("many", True, False),
            ("swap one", False, True),
            ("swap", True, True),
        ):
            found.append(
                Variant(
                    f"compose {name} {kind}",
                    _compose_kernel,
                    {**table, "new": "i32", "count": "i32", "most": "i32", **rest},
                    {
                        **both,
                        "BITS": _BITS[code],
                        "CODES": 1,
                        "MANY": many,
                        "OLD": old,
                        "LOG": True,
                    },
                    NUM_WARPS_MANY if many or old else NUM_WARPS,
                    # There the compiler spills a few bytes to fit more programs at a time.
                    hot=many or not old,
                    unaligned=("new", "count", "most"),
                )
            )
        for kind, many in (("one", False), ("many", True)):
            found.append(
                Variant(
                    f"restore {name} {kind}",
                    _restore_kernel,
                    {**table, "count": "i32", "most": "i32", "base_ptr": "*i64"},
                    {**both, "MANY": many},
                    NUM_WARPS,
                    unaligned=("count", "most"),
                )
            )
    return found
