"""TileTable: where the tiles of a list of tensors lie in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

TILE = 65536
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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

    def __init__(self, tensors: Sequence[Tensor], numels: Sequence[int] | None = None) -> None:
        sizes = [t.numel() for t in tensors] if numels is None else list(numels)
        device = tensors[0].device if tensors else torch.device("cpu")
        counts = torch.tensor([-(-n // TILE) for n in sizes], dtype=torch.int64)
        self.n = int(counts.sum()) if sizes else 0
        first = torch.cumsum(counts, 0) - counts
        inside = torch.arange(self.n) - torch.repeat_interleave(first, counts)
        numel = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64), counts)
        address = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)
        width = torch.tensor([t.element_size() for t in tensors], dtype=torch.int64)
        codes = torch.tensor([DTYPE_CODES[t.dtype] for t in tensors], dtype=torch.int32)
        base = torch.repeat_interleave(address, counts)
        offset = inside * TILE * torch.repeat_interleave(width, counts)
        self.base = _to(torch.where(base == 0, base, base + offset), device)
        self.length = _to(torch.clamp(numel - inside * TILE, max=TILE).to(torch.int32), device)
        self.dtype = _to(torch.repeat_interleave(codes, counts), device)
        # An empty tensor may be of any type: it stands for no gradient.
        self.codes = sum({1 << DTYPE_CODES[t.dtype] for t in tensors if t.numel()})
        self.aligned = all(t.data_ptr() % 16 == 0 for t in tensors)


def _to(host: Tensor, device: torch.device) -> Tensor:
    """Moves a table without waiting for the device."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


_CACHE: OrderedDict[tuple[object, ...], TileTable] = OrderedDict()
_CACHE_SIZE = 64


def tile_table(tensors: Sequence[Tensor], numels: Sequence[int] | None = None) -> TileTable:
    """The tile table of some tensors, rebuilt only when an address, size or data type changed."""
    key: tuple[object, ...] = (
        *((t.data_ptr(), t.dtype) for t in tensors),
        tuple(numels) if numels is not None else tuple(t.numel() for t in tensors),
        tensors[0].device if tensors else None,
    )
    table = _CACHE.get(key)
    if table is None:
        table = _CACHE[key] = TileTable(tensors, numels)
        if len(_CACHE) > _CACHE_SIZE:
            _CACHE.popitem(last=False)
    else:
        _CACHE.move_to_end(key)
    return table


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
