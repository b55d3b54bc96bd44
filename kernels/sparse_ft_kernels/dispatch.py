"""Which backend serves which op: the order per device, the override, the reasons, and the
registration with torch.

`SPARSE_FT_BACKEND=name` forces one backend and then never falls back. Without it the first backend
of the device's order that can serve is taken; a failure inside a backend is raised, never papered
over by the next one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from itertools import filterfalse
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native, reference, triton_backend
from .contract import NAMESPACE, OPS, Op

BACKENDS: dict[str, ModuleType] = {"cpu": native, "triton": triton_backend, "reference": reference}
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
FALLBACK = ("reference",)
ENVIRONMENT = "SPARSE_FT_BACKEND"


class Support(NamedTuple):
    """Whether a backend can serve, and why not where it cannot."""

    ok: bool
    reason: str


class BackendError(RuntimeError):
    """No backend can serve a call; the message lists each one tried, with its reason."""


def support(backend: str, op: str, device: torch.device) -> Support:
    """Can this backend serve this op on this device?"""
    module = BACKENDS[backend]
    # The reason first: to look for an op may import what is not there.
    if reason := module.unavailable(device):
        return Support(False, reason)
    if not hasattr(module, op):
        return Support(False, f"it has no {op}")
    return Support(True, "")


def _candidates(op: str, device_type: str, forced: str) -> tuple[str, ...]:
    """The backends to ask for an op, in order."""
    if forced and (forced in ORDER["cpu"] or not OPS[op].on_host):
        return (forced,)
    return ORDER.get(device_type, FALLBACK)


@lru_cache(maxsize=1024)
def _resolve(op: str, device_type: str, forced: str) -> Callable[..., Any]:
    device = torch.device(device_type)
    if forced and forced not in BACKENDS:
        raise BackendError(
            f"{ENVIRONMENT}={forced!r}: there is no such backend; choose among "
            f"{', '.join(BACKENDS)}"
        )
    tried: list[str] = []
    for name in _candidates(op, device_type, forced):
        answer = support(name, op, device)
        if answer.ok:
            if tried:
                _warn_slow(device_type, tried[0])
            return getattr(BACKENDS[name], op)  # type: ignore[no-any-return]
        tried.append(f"{name}: {answer.reason}")
    forced_by = f" ({ENVIRONMENT}={forced})" if forced else ""
    raise BackendError(
        f"{op} on {device_type}{forced_by}: no backend can serve; " + "; ".join(tried)
    )


@lru_cache(maxsize=8)
def _warn_slow(device_type: str, reason: str) -> None:
    warnings.warn(
        f"sparse_ft: {device_type} tensors are served by plain torch, which is slow ({reason})",
        RuntimeWarning,
        stacklevel=2,
    )


def reset() -> None:
    """Forget which backend serves what, after a build."""
    _resolve.cache_clear()
    native.load.cache_clear()


def explain(device: str = "cpu") -> list[tuple[str, str, str]]:
    """Rows (op, backend, "chosen" | "available" | reason) for a device."""
    rows = []
    forced = os.environ.get(ENVIRONMENT, "")
    for op in OPS:
        chosen = False
        where = "cpu" if OPS[op].on_host else device
        order = ORDER.get(where, FALLBACK)
        candidates = _candidates(op, where, forced)
        for name in (*order, *(name for name in BACKENDS if name not in order)):
            answer = support(name, op, torch.device(where))
            if answer.ok and not chosen and name in candidates:
                chosen = True
                rows.append((op, name, "chosen"))
            else:
                rows.append((op, name, "available" if answer.ok else answer.reason))
    return rows


def _device_type(arguments: tuple[Any, ...]) -> str:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.device.type
        if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
            return argument[0].device.type
    return "cpu"


def _require_alignment(op: str, names: list[str], arguments: tuple[Any, ...]) -> None:
    """Refuses storage that begins between two elements, which no kernel can address."""
    for name, argument in zip(names, arguments, strict=True):
        is_list = isinstance(argument, (list, tuple))
        for i, tensor in enumerate(argument if is_list else (argument,)):
            if isinstance(tensor, Tensor) and tensor.data_ptr() % tensor.element_size():
                raise ValueError(
                    f"{op}: {name}{f'[{i}]' if is_list else ''} begins at address "
                    f"{tensor.data_ptr():#x}, which is no multiple of its element size, "
                    f"{tensor.element_size()} bytes; clone() it"
                )


_FACTS = (
    *(Tensor.data_ptr, attrgetter("dtype"), attrgetter("shape")),
    *(Tensor.is_contiguous, Tensor.get_device),
)
# What passed the checks, by all that they look at, and how many tensors each entry describes. To
# look hundreds of tensors up takes a fourth of the time of checking them again.
_PASSED: dict[tuple[Any, ...], int] = {}
_PASSED_TENSORS = 1 << 15


def _facts(argument: Any) -> Any:
    """All that the checks look at."""
    if isinstance(argument, Tensor):
        argument = (argument,)
    elif not isinstance(argument, (list, tuple)):
        return argument
    elif not argument or not isinstance(argument[0], Tensor):
        return tuple(argument)
    return tuple(tuple(map(fact, argument)) for fact in _FACTS)


def _check(op: Op, names: list[str], arguments: tuple[Any, ...]) -> None:
    """Raises what the contract raises; what passed before passes at once."""
    try:
        facts = (op.name, *map(_facts, arguments))
        if facts in _PASSED:
            return
    except (RuntimeError, TypeError):  # a tensor without an address: the checks say so
        facts = None
    op.check(*arguments)
    _require_alignment(op.name, names, arguments)
    if facts is not None:
        tensors = sum(len(a) if isinstance(a, (list, tuple)) else 1 for a in arguments)
        if sum(_PASSED.values()) + tensors > _PASSED_TENSORS:
            _PASSED.clear()
        _PASSED[facts] = tensors


def _implementation(op: Op) -> Callable[..., Any]:
    names = [a.name for a in torch._C.parse_schema(f"{NAMESPACE}::{op.schema}").arguments]
    mutated = [names.index(name) for name in op.mutates]

    def call(*arguments: Any) -> Any:
        _check(op, names, arguments)
        backend = _resolve(op.name, _device_type(arguments), os.environ.get(ENVIRONMENT, ""))
        with torch.no_grad():
            result = backend(*arguments)
        # Tell autograd that these tensors changed, as torch's own in-place ops do.
        for position in mutated:
            changed = arguments[position]
            tensors = [changed] if isinstance(changed, Tensor) else changed
            torch.autograd.graph.increment_version(list(filterfalse(Tensor.is_inference, tensors)))
        return result

    call.__name__ = op.name
    return call


def _fake(op: Op) -> Callable[..., Any]:
    def fake(*arguments: Any) -> Any:
        op.check(*arguments)
        return op.fake(*arguments)

    return fake


LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _op in OPS.values():
    LIBRARY.define(_op.schema)
    LIBRARY.impl(_op.name, _implementation(_op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_op.name}", _fake(_op), lib=LIBRARY)
