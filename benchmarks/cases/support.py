"""What is asked of supports: what two share, whether one is valid, to which model it belongs."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparse_ft_kernels as ops
from sparse_ft_kernels.contract import OPS

from .. import inputs
from ..case import Case, Job, Provider, Setting, Target, case
from .composition import Deltas, lengths_of


def _flat(model: list[Tensor], at: list[Tensor]) -> Tensor:
    """Positions in the concatenated model, int64."""
    out, begin = [], 0
    for tensor, where in zip(model, at, strict=True):
        out.append(where + begin)
        begin += tensor.numel()
    return torch.cat(out)


@case("overlap", input_bytes=lambda s: 5 * s.numel + 60 * s.nnz)
def overlap(setting: Setting) -> Case:
    """The entries that two fine-tunings share, those of equal sign, and the products."""
    model = inputs.tensors(setting, 0)
    deltas = Deltas(setting, model, 2)
    pair = [(deltas.idx[i], deltas.ptr[i], deltas.val[i]) for i in range(2)]
    flat = [_flat(model, at) for at in deltas.at]

    def with_isin() -> tuple[int, int, float]:
        a, b = deltas.val
        both = torch.isin(flat[0], flat[1], assume_unique=True)
        other = b[torch.searchsorted(flat[1], flat[0][both])]
        mine = a[both]
        return int(both.sum()), int((mine.sign() == other.sign()).sum()), float(mine @ other)

    def with_numpy() -> Job:
        first, second = (f.numpy() for f in flat)
        a, b = (v.numpy() for v in deltas.val)

        def run() -> tuple[int, int, float]:
            both, at_a, at_b = np.intersect1d(
                first, second, assume_unique=True, return_indices=True
            )
            x, y = a[at_a], b[at_b]
            return len(both), int((np.sign(x) == np.sign(y)).sum()), float(x @ y)

        return run

    def exact() -> tuple[int, int, float]:
        a = torch.zeros(setting.numel, dtype=torch.float64, device=setting.device)
        chosen = torch.zeros(setting.numel, dtype=torch.bool, device=setting.device)
        a[flat[0]], chosen[flat[0]] = deltas.val[0].double(), True
        mine, both = a[flat[1]], chosen[flat[1]]
        other = deltas.val[1].double()
        same = both & (mine.sign() == other.sign())
        return int(both.sum()), int(same.sum()), float((mine * other)[both].sum())

    def check(result: Any) -> None:
        shared, same, product = result
        wanted = exact()
        assert (shared, same) == wanted[:2], (shared, same, wanted)
        assert abs(product - wanted[2]) <= 1e-3 * setting.nnz * 1e-6

    def verify() -> None:
        counts, sums = ops.overlap(*pair[0], *pair[1])
        check((int(counts[:, 0].sum()), int(counts[:, 1].sum()), float(sums[:, 0].sum())))

    providers = {
        "sparse_ft": Provider(lambda: lambda: ops.overlap(*pair[0], *pair[1])),
        "torch.isin": Provider(
            lambda: with_isin, "isin and searchsorted of flat positions", check, 60 * setting.nnz
        ),
    }
    if setting.device == "cpu":
        providers["numpy.intersect1d"] = Provider(
            with_numpy, "intersect1d of flat positions with indices", check, 100 * setting.nnz
        )
    return Case(
        "overlap",
        setting,
        OPS["overlap"].bytes_moved(*pair[0], *pair[1]),
        providers,
        verify,
        yardstick="read",
        targets=(Target("peer", 20, "numpy.intersect1d"),),
    )


@case("check_support", input_bytes=lambda s: 5 * s.numel + 40 * s.nnz)
def check_support(setting: Setting) -> Case:
    """Proving that the content of a file can be trusted: in order, in range, finite."""
    model = inputs.tensors(setting, 0)
    deltas = Deltas(setting, model, 1)
    idx, ptr, val = deltas.idx[0], deltas.ptr[0], deltas.val[0]
    lengths = lengths_of(setting, model)

    def with_torch() -> bool:
        """On 64-bit positions, as generic tools keep them."""
        fine = True
        for tensor, at in zip(model, deltas.at[0], strict=True):
            fine &= bool((at.diff() > 0).all())
            if len(at):
                fine &= int(at[0]) >= 0 and int(at[-1]) < tensor.numel()
        return fine and bool(val.isfinite().all())

    def check(result: Any) -> None:
        assert result is True

    def verify() -> None:
        assert int(ops.check_support(lengths, idx, ptr, val)[0]) == 0
        broken = val.clone()
        broken[-1] = float("inf")
        assert int(ops.check_support(lengths, idx, ptr, broken)[0]) != 0

    return Case(
        "check_support",
        setting,
        OPS["check_support"].bytes_moved(lengths, idx, ptr, val),
        {
            "sparse_ft": Provider(lambda: lambda: ops.check_support(lengths, idx, ptr, val)),
            "torch, 64-bit positions": Provider(
                lambda: with_torch, "diff, compare and isfinite per parameter", check
            ),
        },
        verify,
        yardstick="read",
    )


@case("digest", input_bytes=lambda s: 5 * s.numel + 40 * s.nnz)
def digest(setting: Setting) -> Case:
    """Telling on which base model a fine-tuning belongs, from the selected weights."""
    model = inputs.tensors(setting, 0)
    idx, ptr = inputs.support(setting, model, 0)
    at = inputs.positions(model, idx, ptr)

    def sha256(selected: bool) -> Job:
        def run() -> str:
            hasher = hashlib.sha256()
            for tensor, where in zip(model, at, strict=True):
                chosen = tensor.view(-1)[where] if selected else tensor.view(-1)
                hasher.update(chosen.cpu().view(torch.uint8).numpy().data)
            return hasher.hexdigest()

        return run

    def check(result: Any) -> None:
        assert len(str(result)) == 64

    def verify() -> None:
        """The same for the same bits, another for one bit changed in one selected weight."""
        first = ops.digest(model, idx, ptr)
        which = next(i for i, where in enumerate(at) if len(where))
        flat, place = model[which].view(-1), at[which][-1]
        kept = flat[place].clone()
        flat[place] = -kept
        assert not torch.equal(ops.digest(model, idx, ptr), first)
        flat[place] = kept
        assert torch.equal(ops.digest(model, idx, ptr), first)

    return Case(
        "digest",
        setting,
        OPS["digest"].bytes_moved(model, idx, ptr) + inputs.surplus(setting, at),
        {
            "sparse_ft": Provider(lambda: lambda: ops.digest(model, idx, ptr)),
            "SHA-256 of the selected": Provider(
                lambda: sha256(selected=True),
                "hashlib.sha256 of the selected weights, gathered",
                check,
                8 * setting.nnz,
            ),
            "SHA-256 of the model": Provider(
                lambda: sha256(selected=False), "hashlib.sha256 of every weight", check
            ),
        },
        verify,
        targets=(Target("peer", 5, "SHA-256 of the model", quick=2),),
    )
