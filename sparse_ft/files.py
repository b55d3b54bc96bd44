"""The SFT file, version 1: a safetensors file that this module writes and reads, and checks to the
last byte.

`docs/file-format.md` is the specification. A reader trusts nothing: no size is allocated because a
header declares it, no value is used before it was checked on a private copy, and every fault is an
`SFTFileError` that names file and field.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import re
import secrets
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from sparse_ft_kernels import check_support, hash_pieces

from .delta import DTYPE_NAMES, SparseDelta
from .metadata import (
    BASE_FIELDS,
    FILE_FIELDS,
    MAX_TENSORS,
    TEXT_FIELDS,
    TRAINED_ON_FIELDS,
    SFTError,
    check_name,
    checked_meta,
    plain_json,
    short,
)
from .tiles import TILE, Layout, Support

__all__ = ["FILE_NAME", "SFTFileError", "describe", "load", "save"]

FILE_NAME = "sft.safetensors"
LEGACY_NAME = "pytorch_diff.bin"
VERSION = (1, 0)
KEY = "sparse_ft"
MAX_HEADER = 16 << 20
MAX_BRACKETS = 1 << 20
MAX_DIGITS = 64
MAX_BYTES = 64 << 30
MAX_NUMEL = 1 << 48
MAX_DIMS = 32
# From this many entries on, `ptr` needs 64 bits.
WIDE = 1 << 32
# Larger values than this are legal and improbable.
LARGE_VALUE = 1e4

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U16": 2, "U32": 4, "U64": 8}
# The order in which the safetensors library lays tensors out: aligned without padding.
_ORDER = ("U64", "F64", "F32", "U32", "BF16", "F16", "U16")
_TENSOR_NAME = re.compile(r"idx|ptr|val|dense\.(0|[1-9][0-9]{0,5})")
_REQUIRED = (
    *("format", "version", "kind", "tile", "nnz", "numel", "params", "dense"),
    *("value_loss", "content_id"),
)
_OPTIONAL = ("base", "trained_on", *TEXT_FIELDS, "recipe")


class SFTFileError(SFTError):
    """A file is not an SFT, or a damaged or malformed one; the message names file and field."""


# --- what a file says ---------------------------------------------------------------------------


def canonical(document: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def parse_json(where: str, raw: bytes | str, *, finite: bool = True) -> Any:
    """Foreign JSON, without repeated keys.

    Args:
        where: What it is, for messages.
        raw: The text; bytes are UTF-8.
        finite: Refuse NaN and infinities, which Python takes for JSON.

    Raises:
        SFTFileError: It is no JSON, repeats a key, or is beyond a limit; it begins with `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = counts.most_common(1)[0][0]
            raise ValueError(f"the key {short(twice)} stands there twice")
        return found

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"an integer of {len(digits):,} digits")
        return int(digits)

    def real(digits: str) -> float:
        if len(digits) > MAX_DIGITS or (finite and not math.isfinite(float(digits))):
            raise ValueError(f"the number {short(digits)}")
        return float(digits)

    def constant(name: str) -> float:
        if finite:
            raise ValueError(f"the number {name}")
        return float(name)

    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise ValueError(f"more than {MAX_BRACKETS:,} lists and objects")
        return json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=real,
            parse_constant=constant,
        )
    except RecursionError:
        raise SFTFileError(f"{where}: is nested too deep") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise SFTFileError(f"{where}: is not valid JSON: {error}") from None


def content_document(delta: SparseDelta) -> dict[str, Any]:
    """The metadata that belong to a delta's content: all but content id, recipe and free text.

    Raises:
        SFTError: A field is malformed.
    """
    meta = checked_meta(delta.meta, delta.layout, delta.heads)
    dtypes, aliases = meta.get("dtypes", {}), meta.get("aliases", {})
    roles = meta.get("dense_roles", {})
    params = []
    for (name, count), shape in zip(
        delta.support.counts().items(), delta.layout.shapes, strict=True
    ):
        entry: dict[str, Any] = {"n": name, "s": list(shape), "k": count}
        if name in dtypes:
            entry["d"] = dtypes[name]
        if aliases.get(name):
            entry["a"] = aliases[name]
        params.append(entry)
    document: dict[str, Any] = {
        "format": "sft",
        "version": list(VERSION),
        "kind": meta.get("kind", "diff"),
        "tile": TILE,
        "nnz": delta.nnz,
        "numel": delta.layout.numel,
        "params": params,
        "dense": [
            {"n": name, "t": f"dense.{i}", "role": roles.get(name, "head")}
            for i, name in enumerate(delta.heads)
        ],
        "value_loss": meta.get("value_loss", "none"),
    }
    for key in ("base", "trained_on"):
        if meta.get(key):
            document[key] = meta[key]
    return document


class _Array(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def raw(self) -> np.ndarray:
        return self.data.reshape(-1).view(np.uint8)


def _arrays(delta: SparseDelta) -> dict[str, _Array]:
    """The tensors of a file, in the order in which the content id takes them."""
    ptr = delta.support.ptr.cpu().numpy()
    wide = delta.nnz >= WIDE
    arrays = {
        "idx": _Array("U16", (delta.nnz,), _bits(delta.support.idx)),
        "ptr": _Array(
            "U64" if wide else "U32", ptr.shape, ptr.astype(np.uint64 if wide else np.uint32)
        ),
        "val": _Array(DTYPE_NAMES[delta.val.dtype], (delta.nnz,), _bits(delta.val)),
    }
    for i, head in enumerate(delta.heads.values()):
        arrays[f"dense.{i}"] = _Array(DTYPE_NAMES[head.dtype], tuple(head.shape), _bits(head))
    return arrays


def _bits(tensor: Tensor) -> np.ndarray:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(integer).numpy()


def content_hash(text: str, delta: SparseDelta) -> str:
    """BLAKE2b-256 over the canonical content document, then name, type, shape and the hashes of the
    pieces of each tensor."""
    state = hashlib.blake2b(text.encode("ascii"), digest_size=32)
    for name, array in _arrays(delta).items():
        state.update(canonical([name, array.dtype, list(array.shape)]).encode("ascii"))
        state.update(hash_pieces(torch.from_numpy(array.raw)).numpy().data)
    return state.hexdigest()


# --- writing ------------------------------------------------------------------------------------


def save(delta: SparseDelta, path: str | os.PathLike[str]) -> str:
    """Writes a delta to a `.safetensors` file, or into an existing folder as `sft.safetensors`.

    The file appears whole or not at all: it is written beside its place and renamed. Equal deltas
    give equal bytes, on every machine and in every process.

    Args:
        delta: The delta.
        path: A path that ends in `.safetensors`, or an existing folder.

    Returns:
        The path of the file.

    Raises:
        SFTError: The delta is malformed, or beyond the limits of a file (docs/file-format.md), or
            the path is neither.
        OSError: The file cannot be written.
    """
    target = os.fsdecode(path)
    if os.path.isdir(target):
        target = os.path.join(target, FILE_NAME)
    if not target.endswith(".safetensors"):
        raise SFTError(
            f"SparseDelta.save: {target!r} must end in .safetensors, or be an existing folder"
        )
    with new_file("SparseDelta.save", target) as temporary:
        delta = delta.to("cpu")
        try:
            support = Support(delta.layout, delta.support.idx, delta.support.ptr)
        except ValueError as error:
            raise SFTError(f"SparseDelta.save: {error}") from None
        delta = SparseDelta(support, delta.val, delta.heads, delta.meta)
        header, arrays = _header(delta)
        with open(temporary, "xb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for array in arrays:
                file.write(array.raw.data)
            file.flush()
            os.fsync(file.fileno())
    return target


@contextmanager
def new_file(op: str, target: str) -> Iterator[str]:
    """A path to write to, whose file becomes `target` when the block ends and vanishes if it fails.

    Raises:
        SFTError: `target` is there and no regular file, or the folder to hold it is not.
    """
    # A link stays a link: what it points to is replaced.
    real = os.path.realpath(target)
    if os.path.lexists(real) and not os.path.isfile(real):
        raise SFTError(f"{op}: {target!r} exists and is not a regular file")
    folder = os.path.dirname(real)
    if not os.path.isdir(folder):
        raise SFTError(f"{op}: there is no folder {folder!r}; create it first")
    # Without the name, which can be as long as names may be.
    temporary = os.path.join(folder, f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        os.replace(temporary, real)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


def _header(delta: SparseDelta) -> tuple[bytes, list[_Array]]:
    document = content_document(delta)
    document["content_id"] = delta.content_id
    for key in (*TEXT_FIELDS, "recipe"):
        if delta.meta.get(key):
            document[key] = plain_json(key, delta.meta[key])
    text = canonical(document)
    entries: dict[str, Any] = {"__metadata__": {KEY: text}}
    arrays = sorted(_arrays(delta).items(), key=lambda item: (_ORDER.index(item[1].dtype), item[0]))
    offset = 0
    for name, array in arrays:
        end = offset + array.raw.nbytes
        entries[name] = {
            "dtype": array.dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER:
        raise SFTError(
            f"SparseDelta.save: the header takes {len(header):,} bytes, and {MAX_HEADER:,} are the "
            f"limit; {len(delta.layout):,} tensors, their names and the recipe are what fills it"
        )
    # What is written must be read: the reader says so, before anything is written.
    start = len(header).to_bytes(8, "little") + header
    _Reader("SparseDelta.save").check(start, len(start) + offset)
    return header, [array for _, array in arrays]


# --- reading ------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, mmap: bool = False
) -> SparseDelta:
    """Reads and checks an SFT.

    Args:
        path: A `.safetensors` file, a `pytorch_diff.bin`, or a folder with a file
            `sft.safetensors` or else `pytorch_diff.bin`.
        max_bytes: Larger files are refused before anything is allocated.
        mmap: Map the file, copy on write, instead of reading it into memory of its own. It is
            checked as ever, and processes that load it share its pages; but the delta is sound only
            as long as nobody writes to the file: a change made after the check goes unseen, and
            where the file is cut short the process dies (SIGBUS). A file that is replaced, as
            `save` does it, stays whole for those who have it mapped.

    Returns:
        The delta, on the CPU, writable; in memory of its own unless `mmap`.

    Raises:
        SFTFileError: The file is missing, foreign, damaged or malformed.
    """
    where = _locate(path)
    if where.endswith(".bin"):
        from . import legacy

        return legacy.read(where, max_bytes=min(max_bytes, legacy.MAX_BYTES))
    return _Reader(where, max_bytes, mmap).read()


class _Tensor(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class _Structure(NamedTuple):
    """What a file says before its tensors."""

    document: dict[str, Any]
    layout: Layout
    heads: list[str]
    meta: dict[str, Any]
    entries: dict[str, _Tensor]
    begin: int


# Gives the bytes of a tensor.
_Read = Callable[[_Tensor], np.ndarray]


def _tensor(read: _Read, entry: _Tensor) -> Tensor:
    # Through integers of the same width: torch does not widen the type of an empty tensor.
    integers = read(entry).view(f"i{_WIDTHS[entry.dtype]}")
    return torch.from_numpy(integers).view(_TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


def _of_this_version(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that have fields of their own, without those that a later minor version added."""

    def known(item: Any, fields: tuple[str, ...]) -> Any:
        return {k: item[k] for k in fields if k in item} if isinstance(item, dict) else item

    def each(items: Any, fields: tuple[str, ...]) -> Any:
        return [known(item, fields) for item in items] if isinstance(items, list) else items

    kept = {}
    if "base" in meta:
        kept["base"] = base = known(meta["base"], BASE_FIELDS)
        if isinstance(base, dict) and "files" in base:
            base["files"] = each(base["files"], FILE_FIELDS)
    if "trained_on" in meta:
        kept["trained_on"] = each(meta["trained_on"], TRAINED_ON_FIELDS)
    return kept


def open_regular(path: str, advice: str) -> tuple[int, int]:
    """A descriptor of a regular file, for reading, and its size.

    Raises:
        SFTFileError: It cannot be opened, or is something else; the message ends with the advice.
    """
    try:
        # Not blocking: opening a pipe would wait for a writer.
        flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        raise SFTFileError(f"{path}: cannot be opened: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise SFTFileError(f"{path}: is not a regular file; {advice}")
    return descriptor, status.st_size


class _Reader:
    """One reading of one file. Rules are numbered as in docs/file-format.md."""

    def __init__(self, path: str, max_bytes: int = MAX_BYTES, mmap: bool = False) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.mmap = mmap
        self.size = 0
        self.note = ""

    def fail(self, message: str) -> NoReturn:
        raise SFTFileError(f"{self.path}: {message}{self.note}")

    def read(self) -> SparseDelta:
        descriptor, self.size = open_regular(self.path, "give a file, or a folder that holds one")
        with open(descriptor, "rb", buffering=0) as file:
            if self.size > self.max_bytes:
                self.fail(
                    f"is {self.size:,} bytes long, and max_bytes = {self.max_bytes:,}; "
                    "sparse_ft.files.load takes a larger one"
                )
            try:
                return self._read(file)
            except SFTFileError:
                raise
            except SFTError as error:
                self.fail(str(error))
            except OSError as error:
                raise SFTFileError(f"{self.path}: cannot be read: {error.strerror}") from error

    def check(self, start: bytes, size: int) -> None:
        """Checks the beginning of a file of so many bytes, up to its tensors: rules 1 to 7."""
        self.size = size
        try:
            self._structure(io.BytesIO(start))
        except SFTFileError as error:
            raise SFTError(str(error)) from None
        except SFTError as error:
            raise SFTError(f"{self.path}: {error}") from None

    def _structure(self, file: BinaryIO) -> _Structure:
        entries, text, begin = self._header(file)
        document = self._document(text)
        layout, heads, meta = self._parameters(document)
        self._match(document, layout, heads, entries)
        return _Structure(document, layout, heads, meta, entries, begin)

    def _read(self, file: BinaryIO) -> SparseDelta:
        document, layout, heads, meta, entries, begin = self._structure(file)
        read = self._mapped(file, begin) if self.mmap else self._copied(file, begin)
        support, val, zeros = self._content(read, entries, layout, document)
        dense = {name: _tensor(read, entries[f"dense.{i}"]) for i, name in enumerate(heads)}
        for name, head in dense.items():
            if not torch.isfinite(head).all():
                self.fail(f"dense: {name!r} holds NaN or infinite values")
        delta = SparseDelta(support, val, dense, meta, check=False)
        if delta.content_id != document["content_id"]:
            self.fail(
                f"content_id: the content has the id {delta.content_id}, and the file says "
                f"{document['content_id']}; it was damaged or changed after it was written, or "
                "comes from sparse-ft 0.1.0, whose ids were formed otherwise"
            )
        self._warn(delta, zeros)
        return delta

    # Rules 1 to 4: the header.

    def _header(self, file: BinaryIO) -> tuple[dict[str, _Tensor], str, int]:
        if self.size < 8:
            self.fail(f"is {self.size} bytes long, too short for a safetensors file")
        start = self._bytes(file, 0, 8).tobytes()
        length = int.from_bytes(start, "little")
        if length > self.size - 8:
            # Only here: a right length may begin with these bytes too.
            if start.startswith((b"PK\x03\x04", b"\x80")):
                self.fail(
                    "is a PyTorch (pickle) file, not a safetensors file. The LT-SFT reference "
                    f"implementation writes such files as {LEGACY_NAME}; if this is one, give it a "
                    "name that ends in .bin"
                )
            self.fail(
                f"header: {length:,} bytes are declared and {self.size - 8:,} follow; "
                "the file is truncated, or no safetensors file"
            )
        if length > MAX_HEADER:
            self.fail(f"header: {length:,} bytes; at most {MAX_HEADER:,} are allowed in an SFT")
        root = parse_json(f"{self.path}: header", self._bytes(file, 8, length).tobytes())
        if not isinstance(root, dict):
            self.fail("header: must be a JSON object")
        metadata = root.pop("__metadata__", None)
        if not isinstance(metadata, dict) or KEY not in metadata:
            self.fail(
                f"is a safetensors file, but not an SFT: its metadata have no key {KEY!r}. A tuned "
                "checkpoint becomes an SFT by SparseDelta.between(base, tuned)"
            )
        if len(metadata) > 1:
            self.fail(f"metadata: must have the one key {KEY!r}, found {short(sorted(metadata))}")
        if not isinstance(metadata[KEY], str):
            self.fail(f"metadata: {KEY!r} must be a string")
        entries = {name: self._entry(name, entry) for name, entry in root.items()}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
            if entry.start != end:
                what = (
                    "overlaps the one before it" if entry.start < end else "leaves a hole before it"
                )
                self.fail(
                    f"tensor {name!r}: starts at byte {entry.start:,}, so it {what} ({end:,})"
                )
            end = entry.end
        present = self.size - 8 - length
        if end != present:
            what = "is truncated" if end > present else "has bytes behind its last tensor"
            self.fail(f"{what}: the tensors take {end:,} bytes, and {present:,} are there")
        return entries, metadata[KEY], 8 + length

    def _entry(self, name: str, entry: Any) -> _Tensor:
        if not _TENSOR_NAME.fullmatch(name):
            self.fail(
                f"tensor {short(name)}: an SFT has the tensors val, idx, ptr and dense.N, no others"
            )
        at = f"tensor {name!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            self.fail(f"{at}: must have dtype, shape and data_offsets, found {short(entry)}")
        allowed = {"idx": ("U16",), "ptr": ("U32", "U64"), "val": ("F32", "BF16", "F16")}.get(
            name, ("F32", "BF16", "F16", "F64")
        )
        dtype = entry["dtype"]
        if dtype not in allowed:
            self.fail(f"{at}: its dtype must be {' or '.join(allowed)}, found {short(dtype)}")
        shape, numel = self._shape(at, entry["shape"])
        if not name.startswith("dense") and len(shape) != 1:
            self.fail(f"{at}: must have one dimension, found shape {list(shape)}")
        offsets = entry["data_offsets"]
        if (
            not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(type(offset) is int for offset in offsets)
            or not 0 <= offsets[0] <= offsets[1]
        ):
            self.fail(f"{at}: data_offsets must be two ascending integers, found {short(offsets)}")
        if offsets[1] - offsets[0] != numel * _WIDTHS[dtype]:
            self.fail(
                f"{at}: shape {list(shape)} of {dtype} takes {numel * _WIDTHS[dtype]:,} bytes, and "
                f"its offsets span {offsets[1] - offsets[0]:,}"
            )
        return _Tensor(dtype, shape, *offsets)

    # Rules 4 and 5: the document.

    def _document(self, text: str) -> dict[str, Any]:
        document = parse_json(f"{self.path}: metadata", text)
        if not isinstance(document, dict):
            self.fail("metadata: must be a JSON object")
        if document.get("format") != "sft":
            self.fail(f"format: must be 'sft', found {short(document.get('format'))}")
        version = document.get("version")
        if (
            not isinstance(version, list)
            or len(version) != 2
            or not all(type(part) is int and part >= 0 for part in version)
        ):
            self.fail(f"version: must be [major, minor], found {short(version)}")
        if version[0] != VERSION[0]:
            self.fail(
                f"version: the file has format version {version[0]}.{version[1]}, and this release "
                f"reads {VERSION[0]}.x; install a release of sparse-ft that reads it"
            )
        if version[1] > VERSION[1]:
            self.note = (
                f" (the file has format version {version[0]}.{version[1]}, newer than the "
                f"{VERSION[0]}.{VERSION[1]} that this release knows)"
            )
        self._fields("metadata", document, _REQUIRED, _OPTIONAL)
        if document["tile"] != TILE or type(document["tile"]) is not int:
            self.fail(f"tile: must be {TILE}, found {short(document['tile'])}")
        for key in ("nnz", "numel"):
            self._integer(key, document[key])
        for key in _OPTIONAL:
            if key in document and document[key] in (None, "", [], {}):
                self.fail(f"{key}: is empty; an empty field is left out")
        if not re.fullmatch(r"[0-9a-f]{64}", str(document["content_id"])):
            self.fail(
                f"content_id: must be 64 hex digits (lower case), "
                f"found {short(document['content_id'])}"
            )
        return document

    def _fields(
        self, at: str, value: Any, required: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> None:
        if not isinstance(value, dict):
            self.fail(f"{at}: must be a JSON object, found {short(value)}")
        for key in required:
            if key not in value:
                self.fail(f"{at}: the field {key!r} is missing")
        extra = sorted(set(value) - {*required, *optional})
        # A later minor version may say more; what this release does not know it leaves alone.
        if extra and not self.note:
            self.fail(f"{at}: there is no field {short(extra[0])} in version 1.0")

    def _integer(self, at: str, value: Any, limit: int = (1 << 63) - 1) -> int:
        if type(value) is not int or not 0 <= value <= limit:
            self.fail(f"{at}: must be an integer from 0 to {limit}, found {short(value)}")
        return value

    def _shape(self, at: str, shape: Any) -> tuple[tuple[int, ...], int]:
        if not isinstance(shape, list) or len(shape) > MAX_DIMS:
            self.fail(
                f"{at}: shape must be a list of at most {MAX_DIMS} sizes, found {short(shape)}"
            )
        # A size of 0 does not excuse the others.
        if math.prod(max(self._integer(f"{at}: shape", n), 1) for n in shape) > MAX_NUMEL:
            self.fail(f"{at}: shape {short(shape)} has more than 2^48 elements")
        return tuple(shape), math.prod(shape)

    # Rules 5 to 7: the tensors that the document names.

    def _parameters(self, document: dict[str, Any]) -> tuple[Layout, list[str], dict[str, Any]]:
        meta = {key: document[key] for key in ("kind", "value_loss", *_OPTIONAL) if key in document}
        if self.note:
            meta |= _of_this_version(meta)
        params, dense = document["params"], document["dense"]
        for key, value in (("params", params), ("dense", dense)):
            if not isinstance(value, list) or len(value) > MAX_TENSORS:
                self.fail(f"{key}: must be a list of at most {MAX_TENSORS:,} items")
        names: list[str] = []
        shapes: list[tuple[int, ...]] = []
        nnz = numel = 0
        for i, item in enumerate(params):
            at = f"params[{i}]"
            self._fields(at, item, ("n", "s", "k"), ("d", "a"))
            names.append(check_name(f"{at}: n", item["n"]))
            at = f"params[{i}] {item['n']!r}"
            shape, own = self._shape(f"{at}: s", item["s"])
            shapes.append(shape)
            self._integer(f"{at}: k", item["k"])
            if item["k"] > own:
                self.fail(f"{at}: k = {item['k']:,} entries of {own:,} elements")
            nnz, numel = nnz + item["k"], numel + own
            if "d" in item:
                if item["d"] not in ("F32", "BF16", "F16"):
                    self.fail(f"{at}: d must be F32, BF16 or F16, found {short(item['d'])}")
                meta.setdefault("dtypes", {})[item["n"]] = item["d"]
            if "a" in item:
                if not isinstance(item["a"], list) or not item["a"]:
                    self.fail(f"{at}: a must be a list of names, found {short(item['a'])}")
                meta.setdefault("aliases", {})[item["n"]] = item["a"]
        self._sorted("params", names)
        for key, total in (("nnz", nnz), ("numel", numel)):
            if document[key] != total:
                self.fail(f"{key}: is {document[key]:,}, and the parameters add up to {total:,}")
        heads: list[str] = []
        for i, item in enumerate(dense):
            at = f"dense[{i}]"
            self._fields(at, item, ("n", "t", "role"))
            heads.append(check_name(f"{at}: n", item["n"]))
            if item["t"] != f"dense.{i}":
                self.fail(f"{at}: t must be 'dense.{i}', found {short(item['t'])}")
            if item["role"] not in ("head", "param"):
                self.fail(f"{at}: role must be 'head' or 'param', found {short(item['role'])}")
            if item["role"] == "param":
                meta.setdefault("dense_roles", {})[item["n"]] = "param"
        self._sorted("dense", heads)
        layout = Layout(tuple(names), tuple(shapes))
        return layout, heads, checked_meta(meta, layout, heads)

    def _sorted(self, at: str, names: list[str]) -> None:
        for before, after in pairwise(names):
            if before >= after:
                self.fail(f"{at}: must be sorted by name without repetition; {before!r}, {after!r}")

    def _match(
        self,
        document: dict[str, Any],
        layout: Layout,
        heads: list[str],
        entries: dict[str, _Tensor],
    ) -> None:
        nnz = document["nnz"]
        expected = {"val", "idx", "ptr", *(f"dense.{i}" for i in range(len(heads)))}
        for name in sorted(expected - set(entries)):
            self.fail(f"tensor {name!r} is missing")
        for name in sorted(set(entries) - expected):
            self.fail(f"tensor {name!r} is not in the list `dense` of the metadata")
        for name in ("idx", "val"):
            if entries[name].shape != (nnz,):
                self.fail(
                    f"tensor {name!r}: {entries[name].shape[0]:,} elements, and nnz = {nnz:,}"
                )
        tiles = sum(-(-numel // TILE) for numel in layout.numels)
        if entries["ptr"].shape != (tiles + 1,):
            self.fail(
                f"tensor 'ptr': {entries['ptr'].shape[0]:,} elements; the {tiles:,} tiles of the "
                f"parameters need {tiles + 1:,}"
            )
        wanted = "U64" if nnz >= WIDE else "U32"
        if entries["ptr"].dtype != wanted:
            self.fail(
                f"tensor 'ptr': must be {wanted} for nnz = {nnz:,}, found {entries['ptr'].dtype}"
            )

    # Rules 9 to 11: the content, on a private copy.

    def _content(
        self,
        read: _Read,
        entries: dict[str, _Tensor],
        layout: Layout,
        document: dict[str, Any],
    ) -> tuple[Support, Tensor, int]:
        """Support and values, and how many of these are 0."""
        nnz = document["nnz"]
        raw = read(entries["ptr"])
        stored = raw.view("<u8" if entries["ptr"].dtype == "U64" else "<u4")
        if int(stored.max(initial=0)) > nnz:
            self.fail(f"ptr: runs to {int(stored.max()):,}, beyond nnz = {nnz:,}")
        ptr = stored.astype(np.int64)
        starts = ptr[layout.tile_starts]
        idx = torch.from_numpy(read(entries["idx"]).view(np.int16)).view(torch.uint16)
        val = _tensor(read, entries["val"])
        pointers = torch.from_numpy(ptr)
        code, tile, entry, zeros = check_support(layout.lengths, idx, pointers, val).tolist()
        if code:
            where = ""
            if layout.n_tiles:
                name, first = layout.locate(tile)
                where = f" (in {name!r}, the tile from flat index {first:,} on, entry {entry:,})"
            what = {
                1: f"ptr: must run from 0 to nnz = {nnz:,}, found {ptr[0]:,} to {ptr[-1]:,}",
                2: "ptr: decreases, or gives a tile more entries than it has elements",
                3: "idx: is not strictly ascending inside its tile",
                4: "idx: points beyond the end of its parameter",
                5: "val: holds a value that is NaN or infinite",
            }[code]
            self.fail(what + where)
        for name, item, count in zip(
            layout.names, document["params"], np.diff(starts).tolist(), strict=True
        ):
            if item["k"] != count:
                self.fail(
                    f"params: {name!r} has k = {item['k']:,}, and ptr gives it {count:,} entries"
                )
        return Support(layout, idx, pointers, check=False), val, zeros

    def _copied(self, file: BinaryIO, begin: int) -> _Read:
        return lambda entry: self._bytes(file, begin + entry.start, entry.end - entry.start)

    def _mapped(self, file: BinaryIO, begin: int) -> _Read:
        try:
            mapped = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
        except ValueError:  # no longer so long
            self.fail("became shorter while it was read")
        data = np.frombuffer(mapped, np.uint8)[begin:]

        def read(entry: _Tensor) -> np.ndarray:
            raw = data[entry.start : entry.end]
            # Other writers may begin a tensor between two elements.
            return raw if (begin + entry.start) % _WIDTHS[entry.dtype] == 0 else raw.copy()

        return read

    def _bytes(self, file: BinaryIO, start: int, size: int) -> np.ndarray:
        """Bytes that are there, in memory of our own."""
        buffer = np.empty(size, np.uint8)
        view = buffer.data
        file.seek(start)
        done = 0
        while done < size:
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                self.fail("became shorter while it was read")
            done += count
        return buffer

    def _warn(self, delta: SparseDelta, zeros: int) -> None:
        if not delta.nnz:
            return
        low, high = (float(bound) for bound in torch.aminmax(delta.val))
        if max(-low, high) > LARGE_VALUE:
            warnings.warn(
                f"{self.path}: val runs from {low:.3g} to {high:.3g}; a difference so large is "
                "rarely meant",
                stacklevel=5,
            )
        if 2 * zeros > delta.nnz:
            warnings.warn(
                f"{self.path}: {zeros:,} of {delta.nnz:,} values are 0 and change nothing",
                stacklevel=5,
            )


def _locate(path: str | os.PathLike[str]) -> str:
    given = os.fsdecode(path)
    if "\0" in given:
        raise SFTFileError(f"{given!r}: a path has no NUL character")
    if os.path.isdir(given):
        inside = os.path.join(given, FILE_NAME)
        if os.path.lexists(inside):
            return inside
        legacy = os.path.join(given, LEGACY_NAME)
        if os.path.lexists(legacy):
            return legacy
        raise SFTFileError(
            f"{given}: the folder holds no file {FILE_NAME} (nor {LEGACY_NAME}); name the file "
            "itself"
        )
    if not os.path.exists(given):
        if os.path.islink(given):
            raise SFTFileError(
                f"{given}: is a link to {os.readlink(given)!r}, which does not exist"
            )
        raise SFTFileError(
            f"{given}: there is no such file{_beside(given)}. Give a .safetensors file, a folder "
            f"that holds {FILE_NAME}, or to SparseDelta.load the id of a Hub repository, owner/name"
        )
    return given


def _beside(path: str) -> str:
    """What the folder of a file that is not there holds instead, if there is such a folder."""
    folder = os.path.dirname(path)
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"; {folder} holds {', '.join(map(short, names[:5])) or 'nothing'}{more}"


# --- saying what is in a file -------------------------------------------------------------------


def describe(source: str | os.PathLike[str]) -> dict[str, str | int]:
    """What an SFT holds, field by field, in the order in which to show it. It is checked whole.

    Args:
        source: As `SparseDelta.load` takes it.

    Raises:
        SFTFileError: As `SparseDelta.load`.
    """
    delta = SparseDelta.load(source)
    return dict(_describe(delta, source)) | {
        name: f"{count:,} of {numel:,} entries, {count / delta.nnz:.1%} of all"
        for name, count, numel in _largest(delta)
    }


def _describe(
    delta: SparseDelta, source: str | os.PathLike[str]
) -> Iterator[tuple[str, str | int]]:
    meta = delta.meta
    with_entries = sum(count > 0 for count in delta.support.counts().values())
    where = _locate(source) if os.path.exists(source) else os.fsdecode(source)
    yield "file", where
    if os.path.exists(where):
        yield "bytes", f"{os.path.getsize(where):,}"
    yield "format", f"sft {VERSION[0]}.x"
    yield "kind", delta.kind
    for key in TEXT_FIELDS:
        if meta.get(key):
            yield key, meta[key]
    yield "entries", f"{delta.nnz:,} of {delta.layout.numel:,}"
    yield "density", f"{delta.density:.4%}"
    yield "parameters", f"{len(delta.layout):,}, {with_entries:,} of them with entries"
    yield "heads", _heads(delta)
    yield "base", _base(meta.get("base", {}))
    yield "trained on", _terms(meta.get("trained_on", [])) or "the base alone"
    yield "values", _values(delta)
    for key, value in meta.get("recipe", {}).items():
        said = _terms(value) if key == "merged_from" else ""
        yield f"recipe: {key}", said or (value if isinstance(value, str) else canonical(value))
    yield "content id", delta.content_id


def _largest(delta: SparseDelta) -> list[tuple[str, int, int]]:
    """Name, entries and elements of the tensors with the most entries, ten at most."""
    counts = {name: count for name, count in delta.support.counts().items() if count}
    numels = dict(zip(delta.layout.names, delta.layout.numels, strict=True))
    names = sorted(counts, key=lambda n: (-counts[n], n))[:10]
    return [(name, counts[name], numels[name]) for name in names]


def _terms(items: Any) -> str:
    """SFTs and their weights; "" where that is not what the value is, as a recipe is free."""
    try:
        return ", ".join(f"{item['alpha']:g} × {item['id'][:16]}…" for item in items)
    except (KeyError, TypeError, ValueError):
        return ""


def _heads(delta: SparseDelta) -> str:
    parts = [
        f"{name} {'×'.join(map(str, head.shape)) or 'scalar'} "
        f"{str(head.dtype).removeprefix('torch.')}"
        for name, head in delta.heads.items()
    ]
    return ", ".join(parts) or "none"


def _base(base: Mapping[str, Any]) -> str:
    parts = [str(base[key]) for key in ("id", "revision", "arch") if key in base]
    if "digest_f32" in base:
        parts.append(f"digest {base['digest_f32']} (fp32)")
    if "digest_bf16" in base:
        parts.append(f"digest {base['digest_bf16']} (bf16)")
    return ", ".join(parts) or "not recorded"


def _values(delta: SparseDelta) -> str:
    loss = delta.meta.get("value_loss", "none")
    said = str(delta.val.dtype).removeprefix("torch.")
    said += ", nothing lost in storage" if loss == "none" else f", rounded to {loss}"
    if not delta.nnz:
        return said
    low, high = (float(bound) for bound in torch.aminmax(delta.val))
    zeros = int((delta.val == 0).sum())
    return f"{said}, {low:.3g} to {high:.3g}, {zeros:,} zeros"
