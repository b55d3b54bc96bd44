"""Training and evaluation from files to files: what the commands `train` and `evaluate` call.

A run is a recipe, data, a base model and a folder. The folder holds the state of the run, so that
the same call continues where a killed one stopped, and its log; the SFT is written at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.utils.data import DataLoader

from .. import criteria
from ..compose import compose
from ..delta import SparseDelta
from ..families import decouple_output_embeddings, freeze_norms
from ..files import FILE_NAME
from ..kept import random_state_kept
from ..loop import Loop
from ..lottery import LotteryTicket
from ..metadata import checked_meta
from ..select import eligible_parameters, resolve_k
from ..sources import MultiSource
from ..sweep import from_full, made_with
from ..tiles import Layout
from . import TASKS, Examples, Task, held_out
from .lm import Blocks
from .recipes import Recipe
from .recipes import recipe as preset

__all__ = ["RunError", "Source", "Trained", "evaluate", "read_sources", "train"]

PathLike = str | os.PathLike[str]
LOG = "log.jsonl"
EVAL = "eval_"
"""What evaluations log begins with this: the loss of a batch is not that of held-out text."""
EVALUATED_AT_ONCE = 32
CALIBRATION_BATCHES = 256
CALIBRATED = {
    "gradient": criteria.gradient,
    "fisher": criteria.fisher,
    "snip": criteria.snip,
}
"""Criteria that rank by gradients at the start: approximations that need no full phase."""


class RunError(ValueError):
    """A run cannot be done as it was asked for; nothing has been changed."""


@dataclass(frozen=True)
class Source:
    """Data to train on, and the SFT of their language.

    Attributes:
        data: Files or folders.
        valid: Data to choose the best state by; None: there are none.
        sft: The SFT of their language, its path or its Hub name: on the model while it trains on
            them, and not part of the result. None: the bare model.
        repeat: Passes over these data in one over all sources.
    """

    data: tuple[PathLike, ...]
    valid: PathLike | None = None
    sft: SparseDelta | PathLike | None = None
    repeat: int = 1


@dataclass(frozen=True)
class Trained:
    """What a run came to.

    Attributes:
        delta: The SFT.
        path: Its file.
        folder: The run's folder, with the log.
        recipe: The settings that were used.
        phases: What the log says of each phase: "phase", "iteration", "step", "loss" and, where
            there were evaluations, "best", the figures of the state that was chosen, and
            "best_step".
    """

    delta: SparseDelta
    path: Path
    folder: Path
    recipe: Recipe
    phases: list[dict[str, Any]]


@dataclass(frozen=True)
class _Prepared:
    """The data of a source as the model reads them."""

    train: Sequence[dict[str, Any]]
    valid: Sequence[dict[str, Any]]
    valid_examples: Examples
    record: dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    """What a run is made of, its base model aside: all that can be wrong with it shows here."""

    recipe: Recipe
    task: Task
    tokenizer: Any
    sources: dict[str, Source]
    deltas: dict[str, SparseDelta | None]
    prepared: dict[str, _Prepared]
    labels: list[str] | None
    reading: dict[str, Any]


def train(
    data: PathLike | Sequence[PathLike] | Mapping[str, Source],
    base: PathLike,
    output: PathLike,
    *,
    recipe: str | Recipe,
    valid: PathLike | None = None,
    sft: SparseDelta | PathLike | None = None,
    lang: str | None = None,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    run: PathLike | None = None,
    save_every: int = 500,
    seed: int = 0,
    device: str = "auto",
    fresh: bool = False,
    force: bool = False,
    license: str | None = None,
    full_model: PathLike | None = None,
    note: Callable[[str], None] = lambda said: None,
) -> Trained:
    """Trains an SFT of a language or of a task, as a recipe says, and writes it.

    The same call continues a run that was stopped at any moment, to the same bits, and gives the
    result of a finished one without training.

    Args:
        data: Files or folders to train on; or several sources by name, of which each batch holds
            one.
        base: The base model: a folder, or its name on the Hub.
        output: The file to write, *.safetensors.
        recipe: A preset's name, or a recipe.
        valid: Data to choose the best state by. Without them, text is parted as the recipe says,
            and for a task the last state counts.
        sft: The SFT of the language of the data, for a task: on the model while it trains, and not
            part of the result.
        lang: The language of the data, as a tag such as "sw"; default: that of `sft`.
        name: What the task is called, such as "ner"; default: its kind.
        labels: What the head shall tell apart; default: the labels of the data.
        options: Of the task, over those of the recipe, and of the reader of its data, such as
            format (see `sparse_ft.tasks.data.read`).
        run: The run's folder; default: beside the output, with .run for .safetensors.
        save_every: Optimizer steps from one stored state to the next.
        seed: Of the new head, of the order of the data, and of all else that is drawn.
        device: Such as "cpu" or "cuda"; "auto": a GPU where there is one.
        fresh: Start over, whatever the folder holds.
        force: Replace an output of another run.
        license: Of the result, for its metadata.
        full_model: A file for the fully tuned model: the first of several runs that differ in
            nothing but how entries are selected (density, criterion) makes it, the others begin
            with their selection. A criterion that needs no full phase leaves the file alone.
        note: Is told what the user should know, a line each.

    Raises:
        RunError, DataError, RecipeError, SFTError: Something does not fit; nothing has been lost.
        OSError: A file cannot be read or written.
        TrainingDiverged: The loss is not finite any more.
    """
    target = Path(output)
    folder = target.parent / f"{target.stem}.run" if run is None else Path(run)
    mine = _check_places(target, folder, force)
    plan = planned(data, base, recipe, valid, sft, labels, options, note)
    chosen, task, prepared = plan.recipe, plan.task, plan.prepared
    if full_model is not None and chosen.iterations > 1:
        raise RunError("full_model is of one full phase; iterations have several")
    told = _told(chosen, lang, name, license, plan.deltas)
    model = task.build(base, plan.labels, seed=seed)
    for p in plan.prepared.values():
        _check_reach(model, (p.train, p.valid))
    model = model.to(_device(device))
    told["base"] = _origin(base, model)
    # A mistake in the metadata must not show after days of training.
    told = checked_meta(told, Layout((), ()), ())
    if chosen.freeze_norms:
        freeze_norms(model)
    if chosen.decouple:
        decouple_output_embeddings(model)
    eligible = eligible_parameters(model, None)

    collate = task.collate(plan.tokenizer)
    loaders: dict[str, Any] = {
        key: DataLoader(p.train, chosen.batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
        for key, p in prepared.items()
    }
    with _on_sources(model, loaders, plan.deltas, plan.sources, seed) as (batches, on):
        criterion = _criterion(chosen, task, model, batches, seed)
        meta: dict[str, Any] = {
            **{key: told[key] for key in ("role", "lang") if key in told},
            "recipe": {
                **chosen.to_dict(),
                **criterion.recipe(),
                "seed": seed,
                "task": {"name": task.name, **asdict(task)},
                "labels": plan.labels,
                "data": _records(prepared),
            },
        }
        ticket = LotteryTicket(
            model,
            k=_count(chosen, criterion, eligible),
            iterations=chosen.iterations,
            l1=chosen.l1,
            criterion=criterion,
            seed=seed,
            fill=chosen.fill,
        )
        loop = _loop(chosen, task, batches, prepared, on, plan.tokenizer, seed, folder, fresh)
        if full_model is not None and criterion.fixed is None:
            tuning = _without_selection(meta["recipe"], criterion)
            made_by = made_with(ticket, loop, {**meta, "recipe": tuning})
            ticket.criterion = from_full(criterion, Path(full_model), made_by)
        delta = ticket.fit(loop, folder, save_every=save_every, fresh=fresh, **meta)
    # What names the result and changes nothing of it is no setting of the run. The folder has it
    # too, as by that an output is known for this run's.
    told["base"] = {**delta.meta.get("base", {}), **told["base"]}
    delta.meta.update(told)
    delta.save(folder / FILE_NAME)
    _save(delta, target, force or mine)
    return Trained(delta, target, folder, chosen, _phases(folder / LOG, task))


def planned(
    data: PathLike | Sequence[PathLike] | Mapping[str, Source],
    base: PathLike,
    recipe: str | Recipe,
    valid: PathLike | None = None,
    sft: SparseDelta | PathLike | None = None,
    labels: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda said: None,
) -> _Plan:
    """Reads and checks what `train` is given, up to the model; arguments and errors as there."""
    chosen = recipe if isinstance(recipe, Recipe) else preset(recipe)
    own, reading = _parted(chosen.task, options or {})
    chosen = chosen.changed(options={**chosen.options, **own})
    task = _made(chosen.task, {"metric": chosen.metric} if chosen.metric else {}, chosen.options)
    _check_labels(labels)
    sources = _sources(data, valid, sft, chosen)
    deltas = {key: _language(source.sft) for key, source in sources.items()}
    tokenizer = task.tokenizer(base)
    if chosen.evaluate_every is None and any(s.valid is not None for s in sources.values()):
        note("the recipe evaluates nothing (evaluate_every), so the validation data are not used")
        sources = {key: replace(source, valid=None) for key, source in sources.items()}
    texts = {key: _read(task, source, chosen, reading) for key, source in sources.items()}
    if labels is None:
        labels = task.labels(_joined([text for text, _ in texts.values()]))
    prepared = {
        key: _prepare(task, *pair, tokenizer, chosen, labels) for key, pair in texts.items()
    }
    chosen = _without_evaluation(chosen, prepared, note)
    known = None if labels is None else list(labels)
    return _Plan(chosen, task, tokenizer, sources, deltas, prepared, known, reading)


def _without_selection(recipe: Mapping[str, Any], criterion: criteria.Criterion) -> dict[str, Any]:
    """A recipe's record without its name and what only the selection looks at: a full phase knows
    of neither."""
    name = ("preset", "origin", "changed")
    left_out = {*name, "k", "density", "criterion_options", "fill", *criterion.recipe()} - {"seed"}
    return {key: recipe[key] for key in recipe if key not in left_out}


def _check_labels(labels: Sequence[str] | None) -> None:
    if labels is not None and len({*labels}) < len(labels):
        twice = next(label for label in labels if list(labels).count(label) > 1)
        raise RunError(f"labels: {twice!r} stands there twice")


def _check_places(target: Path, folder: Path, force: bool) -> bool:
    """Refuses an output before the work is done.

    Returns:
        Whether what the output holds is of this run, and may be replaced by its result.

    Raises:
        RunError, OSError: It cannot be written, or another run's result is there.
    """
    if target.suffix != ".safetensors":
        raise RunError(f"{target}: the output must end in .safetensors")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent}; create it first")
    if not target.exists():
        return False
    try:
        own = SparseDelta.load(folder / FILE_NAME).content_id
        mine = SparseDelta.load(target).content_id == own
    except (OSError, ValueError):
        mine = False
    if not (mine or force):
        raise FileExistsError(
            f"{target} exists, and {folder} holds no run that it is of; --force replaces it"
        )
    return mine


def _parted(kind: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a task, and the others, which the reader of its data gets."""
    known = {f.name for f in fields(TASKS[kind])}
    own = {name: value for name, value in options.items() if name in known}
    return own, {name: value for name, value in options.items() if name not in known}


def _made(kind: str, *options: Mapping[str, Any]) -> Task:
    """A task; of options given several times, the last count.

    Raises:
        RunError: It has no such option.
    """
    known = [f.name for f in fields(TASKS[kind])]
    settings = {name: value for some in options for name, value in some.items()}
    if unknown := [name for name in settings if name not in known]:
        raise RunError(f"{kind} has no option {unknown[0]!r}; it has {', '.join(known)}")
    hints = get_type_hints(TASKS[kind])
    for name, value in settings.items():
        if not _fits(value, hints[name]):
            said = getattr(hints[name], "__name__", hints[name])
            raise RunError(f"{kind}: the option {name} must be {said}; found {value!r}")
    return TASKS[kind](**settings)


def _fits(value: Any, hint: Any) -> bool:
    """Is this a value of a task's option, as far as its type tells?"""
    if hint is float:
        return _fits(value, int) or isinstance(value, float)
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _sources(
    data: PathLike | Sequence[PathLike] | Mapping[str, Source],
    valid: PathLike | None,
    sft: SparseDelta | PathLike | None,
    chosen: Recipe,
) -> dict[str, Source]:
    if isinstance(data, Mapping):
        if valid is not None or sft is not None:
            raise RunError("several sources have valid and sft each; give neither for them all")
        sources = dict(data)
    else:
        files = (data,) if isinstance(data, str | os.PathLike) else tuple(data)
        sources = {"": Source(files, valid, sft)}
    if not sources or not all(source.data for source in sources.values()):
        raise RunError("there are no data to train on")
    if chosen.role == "language" and any(s.sft is not None for s in sources.values()):
        raise RunError("sft is the language of a task's data; a language is learnt without one")
    return sources


def _language(sft: SparseDelta | PathLike | None) -> SparseDelta | None:
    """The SFT of a language.

    Raises:
        RunError: It is a task's.
    """
    if sft is None:
        return None
    delta = sft if isinstance(sft, SparseDelta) else SparseDelta.load(sft)
    if delta.meta.get("role") == "task":
        said = "the SFT" if isinstance(sft, SparseDelta) else os.fspath(sft)
        raise RunError(
            f"{said}: is the SFT of a task ({delta.meta.get('task', 'unnamed')}), not of a language"
        )
    return delta


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise RunError(
            f"device {device!r} cannot be used: {str(error).partition(chr(10))[0]}"
        ) from None
    return found


def _read(
    task: Task, source: Source, chosen: Recipe, reading: Mapping[str, Any]
) -> tuple[Examples, Examples]:
    """The examples of a source to train on, and those to choose the best state by."""
    examples = _joined([_examples(task, path, "train", reading) for path in source.data])
    if source.valid is not None:
        return examples, _examples(task, source.valid, "validation", reading)
    if chosen.held_out is not None and chosen.evaluate_every is not None:
        return held_out(examples, chosen.held_out)
    return examples, Examples()


def _examples(task: Task, path: PathLike, split: str, reading: Mapping[str, Any]) -> Examples:
    try:
        return task.read(path, split, **reading)
    except TypeError as error:
        if not reading:
            raise
        own = ", ".join(f.name for f in fields(task))
        given = ", ".join(f"{name}={value!r}" for name, value in reading.items())
        raise RunError(
            f"{path}: neither the task {task.name} (options: {own}) nor the reader of these data "
            f"takes {given} ({error})"
        ) from None


def _joined(parts: Sequence[Examples]) -> Examples:
    if len(parts) == 1:
        return parts[0]
    return _Joined(parts)


class _Joined(Examples):
    """Examples of several files, each of which keeps its own's name."""

    def __init__(self, parts: Sequence[Examples]) -> None:
        super().__init__(chain.from_iterable(parts), ", ".join(part.source for part in parts))
        self.parts = parts

    def where(self, i: int) -> str:
        for part in self.parts:
            if i < len(part):
                return part.where(i)
            i -= len(part)
        raise IndexError(i)


def _prepare(
    task: Task,
    examples: Examples,
    valid: Examples,
    tokenizer: Any,
    chosen: Recipe,
    labels: Sequence[str] | None,
) -> _Prepared:
    def features(of: Examples) -> Sequence[dict[str, Any]]:
        return task.encode(of, tokenizer, chosen.max_length, labels=labels) if of else []

    record = {"train": _described(examples)} | ({"valid": _described(valid)} if valid else {})
    return _Prepared(features(examples), features(valid), valid, record)


def _check_reach(model: nn.Module, parts: Iterable[Sequence[dict[str, Any]]]) -> None:
    """Refuses data that a model cannot read: on a GPU it would die without a word.

    Raises:
        RunError: A piece has no embedding, or a sequence is longer than the table of positions.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    rows = embedding.weight.shape[0] if embedding is not None else None
    # Positions of RoBERTa begin after that of padding, those of BART after an offset.
    room = [
        module.num_embeddings
        - int(getattr(module, "offset", 0))
        - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and name.endswith(("position_embeddings", "embed_positions", "wpe"))
    ]
    for features in parts:
        if isinstance(features, Blocks):
            longest = min(features.length, len(features.pieces))
            largest = int(features.pieces.max())
        else:
            longest = max((len(f["input_ids"]) for f in features), default=0)
            largest = max((max(f["input_ids"]) for f in features), default=0)
        if rows is not None and largest >= rows:
            raise RunError(
                f"the tokenizer gives the piece {largest}, and the model has {rows:,} "
                "embeddings; they are not of one model"
            )
        if room and longest > min(room):
            raise RunError(
                f"a sequence has {longest} pieces, and the model has {min(room)} positions; set "
                f"max_length to at most {min(room)}"
            )


def _described(examples: Examples) -> dict[str, Any]:
    """What tells one set of examples from another, wherever its files lie."""
    content = hashlib.sha256()
    for example in examples:
        content.update(json.dumps(example, sort_keys=True, default=str).encode() + b"\n")
    return {"examples": len(examples), "sha256": content.hexdigest()}


def _without_evaluation(
    chosen: Recipe, prepared: Mapping[str, _Prepared], note: Callable[[str], None]
) -> Recipe:
    """The recipe as it can be followed: without data to evaluate on, the last state counts."""
    if chosen.evaluate_every is None or any(len(p.valid) for p in prepared.values()):
        return chosen
    note("there are no validation data, so the last state of each phase counts, not the best")
    return chosen.changed(evaluate_every=None)


def _told(
    chosen: Recipe,
    lang: str | None,
    name: str | None,
    license: str | None,
    deltas: Mapping[str, SparseDelta | None],
) -> dict[str, Any]:
    """What the result is, as its metadata say it."""
    on = [delta for delta in deltas.values() if delta is not None]
    if lang is None and len(deltas) == 1 and on:
        lang = on[0].meta.get("lang")
    meta: dict[str, Any] = {"role": chosen.role, "lang": lang, "license": license}
    if chosen.role == "task":
        meta["task"] = name or chosen.task
    return meta


def _origin(base: PathLike, model: nn.Module) -> dict[str, str]:
    """What is known of the base model, but its digests."""
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    return {
        # The name of a folder, not the way to it: that is nobody else's business.
        "id": os.path.basename(os.path.abspath(base)) if os.path.isdir(base) else os.fspath(base),
        "arch": type(model).__name__,
        **({"revision": revision} if revision else {}),
    }


def _records(prepared: Mapping[str, _Prepared]) -> dict[str, Any]:
    records = {key: p.record for key, p in prepared.items()}
    return records if len(records) > 1 else next(iter(records.values()))


def _criterion(
    chosen: Recipe, task: Task, model: nn.Module, batches: Any, seed: int
) -> criteria.Criterion:
    """The criterion of a recipe. One that needs a calibration gets it when entries are chosen: a
    run that is past that has no use for it.

    Raises:
        RunError: There is no such criterion, or no such option of it.
    """
    name, options = chosen.criterion, dict(chosen.criterion_options)
    if chosen.full:
        return replace(criteria.random(), name="full", settings={"method": "full"})
    try:
        if name in criteria.CRITERIA:
            return criteria.CRITERIA[name](**options)
        if name in CALIBRATED:
            samples = options.pop("samples", CALIBRATION_BATCHES)
            if options:
                raise TypeError(f"its one option is samples, not {', '.join(options)}")
            if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
                raise TypeError(f"samples must be a whole number of at least 1, not {samples!r}")
            if isinstance(batches, MultiSource):
                raise TypeError("it is calibrated on one source, and there are several")

            def choose(candidates: criteria.Candidates) -> criteria.Choice:
                with random_state_kept():
                    torch.manual_seed(seed)
                    scores = criteria.calibrate(model, batches, task.loss, name, samples=samples)
                rank = CALIBRATED[name](scores).choose
                assert rank is not None
                return rank(candidates)

            return replace(CALIBRATED[name]({}), choose=choose)
    except TypeError as error:
        raise RunError(f"criterion {name!r}: {error}") from None
    raise RunError(
        f"there is no criterion {name!r}; there are "
        f"{', '.join(sorted([*criteria.CRITERIA, *CALIBRATED]))}"
    )


def _count(
    chosen: Recipe, criterion: criteria.Criterion, eligible: Mapping[str, nn.Parameter]
) -> int:
    """K.

    Raises:
        RunError: It was published for a larger model.
    """
    total = sum(p.numel() for p in eligible.values())
    if chosen.full:
        return total
    if criterion.fixed is not None:
        return criterion.fixed(Layout.of(eligible)).nnz
    if chosen.k is not None and chosen.k > total:
        raise RunError(
            f"k is {chosen.k:,} (preset {chosen.name}), and the model has {total:,} eligible "
            "entries; give a smaller k, or a density"
        )
    return resolve_k(chosen.k, chosen.density, total)


On = Callable[[str], Any]


@contextmanager
def _on_sources(
    model: nn.Module,
    loaders: Mapping[str, Any],
    deltas: Mapping[str, SparseDelta | None],
    sources: Mapping[str, Source],
    seed: int,
) -> Iterator[tuple[Any, On]]:
    """The batches of all sources, with the SFTs of their languages on the model in time.

    Yields:
        The batches, and a function that has the SFT of a source on the model for a block.
    """
    if len(loaders) > 1:
        repeat = {key: source.repeat for key, source in sources.items()}
        batches = MultiSource(loaders, deltas, repeat, seed)
        yield batches, lambda key: batches.on(model, key)
        return
    ((key, loader),) = loaders.items()
    delta = deltas[key]
    with nullcontext() if delta is None else compose(model, [delta]):
        yield loader, lambda key: nullcontext()


def _loop(
    chosen: Recipe,
    task: Task,
    batches: Any,
    prepared: Mapping[str, _Prepared],
    on: On,
    tokenizer: Any,
    seed: int,
    folder: Path,
    fresh: bool,
) -> Loop:
    full, sparse = chosen.lengths()
    scored = chosen.evaluate_every is not None

    def evaluate(model: nn.Module) -> dict[str, float]:
        """The figures of each source, and their means."""
        found = {}
        for key, p in prepared.items():
            if len(p.valid):
                with on(key):
                    found[key] = task.evaluate(
                        model, p.valid, p.valid_examples, tokenizer, EVALUATED_AT_ONCE
                    )
        each = list(found.values())
        figures = {EVAL + key: sum(f[key] for f in each) / len(each) for key in each[0]}
        if len(found) > 1:
            figures |= {f"{EVAL}{task.metric} ({key})": f[task.metric] for key, f in found.items()}
        return figures

    return Loop(
        batches,
        full=full,
        sparse=sparse,
        loss=task.loss,
        lr=chosen.lr,
        schedule=chosen.schedule,
        warmup=chosen.warmup,
        accumulate=chosen.accumulate,
        max_grad_norm=chosen.max_grad_norm or None,
        weight_decay=chosen.weight_decay,
        precision=chosen.precision,
        evaluate=evaluate if scored else None,
        metric=EVAL + task.metric if scored else None,
        greater_is_better=task.greater_is_better,
        evaluate_every=chosen.evaluate_every,
        seed=seed,
        log=_Log(folder / LOG, fresh),
    )


class _Log:
    """Appends what a loop logs to a file, one JSON object a line.

    Args:
        path: The file.
        fresh: The first line takes the place of all that is there: by then the run is ours.
    """

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.mode = "w" if fresh else "a"

    def __call__(self, record: dict[str, Any]) -> None:
        mode, self.mode = self.mode, "a"
        with open(self.path, mode, encoding="utf-8") as file:
            file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")


def _save(delta: SparseDelta, target: Path, replaces: bool) -> None:
    if target.exists() and not replaces:
        raise FileExistsError(f"{target} was written by another run meanwhile; --force replaces it")
    delta.save(target)


def _phases(log: Path, task: Task) -> list[dict[str, Any]]:
    """What a log says of each phase; of a step that was done again, the last time counts."""
    steps: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for line in log.read_text("utf-8").splitlines() if log.exists() else ():
        try:
            record = json.loads(line)
            at = (int(record.get("iteration", 0)), str(record["phase"]))
            steps.setdefault(at, {}).setdefault(int(record["step"]), {}).update(record)
        except (ValueError, KeyError, TypeError):
            continue  # a line that was being written when the process died
    phases = []
    for (iteration, phase), records in sorted(steps.items()):
        ordered = [records[step] for step in sorted(records)]
        found = {"phase": phase, "iteration": iteration, "step": ordered[-1]["step"]}
        if losses := [r["loss"] for r in ordered if "loss" in r]:
            found["loss"] = losses[-1]
        metric = EVAL + task.metric
        if scored := [r for r in ordered if metric in r]:
            best = (max if task.greater_is_better else min)(scored, key=lambda r: r[metric])
            found |= {"best": best[metric], "best_step": best["step"]}
        phases.append(found)
    return phases


# --- evaluation ---------------------------------------------------------------------------------


def evaluate(
    base: PathLike,
    sft: SparseDelta | PathLike,
    tests: PathLike | Sequence[PathLike],
    *,
    langs: Sequence[SparseDelta | PathLike | None] = (None,),
    weight: float = 1.0,
    kind: str | None = None,
    labels: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    batch_size: int = EVALUATED_AT_ONCE,
    device: str = "auto",
    allow_base_mismatch: bool = False,
    predictions: bool = False,
) -> list[dict[str, Any]]:
    """Scores θ0 + φ_task + weight · φ_language on test data.

    What the SFT of the task records of its kind, its labels and its lengths need not be given.

    Args:
        base: The base model: a folder, or its name on the Hub.
        sft: The SFT of a task (or of a language: its perplexity), or its path or Hub name.
        tests: Test data: a file or folder, or several.
        langs: SFTs of languages; None: none (task only). As many as `tests`: each goes with its
            own; one of either goes with all of the other.
        weight: Of the languages' SFTs.
        kind: Kind of the task, for an SFT that records none.
        labels: Likewise, in the order of its head.
        options: Of the task, over those that the SFT records, and of the reader of the data.
        max_length: Most pieces of an example; default: as trained.
        batch_size: Examples at once; it changes no figure.
        device: Such as "cpu" or "cuda"; "auto": a GPU where there is one.
        allow_base_mismatch: Go on where an SFT was made for another base model.
        predictions: Tell what is predicted of each example, too.

    Returns:
        A record for each pair: "data", "lang" (None for task only), the task's "metric", and its
        figures by name. With `predictions` also "gold" and "predictions", an item an example: a
        label; a list with the label of each word ("" where it is unlabelled) or its [head,
        relation]; an answer, and in "gold" the list of all right ones.

    Raises:
        RunError, DataError, SFTError: Something does not fit.
        OSError: A file cannot be read.
    """
    delta = sft if isinstance(sft, SparseDelta) else SparseDelta.load(sft)
    said = "the SFT" if isinstance(sft, SparseDelta) else os.fspath(sft)
    recorded = _recorded(delta)
    kind, settings = _recorded_task(said, recorded, kind)
    own, reading = _parted(kind, options or {})
    task = _made(kind, settings, own)
    labels = _same_labels(said, labels, recorded.get("labels"), task)
    if weight != 1.0 and all(lang is None for lang in langs):
        raise RunError("weight is of the languages' SFTs, and none is given")
    if predictions and type(task).predict is Task.predict:
        raise RunError(f"{said}: {task.name} predicts nothing of an example; leave predictions out")
    if task.role == "task" and not delta.heads:
        raise RunError(f"{said}: has no heads, so there is nothing that it could predict")
    paths = [tests] if isinstance(tests, str | os.PathLike) else list(tests)
    pairs = _pairs(paths, list(langs))
    loaded = [_language(lang) for lang in langs]
    languages = dict(zip(map(id, langs), loaded, strict=True))
    where = _device(device)
    tokenizer = task.tokenizer(base)
    examples = [_examples(task, path, "test", reading) for path in paths]
    length = recorded.get("max_length", Recipe.max_length) if max_length is None else max_length
    features = [task.encode(e, tokenizer, int(length), labels=labels) for e in examples]
    model = task.build(base, labels)
    _check_reach(model, features)
    model = model.to(where)
    if recorded.get("decouple"):
        decouple_output_embeddings(model)
    heads = [delta] if delta.heads else []
    rows = []
    for path, lang in pairs:
        i = paths.index(path)
        phi = languages[id(lang)]
        deltas, weights = ([delta], [1.0]) if phi is None else ([delta, phi], [1.0, weight])
        with compose(model, deltas, weights, heads=heads, allow_base_mismatch=allow_base_mismatch):
            found: dict[str, Any]
            if predictions:
                predicted = task.predict(model, features[i], examples[i], tokenizer, batch_size)
                told = {"gold": task.gold(examples[i]), "predictions": predicted}
                found = {**task.score(predicted, examples[i]), **told}
            else:
                found = task.evaluate(model, features[i], examples[i], tokenizer, batch_size)
        shown = (
            None if lang is None else "SFT" if isinstance(lang, SparseDelta) else os.fspath(lang)
        )
        rows.append({"data": os.fspath(path), "lang": shown, "metric": task.metric, **found})
    return rows


def _same_labels(
    said: str, given: Sequence[str] | None, recorded: Sequence[str] | None, task: Task
) -> Sequence[str] | None:
    """The labels of an SFT's head; None for a task without.

    Raises:
        RunError: There are none, or those given are not those that it records.
    """
    _check_labels(given)
    if given is not None and recorded is not None and list(given) != list(recorded):
        raise RunError(
            f"{said}: records the labels {', '.join(recorded)}, in this order; leave --label out"
        )
    labels = given or recorded
    if labels is None and type(task).labels is not Task.labels:
        raise RunError(f"{said}: records no labels; give each with --label, as its head has them")
    return labels


def _recorded(delta: SparseDelta) -> dict[str, Any]:
    """What an SFT records of its training, as far as it has the form that `train` gives it."""
    recipe = delta.meta.get("recipe")
    found = recipe if isinstance(recipe, dict) else {}
    return found if isinstance(found.get("task"), dict) else {}


def _recorded_task(
    said: str, recorded: Mapping[str, Any], kind: str | None
) -> tuple[str, dict[str, Any]]:
    """The kind of an SFT's task, and its options as far as they are of that kind."""
    settings = dict(recorded.get("task", {}))
    found = settings.pop("name", None)
    name = kind or found
    if name is None:
        raise RunError(
            f"{said}: records no kind of task; it must be given, with the labels: "
            f"{', '.join(TASKS)}"
        )
    if name not in TASKS:
        raise RunError(f"{said}: there is no kind of task {name!r}; there are {', '.join(TASKS)}")
    return name, settings if name == found else {}


def _pairs(tests: Sequence[PathLike], langs: Sequence[Any]) -> list[tuple[PathLike, Any]]:
    if not tests or not langs:
        raise RunError("there is nothing to evaluate on")
    if len(tests) == len(langs):
        return list(zip(tests, langs, strict=True))
    if 1 in (len(tests), len(langs)):
        return [(test, lang) for lang in langs for test in tests]
    raise RunError(
        f"{len(tests)} test data and {len(langs)} languages: give one of either, or as many of "
        "the one as of the other, in the same order"
    )


# --- several sources ----------------------------------------------------------------------------


def read_sources(path: PathLike) -> dict[str, Source]:
    """Reads sources from a JSON file: name → {"data": file or list of files, "valid": file, "sft":
    file or Hub name, "repeat": number}. Paths are relative to the file's folder.

    Raises:
        RunError: It is not of that form; an unknown key is refused by name.
        OSError: It cannot be read.
    """
    folder = Path(path).parent
    try:
        document = json.loads(Path(path).read_text("utf-8-sig"))
    except ValueError as error:
        raise RunError(f"{path}: is not JSON: {error}") from None
    if not isinstance(document, dict) or not document:
        raise RunError(f"{path}: must be an object, one entry for each source")
    known = [f.name for f in fields(Source)]
    sources = {}
    for name, entry in document.items():
        at = f"{path}: source {name!r}"
        if not isinstance(entry, dict):
            raise RunError(f"{at}: must be an object with {', '.join(known)}")
        if wrong := [key for key in entry if key not in known]:
            raise RunError(f"{at}: there is no key {wrong[0]!r}; there are {', '.join(known)}")
        data = entry.get("data", [])
        data = [data] if isinstance(data, str) else data
        texts = [*data, *(entry[k] for k in ("valid", "sft") if entry.get(k) is not None)]
        if not isinstance(data, list) or not data or not all(isinstance(x, str) for x in texts):
            raise RunError(f"{at}: data must be a file or a list of files, valid and sft one each")
        repeat = entry.get("repeat", 1)
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise RunError(f"{at}: repeat must be a whole number of at least 1; found {repeat!r}")

        def here(text: str | None) -> str | None:
            local = None if text is None else folder / text
            return str(local) if local is not None and local.exists() else text

        sources[name] = Source(
            tuple(here(x) or x for x in data),
            here(entry.get("valid")),
            here(entry.get("sft")),
            repeat,
        )
    return sources
