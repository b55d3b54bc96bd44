"""compose_ and restore_: one rounding, no order, exact undo."""

import itertools

import numpy as np
import oracles
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import DTYPES, MODELS, numels, random_support, rng, take, tensors

from sparse_ft_kernels import compose_, merge, restore_


def make_deltas(sizes, count, density, generator, dtype=torch.float32):
    deltas = []
    for _ in range(count):
        idx, ptr, chosen = random_support(sizes, density, generator)
        val = (torch.randn(len(idx), generator=generator) * 0.1).to(dtype)
        deltas.append((idx, ptr, val, chosen))
    return deltas


def expected_weights(weights, deltas, alphas):
    """Element by element in numpy's float32."""
    out = []
    for i, w in enumerate(weights):
        acc = np.zeros(w.numel(), np.float32)
        for (_, _, val, chosen), alpha in zip(deltas, alphas, strict=True):
            first = sum(len(c) for c in chosen[:i])
            values = val[first : first + len(chosen[i])].float().numpy()
            acc[chosen[i]] += np.float32(alpha) * values
        flat = w.reshape(-1).clone()
        moved = torch.from_numpy(flat.float().numpy() + acc).to(w.dtype)
        out.append(torch.where(torch.from_numpy(acc == 0), flat, moved).view(w.shape))
    return out


def split(deltas):
    return [list(x) for x in zip(*((d[0], d[1], d[2]) for d in deltas), strict=True)] or [
        [],
        [],
        [],
    ]


def undo_for(deltas, weights):
    dtype = weights[0].dtype if weights else torch.float32
    return [torch.zeros(len(d[0]), dtype=dtype) for d in deltas]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_sum_is_rounded_once_and_undone_exactly(backend, name, dtype, count):
    generator = rng(name, dtype, count)
    start = tensors(MODELS[name], generator, dtype)
    weights = [t.clone() for t in start]
    deltas = make_deltas(numels(start), count, 0.2, generator, DTYPES[count % 3])
    alphas = [1.0, -0.7, 0.3, 2.0, 1.0][:count]
    undo = undo_for(deltas, start)
    stats = compose_(weights, *split(deltas), alphas, undo)
    expected = expected_weights(start, deltas, alphas)
    changed = swallowed = 0
    for found, want in zip(weights, expected, strict=True):
        oracles.assert_bits(found, want)
    for log, delta in zip(undo, deltas, strict=True):
        oracles.assert_bits(log, take(start, delta[3]).to(log.dtype))
    for before, after in zip(start, weights, strict=True):
        changed += int((oracles.bits(before) != oracles.bits(after)).sum())
    swallowed = int(stats[1])
    assert int(stats[0]) - swallowed == changed
    restore_(weights, *split(deltas)[:2], undo)
    for found, want in zip(weights, start, strict=True):
        oracles.assert_bits(found, want)


def test_without_undo(backend):
    generator = rng("no undo")
    start = tensors(MODELS["many"], generator)
    weights = [t.clone() for t in start]
    deltas = make_deltas(numels(start), 3, 0.3, generator)
    compose_(weights, *split(deltas), [1.0, 1.0, 1.0])
    for found, want in zip(weights, expected_weights(start, deltas, [1, 1, 1]), strict=True):
        oracles.assert_bits(found, want)


def test_special_values(backend):
    weights = [torch.tensor([-0.0, 1.0, 1e-45, 65504.0, -1.0, float("inf")])]
    deltas = [
        (torch.arange(6, dtype=torch.int16).view(torch.uint16), torch.tensor([0, 6]), v, None)
        for v in (
            torch.tensor([0.5, 0.25, 0, 1.0, 1e-45, 1.0]),
            torch.tensor([-0.5, 0.25, 0, 1.0, 0, 1.0]),
        )
    ]
    stats = compose_(weights, *split(deltas), [1.0, 1.0])
    expected = torch.tensor([-0.0, 1.5, 1e-45, 65506.0, -1.0, float("inf")])
    oracles.assert_bits(weights[0], expected)  # -0.0 and the subnormal keep their bits
    assert stats.tolist() == [4, 2]  # 1e-45 on -1.0 and 1 on infinity are swallowed


def test_overflow_in_fp16_is_infinite_and_undone(backend):
    weights = [torch.full((10,), 60000.0, dtype=torch.float16)]
    idx, ptr = torch.arange(10, dtype=torch.int16).view(torch.uint16), torch.tensor([0, 10])
    undo = [torch.zeros(10, dtype=torch.float16)]
    compose_(weights, [idx], [ptr], [torch.full((10,), 6000.0)], [1.0], undo)
    assert torch.isinf(weights[0]).all()
    restore_(weights, [idx], [ptr], undo)
    assert (weights[0] == 60000).all()


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.sampled_from([[(300,), (1000,)], [(5,), (0,), (2000,)], [(300,), (66_000,)]]),
    count=st.integers(1, 6),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    alphas=st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_any_deltas(backend, shapes, count, density, dtype, alphas, seed):
    generator = torch.Generator().manual_seed(seed)
    start = tensors(shapes, generator, dtype)
    weights = [t.clone() for t in start]
    deltas = make_deltas(numels(start), count, density, generator)
    undo = undo_for(deltas, start)
    compose_(weights, *split(deltas), alphas[:count], undo)
    for found, want in zip(weights, expected_weights(start, deltas, alphas[:count]), strict=True):
        oracles.assert_bits(found, want)
    restore_(weights, *split(deltas)[:2], undo)
    for found, want in zip(weights, start, strict=True):
        oracles.assert_bits(found, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_swaps(dtype):
    generator = rng("swaps", dtype)
    start = tensors([(1000,), (70_000,)], generator, dtype)
    weights = [t.clone() for t in start]
    pool = make_deltas(numels(start), 5, 0.05, generator)
    for i in range(1000):
        pair = [pool[i % 5], pool[(i * 7 + 1) % 5]]
        undo = undo_for(pair, start)
        compose_(weights, *split(pair), [1.0, -0.5], undo)
        restore_(weights, *split(pair)[:2], undo)
    for found, want in zip(weights, start, strict=True):
        oracles.assert_bits(found, want)


def test_merge_then_apply_is_compose(backend):
    generator = rng("merge")
    start = tensors(MODELS["many"], generator)
    deltas = make_deltas(numels(start), 4, 0.2, generator)
    alphas = [1.0, 0.5, -1.0, 0.1]
    composed, merged = [t.clone() for t in start], [t.clone() for t in start]
    compose_(composed, *split(deltas), alphas)
    sizes = [
        n
        for s in numels(start)
        for n in [65536] * (s // 65536) + ([s % 65536] if s % 65536 else [])
    ]
    idx, ptr, val = merge(torch.tensor(sizes, dtype=torch.int32), *split(deltas), alphas)
    compose_(merged, [idx], [ptr], [val], [1.0])
    for found, want in zip(merged, composed, strict=True):
        oracles.assert_bits(found, want)


def test_two_deltas_commute(backend):
    generator = rng("commute")
    start = tensors([(70_000,)], generator)
    deltas = make_deltas([70_000], 2, 0.5, generator)
    results = []
    for order in itertools.permutations(deltas):
        weights = [t.clone() for t in start]
        compose_(weights, *split(list(order)), [1.0, 1.0])
        results.append(weights[0])
    oracles.assert_bits(results[0], results[1])


# Many small tensors, so that a block of entries spans many tiles; and one of two tiles.
SCATTERED = [(1 + 7 * i % 50,) for i in range(40)] + [(66_000,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deltas_that_differ_in_size_type_and_overlap(backend, dtype):
    generator = rng("differ", dtype)
    start = tensors(SCATTERED, generator, dtype)
    weights = [t.clone() for t in start]
    deltas = [
        delta
        for density, values in zip((0.02, 0.0, 0.3, 0.001, 1.0), (*DTYPES, *DTYPES), strict=False)
        for delta in make_deltas(numels(start), 1, density, generator, values)
    ]
    alphas = [1.0, 2.0, -0.1, 1e-3, 0.3]
    undo = undo_for(deltas, start)
    compose_(weights, *split(deltas), alphas, undo)
    for found, want in zip(weights, expected_weights(start, deltas, alphas), strict=True):
        oracles.assert_bits(found, want)
    for log, delta in zip(undo, deltas, strict=True):
        oracles.assert_bits(log, take(start, delta[3]).to(log.dtype))
    restore_(weights, *split(deltas)[:2], undo)
    for found, want in zip(weights, start, strict=True):
        oracles.assert_bits(found, want)


def shifted(tensor):
    """The same values, not at a multiple of 16 bytes."""
    room = torch.zeros(len(tensor) + 1, dtype=tensor.dtype)
    room[1:] = tensor
    return room[1:]


def test_arrays_at_odd_addresses(backend):
    generator = rng("odd")
    start = tensors([(3000,)], generator, torch.bfloat16)
    weights = [shifted(t) for t in start]
    deltas = [
        (shifted(idx.view(torch.int16)).view(torch.uint16), ptr, shifted(val), chosen)
        for idx, ptr, val, chosen in make_deltas([3000], 2, 0.5, generator, torch.bfloat16)
    ]
    undo = [shifted(u) for u in undo_for(deltas, start)]
    compose_(weights, *split(deltas), [1.0, 0.5], undo)
    oracles.assert_bits(weights[0], expected_weights(start, deltas, [1.0, 0.5])[0])
    restore_(weights, *split(deltas)[:2], undo)
    oracles.assert_bits(weights[0], start[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_nan_stays_nan(backend, dtype):
    nan = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    weights = [torch.full((4,), nan, dtype=integer).view(dtype)]
    before = weights[0].clone()
    idx, ptr = torch.tensor([1, 3]).to(torch.uint16), torch.tensor([0, 2])
    stats = compose_(weights, [idx], [ptr], [torch.tensor([1.0, 0.0])], [1.0])
    assert torch.isnan(weights[0]).all()
    # torch's own conversions may give another NaN.
    if backend != "reference":
        oracles.assert_bits(weights[0], before)
        assert stats.tolist() == [1, 1]


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("block", [64, 1024])
def test_triton_has_the_same_bits_with_every_block_size_and_order(monkeypatch, block, order):
    triton_backend = pytest.importorskip("sparse_ft_kernels.triton_backend")
    if why := triton_backend.unavailable(torch.device("cpu")):
        pytest.skip(why)
    from triton.runtime.interpreter import interpreter_builder as builder

    from sparse_ft_kernels import reference, triton_compose, triton_merge

    for module in (triton_compose, triton_merge):
        monkeypatch.setattr(module, "block_for", lambda idx: block)
    if order == "backward":
        # Programs of a GPU run in any order; the interpreter's run in one that a test can turn.
        forward = builder.set_grid_idx
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda x, y, z: forward(builder.grid_dim[0] - 1 - x, y, z)
        )
    generator = rng("block")
    start = tensors([(300,), (7,), (1500,)], generator, torch.bfloat16)
    old, new = (make_deltas(numels(start), n, 0.4, generator) for n in (2, 3))
    alphas = [1.0, -0.5, 2.0]
    results = []
    for ops in (reference, triton_compose):
        weights, stats = [t.clone() for t in start], []
        undo_old, undo_new = undo_for(old, start), undo_for(new, start)
        stats.append(ops.compose_(weights, *split(old), alphas[:2], undo_old))
        after_old = [t.clone() for t in weights]
        stats.append(ops.swap_(weights, *split(old)[:2], undo_old, *split(new), alphas, undo_new))
        after_new = [t.clone() for t in weights]
        ops.restore_(weights, *split(new)[:2], undo_new)
        results.append([*after_old, *after_new, *weights, *undo_old, *undo_new, *stats])
    lengths = torch.tensor([300, 7, 1500], dtype=torch.int32)
    for merge_, result in ((reference.merge, results[0]), (triton_merge.merge, results[1])):
        result += merge_(lengths, *split(new), alphas)
    for found, want in zip(results[1], results[0], strict=True):
        oracles.assert_bits(found, want)
