"""The command `sparse-ft`.

Each command imports what it needs when it runs: `sparse-ft --help` is quick and needs no extra.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sparse_ft._version import __version__

if TYPE_CHECKING:
    from sparse_ft import SparseDelta

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


File = Annotated[
    str,
    typer.Argument(
        metavar="SFT",
        help="An SFT: a .safetensors file, a folder, a pytorch_diff.bin, or owner/name on the Hub.",
    ),
]
Files = Annotated[
    list[str],
    typer.Argument(
        metavar="SFT…",
        help="SFTs: .safetensors files, folders, pytorch_diff.bin files, or owner/name on the Hub.",
    ),
]
Base = Annotated[
    str,
    typer.Argument(
        metavar="BASE",
        help="The base model: a folder with model.safetensors (or shards, or pytorch_model.bin), "
        "or one such file.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="What to write.")]
Weights = Annotated[
    list[float] | None,
    typer.Option(
        "--weight", "-w", help="One α for each SFT, in their order; default 1. May be negative."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for programs.")]
Mismatch = Annotated[
    bool,
    typer.Option(
        "--allow-base-mismatch", help="Go on even where the SFT was made for another base model."
    ),
]


@app.command()
def info(file: File, as_json: Json = False) -> None:
    """Print what an SFT holds: sizes, origin, the model it belongs to. It is checked whole."""
    from sparse_ft.files import describe

    with _errors():
        fields = _describe(_load(file), file) if as_json else describe(file)
    if as_json:
        _print_json(fields)
    else:
        _print_fields(file, fields)


@app.command()
def verify(
    files: Files,
    base: Annotated[
        str | None,
        typer.Option(help="Check against this base model, too: a checkpoint's file or folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check SFTs: format, content, content id, and with --base that they belong to a model.

    The exit status is 1 if any of them fails.
    """
    from sparse_ft.checkpoints import Checkpoint, check_fit

    results: list[dict[str, Any]] = []
    with _errors():
        model = None if base is None else Checkpoint(base)
    for file in files:
        found: dict[str, Any]
        try:
            delta = _load(file)
            found = {"file": file, "ok": True, "nnz": delta.nnz, "content_id": delta.content_id}
            if model is not None:
                check_fit(model, delta)
                digests = delta.meta.get("base", {}).keys() & {"digest_f32", "digest_bf16"}
                found["base"] = (
                    "fits" if digests else "fits by names and shapes; no digest was recorded"
                )
        except (OSError, ValueError) as error:
            found = {"file": file, "ok": False, "error": str(error)}
        results.append(found)
        if not as_json:
            said = f"FAILED  {found.get('error')}"
            if found["ok"]:
                about = f"; the base {found['base']}" if "base" in found else ""
                said = (
                    f"ok      {file}: {found['nnz']:,} entries, {found['content_id'][:16]}…{about}"
                )
            typer.echo(_inert(said))
    if as_json:
        _print_json(results)
    if not all(found["ok"] for found in results):
        raise typer.Exit(1)


@app.command()
def compose(
    files: Files,
    output: Output,
    weight: Weights = None,
    heads: Annotated[
        str | None, typer.Option(help="The SFT, of those given, whose heads the result keeps.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add SFTs up to one: applying it gives the bits of composing them all."""
    _merge(files, output, weight, "sum", {}, heads, force, as_json)


@app.command()
def merge(
    files: Files,
    output: Output,
    rule: Annotated[str, typer.Option(help="How, such as ties, dare or mean.")] = "sum",
    weight: Weights = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="An option of the rule: name=value.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="The SFT, of those given, whose heads the result keeps.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Merge SFTs into one by a rule: sum, mean, ties, dare and others (docs/merging.md)."""
    options: dict[str, Any] = {}
    for item in option or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"--option takes name=value, found {item!r}")
        options[name] = _value(value)
    _merge(files, output, weight, rule, options, heads, force, as_json)


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
    as_json: Json = False,
) -> None:
    """Show which entries SFTs share, and whether they pull the same way there."""
    from sparse_ft.overlap import overlap as compare

    with _errors():
        deltas = [_load(file) for file in files]
        found = compare(deltas, names=_labels(files), progress=_shows_progress(as_json))
        table = found.table(metric)
        if csv is not None:
            found.to_csv(csv)
        if plot is not None:
            try:
                found.plot(plot, metric)
            except ModuleNotFoundError as error:
                _fail(str(error))
    if as_json:
        _print_json(found.to_dict())
    else:
        _print(table)


@app.command()
def diff(
    base: Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The tuned model, likewise.")],
    output: Output,
    density: Annotated[
        float | None, typer.Option(help="Keep this share of the entries, those most changed.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Keep so many entries.")] = None,
    eps: Annotated[float, typer.Option(help="Drop differences of at most this size.")] = 0.0,
    head: Annotated[
        list[str] | None,
        typer.Option("--head", help="A tensor of TUNED to store whole, such as a classifier's."),
    ] = None,
    lang: Annotated[str | None, typer.Option(help="Its language, such as sw.")] = None,
    task: Annotated[str | None, typer.Option(help="Its task, such as ner.")] = None,
    base_id: Annotated[str | None, typer.Option(help="The base model's name on the Hub.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make an SFT from two checkpoints on disk, neither of which is held in memory."""
    from sparse_ft.checkpoints import diff as compare

    meta: dict[str, Any] = {"lang": lang, "task": task}
    meta["base"] = {"id": base_id} if base_id else None
    with _errors():
        _check_output(output, force)
        delta = compare(
            base,
            tuned,
            k=k,
            density=density,
            eps=eps,
            heads=head or (),
            progress=_shows_progress(as_json),
            **{key: value for key, value in meta.items() if value},
        )
        _saved(delta, output, as_json)


@app.command()
def apply(
    base: Base,
    files: Files,
    output: Output,
    weight: Weights = None,
    heads: Annotated[
        str | None, typer.Option(help="The SFT, of those given, whose heads to put on as well.")
    ] = None,
    allow_base_mismatch: Mismatch = False,
    as_json: Json = False,
) -> None:
    """Write the model that SFTs make of a base model, tensor by tensor, into a new folder."""
    from sparse_ft.checkpoints import export

    with _errors():
        deltas = [_load(file) for file in files]
        with_heads = [deltas[_index(files, heads)]] if heads is not None else []
        path = export(
            base,
            deltas,
            output,
            weights=weight,
            heads=with_heads,
            allow_base_mismatch=allow_base_mismatch,
            progress=_shows_progress(as_json),
        )
        size = sum(f.stat().st_size for f in Path(path).glob("*.safetensors"))
    _report({"output": path, "bytes": size, "deltas": len(deltas)}, as_json)


class Form(str, Enum):
    """What `convert` writes."""

    sft = "sft"
    legacy = "legacy"
    shira = "shira"
    patch = "patch"


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="An SFT, a pytorch_diff.bin, a folder with a PEFT SHiRA adapter, or owner/name on "
            "the Hub."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The file or folder to write.")],
    to: Annotated[
        Form | None,
        typer.Option(
            help="sft: our format. legacy: pytorch_diff.bin, for the LT-SFT reference library. "
            "shira: a PEFT adapter. patch: absolute values, for inference engines. Default: legacy "
            "for a .bin, else sft."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model on disk: its digest is recorded; shira and patch need it."
        ),
    ] = None,
    base_id: Annotated[str | None, typer.Option(help="The base model's name on the Hub.")] = None,
    lang: Annotated[str | None, typer.Option(help="Its language, such as sw.")] = None,
    task: Annotated[str | None, typer.Option(help="Its task, such as ner.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert between our format, the LT-SFT reference library's, PEFT's SHiRA and patches."""
    from sparse_ft import exchange, legacy

    form = to or (Form.legacy if output.suffix == ".bin" else Form.sft)
    with _errors():
        if form in (Form.shira, Form.patch) and base is None:
            raise ValueError(f"convert: --to {form.value} needs --base, the base model on disk")
        _check_output(output, force)
        delta = _import(source, base, base_id, lang=lang, task=task)
        if form is Form.sft:
            _saved(delta, output, as_json)
            return
        if form is Form.legacy:
            path = legacy.write(delta, output)
        elif form is Form.shira:
            assert base is not None
            path = exchange.write_shira(delta, output, _skeleton(base), base_id=base_id)
        else:
            assert base is not None
            path = exchange.write_patch(exchange.replacing(delta, base), output)
    _report({"output": path, "nnz": delta.nnz}, as_json)


def _import(
    source: str, base: str | None, base_id: str | None, **labels: str | None
) -> SparseDelta:
    """An SFT of any kind, labelled as asked for."""
    from sparse_ft import SparseDelta, exchange, hub, legacy
    from sparse_ft.checkpoints import Checkpoint

    meta: dict[str, Any] = {key: value for key, value in labels.items() if value}
    source = hub.located(source)
    if os.path.isfile(os.path.join(source, "adapter_config.json")):
        if base is None:
            raise ValueError(
                f"{source}: a SHiRA adapter knows no shapes; name its base with --base"
            )
        delta = exchange.read_shira(source, base, **meta)
    elif source.endswith(".bin") or (
        os.path.isdir(source) and not os.path.lexists(os.path.join(source, "sft.safetensors"))
    ):
        model = None if base is None else Checkpoint(base)
        return legacy.read(source, base=model, base_id=base_id, **meta)
    else:
        delta = SparseDelta.load(source)
    if base_id:
        meta["base"] = {**delta.meta.get("base", {}), "id": base_id}
    return SparseDelta(delta.support, delta.val, delta.heads, {**delta.meta, **meta})


def _skeleton(base: str) -> Any:
    """A model without values, for the kinds of its modules."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError(
            "convert: --to shira looks at the modules of the model and needs transformers; install "
            'it with: pip install "sparse-ft[trainer]"'
        ) from None
    import torch

    config = transformers.AutoConfig.from_pretrained(base)
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(f"{base}: config.json names no architecture that transformers knows")
    with torch.device("meta"):
        return kind(config)


# --- what the commands share --------------------------------------------------------------------


@contextmanager
def _errors() -> Iterator[None]:
    """Ends the command with one line and status 1 where an input or an output is refused."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        _fail(str(error.args[0]) if isinstance(error, KeyError) else str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"sparse-ft: {_inert(message)}", err=True)
    raise typer.Exit(1)


def _load(file: str) -> SparseDelta:
    from sparse_ft import SparseDelta

    return SparseDelta.load(file)


def _merge(
    files: Sequence[str],
    output: Path,
    weights: list[float] | None,
    rule: str,
    options: dict[str, Any],
    heads: str | None,
    force: bool,
    as_json: bool,
) -> None:
    from sparse_ft import merge as merge_deltas

    with _errors():
        _check_output(output, force)
        deltas = [_load(file) for file in files]
        keep = None if heads is None else deltas[_index(files, heads)]
        delta = merge_deltas(deltas, weights, rule=rule, heads=keep, **options)
        _saved(delta, output, as_json)


def _index(files: Sequence[str], chosen: str) -> int:
    if chosen not in files:
        raise ValueError(f"--heads {chosen}: it is none of the SFTs given: {', '.join(files)}")
    return files.index(chosen)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _labels(files: Sequence[str]) -> list[str]:
    """Names to show: the last parts of the paths, as many as tell them apart."""
    parts = [Path(file).with_suffix("").parts for file in files]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(names)]


def _check_output(output: Path, force: bool) -> None:
    """Refuses before the work is done, not after it."""
    target = output / "sft.safetensors" if output.is_dir() else output
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; --force replaces it")


def _saved(delta: SparseDelta, output: Path, as_json: bool) -> None:
    path = delta.save(output)
    _report(
        {
            "output": path,
            "bytes": os.path.getsize(path),
            "nnz": delta.nnz,
            "density": delta.density,
            "content_id": delta.content_id,
        },
        as_json,
    )


def _describe(delta: SparseDelta, file: str) -> dict[str, Any]:
    meta = delta.meta
    counts = delta.support.counts()
    return {
        "file": file,
        "kind": delta.kind,
        "nnz": delta.nnz,
        "numel": delta.layout.numel,
        "density": delta.density,
        "value_dtype": str(delta.val.dtype).removeprefix("torch."),
        "content_id": delta.content_id,
        "params": [
            {
                "name": name,
                "shape": list(shape),
                "nnz": counts[name],
                "base_dtype": meta.get("dtypes", {}).get(name),
                "aliases": meta.get("aliases", {}).get(name, []),
            }
            for name, shape in zip(delta.layout.names, delta.layout.shapes, strict=True)
        ],
        "heads": [
            {
                "name": name,
                "shape": list(head.shape),
                "dtype": str(head.dtype).removeprefix("torch."),
                "role": meta.get("dense_roles", {}).get(name, "head"),
            }
            for name, head in delta.heads.items()
        ],
        **{
            key: meta.get(key)
            for key in ("role", "lang", "task", "license", "base", "trained_on", "recipe")
        },
        "value_loss": meta.get("value_loss", "none"),
    }


def _shows_progress(as_json: bool) -> bool:
    return sys.stderr.isatty() and not as_json


def _inert(text: str) -> str:
    """Foreign text that acts on no terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


def _print_fields(title: str, fields: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(_inert(title)), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in fields.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(Text(_inert(name)), Text(_inert(shown)))
    _print(table)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=True))


def _report(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(found)
    else:
        _print_fields(str(found["output"]), {k: v for k, v in found.items() if k != "output"})


def main() -> None:
    """The entry point of the command."""
    app()
