"""Compiles every Triton kernel ahead of time and reads its machine code: no GPU is needed.

`python -m sparse_ft_kernels.aot` prints, for each kernel and target, registers, spilled bytes,
shared memory and the widest global load and store, and fails where a kernel does not compile, where
a hot one spills or reads its streams in pieces, or where an address could overflow 32 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes: one or two registers put aside once, as ptxas does to fit another program on a processor.
SPILL = 8
WIDE = 128  # bits: the most that a thread can read or write at once on all targets
# Arguments with a value for each tile. Tiles are fewer than 2^31; entries need not be.
TILE_TABLES = ("_code_ptr", "code_ptr", "first_ptr", "length_ptr", "ptr_ptr")


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one kernel says.

    Args:
        name: Kernel and variant.
        target: GPU architecture.
        registers: 32-bit registers of a thread (vector registers on AMD).
        spills: Bytes of a thread's registers that are kept in memory.
        shared: Bytes of shared memory of a program.
        load: Bits of the widest global load.
        store: Bits of the widest global store.
        narrow: Addresses that are formed with 32-bit arithmetic and could overflow it.
        inexact: Instructions that other backends cannot reproduce (contracted, approximate, or
            flushing subnormal numbers); looked for on NVIDIA targets.
        hot: It streams: it must not spill, and must read 16 bytes at once.
    """

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    load: int
    store: int
    narrow: tuple[str, ...]
    inexact: tuple[str, ...]
    hot: bool

    def faults(self) -> list[str]:
        """What it must not have."""
        found = [f"address in 32 bits: {line}" for line in self.narrow]
        if self.inexact:
            found.append(f"uses {', '.join(self.inexact)}")
        if self.hot and self.spills > SPILL:
            found.append(f"spills {self.spills} bytes")
        # An AMD wavefront has 64 lanes: a block of the same size is fewer bytes for each.
        if self.hot and self.target.startswith("sm_") and max(self.load, self.store) < WIDE:
            found.append(f"widest access {max(self.load, self.store)} bits, not {WIDE}")
        return found


def variants() -> list[Any]:
    """Every kernel variant of every op."""
    from .triton_backend import STEMS

    found: list[Any] = []
    for stem in sorted(set(STEMS.values())):
        found += import_module(f".triton_{stem}", __package__).variants()
    return found


def compile_variant(variant: Any, target: str) -> Any:
    """The compiled kernel, with its text in every stage under `.asm`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    names = variant.kernel.arg_names
    signature = {n: variant.signature.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): value for n, value in variant.constants.items()}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in variant.signature and n not in variant.unaligned
    }
    source = ASTSource(
        fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    options = {"num_warps": variant.num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=gpu, options=options)


def inspect(variant: Any, target: str) -> Compiled:
    """Compiles one kernel and reads its machine code."""
    compiled = compile_variant(variant, target)
    inexact: tuple[str, ...] = ()
    if target.startswith("sm_"):
        registers, spills, load, store = _read_nvidia(compiled.asm["cubin"])
        inexact = tuple(sorted(set(_INEXACT.findall(compiled.asm["ptx"]))))
    else:
        registers, spills, load, store = _read_amd(compiled.asm["amdgcn"])
    narrow = tuple(narrow_addresses(compiled.asm["ttir"], variant.kernel.arg_names))
    shared = int(compiled.metadata.shared)
    return Compiled(
        *(variant.name, target, registers, spills, shared, load, store, narrow, inexact),
        variant.hot,
    )


# --- machine code ---------------------------------------------------------------------------------


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_INEXACT = re.compile(r"\b(?:fma|div\.full|[\w.]+\.approx|[\w.]+\.ftz)[\w.]*")
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def _widest(instruction: str, sass: str) -> int:
    widths = [0]
    for match in re.finditer(rf"\b{instruction}\.E((?:\.\w+)*)", sass):
        widths.append(next((_WIDTHS[p] for p in match[1].split(".") if p in _WIDTHS), 32))
    return max(widths)


def _read_nvidia(cubin: bytes) -> tuple[int, int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        sass = _run(_tool("nvdisasm"), "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no register count:\n{usage}")
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local, _widest("LDG", sass), _widest("STG", sass)


def _read_amd(text: str) -> tuple[int, int, int, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    def widest(kind: str) -> int:
        words = re.findall(rf"(?:global|buffer)_{kind}_dword(?:x(\d))?\b", text)
        return max((32 * int(n or 1) for n in words), default=0)

    spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return number("vgpr_count"), spills, widest("load"), widest("store")


# --- addresses ------------------------------------------------------------------------------------


def narrow_addresses(ttir: str, arguments: Sequence[str]) -> Iterator[str]:
    """Lines of Triton's representation that could overflow 32 bits in a large model.

    Two are looked for: a 32-bit offset, other than a constant, that is added to an array of
    entries; and a 32-bit product that is widened afterwards. An offset inside a tile is added to
    the tile's 64-bit base, and a tile's number to a table of tiles: these may be 32 bits wide.

    Args:
        ttir: The text.
        arguments: Names of the kernel's parameters.
    """
    made: dict[str, tuple[str, str]] = {}  # value -> operation, first operand
    for line in ttir.splitlines():
        match = re.match(r"\s*(%[\w#]+)(?::\d+)? = ([\w.]+)\s*(%[\w#]+)?(.*)", line)
        if not match:
            continue
        value, operation, first, rest = match.groups()
        made[value] = (operation, first or "")
        if operation == "arith.extsi" and first and made.get(first, ("", ""))[0] == "arith.muli":
            yield line.strip()
        if operation != "tt.addptr" or not re.search(r"[ <x]i32>? loc|[ <x]i32>?$", rest):
            continue
        offset = re.search(r",\s*(%[\w#]+)", rest)
        if offset and (offset[1].startswith("%c") or _constant(made, offset[1])):
            continue
        root = first or ""
        while root in made and made[root][0] in ("tt.splat", "tt.addptr", "tt.broadcast"):
            root = made[root][1]
        if root in made or root.lstrip("%") not in arguments:
            continue  # the base of a tile
        if re.search(r"ptr<i64>", rest) or root.endswith(TILE_TABLES):
            continue
        yield line.strip()


def _constant(made: dict[str, tuple[str, str]], value: str) -> bool:
    """Is a value made of constants alone (a range, a literal)?"""
    operation, first = made.get(value, ("", ""))
    if operation in ("tt.make_range", "arith.constant"):
        return True
    return operation in ("tt.splat", "tt.expand_dims") and _constant(made, first)


# --- the command ----------------------------------------------------------------------------------


def _job(index: int, target: str) -> Compiled | str:
    variant = variants()[index]
    try:
        return inspect(variant, target)
    except Exception as error:
        return f"{variant.name} for {target}: {type(error).__name__}: {str(error)[:2000]}"


def inspect_all(targets: Sequence[str], only: str = "") -> Iterator[Compiled | str]:
    """Every kernel whose name contains `only`, for every target; a text where it fails."""
    jobs = [(i, t) for i, v in enumerate(variants()) if only in v.name for t in targets]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_job, *zip(*jobs, strict=True))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sparse_ft_kernels.aot", description=str(__doc__)
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="write one line for each kernel and target here")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
        return 2
    import triton

    print(f"triton {triton.__version__}")
    print(f"{'kernel':<44}{'target':<8}registers  spills  shared  load  store")
    failed, lines = 0, []
    for found in inspect_all(options.target or TARGETS, options.only):
        if isinstance(found, str):
            failed += 1
            print(f"FAILED {found}", flush=True)
            continue
        faults = found.faults()
        failed += bool(faults)
        lines.append(json.dumps(asdict(found)))
        print(
            f"{found.name:<44}{found.target:<8}{found.registers:9}{found.spills:8}"
            f"{found.shared:8}{found.load:6}{found.store:7}"
            + (f"  FAULT: {'; '.join(faults)}" if faults else ""),
            flush=True,
        )
    if options.json:
        options.json.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
