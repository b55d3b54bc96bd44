"""compute-sanitizer over every kernel on small sizes: no access outside, no race."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu_oracles import REAL

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 130

# What runs under the tool. It must be small: the tool slows a kernel by one or two orders.
SCRIPT = """
import torch
import oracles, sparse_ft_kernels as ops
from gpu_oracles import lengths_of, moved, off_by
g = torch.Generator().manual_seed(0)
model = oracles.tensors([(300,), (0,), (65_537,), (1,)], g, getattr(torch, "{dtype}"))
sizes = oracles.numels(model)
supports = [oracles.random_support(sizes, d, g) for d in (0.02, 0.03)]
idx, ptr = ([moved(s[i]) for s in supports] for i in range(2))
n = [len(i) for i in idx]
start = moved(oracles.take(model, supports[0][2]))
other = moved(oracles.tensors([(300,), (0,), (65_537,), (1,)], g, getattr(torch, "{dtype}")))
weights = moved(model)
zeros = lambda: [torch.zeros(n[0], device="cuda") for _ in range(3)]
step, lr = torch.zeros((), device="cuda"), torch.ones(1, dtype=torch.float64, device="cuda")
val = [torch.randn(k, generator=g).cuda() for k in n]
out = torch.zeros(n[0], device="cuda")
ops.select_topk(weights, other, k=700)
ops.select_topk(weights, [], k=700, exclude=(idx[0], ptr[0]), tie="all")
ops.select_random(weights, k=700, seed=1)
ops.gather(other, sizes, idx[0], ptr[0], out)
for w in (weights, [off_by(t, 1) for t in weights]):
    ops.masked_adamw_(w, idx[0], ptr[0], other, *zeros(), start, step, lr=lr, l1=0.1)
    ops.masked_adamw_(w, idx[0], ptr[0], out, *zeros(), start, step, lr=lr)
    moments = [[torch.zeros(t.shape, device="cuda") for t in w] for _ in range(2)]
    ops.dense_adamw_(w, other, *moments, [], weights, step, lr=lr, l1=0.1)
ops.anchor_l1_(other, weights, other, 0.1)
undo = [torch.empty(k, dtype=weights[0].dtype, device="cuda") for k in n]
ops.compose_(weights, idx, ptr, val, [1.0, 0.5], undo)
again = [torch.empty_like(undo[0])]
ops.swap_(weights, idx, ptr, undo, idx[:1], ptr[:1], val[:1], [0.5], again)
ops.restore_(weights, idx[:1], ptr[:1], again)
lengths = moved(lengths_of(sizes))
ops.merge(lengths, idx, ptr, val, [1.0, -1.0])
ops.overlap(idx[0], ptr[0], val[0], idx[1], ptr[1], val[1])
ops.digest(weights, idx[0], ptr[0])
ops.check_support(lengths, idx[0], ptr[0], val[0])
torch.cuda.synchronize()
print("all ops ran")
"""


def find_tool() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    )


# One data type is enough for races: shared memory holds fp32, fp64 and integers alone.
RUNS = (("memcheck", "float32"), ("memcheck", "bfloat16"), ("racecheck", "float32"))


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Iterator[dict]:
    """All runs at once: each spends most of its time in one thread of the host."""
    program = find_tool()
    if program is None or not REAL:
        yield {}
        return
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SPARSE_FT_BACKEND": "triton",
        # The tool sees single allocations, not what torch keeps of them.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    running = {}
    for tool, dtype in RUNS:
        log = tmp_path_factory.mktemp("sanitizer") / f"{tool}-{dtype}.log"
        script = [sys.executable, "-c", SCRIPT.format(dtype=dtype)]
        command = [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        with log.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(
                [*command, *script], stdout=out, stderr=subprocess.STDOUT, env=environment
            )
        running[tool, dtype] = (process, log, time.monotonic() + LIMIT_S)
    try:
        yield running
    finally:
        for process, _, _ in running.values():
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.mark.parametrize(("tool", "dtype"), RUNS)
def test_nothing_is_found(tool, dtype, cuda, started):
    if not started:
        pytest.skip("compute-sanitizer is not on this machine")
    process, log, end = started[tool, dtype]
    try:
        code = process.wait(timeout=max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} did not finish in {LIMIT_S} s")
    text = log.read_text(encoding="utf-8", errors="replace")[-6000:]
    unusable = ("Device not supported", "not supported on this", "Unable to find injection")
    if any(sign in text for sign in unusable):
        pytest.skip(f"compute-sanitizer cannot work on this machine: {text[-300:]}")
    assert code == 0, text
    assert "all ops ran" in text, text
