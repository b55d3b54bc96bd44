"""overlap: which entries sparse fine-tunings share, and whether they pull the same way there."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, combinations_with_replacement
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparse_ft_kernels import overlap as overlap_entries

from .delta import SparseDelta
from .merge import renamed, shared_names, some, union_layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import ConsoleRenderable

__all__ = ["METRICS", "Overlap", "layer_of", "overlap"]

EMBEDDINGS, OTHER = "embeddings", "other"
# What table() and plot() can show: a matrix of Overlap → what it says, and how a value is written.
METRICS = {
    "both": ("entries in both", ",.0f"),
    "expected": ("entries in both by chance", ",.0f"),
    "lift": ("entries in both, times chance", ".2f"),
    "share": ("share of the row's entries that the column has too", ".1%"),
    "expected_share": ("share of the row's entries in the column by chance", ".1%"),
    "jaccard": ("entries in both over entries in either", ".1%"),
    "expected_jaccard": ("entries in both over entries in either, by chance", ".1%"),
    "sign_agreement": ("share of the entries in both whose signs agree", ".1%"),
    "cosine": ("cosine", ".3f"),
    "cosine_common": ("cosine over the entries in both", ".3f"),
    "energy_share": ("share of the row's squared norm on entries in both", ".1%"),
    "interference": ("energy lost in the sum", ".3f"),
    "embedding_share": ("share of the entries in both that lie in embeddings", ".1%"),
}
# Those that have a sign: a heat map shows them about 0, and at least as far as this on either side.
_SIGNED = ("cosine", "cosine_common", "interference")
_LEAST_SIGNED = 0.05
# Up to this many fine-tunings a heat map has its values written into it.
_ANNOTATED = 16
_PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def layer_of(name: str) -> str:
    """The part of a model that a tensor belongs to, told by the components of its name.

    The first component that is an integer or contains "embed" decides: the name up to the integer
    ("encoder.layer.7"), or "embeddings"; without one, "other".

    Args:
        name: Of a tensor, components separated by dots.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
        if "embed" in part.lower():
            return EMBEDDINGS
    return OTHER


def _place(layer: str) -> tuple[int, str, int]:
    """Sorts layers: embeddings, then by number, then the rest."""
    stem, _, number = layer.rpartition(".")
    if layer in (EMBEDDINGS, OTHER):
        return (0 if layer == EMBEDDINGS else 2, "", 0)
    return 1, stem, int(number)


def _shared_start(texts: Sequence[str]) -> int:
    """Length of what all texts begin with, up to the end of a word."""
    end = 0
    for i, letters in enumerate(zip(*texts, strict=False), 1):
        if len(set(letters)) > 1:
            break
        end = i if letters[0] in "-_./ " else end
    return end


def _short(labels: Sequence[str]) -> list[str]:
    """Labels without the words that all begin with, and without those that all end with."""
    first = _shared_start(labels)
    last = _shared_start([label[first:][::-1] for label in labels])
    short = [label[first : len(label) - last] for label in labels]
    return short if all(short) else list(labels)


def _written(value: float, spec: str) -> str:
    """A value as `METRICS` says, and what rounds to 0 without a sign; "" for NaN."""
    if math.isnan(value):
        return ""
    text = format(value, spec)
    return text if text.strip("-0.%") else text.removeprefix("-")


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below; NaN where below is 0: there is nothing to take a share of."""
    out = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    np.divide(above, below, out=out, where=below != 0)
    return out


@dataclass(frozen=True, repr=False)
class Overlap:
    """Pairwise overlap of n sparse fine-tunings.

    A matrix has a row and a column for each. Where two share no entry, what is a mean over the
    shared ones is NaN.

    Attributes:
        labels: What each is called.
        names: Names of the tensors, in canonical order.
        sizes: [tensors] elements of each tensor.
        nnz: [n] entries of each.
        both: [n, n] entries in both.
        same_sign: [n, n] of those, entries with equal sign. A value of 0 agrees with none.
        dot: [n, n] Σab over the entries in both, fp64; its diagonal is the squared norm.
        energy: [n, n] Σa² over the entries in both, a being the row.
        by_tensor: [n, n, tensors] entries in both, tensor by tensor.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    sizes: np.ndarray
    nnz: np.ndarray
    both: np.ndarray
    same_sign: np.ndarray
    dot: np.ndarray
    energy: np.ndarray
    by_tensor: np.ndarray

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return int(self.sizes.sum())

    @property
    def either(self) -> np.ndarray:
        """[n, n] entries in at least one of the two."""
        return np.asarray(self.nnz[:, None] + self.nnz[None, :] - self.both)

    @property
    def expected(self) -> np.ndarray:
        """[n, n] |A|·|B| / N: the mean of `both` over random supports of these sizes."""
        nnz = self.nnz.astype(np.float64)
        return np.asarray(nnz[:, None] * nnz[None, :] / max(self.numel, 1))

    @property
    def lift(self) -> np.ndarray:
        """[n, n] entries in both over those expected by chance."""
        return _ratio(self.both, self.expected)

    @property
    def jaccard(self) -> np.ndarray:
        """[n, n] entries in both over entries in either."""
        return np.asarray(self.both / np.maximum(self.either, 1))

    @property
    def expected_jaccard(self) -> np.ndarray:
        """[n, n] the Jaccard index at the chance level of `both`."""
        both = self.expected
        return np.asarray(both / np.maximum(self.nnz[:, None] + self.nnz[None, :] - both, 1))

    @property
    def share(self) -> np.ndarray:
        """[n, n] share of the row's entries that the column has too (LT-SFT, figure 5)."""
        return np.asarray(self.both / np.maximum(self.nnz[:, None], 1))

    @property
    def expected_share(self) -> np.ndarray:
        """[n, n] the share that random supports of these sizes would have."""
        return np.broadcast_to(self.nnz[None, :] / max(self.numel, 1), self.both.shape)

    @property
    def sign_agreement(self) -> np.ndarray:
        """[n, n] share of the entries in both whose signs agree."""
        return _ratio(self.same_sign, self.both)

    @property
    def cosine(self) -> np.ndarray:
        """[n, n] cosine of the two difference vectors."""
        norm = np.sqrt(np.diagonal(self.dot))
        return np.asarray(self.dot / np.maximum(norm[:, None] * norm[None, :], 1e-300))

    @property
    def cosine_common(self) -> np.ndarray:
        """[n, n] cosine of the two difference vectors cut to the entries in both."""
        norm = np.sqrt(self.energy)
        return _ratio(self.dot, norm * norm.T)

    @property
    def energy_share(self) -> np.ndarray:
        """[n, n] share of the row's squared norm that lies on entries in both."""
        return _ratio(self.energy, np.diagonal(self.dot)[:, None])

    @property
    def interference(self) -> np.ndarray:
        """[n, n] energy that the sum of the two loses: 1 − |a + b|² / (|a|² + |b|²).

        From −1 (b = a: they add up) over 0 (disjoint or orthogonal) to 1 (b = −a: they cancel).
        """
        norm = np.diagonal(self.dot)
        # |a + b|² = |a|² + |b|² + 2ab; + 0.0, since −0 would print as such.
        return _ratio(-2 * self.dot, norm[:, None] + norm[None, :]) + 0.0

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The layers of the model that have tensors here (see `layer_of`), embeddings first."""
        return tuple(sorted({layer_of(name) for name in self.names}, key=_place))

    def by_layer(self, counts: np.ndarray) -> np.ndarray:
        """Sums counts by tensor to counts by layer.

        Args:
            counts: [..., tensors], as `by_tensor` or `sizes`.

        Returns:
            [..., layers], in the order of `layers`.
        """
        place = {layer: i for i, layer in enumerate(self.layers)}
        out = np.zeros((*counts.shape[:-1], len(place)), counts.dtype)
        for t, name in enumerate(self.names):
            out[..., place[layer_of(name)]] += counts[..., t]
        return out

    @property
    def embedding_share(self) -> np.ndarray:
        """[n, n] share of the entries in both that lie in embeddings (see `layer_of`); on the
        diagonal, of all entries.
        """
        inside = np.array([layer_of(name) == EMBEDDINGS for name in self.names], bool)
        return _ratio(self.by_tensor[..., inside].sum(-1), self.both)

    def rows(self) -> list[dict[str, Any]]:
        """Everything that there is to say of each pair, one dictionary a pair; None for NaN.

        Keys that end in _a and _b are of the one and of the other; shares are fractions of 1.
        """
        symmetric = (
            *("both", "expected", "lift", "jaccard", "expected_jaccard", "sign_agreement"),
            *("cosine", "cosine_common", "interference", "embedding_share"),
        )
        matrices = {name: getattr(self, name) for name in (*symmetric, "share", "energy_share")}

        def value(name: str, i: int, j: int) -> float | None:
            number = matrices[name][i, j].item()
            return None if math.isnan(number) else number

        return [
            {
                "a": self.labels[i],
                "b": self.labels[j],
                "entries_a": int(self.nnz[i]),
                "entries_b": int(self.nnz[j]),
                **{name: value(name, i, j) for name in symmetric},
                **{f"{name}_a": value(name, i, j) for name in ("share", "energy_share")},
                **{f"{name}_b": value(name, j, i) for name in ("share", "energy_share")},
            }
            for i, j in combinations(range(len(self.labels)), 2)
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes `rows()` as a table of comma-separated values; what is None stays empty.

        Args:
            path: The file.
        """
        rows = self.rows()
        with open(path, "w", encoding="utf-8", newline="") as file:
            # Two labels always give one row, so its keys serve where there is no pair.
            keys = list(rows[0]) if rows else ["a", "b"]
            writer = csv.DictWriter(file, keys)
            writer.writeheader()
            writer.writerows(rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it: labels, entries, the pairs, and entries in both by layer."""
        both, sizes = self.by_layer(self.by_tensor), self.by_layer(self.sizes)
        return {
            "labels": list(self.labels),
            "numel": self.numel,
            "entries": self.nnz.tolist(),
            "pairs": self.rows(),
            "layers": [
                {"layer": layer, "numel": int(sizes[i]), "both": both[..., i].tolist()}
                for i, layer in enumerate(self.layers)
            ],
        }

    def table(self, metric: str = "share") -> ConsoleRenderable:
        """A matrix as a table that `rich.print` shows; a notebook shows it as it is.

        The rows have the labels in full, the columns without the words that all labels begin or end
        with. Columns that do not fit beside each other follow below.

        Args:
            metric: One of `METRICS`.

        Raises:
            ValueError: An unknown metric.
        """
        from .matrix import Matrix

        _, cells, title, _ = self._metric("table", metric)
        entries = [f"{nnz:,}" for nnz in self.nnz.tolist()]
        return Matrix(title, self.labels, _short(self.labels), entries, cells)

    def plot(self, path: str | os.PathLike[str], metric: str = "share") -> None:
        """Draws a matrix as a heat map. The diagonal stays empty: it would set the scale.

        Colours begin at 0, or for cosines and interference are centred there, and reach as far as
        the values do; values that are written nearly alike never fill the whole scale.

        Args:
            path: The file; its suffix (.png, .svg, .pdf) says of which kind.
            metric: One of `METRICS`.

        Raises:
            ValueError: An unknown metric or suffix.
            ModuleNotFoundError: matplotlib is not installed.
        """
        values, cells, title, spec = self._metric("plot", metric)
        n = len(self.labels)
        few = n <= _ANNOTATED
        # Inches; a character is about 0.07 wide.
        cell = 0.08 * max(7, *(len(text) for row in cells for text in row)) if few else 0.17
        side, size = max(2.4, n * cell), 9 if few else 6
        # The map fills the figure: all else lies outside, and what is saved grows to hold it.
        figure = new_figure("Overlap.plot", path, side, side)
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes = figure.add_axes((0, 0, 1, 1), facecolor="0.8")
        high = min(1.0, 5 / side)
        bar = figure.add_axes((1 + 0.2 / side, 1 - high, 0.2 / side, high))
        shown = np.ma.masked_invalid(np.where(np.eye(n, dtype=bool), np.nan, values))
        # Ten units of the last place that is written, so that ticks are not written alike.
        places = int(spec.rstrip("f%")[-1]) + 2 * spec.endswith("%")
        most = np.max(np.abs(shown.compressed()), initial=10.0 ** (1 - places))
        if metric in _SIGNED:
            most = max(most, _LEAST_SIGNED)
            image = axes.imshow(shown, cmap="RdBu_r", vmin=-most, vmax=most)
        else:
            image = axes.imshow(shown, cmap="viridis", vmin=0, vmax=most)
        figure.colorbar(
            image,
            bar,
            format=FuncFormatter(lambda value, _: _written(value, spec)),
            ticks=MaxNLocator(8, steps=[1, 2, 5, 10]),
        )
        # A label is not a formula, whatever dollars it has.
        axes.set_xticks(range(n), _short(self.labels), rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(n), self.labels, fontsize=size, parse_math=False)
        axes.set_title(title, loc="left", fontsize=10)
        light = image.to_rgba(shown)[..., :3] @ (0.299, 0.587, 0.114) > 0.5
        for i, j in np.argwhere(~np.ma.getmaskarray(shown)) if few else ():
            colour = "black" if light[i, j] else "white"
            axes.text(j, i, cells[i][j], ha="center", va="center", color=colour, fontsize=8)
        figure.savefig(path, dpi=150, bbox_inches="tight")

    def plot_layers(self, path: str | os.PathLike[str]) -> None:
        """Draws by layer the Jaccard index of the pairs, and its chance level there.

        The line is the median over the pairs, the band reaches from the least to the greatest. The
        chance level is that of random entries, as many in each layer as each fine-tuning has there.

        Args:
            path: The file; its suffix (.png, .svg, .pdf) says of which kind.

        Raises:
            ValueError: There is no pair, or an unknown suffix.
            ModuleNotFoundError: matplotlib is not installed.
        """
        n = len(self.labels)
        if n < 2:
            raise ValueError("Overlap.plot_layers: one fine-tuning makes no pair; compare several")
        both, sizes = self.by_layer(self.by_tensor).astype(np.float64), self.by_layer(self.sizes)
        first, second = np.triu_indices(n, 1)
        a, b, both = both[first, first], both[second, second], both[first, second]
        chance = a * b / np.maximum(sizes, 1)
        index, by_chance = (100 * x / np.maximum(a + b - x, 1) for x in (both, chance))
        places = np.arange(len(self.layers))
        figure = new_figure("Overlap.plot_layers", path, max(5.0, 0.3 * len(places) + 2), 4.5)
        axes = figure.subplots()
        axes.fill_between(places, index.min(0), index.max(0), color="#0072B2", alpha=0.2, lw=0)
        median = np.median(index, 0)
        axes.plot(places, median, "o-", color="#0072B2", markersize=4, label="median of the pairs")
        by_chance = np.median(by_chance, 0)
        axes.plot(places, by_chance, "--", color="#D55E00", label="by chance")
        numbered = [layer for layer in self.layers if layer not in (EMBEDDINGS, OTHER)]
        short = dict(zip(numbered, _short(numbered), strict=True))
        names = [short.get(layer, layer) for layer in self.layers]
        axes.set_xticks(places, names, rotation=90, fontsize=8, parse_math=False)
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("entries in both over entries in either, %")
        pairs = f"{len(first):,} pair{'s' if len(first) > 1 else ''}"
        axes.set_title(f"Overlap by layer, {pairs}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150, bbox_inches="tight")

    def _metric(self, what: str, metric: str) -> tuple[np.ndarray, list[list[str]], str, str]:
        """A matrix, its values as they are written, what it says, and how a value is written."""
        if metric not in METRICS:
            raise ValueError(
                f"Overlap.{what}: unknown metric {metric!r}; there are {', '.join(METRICS)}"
            )
        title, spec = METRICS[metric]
        values = np.asarray(getattr(self, metric), np.float64)
        cells = [[_written(value, spec) for value in row] for row in values.tolist()]
        return values, cells, title, spec

    def __repr__(self) -> str:
        n = len(self.nnz)
        lines = [
            f"Overlap of {n} deltas over {self.numel:,} entries: share of the row's entries in "
            "the column, %"
        ]
        width = max(len(label) for label in self.labels)
        for i in range(n):
            cells = " ".join(f"{100 * self.share[i, j]:6.2f}" for j in range(n))
            lines.append(f"  {self.labels[i]:>{width}} ({self.nnz[i]:>11,})  {cells}")
        return "\n".join(lines)


def new_figure(where: str, path: str | os.PathLike[str], width: float, height: float) -> Figure:
    if os.path.splitext(path)[1].lower() not in _PLOT_SUFFIXES:
        raise ValueError(
            f"{where}: path must end in {', '.join(_PLOT_SUFFIXES[:-1])} or "
            f"{_PLOT_SUFFIXES[-1]}, found {os.fspath(path)!r}"
        )
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{where} needs matplotlib, which is not installed. Install it with: "
            'pip install "sparse-ft[plot]"',
            name=error.name,
        ) from None
    return Figure(figsize=(width, height))


@torch.no_grad()
def overlap(
    deltas: SparseDelta | Iterable[SparseDelta],
    names: Sequence[str] | None = None,
    *,
    progress: bool = False,
) -> Overlap:
    """Compares sparse fine-tunings pair by pair, in one pass over the entries of each pair.

    Args:
        deltas: At least one.
        names: What to call each, all different. Default: the language or task that its metadata
            name, and its number where those do not tell all apart.
        progress: Show a progress bar over the pairs.

    Returns:
        Counts, signs and products as matrices; nothing dense is built.

    Raises:
        SFTError: The deltas disagree about a tensor's shape.
        ValueError: No deltas, or names that do not fit.
    """
    chosen = some("overlap", deltas)
    labels = _labels(chosen, names)
    shared = shared_names("overlap", chosen)
    union = union_layout("overlap", chosen, shared)
    device = chosen[0].device
    own = [renamed(d, s, device) for d, s in zip(chosen, shared, strict=True)]
    supports = [support.expand(union) for support, _ in own]
    values = [val for _, val in own]
    n = len(chosen)
    both = np.zeros((n, n), np.int64)
    same_sign = np.zeros((n, n), np.int64)
    dot = np.zeros((n, n))
    energy = np.zeros((n, n))
    by_tensor = np.zeros((n, n, len(union)), np.int64)
    first = union.tile_starts
    pairs: Iterable[tuple[int, int]] = list(combinations_with_replacement(range(n), 2))
    if progress:
        from rich.console import Console
        from rich.progress import track

        pairs = track(pairs, "overlap", console=Console(stderr=True))
    for i, j in pairs:
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
    sizes = np.asarray(union.numels, np.int64)
    return Overlap(labels, union.names, sizes, nnz, both, same_sign, dot, energy, by_tensor)


def _labels(deltas: Sequence[SparseDelta], names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        found = [d.meta.get("lang") or d.meta.get("task") or "" for d in deltas]
        if "" in found or len(set(found)) < len(found):
            found = [f"{name} {i}".strip() for i, name in enumerate(found)]
        return tuple(found)
    if isinstance(names, str) or len(names) != len(deltas):
        raise ValueError(f"overlap: names must be one for each of {len(deltas)} deltas: {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"overlap: names must all be different, got {list(names)}")
    return tuple(names)
