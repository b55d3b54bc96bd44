"""`python -m benchmarks.run --scaling`: how time and extra memory grow with the model and with the
number of selected entries, ours and the peers'."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .case import RECIPES, Setting
from .clocks import Clock
from .lines import DENSITY, Line, all_series, ours, timed
from .run import line, measure, print_table

OPS = (
    "select_topk",
    "masked_adamw",
    "compose",
    "restore",
    "gather",
    "merge",
    "overlap",
    "digest",
)
# 1M to 10G in steps of √10; one more, since the cases know no empty tensors, which are what is left
# of a square.
NUMELS = tuple(int(10 ** (6 + i / 2)) + 1 for i in range(9))
DENSITIES = (0.001, 0.01, DENSITY, 0.05, 0.08)
FIXED_NUMEL = {"cpu": NUMELS[3], "cuda": NUMELS[5]}
# Of the whole study. A point that would not end in time is left out.
SECONDS = 280.0
# A peer that would take longer for one run is left out.
PEER_SECONDS = 1.0
ROUNDS = 5


def plan(device: str) -> list[tuple[str, Setting]]:
    """The points: every size at one density, and after the fixed size every density there."""
    points = []
    for numel in NUMELS:
        points.append((numel, DENSITY))
        if numel == FIXED_NUMEL[device]:
            points += [(numel, density) for density in DENSITIES if density != DENSITY]
    return [
        (op, Setting(f"N={numel}", density, device=device))
        for numel, density in points
        for op in OPS
    ]


def peers_in_time(setting: Setting, before: Line | None, names: Sequence[str]) -> list[str]:
    """Those of the peers that will not take too long.

    Args:
        setting: The point to be measured.
        before: The line of a smaller or equal one; None if there is none.
        names: All peers.

    Returns:
        The names, in the same order.
    """
    if before is None:
        return list(names)
    growth = setting.numel / before["numel"]
    known = timed(before)
    return [name for name in names if known.get(name, math.inf) * growth <= PEER_SECONDS]


def point(
    op: str, setting: Setting, clock: Clock, here: dict[str, Any], before: Line | None
) -> Line:
    """Measures one point, without the peers that would take too long.

    Args:
        op: Name of the case.
        setting: On what.
        clock: Of the device.
        here: What machine() gave.
        before: The line of a smaller point.

    Returns:
        The line.
    """
    case = RECIPES[op].make(setting)
    mine, *others = case.providers
    kept = [mine, *peers_in_time(setting, before, others)]
    case.providers = {name: case.providers[name] for name in kept}
    return line(case, measure(case, ROUNDS, clock), here, study="scaling")


def run(device: str, clock: Clock, here: dict[str, Any], path: Path | None = None) -> list[Line]:
    """Measures the study, prints every point and the slopes, and appends the lines to a file.

    Args:
        device: "cpu" or "cuda".
        clock: Of the device.
        here: What machine() gave.
        path: File for the lines; None: they are only printed.

    Returns:
        The lines.
    """
    begin = time.monotonic()
    lines: list[Line] = []
    largest: dict[str, Line] = {}  # of those at the density of the study of N
    seconds: dict[str, tuple[int, float]] = {}  # op → size and seconds of its last point
    ends: dict[str, int] = {}  # op → the size from which on it is left out
    for op, setting in plan(device):
        gc.collect()
        elapsed = time.monotonic() - begin
        numel, last = seconds.get(op, (setting.numel, 0.0))
        expected = last * setting.numel / numel
        needed, free = RECIPES[op].input_bytes(setting), clock.free_bytes()
        title = f"[{elapsed:.0f} s] {op}: {setting}"
        if setting.numel > ends.get(op, math.inf):
            continue
        if needed > 0.9 * free or elapsed + expected > SECONDS:
            why = f"it needs about {needed / 1e9:.1f} GB and {expected:.0f} s"
            print(f"{title}: left out: {why}", flush=True)
            ends[op] = setting.numel
            continue
        start = time.monotonic()
        try:
            record = point(op, setting, clock, here, largest.get(op))
        except (RuntimeError, AssertionError) as error:
            print(f"{title}: FAILED: {type(error).__name__}: {error}", flush=True)
            continue
        seconds[op] = setting.numel, time.monotonic() - start
        if setting.density == DENSITY:
            largest[op] = record
        lines.append(record)
        mine, *others = timed(record).values()
        beside = f", the fastest peer {min(others) / mine:.1f}×" if others else ""
        print(f"{title}: {mine * 1e3:.2f} ms{beside}", flush=True)
        if path:
            with path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(record) + "\n")
    print_slopes(lines)
    return lines


def print_slopes(lines: Sequence[Line]) -> None:
    """Prints the fitted exponents of every series beside that of its bytes."""
    rows = []
    for series in all_series(lines):
        mine = ours(series.lines[0])
        low, high = (series.lines[i][series.over] for i in (0, -1))
        rows.append(
            [
                f"{series.op} over {series.over}",
                f"{low / 1e6:.3g}M–{high / 1e6:.3g}M",
                f"{series.slope(mine):.2f}",
                f"{series.slope_of_bytes:.2f}",
                ", ".join(f"{name} {series.slope(name):.2f}" for name in series.names[1:]),
            ]
        )
    if rows:
        print("fitted exponents of time (over numel: from 10M on)")
        print_table(["", "range", "ours", "its bytes", "peers"], rows)
