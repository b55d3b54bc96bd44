"""check_support: each fault alone, at both ends and at tile borders."""

import pytest
import torch
from oracles import numels, random_support, rng, tensors

from sparse_ft_kernels import check_support

SIZES = [70_000, 5, 65536]
LENGTHS = torch.tensor([65536, 4464, 5, 65536], dtype=torch.int32)


def support():
    model = tensors([(n,) for n in SIZES], rng("support"))
    idx, ptr, _ = random_support(numels(model), 0.1, rng("support"))
    return idx, ptr, torch.randn(len(idx), generator=rng("values"))


def with_entry(idx, at, value):
    out = idx.view(torch.int16).clone()
    out[at] = value - 65536 if value > 32767 else value
    return out.view(torch.uint16)


def test_well_formed(backend):
    idx, ptr, val = support()
    val[::10] = 0
    assert check_support(LENGTHS, idx, ptr, val).tolist() == [0, 0, 0, int((val == 0).sum())]
    assert check_support(LENGTHS, idx, ptr).tolist()[0] == 0
    empty = torch.empty(0, dtype=torch.int32)
    assert check_support(empty, idx[:0], torch.zeros(1, dtype=torch.int64)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("change", ["first", "last"])
def test_ptr_ends(backend, change):
    idx, ptr, _ = support()
    ptr[0 if change == "first" else -1] += 1
    assert check_support(LENGTHS, idx, ptr)[0] == 1


@pytest.mark.parametrize("value", [-1, 1 << 40, -(1 << 62)])
def test_ptr_out_of_order(backend, value):
    idx, ptr, val = support()
    ptr[2] = value
    assert check_support(LENGTHS, idx, ptr, val)[0] == 2


def test_more_entries_than_a_tile_holds(backend):
    idx, ptr, _ = support()
    ptr[3] = ptr[2] + 6
    found = check_support(LENGTHS, idx, ptr)
    assert found[:2].tolist() == [2, 2]


@pytest.mark.parametrize("tile", [0, 1, 3])
def test_not_ascending(backend, tile):
    idx, ptr, _ = support()
    at = int(ptr[tile + 1]) - 1
    bad = with_entry(idx, at, int(idx[at - 1]))  # a repetition
    assert check_support(LENGTHS, bad, ptr)[:3].tolist() == [3, tile, at]


@pytest.mark.parametrize(("tile", "value"), [(1, 4464), (1, 65535), (2, 5)])
def test_beyond_the_tile(backend, tile, value):
    idx, ptr, _ = support()
    if ptr[tile + 1] == ptr[tile]:
        pytest.skip("no entry there")
    at = int(ptr[tile + 1]) - 1
    assert check_support(LENGTHS, with_entry(idx, at, value), ptr)[:3].tolist() == [4, tile, at]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values(backend, value, dtype):
    idx, ptr, val = support()
    val = val.to(dtype)
    for at in (0, 777, len(val) - 1):
        bad = val.clone()
        bad[at] = value
        found = check_support(LENGTHS, idx, ptr, bad)
        tile = int((ptr <= at).nonzero()[-1])
        assert found[:3].tolist() == [5, tile, at]


@pytest.mark.parametrize("fault", ["ptr", "step", "order", "beyond", "value"])
def test_zeros_are_not_counted_where_there_is_a_fault(backend, fault):
    idx, ptr, val = support()
    val[::10] = 0
    last = len(idx) - 1
    if fault == "ptr":
        ptr[-1] += 1
    elif fault == "step":
        ptr[2] = -1
    elif fault == "order":
        idx = with_entry(idx, last, int(idx[last - 1]))
    elif fault == "beyond":
        idx = with_entry(idx, int(ptr[2]) - 1, 4464)
    else:
        val[last] = float("nan")
    found = check_support(LENGTHS, idx, ptr, val)
    assert found[0] > 0
    assert found[3] == 0
