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
from oracles import MODELS, assert_bits, numels, random_support, rng, tensors
from torch import Tensor

import sparse_ft_kernels as ops

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


# A model of millions of elements with whole tiles, rests and vectors; less where kernels are
# interpreted.
LARGE = [(2500, 1021), (768,), (1300, 1031), (0,), (65536,), (3,)] if REAL else [(70_001,), (9,)]
SHAPES = {**{name: MODELS[name] for name in MODELS if name != "empty"}, "large": LARGE}
DENSITIES = (0.001, 0.028, 0.3, 1.1)  # above 1: all entries


def model_and_support(
    name: str, dtype: torch.dtype, density: float = 0.1, what: str = "model"
) -> tuple[list[Tensor], Tensor, Tensor, list[np.ndarray], torch.Generator]:
    """A model of SHAPES with a random support (idx, ptr, flat positions) and a generator."""
    generator = rng(name, dtype, density, what)
    model = tensors(SHAPES[name], generator, dtype)
    return model, *random_support(numels(model), density, generator), generator


def deltas_of(
    model: Sequence[Tensor],
    count: int,
    density: float,
    generator: torch.Generator,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """idx, ptr and values of random deltas."""
    supports = [random_support(numels(model), density, generator) for _ in range(count)]
    vals = [
        (torch.randn(len(idx), generator=generator) * 0.1).to(dtypes[j % len(dtypes)])
        for j, (idx, _, _) in enumerate(supports)
    ]
    return [s[0] for s in supports], [s[1] for s in supports], vals


def logs_of(idx: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Room for the undo logs of deltas."""
    return [torch.zeros(len(i), dtype=dtype) for i in idx]


def select_topk(**arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op, without the word whether a backend took its slow way."""
    idx, ptr, info = ops.select_topk(**arguments)
    return idx, ptr, info.index_fill(0, torch.tensor([6]), 0)
