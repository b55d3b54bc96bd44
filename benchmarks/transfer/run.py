"""Runs an experiment piece by piece: what is finished lies on disk and is not done again.

A piece is one SFT to train or one row to score, each a call of the public API. Its file is named by
a key of everything that decides it, so that the same command goes on wherever it was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

import sparse_ft as sf
from sparse_ft.quickstart.store import Store, key_of, write_text
from sparse_ft.tasks import TASKS, Task
from sparse_ft.tasks.recipes import Recipe
from sparse_ft.tasks.runner import evaluate, train

from . import scores
from .arms import ARMS, DENOISED, DENSE, FULL, RANDOM, SHARING, Arm, by_method
from .dataset import Dataset, DatasetError, digest_of
from .experiments import Settings

SCHEMA = 1
PARTS = ("arms", "ladder", "grid", "overlap")
STOPPED = "stopped.json"
RING_AGAIN = 10.0
"""Seconds after which a deadline is raised once more, should a callback have swallowed it."""


class OutOfTime(BaseException):
    """The deadline has come; what is on disk is whole."""


@contextmanager
def deadline(minutes: float | None) -> Iterator[None]:
    """Raises `OutOfTime` in the block after some minutes; None: never."""
    if minutes is None:
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes, RING_AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Sft:
    """An SFT to train.

    Attributes:
        seed: Of its run.
        method: One of `METHODS`.
        language: Of its text; None: it is the task's.
        density: Share of the entries, where it is not the recipe's.
        options: Of the method's criterion, where they are not the experiment's: pairs, sorted.
    """

    seed: int
    method: str
    language: str | None = None
    density: float | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        what = "task" if self.language is None else self.language
        extra = [f"{self.density:.3g}"] if self.density is not None else []
        extra += [f"{name}={value}" for name, value in self.options]
        return " ".join([f"{what}-{self.method}", *extra])


@dataclass(frozen=True)
class Row:
    """One score to find: an arm in a language.

    Attributes:
        seed: Of all of its SFTs.
        language: Of the test data.
        arm: One of `ARMS`.
        part: Of the study.
        task_density: Of the task's SFT, where it is not the recipe's.
        language_density: Of the language's.
        weight: Of the language's SFT; None: as the arm has it.
        options: Of the methods' criterion; pairs, sorted.
    """

    seed: int
    language: str
    arm: str
    part: str = "arms"
    task_density: float | None = None
    language_density: float | None = None
    weight: float | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        densities = [d for d in (self.task_density, self.language_density) if d is not None]
        extra = [f"{d:.3g}" for d in densities]
        extra += [f"weight {self.weight:g}"] if self.weight is not None else []
        extra += [f"{name}={value}" for name, value in self.options]
        return " ".join([f"{self.language}-{self.arm}", *extra])


@dataclass(frozen=True)
class Pairs:
    """What the supports of a seed's SFTs share: those of all languages, and that of the task."""

    seed: int
    languages: tuple[str, ...]

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        return "overlap"


Piece = Sft | Row | Pairs


class Run:
    """An experiment on one base model, in one folder.

    Args:
        dataset: Its data.
        base: A folder with a model, or its name on the Hub.
        settings: How its SFTs are trained.
        folder: For everything that it makes; created when missing.
        size: "quick", "full" or "own": for its lines.
        base_name: What the base model is called there; default: the last part of `base`.
        device: Such as "cpu" or "cuda"; "auto": a GPU where there is one.
        precision: "bf16" for autocast in training, None for the weights' own.
        store: A file that gets its lines too.
        say: Is told what happens, a line each.

    Attributes:
        folder: Its own; another base model, device or precision has another.
        lines: The file of its lines; other settings have another.
    """

    def __init__(
        self,
        dataset: Dataset,
        base: str | os.PathLike[str],
        settings: Settings,
        folder: str | os.PathLike[str],
        *,
        size: str,
        base_name: str | None = None,
        device: str = "auto",
        precision: str | None = None,
        store: Path | None = None,
        say: Callable[[str], None] = lambda said: None,
    ) -> None:
        self.dataset = dataset
        self.base = os.fspath(base)
        self.base_name = base_name or Path(self.base).name
        self.settings = settings
        self.size = size
        self.device = device
        if device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = precision
        self.store = store
        self.say = say
        # What another machine or precision made is not mixed with this one's.
        told = {
            "data": dataset.content,
            "base": _identity(self.base, content=size == "own"),
            "device": self.device.partition(":")[0],
            "precision": precision,
        }
        name = f"{dataset.name}-{size}-{key_of(told)}"
        self.folder = Path(folder) / name
        self.records = Store(self.folder / "records")
        # What other settings gave stays apart: a report compares what was trained alike.
        recipes = {x: getattr(settings, x).to_dict() for x in ("language", "source", "task")}
        how = {**recipes, "denoised": dict(settings.denoised), "weight": settings.weight}
        self.lines = self.folder / f"lines-{key_of(how)}.jsonl"
        self._tests: dict[str, list[Any]] = {}

    # --- what there is to do ----------------------------------------------------------------------

    def rows(
        self,
        seeds: Iterable[int],
        languages: Sequence[str],
        arms: Sequence[str],
        parts: Sequence[str] = ("arms",),
    ) -> list[Row | Pairs]:
        """The scores of a study, in the order in which they are found: seed by seed, language by
        language, so that complete rows come early.

        Raises:
            DatasetError: There are no test data of a language, or there is nothing to do.
        """
        every = (*self.dataset.targets, *self.dataset.development, self.dataset.source)
        known = [language for language in every if language in self.dataset.test]
        if unknown := [language for language in languages if language not in known]:
            raise DatasetError(
                f"data set {self.dataset.name!r} has no test data of {unknown[0]!r}; it has those "
                f"of {', '.join(known)}"
            )
        seeds = list(seeds)
        grid = self.settings.grid
        found: list[Row | Pairs] = []
        if "arms" in parts:
            for seed in seeds:
                for language in languages:
                    found += [
                        Row(seed, language, arm)
                        for arm in arms
                        if self._whose(ARMS[arm], language) is not None
                    ]
        if "ladder" in parts:
            for seed in seeds:
                for language in languages:
                    for density in self.settings.ladder:
                        found += [
                            Row(seed, language, "task-only", "ladder", density),
                            Row(seed, language, "composed", "ladder", density),
                            Row(seed, language, "composed", "ladder", density, density),
                        ]
        if "grid" in parts:
            found += [
                Row(seeds[0], language, "composed", "grid", task, of_language)
                for language in languages
                for of_language in grid
                for task in grid
            ]
        if "overlap" in parts:
            found += [Pairs(seed, tuple(languages)) for seed in seeds]
        if not found:
            raise DatasetError(
                f"data set {self.dataset.name!r} has no language whose SFT the arms "
                f"{', '.join(arms)} could take"
            )
        return list(dict.fromkeys(found))

    def other(self, language: str) -> str | None:
        """The language whose SFT is the wrong one, whichever languages a run has: the targets have
        each other's, the first the second's and so on; None where there is no other."""
        targets = self.dataset.targets
        if language not in targets:
            return targets[0]
        i = targets.index(language)
        if len(targets) == 1:
            return next((x for x in self.dataset.development if x in self.dataset.text), None)
        return targets[i ^ 1 if i ^ 1 < len(targets) else i - 1]

    def _whose(self, arm: Arm, language: str) -> str | None:
        """The language whose SFT an arm takes; None where there is none."""
        if arm.whose == "other":
            return self.other(language)
        if arm.whose == "source":
            return self.dataset.source if self.dataset.source in self.dataset.text else None
        return language

    def needs(self, piece: Piece) -> list[Sft]:
        """The SFTs that a piece is made of, each after those that it needs itself."""
        if isinstance(piece, Sft):
            below = self._below(piece)
            return [] if below is None else [below]
        if isinstance(piece, Pairs):
            direct = [Sft(piece.seed, "lt", x) for x in self._with_source(piece.languages)]
            direct.append(Sft(piece.seed, "lt"))
        else:
            direct = [sft for sft in self._pair(piece) if sft is not None]
        return list(dict.fromkeys(x for sft in direct for x in (*self.needs(sft), sft)))

    def _with_source(self, languages: Sequence[str]) -> list[str]:
        source = self.dataset.source
        first = [source] if source in self.dataset.text else []
        return list(dict.fromkeys([*first, *languages]))

    def _below(self, sft: Sft) -> Sft | None:
        """The SFT of the source language that a task is learnt on: of the same method."""
        source = self.dataset.source
        if sft.language is not None or sft.method == FULL or source not in self.dataset.text:
            return None
        return Sft(sft.seed, sft.method, source, options=sft.options)

    def _pair(self, row: Row) -> tuple[Sft, Sft | None]:
        """The SFT of the task and that of the language."""
        arm = ARMS[row.arm]
        task = Sft(row.seed, arm.task, None, row.task_density, self._options(arm.task, row))
        if arm.language is None:
            return task, None
        method = "lt" if arm.language == DENSE else arm.language
        whose = self._whose(arm, row.language)
        options = self._options(method, row)
        return task, Sft(row.seed, method, whose, row.language_density, options)

    def _options(self, method: str, row: Row) -> tuple[tuple[str, Any], ...]:
        if method != DENOISED or dict(row.options) == self.settings.denoised:
            return ()
        return row.options

    def pending(self, rows: Iterable[Row | Pairs]) -> list[Piece]:
        """What is left to do for some scores, in order, each piece once."""
        found: dict[Piece, None] = {}
        trained: dict[Sft, bool] = {}
        for row in rows:
            if self._record(row) is None:
                for sft in self.needs(row):
                    if sft not in trained:
                        trained[sft] = self._record(sft) is not None
                    if not trained[sft]:
                        found[sft] = None
                found[row] = None
        return list(found)

    # --- keys and files ---------------------------------------------------------------------------

    def recipe(self, sft: Sft) -> Recipe:
        """How an SFT is trained."""
        settings = self.settings
        if sft.language is None:
            chosen = settings.task
        else:
            own = sft.language == self.dataset.source
            chosen = settings.source if own else settings.language
        options: Mapping[str, Any] | None = dict(sft.options)
        if sft.method == DENOISED:
            options = options or settings.denoised
        elif sft.method == RANDOM:
            # From one seed all would have one mask, and meet in every entry when composed.
            told = f"{sft.seed} {'task' if sft.language is None else sft.language}"
            options = {"seed": int(hashlib.sha256(told.encode()).hexdigest()[:8], 16)}
        chosen = by_method(chosen, sft.method, options)
        if sft.density is not None:
            chosen = chosen.changed(density=sft.density)
        return chosen.changed(precision=self.precision)

    def key(self, piece: Piece) -> str:
        """A digest of everything that decides a piece within this folder."""
        return key_of(self._told(piece))

    def _told(self, piece: Piece) -> dict[str, Any]:
        told: dict[str, Any] = {
            "piece": {"kind": type(piece).__name__, **dataclasses.asdict(piece)},
            "needs": [self.key(sft) for sft in self.needs(piece)],
        }
        if isinstance(piece, Sft):
            told["recipe"] = self.recipe(piece).to_dict()
        elif isinstance(piece, Row):
            arm = ARMS[piece.arm]
            told["arm"] = {k: v for k, v in dataclasses.asdict(arm).items() if k != "about"}
            told["weight"] = self._weight(piece)
        return json.loads(json.dumps(told))  # type: ignore[no-any-return]

    def _record(self, piece: Piece) -> dict[str, Any] | None:
        return self.records.get(self._name(piece), self.key(piece))

    def _name(self, piece: Piece) -> str:
        words = piece.label.replace("=", "-").replace(":", "-").replace(" ", "-")
        return f"seed{piece.seed}-{words}" + (f"-{piece.part}" if isinstance(piece, Row) else "")

    def path(self, sft: Sft) -> Path:
        """The file of an SFT."""
        name = self._name(sft).partition("-")[2]
        return self.folder / f"seed{sft.seed}" / f"{name}-{self.key(sft)}.safetensors"

    def full_model(self, sft: Sft) -> Path:
        """The fully tuned model that SFTs of one text, recipe and seed are selected from, whatever
        their density and criterion."""
        recipe = by_method(self.recipe(dataclasses.replace(sft, density=None, options=())), "lt")
        plain = recipe.changed(density=1.0, criterion="magnitude", criterion_options={})
        told = {
            "recipe": plain.to_dict(),
            "language": sft.language,
            "below": [self.key(below) for below in self.needs(sft)],
        }
        what = "task" if sft.language is None else sft.language
        return self.folder / f"seed{sft.seed}" / f"full-{what}-{key_of(told)}.safetensors"

    # --- doing it ---------------------------------------------------------------------------------

    def go(self, rows: Sequence[Row | Pairs]) -> list[dict[str, Any]]:
        """Does what is left to do for some scores; stopped at any moment, the same call goes on.

        Args:
            rows: As `rows` gives them.

        Returns:
            Their lines, in order.

        Raises:
            DatasetError: A row needs the SFT of a language that has no text; nothing was done.
            RunError, DataError, SFTError, OSError: A piece cannot be done.
        """
        start = time.monotonic()
        left = self.pending(rows)
        for piece in left:
            language = piece.language if isinstance(piece, Sft) else None
            if language is not None and language not in self.dataset.text:
                raise DatasetError(
                    f"data set {self.dataset.name!r} has no text of {language!r} to learn its SFT "
                    "from; leave the language out, or the arms that need it"
                )
        taken = self._taken()
        for i, piece in enumerate(left):
            self.say(
                f"[{i + 1}/{len(left)}] {clock(time.monotonic() - start)} passed, "
                f"{self._expected(left[i:], taken)} to go: seed {piece.seed}, "
                f"{'SFT' if isinstance(piece, Sft) else 'score'} {piece.label}"
            )
            record = self._do(piece)
            taken.setdefault(record["sort"], []).append(record["seconds"])
            if not isinstance(piece, Sft):
                self.publish([piece])
        return self.publish(rows)

    def publish(self, rows: Iterable[Row | Pairs]) -> list[dict[str, Any]]:
        """Adds the lines of finished scores to the folder's file and to the store.

        Returns:
            They all.
        """
        found = [self._record(row) for row in rows]
        lines = [line for record in found if record is not None for line in record["lines"]]
        if lines:
            for path in (self.lines, self.store):
                if path is not None:
                    append(path, [*self._groups(lines), *lines])
        return lines

    def _groups(self, lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What is resampled together, once for each language of these lines."""
        found = []
        for language in dict.fromkeys(str(line.get("language")) for line in lines):
            if language in self.dataset.groups:
                names = self.dataset.groups[language].read_text("utf-8").splitlines()
                line = {
                    "schema": SCHEMA,
                    "kind": "transfer",
                    "experiment": self.dataset.name,
                    "size": self.size,
                    "part": "groups",
                    "language": language,
                    "data": {"content": self.dataset.content},
                    "groups": scores.group_ids(names),
                }
                if self.dataset.metric == "accuracy":
                    line["commonest"] = list(scores.commonest(self._test(language)))
                found.append({**line, "key": key_of(line)})
        return found

    def _taken(self) -> dict[str, list[float]]:
        """Sort of piece → seconds of those that are done."""
        taken: dict[str, list[float]] = {}
        for path in self.records.folder.glob("*.json"):
            record = json.loads(path.read_text("utf-8"))
            taken.setdefault(record["sort"], []).append(record["seconds"])
        return taken

    def _expected(self, left: Sequence[Piece], taken: Mapping[str, Sequence[float]]) -> str:
        """The time that pieces will take, as far as pieces of their sort have been done."""
        known = {sort: sum(seconds) / len(seconds) for sort, seconds in taken.items()}
        sorts = [_sort(piece, self.dataset.source) for piece in left]
        total = sum(known.get(sort, 0.0) for sort in sorts)
        if not total:
            return "an unknown time"
        return ("at least " if {*sorts} - {*known} else "about ") + clock(total)

    def _do(self, piece: Piece) -> dict[str, Any]:
        name = self._name(piece)
        key = self.key(piece)
        start = time.monotonic()
        lines: list[dict[str, Any]] = []
        files: list[Path] = []
        (self.folder / f"seed{piece.seed}").mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(piece, Sft):
                files = [self._train(piece)]
            elif isinstance(piece, Row):
                lines = [self._score(piece)]
            else:
                lines = self._overlap(piece)
        except BaseException:
            self._stop(piece, time.monotonic() - start)
            raise
        seconds = sum(self._stops(piece), time.monotonic() - start)
        sort = _sort(piece, self.dataset.source)
        record = {"sort": sort, "seconds": round(seconds, 2), "lines": lines}
        return self.records.put(name, key, record, *files)

    def _stops(self, piece: Piece) -> list[float]:
        """Seconds of the tries at a piece that were stopped."""
        return self._stopped(piece.seed).get(f"{self._name(piece)}-{self.key(piece)}", [])

    def _stopped(self, seed: int) -> dict[str, list[float]]:
        try:
            text = (self.folder / f"seed{seed}" / STOPPED).read_text("utf-8")
            found: dict[str, list[float]] = json.loads(text)
        except (OSError, ValueError):
            return {}
        return found

    def _stop(self, piece: Piece, seconds: float) -> None:
        stops = {f"{self._name(piece)}-{self.key(piece)}": [*self._stops(piece), seconds]}
        text = json.dumps({**self._stopped(piece.seed), **stops}, indent=1) + "\n"
        write_text(self.folder / f"seed{piece.seed}" / STOPPED, text)

    def _train(self, sft: Sft) -> Path:
        dataset, recipe, path = self.dataset, self.recipe(sft), self.path(sft)
        shared = self.full_model(sft) if sft.method in SHARING else None
        options: dict[str, Any] = {
            "recipe": recipe,
            "seed": sft.seed,
            "device": self.device,
            # Halved at each stop: what is stored too seldom for the time that it is given would
            # begin at the same place again and again.
            "save_every": max(1, self.settings.save_every >> len(self._stops(sft))),
            "full_model": shared,
            # Its name has the key of what it is: whatever is there and is not whole is not needed.
            "force": True,
            "note": self.say,
        }
        if sft.language is not None:
            text = dataset.text[sft.language]
            train(text, self.base, path, lang=sft.language, **options)
        else:
            below = self._below(sft)
            train(
                dataset.train,
                self.base,
                path,
                valid=dataset.dev,
                sft=None if below is None else self.path(below),
                lang=dataset.source,
                name=dataset.name,
                options=dataset.options,
                **options,
            )
        return path

    def _weight(self, row: Row) -> float:
        if row.weight is not None:
            return row.weight
        return self.settings.weight if ARMS[row.arm].weighted else 1.0

    def _dense(self, sft: Sft) -> sf.SparseDelta:
        """The fully tuned model of a language minus the base model."""
        full = self.full_model(sft)
        return sf.diff(self.base, full, eligible="*", role="language", lang=sft.language)

    def _score(self, row: Row) -> dict[str, Any]:
        """The line of a score."""
        dataset, arm = self.dataset, ARMS[row.arm]
        task, language = self._pair(row)
        phi: Any = self.path(task)
        other: Any = None
        if language is not None:
            other = self._dense(language) if arm.language == DENSE else self.path(language)
        if arm.rule is not None:
            phi, other = self._merged(arm, phi, other), None
        tuning = row.part == "tune"
        test = dataset.dev_of[row.language] if tuning else dataset.test[row.language]
        views = {} if tuning else dataset.views.get(row.language, {})
        labels = sf.SparseDelta.load(self.path(task)).meta["recipe"]["labels"]
        (found,) = evaluate(
            *(self.base, phi, test),
            langs=(other,),
            weight=self._weight(row) if other is not None else 1.0,
            # What is merged by a rule does not say any more what its head is.
            kind=dataset.task,
            labels=labels,
            max_length=self.settings.task.max_length,
            options=self._task_options,
            device=self.device,
            predictions=True,
        )
        # The sentences of a view are those of the test data, so the predictions are too.
        table, *others = (
            scores.counts(dataset.metric, gold, found["predictions"], labels, self._ignored(gold))
            for gold in (found["gold"], *map(self._gold, views.values()))
        )
        seen = dict(zip(views, others, strict=True))
        used = self.needs(row)
        return {
            **self._line(row),
            "arm": row.arm,
            "language": row.language,
            **{
                name: value
                for name, value in (
                    ("density", row.task_density if row.part == "ladder" else None),
                    ("of", self._ladder_of(row)),
                    ("task_density", row.task_density if row.part == "grid" else None),
                    ("language_density", row.language_density if row.part == "grid" else None),
                    ("weight", row.weight),
                    ("options", dict(row.options) or None),
                )
                if value is not None
            },
            "metric": dataset.metric,
            "score": _score(dataset.metric, table),
            "views": {name: _score(dataset.metric, one) for name, one in seen.items()},
            "counts": table.tolist(),
            "view_counts": {name: one.tolist() for name, one in seen.items()},
            "n": len(table),
            "settings": self._settings(used, self._weight(row) if language else None),
            "data": self._data(),
            "seconds": round(sum(self._seconds(sft) for sft in used), 1),
        }

    @staticmethod
    def _ladder_of(row: Row) -> str | None:
        if row.part != "ladder":
            return None
        return "task" if row.language_density is None else "both"

    def _merged(self, arm: Arm, task: Path, language: Any) -> sf.SparseDelta:
        deltas = [sf.SparseDelta.load(task), sf.SparseDelta.load(language)]
        assert arm.rule is not None
        return sf.merge(deltas, rule=arm.rule, heads=deltas[0], **arm.options)

    @property
    def _task_options(self) -> dict[str, Any]:
        """As `train` has them: what is merged by a rule does not say them any more."""
        return {**self.settings.task.options, **self.dataset.options}

    def _task(self) -> tuple[Task, dict[str, Any]]:
        """The task, and the options that are of the reader of its data."""
        kind, options = TASKS[self.dataset.task], self._task_options
        known = {f.name for f in dataclasses.fields(kind)}
        own = {name: value for name, value in options.items() if name in known}
        return kind(**own), {name: options[name] for name in options if name not in known}

    def _gold(self, path: Path) -> list[Any]:
        """What is right for each example of a file, in the form of predictions."""
        task, reading = self._task()
        return task.gold(task.read(path, "test", **reading))

    def _test(self, language: str) -> list[Any]:
        """What is right for each test example of a language."""
        if language not in self._tests:
            self._tests[language] = self._gold(self.dataset.test[language])
        return self._tests[language]

    def _ignored(self, gold: Sequence[Any]) -> set[str]:
        """Labels of words that do not count: "" where a word has none, and punctuation's."""
        task, _ = self._task()
        if getattr(task, "punctuation", True):
            return {""}
        relations = {relation for words in gold for _, relation in words}
        return {relation for relation in relations if relation.partition(":")[0] == "punct"}

    def _overlap(self, pairs: Pairs) -> list[dict[str, Any]]:
        """A line for each two SFTs of a seed."""
        sfts = {x: Sft(pairs.seed, "lt", x) for x in self._with_source(pairs.languages)}
        sfts["task"] = Sft(pairs.seed, "lt")
        deltas = [sf.SparseDelta.load(self.path(sft)) for sft in sfts.values()]
        found = sf.overlap(deltas, list(sfts))
        return [
            {
                **self._line(pairs, f"{row['a']} {row['b']}"),
                "first": row["a"],
                "second": row["b"],
                "shared": row["both"],
                "entries": [row["entries_a"], row["entries_b"]],
                "share": [row["share_a"], row["share_b"]],
                "expected": row["expected"],
                "cosine": row["cosine"],
                "settings": self._settings(list(sfts.values()), None),
                "data": self._data(),
            }
            for row in found.rows()
        ]

    # --- lines ------------------------------------------------------------------------------------

    def _line(self, piece: Row | Pairs, which: str = "") -> dict[str, Any]:
        """What all lines have; `key` tells one setting from another."""
        return {
            "schema": SCHEMA,
            "kind": "transfer",
            "experiment": self.dataset.name,
            "size": self.size,
            "part": piece.part if isinstance(piece, Row) else "overlap",
            "seed": piece.seed,
            "key": key_of({"run": self.folder.name, "piece": self.key(piece), "which": which}),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _settings(self, used: Sequence[Sft], weight: float | None) -> dict[str, Any]:
        import transformers

        return {
            "base": self.base_name,
            "recipes": {sft.label: _short(self.recipe(sft)) for sft in used},
            **({} if weight is None else {"weight": weight}),
            "device": _device_name(self.device),
            "threads": torch.get_num_threads(),
            "precision": self.precision or "fp32",
            "versions": {
                "sparse_ft": sf.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }

    def _data(self) -> dict[str, Any]:
        return {
            "content": self.dataset.content,
            "packages": {
                name: package.get("version")
                for name, package in self.dataset.about.get("packages", {}).items()
            },
        }

    def _seconds(self, sft: Sft) -> float:
        record = self._record(sft)
        return 0.0 if record is None else float(record["seconds"])


def _score(metric: str, table: Any) -> float:
    return float(scores.value(metric, table.sum(0)))


def _sort(piece: Piece, source: str) -> str:
    """Pieces of one sort take about as long."""
    if not isinstance(piece, Sft):
        return type(piece).__name__
    of = "task" if piece.language is None else "source" if piece.language == source else "language"
    return f"{of}-{piece.method}"


def _short(recipe: Recipe) -> dict[str, Any]:
    """What a recipe sets otherwise than `Recipe` does by itself, whatever the seed of its run."""
    plain = Recipe("", "", "", "").to_dict()
    options = {k: v for k, v in recipe.criterion_options.items() if k != "seed"}
    told = {**recipe.to_dict(), "criterion_options": options}
    return {
        name: value
        for name, value in told.items()
        if name not in ("origin", "changed", "options") and plain.get(name, {}) != value
    }


def _identity(base: str, content: bool) -> dict[str, Any]:
    """What tells one base model from another: name and sizes of its files, as the name of one that
    was built here has a key of all that it is; of any other, their content."""
    path = Path(base)
    if not path.is_dir():
        return {"name": base}
    files = [file for file in sorted(path.iterdir()) if file.is_file()]
    told: dict[str, Any] = {"name": path.name, "sizes": {f.name: f.stat().st_size for f in files}}
    if content:
        told["content"] = {file.name: digest_of(file) for file in files}
    return told


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = next(line for line in text.splitlines() if line.startswith("model name"))
        return model.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def clock(seconds: float) -> str:
    """A time as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines to a file of JSON lines, but for those whose key it has; each is written whole.

    A last line that was never finished goes. Several processes may do this at once.

    Args:
        path: The file; created when missing.
        lines: Each with a "key".

    Raises:
        ValueError: The file holds something else; it is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file, _alone(file):
        file.seek(0)
        *whole, last = (file.read() or b"").split(b"\n")
        torn = last.startswith(b"{") and not _is_json(last)
        try:
            there = [json.loads(line) for line in [*whole, b"" if torn else last] if line.strip()]
            known = {line.get("key") for line in there}
        except (ValueError, AttributeError):
            raise ValueError(f"{path} holds something other than lines; name another") from None
        new = {line["key"]: line for line in lines if line["key"] not in known}
        if torn:
            file.truncate(file.tell() - len(last))
        if new:
            text = "".join(json.dumps(line) + "\n" for line in new.values())
            file.write(("\n" * bool(last and not torn) + text).encode())


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@contextmanager
def _alone(file: IO[bytes]) -> Iterator[None]:
    """Keeps other processes that ask for it out of a file, where the system can."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    yield  # closing the file ends it
