"""Triton's kernels as machine code: they compile for three generations of GPU and an AMD one, and
stay within stored limits. No GPU is needed.

In processes of their own: what the interpreter has decorated cannot be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_ft_kernels import aot

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("sm_80", "sm_100", "gfx942")
# Registers of a thread on NVIDIA targets, by kernel: those of Triton 3.7.1 for sm_90 and a quarter
# more, or the most of Triton 3.6.0 and 3.9.0 for sm_80 … sm_100 where that is larger.
LIMITS = json.loads((ROOT / "tests" / "aot_limits.json").read_text(encoding="utf-8"))


def run(*command: str, code: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """Every kernel for one target, and those of bfloat16 for the others: all take twice as long."""
    folder = tmp_path_factory.mktemp("aot")
    others = [word for target in OTHERS for word in ("--target", target)]
    lines = []
    for name, options in (("all", ["--target", "sm_90"]), ("bf16", ["--only", "bf16", *others])):
        file = folder / f"{name}.jsonl"
        run("-m", "sparse_ft_kernels.aot", "--json", str(file), *options)
        lines += file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_kernels_compile_for_every_target(compiled):
    assert {line["name"] for line in compiled if line["target"] == "sm_90"} == LIMITS.keys()
    brain = {name for name in LIMITS if "bf16" in name}
    assert len(brain) > 10
    for target in OTHERS:
        assert {line["name"] for line in compiled if line["target"] == target} == brain


@pytest.mark.slow
def test_registers_stay_within_their_limits(compiled):
    beyond = {
        f"{line['name']} {line['target']}": (line["registers"], LIMITS[line["name"]])
        for line in compiled
        if line["target"].startswith("sm_") and line["registers"] > LIMITS[line["name"]]
    }
    assert not beyond


@pytest.mark.slow
def test_hot_kernels_keep_registers_and_read_wide(compiled):
    hot = [line for line in compiled if line["hot"]]
    assert {line["name"].split()[0] for line in hot} >= {
        *("select_topk", "gather", "masked_adamw", "dense_adamw", "anchor_l1", "compose"),
    }
    assert [line for line in hot if line["spills"] > aot.SPILL] == []
    nvidia = [line for line in hot if line["target"].startswith("sm_")]
    assert [line for line in nvidia if max(line["load"], line["store"]) < 128] == []
    assert [line for line in compiled if line["narrow"]] == []


@pytest.mark.slow
def test_no_kernel_rounds_otherwise_than_the_reference(compiled):
    assert [line for line in compiled if line["inexact"]] == []


KERNEL = """
import sys
import triton
import triton.language as tl
from sparse_ft_kernels import aot
from sparse_ft_kernels.triton_common import Variant

@triton.jit
def narrow(x_ptr, BLOCK: tl.constexpr):
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + e, tl.load(x_ptr + e) + 1)

@triton.jit
def late(x_ptr, BLOCK: tl.constexpr):
    e = (tl.program_id(0) * BLOCK).to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(x_ptr + e, tl.load(x_ptr + e) + 1)

@triton.jit
def wide(x_ptr, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + e, tl.load(x_ptr + e) + 1)

@triton.jit
def spilling(x_ptr, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + e)
    y = tl.load(x_ptr + e + BLOCK)
    tl.debug_barrier()
    tl.store(x_ptr + e, x * y)
    tl.store(x_ptr + e + BLOCK, tl.cumsum(x + y, 0))

@triton.jit
def rough(x_ptr, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + e)
    tl.store(x_ptr + e, tl.math.fma(x, x, x) / tl.sqrt(x))

for kernel, size, warps in ((narrow, 1024, 4), (late, 1024, 4), (wide, 1024, 4), (wide, 128, 4),
                            (spilling, 32768, 1), (rough, 1024, 4)):
    probe = Variant("probe", kernel, {"x_ptr": "*fp32"}, {"BLOCK": size}, warps)
    found = aot.inspect(probe, "sm_90")
    inexact = [i.split(".")[0] for i in found.inexact]
    print(len(found.narrow) > 0, found.spills > 0, found.load, *inexact)
"""


def test_the_check_sees_what_it_looks_for(tmp_path):
    """A 32-bit address, a late widening, a narrow access and a spill are found; a good kernel is
    not blamed."""
    script = tmp_path / "probe.py"
    script.write_text(KERNEL, encoding="utf-8")
    lines = run(str(script)).split("\n")
    assert lines[0].startswith("True False"), "a 32-bit address"
    assert lines[1].startswith("True False"), "a 32-bit product that is widened too late"
    assert lines[2] == "False False 128"
    assert lines[3] == "False False 32"
    assert lines[4].startswith("False True"), "a spill"
    assert lines[5] == "False False 128 div fma sqrt", "rounding of its own"


LAST = """
import re
import sys
from sparse_ft_kernels import aot

for variant in aot.variants():
    if variant.name in sys.argv[1:]:
        ptx = aot.compile_variant(variant, "sm_90").asm["ptx"]
        print(*re.findall(r"bar\\.sync|atom\\.global\\.\\w+\\.acq_rel|ld\\.global\\.cg", ptx))
"""


@pytest.mark.slow
def test_the_last_program_sees_what_the_others_did(tmp_path):
    """Who counts the programs that have finished does so for all its threads, which a barrier
    brings together, and orders what they read and wrote before it; all learn the count behind a
    second barrier; and what others added is read past the first-level cache.
    """
    script = tmp_path / "last.py"
    script.write_text(LAST, encoding="utf-8")
    names = ("masked_adamw f32 dense grad", "dense_adamw f32", "select_topk digit next")
    lines = run(str(script), *names).splitlines()
    assert len(lines) == len(names)
    for line in lines:
        assert line.count("acq_rel") == 1
        assert "bar.sync atom.global.gpu.acq_rel bar.sync" in line
    digit = next(line for line in lines if "ld.global.cg" in line)
    assert digit.index("acq_rel bar.sync ld.global.cg") < digit.rindex("ld.global.cg")


def test_interpreted_kernels_are_refused():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "sparse_ft_kernels.aot"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "unset it" in done.stdout
