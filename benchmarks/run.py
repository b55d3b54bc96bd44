"""`python -m benchmarks.run`: verifies each case, then times us and the peers in turn.

Times on shared processors drift, so the providers take turns and the ratio of medians is what
counts. With `--device cuda`, events give the time of each call; what can be captured is also
replayed as a CUDA graph, which is the device's work alone.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparse_ft_kernels import native

from .cases import CASES, Case
from .clocks import Clock, clock_of
from .shapes import MODELS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bytes per second by which times were predicted before there were any measurements (an H200).
PREDICTED_BANDWIDTH = 4.3e12


class Job(NamedTuple):
    """One line of a run."""

    case: str
    shape: str
    density: float
    dtype: str = "fp32"


DEFAULT: dict[str, tuple[Job, ...]] = {
    # What README states.
    "cpu": (
        Job("select_topk", "100M", 0.01),
        Job("masked_adamw", "xlmr-base", 0.028),
        Job("compose", "xlmr-base", 0.028),
        Job("restore", "xlmr-base", 0.028),
    ),
    "cuda": (
        Job("select_topk", "1B", 0.01),
        Job("select_topk", "1B", 0.01, "bf16"),
        Job("masked_adamw", "1B", 0.01),
        Job("masked_adamw", "1B", 0.01, "bf16"),
        Job("masked_adamw", "1B", 0.028, "bf16"),
        Job("masked_adamw", "xlmr-base", 0.028),
        Job("masked_adamw", "xlmr-base", 0.01, "bf16"),
        Job("dense_adamw", "1B", 1.0),
        Job("dense_adamw", "1B", 1.0, "bf16"),
        Job("compose_2", "xlmr-base", 0.028),
        Job("compose_2", "xlmr-base", 0.028, "bf16"),
        Job("compose", "xlmr-base", 0.028),
        Job("restore", "xlmr-base", 0.028),
        Job("swap", "xlmr-base", 0.028),
        Job("swap", "xlmr-base", 0.028, "bf16"),
        Job("select_topk", "xlmr-base", 0.028),
        Job("masked_adamw", "xlmr-xl", 0.01, "bf16"),
        Job("compose_2", "xlmr-xl", 0.01, "bf16"),
        Job("select_topk", "xlmr-xl", 0.01, "bf16"),
    ),
}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20 % and 80 %."""
    ordered = sorted(seconds)
    at = int(0.2 * (len(ordered) - 1))
    return {"median": statistics.median(ordered), "p20": ordered[at], "p80": ordered[-1 - at]}


def measure(case: Case, repeats: int, clock: Clock) -> dict[str, dict[str, Any]]:
    """For each provider seconds (median, 20 % and 80 %) and peak extra memory, or its error.

    On a GPU also the host's seconds for a call ("host"), and those of a graph replay ("graph").
    """
    case.verify()
    gpu = torch.device(getattr(clock, "device", "cpu")).type != "cpu"
    out: dict[str, dict[str, Any]] = {name: {} for name in case.providers}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in case.providers}

    def failed(name: str, error: Exception) -> None:
        if name == next(iter(case.providers)):
            raise error
        out[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        print(f"  {case.name}: {name} failed: {out[name]['error']}", flush=True)

    for name, job in case.providers.items():
        case.reset()
        # The first call: what a provider keeps (optimizer state) counts as much as what it frees.
        try:
            out[name]["peak_extra_bytes"] = clock.peak_extra_bytes(job)
            if gpu:
                clock.seconds(job)  # a second call, whatever the first one compiled
        except (RuntimeError, MemoryError) as error:
            failed(name, error)
        if gpu:
            torch.cuda.empty_cache()
    for turn in range(repeats):
        for name, job in case.providers.items():
            if "error" in out[name]:
                continue
            case.reset()
            try:
                times[name].append(clock.seconds(job))
            except (RuntimeError, MemoryError) as error:
                failed(name, error)
        if not gpu:
            print(f"  {case.name}: round {turn + 1} of {repeats}", flush=True)
    for name, taken in times.items():
        if "error" in out[name]:
            continue
        out[name] |= spread([seconds for seconds, _ in taken])
        if gpu:
            out[name]["host"] = statistics.median(host for _, host in taken)
    for name in case.captured if gpu else ():
        if "error" in out[name]:
            continue
        try:
            replay = clock.replay(case.providers[name])
            out[name]["graph"] = spread([clock.seconds(replay)[0] for _ in range(repeats)])
            del replay
        except RuntimeError as error:
            out[name]["graph_error"] = str(error).splitlines()[0][:200]
            print(f"  {case.name}: {name} was not captured: {error}", flush=True)
    return out


def judge(
    case: Case, measured: dict[str, dict[str, Any]], bandwidth: float
) -> list[dict[str, Any]]:
    """Each target beside what was measured."""
    ours = next(iter(measured.values()))
    best = min(ours["median"], ours.get("graph", ours)["median"])
    floor = case.bytes_moved / bandwidth
    lines = []
    for target in case.targets:
        peer = measured.get(target.peer, {})
        if target.kind == "floor":
            text = f"at least {target.value:.0%} of the floor"
            found = floor / best
            passed = found >= target.value
        elif "median" not in peer:
            continue
        elif target.kind == "peer":
            text = f"at least {target.value:g}× faster than {target.peer}"
            found = peer["median"] / ours["median"]
            passed = found >= target.value
        else:
            text = f"at most {target.value:.0%} of the extra memory of {target.peer}"
            found = ours["peak_extra_bytes"] / max(1, peer["peak_extra_bytes"])
            passed = found <= target.value
        lines.append({"target": text, "found": found, "passed": passed})
    return lines


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns in line, the first to the left."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for cells in (columns, *rows):
        line = [cells[0].ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        print("  " + "  ".join(line).rstrip(), flush=True)


def report(case: Case, measured: dict[str, dict[str, Any]], bandwidth: float, gpu: bool) -> None:
    """The table of a case."""
    print(f"{case.name}: {case.conditions}")
    columns = ["", "ms (median)", "20–80 %", "GB/s", "% of copy", "extra MB", "ours is faster by"]
    if gpu:
        columns[3:3] = ["graph ms", "host ms"]
    ours = next(iter(measured.values()))["median"]
    digits = 3 if gpu else 1
    rows = []
    for i, (name, m) in enumerate(measured.items()):
        if "error" in m:
            rows.append([name, "failed", *[""] * (len(columns) - 2)])
            continue
        rate = case.bytes_moved / m.get("graph", m)["median"]
        row = [
            name,
            f"{m['median'] * 1e3:.{digits}f}",
            f"{m['p20'] * 1e3:.{digits}f}–{m['p80'] * 1e3:.{digits}f}",
            f"{rate / 1e9:.1f}" if i == 0 else "",
            f"{100 * rate / bandwidth:.0f}" if i == 0 else "",
            f"{m['peak_extra_bytes'] / 1e6:.1f}",
            "" if i == 0 else f"{m['median'] / ours:.1f}×",
        ]
        if gpu:
            graph = f"{m['graph']['median'] * 1e3:.3f}" if "graph" in m else ""
            row[3:3] = [graph, f"{m['host'] * 1e3:.3f}"]
        rows.append(row)
    print_table(columns, rows)
    if gpu:
        print(
            f"  {case.bytes_moved / 1e9:.3f} GB: "
            f"{case.bytes_moved / PREDICTED_BANDWIDTH * 1e3:.3f} ms predicted at 4.3 TB/s, "
            f"floor {case.bytes_moved / bandwidth * 1e3:.3f} ms at the measured copy bandwidth"
        )
        for line in judge(case, measured, bandwidth):
            word = "pass" if line["passed"] else "FAIL"
            form = f"{line['found']:.1f}×" if "faster" in line["target"] else f"{line['found']:.2%}"
            print(f"  target: {line['target']}: {form}, {word}", flush=True)


def commit() -> str:
    """The commit that is measured; SPARSE_FT_COMMIT names it where there is no git."""
    if named := os.environ.get("SPARSE_FT_COMMIT"):
        return named
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:
        return ""


def machine(device: torch.device) -> dict[str, Any]:
    """What a stored result must say of where it was measured."""
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
    here = {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "library": native.load()[1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    if device.type != "cpu":
        import triton

        here |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    return here


def scaling(repeats: int, device: torch.device, clock: Clock) -> None:
    """Time against N and nnz: both must be linear."""
    print("scaling, fp32: milliseconds (and nanoseconds per parameter)")
    names = ("select_topk", "masked_adamw", "compose")
    rows = []
    for n in (12_500_000, 25_000_000, 50_000_000, 100_000_000):
        MODELS["scaling"] = {"matrix": (n,)}
        row = [f"{n / 1e6:.1f}M"]
        for name in names:
            case = CASES[name]("scaling", 0.02, torch.float32, device)
            job = next(iter(case.providers.values()))
            seconds = []
            for _ in range(repeats):
                case.reset()
                job()
                seconds.append(clock.seconds(job)[0])
            best = statistics.median(seconds)
            row.append(f"{best * 1e3:.2f} ({best / n * 1e9:.3f})")
        rows.append(row)
    print_table(["parameters", *names], rows)


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """The lines of a run: the default ones as the options change them, each once."""
    found: list[Job] = []
    chosen = list(DEFAULT[arguments.device])
    known = {job.case for job in chosen}
    # A case that is no default of this device: on the model that most are measured on.
    chosen += [Job(op, "xlmr-base", 0.028) for op in arguments.op or () if op not in known]
    for job in chosen:
        if arguments.op and job.case not in arguments.op:
            continue
        changed = Job(
            job.case,
            "25M" if arguments.quick else arguments.shape or job.shape,
            arguments.density or job.density,
            arguments.dtype or job.dtype,
        )
        if changed not in found:
            found.append(changed)
    return found


def run_job(
    job: Job, repeats: int, device: torch.device, clock: Clock, bandwidth: float
) -> dict[str, Any]:
    """Measures one line, prints its table, and returns what is stored of it."""
    gpu = device.type != "cpu"
    case = CASES[job.case](job.shape, job.density, DTYPES[job.dtype], device)
    measured = measure(case, repeats, clock)
    report(case, measured, bandwidth, gpu)
    record = {
        **job._asdict(),
        "bytes_moved": case.bytes_moved,
        "copy_bandwidth": bandwidth,
        "providers": measured,
    }
    if gpu:
        record |= {
            "predicted": case.bytes_moved / PREDICTED_BANDWIDTH,
            "floor": case.bytes_moved / bandwidth,
            "targets": judge(case, measured, bandwidth),
        }
    return record


def main() -> int:
    """The command line; the exit status is 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--device", choices=tuple(DEFAULT), default="cpu")
    parser.add_argument("--op", choices=sorted(CASES), action="append", help="only these cases")
    parser.add_argument("--shape", choices=sorted(MODELS), help="model; default: each case's own")
    parser.add_argument("--density", type=float, help="default: each case's own")
    parser.add_argument("--dtype", choices=DTYPES, help="default: each case's own")
    parser.add_argument("--repeats", type=int, help="default: 7, and 15 on a GPU")
    parser.add_argument("--quick", action="store_true", help="a 25M model, three rounds")
    parser.add_argument(
        "--scaling", action="store_true", help="also time against the size of the model"
    )
    parser.add_argument("--limit", type=float, help="begin no case after so many seconds")
    parser.add_argument("--json", type=Path, help="append one line per case to this file")
    arguments = parser.parse_args()
    begin = time.monotonic()
    device = torch.device(arguments.device)
    library, reason = native.load()
    if device.type == "cpu" and library is None:
        parser.error(f"the C++ library cannot be used, so there is nothing to measure: {reason}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    repeats = 3 if arguments.quick else arguments.repeats or (7 if device.type == "cpu" else 15)
    here = machine(device)
    clock = clock_of(device)
    bandwidth = clock.copy_bandwidth()
    print(f"{here['cpu']}, {here['threads']} threads, torch {here['torch']}, {here['library']}")
    if device.type != "cpu":
        print(f"{here['device']}, CUDA {here['cuda']}, Triton {here['triton']}")
    print(f"copy: {bandwidth / 1e9:.1f} GB/s", flush=True)
    failures = []
    for job in jobs_of(arguments):
        if arguments.limit and time.monotonic() - begin > arguments.limit:
            failures.append(job)
            print(f"{job}: not begun, {arguments.limit:.0f} s are over", flush=True)
            continue
        gc.collect()
        if device.type != "cpu":
            torch.cuda.empty_cache()
        try:
            record = run_job(job, repeats, device, clock, bandwidth)
        except Exception as error:
            failures.append(job)
            print(f"{job}: FAILED: {type(error).__name__}: {error}", flush=True)
            continue
        if arguments.json:
            with arguments.json.open("a", encoding="utf-8") as out:
                out.write(json.dumps({**record, **here}, sort_keys=True) + "\n")
        print(f"  ({time.monotonic() - begin:.0f} s so far)", flush=True)
    if arguments.scaling:
        scaling(3, device, clock)
    if failures:
        print(f"{len(failures)} failed: {', '.join(map(str, failures))}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
