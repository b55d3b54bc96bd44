"""Denoising the difference of a weight matrix, as DeFT-X does before it selects.

ΔW = UΣVᵀ is split at a rank r into a lower-order part L = Σ_{i≤r} σᵢuᵢvᵢᵀ, which is kept whole, and
a higher-order part H = ΔW − L, of which only the entries of largest magnitude are kept:
ΔŴ = L + H̃ (Simon and Jyothi, Findings of EMNLP 2025). An entry that H̃ keeps is therefore an entry
of ΔW itself.

L is found from the smaller Gram matrix, G = ΔWᵀΔW = VΣ²Vᵀ and L = ΔW V_r V_rᵀ, which needs no U.
G is summed in fp64, so that squaring the condition number loses nothing that fp32 had. So are all
other products, which neither autocast nor TF32 rounds then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from sparse_ft_kernels import select_topk

from .tiles import Layout, Support

__all__ = ["Split", "denoise"]

# Rows that are turned to fp64 at a time, and multiplied.
_ROWS = 4096
# Of the randomised range finder (Halko, Martinsson and Tropp, 2011): columns beyond the rank, and
# iterations that sharpen a spectrum which falls slowly.
_OVERSAMPLE = 8
_POWER = 2


@dataclass(frozen=True)
class Split:
    """How a matrix was split.

    Attributes:
        rank: r; the smaller side where nothing was cut off, 0 for a matrix of zeros.
        full: The smaller side.
        kept: ‖L‖²/‖ΔW‖², the share of the sum of squares in the lower-order part.
    """

    rank: int
    full: int
    kept: float


@torch.no_grad()
def denoise(
    delta: Tensor,
    *,
    rank: str | int = "var:0.9",
    energy: str = "sq",
    keep_high: float = 0.05,
    method: str = "gram",
    seed: int = 0,
) -> tuple[Tensor, Split]:
    """L + H̃ of one matrix.

    Where all of it is kept (`rank="full"`, an integer of at least the smaller side, or
    `keep_high=1`) this is `delta` itself, to the last bit. Beside `delta` it holds one matrix of
    the same size, and for "gram" an fp64 one of the smaller side squared.

    Args:
        delta: fp32 [m, n].
        rank: "var:p", the smallest r whose singular values have a share p of the energy, 0 < p ≤ 1;
            an integer r ≥ 1; or "full".
        energy: Of "var:p": "sq" is Σσ², the variance; "abs" is Σσ.
        keep_high: Share of the entries of H to keep, those of largest magnitude, in [0, 1].
        method: "gram" (exact), "svd" (exact, by LAPACK's decomposition: it holds U as well, and
            gains less from threads), or "randomized" (approximate; for an integer rank far below
            the smaller side).
        seed: Of "randomized".

    Returns:
        fp32 [m, n], and how it was split.

    Raises:
        ValueError: An option is out of range, `delta` is no fp32 matrix, or it holds NaN or
            infinity.
    """
    check_options(rank, energy, keep_high, method)
    if delta.dim() != 2 or delta.dtype != torch.float32:
        raise ValueError(
            f"denoise: delta must be an fp32 matrix, got {delta.dtype} of shape "
            f"{tuple(delta.shape)}"
        )
    full = min(delta.shape)
    if not delta.numel():
        return delta, Split(0, 0, 0.0)
    if not all(map(math.isfinite, torch.stack(delta.aminmax()).tolist())):
        raise ValueError("denoise: delta holds NaN or infinity")
    if keep_high == 1 or rank == "full" or _share(rank) == 1:
        return delta, Split(full, full, 1.0)
    if isinstance(rank, int) and rank >= full:
        return delta, Split(full, full, 1.0)
    if not delta.any():
        return delta, Split(0, full, 0.0)
    # Singular vectors are sought on the smaller side.
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    if method == "gram":
        low, split = _by_gram(tall, rank, energy)
    elif method == "svd":
        low, split = _by_svd(tall, rank, energy)
    else:
        assert isinstance(rank, int)
        low, split = _randomized(tall, rank, seed)
    if tall is not delta:
        low = low.T
    low = low.contiguous()
    count = math.floor(keep_high * delta.numel())
    if count:
        idx, ptr, _ = select_topk([delta.contiguous()], [low], k=count)
        at = Support(Layout.of({"": delta}), idx, ptr, check=False).indices("")
        low.view(-1)[at] = delta.reshape(-1)[at]
    return low, split


def check_options(rank: str | int, energy: str, keep_high: float, method: str) -> None:
    """Refuses options of `denoise` that are out of range.

    Raises:
        ValueError: It names the option, and what would work.
    """
    share = _share(rank)
    number = isinstance(rank, int) and not isinstance(rank, bool)
    if not (number and int(rank) >= 1) and rank != "full" and not 0 < share <= 1:
        raise ValueError(
            'denoise: rank must be "var:p" with 0 < p ≤ 1, an integer of at least 1, or "full", '
            f"got {rank!r}"
        )
    if energy not in ("sq", "abs"):
        raise ValueError(f'denoise: energy must be "sq" or "abs", got {energy!r}')
    if (
        isinstance(keep_high, bool)
        or not isinstance(keep_high, int | float)
        or not 0 <= keep_high <= 1
    ):
        raise ValueError(f"denoise: keep_high must be a share in [0, 1], got {keep_high!r}")
    if method not in ("gram", "svd", "randomized"):
        raise ValueError(f'denoise: method must be "gram", "svd" or "randomized", got {method!r}')
    if method == "randomized" and not number:
        raise ValueError(
            f'denoise: method "randomized" needs an integer rank, got {rank!r}; a share of the '
            'energy needs all singular values: use "gram"'
        )


def _share(rank: str | int) -> float:
    """p of "var:p"; NaN where it is something else."""
    if not isinstance(rank, str) or not rank.startswith("var:"):
        return math.nan
    try:
        return float(rank[4:])
    except ValueError:
        return math.nan


def _rank(sigma_sq: Tensor, rank: str | int, energy: str) -> Split:
    """Where to cut a spectrum: σ², fp64, in descending order."""
    squares = sigma_sq.cumsum(0)
    total = float(squares[-1])
    if isinstance(rank, int):
        r = rank
    else:
        reached = squares if energy == "sq" else sigma_sq.sqrt().cumsum(0)
        r = 1 + int((reached < _share(rank) * reached[-1]).sum())
    return Split(r, len(sigma_sq), float(squares[r - 1]) / total)


def _by_gram(tall: Tensor, rank: str | int, energy: str) -> tuple[Tensor, Split]:
    n = tall.shape[1]
    gram = torch.zeros(n, n, dtype=torch.float64, device=tall.device)
    for rows in tall.split(_ROWS):
        wide = rows.to(torch.float64)
        gram.addmm_(wide.T, wide)
    values, vectors = torch.linalg.eigh(gram)  # in ascending order
    split = _rank(values.flip(0).clamp(min=0), rank, energy)
    top = vectors[:, n - split.rank :]
    return _product(tall, top, top.T), split


def _by_svd(tall: Tensor, rank: str | int, energy: str) -> tuple[Tensor, Split]:
    u, sigma, vh = torch.linalg.svd(tall, full_matrices=False)
    split = _rank(sigma.to(torch.float64).square(), rank, energy)
    return _product(u[:, : split.rank] * sigma[: split.rank], vh[: split.rank]), split


def _randomized(tall: Tensor, rank: int, seed: int) -> tuple[Tensor, Split]:
    n = tall.shape[1]
    columns = min(n, rank + _OVERSAMPLE)
    # Drawn on the CPU, for the same numbers on every device.
    draw = torch.randn(n, columns, generator=torch.Generator().manual_seed(seed)).to(tall.device)
    basis = torch.linalg.qr(_product(tall, draw)).Q
    for _ in range(_POWER):
        basis = torch.linalg.qr(_transposed_product(tall, basis)).Q
        basis = torch.linalg.qr(_product(tall, basis)).Q
    inner = _transposed_product(tall, basis).T
    # The smaller of the two has few rows, so its own split is cheap and exact.
    wide = inner.to(torch.float64)
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    top = vectors[:, columns - rank :]
    kept = float(values[columns - rank :].clamp(min=0).sum()) / _sum_of_squares(tall)
    return _product(basis, top, top.T, inner), Split(rank, n, min(1.0, kept))


def _product(tall: Tensor, *factors: Tensor) -> Tensor:
    """A·B·…, from left to right, for a tall A: fp32, summed in fp64."""
    wide = [factor.to(torch.float64) for factor in factors]
    out = tall.new_empty(len(tall), factors[-1].shape[1])
    for rows, into in zip(tall.split(_ROWS), out.split(_ROWS), strict=True):
        into.copy_(reduce(torch.mm, wide, rows.to(torch.float64)))
    return out


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """Aᵀ·B for a tall A and a tall B: fp32, summed in fp64."""
    out = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(_ROWS), b.split(_ROWS), strict=True):
        out.addmm_(left.T.to(torch.float64), right.to(torch.float64))
    return out.to(torch.float32)


def _sum_of_squares(matrix: Tensor) -> float:
    return sum(float(rows.to(torch.float64).square().sum()) for rows in matrix.split(_ROWS))
