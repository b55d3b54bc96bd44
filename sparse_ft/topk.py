"""TopK: the K largest of scores that come tensor by tensor, of which few are held at a time.

What it selects is, bit for bit, what `select_topk` would select from all scores at once. For the
selection within a tensor is the head of that tensor's own ranking, so its own top K holds it; and
once K candidates are there, the K-th largest is a floor that later entries must exceed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_ft_kernels import TILE, NonFiniteError, select_topk

from .tiles import Layout, Support

__all__ = ["TopK"]

# Entries whose scores are looked at together: 8 MB of fp32.
CHUNK = 32 * TILE


@dataclass
class _Piece:
    """The candidates of a chunk: uint16 offsets and fp32 |scores|; first entry of each tile."""

    idx: Tensor
    size: Tensor
    ptr: Tensor


class TopK:
    """Selects the k entries of largest |score|, over tensors that are added in canonical order.

    It holds at most about 1.25 k candidates, of 6 bytes each, and two chunks of fp32 scores.

    Args:
        k: Entries to select, at least 1 and at most those that will be added.
        tie: "index" or "all", as in `select_topk`.
        exclude: idx and ptr, over all tiles to come, of entries that must not be selected.
        device: Where candidates are kept.
    """

    def __init__(
        self,
        k: int,
        tie: str = "index",
        exclude: tuple[Tensor, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.k = k
        self.tie = tie
        self.device = torch.device(device)
        self._exclude = None if exclude is None else (exclude[0], exclude[1].cpu())
        self._pieces: list[_Piece] = []
        self._held = 0
        self._tensors = self._tiles = self._eligible = 0
        # The K-th largest so far, or a value that every entry exceeds and no excluded one does.
        self._floor = -1.0
        # Entries that were dropped at the highest score at which any was.
        self._dropped = (-1.0, 0)

    def add(self, a: Tensor, b: Tensor | None = None) -> None:
        """Adds the next tensor.

        Args:
            a: Its scores, of any shape and floating data type, on any device.
            b: Values to subtract from them in fp32, of the same shape.

        Raises:
            NonFiniteError: A score is NaN or infinite, and not excluded.
        """
        a, b = a.detach().reshape(-1), b.detach().reshape(-1) if b is not None else None
        for first in range(0, a.numel(), CHUNK):
            score = self._fp32(a[first : first + CHUNK])
            if b is None:
                self._add(score.abs())
            else:
                self._add((score - self._fp32(b[first : first + CHUNK])).abs_())
        self._tensors += 1

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """idx, ptr and the info vector, as `select_topk` returns them."""
        info = self._prune()
        counts = [piece.ptr.diff() for piece in self._pieces]
        idx = [piece.idx.view(torch.int16) for piece in self._pieces]
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        ptr = torch.cat([zero, *counts]).cumsum(0)
        # The pruning has seen to it that these are at the threshold.
        info[3] = info[4] + self._dropped[1]
        info[7] = self._eligible
        return torch.cat([zero[:0].to(torch.int16), *idx]).view(torch.uint16), ptr, info

    def _fp32(self, values: Tensor) -> Tensor:
        return values.to(device=self.device, dtype=torch.float32)

    def _add(self, size: Tensor) -> None:
        tile, tiles = self._tiles, -(-size.numel() // TILE)
        self._tiles += tiles
        self._eligible += size.numel()
        layout, exclude = Layout(("",), ((size.numel(),),)), None
        if self._exclude is not None:
            ptr = self._exclude[1][tile : tile + tiles + 1]
            exclude = self._exclude[0][ptr[0] : ptr[-1]], (ptr - ptr[0]).to(self.device)
            size[Support(layout, *exclude, check=False).indices("")] = -2.0
            self._eligible -= len(exclude[0])
        largest = float(size.max())
        if not math.isfinite(largest):
            bad = int((~size.isfinite()).nonzero()[0])
            raise NonFiniteError(tile + bad // TILE, self._tensors)
        wanted = 0
        if largest >= self._floor:
            tied = int((size == self._floor).count_nonzero())
            if self.tie == "index":
                # Those before them in canonical order fill the room already.
                self._drop(self._floor, tied)
                tied = 0
            wanted = min(self.k, int((size > self._floor).count_nonzero()) + tied)
        if not wanted:
            none = torch.zeros(tiles + 1, dtype=torch.int64, device=self.device)
            empty = torch.zeros(0, dtype=torch.uint16, device=self.device)
            self._pieces.append(_Piece(empty, size.new_zeros(0), none))
            return
        idx, ptr, info = select_topk([size], k=wanted, exclude=exclude, tie=self.tie)
        if wanted == self.k:
            self._drop(_threshold(info), int(info[3] - info[4]))
        at = Support(layout, idx, ptr, check=False).indices("")
        self._pieces.append(_Piece(idx, size[at], ptr))
        self._held += len(at)
        if self._held >= self.k + self.k // 4:
            self._floor = _threshold(self._prune())

    def _prune(self) -> Tensor:
        """Drops candidates that are not among the k largest; gives the info of `select_topk`."""
        full = [piece for piece in self._pieces if len(piece.idx)]
        idx, ptr, info = select_topk(
            [piece.size for piece in full], k=min(self.k, self._held), tie=self.tie
        )
        names = tuple(f"{i:012}" for i in range(len(full)))
        layout = Layout(names, tuple((len(piece.idx),) for piece in full))
        kept = Support(layout, idx, ptr, check=False)
        for name, piece in zip(names, full, strict=True):
            at = kept.indices(name)
            piece.idx = piece.idx.view(torch.int16)[at].view(torch.uint16)
            piece.size = piece.size[at]
            piece.ptr = torch.searchsorted(at, piece.ptr)
        self._held = kept.nnz
        self._drop(_threshold(info), int(info[3] - info[4]))
        return info

    def _drop(self, score: float, count: int) -> None:
        """Counts entries that tie with a score and are left out. All left out before are at it, or
        below."""
        if score > self._dropped[0]:
            self._dropped = (score, 0)
        if score == self._dropped[0]:
            self._dropped = (score, self._dropped[1] + count)


def _threshold(info: Tensor) -> float:
    return float(info[:1].to(torch.int32).view(torch.float32))
