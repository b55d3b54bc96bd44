"""hash_pieces: what hashlib gives for each piece, whatever the instruction set and the threads."""

import hashlib

import pytest
import torch
from oracles import rng

from sparse_ft_kernels import BackendError, contract, digest, dispatch, hash_pieces

PIECE = contract.HASH_PIECE
# Around the blocks of the hash, around the pieces, and for every number of pieces that vectors of
# 2, 4 and 8 lanes leave over.
LENGTHS = (
    *(0, 1, 8, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000),
    *(PIECE + d for d in (-129, -128, -127, -1, 0, 1, 127, 128, 129)),
    *(k * PIECE + d for k in (2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 25) for d in (0, 1)),
)


def data(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=rng("hash", n))


def expected(x: torch.Tensor) -> bytes:
    raw = x.numpy().tobytes()
    pieces = [raw[at : at + PIECE] for at in range(0, len(raw), PIECE)]
    return b"".join(hashlib.blake2b(piece, digest_size=32).digest() for piece in pieces)


@pytest.mark.parametrize("n", LENGTHS)
def test_is_hashlib_piece_by_piece(backend, n):
    x = data(n)
    found = hash_pieces(x)
    assert found.dtype == torch.uint8
    assert found.shape == (-(-n // PIECE), 32)
    assert found.numpy().tobytes() == expected(x)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_any_number_of_threads(backend, threads):
    x = data(25 * PIECE + 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert hash_pieces(x).numpy().tobytes() == expected(x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("offset", range(1, 9))
def test_begins_anywhere(backend, offset):
    x = data(2 * PIECE + 300)[offset:]
    assert hash_pieces(x).numpy().tobytes() == expected(x)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"hash_pieces: data must be a contiguous torch\.uint8"):
        hash_pieces(torch.ones(8))
    with pytest.raises(ValueError, match=r"data must be .* vector, got .* shape \(4, 4\)"):
        hash_pieces(torch.ones(4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="data must be a contiguous"):
        hash_pieces(torch.ones(8, dtype=torch.uint8)[::2])
    with pytest.raises(ValueError, match=r"data is on meta, .* on the CPU; pass data.cpu\(\)"):
        hash_pieces(torch.ones(8, dtype=torch.uint8, device="meta"))


def test_a_forced_backend_of_other_devices_does_not_concern_it(monkeypatch):
    x = data(1000)
    monkeypatch.setenv("SPARSE_FT_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    # What other tests resolved would stand.
    dispatch._resolve.cache_clear()
    with pytest.raises(BackendError):
        digest([], x[:0].view(torch.uint16), torch.zeros(1, dtype=torch.int64))
    assert hash_pieces(x).numpy().tobytes() == expected(x)
    monkeypatch.setenv("SPARSE_FT_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="there is no such backend"):
        hash_pieces(x)
