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
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.sampled_from([[(300,), (1000,)], [(300,), (66_000,)]]),
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
