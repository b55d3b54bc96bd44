"""`pytorch_diff.bin`, the file of the LT-SFT reference implementation: read safely, and written for
it.

Such a file (Ansell et al., 2022; composable-sft) is a dict that `torch.save` wrote: `diffs` has for
each parameter its size, its values, and the gaps between their flat positions, of which the first
dimension varies fastest; `abs` has the tensors that were tuned whole. docs/legacy-format.md is the
specification. The file says nothing of its base model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from itertools import groupby
from math import prod
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from sparse_ft_kernels.contract import describe_unusable

from . import torch_zip
from .delta import VALUE_DTYPES, SparseDelta, check_head
from .families import known_names
from .files import LEGACY_NAME, MAX_DIMS, MAX_NUMEL, SFTFileError, new_file
from .metadata import MAX_TENSORS, SFTError, check_name, short
from .tiles import TILE, Layout, Support

__all__ = ["read", "write"]

MAX_BYTES = 4 << 30
# Elements of all parameters together: what their tiles take is not in the file.
MAX_ELEMENTS = 1 << 38
# The reference implementation decodes with 32-bit numbers.
_REFERENCE_NUMEL = 1 << 31
_FIELDS = ("size", "index_steps", "values")


def read(
    path: str | os.PathLike[str],
    *,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    base_id: str | None = None,
    max_bytes: int = MAX_BYTES,
    **meta: Any,
) -> SparseDelta:
    """Reads and checks a `pytorch_diff.bin`.

    Args:
        path: The file, or a folder with a file `pytorch_diff.bin`.
        base: The model that the SFT was made from, or its tensors by name (fp32, bf16 or fp16): the
            delta gets the digest by which `bind` recognises its base. Without it nothing is known
            of the base, and a warning says so.
        base_id: The name of the base model, to be recorded.
        max_bytes: Larger files are refused.
        **meta: Further fields of the metadata, of which the file has none: trained_on, role, lang,
            task, license, recipe.

    Returns:
        The delta, on the CPU. Its values have the type that they have in the file, or fp32 where
        that is not the same for all.

    Raises:
        SFTFileError: The file is missing, foreign, damaged or malformed; the message names file and
            field.
        SFTError: `base` or `meta` is malformed or does not fit; the message names the field.
    """
    where = _locate(path)
    delta = _Reader(where, _loaded(where, max_bytes)).read()
    if base_id is not None:
        meta["base"] = {"id": base_id}
    selected, dtypes = None, None
    if base is not None:
        selected = _selected(delta.support, base)
        dtypes = {name: values.dtype for name, values in selected.items()}
    else:
        warnings.warn(
            f"{where}: does not say which base model it was made from, so a wrong one will not be "
            "noticed; sparse_ft.legacy.read takes base=, sparse-ft convert --base",
            stacklevel=2,
        )
    return SparseDelta.from_compact(
        delta.support,
        delta.val,
        heads=delta.heads,
        base=selected,
        base_dtypes=dtypes,
        meta=meta,
    )


def _loaded(path: str, max_bytes: int = MAX_BYTES) -> Any:
    return torch_zip.load(path, max_bytes=max_bytes, mapped=False, packed=True)


def write(delta: SparseDelta, path: str | os.PathLike[str]) -> str:
    """Writes a delta as the reference implementation reads it: entries and heads, no metadata.

    The file appears whole or not at all. Equal deltas give equal bytes with one version of torch.

    Args:
        delta: The delta. Values in bf16 or fp16 are widened to fp32, exactly; heads keep their
            type.
        path: A path that ends in `.bin`, or an existing folder, which gets a `pytorch_diff.bin`.

    Returns:
        The path of the file.

    Raises:
        SFTError: The reference implementation could not read the delta: it is of kind `replace`, or
            has entries in a tensor that has not one or two dimensions or 2^31 elements or more; or
            it is beyond what `read` takes (docs/legacy-format.md), or the path is neither.
        OSError: The file cannot be written. What stood there before still stands.
    """
    target = os.fsdecode(path)
    if os.path.isdir(target):
        target = os.path.join(target, LEGACY_NAME)
    if not target.endswith(".bin"):
        raise SFTError(f"legacy.write: {target!r} must end in .bin, or be an existing folder")
    with new_file("legacy.write", target) as temporary:
        content = _content(delta)
        with open(temporary, "xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        # What is written must be read.
        try:
            _Reader(temporary, _loaded(temporary)).structure()
        except SFTFileError as error:
            said = str(error).removeprefix(f"{temporary}: ")
            raise SFTError(f"legacy.write: {said}") from None
    return target


def _content(delta: SparseDelta) -> dict[str, dict[str, Any]]:
    if delta.kind != "diff":
        raise SFTError(
            f"legacy.write: the delta is of kind {delta.kind!r}; {LEGACY_NAME} holds differences"
        )
    # Checked as a file's would be: the tensors of a delta can be written to.
    delta = delta.to("cpu")
    try:
        support = Support(delta.layout, delta.support.idx, delta.support.ptr)
    except ValueError as error:
        raise SFTError(f"legacy.write: {error}") from None
    delta = SparseDelta(support, delta.val, delta.heads, delta.meta)
    differences: dict[str, Any] = {}
    for name, shape in zip(delta.layout.names, delta.layout.shapes, strict=True):
        flat, values = delta.indices(name).numpy(), delta.values(name).float()
        if len(flat) and (len(shape) not in (1, 2) or prod(shape) >= _REFERENCE_NUMEL):
            raise SFTError(
                f"legacy.write: {name!r} has entries and the shape {shape}; the reference "
                "implementation decodes one and two dimensions of fewer than 2^31 elements, and "
                "others wrongly. Save the delta as .safetensors"
            )
        place = _reversed(flat, shape)
        order = np.argsort(place, kind="stable")
        differences[name] = {
            "size": torch.Size(shape),
            # Python's integers: with numpy's, which published files have in the first place,
            # torch.load refuses the file by default.
            "index_steps": np.diff(place[order], prepend=0).tolist(),
            "values": values[torch.from_numpy(order)],
        }
    heads = {name: head.detach().contiguous().clone() for name, head in delta.heads.items()}
    return {"diffs": differences, "abs": heads}


def _reversed(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Row-major positions in a tensor as positions in the order in which its first dimension
    varies fastest; or back, for the reversed shape."""
    if not shape:
        return flat
    place: Any = 0
    rest = flat
    for size in shape[:0:-1]:
        above = rest // max(size, 1)
        place = place * size + (rest - above * size)
        rest = above
    return np.asarray(place * shape[0] + rest)


def _selected(support: Support, base: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base values at the selected entries of each tensor."""
    if isinstance(base, nn.Module):
        base = known_names(base)
    found = {}
    for name, shape in zip(support.layout.names, support.layout.shapes, strict=True):
        tensor = base.get(name)
        if not isinstance(tensor, Tensor):
            raise SFTError(f"base: has no tensor {name!r}, which the SFT has")
        reason = describe_unusable(tensor)
        if reason and not reason.startswith("is not contiguous"):
            raise SFTError(f"base: {name!r} {reason}")
        if tuple(tensor.shape) != shape:
            raise SFTError(
                f"base: {name!r} has shape {tuple(tensor.shape)}, and {shape} in the SFT"
            )
        flat = tensor.detach().reshape(-1)
        found[name] = flat[support.indices(name).to(flat.device)].cpu()
    return found


def _locate(path: str | os.PathLike[str]) -> str:
    given = os.fsdecode(path)
    return os.path.join(given, LEGACY_NAME) if os.path.isdir(given) else given


class _Reader:
    """One reading of one file's content."""

    def __init__(self, path: str, content: Any) -> None:
        self.path = path
        self.content = content

    def fail(self, message: str) -> NoReturn:
        raise SFTFileError(f"{self.path}: {message}")

    def structure(self) -> tuple[Layout, dict[str, Any], dict[str, Any]]:
        """The layout, and what the file has for each of its tensors and for each head."""
        content = self._dict("what was saved", self.content)
        if not content.keys() & {"diffs", "abs"} or content.keys() - {"diffs", "abs"}:
            self.fail(
                f"must have the keys diffs and abs, found {short(sorted(map(str, content))[:9])}; "
                "it is a PyTorch file, but not an SFT. A tuned checkpoint becomes an SFT by "
                "SparseDelta.between(base, tuned)"
            )
        differences = self._dict("diffs", content.get("diffs", {}))
        heads = self._dict("abs", content.get("abs", {}))
        if len(differences) + len(heads) > MAX_TENSORS:
            self.fail(f"has {len(differences) + len(heads):,} tensors; at most {MAX_TENSORS:,}")
        for name in (*differences, *heads):
            try:
                check_name("diffs, abs: a name", name)
            except SFTError as error:
                self.fail(str(error))
        for name in differences.keys() & heads.keys():
            self.fail(f"{name!r} is both in diffs and in abs")
        return self._layout(differences), differences, heads

    def read(self) -> SparseDelta:
        layout, differences, heads = self.structure()
        pieces = [self._entries(name, differences[name]) for name in layout.names]
        try:
            for name, head in heads.items():
                if not isinstance(head, Tensor):
                    self.fail(f"abs[{name!r}]: must be a tensor, found a {type(head).__name__}")
                check_head(name, head)
            return SparseDelta(
                _support(layout, [piece[0] for piece in pieces]),
                _joined([piece[1] for piece in pieces]),
                {name: head.contiguous().clone() for name, head in heads.items()},
            )
        except SFTFileError:
            raise
        except SFTError as error:
            self.fail(str(error))

    def _dict(self, what: str, value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict):
            self.fail(f"{what}: must be a dict, found a {type(value).__name__}")
        return value

    def _layout(self, differences: dict[str, Any]) -> Layout:
        shapes = {}
        for name, entry in differences.items():
            at = f"diffs[{name!r}]"
            if set(self._dict(at, entry)) != set(_FIELDS):
                self.fail(
                    f"{at}: must have {', '.join(_FIELDS)}, "
                    f"found {short(sorted(map(str, entry))[:9])}"
                )
            shape = entry["size"]
            if (
                type(shape) is not tuple
                or len(shape) > MAX_DIMS
                or any(type(n) is not int or not 0 <= n <= MAX_NUMEL for n in shape)
                or prod(n or 1 for n in shape) > MAX_NUMEL
            ):
                self.fail(
                    f"{at}: size: must be a torch.Size of at most {MAX_DIMS} integers from 0 on, "
                    f"of product 2^48 at most"
                )
            shapes[name] = shape
        layout = Layout.of(shapes)
        if layout.numel > MAX_ELEMENTS:
            self.fail(f"diffs: the sizes give {layout.numel:,} elements; at most {MAX_ELEMENTS:,}")
        return layout

    def _entries(self, name: str, entry: dict[str, Any]) -> tuple[np.ndarray, Tensor]:
        """Row-major positions of a tensor's entries, ascending, and their values."""
        at = f"diffs[{name!r}]"
        shape, values = entry["size"], entry["values"]
        place = self._positions(at, prod(shape), entry["index_steps"])
        if not isinstance(values, Tensor) or values.dim() != 1 or values.dtype not in VALUE_DTYPES:
            found = (
                f"{values.dtype} of shape {tuple(values.shape)}"
                if isinstance(values, Tensor)
                else f"a {type(values).__name__}"
            )
            self.fail(f"{at}: values: must be a vector of fp32, bf16 or fp16, found {found}")
        if len(values) != len(place):
            self.fail(
                f"{at}: values: {len(values):,} values for {len(place):,} index_steps; one per step"
            )
        if not torch.isfinite(values).all():
            entry_at = int((~torch.isfinite(values)).nonzero()[0])
            self.fail(f"{at}: values: the value {entry_at:,} is {values[entry_at].item()}")
        flat = _reversed(place, shape[::-1])
        order = np.argsort(flat, kind="stable")
        return flat[order], values[torch.from_numpy(order)]

    def _positions(self, at: str, numel: int, steps: Any) -> np.ndarray:
        """Positions in a tensor, first dimension fastest, from the gaps between them."""
        if type(steps) is not list:
            self.fail(f"{at}: index_steps: must be a list, found a {type(steps).__name__}")
        parts = [np.zeros(0, np.int64)]
        for packed, group in groupby(steps, lambda n: type(n) is np.ndarray):
            items = list(group)
            if packed:
                parts += items
                continue
            # Published files begin with one of numpy's numbers, which their writer left there.
            if len(parts) == 1 and type(items[0]) is np.int64:
                items[0] = int(items[0])
            for n in items:
                if type(n) is not int or abs(n) > MAX_NUMEL:
                    said = short(n) if type(n) is int else f"a {type(n).__name__}"
                    self.fail(f"{at}: index_steps: must be integers up to 2^48, found {said}")
            parts.append(np.array(items, np.int64))
        steps = np.concatenate(parts)
        if len(steps) and (steps[0] < 0 or (steps[1:] < 1).any()):
            entry = int((steps[1:] < 1).argmax()) + 1 if steps[0] >= 0 else 0
            self.fail(
                f"{at}: index_steps: must begin at 0 or above and go on in steps of 1 or more, "
                f"and item {entry:,} is {steps[entry]}"
            )
        # With steps of 48 bits, a sum beyond 64 bits passes through the range that is refused.
        place = np.cumsum(steps)
        if len(place) and (last := int(place.max())) >= numel:
            self.fail(
                f"{at}: index_steps: lead to position {last:,}, and size has {numel:,} elements"
            )
        return place


def _support(layout: Layout, positions: list[np.ndarray]) -> Support:
    """The support of ascending row-major positions, tensor by tensor."""
    counts = [np.zeros(1, np.int64)]
    for tiles, flat in zip(np.diff(layout.tile_starts).tolist(), positions, strict=True):
        counts.append(np.diff(np.searchsorted(flat, np.arange(tiles + 1) * TILE)))
    idx = np.concatenate(
        [np.zeros(0, np.uint16), *((f % TILE).astype(np.uint16) for f in positions)]
    )
    ptr = np.cumsum(np.concatenate(counts), dtype=np.int64)
    return Support(layout, torch.from_numpy(idx), torch.from_numpy(ptr))


def _joined(values: list[Tensor]) -> Tensor:
    """The values of all tensors; fp32, where they have several types."""
    dtypes = {piece.dtype for piece in values if len(piece)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return torch.cat([torch.zeros(0, dtype=dtype), *(piece.to(dtype) for piece in values)])
