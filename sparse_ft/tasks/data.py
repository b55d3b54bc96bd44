"""Data of a user's own: plain text, CoNLL, CoNLL-U, JSON lines, JSON, CSV, `datasets`.

Every reader gives `Examples`: a list of dicts that knows where it comes from. Text is UTF-8, a byte
order mark is taken off, and nothing is guessed: what does not fit is a `DataError` that names the
file and the line, before anything is trained.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "DataError",
    "Examples",
    "held_out",
    "read",
    "read_conll",
    "read_conllu",
    "read_csv",
    "read_dataset",
    "read_json",
    "read_json_lines",
    "read_text",
]

Source = str | os.PathLike[str]

# What a split's file may be called: the whole stem, or its end after "-", "_" or ".".
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# One field of a CSV file may hold a long document.
_MAX_FIELD = 1 << 27
# What stands between columns of CoNLL files, and on empty lines.
_BLANK = " \t"


class DataError(ValueError):
    """Data cannot be read or do not fit the task; the message names the file and the place."""


class Examples(list[dict[str, Any]]):
    """Examples in order, and the file or data set that they come from.

    Args:
        rows: One dict an example.
        source: What messages call it.
        lines: Where each of them begins in the file, from 1; None where that is not known.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]] = (),
        source: str = "data",
        lines: Sequence[int] | None = None,
    ) -> None:
        super().__init__(rows)
        self.source = source
        self.lines = lines

    def where(self, i: int) -> str:
        """How a message names example `i`."""
        if self.lines is None:
            return f"{self.source}, example {i + 1}"
        return f"{self.source}, line {self.lines[i]}"

    def replaced(self, rows: Iterable[dict[str, Any]]) -> Examples:
        """Other rows in the place of these, one for one."""
        return Examples(rows, self.source, self.lines)


def source_of(examples: Sequence[Mapping[str, Any]]) -> str:
    """Where examples come from, as messages name it."""
    return getattr(examples, "source", "data")


def where(examples: Sequence[Mapping[str, Any]], i: int) -> str:
    """How a message names an example, whatever holds it."""
    return (
        examples.where(i)
        if isinstance(examples, Examples)
        else f"{source_of(examples)}, example {i + 1}"
    )


def read(
    source: Source,
    *,
    split: str | None = None,
    format: str | None = None,
    plain: str = "text",
    **options: Any,
) -> Examples:
    """Reads data by what they are: a file by its suffix, a folder, or a name on the Hub.

    Args:
        source: A file, which is read whatever `split` says; a folder with one file a split
            (`train.conllu`, `en_ewt-ud-dev.conllu`) or one that `datasets` saved; or, where there
            is no such path, a data set's name on the Hub.
        split: "train", "validation" or "test" (or a data set's own name for one); needed for a
            folder or a data set, without meaning for a file.
        format: "text", "conll", "conllu", "jsonl", "json", "csv", "tsv" or "dataset"; default: by
            the suffix.
        plain: The format of a `.txt` file.
        **options: Of that format's reader.

    Raises:
        DataError: It is not there, is not in that format, or holds nothing.
        TypeError: The format has no such option.
    """
    path = Path(source)
    if format is not None and format not in _READERS:
        raise DataError(f"format is {format!r}; it must be one of {', '.join(_READERS)}")
    if format == "dataset" or not path.exists():
        if format != "dataset" and (
            not _HUB_ID.fullmatch(os.fspath(source)) or path.suffix in _SUFFIXES
        ):
            raise DataError(f"{source}: no such file or folder")
        return read_dataset(source, split, **options)
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return read_dataset(source, split, **options)
        path = _file_of_split(path, split)
    if format is None:
        format = plain if path.suffix.lower() == ".txt" else _SUFFIXES.get(path.suffix.lower())
    if format is None:
        raise DataError(
            f"{path}: the suffix {path.suffix!r} says nothing of its format; name it (format=): "
            f"{', '.join(_READERS)}"
        )
    reader = _READERS[format]
    known = [name for name in inspect.signature(reader).parameters if name != "path"]
    if unknown := sorted(options.keys() - known):
        raise TypeError(
            f"{path}: the format {format} takes no argument {unknown[0]!r}; it takes "
            f"{', '.join(known) or 'none'}"
        )
    return reader(path, **options)


def _file_of_split(folder: Path, split: str | None) -> Path:
    """The one file of a folder that is named after a split."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in {*_SUFFIXES, ".txt"})
    there = ", ".join(f.name for f in files) or "none"
    if split is None:
        raise DataError(f"{folder}: is a folder; say which split (files: {there})")
    names = next((names for names in _SPLITS.values() if split in names), (split,))
    found = [f for f in files if re.split(r"[-_.]", f.stem.lower())[-1] in names]
    if len(found) != 1:
        raise DataError(
            f"{folder}: {len(found) or 'no'} files are named after the split {split!r} (files: "
            f"{there}); name the file itself"
        )
    return found[0]


# --- formats ------------------------------------------------------------------------------------


def read_text(path: Source) -> Examples:
    """Reads plain text: each line that is not empty is an example {"text"}.

    Raises:
        DataError: The file is missing, empty or not UTF-8.
    """
    lines = _lines(path)
    return _some([{"text": text} for line in lines if (text := line.strip())], path, "text")


def read_conll(path: Source, *, token: int = 0, tag: int = -1) -> Examples:
    """Reads one token a line, columns separated by tabs or by spaces, sentences by empty lines.

    The format of CoNLL-2003 and MasakhaNER. Lines with -DOCSTART- are passed over; "#" begins no
    comment, as it may be a token.

    Args:
        path: The file.
        token: Column of the token, from 0.
        tag: Column of the tag; -1: the last one.

    Returns:
        Examples {"tokens": [str], "tags": [str]}.

    Raises:
        DataError: The file is missing, empty or not UTF-8, a line has too few columns, or lines end
            in a carriage return alone.
    """
    sentences: list[dict[str, Any]] = []
    begins: list[int] = []
    tokens: list[str] = []
    tags: list[str] = []

    def end(line: int) -> None:
        if tokens:
            sentences.append({"tokens": [*tokens], "tags": [*tags]})
            begins.append(line - len(tokens))
            tokens.clear()
            tags.clear()

    lines = _table_lines(path)
    for number, line in enumerate(lines, 1):
        # No other space ends a column: a no-break space may be in the token "1 000".
        if not (bare := line.strip(_BLANK)) or line.startswith("-DOCSTART-"):
            end(number)
            continue
        columns = line.split("\t") if "\t" in line else re.split(" +", bare)
        try:
            if len(columns) < 2:
                raise IndexError
            word, label = columns[token].strip(_BLANK), columns[tag].strip(_BLANK)
        except IndexError:
            raise DataError(
                f"{path}, line {number}: {len(columns)} column(s); a token (column {token}) and a "
                f"tag (column {tag}) are needed, separated by tabs or spaces"
            ) from None
        if not word or not label:
            raise DataError(f"{path}, line {number}: the token or its tag is empty")
        tokens.append(word)
        tags.append(label)
    end(len(lines) + 1)
    return _some(sentences, path, "sentence", begins)


def read_conllu(path: Source) -> Examples:
    """Reads CoNLL-U: the syntactic words, without multiword ranges (1-2) and empty nodes (1.1).

    Returns:
        Examples {"tokens", "upos", "xpos", "heads" (0 is the root), "relations"}, one item a
        word. A column that is "_" throughout a sentence is left out.

    Raises:
        DataError: The file is missing, empty, not UTF-8, or not CoNLL-U.
    """
    sentences: list[dict[str, Any]] = []
    begins: list[int] = []
    words: list[tuple[int, list[str]]] = []

    def end() -> None:
        if words:
            sentences.append(_sentence(path, words))
            begins.append(words[0][0])
            words.clear()

    for number, line in enumerate(_table_lines(path), 1):
        if not line.strip(_BLANK):
            end()
            continue
        if line.startswith("#"):
            continue
        columns = line.split("\t")
        if len(columns) != 10:
            raise DataError(
                f"{path}, line {number}: {len(columns)} column(s); CoNLL-U has 10, separated by "
                "tabs"
            )
        if "-" in columns[0] or "." in columns[0]:
            continue
        if columns[0] != str(len(words) + 1):
            raise DataError(
                f"{path}, line {number}: the word's ID is {columns[0]!r}; "
                f"{len(words) + 1} comes next"
            )
        words.append((number, columns))
    end()
    return _some(sentences, path, "sentence", begins)


def _sentence(path: Source, words: list[tuple[int, list[str]]]) -> dict[str, Any]:
    """A sentence of CoNLL-U, its heads checked."""
    found: dict[str, Any] = {"tokens": [row[1] for _, row in words]}
    for name, column in (("upos", 3), ("xpos", 4), ("heads", 6), ("relations", 7)):
        values = [row[column] for _, row in words]
        if any(value != "_" for value in values):
            found[name] = values
    if "heads" in found:
        for (number, _), head in zip(words, found["heads"], strict=True):
            if not (head.isdecimal() and int(head) <= len(words)):
                raise DataError(
                    f"{path}, line {number}: the head is {head!r}; a sentence of {len(words)} "
                    f"words has heads 0 to {len(words)}"
                )
        found["heads"] = [int(head) for head in found["heads"]]
    return found


def read_json_lines(path: Source) -> Examples:
    """Reads one JSON object a line.

    Raises:
        DataError: The file is missing, empty or not UTF-8, or a line holds no JSON object.
    """
    rows, begins = [], []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            row = _parsed(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: must be a JSON object, found {line[:40]}")
            rows.append(row)
            begins.append(number)
    return _some(rows, path, "example", begins)


def read_json(path: Source) -> Examples:
    """Reads a JSON list of objects, or the nested form of SQuAD.

    Returns:
        The objects; of SQuAD {"id", "context", "question", "answers": {"text", "answer_start"}}.

    Raises:
        DataError: The file is missing, empty, not UTF-8, or neither of the two.
    """
    document = _parsed(_text(path), path)
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        try:
            document = [
                {
                    "id": question["id"],
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": {
                        key: [answer[key] for answer in question["answers"]]
                        for key in ("text", "answer_start")
                    },
                }
                for article in document["data"]
                for paragraph in article["paragraphs"]
                for question in paragraph["qas"]
            ]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}: is not SQuAD: data → paragraphs → context, qas → id, question, answers "
                f"→ text, answer_start ({type(error).__name__}: {error})"
            ) from None
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise DataError(
            f'{path}: must be a list of objects, or SQuAD: an object with a list "data"'
        )
    return _some(document, path, "example")


def read_csv(
    path: Source,
    *,
    delimiter: str = ",",
    quoting: bool = True,
    columns: Sequence[str] | None = None,
) -> Examples:
    """Reads a table whose first line names the columns.

    Args:
        path: The file.
        delimiter: What stands between fields.
        quoting: Fields may stand between quotation marks, and then hold delimiters and ends of
            lines. False, the default of the format "tsv": a quotation mark is text.
        columns: Their names, where the first line is a row like the others.

    Raises:
        DataError: The file is missing, empty or not UTF-8, a line has more or fewer fields than
            there are columns, two of them have one name, or `columns` is no list.
    """
    if isinstance(columns, str):
        raise DataError(
            f'{path}: columns is {columns!r}; it must be a list such as ["text", "label"]'
        )
    limit = csv.field_size_limit(_MAX_FIELD)
    try:
        table = csv.DictReader(
            io.StringIO(_text(path), newline=""),
            fieldnames=columns,
            delimiter=delimiter,
            strict=True,
            quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        )
        rows, begins = [], []
        try:
            names = table.fieldnames or ()
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{path}, line 1: two columns have the name {twice[0]!r}")
            named = "first line" if columns is None else f"columns {', '.join(names)}"
            for row in table:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, line {table.line_num}: does not have the "
                        f"{len(names)} fields of the {named}"
                    )
                rows.append(row)
                begins.append(table.line_num)
        except csv.Error as error:
            raise DataError(f"{path}, line {table.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return _some(rows, path, "row", begins)


def read_dataset(
    source: Source,
    split: str | None = None,
    *,
    config: str | None = None,
    revision: str | None = None,
) -> Examples:
    """Reads a data set of the library `datasets`; class labels become their names.

    Args:
        source: A folder that `save_to_disk` wrote, or a name on the Hub.
        split: Its split, such as "train"; "validation[:100]" and the like work for the Hub.
        config: The data set's configuration, such as a language.
        revision: Of the Hub's repository.

    Raises:
        DataError: The library is missing, or the data set cannot be found, reached or read.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise DataError(
            f"{source}: no such file, and reading a data set needs the package datasets "
            '(pip install "sparse-ft[datasets]")'
        ) from None
    try:
        if os.path.isdir(source):
            found: Any = datasets.load_from_disk(os.fspath(source))
        else:
            found = datasets.load_dataset(os.fspath(source), config, revision=revision, split=split)
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{source}: no such file or folder here, and no data set that can be read "
            f"({type(error).__name__}: {reason}). Without the Hub, save it once elsewhere "
            "(Dataset.save_to_disk) and give the folder"
        ) from None
    if isinstance(found, Mapping):
        if split not in found:
            raise DataError(
                f"{source}: has no split {split!r}; it has {', '.join(map(str, found))}"
            )
        found = found[split]
    features: Any = found.features
    names = {key: _class_names(feature) for key, feature in features.items()}

    def named(row: dict[str, Any]) -> dict[str, Any]:
        return {key: _named(value, names[key]) for key, value in row.items()}

    label = f"{source} ({split})" if split else os.fspath(source)
    return _some([named(row) for row in found], label, "example")


def _class_names(feature: Any) -> list[str] | None:
    """The names of a column's classes, be it of labels or of lists of labels."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return getattr(inner, "names", None)


def _named(value: Any, names: list[str] | None) -> Any:
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if value >= 0 else None  # -1 stands for "no label"


# --- one part held out --------------------------------------------------------------------------


def held_out(
    examples: Sequence[dict[str, Any]], share: float, seed: int = 0
) -> tuple[Examples, Examples]:
    """Parts examples into a training part and a held-out one, by a hash of their content.

    The same examples part the same way in any order, and equal ones stay together, so that nothing
    held out is trained on.

    Args:
        examples: At least two that differ.
        share: Of the examples to hold out, in (0, 1); at least one is.
        seed: Another parting.

    Returns:
        What is left to train on, and what is held out, each in the old order.

    Raises:
        ValueError: share is out of range.
        DataError: There is nothing to part.
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out: share must lie between 0 and 1, got {share}")
    keys = [_key(example, seed) for example in examples]
    count: dict[bytes, int] = {}
    for key in keys:
        count[key] = count.get(key, 0) + 1
    source, lines = source_of(examples), getattr(examples, "lines", None)
    if len(count) < 2:
        raise DataError(f"{source}: at least two different examples are needed to hold some out")
    out: set[bytes] = set()
    taken = 0
    for key in sorted(count)[:-1]:
        if taken and taken + count[key] > share * len(keys):
            break
        out.add(key)
        taken += count[key]

    def part(held: bool) -> Examples:
        of = [i for i, key in enumerate(keys) if (key in out) == held]
        return Examples(
            (examples[i] for i in of), source, None if lines is None else [lines[i] for i in of]
        )

    return part(False), part(True)


def _key(example: dict[str, Any], seed: int) -> bytes:
    if example.keys() == {"text"} and isinstance(example["text"], str):
        # Lines of text are many, and JSON takes its time.
        content = f"{seed} {example['text']}".encode("utf-8", "surrogatepass")
    else:
        named = {name: value for name, value in example.items() if name != "id"}
        content = json.dumps([seed, named], sort_keys=True, default=str).encode("ascii")
    return hashlib.blake2b(content, digest_size=16).digest()


# --- helpers ------------------------------------------------------------------------------------


def _text(path: Source) -> str:
    """The text of a file, strictly UTF-8, without a byte order mark.

    Raises:
        DataError: It cannot be opened, or holds other bytes; it says which and where.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind a byte order mark.
        start = error.start + 3 * raw.startswith(b"\xef\xbb\xbf")
        line = raw.count(b"\n", 0, start) + 1
        raise DataError(
            f"{path}, line {line}: byte {start} (0x{raw[start]:02x}) is not UTF-8; convert the "
            "file, for instance with iconv -t UTF-8"
        ) from None


def _lines(path: Source) -> list[str]:
    # Not splitlines(), which also breaks at characters that text contains, such as U+2028.
    return [line.removesuffix("\r") for line in _text(path).split("\n")]


def _table_lines(path: Source) -> list[str]:
    lines = _lines(path)
    for number, line in enumerate(lines, 1):
        if "\r" in line:
            raise DataError(
                f"{path}, line {number}: holds a carriage return that ends no line; have lines end "
                "in a line feed, for instance with tr '\\r' '\\n'"
            )
    return lines


def _parsed(text: str, at: Source) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{at}: is not JSON: {error}") from None


def _some(
    rows: list[dict[str, Any]], source: Source, what: str, lines: Sequence[int] | None = None
) -> Examples:
    if not rows:
        raise DataError(f"{source}: holds no {what}")
    return Examples(rows, os.fspath(source), lines)


def _read_tsv(
    path: Source, *, quoting: bool = False, columns: Sequence[str] | None = None
) -> Examples:
    return read_csv(path, delimiter="\t", quoting=quoting, columns=columns)


_READERS: dict[str, Callable[..., Examples]] = {
    "text": read_text,
    "conll": read_conll,
    "conllu": read_conllu,
    "jsonl": read_json_lines,
    "json": read_json,
    "csv": read_csv,
    "tsv": _read_tsv,
    "dataset": read_dataset,
}
_SUFFIXES = {
    ".txt": "text",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".conllu": "conllu",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
}
