"""Backend `reference`: every op in plain torch, on any device: the definition.

Nothing here is tuned. What is deliberate is the order of every floating-point operation, since the
other backends reproduce it bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .contract import HASH_BYTES, HASH_PIECE, NonFiniteError, Tensors
from .tile_table import TILE, n_tiles

_INFINITY_KEY = 0x7F800000
SUM_RUN = 1024


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve a device; None where it can."""
    return None


# --- positions ------------------------------------------------------------------------------------


def _offsets(idx: Tensor) -> Tensor:
    # torch has little arithmetic on uint16: reinterpret and mask.
    return idx.view(torch.int16).to(torch.int64) & 0xFFFF


def _positions(numels: Sequence[int], idx: Tensor, ptr: Tensor) -> list[tuple[slice, Tensor]]:
    """Per tensor: where its entries lie in the compact arrays, and their flat positions."""
    counts = ptr[1:] - ptr[:-1]
    starts = ptr.tolist()
    out = []
    tile = 0
    for numel in numels:
        tiles = -(-numel // TILE)
        entries = slice(starts[tile], starts[tile + tiles])
        base = torch.arange(tiles, device=idx.device) * TILE
        flat = _offsets(idx[entries]) + torch.repeat_interleave(base, counts[tile : tile + tiles])
        out.append((entries, flat))
        tile += tiles
    return out


# --- sums in one order ----------------------------------------------------------------------------


def _run_sums(x: Tensor) -> Tensor:
    """fp64 sums of runs of SUM_RUN values, the last one padded with +0, each by halving."""
    runs = torch.nn.functional.pad(x, (0, -x.shape[0] % SUM_RUN)).view(-1, SUM_RUN)
    while runs.shape[1] > 1:
        half = runs.shape[1] // 2
        runs = runs[:, :half] + runs[:, half:]
    return runs[:, 0]


def tree_sum(x: Tensor) -> Tensor:
    """The sum of fp64 values in an order that can be parallel: sums of runs, of these sums, …

    Args:
        x: fp64 [n], n ≥ 0.

    Returns:
        fp64 [1]; +0 where n = 0.
    """
    if not x.shape[0]:
        return x.new_zeros(1)
    while x.shape[0] > 1:
        x = _run_sums(x)
    return x


def _sum_in_order(rows: Tensor) -> Tensor:
    """fp64 sums of the rows of a matrix, each from +0 and from left to right."""
    total = rows.new_zeros(rows.shape[0])
    for column in rows.unbind(1):
        total = total + column
    return total


# --- selection ------------------------------------------------------------------------------------


def _magnitude_key(a: Tensor, b: Tensor | None) -> Tensor:
    score = a.reshape(-1).to(torch.float32)
    if b is not None:
        score = score - b.reshape(-1).to(torch.float32)
    return score.abs().view(torch.int32)


def _select(
    numels: Sequence[int],
    key_of: Callable[[int], Tensor],
    k: int,
    exclude_idx: Tensor | None,
    exclude_ptr: Tensor | None,
    ties_all: bool,
    device: torch.device,
    finite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact selection by radix over the 31 bits of the key, one tensor's keys at a time."""
    excluded = (
        _positions(numels, exclude_idx, exclude_ptr)
        if exclude_idx is not None and exclude_ptr is not None
        else None
    )

    def keys(i: int) -> Tensor:
        key = key_of(i)
        if excluded is not None:
            key = key.index_fill(0, excluded[i][1], -1)
        return key

    eligible = sum(numels) - (exclude_idx.numel() if exclude_idx is not None else 0)
    if finite:
        tile = 0
        for i, numel in enumerate(numels):
            bad = (keys(i) >= _INFINITY_KEY).nonzero()
            if len(bad):
                raise NonFiniteError(tile + int(bad[0]) // TILE, i)
            tile += -(-numel // TILE)
    ptr = torch.zeros(n_tiles(numels) + 1, dtype=torch.int64, device=device)
    info = torch.tensor([0, 0, 0, 0, 0, -1, 0, eligible], dtype=torch.int64)
    if k == 0:
        return torch.empty(0, dtype=torch.uint16, device=device), ptr, info

    # Three digits of 11, 10 and 10 bits; `above` counts the keys that are certainly larger than the
    # threshold.
    threshold, above = 0, 0
    high = 31
    for bits in (11, 10, 10):
        low = high - bits
        histogram = torch.zeros(1 << bits, dtype=torch.int64, device=device)
        for i in range(len(numels)):
            key = keys(i)
            key = key[key >= 0]
            key = key[(key >> high) == (threshold >> high)] if high < 31 else key
            histogram += torch.bincount((key >> low) & ((1 << bits) - 1), minlength=1 << bits)
        from_top = torch.flip(torch.cumsum(torch.flip(histogram, (0,)), 0), (0,))
        digit = int((from_top >= k - above).nonzero()[-1])
        above += int(from_top[digit]) - int(histogram[digit])
        threshold |= digit << low
        high = low
        ties = int(histogram[digit])

    quota = ties if ties_all else k - above
    chosen = above + quota
    pieces, counts = [], []
    left = quota
    for i, numel in enumerate(numels):
        key = keys(i)
        take = key > threshold
        tied = (key == threshold).nonzero().reshape(-1)[:left]
        left -= len(tied)
        take[tied] = True
        flat = take.nonzero().reshape(-1)
        counts.append(torch.bincount(flat // TILE, minlength=-(-numel // TILE)))
        pieces.append((flat % TILE).to(torch.uint16))
    torch.cumsum(torch.cat(counts), 0, out=ptr[1:])
    info[:5] = torch.tensor([threshold, chosen, above, ties, quota])
    return torch.cat(pieces), ptr, info


def select_topk(
    a: Tensors,
    b: Tensors,
    k: int,
    exclude_idx: Tensor | None,
    exclude_ptr: Tensor | None,
    ties_all: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest |fp32(a) - fp32(b)|; equal ones in the order of (tensor, offset)."""
    return _select(
        [t.numel() for t in a],
        lambda i: _magnitude_key(a[i], b[i] if b else None),
        k,
        exclude_idx,
        exclude_ptr,
        ties_all,
        a[0].device if a else torch.device("cpu"),
        finite=True,
    )


def signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch can hold."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


_POSITION = signed(0x9E3779B97F4A7C15)
_PAYLOAD = signed(0xD1342543DE82EF95)


def shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix(z: Tensor) -> Tensor:
    z = (z ^ shift(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shift(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ shift(z, 31)


def select_random(
    like: Tensors, k: int, seed: int, exclude_idx: Tensor | None, exclude_ptr: Tensor | None
) -> tuple[Tensor, Tensor]:
    """k entries at random: the top k by a hash of (seed, tile, offset)."""
    numels = [t.numel() for t in like]
    device = like[0].device if like else torch.device("cpu")
    start = signed(seed * 0xD1342543DE82EF95)

    def key_of(i: int) -> Tensor:
        first = n_tiles(numels[:i]) * TILE
        position = torch.arange(first + 1, first + numels[i] + 1, device=device)
        return shift(mix(start + position * _POSITION), 33).to(torch.int32)

    idx, ptr, _ = _select(numels, key_of, k, exclude_idx, exclude_ptr, False, device, finite=False)
    return idx, ptr


# --- the optimizer step ---------------------------------------------------------------------------


def _read(tensors: Tensors, numels: Sequence[int], idx: Tensor, ptr: Tensor) -> Tensor:
    """fp32 values of the selected entries; a missing (empty) tensor reads as 0."""
    out = torch.zeros(idx.shape[0], dtype=torch.float32, device=idx.device)
    for tensor, (entries, flat) in zip(tensors, _positions(numels, idx, ptr), strict=True):
        if tensor.numel():
            out[entries] = tensor.reshape(-1)[flat].to(torch.float32)
    return out


def gather(
    grads: Tensors,
    numels: Sequence[int],
    idx: Tensor,
    ptr: Tensor,
    out: Tensor,
    grad_scale: Tensor | None,
    accumulate: bool,
    delta: Tensor | None,
    l1: float,
) -> tuple[Tensor, Tensor]:
    """Compact gradient of the selected entries, its squared norm, and its finiteness."""
    if grads:
        read = _read(grads, numels, idx, ptr)
        out.copy_(out + read if accumulate else read)
    elif not accumulate:
        out.zero_()
    if grad_scale is not None:
        out.copy_(out / grad_scale.reshape(()))
    if l1 != 0 and delta is not None:
        out.copy_(out + delta.sign() * l1)
    norm_sq = tree_sum(out.to(torch.float64).square())
    found_inf = (~torch.isfinite(out)).any().to(torch.float32).reshape(1)
    return norm_sq, found_inf


def _power(beta: float, t: int) -> float:
    """beta^t by binary powering: `**` has other bits on other machines."""
    p = 1.0
    while t > 0:
        if t & 1:
            p *= beta
        beta *= beta
        t >>= 1
    return p


def _root(v: Tensor) -> Tensor:
    # torch's float32 square root is not correctly rounded everywhere; through float64 it is.
    return v.to(torch.float64).sqrt().to(torch.float32)


def _like(value: float, tensor: Tensor) -> Tensor:
    # By a Python number torch divides on some devices through its reciprocal, by a tensor never.
    return torch.tensor(value, dtype=torch.float32, device=tensor.device)


def masked_adamw_(
    weights: Tensors,
    idx: Tensor,
    ptr: Tensor,
    grad: Tensor | None,
    grads: Tensors,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    delta: Tensor,
    theta0: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    l1: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
) -> None:
    """One AdamW step of the selected entries; w = round(theta0 + delta)."""
    if found_inf is not None and float(found_inf) != 0:
        return
    numels = [t.numel() for t in weights]
    t = int(float(step) + 1)
    rate = float(lr)
    correction = math.sqrt(1 - _power(beta2, t))
    g = _read(grads, numels, idx, ptr) if grad is None else grad
    if grad_scale is not None:
        g = g / grad_scale.reshape(())
    if l1 != 0:
        g = g + delta.sign() * l1
    if clip is not None:
        g = g * clip.reshape(())
    m = exp_avg + (g - exp_avg) * (1 - beta1)
    v = exp_avg_sq * beta2 + (g * (1 - beta2)) * g
    d = delta
    if weight_decay != 0:
        d = d - (theta0.to(torch.float32) + d) * (rate * weight_decay)
    d = d + (m * (-rate / (1 - _power(beta1, t)))) / (_root(v) / _like(correction, v) + eps)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    delta.copy_(d)
    step.fill_(t)
    _write(weights, idx, ptr, theta0.to(torch.float32) + d)


def _write(weights: Tensors, idx: Tensor, ptr: Tensor, values: Tensor) -> None:
    numels = [t.numel() for t in weights]
    for weight, (entries, flat) in zip(weights, _positions(numels, idx, ptr), strict=True):
        weight.view(-1)[flat] = values[entries].to(weight.dtype)


def _join(weight: Tensor, low: Tensor) -> Tensor:
    """fp32 master values from bf16 weights and the 16 bits below, as csrc/sparse_ft.h states it."""
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def _split(x: Tensor, weight: Tensor, low: Tensor) -> None:
    """Writes fp32 master values as bf16 weights and the 16 bits below."""
    bits = x.view(torch.int32)
    high = (bits + 0x8000) >> 16
    weight.view(torch.int16).copy_(high)
    low.copy_(bits - (high << 16))


def dense_adamw_(
    weights: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    master: Tensors,
    anchors: Tensors,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    l1: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
) -> None:
    """One AdamW step of every entry that has a gradient; w = round(x), x the fp32 master."""
    if found_inf is not None and float(found_inf) != 0:
        return
    t = int(float(step) + 1)
    rate = float(lr)
    minus_a = -rate / (1 - _power(beta1, t))
    correction = math.sqrt(1 - _power(beta2, t))
    step.fill_(t)
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        if not grad.numel():
            continue
        low = master[i] if master and master[i].dtype == torch.int16 else None
        if low is not None:
            x = _join(weight, low)
        else:
            x = (master[i] if master else weight).to(torch.float32)
        g = grad.reshape(weight.shape).to(torch.float32)
        if grad_scale is not None:
            g = g / grad_scale.reshape(())
        if l1 != 0:
            g = g + (x - anchors[i].to(torch.float32)).sign() * l1
        if clip is not None:
            g = g * clip.reshape(())
        m, v = exp_avg[i].to(torch.float32), exp_avg_sq[i].to(torch.float32)
        m = m + (g - m) * (1 - beta1)
        v = v * beta2 + (g * (1 - beta2)) * g
        if weight_decay != 0:
            x = x * (1 - rate * weight_decay)
        x = x + (m * minus_a) / (_root(v) / _like(correction, v) + eps)
        exp_avg[i].copy_(m)
        exp_avg_sq[i].copy_(v)
        if low is not None:
            _split(x, weight, low)
            continue
        if master:
            master[i].copy_(x)
        weight.copy_(x)


def anchor_l1_(grads: Tensors, weights: Tensors, anchors: Tensors, coeff: float) -> Tensor:
    """g += coeff * sign(w - anchor); the sum of |w - anchor|."""
    device = weights[0].device if weights else torch.device("cpu")
    tile_sums = [torch.zeros(0, dtype=torch.float64, device=device)]
    for i, (weight, anchor) in enumerate(zip(weights, anchors, strict=True)):
        moved = weight.to(torch.float32) - anchor.to(torch.float32)
        distance = moved.reshape(-1).abs().to(torch.float64)
        runs = _run_sums(distance)
        runs = torch.nn.functional.pad(runs, (0, -len(runs) % (TILE // SUM_RUN)))
        tile_sums.append(_sum_in_order(runs.view(-1, TILE // SUM_RUN)))
        if grads and grads[i].numel():
            grads[i].copy_(grads[i].to(torch.float32) + moved.sign() * coeff)
    return tree_sum(torch.cat(tile_sums))


# --- composition ----------------------------------------------------------------------------------


def compose_(
    weights: Tensors,
    idx: Tensors,
    ptr: Tensors,
    val: Tensors,
    alphas: Sequence[float],
    undo: Tensors,
) -> Tensor:
    """w = round(w + sum of alpha * val), the sum in fp32 from +0 in the order given; undo first."""
    numels = [t.numel() for t in weights]
    where = [_positions(numels, i, p) for i, p in zip(idx, ptr, strict=True)]
    for j, log in enumerate(undo):
        for weight, (entries, flat) in zip(weights, where[j], strict=True):
            log[entries] = weight.view(-1)[flat]
    changed, swallowed = 0, 0
    for i, weight in enumerate(weights):
        acc = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
        for j, alpha in enumerate(alphas):
            entries, flat = where[j][i]
            acc[flat] = acc[flat] + val[j][entries].to(torch.float32) * alpha
        touched = (acc != 0).nonzero().reshape(-1)
        before = weight.view(-1)[touched]
        after = (before.to(torch.float32) + acc[touched]).to(weight.dtype)
        weight.view(-1)[touched] = after
        changed += len(touched)
        # Bits, so that a NaN that stays the same NaN counts as unchanged.
        bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
        swallowed += int((before.view(bits) == after.view(bits)).sum())
    return torch.tensor(
        [changed, swallowed],
        dtype=torch.int64,
        device=weights[0].device if weights else torch.device("cpu"),
    )


def restore_(weights: Tensors, idx: Tensors, ptr: Tensors, undo: Tensors) -> None:
    """Write the logged values back, bit for bit."""
    numels = [t.numel() for t in weights]
    for i, p, log in zip(idx, ptr, undo, strict=True):
        for weight, (entries, flat) in zip(weights, _positions(numels, i, p), strict=True):
            weight.view(-1)[flat] = log[entries]


def swap_(
    weights: Tensors,
    old_idx: Tensors,
    old_ptr: Tensors,
    old_undo: Tensors,
    idx: Tensors,
    ptr: Tensors,
    val: Tensors,
    alphas: Sequence[float],
    undo: Tensors,
) -> Tensor:
    """restore_ of the old deltas, then compose_ of the new ones."""
    restore_(weights, old_idx, old_ptr, old_undo)
    return compose_(weights, idx, ptr, val, alphas, undo)


def merge(
    lengths: Tensor, idx: Tensors, ptr: Tensors, val: Tensors, alphas: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The union of the supports, with the fp32 sum of alpha * val in the order given."""
    union, out_ptr, places = _union(lengths, idx, ptr)
    acc = torch.zeros(len(union), dtype=torch.float32, device=lengths.device)
    for at, v, alpha in zip(places, val, alphas, strict=True):
        acc[at] = acc[at] + v.to(torch.float32) * alpha
    return union, out_ptr, acc


def reduce(
    lengths: Tensor, idx: Tensors, ptr: Tensors, val: Tensors, alphas: Sequence[float]
) -> tuple[Tensor, ...]:
    """The union of the supports; of alpha * val there: sums of all, of the positive, of the
    negative, the largest magnitude; how many, how many positive, how many negative."""
    union, out_ptr, places = _union(lengths, idx, ptr)
    n, device = len(union), lengths.device
    total, positive, negative, largest = (torch.zeros(n, device=device) for _ in range(4))
    n_present, n_positive, n_negative = (
        torch.zeros(n, dtype=torch.int16, device=device) for _ in range(3)
    )
    for at, v, alpha in zip(places, val, alphas, strict=True):
        x = v.to(torch.float32) * alpha
        zero, most = torch.zeros_like(x), largest[at]
        total[at] = total[at] + x
        positive[at] = positive[at] + torch.where(x > 0, x, zero)
        negative[at] = negative[at] + torch.where(x < 0, x, zero)
        larger = (x.abs() > most.abs()) | ((x.abs() == most.abs()) & (x > most))
        largest[at] = torch.where(larger, x, most)
        n_present[at] += 1
        n_positive[at] += x > 0
        n_negative[at] += x < 0
    return union, out_ptr, total, positive, negative, largest, n_present, n_positive, n_negative


def _union(lengths: Tensor, idx: Tensors, ptr: Tensors) -> tuple[Tensor, Tensor, list[Tensor]]:
    """idx and ptr of the union of the supports, and where the entries of each lie in it."""
    tiles = lengths.shape[0]
    base = torch.arange(tiles, device=lengths.device) * TILE
    keys = [
        _offsets(i) + torch.repeat_interleave(base, p[1:] - p[:-1])
        for i, p in zip(idx, ptr, strict=True)
    ]
    union = torch.unique(torch.cat([base[:0], *keys]), sorted=True)
    out_ptr = torch.zeros(tiles + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(torch.bincount(union // TILE, minlength=tiles), 0, out=out_ptr[1:])
    places = [torch.searchsorted(union, key) for key in keys]
    return (union % TILE).to(torch.uint16), out_ptr, places


def overlap(
    idx_a: Tensor, ptr_a: Tensor, val_a: Tensor, idx_b: Tensor, ptr_b: Tensor, val_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Per tile: entries in both and with equal sign; a.b, a.a and b.b over the entries in both."""
    tiles = ptr_a.shape[0] - 1
    counts = torch.zeros(tiles, 2, dtype=torch.int64, device=idx_a.device)
    dots = torch.zeros(tiles, 3, dtype=torch.float64, device=idx_a.device)
    starts_a, starts_b = ptr_a.tolist(), ptr_b.tolist()
    offsets_a, offsets_b = _offsets(idx_a), _offsets(idx_b)
    for t in range(tiles):
        in_a = slice(starts_a[t], starts_a[t + 1])
        in_b = slice(starts_b[t], starts_b[t + 1])
        both_a = torch.isin(offsets_a[in_a], offsets_b[in_b])
        both_b = torch.isin(offsets_b[in_b], offsets_a[in_a])
        a = val_a[in_a][both_a].to(torch.float64)
        b = val_b[in_b][both_b].to(torch.float64)
        counts[t, 0] = len(a)
        counts[t, 1] = int(((a > 0) & (b > 0) | (a < 0) & (b < 0)).sum())
        for column, product in enumerate((a * b, a * a, b * b)):
            padded = product.new_zeros(len(both_a))
            padded[both_a] = product
            dots[t, column] = _sum_in_order(_run_sums(padded).view(1, -1))
    return counts, dots


# --- identity and validity ------------------------------------------------------------------------


def digest(weights: Tensors, idx: Tensor, ptr: Tensor) -> Tensor:
    """Sums mod 2^64 over (position, bits) of the selected weights: fp32 bits, bf16 bits."""
    numels = [t.numel() for t in weights]
    base = torch.arange(n_tiles(numels), device=idx.device) * TILE
    position = _offsets(idx) + torch.repeat_interleave(base, ptr[1:] - ptr[:-1]) + 1
    values = _read(weights, numels, idx, ptr)
    full = values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    half = values.to(torch.bfloat16).view(torch.int16).to(torch.int64) & 0xFFFF
    sums = [mix(position * _POSITION + bits * _PAYLOAD).sum() for bits in (full, half)]
    return torch.stack(sums)


def check_support(lengths: Tensor, idx: Tensor, ptr: Tensor, val: Tensor | None) -> Tensor:
    """First fault of a support: code (as in csrc/sparse_ft.h), tile, entry, explicit zeros."""
    nnz, tiles = idx.shape[0], lengths.shape[0]
    bounds = ptr.tolist()
    if bounds[0] != 0:
        return torch.tensor([1, 0, 0, 0])
    if bounds[-1] != nnz:
        return torch.tensor([1, max(0, tiles - 1), 0, 0])
    steps = ptr[1:] - ptr[:-1]
    wrong = ((steps < 0) | (steps > lengths)).nonzero()
    if len(wrong):
        tile = int(wrong[0])
        return torch.tensor([2, tile, max(0, bounds[tile]), 0])
    tile_of = torch.repeat_interleave(torch.arange(tiles, device=idx.device), steps)
    offsets = _offsets(idx)
    out_of_order = torch.zeros(nnz, dtype=torch.bool, device=idx.device)
    if nnz > 1:
        same = tile_of[1:] == tile_of[:-1]
        out_of_order[1:] = same & (offsets[1:] <= offsets[:-1])
    beyond = offsets >= lengths[tile_of]
    bad_value = ~torch.isfinite(val) if val is not None else torch.zeros_like(out_of_order)
    fault = (out_of_order | beyond | bad_value).nonzero()
    if not len(fault):
        zeros = int((val == 0).sum()) if val is not None else 0
        return torch.tensor([0, 0, 0, zeros])
    entry = int(fault[0])
    code = 3 if out_of_order[entry] else 4 if beyond[entry] else 5
    return torch.tensor([code, int(tile_of[entry]), entry, 0])


def hash_pieces(data: Tensor) -> Tensor:
    """BLAKE2b-256 of each piece."""
    out = torch.empty(-(-data.shape[0] // HASH_PIECE), HASH_BYTES, dtype=torch.uint8)
    for row, piece in zip(out, data.split(HASH_PIECE), strict=False):
        hashed = hashlib.blake2b(piece.numpy(), digest_size=HASH_BYTES).digest()
        row.copy_(torch.frombuffer(bytearray(hashed), dtype=torch.uint8))
    return out
