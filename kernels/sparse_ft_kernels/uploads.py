"""Small vectors that kernels read (addresses, scalars): uploaded without waiting, and kept.

What is kept has to be right on every stream and in CUDA graphs:

- An upload is queued on a stream, and only that stream is sure to find it done. So a value is used
  on the stream that made it, and made anew on another.
- A graph remembers addresses. What it was given while it was recorded is never dropped, since it
  may be replayed as long as the process lives.
- A copy that is recorded reads its host memory at each replay. So in a graph values travel as
  arguments of kernels, and what is made there belongs to the graph and is not kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_IN_GRAPHS: dict[int, object] = {}


def capturing(device: torch.device) -> bool:
    """Is a CUDA graph being recorded?"""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep_in_graph(value: object) -> None:
    """Never drops a value: a graph that is being recorded points at it."""
    _IN_GRAPHS[id(value)] = value


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of numbers on a device, without waiting for the device."""
    if capturing(device):
        out = torch.zeros(len(values), dtype=dtype, device=device)
        if len(values):
            torch._foreach_add_(list(out.unbind()), list(values))
        return out
    host = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class Kept(Generic[T]):
    """Values on devices, each by a key that determines it; the latest used ones.

    Args:
        room: What the values kept may cost together.
        cost: What a value costs; default: 1.
    """

    def __init__(self, room: int, cost: Callable[[T], int] = lambda _: 1) -> None:
        self._room = room
        self._cost = cost
        self._filled = 0
        self._values: OrderedDict[Hashable, tuple[int, T]] = OrderedDict()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """The value of a key, made where there is none for the current stream.

        Args:
            key: It determines the value; the device is part of it.
            device: Where the value lies; the current one, if it is a CUDA device.
            make: Makes the value, by work on the current stream.
        """
        found = self._values.get(key)
        if capturing(device):
            if found is None:
                return make()
            keep_in_graph(found[1])
            return found[1]
        stream = _stream(device)
        if found is not None:
            if found[0] == stream:
                self._values.move_to_end(key)
                return found[1]
            self._drop(key)
        value = make()
        self._values[key] = (stream, value)
        self._filled += self._cost(value)
        while self._filled > self._room and len(self._values) > 1:
            self._drop(next(iter(self._values)))
        return value

    def _drop(self, key: Hashable) -> None:
        self._filled -= self._cost(self._values.pop(key)[1])


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)
