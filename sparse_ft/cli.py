"""The command `sparse-ft`.

Each command imports what it needs when it runs, so that `sparse-ft --help` needs no extra. What the
library says in the words of Python is put into the words of the shell here (`_worded`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

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
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    context.with_resource(_plain_warnings())


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
        help="The base model on this machine: a folder with model.safetensors (or shards, or "
        "pytorch_model.bin), or one such file.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="What to write.")]
Weights = Annotated[
    list[float] | None,
    typer.Option(
        "--weight",
        "-w",
        help="One α for each SFT, in their order, each with a -w of its own: -w 1 -w 0.5. Default: "
        "1 each. May be negative.",
    ),
]
Heads = Annotated[
    str | None,
    typer.Option(
        metavar="SFT",
        help="The SFT, of those given, whose heads are kept: as it was given, or its name alone.",
    ),
]
Role = Annotated[str | None, typer.Option(help="What it is for: language, task, …")]
License = Annotated[str | None, typer.Option(help="The license of its values.")]
Lang = Annotated[str | None, typer.Option(help="Its language, such as sw.")]
Task = Annotated[str | None, typer.Option(help="Its task, such as ner.")]
BaseId = Annotated[str | None, typer.Option(help="The base model's name on the Hub.")]
OfBase = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="The base model on disk: the SFTs are checked against it, and the result carries its "
        "digest.",
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
    from sparse_ft.files import _describe, _largest

    with _errors():
        delta = _load(file)
        if as_json:
            _print_json(_document(delta, file))
            return
        fields = dict(_describe(delta, file))
        fields["content id"] = _short_id(delta)
        _print_fields(str(fields.pop("file")), fields)
        if rows := _largest(delta):
            _print_largest(rows, delta.nnz)


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
            about = f"; the base {found['base']}" if "base" in found else ""
            said = f"{file}: ok, {delta.nnz:,} entries, {_short_id(delta)}{about}"
        except (OSError, ValueError) as error:
            why = _worded(str(error), ["the SFT"]).removesuffix("; or pass --allow-base-mismatch")
            found = {"file": file, "ok": False, "error": why}
            said = f"{file}: FAILED: {why.removeprefix(f'{file}: ')}"
        results.append(found)
        if not as_json:
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
    heads: Heads = None,
    base: OfBase = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add SFTs up to one: applying it gives the bits of composing them all."""
    _merge(files, output, weight, "sum", {}, heads, base, force, as_json)


# The options of the rules that have some, with their values; * marks one that has none by itself.
_RULES = {
    "ties": "density=1.0 elect=sum divisor=count scale=1.0",
    "consensus": "k=2 threshold=1.0",
    "dare": "p=0.9* seed=0",
    "della": "p=0.7* epsilon=0.2* seed=0 scope=row elect=sum divisor=none scale=1.0",
    "breadcrumbs": "beta=0.85* gamma=0.01*",
}
_PLAIN_RULES = ("sum", "mean", "mean_present", "magmax", "priority", "disjoint")
_RULES_HELP = "\n".join(f"  {name}: {options}" for name, options in _RULES.items())


@app.command(
    help="Merge SFTs into one by a rule; docs/merging.md has the formulas.\n\n\b\nRules: "
    f"{', '.join(_PLAIN_RULES)}\nand these, with their options (* must be given):\n{_RULES_HELP}"
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
        options[name] = _value(value)
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

    with _errors(files):
        if len(files) < 2:
            raise ValueError(f"overlap compares SFTs: give at least two, not {files[0]} alone")
        for path in (csv, plot):
            if path is not None:
                _check_output(path, force)
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
    k: Annotated[int | None, typer.Option("--k", "-k", help="Keep so many entries.")] = None,
    eps: Annotated[float, typer.Option(help="Drop differences of at most this size.")] = 0.0,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            "--heads",
            "--head",
            metavar="GLOB",
            help="Tensors of TUNED to store whole, such as 'classifier*'. May be repeated.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Compare these tensors alone. May be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Leave these tensors out. May be repeated. A language's SFT that is to be "
            "composed with a task's leaves out the output layer, which the task's model lacks: "
            "'lm_head*'.",
        ),
    ] = None,
    role: Role = None,
    lang: Lang = None,
    task: Task = None,
    license: License = None,
    base_id: BaseId = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make an SFT from two checkpoints on disk, neither of which is held in memory."""
    from sparse_ft.checkpoints import diff as compare

    meta: dict[str, Any] = {"role": role, "lang": lang, "task": task, "license": license}
    meta["base"] = {"id": base_id} if base_id else None
    with _errors():
        _check_output(output, force, "sft.safetensors")
        delta = compare(
            base,
            tuned,
            k=k,
            density=density,
            eps=eps,
            heads=heads or (),
            eligible=only or None,
            exclude=exclude or (),
            progress=_shows_progress(as_json),
            **{key: value for key, value in meta.items() if value},
        )
        _saved(delta, output, as_json)


class DType(str, Enum):
    """The data types of weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@app.command()
def apply(
    base: Base,
    files: Files,
    output: Output,
    weight: Weights = None,
    heads: Heads = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Data type of all weights; the sum is rounded to it once. Default: own."),
    ] = None,
    allow_base_mismatch: Mismatch = False,
    as_json: Json = False,
) -> None:
    """Write the model that SFTs make of a base model, tensor by tensor, into a new folder."""
    import torch

    from sparse_ft.checkpoints import export

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    with _errors(files):
        deltas = _load_all(files, weight)
        with_heads = _with_heads(files, deltas, heads)
        path = export(
            base,
            deltas,
            output,
            weights=weight,
            heads=with_heads or (),
            dtype=None if dtype is None else kinds[dtype.value],
            allow_base_mismatch=allow_base_mismatch,
            progress=_shows_progress(as_json),
        )
        size = sum(f.stat().st_size for f in Path(path).glob("*.safetensors"))
    _report({"output": path, "bytes": size, "deltas": len(deltas)}, as_json)
    if with_heads is not None:
        _note_labels(path, with_heads)


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
            metavar="SOURCE",
            help="An SFT, a pytorch_diff.bin, a folder with a PEFT SHiRA adapter, a patch, or "
            "owner/name on the Hub.",
        ),
    ],
    output: Output,
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
    base_id: BaseId = None,
    role: Role = None,
    lang: Lang = None,
    task: Task = None,
    license: License = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert between our format, the LT-SFT reference library's, PEFT's SHiRA and patches."""
    from sparse_ft import exchange, legacy

    form = to or (Form.legacy if output.suffix == ".bin" else Form.sft)
    inside = {
        Form.sft: "sft.safetensors",
        Form.legacy: "pytorch_diff.bin",
        Form.shira: "adapter_config.json",
        Form.patch: None,
    }
    with _errors():
        if form in (Form.shira, Form.patch) and base is None:
            raise ValueError(f"--to {form.value} needs --base, the base model on disk")
        _check_output(output, force, inside[form])
        labels = {"role": role, "lang": lang, "task": task, "license": license}
        delta = _import(source, base, base_id, **labels)
        if form is Form.sft:
            _saved(delta, output, as_json)
            return
        if form is Form.legacy:
            if output.suffix != ".bin":
                output.mkdir(exist_ok=True)
            path = legacy.write(delta, output)
        elif form is Form.shira:
            assert base is not None
            path = _write_shira(delta, output, base, base_id)
        else:
            assert base is not None
            path = exchange.write_patch(exchange.replacing(delta, base), output)
    _report({"output": path, "nnz": delta.nnz}, as_json)


def _write_shira(delta: SparseDelta, output: Path, base: str, base_id: str | None) -> str:
    from tempfile import TemporaryDirectory

    from sparse_ft import exchange

    model = _skeleton(base)
    if not (output / "adapter_config.json").exists():
        return exchange.write_shira(delta, output, model, base_id=base_id)
    # In the place of an adapter that is there; what else the folder holds stays.
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        new = exchange.write_shira(delta, Path(folder) / "adapter", model, base_id=base_id)
        for path in sorted(Path(new).iterdir()):
            path.replace(output / path.name)
    return str(output)


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
    elif _is_patch(source):
        delta = exchange.read_patch(source)
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
            "--to shira looks at the modules of the model and needs transformers; install "
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
def _errors(files: Sequence[str] = ()) -> Iterator[None]:
    """Ends the command with one line and status 1 where an input or an output is refused."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        said = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        _fail(_worded(said, files))


def _fail(message: str) -> NoReturn:
    typer.echo(f"sparse-ft: {_inert(message)}", err=True)
    raise typer.Exit(1)


def _note(message: str) -> None:
    typer.echo(f"sparse-ft: note: {_inert(message)}", err=True)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the place in the source."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        said = " ".join(_worded(str(message)).split())
        typer.echo(f"sparse-ft: warning: {_inert(said)}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


_FUNCTION = re.compile(
    r"(compose|convert|diff|export|merge|overlap|replacing|select|write_\w+|"
    r"(SparseDelta|Overlap|legacy)\.\w+): "
)
_ARGUMENT = re.compile(
    r"\b(allow_base_mismatch|dtype|eligible|exclude|heads)=(True)?|"
    r"^(eligible|exclude|heads)(?=: )"
)


def _worded(message: str, files: Sequence[str] = ()) -> str:
    """A message of the library in the words of the command: no function, files in place of
    `deltas[i]`, options in place of arguments."""

    def named(match: re.Match[str]) -> str:
        place = int(match[2])
        file = files[place] if place < len(files) else match[0]
        return f"the weight of {file}" if match[1] == "weights" else file

    def needed(match: re.Match[str]) -> str:
        example = re.search(rf"\b{match[2]}=\S+", _RULES.get(match[1], ""))
        value = example[0].rstrip("*") if example else f"{match[2]}=VALUE"
        return f"rule {match[1]!r} needs {match[2]}, such as --option {value}"

    def option(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return "--only" if name == "eligible" else "--" + name.replace("_", "-")

    message = message[found.end() :] if (found := _FUNCTION.match(message)) else message
    message = re.sub(r"\b(deltas|weights)\[(\d+)\]", named, message)
    message = message.replace(" to SparseDelta.load", "")
    message = re.sub(r"rule '(\w+)' needs (\w+)=$", needed, message)
    return _ARGUMENT.sub(option, message)


def _load(file: str) -> SparseDelta:
    from sparse_ft import SparseDelta
    from sparse_ft.files import SFTFileError

    try:
        return SparseDelta.load(file)
    except SFTFileError:
        if os.path.isfile(os.path.join(file, "adapter_config.json")):
            other = "a folder with an adapter of PEFT; sparse-ft convert --base reads SHiRA's"
        elif _is_patch(file):
            other = "a patch of absolute values; sparse-ft convert makes an SFT of it"
        else:
            raise
        raise SFTFileError(f"{file}: is no SFT, but {other}") from None


def _is_patch(path: str) -> bool:
    from safetensors import SafetensorError, safe_open

    from sparse_ft.exchange import _PATCH_KEY

    if not path.endswith(".safetensors") or not os.path.isfile(path):
        return False
    try:
        with safe_open(path, "pt") as file:
            return _PATCH_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _load_all(files: Sequence[str], weights: Sequence[float] | None) -> list[SparseDelta]:
    """SFTs that are to be added up."""
    for file in files:
        if isinstance(_value(file), int | float) and not os.path.lexists(file):
            raise ValueError(
                f"{file}: there is no such file. For a weight, repeat -w: -w 1 -w {file}"
            )
    if weights and len(weights) != len(files):
        raise ValueError(
            f"{len(weights)} weights (-w) for {len(files)} SFTs; give one for each, or none"
        )
    deltas = [_load(file) for file in files]
    ids = [delta.content_id for delta in deltas]
    for j, name in enumerate(ids):
        if (first := ids.index(name)) < j:
            warnings.warn(
                f"{files[j]} is the same SFT as {files[first]}, and is added as well", stacklevel=2
            )
    return deltas


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

    with _errors(files):
        # Before anything else: an option is no argument of the function.
        if rule in RULES:
            options = RULES[rule].options(rule, options)
        _check_output(output, force, "sft.safetensors")
        deltas = _load_all(files, weights)
        keep = _with_heads(files, deltas, heads)
        model = None if base is None else Checkpoint(base)
        delta = merge_deltas(deltas, weights, rule=rule, heads=keep, base=model, **options)
        if model is None and any(delta.known_digests for delta in deltas):
            _note("the result carries no digest of its base model; --base BASE records it")
        _saved(delta, output, as_json)


def _with_heads(
    files: Sequence[str], deltas: Sequence[SparseDelta], chosen: str | None
) -> SparseDelta | None:
    """The SFT whose heads are wanted; a line says whose are left out where none is."""
    having = [file for file, delta in zip(files, deltas, strict=True) if delta.heads]
    if chosen is None:
        if having:
            _note(
                f"the heads of {', '.join(having)} are left out; --heads {having[0]} keeps those "
                "of that one"
            )
        return None
    names = next((n for n in (files, _labels(files)) if chosen in n), None)
    if names is None:
        raise ValueError(f"--heads {chosen}: it is none of the SFTs given: {', '.join(files)}")
    delta = deltas[names.index(chosen)]
    if not delta.heads:
        others = f"; {', '.join(having)} has" if having else ""
        raise ValueError(f"--heads {chosen}: this SFT has no heads{others}")
    return delta


def _note_labels(folder: str, delta: SparseDelta) -> None:
    """Says how to load a model whose classifier is not of the size that its config.json names."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        known = len(config.get("id2label") or ()) or int(config.get("num_labels", 2))
    except (OSError, ValueError, TypeError, AttributeError):
        return
    # Of the matrices of a classifier, the one that gives the labels has the fewest rows.
    rows = [head.shape[0] for head in delta.heads.values() if head.dim() == 2]
    if rows and min(rows) != known:
        _note(
            f"config.json is the base model's: load with from_pretrained({folder!r}, "
            f"num_labels={min(rows)})"
        )


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _labels(files: Sequence[str]) -> list[str]:
    """Names to show: the last parts of the paths, as many as tell them apart."""
    parts = [
        Path(os.path.abspath(file).removesuffix(".safetensors").removesuffix(".bin")).parts
        for file in files
    ]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(names)]


def _check_output(output: Path, force: bool, inside: str | None = None) -> None:
    """Refuses before the work is done, not after it; `inside` is the file's name in a folder."""
    target = output / inside if inside and output.is_dir() else output
    if inside == "sft.safetensors" and target.suffix != ".safetensors":
        raise ValueError(f"{output}: must end in .safetensors, or be an existing folder")
    if target.is_dir() and inside is None:
        raise IsADirectoryError(f"{target} is a folder; name a file")
    if target.is_file() and not force:
        raise FileExistsError(f"{target} exists; --force replaces it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent}; create it first")


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


def _short_id(delta: SparseDelta) -> str:
    return f"{delta.content_id[:16]}…"


def _document(delta: SparseDelta, file: str) -> dict[str, Any]:
    from sparse_ft.files import _locate
    from sparse_ft.hub import located

    meta = delta.meta
    counts = delta.support.counts()
    low, high = (delta.val.min().item(), delta.val.max().item()) if delta.nnz else (None, None)
    return {
        "file": file,
        "bytes": os.path.getsize(_locate(located(file))),
        "kind": delta.kind,
        "nnz": delta.nnz,
        "numel": delta.layout.numel,
        "density": delta.density,
        "value_dtype": str(delta.val.dtype).removeprefix("torch."),
        "value_min": low,
        "value_max": high,
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


def _print_fields(title: str, fields: Mapping[str, Any]) -> None:
    typer.echo(_inert(title))
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        _print_folded(f"{name:{width}}  ", shown)


def _print_largest(rows: Sequence[tuple[str, int, int]], nnz: int) -> None:
    typer.echo("\nThe tensors with the most entries:")
    width = max(len("entries"), *(len(f"{count:,}") for _, count, _ in rows))
    typer.echo(f"{'entries':>{width}}  of all  density  tensor")
    for name, count, numel in rows:
        shares = f"{count / nnz:6.1%}  {count / numel:7.2%}"
        _print_folded(f"{count:{width},}  {shares}  ", name)


def _print_folded(head: str, text: str) -> None:
    """Text after a head, in as many lines as the terminal needs, below one another."""
    room = max(20, shutil.get_terminal_size().columns - len(head))
    first, *further = textwrap.wrap(_inert(text), room, break_on_hyphens=False) or [""]
    typer.echo(_inert(head) + first)
    for line in further:
        typer.echo(" " * len(head) + line)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=True))


def _report(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(found)
    else:
        said = {"nnz": "entries", "content_id": "content id"}
        shown = {said.get(k, k): v for k, v in found.items() if k != "output"}
        if "density" in shown:
            shown["density"] = f"{shown['density']:.4%}"
        if "content id" in shown:
            shown["content id"] = f"{shown['content id'][:16]}…"
        _print_fields(str(found["output"]), shown)


def main() -> None:
    """The entry point of the command."""
    app(prog_name="sparse-ft")


if __name__ == "__main__":
    main()
