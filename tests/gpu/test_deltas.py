"""Composition and the ops on sparse deltas on the GPU against the CPU, bit for bit."""

import pytest
import torch
from gpu_oracles import (
    DEVICE,
    REAL,
    SHAPES,
    Twins,
    assert_same,
    deltas_of,
    forced,
    lengths_of,
    logs_of,
    model_and_support,
    moved,
    same,
)
from oracles import DTYPES, numels, rng, tensors

import sparse_ft_kernels as ops


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_compose_and_restore(name, dtype, count):
    generator = rng(name, dtype, count)
    model = tensors(SHAPES[name], generator, dtype)
    start = [t.clone() for t in model]
    idx, ptr, val = deltas_of(model, count, 0.1, generator, (DTYPES[count % 3],))
    twins = Twins(weights=model, idx=idx, ptr=ptr, undo=logs_of(idx, dtype))
    twins.run(ops.compose_, val=val, alphas=[1.0, -0.7, 0.3, 2.0, 1.0][:count])
    twins.run(ops.restore_)
    assert_same(twins.gpu["weights"], start, "the way back")


def test_compose_of_mixed_deltas_without_undo():
    model = tensors(SHAPES["large"], rng("mixed"))
    idx, ptr, val = deltas_of(model, 3, 0.3, rng("mixed deltas"), DTYPES)
    same(ops.compose_, weights=model, idx=idx, ptr=ptr, val=val, alphas=[1.0, -1.0, 0.5])


def test_compose_of_special_values():
    nan = torch.tensor([0x7F812345], dtype=torch.int32).view(torch.float32)
    weights = [torch.cat([torch.tensor([-0.0, 1.0, 1e-45, 65504.0, -1.0, float("inf")]), nan])]
    idx = torch.arange(7, dtype=torch.int16).view(torch.uint16)
    values = torch.tensor([0.5, 0.25, 0, 1.0, 1e-45, 1.0, 1.0])
    for val, other in ((values, -values), (values, values), (-values, values * 0)):
        for dtype in DTYPES:
            same(
                ops.compose_,
                weights=[w.to(dtype) for w in weights],
                idx=[idx, idx],
                ptr=[torch.tensor([0, 7])] * 2,
                val=[val, other],
                alphas=[1.0, 1.0],
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_old", "n_new"), [(1, 1), (2, 3), (0, 2), (2, 0)])
def test_swap(dtype, n_old, n_new):
    for name in ("many", "large"):
        generator = rng(name, dtype, n_old, n_new)
        model = tensors(SHAPES[name], generator, dtype)
        old_idx, old_ptr, old_val = deltas_of(model, n_old, 0.1, generator, (dtype,))
        idx, ptr, val = deltas_of(model, n_new, 0.1, generator)
        twins = Twins(weights=model)
        old_undo = logs_of(old_idx, dtype)
        alphas = [1.0, -0.7, 0.3]
        old = {"idx": old_idx, "ptr": old_ptr, "val": old_val, "alphas": alphas[:n_old]}
        twins.run(ops.compose_, **old, undo=old_undo)
        for side in ("cpu", "gpu"):
            place = torch.device("cpu") if side == "cpu" else DEVICE
            for key, value in (("old_idx", old_idx), ("old_ptr", old_ptr), ("old_undo", old_undo)):
                getattr(twins, side)[key] = moved(value, place)
        twins.run(
            ops.swap_, idx=idx, ptr=ptr, val=val, alphas=alphas[:n_new], undo=logs_of(idx, dtype)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_swaps_end_in_the_same_bits(dtype):
    generator = rng("swaps", dtype)
    start = moved(tensors([(130_000,), (0,), (7, 11), (65_537,)], generator, dtype))
    weights = [w.clone() for w in start]
    pool = []
    for j in range(6):
        idx, ptr, val = deltas_of(weights, 1 + j % 3, 0.02 * (1 + j), generator, (DTYPES[j % 3],))
        pool.append((moved(idx), moved(ptr), moved(val), [1.0, -0.7, 0.3][: len(idx)]))
    old: tuple[list, list, list] = ([], [], [])
    order = torch.randint(len(pool), (1000 if REAL else 12,), generator=generator).tolist()
    with forced():
        for turn, j in enumerate(order):
            idx, ptr, val, alphas = pool[j]
            undo = [torch.empty(len(i), dtype=dtype, device=DEVICE) for i in idx]
            if turn % 2:
                ops.swap_(weights, *old, idx, ptr, val, alphas, undo)
            else:
                ops.restore_(weights, *old)
                ops.compose_(weights, idx, ptr, val, alphas, undo)
            old = (idx, ptr, undo)
        assert not all(torch.equal(w, s) for w, s in zip(weights, start, strict=True))
        ops.restore_(weights, *old)
    assert_same(weights, start, "after all swaps")


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_merge(name, count):
    model = tensors(SHAPES[name], rng(name))
    idx, ptr, val = deltas_of(model, count, 0.05, rng(name, count), DTYPES[:count])
    for op in (ops.merge, ops.reduce):
        same(
            op,
            lengths=lengths_of(numels(model)),
            idx=idx,
            ptr=ptr,
            val=val,
            alphas=[1.0, -0.3, 0.7, 1.5][:count],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_overlap(name, dtype):
    model = tensors(SHAPES[name], rng(name))
    (idx_a, idx_b), (ptr_a, ptr_b), (a, b) = deltas_of(
        model, 2, 0.2, rng(name, dtype), (torch.float32, dtype)
    )
    a[::7] = 0
    same(ops.overlap, idx_a=idx_a, ptr_a=ptr_a, val_a=a, idx_b=idx_b, ptr_b=ptr_b, val_b=b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_digest(name, dtype):
    model, idx, ptr, _, _ = model_and_support(name, dtype)
    same(ops.digest, weights=model, idx=idx, ptr=ptr)


@pytest.mark.parametrize("name", ["many", "large"])
def test_check_support(name):
    model, idx, ptr, _, generator = model_and_support(name, torch.float32)
    val = torch.randn(len(idx), generator=generator)
    val[::10] = 0
    good = {"lengths": lengths_of(numels(model)), "idx": idx, "ptr": ptr, "val": val}
    assert int(same(ops.check_support, **good)[0]) == 0
    faults = []
    for key, at, value in (
        ("ptr", 0, 1),
        ("ptr", -1, 7),
        ("ptr", 1, -5),
        ("ptr", 1, 1 << 40),
        ("idx", 1, int(idx.view(torch.int16)[0])),
        ("idx", int(ptr[1]) - 1, -1),  # beyond the first tile, where that is short
        ("val", len(val) // 2, float("nan")),
    ):
        bad = good[key].clone()
        (bad.view(torch.int16) if key == "idx" else bad)[at] = value
        faults.append(int(same(ops.check_support, **{**good, key: bad})[0]))
    assert sum(fault > 0 for fault in faults) >= 6
    same(ops.check_support, lengths=good["lengths"], idx=idx, ptr=ptr)
