"""What a case is: one op in one setting, our way of doing it and the ways it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import shapes

Job = Callable[[], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SUPPORTS = ("uniform", "clustered")
LARGE = 100_000_000


@dataclass(frozen=True)
class Setting:
    """On what an op is measured.

    Args:
        shape: Name of the model, see shapes.py.
        density: Share of the parameters that is selected, 0 to 1.
        dtype: "fp32" or "bf16".
        device: "cpu" or "cuda".
        support: "uniform": every set of entries equally likely. "clustered": as training leaves
            them, in some rows of the embeddings and some layers more than in others; see inputs.py.
    """

    shape: str
    density: float = 0.028
    dtype: str = "fp32"
    device: str = "cpu"
    support: str = "uniform"

    def __post_init__(self) -> None:
        shapes.shapes_of(self.shape)
        if not 0 < self.density <= 1:
            raise ValueError(f"density = {self.density}, but it is a share above 0 and at most 1")
        if self.dtype not in DTYPES or self.support not in SUPPORTS:
            raise ValueError(
                f"dtype = {self.dtype!r} and support = {self.support!r}, but known are "
                f"{', '.join(DTYPES)} and {', '.join(SUPPORTS)}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def numel(self) -> int:
        return shapes.numel(self.shape)

    @property
    def nnz(self) -> int:
        return max(1, int(self.density * self.numel))

    @property
    def width(self) -> int:
        """Bytes of one weight."""
        return self.torch_dtype.itemsize

    def __str__(self) -> str:
        return (
            f"{self.shape} ({self.numel / 1e6:,.0f}M parameters), {self.density:.3g} selected, "
            f"{self.support}, {self.dtype}"
        )


@dataclass
class Provider:
    """One way of doing the whole job of a case.

    Args:
        build: Prepares it and returns the job, which does everything once.
        source: Where the method is described; ours needs none.
        check: Raises AssertionError where what the job returned, or left behind, is wrong. It is
            called after the first run.
        extra_bytes: Memory that it needs beyond the inputs, estimated: it is left out, and the line
            says so, where there is not so much.
        state_bytes: What it keeps between two runs, such as an optimizer's moments; None: nothing.
        captured: It never waits for the device, so that a CUDA graph can replay it.
        whole: It does the whole job; not a part of it, nor one that leaves something out.
    """

    build: Callable[[], Job]
    source: str = ""
    check: Callable[[Any], None] | None = None
    extra_bytes: float = 0
    state_bytes: int | None = None
    captured: bool = False
    whole: bool = True


@dataclass(frozen=True)
class Target:
    """What is to be reached on models of LARGE parameters and more; a statement of intent until a
    stored line says that it is.

    Args:
        kind: "floor": our time is at most 1 / value of the floor, the time to move the bytes at the
            bandwidth of the case's yardstick. "peer": ours is faster than `peer` by value.
            "memory": ours needs at most value of the extra memory of `peer`. "share": `peer`, a
            part of what we do, takes at most value of our time.
        value: The number.
        peer: The provider compared with.
        quick: What even a small model on a busy CPU must show ("peer" only): `--quick` fails below
            it. It is set only where the ratio is far from 1.
    """

    kind: str
    value: float
    peer: str = ""
    quick: float | None = None


@dataclass
class Case:
    """One op in one setting.

    Args:
        op: Name of the case.
        setting: On what.
        bytes_moved: Bytes that the op must move at least.
        providers: Name → way of doing it. The first is ours.
        verify: Raises AssertionError where our result differs from an independent one.
        reset: Puts the inputs back before each run.
        yardstick: "copy" or "read": the bandwidth that gives the floor.
        targets: What is to be reached in this setting.
        note: What the reader must know of the case beside the setting.
        has_floor: Whether moving bytes is what the job consists of.
    """

    op: str
    setting: Setting
    bytes_moved: float
    providers: dict[str, Provider]
    verify: Callable[[], None]
    reset: Callable[[], None] = field(default=lambda: None)
    yardstick: str = "copy"
    targets: tuple[Target, ...] = ()
    note: str = ""
    has_floor: bool = True


@dataclass(frozen=True)
class Recipe:
    """How a case is made.

    Args:
        make: Makes it for a setting.
        ops: Names of the ops of the kernel layer that it measures.
        input_bytes: Memory of its inputs and of our way, estimated.
        cpu_only: It measures what has no device, such as the reading of files.
        uses_density: Whether the density changes anything.
        shapes: The models that it can be measured on; empty: all.
    """

    make: Callable[[Setting], Case]
    ops: tuple[str, ...]
    input_bytes: Callable[[Setting], float]
    cpu_only: bool = False
    uses_density: bool = True
    shapes: tuple[str, ...] = ()

    def setting(self, setting: Setting) -> Setting:
        """The setting without what makes no difference to the case."""
        return setting if self.uses_density else replace(setting, density=1.0, support="uniform")


RECIPES: dict[str, Recipe] = {}


def case(
    *ops: str,
    input_bytes: Callable[[Setting], float],
    cpu_only: bool = False,
    uses_density: bool = True,
    shapes: tuple[str, ...] = (),
) -> Callable[[Callable[[Setting], Case]], Callable[[Setting], Case]]:
    """Registers a function from a setting to a case under its name; see Recipe."""

    def register(make: Callable[[Setting], Case]) -> Callable[[Setting], Case]:
        RECIPES[make.__name__] = Recipe(make, ops, input_bytes, cpu_only, uses_density, shapes)
        return make

    return register
