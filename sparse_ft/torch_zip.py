"""What `torch.save` wrote, read without `torch.load`: nothing in the file is imported or called.

A file is a zip archive of stored members: `data.pkl`, a pickle, and `data/0`, `data/1`, …, the
bytes of storages. The pickle is run by a machine of our own, which knows the instructions that
`torch.save` writes and no others; the names it may mention are those of `_GLOBALS`, and each stands
for a function of this module. Tensors are views of the file, mapped copy-on-write, so that a
checkpoint costs nothing before it is read.

No size is believed: every one is compared, in unbounded integers, with the bytes that are there.
`docs/legacy-format.md` describes archive and instructions.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from .files import MAX_BYTES, MAX_DIMS, MAX_NUMEL, SFTFileError, open_regular
from .metadata import short

__all__ = ["load"]

# Bounds the work and the memory (150 bytes each at most) that a pickle can ask for. `torch.save`
# writes about 50 instructions per tensor.
MAX_INSTRUCTIONS = 1 << 22
MAX_DEPTH = 64
# Long lists of integers fill a pickle, two bytes each and more: 130 million of them.
MAX_PICKLE = 1 << 28
# Names are shorter.
MAX_TEXT = 1 << 16
# Bytes are those of one of numpy's numbers.
_MAX_BYTES = 16
# Python's pickler writes a list in batches of so many items.
_BATCH = 1000
# Bytes of a pickle in which runs are looked for at a time.
_BLOCK = 1 << 20


def load(
    path: str | os.PathLike[str],
    *,
    max_bytes: int = MAX_BYTES,
    mapped: bool = True,
    packed: bool = False,
) -> Any:
    """Reads a file that `torch.save` wrote.

    Args:
        path: The file.
        max_bytes: Larger files are refused.
        mapped: Tensors are views of the file, copied page by page when they are written to; the
            file must not be shortened while they live. Otherwise it is read into memory, and the
            checksums of its storages are compared too.
        packed: Runs of integers in a list may come as int32 vectors, which is faster: an item of
            the list is then an integer or a `np.ndarray` of several.

    Returns:
        What was saved, of dict (ordered ones included), list, tuple (`torch.Size` included), str,
        bytes, int, float, bool, None, numpy numbers and CPU tensors. Each container stands in one
        place: nothing is larger when it is unfolded.

    Raises:
        SFTFileError: The file is missing, no such archive, damaged, or holds anything else.
    """
    return _Archive(os.fsdecode(path), max_bytes, mapped).load(packed)


# --- the archive --------------------------------------------------------------------------------

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF


class _Member(NamedTuple):
    """A file in the archive: where its bytes are, and their checksum (0: none was made)."""

    start: int
    end: int
    crc: int


class _Archive:
    """One reading of one file."""

    def __init__(self, path: str, max_bytes: int, mapped: bool) -> None:
        self.path = path
        self.mapped = mapped
        self.storages: dict[str, tuple[torch.dtype, Tensor]] = {}
        if "\0" in path:
            raise SFTFileError(f"{path!r}: a path has no NUL character")
        descriptor, self.size = open_regular(path, "give a file that torch.save wrote")
        with open(descriptor, "rb", buffering=0) as file:
            if self.size > max_bytes:
                self.fail(f"is {self.size:,} bytes long, and max_bytes = {max_bytes:,}")
            if self.size < _END.size:
                self.fail(f"is {self.size} bytes long, too short for a PyTorch file")
            try:
                if mapped:
                    self.data = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_COPY)
                else:
                    self.data = self._copy(file)
            except (OSError, ValueError) as error:  # ValueError: it became shorter meanwhile
                raise SFTFileError(f"{path}: cannot be read: {error}") from error
        self.members = self._members()

    data: mmap.mmap | memoryview

    def fail(self, message: str) -> NoReturn:
        raise SFTFileError(f"{self.path}: {message}")

    def _copy(self, file: Any) -> memoryview:
        view = np.empty(self.size, np.uint8).data
        done = 0
        while done < self.size:
            count = file.readinto(view[done:])
            if not count:
                self.fail("became shorter while it was read")
            done += count
        return view

    def load(self, packed: bool) -> Any:
        pickles = [name for name in self.members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            self.fail(
                f"must hold one file data.pkl in one folder, found {short(pickles)}; "
                "it is a zip archive, but none of torch.save"
            )
        self.prefix = pickles[0].removesuffix("data.pkl")
        order = self.members.get(f"{self.prefix}byteorder")
        if order is not None and (said := self._bytes(order, 16)) != b"little":
            self.fail(f"byteorder: must be little, found {short(said)}")
        member = self.members[pickles[0]]
        if (size := member.end - member.start) > MAX_PICKLE:
            self.fail(f"data.pkl: is {size:,} bytes long; at most {MAX_PICKLE:,}")
        code = self._bytes(member)
        if zlib.crc32(code) != member.crc and member.crc:
            self.fail("data.pkl: does not have its checksum; the file is damaged")
        return _Pickle(code, self.storage, self.fail, packed).run()

    def _bytes(self, member: _Member, most: int | None = None) -> bytes:
        end = member.end if most is None else min(member.end, member.start + most)
        return bytes(self.data[member.start : end])

    def _unpack(self, what: str, layout: struct.Struct, mark: bytes, at: int) -> tuple[Any, ...]:
        if not 0 <= at <= self.size - layout.size:
            self.fail(f"zip: {what} lies outside the file; it is damaged or cut off")
        fields = layout.unpack_from(self.data, at)
        if fields[0] != mark:
            self.fail(f"zip: {what} is not where it should be; the file is damaged or cut off")
        return fields

    def _members(self) -> dict[str, _Member]:
        start = bytes(self.data[:2])
        if start == b"\x80\x02" or bytes(self.data[257:262]) == b"ustar":
            self.fail(
                "is a file of PyTorch 1.5 or older, or a plain pickle, not a zip archive. "
                "Load it with a PyTorch that you trust it with, and torch.save it again"
            )
        if start != b"PK":
            self.fail("is no zip archive, so torch.save did not write it")
        end = self.size - _END.size
        what = "the end of its directory"
        _, _, _, _, count, length, at, comment = self._unpack(what, _END, b"PK\5\6", end)
        if comment:
            self.fail("zip: has a comment, which torch.save does not write")
        if bytes(self.data[max(0, end - _LOCATOR_64.size) :][:4]) == b"PK\6\7":
            end -= _LOCATOR_64.size
            _, _, end_64, _ = self._unpack(what, _LOCATOR_64, b"PK\6\7", end)
            fields = self._unpack(what, _END_64, b"PK\6\6", end_64)
            long = fields[7:]
            for short_field, long_field, full in zip(
                (count, length, at), long, (_FULL_16, _FULL_32, _FULL_32), strict=True
            ):
                if short_field not in (long_field, full):
                    self.fail("zip: the two ends of its directory disagree")
            count, length, at = long
            end = end_64
        if at + length != end:
            self.fail("zip: its directory does not end where it should; the file is damaged")
        if count * (_CENTRAL.size + _LOCAL.size) > self.size:
            self.fail(f"zip: declares {count:,} files, more than it has room for")
        members: dict[str, _Member] = {}
        spans = [(at, end)]
        for _ in range(count):
            at = self._entry(at, end, members, spans)
        if at != end:
            self.fail(f"zip: its directory has more than the {count:,} files it declares")
        for (_, stop), (begin, _) in pairwise(sorted(spans)):
            if begin < stop:
                self.fail("zip: two of its files overlap")
        return members

    def _entry(
        self, at: int, end: int, members: dict[str, _Member], spans: list[tuple[int, int]]
    ) -> int:
        """Reads one entry of the directory; returns where the next begins."""
        fields = self._unpack("an entry of its directory", _CENTRAL, b"PK\1\2", at)
        flags, method = fields[3], fields[4]
        crc, packed, size, n_name, n_extra, n_comment = fields[7:13]
        header = fields[16]
        begin = at + _CENTRAL.size
        after: int = begin + n_name + n_extra + n_comment
        if after > end:
            self.fail("zip: an entry of its directory is cut off")
        raw_name = bytes(self.data[begin : begin + n_name])
        try:
            name = raw_name.decode()
        except UnicodeDecodeError:
            self.fail(f"zip: {short(raw_name)}: a file name must be UTF-8")
        if name in members:
            self.fail(f"zip: holds two files {short(name)}")
        if method or flags & 1:
            self.fail(
                f"zip: {short(name)} is compressed or encrypted, which torch.save does not do"
            )
        wide = self._wide(begin + n_name, n_extra)
        size, packed, header = (
            next(wide, value) if value == _FULL_32 else value for value in (size, packed, header)
        )
        if packed != size:
            self.fail(f"zip: {short(name)} is stored in {packed:,} bytes and has {size:,}")
        local = self._unpack(f"the file {short(name)}", _LOCAL, b"PK\3\4", header)
        begin = header + _LOCAL.size
        if bytes(self.data[begin : begin + n_name]) != raw_name or local[9] != n_name:
            self.fail(f"zip: {short(name)} has another name where its bytes are")
        begin += n_name + local[10]
        if begin + size > self.size:
            self.fail(f"zip: {short(name)} declares {size:,} bytes, more than the file holds")
        members[name] = _Member(begin, begin + size, crc)
        spans.append((header, begin + size))
        return after

    def _wide(self, at: int, length: int) -> Iterator[int]:
        """The 64-bit fields of an entry whose 32-bit fields are full."""
        end = at + length
        while at + 4 <= end:
            kind, size = struct.unpack_from("<2H", self.data, at)
            at += 4
            if kind == 1:
                raw = bytes(self.data[at : min(at + size, end)])
                return iter(struct.unpack(f"<{len(raw) // 8}Q", raw[: len(raw) // 8 * 8]))
            at += size
        return iter(())

    def storage(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        """The elements of a storage, as a vector."""
        known = self.storages.get(key)
        if known is None:
            member = self.members.get(f"{self.prefix}data/{key}")
            if member is None:
                self.fail(f"storage {short(key)}: the file holds no data/{short(key)}")
            size = member.end - member.start
            if numel * dtype.itemsize != size:
                self.fail(
                    f"storage {short(key)}: {numel:,} elements of {dtype} are declared, and "
                    f"{size:,} bytes are there"
                )
            if member.start % dtype.itemsize:
                self.fail(f"storage {short(key)}: is not aligned to its {dtype}")
            if not self.mapped and member.crc:
                found = zlib.crc32(self.data[member.start : member.end])
                if found != member.crc:
                    self.fail(
                        f"storage {short(key)}: does not have its checksum; the file is damaged"
                    )
            if numel:
                vector = torch.frombuffer(self.data, dtype=dtype, count=numel, offset=member.start)
            else:
                vector = torch.zeros(0, dtype=dtype)
            known = self.storages[key] = (dtype, vector)
        if known[0] != dtype or len(known[1]) != numel:
            self.fail(f"storage {short(key)}: is declared twice, differently")
        return known[1]


# --- what a pickle may name ---------------------------------------------------------------------


class _Refused(Exception):
    """What is wrong with a call or a value; the machine adds where."""


@dataclass(frozen=True)
class _Global:
    """A name that a pickle may mention, and what stands for it here."""

    name: str
    call: Callable[..., Any]


@dataclass(frozen=True)
class _Storage:
    """Bytes of the archive, as elements."""

    data: Tensor


def _is_sizes(value: Any) -> bool:
    return type(value) is tuple and all(type(n) is int and 0 <= n <= MAX_NUMEL for n in value)


def _size(sizes: Any) -> tuple[int, ...]:
    if not _is_sizes(sizes) or len(sizes) > MAX_DIMS or prod(n or 1 for n in sizes) > MAX_NUMEL:
        raise _Refused(
            f"a torch.Size must be a tuple of at most {MAX_DIMS} integers from 0 on, of product "
            f"2^48 at most, found {_shown(sizes)}"
        )
    # A tuple of its own: the machine counts in how many places each stands.
    return (*list(sizes),)


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, _: Any = None
) -> Tensor:
    if type(storage) is not _Storage:
        raise _Refused("a tensor must have a storage")
    data = storage.data
    if type(offset) is not int or offset < 0:
        raise _Refused(f"a tensor's offset must be an integer ≥ 0, found {_shown(offset)}")
    if type(grad) is not bool or type(hooks) is not dict or hooks:
        raise _Refused("a tensor must come without hooks")
    size = _size(size)
    if not _is_sizes(stride) or len(stride) != len(size):
        raise _Refused(
            f"a tensor of shape {_shown(size)} must have as many strides from 0 to 2^48, "
            f"found {_shown(stride)}"
        )
    if 0 in size:
        return torch.zeros(size, dtype=data.dtype)
    # Each stride must pass over all that the smaller ones reach: no two elements share a place.
    reach = 0
    for step, length in sorted(zip(stride, size, strict=True)):
        if length > 1:
            if step <= reach:
                raise _Refused(
                    f"a tensor of shape {size} with strides {stride} shows elements more than once"
                )
            reach += step * (length - 1)
    if offset + reach >= len(data):
        raise _Refused(
            f"a tensor of shape {size} with strides {stride} at offset {offset:,} reaches beyond "
            f"its storage of {len(data):,} elements"
        )
    return data.as_strided(size, stride, offset)


def _parameter(data: Any, grad: Any, hooks: Any) -> Tensor:
    if not isinstance(data, Tensor) or type(grad) is not bool or type(hooks) is not dict or hooks:
        raise _Refused("a parameter must be a tensor without hooks")
    return data


_NUMBERS = {
    code: np.dtype(f"<{code}")
    for code in ("i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "f8", "f4", "f2", "b1")
}


def _dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    if not isinstance(code, str) or code not in _NUMBERS:
        raise _Refused(f"a numpy type must be one of {', '.join(_NUMBERS)}, found {_shown(code)}")
    return _NUMBERS[code]


def _scalar(dtype: Any, raw: Any) -> Any:
    if not isinstance(dtype, np.dtype) or type(raw) is not bytes or len(raw) != dtype.itemsize:
        raise _Refused("a numpy number must be a type and as many bytes as it has")
    return np.frombuffer(raw, dtype)[0]


def _encode(text: Any, encoding: Any) -> bytes:
    # Longer ones would be copied at every call, of which there can be millions.
    if type(text) is not str or len(text) > _MAX_BYTES or encoding != "latin1":
        raise _Refused(f"bytes must be written as text in latin1, at most {_MAX_BYTES} of them")
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise _Refused("bytes are written as text with characters beyond latin1") from None


def _not_called(*_: Any) -> NoReturn:
    raise _Refused("a storage type is not to be called")


_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "torch Size": _size,
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "numpy dtype": _dtype,
    "numpy.core.multiarray scalar": _scalar,
    "numpy._core.multiarray scalar": _scalar,
    "_codecs encode": _encode,
    **dict.fromkeys(_STORAGES, _not_called),
}
_GLOBALS = {name: _Global(name, call) for name, call in _CALLS.items()}


# --- the machine --------------------------------------------------------------------------------

_CONTAINERS = (dict, list, tuple)
_LEAVES = (Tensor, np.generic, np.ndarray, str, bytes, int, float, bool, type(None))


def _shown(value: Any) -> str:
    """A value in a message; a container could be deep, or large when it is unfolded."""
    if type(value) is tuple and len(value) <= MAX_DIMS:
        return "({})".format(", ".join(_shown(n) if type(n) is int else "…" for n in value))
    plain = isinstance(value, str | bytes | int | float | None)
    return short(value) if plain else f"a {type(value).__name__.lstrip('_')}"


class _Pickle:
    """Runs the instructions of a pickle of protocol 2 (Python, Lib/pickle.py and pickletools)."""

    def __init__(
        self,
        code: bytes,
        storage: Callable[[str, torch.dtype, int], Tensor],
        fail: Callable[[str], NoReturn],
        packed: bool,
    ) -> None:
        self.code = code
        self.storage = storage
        self.fail_file = fail
        self.at = 0
        # What lies above the last MARK, and what lay above each before it.
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        # Containers that stand in another, by identity; kept, so that no identity is used again.
        self.placed: dict[int, Any] = {}
        self.runs = _Runs(code) if packed else None

    def fail(self, message: str) -> NoReturn:
        self.fail_file(f"data.pkl, byte {self.at:,}: {message}")

    def run(self) -> Any:
        if self.code[:2] != b"\x80\x02":
            self.fail("must begin as a pickle of protocol 2, which torch.save writes")
        self.at = 2
        try:
            for _ in range(MAX_INSTRUCTIONS):
                if self._step():
                    break
            else:
                self.fail(f"has more than {MAX_INSTRUCTIONS:,} instructions")
            root = self.stack.pop()
        except _Refused as error:
            self.fail(str(error))
        except IndexError:
            self.fail("an instruction lacks what it works on; the pickle is damaged or cut off")
        if self.stack or self.below:
            self.fail("ends with values left over")
        self._check_tree(root)
        if self.runs is not None:
            self.runs.fill_in()
        return root

    def _check_tree(self, root: Any) -> None:
        if id(root) in self.placed:
            self.fail("what was saved contains itself")
        level = [root]
        for _ in range(MAX_DEPTH):
            below: list[Any] = []
            for item in level:
                if isinstance(item, dict):
                    below += item.values()
                elif isinstance(item, list | tuple):
                    below += item
                elif not isinstance(item, _LEAVES):
                    said = item.name if type(item) is _Global else type(item).__name__
                    self.fail(f"holds {said!r} itself, which is no value")
            level = below
            if not level:
                return
        self.fail(f"is nested more than {MAX_DEPTH} deep")

    def _take(self, size: int) -> bytes:
        """The next bytes of the pickle."""
        raw = self.code[self.at : self.at + size]
        if len(raw) < size:
            raise IndexError
        self.at += size
        return raw

    def _int(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _line(self) -> str:
        end = self.code.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise _Refused("names something in more than 256 bytes")
        return self._take(end + 1 - self.at)[:-1].decode("ascii", "replace")

    def _above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _place(self, items: list[Any]) -> list[Any]:
        """Notes that the containers among some items stand in another."""
        for item in items:
            if isinstance(item, _CONTAINERS) and item != ():
                if id(item) in self.placed:
                    raise _Refused(f"a {type(item).__name__} stands in two places")
                self.placed[id(item)] = item
        return items

    def _append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise _Refused(f"appends to {_shown(self.stack[-1])}, not to a list")
        self.stack[-1] += self._place(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise _Refused(f"sets items of {_shown(target)}, not of a dict, or without values")
        for key, value in zip(items[::2], self._place(items[1::2]), strict=True):
            # Numbers of 32 bits: larger ones can be chosen to collide.
            if type(key) is not str and (type(key) is not int or abs(key) > _FULL_32):
                raise _Refused(f"a key must be text or a small integer, found {_shown(key)}")
            if key in target:
                raise _Refused(f"the key {short(key)} is there twice")
            target[key] = value

    def _call(self, function: Any, arguments: Any) -> Any:
        if type(function) is not _Global or type(arguments) is not tuple:
            raise _Refused("calls what is no function")
        self._place([arguments])
        try:
            return function.call(*arguments)
        except TypeError:
            raise _Refused(f"calls {function.name!r} with {len(arguments)} arguments") from None

    def _global(self) -> _Global:
        name = f"{self._line()} {self._line()}"
        if name not in _GLOBALS:
            raise _Refused(
                f"names {short(name.replace(' ', '.'))}, which is none of what tensors and numbers "
                "are saved with; the file was not read further, and nothing was run"
            )
        return _GLOBALS[name]

    def _persistent(self, what: Any) -> _Storage:
        if type(what) is not tuple or len(what) != 5 or what[0] != "storage":
            raise _Refused("a storage must be named by ('storage', type, key, location, numel)")
        _, kind, key, _, numel = what
        if type(kind) is not _Global or kind.name not in _STORAGES:
            raise _Refused("a storage's type must be one of torch's storages")
        if type(key) is not str or type(numel) is not int or numel < 0:
            raise _Refused(
                f"a storage must have a key and a length ≥ 0, found {_shown(key)}, {_shown(numel)}"
            )
        return _Storage(self.storage(key, _STORAGES[kind.name], numel))

    def _build(self, state: Any) -> None:
        """State of an ordered dict (a model's `_metadata`) is dropped; that of a numpy type says
        that it is little-endian."""
        target = self.stack[-1]
        if type(target) is dict and type(state) is dict:
            return
        if isinstance(target, np.dtype) and type(state) is tuple and len(state) > 1:
            if state[1] not in ("<", "|"):
                raise _Refused("a numpy type must be little-endian")
            return
        raise _Refused(f"gives {_shown(target)} a state, which only dicts and numpy types have")

    def _step(self) -> bool:
        """One instruction; True after the last."""
        stack = self.stack
        match self._take(1):
            case b"K":  # BININT1
                stack.append(self._take(1)[0])
            case b"M":  # BININT2
                stack.append(self._int(2))
            case b"J":  # BININT
                stack.append(self._int(4, signed=True))
            case b"q":  # BINPUT
                self.memo[self._int(1)] = stack[-1]
            case b"r":  # LONG_BINPUT
                self.memo[self._int(4)] = stack[-1]
            case b"h":  # BINGET
                stack.append(self._known(self._int(1)))
            case b"j":  # LONG_BINGET
                stack.append(self._known(self._int(4)))
            case b"(":  # MARK
                end = self.runs.take(self.at, stack) if self.runs is not None else 0
                if end:
                    self.at = end
                else:
                    self.below.append(stack)
                    self.stack = []
            case b"t":  # TUPLE
                items = self._above_mark()
                self.stack.append(tuple(self._place(items)))
            case b")":  # EMPTY_TUPLE
                stack.append(())
            case b"\x85":  # TUPLE1
                stack.append(tuple(self._place(self._pop(1))))
            case b"\x86":  # TUPLE2
                stack.append(tuple(self._place(self._pop(2))))
            case b"\x87":  # TUPLE3
                stack.append(tuple(self._place(self._pop(3))))
            case b"X":  # BINUNICODE
                stack.append(self._text(self._int(4)))
            case b"R":  # REDUCE
                stack.append(self._call(*self._pop(2)))
            case b"Q":  # BINPERSID
                stack.append(self._persistent(stack.pop()))
            case b"c":  # GLOBAL
                stack.append(self._global())
            case b"]":  # EMPTY_LIST
                stack.append([])
            case b"}":  # EMPTY_DICT
                stack.append({})
            case b"a":  # APPEND
                self._append(self._pop(1))
            case b"e":  # APPENDS
                items = self._above_mark()
                self._append(items)
            case b"s":  # SETITEM
                self._set(self._pop(2))
            case b"u":  # SETITEMS
                items = self._above_mark()
                self._set(items)
            case b"b":  # BUILD
                self._build(stack.pop())
            case b"N":  # NONE
                stack.append(None)
            case b"\x88":  # NEWTRUE
                stack.append(True)
            case b"\x89":  # NEWFALSE
                stack.append(False)
            case b"G":  # BINFLOAT
                stack.append(struct.unpack(">d", self._take(8))[0])
            case b"\x8a":  # LONG1
                size = self._int(1)
                if size > 8:
                    raise _Refused("an integer takes more than 64 bits")
                stack.append(self._int(size, signed=True))
            case b".":  # STOP
                return True
            case other:
                raise _Refused(f"has the instruction {other!r}, which torch.save does not write")
        return False

    def _known(self, index: int) -> Any:
        if index not in self.memo:
            raise _Refused(f"refers to the value {index:,}, which is not there")
        return self.memo[index]

    def _text(self, size: int) -> str:
        if size > MAX_TEXT:
            raise _Refused(f"has a text of {size:,} bytes; at most {MAX_TEXT:,}")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            raise _Refused("text is not UTF-8") from None


class _Runs:
    """Long runs of integers, decoded many at a time.

    A list of millions is a chain of batches, MARK, at most 1,000 integers, APPENDS: where one ends
    is known only once all before it are read, since an instruction takes two, three or five bytes.
    But MARK follows the end of a batch or the beginning of a list, so all places behind such bytes
    are followed at once, instruction by instruction; those that are no batch, but bytes of an
    integer that look so, are simply never asked for.

    Args:
        code: The pickle.
    """

    _WIDTHS = np.zeros(256, np.int8)
    _WIDTHS[list(b"KMJ")] = 2, 3, 5

    def __init__(self, code: bytes) -> None:
        # What an instruction cut off at the end would need.
        self.code = np.frombuffer(code + bytes(8), np.uint8)
        starts = self._starts(len(code) // 64)
        ends = self._follow(starts, None)
        full = (self.code[ends] == ord("e")) & (ends > starts)
        self.ends = dict(zip(starts[full].tolist(), ends[full].tolist(), strict=True))
        self.taken: list[tuple[list[Any], int, int]] = []

    def _starts(self, most: int) -> np.ndarray:
        """Where runs may begin; nowhere, if there are more places: they hold few integers then."""
        found = [np.zeros(0, np.int64)]
        count = 0
        for begin in range(0, len(self.code), _BLOCK):
            mark = begin + np.flatnonzero(self.code[begin : begin + _BLOCK] == ord("("))
            one, two, three, five, six = (self.code[mark - n] for n in (1, 2, 3, 5, 6))
            found.append(
                1
                + mark[
                    (one == ord("e"))  # APPENDS
                    | (one == ord("]"))  # EMPTY_LIST
                    | (three == ord("]")) & (two == ord("q"))  # EMPTY_LIST BINPUT
                    | (six == ord("]")) & (five == ord("r"))  # EMPTY_LIST LONG_BINPUT
                ]
            )
            count += len(found[-1])
            if count > most:
                return found[0]
        return np.concatenate(found)

    def take(self, start: int, stack: list[Any]) -> int:
        """Appends the run that begins at a byte to the list on top of the stack; returns where the
        pickle goes on, or 0 if there is no such run."""
        if start not in self.ends or not stack or type(stack[-1]) is not list:
            return 0
        self.taken.append((stack[-1], len(stack[-1]), start))
        stack[-1].append(None)
        return int(self.ends[start]) + 1

    def fill_in(self) -> None:
        """Puts the integers where `take` has kept a place for them."""
        if not self.taken:
            return
        starts = np.array([start for _, _, start in self.taken])
        is_start = np.zeros(len(self.code), np.bool_)
        self._follow(starts, is_start)
        at = np.flatnonzero(is_start)
        values = self.code[at + 1].astype(np.int32)
        kinds = self.code[at]
        two = np.flatnonzero(kinds == ord("M"))
        values[two] |= self.code[at[two] + 2].astype(np.int32) << 8
        four = np.flatnonzero(kinds == ord("J"))
        places = at[four, None] + np.arange(1, 5)
        values[four] = self.code[places].view("<i4").reshape(-1)
        bounds = np.searchsorted(at, [(start, self.ends[start]) for _, _, start in self.taken])
        for (target, index, _), (low, high) in zip(self.taken, bounds.tolist(), strict=True):
            target[index] = values[low:high]

    def _follow(self, starts: np.ndarray, mark: np.ndarray | None) -> np.ndarray:
        """The ends of runs of at most 1,000 integers; their instructions are marked on the way."""
        ends = starts.copy()
        at, run = starts, np.arange(len(starts))
        steps = 0
        for _ in range(_BATCH + 1):
            # Runs that are batches share no byte. Where more is asked for, few are.
            steps += len(at)
            if steps > len(self.code):
                return starts
            width = self._WIDTHS[self.code[at]]
            going = width > 0
            if not going.all():
                ends[run[~going]] = at[~going]
                at, run, width = at[going], run[going], width[going]
            if not len(at):
                break
            if mark is not None:
                mark[at] = True
            at = at + width
        # A longer run is no batch: its end is then no APPENDS, but where it began.
        return ends
