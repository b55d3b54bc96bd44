"""Memory of sparse tuning, measured in a process of its own: the model, 16 to 20 bytes for each
selected entry and two for its place, and one gradient at a time where the hooks gather."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse_ft as sf

LAYERS, SIZE, K = 8, 1600, 1_000_000
MEGABYTE = 1 << 20
GRADIENT = 4 * SIZE * SIZE
# Activations, and pages of which a part is used. Less than a second gradient.
SLACK = 6 * MEGABYTE


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))


def tensors(optimizer: sf.MaskedAdamW) -> int:
    """Bytes of all memory that the optimizer keeps, shared memory once, the weights apart."""
    units = [unit for _, unit in optimizer._units]
    mine = {id(p) for unit in units for p in unit.parameters}
    found = {}
    for unit in units:
        for value in (*vars(unit).values(), unit.support.idx, unit.support.ptr):
            if isinstance(value, torch.Tensor) and id(value) not in mine:
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize(
    ("gather", "norm", "each"), [("step", None, 16), ("step", 1.0, 20), ("hook", None, 20)]
)
def test_the_state_has_16_or_20_bytes_an_entry(gather, norm, each):
    net = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 500))
    support = sf.select(net, k=10_001, criterion="random")
    optimizer = sf.MaskedAdamW(net, support, gather=gather, max_grad_norm=norm)
    for _ in range(2):
        net(torch.randn(4, 300)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    places = 2 * support.nnz + 8 * len(support.ptr)
    scalars = 12  # the number of the step, the learning rate
    assert tensors(optimizer) == each * support.nnz + places + scalars


def peak(path: str = "/proc/self/status") -> int:
    """The most memory that this process has had since `forget_peak`."""
    status = Path(path).read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def now() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train(net: nn.Module, support: sf.Support, gather: str) -> None:
    optimizer = sf.MaskedAdamW(net, support, lr=1e-3, max_grad_norm=1.0, gather=gather)
    for _ in range(3):
        net(torch.randn(2, net[0].in_features)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.detach_hooks()


def measured() -> dict[str, int]:
    """Bytes beyond the model that sparse tuning takes at most, by way of gathering."""
    net = model()
    support = sf.select(net, k=K, criterion="random")
    # What libraries load and allocate once: the first optimizer imports much of torch.
    small = nn.Sequential(nn.Linear(8, 8, bias=False))
    found = {}
    for gather in ("hook", "step"):
        train(small, sf.select(small, k=8, criterion="random"), gather)
        net(torch.randn(2, SIZE)).square().mean().backward()
        net.zero_grad()
        before = now()
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        train(net, support, gather)
        found[gather] = peak() - before
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_is_the_state_and_one_gradient():
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # So that freed memory goes back to the system at once.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    every = LAYERS * GRADIENT
    # One gradient at a time; or all of them, and while they are clipped the selected entries' too.
    assert 20 * K < found["hook"] <= 20 * K + GRADIENT + SLACK
    assert 16 * K + every < found["step"] <= 16 * K + 4 * K + every + SLACK


if __name__ == "__main__":
    print(json.dumps(measured()))
