"""The tables of the stored lines: in docs/transfer.md, in a terminal, or of a user's own lines.

What is better than what is not written by hand: each claim is a pair of arms, and the interval of
their difference says whether it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..lines import ROOT
from ..report import markdown
from . import papers
from .arms import ARMS
from .lines import Line, Study, studies
from .scores import DRAWS, Difference

if TYPE_CHECKING:
    from rich.console import Console

    from .plots import Plot

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "transfer.md"
IMAGES = ROOT / "docs" / "images"
MARKS = ("<!-- transfer:begin -->", "<!-- transfer:end -->")
# The experiment and size that README shows.
HEADLINE = ("pos", "quick")

TITLES = {
    "pos": "Parts of speech",
    "intents": "Intents",
    "topics": "Topics of messages",
}
METRICS = {"accuracy": "accuracy", "f1": "F1", "las": "LAS", "uas": "UAS"}
TASK_ONLY, COMPOSED = "task-only", "composed"
COMMONEST = "most frequent label"
# One arm, another, and what it says if the first is better.
CLAIMS = (
    (COMPOSED, TASK_ONLY, "a language's SFT carries the task to its language"),
    (COMPOSED, "wrong-language", "it has to be that language's SFT"),
    (COMPOSED, "source-language", "the SFT that the task was learnt on does not bring as much"),
    (COMPOSED, "random", "chosen entries are better than random ones"),
    ("denoised", COMPOSED, "DeFT-X is better than LT-SFT"),
    (COMPOSED, "dense-language", "a sparse language vector is better than a dense one"),
    (COMPOSED, "bitfit", "LT-SFT is better than BitFit"),
    (COMPOSED, "full-tuning", "composing is better than plain fine-tuning on the task"),
    ("weighted", COMPOSED, "a weight chosen on other languages is better than the plain sum"),
    ("ties", COMPOSED, "TIES is better than the plain sum"),
)
HOLDS, NOT, UNDECIDED, SAME = "holds", "does not hold", "undecided", "the same"
# Beyond, languages are rows and not columns.
COLUMNS = 6
# Columns of words that a terminal has no room for.
_SAYS, _ABOUT, _WHERE = "that is", "what is on the model", "where"
_LONG = (_SAYS, _ABOUT)
_COMPOSED = f">− {COMPOSED}"
_OF_SEEDS = ", with Student's t for the spread between seeds"


class Table(NamedTuple):
    """A table, for Markdown or a terminal.

    Args:
        title: What it shows.
        head: Names of the columns; with ">" before those that are set to the right.
        rows: Cells.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


# --- words and figures -------------------------------------------------------------------------


def points(share: float | None) -> str:
    """A score in percent."""
    return "" if share is None else f"{100 * share:.1f}"


def _signed(share: float) -> str:
    """A difference in points; what rounds to 0 has no sign."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def interval(found: Difference | None) -> str:
    """A difference and its interval, in points."""
    if found is None:
        return ""
    return f"{_signed(found.mean)} [{_signed(found.low)}, {_signed(found.high)}]"


def verdict(found: Difference) -> str:
    """What an interval says of the claim that the difference is above 0."""
    if found.low == found.high == 0:
        return SAME
    return HOLDS if found.low > 0 else NOT if found.high < 0 else UNDECIDED


def stated(found: Difference, mark: str = "") -> str:
    """A difference, its interval and the verdict; of one seed, that it is of one."""
    only = " for one seed" if found.seeds == 1 and verdict(found) != SAME else ""
    return f"{interval(found)} {mark}{verdict(found)}{mark}{only}"


def _each(values: Sequence[object]) -> str:
    """Different values, in order of appearance."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def title(study: Study) -> str:
    """What a study is called."""
    name: str = TITLES.get(study.experiment, study.experiment)
    return f"{name}, `--{study.size}`" if study.size != "own" else name


def _about(study: Study, arm: str) -> str:
    if arm not in ARMS:
        return arm
    lines = [x for x in study.part("arms") if x["arm"] == arm and ARMS[arm].weighted]
    weights = _each([f"{x['settings']['weight']:g}" for x in lines if "weight" in x["settings"]])
    return ARMS[arm].about + (f", times {weights}" if weights else "")


# --- tables ------------------------------------------------------------------------------------


def tables(study: Study) -> Iterator[Table]:
    """Everything there is to show of a study, one table after another."""
    for view in ("", *study.views):
        seen = Study(study.lines, view) if view else study
        where = f", words that are {view}" if view else ""
        if seen.runs:
            yield _claims(seen, where)
            yield from _scores(seen, where)
    if study.size == "own" and study.runs and papers.methods(study.experiment):
        yield _published(study)
    if lines := study.part("ladder"):
        yield _ladder(study, lines)
    for language, lines in by_language(study.part("grid")).items():
        yield _grid(study, language, lines)
    if lines := study.part("overlap"):
        yield _overlap(lines)


def _scores(study: Study, where: str) -> Iterator[Table]:
    """Arms and languages; many languages are rows of a table of their own."""
    name = METRICS[study.metric]
    metric = f"{name[:1].upper()}{name[1:]}, %{where}"
    many = len(study.languages) > COLUMNS
    several = len(study.languages) > 1
    columns = [] if many else study.languages
    rows = []
    for arm in study.arms:
        row = [arm, _about(study, arm), *(points(study.score(arm, x)) for x in columns)]
        if several:
            row.append(points(study.mean(arm)))
        for other in (TASK_ONLY, COMPOSED):
            row.append("" if arm == other else interval(study.difference(arm, other)))
        rows.append([*row, _each(sorted({len(study.seeds(arm, x)) for x in study.languages}))])
    if known := [study.commonest[x] for x in study.languages if x in study.commonest]:
        shares = [share for _, share in known]
        mean_share = points(sum(shares) / len(shares)) if len(known) == len(study.languages) else ""
        row = [COMMONEST, f"always {_each([label for label, _ in known])}"]
        row += [points(study.commonest[x][1]) if x in study.commonest else "" for x in columns]
        rows.append([*row, *([mean_share] if several else []), "", "", ""])
    mean = [">mean"] if several else []
    head = ["arm", _ABOUT, *(f">{x}" for x in columns), *mean]
    yield Table(metric, [*head, f">− {TASK_ONLY}", _COMPOSED, ">seeds"], rows)
    if many:
        rows = [
            [language, *(points(study.score(arm, language)) for arm in study.arms)]
            for language in study.languages
        ]
        yield Table(f"{metric}, by language", ["", *(f">{arm}" for arm in study.arms)], rows)


def _published(study: Study) -> Table:
    """What the papers print for the languages of a user's own data."""
    task, metric = study.experiment, study.metric
    columns = [*study.languages, papers.MEAN]
    arms = {method: f"{method} ({arm})" for arm, method in papers.ARMS.items()}
    head = ["method (arm)", *(f">{x}" for x in study.languages), ">mean, as printed", _WHERE]
    rows = [
        [
            arms.get(method, method),
            *(points(papers.beside(task, language, method, metric)) for language in columns),
            papers.where(task, method, metric),
        ]
        for method in papers.methods(task)
    ]
    if len(study.languages) > COLUMNS:
        names = [name.removeprefix(">") for name in head]
        first, *others = (list(column) for column in zip(names, *rows, strict=True))
        head, rows = [first[0], *(f">{name}" for name in first[1:])], others
    return Table(f"The papers: {METRICS[metric]}, %", head, rows)


def _claims(study: Study, where: str) -> Table:
    """What the intervals say: in each language, or in how many, and in the mean."""
    languages = study.languages
    many = len(languages) > COLUMNS
    rows = []
    for better, worse, says in CLAIMS:
        found = {x: study.difference(better, worse, x) for x in languages}
        known = {x: d for x, d in found.items() if d is not None}
        if not known:
            continue
        dull = [f"{x} in {_each(y)}" for x in (better, worse) if (y := study.unlearnt(x))]
        note = f" ({' and '.join(dull)}: no better than the {COMMONEST})" if dull else ""
        row = [f"{better} > {worse}{note}", says]
        if many:
            verdicts = [verdict(d) for d in known.values()]
            row += [str(verdicts.count(word)) for word in (HOLDS, NOT)]
            row.append(str(len(known) - sum(map(int, row[-2:]))))
        else:
            row += [stated(d) if (d := found[x]) else "" for x in languages]
        if len(languages) > 1:
            mean = study.difference(better, worse)
            row.append(stated(mean, "**") if mean else "")
        rows.append(row)
    columns = [f">{word} in" for word in (HOLDS, NOT, UNDECIDED)] if many else languages
    mean_column = ["mean"] if len(languages) > 1 else []
    head = ["claim", _SAYS, *columns, *mean_column]
    return Table(f"Claims: differences in points of {METRICS[study.metric]}{where}", head, rows)


def by_language(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of each language."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["language"], []).append(line)
    return found


def mean_scores(lines: Sequence[Line], *names: str) -> dict[tuple[Any, ...], float]:
    """Mean scores over the seeds.

    Args:
        lines: Of a part.
        *names: The fields that tell settings apart.

    Returns:
        Setting → mean, sorted.
    """
    found: dict[tuple[Any, ...], list[float]] = {}
    for line in lines:
        found.setdefault(tuple(line[name] for name in names), []).append(line["score"])
    return {key: sum(found[key]) / len(found[key]) for key in sorted(found, key=repr)}


def _over(lines: Sequence[Line]) -> str:
    """What scores without intervals are of."""
    n = len({line["seed"] for line in lines})
    return f", {'one seed' if n == 1 else f'means over {n} seeds'}, without intervals"


def percent(density: float) -> str:
    """A density."""
    return f"{100 * density:.3g} %"


def ladder(lines: Sequence[Line]) -> dict[str, dict[float, dict[str, float]]]:
    """What has the density → density → language → mean score."""
    names = {
        (TASK_ONLY, "task"): "task SFT alone",
        (COMPOSED, "task"): "task SFT of it + language SFT",
        (COMPOSED, "both"): "task SFT + language SFT, both of it",
    }
    found: dict[str, dict[float, dict[str, float]]] = {}
    for (arm, of, density, language), score in mean_scores(
        lines, "arm", "of", "density", "language"
    ).items():
        name = names.get((arm, of), f"{arm}, {of}")
        found.setdefault(name, {}).setdefault(density, {})[language] = score
    order = [*names.values(), *found]
    return {name: found[name] for name in dict.fromkeys(order) if name in found}


def _ladder(study: Study, lines: Sequence[Line]) -> Table:
    languages = list(dict.fromkeys(line["language"] for line in lines))
    rows = [
        [name, percent(density), *(points(scores.get(x)) for x in languages)]
        for name, by_density in ladder(lines).items()
        for density, scores in sorted(by_density.items())
    ]
    head = ["on the model", ">density", *(f">{x}" for x in languages)]
    return Table(f"Densities: {METRICS[study.metric]}, %{_over(lines)}", head, rows)


def grid(lines: Sequence[Line]) -> tuple[list[float], list[float], np.ndarray]:
    """The densities of the language's SFT and of the task's, and [task, language] mean scores.

    A cell that was not run is NaN.
    """
    found = mean_scores(lines, "task_density", "language_density")
    columns = sorted({line["language_density"] for line in lines})
    rows = sorted({line["task_density"] for line in lines})
    return columns, rows, np.array([[found.get((t, x), np.nan) for x in columns] for t in rows])


def _grid(study: Study, language: str, lines: Sequence[Line]) -> Table:
    columns, rows, cells = grid(lines)
    best = np.nanmax(cells)
    shown = [
        [f"**{points(x)}**" if x == best else points(None if np.isnan(x) else x) for x in row]
        for row in cells.tolist()
    ]
    return Table(
        f"Density × density in {language}: {METRICS[study.metric]}, %{_over(lines)}",
        [">task ↓ language →", *(f">{percent(x)}" for x in columns)],
        [[percent(task), *row] for task, row in zip(rows, shown, strict=True)],
    )


def overlaps(lines: Sequence[Line]) -> tuple[list[str], np.ndarray]:
    """The SFTs of pairs, and [SFT, SFT] the share of the row's entries that the column has too.

    Means over the seeds; the diagonal is NaN.
    """
    names = list(dict.fromkeys(line[which] for which in ("first", "second") for line in lines))
    sums, n = np.zeros((2, len(names), len(names)))
    for line in lines:
        i, j = names.index(line["first"]), names.index(line["second"])
        for row, column, entries in zip((i, j), (j, i), line["entries"], strict=True):
            sums[row, column] += line["shared"] / max(1, entries)
            n[row, column] += 1
    return names, np.where(n > 0, sums / np.maximum(n, 1), np.nan)


def _overlap(lines: Sequence[Line]) -> Table:
    names, share = overlaps(lines)
    rows = [
        [name, *(points(None if np.isnan(x) else x) for x in row)]
        for name, row in zip(names, share.tolist(), strict=True)
    ]
    head = ["", *(f">{name}" for name in names)]
    return Table("Overlap: share of the row's entries that the column has too, %", head, rows)


# --- texts -------------------------------------------------------------------------------------


def conditions(study: Study) -> str:
    """On what data, with what and when the lines of a study were made."""
    lines = [line for line in study.lines if "settings" in line]
    found = [line["settings"] for line in lines]
    seeds = {len(study.seeds(arm, x)) for arm in study.arms for x in study.languages} - {0}
    parts = [f"{study.experiment}, data {lines[0]['data']['content']}"]
    if packages := lines[0]["data"].get("packages"):
        parts.append(", ".join(f"{name} {version}" for name, version in packages.items()))
    parts.append(f"base model {_each([x['base'] for x in found])}")
    threads = _each([x["threads"] for x in found])
    versions = {name: _each([x["versions"][name] for x in found]) for name in found[0]["versions"]}
    parts.append(
        f"{_each([x['device'] for x in found])}, {threads} threads, "
        f"{_each([x['precision'] for x in found])}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    dates = sorted({line["date"][:10] for line in lines})
    parts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    text = "; ".join(parts) + "."
    if study.runs:
        text += f" Test data: {_tested(study)}."
    if seeds:
        least, most = min(seeds), max(seeds)
        said = f"{least}" if least == most else f"{least} to {most}"
        text += f" Means over {said} seed{'s' if most > 1 else ''}"
        text += (
            f"; intervals of 95 % from {DRAWS:,} draws of "
            f"{'messages, templates or examples' if study.groups else 'examples'}"
            f"{_OF_SEEDS if most > 1 else '; they know nothing of other seeds'}."
        )
    return text


def _tested(study: Study) -> str:
    """How much there is to get right in each language, or in the least and the largest."""
    words = study.metric != "f1"
    sizes = {key[1]: (len(t), int(t[:, 1].sum()) if words else 0) for key, t in study.runs.items()}
    if len(sizes) > COLUMNS:
        least, most = (f"{pick(n for n, _ in sizes.values()):,}" for pick in (min, max))
        return f"{len(sizes)} languages with {least} to {most} examples"
    said = []
    for language, (n, all_words) in sizes.items():
        text = f"{language} {n:,} examples"
        said.append(f"{text} ({all_words:,} words)" if all_words not in (0, n) else text)
    return ", ".join(said)


def section(study: Study, images: str) -> str:
    """A study in Markdown.

    Args:
        study: What is shown.
        images: Folder of the plots, as the page names it.
    """
    from . import plots

    parts = [f"### {title(study)}", conditions(study)]
    for name, plot in plots.of_study(study).items():
        parts.append(f"![{plot.about}]({images}/{name})")
    for table in tables(study):
        parts += [f"**{table.title}**", markdown(table.head, table.rows)]
    return "\n\n".join(parts)


def summary(study: Study) -> str:
    """A study for README: its scores, and where the rest is."""
    table = next(_scores(study, ""))
    shown = [i for i, name in enumerate(table.head) if name != _COMPOSED]
    rows = [[row[i] for i in shown] for row in table.rows]
    return "\n\n".join(
        [
            markdown([table.head[i] for i in shown], rows),
            f"{table.title}; {conditions(study)} What holds, what does not, and what was left out: "
            "[docs/transfer.md](docs/transfer.md).",
        ]
    )


def between(path: Path, body: str) -> str:
    """A file's text with something else between its marks.

    Args:
        path: A file that has both marks.
        body: What is put there.

    Returns:
        The new text.

    Raises:
        ValueError: A mark is missing.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"{path} has no {' … '.join(MARKS)}")
    return f"{before}{begin}\n\n{body}\n\n{end}{after}"


def texts(shown: Sequence[Study]) -> dict[Path, str]:
    """The page, and README where there are lines for it, as they should be."""
    sections = [section(study, IMAGES.name) for study in shown]
    out = {PAGE: between(PAGE, "\n\n".join(sections) or "No line is stored.")}
    for study in shown:
        if (study.experiment, study.size) == HEADLINE and study.runs:
            out[README] = between(README, summary(study))
    return out


def ordered(lines: Sequence[Line]) -> list[Study]:
    """The studies that there are lines of, those of this package first."""
    known = [*TITLES]

    def place(study: Study) -> tuple[int, str, str]:
        name = study.experiment
        return known.index(name) if name in known else len(known), name, study.size

    return sorted(studies(lines), key=place)


def drawings(shown: Sequence[Study]) -> dict[str, Plot]:
    """The plots of all studies, by the name of the file."""
    from . import plots

    return {name: plot for study in shown for name, plot in plots.of_study(study).items()}


def drawn() -> list[Path]:
    """The plots of stored lines that there are; other images are none of ours."""
    return sorted(IMAGES.glob("transfer-*.svg"))


def faults(lines: Sequence[Line]) -> list[str]:
    """Which files differ from what the lines give."""
    shown = ordered(lines)
    out = [
        f"{path} is not what the stored lines give"
        for path, text in texts(shown).items()
        if path.read_text(encoding="utf-8") != text
    ]
    wanted = {IMAGES / name: one.plot.digest for name, one in drawings(shown).items()}
    for path, digest in wanted.items():
        if not path.exists() or digest not in path.read_text(encoding="utf-8"):
            out.append(f"{path} was drawn from other lines")
    out += [f"{path} is drawn from no line" for path in drawn() if path not in wanted]
    return out


def write(lines: Sequence[Line]) -> None:
    """Puts what the lines say into the page and README, and draws the plots."""
    shown = ordered(lines)
    found, wanted = texts(shown), drawings(shown)
    IMAGES.mkdir(exist_ok=True)
    for path in drawn():
        if path.name not in wanted:
            path.unlink()
    for name, one in wanted.items():
        one.plot.save(IMAGES / name)
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")


def write_to(lines: Sequence[Line], folder: Path) -> Path:
    """Writes a report of its own, such as of a user's own data.

    Args:
        lines: Those that count.
        folder: For `report.md` and the plots.

    Returns:
        The report's path.
    """
    shown = ordered(lines)
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in drawings(shown).items():
        one.plot.save(folder / name)
    text = "\n\n".join(["# Transfer", *(section(study, ".") for study in shown)])
    path = folder / "report.md"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def show(lines: Sequence[Line], console: Console | None = None) -> None:
    """Prints the tables.

    Args:
        lines: Those that count.
        console: Where to; default: standard output.
    """
    from rich import table as rich_table
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    for study in ordered(lines):
        console.rule(escape(title(study).replace("`", "")))
        console.print(conditions(study), markup=False, highlight=False)
        for table in tables(study):
            shown = rich_table.Table(title=escape(table.title), title_justify="left")
            kept = [i for i, name in enumerate(table.head) if name not in _LONG]
            for name in (table.head[i] for i in kept):
                side: Any = "right" if name.startswith(">") else "left"
                shown.add_column(escape(name.removeprefix(">")), justify=side)
            for row in table.rows:
                shown.add_row(*(escape(row[i].replace("**", "")) for i in kept))
            console.print(shown)
