"""Snapshot: a bit-exact copy of a model's parameters and buffers, to measure from and to go back to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .families import named_parameters

__all__ = ["Snapshot", "snapshot"]


class Snapshot(Mapping[str, Tensor]):
    """The values that a model had: a mapping from parameter names to tensors, with its buffers beside them.

    Args:
        model: The model to copy. The copies lie on the devices of the originals, or on `device`.
        device: Where to keep the copies, for instance "cpu".
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        parameters = named_parameters(model)
        for name, parameter in parameters.items():
            if parameter.device.type == "meta":
                raise ValueError(
                    f"snapshot: parameter {name!r} is on the meta device and holds no data; "
                    "materialise it first"
                )
        self._parameters = {name: _copy(p, device) for name, p in parameters.items()}
        self._buffers = {name: _copy(b, device) for name, b in model.named_buffers()}

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Writes every value back, bit for bit, in place.

        Raises:
            ValueError: The model has other parameters or buffers than the one that was copied. Nothing is written then.
        """
        targets = [
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
                found[name].copy_(value)

    def __getitem__(self, name: str) -> Tensor:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __repr__(self) -> str:
        numel = sum(t.numel() for t in self._parameters.values())
        return f"Snapshot({len(self._parameters)} parameters, {numel:,} values)"


def _copy(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    copy = tensor.detach().clone()
    return copy if device is None else copy.to(device)


def snapshot(model: nn.Module, device: torch.device | str | None = None) -> Snapshot:
    """A bit-exact copy of a model's parameters and buffers.

    Args:
        model: The model to copy.
        device: Where to keep the copies; default: beside the originals.

    Returns:
        A mapping from parameter names to tensors, with `restore(model)`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: A parameter holds no data (meta device).
    """
    return Snapshot(model, device)
