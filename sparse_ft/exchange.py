"""Exchange with other formats: SHiRA adapters of PEFT, and patches of absolute values for inference
engines (docs/exchange.md).

What a file says is not trusted: every position is checked before it is used, and a fault is an
`SFTFileError` that names file and tensor.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparse_ft_kernels.contract import describe_unusable

from .checkpoints import (
    Checkpoint,
    inside,
    json_object,
    new_folder,
    read_json,
    write_json,
    write_safetensors,
)
from .delta import DTYPE_NAMES, VALUE_DTYPES, SFTError, SparseDelta, _same_bits, _tensors
from .files import MAX_DIMS, MAX_NUMEL, SFTFileError, canonical, new_file
from .legacy import MAX_ELEMENTS
from .metadata import MAX_TENSORS, checked_meta, short
from .tiles import Layout, Support

__all__ = ["read_patch", "read_shira", "replacing", "write_patch", "write_shira"]

Base = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PEFT_PREFIX = "base_model.model."
# Positions are int32 in both formats.
_MAX_POSITIONS = 1 << 31
# Up to here every integer is a float32.
_MAX_FLOAT = 1 << 24
_PATCH_KEY = "sparse_ft_patch"
_PATCH_FIELDS = ("base", "trained_on", "aliases")


def _fail(path: str, message: str) -> NoReturn:
    raise SFTFileError(f"{path}: {message}")


def _opened(base: Base) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    return _tensors("base", Checkpoint(base) if isinstance(base, str | os.PathLike) else base)


def _without_repetition(path: str, name: str, flat: Tensor, numel: int) -> Tensor:
    """The order that sorts positions, once they are checked."""
    order = torch.argsort(flat)
    ascending = flat[order]
    if len(flat) and (int(ascending[0]) < 0 or int(ascending[-1]) >= numel):
        _fail(
            path,
            f"{name!r}: positions run from {int(ascending[0])} to {int(ascending[-1])}, and it has "
            f"{numel:,} elements",
        )
    if bool((ascending[1:] == ascending[:-1]).any()):
        _fail(path, f"{name!r}: a position is given twice")
    return order


def _assembled(
    path: str,
    layout: Layout,
    positions: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    **parts: Any,
) -> SparseDelta:
    """A delta from ascending positions and their values, tensor by tensor."""
    support = Support.from_indices(layout, positions)
    pieces = [values[name] for name in layout.names if name in values]
    # Of several data types, cat takes the one that holds them all.
    val = torch.cat(pieces) if pieces else torch.zeros(0)
    try:
        return SparseDelta.from_compact(support, val, **parts)
    except SFTError as error:
        raise SFTFileError(f"{path}: {error}") from None


# --- PEFT: SHiRA --------------------------------------------------------------------------------


@torch.no_grad()
def read_shira(folder: str | os.PathLike[str], base: Base, **meta: Any) -> SparseDelta:
    """Reads a SHiRA adapter of PEFT (Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175).

    Entries of value 0 are dropped: they change nothing, and SHiRA fills up with them. PEFT stores
    no scaling; it is 1. Modules that were tuned whole (`modules_to_save`) become heads.

    Args:
        folder: The adapter's folder, with `adapter_config.json` and `adapter_model.safetensors` or
            `adapter_model.bin`.
        base: The base model, as a path, tensors by name or a module: the adapter knows neither the
            shapes nor the values.
        **meta: Fields of the metadata, such as role, lang, task, license.

    Returns:
        A delta over the adapter's matrices, with the digest of the base.

    Raises:
        SFTFileError: The adapter is malformed, of another kind, or does not fit the base.
    """
    folder = os.fsdecode(folder)
    settings = inside(folder, PEFT_CONFIG)
    config = read_json(settings)
    if config.get("peft_type") != "SHIRA":
        _fail(settings, f"peft_type: must be SHIRA, found {short(config.get('peft_type'))}")
    r = config.get("r")
    if type(r) is not int or r < 1:
        _fail(settings, f"r: must be a positive integer, found {short(r)}")
    present = [name for name in PEFT_WEIGHTS if os.path.lexists(os.path.join(folder, name))]
    if not present:
        _fail(folder, f"the folder holds neither {' nor '.join(PEFT_WEIGHTS)}")
    path = inside(folder, present[0])
    adapter = Checkpoint(path)
    tensors, tied = _opened(base)
    shared = {name for owner, further in tied.items() for name in (owner, *further)}
    positions: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for key in adapter:
        module, _, part = key.removeprefix(_PEFT_PREFIX).rpartition(".")
        if part == "shira_weight":
            name = f"{module}.weight"
            if name not in tensors:
                _fail(path, f"{key!r}: the base has no tensor {name!r}")
            if name in positions:
                _fail(path, f"{key!r}: the adapter has entries of {name!r} twice")
            if name in shared:
                _fail(
                    path,
                    f"{key!r}: {name!r} is tied to another tensor in the base, which SHiRA leaves "
                    "as it is; untie it in the base (decouple_output_embeddings)",
                )
            positions[name], values[name] = _shira_entries(path, adapter, key, tensors[name], r)
        elif part == "shira_indices":
            if (weight := key.removesuffix("indices") + "weight") not in adapter:
                _fail(path, f"{key!r}: there is no {weight!r}")
        elif adapter[key].is_floating_point():
            if (name := key.removeprefix(_PEFT_PREFIX)) in heads:
                _fail(path, f"{key!r}: the adapter has the tensor {name!r} twice")
            heads[name] = adapter[key].clone()
        else:
            _fail(path, f"{key!r}: has dtype {adapter[key].dtype}, and is no part of SHiRA")
    source = {
        field: config[key]
        for field, key in (("id", "base_model_name_or_path"), ("revision", "revision"))
        if config.get(key)
    }
    meta["base"] = source | meta.get("base", {})
    meta.setdefault("recipe", {"method": "shira", "r": r})
    return _assembled(
        path,
        Layout.of({name: tensors[name] for name in positions}),
        positions,
        values,
        heads=heads,
        base={
            n: tensors[n].detach().reshape(-1)[p.to(tensors[n].device)]
            for n, p in positions.items()
        },
        base_dtypes={name: tensors[name].dtype for name in positions},
        meta=meta,
    )


def _shira_entries(
    path: str, adapter: Checkpoint, key: str, weight: Tensor, r: int
) -> tuple[Tensor, Tensor]:
    """Ascending positions and values of one matrix, without zeros."""
    pairs = key.removesuffix("weight") + "indices"
    if pairs not in adapter:
        _fail(path, f"{key!r}: there is no {pairs!r}")
    if reason := describe_unusable(weight):
        _fail(path, f"{key!r}: the tensor of the base {reason}")
    if weight.dim() != 2 or not weight.numel():
        _fail(path, f"{key!r}: the tensor of the base has shape {tuple(weight.shape)}, no matrix")
    rows, columns = weight.shape
    # Checked and used in memory of our own.
    values, index = adapter[key].clone(), adapter[pairs].clone()
    count = r * (rows + columns)
    if values.dtype not in VALUE_DTYPES or tuple(values.shape) != (count,):
        _fail(
            path,
            f"{key!r}: must be {r} · ({rows} + {columns}) = {count:,} values, float32, bfloat16 or "
            f"float16, found {values.dtype} of shape {tuple(values.shape)}",
        )
    if index.is_floating_point():  # as PEFT writes them on Windows
        exact = index.float()
        if not bool(((exact == exact.trunc()) & (exact.abs() <= _MAX_FLOAT)).all()):
            _fail(path, f"{pairs!r}: holds numbers that are no integers up to {_MAX_FLOAT:,}")
        index = exact.long()
    if index.dtype not in (torch.int32, torch.int64) or tuple(index.shape) != (2, count):
        _fail(
            path,
            f"{pairs!r}: must be int32 of shape {(2, count)}, found {index.dtype} of shape "
            f"{tuple(index.shape)}",
        )
    for what, line, size in (("rows", index[0], rows), ("columns", index[1], columns)):
        low, high = (int(bound) for bound in torch.aminmax(line))
        if low < 0 or high >= size:
            _fail(path, f"{pairs!r}: {what} run from {low} to {high}, and there are {size}")
    flat = index[0].long() * columns + index[1].long()
    order = _without_repetition(path, pairs, flat, rows * columns)
    flat, values = flat[order], values[order]
    return flat[values != 0], values[values != 0]


@torch.no_grad()
def write_shira(
    delta: SparseDelta,
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    base_id: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
) -> str:
    """Writes a delta as a SHiRA adapter, which `peft.PeftModel.from_pretrained` loads.

    SHiRA has r·(rows + columns) entries in every matrix, with one r for all: the smallest r that
    holds the densest matrix is chosen, and unused positions are filled with zeros. The entries are
    stored in fp32, exactly; PEFT rounds them to the data type of the model when it loads them.

    Args:
        delta: Its entries must lie in the weights of `nn.Linear`. Heads become `modules_to_save`.
        folder: The folder to write: one that does not exist yet, or is empty.
        model: The model to be adapted, for the kinds of its modules; on the meta device it will do.
        base_id: Name of the base model; default: the delta's own.
        revision: Its revision; default: the delta's own.
        task_type: PEFT's name of the task, such as TOKEN_CLS.

    Returns:
        The path of the folder.

    Raises:
        SFTError: SHiRA cannot hold the delta; the message lists the tensors that stand in the way.
            Or `folder` is not free.
    """
    if delta.kind != "diff":
        raise SFTError(f"write_shira: a delta of kind {delta.kind!r} is no difference")
    delta = delta.to("cpu")
    counts = {name: count for name, count in delta.support.counts().items() if count}
    if not counts:
        raise SFTError("write_shira: the delta has no entries")
    shapes = dict(zip(delta.layout.names, delta.layout.shapes, strict=True))
    _check_linear(model, {name: shapes[name] for name in counts})
    r = max(-(-count // sum(shapes[name])) for name, count in counts.items())
    if full := [name for name in counts if r * sum(shapes[name]) > math.prod(shapes[name])]:
        densest = max(counts, key=lambda name: counts[name] / sum(shapes[name]))
        raise SFTError(
            f"write_shira: {densest!r} with its {counts[densest]:,} entries needs r = {r}, and "
            f"SHiRA would give r · (rows + columns) entries to every matrix, more than "
            f"{_listed(full)} can hold; leave out the small ones, or the densest"
        )
    modules = dict(model.named_modules())
    saved = sorted({name.rpartition(".")[0] for name in delta.heads})
    if absent := [name for name in saved if name not in modules or not name]:
        raise SFTError(f"write_shira: heads: the model has no module for {_listed(absent)}")
    tensors = {_PEFT_PREFIX + name: head for name, head in delta.heads.items()}
    for name in counts:
        flat, values = _padded(delta, name, r * sum(shapes[name]))
        key = _PEFT_PREFIX + name.removesuffix("weight")
        columns = shapes[name][1]
        tensors[f"{key}shira_weight"] = values
        tensors[f"{key}shira_indices"] = torch.stack([flat // columns, flat % columns]).int()
    known = delta.meta.get("base", {})
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base_id if base_id is not None else known.get("id"),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        # Any name but "random", for which PEFT would permute every matrix only to overwrite it.
        "mask_type": "custom",
        "modules_to_save": saved or None,
        "peft_type": "SHIRA",
        "r": r,
        "random_seed": None,
        "revision": revision if revision is not None else known.get("revision"),
        # As one expression, which PEFT matches whole: a list would match by the end of a name.
        "target_modules": "|".join(re.escape(name.removesuffix(".weight")) for name in counts),
        "task_type": task_type,
    }
    with new_folder("write_shira", folder) as place:
        _write(os.path.join(place, PEFT_WEIGHTS[0]), tensors)
        write_json(os.path.join(place, PEFT_CONFIG), config)
    return os.fsdecode(folder)


def _check_linear(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses: dict[int, int] = {}
    for parameter in parameters.values():
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    modules = dict(model.named_modules())
    wrong = []
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        if name not in parameters:
            wrong.append(f"{name!r} (the model has none)")
        elif part != "weight" or not isinstance(modules.get(module), nn.Linear):
            wrong.append(f"{name!r} ({type(modules.get(module)).__name__}.{part})")
        elif uses[id(parameters[name])] > 1:
            wrong.append(f"{name!r} (tied)")
        elif tuple(parameters[name].shape) != shape:
            wrong.append(f"{name!r} ({shape} here, {tuple(parameters[name].shape)} in the model)")
    if wrong:
        raise SFTError(
            "write_shira: SHiRA adapts the weights of torch.nn.Linear alone, and the delta has "
            f"entries in {_listed(wrong, str)}; select with eligible= among those weights"
        )


def _listed(names: list[str], said: Any = repr) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(said, names[:10])) + more


def _padded(delta: SparseDelta, name: str, count: int) -> tuple[Tensor, Tensor]:
    """Positions and fp32 values of one matrix, with zeros at the first free positions."""
    positions = delta.indices(name)
    # Among the first `count` positions there are free ones enough.
    free = torch.ones(count, dtype=torch.bool)
    free[positions[positions < count]] = False
    padding = free.nonzero().reshape(-1)[: count - len(positions)]
    flat = torch.cat([positions, padding])
    values = torch.cat([delta.values(name).float(), torch.zeros(len(padding))])
    order = torch.argsort(flat)
    return flat[order], values[order]


def _write(
    path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(path, specs, tensors.__getitem__, metadata)


# --- absolute values ----------------------------------------------------------------------------


@torch.no_grad()
def replacing(delta: SparseDelta, base: Base, *, allow_base_mismatch: bool = False) -> SparseDelta:
    """The weights that a delta leads to, as absolute values: round(θ0 + φ), once, in the data type
    of the base.

    They are the bits that `compose` writes. Replacing may be repeated, as adding may not.

    Args:
        delta: A difference.
        base: The base model, as a path, tensors by name or a module.
        allow_base_mismatch: Go on even where the digest says that the base model is another one.

    Returns:
        A delta of kind "replace", over the same entries, with the base's names of its tensors and
        their data type in `meta["dtypes"]`; its values are in fp32 where the base has several.
        Where the base has a tensor under several names (tied), the further ones are its aliases.

    Raises:
        SFTError: The delta does not fit the base, or a sum is beyond its data type.
    """
    if delta.kind != "diff":
        raise SFTError(f"replacing: the delta is of kind {delta.kind!r} already")
    delta = delta.to("cpu")
    tensors, tied = _opened(base)
    found = _names(delta, tensors, tied)
    if not allow_base_mismatch:
        delta.check_base([tensors[names[0]].detach() for names in found.values()])
    layout = Layout.of(
        {found[own][0]: shape for own, shape in zip(found, delta.layout.shapes, strict=True)}
    )
    positions: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for own, at, phi in delta:
        name = found[own][0]
        tensor = tensors[name].detach()
        old = tensor.reshape(-1)[at.to(tensor.device)].cpu()
        new = (old.float() + phi.float()).to(old.dtype)
        # As in compose: a sum of 0 leaves the weight's bits alone.
        values[name] = torch.where(phi == 0, old, new)
        positions[name], before[name] = at, old
    meta = delta.meta | {
        "kind": "replace",
        "aliases": {name: further for name, *further in found.values() if further},
        "recipe": {
            "method": "replacing",
            "merged_from": [{"id": delta.content_id, "alpha": 1.0}],
        },
    }
    return SparseDelta.from_compact(
        Support.from_indices(layout, positions),
        torch.cat([values[name] for name in sorted(values)]) if values else torch.zeros(0),
        heads=delta.heads,
        base=before,
        base_dtypes={name: tensors[name].dtype for name in layout.names},
        meta=meta,
    )


def _names(
    delta: SparseDelta, tensors: Mapping[str, Tensor], tied: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """All of a base's names for each tensor of a delta; the delta's own first, if it is one."""
    groups = {name: [owner, *more] for owner, more in tied.items() for name in (owner, *more)}
    aliases = delta.meta.get("aliases", {})
    found: dict[str, list[str]] = {}
    taken: dict[str, str] = {}
    for own, shape in zip(delta.layout.names, delta.layout.shapes, strict=True):
        known = [n for n in (own, *aliases.get(own, ())) if n in tensors]
        if not known:
            raise SFTError(f"replacing: base has no tensor {own!r}")
        further = (n for name in known for n in groups.get(name, ()) if n not in delta.heads)
        found[own] = list(dict.fromkeys((*known, *further)))
        for name in found[own]:
            if reason := describe_unusable(tensors[name]):
                raise SFTError(f"replacing: base: {name!r} {reason}")
            if tuple(tensors[name].shape) != shape:
                raise SFTError(
                    f"replacing: {name!r} has shape {tuple(tensors[name].shape)} in base and "
                    f"{shape} in the delta"
                )
            if not _same_bits(tensors[name], tensors[known[0]]):
                raise SFTError(
                    f"replacing: {known[0]!r} and {name!r} are one tied tensor in the delta, and "
                    "differ in base"
                )
            if taken.setdefault(name, own) != own:
                raise SFTError(
                    f"replacing: {taken[name]!r} and {own!r} are two tensors in the delta and "
                    f"one, {name!r}, in base (tied)"
                )
    return found


def write_patch(delta: SparseDelta, path: str | os.PathLike[str]) -> str:
    """Writes absolute values as a patch: per tensor of the checkpoint `<name>.indices`, int32, flat
    and ascending, and `<name>.values`, in the data type of the weight; a tied tensor's under each
    of its names.

    Args:
        delta: A delta of kind "replace", as `replacing` makes it, without heads.
        path: A path that ends in `.safetensors`.

    Returns:
        The path.

    Raises:
        SFTError: The delta is no such delta, or a tensor has 2³¹ elements or more.
        OSError: The file cannot be written. What stood there before still stands.
    """
    target = os.fsdecode(path)
    if not target.endswith(".safetensors"):
        raise SFTError(f"write_patch: {target!r} must end in .safetensors")
    if delta.kind != "replace":
        raise SFTError("write_patch: the delta holds differences; give replacing(delta, base)")
    if delta.heads:
        raise SFTError(
            f"write_patch: a patch holds no whole tensors, and the delta has the heads "
            f"{_listed([*delta.heads])}; export() writes them"
        )
    delta = delta.to("cpu")
    tensors: dict[str, Tensor] = {}
    params: dict[str, Any] = {}
    for name, shape, numel in zip(
        delta.layout.names, delta.layout.shapes, delta.layout.numels, strict=True
    ):
        dtype = delta.meta.get("dtypes", {}).get(name, DTYPE_NAMES[delta.val.dtype])
        params[name] = {"shape": list(shape), "dtype": dtype}
        if not (values := delta.values(name)).numel():
            continue
        if numel >= _MAX_POSITIONS:
            raise SFTError(
                f"write_patch: {name!r} has {numel:,} elements; int32 positions reach "
                f"{_MAX_POSITIONS:,}"
            )
        flat, stored = delta.indices(name).int(), values.to(_PATCH_DTYPES[dtype])
        for each in (name, *delta.meta.get("aliases", {}).get(name, ())):
            tensors[f"{each}.indices"], tensors[f"{each}.values"] = flat, stored
        if not torch.equal(stored.float(), values.float()):
            raise SFTError(f"write_patch: {name!r}: its values are no {dtype}, which the base has")
    kept = {key: delta.meta[key] for key in _PATCH_FIELDS if key in delta.meta}
    document = {"version": 1, "params": params, **kept}
    _patched("write_patch", params)
    with new_file("write_patch", target) as temporary:
        _write(temporary, tensors, {_PATCH_KEY: canonical(document)})
    return target


_PATCH_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in VALUE_DTYPES}


def read_patch(path: str | os.PathLike[str]) -> SparseDelta:
    """Reads a patch that `write_patch` wrote.

    Returns:
        A delta of kind "replace".

    Raises:
        SFTFileError: The file is malformed; the message names tensor or field.
    """
    path = os.fsdecode(path)
    if os.path.isdir(path) or not path.endswith(".safetensors"):
        _fail(path, "is no patch, which is a file that ends in .safetensors")
    patch = Checkpoint(path)
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_PATCH_KEY)
    if text is None:
        _fail(path, f"is no patch: its metadata have no {_PATCH_KEY}")
    document = json_object(path, text)
    params, version = document.get("params"), document.get("version")
    if type(version) is not int or version != 1 or not isinstance(params, dict):
        _fail(path, "is no patch of version 1 with params")
    layout, dtypes = _patched(path, params)
    fields = {key: document[key] for key in _PATCH_FIELDS if key in document}
    try:
        meta = checked_meta(fields | {"kind": "replace", "dtypes": dtypes}, layout, ())
    except SFTError as error:
        _fail(path, str(error))
    owners = {n: name for name, group in meta.get("aliases", {}).items() for n in group}
    positions: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for key in patch:
        name, _, part = key.rpartition(".")
        owner = owners.get(name, name)
        if owner not in layout or part not in ("indices", "values"):
            _fail(path, f"tensor {key!r} belongs to none of params")
        pair = {part: f"{name}.{part}" for part in ("indices", "values")}
        if any(other not in patch for other in pair.values()):
            _fail(path, f"tensor {key!r}: {name!r} needs both indices and values")
        if part == "values":
            continue
        # Checked and used in memory of our own.
        flat, own = patch[pair["indices"]].clone(), patch[pair["values"]].clone()
        if flat.dtype != torch.int32 or own.dtype != _PATCH_DTYPES[dtypes[owner]]:
            _fail(
                path,
                f"{name!r}: must have indices of int32 and values of {dtypes[owner]}, found "
                f"{flat.dtype} and {own.dtype}",
            )
        if flat.dim() != 1 or flat.shape != own.shape:
            _fail(
                path,
                f"{name!r}: indices of shape {tuple(flat.shape)} for values of shape "
                f"{tuple(own.shape)}; one each, in a row",
            )
        order = _without_repetition(path, name, flat, layout.numels[layout.ordinal(owner)])
        positions[name], values[name] = flat[order], own[order]
    for name in owners.keys() & positions.keys():
        flat, own, owner = positions.pop(name), values.pop(name), owners[name]
        if not (
            owner in positions
            and torch.equal(flat, positions[owner])
            and _same_bits(own, values[owner])
        ):
            _fail(path, f"{name!r}: is a name of {owner!r}, and their entries differ")
    return _assembled(path, layout, positions, values, meta=meta)


def _patched(path: str, params: Mapping[str, Any]) -> tuple[Layout, dict[str, str]]:
    """The tensors that a patch is for, and their data types."""
    if len(params) > MAX_TENSORS:
        _fail(path, f"params: {len(params):,} tensors; at most {MAX_TENSORS:,}")
    shapes, dtypes = {}, {}
    for name, item in params.items():
        shape = item.get("shape") if isinstance(item, dict) else None
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMS
            or any(type(size) is not int or size < 0 for size in shape)
            or math.prod(max(size, 1) for size in shape) > MAX_NUMEL
        ):
            _fail(
                path,
                f"params: {name!r}: shape: must be a list of at most {MAX_DIMS} sizes, of product "
                f"2^48 at most, found {short(shape)}",
            )
        if not isinstance(item.get("dtype"), str) or item["dtype"] not in _PATCH_DTYPES:
            _fail(path, f"params: {name!r}: dtype: must be F32, BF16 or F16")
        shapes[name], dtypes[name] = shape, item["dtype"]
    layout = Layout.of(shapes)
    if layout.numel > MAX_ELEMENTS:
        _fail(path, f"params: {layout.numel:,} elements; at most {MAX_ELEMENTS:,}")
    return layout, dtypes
