"""Backend `triton`: one file an op, loaded when the op is first called.

It serves CUDA tensors; under `TRITON_INTERPRET=1` it serves CPU tensors too, slowly, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

OLDEST = (3, 6)

# The file of each op.
STEMS = {
    "select_topk": "select_topk",
    "select_random": "select_random",
    "gather": "gather",
    "masked_adamw_": "masked_adamw",
    "dense_adamw_": "dense_adamw",
    "anchor_l1_": "anchor_l1",
    "compose_": "compose",
    "restore_": "compose",
    "swap_": "compose",
    "merge": "merge",
    "reduce": "reduce",
    "overlap": "overlap",
    "digest": "digest",
    "check_support": "check_support",
}


@lru_cache(maxsize=1)
def _missing() -> str | None:
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed; CUDA builds of torch bring it, or `pip install triton`"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"triton {found} is too old; {OLDEST[0]}.{OLDEST[1]} or newer is needed"
    return None


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve a device; None where it can."""
    if reason := _missing():
        return reason
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    if device.type == "cuda" and not interpreted:
        return None
    if device.type == "cpu":
        if interpreted:
            return None
        return "it works on CUDA tensors (on CPU tensors under TRITON_INTERPRET=1, for tests)"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU"
    return f"it works on CUDA tensors, not on {device.type}"


def _device(arguments: tuple[Any, ...]) -> torch.device:
    for argument in arguments:
        for item in argument if isinstance(argument, list | tuple) else (argument,):
            if isinstance(item, Tensor):
                return item.device
    return torch.device("cpu")


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in STEMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function: Callable[..., Any] = getattr(
        import_module(f".triton_{STEMS[name]}", __package__), name
    )

    @wraps(function)
    def call(*arguments: Any) -> Any:
        device = _device(arguments)
        if device.type != "cuda":
            return function(*arguments)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device):
            return function(*arguments)

    globals()[name] = call
    return call
