"""Results of finished steps on disk, so that an interrupted quickstart continues where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def key_of(settings: Mapping[str, Any]) -> str:
    """A short digest of settings; equal settings give equal keys."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """Records of finished steps, one JSON file each, named by step and key of its settings.

    Args:
        folder: where the records lie; created when missing.
        fresh: ignore the records that are there, other than this object's own.
    """

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder = folder
        self.fresh = fresh
        self._put: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, key: str) -> dict[str, Any] | None:
        """The record of a step, or None when the step has yet to run or left damaged files."""
        path = self._path(name, key)
        if (self.fresh and path not in self._put) or not path.is_file():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None
        files = record.get("files", {})
        intact = all(_digest(self.folder.parent / f) == d for f, d in files.items())
        return record if intact else None

    def put(self, name: str, key: str, record: dict[str, Any], *files: Path) -> dict[str, Any]:
        """Record a finished step and the digests of the files it wrote, in one atomic move."""
        root = self.folder.parent
        record["files"] = {str(f.relative_to(root)): _digest(f) for f in files}
        path = self._path(name, key)
        write_text(path, json.dumps(record, indent=1, sort_keys=True) + "\n")
        self._put.add(path)
        return record

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key}.json"


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
