"""Reading a sparse fine-tuning from its file, proved fit to be put on a model."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

import sparse_ft as sf
import sparse_ft_kernels as ops
from sparse_ft_kernels.contract import OPS

from .. import inputs
from ..case import Case, Job, Provider, Setting, Target, case
from ..shapes import shapes_of


def entries(delta: sf.SparseDelta) -> Iterator[tuple[str, tuple[int, ...], Tensor, Tensor]]:
    """Name, shape, flat positions and values of each tensor, also of those without entries."""
    for name, shape in zip(delta.layout.names, delta.layout.shapes, strict=True):
        yield name, shape, delta.indices(name), delta.values(name)


def write_legacy(delta: sf.SparseDelta, path: Path) -> None:
    """`pytorch_diff.bin` as composable-sft publishes it: gaps between column-major positions."""
    differences = {}
    for name, shape, flat, values in entries(delta):
        at = np.unravel_index(flat.numpy(), shape)
        place = np.ravel_multi_index(at, shape, order="F")
        order = np.argsort(place)
        place = place[order]
        differences[name] = {
            "size": torch.Size(shape),
            # The published files hold a numpy number first, then Python's.
            "index_steps": [*place[:1], *np.diff(place).tolist()],
            "values": values[torch.from_numpy(order)],
        }
    torch.save({"diffs": differences, "abs": {}}, path)


def read_legacy(path: Path) -> dict[str, Tensor]:
    """What composable-sft does with it: unpickle, add the gaps up, unravel, build COO tensors."""
    # Safe only because this process wrote the file; as unsafe, and as fast, as the original.
    content = torch.load(path, weights_only=False)
    out = {}
    for name, entry in content["diffs"].items():
        place = np.cumsum(np.array(entry["index_steps"], dtype=np.int64))
        indices = []
        for size in entry["size"]:
            indices.append(place % size)
            place = place // size
        at = torch.from_numpy(np.stack(indices))
        sparse = torch.sparse_coo_tensor(at, entry["values"], entry["size"], check_invariants=False)
        out[name] = sparse.coalesce()
    return out


def write_coo(delta: sf.SparseDelta, path: Path) -> None:
    """64-bit positions and values of each parameter, as generic tools keep them."""
    tensors = {}
    for name, _, flat, values in entries(delta):
        tensors[f"{name}.indices"] = flat.clone()
        tensors[f"{name}.values"] = values.clone()
    safetensors.torch.save_file(tensors, path)


def read_coo(path: Path, shape: str) -> dict[str, Tensor]:
    """COO tensors of them, sorted and free of repetition."""
    content = safetensors.torch.load_file(path)
    out = {}
    for name, size in shapes_of(shape).items():
        at = content[f"{name}.indices"][None]
        sparse = torch.sparse_coo_tensor(
            at, content[f"{name}.values"], (int(np.prod(size)),), check_invariants=True
        )
        out[name] = sparse.coalesce()
    return out


@case("check_support", input_bytes=lambda s: s.numel * s.width + 500 * s.nnz, cpu_only=True)
def load(setting: Setting) -> Case:
    """Reading a sparse fine-tuning and checking all of it."""
    model = inputs.tensors(setting, 0)
    layout = sf.Layout.of(shapes_of(setting.shape))
    idx, ptr = inputs.support(setting, model, 0)
    values = inputs.values(len(idx), 2, "cpu").to(setting.torch_dtype)
    delta = sf.SparseDelta(sf.Support(layout, idx, ptr), values)
    del model
    folder = tempfile.TemporaryDirectory(prefix="sparse-ft-benchmark-")
    names = {"sft": "sft.safetensors", "coo": "coo.safetensors", "legacy": "pytorch_diff.bin"}
    files = {kind: Path(folder.name) / name for kind, name in names.items()}
    # The files are read from memory, where writing them left them.
    delta.save(files["sft"])

    def verify() -> None:
        assert folder.name  # which keeps the files for as long as the case lives
        assert sf.SparseDelta.load(files["sft"]) == delta

    @cache
    def wanted() -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (flat, values) for name, _, flat, values in entries(delta)}

    def check(found: dict[str, Tensor]) -> None:
        for name, (flat, values) in wanted().items():
            sparse, shape = found[name], found[name].shape
            at = sparse.indices()
            place = at[0]
            for row, size in zip(at[1:], shape[1:], strict=True):
                place = place * size + row
            assert torch.equal(place, flat)
            assert torch.equal(sparse.values(), values)

    def written(write: Callable[[sf.SparseDelta, Path], None], kind: str, read: Job) -> Job:
        write(delta, files[kind])
        return read

    return Case(
        "load",
        setting,
        files["sft"].stat().st_size,
        {
            "sparse_ft": Provider(lambda: lambda: sf.SparseDelta.load(files["sft"])),
            "sparse_ft, mapped": Provider(
                lambda: lambda: sf.SparseDelta.load(files["sft"], mmap=True)
            ),
            "legacy reader": Provider(
                lambda: written(write_legacy, "legacy", lambda: read_legacy(files["legacy"])),
                "composable-sft (Ansell et al., 2022): pickled gaps, decoded into COO tensors",
                check,
                400 * setting.nnz,
            ),
            "safetensors COO": Provider(
                lambda: written(write_coo, "coo", lambda: read_coo(files["coo"], setting.shape)),
                "int64 positions and values per parameter, built into COO tensors and checked",
                check,
                100 * setting.nnz,
            ),
        },
        verify,
        yardstick="read",
        targets=(Target("peer", 50, "legacy reader", quick=5),),
        note="files in the page cache",
    )


@case("hash_pieces", input_bytes=lambda s: 6 * s.nnz, cpu_only=True)
def hash_pieces(setting: Setting) -> Case:
    """Telling one file from another: BLAKE2b of as many bytes as its entries take, in pieces."""
    generator = torch.Generator().manual_seed(0)
    words = torch.empty(6 * setting.nnz // 8 + 1, dtype=torch.int64).random_(generator=generator)
    data = words.view(torch.uint8)
    pieces = [piece.numpy() for piece in data.split(65536)]

    def hashed(piece: np.ndarray) -> bytes:
        return hashlib.blake2b(piece, digest_size=32).digest()

    def one_thread() -> bytes:
        return b"".join(map(hashed, pieces))

    def threads() -> Job:
        pool = ThreadPoolExecutor(torch.get_num_threads())
        return lambda: b"".join(pool.map(hashed, pieces))

    def verify() -> None:
        assert ops.hash_pieces(data).numpy().tobytes() == one_thread()

    def check(found: bytes) -> None:
        assert found == one_thread()

    return Case(
        "hash_pieces",
        setting,
        OPS["hash_pieces"].bytes_moved(data),
        {
            "sparse_ft": Provider(lambda: lambda: ops.hash_pieces(data)),
            "hashlib": Provider(lambda: one_thread, "Python's hashlib.blake2b per piece", check),
            "hashlib in threads": Provider(
                threads, "the same in as many threads as torch has", check
            ),
        },
        verify,
        yardstick="read",
        targets=(Target("peer", 2, "hashlib in threads"),),
        has_floor=False,
    )
