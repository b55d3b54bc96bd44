"""A save that is killed leaves a whole file: the old one or the new one."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

import sparse_ft as sf

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses signals")

MAKE = """
import sys, torch, sparse_ft as sf
def make(value):
    layout = sf.Layout.of({"w": (40, 65536)})
    support = sf.Support.full(layout)
    return sf.SparseDelta(support, torch.full((support.nnz,), value))
"""
SAVE = """
path = sys.argv[1]
deltas = [make(1.0), make(2.0)]
for delta in deltas:
    delta.content_id
print("ready", flush=True)
while True:
    for delta in deltas:
        delta.save(path)
"""


def python(script, path, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", MAKE + script, str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def whole(path) -> float:
    """The value that all of a delta's entries have."""
    (value,) = sf.SparseDelta.load(path).val.unique().tolist()
    return value


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    path = tmp_path / "x.safetensors"
    found = set()
    for trial in range(4):
        child = python(SAVE, path)
        assert child.stdout.readline() == "ready\n"
        while not path.exists():
            time.sleep(0.001)
        time.sleep(random.Random(trial).uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        found.add(whole(path))
    assert found <= {1.0, 2.0}
    # What was not finished stands beside it, hidden, and harms no folder that is loaded.
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {path.name}
