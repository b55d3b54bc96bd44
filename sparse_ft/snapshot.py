"""Snapshot: a bit-exact copy of a model's parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .families import named_parameters

__all__ = ["Snapshot", "snapshot"]


_LAZY = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)


class Snapshot(Mapping[str, Tensor]):
    """The values that a model had: a mapping from parameter names to tensors, with its buffers
    beside them.

    Args:
        model: The model to copy. The copies lie on the devices of the originals, or on `device`.
        device: Where to keep the copies, for instance "cpu".
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        self._parameters = _copies("parameter", named_parameters(model), device)
        self._buffers = _copies("buffer", dict(model.named_buffers()), device)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Writes every value back, bit for bit, in place.

        Raises:
            ValueError: The model has other parameters or buffers than the one that was copied.
                Nothing is written then.
        """
        targets: list[tuple[str, dict[str, Tensor], Mapping[str, Tensor]]] = [
            ("parameter", self._parameters, named_parameters(model)),
            ("buffer", self._buffers, dict(model.named_buffers())),
        ]
        for kind, values, found in targets:
            for name in sorted(values.keys() | found.keys()):
                if name not in found:
                    raise ValueError(f"Snapshot.restore: the model has no {kind} {name!r} any more")
                if name not in values:
                    raise ValueError(f"Snapshot.restore: the model has a new {kind} {name!r}")
                if (
                    values[name].shape != found[name].shape
                    or values[name].dtype != found[name].dtype
                ):
                    raise ValueError(
                        f"Snapshot.restore: {kind} {name!r} was {values[name].dtype} of shape "
                        f"{tuple(values[name].shape)} and is {found[name].dtype} of shape "
                        f"{tuple(found[name].shape)} now"
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

    def __repr__(self) -> str:
        numel = sum(t.numel() for t in self._parameters.values())
        return f"Snapshot({len(self._parameters)} parameters, {numel:,} values)"


def _copies(
    kind: str, tensors: Mapping[str, Tensor], device: torch.device | str | None
) -> dict[str, Tensor]:
    copies = {}
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
        copy = tensor.detach().clone()
        copies[name] = copy if device is None else copy.to(device)
    return copies


def snapshot(model: nn.Module, device: torch.device | str | None = None) -> Snapshot:
    """A bit-exact copy of a model's parameters and buffers.

    Args:
        model: The model to copy.
        device: Where to keep the copies; default: beside the originals.

    Returns:
        A mapping from parameter names to tensors, with `restore(model)`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: A parameter or buffer holds no data (meta device, lazy module).
    """
    return Snapshot(model, device)
