"""select: which K of a model's entries a sparse fine-tuning may change."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_ft_kernels import NonFiniteError

from .criteria import CRITERIA, Candidates, Choice, largest
from .families import backbone_names, check_usable, named_parameters
from .tiles import Layout, Support

__all__ = ["Eligible", "eligible_parameters", "resolve_k", "select"]

Eligible = Callable[[str, nn.Parameter], bool] | Collection[str] | None
_T = TypeVar("_T", bound=Tensor)


def eligible_parameters(model: nn.Module, eligible: Eligible = None) -> dict[str, nn.Parameter]:
    """The parameters among which entries may be selected, in canonical order.

    Args:
        model: Any module.
        eligible: A callable `(name, parameter) -> bool` or a set of names; default: the trainable
            parameters of the backbone.

    Raises:
        ValueError: A name is unknown, or nothing is eligible.
    """
    parameters = named_parameters(model)
    if not parameters:
        raise ValueError(f"the model {type(model).__name__} has no parameters")
    if eligible is not None:
        return _chosen(type(model).__name__, parameters, eligible)
    inside = backbone_names(model)
    trainable = {n: p for n, p in sorted(parameters.items()) if n in inside and p.requires_grad}
    if not trainable:
        raise ValueError(
            f"no parameter of the backbone of {type(model).__name__} is trainable, so none is "
            "eligible; "
            "set requires_grad on some, or name them with eligible="
        )
    return trainable


def _chosen(
    what: str,
    tensors: Mapping[str, _T],
    eligible: Callable[[str, _T], bool] | Collection[str],
) -> dict[str, _T]:
    """The tensors that a rule or a set of names lets through, in canonical order."""
    if callable(eligible):
        chosen = {n for n, t in tensors.items() if eligible(n, t)}
    else:
        chosen = {eligible} if isinstance(eligible, str) else set(eligible)
        if unknown := sorted(chosen - tensors.keys()):
            raise ValueError(
                f"eligible: the {what} has no parameter {unknown[0]!r}"
                + (f" (and {len(unknown) - 1} more unknown names)" if len(unknown) > 1 else "")
            )
    if not chosen:
        raise ValueError("eligible: no parameter is eligible; widen the rule")
    return {name: tensors[name] for name in sorted(chosen)}


def resolve_k(k: int | None, density: float | None, numel: int) -> int:
    """Entries to select: a count, or a share of `numel` (rounded down, at least 1).

    Raises:
        ValueError: Both or neither are given, or the one given is out of range.
    """
    if (k is None) == (density is None):
        raise ValueError("give either k (a count) or density (a share), not both or neither")
    if k is not None:
        try:
            k = operator.index(None if isinstance(k, bool) else k)  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(f"k must be an integer, got {k!r}") from None
        if not 1 <= k <= numel:
            raise ValueError(f"k must be between 1 and the {numel} eligible entries, got {k}")
        return k
    assert density is not None
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise ValueError(f"density must be a number in (0, 1], got {density!r}")
    if not (0.0 < density <= 1.0):
        raise ValueError(f"density must be in (0, 1], got {density}")
    return max(1, math.floor(density * numel))


@torch.no_grad()
def select(
    model: nn.Module | Mapping[str, Tensor],
    theta0: Mapping[str, Tensor] | None = None,
    *,
    k: int | None = None,
    density: float | None = None,
    criterion: str | Callable[[str, Tensor, Tensor | None], Tensor] = "magnitude",
    eligible: Eligible = None,
    exclude: Support | None = None,
    seed: int = 0,
    tie: str = "index",
) -> Support:
    """Selects the K entries of a model that rank highest, over all eligible parameters at once.

    Args:
        model: A module, or a mapping from names to tensors (all of which are then eligible): the
            values now. Give fp32 values where an fp32 master exists: differences of bf16 weights
            are mostly tied.
        theta0: The values at the start, for instance a `Snapshot`.
        k: Entries to select.
        density: Their share of the eligible entries instead, in (0, 1].
        criterion: "magnitude" (largest |θ1 − θ0|), "random" (seeded, uniform), or a function
            `(name, now, start) -> scores` whose largest |scores| are taken; scores have the
            tensor's shape.
        eligible: `(name, parameter) -> bool`, or names; default: the trainable parameters of the
            backbone.
        exclude: A support whose entries must not be selected (later rounds of iterative LT-SFT;
            disjoint tasks).
        seed: For "random".
        tie: "index" selects exactly K, the first by (name, position) among equals; "all" selects
            every entry that reaches the threshold, as the LT-SFT reference implementation does.

    Returns:
        The support, over the eligible parameters. Its `info` holds threshold and ties.

    Raises:
        ValueError: Unusable parameters, k or density out of range, NaN or infinity (with the
            parameter's name), or a start that does not fit.
    """
    if isinstance(model, Mapping):
        tensors: dict[str, Tensor] = {name: model[name] for name in sorted(model)}
        if not tensors:
            raise ValueError("select: the mapping holds no tensors")
        if eligible is not None:
            rule: Any = eligible
            tensors = _chosen("mapping", tensors, rule)
    else:
        tensors = dict(eligible_parameters(model, eligible))
    check_usable("select", iter(tensors.items()))
    layout = Layout.of(tensors)
    names = list(layout.names)
    current = [tensors[name].detach() for name in names]
    devices = sorted({str(t.device) for t in current})
    if len(devices) > 1:
        raise ValueError(
            f"select: the parameters lie on {', '.join(devices)}; selection ranks them together, "
            "so move them to one "
            "device, or name those of one device with eligible="
        )

    start: list[Tensor] = []
    if theta0 is not None:
        if not isinstance(theta0, Mapping):
            raise TypeError(
                "select: theta0 must be a mapping from names to tensors, such as "
                "sf.snapshot(model), "
                f"got {type(theta0).__name__}"
            )
        for name in names:
            if name not in theta0:
                raise ValueError(f"select: theta0 has no {name!r}")
            value = theta0[name]
            check_usable("select: theta0", iter([(name, value)]))
            if value.shape != tensors[name].shape:
                raise ValueError(
                    f"select: {name!r} has shape {tuple(tensors[name].shape)} in the model and "
                    f"{tuple(value.shape)} in theta0"
                )
            start.append(value.detach().to(tensors[name].device))

    skip = None
    if exclude is not None:
        inside = exclude.restrict(n for n in exclude.layout.names if n in layout).expand(layout)
        skip = (inside.idx.to(current[0].device), inside.ptr.to(current[0].device))
    count = resolve_k(k, density, layout.numel - (skip[0].numel() if skip else 0))

    if callable(criterion):
        scores = []
        for i, name in enumerate(names):
            score = criterion(name, current[i], start[i] if start else None)
            if not isinstance(score, Tensor):
                raise ValueError(
                    f"select: the criterion gave a {type(score).__name__} for {name!r}, not a "
                    "tensor of scores"
                )
            if score.shape != current[i].shape:
                raise ValueError(
                    f"select: the criterion gave scores of shape {tuple(score.shape)} for "
                    f"{name!r}, "
                    f"which has shape {tuple(current[i].shape)}"
                )
            scores.append(score.detach().to(torch.float32).contiguous())
        candidates = Candidates(names, scores, (), count, skip, seed, tie)
        choose: Callable[[Candidates], Choice] = largest
    else:
        if criterion not in CRITERIA:
            raise ValueError(
                f"select: unknown criterion {criterion!r}; there are "
                f"{', '.join(sorted(CRITERIA))}, or pass a function"
            )
        candidates = Candidates(names, current, start, count, skip, seed, tie)
        choose = CRITERIA[criterion]
    try:
        idx, ptr, info = choose(candidates)
    except NonFiniteError as error:
        raise ValueError(
            f"select: parameter {names[error.ordinal]!r} holds NaN or infinity, so its entries "
            "cannot be ranked; "
            "the training has diverged there, or exclude it with eligible="
        ) from error
    support = Support(layout, idx, ptr, check=False)
    if info is not None:
        threshold = float(info[:1].to(torch.int32).view(torch.float32))
        support.info = {
            "threshold": threshold,
            "above": int(info[2]),
            "tied": int(info[3]),
            "tied_selected": int(info[4]),
        }
        if threshold == 0.0:
            warnings.warn(
                f"select: only {int(info[2])} entries moved, fewer than the {count} wanted; the "
                "other "
                f"{int(info[4])} were filled up in order of (name, position). Train longer, lower "
                "k, or give fp32 values.",
                stacklevel=3,  # the caller of select, beyond torch.no_grad's wrapper
            )
    return support
