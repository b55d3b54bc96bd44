"""What the GPU tests share: the device, and an op run on the CPU and there, bit for bit the same.

`SPARSE_FT_GPU_TESTS=cpu pytest tests/gpu` tries the tests themselves where there is no GPU: the
kernels then run in Triton's interpreter, and what needs a real device is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from oracles import assert_bits
from torch import Tensor

REAL = torch.cuda.is_available()
TRIAL = not REAL and os.environ.get("SPARSE_FT_GPU_TESTS") == "cpu"
DEVICE = torch.device("cuda", 0) if REAL else torch.device("cpu")
TILE = 65536


@contextmanager
def environment(name: str, value: str | None) -> Iterator[None]:
    """Sets or unsets a variable for a while."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def forced() -> Any:
    """Within it the ops are served by the Triton kernels, or fail."""
    return environment("SPARSE_FT_BACKEND", "triton")


def moved(value: Any, device: torch.device = DEVICE) -> Any:
    """A copy of a tensor, or of all tensors of a list, on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, list | tuple):
        return type(value)(moved(v, device) for v in value)
    return value


def assert_same(found: Any, expected: Any, what: str) -> None:
    """Tensors, or lists of tensors, of equal bits, on whatever devices."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor), what
        assert_bits(found.detach().cpu(), expected.detach().cpu(), what)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), what
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert_same(x, y, f"{what}[{i}]")
    else:
        assert found == expected, what


class Twins:
    """The arguments of an op, on the CPU and on the device.

    Args:
        device: Where the second set lies.
        **arguments: Tensors, lists of tensors and numbers, by the names of the op's parameters.
    """

    def __init__(self, device: torch.device = DEVICE, **arguments: Any) -> None:
        self.device = device
        self.cpu = arguments
        self.gpu = {name: moved(value, device) for name, value in arguments.items()}

    def run(self, op: Callable[..., Any], **more: Any) -> Any:
        """Calls the op on both sets, compares results and arguments, and returns the result.

        Args:
            op: A public op.
            **more: Further arguments of this call, on the CPU.
        """
        with environment("SPARSE_FT_BACKEND", None):
            expected = op(**self.cpu, **more)
        there = {name: moved(value, self.device) for name, value in more.items()}
        with forced():
            found = op(**self.gpu, **there)
        assert_same(found, expected, f"{op.__name__}: result")
        for name, value in {**self.cpu, **more}.items():
            assert_same({**self.gpu, **there}[name], value, f"{op.__name__}: {name}")
        return found


def same(op: Callable[..., Any], **arguments: Any) -> Any:
    """One call of an op on both devices; returns the device's result."""
    return Twins(**arguments).run(op)


def lengths_of(sizes: Sequence[int]) -> Tensor:
    """Elements of each tile, int32."""
    lengths: list[int] = []
    for n in sizes:
        lengths += [TILE] * (n // TILE) + ([n % TILE] if n % TILE else [])
    return torch.tensor(lengths, dtype=torch.int32)


def off_by(tensor: Tensor, elements: int) -> Tensor:
    """A copy of a tensor that begins some elements after an aligned address."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device=tensor.device)
    view = room[elements:].view(tensor.shape)
    view.copy_(tensor)
    return view


def ulps(found: Tensor, expected: Tensor) -> float:
    """The largest distance of fp32 values from fp64 ones, in units of the expected last place."""
    target = expected.cpu().numpy()
    last = np.spacing(np.abs(target.astype(np.float32))).astype(np.float64)
    return float((np.abs(found.cpu().double().numpy() - target) / last).max())
