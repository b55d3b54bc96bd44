"""The kernel layer of sparse_ft: whole-model ops on selected entries, with several backends under
one contract.
"""

# Registers the ops with torch before ops.py looks them up.
from . import dispatch as _dispatch  # noqa: F401
from .contract import NonFiniteError, TooFewError
from .dispatch import BackendError, explain
from .ops import (
    Reduction,
    anchor_l1_,
    check_support,
    compose_,
    dense_adamw_,
    digest,
    gather,
    hash_pieces,
    masked_adamw_,
    merge,
    overlap,
    reduce,
    restore_,
    select_random,
    select_topk,
    swap_,
)
from .tile_table import TILE, TileTable, tile_table

__all__ = [
    "TILE",
    "BackendError",
    "NonFiniteError",
    "Reduction",
    "TileTable",
    "TooFewError",
    "anchor_l1_",
    "check_support",
    "compose_",
    "dense_adamw_",
    "digest",
    "explain",
    "gather",
    "hash_pieces",
    "masked_adamw_",
    "merge",
    "overlap",
    "reduce",
    "restore_",
    "select_random",
    "select_topk",
    "swap_",
    "tile_table",
]
