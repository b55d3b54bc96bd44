"""Loop: a ready training function for LotteryTicket, in plain PyTorch."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .kept import modes_kept, random_state_kept
from .lottery import Phase
from .phases import GATHER

__all__ = ["Length", "Loop"]

SCHEDULES = ("linear", "constant", "cosine")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Length:
    """How long a phase is.

    The rule of the LT-SFT reference implementation: epochs in steps, rounded down, not more than
    `max_steps`, not fewer than `min_steps` (and not fewer than 1).

    Args:
        steps: Optimizer steps.
        epochs: Passes over the data instead.
        min_steps: At least so many.
        max_steps: At most so many; alone, exactly so many.

    Raises:
        ValueError: Both or none of them are given, or one is not positive.
    """

    steps: int | None = None
    epochs: float | None = None
    min_steps: int | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not value > 0):
                raise ValueError(f"Length: {field.name} must be positive, got {value!r}")
            if value is not None and field.name != "epochs" and value != int(value):
                raise ValueError(
                    f"Length: {field.name} counts optimizer steps and must be whole, got "
                    f"{value!r}; passes over the data are epochs"
                )
        if self.steps is not None and self.epochs is not None:
            raise ValueError("Length: give steps or epochs, not both")
        if self.steps is None and self.epochs is None and self.max_steps is None:
            raise ValueError("Length: give steps, epochs or max_steps")
        if (self.min_steps or 0) > (self.max_steps or math.inf):
            raise ValueError(
                f"Length: min_steps is {self.min_steps}, above max_steps, {self.max_steps}"
            )

    def resolve(self, steps_per_epoch: float | None) -> int:
        """The optimizer steps.

        Args:
            steps_per_epoch: Optimizer steps of one pass (batches / accumulation, a fraction
                included); None where the data have no length.

        Raises:
            ValueError: Epochs were asked for and the data have no length.
        """
        steps: float = self.steps or self.max_steps or 0
        if self.epochs is not None:
            if steps_per_epoch is None:
                raise ValueError(
                    f"Length: {self.epochs} epochs of data that have no length; give steps"
                )
            # 0.29 · 100 is 28.999999999999996 in floating point, and 29 steps.
            steps = math.floor(round(self.epochs * steps_per_epoch, 6))
        steps = min(steps, self.max_steps or math.inf)
        return int(max(steps, self.min_steps or 1))


@dataclass(eq=False)
class Loop:
    """A training function for `LotteryTicket.fit`: the same loop in both phases.

    Args:
        batches: A `DataLoader` or another re-iterable of batches, or a function `(phase) -> one`.
            If it has `active(model, batch)`, as a `MultiSource` has, each batch is run inside that
            context. If it has `settings`, a run that is resumed must have the same;
            if it has `trained_on`, the result's metadata do.
        full: Length of the full phase; a number is steps.
        sparse: Length of the sparse phase; default: as the full one.
        loss: `(model, batch) -> scalar`; default: `model(**batch).loss`, with the batch moved to
            the model's device.
        lr: Peak learning rate; a pair gives the full and the sparse phase their own.
        schedule: "linear" (down to 0), "cosine" (idem) or "constant".
        warmup: Share of the steps over which the rate rises from 0, in [0, 1).
        accumulate: Batches for one step.
        max_grad_norm: Norm to clip to, > 0; None: no clipping.
        weight_decay: Decoupled decay of the tuned entries.
        betas: Decay rates of the moments.
        eps: ε of AdamW.
        gather: "step" or "hook", as in `MaskedAdamW`, for the sparse phase.
        precision: None, "bf16" or "fp16": autocast, for fp16 with a gradient scaler.
        evaluate: `(model) -> score`, or several by name; without gradients, in evaluation mode.
        metric: Which score decides; not needed where there is one.
        greater_is_better: Whether more of it is better; to be stated, unless `metric` ends in
            "loss" or "perplexity", of which less is better.
        evaluate_every: Steps between evaluations, or "epoch"; default: at the end of a phase alone.
            The best weights of a phase decide its outcome. Buffers are not part of it: see
            `Phase.offer`.
        seed: Seeds Python, NumPy and torch at the start of each phase; None leaves the state that
            `fit` gives.
        log: Gets a dictionary every `log_every` steps (phase, iteration, step, steps, loss, lr, l1,
            moved, grad_norm) and after each evaluation (phase, iteration, step, the scores).
        log_every: Steps.

    Raises:
        ValueError: A setting is out of range.
    """

    batches: Iterable[Any] | Callable[[Phase], Iterable[Any]]
    full: Length | int
    sparse: Length | int | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    lr: float | tuple[float, float] = 5e-5
    schedule: str = "linear"
    warmup: float = 0.0
    accumulate: int = 1
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    gather: str = "step"
    precision: str | None = None
    evaluate: Callable[[nn.Module], float | Mapping[str, float]] | None = None
    metric: str | None = None
    greater_is_better: bool | None = None
    evaluate_every: int | str | None = None
    seed: int | None = 0
    log: Callable[[dict[str, Any]], Any] | None = None
    log_every: int = 100

    def __post_init__(self) -> None:
        for field in fields(self):
            # NumPy's numbers seed nothing, and JSON has none.
            if isinstance(value := getattr(self, field.name), np.generic):
                setattr(self, field.name, value.item())
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"Loop: schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}"
            )
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(
                f"Loop: precision must be None, {' or '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"Loop: warmup must be a share in [0, 1), got {self.warmup}")
        every = self.evaluate_every
        if every not in (None, "epoch") and not (isinstance(every, int) and every > 0):
            raise ValueError(
                f'Loop: evaluate_every must be a number of steps or "epoch", got {every!r}'
            )
        if self.evaluate is None and (every is not None or self.metric is not None):
            raise ValueError("Loop: evaluate_every and metric need evaluate")
        if self.evaluate is not None and self.greater_is_better is None:
            if not (self.metric or "").endswith(("loss", "perplexity")):
                raise ValueError(
                    "Loop: greater_is_better: say whether more of the score is better, True (an "
                    f"accuracy) or False (a loss); metric is {self.metric!r}, which does not tell"
                )
            self.greater_is_better = False
        _length(self.full), self._length("sparse")
        if len(self._pair(self.lr)) != 2:
            raise ValueError(f"Loop: lr must be a number, or a pair (full, sparse), got {self.lr}")
        # What only the sparse phase would find is found before the full one.
        for lr in self._pair(self.lr):
            if not 0 <= lr < math.inf:
                raise ValueError(f"Loop: lr must be finite and not negative, got {self.lr}")
        if not self.weight_decay >= 0 or not self.eps >= 0:
            raise ValueError(
                "Loop: weight_decay and eps must not be negative, got "
                f"{self.weight_decay} and {self.eps}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Loop: betas must be two numbers in [0, 1), got {self.betas}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"Loop: max_grad_norm must be positive, got {self.max_grad_norm}; None is no "
                "clipping"
            )
        if self.gather not in GATHER:
            raise ValueError(
                f"Loop: gather must be {' or '.join(map(repr, GATHER))}, got {self.gather!r}"
            )
        for name in ("accumulate", "log_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Loop: {name} must be an integer ≥ 1, got {value!r}")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result of a run, as far as it is plain values: a run that is resumed
        must have the same."""
        ways = ("batches", "loss", "evaluate", "log", "log_every", "full", "sparse")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ways}
        return {
            **plain,
            "lr": self._pair(self.lr),
            "batches": getattr(self.batches, "settings", _count(self.batches)),
            "full": vars(_length(self.full)),
            "sparse": vars(self._length("sparse")),
        }

    @property
    def trained_on(self) -> list[dict[str, Any]]:
        """What the batches say of the SFTs below, for the metadata of the result."""
        return list(getattr(self.batches, "trained_on", ()))

    @staticmethod
    def _pair(value: Any) -> tuple[Any, Any]:
        return tuple(value) if isinstance(value, (tuple, list)) else (value, value)

    def _length(self, phase: str) -> Length:
        return _length(self.full if phase == "full" or self.sparse is None else self.sparse)

    def __call__(self, phase: Phase) -> None:
        """Trains one phase."""
        model, sparse = phase.model, phase.name == "sparse"
        if self.seed is not None:
            random.seed(self.seed)
            np.random.seed(self.seed % (1 << 32))  # noqa: NPY002  (what data collators draw from)
            torch.manual_seed(self.seed)
        batches: Any = self.batches
        if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
            batches = batches(phase)
        count = _count(batches)
        per_epoch = None if count is None else count / self.accumulate
        steps = self._length(phase.name).resolve(per_epoch)
        every = self._every(steps, per_epoch)

        optimizer = phase.optimizer(
            self.max_grad_norm,
            lr=self._pair(self.lr)[sparse],
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            gather=self.gather,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of(steps))
        device = next(model.parameters()).device
        scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        active = getattr(batches, "active", None)
        if (bind := getattr(batches, "bind", None)) is not None:
            # Before a stored state moves the weights: sources' SFTs belong to θ0.
            bind(model, phase.theta0)
        loss_of = self.loss or _loss
        mean, added = torch.zeros((), device=device), 0
        model.train()
        for batch in phase.batches(
            batches, steps, accumulate=self.accumulate, keep=[schedule, scaler]
        ):
            with contextlib.nullcontext() if active is None else active(model, batch):
                with self._autocast(device):
                    loss = loss_of(model, batch)
                if loss.numel() != 1:
                    raise ValueError(
                        f"Loop: loss must be one number, got shape {tuple(loss.shape)}; take its "
                        "mean over the batch"
                    )
                scaler.scale(loss / self.accumulate).backward()
            mean += loss.detach()
            added += 1
            if not phase.step_due:
                phase.log(loss)
                continue
            if not sparse and scaler.is_enabled():
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            rate = float(schedule.get_last_lr()[0])
            schedule.step()
            optimizer.zero_grad()
            phase.log(loss)
            if self.log is not None and (phase.step % self.log_every == 0 or phase.step == steps):
                self._report(phase, steps, float(mean) / added, rate)
                mean, added = torch.zeros_like(mean), 0
            if self.evaluate is not None and (phase.step % every == 0 or phase.step == steps):
                self._evaluate(phase)

    def _every(self, steps: int, per_epoch: float | None) -> int:
        """Steps between evaluations."""
        if isinstance(self.evaluate_every, int):
            return self.evaluate_every
        if self.evaluate_every is None:
            return steps
        if per_epoch is None:
            raise ValueError(
                'Loop: evaluate_every="epoch" with data that have no length; give steps'
            )
        return max(1, int(per_epoch))

    def _autocast(self, device: torch.device) -> torch.autocast:
        dtype = PRECISIONS.get(self.precision or "", torch.bfloat16)
        return torch.autocast(device.type, dtype, enabled=self.precision is not None)

    def _share_of(self, steps: int) -> Callable[[int], float]:
        """The learning rate over its peak, by step."""
        rise = math.ceil(self.warmup * steps)

        def share(step: int) -> float:
            if step < rise:
                return step / rise
            left = max(0.0, (steps - step) / max(1, steps - rise))
            if self.schedule == "linear":
                return left
            return 1.0 if self.schedule == "constant" else 0.5 - 0.5 * math.cos(math.pi * left)

        return share

    def _report(self, phase: Phase, steps: int, loss: float, lr: float) -> None:
        assert self.log is not None
        norm = phase.grad_norm
        self.log(
            {
                **_where(phase),
                "steps": steps,
                "loss": loss,
                "lr": lr,
                **phase.distance(),
                **({} if norm is None else {"grad_norm": float(norm)}),
            }
        )

    def _evaluate(self, phase: Phase) -> None:
        assert self.evaluate is not None
        model = phase.model
        # Training draws the same, however often it is interrupted by this.
        with modes_kept(model), torch.no_grad(), random_state_kept():
            model.eval()
            found = self.evaluate(model)
        scores = dict(found) if isinstance(found, Mapping) else {self.metric or "score": found}
        metric = self.metric or (next(iter(scores)) if len(scores) == 1 else None)
        if metric not in scores:
            raise ValueError(
                f"Loop: evaluate gave {', '.join(map(repr, scores)) or 'nothing'}; metric must "
                f"name the score that decides, got {metric!r}"
            )
        phase.offer(float(scores[metric]), "higher" if self.greater_is_better else "lower")
        if self.log is not None:
            self.log({**_where(phase), **{name: float(s) for name, s in scores.items()}})


def _length(length: Length | int) -> Length:
    return length if isinstance(length, Length) else Length(steps=length)


def _count(batches: Any) -> int | None:
    """How many batches there are, where that is known."""
    try:
        return len(batches)
    except TypeError:  # a DataLoader of an IterableDataset has a length only where that has one
        return None


def _where(phase: Phase) -> dict[str, Any]:
    return {"phase": phase.name, "iteration": phase.iteration, "step": phase.step}


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    device = next(model.parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    loss: Tensor = model(**moved).loss
    return loss
