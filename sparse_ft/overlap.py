"""overlap: which entries sparse fine-tunings share, and whether they pull the same way there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparse_ft_kernels import overlap as overlap_entries

from .delta import SparseDelta
from .merge import given, union_layout

__all__ = ["Overlap", "overlap"]


@dataclass(frozen=True)
class Overlap:
    """Pairwise overlap of n sparse fine-tunings.

    Attributes:
        names: Names of the tensors, in canonical order.
        numel: Elements of those tensors.
        nnz: [n] entries of each.
        both: [n, n] entries in both.
        same_sign: [n, n] of those, entries with equal sign.
        dot: [n, n] Σab over the entries in both, fp64; its diagonal is the squared norm.
        energy: [n, n] Σa² over the entries in both, a being the row.
        by_tensor: [n, n, tensors] entries in both, tensor by tensor.
    """

    names: tuple[str, ...]
    numel: int
    nnz: np.ndarray
    both: np.ndarray
    same_sign: np.ndarray
    dot: np.ndarray
    energy: np.ndarray
    by_tensor: np.ndarray

    @property
    def either(self) -> np.ndarray:
        """[n, n] entries in at least one of the two."""
        return np.asarray(self.nnz[:, None] + self.nnz[None, :] - self.both)

    @property
    def jaccard(self) -> np.ndarray:
        """[n, n] entries in both over entries in either."""
        return np.asarray(self.both / np.maximum(self.either, 1))

    @property
    def share(self) -> np.ndarray:
        """[n, n] share of the row's entries that the column has too (LT-SFT, figure 5)."""
        return np.asarray(self.both / np.maximum(self.nnz[:, None], 1))

    @property
    def expected_share(self) -> np.ndarray:
        """[n, n] the share that random supports of these sizes would have."""
        return np.broadcast_to(self.nnz[None, :] / max(self.numel, 1), self.both.shape)

    @property
    def cosine(self) -> np.ndarray:
        """[n, n] cosine of the two difference vectors."""
        norm = np.sqrt(np.diagonal(self.dot))
        return np.asarray(self.dot / np.maximum(norm[:, None] * norm[None, :], 1e-300))

    def __repr__(self) -> str:
        n = len(self.nnz)
        lines = [
            f"Overlap of {n} deltas over {self.numel:,} entries: share of the row's entries in "
            "the column, %"
        ]
        for i in range(n):
            cells = " ".join(f"{100 * self.share[i, j]:6.2f}" for j in range(n))
            lines.append(f"  {i:>2} ({self.nnz[i]:>11,})  {cells}")
        return "\n".join(lines)


@torch.no_grad()
def overlap(deltas: Sequence[SparseDelta]) -> Overlap:
    """Compares sparse fine-tunings pair by pair, in one pass over the entries of each pair.

    Args:
        deltas: At least one.

    Returns:
        Counts, signs and products as matrices; nothing dense is built.

    Raises:
        SFTError: The deltas disagree about a tensor's shape.
    """
    chosen = given("overlap", deltas)
    union = union_layout("overlap", chosen)
    device = chosen[0].device
    supports = [d.support.expand(union).to(device) for d in chosen]
    values = [d.val.to(device) for d in chosen]
    n = len(chosen)
    both = np.zeros((n, n), np.int64)
    same_sign = np.zeros((n, n), np.int64)
    dot = np.zeros((n, n))
    energy = np.zeros((n, n))
    by_tensor = np.zeros((n, n, len(union)), np.int64)
    first = union.tile_starts
    for i in range(n):
        for j in range(i, n):
            counts, dots = overlap_entries(
                *(supports[i].idx, supports[i].ptr, values[i]),
                *(supports[j].idx, supports[j].ptr, values[j]),
            )
            tiles = counts.cpu().numpy()
            running = np.concatenate([np.zeros(1, np.int64), np.cumsum(tiles[:, 0])])
            by_tensor[i, j] = by_tensor[j, i] = np.diff(running[first])
            both[i, j], same_sign[i, j] = tiles.sum(0)
            both[j, i], same_sign[j, i] = both[i, j], same_sign[i, j]
            # Tile after tile, so that the sum has one order on every machine.
            ab, aa, bb = np.cumsum(dots.cpu().numpy(), axis=0)[-1] if len(dots) else np.zeros(3)
            dot[i, j] = dot[j, i] = ab
            energy[i, j], energy[j, i] = aa, bb
    nnz = np.asarray([s.nnz for s in supports], np.int64)
    return Overlap(union.names, union.numel, nnz, both, same_sign, dot, energy, by_tensor)
