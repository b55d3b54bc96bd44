"""Which entries to tune: the most changed ones, or random ones, of a whole model."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparse_ft_kernels as ops
from sparse_ft_kernels.contract import OPS

from .. import inputs
from ..case import Case, Job, Provider, Setting, Target, case

# The list of floats takes 32 bytes and about 60 ns an element: beyond this, minutes.
LIST_NUMEL = 30_000_000
# Beyond this the other peers say as much in less time.
KTHVALUE_NUMEL = 100_000_000


def _scores(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """|a − b| of all tensors as one vector, written once, without temporaries in fp32."""
    out = torch.empty(sum(x.numel() for x in a), device=a[0].device)
    pieces = out.split([x.numel() for x in a])
    for x, y, piece in zip(a, b, pieces, strict=True):
        torch.sub(x.float().view(-1), y.float().view(-1), out=piece)
    return out.abs_()


def _verify(a: list[Tensor], b: list[Tensor], k: int) -> float:
    """Proves that exactly the right entries are chosen, and returns the threshold.

    All above the threshold, and of those equal to it the first, in canonical order.
    """
    idx, ptr, info = ops.select_topk(a, b, k=k)
    threshold = float(info[:1].to(torch.int32).view(torch.float32))
    tied = k - int(info[2])
    above = 0
    for x, y, found in zip(a, b, inputs.positions(a, idx, ptr), strict=True):
        score = (x.float() - y.float()).abs().view(-1)
        wanted = score > threshold
        above += int(wanted.count_nonzero())
        equal = (score == threshold).nonzero().view(-1)[:tied]
        tied -= len(equal)
        wanted[equal] = True
        assert torch.equal(wanted.nonzero().view(-1), found)
    assert above == int(info[2]) < k == len(idx)
    assert tied == 0
    return threshold


@case("select_topk", input_bytes=lambda s: 2 * s.numel * s.width + 8 * s.numel)
def select_topk(setting: Setting) -> Case:
    """The k most changed of all parameters."""
    if setting.support == "uniform":
        a, b = (inputs.tensors(setting, seed) for seed in (0, 1))
    else:
        b = inputs.tensors(setting, 0)
        a = [
            (start.float() + change).to(setting.torch_dtype)
            for start, change in zip(b, inputs.drift(setting, 1), strict=True)
        ]
    n, k = setting.numel, setting.nnz
    threshold = float("nan")

    def verify() -> None:
        nonlocal threshold
        threshold = _verify(a, b, k)

    def check(result: Any) -> None:
        assert float(result) == threshold, f"{result} is not the threshold {threshold}"

    def partition() -> object:
        score = _scores(a, b).numpy()
        score.partition(n - k)
        return score[n - k]

    def as_list() -> object:
        differences: list[float] = []
        for x, y in zip(a, b, strict=True):
            differences.extend((x.float() - y.float()).abs().view(-1).tolist())
        least = np.partition(np.array(differences), n - k)[n - k]
        masks = [(x.float() - y.float()).abs() >= least for x, y in zip(a, b, strict=True)]
        assert sum(int(mask.sum()) for mask in masks) >= k
        return least

    providers = {
        "sparse_ft": Provider(lambda: lambda: ops.select_topk(a, b, k=k)),
        "torch.topk": Provider(
            lambda: lambda: torch.topk(_scores(a, b), k, sorted=False)[0].min(),
            "LoTA (Panda et al., 2024): topk of the concatenated differences",
            check,
            20 * n,
        ),
    }
    targets = [Target("peer", 5, "torch.topk", quick=3), Target("memory", 0.02, "torch.topk")]
    if setting.device == "cpu":
        # On a GPU one block of threads does it all, so that it takes seconds.
        if n <= KTHVALUE_NUMEL:
            providers["torch.kthvalue"] = Provider(
                lambda: lambda: torch.kthvalue(_scores(a, b), n - k + 1)[0],
                "SparseML: kthvalue of the concatenated scores",
                check,
                20 * n,
            )
        providers["numpy.partition"] = Provider(
            lambda: partition, "numpy.partition of the concatenated differences", check, 8 * n
        )
        as_lists = "list of floats, numpy.partition"
        if n <= LIST_NUMEL:
            providers[as_lists] = Provider(
                lambda: as_list,
                "composable-sft (Ansell et al., 2022): a list of all differences, then masks",
                check,
                60 * n,
            )
            targets.append(Target("peer", 50, as_lists, quick=10))
        targets.append(Target("peer", 10, "numpy.partition", quick=5))
    bf16_on_cpu = setting.dtype == "bf16" and setting.device == "cpu"
    targets.append(Target("floor", 1 / 2.5 if bf16_on_cpu else 1 / 1.5))
    return Case(
        "select_topk",
        setting,
        OPS["select_topk"].bytes_moved(a, b, k, None, None, False),
        providers,
        verify,
        yardstick="read",
        targets=tuple(targets),
    )


@case("select_random", input_bytes=lambda s: s.numel * s.width)
def select_random(setting: Setting) -> Case:
    """k entries at random, every set equally likely."""
    model = inputs.tensors(setting, 0)
    n, k, device = setting.numel, setting.nnz, setting.device

    def verify() -> None:
        """Right in number and spread: each tensor has its share, within six standard errors."""
        idx, ptr = ops.select_random(model, k=k, seed=0)
        assert len(idx) == k
        for tensor, at in zip(model, inputs.positions(model, idx, ptr), strict=True):
            assert bool((at.diff() > 0).all())
            share = tensor.numel() / n
            spread = (k * share * (1 - share)) ** 0.5
            assert abs(len(at) - k * share) <= 6 * spread + 1

    def check(result: Any) -> None:
        assert isinstance(result, Tensor)
        assert len(result) == k
        assert bool((result.diff() > 0).all())

    def choice() -> object:
        drawn = np.random.default_rng(0).choice(n, k, replace=False, shuffle=False)
        return torch.from_numpy(np.sort(drawn))

    providers = {
        "sparse_ft": Provider(lambda: lambda: ops.select_random(model, k=k, seed=0)),
        "torch.randperm": Provider(
            lambda: lambda: torch.randperm(n, device=device)[:k].sort()[0],
            "a permutation of all positions, its first k in order",
            check,
            24 * n,
        ),
        "random scores, torch.topk": Provider(
            lambda: lambda: torch.topk(torch.rand(n, device=device), k, sorted=False)[1].sort()[0],
            "RAND-SFT by the selection of LT-SFT with random scores",
            check,
            16 * n,
        ),
    }
    if device == "cpu":
        providers["numpy Generator.choice"] = Provider(
            lambda: choice, "numpy.random.Generator.choice without replacement", check, 16 * n
        )
    return Case(
        "select_random",
        setting,
        OPS["select_random"].bytes_moved(model, k, 0, None, None),
        providers,
        verify,
        targets=(Target("peer", 5, "torch.randperm", quick=2),),
        note="there is next to nothing to move: it is arithmetic, a hash a parameter",
    )


@case("select_topk", input_bytes=lambda s: 12 * s.numel)
def index_build(setting: Setting) -> Case:
    """The support of given masks."""
    import sparse_ft as sf

    model = inputs.tensors(setting, 0)
    names = inputs.names(setting)

    @cache
    def masks() -> dict[str, Tensor]:
        at = inputs.positions(model, *inputs.support(setting, model, 0))
        return dict(zip(names, inputs.masks(model, at), strict=True))

    def flat() -> Tensor:
        return torch.cat([mask.view(-1) for mask in masks().values()])

    def verify() -> None:
        support = sf.Support.from_masks(masks())
        for name, mask in masks().items():
            wanted = mask.view(-1).nonzero().view(-1)
            assert torch.equal(support.indices(name).to(wanted.device), wanted)

    def check(result: Any) -> None:
        assert torch.equal(result, flat().nonzero().view(-1))

    def check_each(result: Any) -> None:
        for mask, at in zip(masks().values(), result, strict=True):
            assert torch.equal(at.view(-1), mask.view(-1).nonzero().view(-1))

    def build(job: Job) -> Job:
        masks()
        return job

    return Case(
        "index_build",
        setting,
        setting.numel + 2 * setting.nnz,
        {
            "sparse_ft": Provider(lambda: build(lambda: sf.Support.from_masks(masks()))),
            "nonzero, flat": Provider(
                lambda: build(lambda: flat().nonzero().view(-1)),
                "torch.nonzero of the concatenated masks, int64 positions",
                check,
                setting.numel + 8 * setting.nnz,
            ),
            "nonzero, per parameter": Provider(
                lambda: build(lambda: [m.view(-1).nonzero() for m in masks().values()]),
                "torch.nonzero of each mask, int64 positions (SHiRA, PEFT)",
                check_each,
                8 * setting.nnz,
            ),
        },
        verify,
        yardstick="read",
    )
