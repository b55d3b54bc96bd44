"""`python -m benchmarks.report`: README's tables, docs/benchmarks.md and the plots from the stored
lines; with `--check` it only says whether they are what those lines give."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from .lines import (
    ROOT,
    Line,
    all_series,
    best_seconds,
    fastest_peer,
    is_ours,
    ours,
    peers,
    stored,
    timed,
)

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"

MODELS = {
    "xlmr-base": "XLM-R base",
    "xlmr-large": "XLM-R large",
    "xlmr-xl": "XLM-R XL",
    "xlmr-xxl": "XLM-R XXL",
    "llama-8b": "Llama 3 8B",
}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
# What a user does, and the provider that does it as LT-SFT's own library does.
JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "select_topk": (
        "Select the {share} most changed of {model}",
        ("list of floats, numpy.partition",),
    ),
    "masked_adamw": (
        "One AdamW step of {share} of {model}",
        # On a GPU torch's default is its foreach.
        ("gradient × mask, default AdamW", "gradient × mask, foreach AdamW"),
    ),
    "training_step": (
        "A whole training step of {model}, {share} tuned",
        ("gradient × mask, default AdamW", "gradient × mask, foreach AdamW"),
    ),
    "compose": ("Put a fine-tuning on {model}, {share}, with undo", ("w += COO",)),
    "compose_2": ("Put two on {model} at once, {share} each", ("w += COO",)),
    "restore": ("Take a fine-tuning off {model} again, exactly", ("w −= COO, inexact",)),
    "merge": ("Add two fine-tunings of {model} up", ("COO + COO",)),
    "swap": ("Exchange the fine-tuning on {model}", ()),
    "overlap": ("Compare two fine-tunings of {model}", ()),
    "load": ("Load and check a fine-tuning of {model}", ("legacy reader",)),
}
# The rows of README: op, shape, density, dtype, support, as far as there are lines.
ROWS = {
    "cpu": (
        ("select_topk", "100M", 0.01, "fp32", "uniform"),
        ("select_topk", "25M", 0.01, "fp32", "uniform"),
        ("masked_adamw", "xlmr-base", 0.028, "fp32", "uniform"),
        ("masked_adamw", "xlmr-base", 0.028, "bf16", "uniform"),
        ("training_step", "xlmr-base", 0.028, "fp32", "uniform"),
        ("compose", "xlmr-base", 0.028, "fp32", "uniform"),
        ("restore", "xlmr-base", 0.028, "fp32", "uniform"),
        ("swap", "xlmr-base", 0.028, "fp32", "uniform"),
        ("merge", "xlmr-base", 0.028, "fp32", "uniform"),
        ("overlap", "xlmr-base", 0.028, "fp32", "uniform"),
        ("load", "xlmr-base", 0.028, "fp32", "uniform"),
    ),
    "cuda": (
        ("select_topk", "1B", 0.01, "fp32", "uniform"),
        ("select_topk", "1B", 0.01, "bf16", "uniform"),
        ("masked_adamw", "1B", 0.01, "bf16", "uniform"),
        ("masked_adamw", "xlmr-base", 0.028, "fp32", "uniform"),
        ("training_step", "xlmr-large", 0.028, "fp32", "uniform"),
        ("compose", "xlmr-base", 0.028, "fp32", "uniform"),
        ("restore", "xlmr-base", 0.028, "fp32", "uniform"),
        ("swap", "xlmr-base", 0.028, "bf16", "uniform"),
    ),
}

PAGE_HEADER = """\
# Benchmarks

Every number here is of a line in [benchmarks/results](../benchmarks/results), written by
`python -m benchmarks.report`; a test fails where this page and those lines differ.

To measure again, in a checkout with `pip install -c constraints.txt -e ".[test]"`:

```sh
python -m benchmarks.run --json benchmarks/results/my-machine.jsonl                    # every case
python -m benchmarks.run --scaling --json benchmarks/results/my-machine-scaling.jsonl  # N, density
python -m benchmarks.run --op compose --dtype bf16 --density 0.05                      # one case
python -m benchmarks.run --compare benchmarks/results/my-machine.jsonl                 # got worse?
python -m benchmarks.report                                                            # this page
```

`--device cuda` measures on a GPU.

**How.** A case is one op in one setting. Our result is proved right, then that of every peer. Then
all of them take turns in one process, each run with cold caches, and so do two yardsticks: a copy
from one array to another, and a read of two. The speed of memory on shared machines drifts by a
factor of two within minutes: ratios within a case stand, times of different cases do not compare.

**Columns.** *ms*: median. *20–80 %*: the spread (of three to five rounds, all of it). *GB/s*: the
least bytes that the job must move, by the time. *of the floor*: the floor, which is the time to
move those bytes as fast as the yardstick does, by the time; above 100 % the yardstick was slower
than the op, or caches helped. *extra MB*: peak of memory beyond the inputs, for preparing and one
run. *state MB*: what is kept from run to run. *ours is faster by*: time of the peer by ours.

**Bytes.** The least that must be moved: the lines of memory in which selected entries lie, since
memory is read in lines (64 bytes on a CPU, 32 on a GPU), and everything that is dense. The model of
each op is in [contract.py](../kernels/sparse_ft_kernels/contract.py).

**Peers.** Other ways of doing the whole job, written for this from their published descriptions;
the sources are [at the end](#peers).

**Supports.** Uniform: every set of entries is equally likely. Clustered: as training leaves them,
more in some tensors and rows than in others.
"""


def milliseconds(seconds: float) -> str:
    """With three digits or so."""
    ms = seconds * 1e3
    digits = 0 if ms >= 20 else 1 if ms >= 2 else 2 if ms >= 0.2 else 3
    return f"{ms:,.{digits}f}"


def ratio(value: float) -> str:
    """A speed-up."""
    return f"{value:,.{0 if value >= 9.95 else 1 if value >= 0.95 else 2}f}×"


def megabytes(count: float) -> str:
    """Of 10^6 bytes."""
    mb = count / 1e6
    if mb < 0.1:
        return "< 0.1"
    return f"{mb:,.{0 if mb >= 10 else 1}f}"


def of_floor(line: Line, seconds: float) -> str:
    """The floor as a share of a time, where moving bytes is what the job consists of."""
    return f"{100 * line['floor'] / seconds:.0f} %" if line["floor"] else ""


def share(density: float) -> str:
    """A density in percent."""
    return f"{100 * density:.3g} %"


def model_name(shape: str) -> str:
    """A shape as a reader knows it."""
    if shape in MODELS:
        return MODELS[shape]
    return f"{shape.removeprefix('N=')} parameters"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; a column whose name begins with ">" is set to the right."""
    marks = ["---:" if name.startswith(">") else "---" for name in head]
    cells = [[name.removeprefix(">") for name in head], marks, *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def title(line: Line) -> str:
    """What a line measures, as a user would say it."""
    text = JOBS[line["op"]][0].format(share=share(line["density"]), model=model_name(line["shape"]))
    return text if line["dtype"] == "fp32" else f"{text}, {line['dtype']}"


def reference(line: Line) -> str | None:
    """The provider that does the job as LT-SFT's own library does, if it ran."""
    return next((name for name in JOBS[line["op"]][1] if name in timed(line)), None)


def headlines(lines: Sequence[Line], device: str) -> list[Line]:
    """The lines of README's rows for a device."""
    names = ("op", "shape", "density", "dtype", "support")
    found = {
        tuple(line[name] for name in names): line
        for line in lines
        if line["study"] == "cases" and line["device"] == device
    }
    return [found[row] for row in ROWS[device] if row in found]


def _beside(line: Line, peer: str | None) -> str:
    """A peer's name, time and ratio."""
    if peer is None:
        return ""
    seconds = timed(line)
    times = seconds[peer] / seconds[ours(line)]
    return f"{peer}: {milliseconds(seconds[peer])} ms, **{ratio(times)}**"


def speed_table(lines: Sequence[Line]) -> str:
    """README's table of one device."""
    rows = []
    for line in lines:
        fastest = fastest_peer(line)
        published = reference(line)
        rows.append(
            [
                title(line),
                milliseconds(timed(line)[ours(line)]),
                of_floor(line, best_seconds(line)),
                _beside(line, fastest),
                "the same" if published and published == fastest else _beside(line, published),
            ]
        )
    head = ["job", ">sparse_ft, ms", ">of the floor", "fastest alternative", "as LT-SFT's library"]
    return markdown(head, rows)


def _each(values: Sequence[object]) -> str:
    """Different values, in order of appearance."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def conditions(lines: Sequence[Line]) -> str:
    """On what, with what and when lines were measured."""
    machines = [line["machine"] for line in lines]
    rounds = [m["rounds"] for line in lines for m in line["providers"].values() if "rounds" in m]
    threads = _each([machine["threads"] for machine in machines])
    where = f"{_each([machine['cpu'] for machine in machines])}, {threads} threads"
    versions = [f"torch {_each([machine['torch'] for machine in machines])}"]
    if lines[0]["device"] == "cuda":
        where = _each([machine["device"] for machine in machines])
        versions += [f"{name} {_each([m[name] for m in machines])}" for name in ("cuda", "triton")]
    else:
        where += f" ({_each([machine['library'] for machine in machines])})"
    dates = sorted({line["date"] for line in lines})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    commits = _each([line["commit"] for line in lines])
    low, high = min(rounds), max(rounds)
    return (
        f"Medians of {low if low == high else f'{low} to {high}'} rounds in which all took turns, "
        f"caches cold; {where}, {', '.join(versions)}, "
        f"Python {_each([machine['python'] for machine in machines])}; commit {commits}, {when}."
    )


def _memory(lines: Sequence[Line]) -> str:
    """A sentence on the memory of selection and optimizer, where both were measured."""
    said = []
    for line in lines:
        mine = line["providers"][ours(line)]
        if line["op"] == "select_topk" and "peak_extra_bytes" in line["providers"].get(
            "torch.topk", {}
        ):
            theirs = line["providers"]["torch.topk"]["peak_extra_bytes"]
            said.append(
                f"selecting from {model_name(line['shape'])} {megabytes(mine['peak_extra_bytes'])} "
                f"MB (torch.topk {megabytes(theirs)})"
            )
            break
    for line in lines:
        dense = line["providers"].get("gradient × mask, fused AdamW", {}).get("state_bytes")
        mine = line["providers"][ours(line)]
        if line["op"] == "masked_adamw" and dense and "state_bytes" in mine:
            said.append(
                f"the optimizer's state for {model_name(line['shape'])} "
                f"{megabytes(mine['state_bytes'])} MB (dense moments and mask {megabytes(dense)})"
            )
            break
    return f" Extra memory: {', '.join(said)}." if said else ""


def speed(lines: Sequence[Line]) -> str:
    """What stands between the marks in README."""
    parts = []
    for device, name in DEVICES.items():
        chosen = headlines(lines, device)
        if not chosen:
            continue
        parts += [
            f"On a {name}:",
            speed_table(chosen),
            conditions(chosen) + _memory(chosen),
            f"![How much faster than each alternative, on a {name}]"
            f"(docs/images/speedup-{device}.svg)",
        ]
    parts.append(
        "*Of the floor*: the time that its bytes take at the bandwidth of a copy (selection: a "
        "read) measured in the same rounds, by the op's time. All cases, all alternatives and "
        "their sources, memory, scaling: [docs/benchmarks.md](docs/benchmarks.md)."
    )
    if not any(line["device"] == "cuda" for line in lines):
        parts.append("Nothing was measured on a GPU, and no figure is claimed for one.")
    return "\n\n".join(parts)


def readme(text: str, lines: Sequence[Line] | None = None) -> str:
    """README with what the lines say between the marks.

    Args:
        text: README.
        lines: Those that count; None: the stored ones. Without any the text stays.

    Returns:
        The new text.

    Raises:
        ValueError: It has no marks.
    """
    lines = stored() if lines is None else lines
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} … {END}")
    if not lines:
        return text
    return f"{before}{BEGIN}\n\n{speed(lines)}\n\n{END}{after}"


def _case_table(line: Line) -> str:
    """All providers of a case: ours, then the peers by their time, then those that did not run."""
    seconds = timed(line)
    mine = seconds[ours(line)]
    order = [ours(line)]
    order += [name for name in seconds if is_ours(name) and name != order[0]] + peers(line)
    gpu = line["device"] == "cuda"
    rows = []
    for name in order:
        m = line["providers"][name]
        best = min(m["median"], m.get("graph", m)["median"])
        row = [
            name,
            milliseconds(m["median"]),
            f"{milliseconds(m['p20'])}–{milliseconds(m['p80'])}",
            f"{line['bytes_moved'] / best / 1e9:,.1f}",
            of_floor(line, best),
            megabytes(m["peak_extra_bytes"]) if "peak_extra_bytes" in m else "",
            megabytes(m["state_bytes"]) if "state_bytes" in m else "",
            "" if name == order[0] else ratio(m["median"] / mine),
        ]
        if gpu:
            row[3:3] = [milliseconds(m["graph"]["median"]) if "graph" in m else ""]
        rows.append(row)
    head = [
        "",
        ">ms",
        ">20–80 %",
        ">GB/s",
        ">of the floor",
        ">extra MB",
        ">state MB",
        ">ours is faster by",
    ]
    if gpu:
        head[3:3] = [">as a graph, ms"]
    for name, m in line["providers"].items():
        if "median" not in m:
            why = f"left out: {m['skipped']}" if "skipped" in m else f"failed: {m['error']}"
            rows.append([f"{name} ({why})", *[""] * (len(head) - 1)])
    return markdown(head, rows)


def _case(line: Line) -> str:
    """A case of the page: heading, what there is to move, its table, its targets."""
    parts = [model_name(line["shape"]), line["dtype"]]
    if line["density"] < 1:
        parts[1:1] = [share(line["density"]), line["support"]]
    rates = ", ".join(f"{name} {rate / 1e9:,.1f}" for name, rate in line["bandwidth"].items())
    text = f"{line['numel']:,} parameters"
    if line["density"] < 1:
        text += f", {line['nnz']:,} selected"
    if line["floor"]:
        text += (
            f"; {line['bytes_moved'] / 1e6:,.0f} MB to move, in {milliseconds(line['floor'])} ms "
            f"at the speed of a {line['yardstick']} (GB/s in these rounds: {rates})"
        )
    text += f"; commit {line['commit']}, {line['date']}."
    if line["note"]:
        text += f" Note: {line['note']}."
    out = [f"#### {', '.join(parts)}", text, _case_table(line)]
    if line["targets"]:
        said = []
        for target in line["targets"]:
            faster = target["kind"] == "peer"
            found = ratio(target["found"]) if faster else f"{100 * target['found']:.3g} %"
            word = "reached" if target["passed"] else "**missed**"
            said.append(f"{target['target'].replace('%', ' %')} ({word}: {found})")
        out.append(f"Aims: {'; '.join(said)}.")
    return "\n\n".join(out)


def _scaling(lines: Sequence[Line]) -> list[str]:
    """The section on the exponents, or nothing."""
    series = all_series(lines)
    if not series:
        return []
    rows = []
    for one in series:
        mine = ours(one.lines[0])
        low, high = (one.lines[i][one.over] / 1e6 for i in (0, -1))
        rows.append(
            [
                f"`{one.op}`",
                DEVICES[one.device],
                "parameters" if one.over == "numel" else "selected entries",
                f"{low:,.3g}M to {high:,.3g}M",
                f"{one.slope(mine):.2f}",
                f"{one.slope_of_bytes:.2f}",
                "; ".join(
                    f"{name} {round(exponent, 2) + 0.0:.2f}"
                    for name in one.names[1:]
                    if not math.isnan(exponent := one.slope(name))
                ),
            ]
        )
    head = ["op", "on", "as there are more", "range", ">ours", ">its bytes", "peers"]
    devices = dict.fromkeys(one.device for one in series)
    images = [
        f"![{text}, on a {DEVICES[device]}](images/scaling-{kind}-{device}.svg)"
        for device in devices
        for kind, text in (
            ("parameters", "Time against parameters"),
            ("density", "Time against selected entries"),
            ("memory", "Extra memory against parameters"),
        )
    ]
    return [
        "## Scaling",
        "Exponents of the power laws that fit best: 1 is linear. Over parameters (2.8 % of them "
        "selected) they are of models above 10M, which no cache holds; over selected entries the "
        "model stays the same, and what must be moved grows more slowly than the number of "
        "entries, as several lie in one line of memory: the column *its bytes* is the exponent of "
        "a job that takes as long as its bytes.",
        markdown(head, rows),
        *images,
        conditions([line for one in series for line in one.lines]),
    ]


def page(lines: Sequence[Line]) -> str:
    """The text of docs/benchmarks.md."""
    parts = [PAGE_HEADER.rstrip()]
    for device, name in DEVICES.items():
        chosen = [x for x in lines if x["study"] == "cases" and x["device"] == device]
        parts.append(f"## {name}")
        if not chosen:
            parts.append(f"Nothing was measured on a {name}.")
            continue
        parts += [
            conditions(chosen),
            f"![How much faster than each alternative](images/speedup-{device}.svg)",
            f"![Bandwidth of each op beside that of a copy and a read]"
            f"(images/bandwidth-{device}.svg)",
        ]
        for op in dict.fromkeys(x["op"] for x in chosen):
            parts += [f"### {op}", *(_case(x) for x in chosen if x["op"] == op)]
    parts += _scaling(lines)
    sources = {
        (line["op"], name): m["source"]
        for line in lines
        if line["study"] == "cases"
        for name, m in line["providers"].items()
        if m.get("source")
    }
    rows = [[f"`{op}`", name, source] for (op, name), source in sorted(sources.items())]
    parts += ["## Peers", markdown(["case", "name", "what it does, and where from"], rows)]
    return "\n\n".join(parts) + "\n"


def texts(lines: Sequence[Line]) -> dict[Path, str]:
    """The files that are text, as they should be."""
    return {README: readme(README.read_text(encoding="utf-8"), lines), PAGE: page(lines)}


def drawn() -> list[Path]:
    """The plots of stored lines that there are; other images are none of ours."""
    kinds = ("speedup", "bandwidth", "scaling")
    return sorted(path for kind in kinds for path in IMAGES.glob(f"{kind}-*.svg"))


def faults(lines: Sequence[Line]) -> list[str]:
    """Which files differ from what the lines give."""
    from . import plots

    out = []
    for path, text in texts(lines).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            out.append(f"{path.relative_to(ROOT)} is not what the stored lines give")
    wanted = {IMAGES / name: plot.digest for name, plot in plots.plots(lines).items()}
    for path, digest in wanted.items():
        if not path.exists() or digest not in path.read_text(encoding="utf-8"):
            out.append(f"{path.relative_to(ROOT)} was drawn from other lines")
    for path in drawn():
        if path not in wanted:
            out.append(f"{path.relative_to(ROOT)} is drawn from no line")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status of `--check` is 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    lines = stored()
    if not lines:
        parser.error("there are no stored lines; python -m benchmarks.run --json writes them")
    if options.check:
        found = faults(lines)
        for fault in found:
            print(f"{fault}: python -m benchmarks.report")
        return 1 if found else 0
    from . import plots

    for path, text in texts(lines).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    wanted = plots.plots(lines)
    for path in drawn():
        if path.name not in wanted:
            path.unlink()
    for name, plot in wanted.items():
        plot.save(IMAGES / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
