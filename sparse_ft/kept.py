"""What training leaves as it found it: the state of random generators, and the modes of modules."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["modes_kept", "random_state", "random_state_kept", "set_random_state"]


def random_state() -> dict[str, Any]:
    """The state of the generators that training draws from: Python's, NumPy's, torch's, CUDA's."""
    kind, key, *rest = np.random.get_state()  # noqa: NPY002  (what data collators draw from)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(key).tolist(), *rest),
        "torch": torch.get_rng_state(),
        # A device that was never used has drawn nothing.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts a `random_state` back."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value, device)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn inside counts as not drawn."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Each module of a model is in training or evaluation mode afterwards as it was before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
