"""What an experiment is made of, as files in one folder with a manifest, whoever built them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sparse_ft.quickstart.store import write_text

MANIFEST = "manifest.json"
SCHEMA = 1
_PATHS = ("text", "stage0", "train", "dev", "test", "dev_of", "views", "groups")


class DatasetError(ValueError):
    """A data set does not fit together, or its folder does not hold it."""


@dataclass(frozen=True)
class Dataset:
    """Labelled data in one language, test data and unlabelled text in others.

    No line of the text is a twin of a test or dev item, in any language: the same message, or
    another expansion of its template.

    Attributes:
        name: Of the experiment: "pos", "intents", "topics", or the user's.
        task: Kind of the task, as `sparse_ft.tasks` names it: "tokens", "sequences", "parsing".
        metric: What is reported: "accuracy", "f1" (of entities for tokens, macro for sequences),
            "las".
        source: Language of the labelled training data.
        targets: Languages that are reported.
        development: Languages that settings may be chosen on; never among the targets.
        train: Labelled, in the source language.
        dev: Likewise; what the best state is chosen by.
        test: Language (targets, development, source) → labelled file, as `sparse_ft.tasks.data`
            reads it.
        text: Language → unlabelled text, one line a message.
        stage0: Text of seen languages, for the base model's head.
        dev_of: Development language → labelled file, for choosing settings alone.
        views: Language → name → labelled file: the test data's sentences with some words left out.
        groups: Language → text file with one line for each test example: what is drawn together
            when scores are resampled (a message key, a template).
        options: For training and evaluation, such as {"tags": "upos"}.
        about: Packages with versions and licences, counts, notes: plain JSON.

    Raises:
        DatasetError: The languages contradict each other, or a target has no test data.
    """

    name: str
    task: str
    metric: str
    source: str
    targets: tuple[str, ...]
    development: tuple[str, ...]
    train: Path
    dev: Path
    test: Mapping[str, Path]
    text: Mapping[str, Path]
    stage0: tuple[Path, ...] = ()
    dev_of: Mapping[str, Path] = field(default_factory=dict)
    views: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    groups: Mapping[str, Path] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.targets:
            raise DatasetError(f"data set {self.name!r} has no target language")
        if shared := {*self.targets} & {*self.development, self.source}:
            raise DatasetError(
                f"data set {self.name!r}: {', '.join(sorted(shared))} cannot be a target and the "
                "source or a development language as well"
            )
        for what, found in (("test data", self.test), ("text", self.text)):
            if missing := [language for language in self.targets if language not in found]:
                raise DatasetError(
                    f"data set {self.name!r} has no {what} for the target {missing[0]}"
                )

    def save(self, folder: str | os.PathLike[str]) -> Dataset:
        """Writes the manifest: from here on, the folder holds the data set.

        Args:
            folder: Where the files lie; those elsewhere are named by their absolute paths.

        Returns:
            The data set.

        Raises:
            DatasetError: A file is not there; nothing is written.
        """
        root = Path(folder).resolve()
        _check_files(self, root)

        def name(path: Path) -> str:
            path = Path(path).resolve()
            return path.relative_to(root).as_posix() if root in path.parents else str(path)

        document = {"schema": SCHEMA, **_plain(_with_paths(self, name))}
        text = json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        write_text(root / MANIFEST, text)
        return self

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Dataset:
        """The data set that a folder holds.

        Raises:
            DatasetError: It has no manifest, one of another version, or a file is not there.
        """
        root = Path(folder).resolve()
        path = root / MANIFEST
        if not path.is_file():
            raise DatasetError(f"{folder} holds no data set: there is no {MANIFEST} in it")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if (found := document.pop("schema")) != SCHEMA:
                raise DatasetError(f"{path} has schema {found!r}, and this version reads {SCHEMA}")
            for listed in ("targets", "development", "stage0"):
                document[listed] = tuple(document[listed])
            dataset = _with_paths(cls(**document), lambda name: root / name)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{path} is not a manifest: {error}") from None
        _check_files(dataset, root)
        return dataset

    @cached_property
    def content(self) -> str:
        """A digest of all files and settings, wherever the files lie."""
        document = _plain(_with_paths(self, digest_of))
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_paths(dataset: Dataset, change: Callable[[Any], Any]) -> Dataset:
    """The data set with each of its paths put through a function."""

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(one) for key, one in value.items()}
        if isinstance(value, tuple):
            return tuple(walk(one) for one in value)
        return change(value)

    return replace(dataset, **{name: walk(getattr(dataset, name)) for name in _PATHS})


def _plain(dataset: Dataset) -> dict[str, Any]:
    return {f.name: getattr(dataset, f.name) for f in fields(dataset)}


def _check_files(dataset: Dataset, root: Path) -> None:
    def check(path: Path) -> Path:
        if not Path(path).is_file():
            raise DatasetError(
                f"{root}: data set {dataset.name!r} lacks {path}; remove the folder to build it "
                "again"
            )
        return path

    _with_paths(dataset, check)


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
