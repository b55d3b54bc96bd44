"""Runs on disk: the folder from which training continues after it was stopped at any moment.

`run.json` names the files that hold the state. A new state is written into new files first, then
`run.json` is replaced in one step, then the old files go: whatever moment the process dies at, the
folder holds one whole state. Tensors lie in safetensors files, all else is JSON; nothing is
pickled. The files' names hold a random number of the run, so that no other file is taken for one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoints import read_json, write_json, write_safetensors
from .files import SFTFileError, canonical, parse_json

__all__ = ["Run", "differences"]

NAME = "run.json"
FORMAT = {"format": "sparse_ft.run", "version": 1}
_ID = re.compile(r"[0-9a-f]{8}")
# Seconds: when a process is killed, the workers of its loaders live on for a while, and hold its
# lock.
WAIT = 10.0
# Beside the tensors: names, the tree, the directory's own blocks.
_SLACK = 1 << 20


# --- trees of tensors ---------------------------------------------------------------------------


def _encoded(tree: Any, tensors: list[Tensor], at: str) -> Any:
    """A tree as JSON: tensors by their number, what JSON lacks as an object with one key."""
    if tree is None or isinstance(tree, (bool, int, str)):
        return tree
    if isinstance(tree, np.generic):
        return _encoded(tree.item(), tensors, at)
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else {"float": repr(tree)}
    if isinstance(tree, Tensor):
        tensors.append(tree.detach())
        return {"tensor": len(tensors) - 1}
    if isinstance(tree, (list, tuple)):
        items = [_encoded(item, tensors, f"{at}[{i}]") for i, item in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    if isinstance(tree, Mapping):
        pairs = []
        for key, value in tree.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"{at}: a key of type {type(key).__name__} cannot be stored")
            pairs.append([key, _encoded(value, tensors, f"{at}[{key!r}]")])
        return {"dict": pairs}
    raise TypeError(
        f"{at}: a {type(tree).__name__} cannot be stored; tensors, numbers, texts, lists, tuples "
        "and dictionaries of them can"
    )


def _decoded(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decoded(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decoded(content, tensors))
    return {key: _decoded(value, tensors) for key, value in content}


def write_tree(path: str, tree: Any) -> None:
    """Writes a tree of tensors, numbers, texts, lists, tuples and dictionaries to a new file.

    Raises:
        TypeError: Something else is in it; the message says where.
        OSError: The file cannot be written; what was written of it is gone.
    """
    tensors: list[Tensor] = []
    text = json.dumps(_encoded(tree, tensors, os.path.basename(path)), separators=(",", ":"))
    numbered = {str(i): tensor for i, tensor in enumerate(tensors)}
    needed = sum(t.numel() * t.itemsize for t in tensors) + len(text) + _SLACK
    free = shutil.disk_usage(os.path.dirname(path)).free
    try:
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free")
        write_safetensors(
            path,
            {name: (t.dtype, tuple(t.shape)) for name, t in numbered.items()},
            lambda name: numbered[name].cpu(),
            {"tree": text},
        )
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise OSError(
            error.errno,
            f"the state of the run could not be written ({error.strerror}); the state before it is "
            "whole, so make room and start the run again: it continues from there",
            path,
        ) from error
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def read_tree(path: str) -> Any:
    """What `write_tree` wrote, in memory of its own.

    Raises:
        SFTFileError: It is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {})["tree"]
            # Copies: a mapped tensor would hold the file, which the next state replaces.
            tensors = [file.get_tensor(str(i)).clone() for i in range(len(file.keys()))]
        return _decoded(parse_json(path, text), tensors)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise SFTFileError(f"{path}: is not the state of a run: {error}") from error


# --- the folder ---------------------------------------------------------------------------------


class Run:
    """The folder of one run: its settings, how far it is, and its state.

    Args:
        folder: Where the run is or shall be; made if it is not there.
        settings: What decides the result, as JSON values. A run goes on only with the same.
        fresh: Start over, whatever is there. It stays until the first `commit`.

    Attributes:
        progress: How far the run is, as its owner recorded it; empty at the beginning.

    Raises:
        ValueError: The folder holds a run with other settings; the message says which.
        SFTFileError: It holds something that is not a run of this version.
        OSError: It cannot be made, or another process works in it.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: Mapping[str, Any], fresh: bool = False
    ) -> None:
        self.folder = os.path.abspath(os.fsdecode(folder))
        os.makedirs(self.folder, exist_ok=True)
        self._lock = _locked(self.folder)
        self.progress: dict[str, Any] = {}
        self._id = secrets.token_hex(4)
        self._claimed = False
        self._files: dict[str, str] = {}
        # The files that run.json names.
        self._committed: set[str] = set()
        self._settings = parse_json("settings", canonical(_plain(settings)))
        try:
            if os.path.exists(self._path(NAME)):
                self._open(fresh)
        except BaseException:
            self.close()
            raise

    def _open(self, fresh: bool) -> None:
        path = self._path(NAME)
        try:
            document = read_json(path)
            own = {key: document.get(key) for key in FORMAT} == FORMAT
            if not own or not _ID.fullmatch(str(document.get("id"))):
                raise SFTFileError(f"{path}: is not a run of this version; name another folder")
        except SFTFileError:
            if fresh:
                return
            raise
        self._claimed = True
        if fresh:
            # Under the same number, so that the old files go once there are new ones.
            self._id, self._committed = document["id"], set(document["files"].values())
            return
        if changes := differences(document["settings"], self._settings):
            raise ValueError(
                f"{self.folder}: holds a run with other settings: {'; '.join(changes[:5])}"
                + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
                + ". Give it those settings, name another folder, or start over with fresh=True"
            )
        self._id, self.progress, self._files = (document[k] for k in ("id", "progress", "files"))
        self._committed = set(self._files.values())
        self._sweep()

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def path(self, kind: str) -> str | None:
        """The file of one part of the state; None where there is none."""
        return self._path(self._files[kind]) if kind in self._files else None

    def write(self, kind: str, tree: Any) -> None:
        """Writes one part of the state; it counts from the next `commit` on."""
        if not self._claimed:
            # The number is on the disk before the first file that bears it.
            self._record({}, {})
        taken = [int(name.rsplit("-", 1)[1].split(".")[0]) for name in self._own()]
        name = f"run-{kind}-{self._id}-{max(taken, default=0) + 1}.safetensors"
        write_tree(self._path(name), tree)
        self._files[kind] = name
        self._sweep()

    def read(self, kind: str) -> Any:
        """One part of the state; None where there is none."""
        path = self.path(kind)
        return None if path is None else read_tree(path)

    def drop(self, *kinds: str) -> None:
        """Forgets parts of the state, from the next `commit` on."""
        for kind in kinds:
            self._files.pop(kind, None)

    def commit(self, **progress: Any) -> None:
        """Makes what was written the state of the run, in one step."""
        now = {**self.progress, **progress}
        self._record(now, self._files)
        self.progress, self._committed = now, set(self._files.values())
        self._sweep()

    def _record(self, progress: Mapping[str, Any], files: Mapping[str, str]) -> None:
        document = {
            **FORMAT,
            "id": self._id,
            "progress": progress,
            "files": files,
            "settings": self._settings,
        }
        # The new files' names are on the disk before run.json names them.
        _sync(self.folder)
        temporary = self._path(f"run-{self._id}.tmp")
        try:
            write_json(temporary, document)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self._path(NAME))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync(self.folder)
        self._claimed = True

    def _own(self) -> list[str]:
        own = re.compile(rf"run-[a-z]+-{self._id}-[0-9]+\.safetensors")
        return [name for name in os.listdir(self.folder) if own.fullmatch(name)]

    def _sweep(self) -> None:
        """Removes the files that no state names any more."""
        for name in set(self._own()) - self._committed - set(self._files.values()):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(name))

    def close(self) -> None:
        """Lets other processes work in the folder."""
        if self._lock is not None:
            _unlock(self._lock)
            self._lock = None


def _unlock(lock: int) -> None:
    import fcntl

    # Workers of loaders that live on hold the same lock: closing this handle would not end it.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def _locked(folder: str) -> int | None:
    """A lock on the folder that ends with the process; None where the system has none."""
    try:
        import fcntl
    except ImportError:
        return None
    lock = os.open(folder, os.O_RDONLY)
    patience = time.monotonic() + WAIT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() < patience:
                time.sleep(0.05)
                continue
            os.close(lock)
            raise OSError(
                errno.EAGAIN,
                "another process works on this run; wait for it, or name another",
                folder,
            ) from None
        except OSError:  # a file system without locks
            os.close(lock)
            return None


def _sync(folder: str) -> None:
    with contextlib.suppress(OSError):  # not every system opens folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _plain(tree: Any) -> Any:
    """Settings with NumPy's numbers as Python's."""
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, (list, tuple)):
        return [_plain(item) for item in tree]
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return tree


def differences(stored: Any, given: Any, at: str = "") -> list[str]:
    """What differs between two JSON documents, one line each."""
    if isinstance(stored, dict) and isinstance(given, dict):
        out = []
        for key in sorted(stored.keys() | given.keys()):
            out += differences(stored.get(key), given.get(key), f"{at}.{key}" if at else key)
        return out
    if stored == given:
        return []
    return [f"{at} was {_brief(stored)} and is {_brief(given)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:99] + "…"
