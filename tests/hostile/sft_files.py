"""Malformed SFT files, each with one fault, and the encoder that makes them.

The encoder is written from docs/file-format.md, with nothing of `sparse_ft.files` in it, so that
it also serves as a second opinion on what a right file is.
"""

import copy
import hashlib
import json
import struct
from collections.abc import Callable

import numpy as np

TILE = 65536
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U16": 2, "U32": 4, "U64": 8, "I32": 4, "U8": 1}
ORDER = ("U64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "U8")


def canonical(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


class File:
    """A file in parts, to be broken: the document, the tensors, the header's entries."""

    def __init__(self, document: dict, tensors: dict[str, tuple[str, list[int], bytes]]):
        self.document = document
        self.tensors = tensors
        self.text: str | None = None  # the document, if it is to be no JSON of `document`
        self.metadata: object = None  # __metadata__, if it is to be another
        self.entries: dict[str, object] = {}  # entries of the header that are to be others
        self.header: bytes | None = None  # the header, if it is to be another
        self.tail = b""

    def sign(self) -> "File":
        """Gives the file the content id that its parts have."""
        kept = {
            k: v
            for k, v in self.document.items()
            if k not in ("content_id", "recipe", "role", "lang", "task", "license")
        }
        kept["version"] = [1, 0]
        state = hashlib.blake2b(canonical(kept).encode(), digest_size=32)
        names = ["idx", "ptr", "val", *(f"dense.{i}" for i in range(2))]
        for name in names:
            dtype, shape, data = self.tensors[name]
            state.update(canonical([name, dtype, shape]).encode())
            for at in range(0, len(data), 65536):
                state.update(hashlib.blake2b(data[at : at + 65536], digest_size=32).digest())
        self.document["content_id"] = state.hexdigest()
        return self

    def build(self) -> bytes:
        text = canonical(self.document) if self.text is None else self.text
        entries: dict[str, object] = {
            "__metadata__": {"sparse_ft": text} if self.metadata is None else self.metadata
        }
        offset, body = 0, b""
        for name, (dtype, shape, data) in sorted(
            self.tensors.items(), key=lambda item: (ORDER.index(item[1][0]), item[0])
        ):
            end = offset + len(data)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset, body = end, body + data
        for name, entry in self.entries.items():
            entries[name] = entry
            if entry is None:
                del entries[name]
        header = self.header
        if header is None:
            header = json.dumps(entries, separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header + body + self.tail

    def header_dict(self) -> dict:
        raw = self.build()
        (size,) = struct.unpack("<Q", raw[:8])
        return json.loads(raw[8 : 8 + size])


# Flat positions of the entries: "a" has two tiles (65,536 and 14,464 elements).
POSITIONS = {"a": [0, 7, 65535, 65536, 79999], "b": [1, 2], "s": [0], "z": []}
SHAPES = {"a": [200, 400], "b": [3], "s": [], "z": [0, 5]}


def valid() -> File:
    """A right file: four parameters (two tiles, short, scalar, empty) and two heads."""
    idx, ptr = [], [0]
    for name, shape in SHAPES.items():
        numel = int(np.prod(shape, dtype=np.int64))
        for start in range(0, numel, TILE):
            inside = [p - start for p in POSITIONS[name] if start <= p < start + TILE]
            idx += inside
            ptr.append(len(idx))
    values = [0.5, -0.25, 3.0, 1e-3, -2.0, 0.125, 0.75, -1.5]
    file = File(
        {
            "format": "sft",
            "version": [1, 0],
            "kind": "diff",
            "tile": TILE,
            "nnz": 8,
            "numel": 80004,
            "params": [
                {"n": "a", "s": [200, 400], "k": 5, "d": "F32", "a": ["out.a"]},
                {"n": "b", "s": [3], "k": 2, "d": "F32"},
                {"n": "s", "s": [], "k": 1, "d": "BF16"},
                {"n": "z", "s": [0, 5], "k": 0, "d": "F32"},
            ],
            "dense": [
                {"n": "head.bias", "t": "dense.0", "role": "head"},
                {"n": "head.weight", "t": "dense.1", "role": "param"},
            ],
            "base": {
                "id": "some/model",
                "revision": "main",
                "files": [{"name": "model.safetensors", "sha256": "ab" * 32}],
                "digest_f32": "0123456789abcdef",
                "digest_bf16": "fedcba9876543210",
            },
            "trained_on": [{"id": "cd" * 32, "alpha": 1.0}],
            "role": "task",
            "lang": "sw",
            "task": "ner",
            "license": "Apache-2.0",
            "recipe": {"method": "LT-SFT", "k_requested": 8, "l1": 0.1, "frozen": ["norms"]},
            "value_loss": "none",
        },
        {
            "idx": ("U16", [8], np.asarray(idx, "<u2").tobytes()),
            "ptr": ("U32", [5], np.asarray(ptr, "<u4").tobytes()),
            "val": ("F32", [8], np.asarray(values, "<f4").tobytes()),
            "dense.0": ("F32", [2], np.asarray([1, -1], "<f4").tobytes()),
            "dense.1": ("F16", [2, 3], np.arange(6).astype("<f2").tobytes()),
        },
    )
    return file.sign()


# name → (what the error must say, how to break a right file)
CASES: dict[str, tuple[str, Callable[[File], File | bytes | None]]] = {}


def case(name: str, message: str):
    """Registers a way to break a file, and what its error must say (a regular expression)."""

    def register(function):
        assert name not in CASES, name
        CASES[name] = (message, function)
        return function

    return register


def build(name: str) -> bytes:
    file = valid()
    result = CASES[name][1](file)
    return result if isinstance(result, bytes) else (result or file).build()


# --- rule 1: the frame ---------------------------------------------------------------------------

case("empty", "0 bytes long")(lambda f: b"")
case("seven bytes", "7 bytes long")(lambda f: f.build()[:7])
case("header longer than the file", "header: .* are declared")(
    lambda f: struct.pack("<Q", 1 << 20) + f.build()[8:]
)
case("header length 2^63", "header: .* are declared")(
    lambda f: struct.pack("<Q", 1 << 63) + f.build()[8:]
)
case("text file", "no safetensors file")(lambda f: b"# This is a model card.\n" * 10)
case("pickle", "PyTorch .pickle. file")(lambda f: b"\x80\x02}q\x00." + bytes(100))
case("zip", "pytorch_diff.bin")(lambda f: b"PK\x03\x04" + bytes(100))


@case("header of 17 MiB", "header: .* at most")
def _(f):
    size = 17 << 20
    return struct.pack("<Q", size) + b"{" + b" " * (size - 2) + b"}"


@case("header of zero bytes", "header: is not valid JSON")
def _(f):
    f.header = b""


# --- rule 2: JSON --------------------------------------------------------------------------------


@case("header no JSON", "header: is not valid JSON")
def _(f):
    f.header = b"{not json}      "


@case("header no UTF-8", "header: is not valid JSON")
def _(f):
    f.header = b'{"\xff\xfe": 1}'


@case("header a list", "header: must be a JSON object")
def _(f):
    f.header = b"[]"


@case("header of 100,000 brackets", "header: (is nested too deep|is not valid JSON)")
def _(f):
    f.header = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@case("header of 2,000,000 lists", "more than 1,048,576 lists")
def _(f):
    f.header = b'{"a":[' + b"[]," * 2_000_000 + b"0]}"


@case("tensor name twice", "the key 'val' stands there twice")
def _(f):
    raw = json.dumps(f.header_dict())
    f.header = (raw[:-1] + ',"val":' + json.dumps(f.header_dict()["val"]) + "}").encode()


@case("metadata key twice", "the key 'sparse_ft' stands there twice")
def _(f):
    raw = json.dumps(f.header_dict())
    f.header = raw.replace('{"sparse_ft": ', '{"sparse_ft": "", "sparse_ft": ', 1).encode()


@case("field twice", "metadata: .* the key 'nnz' stands there twice")
def _(f):
    f.text = canonical(f.document)[:-1] + ',"nnz":8}'


@case("field of a parameter twice", "metadata: .* the key 'k' stands there twice")
def _(f):
    f.text = canonical(f.document).replace('"k":5', '"k":5,"k":5')


@case("many keys, the last one twice", "the key 'x199999' stands there twice")
def _(f):
    keys = ",".join(f'"x{i}":0' for i in range(200_000))
    f.header = ("{" + keys + ',"x199999":0}').encode()


@case("integer of 5,000 digits", "integer of 5,000 digits")
def _(f):
    f.text = canonical(f.document).replace('"nnz":8', '"nnz":' + "1" * 5000)


@case("NaN in the recipe", "the number NaN")
def _(f):
    f.text = canonical(f.document).replace('"l1":0.1', '"l1":NaN')


@case("1e999 in the recipe", "the number '1e999'")
def _(f):
    f.text = canonical(f.document).replace('"l1":0.1', '"l1":1e999')


@case("JSON cut short", "metadata: is not valid JSON")
def _(f):
    f.text = canonical(f.document)[:-5]


# --- rule 3: tensors -----------------------------------------------------------------------------


def tensor(f: File, name: str, array, dtype: str | None = None) -> None:
    array = np.asarray(array)
    f.tensors[name] = (dtype or f.tensors[name][0], list(array.shape), array.tobytes())


@case("further tensor", "'dense.2' is not in the list")
def _(f):
    f.tensors["dense.2"] = ("F32", [1], bytes(4))


@case("foreign tensor", "tensor 'model.weight': an SFT has the tensors")
def _(f):
    f.tensors["model.weight"] = ("F32", [1], bytes(4))


@case("tensor named as a path", "tensor '../../etc/passwd'")
def _(f):
    f.tensors["../../etc/passwd"] = ("F32", [1], bytes(4))


@case("dense.00", "tensor 'dense.00'")
def _(f):
    f.tensors["dense.00"] = ("F32", [1], bytes(4))


for _name in ("val", "idx", "ptr", "dense.1"):

    @case(f"{_name} missing", f"tensor '{_name}' is missing")
    def _(f, name=_name):
        del f.tensors[name]


for _name, _dtype in (("val", "F64"), ("idx", "U32"), ("ptr", "I32"), ("dense.0", "U8")):

    @case(f"{_name} of {_dtype}", f"tensor '{_name}': its dtype must be .* found '{_dtype}'")
    def _(f, name=_name, dtype=_dtype):
        shape = f.tensors[name][1]
        f.tensors[name] = (dtype, shape, bytes(WIDTHS[dtype] * shape[0]))


@case("ptr of U64", "tensor 'ptr': must be U32")
def _(f):
    ptr = np.frombuffer(f.tensors["ptr"][2], "<u4")
    tensor(f, "ptr", ptr.astype("<u8"), "U64")
    f.sign()


@case("idx of two dimensions", "tensor 'idx': must have one dimension")
def _(f):
    f.tensors["idx"] = ("U16", [2, 4], f.tensors["idx"][2])


def entry(f: File, name: str, **changes) -> None:
    f.entries[name] = {**f.header_dict()[name], **changes}


@case("entry with a further key", "tensor 'val': must have dtype, shape and data_offsets")
def _(f):
    entry(f, "val", strides=[1])


@case("entry a list", "tensor 'val': must have dtype")
def _(f):
    f.entries["val"] = [1, 2, 3]


@case("offsets beyond the file", "offsets span")
def _(f):
    entry(f, "val", data_offsets=[0, 1 << 50])


@case("offsets and shape beyond the file", "(overlaps|truncated|hole)")
def _(f):
    entry(f, "val", data_offsets=[0, 1 << 40], shape=[1 << 38])


@case("offsets descending", "two ascending integers")
def _(f):
    entry(f, "val", data_offsets=[32, 0])


@case("offsets negative", "two ascending integers")
def _(f):
    entry(f, "val", data_offsets=[-32, 0])


@case("offsets bool", "two ascending integers")
def _(f):
    entry(f, "val", data_offsets=[False, 32])


@case("offsets of floats", "two ascending integers")
def _(f):
    entry(f, "val", data_offsets=[0.0, 32.0])


@case("overlap", "overlaps the one before it")
def _(f):
    start = f.header_dict()["idx"]["data_offsets"][0]
    entry(f, "idx", data_offsets=[start - 2, start + 14])


@case("hole", "leaves a hole")
def _(f):
    start = f.header_dict()["idx"]["data_offsets"][0]
    entry(f, "idx", data_offsets=[start + 2, start + 18])


@case("trailing bytes", "bytes behind its last tensor")
def _(f):
    f.tail = b"\0"


# --- rule 4: metadata ----------------------------------------------------------------------------


@case("no metadata", "safetensors file, but not an SFT")
def _(f):
    f.entries["__metadata__"] = None


@case("metadata of another program", "safetensors file, but not an SFT")
def _(f):
    f.metadata = {"format": "pt"}


@case("two metadata keys", "must have the one key 'sparse_ft'")
def _(f):
    f.metadata = {"sparse_ft": canonical(f.document), "format": "pt"}


@case("metadata not text", "'sparse_ft' must be a string")
def _(f):
    f.metadata = {"sparse_ft": f.document}


@case("document a list", "metadata: must be a JSON object")
def _(f):
    f.text = "[]"


for _key in (
    *("format", "version", "kind", "tile", "nnz", "numel", "params", "dense"),
    *("value_loss", "content_id"),
):

    @case(f"{_key} left out", f"{_key}")
    def _(f, key=_key):
        del f.document[key]


def field(name: str, key: str, value, message: str) -> None:
    """A case: one top-level field has another value. The content id is right for it."""

    @case(name, message)
    def _(f):
        f.document[key] = value
        if key != "content_id":
            f.sign()


def within(name: str, path: tuple, value, message: str) -> None:
    """A case: a field further down has another value. The content id is right for it."""

    @case(name, message)
    def _(f):
        target = f.document
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value
        f.sign()


field("field unknown", "extra", 1, "there is no field 'extra' in version 1.0")
field("aliases at the top", "aliases", {}, "there is no field 'aliases'")
field("role null", "role", None, "role: is empty")
field("base empty", "base", {}, "base: is empty")
field("format another", "format", "lora", "format: must be 'sft'")
field("version 2.0", "version", [2, 0], "version: the file has format version 2.0")
field("version 0.9", "version", [0, 9], "version: the file has format version 0.9")
field("version text", "version", "1.0", "version: must be")
field("version bool", "version", [True, 0], "version: must be")
field("kind unknown", "kind", "lora", "kind: must be one of")
field("kind a list", "kind", ["diff"], "kind: must be one of")
field("value_loss unknown", "value_loss", "int8", "value_loss: must be one of")
field("tile another", "tile", 4096, "tile: must be 65536")
field("tile a float", "tile", 65536.0, "tile: must be 65536")
field("nnz bool", "nnz", True, "nnz: must be an integer")
field("nnz a float", "nnz", 8.0, "nnz: must be an integer")
field("nnz text", "nnz", "8", "nnz: must be an integer")
field("nnz negative", "nnz", -8, "nnz: must be an integer")
field("numel beyond 64 bits", "numel", 1 << 64, "numel: must be an integer")
field("params no list", "params", {}, "params: must be a list")
field("params of text", "params", ["a"], r"params\[0\]: must be a JSON object")
field("dense no list", "dense", None, "dense: must be a list")
field("role with an escape sequence", "role", "a\x1b[2J", "role: must be text")
field("role of 5,000 characters", "role", "a" * 5000, "role: must be text")
field("role a number", "role", 3, "role: must be text")
field("task right to left", "task", "a\u202eb", "task: must be text")
field("lang a sentence", "lang", "the language", "lang: .* language tag")
field("recipe a list", "recipe", [1], "recipe: must be a mapping")
field("recipe nested", "recipe", {"a": [[[[[[[[1]]]]]]]]}, "nested more than 8 deep")
field("recipe integer of 65 bits", "recipe", {"a": 1 << 64}, "recipe.a: an integer beyond")
field("recipe list of 70,000", "recipe", {"a": [0] * 70_000}, "recipe.a: 70,000 items")
field("base a list", "base", ["x"], "base: must be a mapping")
field("base unknown field", "base", {"sha": "x"}, "base: there is no field 'sha'")
field("base digest short", "base", {"digest_f32": "abc"}, "base.digest_f32: must be 16 hex")
field("base digest upper case", "base", {"digest_f32": "A" * 16}, "base.digest_f32: must be 16 hex")
field("base files no list", "base", {"files": 3}, "base.files: must be a list")
field("base file without hash", "base", {"files": [{"name": "x"}]}, r"base.files\[0\]: must have")
field("trained_on no list", "trained_on", {"id": "x"}, "trained_on: must be a list")
field("trained_on id short", "trained_on", [{"id": "ab", "alpha": 1}], r"trained_on\[0\].id")
field(
    "trained_on alpha bool",
    *("trained_on", [{"id": "ab" * 32, "alpha": True}], r"trained_on\[0\].alpha"),
)
field("content_id short", "content_id", "abc", "content_id: must be 64 hex")
field("content_id a number", "content_id", 5, "content_id: must be 64 hex")

# --- rule 5: names -------------------------------------------------------------------------------

within("name empty", ("params", 0, "n"), "", r"params\[0\]: n: must be 1 to 512 printable")
within("name of 513 characters", ("params", 0, "n"), "a" * 513, "must be 1 to 512 printable")
within("name with a newline", ("params", 0, "n"), "a\nb", "must be 1 to 512 printable")
within("name with NUL", ("params", 0, "n"), "a\0", "must be 1 to 512 printable")
within("name a surrogate", ("params", 0, "n"), "\ud800", "must be 1 to 512 printable")
within("name a number", ("params", 0, "n"), 7, "must be 1 to 512 printable")
within("name twice", ("params", 1, "n"), "a", "params: must be sorted by name without repetition")
within("names unsorted", ("params", 1, "n"), "zz", "params: must be sorted by name")
within("alias is a parameter", ("params", 0, "a"), ["b"], "'b' is taken already")
within("alias is the name itself", ("params", 0, "a"), ["a"], "'a' is taken already")
within("alias is a head", ("params", 0, "a"), ["head.bias"], "'head.bias' is taken already")
within("alias twice", ("params", 0, "a"), ["x", "x"], "'x' is taken already")
within("alias no text", ("params", 0, "a"), [3], "must be 1 to 512 printable")
within("aliases empty", ("params", 0, "a"), [], "a must be a list of names")
within("aliases text", ("params", 0, "a"), "out.a", "a must be a list of names")
within("head is a parameter", ("dense", 0, "n"), "b", "'b' is both among")
within("heads unsorted", ("dense", 0, "n"), "zz", "dense: must be sorted by name")
within("head twice", ("dense", 1, "n"), "head.bias", "dense: must be sorted by name")
within("head of another tensor", ("dense", 0, "t"), "dense.1", r"dense\[0\]: t must be 'dense.0'")
within("head role unknown", ("dense", 0, "role"), "x", r"dense\[0\]: role must be")
within("head further field", ("dense", 0, "x"), 1, r"dense\[0\]: there is no field 'x'")
within("parameter further field", ("params", 0, "x"), 1, r"params\[0\]: there is no field 'x'")
within("parameter dtype unknown", ("params", 0, "d"), "F64", r"params\[0\] 'a': d must be")

# --- rules 6 and 7: arithmetic -------------------------------------------------------------------

within("size negative", ("params", 1, "s"), [-3], "s: shape: must be an integer from 0")
within("size bool", ("params", 1, "s"), [True, 3], "s: shape: must be an integer")
within("size a float", ("params", 1, "s"), [3.0], "s: shape: must be an integer")
within("shape a number", ("params", 1, "s"), 3, "s: shape must be a list")
within("size 2^60", ("params", 0, "s"), [1 << 60], "more than 2.48 elements")
within("sizes 2^30 by 2^30", ("params", 0, "s"), [1 << 30, 1 << 30], "more than 2.48 elements")
within("sizes 2^60 by 0", ("params", 3, "s"), [1 << 60, 0], "more than 2.48 elements")
within("33 dimensions", ("params", 1, "s"), [1] * 33, "at most 32 sizes")
within("k above numel", ("params", 1, "k"), 4, "k = 4 entries of 3 elements")
within("k negative", ("params", 1, "k"), -1, "k: must be an integer from 0")
within("k bool", ("params", 2, "k"), True, "k: must be an integer")
within("k missing one", ("params", 0, "k"), 4, "nnz: is 8, and the parameters add up to 7")
field("nnz another", "nnz", 9, "nnz: is 9, and the parameters add up to 8")
field("numel another", "numel", 80005, "numel: is 80,005, and the parameters add up to 80,004")


@case("shape of 2^40 that k and numel fit", "tensor 'ptr': 5 elements; the .* tiles")
def _(f):
    f.document["params"][0]["s"] = [1 << 40]
    f.document["numel"] = (1 << 40) + 4
    f.sign()


@case("tensor shape [2^60, 0]", "more than 2.48 elements")
def _(f):
    f.tensors["dense.0"] = ("F32", [1 << 60, 0], b"")


@case("tensor shape 2^60", "more than 2.48 elements")
def _(f):
    f.tensors["dense.0"] = ("F32", [1 << 60], bytes(8))


@case("idx short", "tensor 'idx': 7 elements, and nnz = 8")
def _(f):
    tensor(f, "idx", np.frombuffer(f.tensors["idx"][2], "<u2")[:7])
    f.sign()


@case("val long", "tensor 'val': 9 elements, and nnz = 8")
def _(f):
    tensor(f, "val", np.ones(9, "<f4"))
    f.sign()


for _n in (0, 4, 6):

    @case(f"ptr of {_n}", f"tensor 'ptr': {_n} elements; the 4 tiles of the parameters need 5")
    def _(f, n=_n):
        tensor(f, "ptr", np.zeros(n, "<u4"))
        f.sign()


# --- rules 9 to 12: content ----------------------------------------------------------------------


def pointers(name: str, values: list[int], message: str) -> None:
    @case(name, message)
    def _(f):
        tensor(f, "ptr", np.asarray(values, "<u4"))
        f.sign()


pointers("ptr starts at 1", [1, 3, 5, 7, 8], "ptr: must run from 0 to nnz = 8, found 1 to 8")
pointers("ptr ends early", [0, 3, 5, 7, 7], "ptr: must run from 0 to nnz = 8, found 0 to 7")
pointers("ptr beyond nnz", [0, 3, 5, 4_000_000_000, 8], "ptr: runs to 4,000,000,000")
pointers("ptr decreases", [0, 5, 3, 7, 8], "ptr: decreases, .* .in 'a'")
pointers("ptr gives a scalar two", [0, 3, 5, 6, 8], "ptr: decreases, or gives .* .in 's'")
pointers("ptr splits tiles elsewhere", [0, 4, 5, 7, 8], "idx: is not strictly ascending .*'a'")


@case("ptr gives b an entry of a", "params: 'a' has k = 5, and ptr gives it 4 entries")
def _(f):
    tensor(f, "ptr", np.asarray([0, 3, 4, 7, 8], "<u4"))
    tensor(f, "idx", np.asarray([0, 7, 65535, 0, 0, 1, 2, 0], "<u2"))
    f.sign()


@case("ptr with more than a tile", "ptr: .* .in 'a', the tile from flat index 0")
def _(f):
    n = 65537
    f.document["params"] = [{"n": "a", "s": [70000], "k": n}]
    f.document["nnz"], f.document["numel"] = n, 70000
    tensor(f, "idx", np.arange(n).astype("<u2"))
    tensor(f, "ptr", np.asarray([0, n, n], "<u4"))
    tensor(f, "val", np.ones(n, "<f4"))
    f.sign()


def offsets(name: str, at: int, value: int, message: str) -> None:
    @case(name, message)
    def _(f):
        idx = np.frombuffer(f.tensors["idx"][2], "<u2").copy()
        idx[at] = value
        tensor(f, "idx", idx)
        f.sign()


offsets("idx twice", 1, 0, "idx: is not strictly ascending .* .in 'a'.* entry 1")
offsets("idx descending", 1, 65535, "idx: is not strictly ascending .* .in 'a'.* entry 2")
offsets(
    "idx beyond a short tile",
    4,
    14464,
    "idx: points beyond .* .in 'a', .* index 65,536 on, entry 4",
)
offsets("idx beyond b", 6, 3, "idx: points beyond the end of its parameter .in 'b'")
offsets("idx beyond a scalar", 7, 1, "idx: points beyond the end of its parameter .in 's'")

for _bad in ("nan", "inf", "-inf"):
    for _dtype, _kind in (("F32", "<f4"), ("F16", "<f2")):

        @case(
            f"val {_bad} {_dtype}", "val: holds a value that is NaN or infinite .in 'a'.* entry 3"
        )
        def _(f, bad=_bad, dtype=_dtype, kind=_kind):
            values = np.ones(8, kind)
            values[3] = float(bad)
            tensor(f, "val", values, dtype)
            f.sign()


@case("val NaN BF16", "val: holds a value that is NaN or infinite .in 's'")
def _(f):
    tensor(f, "val", np.asarray([0x3F80] * 7 + [0x7FC1], "<u2"), "BF16")
    f.sign()


@case("head NaN", "dense: 'head.bias' holds NaN")
def _(f):
    tensor(f, "dense.0", np.asarray([1, np.nan], "<f4"))
    f.sign()


@case("content_id of another file", "content_id: the content has the id")
def _(f):
    f.document["content_id"] = "ab" * 32


for _name in ("val", "dense.0", "dense.1"):

    @case(f"{_name} changed", "content_id: the content has the id .* damaged or changed")
    def _(f, name=_name):
        dtype, shape, data = f.tensors[name]
        f.tensors[name] = (dtype, shape, bytes([data[0] ^ 1]) + data[1:])


@case("idx changed", "content_id: the content has the id")
def _(f):
    idx = np.frombuffer(f.tensors["idx"][2], "<u2").copy()
    idx[1] = 8
    tensor(f, "idx", idx)


@case("heads of other shape", "content_id: the content has the id")
def _(f):
    f.tensors["dense.1"] = ("F16", [3, 2], f.tensors["dense.1"][2])


@case("heads exchanged", "content_id: the content has the id")
def _(f):
    f.tensors["dense.0"], f.tensors["dense.1"] = f.tensors["dense.1"], f.tensors["dense.0"]


@case("base changed", "content_id: the content has the id")
def _(f):
    f.document["base"] = {**copy.deepcopy(f.document["base"]), "digest_f32": "0" * 16}
