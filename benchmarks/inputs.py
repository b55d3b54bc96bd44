"""Models, gradients, supports and fine-tunings to measure on, the same for the same seed."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import sparse_ft_kernels as ops
from sparse_ft_kernels.contract import touched_bytes

from .case import Setting
from .shapes import shapes_of

# Values repeat with a period that differs from seed to seed, so that the difference of two models
# does not repeat in any model there is. Drawing every value would take longer than the benchmark.
_PERIOD = 4_194_301
# How unequal the differences of trained models are, as standard deviations of logarithms: between
# tensors, between rows, and between rows of embeddings, most of whose pieces a language never uses.
_TENSOR_SPREAD, _ROW_SPREAD, _EMBEDDING_SPREAD = 0.5, 0.3, 1.5
_EMBEDDING_ROWS = 20_000


def names(setting: Setting) -> list[str]:
    """The parameters in canonical order."""
    return sorted(shapes_of(setting.shape))


@cache
def _noise(seed: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    period = _PERIOD - 2 * seed
    return torch.empty(period, device=device).normal_(generator=generator)


def _tiled(noise: Tensor, shape: tuple[int, ...], start: int, dtype: torch.dtype) -> Tensor:
    """The noise from a place on, repeated to a shape."""
    out = torch.empty(shape, dtype=dtype, device=noise.device)
    flat, n, period = out.view(-1), out.numel(), len(noise)
    first = min(n, period - start % period)
    flat[:first] = noise[start % period :][:first]
    whole = (n - first) // period
    flat[first : first + whole * period].view(whole, period).copy_(noise.expand(whole, -1))
    rest = first + whole * period
    flat[rest:] = noise[: n - rest]
    return out


def tensors(setting: Setting, seed: int, spread: float = 0.02) -> list[Tensor]:
    """Normally distributed values in the shapes of the model.

    Args:
        setting: Shape, dtype and device.
        seed: Which values.
        spread: Standard deviation.

    Returns:
        One tensor a parameter, in canonical order.
    """
    noise = (_noise(seed, setting.device) * spread).to(setting.torch_dtype)
    out, start = [], 0
    for name in names(setting):
        out.append(_tiled(noise, shapes_of(setting.shape)[name], start, setting.torch_dtype))
        start += out[-1].numel()
    return out


def drift(setting: Setting, seed: int, size: float = 1e-3) -> list[Tensor]:
    """Differences as training leaves them: unequal between tensors, rows and embedding rows, fp32.

    Args:
        setting: Shape and device.
        seed: Which values.
        size: Their typical size.

    Returns:
        One fp32 tensor a parameter, in canonical order.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = _noise(seed, setting.device) * size
    out, start = [], 0
    for name in names(setting):
        shape = shapes_of(setting.shape)[name]
        values = _tiled(noise, shape, start, torch.float32)
        start += values.numel()
        scale = torch.randn((), generator=generator).mul(_TENSOR_SPREAD).exp()
        values.mul_(float(scale))
        if len(shape) == 2:
            by_row = _EMBEDDING_SPREAD if shape[0] >= _EMBEDDING_ROWS else _ROW_SPREAD
            rows = torch.randn((shape[0], 1), generator=generator).mul(by_row).exp()
            values.mul_(rows.to(values.device))
        out.append(values)
    return out


def support(setting: Setting, model: list[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """A support of the setting's density and kind.

    Args:
        setting: Density and kind.
        model: Where.
        seed: Which.

    Returns:
        idx and ptr, as select_topk returns them.
    """
    if setting.support == "uniform" or setting.density == 1:
        return ops.select_random(model, k=setting.nnz, seed=seed)
    idx, ptr, _ = ops.select_topk(drift(setting, 100 + seed), k=setting.nnz)
    return idx, ptr


def values(n: int, seed: int, device: str, spread: float = 1e-3) -> Tensor:
    """fp32 values of a fine-tuning."""
    return _tiled(_noise(seed, device) * spread, (n,), 0, torch.float32)


def positions(model: list[Tensor], idx: Tensor, ptr: Tensor) -> list[Tensor]:
    """The selected entries of each tensor, as int64 flat positions."""
    counts, ends = ptr[1:] - ptr[:-1], ptr.tolist()
    out, tile = [], 0
    for tensor in model:
        n = -(-tensor.numel() // ops.TILE)
        base = torch.arange(n, device=idx.device) * ops.TILE
        base = torch.repeat_interleave(base, counts[tile : tile + n])
        out.append((idx[ends[tile] : ends[tile + n]].to(torch.int64) & 0xFFFF) + base)
        tile += n
    return out


def masks(model: list[Tensor], at: list[Tensor]) -> list[Tensor]:
    """A bool mask a tensor from the positions of its selected entries."""
    out = []
    for tensor, where in zip(model, at, strict=True):
        mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
        mask[where] = True
        out.append(mask.view(tensor.shape))
    return out


def taken(model: list[Tensor], at: list[Tensor]) -> Tensor:
    """The values at the positions of all tensors, one after the other."""
    return torch.cat([t.view(-1)[where] for t, where in zip(model, at, strict=True)])


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two models hold the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def surplus(setting: Setting, *at: list[Tensor]) -> int:
    """Bytes of memory lines that supports touch together beyond those of uniform ones (often
    fewer).
    """
    if setting.support == "uniform":
        return 0
    line = 32 if setting.device == "cuda" else 64
    values = line // setting.width
    touched = sum(len((torch.cat(places) // values).unique()) for places in zip(*at, strict=True))
    uniform = touched_bytes(setting.numel, len(at) * setting.nnz, setting.width, line)
    return touched * line - uniform
