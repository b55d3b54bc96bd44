"""compose: θ0 + Σ α·φ on a model in place, rounded once, and taken off again to the last bit."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from sparse_ft_kernels import compose_, restore_

from .delta import SFTError, SparseDelta
from .families import named_parameters
from .tiles import Layout, Support

__all__ = ["Composition", "active", "compose"]

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, Composition] = weakref.WeakKeyDictionary()


def active(model: nn.Module) -> Composition | None:
    """The composition that is on a model now, if any."""
    return _ACTIVE.get(model)


@dataclass
class _Group:
    """The part of a composition that one call of the kernel applies: one device, one data type."""

    names: tuple[str, ...]
    weights: list[Tensor]
    idx: list[Tensor]
    ptr: list[Tensor]
    val: list[Tensor]
    alphas: list[float]
    undo: list[Tensor]
    applied: bool = False


@dataclass
class _Head:
    """A parameter of the model that a composition overwrites whole."""

    name: str
    parameter: Tensor
    value: Tensor
    before: Tensor


class Composition:
    """Sparse fine-tunings that are on a model, until `restore()` takes them off.

    A context manager: leaving the block restores the model, also after an exception.

    Attributes:
        deltas: The deltas, in the order given.
        weights: Their weights.
        changed: Distinct entries that a sum other than 0 was added to.
        swallowed: Of those, entries whose weight stayed the same, since the sum was below half its
            last place.
    """

    def __init__(
        self,
        model: nn.Module,
        deltas: Sequence[SparseDelta],
        weights: Sequence[float],
        heads: Sequence[SparseDelta],
        compat: str | None,
        allow_base_mismatch: bool,
    ) -> None:
        self.deltas = tuple(deltas)
        self.weights = tuple(weights)
        self.changed = 0
        self.swallowed = 0
        self._model = weakref.ref(model)
        bindings = [delta.bind(model, allow_base_mismatch=allow_base_mismatch) for delta in deltas]
        # Canonical order: the same bits whatever the order of the list.
        order = list(range(len(deltas)))
        if compat is None:
            order.sort(key=lambda j: deltas[j].content_id)
        names = {id(p): name for name, p in named_parameters(model).items()}
        parts: dict[tuple[torch.device, torch.dtype], list[tuple[int, list[str]]]] = {}
        tensors: dict[str, Tensor] = {}
        for j in order:
            kinds: dict[tuple[torch.device, torch.dtype], list[str]] = {}
            for own, tensor in zip(deltas[j].layout.names, bindings[j].tensors, strict=True):
                tensors[names[id(tensor)]] = tensor
                if tensor.numel():
                    kinds.setdefault((tensor.device, tensor.dtype), []).append(own)
            for kind, own_names in kinds.items():
                parts.setdefault(kind, []).append((j, own_names))
        to_model = [
            {own: names[id(t)] for own, t in zip(d.layout.names, b.tensors, strict=True)}
            for d, b in zip(deltas, bindings, strict=True)
        ]
        self._groups = [
            _make_group(kind[0], members, deltas, weights, to_model, tensors)
            for kind, members in parts.items()
        ]
        if compat == "sequential":
            self._groups = [step for group in self._groups for step in _one_by_one(group)]
        by_delta = {id(d): b for d, b in zip(deltas, bindings, strict=True)}
        self._heads: list[_Head] = []
        for delta in heads:
            for own, parameter in by_delta[id(delta)].heads:
                value = delta.heads[own].to(parameter.device, parameter.dtype)
                name = names[id(parameter)]
                self._heads.append(_Head(name, parameter, value, parameter.detach().clone()))
        self._apply(model)

    @torch.no_grad()
    def _apply(self, model: nn.Module) -> None:
        _ACTIVE[model] = self
        try:
            for group in self._groups:
                stats = compose_(
                    group.weights, group.idx, group.ptr, group.val, group.alphas, group.undo
                )
                group.applied = True
                self.changed += int(stats[0])
                self.swallowed += int(stats[1])
            for head in self._heads:
                head.parameter.copy_(head.value)
        except BaseException:
            for group in self._groups:
                # An interruption may come before the op or after it. The op writes its whole log
                # before the first weight, so a log with a gap says that no weight was written.
                group.applied |= not any(bool(log.isnan().any()) for log in group.undo)
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Writes every changed value back, bit for bit. A second call does nothing."""
        model = self._model()
        if model is None or _ACTIVE.get(model) is not self:
            return
        for group in reversed(self._groups):
            if group.applied:
                restore_(group.weights, group.idx, group.ptr, group.undo)
                group.applied = False
        for head in self._heads:
            head.parameter.copy_(head.before)
        del _ACTIVE[model]

    @torch.no_grad()
    def pristine(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What tensors of the model would hold without this composition.

        Args:
            values: Names of the model's parameters → their values while the composition is on.

        Returns:
            Copies, with the values from before the composition at its entries and heads.
        """
        out = {name: value.detach().clone() for name, value in values.items()}
        for group in reversed(self._groups):
            weights = [
                out.get(name, weight).to(weight.device) if name in out else weight.clone()
                for name, weight in zip(group.names, group.weights, strict=True)
            ]
            restore_(weights, group.idx, group.ptr, group.undo)
            out |= {n: w for n, w in zip(group.names, weights, strict=True) if n in out}
        for head in self._heads:
            if head.name in out:
                out[head.name].copy_(head.before)
        return out

    @property
    def swallowed_share(self) -> float:
        """Share of the changed entries whose weight swallowed the change."""
        return self.swallowed / self.changed if self.changed else 0.0

    def __enter__(self) -> Composition:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        model = self._model()
        state = "on" if model is not None and _ACTIVE.get(model) is self else "taken off"
        return (
            f"Composition({len(self.deltas)} deltas, {self.changed:,} entries changed, "
            f"{self.swallowed_share:.2%} swallowed, {state})"
        )


def _make_group(
    device: torch.device,
    members: list[tuple[int, list[str]]],
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    to_model: list[dict[str, str]],
    tensors: dict[str, Tensor],
) -> _Group:
    union = Layout.of(
        {
            to_model[j][own]: tensors[to_model[j][own]]
            for j, own_names in members
            for own in own_names
        }
    )
    group = _Group(
        union.names, [tensors[name].detach() for name in union.names], [], [], [], [], []
    )
    dtype = group.weights[0].dtype
    for j, own_names in members:
        delta = deltas[j]
        support, val = _renamed(delta, own_names, to_model[j])
        support = support.expand(union).to(device)
        group.idx.append(support.idx)
        group.ptr.append(support.ptr)
        group.val.append(val.to(device))
        group.alphas.append(float(weights[j]))
        group.undo.append(torch.full((support.nnz,), torch.nan, dtype=dtype, device=device))
    return group


def _renamed(
    delta: SparseDelta, own_names: list[str], to_model: dict[str, str]
) -> tuple[Support, Tensor]:
    """A delta's entries of some tensors, under the model's names and in their order."""
    support, val = delta.support, delta.val
    target = sorted(own_names, key=lambda own: to_model[own])
    if len(own_names) < len(support.layout) or target != list(support.layout.names):
        val = torch.cat([val[:0], *(val[support.entries_of(own)] for own in target)])
    layout = Layout.of(
        {to_model[own]: support.layout.shapes[support.layout.ordinal(own)] for own in own_names}
    )
    if target == list(support.layout.names):
        return Support(layout, support.idx, support.ptr, check=False), val
    idx = torch.cat(
        [
            support.idx[:0].view(torch.int16),
            *(support.idx[support.entries_of(o)].view(torch.int16) for o in target),
        ]
    )
    counts = torch.cat(
        [
            torch.diff(
                support.ptr[support.layout.tiles_of(o).start : support.layout.tiles_of(o).stop + 1]
            )
            for o in target
        ]
    )
    ptr = torch.zeros(layout.n_tiles + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=ptr[1:])
    return Support(layout, idx.view(torch.uint16), ptr, check=False), val


def _one_by_one(group: _Group) -> list[_Group]:
    return [
        _Group(group.names, group.weights, [i], [p], [v], [a], [u])
        for i, p, v, a, u in zip(
            group.idx, group.ptr, group.val, group.alphas, group.undo, strict=True
        )
    ]


def compose(
    model: nn.Module,
    deltas: SparseDelta | Iterable[SparseDelta],
    weights: Sequence[float] | None = None,
    *,
    heads: SparseDelta | Iterable[SparseDelta] = (),
    compat: str | None = None,
    allow_base_mismatch: bool = False,
) -> Composition:
    """Puts sparse fine-tunings on a model, in place: w = round(θ0 + Σ α·φ).

    The sum is formed in fp32 in an order that does not depend on the order of the list, and rounded
    once to the data type of the weights. Everything is checked before the first write; addresses of
    parameters do not change.

    Args:
        model: The base model. It must carry no other composition.
        deltas: Deltas made for this base model (each checks that by its digest).
        weights: One finite α for each; default 1. Negative values subtract.
        heads: The deltas, of those given, whose fully tuned tensors are to be put on the model as
            well, as a task's classifier must be.
        compat: "sequential" adds one delta after the other in the order given, each rounded, as the
            LT-SFT reference implementation does.
        allow_base_mismatch: Apply even where the digest says that the base model is another one.

    Returns:
        A `Composition`: a context manager, and a handle with `restore()`.

    Raises:
        SFTError: A delta does not fit the model; the message names delta and parameter. The model
            is untouched.
        RuntimeError: Another composition is on the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compose: model must be a torch.nn.Module, got {type(model).__name__}")
    chosen = [deltas] if isinstance(deltas, SparseDelta) else list(deltas)
    for j, delta in enumerate(chosen):
        if not isinstance(delta, SparseDelta):
            raise TypeError(
                f"compose: deltas[{j}] must be a SparseDelta, got {type(delta).__name__}"
            )
    alphas = [1.0] * len(chosen) if weights is None else [float(w) for w in weights]
    if len(alphas) != len(chosen):
        raise ValueError(f"compose: {len(alphas)} weights for {len(chosen)} deltas")
    for j, alpha in enumerate(alphas):
        if not abs(alpha) <= torch.finfo(torch.float32).max:
            raise ValueError(f"compose: weights[{j}] must be a finite fp32 number, got {alpha}")
    with_heads = [heads] if isinstance(heads, SparseDelta) else list(heads)
    for delta in with_heads:
        if not any(delta is d for d in chosen):
            raise ValueError("compose: heads names a delta that is not among the deltas")
    seen: dict[str, int] = {}
    for delta in with_heads:
        for name in delta.heads:
            if name in seen:
                raise ValueError(
                    f"compose: two deltas of heads bring the head {name!r}; name one of them"
                )
            seen[name] = 1
    if compat not in (None, "sequential"):
        raise ValueError(f'compose: compat must be None or "sequential", got {compat!r}')
    if (other := active(model)) is not None:
        raise RuntimeError(
            f"compose: {other!r} is on this model already; restore it first, or pass all deltas "
            "in one call"
        )
    for delta in chosen:
        if delta.kind != "diff":
            raise SFTError(
                f"compose: a delta of kind {delta.kind!r} replaces values and cannot be added"
            )
    return Composition(model, chosen, alphas, with_heads, compat, allow_base_mismatch)
