"""LotteryTicket: both phases of LT-SFT around any training function.

Full tuning finds the entries that move most; everything is rewound; sparse tuning of those entries
alone gives φ (Ansell et al., ACL 2022, algorithm 1). With a folder, the state goes to disk as
training proceeds, and a run that was killed continues to the same bits.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_ft_kernels import anchor_l1_, digest, hash_pieces

from .compose import Applied, active
from .delta import SparseDelta
from .families import aliases, named_parameters, unusable
from .files import FILE_NAME
from .metadata import checked_meta
from .optim import MaskedAdamW
from .runs import Run, random_state, set_random_state
from .select import Eligible, eligible_parameters, resolve_k, select
from .snapshot import Snapshot
from .tiles import Layout, Support

__all__ = ["LotteryTicket", "Phase", "TrainingDiverged"]

# Losses are looked at in groups: each look waits for the device.
CHECK_EVERY = 10
# Elements that are compared at a time, so that no temporary has the size of a tensor.
CHUNK = 1 << 20


class TrainingDiverged(RuntimeError):
    """The loss or a weight became NaN or infinite; the message says where, and what was kept."""


class _Learnt(NamedTuple):
    """What sparse phases have found: φ at the entries of a support (fp32 [nnz], CPU), and the
    heads."""

    support: Support
    values: Tensor
    heads: dict[str, Tensor]

    def stored(self) -> dict[str, Tensor]:
        return {"idx": self.support.idx, "ptr": self.support.ptr, "values": self.values}


class Phase:
    """One phase, as a training function gets it: the model at its start, and what belongs to it.

    Attributes:
        name: "full" or "sparse".
        iteration: Number of the iteration, from 0.
        iterations: How many there are.
        model: The model, at θ0 (in later iterations with the sparse values learnt so far); the same
            object in all phases.
        support: The selected entries; None in the full phase.
        theta0: The parameters' values when `fit` began, by name.
        l1: λ of this phase.
        eligible: Names of the eligible parameters.
        resumed: Whether `batches` goes on from a stored state.
        step: Optimizer steps done, the one of the current batch included where `step_due`.
        step_due: Whether an optimizer step belongs to the current batch.
        best: Score and step of the best weights offered so far, or None.
    """

    def __init__(
        self,
        ticket: LotteryTicket,
        name: str,
        iteration: int,
        theta0: Snapshot,
        learnt: _Learnt | None,
        files: _Files,
    ) -> None:
        self.name = name
        self.iteration = iteration
        self.iterations = ticket.iterations
        self.model = ticket.model
        self.support = None if name == "full" or learnt is None else learnt.support
        self.theta0: Mapping[str, Tensor] = theta0
        self.l1 = ticket.l1[name == "sparse"]
        self.l1_numel = ticket.l1_numel
        self.l1_heads = ticket.l1_heads
        self.eligible: Collection[str] = ticket.eligible
        self.made: torch.optim.Optimizer | None = None
        self.step = 0
        self.step_due = False
        self.best: tuple[float, int] | None = None
        self._best_weights: dict[str, Any] | None = None
        self._snapshot_device = ticket.snapshot_device
        self._learnt = learnt
        self._files = files
        self._state = self._files.stored()
        self.resumed = self._state is not None
        self._anchor: _AnchorAndClip | None = None
        self._batched = False
        self._losses: list[tuple[int, Any]] = []
        self._saved_step: int | None = None
        self._bar: _Bar | None = None

    def __repr__(self) -> str:
        return f"Phase({self.title}, step {self.step})"

    @property
    def title(self) -> str:
        """The phase in words: "full phase", or "sparse phase, iteration 2 of 3"."""
        of = f", iteration {self.iteration + 1} of {self.iterations}" if self.iterations > 1 else ""
        return f"{self.name} phase{of}"

    # --- the optimizer --------------------------------------------------------------------------

    def optimizer(self, max_grad_norm: float | None = None, **adamw: Any) -> torch.optim.Optimizer:
        """The optimizer of this phase: AdamW over everything, or `MaskedAdamW` over the support.

        The L1 term is inside it, and so is clipping: the order is mask, L1, clip in both phases.

        Args:
            max_grad_norm: Norm to clip to; default: no clipping.
            **adamw: lr (default 5e-5), betas, eps, weight_decay (default 0); for the sparse phase
                also gather="hook".

        Returns:
            A `torch.optim.Optimizer`: schedulers and gradient scalers work with it.
        """
        self.release()
        adamw = {"lr": 5e-5, "weight_decay": 0.0, **adamw}
        if self.support is not None:
            self.made = sparse = MaskedAdamW(
                self.model,
                self.support,
                self.theta0,
                l1=self.l1,
                l1_numel=self.l1_numel,
                l1_heads=self.l1_heads,
                max_grad_norm=max_grad_norm,
                **adamw,
            )
            if self.iteration and self._learnt is not None:
                # The weights have rounded what was learnt; δ itself goes on.
                sparse.start_from(self._learnt.values)
            return sparse
        adamw.pop("gather", None)
        trainable = self._trainable()
        if not {"fused", "foreach"} & adamw.keys():
            # The fused step makes one pass where the default makes a dozen.
            adamw["fused"] = all(p.device.type in ("cpu", "cuda") for p in trainable.values())
        self.made = torch.optim.AdamW(trainable.values(), **adamw)
        self._anchor = _AnchorAndClip(
            trainable, self._anchored(), self.theta0, self.l1 / self.l1_numel, max_grad_norm
        )
        self.made.register_step_pre_hook(self._anchor)
        return self.made

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the tuned gradients of the last step, before clipping; None without clipping."""
        source = self.made if isinstance(self.made, MaskedAdamW) else self._anchor
        return None if source is None else source.grad_norm

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in named_parameters(self.model).items() if p.requires_grad}

    def _anchored(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self._trainable().items() if self.l1_heads or n in self.eligible}

    def release(self) -> None:
        """Takes the hooks of this phase's optimizer off the model."""
        if isinstance(self.made, MaskedAdamW):
            self.made.detach_hooks()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # --- the loop -------------------------------------------------------------------------------

    def batches(
        self, loader: Iterable[Any], steps: int, *, accumulate: int = 1, keep: Sequence[Any] = ()
    ) -> Iterator[Any]:
        """The batches of this phase, epoch after epoch, until `steps` optimizer steps are done.

        With a folder, the state is stored on the way; the same loop in a new process goes on where
        the stored state ends: parameters, buffers, optimizer, `keep`, random state, position in the
        data, best weights. Batches before that position are drawn and dropped. The order of an
        epoch must be settled by the random state when it begins, as with torch's samplers.

        Args:
            loader: A `DataLoader`, or whatever gives its batches anew each time it is iterated.
            steps: Optimizer steps of this phase, ≥ 1.
            accumulate: Batches for one step, ≥ 1. A step may span two epochs, so that all steps are
                of the same size.
            keep: What else has a state (`state_dict`, `load_state_dict`): schedules, gradient
                scalers. The optimizer is known.

        Yields:
            The batches. Take an optimizer step wherever `phase.step_due`.

        Raises:
            ValueError: There are no batches, or steps or accumulate is below 1.
            RuntimeError: `phase.optimizer` was not called, or this was called before.
            TrainingDiverged: The loss or a weight is NaN or infinite.
        """
        for what, count in (("steps", steps), ("accumulate", accumulate)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"Phase.batches: {what} must be an integer ≥ 1, got {count!r}")
        if self.made is None:
            raise RuntimeError("Phase.batches: call phase.optimizer(...) first")
        if self._batched:
            raise RuntimeError(
                "Phase.batches: a phase has one loop; give it one loader that has all batches"
            )
        if iter(loader) is loader:
            raise ValueError(
                "Phase.batches: the loader is an iterator, which ends after one epoch; give a "
                "DataLoader, a list, or another object that can be iterated again"
            )
        self._batched = True
        return self._batches(loader, steps, accumulate, list(keep))

    def _batches(
        self, loader: Iterable[Any], steps: int, accumulate: int, keep: list[Any]
    ) -> Iterator[Any]:
        data = _Data(loader, self._files)
        micro = 0
        if self._state is not None:
            micro = self._restore(self._state, data, keep)
            self._state = None
        self._bar = _Bar(self.title, steps, self.step, self._files.progress)
        try:
            while self.step < steps:
                # The state is stored after this batch: its draw has to be repeatable.
                due = (micro + 1) % accumulate == 0
                saving = due and self._files.due(self.step + 1)
                batch = data.next(remember=saving)
                micro += 1
                self.step_due = due
                self.step += due
                yield batch
                if due:
                    self._bar.to(self.step)
                if saving:
                    self._check_losses()
                    self._files.save(self._captured(data, micro, keep))
                    self._saved_step = self.step
            self._check_losses()
        finally:
            self.step_due = False
            if self._bar is not None:
                self._bar.close()

    def log(self, loss: Tensor | float) -> None:
        """Shows a batch's loss in the progress bar, and stops training when it is NaN or infinite.

        Reading a loss waits for the device, so losses are read ten at a time, and always before the
        state is stored: what is stored comes from before the divergence.

        Raises:
            TrainingDiverged: It names phase and step, and the last good state.
        """
        value = loss.detach() if isinstance(loss, Tensor) else loss
        self._losses.append((self.step + (not self.step_due), value))
        if len(self._losses) >= CHECK_EVERY:
            self._check_losses()

    def _check_losses(self) -> None:
        if not self._losses:
            return
        losses, self._losses = self._losses, []
        values = [v.to(torch.float32).reshape(()) for _, v in losses if isinstance(v, Tensor)]
        read = iter(torch.stack(values).tolist() if values else [])
        for step, value in losses:
            number = next(read) if isinstance(value, Tensor) else float(value)
            if not abs(number) < float("inf"):
                raise self._diverged(f"the loss is {number} at step {step}")
        if self._bar is not None:
            self._bar.loss = number

    def _diverged(self, what: str) -> TrainingDiverged:
        kept = "No state was stored"
        if self._saved_step is not None:
            kept = f"The state of step {self._saved_step} is in {self._files.where()}"
        elif self._files.run is not None:
            kept = f"The state from before this phase is in {self._files.run.folder}"
        return TrainingDiverged(
            f"LotteryTicket: {what} of the {self.title}, so training has diverged. {kept}. "
            "A lower learning rate, a warm-up or max_grad_norm may help"
        )

    def offer(self, score: float, better: str = "lower") -> bool:
        """Keeps the weights if their score is the best so far; the best ones decide the outcome of
        the phase.

        Args:
            score: What the weights achieve now; NaN is never the best.
            better: "lower" or "higher".

        Returns:
            Whether they are the best so far.
        """
        if better not in ("lower", "higher"):
            raise ValueError(f'Phase.offer: better must be "lower" or "higher", got {better!r}')
        score = float(score)
        sign = 1 if better == "lower" else -1
        if score != score or (self.best is not None and sign * score >= sign * self.best[0]):
            return False
        weights = self._weights()
        if self._files.run is not None:
            self._files.run.write("best", weights)
        else:
            self._best_weights = _cloned(weights, self._snapshot_device)
        self.best = (score, self.step)
        return True

    @torch.no_grad()
    def distance(self) -> dict[str, float]:
        """How far the model is from θ0.

        Returns:
            "l1": the value of the term λ/N · Σ|θ − θ0|; "moved": the share of the eligible entries
            that differ from θ0.
        """
        far: list[Tensor] = []
        moved: list[Tensor] = []
        anchored = self._anchored()
        for name, parameter in self._trainable().items():
            now, start = parameter.detach().reshape(-1), self.theta0[name].reshape(-1)
            if self.support is not None and name in self.support.layout:
                at = self.support.indices(name)
                now, start = now[at.to(now.device)], start[at.to(start.device)]
            for a, b in zip(now.split(CHUNK), start.split(CHUNK), strict=True):
                b = b.to(a.device)
                if name in anchored and self.l1:
                    far.append((a.float() - b.float()).abs().sum(dtype=torch.float64).cpu())
                if name in self.eligible:
                    moved.append((a != b).sum().cpu())
        total = sum(self.theta0[name].numel() for name in self.eligible)
        return {
            "l1": self.l1 / self.l1_numel * float(sum(far)),
            "moved": int(sum(moved)) / total,
        }

    # --- state ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _weights(self) -> dict[str, Any]:
        """What counts at the end of the phase: all trained tensors, or φ and the heads."""
        trainable = self._trainable()
        if self.support is None:
            return {"parameters": {n: p.detach() for n, p in trainable.items()}}
        if isinstance(self.made, MaskedAdamW) and self.made.holds(self.model):
            values = self.made.delta().val
        else:
            # The training function put other weights there: the best checkpoint, say.
            parameters = named_parameters(self.model)
            pieces = [
                _entries(parameters[name], at).cpu().float()
                - _entries(self.theta0[name], at).cpu().float()
                for name, at in self.support
            ]
            values = torch.cat([torch.zeros(0), *pieces])
        heads = {n: p.detach() for n, p in trainable.items() if n not in self.eligible}
        return {"values": values, "heads": heads}

    def _best(self) -> dict[str, Any] | None:
        if self.best is None or self._best_weights is not None:
            return self._best_weights
        assert self._files.run is not None
        best: dict[str, Any] = self._files.run.read("best")
        return best

    def _put_best(self) -> None:
        """Puts the best weights of the full phase into the model."""
        if (best := self._best()) is not None:
            _write(self._trainable(), best["parameters"])

    def _learned(self) -> _Learnt:
        """The outcome of the sparse phase."""
        assert self.support is not None
        found = self._best() or _cloned(self._weights())
        return _Learnt(self.support, found["values"].cpu(), found["heads"])

    def _captured(self, data: _Data, micro: int, keep: list[Any]) -> dict[str, Any]:
        assert self.made is not None
        parameters = self._trainable()
        for name, parameter in parameters.items():
            if not _finite(parameter.detach()):
                raise self._diverged(f"{name!r} holds NaN or infinity at step {self.step}")
        if self.support is not None:
            parameters = {n: p for n, p in parameters.items() if n not in self.eligible}
        return {
            "step": self.step,
            "micro": micro,
            "best": self.best,
            "parameters": parameters,
            "buffers": dict(self.model.named_buffers()),
            "optimizer": self.made.state_dict(),
            "keep": [item.state_dict() for item in keep],
            "data": data.state(),
        }

    @torch.no_grad()
    def _restore(self, state: Mapping[str, Any], data: _Data, keep: list[Any]) -> int:
        assert self.made is not None
        if len(state["keep"]) != len(keep):
            raise ValueError(
                f"Phase.batches: the stored state has {len(state['keep'])} items in keep, this "
                f"loop {len(keep)}; give the same ones in the same order"
            )
        self.step, self._saved_step = state["step"], state["step"]
        self.best = state["best"]
        _write(self._trainable(), state["parameters"])
        _write(dict(self.model.named_buffers()), state["buffers"])
        self.made.load_state_dict(state["optimizer"])
        for item, stored in zip(keep, state["keep"], strict=True):
            item.load_state_dict(stored)
        data.restore(state["data"])
        return int(state["micro"])


class _Data:
    """Batches of a loader, epoch after epoch, from any position on.

    Three random states make a position: that of the epoch's beginning, from which the loader
    settles its order; that before the last batch was drawn, for loaders that draw one ahead; that
    of now.
    """

    def __init__(self, loader: Iterable[Any], files: _Files) -> None:
        self.loader = loader
        self.epoch = -1
        self.position = 0
        self._batches: Iterator[Any] = iter(())
        self._at_epoch: dict[str, Any] = {}
        self._at_draw: dict[str, Any] = {}
        parts = [loader, getattr(loader, "collate_fn", None), getattr(loader, "dataset", None)]
        for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            parts += [sampler, getattr(sampler, "sampler", None)]
        self._parts = [part for part in parts if part is not None]
        found = [getattr(part, "generator", None) for part in self._parts]
        unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
        self._generators = list(unique.values())
        files.rewind(self._generators)
        if getattr(loader, "persistent_workers", False):
            # Workers that live on draw a seed when they start, and later epochs do not.
            state = self._drawn()
            iter(loader)
            self._redraw(state)

    def _drawn(self) -> dict[str, Any]:
        return {
            "random": random_state(),
            "generators": [g.get_state() for g in self._generators],
        }

    def _redraw(self, state: Mapping[str, Any]) -> None:
        set_random_state(state["random"])
        for generator, value in zip(self._generators, state["generators"], strict=True):
            generator.set_state(value)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        self._at_epoch = self._at_draw = self._drawn()
        for part in {id(p): p for p in self._parts}.values():
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        self._batches = iter(self.loader)

    def next(self, remember: bool = False) -> Any:
        """The next batch.

        Args:
            remember: Whether `state` is asked for after this batch.
        """
        if self.epoch < 0:
            self._begin(0)
        while True:
            if remember and self.position:
                self._at_draw = self._drawn()
            try:
                batch = next(self._batches)
            except StopIteration:
                if not self.position:
                    raise ValueError(
                        "Phase.batches: the loader gave no batch; is the data empty, or smaller "
                        "than one batch with drop_last=True?"
                    ) from None
                self._begin(self.epoch + 1)
                continue
            self.position += 1
            return batch

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "at_epoch": self._at_epoch,
            "at_draw": self._at_draw,
            "now": self._drawn(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        count = len(state["now"]["generators"])
        if count != len(self._generators):
            raise ValueError(
                f"Phase.batches: the loader of the stored state has {count} generators, this one "
                f"{len(self._generators)}; build it in the same way"
            )
        self._redraw(state["at_epoch"])
        self._begin(state["epoch"])
        for i in range(state["position"]):
            if i and i + 1 == state["position"]:
                self._redraw(state["at_draw"])
            if next(self._batches, self) is self:
                raise ValueError(
                    f"Phase.batches: the stored state is at batch {state['position']} of an epoch, "
                    f"and the loader has only {i}; give the data of the run that was stored"
                )
        self.position = state["position"]
        self._at_draw = state["at_draw"]
        self._redraw(state["now"])


class _Files:
    """What the phases of one fit share: the run on disk, if any, and how to report.

    Args:
        run: The run; None without a folder.
        save_every: Steps from one stored state to the next; None stores none inside a phase.
        progress: Whether to show progress bars.
    """

    def __init__(
        self, run: Run | None = None, save_every: int | None = None, progress: bool = False
    ) -> None:
        self.run = run
        self.save_every = save_every
        self.progress = progress
        # The loaders' generators, with their states before `fit` used them.
        self.loaders: list[tuple[torch.Generator, Tensor]] = []

    def rewind(self, generators: list[torch.Generator]) -> None:
        """Puts a loader's generators where the first phase found them."""
        known = {id(generator) for generator, _ in self.loaders}
        self.loaders += [(g, g.get_state()) for g in generators if id(g) not in known]
        for generator, state in self.loaders:
            generator.set_state(state)

    def stored(self) -> Any:
        return None if self.run is None else self.run.read("state")

    def where(self) -> str | None:
        return None if self.run is None else self.run.path("state")

    def due(self, step: int) -> bool:
        return self.run is not None and self.save_every is not None and step % self.save_every == 0

    def save(self, state: Mapping[str, Any]) -> None:
        assert self.run is not None
        self.run.write("state", state)
        self.run.commit()


class _Bar:
    """A progress bar on the terminal; nothing where stderr is none."""

    def __init__(self, title: str, steps: int, done: int, shown: bool) -> None:
        self.loss = float("nan")
        self._bar: Any = None
        if not (shown and sys.stderr.isatty()):
            return
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]} loss {task.fields[loss]:.4g}"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(title, total=steps, completed=done, loss=self.loss, rate="")
        self._bar.start()

    def to(self, step: int) -> None:
        if self._bar is not None:
            speed = self._bar.tasks[0].speed
            rate = "" if speed is None else f"{speed:.1f} it/s"
            self._bar.update(self._task, completed=step, loss=self.loss, rate=rate)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _AnchorAndClip:
    """Runs before each step of the full phase: adds the gradient of λ/N·Σ|θ − θ0|, then clips."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        anchored: Mapping[str, nn.Parameter],
        theta0: Mapping[str, Tensor],
        coeff: float,
        max_grad_norm: float | None,
    ) -> None:
        self.parameters = list(parameters.values())
        self.anchored = list(anchored.values())
        self.anchors = [theta0[n].to(p.device) for n, p in anchored.items()] if coeff else []
        self.coeff = coeff
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "LotteryTicket: the gradients are still scaled; call scaler.unscale_(optimizer) "
                "before scaler.step()"
            )
        if self.coeff:
            groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
            for i, parameter in enumerate(self.anchored):
                if parameter.grad is not None:
                    groups.setdefault((parameter.device, parameter.dtype), []).append(i)
            for members in groups.values():
                anchor_l1_(
                    [_contiguous_grad(self.anchored[i]) for i in members],
                    [self.anchored[i].detach() for i in members],
                    [self.anchors[i] for i in members],
                    self.coeff,
                )
        if self.max_grad_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)


def _contiguous_grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    if not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    return parameter.grad


class LotteryTicket:
    """Lottery-ticket sparse fine-tuning of one model.

    Entries are selected among the *eligible* parameters. A trainable parameter that is not eligible
    is a *head*: tuned in full in both phases, from the same values, and stored with the result.
    Freeze what must not move (`sparse_ft.freeze_norms`, `sparse_ft.decouple_output_embeddings`)
    before the ticket is made.

    With n iterations, each selects K // n more entries (the last one the rest) among those not yet
    selected, by |θ − θ0| after a full phase that starts from the sparse values learnt so far, and
    then tunes all entries selected so far; heads start afresh in each phase, and θ0 is always the
    start of `fit`, as in the reference implementation.

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
        criterion: As in `sparse_ft.select`. One that needs no training ("random") skips the full
            phase.
        exclude: Entries that must not be selected, as in `sparse_ft.select`.
        include: Entries that must be selected.
        seed: For "random".
        tie: As in `sparse_ft.select`.
        eps: Entries of the result with |φ| ≤ eps are dropped, if eps > 0 (the reference
            implementation: 1e-7).
        snapshot_device: Where to keep the start's values, for instance "cpu".

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
        criterion: Any = "magnitude",
        exclude: Any = None,
        include: Any = None,
        seed: int = 0,
        tie: str = "index",
        eps: float = 0.0,
        snapshot_device: torch.device | str | None = None,
    ) -> None:
        pair = tuple(l1) if isinstance(l1, (tuple, list)) else (l1, l1)
        if len(pair) != 2 or not all(0 <= value < float("inf") for value in pair):
            raise ValueError(
                f"LotteryTicket: l1 must not be negative, or be a pair (full, sparse), got {l1}"
            )
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
        self.k = resolve_k(k, density, sum(p.numel() for p in chosen.values()))
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"LotteryTicket: iterations must be an integer ≥ 1, got {iterations}")
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
        self.model = model
        self.iterations = iterations
        self.l1 = pair
        self.l1_numel = numel
        self.l1_heads = l1_heads
        self.criterion = criterion
        self.exclude = exclude
        self.include = include
        self.seed = seed
        self.tie = tie
        self.eps = eps
        self.eligible = frozenset(chosen)
        self.snapshot_device = snapshot_device
        self.support: Support | None = None
        self.theta0: Snapshot | None = None

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
                a finished run gives its result at once.
            save_every: Store the state every so many optimizer steps too, in training functions
                that use `phase.batches`; default: after each phase.
            fresh: Start over, whatever the folder holds.
            progress: Show a progress bar per phase, if stderr is a terminal.
            **meta: Fields of the result's metadata, such as role, lang, task, license.

        Returns:
            φ, with the heads, as a `SparseDelta`. Model and random state are as they were, bit for
            bit, also after an exception; `sparse_ft.compose` puts φ on the model.

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
        # A mistake in the metadata must not show after days of training.
        meta = checked_meta(meta, layout, self._heads())
        run = None
        if folder is not None:
            run = Run(folder, self._settings(train, meta), fresh)
        try:
            if run is not None and run.progress.get("done"):
                return SparseDelta.load(run.folder)
            return self._kept(train, _Files(run, save_every, progress), meta)
        finally:
            if run is not None:
                run.close()

    def _kept(
        self, train: Callable[[Phase], Any], files: _Files, meta: dict[str, Any]
    ) -> SparseDelta:
        """Runs the phases; model, modes and random state are as they were afterwards."""
        model = self.model
        drawn = random_state()
        modes = {module: module.training for module in model.modules()}
        # In a new process heads are drawn anew, so the run brings its own.
        mine = _cloned(self._volatile()) if files.run is not None else None
        try:
            origin = drawn if files.run is None else self._begin(files.run, drawn)
            start = self.theta0 = Snapshot(model, self.snapshot_device)
            try:
                return self._fit(train, files, origin, start, meta)
            finally:
                self._rewind(start, None)
        finally:
            if mine is not None:
                self._put(mine)
            for module, mode in modes.items():
                module.training = mode
            for generator, state in files.loaders:
                generator.set_state(state)
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
        files: _Files,
        origin: dict[str, Any],
        start: Snapshot,
        meta: dict[str, Any],
    ) -> SparseDelta:
        run, composition = files.run, active(self.model)
        learnt: _Learnt | None = None
        iteration, name = 0, "full"
        if run is not None:
            iteration, name = run.progress["iteration"], run.progress["phase"]
            learnt = self._stored(run)

        def phase() -> Phase:
            self._rewind(start, learnt)
            set_random_state(origin)
            now = Phase(self, name, iteration, start, learnt, files)
            try:
                train(now)
            finally:
                now.release()
            return now

        while True:
            if name == "full":
                if _needs_training(self.criterion):
                    phase()._put_best()
                else:
                    self._rewind(start, learnt)
                learnt = self._select(start, iteration, learnt)
                name = "sparse"
            else:
                learnt = phase()._learned()
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
            _write(targets, values[kind])

    @torch.no_grad()
    def _rewind(self, start: Snapshot, learnt: _Learnt | None) -> None:
        """Puts the model at θ0, with the sparse values learnt so far."""
        for parameter in self.model.parameters():
            parameter.grad = None
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

    def _stored(self, run: Run) -> _Learnt | None:
        tree = run.read("learnt")
        if tree is None:
            return None
        parameters = {n: p for n, p in named_parameters(self.model).items() if n in self.eligible}
        support = Support(Layout.of(parameters), tree["idx"], tree["ptr"])
        self.support = support = support.to(next(iter(parameters.values())).device)
        return _Learnt(support, tree["values"], {})

    def _select(self, start: Snapshot, iteration: int, learnt: _Learnt | None) -> _Learnt:
        share = self.k // self.iterations
        if iteration + 1 == self.iterations:
            share = self.k - iteration * share
        options = {"include": self.include, "exclude": self.exclude}
        if learnt is not None:
            options = {"exclude": _both(self.exclude, learnt.support)}
        chosen = select(
            self.model,
            start,
            k=share,
            criterion=self.criterion,
            eligible=self.eligible,
            seed=self.seed,
            tie=self.tie,
            **{key: value for key, value in options.items() if value is not None},
        )
        if learnt is None:
            self.support = chosen
            return _Learnt(chosen, torch.zeros(chosen.nnz), {})
        indices = dict(learnt.support)
        for name, at in chosen:
            indices[name] = torch.cat([indices[name], at]) if name in indices else at
        self.support = union = Support.from_indices(chosen.layout, indices).to(chosen.device)
        values = torch.zeros(union.nnz)
        for name, at in learnt.support:
            # Both ascend, so an entry's place in the union is found by bisection.
            place = torch.searchsorted(union.indices(name), at).cpu()
            place += union.entries_of(name).start
            values[place] = learnt.values[learnt.support.entries_of(name)]
        return _Learnt(union, values, {})

    def _settings(self, train: Callable[[Phase], Any], meta: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the result of a run, as JSON values."""
        parameters = named_parameters(self.model)
        heads = set(self._heads())
        return {
            **self._recipe(),
            "l1_numel": self.l1_numel,
            "l1_heads": self.l1_heads,
            "tie": self.tie,
            "exclude": _fingerprint(self.exclude),
            "include": _fingerprint(self.include),
            "meta": dict(meta),
            "training": getattr(train, "settings", None),
            "eligible": sorted(self.eligible),
            "heads": sorted(heads),
            "shapes": {n: [str(p.dtype), *p.shape] for n, p in parameters.items()},
            "values": {n: _hash(p) for n, p in parameters.items() if n not in heads},
        }

    def _recipe(self) -> dict[str, Any]:
        recipe = getattr(self.criterion, "recipe", None)
        name = self.criterion if isinstance(self.criterion, str) else "custom"
        name = getattr(self.criterion, "name", name)
        return {
            "method": "RAND-SFT" if name == "random" else "LT-SFT",
            "criterion": recipe() if callable(recipe) else name,
            "k_requested": self.k,
            "iterations": self.iterations,
            "l1": self.l1[0] if self.l1[0] == self.l1[1] else list(self.l1),
            "eps": self.eps,
            "seed": self.seed,
        }

    @torch.no_grad()
    def _extract(
        self,
        learnt: _Learnt,
        start: Snapshot,
        composition: Applied | None,
        meta: dict[str, Any],
    ) -> SparseDelta:
        meta = {"recipe": self._recipe(), **meta}
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
        base = {n: _entries(start[n], at).cpu() for n, at in learnt.support}
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


def _needs_training(criterion: Any) -> bool:
    if isinstance(criterion, str):
        return criterion != "random"
    return bool(getattr(criterion, "needs_training", True))


def _both(exclude: Any, support: Support) -> Any:
    if exclude is None:
        return support
    return [*exclude, support] if isinstance(exclude, (list, tuple)) else [exclude, support]


def _entries(tensor: Tensor, at: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[at.to(tensor.device)]


@torch.no_grad()
def _write(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        target = targets[name].detach()
        # An expanded buffer holds one value where it shows many: write that one.
        once = tuple(slice(None if stride else 1) for stride in target.stride())
        target[once].copy_(value[once])


def _cloned(tree: Any, device: torch.device | str | None = None) -> Any:
    """A copy of a dictionary of tensors, at any depth."""
    if isinstance(tree, Tensor):
        copy = tree.detach().clone()
        return copy if device is None else copy.to(device)
    return {name: _cloned(value, device) for name, value in tree.items()}


def _finite(tensor: Tensor) -> bool:
    """Whether all values are, without a temporary of the tensor's size."""
    if not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _hash(tensor: Tensor) -> str:
    """A digest of a tensor's bits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(hash_pieces(data).numpy().tobytes()).hexdigest()[:32]


def _fingerprint(chosen: Any) -> Any:
    """A digest of supports, for comparison."""
    if chosen is None:
        return None
    if isinstance(chosen, (list, tuple)):
        return [_fingerprint(item) for item in chosen]
    support = getattr(chosen, "support", chosen)
    parts = {n: _hash(at) for n, at in support}
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:32]
