"""merge: several sparse fine-tunings as one, without building anything dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_ft_kernels import merge as merge_entries

from .delta import SFTError, SparseDelta
from .tiles import Layout, Support

__all__ = ["RULES", "merge", "rule"]

# lengths, idx, ptr, val and alphas of deltas over one layout, in canonical order → idx, ptr, val.
Rule = Callable[
    [Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[float]],
    tuple[Tensor, Tensor, Tensor],
]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    """Registers a merging rule under a name."""

    def register(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return register


@rule("sum")
def total(
    lengths: Tensor,
    idx: Sequence[Tensor],
    ptr: Sequence[Tensor],
    val: Sequence[Tensor],
    alphas: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ α·φ: what composing all of them adds (LT-SFT §3.3)."""
    return merge_entries(lengths, idx, ptr, val, alphas)


@torch.no_grad()
def merge(
    deltas: Iterable[SparseDelta],
    weights: Sequence[float] | None = None,
    *,
    rule: str = "sum",
    heads: SparseDelta | None = None,
) -> SparseDelta:
    """Merges sparse fine-tunings of one base model into one.

    Applying the result gives the bits of composing the deltas (rule "sum").

    Args:
        deltas: At least one.
        weights: One finite α for each; default 1.
        rule: "sum": Σ α·φ on the union of the supports.
        heads: The delta, of those given, whose heads the result keeps; default: none.

    Returns:
        A `SparseDelta` with fp32 values; its recipe lists what it was merged from.

    Raises:
        SFTError: The deltas disagree about a tensor's shape or name, a delta is no difference, or a
            sum is beyond fp32.
        ValueError: No deltas, an unknown rule, or weights that do not fit.
    """
    chosen = given("merge", deltas)
    if rule not in RULES:
        raise ValueError(f"merge: unknown rule {rule!r}; there are {', '.join(sorted(RULES))}")
    alphas = [1.0] * len(chosen) if weights is None else [float(w) for w in weights]
    if len(alphas) != len(chosen):
        raise ValueError(f"merge: {len(alphas)} weights for {len(chosen)} deltas")
    for j, alpha in enumerate(alphas):
        if not abs(alpha) <= torch.finfo(torch.float32).max:
            raise ValueError(f"merge: weights[{j}] must be a finite fp32 number, got {alpha}")
    if heads is not None and not any(heads is d for d in chosen):
        raise ValueError("merge: heads is not among the deltas")
    for j, delta in enumerate(chosen):
        if delta.kind != "diff":
            raise SFTError(
                f"merge: deltas[{j}] is of kind {delta.kind!r}: it replaces values and cannot be "
                "added"
            )
    union = union_layout("merge", chosen)
    order = sorted(range(len(chosen)), key=lambda j: chosen[j].content_id)
    device = chosen[0].device
    supports = [chosen[j].support.expand(union).to(device) for j in order]
    idx, ptr, val = RULES[rule](
        union.lengths.to(device),
        [s.idx for s in supports],
        [s.ptr for s in supports],
        [chosen[j].val.to(device) for j in order],
        [alphas[j] for j in order],
    )
    sources = [{"id": chosen[j].content_id, "alpha": alphas[j]} for j in order]
    meta = {
        **_common(chosen, union),
        "recipe": {"method": f"merge:{rule}", "merged_from": sources},
    }
    return SparseDelta(
        Support(union, idx, ptr, check=False),
        val,
        heads=dict(heads.heads) if heads is not None else None,
        meta=meta,
    )


def given(op: str, deltas: SparseDelta | Iterable[SparseDelta]) -> list[SparseDelta]:
    """The deltas as a list.

    Raises:
        ValueError: There are none.
        TypeError: One is something else.
    """
    chosen = [deltas] if isinstance(deltas, SparseDelta) else list(deltas)
    if not chosen:
        raise ValueError(f"{op}: no deltas given")
    for j, delta in enumerate(chosen):
        if not isinstance(delta, SparseDelta):
            raise TypeError(f"{op}: deltas[{j}] must be a SparseDelta, got {type(delta).__name__}")
    return chosen


def _common(deltas: Sequence[SparseDelta], union: Layout) -> dict[str, Any]:
    """What the metadata of all deltas say about their base model: its names, not its digest, which
    belongs to one support."""
    bases = [dict(delta.meta.get("base", {})) for delta in deltas]
    base = {
        key: value
        for key, value in bases[0].items()
        if not key.startswith("digest") and all(other.get(key) == value for other in bases)
    }
    aliases: dict[str, list[str]] = {}
    dtypes: dict[str, str] = {}
    for delta in deltas:
        dtypes |= delta.meta.get("dtypes", {})
        for name, others in delta.meta.get("aliases", {}).items():
            aliases[name] = sorted({*aliases.get(name, []), *others})
            if twice := [other for other in others if other in union]:
                raise SFTError(
                    f"merge: {name!r} and {twice[0]!r} are one tied tensor, and the deltas name it "
                    "differently; make them from models that name it alike"
                )
    return {"base": base, "aliases": aliases, "dtypes": dtypes}


def union_layout(op: str, deltas: Sequence[SparseDelta]) -> Layout:
    """The tensors of all deltas together.

    Raises:
        SFTError: Two of them disagree about a shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for j, delta in enumerate(deltas):
        for name, shape in zip(delta.layout.names, delta.layout.shapes, strict=True):
            if shapes.setdefault(name, shape) != shape:
                raise SFTError(
                    f"{op}: {name!r} has shape {shapes[name]} in an earlier delta and {shape} in "
                    f"deltas[{j}]; "
                    "they belong to different base models"
                )
    return Layout.of(shapes)
