"""Checkpoints on disk: a model as a mapping of memory-mapped tensors, the difference of two of
them, and a merged one, written tensor by tensor. No model is ever held in memory.

What a checkpoint says is not trusted: an index names files of its own folder only, and a link leads
out of the folder only into a cache of the Hugging Face Hub.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparse_ft_kernels import compose_
from sparse_ft_kernels.contract import describe_unusable

from .compose import among, canonical_order, weighed
from .delta import SFTError, SparseDelta, _comparable, _digests, _same_bits, _tensors
from .files import SFTFileError, parse_json
from .merge import some
from .metadata import check_name, short
from .select import _chosen, select
from .tiles import Support

__all__ = ["Checkpoint", "check_fit", "diff", "export"]

# Where a model's weights are in a folder, in the order in which transformers looks.
WEIGHTS = "model.safetensors"
WEIGHT_FILES = (
    *(WEIGHTS, f"{WEIGHTS}.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
MAX_JSON = 64 << 20
# What a folder holds beside the weights: configuration, tokenizer, generation, code of the model.
_BESIDE = re.compile(
    r"(?!.*\.index\.json$|adapter_config\.json$).+\.(json|txt|model|jinja|tiktoken|py)|LICEN[CS]E.*|NOTICE.*"
)
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# owner/name, or one of the first models, which have no owner; no file.
_HUB_ID = re.compile(
    r"(?!.*\.(safetensors|bin|json|pt|npz)$)([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*"
)
_SHARDS = re.compile(r"\.(safetensors|bin)\.index\.json$")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_WORKING = (torch.float32, torch.bfloat16, torch.float16)


# --- reading ------------------------------------------------------------------------------------


class Checkpoint(Mapping[str, Tensor]):
    """A model on disk: a mapping from names to tensors, whose bytes stay there until they are used.

    Tensors are memory-mapped, on the CPU, to be read only (what is written into one stays private).
    One whose bytes begin between two elements is copied when it is asked for.

    Args:
        path: A `.safetensors` or `.bin` file, the index of a model in several of them
            (`*.index.json`), or a folder with `model.safetensors` or `pytorch_model.bin`, whole or
            in shards.

    Raises:
        SFTFileError: A file is missing, foreign or malformed; the message names file and tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        self.files, listed = _weight_files(self.path)
        self._where: dict[str, tuple[str, Callable[[], Tensor]]] = {}
        for file in self.files:
            for name, read in _open(file).items():
                if name in self._where:
                    _fail(file, f"tensor {name!r} is in {self._where[name][0]!r} as well")
                self._where[name] = file, read
        for name, file in listed.items():
            if self._where.get(name, ("",))[0] != file:
                _fail(file, f"has no tensor {name!r}, which the index {self.path!r} puts there")

    def mapped(self, name: str) -> Tensor:
        """A tensor as it lies in the file, which may be anywhere.

        Raises:
            SFTFileError: It is of a type or shape that torch does not have.
        """
        file, read = self._where[name]
        try:
            return read()
        except (SafetensorError, AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise SFTFileError(f"{file}: tensor {name!r} cannot be read: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.mapped(name)
        if not tensor.is_contiguous() or tensor.data_ptr() % tensor.element_size():
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._where))

    def __len__(self) -> int:
        return len(self._where)

    def __reduce__(self) -> tuple[Any, ...]:
        # The files are opened again.
        return Checkpoint, (self.path,)

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {len(self)} tensors in {len(self.files)} files)"

    def identity(self, *, progress: bool = False) -> list[dict[str, str]]:
        """Name and sha256 of every weight file, as the field `base.files` of an SFT has them.

        Args:
            progress: Show a bar.
        """
        found = []
        with _bar(progress, "hashing", sum(map(os.path.getsize, self.files))) as advance:
            for file in self.files:
                state = hashlib.sha256()
                with open(file, "rb") as stream:
                    while block := stream.read(1 << 22):
                        state.update(block)
                        advance(len(block))
                found.append({"name": os.path.basename(file), "sha256": state.hexdigest()})
        return found


def _fail(path: str, message: str) -> NoReturn:
    raise SFTFileError(f"{path}: {message}")


def _weight_files(path: str) -> tuple[list[str], dict[str, str]]:
    """The weight files of a checkpoint, and by its index, if it has one, each tensor's file."""
    if "\0" in path:
        _fail(repr(path), "a path has no NUL character")
    if os.path.isdir(path):
        present = [name for name in WEIGHT_FILES if os.path.lexists(os.path.join(path, name))]
        if not present:
            _fail(path, f"the folder holds none of {', '.join(WEIGHT_FILES)}; name the file itself")
        path = inside(path, present[0])
    elif not os.path.isfile(path):
        there = "is not a regular file" if os.path.lexists(path) else "there is no such file"
        hub = ""
        if _HUB_ID.fullmatch(path) and not os.path.lexists(path):
            name = path.rpartition("/")[2]
            hub = (
                f". Checkpoints are read from this machine only: fetch a model of the Hub with `hf "
                f"download {path} --local-dir {name}`, and name the folder {name}"
            )
        _fail(path, f"{there}. Give a folder, or a .safetensors, .bin or .index.json file{hub}")
    shards = _SHARDS.search(path)
    if not shards:
        if not path.endswith((".safetensors", ".bin")):
            _fail(
                path, "must end in .safetensors, .bin, .safetensors.index.json or .bin.index.json"
            )
        return [path], {}
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        _fail(path, f"weight_map: must map names to files, found {short(weights)}")
    folder, listed = os.path.dirname(path), {}
    for name, file in weights.items():
        if not isinstance(file, str) or not file.endswith(f".{shards[1]}"):
            _fail(path, f"weight_map: {name!r}: must be a .{shards[1]} file, found {short(file)}")
        listed[name] = file
    places = {file: inside(folder, file) for file in sorted(set(listed.values()))}
    return list(places.values()), {name: places[file] for name, file in listed.items()}


def inside(folder: str, name: str) -> str:
    """The path of a regular file of a folder, which a foreign file has named.

    Raises:
        SFTFileError: The name is no plain file name, the file is missing, or it is a link that
            leads elsewhere than into the folder or a Hub cache (`…/blobs/<hash>`).
    """
    if name in ("", ".", "..") or not name.isprintable() or re.search(r"[/\\:]", name):
        _fail(folder, f"{short(name)} is no plain file name; a file must lie in the folder itself")
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        there = "is not a regular file" if os.path.exists(path) else "there is no such file"
        _fail(path, there)
    real, home = os.path.realpath(path), os.path.realpath(folder)
    parent, target = os.path.split(real)
    in_cache = os.path.basename(parent) == "blobs" and _BLOB.fullmatch(target)
    if os.path.commonpath([real, home]) != home and not in_cache:
        _fail(path, f"is a link to {real!r}, outside its folder; name that file, or copy it")
    return path


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a foreign file.

    Raises:
        SFTFileError: It cannot be read, is no JSON object, too large, or names a field twice.
    """
    try:
        if (size := os.path.getsize(path)) > MAX_JSON:
            _fail(path, f"is {size:,} bytes long; at most {MAX_JSON:,} are read")
        with open(path, "rb") as file:
            return json_object(path, file.read())
    except OSError as error:
        raise SFTFileError(f"{path}: cannot be read: {error.strerror}") from error


def json_object(path: str, text: str | bytes) -> dict[str, Any]:
    """A JSON object from text that stands in a foreign file.

    Raises:
        SFTFileError: It is no JSON object, or names a field twice.
    """
    # Configurations of models have infinities.
    document = parse_json(path, text, finite=False)
    if not isinstance(document, dict):
        _fail(path, f"must be a JSON object, found {short(document)}")
    return document


def _open(file: str) -> dict[str, Callable[[], Tensor]]:
    """The tensors of one file, each to be mapped when it is called for."""
    tensors: dict[str, Callable[[], Tensor]]
    if file.endswith(".safetensors"):
        try:
            handle = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise SFTFileError(f"{file}: is not a safetensors file: {error}") from None
        _check_header(file)
        tensors = {name: partial(handle.get_tensor, name) for name in handle.keys()}  # noqa: SIM118
    else:
        from .torch_zip import load

        content = load(file)
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
        ):
            _fail(file, "must hold a state dict: a mapping from names to tensors")
        tensors = {name: partial(content.__getitem__, name) for name in content}
    for name in tensors:
        if name == "__metadata__":
            _fail(file, f"a tensor is called {name!r}, which safetensors keeps for itself")
        try:
            check_name("tensor name", name)
        except SFTError as error:
            _fail(file, str(error))
    return tensors


def _check_header(file: str) -> None:
    """Refuses a safetensors file that names a tensor twice, of which its library shows one."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_JSON:
            _fail(file, f"header: {length:,} bytes; at most {MAX_JSON:,} are read")
        json_object(f"{file}: header", stream.read(length))


@contextmanager
def _bar(shown: bool, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr over `total` bytes; over an unknown time where that is None."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


# --- the difference of two ----------------------------------------------------------------------


@torch.no_grad()
def diff(
    base: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module,
    tuned: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module,
    /,
    *,
    k: int | None = None,
    density: float | None = None,
    eps: float = 0.0,
    heads: Mapping[str, Tensor] | Iterable[str] = (),
    eligible: Callable[[str, Tensor], bool] | Collection[str] | None = None,
    exclude: Collection[str] = (),
    support: Support | None = None,
    identify: bool = False,
    progress: bool = False,
    **meta: Any,
) -> SparseDelta:
    """The difference of two models, of which nothing but the result is held in memory.

    With `k` or `density` it has the K entries with the largest |fp32(tuned) − fp32(base)| over all
    tensors at once (LT-SFT §3.1), or those that differ where they are fewer; else the entries of
    `support`; else every entry that differs. Tensors that only the base has, as a task model lacks
    the output layer of a language model, are left out with a warning.

    Names may be patterns of `fnmatch`: "classifier*" is every tensor whose name begins so.

    Args:
        base: The model before: a path that `Checkpoint` takes, tensors by name, or a module.
        tuned: The model after.
        k: Entries to take.
        density: Their share of the eligible entries instead, in (0, 1].
        eps: Entries with |φ| ≤ eps are dropped, if eps > 0.
        heads: Tensors to store whole, or their names in `tuned`, such as a classifier that `base`
            lacks.
        eligible: `(name, tensor) -> bool` or names: the tensors to compare; default: all.
        exclude: Names of tensors to leave out. One that is tied to a tensor of another name stays
            under that name.
        support: The entries to take.
        identify: Record the sha256 of the base's files as well, if it is a path.
        progress: Show bars.
        **meta: Fields of the metadata, as `SparseDelta.between` takes them.

    Returns:
        A delta with fp32 values and the digest of the base.

    Raises:
        SFTError: A tensor is missing, has another shape, or cannot be compared; a pattern matches
            no tensor; or base and tuned are equal.
        ValueError: `k` or `density` is out of range, or given beside each other or `support`.
    """
    if k is not None and density is not None:
        raise ValueError(f"diff: give k or density, not both; got k={k} and density={density}")
    if support is not None and not (
        k is None and density is None and eligible is None and not exclude
    ):
        raise ValueError("diff: give either support, or k, density, eligible and exclude")
    opened = Checkpoint(base) if isinstance(base, str | os.PathLike) else base
    before, tied_before = _tensors("base", opened)
    after, tied_after = _tensors(
        "tuned", Checkpoint(tuned) if isinstance(tuned, str | os.PathLike) else tuned
    )
    if isinstance(heads, Mapping):
        whole = dict(heads)
    else:
        whole = {name: after[name] for name in sorted(_matching("heads: tuned", after, heads))}
    named: set[str] = set()
    if eligible is not None and not callable(eligible):
        named = _matching("eligible: tuned", after, eligible)
    dropped = _matching("exclude: neither base nor tuned", {**before, **after}, exclude)
    aliases = _one_name_each(before, after, tied_before, tied_after, dropped)
    # Releases of transformers differ in the counters that they save, such as position_ids.
    for side, other in ((before, after), (after, before)):
        for name in [n for n, t in side.items() if n not in other and not t.is_floating_point()]:
            del side[name]
    for name in dropped:
        if dropped.issuperset(aliases.get(name, ())):
            before.pop(name, None)
            after.pop(name, None)
    if eligible is not None:
        rule = (
            eligible
            if callable(eligible)
            else lambda name, _: not named.isdisjoint((name, *aliases.get(name, ())))
        )
        names = {*_chosen("checkpoint", after, rule)} - whole.keys()
        if absent := sorted(names - before.keys()):
            raise SFTError(f"diff: eligible: base has no tensor {absent[0]!r}; name it in heads=")
        before, after = ({name: side[name] for name in names} for side in (before, after))
    elif support is None:
        if absent := sorted(after.keys() - before.keys() - whole.keys()):
            raise SFTError(
                f"diff: tuned has {_examples(absent)}, which base lacks; name what is to be stored "
                "whole in heads=, such as a classifier, and the rest in exclude="
            )
        if absent := sorted(before.keys() - after.keys() - whole.keys()):
            before = {name: tensor for name, tensor in before.items() if name not in absent}
            warnings.warn(
                f"diff: left out {_examples(absent)}, which base has and tuned lacks; exclude= "
                "leaves them out without this warning",
                stacklevel=3,  # the caller of diff, beyond torch.no_grad's wrapper
            )
    recipe: dict[str, Any] = {"method": "diff", "eps": eps}
    fewer = ""
    with _bar(progress, "comparing", None):
        if not (k is None and density is None):
            compared = _comparable(before, after, {}, whole)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "select: ")
                support = select(
                    {name: after[name] for name in compared},
                    {name: before[name] for name in compared},
                    k=k,
                    density=density,
                    fill=True,
                )
            recipe |= {"criterion": "magnitude", "k_requested": support.nnz}
            if support.info["threshold"] == 0.0:
                # Filled up with entries that are equal, which no SFT needs.
                fewer = f"only {support.info['above']:,} entries differ, not {support.nnz:,}"
                support = None
        covered = after if support is None else support.layout
        meta["aliases"] = {
            name: free
            for name, further in aliases.items()
            if name in covered and name not in whole
            if (free := [other for other in further if other not in whole])
        }
        meta["recipe"] = recipe | meta.get("recipe", {})
        delta = SparseDelta.between(before, after, support, eps, whole, **meta)
    if support is None and not delta.nnz and not delta.heads:
        beyond = f" up to differences of {eps:g}" if eps > 0 else ""
        raise SFTError(
            f"diff: base and tuned are equal{beyond}: none of the {delta.layout.numel:,} entries "
            "compared differs; check that the two are the right ones"
        )
    if fewer:
        warnings.warn(f"diff: {fewer} as wanted; the SFT has these alone", stacklevel=3)
    if identify:
        if not isinstance(opened, Checkpoint):
            raise TypeError(f"diff: identify needs a path as base, not a {type(base).__name__}")
        files = opened.identity(progress=progress)
        fields = delta.meta | {"base": {**delta.meta.get("base", {}), "files": files}}
        delta = SparseDelta(delta.support, delta.val, delta.heads, fields)
    return delta


def _matching(what: str, names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that some pattern matches; a name matches itself.

    Raises:
        SFTError: A pattern matches none of them.
    """
    found: set[str] = set()
    names = [*names]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not hits:
            near = difflib.get_close_matches(pattern, names, 1)
            like = f"; the nearest name is {near[0]!r}" if near else ""
            raise SFTError(f"diff: {what} has no tensor {pattern!r}{like}")
        found |= hits
    return found


def _examples(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
    return shown if len(names) == 1 else f"{len(names)} tensors ({shown})"


def _one_name_each(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    tied_before: Mapping[str, list[str]],
    tied_after: Mapping[str, list[str]],
    dropped: Collection[str],
) -> dict[str, list[str]]:
    """Leaves each tied tensor one name, which both models have if it can be, and rather one that is
    not to be dropped.

    Returns:
        The further names of those that had several.

    Raises:
        SFTError: Tensors that are tied in the tuned model differ in the base.
    """
    aliases: dict[str, list[str]] = {}
    for owner, further in tied_after.items():
        group = [owner, *further]
        kept, *others = sorted(group, key=lambda name: (name not in before, name in dropped))
        aliases[kept] = []
        for name in others:
            same = name not in before or _same_bits(before[name], before[kept])
            if not (same or name in dropped):
                raise SFTError(
                    f"diff: {kept!r} and {name!r} are one tensor in tuned (tied) and differ in "
                    "base; untie them in tuned, or leave one out with exclude="
                )
            after.pop(name)
            before.pop(name, None)
            if same:
                aliases[kept].append(name)
    for owner, further in tied_before.items():
        group = [name for name in (owner, *further) if name in before]
        shared = [name for name in group if name in after]
        # Where the tuned model has untied them, each goes its own way.
        if len(shared) == 1:
            for name in group:
                if name not in after:
                    before.pop(name)
            names = {*aliases.get(shared[0], []), owner, *further} - {shared[0]}
            aliases[shared[0]] = sorted(names)
    return aliases


# --- a merged checkpoint ------------------------------------------------------------------------


@torch.no_grad()
def export(
    base: str | os.PathLike[str] | Checkpoint,
    deltas: SparseDelta | Iterable[SparseDelta],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    heads: SparseDelta | Iterable[SparseDelta] = (),
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    allow_base_mismatch: bool = False,
    progress: bool = False,
) -> str:
    """Writes θ0 + Σ α·φ as a checkpoint of its own, to the bits that `compose` puts on the model.

    It is written tensor by tensor, into a folder beside `out` that takes its name at the end: an
    interruption leaves nothing behind. Tensors keep the names that the base checkpoint has; one
    that it ties is written under each of its names.

    Args:
        base: The base checkpoint. Of a folder, the files of configuration, tokenizer and
            generation are copied; `config.json` stays as it is but for the data type.
        deltas: Deltas made for this base model (each checks that by its digest).
        out: The folder to write: one that does not exist yet, or is empty.
        weights: One finite α for each delta; default 1.
        heads: The deltas, of those given, whose fully tuned tensors are to be written as well; what
            the base lacks is added.
        dtype: Data type of all floating tensors: the sum is rounded to it, once. Default: each
            keeps its own.
        max_shard_bytes: Above this size the weights are cut into several files.
        allow_base_mismatch: Write even where the digest says that the base model is another one.
        progress: Show a bar.

    Returns:
        The path of the folder.

    Raises:
        SFTError: A delta does not fit the checkpoint, a result is beyond `dtype`, or `out` is not
            free; the message names it.
        ValueError: Weights or heads that do not fit the deltas.
    """
    chosen, alphas = weighed("export", some("export", deltas), weights)
    with_heads = among("export", heads, chosen)
    if dtype is not None and dtype not in _WORKING:
        raise ValueError(f"export: dtype must be float32, bfloat16 or float16, got {dtype}")
    if max_shard_bytes < 1:
        raise ValueError(f"export: max_shard_bytes must be positive, got {max_shard_bytes}")
    source = base if isinstance(base, Checkpoint) else Checkpoint(base)
    plan = _Plan(source, chosen, alphas, with_heads, dtype, allow_base_mismatch)
    with new_folder("export", out) as folder:
        # First, for what is wrong with these is found at once.
        if os.path.isdir(source.path):
            _copy_beside(source.path, folder, dtype)
        files = _shards(plan.specs, max_shard_bytes)
        total = sum(map(_nbytes, plan.specs.values()))
        with _bar(progress, "writing", total) as advance:

            def read(name: str) -> Tensor:
                tensor = plan.tensor(name)
                advance(_nbytes(plan.specs[name]))
                return tensor

            for file, names in files.items():
                specs = {name: plan.specs[name] for name in names}
                write_safetensors(os.path.join(folder, file), specs, read)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: file for file, names in files.items() for name in names},
            }
            write_json(os.path.join(folder, f"{WEIGHTS}.index.json"), index)
    return os.fsdecode(out)


def check_fit(base: Checkpoint, delta: SparseDelta) -> None:
    """Checks that a delta belongs to a checkpoint, as `export` does: names, shapes, ties, digest.

    Raises:
        SFTError: It does not; the message names the tensor.
    """
    _Plan(base, [delta], [1.0], [], None, False)


_Spec = tuple[torch.dtype, tuple[int, ...]]


class _Plan:
    """What an export writes: checked whole before the first byte, computed tensor by tensor."""

    def __init__(
        self,
        source: Checkpoint,
        deltas: Sequence[SparseDelta],
        alphas: Sequence[float],
        with_heads: Sequence[SparseDelta],
        dtype: torch.dtype | None,
        allow_base_mismatch: bool,
    ) -> None:
        self.source = source
        tensors, tied = _tensors("base", {name: source.mapped(name) for name in source})
        self.tensors = tensors
        self.groups = {name: [name] for name in tensors}
        for owner, further in tied.items():
            self.groups |= {name: [owner, *further] for name in (owner, *further)}
        # Per tensor: the delta, its weight and its own name for the tensor, in canonical order.
        self.parts: dict[str, list[tuple[SparseDelta, float, str]]] = {}
        for j in canonical_order([delta.content_id for delta in deltas], alphas):
            found = self._bind(j, deltas[j])
            if not allow_base_mismatch:
                self._check_base(deltas[j], found)
            delta = deltas[j].to("cpu")
            for own, names in found.items():
                for name in names:
                    self.parts.setdefault(name, []).append((delta, alphas[j], own))
        self.specs: dict[str, _Spec] = {}
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise SFTError(f"export: {name!r} has dtype {tensor.dtype}, which no file holds")
            wanted = dtype if tensor.dtype in _WORKING else None
            self.specs[name] = wanted or tensor.dtype, tuple(tensor.shape)
        self.heads: dict[str, Tensor] = {}
        for delta in with_heads:
            for name, head in delta.heads.items():
                self._add_head(name, head, dtype)

    def _check_base(self, delta: SparseDelta, found: Mapping[str, list[str]]) -> None:
        """As `SparseDelta.check_base`, with one tensor at a time in memory, if it has to be."""
        if not delta.known_digests or not delta.nnz:
            return
        support = delta.support.to("cpu")
        pieces = {own: self.source[found[own][0]].reshape(-1)[at] for own, at in support}
        used = [self.tensors[names[0]] for names in found.values()]
        kinds = {tensor.dtype for tensor in used if tensor.numel()}
        delta._compare_digests(_digests(support, pieces), kinds)

    def _bind(self, j: int, delta: SparseDelta) -> dict[str, list[str]]:
        """The checkpoint's names for each tensor of a delta."""
        found: dict[str, list[str]] = {}
        taken: dict[str, str] = {}
        for own, shape in zip(delta.layout.names, delta.layout.shapes, strict=True):
            known = [
                n for n in (own, *delta.meta.get("aliases", {}).get(own, ())) if n in self.groups
            ]
            if not known:
                near = difflib.get_close_matches(own, self.tensors, 1, 0.75)
                like = f"; the nearest name is {near[0]!r}" if near else ""
                raise SFTError(
                    f"export: {self.source.path} has no tensor {own!r}, which deltas[{j}] has{like}"
                    ". Save the model that the SFT was made from with save_pretrained, and name "
                    "that folder"
                )
            names = list(dict.fromkeys(n for name in known for n in self.groups[name]))
            for name in names:
                tensor = self.tensors[name]
                if tuple(tensor.shape) != shape:
                    raise SFTError(
                        f"export: {name!r} has shape {tuple(tensor.shape)} in {self.source.path} "
                        f"and {shape} in deltas[{j}]"
                    )
                reason = describe_unusable(tensor)
                if reason and not reason.startswith("is not contiguous"):
                    raise SFTError(f"export: {self.source.path}: {name!r} {reason}")
                if name in taken:
                    raise SFTError(
                        f"export: {taken[name]!r} and {own!r} are two tensors in deltas[{j}] and "
                        f"one, {name!r}, in {self.source.path} (tied)"
                    )
                if name not in self.groups[names[0]] and not _same_bits(
                    tensor, self.tensors[names[0]]
                ):
                    raise SFTError(
                        f"export: {names[0]!r} and {name!r} are one tied tensor in the base model "
                        f"of deltas[{j}], and differ in {self.source.path}"
                    )
                taken[name] = own
            found[own] = names
        return found

    def _add_head(self, name: str, head: Tensor, dtype: torch.dtype | None) -> None:
        if name in self.heads:
            raise ValueError(
                f"export: two deltas of heads bring the head {name!r}; name one of them"
            )
        if name not in self.groups:
            self.specs[name] = dtype or head.dtype, tuple(head.shape)
        for other in self.groups.get(name, ()):
            if self.specs[other][1] != tuple(head.shape):
                raise SFTError(
                    f"export: {other!r} has shape {self.specs[other][1]} in {self.source.path}, "
                    f"and the head {name!r} has {tuple(head.shape)}"
                )
        for other in self.groups.get(name, [name]):
            self.heads[other] = head

    def tensor(self, name: str) -> Tensor:
        """What the merged checkpoint holds under a name."""
        dtype, _ = self.specs[name]
        if name in self.heads:
            head = self.heads[name].cpu()
            out = head.to(dtype)
            self._check_finite(name, out, head)
            return out
        tensor = self.source[name]
        if name not in self.parts or not tensor.numel():
            out = tensor.to(dtype)
        else:
            # In another data type the sum goes there straight from fp32.
            work = tensor.clone() if dtype == tensor.dtype else tensor.to(torch.float32, copy=True)
            idx, ptr, val = [], [], []
            for delta, _, own in self.parts[name]:
                tiles = delta.layout.tiles_of(own)
                entries = delta.support.entries_of(own)
                idx.append(delta.support.idx[entries])
                ptr.append(delta.support.ptr[tiles.start : tiles.stop + 1] - entries.start)
                val.append(delta.val[entries])
            compose_([work], idx, ptr, val, [alpha for _, alpha, _ in self.parts[name]], [])
            out = work.to(dtype)
        if out.dtype in _WORKING and out is not tensor:
            self._check_finite(name, out, tensor)
        return out

    def _check_finite(self, name: str, out: Tensor, before: Tensor) -> None:
        if not _all_finite(out) and _all_finite(before):
            raise SFTError(
                f"export: {name!r} goes beyond the range of {out.dtype}; a wider dtype= holds it"
            )


def _all_finite(tensor: Tensor) -> bool:
    # Unlike isfinite, this needs no memory.
    return not tensor.numel() or all(math.isfinite(bound) for bound in torch.aminmax(tensor))


def _nbytes(spec: _Spec) -> int:
    dtype, shape = spec
    return torch.Size(shape).numel() * dtype.itemsize


def _shards(specs: Mapping[str, _Spec], limit: int) -> dict[str, list[str]]:
    """File names → names of tensors, filled in order of name."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(specs):
        own = _nbytes(specs[name])
        if groups[-1] and size + own > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {
        f"model-{i + 1:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups)
    }


def _copy_beside(source: str, folder: str, dtype: torch.dtype | None) -> None:
    """Copies what lies beside the weights; in config.json the data type follows the weights."""
    for name in sorted(os.listdir(source)):
        if not _BESIDE.fullmatch(name) or os.path.isdir(os.path.join(source, name)):
            continue
        shutil.copyfile(inside(source, name), os.path.join(folder, name))
    path = os.path.join(folder, "config.json")
    if dtype is None or not os.path.exists(path):
        return

    def retyped(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        said = str(dtype).removeprefix("torch.")
        return {
            key: said if key in ("dtype", "torch_dtype") else retyped(item)
            for key, item in value.items()
        }

    write_json(path, retyped(read_json(path)))


# --- writing ------------------------------------------------------------------------------------


@contextmanager
def new_folder(op: str, out: str | os.PathLike[str]) -> Iterator[str]:
    """A folder to write into, which becomes `out` when the block ends and vanishes if it fails.

    Raises:
        SFTError: `out` exists and is no empty folder, or one that cannot be replaced; or the folder
            to hold it does not exist.
    """
    target = os.path.abspath(os.fsdecode(out))
    if os.path.lexists(target) and (
        os.path.islink(target) or not os.path.isdir(target) or os.listdir(target)
    ):
        raise SFTError(f"{op}: {target!r} exists and is no empty folder; name another")
    if os.path.isdir(target) and (os.path.ismount(target) or os.path.samefile(target, os.curdir)):
        raise SFTError(
            f"{op}: {target!r} is the working folder or where a file system is mounted, and cannot "
            "be replaced; name a folder in it"
        )
    parent = os.path.dirname(target)
    if not os.path.isdir(parent):
        raise SFTError(f"{op}: there is no folder {parent!r}; create it first")
    temporary = os.path.join(parent, f".{secrets.token_hex(8)}.tmp")
    os.mkdir(temporary)
    try:
        yield temporary
        # Not every system renames a folder onto an empty one.
        if os.path.isdir(target):
            os.rmdir(target)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: str, document: Mapping[str, Any]) -> None:
    """Writes a JSON file as transformers does: indented, a line feed at the end."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=2) + "\n")


def write_safetensors(
    path: str,
    specs: Mapping[str, _Spec],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file one tensor at a time.

    Args:
        path: A file that does not exist yet.
        specs: Name → data type and shape.
        read: Gives the tensor of a name; it is asked once for each.
        metadata: Texts by name, beside "format": "pt".

    Raises:
        SFTError: A tensor has the name of the metadata.
    """
    if "__metadata__" in specs:
        raise SFTError("a tensor is called '__metadata__', which safetensors keeps for itself")
    # Wide types first, so that every tensor is aligned.
    order = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in order:
        dtype, shape = specs[name]
        end = offset + _nbytes(specs[name])
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            # In one expression: no name keeps a tensor while the next is made.
            file.write(read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
