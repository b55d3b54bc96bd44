"""The command `sparse-ft`.

Each command imports what it needs when it runs, so that `sparse-ft --help` needs no extra. `shared`
holds what they have in common, each other module a group of commands.
"""

from __future__ import annotations

from typing import Annotated

import typer

from sparse_ft._version import __version__

from . import combine, files, quickstart, training
from .shared import plain_warnings

app = typer.Typer(
    name="sparse-ft",
    help="Lottery-Ticket sparse fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (quickstart, training, files, combine):
    app.add_typer(group.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparse-ft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Lottery-Ticket sparse fine-tuning."""
    context.with_resource(plain_warnings())


def main() -> None:
    """The entry point of the command."""
    app(prog_name="sparse-ft")
