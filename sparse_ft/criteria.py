"""Selection criteria: how entries are ranked. One decorated function each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_ft_kernels import select_random, select_topk

__all__ = ["CRITERIA", "Candidates", "Choice", "criterion", "largest"]


@dataclass(frozen=True)
class Candidates:
    """What a criterion chooses from.

    Args:
        names: Names of the eligible tensors, in canonical order.
        current: Their values now.
        start: Their values at the start; empty where there is no start.
        k: Entries to choose.
        exclude: idx and ptr of entries that must not be chosen.
        seed: For criteria that draw at random.
        tie: "index" or "all".
    """

    names: Sequence[str]
    current: Sequence[Tensor]
    start: Sequence[Tensor]
    k: int
    exclude: tuple[Tensor, Tensor] | None
    seed: int
    tie: str


# idx, ptr, and the info vector of select_topk where there is one.
Choice = tuple[Tensor, Tensor, Tensor | None]
CRITERIA: dict[str, Callable[[Candidates], Choice]] = {}


def criterion(
    name: str,
) -> Callable[[Callable[[Candidates], Choice]], Callable[[Candidates], Choice]]:
    """Registers a criterion under a name."""

    def register(function: Callable[[Candidates], Choice]) -> Callable[[Candidates], Choice]:
        CRITERIA[name] = function
        return function

    return register


def largest(candidates: Candidates) -> Choice:
    """The entries with the largest |current − start|, or |current| where there is no start."""
    return select_topk(
        candidates.current,
        candidates.start,
        k=candidates.k,
        exclude=candidates.exclude,
        tie=candidates.tie,
    )


@criterion("magnitude")
def magnitude(candidates: Candidates) -> Choice:
    """The entries that moved most: the largest |θ1 − θ0| over all tensors (LT-SFT, algorithm 1)."""
    if not candidates.start:
        raise ValueError('select: criterion "magnitude" needs theta0, the values at the start')
    return largest(candidates)


@criterion("random")
def random(candidates: Candidates) -> Choice:
    """Entries drawn uniformly (RAND-SFT): the same for one seed on every machine."""
    return (
        *select_random(
            candidates.current, k=candidates.k, seed=candidates.seed, exclude=candidates.exclude
        ),
        None,
    )
