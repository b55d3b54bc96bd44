"""The commands that train SFTs and evaluate them: `train language`, `train task`, `evaluate`,
`sweep`."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared import (
    Force,
    Json,
    License,
    Mismatch,
    Output,
    check_output,
    errors,
    fail,
    labels_of,
    note,
    parsed,
    print_folded,
    print_json,
    print_rich,
    report,
)

if TYPE_CHECKING:
    from sparse_ft.sweep import Sweep
    from sparse_ft.tasks.recipes import Recipe
    from sparse_ft.tasks.runner import Trained

app = typer.Typer()
train = typer.Typer(no_args_is_help=True, help="Train an SFT of a language or of a task.")
app.add_typer(train, name="train")

PANELS = {"recipe": "Recipe: settings over those of the preset", "run": "Run"}
STOPPED = 130
"""The exit status after Ctrl-C, as shells have it."""

_PAIR = "one number, or one for the full and one for the sparse phase"

Model = Annotated[str, typer.Option("--base", help="The base model: a folder, or its Hub name.")]
DataFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Of the data: text, conll, conllu, jsonl, json, csv, tsv or dataset. Default: by the "
        "suffix.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="An option of the task, such as tags=upos or label=intent, or of the reader of its "
        "data, such as delimiter=';'. May be repeated.",
    ),
]
Valid = Annotated[
    str | None, typer.Option(help="Data to choose the best state by: a file or a data set.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: a GPU where there is one.")]


def _settings(
    preset: Annotated[
        str | None,
        typer.Option(help="The recipe to start from; `sparse-ft train presets` lists them."),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", "-k", help="Number of entries to tune.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the entries to tune, in place of --k.")
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="How entries are selected: magnitude, denoised, random, weight, bias, gradient, "
            "fisher or snip."
        ),
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="RAND-SFT: random entries, and no full phase.")
    ] = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Plain fine-tuning of every entry, to compare with: one phase."
        ),
    ] = False,
    l1: Annotated[
        str | None, typer.Option(help="λ of the L1 term: one number, or two as below.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help=f"Optimizer steps: {_PAIR}: 500,2000.")] = None,
    epochs: Annotated[
        str | None, typer.Option(help=f"Passes over the data: {_PAIR}: 3,10.")
    ] = None,
    min_steps: Annotated[int | None, typer.Option(help="Fewest steps of a phase.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Most steps of a phase.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a batch.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches for one step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most pieces of an example.")] = None,
    lr: Annotated[str | None, typer.Option(help=f"Learning rate: {_PAIR}: 2e-4,4e-4.")] = None,
    evaluate_every: Annotated[
        str | None, typer.Option(help='Steps from one evaluation to the next, or "epoch".')
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Autocast: bf16 or fp16.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any other setting of the recipe: --set warmup=0.1."
        ),
    ] = None,
) -> tuple[str | None, dict[str, Any]]:
    """The preset, and what is set otherwise."""
    given = {
        "k": k,
        "density": density,
        "criterion": criterion,
        "l1": _pair(l1),
        "steps": _pair(steps),
        "epochs": _pair(epochs),
        "min_steps": min_steps,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "max_length": max_length,
        "lr": _pair(lr),
        "evaluate_every": None if evaluate_every is None else parsed(evaluate_every),
        "precision": precision,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    settings |= _named_values("--set", setting)
    if random and full:
        raise typer.BadParameter("--random and --full exclude one another")
    if random and settings.setdefault("criterion", "random") != "random":
        raise typer.BadParameter(f"--random and --criterion {criterion} exclude one another")
    if full:
        if {"k", "density", "criterion"} & settings.keys():
            raise typer.BadParameter("--full tunes every entry: no --k, --density or --criterion")
        settings["full"] = True
    return preset, settings


def _run(
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the state and the log of the run. Default: beside the output, .run."
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps from one saved state to the next.")
    ] = 500,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="What the new head, the order of the data and dropout are drawn from."
        ),
    ] = 0,
    device: Device = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over, whatever the folder of the run holds.")
    ] = False,
    force: Force = False,
    license: License = None,
    full_model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The fully tuned model, for several runs that differ in density or criterion "
            "alone: the first makes it, the others need no full phase.",
        ),
    ] = None,
) -> dict[str, Any]:
    """How the training runs, as keywords of `runner.train`."""
    return {
        "run": run,
        "save_every": save_every,
        "seed": seed,
        "device": device,
        "fresh": fresh,
        "force": force,
        "license": license,
        "full_model": full_model,
    }


def _with_options(
    **groups: Callable[..., Any],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options that several have: for each of its parameters named here, the
    parameters of that function, whose result it gets."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shown = dict(inspect.signature(command, eval_str=True).parameters)
        for name, group in groups.items():
            del shown[name]
            for key, p in inspect.signature(group, eval_str=True).parameters.items():
                # A copy: other commands have the option among their own.
                option = copy.copy(p.annotation.__metadata__[0])
                option.rich_help_panel = PANELS[name]
                shown[key] = p.replace(annotation=Annotated[p.annotation.__origin__, option])
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in shown.values()]

        def run(**given: Any) -> None:
            for name, group in groups.items():
                own = {key: given.pop(key) for key in inspect.signature(group).parameters}
                given[name] = group(**own)
            command(**given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


class Objective(str, Enum):
    """How a language is learnt."""

    mlm = "mlm"
    clm = "clm"


class Kind(str, Enum):
    """The kinds of tasks."""

    tokens = "tokens"
    sequences = "sequences"
    qa = "qa"
    parsing = "parsing"


@train.command()
@_with_options(recipe=_settings, run=_run)
def language(
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT…", help="Text of the language: files, or data sets."),
    ],
    base: Model,
    output: Output,
    lang: Annotated[str, typer.Option(help="The language, as a tag such as sw.")],
    objective: Annotated[
        Objective | None,
        typer.Option(help="Masked or causal language modelling. Default: the preset's; mlm."),
    ] = None,
    valid: Valid = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share of the text to hold out, without --valid.")
    ] = None,
    option: Options = None,
    format: DataFormat = None,
    recipe: Any = None,
    run: Any = None,
    as_json: Json = False,
) -> None:
    """Train the SFT of a language on plain text.

    Killed or stopped, the same command continues.
    """
    preset, settings = recipe
    if held_out is not None:
        settings["held_out"] = held_out
    _train(
        texts, base, output, preset, "mlm" if objective is None else objective.value, settings,
        option, format, as_json, given=objective is not None, valid=valid, lang=lang, **run,
    )  # fmt: skip


@train.command()
@_with_options(recipe=_settings, run=_run)
def task(
    kind: Annotated[Kind, typer.Argument(help="The kind of task.")],
    base: Model,
    output: Output,
    data: Annotated[
        list[str] | None, typer.Argument(metavar="DATA…", help="Files or data sets to train on.")
    ] = None,
    valid: Valid = None,
    source_sft: Annotated[
        str | None,
        typer.Option(
            metavar="SFT",
            help="The SFT of the language of the data: it is on the model while that trains, and "
            "not part of the result.",
        ),
    ] = None,
    sources: Annotated[
        Path | None,
        typer.Option(
            help="Several source languages, in place of DATA, --valid and --source-sft: a JSON "
            'file, {"en": {"data": …, "valid": …, "sft": …, "repeat": 1}, …}.'
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the task is called, such as ner.")] = None,
    lang: Annotated[
        str | None, typer.Option(help="The language of the data. Default: the SFT's.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="A label, in the order of the head. Default: those of the data."),
    ] = None,
    option: Options = None,
    format: DataFormat = None,
    recipe: Any = None,
    run: Any = None,
    as_json: Json = False,
) -> None:
    """Train the SFT of a task on labelled data of a source language.

    Killed or stopped, the same command continues.
    """
    preset, settings = recipe
    if sources is not None and (data or valid or source_sft):
        raise typer.BadParameter("--sources takes the place of DATA, --valid and --source-sft")
    if sources is None and not data:
        raise typer.BadParameter("DATA to train on is missing")
    _train(
        sources or data, base, output, preset, kind.value, settings, option, format, as_json,
        given=True, valid=valid, sft=source_sft, name=name, lang=lang, labels=label or None, **run,
    )  # fmt: skip


@train.command()
def presets(as_json: Json = False) -> None:
    """List the recipes: those of the paper and of its scripts, and ours."""
    from sparse_ft.tasks.recipes import DEFAULTS, RECIPES

    if as_json:
        print_json({name: {"task": r.task, **r.to_dict()} for name, r in RECIPES.items()})
        return
    for name, r in RECIPES.items():
        batch = f"{r.accumulate} × {r.batch_size}" if r.accumulate > 1 else r.batch_size
        size = f"density {r.density}" if r.k is None else f"K {r.k:,}"
        ours = f"left open there, so ours: {', '.join(r.unstated)}" if r.unstated else ""
        chosen = "the last state counts" if r.evaluate_every is None else f"best by {r.metric}"
        parts = [
            r.task,
            size,
            _length(r),
            f"batch {batch}",
            f"lr {_said(r.lr)}",
            f"λ {r.l1[0]:g}",
            chosen,
            ours,
        ]
        kinds = [kind for kind, default in DEFAULTS.items() if default == name]
        default = f" [default of {', '.join(kinds)}]" if kinds else ""
        typer.echo(f"{name} ({r.origin}): {r.about}{default}")
        print_folded("    ", "; ".join(str(part) for part in parts if part))


@app.command()
def evaluate(
    tests: Annotated[
        list[str], typer.Argument(metavar="TEST…", help="Test data: files, folders or data sets.")
    ],
    base: Model,
    task: Annotated[
        str,
        typer.Option(
            metavar="SFT",
            help="The SFT of the task; that of a language alone gives its perplexity on text.",
        ),
    ],
    lang: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SFT",
            help='The SFT of the language of TEST, or "none" for the task alone. May be repeated: '
            "with as many TEST, each has its own.",
        ),
    ] = None,
    weight: Annotated[float, typer.Option(help="α of the languages' SFTs.")] = 1.0,
    kind: Annotated[
        str | None, typer.Option(help="Kind of the task, for an SFT that records none.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Likewise a label, in the order of the head.")
    ] = None,
    option: Options = None,
    format: DataFormat = None,
    max_length: Annotated[
        int | None, typer.Option(help="Most pieces of an example. Default: as trained.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at once.")] = 32,
    device: Device = "auto",
    allow_base_mismatch: Mismatch = False,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file for what is predicted of each example, one JSON object a line: data, "
            "lang, index, gold, predicted.",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score a task in other languages: θ0 + φ of the task + φ of each language."""
    langs = [None if name == "none" else name for name in lang or ["none"]]
    with _training_errors():
        from sparse_ft.tasks import runner

        if predictions is not None:
            check_output(predictions, force)
        rows = runner.evaluate(
            base,
            task,
            tests,
            langs=langs,
            weight=weight,
            kind=kind,
            labels=label or None,
            options=_options(option, format),
            max_length=max_length,
            batch_size=batch_size,
            device=device,
            allow_base_mismatch=allow_base_mismatch,
            predictions=predictions is not None,
        )
        if predictions is not None:
            _write_predictions(rows, predictions)
    if as_json:
        print_json(rows)
    else:
        _print_scores(rows)


@app.command()
def sweep(
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT…", help="Text of the language: files, or data sets."),
    ],
    base: Model,
    kind: Annotated[Kind, typer.Option(help="The kind of task.")],
    data: Annotated[list[str], typer.Option(help="Data of the task. May be repeated.")],
    test: Annotated[str, typer.Option(help="Test data of the task, in the language.")],
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for SFTs, runs, table and plot.")
    ],
    lang: Annotated[str | None, typer.Option(help="The language, as a tag such as sw.")] = None,
    valid: Valid = None,
    source_sft: Annotated[
        str | None,
        typer.Option(metavar="SFT", help="The SFT of the language of the task's data."),
    ] = None,
    density: Annotated[
        str | None, typer.Option(help="Densities: 0.05,0.3,1. Default: seven, from 5 to 100 %.")
    ] = None,
    task_density: Annotated[
        str | None, typer.Option(help="Those of the task. Default: the same.")
    ] = None,
    language_preset: Annotated[
        str, typer.Option(help="The recipe of the language.")
    ] = "lt-sft-language-sweep",
    task_preset: Annotated[str | None, typer.Option(help="The recipe of the task.")] = None,
    language_set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A setting of the language's recipe: steps=2000."),
    ] = None,
    task_set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A setting of the task's recipe."),
    ] = None,
    option: Options = None,
    format: DataFormat = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps from one saved state to the next.")
    ] = 500,
    device: Device = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over, whatever the folder holds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compose every density of a language with every density of a task (the paper's figure 3).

    Each of the two is tuned in full once. Killed or stopped, the same command continues; a density
    added later costs itself alone. The folder gets grid.csv and, with matplotlib, grid.png.
    """
    with _training_errors(folder, fresh):
        from sparse_ft.sweep import DENSITIES
        from sparse_ft.tasks import density as densities

        task = _recipe(task_preset, kind.value, True)
        language = _recipe(language_preset, "mlm", False)
        grid = densities.sweep(
            texts,
            data,
            test,
            base,
            folder,
            task=task.changed(**_named_values("--task-set", task_set)),
            language=language.changed(**_named_values("--language-set", language_set)),
            lang=lang,
            valid=valid,
            sft=source_sft,
            densities=DENSITIES if density is None else _shares("--density", density),
            task_densities=None
            if task_density is None
            else _shares("--task-density", task_density),
            options=_options(option, format),
            note=note,
            seed=seed,
            save_every=save_every,
            device=device,
            fresh=fresh,
        )
        grid.to_csv(folder / "grid.csv")
        _plot(grid, folder / "grid.png", task.metric or "score")
    if as_json:
        print_json(grid.rows())
    else:
        print_rich(grid.table())


def _shares(flag: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 0.05,0.3,1", param_hint=flag
        ) from None


def _plot(grid: Sweep, path: Path, label: str) -> None:
    """Draws the grid where that can be done, and says so where it cannot."""
    if min(grid.scores.shape) < 2:
        note("contours need two densities or more on both sides; no plot")
        return
    try:
        grid.plot(path, label)
    except ModuleNotFoundError:
        note('matplotlib is not installed, so there is no plot: pip install "sparse-ft[plot]"')


# --- what they share ----------------------------------------------------------------------------


def _train(
    data: Any,
    base: str,
    output: Path,
    preset: str | None,
    kind: str,
    settings: dict[str, Any],
    option: Sequence[str] | None,
    format: str | None,
    as_json: bool,
    *,
    given: bool,
    **rest: Any,
) -> None:
    """Trains, and says what came of it; `given` says whether the kind was asked for by name."""
    run = rest["run"] or output.parent / f"{output.stem}.run"
    with _training_errors(run, rest["fresh"]):
        from sparse_ft.tasks import runner

        trained = runner.train(
            runner.read_sources(data) if isinstance(data, Path) else data,
            base,
            output,
            recipe=_recipe(preset, kind, given).changed(**settings),
            options=_options(option, format),
            note=note,
            **rest,
        )
    _print_trained(trained, as_json)


def _recipe(preset: str | None, kind: str, given: bool) -> Recipe:
    """The recipe to start from.

    Raises:
        RecipeError: There is no such preset, or it is for another kind of training.
    """
    from sparse_ft.tasks.recipes import DEFAULTS, RECIPES, RecipeError, recipe

    chosen = recipe(preset or DEFAULTS[kind])
    if chosen.task == kind or (not given and chosen.role == "language"):
        return chosen
    if chosen.role == "language" and kind in ("mlm", "clm"):
        return replace(chosen, task=kind)
    fitting = [name for name, r in RECIPES.items() if r.task == kind]
    raise RecipeError(
        f"preset {chosen.name} is for {chosen.task}; for {kind}: {', '.join(fitting)}"
    )


def _options(option: Sequence[str] | None, format: str | None) -> dict[str, Any]:
    given = _named_values("--option", option)
    return given if format is None else {**given, "format": format}


def _named_values(flag: str, items: Sequence[str] | None) -> dict[str, Any]:
    found = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"{item!r} is not NAME=VALUE", param_hint=flag)
        found[name] = parsed(value)
    return found


def _pair(text: str | None) -> Any:
    """One number, or two with a comma between."""
    if text is None:
        return None
    numbers = [parsed(part) for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


@contextmanager
def _training_errors(run: Path | None = None, fresh: bool = False) -> Iterator[None]:
    """Ends the command with one line where something is refused, missing or goes wrong."""
    from torch import OutOfMemoryError

    from sparse_ft.lottery import TrainingDiverged

    try:
        with errors():
            yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("sparse_ft", "sparse_ft_kernels"):
            raise
        fail(
            f"the tasks need the package {error.name!r}, which is not installed. Install it with: "
            'pip install "sparse-ft[tasks]"'
        )
    except TrainingDiverged as error:
        fail(str(error).removeprefix("LotteryTicket: "))
    except OutOfMemoryError as error:
        said = str(error).partition(". ")[0]
        fail(f"{said}; a smaller --batch-size with a larger --accumulate needs less")
    except KeyboardInterrupt:
        command = "the same command, without --fresh," if fresh else "the same command"
        stored = run is not None and (run / "run.json").exists()
        said = f"{command} continues from {run}" if stored else "nothing has been stored yet"
        note(f"stopped; {said}")
        raise typer.Exit(STOPPED) from None


def _length(r: Recipe) -> str:
    """The lengths of a recipe, as short as can be."""
    said = _said(r.steps or r.epochs or 0) + (" steps" if r.steps else " epochs")
    if r.min_steps and r.min_steps == r.max_steps:
        said += f", that is {r.min_steps:,} steps"
    elif r.min_steps and r.max_steps:
        said += f", {r.min_steps:,} to {r.max_steps:,} steps"
    return said


def _said(value: float | tuple[float, float]) -> str:
    """One number, or both where those of the phases differ."""
    full, sparse = value if isinstance(value, tuple) else (value, value)
    return f"{full:g}" if full == sparse else f"{full:g}, {sparse:g}"


def _print_trained(trained: Trained, as_json: bool) -> None:
    delta = trained.delta
    found = {
        "output": str(trained.path),
        "run": str(trained.folder),
        "nnz": delta.nnz,
        "density": delta.density,
        "content_id": delta.content_id,
    }
    if as_json:
        print_json({**found, "phases": trained.phases, "recipe": delta.meta.get("recipe", {})})
        return
    from rich.table import Table

    table = Table("phase", "step", "loss", "best", "at step")
    for phase in trained.phases:
        several = trained.recipe.iterations > 1
        name = f"{phase['phase']} {phase['iteration'] + 1}" if several else phase["phase"]
        values = [phase.get(key) for key in ("step", "loss", "best", "best_step")]
        table.add_row(name, *("" if v is None else f"{v:,.4g}" for v in values))
    if trained.phases:
        print_rich(table)
    report(found, False)


def _write_predictions(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes what is predicted, and takes it out of the rows."""
    from sparse_ft.files import new_file

    with new_file("evaluate", str(path)) as temporary, open(temporary, "w", encoding="utf-8") as f:
        for row in rows:
            pairs = zip(row.pop("gold"), row.pop("predictions"), strict=True)
            for i, (gold, predicted) in enumerate(pairs):
                line = {"data": row["data"], "lang": row["lang"], "index": i}
                f.write(json.dumps({**line, "gold": gold, "predicted": predicted}) + "\n")


def _print_scores(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    figures = [key for key in rows[0] if key not in ("data", "lang", "metric")]
    table = Table()
    for heading in ("data", "language"):
        table.add_column(heading, overflow="fold")
    for figure in figures:
        table.add_column(figure, justify="right")
    names = {
        key: dict(zip(given, labels_of(given), strict=True))
        for key in ("data", "lang")
        if (given := sorted({row[key] for row in rows if row[key] is not None}))
    }
    for row in rows:
        values = (f"{row[key]:,.0f}" if key == "n" else f"{row[key]:.4f}" for key in figures)
        said = "none" if row["lang"] is None else names["lang"][row["lang"]]
        table.add_row(names["data"][row["data"]], said, *values)
    print_rich(table)
