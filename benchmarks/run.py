"""`python -m benchmarks.run`: verifies each case, then times us and the peers in turn.

Times on shared processors drift, so the providers take turns and the ratio of medians is what
counts.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sparse_ft_kernels import native

from .cases import CASES, Case
from .shapes import MODELS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What README states: case, model, density.
DEFAULT = (
    ("select_topk", "100M", 0.01),
    ("masked_adamw", "xlmr-base", 0.028),
    ("compose", "xlmr-base", 0.028),
    ("restore", "xlmr-base", 0.028),
)


def peak_extra_bytes(job: Callable[[], object]) -> int:
    """Resident memory that a job needs beyond what was resident before (Linux; 0 elsewhere)."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return 0

    def field(name: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024

    gc.collect()
    try:
        clear.write_text("5")
    except OSError:
        return 0
    before = field("VmRSS")
    result = job()
    peak = field("VmHWM")
    del result
    return max(0, peak - before)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy, the yardstick of this run."""
    source, target = torch.ones(64_000_000), torch.empty(64_000_000)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / statistics.median(times[1:])


def measure(case: Case, repeats: int, console: Console) -> dict[str, dict[str, float]]:
    """Seconds (median, 20 % and 80 %) and peak extra memory of each provider."""
    case.verify()
    out: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {name: [] for name in case.providers}
    for name, job in case.providers.items():
        case.reset()
        # The first call: what a provider keeps (optimizer state) counts as much as what it frees.
        out[name] = {"peak_extra_bytes": peak_extra_bytes(job)}
    for turn in range(repeats):
        for name, job in case.providers.items():
            case.reset()
            start = time.perf_counter()
            result = job()
            times[name].append(time.perf_counter() - start)
            del result
        console.print(f"  {case.name}: round {turn + 1} of {repeats}", style="dim")
    for name, seconds in times.items():
        ordered = sorted(seconds)
        out[name] |= {
            "median": statistics.median(ordered),
            "p20": ordered[int(0.2 * (len(ordered) - 1))],
            "p80": ordered[-1 - int(0.2 * (len(ordered) - 1))],
        }
    return out


def report(
    case: Case, measured: dict[str, dict[str, float]], bandwidth: float, console: Console
) -> None:
    table = Table(title=f"{case.name}: {case.conditions}", title_justify="left")
    for column in (
        "",
        "ms (median)",
        "20–80 %",
        "GB/s",
        "% of copy",
        "extra MB",
        "ours is faster by",
    ):
        table.add_column(column, justify="left" if not column else "right")
    ours = next(iter(measured.values()))["median"]
    for i, (name, m) in enumerate(measured.items()):
        rate = case.bytes_moved / m["median"]
        table.add_row(
            name,
            f"{m['median'] * 1e3:.1f}",
            f"{m['p20'] * 1e3:.1f}–{m['p80'] * 1e3:.1f}",
            f"{rate / 1e9:.1f}" if i == 0 else "",
            f"{100 * rate / bandwidth:.0f}" if i == 0 else "",
            f"{m['peak_extra_bytes'] / 1e6:.1f}",
            "" if i == 0 else f"{m['median'] / ours:.1f}×",
        )
    console.print(table)


def machine() -> dict[str, Any]:
    """What a stored result must say of where it was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    model = "unknown"
    if (info := Path("/proc/cpuinfo")).exists():
        model = next(
            (
                x.split(":")[1].strip()
                for x in info.read_text().splitlines()
                if x.startswith("model name")
            ),
            model,
        )
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "library": native.load()[1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def scaling(console: Console, repeats: int) -> None:
    """Time against N and nnz: both must be linear."""
    table = Table(
        title="scaling, fp32: milliseconds (and nanoseconds per parameter)", title_justify="left"
    )
    table.add_column("parameters")
    names = ("select_topk", "masked_adamw", "compose")
    for name in names:
        table.add_column(name, justify="right")
    for n in (12_500_000, 25_000_000, 50_000_000, 100_000_000):
        MODELS["scaling"] = {"matrix": (n,)}
        row = [f"{n / 1e6:.1f}M"]
        for name in names:
            case = CASES[name]("scaling", 0.02, torch.float32)
            job = next(iter(case.providers.values()))
            seconds = []
            for _ in range(repeats):
                case.reset()
                job()
                start = time.perf_counter()
                job()
                seconds.append(time.perf_counter() - start)
            best = statistics.median(seconds)
            row.append(f"{best * 1e3:.1f} ({best / n * 1e9:.2f})")
        table.add_row(*row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--op", choices=sorted(CASES), action="append", help="only these cases")
    parser.add_argument("--shape", choices=sorted(MODELS), help="model; default: each case's own")
    parser.add_argument("--density", type=float, help="default: each case's own")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a 25M model, three rounds")
    parser.add_argument(
        "--scaling", action="store_true", help="also time against the size of the model"
    )
    parser.add_argument("--json", type=Path, help="append one line per case to this file")
    arguments = parser.parse_args()
    console = Console(width=118)
    library, reason = native.load()
    if library is None:
        parser.error(f"the C++ library cannot be used, so there is nothing to measure: {reason}")
    here = machine()
    bandwidth = copy_bandwidth()
    console.print(
        f"{here['cpu']}, {here['threads']} threads, torch {here['torch']}, {here['library']}"
    )
    console.print(f"copy: {bandwidth / 1e9:.1f} GB/s")
    for op, shape, density in DEFAULT:
        if arguments.op and op not in arguments.op:
            continue
        shape = "25M" if arguments.quick else arguments.shape or shape
        density = arguments.density or density
        case = CASES[op](shape, density, DTYPES[arguments.dtype])
        measured = measure(case, 3 if arguments.quick else arguments.repeats, console)
        report(case, measured, bandwidth, console)
        if arguments.json:
            record = {
                "case": op,
                "shape": shape,
                "density": density,
                "dtype": arguments.dtype,
                "bytes_moved": case.bytes_moved,
                "copy_bandwidth": bandwidth,
                "providers": measured,
                **here,
            }
            with arguments.json.open("a") as out:
                out.write(json.dumps(record, sort_keys=True) + "\n")
        del case
    if arguments.scaling:
        scaling(console, 3)


if __name__ == "__main__":
    main()
