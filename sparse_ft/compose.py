"""compose: θ0 + Σ α·φ on a model in place, rounded once, and taken off again to the last bit."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sparse_ft_kernels import compose_, restore_, swap_

from .delta import Binding, KeyMap, SFTError, SparseDelta, check_apart
from .families import named_parameters, unusable
from .tiles import Layout, Support

__all__ = ["Applied", "Composition", "active", "compose"]

# What one call of a kernel works on: the weights of one device and data type.
Kind = tuple[torch.device, torch.dtype]

# Parameter → what it belongs to, while something is on it.
_ACTIVE: WeakIdKeyDictionary = WeakIdKeyDictionary()

# An entry of a log that nothing was written to yet: a NaN that no arithmetic gives.
_UNWRITTEN = {
    torch.float32: (torch.int32, 0x7FA5A5A5),
    torch.bfloat16: (torch.int16, 0x7FA5),
    torch.float16: (torch.int16, 0x7DA5),
}


def active(model: nn.Module) -> Applied | None:
    """What is on a model now, if anything is: on it, a part of it, or a module that wraps it."""
    if _ACTIVE:
        for parameter in model.parameters():
            carrier: Carrier | None = _ACTIVE.get(parameter)
            if carrier is not None and carrier.on is not None:
                return carrier.on
    return None


class Carrier:
    """The parameters of a model, and what is on them.

    They are held weakly: what is on a model neither keeps it alive nor ends with a module that
    only wraps it.

    Attributes:
        kind: The class of the model, for messages.
        on: What is on the parameters now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kind = type(model).__name__
        self.on: Applied | None = None
        self._model = weakref.ref(model)
        parameters = named_parameters(model)
        self._refs = {name: weakref.ref(p) for name, p in parameters.items()}
        self._places = {
            name: (p.data_ptr(), p.shape) for name, p in parameters.items() if unusable(p) is None
        }
        self._children = [
            (weakref.ref(module), key, weakref.ref(child))
            for module in model.modules()
            for key, child in module._modules.items()
            if child is not None
        ]
        self._own = [
            (weakref.ref(module), key, weakref.ref(p), p.data_ptr())
            for module in model.modules()
            for key, p in module._parameters.items()
            if p is not None and unusable(p) is None
        ]

    def __contains__(self, name: str) -> bool:
        return name in self._refs

    def carry(self, applied: Applied | None) -> None:
        if (self.on is None) != (applied is None):
            for ref in self._refs.values():
                if (parameter := ref()) is not None and applied is None:
                    _ACTIVE.pop(parameter, None)
                elif parameter is not None:
                    _ACTIVE[parameter] = self
        self.on = applied

    @property
    def intact(self) -> bool:
        """Whether every module and parameter is where it was at the beginning, as most are: several
        times faster than `moved` and `lost`, which say what is not."""
        try:
            return all(
                module()._modules[key] is child()  # type: ignore[union-attr]
                for module, key, child in self._children
            ) and all(
                module()._parameters[key] is (p := ref()) and p.data_ptr() == address  # type: ignore[union-attr]
                for module, key, ref, address in self._own
            )
        except (AttributeError, KeyError):  # it is gone
            return False

    def moved(self) -> dict[str, Tensor]:
        """The parameters that are at another address than at the beginning: those of a model that
        was moved or cast.

        Whoever asks holds the memory at the old addresses, so that nothing else can be there.
        """
        if self.intact:
            return {}
        return {
            name: parameter.detach()
            for name, (address, shape) in self._places.items()
            if (parameter := self._refs[name]()) is not None
            and parameter.data_ptr() != address
            and parameter.shape == shape
        }

    def lost(self) -> list[str]:
        """Names whose parameters the model has replaced, or has in another shape; a model that is
        gone has none."""
        if self.intact or (model := self._model()) is None:
            return []
        inside = {id(parameter) for parameter in model.parameters()}
        return [
            name
            for name, (_, shape) in self._places.items()
            if (parameter := self._refs[name]()) is None
            or id(parameter) not in inside
            or parameter.shape != shape
        ]


class Part(NamedTuple):
    """Entries of a delta, over the tiles of some layout."""

    idx: Tensor
    ptr: Tensor
    val: Tensor


@dataclass
class Group:
    """Weighted deltas on the weights of one device and data type, as one call of a kernel has them.

    Attributes:
        layout: The weights, by their names in the model.
        undo: Per delta, the weights at its entries from before; made by `prepare`.
        logged: All of the undo is written, as is known without looking.
        stats: What the kernel counted, on its device.
    """

    layout: Layout
    weights: list[Tensor]
    idx: list[Tensor] = field(default_factory=list)
    ptr: list[Tensor] = field(default_factory=list)
    val: list[Tensor] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    undo: list[Tensor] = field(default_factory=list)
    logged: bool = False
    stats: Tensor | None = None

    def add(self, part: Part, alpha: float) -> None:
        # What is multiplied by 0 changes no bit.
        if alpha:
            for values, value in zip((self.idx, self.ptr, self.val), part, strict=True):
                values.append(value)
            self.alphas.append(alpha)

    def prepare(self) -> None:
        integer, unwritten = _UNWRITTEN[self.weights[0].dtype]
        self.logged = False
        self.undo = [
            torch.full((len(i),), unwritten, dtype=integer, device=i.device).view(
                self.weights[0].dtype
            )
            for i in self.idx
        ]

    def put_on(self, old: Group | None) -> None:
        new = (self.idx, self.ptr, self.val, self.alphas, self.undo)
        _used(*self.idx, *self.ptr, *self.val, *self.undo)
        if old is not None and old.idx:
            _used(*old.idx, *old.ptr, *old.undo)
            self.stats = swap_(self.weights, old.idx, old.ptr, old.undo, *new)
        elif self.idx:
            self.stats = compose_(self.weights, *new)
        self.logged = True

    def take_off(self, moved: Mapping[str, Tensor]) -> None:
        # A library's call runs to its end; torch's, which Ctrl-C can stop half way, writes the
        # whole log first. So a log with a gap says that no weight was written.
        if not self.idx or not (self.logged or all(_written(log) for log in self.undo)):
            return
        _used(*self.idx, *self.ptr, *self.undo)
        restore_(self.weights, self.idx, self.ptr, self.undo)
        for name in moved.keys() & set(self.layout.names):
            whole = moved[name].contiguous()
            for idx, ptr, undo in zip(self.idx, self.ptr, self.undo, strict=True):
                support = Support(self.layout, idx, ptr, check=False)
                log = undo[support.entries_of(name)]
                at = support.indices(name).to(whole.device)
                whole.view(-1)[at] = log.to(whole.device, whole.dtype)
            moved[name].copy_(whole)

    @property
    def names(self) -> set[str]:
        """Names of the weights that have entries."""
        supports = (
            Support(self.layout, idx, ptr, check=False)
            for idx, ptr in zip(self.idx, self.ptr, strict=True)
        )
        return {name for support in supports for name, n in support.counts().items() if n}


def _written(log: Tensor) -> bool:
    integer, unwritten = _UNWRITTEN[log.dtype]
    return not bool((log.view(integer) == unwritten).any())


def _used(*arrays: Tensor) -> None:
    """Keeps the memory of CUDA arrays from being used again before the current stream is done with
    them."""
    for array in arrays:
        if array.is_cuda:
            array.record_stream(torch.cuda.current_stream(array.device))


@dataclass
class Head:
    """A parameter of the model that is overwritten whole.

    Attributes:
        name: The model's name of it.
        weight: Its memory.
        value: What is written, in its data type and on its device.
        before: What was there.
    """

    name: str
    weight: Tensor
    value: Tensor
    before: Tensor | None = None

    def prepare(self) -> None:
        self.before = None

    def put_on(self) -> None:
        _used(self.value)
        self.before = self.weight.clone()
        self.weight.copy_(self.value)

    def take_off(self, moved: Mapping[str, Tensor]) -> None:
        if self.before is not None:
            _used(self.before)
            self.weight.copy_(self.before)
            if self.name in moved:
                moved[self.name].copy_(self.before)

    @property
    def names(self) -> set[str]:
        return {self.name}


Self = TypeVar("Self", bound="Applied")


class Applied:
    """What is on a model, until `restore()` takes it off.

    A context manager: leaving the block restores the model, also after an exception.

    Attributes:
        ids: The content ids of the deltas.
        weights: Their weights.
    """

    def __init__(
        self,
        carrier: Carrier,
        ids: Sequence[str],
        weights: Sequence[float],
        groups: list[Group],
        heads: list[Head],
    ) -> None:
        self.ids = tuple(ids)
        self.weights = tuple(weights)
        self._carrier = carrier
        self._groups = groups
        self._heads = heads
        # What is to be taken off, the last first: a head's log holds what the groups have written.
        self._parts: list[Group | Head] = [*groups, *heads]

    @torch.no_grad()
    def _put_on(self, previous: Applied | None = None) -> None:
        """Writes the model, which carries nothing, or `previous` over groups of the same weights.

        A failure leaves the base model, bit for bit; where even that fails, this stays on it, with
        its logs.
        """
        if self.is_on:
            raise RuntimeError(f"{self!r} is on this model already")
        for part in self._parts:
            part.prepare()
        own = self._parts
        before: Sequence[Group | None] = [None] * len(self._groups)
        if previous is not None:
            before = previous._groups
            self._parts = [*previous._parts, *own]
        try:
            self._carrier.carry(self)
            if previous is not None:
                for head in previous._heads:
                    head.take_off({})
            for group, old in zip(self._groups, before, strict=True):
                group.put_on(old)
            for head in self._heads:
                head.put_on()
        except BaseException as error:
            try:
                self._write_back()
            except BaseException as second:
                raise RuntimeError(
                    "the weights could not be written, nor all of them written back "
                    f"({second}); the {self._carrier.kind} is not the base model any more: load it "
                    "again"
                ) from error
            self._parts = own
            self._carrier.carry(None)
            raise
        self._parts = own

    def _write_back(self) -> None:
        moved = self._carrier.moved()
        failure: BaseException | None = None
        for part in reversed(self._parts):
            try:
                part.take_off(moved)
            except BaseException as error:
                failure = failure or error
        if failure is not None:
            raise failure

    @torch.no_grad()
    def restore(self) -> None:
        """Writes every changed value back, bit for bit. A second call does nothing.

        A model that was moved or cast since becomes what the base model is after the same move.

        Raises:
            SFTError: The model has replaced a parameter that this was on. It keeps what it has
                there; all others are restored.
            Exception: A parameter could not be written. All others are restored; this stays on the
                model, and can be restored again.
        """
        if not self.is_on:
            return
        lost = self._carrier.lost()
        if lost:
            written = set().union(*(part.names for part in self._parts))
            lost = [name for name in lost if name in written]
        self._write_back()
        self._carrier.carry(None)
        if lost:
            raise SFTError(
                f"the {self._carrier.kind} has replaced parameters while SFTs were on it: "
                f"{', '.join(map(repr, lost[:3]))}{', …' if len(lost) > 3 else ''}. They keep what "
                "they hold; all others are restored. Restore before load_state_dict(assign=True), "
                "and before modules are replaced"
            )

    @torch.no_grad()
    def pristine(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What tensors of the model would hold without this.

        Args:
            values: Names of the model's parameters → their values while this is on.

        Returns:
            Copies, with the values from before at the entries and heads.

        Raises:
            KeyError: A name is none of the model that this was put on.
        """
        for name in values:
            if name not in self._carrier:
                raise KeyError(
                    f"{type(self).__name__}.pristine: the {self._carrier.kind} has no parameter "
                    f"{name!r}; names are those of the module that this was put on"
                )
        out = {name: value.detach().clone() for name, value in values.items()}
        for head in reversed(self._heads):
            if head.name in out and head.before is not None:
                out[head.name].copy_(head.before)
        for group in reversed(self._groups):
            weights = [
                out.get(name, weight).to(weight.device) if name in out else weight.clone()
                for name, weight in zip(group.layout.names, group.weights, strict=True)
            ]
            restore_(weights, group.idx, group.ptr, group.undo)
            out |= {n: w for n, w in zip(group.layout.names, weights, strict=True) if n in out}
        return out

    @torch.no_grad()
    def pristine_at(self, name: str, positions: Tensor, values: Tensor) -> Tensor:
        """What one tensor of the model would hold at some places without this.

        Args:
            name: The parameter's name.
            positions: int64, flat positions, on the parameter's device.
            values: What the parameter holds there now.
        """
        for head in reversed(self._heads):
            if head.name == name and head.before is not None:
                values = head.before.reshape(-1)[positions]
        for group in reversed(self._groups):
            if name not in group.layout:
                continue
            for idx, ptr, undo in zip(group.idx, group.ptr, group.undo, strict=True):
                support = Support(group.layout, idx, ptr, check=False)
                if len(own := support.indices(name)):
                    at = torch.searchsorted(own, positions).clamp_(max=len(own) - 1)
                    log = undo[support.entries_of(name)]
                    values = torch.where(own[at] == positions, log[at], values)
        return values

    @property
    def is_on(self) -> bool:
        """Whether the model still carries this."""
        return self._carrier.on is self

    @property
    def changed(self) -> int:
        """Distinct entries that a sum other than 0 was added to; with compat="sequential", counted
        for each delta, since each is added on its own."""
        return sum(int(group.stats[0]) for group in self._groups if group.stats is not None)

    @property
    def swallowed(self) -> int:
        """Of those, entries whose weight stayed the same, since the sum was below half its last
        place."""
        return sum(int(group.stats[1]) for group in self._groups if group.stats is not None)

    @property
    def swallowed_share(self) -> float:
        """Share of the changed entries whose weight swallowed the change."""
        return self.swallowed / self.changed if self.changed else 0.0

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.restore()
        except Exception as failure:
            # What the block raised comes first.
            if error is None:
                raise
            warnings.warn(str(failure), stacklevel=2)

    def __repr__(self) -> str:
        state = "on" if self.is_on else "taken off"
        return (
            f"{type(self).__name__}({len(self.ids)} deltas, {self.changed:,} entries changed, "
            f"{self.swallowed_share:.2%} swallowed, {state})"
        )


class Composition(Applied):
    """Sparse fine-tunings that `compose` put on a model, until `restore()` takes them off.

    A context manager: leaving the block restores the model, also after an exception.

    Attributes:
        deltas: The deltas, in the order given.
        weights: Their weights.
    """

    def __init__(
        self,
        model: nn.Module,
        bindings: Sequence[Binding],
        weights: Sequence[float],
        heads: Sequence[SparseDelta],
        compat: str | None,
    ) -> None:
        self.deltas = tuple(binding.delta for binding in bindings)
        ids = [delta.content_id for delta in self.deltas]
        order = canonical_order(ids, weights) if compat is None else list(range(len(ids)))
        names = {id(p): name for name, p in named_parameters(model).items()}
        by_delta = {id(binding.delta): binding for binding in bindings}
        whole = [by_delta[id(delta)] for delta in heads]
        written = {id(p): p for binding in bindings for p in binding.tensors}
        written |= {id(p): p for binding in whole for _, p in binding.heads}
        check_apart([(names[i], p) for i, p in written.items()], "compose", "SFTs")
        on_top = [head for binding in whole for head in heads_of(binding, names)]
        one_of_each(
            "compose", ((b.delta.content_id, names[id(p)]) for b in whole for _, p in b.heads)
        )
        members: dict[Kind, list[tuple[int, dict[str, str]]]] = {}
        tensors: dict[Kind, dict[str, Tensor]] = {}
        for j in order:
            for kind, own in by_kind(bindings[j], names).items():
                members.setdefault(kind, []).append((j, {o: n for o, (n, _) in own.items()}))
                tensors.setdefault(kind, {}).update(own.values())
        groups = []
        for kind, chosen in members.items():
            union = Layout.of(tensors[kind])
            targets = [tensors[kind][name].detach() for name in union.names]
            group = Group(union, targets)
            for j, own_names in chosen:
                if compat == "sequential":
                    group = Group(union, targets)
                group.add(placed(self.deltas[j], own_names, union, kind[0]), float(weights[j]))
                if compat == "sequential":
                    groups.append(group)
            if compat is None:
                groups.append(group)
        super().__init__(Carrier(model), ids, weights, groups, on_top)


def by_kind(
    binding: Binding, names: Mapping[int, str]
) -> dict[Kind, dict[str, tuple[str, Tensor]]]:
    """Per kind of weights, the delta's names of tensors that have elements → the model's name and
    parameter.

    Args:
        binding: Where the delta's tensors are.
        names: `id` of a parameter → its name in the model.
    """
    found: dict[Kind, dict[str, tuple[str, Tensor]]] = {}
    for own, tensor in zip(binding.names, binding.tensors, strict=True):
        if tensor.numel():
            kind = (tensor.device, tensor.dtype)
            found.setdefault(kind, {})[own] = (names[id(tensor)], tensor)
    return found


def heads_of(binding: Binding, names: Mapping[int, str]) -> list[Head]:
    """A delta's heads, in the data type of the model's parameters and on their devices."""
    return [
        Head(
            names[id(parameter)],
            parameter.detach(),
            cast_head(own, binding.delta.heads[own], parameter.dtype).to(parameter.device),
        )
        for own, parameter in binding.heads
    ]


def cast_head(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A head in the data type of the model's parameter.

    Raises:
        SFTError: A value is too large for it.
    """
    cast = value.to(dtype)
    if cast.dtype != value.dtype and not torch.isfinite(cast).all():
        raise SFTError(
            f"SparseDelta: the head {name!r} holds values up to {value.abs().max().item():g}, too "
            f"large for the model's {dtype}; load the model in float32 or bfloat16"
        )
    return cast


def one_of_each(what: str, heads: Iterable[tuple[str, str]]) -> None:
    """Refuses two deltas for one head.

    Args:
        what: Begins the message.
        heads: Pairs of a delta's content id and the model's name of a head.
    """
    owner: dict[str, str] = {}
    for content_id, name in heads:
        if owner.setdefault(name, content_id) != content_id:
            raise ValueError(
                f"{what}: two deltas of heads bring the head {name!r}; name one of them"
            )


def given(op: str, deltas: SparseDelta | Iterable[SparseDelta]) -> list[SparseDelta]:
    """The deltas as a list.

    Raises:
        TypeError: One is something else.
    """
    if isinstance(deltas, (str, os.PathLike)):
        raise TypeError(
            f"{op}: deltas must be SparseDeltas, got {deltas!r}; pass SparseDelta.load of it"
        )
    chosen = [deltas] if isinstance(deltas, SparseDelta) else list(deltas)
    for j, delta in enumerate(chosen):
        if not isinstance(delta, SparseDelta):
            raise TypeError(
                f"{op}: deltas[{j}] must be a SparseDelta, got {type(delta).__name__}; "
                "SparseDelta.load reads a file"
            )
    return chosen


def weighed(
    op: str, deltas: list[SparseDelta], weights: Sequence[float] | None
) -> tuple[list[SparseDelta], list[float]]:
    """The deltas, which can be added, and the weight of each.

    Raises:
        SFTError: A delta is no difference.
        TypeError: `weights` is no list.
        ValueError: There are more or fewer weights than deltas, or one is no finite fp32 number.
    """
    if weights is not None and not isinstance(weights, Iterable):
        raise TypeError(
            f"{op}: weights must be a list of one number for each delta, got {weights!r}"
        )
    alphas = [1.0] * len(deltas) if weights is None else [float(w) for w in weights]
    if len(alphas) != len(deltas):
        raise ValueError(f"{op}: {len(alphas)} weights for {len(deltas)} deltas")
    for j, (delta, alpha) in enumerate(zip(deltas, alphas, strict=True)):
        check_alpha(f"{op}: weights[{j}]", alpha)
        if delta.kind != "diff":
            raise SFTError(
                f"{op}: deltas[{j}] is of kind {delta.kind!r}: it replaces values and cannot be "
                "added"
            )
    return deltas, alphas


def among(
    op: str, heads: SparseDelta | Iterable[SparseDelta], deltas: Sequence[SparseDelta]
) -> list[SparseDelta]:
    """The deltas whose heads are wanted, as a list.

    Raises:
        ValueError: One is not among the deltas.
    """
    wanted = [heads] if isinstance(heads, SparseDelta) else list(heads)
    for delta in wanted:
        if not any(delta is d for d in deltas):
            raise ValueError(f"{op}: heads names a delta that is not among the deltas")
    return wanted


def canonical_order(ids: Sequence[str], alphas: Sequence[float]) -> list[int]:
    """The order in which weighted deltas are added: the same bits whatever the order of a list."""
    return sorted(range(len(ids)), key=lambda j: (ids[j], alphas[j]))


def check_alpha(what: str, alpha: float) -> None:
    """Refuses a weight that is no finite fp32 number."""
    if not abs(alpha) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{what} must be a finite fp32 number, got {alpha}")


def placed(
    delta: SparseDelta, names: Mapping[str, str], layout: Layout, device: torch.device
) -> Part:
    """A delta's entries of some tensors, over the tiles of a layout.

    Args:
        delta: Its arrays are shared where the order of entries and the device stay.
        names: The delta's name of each of the tensors → its name in the layout.
        layout: These tensors, and maybe others.
        device: Where the arrays are wanted.
    """
    support = delta.support
    ptr = support.ptr.cpu().numpy()
    counts = np.zeros(layout.n_tiles, np.int64)
    runs = []
    for own in sorted(names, key=names.__getitem__):
        tiles = support.layout.tiles_of(own)
        counts[layout.tiles_of(names[own])] = np.diff(ptr[tiles.start : tiles.stop + 1])
        runs.append(support.entries_of(own))
    runs = [run for run in runs if run.stop > run.start]
    new_ptr = torch.from_numpy(np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))
    idx, val = support.idx, delta.val
    if int(new_ptr[-1]) < support.nnz or any(a.stop != b.start for a, b in pairwise(runs)):
        bits = idx.view(torch.int16)
        idx = torch.cat([bits[:0], *(bits[run] for run in runs)]).view(torch.uint16)
        val = torch.cat([val[:0], *(val[run] for run in runs)])
    return Part(idx.to(device), new_ptr.to(device), val.to(device))


def compose(
    model: nn.Module,
    deltas: SparseDelta | Iterable[SparseDelta],
    weights: Sequence[float] | None = None,
    *,
    heads: SparseDelta | Iterable[SparseDelta] = (),
    compat: str | None = None,
    key_map: KeyMap | None = None,
    unused: str = "error",
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
        key_map: From the deltas' names of tensors to the model's: a callable, or a mapping of names
            and of prefixes that end in ".", such as {"bert.": "roberta."}. What `torch.compile` and
            `DataParallel` put before names needs none.
        unused: What to do about names that the model lacks: "error", or "ignore", which leaves
            their entries out with a warning. As the digest of the base cannot be checked without
            them, that takes allow_base_mismatch=True too.
        allow_base_mismatch: Apply even where the digest says that the base model is another one.

    Returns:
        A `Composition`: a context manager, and a handle with `restore()`.

    Raises:
        SFTError: A delta does not fit the model; the message names delta and parameter. The model
            is untouched.
        RuntimeError: Another composition, or a registry's, is on the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compose: model must be a torch.nn.Module, got {type(model).__name__}")
    chosen, alphas = weighed("compose", given("compose", deltas), weights)
    with_heads = among("compose", heads, chosen)
    if compat not in (None, "sequential"):
        raise ValueError(f'compose: compat must be None or "sequential", got {compat!r}')
    if (other := active(model)) is not None:
        raise RuntimeError(
            f"compose: {other!r} is on this model already; restore it first, or pass all deltas "
            "in one call"
        )
    bindings = [
        delta.bind(model, key_map=key_map, unused=unused, allow_base_mismatch=allow_base_mismatch)
        for delta in chosen
    ]
    composition = Composition(model, bindings, alphas, with_heads, compat)
    composition._put_on()
    return composition
