"""The command `sparse-ft`.

Each command imports what it needs when it runs: `sparse-ft --help` is quick and needs no extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sparse_ft._version import __version__

app = typer.Typer(
    name="sparse-ft",
    help="Lottery-Ticket sparse fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparse-ft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Lottery-Ticket sparse fine-tuning."""


@app.command()
def quickstart(
    language: Annotated[
        str, typer.Option(help="Target language, as a code of home-assistant-intents.")
    ] = "lb",
    model: Annotated[
        str | None,
        typer.Option(
            help="A Hugging Face model, by name or folder, instead of multilingual-e5-small."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Repetitions, each with a seed of its own.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    fast: Annotated[
        bool, typer.Option("--fast", help="Train on a small share: a check, not a result.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Recompute steps that the folder holds already.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: torch's.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for the sparse differences, the table and the plot.")
    ] = Path("sparse-ft-quickstart"),
) -> None:
    """Carry a task from English to another language by composing two sparse differences.

    Trains on real text a language SFT (unlabelled, in the target language) and a task SFT
    (labelled, in English), composes them, and prints the accuracy in the target language.
    Takes under six minutes on two cores.
    """
    try:
        from sparse_ft.quickstart import QuickstartError, run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("sparse_ft", "sparse_ft_kernels"):
            raise
        _fail(
            f"the quickstart needs the package {error.name!r}, which is not installed. "
            'Install it with: pip install "sparse-ft[quickstart]"'
        )
    try:
        run(
            language=language,
            model=model,
            output=output,
            seeds=seeds,
            seed=seed,
            fast=fast,
            fresh=fresh,
            threads=threads,
        )
    except QuickstartError as error:
        _fail(str(error))


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A sparse difference: a .safetensors file.")],
) -> None:
    """Print what a file of a sparse difference holds: sizes, origin, the model it belongs to."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sparse_ft.files import describe

    try:
        fields = describe(file)
    except (OSError, ValueError) as error:
        _fail(str(error))
    table = Table(title=str(file), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in fields.items():
        # A file is foreign text: neither its brackets nor its control codes may act here.
        shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(value))
        table.add_row(name, Text(shown))
    Console().print(table)


def _fail(message: str) -> NoReturn:
    typer.echo(f"sparse-ft: {message}", err=True)
    raise typer.Exit(1)


def main() -> None:
    """The entry point of the command."""
    app()
