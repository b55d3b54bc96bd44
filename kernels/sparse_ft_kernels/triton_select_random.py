"""select_random: k entries, every set of k equally likely: the k largest hashes of (seed, place).

    key = mix(seed * 0xD1342543DE82EF95 + (tile * 65536 + offset + 1) * 0x9E3779B97F4A7C15) >> 33

The kernels are those of select_topk, with the hash as the key. Hashes are uniform, so the bound L
follows from theory and nothing is sampled.

Moves nothing but the candidates (see select_topk) and 2 bytes of idx an entry. What counts is
arithmetic: three products of 64 bits an element.
"""

from __future__ import annotations

from torch import Tensor

from .contract import Tensors
from .triton_common import Variant
from .triton_select_topk import Selection, model_variants, random_bound


def select_random(
    like: Tensors, k: int, seed: int, exclude_idx: Tensor | None, exclude_ptr: Tensor | None
) -> tuple[Tensor, Tensor]:
    """k entries at random: the top k by a hash of (seed, tile, offset)."""
    selection = Selection(like, [], k, exclude_idx, exclude_ptr, seed)
    if k == 0:
        return selection.nothing()[:2]
    bound = random_bound(k, selection.eligible, selection.excluded)
    return selection.run(bound, False, False)[:2]


def variants() -> list[Variant]:
    """The kernels as compiled ahead of time: those of select_topk that make keys."""
    kind = {"HASH": True, "HAS_B": False, "CODES_A": 1, "CODES_B": 1}
    return model_variants("select_random", kind, False, False)
