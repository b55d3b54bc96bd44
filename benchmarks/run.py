"""`python -m benchmarks.run`: verifies each case, then times us and the peers in turn.

Times on shared processors drift, by a factor of two within minutes, so all providers of a case and
the yardsticks of memory bandwidth take turns in one process: ratios of medians are what counts.
Every run begins with cold caches. With `--device cuda` events give the time of each call; what can
be captured is also replayed as a CUDA graph, which is the device's work alone.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparse_ft_kernels import native

from . import (
    cases,  # noqa: F401  (registers them)
    clocks,
)
from .case import DTYPES, LARGE, RECIPES, SUPPORTS, Case, Job, Setting, Target
from .clocks import Clock
from .shapes import MODELS

# Seconds that the rounds of one provider may take in a case; three rounds it gets anyhow.
PROVIDER_SECONDS = 2.0
LEAST_ROUNDS = 3
SCHEMA = 2

Plan = list[tuple[str, Setting]]


def _default(device: str) -> Plan:
    """What is measured where nothing is asked for: what README states, and one line of each op."""
    bf16, clustered = {"dtype": "bf16"}, {"support": "clustered"}
    lines: list[tuple[str, str, float, dict[str, str]]]
    if device == "cpu":
        lines = [
            ("select_topk", "100M", 0.01, {}),
            ("select_topk", "100M", 0.01, bf16),
            ("select_topk", "25M", 0.01, {}),
            ("select_topk", "xlmr-base", 0.028, clustered),
            ("select_random", "25M", 0.028, {}),
            ("index_build", "xlmr-base", 0.028, {}),
            ("masked_adamw", "xlmr-base", 0.028, {}),
            ("masked_adamw", "xlmr-base", 0.028, bf16),
            ("gather", "xlmr-base", 0.028, {}),
            ("gather", "xlmr-base", 0.028, bf16),
            ("dense_adamw", "100M", 1.0, {}),
            ("anchor_l1", "100M", 1.0, {}),
            ("compose", "xlmr-base", 0.028, {}),
            ("compose", "xlmr-base", 0.028, bf16),
            ("compose", "xlmr-base", 0.028, clustered),
            ("compose_2", "xlmr-base", 0.028, {}),
            ("restore", "xlmr-base", 0.028, {}),
            ("swap", "xlmr-base", 0.028, {}),
            ("merge", "xlmr-base", 0.028, {}),
            ("reduce", "25M", 0.028, {}),
            ("overlap", "xlmr-base", 0.028, {}),
            ("check_support", "xlmr-base", 0.028, {}),
            ("digest", "xlmr-base", 0.028, {}),
            ("hash_pieces", "xlmr-base", 0.028, {}),
            ("load", "xlmr-base", 0.028, {}),
            ("training_step", "xlmr-base", 0.028, {}),
        ]
    else:
        lines = [
            ("select_topk", "1B", 0.01, {}),
            ("select_topk", "1B", 0.01, bf16),
            ("masked_adamw", "1B", 0.01, {}),
            ("masked_adamw", "1B", 0.01, bf16),
            ("masked_adamw", "1B", 0.028, bf16),
            ("masked_adamw", "1B", 0.08, bf16),
            ("masked_adamw", "xlmr-base", 0.028, {}),
            ("masked_adamw", "xlmr-base", 0.028, clustered),
            ("masked_adamw", "xlmr-base", 0.01, bf16),
            ("gather", "xlmr-base", 0.028, {}),
            ("dense_adamw", "1B", 1.0, {}),
            ("dense_adamw", "1B", 1.0, bf16),
            ("anchor_l1", "1B", 1.0, {}),
            ("compose_2", "xlmr-base", 0.028, {}),
            ("compose_2", "xlmr-base", 0.028, bf16),
            ("compose", "xlmr-base", 0.028, {}),
            ("restore", "xlmr-base", 0.028, {}),
            ("swap", "xlmr-base", 0.028, {}),
            ("swap", "xlmr-base", 0.028, bf16),
            ("merge", "xlmr-base", 0.028, {}),
            ("reduce", "xlmr-base", 0.028, {}),
            ("overlap", "xlmr-base", 0.028, {}),
            ("check_support", "xlmr-base", 0.028, {}),
            ("digest", "xlmr-base", 0.028, {}),
            ("select_random", "xlmr-base", 0.028, {}),
            ("index_build", "xlmr-base", 0.028, {}),
            ("select_topk", "xlmr-base", 0.028, {}),
            ("training_step", "xlmr-base", 0.028, {}),
            ("training_step", "xlmr-large", 0.028, {}),
            ("masked_adamw", "xlmr-xl", 0.01, bf16),
            ("compose_2", "xlmr-xl", 0.01, bf16),
            ("select_topk", "xlmr-xl", 0.01, bf16),
            ("masked_adamw", "llama-8b", 0.01, bf16),
            ("select_topk", "llama-8b", 0.01, bf16),
        ]
    return [
        (op, Setting(shape, density, device=device, **rest)) for op, shape, density, rest in lines
    ]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20 % and 80 %, and how many there were."""
    ordered = sorted(seconds)
    at = int(0.2 * (len(ordered) - 1))
    return {
        "median": statistics.median(ordered),
        "p20": ordered[at],
        "p80": ordered[-1 - at],
        "rounds": len(ordered),
    }


def _prepare(case: Case, clock: Clock) -> tuple[dict[str, Job], dict[str, dict[str, Any]]]:
    """Builds every provider, runs it once, and checks what it did."""
    jobs: dict[str, Job] = {}
    out: dict[str, dict[str, Any]] = {}
    for name, provider in case.providers.items():
        out[name] = {"source": provider.source} if provider.source else {}
        if provider.state_bytes is not None:
            out[name]["state_bytes"] = provider.state_bytes
        if not provider.whole:
            out[name]["whole"] = False
        if provider.extra_bytes > (free := clock.free_bytes()):
            out[name]["skipped"] = (
                f"needs about {provider.extra_bytes / 1e9:.1f} GB more, {free / 1e9:.1f} are free"
            )
            print(f"  {name}: skipped: {out[name]['skipped']}", flush=True)
            continue
        case.reset()
        clock.begin_peak()
        try:
            job = provider.build()
            result = job()
            out[name]["peak_extra_bytes"] = clock.peak_extra_bytes()
        except (RuntimeError, MemoryError) as error:
            _failed(case, name, out[name], error)
            continue
        if provider.check:
            try:
                provider.check(result)
            except AssertionError as error:
                raise AssertionError(f"{case.op}: {name} gave a wrong result: {error}") from error
        jobs[name] = job
        del result
    return jobs, out


def _replays(
    case: Case, jobs: dict[str, Job], out: dict[str, dict[str, Any]], clock: Clock
) -> dict[str, Job]:
    """Captures what can be captured; a replay must give the right result as well."""
    for job in jobs.values():
        case.reset()
        job()  # whatever the first call compiled, the second has at hand
    torch.cuda.empty_cache()
    replays = {}
    for name, job in jobs.items():
        provider = case.providers[name]
        if not provider.captured:
            continue
        try:
            case.reset()
            replay = clock.replay(job)
            case.reset()
            result = replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            out[name]["graph_error"] = str(error).splitlines()[0][:200]
            print(f"  {name} was not captured: {error}", flush=True)
            continue
        if provider.check:
            provider.check(result)
        replays[name] = replay
    return replays


def _turns(seconds: float, repeats: int) -> set[int]:
    """The rounds that a provider takes part in: all, or if it is slow some, evenly spread."""
    count = min(repeats, max(LEAST_ROUNDS, int(PROVIDER_SECONDS / max(seconds, 1e-9))))
    return {round(i * (repeats - 1) / max(1, count - 1)) for i in range(count)}


def _failed(case: Case, name: str, out: dict[str, Any], error: Exception) -> None:
    """Notes that a peer cannot do the job; we must."""
    if name == next(iter(case.providers)):
        raise error
    out["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    print(f"  {name} failed: {out['error']}", flush=True)


def measure(case: Case, repeats: int, clock: Clock) -> dict[str, Any]:
    """Verifies a case, then times its providers and the yardsticks in turn.

    Args:
        case: The case.
        repeats: Rounds; a provider that is slow sits out some.
        clock: Of the device.

    Returns:
        "providers": for each its seconds (median, p20, p80, rounds) and peak extra memory, or why
        there are none; on a GPU also the host's seconds for a call ("host") and those of a graph
        replay ("graph"). "bandwidth": bytes per second of each yardstick.

    Raises:
        AssertionError: A result is wrong.
    """
    case.verify()
    jobs, out = _prepare(case, clock)
    gpu = case.setting.device != "cpu"
    replays = _replays(case, jobs, out, clock) if gpu else {}
    # The replays take turns with the rest.
    ways = [(name, "", job) for name, job in jobs.items()]
    ways += [(name, "graph", job) for name, job in replays.items()]
    times: dict[tuple[str, str], list[tuple[float, float]]] = {way[:2]: [] for way in ways}
    bare: dict[str, list[float]] = {name: [] for name in clock.yardsticks}
    for turn in range(repeats):
        for name, yardstick in clock.yardsticks.items():
            bare[name].append(clock.seconds(yardstick.job)[0])
        for name, kind, job in ways:
            taken = times[name, kind]
            if "error" in out[name] or (turn and turn not in _turns(taken[0][0], repeats)):
                continue
            case.reset()
            try:
                taken.append(clock.seconds(job))
            except (RuntimeError, MemoryError) as error:
                _failed(case, name, out[name], error)
    for (name, kind), pairs in times.items():
        if "error" in out[name]:
            continue
        found = spread([seconds for seconds, _ in pairs])
        if kind:
            out[name][kind] = found
            continue
        out[name] |= found
        if gpu:
            out[name]["host"] = statistics.median(host for _, host in pairs)
    bandwidth = {
        name: clock.yardsticks[name].bytes_moved / statistics.median(seconds)
        for name, seconds in bare.items()
    }
    return {"providers": out, "bandwidth": bandwidth}


def _judge(target: Target, providers: dict[str, dict[str, Any]], floor: float) -> dict[str, Any]:
    """A target beside what was measured, or {} where nothing was."""
    ours = next(iter(providers.values()))
    best = min(ours["median"], ours.get("graph", ours)["median"])
    peer = providers.get(target.peer, {})
    number = f"{target.value:.3g}"
    if target.kind == "floor":
        text, found = f"at least {target.value:.0%} of the floor", floor / best
    elif "median" not in peer:
        return {}
    elif target.kind == "peer":
        text, found = f"{number}× faster than {target.peer}", peer["median"] / ours["median"]
    elif target.kind == "share":
        text = f"{target.peer} at most {target.value:.0%} of the whole"
        found = peer["median"] / ours["median"]
    elif target.kind == "memory":
        text = f"at most {target.value:.0%} of the extra memory of {target.peer}"
        found = ours["peak_extra_bytes"] / max(1, peer["peak_extra_bytes"])
    else:
        raise ValueError(f"unknown kind of target: {target.kind!r}")
    passed = found <= target.value if target.kind in ("share", "memory") else found >= target.value
    return {
        "target": text,
        "kind": target.kind,
        "value": target.value,
        "peer": target.peer,
        "found": found,
        "passed": passed,
    }


def line(
    case: Case, measured: dict[str, Any], here: dict[str, Any], study: str = "cases"
) -> dict[str, Any]:
    """What is stored of a case.

    Args:
        case: The case.
        measured: What measure() gave.
        here: What machine() gave.
        study: "cases" or "scaling".

    Returns:
        The line, to be written as JSON.
    """
    setting = case.setting
    floor = case.bytes_moved / measured["bandwidth"][case.yardstick]
    targets = case.targets if setting.numel >= LARGE else ()
    judged = [_judge(target, measured["providers"], floor) for target in targets]
    return {
        "schema": SCHEMA,
        "study": study,
        "op": case.op,
        "shape": setting.shape,
        "density": setting.density,
        "dtype": setting.dtype,
        "device": setting.device,
        "support": setting.support,
        "numel": setting.numel,
        "nnz": setting.nnz,
        "bytes_moved": int(case.bytes_moved),
        "note": case.note,
        "yardstick": case.yardstick,
        "floor": floor if case.has_floor else None,
        **measured,
        "targets": [target for target in judged if target],
        **here,
    }


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns in line, the first to the left."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for cells in (columns, *rows):
        text = [cells[0].ljust(widths[0])]
        text += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        print("  " + "  ".join(text).rstrip(), flush=True)


def report(record: dict[str, Any]) -> None:
    """Prints the table of a line."""
    gpu = record["device"] != "cpu"
    columns = ["", "ms (median)", "20–80 %", "GB/s", "% of floor", "extra MB", "ours is faster by"]
    if gpu:
        columns[3:3] = ["graph ms", "host ms"]
    ours = next(iter(record["providers"].values()))["median"]
    digits = 3 if gpu else 1
    rows = []
    for i, (name, m) in enumerate(record["providers"].items()):
        if "median" not in m:
            rows.append([name, "skipped" if "skipped" in m else "failed", *[""] * len(columns[2:])])
            continue
        best = min(m["median"], m.get("graph", m)["median"])
        row = [
            name,
            f"{m['median'] * 1e3:.{digits}f}",
            f"{m['p20'] * 1e3:.{digits}f}–{m['p80'] * 1e3:.{digits}f}",
            f"{record['bytes_moved'] / best / 1e9:.1f}" if i == 0 and record["floor"] else "",
            f"{100 * record['floor'] / best:.0f}" if i == 0 and record["floor"] else "",
            f"{m['peak_extra_bytes'] / 1e6:.1f}",
            "" if i == 0 else f"{m['median'] / ours:.1f}×",
        ]
        if gpu:
            graph = f"{m['graph']['median'] * 1e3:.3f}" if "graph" in m else ""
            row[3:3] = [graph, f"{m['host'] * 1e3:.3f}"]
        rows.append(row)
    print_table(columns, rows)
    bandwidth = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in record["bandwidth"].items())
    if record["floor"]:
        print(
            f"  {record['bytes_moved'] / 1e9:.3f} GB to move: "
            f"{record['floor'] * 1e3:.{digits}f} ms by the {record['yardstick']} yardstick "
            f"(GB/s in these rounds: {bandwidth})"
        )
    for target in record["targets"]:
        word = "pass" if target["passed"] else "FAIL"
        faster = target["kind"] == "peer"
        found = f"{target['found']:.1f}×" if faster else f"{target['found']:.2%}"
        print(f"  target: {target['target']}: {found}, {word}", flush=True)


def commit() -> str:
    """The commit that is measured; SPARSE_FT_COMMIT names it where there is no git."""
    if named := os.environ.get("SPARSE_FT_COMMIT"):
        return named
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError:
        return ""


def machine(device: str) -> dict[str, Any]:
    """What a stored line must say of where, when and of what it was measured."""
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
        "os": platform.system(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1",
    }
    if device != "cpu":
        import triton

        here |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    return {"machine": here, "commit": commit(), "date": datetime.date.today().isoformat()}


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The lines of a run: the default ones as the options change them, each once."""
    device = arguments.device
    chosen = _default(device)
    if arguments.quick:
        chosen = [
            (op, Setting("5M", dtype=dtype, device=device))
            for op, recipe in RECIPES.items()
            for dtype in DTYPES
            if device == "cpu" or not recipe.cpu_only
        ]
    known = {op for op, _ in chosen}
    # A case that is no default of this device: on the model that most are measured on.
    chosen += [
        (op, Setting("xlmr-base", device=device)) for op in arguments.op or () if op not in known
    ]
    changes = {
        name: value
        for name in ("shape", "density", "dtype", "support")
        if (value := getattr(arguments, name)) is not None
    }
    changed = [
        (op, RECIPES[op].setting(replace(setting, **changes)))
        for op, setting in chosen
        if not arguments.op or op in arguments.op
    ]
    return list(dict.fromkeys(changed))


def run_case(
    op: str, setting: Setting, repeats: int, clock: Clock, here: dict[str, Any]
) -> tuple[Case, dict[str, Any]] | None:
    """Measures one case, prints its table, and returns it with its line, or None where it cannot be
    measured here.
    """
    print(f"{op}: {setting}", flush=True)
    gc.collect()
    recipe = RECIPES[op]
    if recipe.shapes and setting.shape not in recipe.shapes:
        print(f"  skipped: it is for {', '.join(recipe.shapes)}", flush=True)
        return None
    needed, free = recipe.input_bytes(setting), clock.free_bytes()
    if needed > 0.9 * free:
        print(
            f"  skipped: it needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free",
            flush=True,
        )
        return None
    case = recipe.make(setting)
    record = line(case, measure(case, repeats, clock), here)
    report(record)
    return case, record


def quick_faults(case: Case, record: dict[str, Any]) -> list[str]:
    """What even a quick run must show and does not: a peer that is missing, a ratio too low."""
    title = f"{case.op}, {case.setting.dtype}"
    providers = record["providers"]
    faults = [
        f"{title}: {name}: {measured}"
        for name, measured in providers.items()
        if "median" not in measured
    ]
    ours = next(iter(providers.values()))["median"]
    for target in case.targets if case.setting.device == "cpu" else ():
        if target.quick is None or "median" not in providers.get(target.peer, {}):
            continue
        found = providers[target.peer]["median"] / ours
        if found < target.quick:
            faults.append(
                f"{title}: only {found:.1f}× faster than {target.peer}, and even a quick run "
                f"should show {target.quick}×"
            )
    return faults


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two lines comparable."""
    names = ("study", "op", "shape", "density", "dtype", "device", "support")
    return tuple(record[name] for name in names)


def compared(new: dict[str, Any], old: dict[str, Any]) -> float:
    """How our advantage changed from one line to another: the geometric mean, over the peers of
    both, of the ratio of peer ÷ ours now to that before. Below 1 we lost ground. Only ratios enter,
    so the machines may differ in speed.
    """
    changes = []
    ours = [next(iter(record["providers"].values()))["median"] for record in (new, old)]
    for name, measured in new["providers"].items():
        if name.startswith("sparse_ft") or not measured.get("whole", True):
            continue
        before = old["providers"].get(name, {})
        if "median" in measured and "median" in before:
            changes.append((measured["median"] / ours[0]) / (before["median"] / ours[1]))
    if not changes:
        return math.nan
    return math.exp(statistics.fmean(map(math.log, changes)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The stored lines of a file that are of today's schema."""
    text = path.read_text(encoding="utf-8")
    records = [json.loads(row) for row in text.splitlines() if row.strip()]
    return [record for record in records if record.get("schema") == SCHEMA]


def compare(
    records: list[dict[str, Any]], stored_lines: list[dict[str, Any]], tolerance: float
) -> list[str]:
    """Prints how our advantage over the peers changed since a stored run; returns what got worse.

    Args:
        records: The lines of this run.
        stored_lines: Those to compare with; of several for one case the last counts.
        tolerance: Share of the advantage that may be lost before it is called worse.
    """
    stored = {key(record): record for record in stored_lines}
    rows, worse = [], []
    for record in records:
        title = f"{record['op']}, {record['shape']}, {record['dtype']}, {record['support']}"
        if (old := stored.get(key(record))) is None:
            rows.append([title, "", "no stored line"])
            continue
        change = compared(record, old)
        word = "nothing to compare" if math.isnan(change) else "same"
        if change < 1 - tolerance:
            word = "WORSE"
            worse.append(f"{title}: {change:.2f} of the advantage at {old['commit']}")
        elif change > 1 / (1 - tolerance):
            word = "better"
        rows.append([title, f"{change:.2f}", word])
    print("advantage over the peers, as a share of that in the stored lines:")
    print_table(["", "now ÷ then", ""], rows)
    if records and not any(key(record) in stored for record in records):
        worse.append("no case of this run has a stored line to be compared with")
    return worse


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return float(text)


def _rounds(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--op", choices=sorted(RECIPES), action="append", help="only these cases")
    parser.add_argument("--shape", choices=sorted(MODELS), help="model; default: each case's own")
    parser.add_argument("--density", type=_share, help="0 to 1; default: each case's own")
    parser.add_argument("--dtype", choices=DTYPES, help="default: each case's own")
    parser.add_argument("--support", choices=SUPPORTS, help="default: each case's own")
    parser.add_argument("--repeats", type=_rounds, help="rounds; default: 7, and 15 on a GPU")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="every case on a small model; the status is 1 where a peer is missing or far slower "
        "ones are not beaten",
    )
    parser.add_argument(
        "--scaling", action="store_true", help="time and memory against parameters and density"
    )
    parser.add_argument("--limit", type=float, help="begin no case after so many seconds")
    parser.add_argument("--json", type=Path, help="append one line per case to this file")
    parser.add_argument(
        "--compare", type=Path, help="a file of stored lines; the status is 1 where we lost ground"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.25, help="of --compare, a share (default 0.25)"
    )
    return parser


def main() -> int:
    """The command line; the exit status is 1 where a case failed, or is worse than it should be."""
    parser = _parser()
    arguments = parser.parse_args()
    begin = time.monotonic()
    device = arguments.device
    library, reason = native.load()
    if device == "cpu" and library is None:
        parser.error(f"the C++ library cannot be used, so there is nothing to measure: {reason}")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    repeats = arguments.repeats or (3 if arguments.quick else 7 if device == "cpu" else 15)
    # What cannot be read or written is found out before hours of measuring.
    stored = None
    try:
        if arguments.compare:
            stored = read_lines(arguments.compare)
        if arguments.json:
            arguments.json.open("a", encoding="utf-8").close()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    here = machine(device)
    clock = clocks.clock_of(device)
    print(", ".join(f"{name} {value}" for name, value in here["machine"].items()), flush=True)
    if arguments.scaling:
        from . import scaling

        scaling.run(device, clock, here, arguments.json)
        return 0
    plan = plan_of(arguments)
    faults, records = [], []
    for number, (op, setting) in enumerate(plan, 1):
        elapsed = time.monotonic() - begin
        if arguments.limit and elapsed > arguments.limit:
            faults.append(f"{op}, {setting}: not begun, {arguments.limit:.0f} s are over")
            continue
        print(f"[{number}/{len(plan)}, {elapsed:.0f} s] ", end="")
        try:
            measured = run_case(op, setting, repeats, clock, here)
        except Exception as error:
            faults.append(f"{op}, {setting}: {type(error).__name__}: {error}")
            print(f"  FAILED: {type(error).__name__}: {error}", flush=True)
            continue
        if measured is None:
            if arguments.quick:
                faults.append(f"{op}, {setting}: skipped")
            continue
        case, record = measured
        records.append(record)
        if arguments.quick and (found := quick_faults(case, record)):
            # Few rounds, perhaps beside other work: a fault counts where it shows twice.
            again = run_case(op, setting, repeats, clock, here)
            faults += [] if again is None else quick_faults(*again) and found
            del again
        del case, measured
        if arguments.json:
            with arguments.json.open("a", encoding="utf-8") as out:
                out.write(json.dumps(record) + "\n")
    print(f"{len(records)} cases in {time.monotonic() - begin:.0f} s")
    if stored is not None:
        faults += compare(records, stored, arguments.tolerance)
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
