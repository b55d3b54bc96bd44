"""swap_: the bits of restore_ followed by compose_, and the way back."""

import oracles
import pytest
import torch
from oracles import DTYPES, numels, random_support, rng, take, tensors

from sparse_ft_kernels import compose_, native, restore_, swap_

# Several tensors, so several tiles, and one tile border inside a tensor.
SHAPES = [(300,), (0,), (65537,), (7, 11)]
SMALL = [(300,), (7, 11), (1,)]


class Deltas:
    """Some deltas over a model, with room for their undo logs."""

    def __init__(self, model, count, density, generator, dtype=torch.float32):
        made = [random_support(numels(model), density, generator) for _ in range(count)]
        self.idx, self.ptr, self.chosen = ([m[i] for m in made] for i in range(3))
        self.val = [(torch.randn(len(i), generator=generator) * 0.1).to(dtype) for i, _, _ in made]
        self.alphas = [1.0, -0.7, 0.3][:count]
        self.undo = [torch.zeros(len(i), dtype=model[0].dtype) for i in self.idx]

    @property
    def old(self):
        return self.idx, self.ptr, self.undo

    @property
    def new(self):
        return self.idx, self.ptr, self.val, self.alphas


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        oracles.assert_bits(x, y)


@pytest.mark.parametrize("with_undo", [True, False], ids=["undo", "no-undo"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_old", "n_new"), [(1, 1), (2, 3), (0, 2), (2, 0), (0, 0)])
def test_is_restore_then_compose(backend, dtype, n_old, n_new, with_undo):
    generator = rng("both", dtype, n_old, n_new)
    start = tensors(SHAPES, generator, dtype)
    weights = [w.clone() for w in start]
    old = Deltas(start, n_old, 0.2, generator, DTYPES[n_new % 3])
    new = Deltas(start, n_new, 0.2, generator, DTYPES[n_old % 3])
    compose_(weights, *old.new, old.undo)
    apart, logs = [w.clone() for w in weights], [u.clone() for u in new.undo]
    restore_(apart, *old.old)
    assert_same(apart, start)
    expected = compose_(apart, *new.new, logs if with_undo else [])
    stats = swap_(weights, *old.old, *new.new, new.undo if with_undo else [])
    assert stats.tolist() == expected.tolist()
    assert_same(weights, apart)
    if with_undo:
        assert_same(new.undo, logs)
        for log, chosen in zip(new.undo, new.chosen, strict=True):
            oracles.assert_bits(log, take(start, chosen))
        restore_(weights, *new.old)
        assert_same(weights, start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_swaps_lead_back(backend, dtype):
    generator = rng("swaps", dtype)
    start = tensors(SMALL, generator, dtype)
    weights = [w.clone() for w in start]
    pool = [Deltas(start, 1 + i % 3, 0.1 * (1 + i), generator, DTYPES[i % 3]) for i in range(5)]
    now = Deltas(start, 0, 0.0, generator)
    swaps = 30 if backend == "triton" else 200  # its interpreter is slow
    for i in torch.randint(len(pool), (swaps,), generator=generator).tolist():
        # A set of deltas may follow itself, with logs of its own.
        undo = [torch.zeros_like(u) for u in pool[i].undo]
        swap_(weights, *now.old, *pool[i].new, undo)
        now = pool[i]
        now.undo = undo
        for log, chosen in zip(undo, now.chosen, strict=True):
            oracles.assert_bits(log, take(start, chosen))
    restore_(weights, *now.old)
    assert_same(weights, start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_backends_give_the_same_bits(dtype, monkeypatch, native_library, other_backends):
    results = []
    for name, threads in (("cpu", 1), ("cpu", 5), *((name, 1) for name in other_backends)):
        monkeypatch.setenv("SPARSE_FT_BACKEND", name)
        monkeypatch.setattr(native, "_threads", lambda n=threads: n)
        generator = rng("bits", dtype)
        weights = tensors(SHAPES, generator, dtype)
        old, new = (Deltas(weights, n, 0.3, generator) for n in (2, 3))
        compose_(weights, *old.new, old.undo)
        stats = swap_(weights, *old.old, *new.new, new.undo)
        results.append(torch.cat([oracles.bits(x).long() for x in (*weights, *new.undo, stats)]))
    for found in results[1:]:
        assert torch.equal(found, results[0])


def test_no_tensors(backend):
    assert swap_([], [], [], [], [], [], [], []).tolist() == [0, 0]


def test_what_does_not_fit_is_refused_before_any_write():
    generator = rng("bad")
    start = tensors(SMALL, generator)
    old, new = (Deltas(start, 1, 0.5, generator) for _ in range(2))
    n_old, n_new = len(old.idx[0]), len(new.idx[0])
    cases = [
        ((*old.old[:2], [], *new.new, []), "0 old_undo arrays for 1 deltas"),
        (
            (*old.old[:2], [torch.zeros(n_old).half()], *new.new, []),
            r"old_undo\[0\] must be a contiguous torch.float32",
        ),
        ((old.idx, [], old.undo, *new.new, []), "1 old idx and 0 ptr"),
        (
            (old.idx, [old.ptr[0][:-1].clone()], old.undo, *new.new, []),
            "old delta 0 ptr must hold 4 values",
        ),
        ((*old.old, *new.new[:3], [], []), "0 alphas for 1 deltas"),
        ((*old.old, *new.new, [torch.zeros(n_new + 1)]), rf"undo\[0\] must hold {n_new} values"),
    ]
    for args, message in cases:
        weights = [w.clone() for w in start]
        with pytest.raises(ValueError, match=f"^swap_: {message}"):
            swap_(weights, *args)
        assert_same(weights, start)


def test_a_bad_new_ptr_is_refused_before_the_old_is_restored(monkeypatch, native_library):
    monkeypatch.setenv("SPARSE_FT_BACKEND", "cpu")
    generator = rng("late")
    weights = tensors(SMALL, generator)
    old, new = (Deltas(weights, 1, 0.5, generator) for _ in range(2))
    compose_(weights, *old.new, old.undo)
    before = [w.clone() for w in weights]
    new.ptr[0][-1] += 1
    with pytest.raises(ValueError, match=r"^swap_: ptr of support 0 runs from 0"):
        swap_(weights, *old.old, *new.new, new.undo)
    assert_same(weights, before)


def test_new_logs_may_take_the_place_of_old_ones(backend):
    generator = rng("place")
    start = tensors(SMALL, generator)
    weights = [w.clone() for w in start]
    deltas = Deltas(start, 2, 0.3, generator)
    compose_(weights, *deltas.new, deltas.undo)
    composed = [w.clone() for w in weights]
    swap_(weights, *deltas.old, *deltas.new, deltas.undo)
    assert_same(weights, composed)
    restore_(weights, *deltas.old)
    assert_same(weights, start)
