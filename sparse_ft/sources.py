"""MultiSource: batches of several source languages in one stream, each with its own SFT on the
model.

A task is learnt on top of a source language's SFT. With several sources, each batch holds examples
of one of them, and that one's SFT is on the model while the batch is run forward and backward
(Ansell et al., ACL 2022, reference implementation). It is off again before the optimizer steps, so
the weights, the moments and the distance from θ0 never contain it.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from .delta import SparseDelta
from .families import named_parameters
from .kept import random_state_kept
from .registry import DeltaRegistry

__all__ = ["MultiSource", "source_of", "sources_on"]


class MultiSource(IterableDataset[Any]):
    """One re-iterable of the batches of all sources, shuffled together.

    Every item is a batch of one source, as that source's loader gives it. `sparse_ft.Loop` takes a
    MultiSource for its batches; a loop of your own puts a batch's SFT on itself:

        for batch in sources:
            with sources.active(model, batch):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        batches: Source → its batches: a DataLoader, or any re-iterable with a length.
        deltas: Source → the SFT to learn on; a source without one (None, or not named) is learnt on
            the bare model.
        repeat: Source → how many passes over its batches one pass over all of them holds, to give
            a small source more weight. Default: 1 each.
        seed: Pass e over all is drawn from seed + e: the order of the sources, and what their
            loaders draw when a pass over them begins, the order of the examples above all.

    Raises:
        ValueError: There is no source, one has no batches, a name is unknown, or a number of passes
            is below 1.
        TypeError: An SFT is no SparseDelta, or batches have no length.
    """

    def __init__(
        self,
        batches: Mapping[str, Collection[Any]],
        deltas: Mapping[str, SparseDelta | None] | None = None,
        repeat: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        if not batches:
            raise ValueError("MultiSource: no sources given")
        self.batches = dict(batches)
        self.repeat = dict.fromkeys(self.batches, 1) | dict(repeat or {})
        self.seed = seed
        self.epoch = 0
        check_sources("MultiSource", self.batches, deltas or {}, repeat or {})
        for source, loader in self.batches.items():
            try:
                count = len(loader)
            except TypeError:
                raise TypeError(
                    f"MultiSource: the batches of the source {source!r} have no length, and the "
                    "order of the sources is drawn from their lengths; give its data a __len__"
                ) from None
            if not count:
                raise ValueError(f"MultiSource: the source {source!r} has no batches")
        self.deltas = {s: delta for s, delta in (deltas or {}).items() if delta is not None}
        self._registry: DeltaRegistry | None = None
        self._bound: weakref.ref[nn.Parameter] | None = None

    def __len__(self) -> int:
        return sum(len(loader) * self.repeat[source] for source, loader in self.batches.items())

    @property
    def settings(self) -> dict[str, Any]:
        """What decides what the batches do, as JSON values: a run goes on with the same alone."""
        ids = {source: delta.content_id for source, delta in self.deltas.items()}
        return {
            "sources": {
                source: {
                    "batches": len(loader),
                    "repeat": self.repeat[source],
                    "sft": ids.get(source),
                }
                for source, loader in self.batches.items()
            },
            "seed": self.seed,
        }

    @property
    def trained_on(self) -> list[dict[str, Any]]:
        """The SFTs below what is learnt, for its metadata."""
        return trained_on(self.deltas.values())

    def set_epoch(self, epoch: int) -> None:
        """Says which pass comes next; without it they are counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = [
            source
            for source, loader in self.batches.items()
            for _ in range(len(loader) * self.repeat[source])
        ]
        generator = torch.Generator().manual_seed(self.seed + epoch)
        drawn = torch.randperm(len(order), generator=generator).tolist()
        streams = {}
        for source, passes in self.repeat.items():
            seeds = torch.randint(1 << 31, (passes,), generator=generator).tolist()
            streams[source] = self._stream(source, epoch, seeds)
        for i in drawn:
            yield _named(next(streams[order[i]]), order[i])

    def _stream(self, source: str, epoch: int, seeds: list[int]) -> Iterator[Any]:
        loader = self.batches[source]
        for i, seed in enumerate(seeds):
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch * len(seeds) + i)
            # A pass begins in mid-training: its order must not hang on what was drawn before.
            with random_state_kept():
                _seed(loader, seed)
                batches = iter(loader)
                first = list(islice(batches, 1))
            yield from first
            yield from batches
        raise RuntimeError(
            f"MultiSource: the source {source!r} gave fewer batches than the {len(loader)} that "
            "its length says"
        )

    def bind(self, model: nn.Module, theta0: Mapping[str, Tensor] | None = None) -> None:
        """Checks that every SFT fits a model and was made for its start; `active` does so the first
        time if nobody did.

        Args:
            model: The model that will be trained, with nothing composed on it.
            theta0: Its start, by name of parameter, where its weights have moved since.

        Raises:
            SFTError: An SFT does not fit, or was made for another base model.
            RuntimeError: A composition is on the model.
        """
        anchor = next(model.parameters(), None)
        if self.deltas and (self._bound is None or self._bound() is not anchor):
            self._registry = sources_on(model, self.deltas, theta0)
            self._bound = weakref.ref(anchor) if anchor is not None else None

    def active(self, model: nn.Module, batch: Any) -> AbstractContextManager[None]:
        """Has the SFT of a batch's source on the model for a block, and takes it off again, bit for
        bit, also after an exception.

        Run forward and backward inside, and step the optimizer outside.

        Args:
            model: The model that is trained, or a wrapper of it.
            batch: An item of this stream, as it was given.

        Raises:
            ValueError: The batch does not say its source.
            SFTError, RuntimeError: As `bind`.
        """
        return self.on(model, source_of(batch))

    @contextmanager
    def on(self, model: nn.Module, source: str) -> Iterator[None]:
        """`active` by the name of the source: to evaluate on it, say."""
        if source not in self.batches:
            raise ValueError(
                f"MultiSource: there is no source {source!r}; there are {_listed(self.batches)}"
            )
        # For a bare source too: the weights are the start's before the first step alone.
        self.bind(model)
        if source not in self.deltas:
            yield
            return
        assert self._registry is not None
        with self._registry.active(source):
            yield

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{source}: {len(loader)} × {self.repeat[source]}"
            + ("" if source in self.deltas else " (bare)")
            for source, loader in self.batches.items()
        )
        return f"MultiSource({parts})"


def sources_on(
    model: nn.Module,
    deltas: Mapping[str, SparseDelta],
    theta0: Mapping[str, Tensor] | None = None,
) -> DeltaRegistry:
    """A registry of sources' SFTs that were checked against the model's start, by their sources.

    From then on the model may be trained: what is on it is taken off bit for bit, whatever its
    weights have become.

    Args:
        model: The model, with nothing composed on it.
        deltas: Source → SFT.
        theta0: The model's start, by name of parameter; default: its weights now.

    Raises:
        SFTError: An SFT does not fit, or was made for another base model.
        RuntimeError: A composition is on the model.
    """
    registry = DeltaRegistry(model)
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}

    def at_start(parameter: Tensor, positions: Tensor) -> Tensor:
        assert theta0 is not None
        start = theta0[names[id(parameter)]].detach().reshape(-1)
        return start[positions.to(start.device)]

    for source, delta in deltas.items():
        if theta0 is not None:
            delta.bind(model, allow_base_mismatch=True).check_base(at_start)
        registry.add(delta, source, allow_base_mismatch=theta0 is not None)
    return registry


def trained_on(deltas: Iterable[SparseDelta]) -> list[dict[str, Any]]:
    """The field `trained_on` of an SFT's metadata, for sources that it was learnt on in turn."""
    ids = dict.fromkeys(delta.content_id for delta in deltas)
    return [{"id": content_id, "alpha": 1.0} for content_id in ids]


def check_sources(
    what: str,
    sources: Collection[str],
    deltas: Mapping[str, SparseDelta | None],
    repeat: Mapping[str, int],
) -> None:
    """Refuses SFTs and numbers of passes that belong to no source, or are none.

    Raises:
        ValueError: A source is unknown, or a number of passes is below 1.
        TypeError: An SFT is no SparseDelta.
    """
    for where, given in (("deltas", deltas), ("repeat", repeat)):
        for source in given:
            if source not in sources:
                raise ValueError(
                    f"{what}: {where} names the source {source!r}; there are {_listed(sources)}"
                )
    for source, delta in deltas.items():
        if delta is not None and not isinstance(delta, SparseDelta):
            raise TypeError(
                f"{what}: deltas[{source!r}] must be a SparseDelta or None, got {delta!r}; "
                "SparseDelta.load reads a file"
            )
    for source, passes in repeat.items():
        if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
            raise ValueError(f"{what}: repeat[{source!r}] must be an integer ≥ 1, got {passes!r}")


def _seed(loader: Any, seed: int) -> None:
    """Seeds what a loader may draw its order from; not CUDA's generators, which it does not."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (what samplers of others draw from)
    generators = [getattr(o, "generator", None) for o in (loader, getattr(loader, "sampler", None))]
    for generator in (torch.default_generator, *generators):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)


class _Dict(dict[Any, Any]):
    source: str


class _List(list[Any]):
    source: str


class _Tuple(tuple[Any, ...]):
    source: str


# What batches are made of mostly, and takes no attribute.
_NAMED: dict[type, Any] = {dict: _Dict, list: _List, tuple: _Tuple}


def _named(batch: Any, source: str) -> Any:
    """The batch, which says its source from now on."""
    batch = _NAMED.get(type(batch), lambda same: same)(batch)
    try:
        batch.source = source
    except AttributeError:
        raise TypeError(
            f"MultiSource: a batch of {source!r} is a {type(batch).__name__}, which takes no "
            "attribute; let its loader give a dict, a list, a tuple or a tensor"
        ) from None
    return batch


def source_of(batch: Any) -> str:
    """The source of a batch that a `MultiSource` gave.

    Raises:
        ValueError: It came from elsewhere, or was copied.
    """
    source = getattr(batch, "source", None)
    if not isinstance(source, str):
        raise ValueError(
            f"MultiSource: this {type(batch).__name__} does not say its source; pass the batch as "
            "the MultiSource gave it, before it is moved or rebuilt"
        )
    return source


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
