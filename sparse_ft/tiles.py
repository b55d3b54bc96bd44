"""Where the entries of a model live: `Layout` names and orders the tensors, `Support` selects
entries of them.

Every tensor is cut, flat and row-major, into tiles of 65,536 elements that never span two tensors.
Tensors are ordered by name. A selected entry is one uint16 (its offset inside its tile), and `ptr`
says where each tile's entries begin.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_ft_kernels import TILE

__all__ = ["TILE", "Layout", "Support"]


@dataclass(frozen=True)
class Layout:
    """The names and shapes of a set of tensors, in canonical order.

    Args:
        names: Tensor names, sorted, without repetition.
        shapes: The shape of each.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise ValueError(
                f"Layout: {len(self.names)} names and {len(self.shapes)} shapes; one shape per name"
            )
        for before, after in zip(self.names, self.names[1:], strict=False):
            if before >= after:
                raise ValueError(
                    f"Layout: names must be sorted and unique, but {before!r} stands before "
                    f"{after!r}"
                )
        for name, shape in zip(self.names, self.shapes, strict=True):
            if any(size < 0 for size in shape):
                raise ValueError(f"Layout: {name!r} has a negative dimension in its shape {shape}")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | Sequence[int]]) -> Layout:
        """The layout of a mapping from names to tensors, or to shapes."""
        names = tuple(sorted(tensors))
        shapes = []
        for name in names:
            value = tensors[name]
            shapes.append(
                tuple(int(n) for n in (value.shape if isinstance(value, Tensor) else value))
            )
        return cls(names, tuple(shapes))

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each tensor."""
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def numel(self) -> int:
        """Elements of all tensors together."""
        return sum(self.numels)

    @cached_property
    def tile_starts(self) -> np.ndarray:
        """First tile of each tensor, and the number of tiles at the end (int64 [len(names) +
        1]).
        """
        tiles = -(-np.asarray(self.numels, dtype=np.int64) // TILE)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(tiles, dtype=np.int64)])

    @property
    def n_tiles(self) -> int:
        """Tiles of all tensors together."""
        return int(self.tile_starts[-1])

    @cached_property
    def lengths(self) -> Tensor:
        """Elements of each tile (int32 [n_tiles], CPU)."""
        lengths = np.full(self.n_tiles, TILE, np.int32)
        for i, numel in enumerate(self.numels):
            if numel:
                last = int(self.tile_starts[i + 1]) - 1
                lengths[last] = numel - (last - int(self.tile_starts[i])) * TILE
        return torch.from_numpy(lengths)

    @cached_property
    def _ordinals(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def ordinal(self, name: str) -> int:
        """Position of a tensor in canonical order.

        Raises:
            KeyError: There is no tensor of that name.
        """
        try:
            return self._ordinals[name]
        except KeyError:
            raise KeyError(
                f"no tensor named {name!r} among the {len(self.names)} of this layout"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._ordinals

    def __len__(self) -> int:
        return len(self.names)

    def tiles_of(self, name: str) -> slice:
        """The tiles of one tensor."""
        i = self.ordinal(name)
        return slice(int(self.tile_starts[i]), int(self.tile_starts[i + 1]))

    def locate(self, tile: int) -> tuple[str, int]:
        """The tensor that a tile belongs to, and the flat index of the tile's first element in
        it.
        """
        i = int(np.searchsorted(self.tile_starts, tile, side="right")) - 1
        return self.names[i], (tile - int(self.tile_starts[i])) * TILE

    def __repr__(self) -> str:
        return f"Layout({len(self.names)} tensors, {self.numel:,} elements, {self.n_tiles:,} tiles)"


class Support:
    """Which entries of a set of tensors are selected.

    Args:
        layout: The tensors.
        idx: uint16 [nnz], offset of each entry inside its tile, strictly ascending in each tile.
        ptr: int64 [layout.n_tiles + 1], first entry of each tile.

    Raises:
        ValueError: The arrays do not describe entries of this layout.
    """

    def __init__(self, layout: Layout, idx: Tensor, ptr: Tensor, *, check: bool = True) -> None:
        self.layout = layout
        self.idx = idx
        self.ptr = ptr
        # How a selection went: threshold, ties (set by `sparse_ft.select`).
        self.info: dict[str, Any] = {}
        if check:
            self._check()

    def _check(self) -> None:
        from sparse_ft_kernels import check_support

        if self.idx.dtype != torch.uint16 or self.idx.dim() != 1 or not self.idx.is_contiguous():
            raise ValueError(
                f"Support: idx must be a contiguous uint16 vector, got {self.idx.dtype} "
                f"of shape {tuple(self.idx.shape)}"
            )
        if self.ptr.dtype != torch.int64 or tuple(self.ptr.shape) != (self.layout.n_tiles + 1,):
            raise ValueError(
                f"Support: ptr must be int64 of shape ({self.layout.n_tiles + 1},), one more than "
                "the "
                f"tiles of the layout, got {self.ptr.dtype} of shape {tuple(self.ptr.shape)}"
            )
        code, tile, entry, _ = check_support(self.layout.lengths, self.idx, self.ptr, None).tolist()
        if code:
            what = {
                1: f"ptr must run from 0 to nnz = {len(self.idx)}",
                2: "ptr decreases, or gives a tile more entries than it has elements",
                3: "idx is not strictly ascending inside a tile",
                4: "idx points beyond the end of its tensor",
            }[code]
            where = self.layout.locate(tile)[0] if self.layout.n_tiles else "an empty layout"
            raise ValueError(f"Support: {what} (in {where!r}, tile {tile}, entry {entry})")

    @classmethod
    def from_indices(
        cls, layout: Layout, indices: Mapping[str, Tensor | np.ndarray | Sequence[int]]
    ) -> Support:
        """A support from flat row-major positions.

        Args:
            layout: The tensors; those absent from `indices` have no selected entry.
            indices: Tensor name → int64 positions, in any order, without repetition.

        Raises:
            KeyError: A name is not in the layout.
            ValueError: A position is no integer, repeated or out of range.
        """
        counts = np.zeros(layout.n_tiles, np.int64)
        parts: list[np.ndarray] = []
        by_ordinal = {layout.ordinal(name): name for name in indices}
        for i in sorted(by_ordinal):
            name = by_ordinal[i]
            raw = indices[name]
            found = raw.detach().cpu().numpy() if isinstance(raw, Tensor) else np.asarray(raw)
            if not found.size:
                continue
            if found.dtype.kind not in "iu":
                raise ValueError(
                    f"Support: positions of {name!r} must be integers, got {found.dtype}; "
                    "from_masks takes masks"
                )
            flat = np.sort(found.astype(np.int64).reshape(-1))
            if flat[0] < 0 or flat[-1] >= layout.numels[i]:
                raise ValueError(
                    f"Support: positions of {name!r} run from {flat[0]} to {flat[-1]}, "
                    f"but it has {layout.numels[i]} elements"
                )
            if (flat[1:] == flat[:-1]).any():
                raise ValueError(f"Support: a position of {name!r} is given twice")
            first, last = int(layout.tile_starts[i]), int(layout.tile_starts[i + 1])
            counts[first:last] = np.bincount(flat // TILE, minlength=last - first)
            parts.append((flat % TILE).astype(np.uint16))
        idx = np.concatenate(parts) if parts else np.zeros(0, np.uint16)
        ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return cls(layout, torch.from_numpy(idx), torch.from_numpy(ptr), check=False)

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor]) -> Support:
        """A support from boolean masks, one per tensor (True: selected)."""
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"Support: the mask of {name!r} must be bool, got {mask.dtype}")
        layout = Layout.of(masks)
        parts, counts = [], []
        for name, numel in zip(layout.names, layout.numels, strict=True):
            # In order and without repetition already, unlike the positions of from_indices.
            at = masks[name].detach().reshape(-1).nonzero().view(-1)
            tiles = -(-numel // TILE)
            starts = torch.arange(tiles + 1, device=at.device) * TILE
            counts.append(torch.searchsorted(at, starts).diff().cpu())
            # A tile has 65,536 entries, so the low 16 bits are the place within it.
            parts.append(at.to(torch.uint16).cpu())
        idx = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint16)
        ptr = torch.zeros(layout.n_tiles + 1, dtype=torch.int64)
        if counts:
            torch.cumsum(torch.cat(counts), 0, out=ptr[1:])
        return cls(layout, idx, ptr, check=False)

    @classmethod
    def full(cls, layout: Layout) -> Support:
        """The support that selects every entry."""
        lengths = layout.lengths.to(torch.int64)
        ptr = torch.zeros(layout.n_tiles + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=ptr[1:])
        ramp = np.arange(TILE, dtype=np.uint16)
        pieces = [ramp[:n] for n in lengths.tolist()]
        idx = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
        return cls(layout, torch.from_numpy(idx), ptr, check=False)

    @property
    def nnz(self) -> int:
        """Selected entries."""
        return self.idx.numel()

    @property
    def density(self) -> float:
        """Selected entries over all entries of the layout."""
        return self.nnz / self.layout.numel if self.layout.numel else 0.0

    @property
    def device(self) -> torch.device:
        return self.idx.device

    @cached_property
    def starts(self) -> np.ndarray:
        """First entry of each tensor, and nnz at the end (int64 [len(layout) + 1])."""
        return np.asarray(self.ptr.cpu().numpy()[self.layout.tile_starts])

    def entries_of(self, name: str) -> slice:
        """Where one tensor's entries lie in `idx` and in every array that runs beside it."""
        i = self.layout.ordinal(name)
        return slice(int(self.starts[i]), int(self.starts[i + 1]))

    def indices(self, name: str) -> Tensor:
        """Flat row-major positions of one tensor's selected entries (int64, ascending)."""
        entries = self.entries_of(name)
        tiles = self.layout.tiles_of(name)
        counts = self.ptr[tiles.start + 1 : tiles.stop + 1] - self.ptr[tiles.start : tiles.stop]
        base = torch.arange(tiles.stop - tiles.start, device=self.device) * TILE
        return self.idx[entries].to(torch.int64) + torch.repeat_interleave(base, counts)

    def mask(self, name: str) -> Tensor:
        """One tensor's selection as a boolean tensor of its shape."""
        i = self.layout.ordinal(name)
        flat = torch.zeros(self.layout.numels[i], dtype=torch.bool, device=self.device)
        flat[self.indices(name)] = True
        return flat.reshape(self.layout.shapes[i])

    def counts(self) -> dict[str, int]:
        """Selected entries of each tensor."""
        starts = self.starts.tolist()
        return {name: starts[i + 1] - starts[i] for i, name in enumerate(self.layout.names)}

    def restrict(self, names: Iterable[str]) -> Support:
        """The same selection over some of the tensors only."""
        keep = sorted(set(names))
        return self._relayout(
            Layout(tuple(keep), tuple(self.layout.shapes[self.layout.ordinal(n)] for n in keep))
        )

    def expand(self, layout: Layout) -> Support:
        """The same selection over a layout that holds further tensors, none of them selected.

        Raises:
            ValueError: A tensor with selected entries is missing there, or has another shape.
        """
        for i, name in enumerate(self.layout.names):
            if name not in layout:
                if self.starts[i + 1] > self.starts[i]:
                    raise ValueError(f"Support: the wider layout lacks {name!r}")
            elif layout.shapes[layout.ordinal(name)] != self.layout.shapes[i]:
                raise ValueError(
                    f"Support: {name!r} has shape {self.layout.shapes[i]} here and "
                    f"{layout.shapes[layout.ordinal(name)]} in the other layout"
                )
        return self._relayout(layout)

    def _relayout(self, layout: Layout) -> Support:
        if layout == self.layout:
            return self
        ptr = self.ptr.cpu().numpy()
        counts = np.zeros(layout.n_tiles, np.int64)
        pieces = []
        for i, name in enumerate(layout.names):
            if name not in self.layout:
                continue
            tiles = self.layout.tiles_of(name)
            own = np.diff(ptr[tiles.start : tiles.stop + 1])
            counts[int(layout.tile_starts[i]) : int(layout.tile_starts[i + 1])] = own
            pieces.append(self.idx[self.entries_of(name)])
        new_ptr = torch.from_numpy(np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))
        # Where nothing is dropped the entries stand in the same order: share them.
        same = int(counts.sum()) == self.nnz
        idx = self.idx if same else torch.cat(pieces) if pieces else self.idx[:0]
        return Support(layout, idx, new_ptr.to(self.device), check=False)

    def to(self, device: torch.device | str) -> Support:
        """The same support on another device."""
        return Support(self.layout, self.idx.to(device), self.ptr.to(device), check=False)

    def __len__(self) -> int:
        return self.nnz

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Tensor by tensor: name, flat positions. Tensors without selected entries are left out."""
        for name, count in self.counts().items():
            if count:
                yield name, self.indices(name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Support):
            return NotImplemented
        return (
            self.layout == other.layout
            and torch.equal(self.ptr.cpu(), other.ptr.cpu())
            and torch.equal(self.idx.cpu().view(torch.int16), other.idx.cpu().view(torch.int16))
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[object, ...]:
        # torch pickles no uint16.
        return _unpickled, (self.layout, self.idx.view(torch.int16), self.ptr, self.info)

    def __repr__(self) -> str:
        return (
            f"Support({self.nnz:,} of {self.layout.numel:,} entries, {self.density:.3%}, "
            f"{len(self.layout)} tensors, {self.device})"
        )


def _unpickled(layout: Layout, idx: Tensor, ptr: Tensor, info: dict[str, Any]) -> Support:
    support = Support(layout, idx.view(torch.uint16), ptr, check=False)
    support.info = dict(info)
    return support
