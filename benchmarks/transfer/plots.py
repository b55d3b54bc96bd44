"""The plots of a study, as SVG: claims with their intervals, densities, overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from .. import plots
from ..plots import MARKERS, OTHER, OURS, PEERS
from .lines import Line, Study
from .report import (
    CLAIMS,
    COLUMNS,
    COMPOSED,
    METRICS,
    TASK_ONLY,
    by_language,
    grid,
    ladder,
    overlaps,
    percent,
    points,
    title,
)
from .scores import Difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Plot(NamedTuple):
    """A plot and what it shows.

    Args:
        about: For those who cannot see it.
        plot: Not drawn yet.
    """

    about: str
    plot: plots.Plot


def of_study(study: Study) -> dict[str, Plot]:
    """The plots that a study has lines for.

    Args:
        study: What is shown.

    Returns:
        File name → plot.
    """
    stem = f"transfer-{study.experiment}-{study.size}"
    kinds: tuple[tuple[str, str, str, Callable[[Study], Figure]], ...] = (
        ("arms", "", "Differences between the arms, with intervals of 95 %", claims),
        ("ladder", "-ladder", "Scores by the density of the fine-tunings", densities),
        ("grid", "-grid", "Scores by both densities", contours),
        ("overlap", "-overlap", "Shared entries of the fine-tunings", shared),
    )
    out = {}
    for part, end, about, draw in kinds:
        lines = study.part(part)
        if not lines or (part == "arms" and not any(claim_rows(study))):
            continue
        if part == "grid" and min(grid(lines)[2].shape) < 2:
            continue  # contours need two densities of either side
        chosen = [*lines, *study.part("groups")] if part == "arms" else lines

        # The study has drawn its samples already; another from these lines would do so again.
        def drawn(_: Sequence[Line], draw: Callable[[Study], Figure] = draw) -> Figure:
            return draw(study)

        out[f"{stem}{end}.svg"] = Plot(f"{title(study)}: {about}", plots.Plot(drawn, chosen))
    return out


def claim_rows(study: Study) -> list[tuple[str, dict[str, Difference]]]:
    """Each claim with the differences in the languages, or in the mean alone if they are many."""
    languages = study.languages if len(study.languages) <= COLUMNS else []
    rows = []
    for better, worse, _ in CLAIMS:
        wanted: dict[str, str | None] = {x: x for x in languages}
        if len(study.languages) > 1:
            wanted["mean"] = None
        found = {name: study.difference(better, worse, x) for name, x in wanted.items()}
        known = {name: d for name, d in found.items() if d is not None}
        if known:
            rows.append((f"{better} − {worse}", known))
    return rows


def claims(study: Study) -> Figure:
    """Each claim's differences and intervals; of many languages, the first claim in each."""
    rows = claim_rows(study)
    each = _each_language(study)
    names = list(dict.fromkeys(name for _, found in rows for name in found))
    heights = [0.6 + 0.17 * len(rows) * (len(names) + 1), 0.19 * len(each) + 0.3]
    panels = 2 if each else 1
    figure = Figure(figsize=(7.5, sum(heights[:panels]) + 0.9), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False, height_ratios=heights[:panels], sharex="col")[
        :, 0
    ]
    step = 1 / (len(names) + 1)
    for i, name in enumerate(names):
        colour = OURS if name == "mean" else PEERS[i % len(PEERS)]
        marker = "o" if name == "mean" else MARKERS[i % len(MARKERS)]
        at = [(row + (i + 1) * step - 0.5, d[name]) for row, (_, d) in enumerate(rows) if name in d]
        _points(axes[0], at, colour, marker, name)
    axes[0].set_yticks(range(len(rows)), [text for text, _ in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    for row in range(1, len(rows)):
        axes[0].axhline(row - 0.5, color="#e4e4e4", linewidth=0.8)
    if len(names) > 1:
        axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names))
    if each:
        _points(axes[1], [(i, d) for i, (_, d) in enumerate(each)], OURS, "o", "")
        axes[1].set_yticks(range(len(each)), [language for language, _ in each])
        axes[1].set_ylim(len(each) - 0.5, -0.5)
        axes[1].set_title(f"{COMPOSED} − {TASK_ONLY}, by language", loc="left", fontsize=9)
    for panel in axes:
        panel.axvline(0, color="#000000", linewidth=0.8)
        panel.grid(axis="x")
    one = max(d.seeds for _, found in rows for d in found.values()) == 1
    what = f"difference, points of {METRICS[study.metric]}"
    axes[-1].set_xlabel(f"{what}; one seed, and no other is known of" if one else what)
    return figure


def _each_language(study: Study) -> list[tuple[str, Difference]]:
    """Of many languages, what the first claim is in each, the largest difference first."""
    if len(study.languages) <= COLUMNS:
        return []
    found = [(x, study.difference(COMPOSED, TASK_ONLY, x)) for x in study.languages]
    known = [(language, d) for language, d in found if d is not None]
    return sorted(known, key=lambda one: -one[1].mean)


def _points(
    axes: Axes, at: Sequence[tuple[float, Difference]], colour: str, marker: str, name: str
) -> None:
    """Means at heights, with their intervals."""
    if not at:
        return
    heights = [y for y, _ in at]
    means, lows, highs = (
        100 * np.array(column) for column in zip(*(d[:3] for _, d in at), strict=True)
    )
    axes.errorbar(
        means, heights, xerr=np.abs([means - lows, highs - means]), fmt=marker, color=colour,
        markersize=4.5, linewidth=1.4, capsize=2.5, label=name,
    )  # fmt: skip


def densities(study: Study) -> Figure:
    """Scores by density, a panel for each language."""
    lines = study.part("ladder")
    found = ladder(lines)
    languages = list(dict.fromkeys(line["language"] for line in lines))
    figure = Figure(figsize=(max(4.2, 3.2 * len(languages)), 3.4), layout="constrained")
    panels = figure.subplots(1, len(languages), squeeze=False)[0]
    for axes, language in zip(panels, languages, strict=True):
        for (name, by_density), colour, marker in zip(
            found.items(), (OTHER, OURS, PEERS[0], *PEERS[1:]), "os^Dv", strict=False
        ):
            at = [(d, 100 * x[language]) for d, x in sorted(by_density.items()) if language in x]
            axes.plot(*zip(*at, strict=True), f"-{marker}", color=colour, markersize=4, label=name)
        axes.set_xscale("log")
        axes.minorticks_off()
        ticks = sorted({line["density"] for line in lines})
        axes.set_xticks(ticks, [percent(x) for x in ticks], rotation=60, fontsize=7.5)
        axes.grid(True)
        axes.set_title(language, loc="left", fontsize=9.5, fontweight="bold")
        axes.set_xlabel("density", fontsize=8)
    panels[0].set_ylabel(f"{METRICS[study.metric]}, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def contours(study: Study) -> Figure:
    """Scores over both densities, a panel for each language."""
    found = by_language(study.part("grid"))
    figure = Figure(figsize=(4.4 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (language, lines) in zip(panels, found.items(), strict=True):
        columns, rows, cells = grid(lines)
        x, y = (100 * np.asarray(side) for side in (columns, rows))
        filled = axes.contourf(x, y, 100 * cells, levels=12, cmap="viridis")
        axes.plot(*(side.ravel() for side in np.meshgrid(x, y)), "k.", markersize=3, clip_on=False)
        figure.colorbar(filled, label=f"{METRICS[study.metric]}, %")
        axes.set_xlabel("density of the language's fine-tuning, %")
        axes.set_ylabel("density of the task's fine-tuning, %")
        axes.set_title(language, loc="left", fontsize=9.5, fontweight="bold")
    return figure


def shared(study: Study) -> Figure:
    """A heat map of the share of the row's entries that the column has too."""
    names, share = overlaps(study.part("overlap"))
    n = len(names)
    few = n <= 12
    side = max(3.0, (0.5 if few else 0.2) * n)
    figure = Figure(figsize=(side + 1.6, side), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.8")
    shown = 100 * np.ma.masked_invalid(share)
    image = axes.imshow(shown, cmap="viridis", vmin=0)
    size = 9 if few else 6
    axes.set_xticks(range(n), names, rotation=90, fontsize=size)
    axes.set_yticks(range(n), names, fontsize=size)
    light = image.to_rgba(shown)[..., :3] @ (0.299, 0.587, 0.114) > 0.5
    for i, j in np.argwhere(~np.isnan(share)) if few else ():
        colour = "black" if light[i, j] else "white"
        axes.text(j, i, points(share[i, j]), ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="share of the row's entries, %")
    return figure
