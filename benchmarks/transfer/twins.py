"""Proof that nothing that is tested or chosen by has a twin in what was trained on.

Beside each file of a data set that knows its items' keys lies one with the suffix .keys: a line an
example, its message key or template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.transfer.dataset import Dataset
from sparse_ft.tasks import data

__all__ = ["Twin", "forms", "identity", "keys_path", "near", "near_twins", "twins"]

_WORD = re.compile(r"[^\W_]+")
_FEWEST = 3
"""Words of a text that can be near another: shorter ones share most of them by chance."""


class Twin(NamedTuple):
    """An example of held-out data that was trained on as well.

    Args:
        held: File of the held-out example.
        trained: File of the one that is trained on.
        what: "key", "text" or "near".
        value: The key, the text as `identity` gives it, or one of `near`.
    """

    held: Path
    trained: Path
    what: str
    value: str


def identity(text: str) -> str:
    """What two texts share that read alike: their letters and digits, without case."""
    text = text.casefold()
    return "".join(filter(str.isalnum, text)) or text.strip()


def near(text: str) -> set[str]:
    """What two texts share that differ in one word at most: their words without one of them.

    Args:
        text: Any; one of fewer than three words is near none.

    Returns:
        All words and each choice of all but one, without case and punctuation. Texts that differ
        by a word put in, left out, changed or moved have one in common.
    """
    words = _WORD.findall(text.casefold())
    if len(words) < _FEWEST:
        return set()
    return {" ".join(words), *(" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)))}


def forms(text: str) -> set[str]:
    """What a text shares with its twins, and with such as differ in one word at most."""
    return {identity(text), *near(text)}


def keys_path(path: Path) -> Path:
    """Where the keys of a file's examples lie: one line an example."""
    return path.with_suffix(".keys")


def twins(dataset: Dataset) -> list[Twin]:
    """Finds held-out examples (test and dev, of any language) in what is trained on.

    Trained on are the labelled training data, the unlabelled text and that of stage 0, in any
    language. Twins are texts with the same letters and digits, and examples with the same key.

    Args:
        dataset: Any; keys are compared where a file has some beside it.

    Returns:
        One for each pair of files and value, ascending; empty: there is none.
    """
    return sorted({*_shared(dataset, "text", _identities), *_shared(dataset, "key", _keys)})


def near_twins(dataset: Dataset) -> list[Twin]:
    """Finds held-out examples that differ by one word at most from what is trained on.

    Args:
        dataset: As for `twins`.

    Returns:
        One for each pair of files and shared form, ascending; empty: there is none.
    """
    return sorted(_shared(dataset, "near", _near))


def _shared(dataset: Dataset, what: str, values: Callable[[Path], set[str]]) -> Iterable[Twin]:
    """What the files that are held out have in common with those that are trained on."""
    held = [dataset.dev, *dataset.test.values(), *dataset.dev_of.values()]
    trained = [dataset.train, *dataset.text.values(), *dataset.stage0]
    trained_on = [(path, values(path)) for path in dict.fromkeys(trained)]
    for path in dict.fromkeys(held):
        mine = values(path)
        for other, theirs in trained_on:
            yield from (Twin(path, other, what, value) for value in mine & theirs)


def _identities(path: Path) -> set[str]:
    return {identity(text) for text in _texts(path)} - {""}


def _near(path: Path) -> set[str]:
    return {form for text in _texts(path) for form in near(text)}


def _texts(path: Path) -> Iterable[str]:
    for row in data.read(path):
        if "tokens" in row:
            yield " ".join(row["tokens"])
        else:
            yield " ".join(str(row[name]) for name in ("text", "text_pair") if name in row)


def _keys(path: Path) -> set[str]:
    path = keys_path(path)
    return set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()
