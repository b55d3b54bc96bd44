"""The optimizer step: of selected entries, of every parameter, and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import sparse_ft_kernels as ops
from sparse_ft_kernels.contract import OPS

from .. import inputs
from ..case import Case, Job, Provider, Setting, Target, case

LR = 1e-3


def _parameters(weights: list[Tensor], grads: list[Tensor]) -> list[nn.Parameter]:
    """The same memory as parameters with gradients."""
    out = [nn.Parameter(w) for w in weights]
    for parameter, grad in zip(out, grads, strict=True):
        parameter.grad = grad
    return out


def _rate(setting: Setting) -> Tensor:
    return torch.tensor(LR, dtype=torch.float64).to(setting.device)


def _zero_state(nnz: int, device: str) -> list[Tensor]:
    return [torch.zeros(nnz, device=device) for _ in range(3)]


def _step_of_few(weights: list[Tensor], grads: list[Tensor]) -> None:
    """Three steps of some entries of the first tensors beside torch's AdamW, masked gradients."""
    start = [w.view(-1)[:5000].float().clone() for w in weights[:3]]
    few_grads = [g.view(-1)[:5000].float().clone() for g in grads[:3]]
    device = str(start[0].device)
    k = max(1, sum(w.numel() for w in start) // 10)
    idx, ptr = ops.select_random(start, k=k, seed=1)
    at = inputs.positions(start, idx, ptr)
    mine = [w.clone() for w in start]
    parameters = _parameters([w.clone() for w in start], few_grads)
    for parameter, mask in zip(parameters, inputs.masks(start, at), strict=True):
        assert parameter.grad is not None
        parameter.grad = parameter.grad * mask
    peer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    state, theta0 = _zero_state(k, device), inputs.taken(start, at)
    step = torch.zeros((), device=device)
    for _ in range(3):
        peer.step()
        ops.masked_adamw_(
            mine, idx, ptr, few_grads, state[0], state[1], state[2], theta0, step, lr=LR
        )
    for w, p in zip(mine, parameters, strict=True):
        assert torch.allclose(w, p.detach(), rtol=1e-6, atol=1e-8)


@case("masked_adamw_", input_bytes=lambda s: 5 * s.numel * s.width + 40 * s.nnz)
def masked_adamw(setting: Setting) -> Case:
    """One optimizer step of the selected entries."""
    start, gradient = (inputs.tensors(setting, seed) for seed in (0, 1))
    weights, grads = ([t.clone() for t in ts] for ts in (start, gradient))
    n, k, device = setting.numel, setting.nnz, setting.device
    idx, ptr = inputs.support(setting, weights, 0)
    at = inputs.positions(weights, idx, ptr)
    parameters = _parameters(weights, grads)
    on_gpu = device == "cuda"

    @cache
    def masks() -> list[Tensor]:
        return inputs.masks(weights, at)

    @cache
    def dense_optimizer() -> torch.optim.Optimizer:
        """One for all kinds of dense step: their state is the same."""
        return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, capturable=on_gpu)

    @cache
    def float_masks() -> list[Tensor]:
        return [mask.to(setting.torch_dtype) for mask in masks()]

    def dense(
        *, fused: bool = False, foreach: bool = False, wanted: Callable[[], list[Tensor]] = masks
    ) -> Job:
        """A dense step after a multiplication by masks."""
        optimizer, by = dense_optimizer(), wanted()

        def run() -> object:
            optimizer.param_groups[0].update(fused=fused, foreach=foreach)
            for p, mask in zip(parameters, by, strict=bool(by)):
                assert p.grad is not None
                p.grad.mul_(mask)
            return optimizer.step()

        return run

    def ours() -> Job:
        exp_avg, exp_avg_sq, delta = _zero_state(k, device)
        theta0 = inputs.taken(start, at)
        step, lr = torch.zeros((), device=device), _rate(setting)
        return lambda: ops.masked_adamw_(
            weights, idx, ptr, grads, exp_avg, exp_avg_sq, delta, theta0, step, lr=lr
        )

    def compact() -> Job:
        parameter = nn.Parameter(inputs.taken(start, at).float())
        parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(
            [parameter], lr=LR, weight_decay=0.0, fused=True, capturable=on_gpu
        )
        counts = [len(where) for where in at]

        def run() -> None:
            assert parameter.grad is not None
            taken = [g.view(-1).index_select(0, i) for g, i in zip(grads, at, strict=True)]
            parameter.grad.copy_(torch.cat(taken))
            optimizer.step()
            for w, i, new in zip(weights, at, parameter.detach().split(counts), strict=True):
                w.view(-1).index_copy_(0, i, new.to(w.dtype))

        return run

    def sparse_adam() -> Job:
        own = [nn.Parameter(w) for w in weights]
        optimizer = torch.optim.SparseAdam(own, lr=LR)
        where = [
            torch.stack(torch.unravel_index(i, w.shape)) for w, i in zip(weights, at, strict=True)
        ]

        def run() -> object:
            for p, g, i, j in zip(own, grads, at, where, strict=True):
                p.grad = torch.sparse_coo_tensor(
                    j, g.view(-1)[i], g.shape, is_coalesced=True, check_invariants=False
                )
            return optimizer.step()

        return run

    def check(_: Any) -> None:
        """A constant gradient moves every tuned weight by lr against its sign, nothing else."""
        tolerance = (0.02 if setting.dtype == "fp32" else 0.4) * LR
        moved = inputs.taken(weights, at).float() - inputs.taken(start, at).float()
        signs = inputs.taken(gradient, at).float()
        # Beside ε a gradient may be too small to count.
        clear = signs.abs() > 1e-4
        assert bool(((moved + LR * signs.sign()).abs()[clear] <= tolerance).all())
        changed = sum(int((w != s).count_nonzero()) for w, s in zip(weights, start, strict=True))
        assert changed == int((moved != 0).sum()), "a weight that is not selected was changed"

    def check_all(_: Any) -> None:
        """Every weight moves against its gradient; how far depends on the steps before."""
        w, s, g = (torch.cat([x.view(-1)[:100_000] for x in y]) for y in (weights, start, gradient))
        moved = w.float() - s.float()
        assert bool((moved * g.float() <= 0).all())
        assert float((moved != 0).float().mean()) > 0.9

    def reset() -> None:
        for w, s, g, first in zip(weights, start, grads, gradient, strict=True):
            w.copy_(s)
            g.copy_(first)

    def verify() -> None:
        _step_of_few(start, gradient)
        reset()
        ours()()
        check(None)
        reset()

    width, moments = setting.width, 2 * setting.width * n
    reference = "composable-sft (Ansell et al., 2022): gradient times mask, then a dense optimizer"
    fused, default = "gradient × mask, fused AdamW", "gradient × mask, default AdamW"
    providers = {
        # Moments, delta, indices and theta0 of the selected entries.
        "sparse_ft": Provider(
            ours, check=check, captured=True, state_bytes=(3 * 4 + 2 + width) * k
        ),
        fused: Provider(
            lambda: dense(fused=True), reference, check, moments + n, moments + n, captured=True
        ),
        "gradient × float mask, fused AdamW": Provider(
            lambda: dense(fused=True, wanted=float_masks),
            "the same with masks of the weights' data type, so that the product is a plain one",
            check,
            moments + n + n * width,
            moments + n * width,
            captured=True,
        ),
        "gradient × mask, foreach AdamW": Provider(
            lambda: dense(foreach=True), reference, check, 5 * n * width, moments + n
        ),
        "compact parameters, fused AdamW": Provider(
            compact,
            "gather into a compact fp32 parameter, torch's fused AdamW, index_copy_ back",
            check,
            40 * k,
            (3 * 4 + 8) * k,
            captured=True,
        ),
        "torch.optim.SparseAdam": Provider(
            sparse_adam,
            "sparse COO gradients; dense moments, no weight decay",
            check,
            moments + 60 * k,
            moments + 16 * k,
        ),
    }
    if not on_gpu:
        providers[default] = Provider(dense, reference, check, moments + 3 * n, moments + n)
    # The last: what it does to the moments of unselected entries would move them in the others.
    bare = "fused AdamW, unmasked"
    providers[bare] = Provider(
        lambda: dense(fused=True, wanted=list),
        "torch.optim.AdamW(fused=True): not the same job, but the least that a dense one costs",
        check_all,
        moments,
        moments,
        whole=False,
    )
    targets: list[Target] = []
    if on_gpu:
        targets += [Target("floor", 0.6)] if n >= 1e9 and setting.density >= 0.01 else []
        targets += [Target("peer", 10, fused)] if setting.density <= 0.01 else []
    elif setting.density <= 0.028:
        targets += [
            Target("peer", 5, fused, quick=2),
            Target("peer", 1.4, bare),
            Target("peer", 10, default, quick=4),
        ]
    return Case(
        "masked_adamw",
        setting,
        OPS["masked_adamw_"].bytes_moved(weights, idx, ptr, None, grads)
        + 3 * inputs.surplus(setting, at),
        providers,
        verify,
        reset,
        targets=tuple(targets),
    )


@case("gather", input_bytes=lambda s: s.numel * s.width + 8 * s.nnz)
def gather(setting: Setting) -> Case:
    """The gradient of the selected entries, compact, with its squared norm."""
    grads = inputs.tensors(setting, 1)
    k, device = setting.nnz, setting.device
    idx, ptr = inputs.support(setting, grads, 0)
    at = inputs.positions(grads, idx, ptr)
    numels = [g.numel() for g in grads]
    out = torch.empty(k, device=device)

    @cache
    def masks() -> list[Tensor]:
        return inputs.masks(grads, at)

    def masked_select() -> Job:
        masks()

        def run() -> tuple[Tensor, Tensor]:
            taken = [g.masked_select(mask) for g, mask in zip(grads, masks(), strict=True)]
            flat = torch.cat(taken).float()
            return flat, flat.square().sum()

        return run

    def index_select() -> tuple[Tensor, Tensor]:
        taken = [g.view(-1).index_select(0, i) for g, i in zip(grads, at, strict=True)]
        flat = torch.cat(taken).float()
        return flat, flat.square().sum()

    def check(result: Any) -> None:
        found, norm = result
        exact = inputs.taken(grads, at).double()
        assert torch.equal(found, exact.float())
        assert torch.allclose(norm.double(), exact.square().sum(), rtol=1e-4)

    def verify() -> None:
        norm, bad = ops.gather(grads, numels, idx, ptr, out)
        exact = inputs.taken(grads, at).double()
        assert torch.equal(out, exact.float())
        assert torch.allclose(norm, exact.square().sum(), rtol=1e-12)
        assert float(bad) == 0

    return Case(
        "gather",
        setting,
        OPS["gather"].bytes_moved(grads, numels, idx, ptr, out, None, False, None, 0.0)
        + inputs.surplus(setting, at),
        {
            "sparse_ft": Provider(
                lambda: lambda: ops.gather(grads, numels, idx, ptr, out), captured=True
            ),
            "index_select": Provider(
                lambda: index_select,
                "index_select per parameter, cat, norm",
                check,
                20 * k,
                captured=True,
            ),
            "masked_select": Provider(
                masked_select,
                "masked_select per parameter, cat, norm",
                check,
                setting.numel + 20 * k,
            ),
        },
        verify,
        targets=(Target("floor", 0.6),),
    )


@case("dense_adamw_", input_bytes=lambda s: s.numel * (4 * s.width + 10), uses_density=False)
def dense_adamw(setting: Setting) -> Case:
    """One optimizer step of every parameter; bf16 weights with the low halves of a split master."""
    start, gradient = (inputs.tensors(setting, seed) for seed in (0, 1))
    weights, anchors = ([w.clone() for w in start] for _ in range(2))
    n, device = setting.numel, setting.device
    split, on_gpu = setting.dtype == "bf16", device == "cuda"
    lr = _rate(setting)

    @cache
    def state() -> list[list[Tensor]]:
        moments = [[torch.zeros(w.shape, device=device) for w in weights] for _ in range(2)]
        master = [torch.zeros_like(w, dtype=torch.int16) for w in weights if split]
        return [*moments, master]

    step = torch.zeros((), device=device)

    @cache
    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            _parameters(weights, gradient), lr=LR, weight_decay=0.01, capturable=on_gpu
        )

    def ours(l1: float) -> Job:
        exp_avg, exp_avg_sq, master = state()
        far = anchors if l1 else []
        return lambda: ops.dense_adamw_(
            *(weights, gradient, exp_avg, exp_avg_sq, master, far, step),
            lr=lr,
            weight_decay=0.01,
            l1=l1,
        )

    def torchs(*, fused: bool = False, foreach: bool = False) -> Job:
        dense = optimizer()

        def run() -> object:
            dense.param_groups[0].update(fused=fused, foreach=foreach)
            return dense.step()

        return run

    def reset() -> None:
        for w, s in zip(weights, start, strict=True):
            w.copy_(s)

    def check(_: Any) -> None:
        tolerance = (0.05 if setting.dtype == "fp32" else 0.4) * LR
        for w, s, g in zip(weights, start, gradient, strict=True):
            moved = w.view(-1).float() - s.view(-1).float()
            clear = g.view(-1).float().abs() > 1e-5
            wanted = -LR * g.view(-1).float().sign()
            assert bool(((moved - wanted).abs()[clear] <= tolerance).all())

    def verify() -> None:
        """Three steps of 10,000 entries beside torch's, in fp32."""
        mine = [start[0].view(-1)[:10_000].float().clone()]
        few = gradient[0].view(-1)[:10_000].float().clone()
        peer = nn.Parameter(mine[0].clone())
        peer.grad = few
        small = [[torch.zeros_like(mine[0])] for _ in range(2)]
        count, adamw = torch.zeros((), device=device), torch.optim.AdamW([peer], lr=LR)
        for _ in range(3):
            adamw.step()
            ops.dense_adamw_(
                mine, [few], small[0], small[1], [], [], count, lr=LR, weight_decay=0.01
            )
        assert torch.allclose(mine[0], peer.detach(), rtol=1e-6, atol=1e-7)

    name = "sparse_ft, split master" if split else "sparse_ft"
    beside = "bf16 moments, no master" if split else "the same state"
    # Gradient read; weight, moments and the low half of a split master read and written.
    bytes_moved = n * (3 * setting.width + 16 + (4 if split else 0))
    moments = 2 * setting.width * n
    source = "torch.optim.AdamW"
    providers = {
        name: Provider(
            lambda: ours(0.0), check=check, state_bytes=(10 if split else 8) * n, captured=True
        ),
        f"{name}, with L1": Provider(lambda: ours(1e-9), check=check, captured=True),
        f"torch fused AdamW, {beside}": Provider(
            lambda: torchs(fused=True), source, check, moments, moments, captured=True
        ),
        f"torch foreach AdamW, {beside}": Provider(
            lambda: torchs(foreach=True), source, check, 5 * n * setting.width, moments
        ),
    }
    return Case(
        "dense_adamw",
        setting,
        bytes_moved,
        providers,
        verify,
        reset,
        targets=(Target("floor", 0.85),) if on_gpu else (),
    )


@case("anchor_l1_", input_bytes=lambda s: 3 * s.numel * s.width, uses_density=False)
def anchor_l1(setting: Setting) -> Case:
    """The L1 pull toward the start, added to dense gradients, and its loss."""
    weights, anchors, start = (inputs.tensors(setting, seed) for seed in (0, 1, 2))
    grads = [g.clone() for g in start]
    coeff = 1e-3

    def per_parameter() -> Tensor:
        total = torch.zeros((), device=setting.device)
        for g, w, a in zip(grads, weights, anchors, strict=True):
            difference = w - a
            g.add_(difference.sign(), alpha=coeff)
            total += difference.abs().sum(dtype=torch.float32)
        return total

    def autograd() -> Tensor:
        own = _parameters(weights, grads)
        loss = sum(
            ((p.float() - a.float()).abs().sum() for p, a in zip(own, anchors, strict=True)),
            torch.zeros((), device=setting.device),
        )
        (coeff * loss).backward()
        return loss.detach()

    def reset() -> None:
        for g, s in zip(grads, start, strict=True):
            g.copy_(s)

    def check(result: Any) -> None:
        exact = 0.0
        tolerance = 1e-6 if setting.dtype == "fp32" else 1e-3
        for g, s, w, a in zip(grads, start, weights, anchors, strict=True):
            difference = w.double() - a.double()
            exact += float(difference.abs().sum())
            wanted = s.double() + coeff * difference.sign()
            assert torch.allclose(g.double(), wanted, rtol=1e-2, atol=tolerance)
        assert abs(float(result) - exact) <= 1e-2 * exact

    def verify() -> None:
        reset()
        check(ops.anchor_l1_(grads, weights, anchors, coeff))
        reset()

    size = setting.numel * setting.width
    return Case(
        "anchor_l1",
        setting,
        OPS["anchor_l1_"].bytes_moved(grads, weights, anchors, coeff),
        {
            "sparse_ft": Provider(
                lambda: lambda: ops.anchor_l1_(grads, weights, anchors, coeff),
                check=check,
                captured=True,
            ),
            "per parameter": Provider(
                lambda: per_parameter, "sub, sign, add_, abs, sum per parameter", check, size
            ),
            "autograd": Provider(
                lambda: autograd, "LT-SFT §3.2 as written: |θ − θ0| in the loss", check, 4 * size
            ),
        },
        verify,
        reset,
    )
