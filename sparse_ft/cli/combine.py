"""The commands on several SFTs: add them up, merge them by a rule, compare them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import (
    PLAIN_RULES,
    RULES_HELP,
    Files,
    Force,
    Heads,
    Json,
    OfBase,
    Output,
    Weights,
    check_output,
    chosen_heads,
    errors,
    fail,
    labels_of,
    load,
    load_all,
    note,
    parsed,
    print_json,
    print_rich,
    saved,
    shows_progress,
)

app = typer.Typer()


@app.command()
def compose(
    files: Files,
    output: Output,
    weight: Weights = None,
    heads: Heads = None,
    base: OfBase = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add SFTs up to one: applying it gives the bits of composing them all."""
    _merge(files, output, weight, "sum", {}, heads, base, force, as_json)


@app.command(
    help="Merge SFTs into one by a rule; docs/merging.md has the formulas.\n\n\b\nRules: "
    f"{', '.join(PLAIN_RULES)}\nand these, with their options (* must be given):\n{RULES_HELP}"
)
def merge(
    files: Files,
    output: Output,
    rule: Annotated[str, typer.Option(help="The rule, such as ties, dare or mean.")] = "sum",
    weight: Weights = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="NAME=VALUE", help="An option of the rule: --option p=0.9."
        ),
    ] = None,
    heads: Heads = None,
    base: OfBase = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    options: dict[str, Any] = {}
    for item in option or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(
                f"{item!r} is not NAME=VALUE, such as p=0.9", param_hint="--option"
            )
        options[name] = parsed(value)
    _merge(files, output, weight, rule, options, heads, base, force, as_json)


@app.command()
def overlap(
    files: Files,
    metric: Annotated[
        str, typer.Option(help="What the table and the plot show; docs/overlap.md lists them.")
    ] = "share",
    csv: Annotated[Path | None, typer.Option(help="Write all figures to a CSV file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a heat map (.png, .svg or .pdf; needs matplotlib).")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show which entries SFTs share, and whether they pull the same way there."""
    from sparse_ft.overlap import overlap as compare

    with errors(files):
        if len(files) < 2:
            raise ValueError(f"overlap compares SFTs: give at least two, not {files[0]} alone")
        for path in (csv, plot):
            if path is not None:
                check_output(path, force)
        deltas = [load(file) for file in files]
        found = compare(deltas, names=labels_of(files), progress=shows_progress(as_json))
        table = found.table(metric)
        if csv is not None:
            found.to_csv(csv)
        if plot is not None:
            try:
                found.plot(plot, metric)
            except ModuleNotFoundError as error:
                fail(str(error))
    if as_json:
        print_json(found.to_dict())
    else:
        print_rich(table)


def _merge(
    files: Sequence[str],
    output: Path,
    weights: list[float] | None,
    rule: str,
    options: dict[str, Any],
    heads: str | None,
    base: str | None,
    force: bool,
    as_json: bool,
) -> None:
    from sparse_ft import merge as merge_deltas
    from sparse_ft.checkpoints import Checkpoint
    from sparse_ft.merge import RULES

    with errors(files):
        # Before anything else: an option is no argument of the function.
        if rule in RULES:
            options = RULES[rule].options(rule, options)
        check_output(output, force, "sft.safetensors")
        deltas = load_all(files, weights)
        keep = chosen_heads(files, deltas, heads)
        model = None if base is None else Checkpoint(base)
        delta = merge_deltas(deltas, weights, rule=rule, heads=keep, base=model, **options)
        if model is None and any(delta.known_digests for delta in deltas):
            note("the result carries no digest of its base model; --base BASE records it")
        saved(delta, output, as_json)
