"""The stored lines: which count, and what those of one experiment say of its arms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..lines import ROOT
from . import scores
from .arms import ARMS
from .scores import Difference

Line = dict[str, Any]

SCHEMA = 1
PARTS = ("arms", "ladder", "grid", "overlap", "groups")
RESULTS = ROOT / "benchmarks" / "results" / "transfer"
# How far a stored score may lie from that of its counts: the rounding of a decimal fraction.
_CLOSE = 1e-6


def read(paths: Iterable[Path]) -> list[Line]:
    """The lines that count: of several for one setting, the newest.

    Args:
        paths: Files of JSON lines, older ones first where dates are the same.

    Returns:
        One line a setting, sorted; lines of other kinds and schemas are left out.

    Raises:
        ValueError: A line is damaged, or its score is not that of its counts; names file and line.
    """
    found: dict[tuple[Any, ...], Line] = {}
    for path in paths:
        for number, row in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not row.strip():
                continue
            try:
                line = json.loads(row)
                if line.get("kind") != "transfer" or line.get("schema") != SCHEMA:
                    continue
                key = _key(line)
                _check(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: {error!s}") from None
            if key not in found or found[key].get("date", "") <= line.get("date", ""):
                found[key] = line
    return [found[key] for key in sorted(found, key=lambda key: tuple(map(str, key)))]


def stored(folder: Path = RESULTS) -> list[Line]:
    """The lines that count, of all files of a folder."""
    return read(sorted(folder.glob("*.jsonl")))


def _part(line: Line) -> str:
    return str(line.get("part", "arms"))


# What tells the lines of a part apart.
_WHICH = (
    *("arm", "language", "seed", "of", "density", "language_density", "task_density"),
    *("weight", "options", "first", "second"),
)


def _key(line: Line) -> tuple[Any, ...]:
    """What tells settings apart."""
    return (
        line["experiment"],
        line["size"],
        _part(line),
        *(json.dumps(line.get(name)) for name in _WHICH),
    )


def _check(line: Line) -> None:
    """Whether the scores are those of the counts."""
    metric = line.get("metric", "accuracy")
    pairs = []
    if "counts" in line:
        pairs = [("", line["score"], line["counts"])]
        views = line.get("view_counts", {})
        pairs += [(view, line["views"][view], rows) for view, rows in views.items()]
    for name, score, rows in pairs:
        given = float(scores.value(metric, np.asarray(rows).sum(0)))
        if not abs(given - score) < _CLOSE:
            where = f" of {name}" if name else ""
            raise ValueError(f"the score{where} is {score}, and that of its counts {given}")


class Study:
    """The lines of one experiment on the same data, and the draws that compare its arms.

    Args:
        lines: Those that count, of one experiment and size.
        view: Of the test data; "": all that is labelled.
    """

    def __init__(self, lines: Sequence[Line], view: str = "") -> None:
        self.lines = list(lines)
        self.view = view
        first = self.lines[0]
        self.experiment: str = first["experiment"]
        self.size: str = first["size"]
        self.metric = next((x["metric"] for x in self.lines if "metric" in x), "accuracy")
        about = {x["language"]: x for x in self.lines if _part(x) == "groups"}
        self.groups = {language: x["groups"] for language, x in about.items()}
        # Language → its most frequent label and the share of it, of all that is labelled.
        self.commonest: dict[str, tuple[str, float]] = {
            language: (x["commonest"][0], x["commonest"][1])
            for language, x in about.items()
            if "commonest" in x and not view
        }
        self.runs = {
            (line["arm"], line["language"], line["seed"]): np.asarray(rows)
            for line in self.part("arms")
            if (rows := line.get("view_counts", {}).get(view) if view else line["counts"])
        }
        arms = {arm for arm, _, _ in self.runs}
        self.arms = [*(a for a in ARMS if a in arms), *sorted(arms - {*ARMS})]
        self.languages = list(dict.fromkeys(language for _, language, _ in self.runs))
        self._differences: dict[tuple[str, str, str | None], Difference | None] = {}
        self._draws: dict[str | None, dict[tuple[str, str, int], np.ndarray]] = {}

    def part(self, name: str) -> list[Line]:
        """The lines of a part."""
        return [line for line in self.lines if _part(line) == name]

    @cached_property
    def views(self) -> list[str]:
        """The views of the test data that were scored."""
        return sorted({view for line in self.part("arms") for view in line.get("view_counts", {})})

    def seeds(self, arm: str, language: str) -> set[int]:
        """The seeds that an arm was run with in a language."""
        return {seed for a, lang, seed in self.runs if (a, lang) == (arm, language)}

    def score(self, arm: str, language: str) -> float | None:
        """Mean over the seeds; None where the arm was not run."""
        totals = [self.runs[arm, language, s].sum(0) for s in self.seeds(arm, language)]
        return float(np.mean(scores.value(self.metric, np.stack(totals)))) if totals else None

    def unlearnt(self, arm: str) -> list[str]:
        """The languages in which an arm is not above the most frequent label."""
        found = ((x, self.score(arm, x)) for x in self.commonest)
        return [x for x, score in found if score is not None and score <= self.commonest[x][1]]

    def mean(self, arm: str) -> float | None:
        """Mean over the languages; None where one is missing."""
        found = [self.score(arm, language) for language in self.languages]
        known = [score for score in found if score is not None]
        return sum(known) / len(found) if len(known) == len(found) else None

    def difference(self, a: str, b: str, language: str | None = None) -> Difference | None:
        """How much better one arm is than another.

        Args:
            a: The one.
            b: The other.
            language: In which; None: in the mean over all.

        Returns:
            The difference over the seeds that both have; None where there is none.
        """
        if (a, b, language) not in self._differences:
            self._differences[a, b, language] = self._compared(a, b, language)
        return self._differences[a, b, language]

    def _compared(self, a: str, b: str, language: str | None) -> Difference | None:
        languages = self.languages if language is None else [language]
        sets = [self.seeds(arm, one) for arm in (a, b) for one in languages]
        shared = sorted(set.intersection(*sets)) if sets else []
        if not shared:
            return None
        drawn = self._drawn(language)
        one, other = (
            np.stack([np.mean([drawn[arm, x, s] for x in languages], 0) for s in shared], 1)
            for arm in (a, b)
        )
        return scores.compared(one, other)

    def _drawn(self, language: str | None) -> dict[tuple[str, str, int], np.ndarray]:
        """The scores of all runs on the same draws."""
        if language not in self._draws:
            keys = [key for key in self.runs if language in (None, key[1])]
            groups = [self._groups(key[1], len(self.runs[key])) for key in keys]
            drawn = scores.resampled(self.metric, [self.runs[key] for key in keys], groups)
            self._draws[language] = dict(zip(keys, drawn.T, strict=True))
        return self._draws[language]

    def _groups(self, language: str, n: int) -> Sequence[str]:
        """The groups of a language's examples; by itself each, where none are stored."""
        found = self.groups.get(language) or [f"{language} {i}" for i in range(n)]
        if len(found) != n:
            raise ValueError(
                f"{self.experiment} {self.size}: {language} has {n} test examples and groups for "
                f"{len(found)}; keep the lines of one run"
            )
        return found


def studies(lines: Sequence[Line]) -> list[Study]:
    """The experiments that there are lines of, in the order in which they come.

    Raises:
        ValueError: Lines of one experiment are of different data, or its arms were trained in
            different ways.
    """
    sets: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if _part(line) in PARTS:
            sets.setdefault((line["experiment"], line["size"]), []).append(line)
    for name, found in sets.items():
        _check_alike(" ".join(name), found)
    return [Study(found) for found in sets.values() if {*map(_part, found)} - {"groups"}]


def _check_alike(study: str, lines: Sequence[Line]) -> None:
    """Whether what is compared is alike: data, base model, precision, one recipe for each SFT."""
    known: dict[str, tuple[Any, Line]] = {}
    for line in lines:
        facts = {"data": line["data"]["content"]}
        if _part(line) == "arms":
            settings = line["settings"]
            facts |= {"base model": settings["base"], "precision": settings["precision"]}
            facts |= settings["recipes"]
        for name, what in facts.items():
            first, other = known.setdefault(name, (what, line))
            if first != what:
                raise ValueError(
                    f"{study}: {_called(other)} and {_called(line)} differ in {name}: {first} and "
                    f"{what}; keep the lines of one run"
                )


def _called(line: Line) -> str:
    """How a message names a line."""
    names = (_part(line), line.get("arm"), line.get("language"), f"seed {line.get('seed')}")
    return " ".join(name for name in names if name)
