"""The kernel layer as the public low-level API: whole-model ops on selected entries.

Everything here comes from `sparse_ft_kernels`; docs/ops.md describes each op, csrc/sparse_ft.h its
arithmetic.
"""

from sparse_ft_kernels import (
    TILE,
    BackendError,
    NonFiniteError,
    Reduction,
    TooFewError,
    anchor_l1_,
    check_support,
    compose_,
    dense_adamw_,
    digest,
    explain,
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

__all__ = [
    "TILE",
    "BackendError",
    "NonFiniteError",
    "Reduction",
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
]
