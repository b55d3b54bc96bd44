"""`python -m benchmarks.gpu_suite OUT`: everything that needs a GPU, in less than eight minutes.

It builds the CPU library where a compiler is, runs the GPU tests (each file in a process of its
own, several at once: one that brings the device down takes no other with it), then the benchmark on
the GPU, then the ahead-of-time check. Each part has a time limit, and none stops another. OUT
receives a log and a summary of every part, `benchmarks.jsonl`, and `summary.json`; the exit status
is 1 where anything failed.

A plain checkout is enough: nothing must be installed but torch, triton, transformers, numpy,
safetensors and pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "pytest")
TOTAL_S = 460.0
# What a part may take at most, and how much of the total must be left for those after it.
BUILD_S, TESTS_S, BENCHMARK_S, AOT_S = 90.0, 170.0, 130.0, 120.0
# Each group of cases is a process of its own, for the same reason as the files of tests.
GROUPS = (
    ("masked_adamw", "gather", "dense_adamw", "anchor_l1"),
    ("compose", "compose_2", "restore", "swap"),
    ("merge", "reduce", "overlap", "check_support", "digest"),
    ("select_topk", "select_random", "index_build"),
    ("training_step",),
)


@dataclass
class Part:
    """What became of one part.

    Args:
        name: Its name, and that of its log.
        status: "passed", "failed", "timed out" or "skipped".
        seconds: How long it ran.
        note: Counts, or why it did not run.
        failures: Names of what failed in it.
    """

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""
    failures: list[str] = field(default_factory=list)


class Suite:
    """Runs the parts.

    Args:
        out: Folder for logs and results.
        total: Seconds for everything.
    """

    def __init__(self, out: Path, total: float) -> None:
        self.out = out
        self.end = time.monotonic() + total
        self.parts: list[Part] = []
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET",)},
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def call(self, name: str, limit: float, *arguments: str) -> Part:
        """Runs `python arguments` with its output in `name.log`."""
        limit = min(limit, self.left())
        if limit < 5:
            return Part(name, "skipped", note="no time was left")
        begin = time.monotonic()
        with (self.out / f"{name}.log").open("w", encoding="utf-8") as log:
            # In a session of its own, so that what it starts can be ended with it.
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=limit)
                status, note = "passed" if code == 0 else "failed", f"exit status {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status, note = "timed out", f"stopped after {limit:.0f} s"
        return Part(name, status, time.monotonic() - begin, note)

    def add(self, part: Part) -> None:
        """Keeps a part and says how it went; what failed, with the end of its log."""
        self.parts.append(part)
        print(f"[{part.status}] {part.name}: {part.seconds:.0f} s, {part.note}", flush=True)
        for name in part.failures[:20]:
            print(f"    {name}", flush=True)
        log = self.out / f"{part.name}.log"
        if part.status in ("failed", "timed out") and log.exists():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
            print("\n".join(f"    | {line[:200]}" for line in lines), flush=True)

    def tests(self, workers: int) -> None:
        """Every file of tests/gpu."""
        files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
        limit = min(TESTS_S, self.left())
        # Several processes at once: none may take every core.
        self.environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

        def one(file: Path) -> Part:
            name = f"tests-{file.stem.removeprefix('test_')}"
            report = self.out / f"{name}.xml"
            part = self.call(
                *(name, limit, "-m", "pytest", str(file.relative_to(ROOT)), "-m", "gpu", "-v"),
                *("--tb=short", "--durations=8", f"--junitxml={report}"),
                *("-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"),
            )
            read_report(part, report)
            return part

        with ThreadPoolExecutor(workers) as pool:
            for part in pool.map(one, files):
                self.add(part)
        del self.environment["OMP_NUM_THREADS"]

    def benchmark(self, extra: Sequence[str]) -> None:
        """The benchmark on the GPU; its tables are printed as well."""
        lines = self.out / "benchmarks.jsonl"
        limit = min(2 * BENCHMARK_S, self.left() - 30)
        end = time.monotonic() + limit
        for group in GROUPS:
            name = f"benchmarks-{group[0]}"
            mine = min(BENCHMARK_S, end - time.monotonic())
            part = self.call(
                *(name, mine, "-m", "benchmarks.run", "--device", "cuda", "--json", str(lines)),
                *("--limit", f"{max(1.0, mine - 30):.0f}"),
                *(word for case in group for word in ("--op", case)),
                *extra,
            )
            log = self.out / f"{name}.log"
            if part.status == "passed" and log.exists():
                print(log.read_text(encoding="utf-8", errors="replace"), flush=True)
            self.add(part)

    def finish(self) -> int:
        """Writes and prints the summary; the exit status."""
        summary = {"parts": [asdict(part) for part in self.parts], "versions": versions()}
        text = json.dumps(summary, indent=1)
        (self.out / "summary.json").write_text(text, encoding="utf-8")
        print("\nsummary")
        for part in self.parts:
            print(f"  {part.status:<10}{part.name:<26}{part.seconds:6.0f} s  {part.note}")
        bad = [part.name for part in self.parts if part.status != "passed"]
        print(f"FAILED: {', '.join(bad)}" if bad else "all passed", flush=True)
        return 1 if bad else 0


def read_report(part: Part, report: Path) -> None:
    """Adds the counts of pytest's own report, where it came to write one."""
    if not report.exists():
        return
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
            part.failures.append(case.get("name", "?"))
        elif "skipped" in kinds:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    part.note = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    if part.status == "passed" and not counts["passed"] and "sanitizer" not in part.name:
        part.status = "failed"
        part.note += ": nothing ran"


def versions() -> dict[str, str]:
    """Versions of what the suite needs."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    for tool in ("gcc", "nvcc", "compute-sanitizer", "nvidia-smi"):
        found[tool] = shutil.which(tool) or "missing"
    return found


def device_name() -> str | None:
    """Name of the first CUDA device, found in another process; None where there is none."""
    code = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else None


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder for logs and results")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for everything together")
    parser.add_argument("--workers", type=int, default=6, help="files of tests at the same time")
    parser.add_argument(
        "--skip", action="append", default=[], choices=("build", "tests", "benchmarks", "aot")
    )
    parser.add_argument("--quick", action="store_true", help="benchmarks on a small model")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(options.out.resolve(), options.seconds)
    for name, value in versions().items():
        print(f"{name}: {value}")
    found = device_name()
    if not found:
        print("torch sees no CUDA device: there is nothing that this suite could run")
        return 2
    print(f"device: {found}", flush=True)
    if "build" not in options.skip:
        suite.add(suite.call("build", BUILD_S, "-m", "sparse_ft_kernels.build", "--cpu"))
        if suite.parts[-1].status != "passed":
            # The tests compare with the definition in torch then; they need not try again.
            suite.environment["SPARSE_FT_CPU"] = "0"
            suite.parts[-1].note += ": the CPU side is the reference in torch, which is slow"
    suite.environment["SPARSE_FT_CUDA"] = "0"
    if "tests" not in options.skip:
        suite.tests(options.workers)
    if "benchmarks" not in options.skip:
        suite.benchmark(["--quick"] if options.quick else [])
    if "aot" not in options.skip:
        suite.add(
            suite.call(
                *("aot", AOT_S, "-m", "sparse_ft_kernels.aot"),
                *("--json", str(suite.out / "aot.jsonl")),
            )
        )
    return suite.finish()


if __name__ == "__main__":
    sys.exit(main())
