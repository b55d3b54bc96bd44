"""Data of the user's own, in the layouts that the papers' data sets are published in.

A folder is searched for files by their names; what is in them is read by `sparse_ft.tasks.data`,
brought to one spelling of labels, and written as a `Dataset`. A file transfer.json in the folder
says what the names do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_ft.quickstart.store import key_of, write_text
from sparse_ft.sweep import DENSITIES
from sparse_ft.tasks.base import TASKS, Task
from sparse_ft.tasks.data import DataError, Examples, read
from sparse_ft.tasks.recipes import K_LADDER, recipe

from .dataset import MANIFEST, Dataset
from .experiments import MBERT, XLM_R, Settings
from .papers import ARMS, TABLES
from .presets import PRESETS, SPLITS, TREEBANKS, Preset, code_of

__all__ = ["PRESETS", "Files", "Preset", "describe", "find", "prepare", "settings"]

CONFIG = "transfer.json"
# Of what is written to the cache: another one, and it is built again.
VERSION = 1

# The fields of pairs, as data sets call them.
_FIELDS = {
    "premise": ("premise", "sentence1"),
    "hypothesis": ("hypothesis", "hypo", "sentence2"),
    "label": ("label", "gold_label"),
    "text": ("text",),
}
ROLES = ("train", "dev", "test", "text")


@dataclass(frozen=True)
class Files:
    """What was found in a folder.

    Attributes:
        source: Language of the labelled training data.
        targets: Languages to report.
        development: Languages that settings may be chosen on.
        paths: "train", "dev", "test" (labelled), "text" (not labelled) → language → file.
    """

    source: str
    targets: tuple[str, ...]
    development: tuple[str, ...]
    paths: Mapping[str, Mapping[str, Path]]


def find(
    folder: str | os.PathLike[str],
    preset: str,
    text: Mapping[str, str | os.PathLike[str]] | None = None,
) -> Files:
    """Finds a task's files in a folder, by their names and by its transfer.json.

    Unlabelled text of a language is text/<language>.txt, one document a line. A language is a
    target when it has test data and text.

    Args:
        folder: With the data sets, as they are published, at any depth.
        preset: One of `PRESETS`.
        text: Language → file, in the place of what is found.

    Raises:
        DataError: Something is missing or there twice; it says what, and what would help.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder")
    if preset not in PRESETS:
        raise DataError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    given = _config(root)
    known = PRESETS[preset]
    source = given.get("source", known.source)
    development = tuple(given.get("development", ()))
    paths: dict[str, dict[str, Path]] = {role: {} for role in ROLES}
    for path in sorted((root / "text").glob("*.txt")):
        paths["text"][code_of(path.stem)] = path
    for role in ROLES:
        paths[role].update({code: root / name for code, name in given.get(role, {}).items()})
    paths["text"].update({code_of(code): Path(path) for code, path in (text or {}).items()})
    for (code, role), several in _by_name(root, known).items():
        if code in paths[role]:
            continue
        if len(several) > 1 and code in (source, *paths["text"]):
            raise DataError(
                f"{root}: {code} has {len(several)} files for {role}: "
                f"{', '.join(str(path.relative_to(root)) for path in several)}; keep one, or name "
                f"one in {root / CONFIG}"
            )
        paths[role][code] = several[0]
    both = {*paths["test"]} & {*paths["text"]}
    targets = given.get("targets", sorted(both - {source, *development}))
    files = Files(source, tuple(targets), development, paths)
    _complete(files, root, known)
    return files


def _config(root: Path) -> dict[str, Any]:
    """The folder's transfer.json, checked; empty where there is none."""
    path = root / CONFIG
    if not path.is_file():
        return {}
    kinds: dict[str, tuple[type, str]] = {
        "source": (str, "a language"),
        **dict.fromkeys(("targets", "development"), (list, "a list of languages")),
        **dict.fromkeys(ROLES, (dict, "language → file")),
    }
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise DataError(f"{path}: must be a JSON object")
    for name, value in given.items():
        if name not in kinds:
            raise DataError(f"{path}: there is no {name!r}; there are {', '.join(kinds)}")
        kind, said = kinds[name]
        inside = value.values() if isinstance(value, dict) else value
        if not isinstance(value, kind) or not all(isinstance(x, str) for x in inside):
            raise DataError(f"{path}: {name!r} must be {said}, found {value!r}")
    return given


def _by_name(root: Path, preset: Preset) -> dict[tuple[str, str], list[Path]]:
    """(language, split) → files, of those whose names a layout knows: the first that has any."""
    found: dict[tuple[str, str], list[Path]] = {}
    paths = sorted(path.relative_to(root) for path in _files(root, {root.resolve()}))
    for layout in preset.layouts:
        here: dict[tuple[str, str], list[Path]] = {}
        for path in paths:
            named = layout.match(path)
            if named is None or path.parent.name == "text":
                continue
            split = SPLITS.get(named["split"], named["split"])
            if layout.language == "":
                codes = _languages(root / path, preset)
            else:
                codes = [code_of(named["language"]) if layout.language is None else layout.language]
            for code in codes:
                here.setdefault((code, split), []).append(root / path)
        for (code, split), several in here.items():
            bank = f"_{TREEBANKS.get(code)}-"
            chosen = [path for path in several if bank in path.name]
            found.setdefault((code, split), chosen or several)
    return found


def _files(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """A folder's files at any depth, hidden ones aside; links are followed, no folder twice."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in seen:
            seen.add(path.resolve())
            yield from _files(path, seen)


def _complete(files: Files, root: Path, preset: Preset) -> None:
    """Checks that all is there that a run needs.

    Raises:
        DataError: Something is not.
    """
    hint = f"name it in {root / CONFIG}"
    names = ", ".join(layout.names for layout in preset.layouts)
    test, text = files.paths["test"], files.paths["text"]
    for role in ("train", "dev"):
        if files.source not in files.paths[role]:
            raise DataError(
                f"{root}: no {role} file in the source language {files.source}; {hint}, or keep "
                f"its published name, such as {names}"
            )
    if not test:
        raise DataError(f"{root}: no test file for {preset.name}; {hint}, such as {names}")
    for code in (files.source, *files.targets, *files.development):
        if code not in text:
            raise DataError(
                f"{root}: no text in {code}, to learn the language from; put it into "
                f"{root / 'text' / code}.txt, or give --text {code}=FILE"
            )
    if not files.targets:
        raise DataError(
            f"{root}: no target: test data are in {', '.join(sorted(test))}, text is in "
            f"{', '.join(sorted(text))}; a target needs both"
        )
    for role, codes in (("test", (*files.targets, *files.development)), ("dev", files.development)):
        for code in codes:
            if code not in files.paths[role]:
                raise DataError(f"{root}: no {role} file in {code}; {hint}")
    for paths in files.paths.values():
        for path in paths.values():
            if not path.is_file():
                raise DataError(f"{path}: no such file")


def settings(
    preset: str,
    language: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
) -> Settings:
    """The papers' settings, and those arms that the papers have figures of.

    English, or whatever the source is, is evaluated on as seldom as the paper's languages with much
    text; the K of the task is the largest of six, which was best for LT-SFT in each task (table 2).

    Args:
        preset: One of `PRESETS`.
        language: Settings of the languages' recipe to have otherwise, such as steps.
        task: Of the task's.

    Raises:
        RecipeError: There is no such setting, or it is out of range.
    """
    known = PRESETS[preset]
    methods = {method for table in TABLES if table.task == preset for method in table.methods}
    size = XLM_R if known.base == "xlm-roberta-base" else MBERT
    return Settings(
        language=recipe("lt-sft-language", **(language or {})),
        source=recipe("lt-sft-language-high-resource", **(language or {})),
        task=recipe(known.recipe, **(task or {})),
        arms=tuple(arm for arm, method in ARMS.items() if method in methods),
        ladder=tuple(round(k / size, 5) for k in K_LADDER.values()),
        grid=DENSITIES,
        save_every=1000,
    )


# --- what is in the files -----------------------------------------------------------------------


def _languages(path: Path, preset: Preset) -> list[str]:
    """The languages of a table that has a column for them."""
    rows = _table(path, preset)
    if "language" not in rows[0]:
        raise DataError(f"{path}: has no column language; name the file in {CONFIG}")
    return sorted({code_of(row["language"]) for row in rows})


def _table(path: Path, preset: Preset) -> Examples:
    """A table, or JSON lines, its fields under our names."""
    columns = None
    if path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline().rstrip("\r\n").lstrip("\ufeff")
        names = re.split("\t" if path.suffix == ".tsv" else ",", first)
        if not {*_FIELDS["label"]} & {*names}:
            columns = next((c for c in preset.columns if len(c) == len(names)), None)
            if columns is None:
                raise DataError(
                    f"{path}, line 1: must name the columns ({', '.join(preset.columns[0])}), or "
                    f"be a row of {' or '.join(str(len(c)) for c in preset.columns)} fields; it "
                    f"has {len(names)}"
                )
    rows = read(path) if columns is None else read(path, format=path.suffix[1:], columns=columns)
    theirs = {
        ours: next((name for name in names if name in rows[0]), ours)
        for ours, names in _FIELDS.items()
    }
    return rows.replaced(
        {name: row[their] for name, their in theirs.items() if their in row}
        | {name: row[name] for name in ("language", "id") if name in row}
        for row in rows
    )


def _read(path: Path, preset: Preset, language: str) -> Examples:
    """A file's examples in one language, checked, under our spellings of labels.

    Raises:
        DataError: It cannot be read, or an example is not of the task; with the file and the line.
    """
    if preset.task == "sequences":
        rows = _labelled(_table(path, preset), preset, language)
    else:
        rows = read(path, format="conllu" if path.suffix == ".conllu" else "conll")
        if preset.name == "ner":
            rows = rows.replaced({**row, "tags": _iob2(row["tags"])} for row in rows)
    if not rows:
        raise DataError(f"{path}: holds no example in {language}")
    return _task(preset).checked(rows)


def _task(preset: Preset) -> Task:
    return TASKS[preset.task](**preset.options)


def _labelled(rows: Examples, preset: Preset, language: str) -> Examples:
    """The rows in one language, with labels in our spelling; those without one are left out."""
    kept = []
    for i, row in enumerate(rows):
        if code_of(str(row.get("language", language))) != language:
            continue
        label = str(row.get("label"))
        if label not in preset.labels:
            known = ", ".join(sorted({x for x in preset.labels.values() if x is not None}))
            raise DataError(f"{rows.where(i)}: the label is {label!r}; it must be one of {known}")
        if preset.labels[label] is not None:
            kept.append((i, {**row, "label": preset.labels[label]}))
    lines = None if rows.lines is None else [rows.lines[i] for i, _ in kept]
    return Examples((row for _, row in kept), rows.source, lines)


def _iob2(tags: list[str]) -> list[str]:
    """Tags whose entities begin with B-, where some begin with I- (CoNLL-2003 as published)."""
    before = ["O", *tags]
    return [
        f"B-{tag[2:]}" if tag[:2] == "I-" and last[2:] != tag[2:] else tag
        for last, tag in zip(before, tags, strict=False)
    ]


# --- the data set -------------------------------------------------------------------------------


def prepare(
    folder: str | os.PathLike[str],
    preset: str,
    cache: str | os.PathLike[str],
    text: Mapping[str, str | os.PathLike[str]] | None = None,
) -> Dataset:
    """A user's folder as a data set: read, checked, and written to a cache folder.

    What is trained on and equals a test or dev item in any language is left out: labelled examples,
    and lines of text, case and spaces aside. The count is told.

    Args:
        folder: As of `find`; preset and text likewise.
        cache: Where data sets are kept; one of the same files is not built again.

    Returns:
        The data set; `about` holds where its files come from and what was counted.

    Raises:
        DataError: Something is missing or damaged; with the file and the line.
    """
    files, known = find(folder, preset, text), PRESETS[preset]
    trained = (files.source, *files.targets, *files.development)
    wanted = {
        "train": (files.source,),
        "dev": (files.source, *files.development),
        "test": trained,
        "text": trained,
    }
    roles = {
        role: {code: files.paths[role][code] for code in codes if code in files.paths[role]}
        for role, codes in wanted.items()
    }
    digests = {path: _digest(path) for path in {p for x in roles.values() for p in x.values()}}
    stated = {role: {c: digests[p] for c, p in paths.items()} for role, paths in roles.items()}
    languages = {"targets": files.targets, "development": files.development}
    # Text stays where it is unless something is left out of it.
    where = [str(path.resolve()) for path in roles["text"].values()]
    key = key_of({"version": VERSION, "preset": preset, **languages, **stated, "where": where})
    out = Path(cache) / f"own-{preset}-{key}"
    if (out / MANIFEST).is_file():
        return Dataset.load(out)
    labelled = {
        role: {code: _read(path, known, code) for code, path in roles[role].items()}
        for role in ("train", "dev", "test")
    }
    held = [rows for role in ("dev", "test") for rows in labelled[role].values()]
    before = labelled["train"][files.source]
    _check_labels(known, before, held)
    items = {_item(known, row) for rows in held for row in rows}
    train = Examples((row for row in before if _item(known, row) not in items), before.source)
    if not train:
        raise DataError(f"{before.source}: all examples are test or dev examples too")
    labelled["train"][files.source] = train
    twins = {_bare(text) for rows in held for row in rows for text in _texts(known, row)}
    counted = {code: _count(path, twins) for code, path in roles["text"].items()}

    out.mkdir(parents=True, exist_ok=True)
    written = {
        role: {
            code: _write(out / f"{role}-{code}{_suffix(known)}", known, rows)
            for code, rows in by_language.items()
        }
        for role, by_language in labelled.items()
    }
    text_of = {
        code: _without(path, twins, out / f"text-{code}.txt") if counted[code][1] else path
        for code, path in roles["text"].items()
    }
    left_out = {"train": len(before) - len(train)}
    left_out |= {f"text {code}": dropped for code, (_, dropped) in counted.items()}
    about = {
        "preset": preset,
        "files": {role: {c: str(p) for c, p in paths.items()} for role, paths in roles.items()},
        "examples": {
            role: {code: len(rows) for code, rows in by_language.items()}
            for role, by_language in labelled.items()
        },
        "labels": _label_counts(known, train),
        "lines": {code: kept for code, (kept, _) in counted.items()},
        "left out as twins": {what: n for what, n in left_out.items() if n},
        "without text": sorted({*files.paths["test"]} - {*files.paths["text"]}),
    }
    return Dataset(
        name=preset,
        task=known.task,
        metric=known.metric,
        source=files.source,
        targets=files.targets,
        development=files.development,
        train=written["train"][files.source],
        dev=written["dev"].pop(files.source),
        test=written["test"],
        dev_of=written["dev"],
        text=text_of,
        groups=_write_groups(out, labelled["test"]),
        options=dict(known.options),
        about=about,
    ).save(out)


def describe(dataset: Dataset) -> list[str]:
    """What was understood of a user's folder, in lines to print."""
    about = dataset.about
    lines = [
        f"{dataset.name}: {dataset.task}, {dataset.metric}; from {dataset.source} to "
        f"{', '.join(dataset.targets)}"
    ]
    if dataset.development:
        lines.append(f"development languages: {', '.join(dataset.development)}")
    for role, by_language in about["examples"].items():
        for code, n in by_language.items():
            lines.append(f"{role} {code}: {n:,} examples, {about['files'][role][code]}")
    for code, n in about["lines"].items():
        lines.append(f"text {code}: {n:,} lines, {about['files']['text'][code]}")
    lines.append("labels: " + ", ".join(f"{k} {n:,}" for k, n in about["labels"].items()))
    for what, n in about["left out as twins"].items():
        lines.append(f"{what}: {n:,} left out, which are test or dev data too")
    if about["without text"]:
        lines.append(f"passed over, for want of text: {', '.join(about['without text'])}")
    return lines


def _suffix(preset: Preset) -> str:
    if preset.task == "sequences":
        return ".jsonl"
    return ".conll" if _tags(preset) == "tags" else ".conllu"


def _write(path: Path, preset: Preset, rows: Examples) -> Path:
    write_text(path, "".join(_formatted(preset, row) for row in rows))
    return path


def _write_groups(out: Path, test: Mapping[str, Examples]) -> dict[str, Path]:
    """What is drawn together when scores are resampled, a line an example, where rows say it."""
    groups = {}
    for code, rows in test.items():
        if lines := [group for row in rows if (group := _group(row)) is not None]:
            groups[code] = out / f"groups-{code}.txt"
            write_text(groups[code], "\n".join(lines) + "\n")
    return groups


def _formatted(preset: Preset, row: Mapping[str, Any]) -> str:
    """An example as its file holds it."""
    if preset.task == "sequences":
        kept = {name: row[name] for name in _FIELDS if name in row}
        return json.dumps(kept, ensure_ascii=False) + "\n"
    tokens = row["tokens"]
    columns: list[Iterable[Any]] = [tokens, row["tags"]] if "tags" in row else []
    if _suffix(preset) == ".conllu":
        empty = ["_"] * len(tokens)
        tags = empty if preset.task == "parsing" else row["upos"]
        tree = (row["heads"], row["relations"]) if preset.task == "parsing" else (empty, empty)
        columns = [range(1, len(tokens) + 1), tokens, empty, tags, empty, empty, *tree]
        columns += [empty, empty]
    return "".join("\t".join(map(str, word)) + "\n" for word in zip(*columns, strict=True)) + "\n"


def _texts(preset: Preset, row: Mapping[str, Any]) -> Iterator[str]:
    """The texts of an example."""
    if preset.task == "sequences":
        yield from (row[name] for name in ("text", "premise", "hypothesis") if name in row)
    else:
        yield "".join(row["tokens"])


def _bare(text: str) -> str:
    """What is compared: treebanks and raw text differ in spaces."""
    return "".join(text.split()).casefold()


def _item(preset: Preset, row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(map(_bare, _texts(preset, row)))


def _group(row: Mapping[str, Any]) -> str | None:
    """What an example is drawn with when scores are resampled: its number, or its premise."""
    found = row.get("premise", row.get("id"))
    return None if found is None else " ".join(str(found).split())


def _labels(preset: Preset, row: Mapping[str, Any]) -> list[str]:
    if preset.task == "sequences":
        return [row["label"]]
    found: list[str] = row["relations" if preset.task == "parsing" else _tags(preset)]
    return found


def _tags(preset: Preset) -> str:
    """The field of the words' labels."""
    return "upos" if preset.task == "parsing" else str(preset.options.get("tags", "tags"))


def _label_counts(preset: Preset, rows: Examples) -> dict[str, int]:
    counts = Counter(label for row in rows for label in _labels(preset, row))
    return dict(sorted(counts.items()))


def _check_labels(preset: Preset, train: Examples, held: Iterable[Examples]) -> None:
    """Refuses what would stop a run at its end: a label that training does not know."""
    if preset.task == "parsing":
        return  # its head tells all universal relations apart
    known = {*(_task(preset).labels(train) or ())}
    for rows in held:
        for i, row in enumerate(rows):
            for label in _labels(preset, row):
                if label not in known:
                    raise DataError(
                        f"{rows.where(i)}: the label {label!r} is not one of the training "
                        f"data's: {', '.join(sorted(known))}"
                    )


def _count(path: Path, twins: set[str]) -> tuple[int, int]:
    """Lines of a text that are no twins, and lines that are; empty ones aside.

    Raises:
        DataError: It is not UTF-8, or no line is left.
    """
    kept = dropped = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                bare = _bare(raw.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise DataError(
                    f"{path}, line {number}: is not UTF-8; convert the file, for instance with "
                    "iconv -t UTF-8"
                ) from None
            kept += bool(bare) and bare not in twins
            dropped += bare in twins
    if not kept:
        raise DataError(f"{path}: holds no text" + (" but test and dev data" if dropped else ""))
    return kept, dropped


def _without(path: Path, twins: set[str], out: Path) -> Path:
    """A copy of a text without the lines that are twins."""
    with path.open("rb") as file, out.open("wb") as left:
        left.writelines(raw for raw in file if _bare(raw.decode("utf-8-sig")) not in twins)
    return out


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
