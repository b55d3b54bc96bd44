"""What the quickstart shows at its end: tables in the terminal, a bar plot, the next commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LABELS: Mapping[str, str] = {
    "task": "task SFT alone",
    "language+task": "task SFT + {weight:g} × {target} SFT",
    "language1+task": "task SFT + 1 × {target} SFT",
    "control+task": "task SFT + {weight:g} × {control} SFT (control)",
    "full": "full fine-tuning on the task",
    "source": "English, held out: task SFT",
    "source_full": "English, held out: full fine-tuning",
}
"""Rows of the result, in order."""
TITLES: Mapping[str, str] = {"intents": "Intents, accuracy", "slots": "Slots, F1"}
"""What a task's scores are."""
COLOURS: Mapping[str, str] = {
    "task": "#8c8c8c",
    "language+task": "#1b7837",
    "language1+task": "#7fbf7b",
    "control+task": "#c2a5cf",
    "full": "#5b8db8",
}


def row_label(row: str, results: Mapping[str, Any]) -> str:
    """The text of a row, with languages and weight filled in."""
    return LABELS[row].format(
        target=results["language"],
        control=results["control"],
        weight=results["language_weight"],
    )


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def score_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, list[str]]]:
    """Row, label, mean score and score of each seed, in percent, of the rows there are."""
    rows = []
    for row in LABELS:
        values = [100 * run["scores"][row] for run in results["runs"] if row in run["scores"]]
        if values:
            rows.append(
                (row, row_label(row, results), f"{mean(values):.1f}", [f"{v:.1f}" for v in values])
            )
    return rows


def size_text(n_bytes: float) -> str:
    """A size in bytes for people: 512 B, 3.4 MB."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def verdict(results: Mapping[str, Any]) -> str:
    """One sentence on what the numbers show, whichever way they fall."""
    runs = results["runs"]
    gain = [100 * (r["scores"]["language+task"] - r["scores"]["task"]) for r in runs]
    over = [100 * (r["scores"]["language+task"] - r["scores"]["control+task"]) for r in runs]
    seeds = f" (mean of {len(runs)} seeds)" if len(runs) > 1 else ""
    errors = results["standard_errors"]
    return (
        f"Adding the {results['language']} SFT to the task SFT changes {results['metric']} by "
        f"{mean(gain):+.1f} ± {100 * errors['task']:.1f} points{seeds}; it is "
        f"{mean(over):+.1f} ± {100 * errors['control+task']:.1f} points from what the "
        f"{results['control']} SFT gives. ± is one standard error of the difference, by template: "
        f"the test has {results['test_sentences']} sentences of {results['test_templates']} "
        "templates that no training saw."
    )


def next_commands(results: Mapping[str, Any]) -> list[str]:
    """Commands a reader may try next."""
    files = results["runs"][0]["files"]
    task, language = results["task"], results["language"]
    commands = [f"sparse-ft info {files['language']}"]
    if len(results["runs"]) < 3:
        commands.append(f"sparse-ft quickstart --task {task} --language {language} --seeds 3")
    different = "slots" if task == "intents" else "intents"
    commands.append(f"sparse-ft quickstart --task {different} --language {language}")
    other = "cy" if language != "cy" else "is"
    commands.append(f"sparse-ft quickstart --task {task} --language {other}")
    return commands


def python_snippet(results: Mapping[str, Any]) -> str:
    """Code that loads and composes the files of the first seed."""
    files = results["runs"][0]["files"]
    name, output = results["task"], results["output"]
    predict = {
        "intents": [
            '    batch = tokenizer(["a sentence"], return_tensors="pt")',
            '    scores = model(batch["input_ids"], batch["attention_mask"])',
            "    print(labels[int(scores.argmax())])",
        ],
        "slots": [
            '    batch = tokenizer(["a sentence"], return_tensors="pt")',
            "    print([labels[i] for i in model(**batch).logits[0].argmax(-1)])",
        ],
    }
    return "\n".join(
        [
            "import sparse_ft as sf",
            "from sparse_ft.quickstart import load_model",
            f'model, tokenizer, labels = load_model("{output}", "{name}")',
            f'task = sf.SparseDelta.load("{files["task"]}")',
            f'language = sf.SparseDelta.load("{files["language"]}")',
            f"with sf.compose(model, [task, language], [1.0, {results['language_weight']:g}], "
            "heads=task):",
            *predict[name],
        ]
    )


def show(results: Mapping[str, Any], console: Any) -> None:
    """Print tables, verdict, files and next commands.

    Args:
        results: what `run` returns.
        console: a `rich.console.Console`.
    """
    from rich.table import Table

    seeds = [str(run["seed"]) for run in results["runs"]]
    title = f"{TITLES[results['task']]} in {results['language']}, %"
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("mean" if len(seeds) > 1 else results["metric"], justify="right")
    if len(seeds) > 1:
        for seed in seeds:
            table.add_column(f"seed {seed}", justify="right")
    for _, label, average, each in score_rows(results):
        table.add_row(label, average, *(each if len(seeds) > 1 else []))
    console.print(table)

    sizes = Table(title="Sparse fine-tunings", title_justify="left")
    for name in ("file", "entries", "density", "size", "seconds"):
        sizes.add_column(name, justify="left" if name == "file" else "right", overflow="fold")
    for run in results["runs"]:
        for sft in run["sfts"]:
            sizes.add_row(
                sft["file"], f"{sft['nnz']:,}", f"{100 * sft['density']:.1f} %",
                size_text(sft["bytes"]), f"{sft['seconds']:.0f}",
            )  # fmt: skip
    console.print(sizes)
    console.print(verdict(results), highlight=False)
    console.print(
        f"\nBase model: {results['base']} ({size_text(results['base_bytes'])}); plot: "
        f"{results['plot']}; {results['seconds']:.0f} s of training, {results['threads']} threads, "
        f"{results['precision']} products, peak memory {size_text(results['peak_bytes'])}.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print("\nCompose them yourself:\n", highlight=False)
    console.print(python_snippet(results), highlight=False, markup=False, soft_wrap=True)
    console.print("\nNext:", highlight=False)
    for command in next_commands(results):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw the scores as bars, one dot per seed, to a PNG file."""
    from matplotlib.figure import Figure

    rows = score_rows(results)
    figure = Figure(figsize=(7.5, 0.55 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    for i, (row, _, average, each) in enumerate(rows):
        axes.barh(i, float(average), color=COLOURS.get(row, "#d9d9d9"))
        axes.plot([float(v) for v in each], [i] * len(each), "k.", markersize=4)
        axes.text(1, i, average, va="center", ha="left", fontsize=9)
    axes.set_yticks(range(len(rows)), [label for _, label, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"{results['metric']}, %")
    title = f"{results['task'].capitalize()}, English → {results['language']}"
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
