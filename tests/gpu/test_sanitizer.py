"""compute-sanitizer over every kernel on small sizes: no access outside, no race."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 150

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tool, dtype, cuda):
    if tool == "racecheck" and dtype != "float32":
        pytest.skip("one data type is enough: shared memory holds fp32, fp64 and integers alone")
    program = find_tool()
    if program is None:
        pytest.skip("compute-sanitizer is not on this machine")
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SPARSE_FT_BACKEND": "triton",
        # The tool sees single allocations, not what torch keeps of them.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    script = [sys.executable, "-c", SCRIPT.format(dtype=dtype)]
    command = [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20", *script]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} did not finish in {LIMIT_S} s")
    log = (done.stdout + done.stderr)[-6000:]
    unusable = ("Device not supported", "not supported on this", "Unable to find injection")
    if any(sign in log for sign in unusable):
        pytest.skip(f"compute-sanitizer cannot work on this machine: {log[-300:]}")
    assert done.returncode == 0, log
    assert "all ops ran" in log, log
