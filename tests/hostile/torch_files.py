"""Files as `torch.save` writes them, and malformed ones, each with one fault.

The archive and the pickle are assembled here by hand, from docs/legacy-format.md, so that anything
can be said in them. In a value, `bytes` are instructions as they stand.
"""

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

# --- pickles ------------------------------------------------------------------------------------


def enc(value) -> bytes:
    """Instructions that leave a value on the stack."""
    if isinstance(value, bytes):
        return value
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if 0 <= value < 256:
            return b"K" + bytes([value])
        if 0 <= value < 65536:
            return b"M" + value.to_bytes(2, "little")
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + value.to_bytes(4, "little", signed=True)
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        raw = value.encode()
        return b"X" + len(raw).to_bytes(4, "little") + raw
    if isinstance(value, tuple):
        return b"(" + b"".join(map(enc, value)) + b"t"
    if isinstance(value, list):
        parts = [value[i : i + 1000] for i in range(0, len(value), 1000)]
        return b"]" + b"".join(b"(" + b"".join(map(enc, part)) + b"e" for part in parts)
    assert isinstance(value, dict)
    return b"}(" + b"".join(enc(k) + enc(v) for k, v in value.items()) + b"u"


def name(module: str, what: str) -> bytes:
    return f"c{module}\n{what}\n".encode()


def call(function: bytes, *arguments) -> bytes:
    return function + enc(arguments) + b"R"


def size(*sizes) -> bytes:
    return call(name("torch", "Size"), tuple(sizes))


def storage(key="0", numel=3, kind="FloatStorage", module="torch") -> bytes:
    return enc(("storage", name(module, kind), key, "cpu", numel)) + b"Q"


EMPTY = name("collections", "OrderedDict") + b")R"


def tensor(key="0", numel=3, shape=(3,), stride=None, offset=0, kind="FloatStorage", hooks=EMPTY):
    if stride is None:
        stride = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage(key, numel, kind), offset, shape, stride, False, hooks)


def scalar(number: int, module="numpy.core.multiarray", order="<") -> bytes:
    """A numpy int64, as published files have it."""
    dtype = call(name("numpy", "dtype"), "i8", False, True)
    dtype += enc((3, order, None, None, None, -1, -1, 0)) + b"b"
    raw = number.to_bytes(8, "little", signed=True).decode("latin1")
    return call(name(module, "scalar"), dtype, call(name("_codecs", "encode"), raw, "latin1"))


def pickled(value) -> bytes:
    return b"\x80\x02" + enc(value) + b"."


# --- archives -----------------------------------------------------------------------------------


FULL = 0xFFFFFFFF  # the field is among the 64-bit ones


@dataclass
class Zip:
    """An archive in parts, to be broken: fields of entries by member, fields of the end."""

    members: list[tuple[str, bytes]]
    entries: dict[str, dict[str, int]] = field(default_factory=dict)
    end: dict[str, int] = field(default_factory=dict)
    comment: bytes = b""
    crc: bool = True
    skew: int = 0  # bytes by which data miss their place
    wide: bool = False  # sizes and places in 64 bits, as above 4 GB

    def build(self) -> bytes:
        body, directory = b"", b""
        for member, data in self.members:
            raw = member.encode("utf-8", "surrogateescape")
            is_said = {
                "flags": 0x800,
                "method": 0,
                "crc": zlib.crc32(data) if self.crc else 0,
                "packed": len(data),
                "size": len(data),
                "header": len(body),
                **self.entries.get(member, {}),
            }
            fields = (is_said["flags"], is_said["method"], 0, 0, is_said["crc"])
            extra = -(len(body) + 30 + len(raw) + 4) % 64 + self.skew
            padding = struct.pack("<2H", 0x4246, extra) + bytes(extra)
            body += struct.pack("<4s5H3I2H", b"PK\3\4", 0, *fields, 0, 0, len(raw), len(padding))
            body += raw + padding + data
            numbers = (is_said["size"], is_said["packed"], is_said["header"])
            more = b""
            if self.wide:
                more = struct.pack("<2H2x2H3Q", 0x9999, 2, 1, 24, *numbers)
                numbers = (FULL, FULL, FULL)
            sizes = (*numbers[1::-1], len(raw), len(more), 0, 0, 0, 0)
            directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, *fields, *sizes, numbers[2])
            directory += raw + more
        said = {
            "count": len(self.members),
            "length": len(directory),
            "start": len(body),
            **self.end,
        }
        numbers = (said["count"], said["count"], said["length"], said["start"])
        end = b""
        if self.wide:
            end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, *numbers)
            end += struct.pack("<4sIQI", b"PK\6\7", 0, len(body) + len(directory), 1)
            numbers = (0xFFFF, 0xFFFF, FULL, FULL)
        end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *numbers, len(self.comment))
        return body + directory + end + self.comment


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def archive(value, *data: bytes, crc=True, **members: bytes) -> Zip:
    """What torch.save writes for a value whose storages are `data`."""
    parts = [("x/data.pkl", value if isinstance(value, bytes) else pickled(value))]
    parts += [(f"x/{member}", raw) for member, raw in {"byteorder": b"little", **members}.items()]
    parts += [(f"x/data/{i}", raw) for i, raw in enumerate(data)]
    return Zip([*parts, ("x/version", b"3\n")], crc=crc)


# --- an SFT, and faults in it -------------------------------------------------------------------

VALUES = (0.5, -0.25, 2.0)
STEPS = [2, 1, 5]
# Column-major positions 2, 3, 8 of a 3 × 4 tensor.
DENSE = np.zeros((3, 4), np.float32)
DENSE[2, 0], DENSE[0, 1], DENSE[2, 2] = VALUES


def sft(steps=STEPS, shape=None, values=None, heads=None, data=VALUES, more=(), **keys) -> Zip:
    entry = {"size": size(3, 4) if shape is None else shape, "index_steps": steps}
    entry["values"] = tensor() if values is None else values
    content = {"diffs": {"w": {**entry, **keys.pop("entry", {})}}, "abs": heads or {}, **keys}
    return archive(content, floats(*data), *more)


def patched(file: Zip, at: str, **fields: int) -> Zip:
    file.entries[f"x/{at}"] = fields
    return file


def deflated() -> Zip:
    raw = zlib.compress(bytes(200_000_000), 9)[2:-4]
    return patched(sft(), "data/0", method=8, packed=len(raw), size=200_000_000)


def overlapping() -> Zip:
    """Two members that are one stretch of bytes."""
    inner = archive({}, floats(*VALUES)).build()
    file = sft()
    file.members.insert(1, ("x/data/9", inner))
    return patched(file, "data/9", packed=len(inner) + 90, size=len(inner) + 90)


def twice() -> Zip:
    file = sft()
    file.members.insert(1, ("x/data.pkl", pickled({})))
    return file


def doubling(depth: int) -> bytes:
    """A list of twice the list before it: `depth` instructions, 2 ^ depth items when unfolded."""
    return b"](e" + b"".join(b"q\0](h\0h\0e" for _ in range(depth))


def endless() -> bytes:
    return pickled(b"]q\0(h\0e")


def narrower_end() -> bytes:
    raw = bytearray(Zip(sft().members, wide=True).build())
    raw[-10:-6] = b"\1\0\0\0"
    return bytes(raw)


ARCHIVES: dict[str, tuple[Callable[[], "Zip | bytes"], tuple[str, ...]]] = {
    "empty": (lambda: b"", ("0 bytes", "too short")),
    "no zip": (lambda: b"x" * 99, ("no zip archive",)),
    "plain pickle": (lambda: b"\x80\x02}." + bytes(99), ("PyTorch 1.5 or older",)),
    "tar": (lambda: bytes(257) + b"ustar" + bytes(99), ("PyTorch 1.5 or older",)),
    "another zip": (lambda: Zip([("a.txt", b"hello")]), ("data.pkl", "none of torch.save")),
    "two pickles": (
        lambda: Zip([("a/data.pkl", pickled({})), ("b/data.pkl", pickled({}))]),
        ("one file data.pkl",),
    ),
    "comment": (lambda: Zip([("x/data.pkl", pickled({}))], comment=b"hi"), ("zip:",)),
    "comment that is an end": (
        lambda: sft().build()[:-2] + b"\x16\0" + sft().build()[-22:],
        ("zip:",),
    ),
    "trailing bytes": (lambda: sft().build() + b"\0", ("zip:", "the end of its directory")),
    "bytes before": (lambda: b"PK" + sft().build(), ("zip:",)),
    "deflated bomb": (deflated, ("zip:", "data/0", "compressed")),
    "deflated pickle": (
        lambda: patched(sft(), "data.pkl", method=8),
        ("zip:", "data.pkl", "compressed"),
    ),
    "encrypted": (lambda: patched(sft(), "data/0", flags=1), ("zip:", "data/0", "encrypted")),
    "overlapping members": (overlapping, ("zip:", "overlap")),
    "one member for two": (
        lambda: patched(sft(), "version", header=0),
        ("zip:", "another name"),
    ),
    "member twice": (twice, ("zip:", "two files", "x/data.pkl")),
    "member beyond the file": (
        lambda: patched(sft(), "data/0", packed=1 << 20, size=1 << 20),
        ("zip:", "data/0", "1,048,576 bytes"),
    ),
    "member beyond the directory": (
        lambda: patched(sft(), "version", packed=9, size=9),
        ("zip:", "overlap"),
    ),
    "sizes that differ": (lambda: patched(sft(), "data/0", packed=8), ("zip:", "data/0", "8")),
    "header elsewhere": (lambda: patched(sft(), "data/0", header=1), ("zip:", "data/0")),
    "header beyond": (lambda: patched(sft(), "data/0", header=1 << 31), ("zip:", "outside")),
    "wide size missing": (
        lambda: patched(sft(), "data/0", packed=0xFFFFFFFF, size=0xFFFFFFFF),
        ("zip:", "data/0", "4,294,967,295"),
    ),
    "too many members": (
        lambda: Zip(sft().members, end={"count": 65535}),
        ("zip:", "65,535 files"),
    ),
    "fewer members": (lambda: Zip(sft().members, end={"count": 2}), ("zip:", "more than the 2")),
    "one member more": (
        lambda: Zip(sft().members, end={"count": len(sft().members) + 1}),
        ("zip:", "directory"),
    ),
    "directory elsewhere": (lambda: Zip(sft().members, end={"start": 7}), ("zip:", "directory")),
    "ends that disagree": (narrower_end, ("zip:", "disagree")),
    "name that is no text": (
        lambda: Zip([("x/data.pkl", pickled({})), ("x/\udcff", b"")]),
        ("zip:", "UTF-8"),
    ),
    "wrong checksum": (lambda: patched(sft(), "data.pkl", crc=7), ("data.pkl", "checksum")),
    "wrong checksum of values": (
        lambda: patched(sft(), "data/0", crc=7),
        ("storage '0'", "checksum"),
    ),
    "big-endian": (
        lambda: archive({}, byteorder=b"big"),
        ("byteorder", "must be little", "big"),
    ),
    "unaligned": (
        lambda: Zip(sft().members, skew=1),
        ("storage '0'", "not aligned"),
    ),
}


def evil(module: str, what: str, *arguments) -> bytes:
    return pickled({"diffs": call(name(module, what), *arguments)})


PICKLES: dict[str, tuple[Callable[[], "Zip | bytes"], tuple[str, ...]]] = {
    "os.system": (lambda: evil("os", "system", "touch owned"), ("os.system", "nothing was run")),
    "posix.system": (lambda: evil("posix", "system", "touch owned"), ("posix.system",)),
    "eval": (lambda: evil("builtins", "eval", "open('owned', 'w')"), ("builtins.eval",)),
    "python 2 eval": (lambda: evil("__builtin__", "eval", "1"), ("__builtin__.eval",)),
    "getattr": (lambda: evil("builtins", "getattr", 1, "x"), ("builtins.getattr",)),
    "import": (lambda: evil("this", "s"), ("this.s",)),
    "torch function": (lambda: evil("torch", "load", "x"), ("torch.load",)),
    "dotted name": (lambda: evil("torch", "Size.__class__"), ("torch.Size.__class__",)),
    "split name": (lambda: evil("torch Size", ""), ("torch.Size.",)),
    "endless name": (lambda: pickled(b"c" + b"x" * 9999 + b"\n\n"), ("256 bytes",)),
    "INST": (lambda: pickled(b"(ios\nsystem\n"), (r"b'i'",)),
    "OBJ": (lambda: pickled(b"(" + name("torch", "Size") + b"o"), (r"b'o'",)),
    "NEWOBJ": (lambda: pickled(name("torch", "Size") + b")\x81"), (r"b'\x81'",)),
    "EXT1": (lambda: pickled(b"\x82\x01"), (r"b'\x82'",)),
    "STACK_GLOBAL": (lambda: pickled(enc("os") + enc("system") + b"\x93"), (r"b'\x93'",)),
    "FRAME": (lambda: pickled(b"\x95" + b"\xff" * 8), (r"b'\x95'",)),
    "text INT": (lambda: pickled(b"I12\n"), (r"b'I'",)),
    "PERSID": (lambda: pickled(b"P0\n"), (r"b'P'",)),
    "protocol 4": (lambda: b"\x80\x04}.", ("byte 0", "protocol 2")),
    "no protocol": (lambda: b"}.", ("protocol 2",)),
    "call of text": (lambda: pickled(enc("x") + b")R"), ("calls what is no function",)),
    "call of a result": (lambda: pickled(EMPTY + b")R"), ("calls what is no function",)),
    "call of a storage type": (
        lambda: pickled(call(name("torch", "FloatStorage"), 1 << 40)),
        ("not to be called",),
    ),
    "wrong count of arguments": (
        lambda: pickled(call(name("torch", "Size"), 1, 2)),
        ("torch Size", "2 arguments"),
    ),
    "ordered dict of pairs": (
        lambda: pickled(call(name("collections", "OrderedDict"), [["a", 1]])),
        ("OrderedDict", "1 arguments"),
    ),
    "bare name": (lambda: pickled({"a": name("torch", "Size")}), ("torch Size", "no value")),
    "bare storage": (lambda: pickled({"a": storage()}), ("Storage", "no value")),
    "bare type": (
        lambda: pickled([call(name("numpy", "dtype"), "i8", False, True)]),
        ("no value",),
    ),
    "object type": (
        lambda: pickled(call(name("numpy", "dtype"), "O8", False, True)),
        ("numpy type", "O8"),
    ),
    "big-endian number": (lambda: pickled(scalar(1, order=">")), ("little-endian",)),
    "number of another width": (
        lambda: pickled(
            call(
                name("numpy._core.multiarray", "scalar"),
                call(name("numpy", "dtype"), "i8", False, True),
                call(name("_codecs", "encode"), "abc", "latin1"),
            )
        ),
        ("numpy number",),
    ),
    "another encoding": (
        lambda: pickled(call(name("_codecs", "encode"), "a", "idna")),
        ("latin1",),
    ),
    "bytes longer than a number": (
        lambda: pickled(call(name("_codecs", "encode"), "a" * 17, "latin1")),
        ("at most 16",),
    ),
    "long text": (lambda: pickled("a" * 65537), ("a text of 65,537 bytes; at most 65,536",)),
    "bytes beyond latin1": (
        lambda: pickled(call(name("_codecs", "encode"), "€", "latin1")),
        ("latin1",),
    ),
    "state of text": (lambda: pickled(enc("x") + enc({"a": 1}) + b"b"), ("a state",)),
    "state of a tensor": (lambda: pickled(tensor() + enc({"a": 1}) + b"b"), ("a state",)),
    "list in two places": (
        lambda: pickled(doubling(30)),
        ("a list stands in two places",),
    ),
    "dict in two places": (
        lambda: pickled({"a": b"}q\0", "b": b"h\0"}),
        ("a dict stands in two places",),
    ),
    "tuple in two places": (
        lambda: pickled(b"K\1\x85q\0h\0\x86"),
        ("a tuple stands in two places",),
    ),
    "list in itself": (endless, ("contains itself",)),
    "deep": (lambda: pickled(b"]" * 9999 + b"a" * 9998), ("nested more than 64 deep",)),
    "deep tuples": (lambda: pickled(b")" + b"\x85" * 9999), ("nested more than 64 deep",)),
    "deep marks": (lambda: pickled(b"(" * 9999), ("lacks what it works on",)),
    "tuple as a key": (lambda: pickled({(1,): 2}), ("a key", "text")),
    "tensor as a key": (lambda: pickled(b"}" + tensor() + b"K\1s"), ("a key",)),
    "number that collides": (lambda: pickled({1 << 61: 1}), ("a key", "small")),
    "key twice": (lambda: pickled(b"}(" + enc("a") * 4 + b"u"), ("'a'", "twice")),
    "key without a value": (lambda: pickled(b"}(K\1u"), ("without values",)),
    "append to a dict": (lambda: pickled(b"}K\1a"), ("appends to a dict",)),
    "append to text": (lambda: pickled(enc("x") + b"(K\1e"), ("appends to 'x'",)),
    "items of a list": (lambda: pickled(b"](K\1K\2u"), ("of a list",)),
    "large memo": (
        lambda: pickled(b"}r\xff\xff\xff\x7fj\xff\xff\xff\x7e"),
        ("refers", "not there"),
    ),
    "memo of nothing": (lambda: pickled(b"q\0"), ("lacks what it works on",)),
    "mark missing": (lambda: pickled(b"K\1t"), ("lacks what it works on",)),
    "values left": (lambda: pickled(b"K\1K\2"), ("left over",)),
    "mark left": (lambda: pickled(b"(K\1"), ("left over",)),
    "no value": (lambda: pickled(b""), ("lacks what it works on",)),
    "no end": (lambda: pickled({})[:-1], ("cut off",)),
    "text cut off": (lambda: b"\x80\x02X\xff\xff\0\0abc", ("cut off",)),
    "text that is none": (lambda: pickled(b"X\1\0\0\0\xff"), ("UTF-8",)),
    "long integer": (lambda: pickled(b"\x8a\xff" + bytes(255)), ("64 bits",)),
    "persistent id of text": (lambda: pickled(enc("storage") + b"Q"), ("storage must be named",)),
    "persistent id of another kind": (
        lambda: pickled(enc(("module", 1, 2, 3, 4)) + b"Q"),
        ("storage must be named",),
    ),
    "storage of no type": (
        lambda: pickled(enc(("storage", "FloatStorage", "0", "cpu", 3)) + b"Q"),
        ("storage's type",),
    ),
    "storage of a function": (
        lambda: pickled(enc(("storage", name("torch", "Size"), "0", "cpu", 3)) + b"Q"),
        ("storage's type",),
    ),
    "storage of untyped bytes": (
        lambda: pickled(storage(kind="UntypedStorage", module="torch.storage")),
        ("torch.storage.UntypedStorage",),
    ),
    "storage that is absent": (lambda: pickled(storage("7")), ("storage '7'", "data/'7'")),
    "storage by a path": (lambda: pickled(storage("../../etc/passwd")), ("storage '../", "passwd")),
    "storage too long": (
        lambda: pickled(storage(numel=4)),
        ("storage '0'", "4 elements", "12 bytes"),
    ),
    "storage too short": (lambda: pickled(storage(numel=2)), ("storage '0'", "2 elements")),
    "storage of -1": (lambda: pickled(storage(numel=-1)), ("a length", "-1")),
    "storage of 2^62": (lambda: pickled(storage(numel=1 << 62)), ("storage '0'", "12 bytes")),
    "storage of another width": (
        lambda: pickled(storage(kind="DoubleStorage")),
        ("storage '0'", "float64"),
    ),
    "storage of two types": (
        lambda: pickled([tensor(), tensor(kind="IntStorage")]),
        ("storage '0'", "twice, differently"),
    ),
    "length of a truth value": (lambda: pickled(storage(numel=True)), ("a length",)),
    "expanded": (
        lambda: pickled(tensor(shape=(10**12,), stride=(0,))),
        ("(1000000000000,)", "strides (0,)", "more than once"),
    ),
    "overlapping rows": (
        lambda: pickled(tensor(shape=(2, 2), stride=(1, 1))),
        ("strides (1, 1)", "more than once"),
    ),
    "beyond its storage": (
        lambda: pickled(tensor(shape=(4,))),
        ("(4,)", "beyond its storage of 3"),
    ),
    "offset beyond": (lambda: pickled(tensor(offset=1)), ("offset 1", "beyond its storage")),
    "negative offset": (lambda: pickled(tensor(offset=-1)), ("offset must be", "-1")),
    "offset 2^62": (lambda: pickled(tensor(offset=1 << 62)), ("beyond its storage",)),
    "negative size": (lambda: pickled(tensor(shape=(-1,), stride=(1,))), ("from 0", "(-1)")),
    "size 2^60": (lambda: pickled(tensor(shape=(1 << 60,))), ("2^48",)),
    "size whose product is 2^60": (
        lambda: pickled(tensor(shape=(1 << 30, 1 << 30))),
        ("product 2^48",),
    ),
    "empty and endless": (
        lambda: pickled(tensor(shape=(0, 1 << 47, 1 << 47), stride=(1, 1, 1))),
        ("product 2^48",),
    ),
    "negative stride": (lambda: pickled(tensor(stride=(-1,))), ("strides from 0", "(-1)")),
    "strides missing": (lambda: pickled(tensor(stride=())), ("as many strides",)),
    "strides in a list": (lambda: pickled(tensor(stride=[1])), ("as many strides", "a list")),
    "size of truth values": (lambda: pickled(tensor(shape=(True,))), ("integers",)),
    "33 dimensions": (lambda: pickled(tensor(shape=(1,) * 33)), ("at most 32",)),
    "hooks": (lambda: pickled(tensor(hooks=enc({"a": 1}))), ("hooks",)),
    "tensor of no storage": (
        lambda: pickled(
            call(name("torch._utils", "_rebuild_tensor_v2"), 1, 0, (3,), (1,), False, EMPTY)
        ),
        ("must have a storage",),
    ),
    "parameter of text": (
        lambda: pickled(call(name("torch._utils", "_rebuild_parameter"), "x", False, EMPTY)),
        ("must be a tensor",),
    ),
}

LEGACY: dict[str, tuple[Callable[[], Zip], tuple[str, ...]]] = {
    "a list": (lambda: archive([]), ("must be a dict", "list")),
    "a state dict": (
        lambda: archive({"w": tensor()}, floats(*VALUES)),
        ("keys diffs and abs", "'w'", "between"),
    ),
    "a further key": (lambda: sft(other={}), ("keys diffs and abs", "other")),
    "diffs that are a list": (lambda: archive({"diffs": []}), ("diffs: must be a dict", "list")),
    "abs that are a list": (lambda: archive({"abs": []}), ("abs: must be a dict", "list")),
    "entry that is a list": (lambda: archive({"diffs": {"w": []}}), ("diffs['w']", "a dict")),
    "name that is a number": (lambda: archive({"diffs": {5: {}}}), ("a name", "5")),
    "name with a bell": (lambda: archive({"diffs": {"\a": {}}}), ("a name", r"\x07")),
    "name in both": (lambda: sft(heads={"w": tensor()}), ("'w'", "both in diffs and in abs")),
    "size missing": (
        lambda: archive({"diffs": {"w": {"index_steps": [], "values": None}}}),
        ("diffs['w']", "size", "index_steps"),
    ),
    "values missing": (
        lambda: archive({"diffs": {"w": {"size": size(3), "index_steps": []}}}),
        ("diffs['w']", "values"),
    ),
    "further field": (lambda: sft(entry={"more": 1}), ("diffs['w']", "more")),
    "size in a list": (lambda: sft(shape=[3, 4]), ("diffs['w']: size",)),
    "size of text": (lambda: sft(shape=("3",)), ("diffs['w']: size",)),
    "size of truth values": (lambda: sft(shape=(True, 12)), ("diffs['w']: size",)),
    "size below 0": (lambda: sft(shape=(-3, -4)), ("diffs['w']: size",)),
    "size of 2^60": (lambda: sft(shape=(1 << 60,)), ("diffs['w']: size", "2^48")),
    "size whose product is 2^60": (
        lambda: sft(shape=(1 << 30, 1 << 30)),
        ("diffs['w']: size", "2^48"),
    ),
    "size of 2^47": (lambda: sft(shape=(1 << 47,)), ("diffs", "at most 274,877,906,944")),
    "size of 33 dimensions": (lambda: sft(shape=(1,) * 33), ("diffs['w']: size",)),
    "steps in a tuple": (lambda: sft((2, 1, 5)), ("diffs['w']: index_steps", "a tuple")),
    "steps that are a tensor": (lambda: sft(tensor()), ("diffs['w']: index_steps", "a Tensor")),
    "step that is text": (lambda: sft([2, "1", 5]), ("diffs['w']: index_steps", "a str")),
    "step that is true": (lambda: sft([2, True, 5]), ("diffs['w']: index_steps", "a bool")),
    "step that is a float": (lambda: sft([2, 1.0, 5]), ("diffs['w']: index_steps", "a float")),
    "step that is a list": (lambda: sft([2, [1], 5]), ("diffs['w']: index_steps", "a list")),
    "numpy number that is not the first": (
        lambda: sft([2, scalar(1), 5]),
        ("diffs['w']: index_steps", "a int64"),
    ),
    "step of 0": (lambda: sft([2, 0, 5]), ("diffs['w']: index_steps", "item 1 is 0")),
    "step below 0": (lambda: sft([2, 5, -1]), ("diffs['w']: index_steps", "item 2 is -1")),
    "first step below 0": (lambda: sft([-1, 2, 5]), ("index_steps", "item 0 is -1")),
    "first numpy step below 0": (lambda: sft([scalar(-1), 2, 5]), ("index_steps", "item 0 is -1")),
    "position beyond": (
        lambda: sft([2, 1, 9]),
        ("diffs['w']: index_steps", "position 12", "12 elements"),
    ),
    "step of 2^40": (lambda: sft([2, 1 << 40, 5]), ("diffs['w']: index_steps", "position 1,099")),
    "step of 2^62": (lambda: sft([2, 1 << 62, 1 << 62]), ("diffs['w']: index_steps", "2^48")),
    "entries of an empty tensor": (lambda: sft(shape=size(0, 4)), ("index_steps", "0 elements")),
    "step of 0 in a long run": (
        lambda: sft([*[1] * 1500, 0, *[1] * 1500], shape=size(9999)),
        ("diffs['w']: index_steps", "item 1,500 is 0"),
    ),
    "step below 0 in a long run": (
        lambda: sft([1] * 2500 + [-70000], shape=size(9999)),
        ("diffs['w']: index_steps", "item 2,500 is -70000"),
    ),
    "long run beyond": (
        lambda: sft([1] * 3000, shape=size(3000)),
        ("diffs['w']: index_steps", "position 3,000"),
    ),
    "long run that adds up beyond 64 bits": (
        lambda: sft([1, *[(1 << 48)] * 99999], shape=size(1 << 30)),
        ("diffs['w']: index_steps", "position"),
    ),
    "values in a list": (lambda: sft(values=[0.5, 1.0, 2.0]), ("diffs['w']: values", "a list")),
    "fewer values": (
        lambda: sft([2, 1, 2, 1]),
        ("diffs['w']: values", "3 values", "4 index_steps"),
    ),
    "values in two dimensions": (
        lambda: sft(values=tensor(shape=(1, 3))),
        ("diffs['w']: values", "(1, 3)"),
    ),
    "values that are integers": (
        lambda: sft(values=tensor(kind="IntStorage")),
        ("diffs['w']: values", "int32"),
    ),
    "value NaN": (lambda: sft(data=(0.5, float("nan"), 1)), ("diffs['w']: values", "1 is nan")),
    "value infinite": (lambda: sft(data=(0.5, 1, float("-inf"))), ("values", "2 is -inf")),
    "expanded values": (
        lambda: sft([1] * 3000, values=tensor(shape=(3000,), stride=(0,))),
        ("data.pkl", "more than once"),
    ),
    "head of text": (lambda: sft(heads={"h": "x"}), ("abs['h']", "a str")),
    "head in a dict": (lambda: sft(heads={"h": {}}), ("abs['h']", "a dict")),
    "head of integers": (
        lambda: sft(heads={"h": tensor("1", kind="IntStorage")}, more=[bytes(12)]),
        ("'h'", "int32"),
    ),
    "head NaN": (
        lambda: sft(heads={"h": tensor("1")}, more=[floats(1, float("nan"), 2)]),
        ("'h'", "NaN"),
    ),
}


def members_of(raw: bytes) -> Zip:
    """The members of a right file."""
    with zipfile.ZipFile(io.BytesIO(raw)) as opened:
        return Zip([(info.filename, opened.read(info)) for info in opened.infolist()])


# --- fuzzing ------------------------------------------------------------------------------------


def seeds(folder: Path) -> list[bytes]:
    """Right files of both kinds, one of them with long runs of integers."""
    steps = np.random.default_rng(1).geometric(1 / 200, 2500).tolist()
    torch.save(
        {
            "diffs": {
                "a": {
                    "size": torch.Size([700, 900]),
                    "index_steps": steps,
                    "values": torch.ones(2500),
                },
                "b": {"size": torch.Size([]), "index_steps": [], "values": torch.ones(0)},
            },
            "abs": {"h": torch.ones(3, 2).bfloat16()},
        },
        folder / "s.bin",
    )
    long = (folder / "s.bin").read_bytes()
    torch.save(torch.nn.Linear(3, 4).state_dict(), folder / "s.bin")
    head = [scalar(2), 1, 5]
    return [
        sft(head).build(),
        (folder / "s.bin").read_bytes(),
        long,
    ]


def mutated(rng: random.Random, raw: bytes) -> bytes:
    """A file with some bytes changed, at random or to what means something in a zip or pickle."""
    out = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(out))
        match rng.randrange(8):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                out[at] = rng.choice(b"KMJqrhjt)XRQc]}aesubN\x88\x89G.(\x85\x86\x87\x8aio\x81\x93")
            case 3:
                out[at : at + 4] = rng.choice(
                    [b"\xff" * 4, bytes(4), b"\1\0\0\0", b"\0\0\0\x80", b"\xff\xff\xff\x7f"]
                )
            case 4:
                start = rng.randrange(len(out))
                out[at:at] = out[start : start + rng.randrange(40)]
            case 5:
                del out[at : at + rng.randrange(1, 20)]
            case 6:
                # The directory and its end.
                at = len(out) - 1 - rng.randrange(min(len(out), 600))
                out[at] = rng.randrange(256)
            case 7:
                out[at : at + 2] = rng.choice([b"e(", b"](", b"h\0", b"q\0", b"a.", b")R", b"PK"])
        if not out:
            return b""
    return bytes(out)


def mutant(rng: random.Random, raw: bytes, file: Zip) -> bytes:
    """A right file with its bytes mutated, or, more often, its pickle alone; without checksums
    then, which would tell."""
    if rng.random() < 0.3:
        return mutated(rng, raw)
    members = [
        (name, mutated(rng, data) if name.endswith("data.pkl") else data)
        for name, data in file.members
    ]
    return Zip(members, crc=False).build()
