"""reduce: what several deltas say of each entry, against a dictionary of lists."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, MODELS, assert_bits, n_tiles, numels, random_support, rng, tensors
from test_merge import entries, lengths_of

from sparse_ft_kernels import merge, native, reduce, reference

F32 = np.float32
Terms = dict[int, list[np.float32]]


def terms_of(parts, alphas) -> Terms:
    """The terms αφ of each entry, in the order of the deltas."""
    found: Terms = {}
    for (idx, ptr, val), alpha in zip(parts, alphas, strict=True):
        for at, v in zip(entries(idx, ptr), val.float().numpy(), strict=True):
            found.setdefault(at, []).append(F32(alpha) * v)
    return found


def folded(values) -> np.float32:
    out = F32(0)
    for v in values:
        out = F32(out + v)
    return out


def expected(found: Terms) -> list[torch.Tensor]:
    """The seven vectors, from their definition."""
    rows = [found[at] for at in sorted(found)]
    floats = [
        [folded(r) for r in rows],
        [folded(x for x in r if x > 0) for r in rows],
        [folded(x for x in r if x < 0) for r in rows],
        # + 0 makes a largest value of -0 a +0.
        [max(r, key=lambda x: (abs(x), x)) + 0 for r in rows],
    ]
    counts = [
        [len(r) for r in rows],
        [sum(x > 0 for x in r) for r in rows],
        [sum(x < 0 for x in r) for r in rows],
    ]
    return [
        *(torch.tensor(np.array(column, F32)) for column in floats),
        *(torch.tensor(np.array(column, np.int16)) for column in counts),
    ]


def check(lengths, parts, alphas) -> None:
    lists = [list(column) for column in zip(*parts, strict=True)] or [[], [], []]
    out = reduce(lengths, *lists, alphas)
    found = terms_of(parts, alphas)
    assert entries(out.idx, out.ptr) == sorted(found)
    assert len(out.ptr) == len(lengths) + 1
    for name, vector, want in zip(out._fields[2:], out[2:], expected(found), strict=True):
        assert_bits(vector, want, name)
    for vector, same in zip(out[:3], merge(lengths, *lists, alphas), strict=True):
        assert_bits(vector, same)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["empty", "one", "65537", "many"])
def test_against_a_dictionary(backend, name, dtype, count):
    generator = rng(name, dtype, count)
    sizes = numels(tensors(MODELS[name], generator))
    parts = []
    for _ in range(count):
        idx, ptr, _ = random_support(sizes, 0.02, generator)
        parts.append((idx, ptr, torch.randn(len(idx), generator=generator).to(dtype)))
    assert n_tiles(sizes) == len(lengths_of(sizes))
    check(lengths_of(sizes), parts, [1.0, -0.3, 0.7, -1.5][:count])


def test_values_of_several_types_in_scattered_tiles(backend):
    generator = rng("several")
    sizes = [1 + 7 * i % 50 for i in range(300)] + [66_000]
    parts = []
    for density, dtype in zip((0.001, 0.05, 0.0, 0.3), (*DTYPES, *DTYPES), strict=False):
        idx, ptr, _ = random_support(sizes, density, generator)
        parts.append((idx, ptr, torch.randn(len(idx), generator=generator).to(dtype)))
    check(lengths_of(sizes), parts, [1.0, -0.3, 0.7, 1e-3])


AWKWARD = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 0.1, -0.3]


def part_of(values: dict[int, float]):
    at = sorted(values)
    return (
        torch.tensor(np.array(at, np.uint16)),
        torch.tensor([0, len(at)]),
        torch.tensor([values[i] for i in at], dtype=torch.float32),
    )


def test_signs_zeros_ties_and_overflow(backend):
    """Every triple of awkward values on one entry; two deltas have it, or all three."""
    values = np.array(AWKWARD, F32)
    triples = np.stack(np.meshgrid(values, values, values), -1).reshape(-1, 3)
    at = torch.tensor(np.arange(len(triples), dtype=np.uint16))
    ptr = torch.tensor([0, len(triples)])
    parts = [(at, ptr, torch.tensor(triples[:, j].copy())) for j in range(3)]
    half = len(triples) // 2
    parts[1] = (at[:half].clone(), torch.tensor([0, half]), parts[1][2][:half].clone())
    with np.errstate(over="ignore", invalid="ignore"):
        check(torch.tensor([65536], dtype=torch.int32), parts, [1.0, -1.0, 1.0])


def test_values_that_are_not_finite_are_no_sign(backend):
    nan, inf = float("nan"), float("inf")
    parts = [part_of({0: nan, 1: inf, 2: nan}), part_of({0: -2.0, 1: 3.0, 3: -inf})]
    lists = [list(column) for column in zip(*parts, strict=True)]
    out = reduce(torch.tensor([9], dtype=torch.int32), *lists, [1.0, 1.0])
    assert out.positive.tolist() == [0, inf, 0, 0]
    assert out.negative.tolist() == [-2, 0, 0, -inf]
    assert out.largest.tolist() == [-2, inf, 0, -inf]
    assert out.n_positive.tolist() == [0, 2, 0, 0]
    assert out.n_negative.tolist() == [1, 0, 0, 1]
    assert out.n_present.tolist() == [2, 2, 1, 1]


def test_no_deltas_and_empty_ones(backend):
    lengths = torch.tensor([10, 3], dtype=torch.int32)
    nothing = (torch.zeros(0, dtype=torch.uint16), torch.zeros(3, dtype=torch.int64), torch.ones(0))
    for count in (0, 1, 3):
        out = reduce(lengths, *([x] * count for x in nothing), [1.0] * count)
        assert out.ptr.tolist() == [0, 0, 0]
        assert [len(v) for v in (out.idx, *out[2:])] == [0] * 8


one_delta = st.dictionaries(st.integers(0, 40), st.sampled_from(AWKWARD), max_size=20)


@settings(deadline=None, max_examples=60)
@given(deltas=st.lists(one_delta, max_size=5), data=st.data())
def test_any_deltas(deltas, data):
    """The C++ version, or the reference where there is none, on whatever hypothesis finds."""
    alphas = [data.draw(st.sampled_from([1.0, -1.0, 0.0, 0.5, -3.0])) for _ in deltas]
    with np.errstate(all="ignore"):
        check(torch.tensor([41], dtype=torch.int32), [part_of(d) for d in deltas], alphas)


def test_threads_give_the_same_bits(native_library):
    generator = rng("threads")
    parts = []
    for _ in range(3):
        idx, ptr, _ = random_support([500_000], 0.2, generator)
        parts.append((idx, ptr, torch.randn(len(idx), generator=generator)))
    lists = [list(column) for column in zip(*parts, strict=True)]
    arguments = (lengths_of([500_000]), *lists, [1.0, -0.5, 0.3])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for found, want in zip(
                native.reduce(*arguments), reference.reduce(*arguments), strict=True
            ):
                assert_bits(found, want)
    finally:
        torch.set_num_threads(before)


def test_refuses():
    idx, ptr, val = part_of({1: 1.0})
    lengths = torch.tensor([9], dtype=torch.int32)
    for arguments, message in [
        (([idx], [ptr], [val], [float("nan")]), r"alphas\[0\] must be finite"),
        (([idx], [ptr], [val, val], [1.0]), "2 val for 1 deltas"),
        (([idx], [ptr[:1]], [val], [1.0]), "reduce: "),
        (([idx] * 32768, [ptr] * 32768, [val] * 32768, [1.0] * 32768), "at most 32767"),
    ]:
        with pytest.raises(ValueError, match=message):
            reduce(lengths, *arguments)
