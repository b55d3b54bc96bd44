"""The commands on files: look at an SFT, check it, make one from checkpoints, apply, convert."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared import (
    Base,
    BaseId,
    File,
    Files,
    Force,
    Heads,
    Json,
    Lang,
    License,
    Mismatch,
    Output,
    Role,
    Task,
    Weights,
    check_output,
    chosen_heads,
    errors,
    inert,
    is_patch,
    load,
    load_all,
    note,
    print_fields,
    print_folded,
    print_json,
    report,
    saved,
    short_id,
    shows_progress,
    worded,
)

if TYPE_CHECKING:
    from sparse_ft import SparseDelta

app = typer.Typer()


@app.command()
def info(file: File, as_json: Json = False) -> None:
    """Print what an SFT holds: sizes, origin, the model it belongs to. It is checked whole."""
    from sparse_ft.files import _describe, _largest

    with errors():
        delta = load(file)
        if as_json:
            print_json(_document(delta, file))
            return
        fields = dict(_describe(delta, file))
        fields["content id"] = short_id(delta)
        print_fields(str(fields.pop("file")), fields)
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
    with errors():
        model = None if base is None else Checkpoint(base)
    for file in files:
        found: dict[str, Any]
        try:
            delta = load(file)
            found = {"file": file, "ok": True, "nnz": delta.nnz, "content_id": delta.content_id}
            if model is not None:
                check_fit(model, delta)
                digests = delta.meta.get("base", {}).keys() & {"digest_f32", "digest_bf16"}
                found["base"] = (
                    "fits" if digests else "fits by names and shapes; no digest was recorded"
                )
            about = f"; the base {found['base']}" if "base" in found else ""
            said = f"{file}: ok, {delta.nnz:,} entries, {short_id(delta)}{about}"
        except (OSError, ValueError) as error:
            why = worded(str(error), ["the SFT"]).removesuffix("; or pass --allow-base-mismatch")
            found = {"file": file, "ok": False, "error": why}
            said = f"{file}: FAILED: {why.removeprefix(f'{file}: ')}"
        results.append(found)
        if not as_json:
            typer.echo(inert(said))
    if as_json:
        print_json(results)
    if not all(found["ok"] for found in results):
        raise typer.Exit(1)


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
    with errors():
        check_output(output, force, "sft.safetensors")
        delta = compare(
            base,
            tuned,
            k=k,
            density=density,
            eps=eps,
            heads=heads or (),
            eligible=only or None,
            exclude=exclude or (),
            progress=shows_progress(as_json),
            **{key: value for key, value in meta.items() if value},
        )
        saved(delta, output, as_json)


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
    with errors(files):
        deltas = load_all(files, weight)
        with_heads = chosen_heads(files, deltas, heads)
        path = export(
            base,
            deltas,
            output,
            weights=weight,
            heads=with_heads or (),
            dtype=None if dtype is None else kinds[dtype.value],
            allow_base_mismatch=allow_base_mismatch,
            progress=shows_progress(as_json),
        )
        size = sum(f.stat().st_size for f in Path(path).glob("*.safetensors"))
    report({"output": path, "bytes": size, "deltas": len(deltas)}, as_json)
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
    with errors():
        if form in (Form.shira, Form.patch) and base is None:
            raise ValueError(f"--to {form.value} needs --base, the base model on disk")
        check_output(output, force, inside[form])
        labels = {"role": role, "lang": lang, "task": task, "license": license}
        delta = _import(source, base, base_id, **labels)
        if form is Form.sft:
            saved(delta, output, as_json)
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
    report({"output": path, "nnz": delta.nnz}, as_json)


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
    elif is_patch(source):
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
        note(
            f"config.json is the base model's: load with from_pretrained({folder!r}, "
            f"num_labels={min(rows)})"
        )


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


def _print_largest(rows: Sequence[tuple[str, int, int]], nnz: int) -> None:
    typer.echo("\nThe tensors with the most entries:")
    width = max(len("entries"), *(len(f"{count:,}") for _, count, _ in rows))
    typer.echo(f"{'entries':>{width}}  of all  density  tensor")
    for name, count, numel in rows:
        shares = f"{count / nnz:6.1%}  {count / numel:7.2%}"
        print_folded(f"{count:{width},}  {shares}  ", name)
