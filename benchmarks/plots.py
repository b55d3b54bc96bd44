"""The plots of the stored lines, as SVG: the same bytes from the same lines and matplotlib.

Each names in its metadata the SHA-256 of the lines it was drawn from, so that a test can tell
whether it is up to date without drawing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .lines import FIT_NUMEL, Line, Series, all_series, best_seconds, ours, peers, timed
from .report import (
    DEVICES,
    conditions,
    headlines,
    milliseconds,
    model_name,
    ratio,
    reference,
    share,
    title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart; the first is ours.
OURS, REFERENCE, OTHER = "#0072B2", "#D55E00", "#999999"
PEERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = "sD^vPX"
STYLE: Any = {
    "svg.hashsalt": "sparse_ft",
    "svg.fonttype": "none",
    "font.family": "sans-serif",  # DejaVu or Verdana, which are as wide
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


class Plot(NamedTuple):
    """A plot, not drawn yet.

    Args:
        draw: Draws it.
        lines: From these.
    """

    draw: Callable[[Sequence[Line]], Figure]
    lines: list[Line]

    @property
    def digest(self) -> str:
        """What tells the lines apart."""
        text = json.dumps(self.lines, sort_keys=True, ensure_ascii=False)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Draws it into an SVG file.

        Args:
            path: The file.
        """
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # not those of whoever runs it
            matplotlib.rcParams.update(STYLE)
            figure = self.draw(self.lines)
            figure.savefig(path, format="svg", metadata={"Date": None, "Description": self.digest})


def plots(lines: Sequence[Line]) -> dict[str, Plot]:
    """The plots that there are lines for.

    Args:
        lines: Those that count.

    Returns:
        File name → plot.
    """
    out = {}
    for device in DEVICES:
        if chosen := headlines(lines, device):
            out[f"speedup-{device}.svg"] = Plot(speedup, chosen)
        if chosen := [x for x in lines if x["study"] == "cases" and x["device"] == device]:
            out[f"bandwidth-{device}.svg"] = Plot(bandwidth, chosen)
        series = [one for one in all_series(lines) if one.device == device]
        for over, name, draw in (
            ("numel", "parameters", time_over_numel),
            ("nnz", "density", time_over_nnz),
            ("numel", "memory", memory_over_numel),
        ):
            if chosen := [line for one in series if one.over == over for line in one.lines]:
                out[f"scaling-{name}-{device}.svg"] = Plot(draw, chosen)
    return out


def _setting(line: Line) -> str:
    parts = [model_name(line["shape"]).replace(" parameters", "")]
    if line["density"] < 1:
        parts.append(share(line["density"]))
    parts.append(line["dtype"])
    if line["support"] != "uniform":
        parts.append(line["support"])
    return ", ".join(parts)


def _caption(figure: Figure, lines: Sequence[Line]) -> None:
    """On what it was measured, under the plot."""
    text = conditions(lines)
    head, _, rest = text.partition("; ")
    text = f"{head};\n{rest}"
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color="#666666")


def speedup(lines: Sequence[Line]) -> Figure:
    """Bars: how much longer each alternative takes, on a log axis."""
    rows: list[tuple[float, float, str, str]] = []
    titles: list[tuple[float, str]] = []
    y = 0.0
    for line in lines:
        seconds = timed(line)
        mine = seconds[ours(line)]
        titles.append((y, f"{title(line)}: {milliseconds(mine)} ms"))
        y += 1
        as_published = reference(line)
        for name in peers(line):
            colour = REFERENCE if name == as_published else OTHER
            rows.append((y, seconds[name] / mine, name, colour))
            y += 1
        y += 0.6
    figure = Figure(figsize=(8.5, 0.205 * y + 1.1), layout="constrained")
    axes = figure.subplots()
    low = min(0.9 * times for _, times, _, _ in [*rows, (0, 1 / 0.9, "", "")])
    high = max(times for _, times, _, _ in rows)
    for at, times, name, colour in rows:
        axes.barh(at, times - low, left=low, height=0.8, color=colour)
        axes.text(times * 1.04, at, f"{ratio(times)}  {name}", va="center", fontsize=8)
    for at, text in titles:
        axes.text(low * 1.02, at, text, va="center", fontsize=8.5, fontweight="bold")
    if low < 1:
        axes.axvline(1, color=OURS, linewidth=1.5)
    axes.set_xscale("log")
    # Room for the names at the right of the longest bar.
    axes.set_xlim(low, high * (high / low) ** 0.5)
    axes.set_ylim(y - 0.4, -0.8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x")
    axes.set_xlabel("time of the alternative ÷ time of sparse_ft")
    axes.bar(0, 0, color=REFERENCE, label="as LT-SFT's library does it")
    axes.bar(0, 0, color=OTHER, label="other alternatives")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    _caption(figure, lines)
    return figure


def bandwidth(lines: Sequence[Line]) -> Figure:
    """Bars: bytes of the model of each op by its time, beside the yardsticks of its rounds."""
    lines = [line for line in lines if line["floor"]]
    figure = Figure(figsize=(8.5, 0.24 * len(lines) + 1.4), layout="constrained")
    axes = figure.subplots()
    for at, line in enumerate(lines):
        found = line["bytes_moved"] / best_seconds(line) / 1e9
        axes.barh(at, found, height=0.7, color=OURS, alpha=0.75)
        for name, marker, colour in (("copy", "|", "#000000"), ("read", "D", "#D55E00")):
            chosen = name == line["yardstick"]
            size = {"|": 13.0, "D": 5.0}[marker]
            axes.plot(
                line["bandwidth"][name] / 1e9,
                at,
                marker,
                color=colour,
                markersize=size,
                markeredgewidth=2 if marker == "|" else 1,
                markerfacecolor=colour if chosen else "none",
                alpha=1 if chosen else 0.45,
            )
    axes.set_yticks(range(len(lines)), [f"{x['op']}  {_setting(x)}" for x in lines], fontsize=8)
    top = max(
        max(x["bytes_moved"] / best_seconds(x), *x["bandwidth"].values()) / 1e9 for x in lines
    )
    for at, line in enumerate(lines):
        axes.text(
            1.03 * top, at, f"{100 * line['floor'] / best_seconds(line):.0f} %", va="center",
            fontsize=8,
        )  # fmt: skip
    axes.text(1.03 * top, -0.9, "of the floor", fontsize=8, va="bottom")
    axes.set_ylim(len(lines) - 0.4, -1)
    axes.set_xlim(0, 1.13 * top)
    axes.grid(axis="x")
    axes.set_xlabel("GB/s: least bytes to move ÷ time")
    axes.bar(0, 0, color=OURS, alpha=0.75, label="sparse_ft")
    axes.plot([], [], "|", color="#000000", markersize=13, markeredgewidth=2, label="copy")
    axes.plot([], [], "D", color="#D55E00", markersize=5, label="read (strong: the op's yardstick)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    _caption(figure, lines)
    return figure


def _count(x: float, _: object = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{letter}"
    return f"{x:g}"


def _time(x: float, _: object = None) -> str:
    for size, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if x >= 0.9999 * size:
            return f"{x / size:.3g} {unit}"
    return f"{x * 1e9:.3g} ns"


def _bytes(x: float, _: object = None) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if x >= 0.9999 * size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.3g} B"


def _panels(lines: Sequence[Line], over: str, what: str, title: str) -> Figure:
    """One panel an op, each provider a line, with its exponent in the legend."""
    found = [one for one in all_series(lines) if one.over == over]
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.1 * columns, 4.0 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, one in zip(grid.flat, found, strict=False):
        _panel(axes, one, what)
    for axes in list(grid.flat)[len(found) :]:
        axes.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _caption(figure, lines)
    return figure


def _panel(axes: Axes, one: Series, what: str) -> None:
    # Resident memory is counted in pages and arenas: below a megabyte it says nothing.
    least = 1e6 if what == "peak_extra_bytes" else 0.0
    for i, name in enumerate(one.names[:6]):
        points = [(x, max(y, least)) for x, y in one.points(name, what)]
        if not points:
            continue
        label = name
        exponent = one.slope(name)
        if what == "median" and not math.isnan(exponent):
            label += f"  ({round(exponent, 2) + 0.0:.2f})"
        xs, ys = zip(*points, strict=True)
        if i == 0:
            axes.plot(xs, ys, "-o", color=OURS, linewidth=2.4, markersize=5, label=label, zorder=5)
        else:
            axes.plot(
                xs, ys, "-" + MARKERS[i - 1], color=PEERS[i - 1], linewidth=1.2, markersize=4,
                label=label,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    if one.over == "numel" and what == "median":
        axes.axvspan(axes.get_xlim()[0], FIT_NUMEL * 0.95, color="#f3f3f3", zorder=0)
    axes.xaxis.set_major_formatter(FuncFormatter(_count))
    axes.yaxis.set_major_formatter(FuncFormatter(_time if what == "median" else _bytes))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.grid(True)
    axes.set_title(one.op, fontsize=9.5, loc="left", fontweight="bold")
    axes.set_xlabel("parameters" if one.over == "numel" else "selected entries", fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.2, -0.16), fontsize=7, handlelength=1.6,
        labelspacing=0.3,
    )  # fmt: skip


def time_over_numel(lines: Sequence[Line]) -> Figure:
    """Time as the model grows."""
    return _panels(
        lines,
        "numel",
        "median",
        "Time against parameters, 2.8 % selected, fp32 (fitted exponent; grey: not fitted)",
    )


def time_over_nnz(lines: Sequence[Line]) -> Figure:
    """Time as more is selected."""
    numel = _count(lines[0]["numel"])
    return _panels(
        lines,
        "nnz",
        "median",
        f"Time against selected entries of {numel} parameters, fp32 (fitted exponent)",
    )


def memory_over_numel(lines: Sequence[Line]) -> Figure:
    """Extra memory as the model grows."""
    return _panels(
        lines,
        "numel",
        "peak_extra_bytes",
        "Peak of memory beyond the inputs against parameters, 2.8 % selected, fp32 (1 MB: or less)",
    )
