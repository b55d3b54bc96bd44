"""denoise: what is left of a difference when its higher-order part is thinned out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_bits, rng
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_ft as sf
from sparse_ft.denoise import Split, denoise

SHAPES = [(40, 40), (300, 17), (17, 300), (9000, 12), (1, 30), (30, 1)]


def draw(shape, *key, decay=0.7):
    """A matrix whose singular values are well apart."""
    g = rng(shape, *key)
    full = min(shape)
    u = torch.linalg.qr(torch.randn(shape[0], full, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(shape[1], full, generator=g, dtype=torch.float64)).Q
    sigma = decay ** torch.arange(full, dtype=torch.float64)
    return ((u * sigma) @ v.T).float(), sigma.numpy()


def truncated(matrix, r):
    """The best approximation of rank r, by numpy in fp64."""
    u, s, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return (u[:, :r] * s[:r]) @ vt[:r]


@pytest.mark.parametrize("method", ["gram", "svd"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.3, 0.9, 0.999])
def test_without_the_higher_order_part_it_is_the_truncated_decomposition(shape, method, p):
    matrix, sigma = draw(shape)
    for energy, spectrum in [("sq", sigma**2), ("abs", sigma)]:
        out, split = denoise(matrix, rank=f"var:{p}", energy=energy, keep_high=0.0, method=method)
        # The smallest rank that reaches the share.
        reached = np.cumsum(spectrum) / spectrum.sum()
        assert split.full == min(shape)
        assert reached[split.rank - 1] >= p - 1e-6
        assert split.rank == 1 or reached[split.rank - 2] < p + 1e-6
        assert split.kept == pytest.approx((sigma**2)[: split.rank].sum() / (sigma**2).sum())
        # fp32 products of at most 40 terms, beside a largest singular value of 1.
        assert np.abs(out.double().numpy() - truncated(matrix, split.rank)).max() < 2e-6
        lost = float(((matrix - out).double() ** 2).sum())
        assert lost == pytest.approx((sigma[split.rank :] ** 2).sum(), rel=1e-3, abs=1e-10)


@pytest.mark.parametrize("method", ["gram", "svd", "randomized"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_entries_of_the_higher_order_part_come_back(shape, method):
    matrix, _ = draw(shape, method)
    r = max(1, min(shape) // 3)
    low, _ = denoise(matrix, rank=r, keep_high=0.0, method=method)
    out, _ = denoise(matrix, rank=r, keep_high=0.25, method=method)
    if r == min(shape):
        assert out is low is matrix
        return
    n = math.floor(0.25 * matrix.numel())
    high = (matrix - low).abs().reshape(-1).numpy()
    back = np.argsort(-high, kind="stable")[:n]
    expected = low.clone().reshape(-1)
    expected[back] = matrix.reshape(-1)[back]
    assert_bits(out.reshape(-1), expected)
    assert out.shape == matrix.shape
    assert out.is_contiguous()


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    method=st.sampled_from(["gram", "svd", "randomized"]),
    whole=st.sampled_from(["full", "var:1", "var:1.0", "side", "beyond", "q"]),
)
def test_nothing_cut_off_is_the_matrix_itself(m, n, seed, method, whole):
    matrix = torch.randn(m, n, generator=rng(seed))
    options = {"rank": whole, "keep_high": 0.0}
    if whole in ("side", "beyond"):
        options["rank"] = min(m, n) + 3 * (whole == "beyond")
    if whole == "q":
        options = {"rank": 1, "keep_high": 1.0}
    if method == "randomized" and isinstance(options["rank"], str):
        method = "gram"
    out, split = denoise(matrix, method=method, **options)
    assert out is matrix
    assert split == Split(min(m, n), min(m, n), 1.0)


@pytest.mark.parametrize("method", ["gram", "svd"])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e15])
def test_matrices_of_zeros_of_rank_one_and_of_one_entry(method, scale):
    for shape in SHAPES:
        nothing = torch.zeros(shape)
        out, split = denoise(nothing, method=method)
        assert_bits(out, nothing)
        assert split == Split(0, min(shape), 0.0)
        g = rng(shape)
        u, v = torch.randn(shape[0], 1, generator=g), torch.randn(1, shape[1], generator=g)
        one = u @ v * scale
        out, split = denoise(one, method=method, keep_high=0.0)
        assert split.rank == 1
        assert split.kept == pytest.approx(1.0)
        # An entry is a sum of products of the two vectors' entries; fp32 loses 2^-24 of each.
        assert float((out - one).abs().max()) <= 1e-5 * float(one.abs().max())
        single = torch.zeros(shape)
        single[-1, 0] = scale
        out, split = denoise(single, method=method, keep_high=0.0)
        assert split.rank == 1
        assert int((out.abs() > 1e-6 * scale).sum()) == 1
    for empty in [(0, 5), (5, 0)]:
        out, split = denoise(torch.zeros(empty), method=method)
        assert out.shape == empty
        assert split == Split(0, 0, 0.0)


def test_the_randomized_split_is_seeded_and_near_the_exact_one():
    matrix, sigma = draw((400, 300), decay=0.9)
    one, split = denoise(matrix, rank=10, keep_high=0.0, method="randomized", seed=3)
    again, _ = denoise(matrix, rank=10, keep_high=0.0, method="randomized", seed=3)
    assert_bits(one, again)
    other, _ = denoise(matrix, rank=10, keep_high=0.0, method="randomized", seed=4)
    assert not torch.equal(one, other)
    exact, known = denoise(matrix, rank=10, keep_high=0.0)
    # Nearly as near to the matrix as a matrix of rank 10 can be (Eckart and Young).
    best, found = float((matrix - exact).norm()), float((matrix - one).norm())
    assert best == pytest.approx(float(np.sqrt((sigma[10:] ** 2).sum())), rel=1e-4)
    assert best * 0.9999 <= found <= best * 1.01
    assert split.kept == pytest.approx(known.kept, rel=0.01)
    assert split.rank == 10


def test_planted_entries_are_found_where_noise_hides_them():
    """A block of rank one under noise as large as its entries."""
    g = rng("planted")
    shape, rows, columns = (300, 200), torch.arange(0, 300, 6), torch.arange(0, 200, 5)
    planted = torch.zeros(shape)
    planted[rows[:, None], columns] = 1.0
    noisy = {"w": planted + 0.7 * torch.randn(shape, generator=g)}
    start = {"w": torch.zeros(shape)}
    k = int(planted.sum())

    def found(criterion):
        return int(planted[sf.select(noisy, start, k=k, criterion=criterion).mask("w")].sum())

    raw = found("magnitude")
    assert raw < 0.3 * k
    assert found(sf.criteria.denoised(rank=1, keep_high=0.0)) > 0.95 * k
    assert found(sf.criteria.denoised(rank=1, keep_high=0.0, method="randomized")) > 0.95 * k
    assert raw < found(sf.criteria.denoised(rank=1, keep_high=0.01))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "0.9"}, 'rank must be "var:p"'),
        ({"rank": "var:0"}, "got 'var:0'"),
        ({"rank": "var:1.1"}, r"got 'var:1\.1'"),
        ({"rank": "var:x"}, "got 'var:x'"),
        ({"rank": "var:nan"}, "got 'var:nan'"),
        ({"rank": 0}, "got 0"),
        ({"rank": True}, "got True"),
        ({"rank": 0.9}, r"got 0\.9"),
        ({"energy": "cube"}, '"sq" or "abs", got \'cube\''),
        ({"keep_high": -0.1}, r"in \[0, 1\], got -0\.1"),
        ({"keep_high": math.nan}, "got nan"),
        ({"keep_high": "0"}, "got '0'"),
        ({"method": "qr"}, "got 'qr'"),
        ({"method": "randomized"}, "needs an integer rank, got 'var:0.9'"),
        ({"method": "randomized", "rank": "full"}, "needs an integer rank, got 'full'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        denoise(torch.ones(2, 2), **options)
    with pytest.raises(ValueError, match=message):
        sf.criteria.denoised(**options)


def test_what_is_no_matrix_of_numbers():
    with pytest.raises(ValueError, match=r"fp32 matrix, got torch\.float32 of shape \(2,\)"):
        denoise(torch.ones(2))
    with pytest.raises(ValueError, match=r"got torch\.bfloat16"):
        denoise(torch.ones(2, 2, dtype=torch.bfloat16))
    for bad in (math.nan, math.inf):
        matrix = torch.ones(3, 4)
        matrix[1, 1] = bad
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            denoise(matrix)


@pytest.mark.parametrize("method", ["gram", "svd", "randomized"])
def test_low_precision_outside_does_not_matter(method):
    delta, options = torch.randn(70, 30), {"rank": 5, "keep_high": 0.02, "method": method}
    expected, split = denoise(delta, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, other = denoise(delta, **options)
    assert_bits(found, expected)
    assert other == split
    # TF32 and bf16 products, which this machine may not have, are of fp32 matrices alone.
    products = Products()
    with products:
        denoise(delta, **options)
    assert products.dtypes == {torch.float64}


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.dtypes |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return function(*args, **(kwargs or {}))
