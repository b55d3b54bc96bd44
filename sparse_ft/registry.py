"""DeltaRegistry: many sparse fine-tunings of one base model, and swapping from set to set."""

from __future__ import annotations

import difflib
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .compose import (
    Applied,
    Carrier,
    Group,
    Head,
    Kind,
    Part,
    active,
    by_kind,
    canonical_order,
    cast_head,
    check_alpha,
    one_of_each,
    placed,
)
from .delta import Binding, KeyMap, SFTError, SparseDelta, check_apart, overlapping
from .families import named_parameters, unusable
from .hub import located
from .tiles import Layout

__all__ = ["DeltaRegistry"]

# What `activate` takes: an id, a pair (id, α), or several of them.
Chosen = str | tuple[str, float] | Iterable[str | tuple[str, float]]


@dataclass(frozen=True)
class _Placed:
    """A delta over the tiles of a registry's model, in one tier.

    Attributes:
        parts: Its entries per kind of weights.
        heads: The model's name of each head → its value, in the data type of the model.
        uploaded: Per device, the end of the copies to it.
    """

    parts: Mapping[Kind, Part]
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    uploaded: Mapping[torch.device, torch.cuda.Event] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes in the memory of its tier: what a device's tier shares with the host is the
        host's."""
        arrays = [*(a for part in self.parts.values() for a in part), *self.heads.values()]
        return sum(a.numel() * a.element_size() for a in arrays if a.is_cuda or not self.uploaded)


@dataclass(eq=False)
class _Entry:
    """A delta that was verified, wherever it is now.

    Attributes:
        path: Its file, or None for a delta that came as an object.
        names: Per kind of weights, the delta's names of tensors → the model's.
        heads: The same for its heads; none where the model has no place for them.
        headless: Why it has none.
        asked: The key_map and the `unused` that it was added with.
        verified: Its digest was that of the base.
        loading: Held while the file is read or the delta uploaded, so that it happens once.
    """

    content_id: str
    path: str | None
    names: Mapping[Kind, Mapping[str, str]]
    heads: Mapping[str, str]
    headless: str
    asked: tuple[KeyMap | None, str]
    verified: bool = False
    loading: threading.RLock = field(default_factory=threading.RLock)


class _Tier:
    """Deltas in one kind of memory, the least recently used first."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.nbytes = 0
        self._placed: OrderedDict[str, _Placed] = OrderedDict()

    def __len__(self) -> int:
        return len(self._placed)

    def get(self, key: str) -> _Placed | None:
        if key in self._placed:
            self._placed.move_to_end(key)
        return self._placed.get(key)

    def put(self, key: str, value: _Placed) -> None:
        self.drop(key)
        self._placed[key] = value
        self.nbytes += value.nbytes

    def drop(self, key: str) -> None:
        if (value := self._placed.pop(key, None)) is not None:
            self.nbytes -= value.nbytes

    def trim(self, stay: Container[str]) -> None:
        for key in list(self._placed):
            if self.budget is None or self.nbytes <= self.budget:
                return
            if key not in stay:
                self.drop(key)

    def __str__(self) -> str:
        of = "" if self.budget is None else f" of {_size(self.budget)}"
        return f"{len(self)} ({_size(self.nbytes)}{of})"


class _Turn:
    """A reentrant lock that any thread may release: a generator can be closed in another thread
    than the one that began it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner is not threading.current_thread():
            self._lock.acquire()
            self._owner = threading.current_thread()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()


class DeltaRegistry:
    """Many sparse fine-tunings of one base model, of which any weighted set can be on it.

    A delta is verified when it is added: it fits the model, and its digest is that of the base.
    It stays in the memory of its model's device, behind that in host memory, and behind that in its
    file, from where it is read and verified again; the least recently used one makes room. What is
    on the model stays in any case, and so does, in host memory, a delta that came as an object: it
    has no file. A model on the CPU has no device tier.

    `activate` swaps from the set that is on the model to another in one call, to the bits of
    `compose` on the base model. It may be called from several threads; to run a model with a set,
    take `active(…)`, which keeps the other threads waiting until the block is left. The model must
    stay on its device, in its data type, and its parameters where they are.

    `len`, `in` and iteration are over ids.

    Args:
        model: The base model, with nothing on it.
        budget_bytes: Bytes of deltas to keep in the memory of the model's devices; default: all of
            them.
        host_budget_bytes: Bytes of deltas to keep in host memory, pinned for a model on CUDA;
            default: all of them. For a model on the CPU both are one, and the smaller holds.

    Raises:
        RuntimeError: Something is on the model.
        ValueError: A budget is negative.
    """

    # `_turn` is held by whoever decides what is on the model, for a whole `with` block; `_lock` for
    # moments, while the tables below or the weights change. Order: _turn, a loading, _lock.

    def __init__(
        self,
        model: nn.Module,
        budget_bytes: int | None = None,
        host_budget_bytes: int | None = None,
    ) -> None:
        parameters = named_parameters(model)
        kinds: dict[Kind, dict[str, Tensor]] = {}
        for name, parameter in parameters.items():
            if unusable(parameter) is None and parameter.numel():
                kinds.setdefault((parameter.device, parameter.dtype), {})[name] = parameter.detach()
        self._cuda = sorted({d for d, _ in kinds if d.type == "cuda"}, key=str)
        for name, budget in (
            ("budget_bytes", budget_bytes),
            ("host_budget_bytes", host_budget_bytes),
        ):
            if budget is not None and budget < 0:
                raise ValueError(f"DeltaRegistry: {name} must be ≥ 0 or None, got {budget}")
        if not self._cuda:
            # The model's memory is the host's: the narrower budget holds.
            given = [b for b in (budget_bytes, host_budget_bytes) if b is not None]
            budget_bytes, host_budget_bytes = None, min(given, default=None)
        if (other := active(model)) is not None:
            raise RuntimeError(f"DeltaRegistry: {other!r} is on this model; restore it first")
        self._model = model
        self._parameters = parameters
        self._names = {id(p): name for name, p in parameters.items()}
        self._carrier = Carrier(model)
        self._shares_memory = bool(overlapping(list(parameters.items())))
        self._sites = {
            kind: (layout := Layout.of(tensors), [tensors[name] for name in layout.names])
            for kind, tensors in kinds.items()
        }
        self._device = _Tier(budget_bytes)
        self._host = _Tier(host_budget_bytes)
        self._entries: dict[str, _Entry] = {}
        self._by_content: dict[str, _Entry] = {}
        self._by_path: dict[str, _Entry] = {}
        self._turn = _Turn()
        self._lock = threading.RLock()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._loader: ThreadPoolExecutor | None = None
        self._on: _Active | None = None
        # What the blocks that are open will bring back.
        self._beneath: list[_Active] = []

    # --- what is in it --------------------------------------------------------------------------

    def add(
        self,
        source: SparseDelta | str | os.PathLike[str],
        id: str | None = None,
        *,
        key_map: KeyMap | None = None,
        unused: str = "error",
        allow_base_mismatch: bool = False,
    ) -> str:
        """Verifies a delta and makes it known. A file that is known already is not opened again.

        Args:
            source: A delta, or what `SparseDelta.load` takes.
            id: What to call it; default: its content id. A delta may have several ids.
            key_map: As in `compose`, as are the next two.
            unused: As in `compose`.
            allow_base_mismatch: As in `compose`.

        Returns:
            The id.

        Raises:
            SFTError: The delta or its file is malformed, or does not fit the model; or the model
                was moved.
            ValueError: The id means another delta, or the delta is known under another key_map.
            TypeError: The id is no string.
        """
        if id is not None and not isinstance(id, str):
            raise TypeError(f"DeltaRegistry.add: an id must be a string, got {id!r}")
        asked = (dict(key_map) if isinstance(key_map, Mapping) else key_map, unused)
        path = None
        if isinstance(source, SparseDelta):
            delta = source
        else:
            path = os.path.realpath(located(source))
            with self._lock:
                known = self._by_path.get(path)
                if (
                    known is not None
                    and known.asked == asked
                    and (known.verified or allow_base_mismatch)
                ):
                    return self._call(known, id)
            delta = SparseDelta.load(path)
        if delta.kind != "diff":
            raise SFTError(
                f"DeltaRegistry.add: a delta of kind {delta.kind!r} replaces values and cannot be "
                "added"
            )
        self._check_model()
        binding = delta.bind(self._model, key_map=key_map, unused=unused, allow_base_mismatch=True)
        entry = self._bound(binding, path, asked)
        with self._lock:
            known = self._known(entry)
            if not allow_base_mismatch and not known.verified:
                binding.check_base(self._pristine_at if self._now is not None else None)
                known.verified = True
            if known is not entry:
                return self._call(known, id, path)
        value = self._place(entry, delta)
        with self._lock:
            known = self._known(entry)
            id = self._call(known, id, path)
            self._by_content[entry.content_id] = known
            self._keep(self._host, known, value)
            return id

    def remove(self, id: str) -> None:
        """Forgets an id, and the delta with its last id.

        Raises:
            KeyError: There is no such id.
            RuntimeError: The delta is on the model, or an open block will bring it back.
        """
        with self._turn, self._lock:
            entry = self._entry(id)
            last = sum(other is entry for other in self._entries.values()) == 1
            if last and self._now is not None and entry.content_id in self._now.ids:
                raise RuntimeError(
                    f"DeltaRegistry.remove: {id!r} is on the model; activate another set, or "
                    "deactivate, first"
                )
            if last and any(entry.content_id in beneath.ids for beneath in self._beneath):
                raise RuntimeError(
                    f"DeltaRegistry.remove: {id!r} comes back when an open block of active() or "
                    "grouped() is left; leave it first"
                )
            del self._entries[id]
            if last:
                del self._by_content[entry.content_id]
                self._by_path = {p: e for p, e in self._by_path.items() if e is not entry}
                self._host.drop(entry.content_id)
                self._device.drop(entry.content_id)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, in the order in which they were added."""
        return tuple(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: object) -> bool:
        return id in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __repr__(self) -> str:
        with self._lock:
            device = f", on the device {self._device}" if self._cuda else ""
            now = self._now
            on = ", ".join(f"{i} × {a:g}" for i, a in now.chosen) if now is not None else "none"
            return (
                f"DeltaRegistry({type(self._model).__name__}, {len(self._by_content)} deltas"
                f"{device}, in host memory {self._host}, active: {on})"
            )

    # --- swapping -------------------------------------------------------------------------------

    def activate(self, deltas: Chosen, heads: str | Iterable[str] = ()) -> Applied:
        """Swaps from what is on the model to a weighted set of deltas: w = round(θ0 + Σ α·φ).

        The bits are those of `compose` on the base model. Where the set is on already, nothing is
        done. A failure before the first write (an unknown id, a file that is gone or was changed,
        no memory) leaves what was on the model; one during the writes leaves the base model.

        Args:
            deltas: An id, a pair (id, α), or several of them; α is 1 where it is not given. An
                empty list is the base model.
            heads: The ids, of those given, whose heads are to be put on the model as well.

        Returns:
            What is on the model: says how many entries changed, and how many were swallowed.

        Raises:
            KeyError: There is no such id.
            SFTError: A delta cannot be loaded again, or the model was moved or has replaced a
                parameter.
            RuntimeError: Something else is on the model, or the writes failed.
        """
        with self._turn:
            chosen, whole = _pairs(deltas), [heads] if isinstance(heads, str) else list(heads)
            return self._activate(chosen, whole)

    def deactivate(self) -> None:
        """Writes the base model back, bit for bit; of a model that was moved or cast, what the base
        model is after the same move.

        Raises:
            SFTError: As `Composition.restore`, where the model has replaced a parameter.
        """
        with self._turn:
            self._deactivate()

    @contextmanager
    def active(self, deltas: Chosen, heads: str | Iterable[str] = ()) -> Iterator[Applied]:
        """`activate` for a block, and back to what was on the model before; other threads that want
        to activate wait.

        Args:
            deltas: As in `activate`.
            heads: As in `activate`.

        Raises:
            SFTError: What was on the model cannot come back; it is the base model then. An
                exception of the block comes first, with a warning.
        """
        with self._block():
            yield self.activate(deltas, heads)

    def grouped(
        self, batch_ids: Iterable[Chosen | None], heads: str | Iterable[str] = ()
    ) -> Iterator[tuple[Chosen | None, Tensor]]:
        """Activates, one after the other, the sets that the items of a batch need.

            for deltas, rows in registry.grouped(batch_ids):
                out[rows] = model(x[rows])

        The set that is on the model comes first, then the others as they appear. Afterwards, and
        when the loop is left, the model is as before. Other threads that want to activate wait.

        Args:
            batch_ids: For each item, what `activate` takes; None for the base model.
            heads: Ids whose heads are put on with each set that contains them.

        Yields:
            The set, as its first item names it, and the positions of its items (int64, ascending).
        """
        whole = [heads] if isinstance(heads, str) else list(heads)
        groups: dict[tuple[Any, ...], tuple[Chosen | None, list[int]]] = {}
        with self._block() as before:
            sets: dict[tuple[Any, ...], tuple[list[tuple[str, float]], list[str]]] = {}
            for position, item in enumerate(batch_ids):
                chosen = [] if item is None else _pairs(item)
                with_heads = [h for h in whole if any(h == i for i, _ in chosen)]
                key = self._key(chosen, with_heads)
                sets.setdefault(key, (chosen, with_heads))
                groups.setdefault(key, (item, []))[1].append(position)
            first = before.key if before is not None else ((), ())
            for key in sorted(groups, key=lambda key: key != first):
                self._activate(*sets[key])
                item, positions = groups[key]
                yield item, torch.tensor(positions)

    def prefetch(self, ids: str | Iterable[str]) -> list[Future[None]]:
        """Brings deltas into the memory of the model's device, in the background.

        Args:
            ids: The ones that will be needed soon.

        Returns:
            One future per id; it has the exception of a load that failed, which `activate` would
            raise as well.

        Raises:
            KeyError: There is no such id.
        """
        with self._lock:
            entries = [self._entry(i) for i in ([ids] if isinstance(ids, str) else list(ids))]
            if self._loader is None:
                self._loader = ThreadPoolExecutor(1, "sparse_ft.prefetch")
            return [self._loader.submit(self._fetch, entry) for entry in entries]

    # --- inside ---------------------------------------------------------------------------------

    @property
    def _now(self) -> _Active | None:
        """What this registry has on the model."""
        return self._on if self._on is not None and self._on.is_on else None

    def _entry(self, id: str) -> _Entry:
        try:
            return self._entries[id]
        except KeyError:
            near = difflib.get_close_matches(str(id), self._entries, 1)
            like = f"; the nearest is {near[0]!r}" if near else ""
            raise KeyError(
                f"DeltaRegistry: no delta {id!r} among the {len(self._entries)} ids{like}; add it "
                "first"
            ) from None

    def _known(self, entry: _Entry) -> _Entry:
        """What the content of an entry is known as: that entry, where it is new."""
        known = self._by_content.get(entry.content_id, entry)
        if (known.names, known.heads) != (entry.names, entry.heads):
            raise ValueError(
                f"DeltaRegistry.add: the delta {_short(entry.content_id)} is registered under "
                "another key_map; remove it first"
            )
        return known

    def _call(self, entry: _Entry, id: str | None, path: str | None = None) -> str:
        id = entry.content_id if id is None else id
        if self._entries.setdefault(id, entry) is not entry:
            raise ValueError(
                f"DeltaRegistry.add: {id!r} is the delta {_short(self._entries[id].content_id)}; "
                f"remove it first, or give {_short(entry.content_id)} another id"
            )
        if path is not None:
            self._by_path[path] = entry
            entry.path = entry.path or path
        return id

    def _bound(
        self, binding: Binding, path: str | None, asked: tuple[KeyMap | None, str]
    ) -> _Entry:
        for own, parameter in zip(binding.names, binding.tensors, strict=True):
            self._name_of(own, parameter)
        names = {
            kind: {own: name for own, (name, _) in tensors.items()}
            for kind, tensors in by_kind(binding, self._names).items()
        }
        heads: dict[str, str] = {}
        headless = ""
        try:
            for own, parameter in binding.heads:
                cast_head(own, binding.delta.heads[own], parameter.dtype)
            heads = {own: self._name_of(own, parameter) for own, parameter in binding.heads}
        except SFTError as error:
            headless = str(error)
        return _Entry(binding.delta.content_id, path, names, heads, headless, asked)

    def _name_of(self, own: str, parameter: Tensor) -> str:
        if id(parameter) not in self._names:
            raise SFTError(
                f"DeltaRegistry.add: the model's parameter for {own!r} is newer than the registry; "
                "make another registry"
            )
        return self._names[id(parameter)]

    def _pristine_at(self, parameter: Tensor, positions: Tensor) -> Tensor:
        """Values of the base model, while something is on the model."""
        assert self._on is not None
        values = parameter.detach().reshape(-1)[positions]
        return self._on.pristine_at(self._names[id(parameter)], positions, values)

    def _place(self, entry: _Entry, delta: SparseDelta) -> _Placed:
        delta = delta.to("cpu")
        parts = {}
        for kind, names in entry.names.items():
            part = placed(delta, names, self._sites[kind][0], torch.device("cpu"))
            parts[kind] = Part(*map(_pinned, part)) if kind[0].type == "cuda" else part
        heads = {}
        for own, name in entry.heads.items():
            parameter = self._parameters[name]
            value = cast_head(own, delta.heads[own], parameter.dtype)
            heads[name] = _pinned(value) if parameter.is_cuda else value
        return _Placed(parts, heads)

    def _keep(self, tier: _Tier, entry: _Entry, value: _Placed) -> None:
        # A delta that was removed meanwhile, and maybe added under another key_map, is another.
        if self._by_content.get(entry.content_id) is entry:
            tier.put(entry.content_id, value)
            self._trim()

    def _in_host(self, entry: _Entry) -> _Placed:
        """The delta in host memory, read from its file where it is not there."""
        with entry.loading:
            with self._lock:
                value = self._host.get(entry.content_id)
            if value is None:
                if entry.path is None:
                    raise KeyError(
                        f"DeltaRegistry: the delta {_short(entry.content_id)} was removed meanwhile"
                    )
                delta = SparseDelta.load(entry.path)
                if delta.content_id != entry.content_id:
                    raise SFTError(
                        f"DeltaRegistry: {entry.path} holds the delta {_short(delta.content_id)} "
                        f"now, and {_short(entry.content_id)} when it was added; remove the id "
                        "and add the file again"
                    )
                value = self._place(entry, delta)
                with self._lock:
                    self._keep(self._host, entry, value)
            return value

    def _near(self, entry: _Entry) -> _Placed:
        """The delta in the memory of the model's devices."""
        if not self._cuda:
            return self._in_host(entry)
        with entry.loading:
            with self._lock:
                value = self._device.get(entry.content_id)
            if value is None:
                value = self._upload(self._in_host(entry))
                with self._lock:
                    self._keep(self._device, entry, value)
            return value

    def _upload(self, host: _Placed) -> _Placed:
        parts, heads, uploaded = dict(host.parts), dict(host.heads), {}
        for device in self._cuda:
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            with torch.cuda.stream(stream):
                for kind, part in host.parts.items():
                    if kind[0] == device:
                        parts[kind] = Part(*(a.to(device, non_blocking=True) for a in part))
                for name, value in host.heads.items():
                    if self._parameters[name].device == device:
                        heads[name] = value.to(device, non_blocking=True)
                uploaded[device] = stream.record_event()
        return _Placed(parts, heads, uploaded)

    def _fetch(self, entry: _Entry) -> None:
        self._near(entry)

    def _trim(self) -> None:
        sets = self._beneath if self._now is None else [self._now, *self._beneath]
        stay = {content_id for applied in sets for content_id in applied.ids}
        self._device.trim(stay)
        if self._cuda:
            stay = set()
        self._host.trim(stay | {c for c, e in self._by_content.items() if e.path is None})

    def _check_model(self) -> None:
        if self._carrier.intact:
            return
        lost = self._carrier.lost()
        if changed := [*lost, *self._carrier.moved()]:
            name = changed[0]
            what = "is another one" if lost else "is at another address"
            raise SFTError(
                f"DeltaRegistry: the parameter {name!r} {what} than when the registry was made; "
                "deactivate, bring the model to its final state, device and data type, and make "
                "another registry then"
            )

    def _key(self, chosen: Sequence[tuple[str, float]], heads: Sequence[str]) -> tuple[Any, ...]:
        """Equal for sets that give the same bits."""
        terms = sorted((self._entry(i).content_id, alpha) for i, alpha in chosen if alpha)
        return tuple(terms), tuple(sorted({self._entry(i).content_id for i in heads}))

    @contextmanager
    def _block(self) -> Iterator[_Active | None]:
        """Holds the turn, and brings back in the end what was on the model at first."""
        with self._turn:
            before = self._now
            if before is not None:
                self._beneath.append(before)
            error: BaseException | None = None
            try:
                yield before
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._return_to(before, error)

    def _return_to(self, before: _Active | None, error: BaseException | None) -> None:
        if before is not None:
            self._beneath.remove(before)
        try:
            try:
                if before is None:
                    self._deactivate()
                elif not before.is_on:
                    # Its arrays and heads are still there, whatever became of ids and files.
                    self._put_on(before)
            except Exception:
                self._deactivate()
                raise
        except Exception as failure:
            if error is None or isinstance(error, GeneratorExit):
                raise
            # What the block raised comes first.
            warnings.warn(str(failure), stacklevel=4)

    def _deactivate(self) -> None:
        with self._lock:
            try:
                if self._now is not None:
                    Applied.restore(self._now)
            finally:
                self._on = self._now
                self._trim()

    def _activate(self, chosen: Sequence[tuple[str, float]], heads: Sequence[str]) -> _Active:
        terms = [(self._entry(i), alpha) for i, alpha in chosen]
        with_heads = [self._entry(i) for i in heads]
        self._check(chosen, heads, terms, with_heads)
        key = self._key(chosen, heads)
        if not terms:
            self._deactivate()
            return _Active(self, (), (), key, [], [])
        now = self._now
        if now is not None and now.key == key:
            self._check_model()
            return now
        needed = [*(entry for entry, alpha in terms if alpha), *with_heads]
        values = {entry: self._near(entry) for entry in dict.fromkeys(needed)}
        for value in values.values():
            _wait_for(value)
        groups = [Group(layout, weights) for layout, weights in self._sites.values()]
        ids = [entry.content_id for entry, _ in terms]
        for j in canonical_order(ids, [alpha for _, alpha in terms]):
            entry, alpha = terms[j]
            if alpha:
                for kind, group in zip(self._sites, groups, strict=True):
                    if kind in values[entry].parts:
                        group.add(values[entry].parts[kind], alpha)
        whole = [
            Head(name, self._parameters[name].detach(), value)
            for entry in dict.fromkeys(with_heads)
            for name, value in values[entry].heads.items()
        ]
        new = _Active(self, chosen, terms, key, groups, whole)
        self._put_on(new)
        with self._lock:
            # One of many may have been evicted while the others were loaded.
            for entry, value in values.items():
                self._keep(self._device if self._cuda else self._host, entry, value)
        return new

    def _put_on(self, new: _Active) -> None:
        with self._lock:
            now = self._now
            if now is None and (other := active(self._model)) is not None:
                raise RuntimeError(
                    f"DeltaRegistry: {other!r} is on this model and not of this registry; restore "
                    "it first"
                )
            self._check_model()
            try:
                new._put_on(now)
            except Exception as error:
                if now is None or active(self._model) is not None:
                    raise
                raise RuntimeError(
                    "DeltaRegistry: the weights could not be written; the model is the base model "
                    "again, bit for bit"
                ) from error
            finally:
                if new.is_on:
                    self._on = new
                self._trim()

    def _check(
        self,
        chosen: Sequence[tuple[str, float]],
        heads: Sequence[str],
        terms: Sequence[tuple[_Entry, float]],
        with_heads: Sequence[_Entry],
    ) -> None:
        for id, alpha in chosen:
            check_alpha(f"DeltaRegistry: the weight of {id!r}", alpha)
        for id, entry in zip(heads, with_heads, strict=True):
            if not any(entry is other for other, _ in terms):
                raise ValueError(
                    f"DeltaRegistry: heads names {id!r}, which is not among the deltas"
                )
            if entry.headless:
                raise SFTError(entry.headless)
        one_of_each(
            "DeltaRegistry", ((e.content_id, n) for e in with_heads for n in e.heads.values())
        )
        if self._shares_memory:
            names = {n for e, _ in terms for own in e.names.values() for n in own.values()}
            names.update(n for e in with_heads for n in e.heads.values())
            check_apart([(n, self._parameters[n]) for n in names], "DeltaRegistry", "SFTs")


class _Active(Applied):
    """What a registry has on its model, and how to ask for it again."""

    def __init__(
        self,
        registry: DeltaRegistry,
        chosen: Sequence[tuple[str, float]],
        terms: Sequence[tuple[_Entry, float]],
        key: tuple[Any, ...],
        groups: list[Group],
        on_top: list[Head],
    ) -> None:
        ids = [entry.content_id for entry, _ in terms]
        super().__init__(registry._carrier, ids, [alpha for _, alpha in terms], groups, on_top)
        self.chosen = chosen
        self.key = key
        # Weakly, as the model: what is on it must not keep it alive.
        self._registry = weakref.ref(registry)

    def restore(self) -> None:
        """As `DeltaRegistry.deactivate`, while this is on the model."""
        if (registry := self._registry()) is None:
            super().restore()
            return
        with registry._turn:
            if self.is_on:
                registry._deactivate()


def _pairs(deltas: Chosen) -> list[tuple[str, float]]:
    """Ids with their weights, of all that `activate` takes."""
    if isinstance(deltas, str):
        return [(deltas, 1.0)]
    items: list[Any] = list(deltas)
    if _is_pair(items):
        return [(items[0], float(items[1]))]
    pairs = []
    for item in items:
        if isinstance(item, str):
            pairs.append((item, 1.0))
        elif _is_pair(item):
            pairs.append((item[0], float(item[1])))
        else:
            raise TypeError(f"DeltaRegistry: a delta is an id or a pair (id, weight), got {item!r}")
    return pairs


def _is_pair(item: Any) -> bool:
    # A number may be numpy's, which is no float.
    return (
        isinstance(item, Sequence)
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], Real)
    )


def _pinned(array: Tensor) -> Tensor:
    # torch pins no uint16.
    if array.dtype is torch.uint16:
        return array.view(torch.int16).pin_memory().view(torch.uint16)
    return array.pin_memory()


def _wait_for(value: _Placed) -> None:
    """Lets the current streams use what another stream uploaded."""
    for device, event in value.uploaded.items():
        torch.cuda.current_stream(device).wait_event(event)


def _short(content_id: str) -> str:
    return f"{content_id[:12]}…"


def _size(n: int) -> str:
    for unit, width in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= width:
            return f"{n / width:.1f} {unit}"
    return f"{n} B"
