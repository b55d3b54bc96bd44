"""What the Triton kernels share: element types, exact rounding, sums in a fixed order, the way from
an entry to its tile, and how a kernel is launched.

A kernel over selected entries is flat: program p works on the entries p·BLOCK … of the compact
arrays, whatever tiles they lie in, so every program has the same work and every compact array is
read in whole vectors; the tile of an entry is found by a short binary search in `ptr`. A kernel
over all elements works on a piece of one tile. Both form addresses from an int64 base and an
offset inside a tile, so no product can exceed 31 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .tile_table import DTYPE_CODES
from .uploads import Kept, capturing, upload

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

F32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
F16 = tl.constexpr(2)

RUN = 1024  # values that a sum halves at once: part of the definition of every sum
_RUN = tl.constexpr(RUN)


# --- element types --------------------------------------------------------------------------------
# bfloat16 is read and written as the int16 of its bits, rounded by integers: Triton's interpreter
# truncates otherwise, and this is exact everywhere.


@triton.jit
def typed(address, CODE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """Pointers of an element type from int64 addresses.

    Args:
        address: Addresses.
        CODE: Element type.
        ALIGNED: `address` is one multiple of 16. The cast forgets it, and loads would fall to
            single elements.
    """
    if CODE == F32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif CODE == BF16:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def to_f32(raw, CODE: tl.constexpr):
    """fp32 of a stored element."""
    if CODE == BF16:
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)


@triton.jit
def from_f32(x, CODE: tl.constexpr):
    """The stored element nearest to x, ties to even."""
    if CODE == F32:
        return x
    elif CODE == BF16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.int16)
    else:
        return x.to(tl.float16)


@triton.jit
def stochastic_bf16(x, seed, position):
    """A bfloat16 neighbour of x at random, x on average: (bits + 16 random bits) cut to 16.

    The bits are a function of (seed, position) alone, so a run can be repeated to the bit.
    """
    bits = x.to(tl.int32, bitcast=True)
    noise = tl.randint(seed, position).to(tl.int32, bitcast=True) & 0xFFFF
    finite = (bits & 0x7F800000) != 0x7F800000
    cut = tl.where(finite, bits + noise, bits) >> 16
    return tl.where(x != x, 0x7FC0, cut).to(tl.int16)


@triton.jit
def load_any(base, offset, code, mask, CODES: tl.constexpr, ALIGNED: tl.constexpr = False):
    """fp32 of elements whose type is known tile by tile.

    Args:
        base: int64 addresses of tiles; 0 reads as 0.0.
        offset: Elements into the tile.
        code: Type of each tile's elements; not looked at where CODES names a single type.
        mask: What to read.
        CODES: Bit c is set where type c occurs.
        ALIGNED: `base` is one address, a multiple of 16.
    """
    there = mask & (base != 0)
    if CODES == 1:
        return tl.load(typed(base, 0, ALIGNED) + offset, mask=there, other=0.0)
    elif CODES == 2:
        return to_f32(tl.load(typed(base, 1, ALIGNED) + offset, mask=there, other=0), 1)
    elif CODES == 4:
        return to_f32(tl.load(typed(base, 2, ALIGNED) + offset, mask=there, other=0.0), 2)
    else:
        full = tl.load(typed(base, 0, ALIGNED) + offset, mask=there & (code == 0), other=0.0)
        brain = tl.load(typed(base, 1, ALIGNED) + offset, mask=there & (code == 1), other=0)
        half = tl.load(typed(base, 2, ALIGNED) + offset, mask=there & (code == 2), other=0.0)
        return tl.where(code == 0, full, tl.where(code == 1, to_f32(brain, 1), to_f32(half, 2)))


@triton.jit
def load(pointer, mask, MASKED: tl.constexpr):
    """A block of a stream. Without a mask, accesses are as wide as the alignment allows."""
    if MASKED:
        return tl.load(pointer, mask=mask, other=0)
    else:
        return tl.load(pointer)


@triton.jit
def store(pointer, value, mask, MASKED: tl.constexpr):
    """The counterpart of load."""
    if MASKED:
        tl.store(pointer, value, mask=mask)
    else:
        tl.store(pointer, value)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def magnitude_key(x):
    """The 31 magnitude bits of an fp32 value: they order as |x| does."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def mix(z):
    """The 64-bit mixing function of csrc/sparse_ft.h."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


# --- sums -----------------------------------------------------------------------------------------


@triton.jit
def halve(x, BLOCK: tl.constexpr):
    """Sums of the runs of 1024 of a block: x[j] += x[j + h] for h = 512, 256, …, 1.

    Each step adds pairs, so no order is left to the compiler. Returns [BLOCK / 1024].
    """
    for level in tl.static_range(10):
        x = tl.sum(tl.reshape(x, (BLOCK // 1024, 2, 512 >> level)), axis=1)
    return tl.reshape(x, (BLOCK // 1024,))


@triton.jit
def _halve_kernel(x_ptr, out_ptr, found_ptr, n, FOUND: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    e = first + tl.arange(0, BLOCK)
    sums = halve(tl.load(x_ptr + e, mask=e < n, other=0.0), BLOCK)
    run = first // 1024 + tl.arange(0, BLOCK // 1024)
    tl.store(out_ptr + run, sums, mask=run * 1024 < n)
    if FOUND:
        # NaN - NaN and inf - inf are NaN.
        bad = tl.where(sums - sums == 0, 0.0, 1.0)
        tl.store(found_ptr + run, bad.to(tl.float32), mask=run * 1024 < n)


def tree_sum(runs: Tensor, found_inf: Tensor | None = None) -> Tensor:
    """The sum of fp64 values in runs of 1024, and runs of runs (csrc/sparse_ft.h, tree_sum).

    Args:
        runs: fp64 [n].
        found_inf: fp32 [1], receives 1.0 where the sum is not finite, else 0.0.

    Returns:
        fp64 [1].
    """
    if not runs.numel():
        if found_inf is not None:
            found_inf.zero_()
        return torch.zeros(1, dtype=torch.float64, device=runs.device)
    while True:
        n = runs.numel()
        out = torch.empty(-(-n // RUN), dtype=torch.float64, device=runs.device)
        last = out.numel() == 1
        found = found_inf if last else None
        block = block_size(RUN)
        launch(
            _halve_kernel,
            -(-n // block),
            *(runs, out, found if found is not None else out, n),
            FOUND=found is not None,
            BLOCK=block,
        )
        if last:
            return out
        runs = out


# --- from an entry to its tile --------------------------------------------------------------------


@triton.jit
def tile_of(entry, first_ptr, ptr_ptr, block):
    """The tile of each entry of a block: the last tile t with ptr[t] <= entry."""
    low_tile = tl.load(first_ptr + block)
    high_tile = tl.load(first_ptr + block + 1)
    low = tl.zeros_like(entry).to(tl.int32) + low_tile
    high = tl.zeros_like(entry).to(tl.int32) + high_tile
    span = high_tile - low_tile
    while span > 0:
        middle = (low + high + 1) >> 1
        right = tl.load(ptr_ptr + middle) <= entry
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle - 1)
        span = span >> 1
    return low


@triton.jit
def find(idx_ptr, low, high, offset, mask, steps):
    """The first entry in [low, high) whose offset is not less, by binary search.

    Args:
        idx_ptr: uint16 offsets, ascending in [low, high).
        low: int64 entries.
        high: int64 entries.
        offset: int32 offsets to look for.
        mask: Lanes that look; the others keep `low`.
        steps: A number at least as large as every high - low; 2^steps bounds the search.
    """
    while steps > 0:
        middle = (low + high) >> 1
        open_ = mask & (low < high)
        here = tl.load(idx_ptr + middle, mask=open_, other=0).to(tl.int32)
        less = open_ & (here < offset)
        low = tl.where(less, middle + 1, low)
        high = tl.where(open_ & (here >= offset), middle, high)
        steps = steps >> 1
    return low


_FIRST: WeakIdKeyDictionary = WeakIdKeyDictionary()


def first_tiles(ptr: Tensor, nnz: int, block: int) -> Tensor:
    """The tile of entry 0, block, 2·block, … of a support, and of its end: int32 [blocks + 1].

    It is kept as long as `ptr` lives unchanged, so a step launches nothing to find it. Ops that
    take turns have blocks of different sizes.
    """
    version = 0 if ptr.is_inference() else ptr._version
    known: tuple[int, Kept[Tensor]] | None = _FIRST.get(ptr)
    if known is None or known[0] != version:
        known = _FIRST[ptr] = (version, Kept(8))
    return known[1].get((nnz, block), ptr.device, lambda: _first_tiles(ptr, nnz, block))


def _first_tiles(ptr: Tensor, nnz: int, block: int) -> Tensor:
    entries = torch.arange(-(-nnz // block) + 1, dtype=torch.int64, device=ptr.device) * block
    first = torch.searchsorted(ptr, entries, right=True) - 1
    return first.clamp_(0, max(0, ptr.shape[0] - 2)).to(torch.int32)


# --- launching ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled ahead of time, to look at its machine code.

    Args:
        name: What it is called in the table.
        kernel: The jitted function.
        signature: Type of each argument that is not a constant, as Triton spells them.
        constants: The constants.
        num_warps: Warps of a program.
        hot: Must not spill, and must use 16-byte accesses on its streams.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    hot: bool = True
    unaligned: tuple[str, ...] = field(default=())


def launch(
    kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, **constants: Any
) -> None:
    """Runs a kernel, without fusing multiplications into additions.

    Args:
        kernel: The jitted function.
        programs: Programs in all; none: nothing is launched.
    """
    if programs > 0:
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=False, **constants)


def block_size(hardware: int) -> int:
    """Entries a program: the interpreter pays per program, not per entry."""
    return max(hardware, 16384) if INTERPRETED else hardware


def raw(tensor: Tensor) -> Tensor:
    """A tensor as the kernels read it: bfloat16 as the int16 of its bits."""
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor


def code_of(tensors: Sequence[Tensor]) -> int:
    """Type code of the first tensor, fp32 where there is none."""
    return DTYPE_CODES[tensors[0].dtype] if tensors else 0


_NUMBERS: Kept[Tensor] = Kept(1024)


def _numbers(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    key = (values, dtype, device)
    return _NUMBERS.get(key, device, lambda: upload(values, dtype, device))


def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """fp64 numbers on a device. Python's floats reach a kernel as fp32 otherwise."""
    return _numbers(values, torch.float64, device)


def scalar(value: float, device: torch.device) -> Tensor:
    """One fp32 number on a device: the default of an optional scalar."""
    return _numbers((value,), torch.float32, device)


def addresses(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 addresses on a device."""
    return _numbers(values, torch.int64, device)


_TICKETS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def ticket_of(step: Tensor) -> Tensor:
    """The counter by which the last program of a launch knows that it is the last: int32 [1], 0.

    The step count may be changed only when every program has read it.
    """
    ticket: Tensor | None = _TICKETS.get(step)
    if ticket is None:
        ticket = torch.zeros(1, dtype=torch.int32, device=step.device)
        if not capturing(step.device):  # else the graph zeroes one of its own at each replay
            _TICKETS[step] = ticket
    return ticket


@triton.jit
def finish(step_ptr, ticket_ptr):
    """Called by every program when it has used the step count: the last one counts the step."""
    tl.debug_barrier()  # no warp of this program has its read of the step still before it
    done = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    if done == tl.num_programs(0) - 1:
        tl.store(ticket_ptr, 0)
        tl.store(step_ptr, tl.load(step_ptr) + 1)
