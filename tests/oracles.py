"""What the op tests share: models of awkward shapes, and slow independent versions of the ops in
numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TILE = 65536
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Every edge of the tile: empty, single, one short of a tile, exact, one over, several, more than
# one dimension, a scalar.
MODELS: dict[str, list[tuple[int, ...]]] = {
    "empty": [],
    "no-elements": [(0,), (0, 5)],
    "one": [(1,)],
    "63": [(63,)],
    "65535": [(65535,)],
    "65536": [(65536,)],
    "65537": [(65537,)],
    "200003": [(200003,)],
    "many": [(7, 11, 13), (0,), (), (200003,), (256, 256), (1,), (65537,)],
}


def rng(*key: object) -> torch.Generator:
    """A generator seeded by the test's own parameters."""
    seed = int.from_bytes(repr(key).encode()[-7:], "little")
    return torch.Generator().manual_seed(seed)


def tensors(
    shapes: Sequence[tuple[int, ...]],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def numels(model: Sequence[Tensor]) -> list[int]:
    return [t.numel() for t in model]


def n_tiles(sizes: Sequence[int]) -> int:
    return sum(-(-n // TILE) for n in sizes)


def flat_support(sizes: Sequence[int], chosen: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """idx and ptr of flat positions per tensor."""
    idx, counts = [np.zeros(0, np.uint16)], [np.zeros(0, np.int64)]
    for n, flat in zip(sizes, chosen, strict=True):
        flat = np.sort(flat)
        idx.append((flat % TILE).astype(np.uint16))
        counts.append(np.bincount(flat // TILE, minlength=-(-n // TILE)).astype(np.int64))
    ptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return torch.from_numpy(np.concatenate(idx)), torch.from_numpy(ptr)


def random_support(
    sizes: Sequence[int], density: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """idx, ptr and the flat positions per tensor."""
    chosen = [
        (torch.rand(n, generator=generator) < density).nonzero().reshape(-1).numpy() for n in sizes
    ]
    return *flat_support(sizes, chosen), chosen


def take(model: Sequence[Tensor], chosen: Sequence[np.ndarray]) -> Tensor:
    """The chosen entries of all tensors, in order."""
    pieces = [t.reshape(-1)[torch.from_numpy(flat)] for t, flat in zip(model, chosen, strict=True)]
    return torch.cat(pieces) if pieces else torch.zeros(0)


def bits(tensor: Tensor) -> Tensor:
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.contiguous().view(-1).view(width)


def assert_bits(found: Tensor, expected: Tensor, what: str = "") -> None:
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, what
    differing = int((bits(found) != bits(expected)).sum()) if found.numel() else 0
    assert differing == 0, f"{what}: {differing} of {found.numel()} entries differ in their bits"


def run_sum(values: np.ndarray) -> float:
    """The fp64 sum of at most 1024 values by halving, as csrc/sparse_ft.h states it."""
    run = np.zeros(1024)
    run[: len(values)] = values
    h = 512
    while h:
        run = run[:h] + run[h:]
        h //= 2
    return float(run[0])


def run_sums(values: np.ndarray) -> list[float]:
    return [run_sum(values[at : at + 1024]) for at in range(0, len(values), 1024)]


def tree_sum(values: np.ndarray) -> float:
    """The fp64 sum by runs, runs of their sums, and so on."""
    values = np.asarray(values, np.float64)
    while len(values) > 1:
        values = np.asarray(run_sums(values))
    return float(values[0]) if len(values) else 0.0


def ulps(found: Tensor, expected: np.ndarray) -> np.ndarray:
    """Distance of fp32 values from fp64 ones, in units of the last place of the fp32 value
    expected.
    """
    target = expected.astype(np.float32)
    return np.abs(found.double().numpy() - expected) / np.spacing(np.abs(target)).astype(np.float64)


def top_k(a: Sequence[Tensor], b: Sequence[Tensor], k: int) -> list[np.ndarray]:
    """Flat positions per tensor of the k largest fp32 differences, by a full stable sort."""
    scores = [
        np.abs(
            t.float().numpy().reshape(-1)
            - (b[i].float().numpy().reshape(-1) if b else np.float32(0))
        )
        for i, t in enumerate(a)
    ]
    everything = np.concatenate([np.zeros(0, np.float32), *scores])
    order = np.argsort(-everything.astype(np.float64), kind="stable")[:k]
    chosen, start = [], 0
    for score in scores:
        mine = order[(order >= start) & (order < start + len(score))] - start
        chosen.append(np.sort(mine))
        start += len(score)
    return chosen
