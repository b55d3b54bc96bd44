"""The public ops: what each does, on whole models at once.

A model is a list of tensors in canonical order (by name). A set of selected entries is `idx`
(uint16, offset inside its tile of 65,536 elements, ascending there) and `ptr` (int64, first entry
of each tile). The formulas, to the last rounding, are in `csrc/sparse_ft.h`; `reference.py` is the
definition in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_OPS = torch.ops.sparse_ft


def select_topk(
    a: Sequence[Tensor],
    b: Sequence[Tensor] = (),
    *,
    k: int,
    exclude: tuple[Tensor, Tensor] | None = None,
    tie: str = "index",
) -> tuple[Tensor, Tensor, Tensor]:
    """The k entries with the largest |fp32(a) − fp32(b)| over all tensors together, exactly.

    Args:
        a: Tensors (fp32, bf16 or fp16, also mixed), contiguous, on one device.
        b: Tensors of the same shapes, or nothing: then |a| is ranked.
        k: Entries to choose, 0 … all eligible ones.
        exclude: idx and ptr of entries that must not be chosen.
        tie: "index" chooses exactly k, the lower (tensor, offset) first among equals; "all" chooses
            every entry that reaches the threshold, as the LT-SFT reference implementation does, so
            possibly more than k.

    Returns:
        idx uint16 [nnz], ptr int64 [tiles + 1], and info int64 [8] on the CPU: bits of the
        threshold, nnz, entries above the threshold, entries tied at it, of those chosen, −1,
        whether the exact fallback ran, eligible entries.

    Raises:
        NonFiniteError: A score is NaN or infinite; it names the tensor's position.
        TooFewError: Fewer than k entries are eligible.
        ValueError: Tensors of another shape, device, layout or data type.
    """
    if tie not in ("index", "all"):
        raise ValueError(f'select_topk: tie must be "index" or "all", got {tie!r}')
    exclude_idx, exclude_ptr = exclude or (None, None)
    return _OPS.select_topk(list(a), list(b), k, exclude_idx, exclude_ptr, tie == "all")  # type: ignore[no-any-return]


def select_random(
    like: Sequence[Tensor],
    *,
    k: int,
    seed: int,
    exclude: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """k entries uniformly at random over all tensors together, the same ones on every machine.

    Args:
        like: Tensors whose shapes and device count; their values do not.
        k: Entries to choose.
        seed: Any integer (taken mod 2^64).
        exclude: idx and ptr of entries that must not be chosen.

    Returns:
        idx uint16 [k], ptr int64 [tiles + 1].
    """
    exclude_idx, exclude_ptr = exclude or (None, None)
    seed &= 0xFFFFFFFFFFFFFFFF
    seed -= (1 << 64) if seed >> 63 else 0
    return _OPS.select_random(list(like), k, seed, exclude_idx, exclude_ptr)  # type: ignore[no-any-return]


def gather(
    grads: Sequence[Tensor],
    numels: Sequence[int],
    idx: Tensor,
    ptr: Tensor,
    out: Tensor,
    *,
    grad_scale: Tensor | None = None,
    accumulate: bool = False,
    delta: Tensor | None = None,
    l1: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compact fp32 gradient of the selected entries, with its squared norm.

    out = (out if accumulate else 0) + g[idx], then out = out / grad_scale + l1 · sign(delta).

    Args:
        grads: Dense gradients, an empty tensor for a missing one; an empty list to finish `out`
            only.
        numels: Elements of each tensor.
        idx: uint16 [nnz].
        ptr: int64 [tiles + 1].
        out: fp32 [nnz], changed in place.
        grad_scale: fp32 scalar tensor, the loss scale to divide by.
        accumulate: Add to `out` instead of replacing it.
        delta: fp32 [nnz], the distance from the start, for the L1 term.
        l1: λ/N, ≥ 0.

    Returns:
        Squared norm of `out` (fp64 [1], one fixed order of summation), and 1.0 where an entry is
        not finite (fp32 [1]).
    """
    return _OPS.gather(  # type: ignore[no-any-return]
        list(grads), list(numels), idx, ptr, out, grad_scale, accumulate, delta, l1
    )


def _rate(lr: Tensor | float, step: Tensor) -> Tensor:
    if isinstance(lr, Tensor):
        return lr
    return torch.tensor([lr], dtype=torch.float64, device=step.device)


def masked_adamw_(
    weights: Sequence[Tensor],
    idx: Tensor,
    ptr: Tensor,
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    delta: Tensor,
    theta0: Tensor,
    step: Tensor,
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """One AdamW step of the selected entries of a model; every other entry keeps its bits.

    The state of an entry is its distance δ from the start θ0, in fp32; the weight is always
    round(θ0 + δ). The update is that of `torch.optim.AdamW` (Loshchilov and Hutter, 2019):
    decoupled decay, ε outside the square root.

    Args:
        weights: Tensors of one data type, changed in place at the selected entries.
        idx: uint16 [nnz].
        ptr: int64 [tiles + 1].
        grad: fp32 [nnz], or the dense gradients (an empty tensor for a missing one).
        exp_avg: fp32 [nnz], first moment, changed in place.
        exp_avg_sq: fp32 [nnz], second moment, changed in place.
        delta: fp32 [nnz], changed in place.
        theta0: [nnz] in the data type of the weights.
        step: fp32 scalar tensor, steps taken, changed in place.
        lr: fp64 scalar tensor, or a number.
        betas: Decay rates of the moments, in [0, 1).
        eps: ε, ≥ 0.
        weight_decay: Decoupled decay of the selected entries, ≥ 0.
        l1: λ/N of the L1 term toward the start, ≥ 0 (LT-SFT §3.2).
        grad_scale: fp32 scalar tensor: gradients are divided by it.
        found_inf: fp32 scalar tensor: where it is not 0 nothing is written, `step` included.
        clip: fp32 scalar tensor: gradients (with the L1 term) are multiplied by it.
    """
    compact = grad if isinstance(grad, Tensor) else None
    dense = [] if isinstance(grad, Tensor) else list(grad)
    rate = _rate(lr, step)
    _OPS.masked_adamw_(
        *(list(weights), idx, ptr, compact, dense, exp_avg, exp_avg_sq, delta, theta0, step, rate),
        *(betas[0], betas[1], eps, weight_decay, l1, grad_scale, found_inf, clip),
    )


def dense_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    master: Sequence[Tensor],
    anchors: Sequence[Tensor],
    step: Tensor,
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """One AdamW step of every entry, in one pass, with the L1 term toward the anchors.

    Args:
        weights: Tensors of one data type, changed in place.
        grads: Dense gradients, of any data types; an empty tensor where there is none: then weight,
            moments and master of that tensor stay as they are, as in `torch.optim.AdamW`.
        exp_avg: First moments, all fp32 or all bf16, changed in place.
        exp_avg_sq: Second moments, of the same data type, changed in place.
        master: Where the fp32 values of the weights are kept, changed in place. Empty: in the
            weights alone. fp32 tensors: there. int16 tensors, beside bf16 weights: the low halves;
            weight and low half together are the fp32 value, exactly, and the weight is that value
            rounded to the nearest bf16, ties away from zero.
        anchors: The weights at the start, for the L1 term; empty where l1 is 0.
        step: fp32 scalar tensor, steps taken, changed in place.
        lr: fp64 scalar tensor, or a number.
        betas: Decay rates of the moments, in [0, 1).
        eps: ε, ≥ 0.
        weight_decay: Decoupled decay, ≥ 0.
        l1: λ/N of the L1 term, ≥ 0 (LT-SFT §3.2).
        grad_scale: fp32 scalar tensor: gradients are divided by it.
        found_inf: fp32 scalar tensor: where it is not 0 nothing is written, `step` included.
        clip: fp32 scalar tensor: gradients (with the L1 term) are multiplied by it.
    """
    _OPS.dense_adamw_(
        *(list(weights), list(grads), list(exp_avg), list(exp_avg_sq), list(master)),
        *(list(anchors), step, _rate(lr, step), betas[0], betas[1], eps, weight_decay, l1),
        *(grad_scale, found_inf, clip),
    )


def anchor_l1_(
    grads: Sequence[Tensor], weights: Sequence[Tensor], anchors: Sequence[Tensor], coeff: float
) -> Tensor:
    """Adds coeff · sign(w − anchor) to dense gradients and sums |w − anchor|, in one pass.

    Args:
        grads: Dense gradients, changed in place; an empty tensor where there is none; an empty list
            for the sum only.
        weights: The weights now.
        anchors: The weights at the start.
        coeff: λ/N, ≥ 0.

    Returns:
        fp64 [1].
    """
    return _OPS.anchor_l1_(list(grads), list(weights), list(anchors), coeff)  # type: ignore[no-any-return]


def compose_(
    weights: Sequence[Tensor],
    idx: Sequence[Tensor],
    ptr: Sequence[Tensor],
    val: Sequence[Tensor],
    alphas: Sequence[float],
    undo: Sequence[Tensor] = (),
) -> Tensor:
    """w = round(w + Σ α·φ): the sum in fp32 in the order given, and one rounding.

    An entry whose sum is 0 keeps its bits.

    Args:
        weights: Tensors of one data type, changed in place.
        idx: One uint16 vector per delta.
        ptr: One int64 [tiles + 1] per delta, all over the tiles of `weights`.
        val: One vector per delta (fp32, bf16 or fp16).
        alphas: One finite weight per delta.
        undo: One vector per delta in the data type of the weights, which receives the untouched
            weights first; empty: no undo.

    Returns:
        int64 [2]: entries changed, and of those the entries whose weight swallowed the change.
    """
    return _OPS.compose_(list(weights), list(idx), list(ptr), list(val), list(alphas), list(undo))  # type: ignore[no-any-return]


def restore_(
    weights: Sequence[Tensor], idx: Sequence[Tensor], ptr: Sequence[Tensor], undo: Sequence[Tensor]
) -> None:
    """Writes the values that `compose_` logged back, bit for bit.

    Args:
        weights: Tensors of one data type, changed in place.
        idx: One uint16 vector per delta.
        ptr: One int64 [tiles + 1] per delta.
        undo: The logs. Where supports overlap, they must hold the same value there, as one call of
            `compose_` writes them: the order in which deltas are restored is not defined.
    """
    _OPS.restore_(list(weights), list(idx), list(ptr), list(undo))


def swap_(
    weights: Sequence[Tensor],
    old_idx: Sequence[Tensor],
    old_ptr: Sequence[Tensor],
    old_undo: Sequence[Tensor],
    idx: Sequence[Tensor],
    ptr: Sequence[Tensor],
    val: Sequence[Tensor],
    alphas: Sequence[float],
    undo: Sequence[Tensor] = (),
) -> Tensor:
    """`restore_` of the old deltas, then `compose_` of the new ones, as one op.

    Args:
        weights: Tensors of one data type, changed in place.
        old_idx: One uint16 vector per delta that is applied now; may be empty.
        old_ptr: One int64 [tiles + 1] per such delta.
        old_undo: Their logs, as in `restore_`: where old supports overlap, with the same value.
        idx: One uint16 vector per new delta; may be empty.
        ptr: One int64 [tiles + 1] per new delta.
        val: One vector per new delta (fp32, bf16 or fp16).
        alphas: One finite weight per new delta.
        undo: One vector per new delta in the data type of the weights, which receives the weights
            as they are without any delta; none of them may share memory with `old_undo`. Empty: no
            undo.

    Returns:
        int64 [2], as `compose_`.
    """
    return _OPS.swap_(  # type: ignore[no-any-return]
        *(list(weights), list(old_idx), list(old_ptr), list(old_undo)),
        *(list(idx), list(ptr), list(val), list(alphas), list(undo)),
    )


def merge(
    lengths: Tensor,
    idx: Sequence[Tensor],
    ptr: Sequence[Tensor],
    val: Sequence[Tensor],
    alphas: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of sparse deltas as one sparse delta; nothing dense is built.

    Args:
        lengths: int32 [tiles], elements of each tile.
        idx: One uint16 vector per delta.
        ptr: One int64 [tiles + 1] per delta.
        val: One vector per delta (fp32, bf16 or fp16).
        alphas: One finite weight per delta.

    Returns:
        idx, ptr and fp32 values of the union. Entries that cancel stay, as zeros.
    """
    return _OPS.merge(lengths, list(idx), list(ptr), list(val), list(alphas))  # type: ignore[no-any-return]


class Reduction(NamedTuple):
    """What several deltas say of each entry of their union; x_j = fl32(α_j·φ_j).

    Attributes:
        idx: uint16 [nnz], the union.
        ptr: int64 [tiles + 1], of the union.
        total: fp32 [nnz], Σ x_j in the order given, as of `merge`.
        positive: fp32 [nnz], Σ of the x_j > 0.
        negative: fp32 [nnz], Σ of the x_j < 0.
        largest: fp32 [nnz], the x_j of largest magnitude; of x and −x the positive one.
        n_present: int16 [nnz], deltas that have the entry.
        n_positive: int16 [nnz], of those, with x_j > 0.
        n_negative: int16 [nnz], of those, with x_j < 0.
    """

    idx: Tensor
    ptr: Tensor
    total: Tensor
    positive: Tensor
    negative: Tensor
    largest: Tensor
    n_present: Tensor
    n_positive: Tensor
    n_negative: Tensor


def reduce(
    lengths: Tensor,
    idx: Sequence[Tensor],
    ptr: Sequence[Tensor],
    val: Sequence[Tensor],
    alphas: Sequence[float],
) -> Reduction:
    """What sparse deltas say of each entry that any of them has: the sums, counts and largest value
    that rules of merging are made of; nothing dense is built.

    Args:
        lengths: int32 [tiles], elements of each tile.
        idx: One uint16 vector per delta; at most 32,767 deltas.
        ptr: One int64 [tiles + 1] per delta.
        val: One vector per delta (fp32, bf16 or fp16).
        alphas: One finite weight per delta.

    Returns:
        The union of the supports, and seven vectors beside it.
    """
    return Reduction(*_OPS.reduce(lengths, list(idx), list(ptr), list(val), list(alphas)))


def overlap(
    idx_a: Tensor, ptr_a: Tensor, val_a: Tensor, idx_b: Tensor, ptr_b: Tensor, val_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Per tile, what two deltas have in common.

    Returns:
        int64 [tiles, 2]: entries in both, and of those with equal sign; fp64 [tiles, 3]: Σab, Σa²,
        Σb² over the entries in both.
    """
    return _OPS.overlap(idx_a, ptr_a, val_a, idx_b, ptr_b, val_b)  # type: ignore[no-any-return]


def digest(weights: Sequence[Tensor], idx: Tensor, ptr: Tensor) -> Tensor:
    """Two order-free 64-bit sums over position and value of the selected weights.

    Returns:
        int64 [2] (the bits of two uint64): by fp32 bits, by bf16 bits. It tells one base
        model from another; it is no cryptographic guarantee.
    """
    return _OPS.digest(list(weights), idx, ptr)  # type: ignore[no-any-return]


def check_support(lengths: Tensor, idx: Tensor, ptr: Tensor, val: Tensor | None = None) -> Tensor:
    """The first fault of a set of selected entries.

    Returns:
        int64 [4]: code, tile, entry, explicit zeros among the values. Codes: 0 none; 1 `ptr` does
            not run from 0 to nnz;
        2 `ptr` decreases or exceeds a tile; 3 `idx` not ascending; 4 `idx` beyond its tile; 5 a
        value is not finite.
    """
    return _OPS.check_support(lengths, idx, ptr, val)  # type: ignore[no-any-return]


def hash_pieces(data: Tensor) -> Tensor:
    """The BLAKE2b-256 hash (RFC 7693) of each piece of 65,536 bytes; the last may be shorter.

    Each is what `hashlib.blake2b(piece, digest_size=32)` gives. One hash is a chain that one thread
    has to follow; those of pieces are computed side by side.

    Args:
        data: uint8 [n], on the CPU.

    Returns:
        uint8 [⌈n / 65,536⌉, 32].

    Raises:
        ValueError: The data are on another device, or no contiguous vector of bytes.
    """
    return _OPS.hash_pieces(data)  # type: ignore[no-any-return]
