"""Snapshot: a bit-exact copy of a model's parameters and buffers, in memory or on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .families import named_parameters

__all__ = ["Snapshot", "snapshot", "starting_values"]


_LAZY = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
# The field of a file's metadata that says which of its tensors are buffers.
_BUFFERS = "sparse_ft_buffers"


class Snapshot(Mapping[str, Tensor]):
    """The values that a model had: a mapping from parameter names to tensors, with its buffers
    beside them.

    Args:
        model: The model to copy. The copies lie on the devices of the originals, or on `device`, or
            in a file.
        device: Where to keep the copies, for instance "cpu".
        path: A safetensors file to write, and to keep the copies in: their bytes are mapped, and
            read when they are used. It must stay as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        parameters: dict[str, Tensor] = {**named_parameters(model)}
        buffers = dict(model.named_buffers())
        _check("parameter", parameters)
        _check("buffer", buffers)
        self.path = None if path is None else os.fsdecode(path)
        self._parameters: Mapping[str, Tensor]
        self._buffers: Mapping[str, Tensor]
        if self.path is None:
            self._parameters = _copies(parameters, device)
            self._buffers = _copies(buffers, device)
        elif device is not None:
            raise ValueError(f"snapshot: give device or path, not both; got {device} and {path}")
        else:
            _write(self.path, parameters, buffers)
            self._open()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Snapshot:
        """A snapshot that was written to a file.

        Raises:
            SFTFileError: The file is missing, malformed, or no snapshot.
        """
        self = cls.__new__(cls)
        self.path = os.fsdecode(path)
        self._open()
        return self

    def _open(self) -> None:
        from .checkpoints import Checkpoint
        from .files import SFTFileError

        assert self.path is not None
        stored = Checkpoint(self.path)
        with safe_open(self.path, "pt") as file:
            said = (file.metadata() or {}).get(_BUFFERS, "")
        try:
            buffers = set(json.loads(said))
        except (TypeError, ValueError):
            raise SFTFileError(
                f"{self.path}: is no snapshot: its metadata have no list {_BUFFERS!r}"
            ) from None
        if absent := sorted(buffers - {*stored}):
            raise SFTFileError(f"{self.path}: {_BUFFERS}: there is no tensor {absent[0]!r}")
        self._parameters = _Part(stored, (name for name in stored if name not in buffers))
        self._buffers = _Part(stored, buffers)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Writes every value back, bit for bit, in place.

        Raises:
            ValueError: The model has other parameters or buffers than the one that was copied.
                Nothing is written then.
        """
        targets: list[tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]]] = [
            ("parameter", self._parameters, named_parameters(model)),
            ("buffer", self._buffers, dict(model.named_buffers())),
        ]
        for kind, values, found in targets:
            for name in sorted(values.keys() | found.keys()):
                if name not in found:
                    raise ValueError(f"Snapshot.restore: the model has no {kind} {name!r} any more")
                if name not in values:
                    raise ValueError(f"Snapshot.restore: the model has a new {kind} {name!r}")
                value, target = values[name], found[name]
                if value.shape != target.shape or value.dtype != target.dtype:
                    raise ValueError(
                        f"Snapshot.restore: {kind} {name!r} was {value.dtype} of shape "
                        f"{tuple(value.shape)} and is {target.dtype} of shape "
                        f"{tuple(target.shape)} now"
                    )
        for _, values, found in targets:
            for name, value in values.items():
                target = found[name]
                if target.layout is torch.strided and 0 in target.stride():
                    # An expanded buffer holds one value where it shows many: write that one.
                    once = tuple(slice(None if stride else 1) for stride in target.stride())
                    target, value = target[once], value[once]
                target.copy_(value)

    def __getitem__(self, name: str) -> Tensor:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if self.path is None:
            return super().__reduce_ex__(protocol)
        return Snapshot.open, (self.path,)

    def __repr__(self) -> str:
        numel = sum(t.numel() for t in self._parameters.values())
        where = "" if self.path is None else f", in {self.path!r}"
        return f"Snapshot({len(self._parameters)} parameters, {numel:,} values{where})"


class _Part(Mapping[str, Tensor]):
    """Some tensors of a checkpoint."""

    def __init__(self, stored: Mapping[str, Tensor], names: Iterable[str]) -> None:
        self._stored = stored
        self._names = dict.fromkeys(sorted(names))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check(kind: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, _LAZY):
            raise ValueError(
                f"snapshot: {kind} {name!r} has no shape yet; run the model once first"
            )
        if tensor.device.type == "meta":
            raise ValueError(
                f"snapshot: {kind} {name!r} is on the meta device and holds no data; "
                "materialise it first"
            )


def _copies(tensors: Mapping[str, Tensor], device: torch.device | str | None) -> dict[str, Tensor]:
    copies = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().clone()
        copies[name] = copy if device is None else copy.to(device)
    return copies


def _write(path: str, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, whole or not at all."""
    from .checkpoints import _DTYPES, write_safetensors
    from .files import new_file
    from .metadata import check_name

    if not path.endswith(".safetensors"):
        raise ValueError(f"snapshot: {path!r} must end in .safetensors")
    if os.path.lexists(path):
        raise ValueError(
            f"snapshot: {path!r} exists; Snapshot.open(path) reads it, or name another file"
        )
    tensors = {**parameters, **buffers}
    for name, tensor in tensors.items():
        check_name("snapshot: name", name)
        if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
            raise ValueError(
                f"snapshot: {name!r} is {tensor.dtype} ({tensor.layout}), which no safetensors "
                "file holds; leave path out to keep the copy in memory"
            )
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with new_file("snapshot", path) as temporary:
        write_safetensors(
            temporary,
            specs,
            lambda name: tensors[name].detach().cpu(),
            {_BUFFERS: json.dumps(sorted(buffers))},
        )


def snapshot(
    model: nn.Module,
    device: torch.device | str | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
) -> Snapshot:
    """A bit-exact copy of a model's parameters and buffers.

    Args:
        model: The model to copy.
        device: Where to keep the copies; default: beside the originals.
        path: A safetensors file to write instead, which must not exist yet. Its tensors are mapped
            and read when they are used, so that the copy takes no memory. `Snapshot.open(path)`
            finds it again, and any reader of safetensors reads it.

    Returns:
        A mapping from parameter names to tensors, with `restore(model)`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: A parameter or buffer holds no data (meta device, lazy module), or is of a kind
            that `path` cannot hold; or `path` exists.
        OSError: The file cannot be written; nothing is left of it.
    """
    return Snapshot(model, device, path=path)


def starting_values(
    op: str, theta0: Mapping[str, Tensor] | str | os.PathLike[str]
) -> Mapping[str, Tensor]:
    """θ0 by name, from what a user gave: tensors, or the path of a checkpoint, which is opened.

    Raises:
        TypeError: It is neither.
        SFTFileError: The checkpoint cannot be read.
    """
    if isinstance(theta0, str | os.PathLike):
        from .checkpoints import Checkpoint

        return Checkpoint(theta0)
    if not isinstance(theta0, Mapping):
        raise TypeError(
            f"{op}: theta0 must be a mapping from names to tensors, such as sf.snapshot(model), or "
            f"the path of a checkpoint, got {type(theta0).__name__}"
        )
    return theta0
