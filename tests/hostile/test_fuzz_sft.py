"""The reader of SFT files under broken input."""

import contextlib
import copy
import functools
import json
import random
import struct

import numpy as np
import pytest
from hostile import sft_files
from hostile.fuzz import COUNT, NUMBERS, broken_bytes, fuzz

from sparse_ft.files import load

VALID = sft_files.valid().build()
(SIZE,) = struct.unpack("<Q", VALID[:8])
VALUES = [
    *NUMBERS,
    *(-1, -(2**63), 0.5, -0.0, 1e308, float("inf"), float("nan"), True, False, None),
    *("", "a", "x" * 513, "x" * 5000, "\0", "../../etc/passwd", "a\nb", "\ud800", "F32", "diff"),
    *([], {}, [[]], [0, 0], {"a": {}}, {"n": "a"}, [None] * 40),
    functools.reduce(lambda inner, _: [inner], range(60), []),
]


def places(value, path=()):
    """The way to every part of a JSON value."""
    found = [path] if path else []
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        found += places(value[key], (*path, key))
    return found


def broken_json(random: random.Random, value):
    """A copy with one part replaced, removed, added or doubled."""
    value = copy.deepcopy(value)
    path = random.choice(places(value))
    *way, key = path
    target = functools.reduce(lambda inner, step: inner[step], way, value)
    match random.randrange(5):
        case 0:
            del target[key]
        case 1 if isinstance(target, list):
            target.insert(key, copy.deepcopy(target[key]))
        case 2 if isinstance(target, dict):
            target[random.choice(["n", "s", "k", "a", "b", "extra", "shape"])] = target[key]
        case 3 if isinstance(target[key], int):
            target[key] += random.choice((-1, 1))
        case _:
            target[key] = random.choice(VALUES)
    return value


def mutate(random: random.Random) -> bytes:
    file = sft_files.valid()
    match random.randrange(5):
        case 0:
            return broken_bytes(random, VALID)
        case 1:  # the header
            header = broken_json(random, file.header_dict())
            raw = json.dumps(header).encode("ascii")
            return struct.pack("<Q", len(raw)) + raw + VALID[8 + SIZE :]
        case 2:  # the header's text: repeated keys and the like
            raw = broken_bytes(random, VALID[8 : 8 + SIZE])
            return struct.pack("<Q", len(raw)) + raw + VALID[8 + SIZE :]
        case 3:  # the document, in half of the cases with the content id that belongs to it
            file.document = broken_json(random, file.document)
        case _:  # the content, with the content id that belongs to it
            name = random.choice(sorted(file.tensors))
            dtype, shape, data = file.tensors[name]
            data = bytearray(data)
            width = sft_files.WIDTHS[dtype]
            at = random.randrange(len(data) // width) * width
            number = random.choice(NUMBERS) % (1 << 8 * width)
            data[at : at + width] = number.to_bytes(width, "little")
            file.tensors[name] = (dtype, shape, bytes(data))
    if random.random() < 0.5:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            file.sign()
    return file.build()


def read(path) -> None:
    """Loads, and goes through all that was accepted."""
    delta = load(path)
    assert delta.nnz == len(delta.val) == sum(len(at) for _, at, _ in delta)
    for name, positions, values in delta:
        shape = delta.layout.shapes[delta.layout.ordinal(name)]
        assert positions.max() < np.prod(shape, dtype=object)
        assert np.isfinite(values.float().numpy()).all()


def test_fuzz(tmp_path):
    report = fuzz(tmp_path, mutate, read)
    print(report)
    assert report.inputs == COUNT
    # Some inputs are right by chance (another name, another value), most are not.
    assert 0.6 * COUNT < report.refused < COUNT
    assert report.slowest < 2
    assert report.grown < 64 << 20


def test_a_reader_that_crashes_is_caught(tmp_path):
    def crash(path):
        if path.read_bytes() != VALID:
            raise KeyError("n")

    with pytest.raises(AssertionError, match=r"input \d+ of seed 0: KeyError"):
        fuzz(tmp_path, mutate, crash, count=50)
