"""density_sweep: how quality depends on how many entries a language's and a task's SFT may change.

The paper's third figure: every density of the one is composed with every density of the other
(Ansell et al., ACL 2022, §5.2 and figure 3).
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .criteria import Candidates, Choice, Criterion, as_criterion
from .delta import SparseDelta
from .files import canonical, new_file
from .lottery import LotteryTicket, Phase
from .overlap import new_figure
from .runs import differences

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "DENSITIES",
    "Sweep",
    "TrainSpec",
    "check_densities",
    "density_sweep",
    "evaluate_grid",
    "fit_densities",
    "from_full",
]

MADE_BY = "made_by"
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Shares of the eligible entries, over the range of the paper's figure 3."""


@dataclass(frozen=True)
class TrainSpec:
    """What one side of a sweep learns.

    Attributes:
        model: The model at θ0, frozen where nothing must move, with the source language's SFT
            composed on it if the task is to be learnt on one.
        train: Called once per phase with a `Phase`, as by `LotteryTicket.fit`; a `Loop`, say.
        ticket: Further arguments of `LotteryTicket`: l1, eligible, seed, …
        meta: Fields of the results' metadata: role, lang, task, …
    """

    model: nn.Module
    train: Callable[[Phase], Any]
    ticket: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """The scores of a grid of densities.

    Attributes:
        language: Densities of the language's SFT, ascending: the columns.
        task: Densities of the task's SFT, ascending: the rows.
        scores: [task, language] what `evaluate` gave.
    """

    language: tuple[float, ...]
    task: tuple[float, ...]
    scores: np.ndarray

    @property
    def best(self) -> tuple[float, float, float]:
        """Density of the language, density of the task and score of the highest cell."""
        row, column = np.unravel_index(np.argmax(self.scores), self.scores.shape)
        return self.language[column], self.task[row], float(self.scores[row, column])

    def rows(self) -> list[dict[str, float]]:
        """One dictionary a cell: language, task, score."""
        return [
            {"language": language, "task": task, "score": float(self.scores[i, j])}
            for i, task in enumerate(self.task)
            for j, language in enumerate(self.language)
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes `rows()` as a table of comma-separated values.

        Args:
            path: The file.
        """
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["language", "task", "score"])
            writer.writeheader()
            writer.writerows(self.rows())

    def table(self) -> Table:
        """The grid as a table that `rich.print` shows."""
        from rich.table import Table

        table = Table(title="score by density", title_justify="left")
        table.add_column("task ↓ language →", justify="right")
        for density in self.language:
            table.add_column(f"{density:.4g}", justify="right")
        for density, scores in zip(self.task, self.scores.tolist(), strict=True):
            table.add_row(f"{density:.4g}", *(f"{score:.4g}" for score in scores))
        return table

    def plot(self, path: str | os.PathLike[str], label: str = "score") -> None:
        """Draws the scores as contours over both densities, a point for each cell.

        Args:
            path: The file; its suffix (.png, .svg, .pdf) says of which kind.
            label: What the scores are, beside the colours.

        Raises:
            ValueError: A side has a single density, or an unknown suffix.
            ModuleNotFoundError: matplotlib is not installed.
        """
        if min(self.scores.shape) < 2:
            raise ValueError(
                "Sweep.plot: contours need two densities or more of the language and of the task, "
                f"found {len(self.language)} and {len(self.task)}"
            )
        drawing = new_figure("Sweep.plot", path, 5.4, 4.2)
        drawing.set_layout_engine("constrained")
        axes = drawing.subplots()
        x, y = (100 * np.asarray(side) for side in (self.language, self.task))
        filled = axes.contourf(x, y, self.scores, levels=12, cmap="viridis")
        axes.plot(*(side.ravel() for side in np.meshgrid(x, y)), "k.", markersize=2, alpha=0.5)
        drawing.colorbar(filled, label=label)
        axes.set_xlabel("density of the language's fine-tuning, %")
        axes.set_ylabel("density of the task's fine-tuning, %")
        drawing.savefig(path, dpi=150)


def density_sweep(
    language: TrainSpec,
    task: TrainSpec,
    evaluate: Callable[[SparseDelta, SparseDelta], float],
    folder: str | os.PathLike[str],
    densities: Sequence[float] = DENSITIES,
    task_densities: Sequence[float] | None = None,
    save_every: int | None = None,
    progress: bool = True,
) -> Sweep:
    """Learns a language's and a task's SFT at several densities and evaluates every combination.

    Each side is tuned in full once; its supports, one inside the other, all come from that. What is
    finished lies in the folder and is not done again, down to the middle of a phase.

    Args:
        language: How the language's SFTs are learnt.
        task: How the task's SFTs are learnt.
        evaluate: `(language SFT, task SFT) -> score`; composes them and measures.
        folder: For runs, SFTs and `cells.jsonl`, a line for each cell. One folder, one `evaluate`.
        densities: Shares of the eligible entries, in (0, 1].
        task_densities: Those of the task, if others.
        save_every: Steps from one stored state to the next, as for `LotteryTicket.fit`.
        progress: Show progress bars.

    Returns:
        The grid, for a table or a contour plot.

    Raises:
        ValueError: No densities, one out of range or given twice, a score that is not finite, or a
            folder that holds another run or a damaged line.

    Source: Ansell et al., ACL 2022, §5.2, figure 3.
    """
    place = Path(folder)
    sides = {
        "language": (language, check_densities("densities", densities)),
        "task": (
            task,
            check_densities(
                "task_densities", densities if task_densities is None else task_densities
            ),
        ),
    }
    fitted = {
        side: fit_densities(spec, shares, place / side, save_every, progress)
        for side, (spec, shares) in sides.items()
    }
    return evaluate_grid(fitted["language"], fitted["task"], evaluate, place / "cells.jsonl")


def evaluate_grid(
    languages: Mapping[float, SparseDelta | Path],
    tasks: Mapping[float, SparseDelta | Path],
    evaluate: Callable[[SparseDelta, SparseDelta], float],
    path: str | os.PathLike[str],
    measure: str = "",
) -> Sweep:
    """Evaluates every SFT of a language with every SFT of a task.

    Args:
        languages: The language's SFTs by density, or their files, of which one is held at a time.
        tasks: The task's SFTs by density, likewise.
        evaluate: `(language SFT, task SFT) -> score`; composes them and measures.
        path: A file of lines of JSON; what it has of the same measure is not evaluated again.
        measure: What `evaluate` does, such as a digest of its data.

    Returns:
        The grid.

    Raises:
        ValueError: A score that is not finite, or a damaged line.
    """
    path = Path(path)
    known = dict(_cells(path))
    columns, rows = sorted(languages.items()), sorted(tasks.items())
    ids_of = {id(sft): _loaded(sft).content_id for _, sft in (*columns, *rows)}
    scores = np.empty((len(rows), len(columns)))
    for i, (task_density, task) in enumerate(rows):
        for j, (language_density, language) in enumerate(columns):
            ids = ids_of[id(language)], ids_of[id(task)]
            key = (*ids, measure)
            if key not in known:
                score = float(evaluate(_loaded(language), _loaded(task)))
                if not np.isfinite(score):
                    raise ValueError(
                        f"density_sweep: evaluate gave {score} for the densities "
                        f"{language_density:g} (language) and {task_density:g} (task)"
                    )
                cell = {"language": language_density, "task": task_density, "score": score}
                _append(path, {**cell, "ids": ids, "measure": measure})
                known[key] = score
            scores[i, j] = known[key]
    return Sweep(tuple(sorted(languages)), tuple(sorted(tasks)), scores)


def fit_densities(
    spec: TrainSpec,
    densities: Sequence[float],
    folder: str | os.PathLike[str],
    save_every: int | None = None,
    progress: bool = True,
) -> dict[float, SparseDelta]:
    """Learns an SFT at each of several densities from one full phase.

    The supports are those that a `LotteryTicket` of each density would select, one inside the
    other; each has a sparse phase of its own.

    Args:
        spec: How they are learnt.
        densities: Shares of the eligible entries, in (0, 1].
        folder: For a run folder of each density, and the fully tuned model, `full.safetensors`.
        save_every: Steps from one stored state to the next, as for `LotteryTicket.fit`.
        progress: Show progress bars.

    Returns:
        The SFTs, by density, ascending. What is finished comes from the folder.

    Raises:
        ValueError: No densities, one out of range or given twice, or a folder of another run.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    options = dict(spec.ticket)
    base = as_criterion(options.pop("criterion", "magnitude"))
    deltas = {}
    for density in check_densities("densities", densities):
        ticket = LotteryTicket(spec.model, density=density, criterion=base, **options)
        made_by = made_with(ticket, spec.train, spec.meta)
        ticket.criterion = from_full(base, place / "full.safetensors", made_by)
        run = place / f"{density}"
        deltas[density] = ticket.fit(spec.train, run, save_every, progress=progress, **spec.meta)
    return deltas


def made_with(
    ticket: LotteryTicket, train: Callable[[Phase], Any], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides the fully tuned model of a ticket's first phase, as JSON values: all that
    decides its result, but for what only the selection looks at (K, the criterion).

    Raises:
        ValueError: It has several full phases.
    """
    if ticket.iterations > 1:
        raise ValueError("density_sweep: iterations have a full phase each; a sweep has one")
    other = {"k_requested", "eps", "tie", "seed", *ticket.criterion.recipe()}
    return {key: value for key, value in ticket._settings(train, meta).items() if key not in other}


def from_full(base: Criterion, path: Path, made_by: Mapping[str, Any]) -> Criterion:
    """A criterion that ranks a fully tuned model on disk, so that tickets share one full phase.

    The first ticket tunes, and its model goes into the file before its selection counts; the others
    skip that phase. Where fewer entries moved than a ticket wants, the others fill up in order.

    Args:
        base: The criterion that ranks; one that needs no full tuning leaves the file alone.
        path: The file, for the eligible parameters in full.
        made_by: What decides them, as `made_with` says it; stored in the file. A file that was made
            by something else is refused.

    Raises:
        ValueError: The criterion takes fixed entries and ranks none, or the file is of another
            model, of other data or of other settings.
    """
    rank = base.choose
    if rank is None:
        raise ValueError(f'density_sweep: criterion "{base.name}" fixes its entries; it ranks none')

    settings = json.loads(canonical(made_by))
    if base.needs_training and path.exists():
        _check_made(path, settings)

    def tuned(candidates: Candidates) -> Candidates:
        if not path.exists():
            now = dict(zip(candidates.names, candidates.current, strict=True))
            with new_file("density_sweep", str(path)) as temporary:
                save_file(now, temporary, {MADE_BY: canonical(settings)})
        with safe_open(path, framework="pt", device=str(candidates.device)) as file:
            return replace(candidates, current=[file.get_tensor(n) for n in candidates.names])

    def choose(candidates: Candidates) -> Choice:
        # Without the info by which `select` refuses to fill up.
        idx, ptr, _, told = rank(tuned(candidates) if base.needs_training else candidates)
        return idx, ptr, None, told

    return replace(base, choose=choose, needs_training=base.needs_training and not path.exists())


def _check_made(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a fully tuned model that other settings have made.

    Raises:
        ValueError: It names the first that differ.
    """
    with safe_open(path, framework="pt") as file:
        stored = json.loads((file.metadata() or {}).get(MADE_BY, "{}"))
    if changes := differences(stored, settings):
        raise ValueError(
            f"{str(path)!r} was tuned with other settings: {'; '.join(changes[:3])}. Use those, "
            "name another folder, or delete the file"
        )


def check_densities(name: str, densities: Sequence[float]) -> list[float]:
    """Densities in ascending order.

    Raises:
        ValueError: There are none, one is out of range or given twice.
    """
    shares = sorted(densities)
    if not shares:
        raise ValueError(f"density_sweep: {name} is empty; give shares in (0, 1]")
    if not (shares[0] > 0 and shares[-1] <= 1):
        raise ValueError(f"density_sweep: {name} must be in (0, 1], got {list(densities)}")
    if len(set(shares)) < len(shares):
        raise ValueError(f"density_sweep: {name} has a density twice: {list(densities)}")
    return shares


def _cells(path: Path) -> Iterator[tuple[tuple[str, str, str], float]]:
    """Scores by the ids of the two SFTs and the measure, but for a last line that was never
    finished."""
    if not path.exists():
        return
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            cell = json.loads(line)
            language, task = cell["ids"]
            yield (language, task, cell.get("measure", "")), float(cell["score"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"density_sweep: line {number} of {str(path)!r} is no cell of a sweep; delete the "
                "line to have the cell evaluated again"
            ) from None


def _loaded(sft: SparseDelta | Path) -> SparseDelta:
    return SparseDelta.load(sft) if isinstance(sft, Path) else sft


def _append(path: Path, cell: Mapping[str, Any]) -> None:
    """Adds a line, in place of a last one that was never finished."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(cell).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
