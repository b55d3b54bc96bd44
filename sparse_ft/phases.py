"""Phase: what a training function is given, the loop that can be stored and resumed, and the data
position that makes it so.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_ft_kernels import anchor_l1_

from .families import named_parameters
from .kept import random_state, set_random_state
from .optim import MaskedAdamW
from .runs import Run
from .tiles import Support

if TYPE_CHECKING:
    from .lottery import LotteryTicket

__all__ = [
    *("Learnt", "Phase", "Shared", "TrainingDiverged"),
    *("cloned", "entries", "put_buffers", "write"),
]

# Losses are looked at in groups: each look waits for the device.
CHECK_EVERY = 10
# Elements that are compared at a time, so that no temporary has the size of a tensor.
CHUNK = 1 << 20
GATHER = ("step", "hook")


class TrainingDiverged(RuntimeError):
    """The loss or a weight became NaN or infinite; the message says where, and what was kept."""


class Learnt(NamedTuple):
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
        theta0: Mapping[str, Tensor],
        learnt: Learnt | None,
        shared: Shared,
    ) -> None:
        self.name = name
        self.iteration = iteration
        self.iterations = ticket.iterations
        self.model = ticket.model
        self.support = None if name == "full" or learnt is None else learnt.support
        self.theta0 = theta0
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
        self._shared = shared
        self.resumed = shared.stored is not None
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

    def optimizer(
        self,
        max_grad_norm: float | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        **adamw: Any,
    ) -> torch.optim.Optimizer:
        """The optimizer of this phase: AdamW over everything, or `MaskedAdamW` over the support.

        The L1 term is inside it, and so is clipping: the order is mask, L1, clip in both phases.

        Args:
            max_grad_norm: Norm to clip to; default: no clipping.
            groups: Parameter groups with settings of their own, such as weight_decay; "params" are
                names. Default: one group.
            **adamw: lr (default 5e-5), betas, eps, weight_decay (default 0); for the sparse phase
                also gather="hook".

        Returns:
            A `torch.optim.Optimizer`: schedulers and gradient scalers work with it.

        Raises:
            ValueError: A trainable parameter is in no group or in two, a name is unknown, or a
                setting is out of range.
        """
        # Both phases check what only one of them uses: the sparse one may come days later.
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"Phase.optimizer: max_grad_norm must be positive, got {max_grad_norm}; None is no "
                "clipping"
            )
        if (gather := adamw.get("gather", "step")) not in GATHER:
            raise ValueError(
                f"Phase.optimizer: gather must be {' or '.join(map(repr, GATHER))}, got {gather!r}"
            )
        self.release()
        adamw = {"lr": 5e-5, "weight_decay": 0.0, **adamw}
        trainable = self._trainable()
        grouped = _grouped(trainable, groups or [{"params": list(trainable)}])
        if self.support is not None:
            self.made = sparse = MaskedAdamW(
                grouped,
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
        if not {"fused", "foreach"} & adamw.keys():
            # The fused step makes one pass where the default makes a dozen.
            adamw["fused"] = all(p.device.type in ("cpu", "cuda") for p in trainable.values())
        plain = [{**group, "params": [p for _, p in group["params"]]} for group in grouped]
        self.made = torch.optim.AdamW(plain, **adamw)
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
        epoch must be settled by the random state when it begins, as with torch's samplers. Workers
        are started anew for each epoch, persistent ones too: what they draw must not hang on the
        epochs that an interrupted run has not seen.

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
        if isinstance(loader, Iterator):
            raise ValueError(
                "Phase.batches: the loader is an iterator, which ends after one epoch; give a "
                "DataLoader, a list, or another object that can be iterated again"
            )
        self._batched = True
        return self._batches(loader, steps, accumulate, list(keep))

    def _batches(
        self, loader: Iterable[Any], steps: int, accumulate: int, keep: list[Any]
    ) -> Iterator[Any]:
        data = _Data(loader, self._shared)
        micro = 0
        if self.resumed:
            micro = self._restore(data, keep)
        self._bar = _Bar(self.title, steps, self.step, self._shared.progress)
        try:
            while self.step < steps:
                # The state is stored after this batch: its draw has to be repeatable.
                due = (micro + 1) % accumulate == 0
                saving = due and self._shared.due(self.step + 1, steps)
                batch = data.next(remember=saving)
                micro += 1
                self.step_due = due
                self.step += due
                yield batch
                if due:
                    self._bar.to(self.step)
                if saving:
                    self.check_losses()
                    self._shared.save(self._captured(data, micro, keep))
                    self._saved_step = self.step
            self.check_losses()
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
            self.check_losses()

    def check_losses(self) -> None:
        """Reads the losses that `log` has kept.

        Raises:
            TrainingDiverged: One is NaN or infinite.
        """
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
            kept = f"The state of step {self._saved_step} is in {self._shared.stored}"
        elif self._shared.run is not None:
            kept = f"The state from before this phase is in {self._shared.run.folder}"
        return TrainingDiverged(
            f"LotteryTicket: {what} of the {self.title}, so training has diverged. {kept}. "
            "A lower learning rate, a warm-up or max_grad_norm may help"
        )

    def offer(self, score: float, better: str = "lower") -> bool:
        """Keeps the weights if their score is the best so far; the best ones decide the outcome of
        the phase.

        Buffers are no part of φ: with running statistics, as a BatchNorm has, the score is that of
        weights and statistics together, and the statistics do not stay.

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
        if self._shared.run is not None:
            self._shared.run.write("best", weights)
        else:
            self._best_weights = cloned(weights, self._snapshot_device)
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
                    far.append((a.float() - b.float()).abs().sum(dtype=torch.float64))
                if name in self.eligible:
                    moved.append((a != b).sum())
        total = sum(self.theta0[name].numel() for name in self.eligible)
        return {
            "l1": self.l1 / self.l1_numel * sum(map(float, far)),
            "moved": sum(map(int, moved)) / total,
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
                entries(parameters[name], at).cpu().float()
                - entries(self.theta0[name], at).cpu().float()
                for name, at in self.support
            ]
            values = torch.cat([torch.zeros(0), *pieces])
        heads = {n: p.detach() for n, p in trainable.items() if n not in self.eligible}
        return {"values": values, "heads": heads}

    def _best(self) -> dict[str, Any] | None:
        if self.best is None or self._best_weights is not None:
            return self._best_weights
        assert self._shared.run is not None
        best: dict[str, Any] = self._shared.run.read("best")
        return best

    def put_best(self) -> None:
        """Puts the best weights of the full phase into the model."""
        if (best := self._best()) is not None:
            write(self._trainable(), best["parameters"])

    def outcome(self) -> Learnt:
        """The outcome of the sparse phase."""
        assert self.support is not None
        found = self._best() or cloned(self._weights())
        return Learnt(self.support, found["values"].cpu(), found["heads"])

    def check_weights(self) -> None:
        """Looks at the weights that are trained.

        Raises:
            TrainingDiverged: One is NaN or infinite.
        """
        where = f"at step {self.step}" if self.step else "at the end"
        for name, parameter in self._trainable().items():
            if not _finite(parameter.detach()):
                raise self._diverged(f"{name!r} holds NaN or infinity {where}")

    def _captured(self, data: _Data, micro: int, keep: list[Any]) -> dict[str, Any]:
        assert self.made is not None
        self.check_weights()
        parameters = self._trainable()
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
    def _restore(self, data: _Data, keep: list[Any]) -> int:
        """Puts everything where the stored state has it; gives the batches done."""
        assert self.made is not None
        assert self._shared.run is not None
        state = self._shared.run.read("state")
        if len(state["keep"]) != len(keep):
            raise ValueError(
                f"Phase.batches: the stored state has {len(state['keep'])} items in keep, this "
                f"loop {len(keep)}; give the same ones in the same order"
            )
        self.step, self._saved_step = state["step"], state["step"]
        self.best = state["best"]
        write(self._trainable(), state["parameters"])
        put_buffers(self.model, state["buffers"])
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

    def __init__(self, loader: Iterable[Any], shared: Shared) -> None:
        self.loader = loader
        self.epoch = -1
        self.position = 0
        self._batches: Iterator[Any] = iter(())
        self._at_epoch: dict[str, Any] = {}
        self._at_draw: dict[str, Any] = {}
        self._parts = _parts(loader)
        shared.rewind(self._parts)
        # A collator may make its generator with its first batch: that one is not there yet.
        found = [_generator(part) for part in self._parts]
        self._given = len({id(g) for g in found if isinstance(g, torch.Generator)})

    def _drawn(self) -> dict[str, Any]:
        return {
            "random": random_state(),
            "generators": [_generator_state(part) for part in self._parts],
        }

    def _redraw(self, state: Mapping[str, Any]) -> None:
        set_random_state(state["random"])
        for part, value in zip(self._parts, state["generators"], strict=True):
            _set_generator(part, value)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        self._at_epoch = self._at_draw = self._drawn()
        for part in _own_parts(self.loader):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        self._batches = iter(())
        for part in self._parts:
            # Workers that live on would keep what they have drawn in epochs before.
            if getattr(part, "persistent_workers", False) and hasattr(part, "_iterator"):
                part._iterator = None
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
            "given": self._given,
            "at_epoch": self._at_epoch,
            "at_draw": self._at_draw,
            "now": self._drawn(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        stored = (len(state["now"]["generators"]), state["given"])
        for what, before, now in zip(
            ("parts", "generators"), stored, (len(self._parts), self._given), strict=True
        ):
            if before != now:
                raise ValueError(
                    f"Phase.batches: the loader of the stored state has {before} {what}, this one "
                    f"{now}; build it in the same way"
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


def _own_parts(loader: Any) -> list[Any]:
    """A loader and what it is made of."""
    parts = [loader, getattr(loader, "collate_fn", None), getattr(loader, "dataset", None)]
    for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        parts += [sampler, getattr(sampler, "sampler", None)]
    return list({id(part): part for part in parts if part is not None}.values())


def _parts(loader: Any) -> list[Any]:
    """The parts of a loader, and of the loaders by source that it may hold."""
    parts = _own_parts(loader)
    if isinstance(held := getattr(loader, "batches", None), Mapping):
        parts += [part for one in held.values() for part in _own_parts(one)]
    return parts


def _generator(part: Any) -> Any:
    return getattr(part, "generator", None)


def _generator_state(part: Any) -> Tensor | None:
    generator = _generator(part)
    return generator.get_state() if isinstance(generator, torch.Generator) else None


def _set_generator(part: Any, state: Tensor | None) -> None:
    """Puts the generator of a part into a state; None: it has none yet."""
    generator = _generator(part)
    if not isinstance(generator, torch.Generator):
        if state is None:
            return
        generator = part.generator = torch.Generator()
    if state is None:
        part.generator = None
    else:
        generator.set_state(state)


class Shared:
    """What the phases of one fit share: the run on disk, if any, and how to report.

    Args:
        run: The run; None without a folder.
        save_every: Steps from one stored state to the next; None stores the last of a phase alone.
        progress: Whether to show progress bars.
    """

    def __init__(
        self, run: Run | None = None, save_every: int | None = None, progress: bool = False
    ) -> None:
        self.run = run
        self.save_every = save_every
        self.progress = progress
        # The loaders' generators, with their states before `fit` used them, and the parts that had
        # none then.
        self._drawn: dict[int, tuple[torch.Generator, Tensor]] = {}
        self._without: dict[int, Any] = {}

    def rewind(self, parts: Iterable[Any] = ()) -> None:
        """Puts the loaders' generators where the first phase found them.

        Args:
            parts: Parts of a loader, which may be new.
        """
        for part in parts:
            if not isinstance(generator := _generator(part), torch.Generator):
                self._without[id(part)] = part
            elif id(part) not in self._without and id(generator) not in self._drawn:
                self._drawn[id(generator)] = (generator, generator.get_state())
        for generator, state in self._drawn.values():
            generator.set_state(state)
        for part in self._without.values():
            _set_generator(part, None)

    @property
    def stored(self) -> str | None:
        """The file of the state inside the phase."""
        return None if self.run is None else self.run.path("state")

    def due(self, step: int, last: int) -> bool:
        """Whether the state is stored after a step: the last one's always is."""
        if self.run is None:
            return False
        return step == last or (self.save_every is not None and step % self.save_every == 0)

    def save(self, state: Mapping[str, Any]) -> None:
        assert self.run is not None
        self.run.write("state", state)
        self.run.commit()


class _Bar:
    """A progress bar on the terminal; nothing where stderr is none."""

    def __init__(self, title: str, steps: int, done: int, shown: bool) -> None:
        self.loss: float | None = None
        self._bar: Any = None
        if not (shown and sys.stderr.isatty()):
            return
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(title, total=steps, completed=done, rate="")
        self._bar.start()

    def to(self, step: int) -> None:
        if self._bar is not None:
            speed = self._bar.tasks[0].speed
            rate = "" if speed is None else f"{speed:.1f} it/s"
            loss = "" if self.loss is None else f" loss {self.loss:.4g}"
            self._bar.update(self._task, completed=step, rate=rate + loss)

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
        self.anchors = [theta0[n] for n in anchored] if coeff else []
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
                if parameter.grad is None:
                    continue
                grad, anchor = _contiguous_grad(parameter), self.anchors[i]
                if anchor.device == parameter.device:
                    groups.setdefault((parameter.device, parameter.dtype), []).append(i)
                    continue
                # θ0 that is kept elsewhere comes piece by piece, or nothing would be saved.
                whole = (t.detach().view(-1).split(CHUNK) for t in (grad, parameter, anchor))
                for g, now, start in zip(*whole, strict=True):
                    anchor_l1_([g], [now], [start.to(now.device)], self.coeff)
            for members in groups.values():
                anchor_l1_(
                    [_contiguous_grad(self.anchored[i]) for i in members],
                    [self.anchored[i].detach() for i in members],
                    [self.anchors[i] for i in members],
                    self.coeff,
                )
        if self.max_grad_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)


def _grouped(
    trainable: Mapping[str, nn.Parameter], groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Groups of names as groups of (name, parameter) pairs."""
    named = Counter(name for group in groups for name in group["params"])
    for name in [*named, *trainable]:
        if name not in trainable or named[name] != 1:
            found = "is no trainable parameter"
            if name in trainable:
                found = f"is in {named[name]} groups, not in one"
            raise ValueError(f"Phase.optimizer: groups: {name!r} {found}")
    return [{**g, "params": [(name, trainable[name]) for name in g["params"]]} for g in groups]


def _contiguous_grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    if not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    return parameter.grad


def entries(tensor: Tensor, at: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[at.to(tensor.device)]


@torch.no_grad()
def write(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        target = targets[name].detach()
        # An expanded buffer holds one value where it shows many: write that one.
        once = tuple(slice(None if stride else 1) for stride in target.stride())
        target[once].copy_(value[once])


@torch.no_grad()
def put_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Writes buffers, and makes those that a model has only after its first forward pass."""
    found = dict(model.named_buffers())
    for name, value in values.items():
        if name in found and found[name].shape == value.shape:
            write(found, {name: value})
            continue
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        device = next(model.parameters()).device
        if leaf in module._buffers:
            module._buffers[leaf] = value.to(device)
        else:
            module.register_buffer(leaf, value.to(device), persistent=False)


def cloned(tree: Any, device: torch.device | str | None = None) -> Any:
    """A copy of a dictionary of tensors, at any depth."""
    if isinstance(tree, Tensor):
        copy = tree.detach().clone()
        return copy if device is None else copy.to(device)
    return {name: cloned(value, device) for name, value in tree.items()}


def _finite(tensor: Tensor) -> bool:
    """Whether all values are, without a temporary of the tensor's size."""
    if not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
