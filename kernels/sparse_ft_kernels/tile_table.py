"""TileTable: where the tiles of a list of tensors lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .uploads import Kept, capturing, keep_in_graph, upload

TILE = 65536
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_DTYPE = attrgetter("dtype")


class TileTable:
    """Per tile of a list of tensors: base address, length and data type.

    Tensors are cut in the order given, flat and row-major, into tiles of `TILE` elements; the last
    tile of a tensor is short and none spans two tensors. The table holds addresses, not the
    tensors: it is valid while they live.

    Args:
        tensors: Contiguous tensors on one device.
        numels: Elements of each; needed where a tensor may be absent (an empty tensor that stands
            for numel zeros: its tiles have base 0).

    Attributes:
        base: int64 [n], address of each tile; 0 where its tensor is absent.
        length: int32 [n], elements of each tile.
        dtype: int32 [n], `DTYPE_CODES` of each tile.
        n: Tiles.
        codes: Bit c is set where a tensor of type code c is present.
        aligned: Every tile starts at a multiple of 16 bytes.
    """

    __slots__ = ("aligned", "base", "codes", "dtype", "length", "n")
    n: int

    def __init__(self, tensors: Sequence[Tensor], numels: Sequence[int] | None = None) -> None:
        sizes = tuple(map(Tensor.numel, tensors)) if numels is None else tuple(numels)
        device = tensors[0].device if tensors else torch.device("cpu")
        cut = _cut(sizes, tuple(t.dtype for t in tensors), device)
        if capturing(device):
            keep_in_graph(cut)
        starts = list(map(Tensor.data_ptr, tensors))
        base = upload(starts, torch.int64, device).index_select(0, cut.ordinal)
        self.base = base + cut.offset
        if not all(starts):  # an empty tensor has no address
            self.base.masked_fill_(base == 0, 0)
        self.length, self.dtype, self.n = cut.length, cut.dtype, len(cut.length)
        # An empty tensor may be of any type: it stands for no gradient.
        self.codes = sum({1 << DTYPE_CODES[t.dtype] for t in tensors if t.numel()})
        self.aligned = all(start % 16 == 0 for start in starts)


class _Cut(NamedTuple):
    """How tensors of some sizes and data types are cut, wherever they lie.

    Args:
        ordinal: int64 [n], the tensor of each tile.
        offset: int64 [n], bytes from the tensor's start to the tile's.
        length: int32 [n].
        dtype: int32 [n].
    """

    ordinal: Tensor
    offset: Tensor
    length: Tensor
    dtype: Tensor


@lru_cache(maxsize=1024)
def _cut(sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> _Cut:
    """The cut of some tensors. Every stream may find it here, so its upload is waited for."""
    if capturing(device):
        raise RuntimeError(
            "sparse_ft: these tensors are met for the first time while a CUDA graph is captured; "
            "run the same step once before the capture"
        )
    counts = torch.tensor([-(-n // TILE) for n in sizes], dtype=torch.int64)
    ordinal = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    inside = torch.arange(len(ordinal)) - (torch.cumsum(counts, 0) - counts)[ordinal]
    numel = torch.tensor(sizes, dtype=torch.int64)[ordinal]
    width = torch.tensor([t.itemsize for t in dtypes], dtype=torch.int64)[ordinal]
    codes = torch.tensor([DTYPE_CODES[t] for t in dtypes], dtype=torch.int32)[ordinal]
    length = torch.clamp(numel - inside * TILE, max=TILE).to(torch.int32)
    cut = (ordinal, inside * TILE * width, length, codes)
    return _Cut(*(t.to(device) for t in cut))


# Tiles of all tables together; a table counts as some thousands, to bound their number too.
_TABLES: Kept[TileTable] = Kept(1 << 23, cost=lambda table: table.n + 4096)


def tile_table(tensors: Sequence[Tensor], numels: Sequence[int] | None = None) -> TileTable:
    """The tile table of some tensors, rebuilt only when an address, size or data type changed."""
    device = tensors[0].device if tensors else torch.device("cpu")
    sizes = map(Tensor.numel, tensors) if numels is None else numels
    dtypes = map(_DTYPE, tensors)
    key = (tuple(map(Tensor.data_ptr, tensors)), tuple(dtypes), tuple(sizes), device)
    return _TABLES.get(key, device, lambda: TileTable(tensors, numels))


def n_tiles(numels: Sequence[int]) -> int:
    """Tiles of tensors of these sizes."""
    return sum(-(-n // TILE) for n in numels)


def tile_lengths(numels: Sequence[int]) -> list[int]:
    """Elements of each tile of tensors of these sizes."""
    lengths: list[int] = []
    for n in numels:
        lengths += [TILE] * (n // TILE)
        if n % TILE:
            lengths.append(n % TILE)
    return lengths
