"""The stored lines: which count, which of their providers is ours, and how times grow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .run import key, read_lines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 2
# Below, caches and fixed costs decide.
FIT_NUMEL = 10_000_000
# What the study of N is made at.
DENSITY = 0.028
# Parts of a job, or less than the job: never "the fastest alternative".

Line = dict[str, Any]


def newest(lines: Iterable[Line]) -> list[Line]:
    """The lines that count: of this schema, and of several for one setting the newest.

    Args:
        lines: Those stored, older ones first where the date is the same.

    Returns:
        One line a setting, sorted.
    """
    by_setting: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        if line.get("schema") != SCHEMA:
            continue
        known = by_setting.get(key(line))
        if known is None or known["date"] <= line["date"]:
            by_setting[key(line)] = line
    return sorted(by_setting.values(), key=lambda line: tuple(map(str, key(line))))


def stored(folder: Path = RESULTS) -> list[Line]:
    """The lines that count, of all files of a folder."""
    return newest(line for path in sorted(folder.glob("*.jsonl")) for line in read_lines(path))


def timed(line: Line) -> dict[str, float]:
    """Provider → median seconds, of those that ran."""
    return {name: m["median"] for name, m in line["providers"].items() if "median" in m}


def ours(line: Line) -> str:
    """The provider that is ours; other ways of ours come after it."""
    return next(name for name in timed(line) if is_ours(name))


def is_ours(name: str) -> bool:
    """Whether a provider is one of ours."""
    return name.startswith("sparse_ft")


def peers(line: Line) -> list[str]:
    """The peers that ran, the fastest first."""
    seconds = timed(line)
    return sorted((name for name in seconds if not is_ours(name)), key=seconds.__getitem__)


def fastest_peer(line: Line) -> str | None:
    """The fastest peer that does the whole job."""
    whole = (name for name in peers(line) if line["providers"][name].get("whole", True))
    return next(whole, None)


def best_seconds(line: Line) -> float:
    """Our least time: on a GPU that of a graph's replay, if there is one."""
    mine = line["providers"][ours(line)]
    return float(min(mine["median"], mine.get("graph", mine)["median"]))


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The exponent of the power law that fits best on log-log axes; NaN for fewer than two points.

    Args:
        points: Pairs (x, y), both above 0.
    """
    if len({x for x, _ in points}) < 2:
        return math.nan
    logs = [(math.log(x), math.log(y)) for x, y in points]
    x_mean, y_mean = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    across = sum((x - x_mean) ** 2 for x, _ in logs)
    return float(sum((x - x_mean) * (y - y_mean) for x, y in logs) / across)


class Series(NamedTuple):
    """One op as a model grows, or as more of it is selected.

    Args:
        op: Name of the case.
        over: "numel" or "nnz".
        device: "cpu" or "cuda".
        dtype: "fp32" or "bf16".
        lines: In the order of `over`.
    """

    op: str
    over: str
    device: str
    dtype: str
    lines: list[Line]

    @property
    def names(self) -> list[str]:
        """Ours, then the peers with at least two points, the fastest at the end of it first."""
        last: dict[str, float] = {}
        points: dict[str, int] = {}
        for line in self.lines:
            for name, seconds in timed(line).items():
                last[name] = seconds / line[self.over]
                points[name] = points.get(name, 0) + 1
        mine = ours(self.lines[0])
        others = [name for name, n in points.items() if n > 1 and not is_ours(name)]
        return [mine, *sorted(others, key=last.__getitem__)]

    def points(self, name: str, what: str = "median") -> list[tuple[float, float]]:
        """(numel or nnz, value) of a provider where it has one."""
        return [
            (line[self.over], line["providers"][name][what])
            for line in self.lines
            if what in line["providers"].get(name, {})
        ]

    def slope(self, name: str, what: str = "median") -> float:
        """Of a provider's times; of N only where the model is larger than the caches."""
        least = FIT_NUMEL if self.over == "numel" else 0
        return slope([(x, y) for x, y in self.points(name, what) if x >= least and y > 0])

    @property
    def slope_of_bytes(self) -> float:
        """What a job would have that takes as long as its bytes."""
        least = FIT_NUMEL if self.over == "numel" else 0
        pairs = [(line[self.over], line["bytes_moved"]) for line in self.lines]
        return slope([(x, y) for x, y in pairs if x >= least and y > 0])


def all_series(lines: Sequence[Line]) -> list[Series]:
    """The series among the lines of the scaling study: over N, then over the density."""
    found: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        if line["study"] == "scaling":
            found.setdefault((line["op"], line["device"], line["dtype"]), []).append(line)
    out = []
    for over in ("numel", "nnz"):
        for (op, device, dtype), group in found.items():
            if over == "numel":
                chosen = [line for line in group if line["density"] == DENSITY]
            else:
                at = _fixed(group)
                chosen = [line for line in group if line["numel"] == at]
            chosen.sort(key=lambda line: float(line[over]))
            if len(chosen) > 1:
                out.append(Series(op, over, device, dtype, chosen))
    return out


def _fixed(group: list[Line]) -> int:
    """The number of parameters at which the most densities were measured."""
    densities: dict[int, set[float]] = {}
    for line in group:
        densities.setdefault(line["numel"], set()).add(line["density"])
    return max(densities, key=lambda numel: (len(densities[numel]), numel))
