"""The density sweep of the paper's figure 3, from files: what the command `sweep` calls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..compose import compose
from ..delta import SparseDelta
from ..families import decouple_output_embeddings
from ..files import canonical
from ..sweep import DENSITIES, Sweep, check_densities, evaluate_grid
from .recipes import Recipe
from .recipes import recipe as preset
from .runner import (
    EVALUATED_AT_ONCE,
    PathLike,
    RunError,
    _described,
    _device,
    _examples,
    planned,
    train,
)

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
    fresh: bool = False,
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
        fresh: Start over, whatever the folder holds.
        note: Is told what the user should know, a line each.
        **run: Further arguments of `runner.train` for all runs: seed, device, save_every.

    Returns:
        The grid; its scores are those of the metric of the task.

    Raises:
        RunError, DataError, RecipeError, SFTError: Something does not fit; nothing has been lost,
            and of what is given, nothing has been trained yet.
        ValueError: A density is out of range, or given twice.

    Source: Ansell et al., ACL 2022, §5.2, figure 3.
    """
    place = Path(folder)
    columns = check_densities("densities", densities)
    rows = columns if task_densities is None else check_densities("task_densities", task_densities)
    of_language, of_task = _sparse("language", language), _sparse("task", task)
    device = run.pop("device", "auto")
    where = _device(device)

    # All that can be wrong shows before days of training, and each note once.
    planned(text, base, of_language, note=note)
    plan = planned(data, base, of_task, valid, sft, options=options, note=note)
    kind, tokenizer = plan.task, plan.tokenizer
    examples = _examples(kind, test, "test", plan.reading)
    features = kind.encode(examples, tokenizer, of_task.max_length, labels=plan.labels)
    measure = canonical({"data": _described(examples), "task": asdict(kind)})
    place.mkdir(parents=True, exist_ok=True)
    if fresh:
        for name in ("language-full.safetensors", "task-full.safetensors", "cells.jsonl"):
            (place / name).unlink(missing_ok=True)

    def learn(
        side: str, recipe: Recipe, files: Any, shares: Sequence[float], **more: Any
    ) -> dict[float, Path]:
        learnt = {}
        for share in shares:
            note(f"{side}, density {share:g}")
            learnt[share] = train(
                files,
                base,
                place / f"{side}-{share}.safetensors",
                recipe=recipe.changed(density=share),
                run=place / f"{side}-{share}.run",
                full_model=place / f"{side}-full.safetensors",
                device=device,
                fresh=fresh,
                **more,
                **run,
            ).path
        return learnt

    languages = learn("language", of_language, text, columns, lang=lang)
    tasks = learn("task", of_task, data, rows, valid=valid, sft=sft, options=options)
    model = kind.build(base, plan.labels).to(where)
    if of_task.decouple:
        decouple_output_embeddings(model)

    def score(phi: SparseDelta, learnt: SparseDelta) -> float:
        with compose(model, [learnt, phi], heads=[learnt]):
            figures = kind.evaluate(model, features, examples, tokenizer, EVALUATED_AT_ONCE)
        return figures[kind.metric]

    digest = hashlib.sha256(measure.encode()).hexdigest()[:16]
    return evaluate_grid(languages, tasks, score, place / "cells.jsonl", digest)


def _sparse(side: str, recipe: str | Recipe) -> Recipe:
    """The recipe of a side.

    Raises:
        RunError: It has no selection, or several.
    """
    chosen = recipe if isinstance(recipe, Recipe) else preset(recipe)
    if chosen.k is None and chosen.density is None:
        raise RunError(f"the recipe of the {side} ranks no entries; a sweep needs selection")
    if chosen.iterations > 1:
        raise RunError(f"the recipe of the {side} has iterations; a sweep has one full phase")
    return chosen
