"""LotteryTicket: both phases of LT-SFT around any training function.

Full tuning finds the entries that move most; everything is rewound; sparse tuning of those entries
alone gives φ (Ansell et al., ACL 2022, algorithm 1). With a folder, the state goes to disk as
training proceeds, and a run that was killed continues to the same bits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_ft_kernels import digest, hash_pieces

from .compose import Applied, active
from .criteria import Criterion, Score, as_criterion
from .delta import SparseDelta
from .families import aliases, named_parameters, unusable
from .files import FILE_NAME
from .kept import modes_kept, random_state, set_random_state
from .metadata import checked_meta
from .phases import Learnt, Phase, Shared, TrainingDiverged, cloned, entries, write
from .runs import Run
from .select import Eligible, Entries, _union, eligible_parameters, resolve_k, select
from .snapshot import Snapshot
from .tiles import Layout, Support

__all__ = ["LotteryTicket", "Phase", "TrainingDiverged"]


class LotteryTicket:
    """Lottery-ticket sparse fine-tuning of one model.

    Entries are selected among the *eligible* parameters. A trainable parameter that is not eligible
    is a *head*: tuned in full in both phases, from the same values, and stored with the result.
    Freeze what must not move (`sparse_ft.freeze_norms`, `sparse_ft.decouple_output_embeddings`)
    before the ticket is made.

    With n iterations, each selects K // n more entries (the last one the rest) among those not yet
    selected, by |θ − θ0| after a full phase that starts from the sparse values learnt so far, and
    then tunes all entries selected so far. θ0 is always the start of `fit`, as in the reference
    implementation. Heads start afresh in each phase, from the same values, as the paper has it; in
    the reference implementation they go on, from the second iteration on, from the phase before.

    Args:
        model: Any module. Where a composition is on it (a source language's SFT, say), that is the
            start: φ does not contain it, and the result records that it was trained on it.
        k: Entries to select.
        density: Their share of the eligible entries instead.
        iterations: n, ≥ 1.
        l1: λ of the term λ/N · Σ|θ − θ0| (the paper: 0.1 for languages, 0 for tasks); a pair gives
            the full and the sparse phase their own.
        l1_numel: N: the elements of "all" parameters (as the reference implementation counts), of
            the "trainable" or the "eligible" ones, or a number.
        l1_heads: Whether that sum holds the heads too, as in the reference implementation.
        eligible: `(name, parameter) -> bool`, or names; default: the trainable parameters of the
            backbone.
        criterion: As in `sparse_ft.select`. One that needs no training ("random", a given mask)
            skips the full phase; one that fixes its entries needs no k, and has one iteration.
        exclude, include, tie, fill: As in `sparse_ft.select`.
        seed: For "random".
        eps: Entries of the result with |φ| ≤ eps are dropped, if eps > 0 (the reference
            implementation: 1e-7).
        snapshot_device: Where to keep the start's values, for instance "cpu"; an L1 term reads them
            from there in each step of the full phase.

    Raises:
        ValueError: Nothing is eligible, a parameter is unusable, or a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        k: int | None = None,
        density: float | None = None,
        iterations: int = 1,
        l1: float | tuple[float, float] = 0.0,
        l1_numel: str | int = "all",
        l1_heads: bool = True,
        eligible: Eligible = None,
        criterion: str | Criterion | Score = "magnitude",
        exclude: Entries = None,
        include: Entries = None,
        seed: int = 0,
        tie: str = "index",
        fill: bool = False,
        eps: float = 0.0,
        snapshot_device: torch.device | str | None = None,
    ) -> None:
        pair = tuple(map(_plain, l1 if isinstance(l1, (tuple, list)) else (l1, l1)))
        iterations, seed, eps = _plain(iterations), _plain(seed), _plain(eps)
        l1_numel = _plain(l1_numel)
        if len(pair) != 2 or not all(0 <= value < float("inf") for value in pair):
            raise ValueError(
                "LotteryTicket: l1 must not be negative; give a number, or a pair (full, sparse), "
                f"got {l1}"
            )
        self.model = model
        chosen = eligible_parameters(model, eligible)
        parameters = named_parameters(model)
        for name, parameter in parameters.items():
            if name in chosen and not parameter.requires_grad:
                raise ValueError(
                    f"LotteryTicket: {name!r} is eligible but frozen; set requires_grad on it, or "
                    "narrow eligible"
                )
            if (name in chosen or parameter.requires_grad) and (reason := unusable(parameter)):
                raise ValueError(f"LotteryTicket: parameter {name!r} {reason}")
        self.criterion = as_criterion(criterion)
        self.exclude = _listed(exclude)
        self.include = _listed(include)
        # Of a criterion that fixes its entries, K is their number.
        self._free = k is None and density is None and self.criterion.fixed is not None
        if self._free:
            self.k = select(
                self.model,
                criterion=self.criterion,
                eligible=frozenset(chosen),
                include=self.include,
                exclude=self.exclude,
            ).nnz
        else:
            self.k = resolve_k(k, density, sum(p.numel() for p in chosen.values()))
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"LotteryTicket: iterations must be an integer ≥ 1, got {iterations}")
        if iterations > 1 and self.criterion.fixed is not None:
            raise ValueError(
                f'LotteryTicket: criterion "{self.criterion.name}" fixes its entries, so there is '
                f"nothing to select in {iterations} iterations; leave iterations at 1"
            )
        if iterations > self.k:
            raise ValueError(
                f"LotteryTicket: {iterations} iterations cannot share {self.k} entries; lower "
                "iterations, or raise k"
            )
        counts = {
            "all": sum(p.numel() for p in parameters.values()),
            "trainable": sum(p.numel() for p in parameters.values() if p.requires_grad),
            "eligible": sum(p.numel() for p in chosen.values()),
        }
        numel = counts.get(l1_numel) if isinstance(l1_numel, str) else l1_numel
        if isinstance(numel, bool) or not isinstance(numel, int) or numel < 1:
            raise ValueError(
                'LotteryTicket: l1_numel must be "all", "trainable", "eligible" or an integer '
                f"≥ 1, got {l1_numel!r}"
            )
        self.iterations = iterations
        self.l1 = pair
        self.l1_numel = numel
        self.l1_heads = l1_heads
        self.seed = seed
        self.tie = tie
        self.fill = fill
        self.eps = eps
        self.eligible = frozenset(chosen)
        self.snapshot_device = snapshot_device
        self.support: Support | None = None
        self.theta0: Snapshot | None = None
        # What a training function may change, as it was: which parameters are tuned, the buffers.
        self._tuned: dict[nn.Parameter, bool] = {}
        self._buffers: dict[nn.Module, dict[str, Tensor | None]] = {}

    def fit(
        self,
        train: Callable[[Phase], Any],
        folder: str | os.PathLike[str] | None = None,
        save_every: int | None = None,
        fresh: bool = False,
        progress: bool = True,
        **meta: Any,
    ) -> SparseDelta:
        """Runs both phases and gives the model back as it was.

        Every phase begins from the same state: parameters, heads, buffers, and the random state
        that Python, NumPy and torch had when this was called, so that a plain loop draws the same
        batches and the same dropout in both phases unless it seeds them itself.

        Args:
            train: Called once per phase with a `Phase`; it trains `phase.model` with
                `phase.optimizer(...)`. What it leaves in the model at its end, or the best weights
                that it gave to `phase.offer`, is what counts. `sparse_ft.Loop` is a ready one.
            folder: Where to keep the state of the run. Called again with the same model, settings
                and folder, after whatever interruption, this goes on from there, to the same bits;
                a finished run gives its result at once, with the metadata of this call.
            save_every: Store the state every so many optimizer steps too, in training functions
                that use `phase.batches`; default: after each phase.
            fresh: Start over, whatever the folder holds.
            progress: Show a progress bar per phase, if stderr is a terminal.
            **meta: Fields of the result's metadata, such as role, lang, task, license.

        Returns:
            φ, with the heads, as a `SparseDelta`. Model and random state are as they were, bit for
            bit, also after an exception; `sparse_ft.compose` puts φ on the model. Buffers, such as
            the running statistics of a BatchNorm, are not part of it.

        Raises:
            ValueError: The folder holds a run with another model or other settings.
            TrainingDiverged: The loss or a weight became NaN or infinite.
            OSError: The state cannot be written. The state before it is whole.
        """
        if save_every is not None and (not isinstance(save_every, int) or save_every < 1):
            raise ValueError(
                f"LotteryTicket.fit: save_every must be an integer ≥ 1, got {save_every!r}"
            )
        if folder is None and (save_every is not None or fresh):
            raise ValueError("LotteryTicket.fit: save_every and fresh need a folder")
        layout = Layout.of(
            {n: p for n, p in named_parameters(self.model).items() if n in self.eligible}
        )
        if trained_on := getattr(train, "trained_on", None):
            meta.setdefault("trained_on", trained_on)
        # A mistake in the metadata must not show after days of training.
        meta = checked_meta(meta, layout, self._heads())
        run = None
        if folder is not None:
            run = Run(folder, self._settings(train, meta), fresh)
        try:
            if run is not None and run.progress.get("done"):
                return self._finished(run.folder, meta)
            if run is not None and not run.progress and not fresh:
                _check_free(run.folder)
            with modes_kept(self.model):
                return self._kept(train, Shared(run, save_every, progress), meta)
        finally:
            if run is not None:
                run.close()

    def _finished(self, folder: str, meta: Mapping[str, Any]) -> SparseDelta:
        """The result of a finished run, with the metadata given now."""
        delta = SparseDelta.load(folder)
        wanted = dict(delta.meta)
        for name, value in meta.items():
            # The run's own fields of a recipe or a base stay.
            wanted[name] = {**wanted.get(name, {}), **value} if isinstance(value, dict) else value
        if wanted != delta.meta:
            delta.meta.update(wanted)
            delta.save(os.path.join(folder, FILE_NAME))
        parameters = named_parameters(self.model)
        self.support = delta.support.to(next(parameters[n].device for n in self.eligible))
        return delta

    def _kept(
        self, train: Callable[[Phase], Any], shared: Shared, meta: dict[str, Any]
    ) -> SparseDelta:
        """Runs the phases; model and random state are as they were afterwards."""
        model = self.model
        drawn = random_state()
        self._tuned = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._buffers = {module: dict(module._buffers) for module in model.modules()}
        # In a new process heads are drawn anew, so the run brings its own.
        mine = cloned(self._volatile()) if shared.run is not None else None
        try:
            origin = drawn if shared.run is None else self._begin(shared.run, drawn)
            start = self.theta0 = Snapshot(model, self.snapshot_device)
            try:
                return self._fit(train, shared, origin, start, meta)
            finally:
                self._rewind(start, None)
        finally:
            if mine is not None:
                self._put(mine)
            shared.rewind()
            self._tuned, self._buffers = {}, {}
            set_random_state(drawn)

    def _begin(self, run: Run, drawn: dict[str, Any]) -> dict[str, Any]:
        """Puts the run's own heads and buffers into the model, and gives its random state."""
        if not run.progress:
            run.write("start", {**self._volatile(), "random": drawn})
            run.commit(iteration=0, phase="full")
            return drawn
        stored = run.read("start")
        self._put(stored)
        origin: dict[str, Any] = stored["random"]
        return origin

    def _fit(
        self,
        train: Callable[[Phase], Any],
        shared: Shared,
        origin: dict[str, Any],
        start: Snapshot,
        meta: dict[str, Any],
    ) -> SparseDelta:
        run, composition = shared.run, active(self.model)
        learnt: Learnt | None = None
        iteration, name = 0, "full"
        if run is not None:
            iteration, name = run.progress["iteration"], run.progress["phase"]
            learnt = self._stored(run)

        def phase() -> Phase:
            self._rewind(start, learnt)
            set_random_state(origin)
            now = Phase(self, name, iteration, start, learnt, shared)
            try:
                train(now)
            finally:
                now.release()
                self._thaw()
            if now.best is None:
                now.check_weights()
            return now

        while True:
            if name == "full":
                if self.criterion.needs_training:
                    phase().put_best()
                else:
                    self._rewind(start, learnt)
                learnt = self._select(start, iteration, learnt)
                name = "sparse"
            else:
                learnt = phase().outcome()
                iteration, name = iteration + 1, "full"
                if iteration == self.iterations:
                    break
            if run is not None:
                run.write("learnt", learnt.stored())
                run.drop("state", "best")
                run.commit(iteration=iteration, phase=name)
        delta = self._extract(learnt, start, composition, meta)
        if run is not None:
            delta.save(os.path.join(run.folder, FILE_NAME))
            run.drop("start", "learnt", "state", "best")
            run.commit(done=True)
        return delta

    def _fixed(self, parameters: Mapping[str, nn.Parameter]) -> Support:
        assert self.criterion.fixed is not None
        return self.criterion.fixed(Layout.of(parameters))

    def _heads(self) -> list[str]:
        parameters = named_parameters(self.model)
        return [n for n, p in parameters.items() if p.requires_grad and n not in self.eligible]

    def _volatile(self) -> dict[str, dict[str, Tensor]]:
        """What two processes that build a model alike may have different: heads and buffers."""
        parameters = named_parameters(self.model)
        return {
            "heads": {name: parameters[name].detach() for name in self._heads()},
            "buffers": dict(self.model.named_buffers()),
        }

    def _put(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        for kind, targets in self._volatile().items():
            write(targets, values[kind])

    def _thaw(self) -> None:
        """Undoes what a training function has frozen or thawed."""
        for parameter, tuned in self._tuned.items():
            parameter.requires_grad_(tuned)

    @torch.no_grad()
    def _rewind(self, start: Snapshot, learnt: Learnt | None) -> None:
        """Puts the model at θ0, with the sparse values learnt so far."""
        for parameter in self.model.parameters():
            parameter.grad = None
        # A forward pass may make buffers, as a cache, or buffers of another shape.
        for module, buffers in self._buffers.items():
            for name in module._buffers.keys() - buffers.keys():
                delattr(module, name)
            for name, buffer in buffers.items():
                now = module._buffers.get(name)
                if buffer is None or now is None or now.shape != buffer.shape:
                    module._buffers[name] = buffer
        start.restore(self.model)
        if learnt is None:
            return
        parameters = named_parameters(self.model)
        for name, at in learnt.support:
            weight = parameters[name].detach().view(-1)
            value = learnt.values[learnt.support.entries_of(name)].to(weight.device)
            # Adding 0 would lose the sign of −0.
            at, value = at.to(weight.device)[value != 0], value[value != 0]
            weight[at] = (weight[at].float() + value).to(weight.dtype)

    def _stored(self, run: Run) -> Learnt | None:
        tree = run.read("learnt")
        if tree is None:
            return None
        parameters = {n: p for n, p in named_parameters(self.model).items() if n in self.eligible}
        support = Support(Layout.of(parameters), tree["idx"], tree["ptr"])
        self.support = support = support.to(next(iter(parameters.values())).device)
        return Learnt(support, tree["values"], {})

    def _select(self, start: Snapshot, iteration: int, learnt: Learnt | None) -> Learnt:
        share = self.k // self.iterations
        if iteration + 1 == self.iterations:
            share = self.k - iteration * share
        chosen = select(
            self.model,
            start,
            k=None if self._free else share,
            criterion=self.criterion,
            eligible=self.eligible,
            # What must be in is so from the first iteration on.
            include=self.include if learnt is None else None,
            exclude=self.exclude if learnt is None else [*self.exclude, learnt.support],
            seed=self.seed,
            tie=self.tie,
            fill=self.fill,
        )
        if learnt is None:
            self.support = chosen
            return Learnt(chosen, torch.zeros(chosen.nnz), {})
        self.support = union = _union(chosen.layout, [learnt.support, chosen], chosen.device)
        values = torch.zeros(union.nnz)
        for name, at in learnt.support:
            # Both ascend, so an entry's place in the union is found by bisection.
            place = torch.searchsorted(union.indices(name), at).cpu()
            place += union.entries_of(name).start
            values[place] = learnt.values[learnt.support.entries_of(name)]
        return Learnt(union, values, {})

    def _settings(self, train: Callable[[Phase], Any], meta: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the result of a run, as JSON values."""
        parameters = named_parameters(self.model)
        eligible = {n: p for n, p in parameters.items() if n in self.eligible}
        return {
            **self._recipe(),
            "l1_numel": self.l1_numel,
            "l1_heads": self.l1_heads,
            "tie": self.tie,
            "fixed": _fingerprint([self._fixed(eligible)] if self.criterion.fixed else []),
            "exclude": _fingerprint(self.exclude),
            "include": _fingerprint(self.include),
            # What else the metadata say decides nothing.
            "meta": {name: meta[name] for name in ("recipe", "trained_on") if name in meta},
            "training": getattr(train, "settings", None),
            **{f"parameter {n!r}": self._described(n, p) for n, p in parameters.items()},
        }

    def _described(self, name: str, parameter: nn.Parameter) -> str:
        what = f"{parameter.dtype} {list(parameter.shape)}"
        if name not in self.eligible and parameter.requires_grad:
            return f"{what}, a head"  # which the run brings itself
        role = "eligible" if name in self.eligible else "frozen"
        return f"{what}, {role}, values {_hash(parameter)[:16]}"

    def _recipe(self) -> dict[str, Any]:
        return {
            "k_requested": self.k,
            "iterations": self.iterations,
            "l1": self.l1[0] if self.l1[0] == self.l1[1] else list(self.l1),
            "eps": self.eps,
            "seed": self.seed,
            **self.criterion.recipe(),
        }

    @torch.no_grad()
    def _extract(
        self,
        learnt: Learnt,
        start: Snapshot,
        composition: Applied | None,
        meta: dict[str, Any],
    ) -> SparseDelta:
        meta = {**meta, "recipe": {**self._recipe(), **meta.get("recipe", {})}}
        if composition is not None:
            meta.setdefault(
                "trained_on",
                [
                    {"id": content_id, "alpha": alpha}
                    for content_id, alpha in zip(composition.ids, composition.weights, strict=True)
                ],
            )
        layout = learnt.support.layout
        tied = aliases(self.model)
        if shared := {n: tied[n] for n in layout.names if n in tied}:
            meta.setdefault("aliases", shared)
        base = {n: entries(start[n], at).cpu() for n, at in learnt.support}
        delta = SparseDelta.from_compact(
            learnt.support.to("cpu"),
            learnt.values,
            heads={n: t.cpu() for n, t in learnt.heads.items()},
            base=base,
            base_dtypes={n: t.dtype for n, t in base.items()},
            meta=meta,
            eps=self.eps,
        )
        if composition is not None:
            # The base that a user will have is the model without what is composed on it now.
            bare = composition.pristine({n: start[n] for n in layout.names})
            support = delta.support.to(next(iter(bare.values())).device)
            full, half = digest([bare[n] for n in layout.names], support.idx, support.ptr).tolist()
            mask = (1 << 64) - 1
            delta.meta["base"] = {
                **delta.meta.get("base", {}),
                "digest_f32": f"{full & mask:016x}",
                "digest_bf16": f"{half & mask:016x}",
            }
        return delta


def _check_free(folder: str) -> None:
    if os.path.lexists(os.path.join(folder, FILE_NAME)):
        raise ValueError(
            f"LotteryTicket.fit: {folder} holds {FILE_NAME}, which no run there has made; name "
            "another folder, or have it replaced with fresh=True"
        )


def _plain(value: Any) -> Any:
    """A number of NumPy's as one of Python's, which JSON can hold."""
    return value.item() if isinstance(value, np.generic) else value


def _listed(entries: Entries) -> list[Support | SparseDelta]:
    if entries is None:
        return []
    return [entries] if isinstance(entries, (Support, SparseDelta)) else list(entries)


def _hash(tensor: Tensor) -> str:
    """A digest of a tensor's bits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(hash_pieces(data).numpy().tobytes()).hexdigest()[:32]


def _fingerprint(entries: Iterable[Support | SparseDelta]) -> list[str]:
    """Digests of supports, for comparison."""
    digests = []
    for item in entries:
        support = item if isinstance(item, Support) else item.support
        text = "".join(f"{name} {_hash(at)};" for name, at in support)
        digests.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    return digests
