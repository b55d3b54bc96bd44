"""What the commands share: their options, words, errors, and ways of printing.

What the library says in the words of Python is put into the words of the shell here (`worded`).
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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

if TYPE_CHECKING:
    from sparse_ft import SparseDelta

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


# The options of the rules that have some, with their values; * marks one that has none by itself.
RULES = {
    "ties": "density=1.0 elect=sum divisor=count scale=1.0",
    "consensus": "k=2 threshold=1.0",
    "dare": "p=0.9* seed=0",
    "della": "p=0.7* epsilon=0.2* seed=0 scope=row elect=sum divisor=none scale=1.0",
    "breadcrumbs": "beta=0.85* gamma=0.01*",
}
PLAIN_RULES = ("sum", "mean", "mean_present", "magmax", "priority", "disjoint")
RULES_HELP = "\n".join(f"  {name}: {options}" for name, options in RULES.items())


@contextmanager
def errors(files: Sequence[str] = ()) -> Iterator[None]:
    """Ends the command with one line and status 1 where an input or an output is refused."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        said = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        fail(worded(said, files))


def fail(message: str) -> NoReturn:
    typer.echo(f"sparse-ft: {inert(message)}", err=True)
    raise typer.Exit(1)


def note(message: str) -> None:
    typer.echo(f"sparse-ft: note: {inert(message)}", err=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the place in the source."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        said = " ".join(worded(str(message)).split())
        typer.echo(f"sparse-ft: warning: {inert(said)}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


_FUNCTION = re.compile(
    r"(compose|convert|diff|export|merge|overlap|replacing|select|write_\w+|"
    r"(SparseDelta|Overlap|legacy)\.\w+): "
)
_ARGUMENT = re.compile(
    r"\b(allow_base_mismatch|dtype|eligible|exclude|fresh|heads)=(True)?|"
    r"^(eligible|exclude|heads)(?=: )"
)


def worded(message: str, files: Sequence[str] = ()) -> str:
    """A message of the library in the words of the command: no function, files in place of
    `deltas[i]`, options in place of arguments."""

    def named(match: re.Match[str]) -> str:
        place = int(match[2])
        file = files[place] if place < len(files) else match[0]
        return f"the weight of {file}" if match[1] == "weights" else file

    def needed(match: re.Match[str]) -> str:
        example = re.search(rf"\b{match[2]}=\S+", RULES.get(match[1], ""))
        value = example[0].rstrip("*") if example else f"{match[2]}=VALUE"
        return f"rule {match[1]!r} needs {match[2]}, such as --option {value}"

    def option(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return "--only" if name == "eligible" else "--" + name.replace("_", "-")

    message = message[found.end() :] if (found := _FUNCTION.match(message)) else message
    message = re.sub(r"\b(deltas|weights)\[(\d+)\]", named, message)
    message = message.replace(" to SparseDelta.load", "")
    message = message.replace("fill=True", "--set fill=true")
    message = re.sub(r"(Load the SFT's own base model), or pass a key_map.*", r"\1.", message)
    message = re.sub(r"rule '(\w+)' needs (\w+)=$", needed, message)
    return _ARGUMENT.sub(option, message)


def load(file: str) -> SparseDelta:
    from sparse_ft import SparseDelta
    from sparse_ft.files import SFTFileError

    try:
        return SparseDelta.load(file)
    except SFTFileError:
        if os.path.isfile(os.path.join(file, "adapter_config.json")):
            other = "a folder with an adapter of PEFT; sparse-ft convert --base reads SHiRA's"
        elif is_patch(file):
            other = "a patch of absolute values; sparse-ft convert makes an SFT of it"
        else:
            raise
        raise SFTFileError(f"{file}: is no SFT, but {other}") from None


def is_patch(path: str) -> bool:
    from safetensors import SafetensorError, safe_open

    from sparse_ft.exchange import _PATCH_KEY

    if not path.endswith(".safetensors") or not os.path.isfile(path):
        return False
    try:
        with safe_open(path, "pt") as file:
            return _PATCH_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_all(files: Sequence[str], weights: Sequence[float] | None) -> list[SparseDelta]:
    """SFTs that are to be added up."""
    for file in files:
        if isinstance(parsed(file), int | float) and not os.path.lexists(file):
            raise ValueError(
                f"{file}: there is no such file. For a weight, repeat -w: -w 1 -w {file}"
            )
    if weights and len(weights) != len(files):
        raise ValueError(
            f"{len(weights)} weights (-w) for {len(files)} SFTs; give one for each, or none"
        )
    deltas = [load(file) for file in files]
    ids = [delta.content_id for delta in deltas]
    for j, name in enumerate(ids):
        if (first := ids.index(name)) < j:
            warnings.warn(
                f"{files[j]} is the same SFT as {files[first]}, and is added as well", stacklevel=2
            )
    return deltas


def chosen_heads(
    files: Sequence[str], deltas: Sequence[SparseDelta], chosen: str | None
) -> SparseDelta | None:
    """The SFT whose heads are wanted; a line says whose are left out where none is."""
    having = [file for file, delta in zip(files, deltas, strict=True) if delta.heads]
    if chosen is None:
        if having:
            note(
                f"the heads of {', '.join(having)} are left out; --heads {having[0]} keeps those "
                "of that one"
            )
        return None
    names = next((n for n in (files, labels_of(files)) if chosen in n), None)
    if names is None:
        raise ValueError(f"--heads {chosen}: it is none of the SFTs given: {', '.join(files)}")
    delta = deltas[names.index(chosen)]
    if not delta.heads:
        others = f"; {', '.join(having)} has" if having else ""
        raise ValueError(f"--heads {chosen}: this SFT has no heads{others}")
    return delta


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def labels_of(files: Sequence[str]) -> list[str]:
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


def check_output(output: Path, force: bool, inside: str | None = None) -> None:
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


def saved(delta: SparseDelta, output: Path, as_json: bool) -> None:
    path = delta.save(output)
    report(
        {
            "output": path,
            "bytes": os.path.getsize(path),
            "nnz": delta.nnz,
            "density": delta.density,
            "content_id": delta.content_id,
        },
        as_json,
    )


def short_id(delta: SparseDelta) -> str:
    return f"{delta.content_id[:16]}…"


def shows_progress(as_json: bool) -> bool:
    return sys.stderr.isatty() and not as_json


def inert(text: str) -> str:
    """Foreign text that acts on no terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def print_rich(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


def print_fields(title: str, fields: Mapping[str, Any]) -> None:
    typer.echo(inert(title))
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        print_folded(f"{name:{width}}  ", shown)


def print_folded(head: str, text: str) -> None:
    """Text after a head, in as many lines as the terminal needs, below one another."""
    room = max(20, shutil.get_terminal_size().columns - len(head))
    first, *further = textwrap.wrap(inert(text), room, break_on_hyphens=False) or [""]
    typer.echo(inert(head) + first)
    for line in further:
        typer.echo(" " * len(head) + line)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=True))


def report(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        said = {"nnz": "entries", "content_id": "content id"}
        shown = {said.get(k, k): v for k, v in found.items() if k != "output"}
        if "density" in shown:
            shown["density"] = f"{shown['density']:.4%}"
        if "content id" in shown:
            shown["content id"] = f"{shown['content id'][:16]}…"
        print_fields(str(found["output"]), shown)
