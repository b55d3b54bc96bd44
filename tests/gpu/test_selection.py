"""Selection on the GPU against the CPU, bit for bit."""

import pytest
import torch
from gpu_oracles import (
    REAL,
    SHAPES,
    Twins,
    moved,
    select_topk,
)
from oracles import DTYPES, numels, random_support, rng, tensors

import sparse_ft_kernels as ops
from sparse_ft_kernels import dispatch


def test_every_op_is_served_by_triton(cuda):
    rows = dispatch.explain("cuda")
    assert {op for op, backend, state in rows if backend == "triton" and state == "chosen"} == {
        name for name, op in dispatch.OPS.items() if not op.on_host
    }, rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_select_topk(name, dtype):
    generator = rng(name, dtype)
    a, b = (tensors(SHAPES[name], generator, dtype) for _ in range(2))
    n = sum(numels(a))
    twins = Twins(a=a, b=b)
    for k in sorted({0, min(1, n), n // 1000, n // 36, n // 3, n}):
        twins.run(select_topk, k=k)
    twins.run(select_topk, k=n // 10, tie="all")


@pytest.mark.parametrize("tie", ["index", "all"])
@pytest.mark.parametrize("kind", ["equal", "zero", "two", "tail", "rows", "ascending"])
def test_select_topk_of_any_distribution(kind, tie):
    n = 3_000_000 if REAL else 140_000
    generator = rng(kind)
    values = {
        "equal": torch.full((n,), 0.25),
        "zero": torch.zeros(n),
        "two": (torch.rand(n, generator=generator) < 0.5).float(),
        "tail": torch.randn(n, generator=generator).exp().pow(8).clamp(max=1e30),
        "rows": torch.zeros(n).index_fill_(0, torch.arange(1000, 3500), 2.0),
        "ascending": torch.arange(n, dtype=torch.float32),
    }[kind]
    twins = Twins(a=[values])
    for k in (1, 2500, n // 2, n - 1):
        twins.run(select_topk, k=k, tie=tie)


def test_select_topk_with_exclusion_and_mixed_types():
    generator = rng("exclude")
    shapes = [(300_001,), (65537,), (40, 50)] if REAL else [(300,), (65537,), (40, 50)]
    a = [t.to(d) for t, d in zip(tensors(shapes, generator), DTYPES, strict=True)]
    b = [t.to(d) for t, d in zip(tensors(shapes, generator), reversed(DTYPES), strict=True)]
    idx, ptr, _ = random_support(numels(a), 0.2, generator)
    twins = Twins(a=a, b=b)
    twins.run(select_topk, k=5000, exclude=(idx, ptr))
    twins.run(select_topk, k=sum(numels(a)) - len(idx), exclude=(idx, ptr))


def test_select_topk_names_what_is_not_finite():
    a = [torch.randn(5), torch.randn(200_003)]
    a[1][150_000] = float("nan")
    with pytest.raises(ops.NonFiniteError, match="tensor 1 "):
        ops.select_topk(moved(a), k=10)


@pytest.mark.parametrize("name", SHAPES)
def test_select_random(name):
    like = tensors(SHAPES[name], rng(name))
    n = sum(numels(like))
    twins = Twins(like=like)
    for k, seed in ((0, 1), (n // 36, 2), (n // 3, -3), (n, 4)):
        twins.run(ops.select_random, k=k, seed=seed)
