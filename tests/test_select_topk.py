"""select_topk against a full stable sort: exact sets, exact order of ties, on every backend."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import DTYPES, MODELS, flat_support, n_tiles, numels, rng, tensors, top_k

from sparse_ft_kernels import NonFiniteError, TooFewError, native, reference, select_topk


def check(a, b, k, exclude=None):
    idx, ptr, info = select_topk(a, b, k=k, exclude=exclude)
    expected_idx, expected_ptr = flat_support(numels(a), top_k(a, b, k))
    assert torch.equal(ptr, expected_ptr)
    oracles.assert_bits(idx, expected_idx)
    assert int(info[1]) == k == len(idx)
    return info


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_equals_a_stable_sort(backend, name, dtype):
    generator = rng(name, dtype)
    a, b = (tensors(MODELS[name], generator, dtype) for _ in range(2))
    total = sum(numels(a))
    for k in sorted({0, min(1, total), total // 100, total // 3, total}):
        check(a, b, k)


def test_threshold_and_ties_are_reported(backend):
    a = [torch.tensor([5.0, -3.0, 3.0, 0.0, 3.0, 1.0])]
    info = check(a, [], 3)
    assert info[:5].tolist() == [
        int(torch.tensor(3.0).view(torch.int32)),  # threshold
        *(3, 1, 3, 2),  # nnz, above it, tied at it, of those chosen
    ]
    idx, _, info = select_topk(a, [], k=3, tie="all")
    assert idx.tolist() == [0, 1, 2, 4]
    assert info[1:5].tolist() == [4, 1, 3, 3]


def _adversarial(kind: str, n: int, generator: torch.Generator) -> torch.Tensor:
    values = {
        "all-equal": torch.full((n,), 0.25),
        "all-zero": torch.zeros(n),
        "ascending": torch.arange(n, dtype=torch.float32),
        "descending": torch.arange(n, 0, -1, dtype=torch.float32),
        "two-values": (torch.rand(n, generator=generator) < 0.5).float(),
        "one-hot": torch.zeros(n).index_fill_(0, torch.tensor([n - 1]), 1.0),
        "subnormal": torch.rand(n, generator=generator) * 1e-42,
        "huge": torch.rand(n, generator=generator) * 3e38,
        "heavy-tail": torch.randn(n, generator=generator).exp().pow(8),
        "one-row": torch.zeros(n).index_fill_(0, torch.arange(1000, 1400), 2.0),
        "minus-zero": -torch.zeros(n),
    }
    return values[kind]


@pytest.mark.parametrize("tie", ["index", "all"])
@pytest.mark.parametrize(
    "kind",
    [
        *("all-equal", "all-zero", "ascending", "descending", "two-values", "one-hot"),
        *("subnormal", "huge", "heavy-tail", "one-row", "minus-zero"),
    ],
)
def test_any_distribution(backend, kind, tie):
    n = 140_000
    a = [_adversarial(kind, n, rng(kind))]
    for k in (1, 399, n // 2, n - 1):
        if tie == "index":
            check(a, [], k)
            continue
        key = a[0].abs()
        threshold = key.sort(descending=True).values[k - 1]
        idx, ptr, _ = select_topk(a, [], k=k, tie="all")
        expected = flat_support([n], [(key >= threshold).nonzero().reshape(-1).numpy()])
        oracles.assert_bits(idx, expected[0])
        assert torch.equal(ptr, expected[1])


def test_clustered_in_a_few_tiles(backend):
    a = [torch.zeros(40 * 65536)]
    a[0][7 * 65536 : 9 * 65536] = torch.randn(2 * 65536, generator=rng("cluster"))
    a[0] += torch.randn(a[0].shape, generator=rng("noise")) * 1e-4
    check(a, [], 100_000)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 63, 4097, 65536, 65537]), min_size=1, max_size=4),
    levels=st.integers(1, 5),
    share=st.floats(0, 1),
    excluded=st.floats(0, 0.5),
    seed=st.integers(0, 2**16),
)
def test_few_distinct_values(backend, sizes, levels, share, excluded, seed):
    generator = torch.Generator().manual_seed(seed)
    a = [torch.randint(0, levels + 1, (n,), generator=generator).float() for n in sizes]
    skip = [
        (torch.rand(n, generator=generator) < excluded).nonzero().reshape(-1).numpy() for n in sizes
    ]
    exclude = flat_support(sizes, skip)
    eligible = sum(sizes) - len(exclude[0])
    k = int(share * eligible)
    idx, ptr, info = select_topk(a, [], k=k, exclude=exclude)
    # Excluded entries rank below everything.
    masked = [t.clone() for t in a]
    for t, flat in zip(masked, skip, strict=True):
        t[torch.from_numpy(flat)] = -1
    everything = torch.cat(masked).numpy().astype(np.float64)
    order = np.argsort(-everything, kind="stable")[:k]
    chosen, start = [], 0
    for n in sizes:
        chosen.append(order[(order >= start) & (order < start + n)] - start)
        start += n
    expected = flat_support(sizes, chosen)
    oracles.assert_bits(idx, expected[0])
    assert torch.equal(ptr, expected[1])
    assert int(info[7]) == eligible


def test_exclude_leaves_the_next_best(backend):
    generator = rng("exclude")
    a, b = (tensors(MODELS["many"], generator) for _ in range(2))
    first = select_topk(a, b, k=20_000)
    second = select_topk(a, b, k=20_000, exclude=first[:2])
    both = flat_support(numels(a), top_k(a, b, 40_000))
    merged = np.sort(np.concatenate([_global(first, a), _global(second, a)]))
    assert np.array_equal(merged, np.sort(_global(both, a)))


def _global(selection, model) -> np.ndarray:
    idx, ptr = selection[:2]
    counts = (ptr[1:] - ptr[:-1]).numpy()
    base = np.repeat(np.arange(n_tiles(numels(model))), counts)
    return base * 65536 + idx.numpy().astype(np.int64)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 3), (2, 150_000)])
def test_non_finite_names_the_tensor(backend, value, where):
    a = tensors([(5,), (65537,), (200_003,)], rng("nan"))
    tensor, position = where
    a[tensor][position] = value
    for k in (2, 50_000):
        with pytest.raises(NonFiniteError, match=f"tensor {tensor} ") as caught:
            select_topk(a, [], k=k)
        assert caught.value.ordinal == tensor


def test_an_excluded_nan_does_not_matter(backend):
    a = [torch.randn(1000, generator=rng("excluded"))]
    a[0][17] = float("nan")
    idx, _, _ = select_topk(a, [], k=10, exclude=flat_support([1000], [np.array([17])]))
    assert 17 not in idx.tolist()


def test_too_many_wanted(backend):
    a = [torch.randn(10)]
    with pytest.raises(TooFewError, match="k = 11 entries wanted, but only 10"):
        select_topk(a, [], k=11)
    with pytest.raises(TooFewError, match="only 8 are eligible"):
        select_topk(a, [], k=9, exclude=flat_support([10], [np.array([0, 9])]))


def test_mixed_data_types(backend):
    generator = rng("mixed")
    shapes = [(300,), (65537,), (40, 50)]
    a = [t.to(d) for t, d in zip(tensors(shapes, generator), DTYPES, strict=True)]
    b = [t.to(d) for t, d in zip(tensors(shapes, generator), reversed(DTYPES), strict=True)]
    check(a, b, 5000)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_same_bits_for_any_number_of_threads(threads, monkeypatch, native_library):
    monkeypatch.setenv("SPARSE_FT_BACKEND", "cpu")
    monkeypatch.setattr(native, "_threads", lambda: threads)
    generator = rng("threads")
    a, b = (tensors([(1_000_003,), (65536,)], generator, torch.bfloat16) for _ in range(2))
    for k in (100, 30_000, 500_000):
        check(a, b, k)


# --- the paths of the Triton kernels --------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """The module of the Triton kernels, which serve the test."""
    pytest.importorskip("triton")
    from sparse_ft_kernels import triton_backend, triton_select_topk

    if why := triton_backend.unavailable(torch.device("cpu")):
        pytest.skip(why)
    monkeypatch.setenv("SPARSE_FT_BACKEND", "triton")
    return triton_select_topk


def same_as_reference(a, b, k, exclude=None, tie="index"):
    """Selects by the backend in use and by `reference`; returns whether the fallback ran."""
    found = select_topk(a, b, k=k, exclude=exclude, tie=tie)
    expected = reference.select_topk(a, b, k, *(exclude or (None, None)), tie == "all")
    oracles.assert_bits(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    info, expected_info = found[2].tolist(), expected[2].tolist()
    assert info[:6] + info[7:] == expected_info[:6] + expected_info[7:]
    return info[6]


def _ranked(generator):
    """Two tensors, two of whose values are frequent, and what to exclude."""
    a = tensors([(70_001,), (4097,)], generator)
    a[0][::3] = 1.5
    a[1][::2] = -0.5
    skip = [(torch.rand(t.shape, generator=generator) < 0.2).nonzero().reshape(-1) for t in a]
    return a, flat_support(numels(a), [s.numpy() for s in skip])


@pytest.mark.parametrize("bound", ["too high", "no room", "everything", "above infinity"])
@pytest.mark.parametrize("excluded", [False, True])
def test_any_bound_gives_the_same_result(kernels, monkeypatch, bound, excluded):
    a, exclude = _ranked(rng("bounds"))
    exclude = exclude if excluded else None
    n_excluded = len(exclude[0]) if exclude else 0
    bounds = {
        "too high": lambda n, k, eligible, out: kernels.Bound(k + 100 + n_excluded, 0x40600000),
        "no room": lambda n, k, eligible, out: kernels.Bound(k + n_excluded, 0x3F000001),
        "everything": lambda n, k, eligible, out: kernels.Bound(eligible + n_excluded, -1),
        "above infinity": lambda n, k, eligible, out: kernels.Bound(k + n_excluded, 0x7F7FFFFF),
    }
    monkeypatch.setattr(kernels, "sampled_bound", bounds[bound])
    for k, tie in ((7, "index"), (20_000, "all")):
        fallback = same_as_reference(a, [], k, exclude, tie)
        assert fallback == (bound != "everything" and not (bound == "too high" and k == 7)), k


@pytest.mark.parametrize("value", [1.5, 0.5])
@pytest.mark.parametrize("excluded", [False, True])
def test_ties_at_the_bound_are_read_again(kernels, monkeypatch, value, excluded):
    a, exclude = _ranked(rng("ties"))
    exclude = exclude if excluded else None
    n_excluded = len(exclude[0]) if exclude else 0
    low = int(torch.tensor(value).view(torch.int32))
    magnitude = torch.cat([t.abs() for t in a])
    if exclude:
        base = torch.repeat_interleave(torch.tensor([0, 65536, 70_001]), exclude[1].diff())
        magnitude[base + exclude[0].to(torch.int64)] = -1
    above = int((magnitude > value).sum())
    equal = int((magnitude == value).sum())
    monkeypatch.setattr(
        kernels, "sampled_bound", lambda n, k, *_: kernels.Bound(k + n_excluded, low)
    )
    for k, tie in ((above + 1, "all"), (above + equal // 2, "index"), (above + equal, "index")):
        assert same_as_reference(a, [], k, exclude, tie) == 0
    assert same_as_reference(a, [], above + equal + 1, exclude) == 1


@pytest.mark.parametrize("part", [4096, 16384])
def test_parts_and_blocks_do_not_matter(kernels, monkeypatch, part):
    generator = rng("parts")
    a, b = (tensors([(90_001,), (5,), (65_536,)], generator, torch.bfloat16) for _ in range(2))
    skip = flat_support(numels(a), [np.arange(0, n, 7) for n in numels(a)])
    monkeypatch.setattr(kernels, "PART", part)
    monkeypatch.setattr(kernels, "LANES", part // 64)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "block_size", lambda hardware: 16 * hardware)
    for exclude in (None, skip):
        same_as_reference(a, b, 3000, exclude)


def test_digits_of_either_width_find_the_same(kernels, monkeypatch):
    a, exclude = _ranked(rng("digits"))
    for digits in (((20, 11), (10, 10), (0, 10)), ((23, 8), (15, 8), (7, 8), (0, 7))):
        monkeypatch.setattr(kernels, "DIGITS", digits)
        monkeypatch.setattr(kernels, "BINS", 1 << digits[0][1])
        same_as_reference(a, [], 5000, exclude)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "sampled_bound", lambda n, k, *_: kernels.Bound(k, 0x7F000000))
            assert same_as_reference(a, [], 5000) == 1
        bad = [a[0].clone(), a[1].clone()]
        bad[1][4000] = float("inf")
        with pytest.raises(NonFiniteError, match=r"tensor 1 \(tile 2\)"):
            select_topk(bad, [], k=10)


def test_the_bound_holds_almost_surely(kernels):
    generator = rng("held")
    a, b = (tensors(MODELS["many"], generator, torch.bfloat16) for _ in range(2))
    for k in (10, 3000, 30_000, 200_000):
        assert same_as_reference(a, b, k) == 0
    assert same_as_reference([torch.zeros(200_000)], [], 1000) == 0


@pytest.mark.parametrize("n_tiles", [1, 40, 15_259, 250_000])
@pytest.mark.parametrize("share", [1e-6, 0.01, 0.1, 1.0])
def test_candidates_are_bounded(kernels, n_tiles, share):
    eligible = n_tiles * 65536
    k = max(1, int(share * eligible))
    bound = kernels.sampled_bound(n_tiles, k, eligible, 123)
    assert k <= bound.room - 123 <= eligible
    assert bound.sampled <= max(kernels.SAMPLE_MOST, kernels.SAMPLE_LEAST)
    assert bound.sampled << bound.cell_bits >= eligible
    if k / eligible >= 0.01 and n_tiles >= 15_259:
        assert bound.room < 1.25 * k + 123
    random = kernels.random_bound(k, eligible, 0)
    assert k <= random.room <= eligible
    assert -1 <= random.low <= 0x7FFFFFFF


def test_storage_that_is_not_aligned(kernels):
    generator = rng("views")
    a, b = ([torch.randn(70_003, generator=generator)[1:], torch.ones(9)[3:]] for _ in range(2))
    same_as_reference(a, b, 2000)
