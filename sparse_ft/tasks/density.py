"""The density sweep of the paper's figure 3, from files: what the command `sweep` calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..delta import SparseDelta
from ..sweep import DENSITIES, Sweep, check_densities, evaluate_grid
from .recipes import Recipe
from .recipes import recipe as preset
from .runner import PathLike, RunError, evaluate, train

__all__ = ["sweep"]


def sweep(
    text: PathLike | Sequence[PathLike],
    data: PathLike | Sequence[PathLike],
    test: PathLike,
    base: PathLike,
    folder: PathLike,
    *,
    task: str | Recipe,
    language: str | Recipe = "lt-sft-language-sweep",
    lang: str | None = None,
    valid: PathLike | None = None,
    sft: PathLike | None = None,
    densities: Sequence[float] = DENSITIES,
    task_densities: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda said: None,
    **run: Any,
) -> Sweep:
    """Learns a language and a task at several densities, and evaluates every combination.

    Each of the two is tuned in full once. What is finished lies in the folder and is not done
    again: a sweep that was stopped continues, and a density added later costs itself alone.

    Args:
        text: Text of the language: files or folders.
        data: Data of the task, in the source language.
        test: Test data of the task in the language.
        base: The base model: a folder, or its name on the Hub.
        folder: For the SFTs, their runs, and `cells.jsonl`, a line for each combination.
        task: Recipe of the task; its K gives way to the densities.
        language: Recipe of the language; default: the paper's for the sweep (footnote 6).
        lang: The language, as a tag such as "sw".
        valid: Data to choose the task's best states by.
        sft: The SFT of the language of `data`.
        densities: Of the language, and of the task too without `task_densities`: shares of the
            eligible entries, in (0, 1].
        task_densities: Of the task.
        options: Of the task and of the readers of its data, as for `runner.train`.
        note: Is told what the user should know, a line each.
        **run: Further arguments of `runner.train` for all runs: seed, device, save_every.

    Returns:
        The grid; its scores are those of the metric of the task.

    Raises:
        RunError, DataError, RecipeError, SFTError: Something does not fit; nothing has been lost.
        ValueError: A density is out of range, or given twice.

    Source: Ansell et al., ACL 2022, §5.2, figure 3.
    """
    place = Path(folder)
    columns = check_densities("densities", densities)
    rows = columns if task_densities is None else check_densities("task_densities", task_densities)
    place.mkdir(parents=True, exist_ok=True)

    def learn(
        side: str, recipe: str | Recipe, files: Any, shares: Sequence[float], **more: Any
    ) -> dict[float, SparseDelta]:
        chosen = recipe if isinstance(recipe, Recipe) else preset(recipe)
        if chosen.full_tuning:
            raise RunError(f"the recipe of the {side} tunes every entry; a sweep needs selection")
        learnt = {}
        for share in shares:
            note(f"{side}, density {share:g}")
            learnt[share] = train(
                files,
                base,
                place / f"{side}-{share:g}.safetensors",
                recipe=chosen.changed(density=share),
                run=place / f"{side}-{share:g}.run",
                full_model=place / f"{side}-full.safetensors",
                note=note,
                **more,
                **run,
            ).delta
        return learnt

    languages = learn("language", language, text, columns, lang=lang)
    tasks = learn("task", task, data, rows, valid=valid, sft=sft, options=options)
    device = {"device": run["device"]} if "device" in run else {}

    def score(phi: SparseDelta, learnt: SparseDelta) -> float:
        (row,) = evaluate(base, learnt, test, langs=[phi], options=options, **device)
        return float(row[row["metric"]])

    return evaluate_grid(languages, tasks, score, place / "cells.jsonl")
