"""The command `quickstart`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .shared import fail

app = typer.Typer()


class QuickstartTask(str, Enum):
    """What the quickstart can learn."""

    intents = "intents"
    slots = "slots"


@app.command()
def quickstart(
    task: Annotated[
        QuickstartTask,
        typer.Option(help="The intent of a sentence, or a tag for each of its words."),
    ] = QuickstartTask.intents,
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
    (labelled, in English), composes them, and prints what they achieve in the target language.
    Two tasks share the language SFTs: intents (one label a sentence) and slots (one a word).
    Takes about six minutes on two cores.
    """
    try:
        from sparse_ft.quickstart import QuickstartError, run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("sparse_ft", "sparse_ft_kernels"):
            raise
        fail(
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
            task=task.value,
        )
    except QuickstartError as error:
        fail(str(error))
