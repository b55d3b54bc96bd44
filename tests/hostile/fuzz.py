"""A seeded loop of broken inputs for a reader: no crash, no other exception, no hang, no growth.

`SPARSE_FT_FUZZ=200000 pytest tests/hostile` runs that many inputs per reader instead of a few
thousand.
"""

import gc
import os
import random
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sparse_ft.files import SFTFileError

COUNT = int(os.environ.get("SPARSE_FT_FUZZ", "3000"))
# Numbers at the edges of what formats and processors can count.
NUMBERS = [
    *(0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 65535, 65536, 65537, 2**20, 2**31 - 1, 2**31, 2**32),
    *(2**48, 2**48 + 1, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30),
]


class Report(NamedTuple):
    inputs: int
    refused: int
    seconds: float
    slowest: float
    grown: int  # bytes of resident memory, from after the first tenth to the end


def fuzz(
    folder: Path,
    mutate: Callable[[random.Random], bytes],
    read: Callable[[Path], object],
    count: int = COUNT,
    seed: int = 0,
) -> Report:
    """Reads `count` mutated files. Whatever is neither accepted nor an SFTFileError gets out, with
    the number of the input, which `mutate(random.Random(f"{seed}:{number}"))` makes again."""
    path = folder / "fuzzed"
    refused, slowest, settled = 0, 0.0, 0
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            if number == count // 10:
                settled = _resident()
            path.write_bytes(mutate(random.Random(f"{seed}:{number}")))
            start, said = time.perf_counter(), ""
            try:
                read(path)
            except SFTFileError as error:
                said = str(error)
            except BaseException as error:
                raise AssertionError(f"input {number} of seed {seed}: {error!r}") from error
            slowest = max(slowest, time.perf_counter() - start)
            if said:
                refused += 1
                assert str(path) in said, number
                assert len(said) < 2000, number
    return Report(
        count, refused, time.perf_counter() - begun, slowest, max(0, _resident() - settled)
    )


def _resident() -> int:
    gc.collect()
    if sys.platform.startswith("linux"):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def broken_bytes(random: random.Random, raw: bytes) -> bytes:
    """Raw bytes with a few faults: flipped, cut, repeated, moved, overwritten by numbers."""
    data = bytearray(raw)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        at = random.randrange(len(data) + 1)
        match random.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << random.randrange(8)
            case 1:
                del data[at : at + random.choice((1, 2, 4, 8, 64, len(data)))]
            case 2:
                data[at:at] = data[at : at + random.choice((1, 8, 64))]
            case 3:
                data[at:at] = random.randbytes(random.choice((1, 2, 8, 100)))
            case 4:
                size = random.choice((1, 2, 4, 8))
                number = random.choice(NUMBERS) % (1 << 8 * size)
                data[at : at + size] = number.to_bytes(size, "little")
            case _:
                other = random.randrange(len(data) + 1)
                size = random.choice((1, 4, 16))
                data[at : at + size] = data[other : other + size]
    return bytes(data)
