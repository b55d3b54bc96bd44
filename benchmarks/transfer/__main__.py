"""The commands: python -m benchmarks.transfer prepare | run | tune | report | own."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sparse_ft.cli.shared import parsed

from . import own as owned
from . import report as report_of
from .arms import ARMS
from .experiments import EXPERIMENTS, Settings, prepared
from .lines import read, stored
from .run import PARTS, OutOfTime, Run, deadline
from .tune import candidates, chosen

OUT_OF_TIME = 75
"""Exit status of a run that goes on with the same command: EX_TEMPFAIL of sysexits.h."""

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


class Precision(str, Enum):
    """Of training."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


Names = Annotated[
    list[str], typer.Option("--experiment", "-e", help=f"Which: {', '.join(EXPERIMENTS)}.")
]
Full = Annotated[
    bool, typer.Option("--full/--quick", help="On a GPU in less than an hour, or on two cores.")
]
Cache = Annotated[Path, typer.Option(help="Folder for packages, data, base models and runs.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …; auto: a GPU where there is one.")]
Minutes = Annotated[
    float | None,
    typer.Option(min=0.01, help="Stop after so many, with exit status 75; call again to go on."),
]
Precise = Annotated[
    Precision,
    typer.Option(help="Of training; auto: bf16 autocast where the device has instructions for it."),
]
Languages = Annotated[
    list[str] | None, typer.Option("--lang", help="Which; may be given several times.")
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Repetitions, each with a seed of its own.")]
First = Annotated[
    int, typer.Option("--seed", min=0, help="The first seed; several commands may share the work.")
]
CACHE = Path(".transfer")


@app.command()
def prepare(
    experiment: Names = ["pos"],  # noqa: B006  (typer reads it)
    full: Full = False,
    base: Annotated[
        bool, typer.Option("--base/--no-base", help="Make the base model as well, with stage 0.")
    ] = True,
    cache: Cache = CACHE,
    device: Device = "auto",
    precision: Precise = Precision.auto,
    minutes: Minutes = None,
) -> None:
    """Fetch the packages, build the data sets, and make their base models.

    Only this needs a network. The cache folder holds all of it: copied to a machine without one,
    `run` works there. Where that machine has a GPU, leave the base models to it (--no-base).
    """
    known(experiment, EXPERIMENTS, "--experiment")
    with stopping(minutes):
        for name in experiment:
            settings = EXPERIMENTS[name].sizes[size_of(full)]
            found = prepared(
                EXPERIMENTS[name], settings, cache, device_of(device),
                precision_of(precision, device), with_base=base, say=say,
            )  # fmt: skip
            say(f"{name}: data {found.dataset.content}, base model {found.base or 'later'}")


@app.command()
def run(
    experiment: Names = ["pos"],  # noqa: B006
    full: Full = False,
    seeds: Seeds = None,
    seed: First = 0,
    lang: Languages = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help=f"Rows of the table; may be given several times: {', '.join(ARMS)}."),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"Parts of the study; likewise: {', '.join(PARTS)}."),
    ] = None,
    minutes: Minutes = None,
    device: Device = "auto",
    precision: Precise = Precision.auto,
    store: Annotated[
        Path | None, typer.Option(help="A file that gets the lines, beside the run's own.")
    ] = None,
    cache: Cache = CACHE,
) -> None:
    """Train the SFTs of an experiment and score its rows; what is done is not done again."""
    known(arm, ARMS, "--arm")
    known(part, PARTS, "--part")
    known(experiment, EXPERIMENTS, "--experiment")
    with stopping(minutes):
        for name in experiment:
            settings = EXPERIMENTS[name].sizes[size_of(full)]
            study = opened(name, settings, full, cache, device, precision, store)
            languages = lang or settings.languages or study.dataset.targets
            rows = study.rows(
                range(seed, seed + (seeds or settings.seeds)),
                list(languages),
                arm or settings.arms,
                part or settings.parts,
            )
            lines = study.go(rows)
            report_of.show(read([study.lines]))
            say(f"{len(lines)} lines in {study.lines}")


@app.command()
def tune(
    experiment: Names = ["pos"],  # noqa: B006
    full: Full = False,
    seeds: Seeds = None,
    seed: First = 0,
    lang: Languages = None,
    minutes: Minutes = None,
    device: Device = "auto",
    precision: Precise = Precision.auto,
    cache: Cache = CACHE,
) -> None:
    """Try the knobs of DeFT-X and the weight of the language's SFT on the development languages.

    It reads their development data alone, and says which did best; `experiments.py` records what
    was chosen.
    """
    known(experiment, EXPERIMENTS, "--experiment")
    with stopping(minutes):
        for name in experiment:
            settings = EXPERIMENTS[name].sizes[size_of(full)]
            study = opened(name, settings, full, cache, device, precision, None)
            languages = lang or list(study.dataset.dev_of)
            if wrong := [one for one in languages if one not in study.dataset.dev_of]:
                raise typer.BadParameter(
                    f"{wrong[0]} is no development language of {name}; there are "
                    f"{', '.join(study.dataset.dev_of) or 'none'}",
                    param_hint="--lang",
                )
            lines = study.go(candidates(range(seed, seed + (seeds or 1)), languages))
            for said in chosen(lines):
                say(said)
            say(f"{len(lines)} lines in {study.lines}")


@app.command()
def report(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of lines, such as a run's; default: those stored here."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write report.md and plots there.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Write nothing; status 1 where docs/transfer.md differs."),
    ] = False,
) -> None:
    """Print the tables of lines, with intervals; of those stored here, write the page as well."""
    with stopping(None):
        lines = read(files) if files else stored()
        if check:
            if found := report_of.faults(lines):
                raise ValueError(f"{'; '.join(found)}: python -m benchmarks.transfer report")
            return
        if not lines:
            raise ValueError("there are no lines to report; run --store writes them")
        report_of.show(lines)
        if output is not None:
            say(f"{report_of.write_to(lines, output)}")
        elif not files:
            report_of.write(lines)


@app.command()
def own(
    folder: Annotated[Path, typer.Argument(help="With the data sets, as they are published.")],
    preset: Annotated[
        str, typer.Option(help=f"The papers' settings for: {', '.join(owned.PRESETS)}.")
    ],
    base: Annotated[
        str | None, typer.Option(help="A folder, or a name on the Hub; default: the paper's.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what was understood, and train nothing.")
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="LANGUAGE=FILE", help="Text of a language; default: text/xx.txt."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the recipes, or of one: --set task.epochs=[1,3].",
        ),
    ] = None,
    seeds: Seeds = 1,
    lang: Languages = None,
    arm: Annotated[
        list[str] | None, typer.Option(help=f"Rows; default: the papers'. {', '.join(ARMS)}.")
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PARTS)}.")] = None,
    minutes: Minutes = None,
    device: Device = "auto",
    precision: Precise = Precision.fp32,
    store: Annotated[Path | None, typer.Option(help="A file that gets the lines too.")] = None,
    cache: Cache = CACHE,
) -> None:
    """Run the papers' tables on your own copies of their data, or on data laid out like them.

    Universal Dependencies for pos and dp, CoNLL-2003 and MasakhaNER for ner, MultiNLI and XNLI or
    AmericasNLI for nli, SMSA and NusaX for sentiment; and text/xx.txt, a document a line, in each
    language. What the names of files do not say, a transfer.json in the folder does.
    """
    known(arm, ARMS, "--arm")
    known(part, PARTS, "--part")
    known([preset], owned.PRESETS, "--preset")
    with stopping(minutes):
        files = dict(split(one, "--text") for one in text or ())
        changes = recipe_settings(setting or ())
        settings = owned.settings(preset, changes["language"], changes["task"])
        dataset = owned.prepare(folder, preset, cache / "data", files)
        for said in owned.describe(dataset):
            typer.echo(said)
        if check:
            return
        study = Run(
            dataset, base or owned.PRESETS[preset].base, settings, cache / "runs", size="own",
            device=device_of(device), precision=precision_of(precision, device), store=store,
            say=say,
        )  # fmt: skip
        rows = study.rows(
            range(seeds or 1), lang or dataset.targets, arm or settings.arms, part or ["arms"]
        )
        lines = study.go(rows)
        report_of.show(read([study.lines]))
        say(f"{len(lines)} lines in {study.lines}")


def split(given: str, option: str) -> tuple[str, str]:
    """NAME=VALUE as a pair.

    Raises:
        typer.BadParameter: It is something else.
    """
    name, equals, value = given.partition("=")
    if not (name and equals and value):
        raise typer.BadParameter(f"{given!r} is not NAME=VALUE", param_hint=option)
    return name, value


def recipe_settings(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings of the languages' and of the task's recipe, from NAME=VALUE or task.NAME=VALUE."""
    found: dict[str, dict[str, Any]] = {"language": {}, "task": {}}
    for one in given:
        name, value = split(one, "--set")
        whose, dot, rest = name.partition(".")
        if dot and whose not in found:
            raise typer.BadParameter(f"{name!r} begins with neither language. nor task.")
        for recipe in (whose,) if dot else ("language", "task"):
            found[recipe][rest if dot else name] = parsed(value)
    return found


def opened(
    name: str,
    settings: Settings,
    full: bool,
    cache: Path,
    device: str,
    precision: Precision,
    store: Path | None,
) -> Run:
    """The run of an experiment, with data and base model in place."""
    where, autocast = device_of(device), precision_of(precision, device)
    found = prepared(EXPERIMENTS[name], settings, cache, where, autocast, say=say)
    assert found.base is not None
    return Run(
        found.dataset,
        found.base,
        settings,
        cache / "runs",
        size=size_of(full),
        device=where,
        precision=autocast,
        store=store,
        say=say,
    )


@contextmanager
def stopping(minutes: float | None) -> Iterator[None]:
    """Ends the command where the time is up or the user stops it; and by one line at a mistake."""
    again = shlex.join([Path(sys.executable).name, "-m", "benchmarks.transfer", *sys.argv[1:]])
    try:
        with deadline(minutes):
            yield
    except OutOfTime:
        say(f"the time is up; this goes on: {again}")
        raise typer.Exit(OUT_OF_TIME) from None
    except KeyboardInterrupt:
        say(f"stopped; this goes on: {again}")
        raise typer.Exit(130) from None
    except (OSError, ValueError, RuntimeError) as error:
        if os.environ.get("SPARSE_FT_TRACEBACK"):
            raise
        say(f"error: {error}")
        raise typer.Exit(1) from None


def size_of(full: bool) -> str:
    """The name of a size."""
    return "full" if full else "quick"


def known(names: Sequence[str] | None, among: Any, option: str) -> None:
    """Refuses a name that there is not.

    Raises:
        typer.BadParameter: It says which there are.
    """
    for name in names or ():
        if name not in among:
            raise typer.BadParameter(
                f"there is no {name!r}; there are {', '.join(among)}", param_hint=option
            )


def device_of(name: str) -> str:
    """A device by its name."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def precision_of(precision: Precision, device: str) -> str | None:
    """What a recipe calls it; "auto" is bf16 where the device has instructions for it."""
    if precision is not Precision.auto:
        return None if precision is Precision.fp32 else "bf16"
    if device_of(device).startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else None
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if has() else None


def say(said: str) -> None:
    typer.echo(said, err=True)


if __name__ == "__main__":
    app()
