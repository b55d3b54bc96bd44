"""Labelled texts and lines of text as files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.transfer.mediawiki import Message
from benchmarks.transfer.twins import identity, keys_path
from sparse_ft.quickstart.store import write_text

__all__ = ["Item", "counts", "distinct", "write_items", "write_lines", "write_messages"]


class Item(NamedTuple):
    """A labelled text.

    Args:
        key: Items with one key belong together: translations of a message, expansions of a
            template.
        text: One line.
        label: What it shall be recognised as.
    """

    key: str
    text: str
    label: str


def distinct(items: Iterable[Item]) -> list[Item]:
    """Items that read differently, without those whose text has several labels."""
    found: dict[str, dict[str, Item]] = {}
    for item in items:
        found.setdefault(identity(item.text), {}).setdefault(item.label, item)
    return [next(iter(some.values())) for some in found.values() if len(some) == 1]


def counts(
    parts: Mapping[tuple[str, str], Sequence[Item]], text: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    """What there is of each language, for the manifest.

    Args:
        parts: (Language, part) → items.
        text: Language → unlabelled text.

    Returns:
        Language → part → "examples", "keys" and "labels" (label → examples), and "text" → "lines"
        and "words".
    """
    found: dict[str, dict[str, Any]] = {}
    for language, path in text.items():
        content = path.read_text(encoding="utf-8")
        found[language] = {"text": {"lines": content.count("\n"), "words": len(content.split())}}
    for (language, part), items in parts.items():
        found[language][part] = {
            "examples": len(items),
            "keys": len({item.key for item in items}),
            "labels": dict(sorted(Counter(item.label for item in items).items())),
        }
    return found


def write_items(path: Path, items: Iterable[Item]) -> Path:
    """Writes items as JSON lines {"text", "label"}, and their keys beside them."""
    some = list(items)
    write_lines(keys_path(path), (item.key for item in some))
    rows = ({"text": item.text, "label": item.label} for item in some)
    return write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def write_messages(path: Path, messages: Iterable[Message]) -> Path:
    """Writes the texts of messages, one line each, and their keys beside them."""
    some = list(messages)
    write_lines(keys_path(path), (message.key for message in some))
    return write_lines(path, (message.text for message in some))


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    """Writes one line each; the folder is created when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in lines))
    return path
