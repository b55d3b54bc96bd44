"""Backend `cpu`: loads the C++ library built from csrc/ through ctypes and calls it on CPU
tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from .contract import HASH_BYTES, HASH_PIECE, NonFiniteError, Tensors, TooFewError
from .tile_table import DTYPE_CODES, TileTable, tile_lengths, tile_table

ABI_VERSION = 1

# SFT_SUM_RUN of csrc/sparse_ft.h.
SUM_RUN = 1024

# sft_master of csrc/sparse_ft.h.
MASTER_NONE, MASTER_F32, MASTER_SPLIT = range(3)

OK, BAD_ARGUMENT, NONFINITE, TOO_FEW, WORKSPACE = range(5)


class Tiles(ctypes.Structure):
    """`sft_tiles` of csrc/sparse_ft.h."""

    _fields_ = [
        ("base", c_void_p),
        ("length", c_void_p),
        ("dtype", c_void_p),
        ("n", c_int64),
    ]


_TILES = POINTER(Tiles)
_P = c_void_p

# Function → result type, argument types. A test compares this table with the header.
SIGNATURES: dict[str, tuple[type, tuple[type, ...]]] = {
    "sft_abi_version": (c_int32, ()),
    "sft_build_id": (c_char_p, ()),
    "sft_status_string": (c_char_p, (c_int32,)),
    "sft_cpu_isa": (c_char_p, ()),
    "sft_cpu_set_isa": (c_int32, (c_char_p,)),
    "sft_cpu_select_topk_workspace_bytes": (c_int64, (c_int64, c_int64, c_int64, c_int32)),
    "sft_cpu_select_topk_find": (
        c_int32,
        (_TILES, _TILES, c_int64, _P, _P, c_int32, _P, _P, _P, c_int64, c_int32),
    ),
    "sft_cpu_select_topk_emit": (
        c_int32,
        (_TILES, _TILES, c_int64, _P, _P, c_int32, _P, _P, _P, c_int64, _P, c_int32),
    ),
    "sft_cpu_select_random_find": (
        c_int32,
        (_P, c_int64, c_int64, c_uint64, _P, _P, _P, _P, _P, c_int64, c_int32),
    ),
    "sft_cpu_select_random_emit": (
        c_int32,
        (_P, c_int64, c_int64, c_uint64, _P, _P, _P, _P, _P, c_int64, _P, c_int32),
    ),
    "sft_cpu_gather": (
        c_int32,
        (_TILES, c_int64, _P, _P, _P, _P, c_int32, _P, c_float, _P, _P, _P, c_int32),
    ),
    "sft_cpu_masked_adamw": (
        c_int32,
        (
            *(_TILES, _P, _P, _P, _TILES, _P, _P, _P, _P, _P, _P),
            *(c_double, c_double, c_double, c_double, c_float, _P, _P, _P, c_int32),
        ),
    ),
    "sft_cpu_dense_adamw": (
        c_int32,
        (
            *(_TILES, _TILES, _TILES, _TILES, _TILES, c_int32, _TILES, _P, _P),
            *(c_double, c_double, c_double, c_double, c_float, _P, _P, _P, c_int32),
        ),
    ),
    "sft_cpu_compose_workspace_bytes": (c_int64, (c_int32, c_int32)),
    "sft_cpu_compose": (
        c_int32,
        (_TILES, c_int32, _P, _P, _P, _P, _P, _P, _P, _P, c_int64, c_int32),
    ),
    "sft_cpu_restore": (c_int32, (_TILES, c_int32, _P, _P, _P, c_int32)),
    "sft_cpu_merge_workspace_bytes": (c_int64, (c_int32, c_int32)),
    "sft_cpu_merge_count": (c_int32, (c_int64, c_int32, _P, _P, _P, _P, c_int64, c_int32)),
    "sft_cpu_merge_fill": (
        c_int32,
        (c_int64, c_int32, _P, _P, _P, _P, _P, _P, _P, _P, _P, c_int64, c_int32),
    ),
    "sft_cpu_reduce": (
        c_int32,
        (
            *(c_int64, c_int32, _P, _P, _P, _P, _P, _P, _P),
            *(_P, _P, _P, _P, _P, _P, _P, c_int32),
        ),
    ),
    "sft_cpu_overlap": (
        c_int32,
        (c_int64, _P, _P, _P, c_int32, _P, _P, _P, c_int32, _P, _P, c_int32),
    ),
    "sft_cpu_anchor_l1": (c_int32, (_TILES, _TILES, _TILES, c_float, _P, _P, c_int32)),
    "sft_cpu_digest": (c_int32, (_TILES, _P, _P, _P, c_int32)),
    "sft_cpu_check_support": (
        c_int32,
        (_P, c_int64, _P, _P, c_int64, _P, c_int32, _P, c_int32),
    ),
    "sft_cpu_hash_pieces": (c_int32, (_P, c_int64, _P, c_int32)),
}


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str]:
    """The CPU library, or None with the reason why it cannot be used."""
    # Here, not at the top: `python -m sparse_ft_kernels.build` must not find itself imported.
    from .build import is_current, library_path

    path = library_path("cpu")
    build = "`python -m sparse_ft_kernels.build` builds it"
    if not path.exists():
        return None, f"the library {path.name} is not built; {build}"
    if not is_current("cpu"):
        return None, f"{path.name} was built from other sources than these; {build} anew"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} does not load ({error}); {build} anew"
    library.sft_abi_version.restype = c_int32
    if (found := library.sft_abi_version()) != ABI_VERSION:
        return (
            None,
            f"{path.name} has ABI version {found}, this package needs {ABI_VERSION}; {build} anew",
        )
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            return None, f"{path.name} lacks {name}; {build} anew"
        function.restype = result
        function.argtypes = arguments
    return library, f"{path.name}, {library.sft_cpu_isa().decode()}"


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve a device; None where it can."""
    if device.type != "cpu":
        return f"it works on CPU tensors, not on {device.type}"
    library, reason = load()
    return None if library is not None else reason


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "portable"."""
    return str(_library().sft_cpu_isa().decode())


def set_isa(name: str) -> None:
    """Use a lesser instruction set than the machine has; results keep their bits.

    Raises:
        ValueError: The machine or the build does not have it.
    """
    if _library().sft_cpu_set_isa(name.encode()) != OK:
        raise ValueError(f"instruction set {name!r} is not available here; {isa()!r} is in use")


def _library() -> ctypes.CDLL:
    library, reason = load()
    if library is None:
        raise RuntimeError(f"backend cpu: {reason}")
    return library


def _check(op: str, status: int) -> None:
    if status != OK:
        text = _library().sft_status_string(status).decode()
        raise RuntimeError(f"{op}: the CPU library reports {text} (status {status})")


def _threads() -> int:
    return torch.get_num_threads()


def _ptr(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _struct(table: TileTable) -> Tiles:
    return Tiles(table.base.data_ptr(), table.length.data_ptr(), table.dtype.data_ptr(), table.n)


def _addresses(tensors: Tensors) -> ctypes.Array[c_void_p]:
    return (c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))


def _codes(tensors: Tensors) -> ctypes.Array[c_int32]:
    return (c_int32 * max(1, len(tensors)))(*(DTYPE_CODES[t.dtype] for t in tensors))


def _floats(values: Sequence[float]) -> ctypes.Array[c_float]:
    return (c_float * max(1, len(values)))(*values)


def _require_ends(op: str, idx: Sequence[Tensor], ptr: Sequence[Tensor], prefix: str = "") -> None:
    """Refuses a ptr that does not run from 0 to nnz: C would read beyond the arrays.

    What lies between is not looked at, which would cost a pass; `check_support` does that.
    """
    for j, (i, p) in enumerate(zip(idx, ptr, strict=True)):
        first, last = int(p[0]), int(p[-1])
        if first != 0 or last != i.shape[0]:
            raise ValueError(
                f"{op}: ptr of {prefix}support {j} runs from {first} to {last}, but it must run "
                f"from 0 to nnz = {i.shape[0]}"
            )


def _workspace(size: int) -> Tensor:
    return torch.empty(max(1, size), dtype=torch.uint8)


# --- selection ------------------------------------------------------------------------------------


def select_topk(
    a: Tensors,
    b: Tensors,
    k: int,
    exclude_idx: Tensor | None,
    exclude_ptr: Tensor | None,
    ties_all: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if exclude_idx is not None and exclude_ptr is not None:
        _require_ends("select_topk", [exclude_idx], [exclude_ptr])
    library, threads = _library(), _threads()
    table_a = tile_table(a)
    table_b = tile_table(b) if b else None
    tiles_a = _struct(table_a)
    tiles_b = _struct(table_b) if table_b is not None else None
    n_excluded = exclude_idx.numel() if exclude_idx is not None else 0
    size = library.sft_cpu_select_topk_workspace_bytes(table_a.n, k, n_excluded, threads)
    workspace = _workspace(size)
    ptr = torch.empty(table_a.n + 1, dtype=torch.int64)
    info = torch.empty(8, dtype=torch.int64)
    common = (
        tiles_a,
        tiles_b,
        k,
        _ptr(exclude_idx),
        _ptr(exclude_ptr),
        int(ties_all),
        ptr.data_ptr(),
    )
    status = library.sft_cpu_select_topk_find(
        *common, info.data_ptr(), workspace.data_ptr(), size, threads
    )
    if status == NONFINITE:
        tile = int(info[5])
        raise NonFiniteError(tile, _ordinal(a, tile))
    if status == TOO_FEW:
        raise TooFewError("select_topk", k, int(info[7]))
    _check("select_topk", status)
    idx = torch.empty(int(info[1]), dtype=torch.uint16)
    status = library.sft_cpu_select_topk_emit(
        *common, info.data_ptr(), workspace.data_ptr(), size, idx.data_ptr(), threads
    )
    _check("select_topk", status)
    return idx, ptr, info


def _ordinal(tensors: Tensors, tile: int) -> int:
    for i, tensor in enumerate(tensors):
        tile -= -(-tensor.numel() // 65536)
        if tile < 0:
            return i
    raise AssertionError("the tile lies beyond the tensors")


def select_random(
    like: Tensors, k: int, seed: int, exclude_idx: Tensor | None, exclude_ptr: Tensor | None
) -> tuple[Tensor, Tensor]:
    if exclude_idx is not None and exclude_ptr is not None:
        _require_ends("select_random", [exclude_idx], [exclude_ptr])
    library, threads = _library(), _threads()
    length = torch.tensor(tile_lengths([t.numel() for t in like]), dtype=torch.int32)
    n = length.shape[0]
    n_excluded = exclude_idx.numel() if exclude_idx is not None else 0
    size = library.sft_cpu_select_topk_workspace_bytes(n, k, n_excluded, threads)
    workspace = _workspace(size)
    ptr = torch.empty(n + 1, dtype=torch.int64)
    info = torch.empty(8, dtype=torch.int64)
    common = (
        *(length.data_ptr(), n, k, seed & 0xFFFFFFFFFFFFFFFF),
        *(_ptr(exclude_idx), _ptr(exclude_ptr), ptr.data_ptr(), info.data_ptr()),
        *(workspace.data_ptr(), size),
    )
    status = library.sft_cpu_select_random_find(*common, threads)
    if status == TOO_FEW:
        raise TooFewError("select_random", k, int(info[7]))
    _check("select_random", status)
    idx = torch.empty(int(info[1]), dtype=torch.uint16)
    _check("select_random", library.sft_cpu_select_random_emit(*common, idx.data_ptr(), threads))
    return idx, ptr


# --- the optimizer step ---------------------------------------------------------------------------


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
    _require_ends("gather", [idx], [ptr])
    n = ptr.shape[0] - 1
    tiles = _struct(tile_table(grads, numels)) if grads else None
    partials = torch.empty(-(-idx.shape[0] // SUM_RUN), dtype=torch.float64)
    norm_sq = torch.empty(1, dtype=torch.float64)
    found_inf = torch.empty(1, dtype=torch.float32)
    status = _library().sft_cpu_gather(
        *(tiles, n, idx.data_ptr(), ptr.data_ptr(), out.data_ptr(), _ptr(grad_scale)),
        *(int(accumulate), _ptr(delta) if l1 != 0 else None, l1),
        *(partials.data_ptr(), norm_sq.data_ptr(), found_inf.data_ptr(), _threads()),
    )
    _check("gather", status)
    return norm_sq, found_inf


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
    _require_ends("masked_adamw_", [idx], [ptr])
    tiles = _struct(tile_table(weights))
    grad_tiles = _struct(tile_table(grads, [w.numel() for w in weights])) if grad is None else None
    status = _library().sft_cpu_masked_adamw(
        *(tiles, idx.data_ptr(), ptr.data_ptr(), _ptr(grad), grad_tiles),
        *(exp_avg.data_ptr(), exp_avg_sq.data_ptr(), delta.data_ptr(), theta0.data_ptr()),
        *(step.data_ptr(), lr.data_ptr(), beta1, beta2, eps, weight_decay, l1),
        *(_ptr(grad_scale), _ptr(found_inf), _ptr(clip), _threads()),
    )
    _check("masked_adamw_", status)


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
    kind = MASTER_NONE
    if master:
        kind = MASTER_SPLIT if master[0].dtype == torch.int16 else MASTER_F32
    if kind == MASTER_SPLIT:
        # The low halves have no code of their own: a table needs one of the same width.
        master = [low.view(torch.bfloat16) for low in master]
    status = _library().sft_cpu_dense_adamw(
        *(_struct(tile_table(weights)), _struct(tile_table(grads, [w.numel() for w in weights]))),
        *(_struct(tile_table(exp_avg)), _struct(tile_table(exp_avg_sq))),
        *(_struct(tile_table(master)) if master else None, kind),
        *(_struct(tile_table(anchors)) if l1 != 0 else None, step.data_ptr(), lr.data_ptr()),
        *(beta1, beta2, eps, weight_decay, l1),
        *(_ptr(grad_scale), _ptr(found_inf), _ptr(clip), _threads()),
    )
    _check("dense_adamw_", status)


def anchor_l1_(grads: Tensors, weights: Tensors, anchors: Tensors, coeff: float) -> Tensor:
    table = tile_table(weights)
    tiles = _struct(tile_table(grads, [w.numel() for w in weights])) if grads else None
    partials = torch.empty(table.n, dtype=torch.float64)
    total = torch.empty(1, dtype=torch.float64)
    status = _library().sft_cpu_anchor_l1(
        *(tiles, _struct(table), _struct(tile_table(anchors)), coeff),
        *(partials.data_ptr(), total.data_ptr(), _threads()),
    )
    _check("anchor_l1_", status)
    return total


# --- composition ----------------------------------------------------------------------------------


def compose_(
    weights: Tensors,
    idx: Tensors,
    ptr: Tensors,
    val: Tensors,
    alphas: Sequence[float],
    undo: Tensors,
) -> Tensor:
    _require_ends("compose_", idx, ptr)
    library, threads = _library(), _threads()
    stats = torch.zeros(2, dtype=torch.int64)
    size = library.sft_cpu_compose_workspace_bytes(len(idx), threads)
    workspace = _workspace(size)
    status = library.sft_cpu_compose(
        *(_struct(tile_table(weights)), len(idx), _addresses(idx), _addresses(ptr)),
        *(_addresses(val), _codes(val), _floats(alphas), _addresses(undo) if undo else None),
        *(stats.data_ptr(), workspace.data_ptr(), size, threads),
    )
    _check("compose_", status)
    return stats


def restore_(weights: Tensors, idx: Tensors, ptr: Tensors, undo: Tensors) -> None:
    _require_ends("restore_", idx, ptr)
    status = _library().sft_cpu_restore(
        *(_struct(tile_table(weights)), len(idx), _addresses(idx), _addresses(ptr)),
        *(_addresses(undo), _threads()),
    )
    _check("restore_", status)


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
    # Both before the first write.
    _require_ends("swap_", old_idx, old_ptr, "old ")
    _require_ends("swap_", idx, ptr)
    restore_(weights, old_idx, old_ptr, old_undo)
    return compose_(weights, idx, ptr, val, alphas, undo)


def merge(
    lengths: Tensor, idx: Tensors, ptr: Tensors, val: Tensors, alphas: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    library, threads = _library(), _threads()
    out_ptr = _union("merge", lengths.shape[0], idx, ptr)
    nnz = int(out_ptr[-1])
    out_idx = torch.empty(nnz, dtype=torch.uint16)
    out_val = torch.empty(nnz, dtype=torch.float32)
    size = library.sft_cpu_merge_workspace_bytes(len(idx), threads)
    workspace = _workspace(size)
    status = library.sft_cpu_merge_fill(
        *(lengths.shape[0], len(idx), _addresses(idx), _addresses(ptr)),
        *(_addresses(val), _codes(val), _floats(alphas), out_ptr.data_ptr(), out_idx.data_ptr()),
        *(out_val.data_ptr(), workspace.data_ptr(), size, threads),
    )
    _check("merge", status)
    return out_idx, out_ptr, out_val


def reduce(
    lengths: Tensor, idx: Tensors, ptr: Tensors, val: Tensors, alphas: Sequence[float]
) -> tuple[Tensor, ...]:
    out_ptr = _union("reduce", lengths.shape[0], idx, ptr)
    nnz = int(out_ptr[-1])
    out_idx = torch.empty(nnz, dtype=torch.uint16)
    sums = [torch.empty(nnz, dtype=torch.float32) for _ in range(4)]
    counts = [torch.empty(nnz, dtype=torch.int16) for _ in range(3)]
    status = _library().sft_cpu_reduce(
        *(lengths.shape[0], len(idx), _addresses(idx), _addresses(ptr)),
        *(_addresses(val), _codes(val), _floats(alphas), out_ptr.data_ptr(), out_idx.data_ptr()),
        *(x.data_ptr() for x in (*sums, *counts)),
        _threads(),
    )
    _check("reduce", status)
    return (out_idx, out_ptr, *sums, *counts)


def _union(op: str, n: int, idx: Tensors, ptr: Tensors) -> Tensor:
    """ptr of the union of some supports over n tiles."""
    _require_ends(op, idx, ptr)
    library, threads = _library(), _threads()
    size = library.sft_cpu_merge_workspace_bytes(len(idx), threads)
    workspace = _workspace(size)
    out_ptr = torch.zeros(n + 1, dtype=torch.int64)
    status = library.sft_cpu_merge_count(
        *(n, len(idx), _addresses(idx), _addresses(ptr)),
        *(out_ptr.data_ptr(), workspace.data_ptr(), size, threads),
    )
    _check(op, status)
    return out_ptr


def overlap(
    idx_a: Tensor, ptr_a: Tensor, val_a: Tensor, idx_b: Tensor, ptr_b: Tensor, val_b: Tensor
) -> tuple[Tensor, Tensor]:
    _require_ends("overlap", [idx_a, idx_b], [ptr_a, ptr_b])
    n = ptr_a.shape[0] - 1
    counts = torch.zeros(n, 2, dtype=torch.int64)
    dots = torch.zeros(n, 3, dtype=torch.float64)
    status = _library().sft_cpu_overlap(
        *(n, idx_a.data_ptr(), ptr_a.data_ptr(), val_a.data_ptr(), DTYPE_CODES[val_a.dtype]),
        *(idx_b.data_ptr(), ptr_b.data_ptr(), val_b.data_ptr(), DTYPE_CODES[val_b.dtype]),
        *(counts.data_ptr(), dots.data_ptr(), _threads()),
    )
    _check("overlap", status)
    return counts, dots


# --- identity and validity ------------------------------------------------------------------------


def digest(weights: Tensors, idx: Tensor, ptr: Tensor) -> Tensor:
    _require_ends("digest", [idx], [ptr])
    out = torch.empty(2, dtype=torch.int64)
    status = _library().sft_cpu_digest(
        *(_struct(tile_table(weights)), idx.data_ptr(), ptr.data_ptr(), out.data_ptr(), _threads())
    )
    _check("digest", status)
    return out


def check_support(lengths: Tensor, idx: Tensor, ptr: Tensor, val: Tensor | None) -> Tensor:
    info = torch.zeros(4, dtype=torch.int64)
    status = _library().sft_cpu_check_support(
        *(lengths.data_ptr(), lengths.shape[0], idx.data_ptr(), ptr.data_ptr(), idx.shape[0]),
        *(_ptr(val), DTYPE_CODES[val.dtype] if val is not None else 0, info.data_ptr(), _threads()),
    )
    _check("check_support", status)
    return info


def hash_pieces(data: Tensor) -> Tensor:
    out = torch.empty(-(-data.shape[0] // HASH_PIECE), HASH_BYTES, dtype=torch.uint8)
    status = _library().sft_cpu_hash_pieces(
        data.data_ptr(), data.shape[0], out.data_ptr(), _threads()
    )
    _check("hash_pieces", status)
    return out
