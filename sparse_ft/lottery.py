"""LotteryTicket: both phases of LT-SFT around any training function.

Full tuning finds the entries that move most; everything is rewound; sparse tuning of those entries
alone gives φ (Ansell et al., ACL 2022, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft_kernels import anchor_l1_, digest

from .compose import Applied, active
from .delta import SparseDelta
from .families import aliases, named_parameters, unusable
from .optim import MaskedAdamW
from .select import Eligible, eligible_parameters, resolve_k, select
from .snapshot import Snapshot
from .tiles import Support

__all__ = ["LotteryTicket", "Phase"]


@dataclass
class Phase:
    """What a training function gets: the model at its start, and this phase's optimizer.

    Attributes:
        name: "full" or "sparse".
        model: The model, at θ0.
        support: The selected entries; None in the full phase.
    """

    name: str
    model: nn.Module
    support: Support | None
    theta0: Mapping[str, Tensor]
    l1: float
    l1_heads: bool
    eligible: Collection[str]
    made: torch.optim.Optimizer | None = None

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
            self.made = MaskedAdamW(
                self.model,
                self.support,
                self.theta0,
                l1=self.l1,
                l1_heads=self.l1_heads,
                max_grad_norm=max_grad_norm,
                **adamw,
            )
            return self.made
        adamw.pop("gather", None)
        trainable = {n: p for n, p in named_parameters(self.model).items() if p.requires_grad}
        if not {"fused", "foreach"} & adamw.keys():
            # The fused step makes one pass where the default makes a dozen.
            adamw["fused"] = all(p.device.type in ("cpu", "cuda") for p in trainable.values())
        optimizer = torch.optim.AdamW(trainable.values(), **adamw)
        numel = sum(p.numel() for p in self.model.parameters())
        anchored = {n: p for n, p in trainable.items() if self.l1_heads or n in self.eligible}
        optimizer.register_step_pre_hook(
            _AnchorAndClip(trainable, anchored, self.theta0, self.l1 / numel, max_grad_norm)
        )
        self.made = optimizer
        return optimizer

    def release(self) -> None:
        """Takes the hooks of this phase's optimizer off the model."""
        if isinstance(self.made, MaskedAdamW):
            self.made.detach_hooks()


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
            nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)


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

    Args:
        model: Any module. Where a composition is on it (a source language's SFT, say), that is the
            start: φ does not contain it, and the result records that it was trained on it.
        k: Entries to select.
        density: Their share of the eligible entries instead.
        l1: λ of the term λ/N · Σ|θ − θ0| in both phases (the paper: 0.1 for languages, 0 for
            tasks).
        l1_heads: Whether that sum holds the heads too, as in the reference implementation.
        eligible: `(name, parameter) -> bool`, or names; default: the trainable parameters of the
            backbone.
        criterion: "magnitude" (LT-SFT), "random" (RAND-SFT: no full phase), or a function, as in
            `sparse_ft.select`.
        seed: For "random".
        tie: As in `sparse_ft.select`.
        eps: Entries of the result with |φ| ≤ eps are dropped, if eps > 0 (the reference
            implementation: 1e-7).
        snapshot_device: Where to keep the start's values, for instance "cpu".

    Raises:
        ValueError: Nothing is eligible, a parameter is unusable, or k or density is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        k: int | None = None,
        density: float | None = None,
        l1: float = 0.0,
        l1_heads: bool = True,
        eligible: Eligible = None,
        criterion: str | Callable[[str, Tensor, Tensor | None], Tensor] = "magnitude",
        seed: int = 0,
        tie: str = "index",
        eps: float = 0.0,
        snapshot_device: torch.device | str | None = None,
    ) -> None:
        if not l1 >= 0:
            raise ValueError(f"LotteryTicket: l1 must not be negative, got {l1}")
        chosen = eligible_parameters(model, eligible)
        for name, parameter in named_parameters(model).items():
            if name in chosen and not parameter.requires_grad:
                raise ValueError(
                    f"LotteryTicket: {name!r} is eligible but frozen; set requires_grad on it, or "
                    "narrow eligible"
                )
            if (name in chosen or parameter.requires_grad) and (reason := unusable(parameter)):
                raise ValueError(f"LotteryTicket: parameter {name!r} {reason}")
        self.k = resolve_k(k, density, sum(p.numel() for p in chosen.values()))
        self.model = model
        self.l1 = l1
        self.l1_heads = l1_heads
        self.criterion = criterion
        self.seed = seed
        self.tie = tie
        self.eps = eps
        self.support: Support | None = None
        self.theta0: Snapshot | None = None
        self._eligible = set(chosen)
        self._snapshot_device = snapshot_device

    def fit(self, train: Callable[[Phase], Any], **meta: Any) -> SparseDelta:
        """Runs both phases and gives the model back as it was.

        Args:
            train: Called once per phase with a `Phase`; it trains `phase.model` with
                `phase.optimizer(...)`. What it leaves in the model at its end (the last state, or
                the best one) is what counts.
            **meta: Fields of the result's metadata, such as role, lang, task, license.

        Returns:
            φ, with the heads, as a `SparseDelta`. The model has its old values again, bit for bit,
            also after an exception; `sparse_ft.compose` puts φ on it.
        """
        model = self.model
        start = self.theta0 = Snapshot(model, self._snapshot_device)
        composition = active(model)
        phase: Phase | None = None
        try:
            if self.criterion != "random":
                train(self._phase("full", None))
            self.support = self._select(start)
            self._rewind(start)
            phase = self._phase("sparse", self.support)
            train(phase)
            return self._extract(phase, start, composition, meta)
        finally:
            if phase is not None:
                phase.release()
            self._rewind(start)

    def _rewind(self, start: Snapshot) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        start.restore(self.model)

    def _phase(self, name: str, support: Support | None) -> Phase:
        assert self.theta0 is not None
        return Phase(name, self.model, support, self.theta0, self.l1, self.l1_heads, self._eligible)

    def _select(self, start: Snapshot) -> Support:
        return select(
            self.model,
            start,
            k=self.k,
            criterion=self.criterion,
            eligible=self._eligible,
            seed=self.seed,
            tie=self.tie,
        )

    def _extract(
        self, phase: Phase, start: Snapshot, composition: Applied | None, meta: dict[str, Any]
    ) -> SparseDelta:
        criterion = self.criterion if isinstance(self.criterion, str) else "custom"
        meta.setdefault(
            "recipe",
            {
                "method": "RAND-SFT" if criterion == "random" else "LT-SFT",
                "criterion": criterion,
                "k_requested": self.k,
                "l1": self.l1,
                "eps": self.eps,
                "seed": self.seed,
            },
        )
        if composition is not None:
            meta.setdefault(
                "trained_on",
                [
                    {"id": content_id, "alpha": alpha}
                    for content_id, alpha in zip(composition.ids, composition.weights, strict=True)
                ],
            )
        assert phase.support is not None
        layout = phase.support.layout
        tied = aliases(self.model)
        if shared := {n: tied[n] for n in layout.names if n in tied}:
            meta.setdefault("aliases", shared)
        optimizer = phase.made
        if isinstance(optimizer, MaskedAdamW) and optimizer.holds(self.model):
            delta = optimizer.delta(self.eps, **meta)
        else:
            # The training function put other weights there: the best checkpoint, say.
            tuned = named_parameters(self.model)
            delta = SparseDelta.between(
                {n: start[n] for n in layout.names},
                {n: tuned[n].detach() for n in layout.names},
                phase.support,
                eps=self.eps,
                heads={
                    n: p for n, p in tuned.items() if p.requires_grad and n not in self._eligible
                },
                **meta,
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
