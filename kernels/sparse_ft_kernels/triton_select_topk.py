"""select_topk: the k largest |fp32(a) - fp32(b)| of a model, exactly. Its kernels also serve
select_random.

    key = the 31 magnitude bits of the difference, or the hash of select_random
    T   = the k-th largest key;  chosen: key > T, and of key = T the first in (tile, offset)

One read of the model, in the usual case:

    1. sample   One key from each cell of 2^c neighbours, at a random place in it. By rank in the
                sample, with a margin of five standard errors, a bound L below T, which few more
                than k keys exceed. For hashes, L follows from theory.
    2. collect  A program takes a part of a tile. Keys > L are written, in order, to slots that one
                integer addition reserves; a table says where the slots of each part begin, so the
                order does not depend on the schedule. Keys = L are only counted.
    3. exclude  Candidates that are excluded get the key -1, which is below all; those at L are
                subtracted. The work is that of the excluded entries, not of the model.
    4. radix    T by digits over the candidates. The last program of each launch picks the digit,
                so the host takes no part. Where candidates are fewer than k, T = L.
    5. count    Per part, candidates > T and = T; prefix sums give the place of every part in the
                result, ptr, and how many ties it takes.
    6. emit     Parts write their chosen offsets. Where T = L, parts that take ties read their data
                again: the lower ones, until the ties are used up.

The host waits once, for T and the counts, between 5 and 6. They tell whether the bound held: the
candidates fitted, and with the keys at L they are k or more. If not, T is found by radix over the
model itself, and 2 to 6 are repeated with L = T, which cannot fail. The result is the same.

Keys equal to L need no memory, and L is a key of the model. So where T is a mass of ties, as of
bf16 pairs or of weights that never moved, L = T almost surely, and a second read is the worst case.

Moves, an element: its bytes once (4 for a bf16 pair, 8 for fp32). A candidate: 6 bytes written, 4
read for each digit (3 or 4 of them), 4 and 6 more; for k = 1 % of 10^9, with 1.07 k candidates, 0.3
bytes an element. Radix over the model would read it once for each digit and then twice, five or six
times as much. Memory: 6 bytes a candidate, 40 a part, the sample (2 MiB at most) and the bins.

NaN and infinity have the largest keys, and L is kept below these, so the first digit shows them.
Only then, and where k = 0, a pass looks for the tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import NonFiniteError, Tensors
from .tile_table import TILE, TileTable, tile_table
from .triton_common import (
    INTERPRETED,
    Variant,
    addresses,
    block_size,
    find,
    first_tiles,
    launch,
    load,
    load_any,
    magnitude_key,
    mix,
    tile_of,
)
from .uploads import upload

PART = 8192  # elements of a program of the passes over the model
PART_WARPS = 8
BLOCK = 4096  # keys of a program of the radix passes
FLAT = 1024  # entries of a program that gathers keys
SEGMENTS = 16  # parts of a program that works on the candidates of parts,
LANES = 64  # and how many of each part's candidates it works on at a time

SAMPLE_CELL = 2048  # elements for each key of the sample, within these limits of its size
SAMPLE_LEAST = 1 << 14
SAMPLE_MOST = 1 << 19

# tl.histogram: before 3.9 its instructions grow with the bins, 2544 for 4096 keys and 256 bins and
# 8184 for 2048; later versions take one shared-memory increment a key.
HARDWARE_HISTOGRAM = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
# Digits, from the top: shift and width.
DIGITS = ((20, 11), (10, 10), (0, 10)) if HARDWARE_HISTOGRAM else ((23, 8), (15, 8), (7, 8), (0, 7))
BINS = 1 << DIGITS[0][1]

INFINITY_KEY = 0x7F800000
LARGEST_KEY = 0x7FFFFFFF

_INFINITY = tl.constexpr(INFINITY_KEY)
_TILE = tl.constexpr(TILE)

# What a radix selection knows: int64 values on the device.
CURSOR = tl.constexpr(0)  # keys found; those beyond ROOM are not stored
ROOM = tl.constexpr(1)
RANK = tl.constexpr(2)  # of the key wanted, 1 is the largest
MOST = tl.constexpr(3)  # the key is lowered to this
KEY = tl.constexpr(4)  # the key found; before the last digit, its digits so far
ABOVE = tl.constexpr(5)  # keys whose digits so far are larger
TOO_FEW = tl.constexpr(6)  # there are fewer keys than RANK
BAD = tl.constexpr(7)  # keys of NaN or infinity
TICKET = tl.constexpr(8)
FIRST_BAD = tl.constexpr(9)  # tile
FIELDS = 10


# --- keys -----------------------------------------------------------------------------------------


@triton.jit
def _value(base_ptr, code_ptr, tile, offset, mask, CODES: tl.constexpr, ALIGNED: tl.constexpr):
    """fp32 of elements of one tile or of several."""
    base = tl.load(base_ptr + tile)
    code = tl.load(code_ptr + tile)
    if (CODES & (CODES - 1)) != 0 and len(tile.shape) == 0:
        # One tile of a model of several types: a branch costs less than loads that do nothing.
        least: tl.constexpr = CODES & (8 - CODES)
        if (1 << code) == least:
            x = load_any(base, offset, code, mask, least, ALIGNED)
        elif CODES != 7:
            x = load_any(base, offset, code, mask, CODES - least, ALIGNED)
        elif code == 1:
            x = load_any(base, offset, code, mask, 2, ALIGNED)
        else:
            x = load_any(base, offset, code, mask, 4, ALIGNED)
    else:
        x = load_any(base, offset, code, mask, CODES, ALIGNED)
    return x


@triton.jit
def _key(
    model,
    tile,
    offset,
    mask,
    HASH: tl.constexpr,
    HAS_B: tl.constexpr,
    CODES_A: tl.constexpr,
    CODES_B: tl.constexpr,
    ALIGNED: tl.constexpr = False,
):
    """Keys of elements.

    Args:
        model: Base and type of the tiles of a and b, their lengths, and the start of the hash.
        tile: int32, one tile or one for each element.
        offset: int32.
        mask: What to read.
        HASH: The key of select_random.
    """
    a_ptr, a_code_ptr, b_ptr, b_code_ptr, _length_ptr, start_ptr = model
    if HASH:
        place = tile.to(tl.int64) * _TILE + offset.to(tl.int64) + 1
        start = tl.load(start_ptr).to(tl.uint64, bitcast=True)
        z = start + place.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
        return (mix(z) >> 33).to(tl.int32)
    else:
        x = _value(a_ptr, a_code_ptr, tile, offset, mask, CODES_A, ALIGNED)
        if HAS_B:
            x = x - _value(b_ptr, b_code_ptr, tile, offset, mask, CODES_B, ALIGNED)
        return magnitude_key(x)


@triton.jit
def _excluded(exclude, tile, offset, lanes):
    """Which of some elements are excluded; only `lanes` are looked up."""
    exclude_idx_ptr, exclude_ptr_ptr = exclude
    low = tl.load(exclude_ptr_ptr + tile) + tl.zeros_like(offset)
    high = tl.load(exclude_ptr_ptr + tile + 1) + tl.zeros_like(offset)
    at = find(exclude_idx_ptr, low, high, offset, lanes, tl.full((), _TILE, tl.int32))
    there = lanes & (at < high)
    return there & (tl.load(exclude_idx_ptr + at, mask=there, other=0).to(tl.int32) == offset)


@triton.jit
def _eligible_keys(
    model,
    exclude,
    least,
    tile,
    first,
    offset,
    PART: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HASH: tl.constexpr,
    HAS_B: tl.constexpr,
    CODES_A: tl.constexpr,
    CODES_B: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Keys of the part of a tile that begins at `first`; -2 beyond the tile, and where a key not
    below `least` is excluded.
    """
    length = tl.load(model[4] + tile)
    if first + PART <= length:
        key = _key(model, tile, offset, True, HASH, HAS_B, CODES_A, CODES_B, ALIGNED)
    else:
        mask = offset < length
        key = _key(model, tile, offset, mask, HASH, HAS_B, CODES_A, CODES_B, ALIGNED)
        key = tl.where(mask, key, -2)
    if HAS_EXCLUDE:
        key = tl.where(_excluded(exclude, tile, offset, key >= least), -2, key)
    return key


@triton.jit
def _part(PART: tl.constexpr):
    """Tile of this program, and where its part begins in it."""
    segment = tl.program_id(0)
    return segment // (_TILE // PART), (segment % (_TILE // PART)) * PART


# --- words ----------------------------------------------------------------------------------------
# Which of 8 neighbours have a property, as bits. Few have it, so what is done for each of them is
# done by a loop over the set bits, which all words of a part take together.


@triton.jit
def _rows(PART: tl.constexpr):
    """Offsets of a part as [words, 8]."""
    return tl.arange(0, PART // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _words(flag):
    return tl.sum(flag.to(tl.int32) << tl.arange(0, 8)[None, :], 1)


@triton.jit
def _ones(word):
    """Number of bits set in 8."""
    word = word - ((word >> 1) & 0x55)
    word = (word & 0x33) + ((word >> 2) & 0x33)
    return (word + (word >> 4)) & 0x0F


@triton.jit
def _flags(key, bound):
    """1 where key > bound, 65536 where key = bound: their prefix sums count both at once."""
    return (key > bound).to(tl.int32) + ((key == bound).to(tl.int32) << 16)


# --- sample, collect, exclude ---------------------------------------------------------------------


@triton.jit
def _sample_kernel(
    a_ptr,
    a_code_ptr,
    b_ptr,
    b_code_ptr,
    length_ptr,
    start_ptr,
    exclude_idx_ptr,
    exclude_ptr_ptr,
    key_ptr,
    n_tiles,
    n,
    CELL_BITS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_B: tl.constexpr,
    CODES_A: tl.constexpr,
    CODES_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = (c + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    random = (mix(z) >> (64 - CELL_BITS)).to(tl.int64) if CELL_BITS > 0 else 0
    # Places of a model whose tiles were all full: nothing is known of the missing elements, and
    # none is counted, so every element has the same chance.
    place = (c << CELL_BITS) + random
    tile = (place >> 16).to(tl.int32)
    offset = (place & 0xFFFF).to(tl.int32)
    mask = (c < n) & (tile < n_tiles)
    tile = tl.where(mask, tile, 0)
    mask = mask & (offset < tl.load(length_ptr + tile))
    model = (a_ptr, a_code_ptr, b_ptr, b_code_ptr, length_ptr, start_ptr)
    key = _key(model, tile, offset, mask, False, HAS_B, CODES_A, CODES_B)
    if HAS_EXCLUDE:
        mask = mask & (_excluded((exclude_idx_ptr, exclude_ptr_ptr), tile, offset, mask) == 0)
    tl.store(key_ptr + c, tl.where(mask, key, -1), mask=c < n)


@triton.jit
def _collect_kernel(
    a_ptr,
    a_code_ptr,
    b_ptr,
    b_code_ptr,
    length_ptr,
    start_ptr,
    low_ptr,
    state_ptr,
    key_ptr,
    offset_ptr,
    segment_start_ptr,
    segment_count_ptr,
    segment_equal_ptr,
    HASH: tl.constexpr,
    HAS_B: tl.constexpr,
    CODES_A: tl.constexpr,
    CODES_B: tl.constexpr,
    ALIGNED: tl.constexpr,
    PART: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    tile, first = _part(PART)
    model = (a_ptr, a_code_ptr, b_ptr, b_code_ptr, length_ptr, start_ptr)
    low = tl.load(low_ptr).to(tl.int32)
    key = _eligible_keys(
        *(model, None, 0, tile, first, first + _rows(PART), PART),
        *(False, HASH, HAS_B, CODES_A, CODES_B, ALIGNED),
    )
    # Bit i: key i > L; above the 8 bits, how many keys equal L.
    lane = tl.arange(0, 8)[None, :]
    word = tl.sum(tl.where(key > low, 1 << lane, tl.where(key == low, 1 << 8, 0)), 1)
    equal = tl.sum(word >> 8, 0)
    word = word & 0xFF
    ones = _ones(word)
    upto = tl.cumsum(ones, 0)
    count = tl.sum(ones, 0)
    start = tl.atomic_add(state_ptr + CURSOR, count.to(tl.int64), sem="relaxed")
    tl.store(segment_start_ptr + segment, start)
    tl.store(segment_count_ptr + segment, count)
    tl.store(segment_equal_ptr + segment, equal)
    room = tl.load(state_ptr + ROOM)
    slot = start + (upto - ones)
    row = first + tl.arange(0, PART // 8) * 8
    left = tl.max(ones, 0)
    while left > 0:
        bit = word & -word
        offset = row + _ones((bit - 1) & 0xFF)
        there = word != 0
        # Read again, for few: it is in the cache.
        found = _key(model, tile, offset, there, HASH, HAS_B, CODES_A, CODES_B)
        there = there & (slot < room)
        tl.store(key_ptr + slot, found, mask=there)
        tl.store(offset_ptr + slot, offset.to(tl.uint16), mask=there)
        word = word ^ bit
        slot += 1
        left -= 1


@triton.jit
def _exclude_kernel(
    a_ptr,
    a_code_ptr,
    b_ptr,
    b_code_ptr,
    length_ptr,
    start_ptr,
    exclude_idx_ptr,
    exclude_ptr_ptr,
    first_ptr,
    low_ptr,
    state_ptr,
    key_ptr,
    offset_ptr,
    segment_start_ptr,
    segment_count_ptr,
    segment_equal_ptr,
    n,
    HASH: tl.constexpr,
    HAS_B: tl.constexpr,
    CODES_A: tl.constexpr,
    CODES_B: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    e = block * BLOCK + tl.arange(0, BLOCK)
    mask = e < n
    tile = tile_of(e, first_ptr, exclude_ptr_ptr, block)
    offset = tl.load(exclude_idx_ptr + e, mask=mask, other=0).to(tl.int32)
    mask = mask & (offset < tl.load(length_ptr + tile))
    model = (a_ptr, a_code_ptr, b_ptr, b_code_ptr, length_ptr, start_ptr)
    key = _key(model, tile, offset, mask, HASH, HAS_B, CODES_A, CODES_B)
    low = tl.load(low_ptr).to(tl.int32)
    segment = tile.to(tl.int64) * (_TILE // PART) + offset // PART
    tl.atomic_add(segment_equal_ptr + segment, -1, mask=mask & (key == low), sem="relaxed")
    stored = mask & (key > low)
    room = tl.load(state_ptr + ROOM)
    start = tl.load(segment_start_ptr + segment, mask=stored, other=0)
    end = start + tl.load(segment_count_ptr + segment, mask=stored, other=0)
    end = tl.minimum(end, room)
    steps = tl.full((), PART, tl.int32)
    at = find(offset_ptr, tl.minimum(start, end), end, offset, stored, steps)
    stored = stored & (at < end)
    stored = stored & (tl.load(offset_ptr + at, mask=stored, other=0).to(tl.int32) == offset)
    tl.store(key_ptr + at, tl.full((BLOCK,), -1, tl.int32), mask=stored)


# --- radix ----------------------------------------------------------------------------------------


@triton.jit
def _tally(
    key,
    lanes,
    state_ptr,
    bins_ptr,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds the digits of the keys that have the digits found so far to the bins."""
    if FIRST:
        lanes = lanes & (key >= 0)
    else:
        found = tl.load(state_ptr + KEY).to(tl.int32)
        lanes = lanes & ((key >> (SHIFT + WIDTH)) == (found >> (SHIFT + WIDTH)))
    digit = (key >> SHIFT) & ((1 << WIDTH) - 1)
    counts = tl.histogram(digit, 1 << WIDTH, mask=lanes)
    bin_ = tl.arange(0, 1 << WIDTH)
    tl.atomic_add(bins_ptr + bin_, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _pick(
    state_ptr,
    bins_ptr,
    otherwise_ptr,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Called by every program at its end: the last one finds the digit.

    Args:
        otherwise_ptr: int64, the key to report where there are too few.
    """
    tl.debug_barrier()  # all warps of this program have read KEY and added to the bins
    done = tl.atomic_add(state_ptr + TICKET, 1, sem="acq_rel")
    if done == tl.num_programs(0) - 1:
        bins: tl.constexpr = 1 << WIDTH
        # From the largest digit down.
        digit = bins - 1 - tl.arange(0, bins)
        counts = tl.load(bins_ptr + digit, cache_modifier=".cg")
        upto = tl.cumsum(counts, 0)
        above = tl.load(state_ptr + ABOVE)
        wanted = tl.load(state_ptr + RANK) - above
        larger = upto < wanted
        found = bins - 1 - tl.sum(larger.to(tl.int32), 0)
        if FIRST:
            few = tl.sum(counts, 0) < wanted
            bad = tl.sum(tl.where(digit >= (_INFINITY >> SHIFT), counts, 0), 0)
            tl.store(state_ptr + BAD, bad)
            tl.store(state_ptr + TOO_FEW, few.to(tl.int64))
        else:
            few = tl.load(state_ptr + TOO_FEW) != 0
        tl.store(state_ptr + ABOVE, above + tl.sum(tl.where(larger, counts, 0), 0))
        key = tl.load(state_ptr + KEY) + (found.to(tl.int64) << SHIFT)
        if SHIFT == 0:
            key = tl.minimum(key, tl.load(state_ptr + MOST))
        tl.store(state_ptr + KEY, tl.where(few, tl.load(otherwise_ptr), key))
        tl.store(state_ptr + TICKET, tl.zeros((), tl.int64))


@triton.jit
def _digit_kernel(
    key_ptr,
    state_ptr,
    bins_ptr,
    otherwise_ptr,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    n = tl.minimum(tl.load(state_ptr + CURSOR), tl.load(state_ptr + ROOM))
    if first < n:
        e = first + tl.arange(0, BLOCK)
        if first + BLOCK <= n:
            key = load(key_ptr + e, True, False)
        else:
            key = load(key_ptr + e, e < n, True)
        _tally(key, e < n, state_ptr, bins_ptr, FIRST, SHIFT, WIDTH)
    _pick(state_ptr, bins_ptr, otherwise_ptr, FIRST, SHIFT, WIDTH)


@triton.jit
def _model_digit_kernel(
    a_ptr,
    a_code_ptr,
    b_ptr,
    b_code_ptr,
    length_ptr,
    start_ptr,
    exclude_idx_ptr,
    exclude_ptr_ptr,
    state_ptr,
    bins_ptr,
    otherwise_ptr,
    HAS_EXCLUDE: tl.constexpr,
    HASH: tl.constexpr,
    HAS_B: tl.constexpr,
    CODES_A: tl.constexpr,
    CODES_B: tl.constexpr,
    ALIGNED: tl.constexpr,
    PART: tl.constexpr,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    model = (a_ptr, a_code_ptr, b_ptr, b_code_ptr, length_ptr, start_ptr)
    exclude = (exclude_idx_ptr, exclude_ptr_ptr)
    tile, first = _part(PART)
    key = _eligible_keys(
        *(model, exclude, 0, tile, first, first + tl.arange(0, PART), PART),
        *(HAS_EXCLUDE, HASH, HAS_B, CODES_A, CODES_B, ALIGNED),
    )
    _tally(key, key >= 0, state_ptr, bins_ptr, FIRST, SHIFT, WIDTH)
    _pick(state_ptr, bins_ptr, otherwise_ptr, FIRST, SHIFT, WIDTH)


# --- count, emit ----------------------------------------------------------------------------------


@triton.jit
def _candidates(state_ptr, segment_start_ptr, segment_count_ptr, segment, mask):
    """Where the stored candidates of parts begin, and how many they are."""
    start = tl.load(segment_start_ptr + segment, mask=mask, other=0)
    count = tl.load(segment_count_ptr + segment, mask=mask, other=0)
    left = tl.maximum(tl.load(state_ptr + ROOM) - start, 0)
    return start, tl.minimum(count, left).to(tl.int32)


@triton.jit
def _count_kernel(
    key_ptr,
    segment_start_ptr,
    segment_count_ptr,
    segment_equal_ptr,
    state_ptr,
    above_ptr,
    equal_ptr,
    n_segments,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    mask = segment < n_segments
    start, count = _candidates(state_ptr, segment_start_ptr, segment_count_ptr, segment, mask)
    bound = tl.load(state_ptr + KEY).to(tl.int32)
    lane = tl.arange(0, LANES)[None, :]
    longest = tl.max(count, 0)
    above = tl.zeros((SEGMENTS,), tl.int32)
    equal = tl.zeros((SEGMENTS,), tl.int32)
    at = longest * 0
    while at < longest:
        here = (at + lane) < count[:, None]
        e = start[:, None] + at + lane
        key = tl.load(key_ptr + e, mask=here, other=-1)
        total = tl.sum(tl.where(here, _flags(key, bound), 0), 1)
        above += total & 0xFFFF
        equal += total >> 16
        at += LANES
    if tl.load(state_ptr + TOO_FEW) != 0:
        equal = tl.load(segment_equal_ptr + segment, mask=mask, other=0)
    tl.store(above_ptr + segment, above.to(tl.int64), mask=mask)
    tl.store(equal_ptr + segment, equal.to(tl.int64), mask=mask)


@triton.jit
def _emit_kernel(
    key_ptr,
    offset_ptr,
    segment_start_ptr,
    segment_count_ptr,
    state_ptr,
    above_ptr,
    out_start_ptr,
    idx_ptr,
    n_segments,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    mask = segment < n_segments
    start, count = _candidates(state_ptr, segment_start_ptr, segment_count_ptr, segment, mask)
    bound = tl.load(state_ptr + KEY).to(tl.int32)
    out, ties = _place(above_ptr, out_start_ptr, segment, mask)
    # Ties that were only counted: _emit_model_kernel writes the whole part.
    dense = (tl.load(state_ptr + TOO_FEW) != 0) & (ties > 0)
    count = tl.where(dense, 0, count)
    lane = tl.arange(0, LANES)[None, :]
    longest = tl.max(count, 0)
    at = longest * 0
    while at < longest:
        here = (at + lane) < count[:, None]
        e = start[:, None] + at + lane
        key = tl.load(key_ptr + e, mask=here, other=-1)
        offset = tl.load(offset_ptr + e, mask=here, other=0)
        flags = tl.where(here, _flags(key, bound), 0)
        upto = tl.cumsum(flags, 1)
        above = upto & 0xFFFF
        equal = upto >> 16
        take = here & ((key > bound) | ((key == bound) & (equal <= ties[:, None])))
        place = out[:, None] + (above + tl.minimum(equal, ties[:, None]) - 1)
        tl.store(idx_ptr + place, offset, mask=take)
        total = tl.sum(flags, 1)
        taken = tl.minimum(total >> 16, ties)
        out += (total & 0xFFFF) + taken
        ties -= taken
        at += LANES


@triton.jit
def _place(above_ptr, out_start_ptr, segment, mask):
    """Where a part's chosen entries begin, and how many of its ties are chosen."""
    out = tl.load(out_start_ptr + segment, mask=mask, other=0)
    chosen = tl.load(out_start_ptr + segment + 1, mask=mask, other=0) - out
    before = tl.load(above_ptr + segment - 1, mask=mask & (segment > 0), other=0)
    above = tl.load(above_ptr + segment, mask=mask, other=0) - before
    return out, (chosen - above).to(tl.int32)


@triton.jit
def _emit_model_kernel(
    a_ptr,
    a_code_ptr,
    b_ptr,
    b_code_ptr,
    length_ptr,
    start_ptr,
    exclude_idx_ptr,
    exclude_ptr_ptr,
    state_ptr,
    above_ptr,
    out_start_ptr,
    idx_ptr,
    HAS_EXCLUDE: tl.constexpr,
    HASH: tl.constexpr,
    HAS_B: tl.constexpr,
    CODES_A: tl.constexpr,
    CODES_B: tl.constexpr,
    ALIGNED: tl.constexpr,
    PART: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    out, ties = _place(above_ptr, out_start_ptr, segment, segment >= 0)
    if ties > 0:
        model = (a_ptr, a_code_ptr, b_ptr, b_code_ptr, length_ptr, start_ptr)
        exclude = (exclude_idx_ptr, exclude_ptr_ptr)
        bound = tl.load(state_ptr + KEY).to(tl.int32)
        tile, first = _part(PART)
        key = _eligible_keys(
            *(model, exclude, bound, tile, first, first + _rows(PART), PART),
            *(HAS_EXCLUDE, HASH, HAS_B, CODES_A, CODES_B, ALIGNED),
        )
        equal = _words(key == bound)
        above = _words(key > bound)
        n_equal = _ones(equal)
        n_above = _ones(above)
        before = tl.cumsum(n_equal, 0) - n_equal
        place = out + (tl.cumsum(n_above, 0) - n_above + tl.minimum(before, ties))
        ties_left = ties - before
        row = first + tl.arange(0, PART // 8) * 8
        word = equal | above
        left = tl.max(n_equal + n_above, 0)
        while left > 0:
            bit = word & -word
            offset = row + _ones((bit - 1) & 0xFF)
            tied = (equal & bit) != 0
            take = (word != 0) & ((ties_left > 0) | (tied == 0))
            tl.store(idx_ptr + place, offset.to(tl.uint16), mask=take)
            place += take.to(tl.int64)
            ties_left -= tied.to(tl.int32)
            word = word ^ bit
            left -= 1


@triton.jit
def _first_bad_kernel(
    a_ptr,
    a_code_ptr,
    b_ptr,
    b_code_ptr,
    length_ptr,
    start_ptr,
    exclude_idx_ptr,
    exclude_ptr_ptr,
    state_ptr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_B: tl.constexpr,
    CODES_A: tl.constexpr,
    CODES_B: tl.constexpr,
    ALIGNED: tl.constexpr,
    PART: tl.constexpr,
):
    model = (a_ptr, a_code_ptr, b_ptr, b_code_ptr, length_ptr, start_ptr)
    exclude = (exclude_idx_ptr, exclude_ptr_ptr)
    tile, first = _part(PART)
    key = _eligible_keys(
        *(model, exclude, _INFINITY, tile, first, first + tl.arange(0, PART), PART),
        *(HAS_EXCLUDE, False, HAS_B, CODES_A, CODES_B, ALIGNED),
    )
    if tl.max(key, 0) >= _INFINITY:
        tl.atomic_min(state_ptr + FIRST_BAD, tile.to(tl.int64), sem="relaxed")


# --- the host -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """How the bound L is found, and how many keys may exceed it.

    Args:
        room: Candidates for which there is room.
        low: L, where it is known beforehand.
        cell_bits: One key in 2^cell_bits is sampled.
        sampled: Keys of the sample.
        rank: L is the key of this rank in the sample.
    """

    room: int
    low: int | None = None
    cell_bits: int = 0
    sampled: int = 0
    rank: int = 0


def sampled_bound(n_tiles: int, k: int, eligible: int, excluded: int) -> Bound:
    """The bound for keys of which nothing is known.

    Of the k largest keys, k / 2^c are expected in the sample, with a standard error of at most the
    root of that number.
    """
    places = n_tiles * TILE
    wanted = min(max(places // SAMPLE_CELL, SAMPLE_LEAST), SAMPLE_MOST)
    cell_bits = max(0, math.ceil(math.log2(places / wanted)))
    cell = 1 << cell_bits
    expected = k / cell
    rank = math.ceil(expected + 5 * math.sqrt(expected) + 8)
    most = math.ceil((rank + 5 * math.sqrt(rank) + 8) * cell)
    # Excluded keys are stored too, until they are struck out.
    room = min(most, eligible) + excluded
    return Bound(room, None, cell_bits, -(-places // cell), rank)


def random_bound(k: int, eligible: int, excluded: int) -> Bound:
    """The bound for hashes: six standard errors below the quantile."""
    margin = 6 * math.sqrt(k) + 16
    low = math.floor((1 - (k + margin) / eligible) * 2.0**31) - 1
    room = min(math.ceil(k + 2 * margin), eligible) + excluded
    return Bound(room, max(-1, min(low, LARGEST_KEY)))


@dataclass(frozen=True)
class Segments:
    """Parts and their candidates.

    Args:
        start: int64, slot of the first candidate of each part.
        count: int32, candidates of each part.
        above: int64, keys > T in the parts up to this one.
        equal: int64, keys = T in the parts up to this one.
    """

    start: Tensor
    count: Tensor
    above: Tensor
    equal: Tensor


class Selection:
    """One selection: what its launches share.

    Args:
        a: Tensors to rank, or whose shapes are those of the model.
        b: Tensors to subtract, or none.
        k: Entries to choose.
        exclude_idx: Entries that cannot be chosen.
        exclude_ptr: Their ptr.
        seed: The keys are hashes of this seed.
    """

    def __init__(
        self,
        a: Tensors,
        b: Tensors,
        k: int,
        exclude_idx: Tensor | None,
        exclude_ptr: Tensor | None,
        seed: int | None = None,
    ) -> None:
        self.tensors = a
        self.device = a[0].device if a else torch.device("cpu")
        table_a: TileTable = tile_table(a)
        table_b = tile_table(b) if b else table_a
        self.n_tiles = table_a.n
        self.k = k
        # The interpreter pays per program and per turn of a loop.
        self.part = TILE if INTERPRETED else PART
        self.lanes = 4096 if INTERPRETED else LANES
        self.n_segments = table_a.n * (TILE // self.part)
        self.excluded = exclude_idx.numel() if exclude_idx is not None else 0
        self.eligible = sum(t.numel() for t in a) - self.excluded
        self.most = INFINITY_KEY - 1 if seed is None else LARGEST_KEY
        start = 0 if seed is None else (seed * 0xD1342543DE82EF95) & 0xFFFFFFFFFFFFFFFF
        start = start - (1 << 64) if start >> 63 else start
        self.model = (
            *(table_a.base, table_a.dtype, table_b.base, table_b.dtype, table_a.length),
            addresses((start,), self.device),
        )
        self.kind: dict[str, Any] = {
            "HAS_B": bool(b),
            "CODES_A": table_a.codes if seed is None else 1,
            "CODES_B": table_b.codes if b else 1,
        }
        self.hash = {"HASH": seed is not None}
        self.aligned = {
            "ALIGNED": table_a.aligned and table_b.aligned and seed is None,
            "PART": self.part,
        }
        self.has_exclude = {"HAS_EXCLUDE": self.excluded > 0}
        self.exclude = (table_a.length, table_a.length)  # not looked at
        if exclude_idx is not None and exclude_ptr is not None:
            self.exclude = (exclude_idx, exclude_ptr)

    def states(self, *rows: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """States of radix selections, one for each (cursor, room, rank), and bins of each."""
        values = [0] * (len(rows) * FIELDS)
        for i, (cursor, room, rank) in enumerate(rows):
            at = i * FIELDS
            values[at + CURSOR.value], values[at + ROOM.value] = cursor, room
            values[at + RANK.value], values[at + MOST.value] = rank, self.most
            values[at + FIRST_BAD.value] = self.n_tiles
        state = upload(values, torch.int64, self.device).view(len(rows), FIELDS)
        bins = torch.zeros((len(rows), len(DIGITS), BINS), dtype=torch.int64, device=self.device)
        return state, bins

    def require_finite(self) -> None:
        """Looks for NaN and infinity.

        Raises:
            NonFiniteError: There is one.
        """
        if not self.n_segments:
            return
        state, _ = self.states((0, 0, 0))
        launch(
            _first_bad_kernel,
            self.n_segments,
            *(*self.model, *self.exclude, state),
            num_warps=PART_WARPS,
            **self.has_exclude,
            **self.kind,
            **self.aligned,
        )
        tile = int(state[0, FIRST_BAD.value])
        if tile < self.n_tiles:
            raise NonFiniteError(tile, _ordinal(self.tensors, tile))

    def nothing(self) -> tuple[Tensor, Tensor, Tensor]:
        """The selection of no entries: idx, ptr and info."""
        idx = torch.empty(0, dtype=torch.uint16, device=self.device)
        ptr = torch.zeros(self.n_tiles + 1, dtype=torch.int64, device=self.device)
        info = torch.tensor([0, 0, 0, 0, 0, -1, 0, self.eligible], dtype=torch.int64)
        return idx, ptr, info

    def radix(self, keys: Tensor, n: int, state: Tensor, bins: Tensor, otherwise: Tensor) -> None:
        """The key of a rank among stored keys, of which there are at most n."""
        block = block_size(BLOCK)
        for i, (shift, width) in enumerate(DIGITS):
            launch(
                _digit_kernel,
                max(1, -(-n // block)),
                *(keys, state, bins[i], otherwise),
                FIRST=i == 0,
                SHIFT=shift,
                WIDTH=width,
                BLOCK=block,
            )

    def model_radix(self) -> Tensor:
        """The state of a radix selection over the model itself: KEY is T."""
        state, bins = self.states((0, 0, self.k))
        for i, (shift, width) in enumerate(DIGITS):
            launch(
                _model_digit_kernel,
                self.n_segments,
                *(*self.model, *self.exclude, state, bins[0, i], addresses((-1,), self.device)),
                num_warps=PART_WARPS,
                **self.has_exclude,
                **self.hash,
                **self.kind,
                **self.aligned,
                FIRST=i == 0,
                SHIFT=shift,
                WIDTH=width,
            )
        return state[0]

    def sample(self, bound: Bound, keys: Tensor, state: Tensor, bins: Tensor) -> Tensor:
        """L from a sample: int64 [1]."""
        block = block_size(FLAT)
        launch(
            _sample_kernel,
            -(-bound.sampled // block),
            *(*self.model, *self.exclude, keys, self.n_tiles, bound.sampled),
            CELL_BITS=bound.cell_bits,
            **self.has_exclude,
            **self.kind,
            BLOCK=block,
        )
        # Where the sample holds fewer keys than that, all keys are candidates.
        self.radix(keys, bound.sampled, state, bins, addresses((-1,), self.device))
        return state[KEY.value :]

    def run(self, bound: Bound, finite: bool, ties_all: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The selection of at least one entry.

        Returns:
            idx, ptr and info.

        Raises:
            NonFiniteError: `finite` is required, and a key is not.
        """
        keys = torch.empty(max(bound.room, bound.sampled), dtype=torch.int32, device=self.device)
        offsets = torch.empty(bound.room, dtype=torch.uint16, device=self.device)
        state, bins = self.states(
            (bound.sampled, bound.sampled, bound.rank), (0, bound.room, self.k)
        )
        low = (
            addresses((bound.low,), self.device)
            if bound.low is not None
            else self.sample(bound, keys, state[0], bins[0])
        )
        fallback = 0
        while True:
            found = self.attempt(bound, low, keys, offsets, state[1], bins[1])
            *values, above, ties = torch.cat(
                (state[1], found.above[-1:], found.equal[-1:])
            ).tolist()
            if finite and values[BAD.value]:
                self.require_finite()
            held = values[CURSOR.value] <= bound.room and above + ties >= self.k
            if held:
                break
            if fallback:
                raise RuntimeError(
                    "select: exclude is not a support of this model; check_support() says why"
                )
            fallback = 1
            model = self.model_radix()
            if finite and int(model[BAD.value]):
                self.require_finite()
            low = model[KEY.value :]
            state, bins = self.states((0, 0, 0), (0, bound.room, self.k))
        quota = ties if ties_all else self.k - above
        tied = bool(values[TOO_FEW.value])
        idx, ptr = self.emit(found, keys, offsets, state[1], quota, above + quota, tied)
        chosen = (values[KEY.value], above + quota, above, ties, quota)
        info = torch.tensor([*chosen, -1, fallback, self.eligible], dtype=torch.int64)
        return idx, ptr, info

    def attempt(
        self, bound: Bound, low: Tensor, keys: Tensor, offsets: Tensor, state: Tensor, bins: Tensor
    ) -> Segments:
        """Collects the keys > L, finds T among them and counts, all without waiting."""
        n = self.n_segments
        start = torch.empty(n, dtype=torch.int64, device=self.device)
        count = torch.empty(n, dtype=torch.int32, device=self.device)
        equal = torch.empty(n, dtype=torch.int32, device=self.device)
        arrays = (low, state, keys, offsets, start, count, equal)
        launch(
            _collect_kernel,
            n,
            *(*self.model, *arrays),
            num_warps=PART_WARPS,
            **self.hash,
            **self.kind,
            **self.aligned,
        )
        if self.excluded:
            block = block_size(FLAT)
            launch(
                _exclude_kernel,
                -(-self.excluded // block),
                *(*self.model, *self.exclude),
                first_tiles(self.exclude[1], self.excluded, block),
                *(*arrays, self.excluded),
                **self.hash,
                **self.kind,
                PART=self.part,
                BLOCK=block,
            )
        self.radix(keys, bound.room, state, bins, low)
        found = Segments(
            start,
            count,
            torch.empty(n, dtype=torch.int64, device=self.device),
            torch.empty(n, dtype=torch.int64, device=self.device),
        )
        launch(
            _count_kernel,
            -(-n // SEGMENTS),
            *(keys, start, count, equal, state, found.above, found.equal, n),
            SEGMENTS=SEGMENTS,
            LANES=self.lanes,
        )
        found.above.cumsum_(0)
        found.equal.cumsum_(0)
        return found

    def emit(
        self,
        found: Segments,
        keys: Tensor,
        offsets: Tensor,
        state: Tensor,
        quota: int,
        nnz: int,
        tied: bool,
    ) -> tuple[Tensor, Tensor]:
        """idx and ptr.

        Args:
            quota: Ties that are chosen.
            nnz: Chosen entries in all.
            tied: T = L: ties are not among the candidates.
        """
        n = self.n_segments
        out_start = torch.zeros(n + 1, dtype=torch.int64, device=self.device)
        torch.add(found.above, found.equal.clamp_(max=quota), out=out_start[1:])
        idx = torch.empty(nnz, dtype=torch.uint16, device=self.device)
        launch(
            _emit_kernel,
            -(-n // SEGMENTS),
            *(keys, offsets, found.start, found.count, state, found.above, out_start, idx, n),
            SEGMENTS=SEGMENTS,
            LANES=self.lanes,
        )
        if tied:
            launch(
                _emit_model_kernel,
                n,
                *(*self.model, *self.exclude, state, found.above, out_start, idx),
                num_warps=PART_WARPS,
                **self.has_exclude,
                **self.hash,
                **self.kind,
                **self.aligned,
            )
        return idx, out_start[:: TILE // self.part].contiguous()


def _ordinal(tensors: Tensors, tile: int) -> int:
    """The position of a tile's tensor in the list."""
    for i, tensor in enumerate(tensors):
        tile -= -(-tensor.numel() // TILE)
        if tile < 0:
            return i
    raise AssertionError("the tile lies beyond the tensors")


def select_topk(
    a: Tensors,
    b: Tensors,
    k: int,
    exclude_idx: Tensor | None,
    exclude_ptr: Tensor | None,
    ties_all: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest |fp32(a) - fp32(b)|; equal ones in the order of (tensor, offset)."""
    selection = Selection(a, b, k, exclude_idx, exclude_ptr)
    if k == 0:
        selection.require_finite()
        return selection.nothing()
    bound = sampled_bound(selection.n_tiles, k, selection.eligible, selection.excluded)
    return selection.run(bound, True, ties_all)


# --- ahead of time --------------------------------------------------------------------------------

MODEL_SIGNATURE = {
    "a_ptr": "*i64",
    "a_code_ptr": "*i32",
    "b_ptr": "*i64",
    "b_code_ptr": "*i32",
    "length_ptr": "*i32",
    "start_ptr": "*i64",
}
_EXCLUDE = {"exclude_idx_ptr": "*u16", "exclude_ptr_ptr": "*i64"}
_SEGMENTS = {"segment_start_ptr": "*i64", "segment_count_ptr": "*i32", "segment_equal_ptr": "*i32"}
_CANDIDATES = {"key_ptr": "*i32", "offset_ptr": "*u16"}


def model_variants(name: str, kind: dict[str, Any], aligned: bool, hot: bool) -> list[Variant]:
    """The passes over a model, for one kind of key.

    Args:
        name: Prefix of their names.
        kind: HASH, HAS_B, CODES_A and CODES_B.
        aligned: Tiles begin at multiples of 16 bytes.
        hot: They must not spill.
    """
    part = {"ALIGNED": aligned, "PART": PART}
    op, _, rest = name.partition(" ")
    collect = {"low_ptr": "*i64", "state_ptr": "*i64", **_CANDIDATES, **_SEGMENTS}
    found = [
        Variant(
            f"{op} collect {rest}".strip(),
            _collect_kernel,
            {**MODEL_SIGNATURE, **collect},
            {**kind, **part},
            PART_WARPS,
            hot,
            ("low_ptr", "state_ptr"),
        ),
        Variant(
            f"{op} exclude {rest}".strip(),
            _exclude_kernel,
            {**MODEL_SIGNATURE, **_EXCLUDE, "first_ptr": "*i32", **collect, "n": "i64"},
            {**kind, "PART": PART, "BLOCK": FLAT},
            hot=False,
            unaligned=("low_ptr", "state_ptr", "n"),
        ),
    ]
    places = {"state_ptr": "*i64", "above_ptr": "*i64", "out_start_ptr": "*i64", "idx_ptr": "*u16"}
    for exclude in (False, True):
        suffix = f"{rest}{' exclude' if exclude else ''}".strip()
        shift, width = DIGITS[1]
        found += [
            Variant(
                f"{op} model digit {suffix}".strip(),
                _model_digit_kernel,
                {
                    **MODEL_SIGNATURE,
                    **_EXCLUDE,
                    "state_ptr": "*i64",
                    "bins_ptr": "*i64",
                    "otherwise_ptr": "*i64",
                },
                {
                    "HAS_EXCLUDE": exclude,
                    **kind,
                    **part,
                    "FIRST": False,
                    "SHIFT": shift,
                    "WIDTH": width,
                },
                PART_WARPS,
                hot=False,
            ),
            Variant(
                f"{op} emit ties {suffix}".strip(),
                _emit_model_kernel,
                {**MODEL_SIGNATURE, **_EXCLUDE, **places},
                {"HAS_EXCLUDE": exclude, **kind, **part},
                PART_WARPS,
                hot=hot and not exclude,
                unaligned=("state_ptr",),
            ),
        ]
    return found


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time."""
    found = []
    for name, codes_a, has_b, codes_b in (
        ("f32 f32", 1, True, 1),
        ("bf16 bf16", 2, True, 2),
        ("mixed mixed", 3, True, 3),
    ):
        kind = {"HAS_B": has_b, "CODES_A": codes_a, "CODES_B": codes_b}
        # Branches on the type cost scalar registers, one more than gfx942 has.
        hot = codes_a in (1, 2, 4)
        found += model_variants(f"select_topk {name}", {"HASH": False, **kind}, True, hot)
        for exclude in (False, True):
            suffix = f"{name}{' exclude' if exclude else ''}"
            found += [
                Variant(
                    f"select_topk sample {suffix}",
                    _sample_kernel,
                    {
                        **MODEL_SIGNATURE,
                        **_EXCLUDE,
                        "key_ptr": "*i32",
                        "n_tiles": "i32",
                        "n": "i32",
                    },
                    {"CELL_BITS": 11, "HAS_EXCLUDE": exclude, **kind, "BLOCK": FLAT},
                    hot=False,
                    unaligned=("n_tiles", "n"),
                ),
                Variant(
                    f"select_topk first bad {suffix}",
                    _first_bad_kernel,
                    {**MODEL_SIGNATURE, **_EXCLUDE, "state_ptr": "*i64"},
                    {"HAS_EXCLUDE": exclude, **kind, "ALIGNED": True, "PART": PART},
                    PART_WARPS,
                    hot=hot and not exclude,
                ),
            ]
    digit = {"state_ptr": "*i64", "bins_ptr": "*i64", "otherwise_ptr": "*i64"}
    for i, (shift, width) in enumerate(DIGITS[:2]):
        found.append(
            Variant(
                f"select_topk digit {'first' if i == 0 else 'next'}",
                _digit_kernel,
                {"key_ptr": "*i32", **digit},
                {"FIRST": i == 0, "SHIFT": shift, "WIDTH": width, "BLOCK": BLOCK},
                unaligned=("state_ptr", "otherwise_ptr"),
            )
        )
    segments = {"SEGMENTS": SEGMENTS, "LANES": LANES}
    found.append(
        Variant(
            "select_topk count",
            _count_kernel,
            {
                "key_ptr": "*i32",
                **_SEGMENTS,
                "state_ptr": "*i64",
                "above_ptr": "*i64",
                "equal_ptr": "*i64",
                "n_segments": "i32",
            },
            segments,
            hot=False,
            unaligned=("state_ptr", "n_segments"),
        )
    )
    found.append(
        Variant(
            "select_topk emit",
            _emit_kernel,
            {
                **_CANDIDATES,
                "segment_start_ptr": "*i64",
                "segment_count_ptr": "*i32",
                "state_ptr": "*i64",
                "above_ptr": "*i64",
                "out_start_ptr": "*i64",
                "idx_ptr": "*u16",
                "n_segments": "i32",
            },
            segments,
            hot=False,
            unaligned=("state_ptr", "n_segments"),
        )
    )
    return found
