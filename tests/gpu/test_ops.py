"""Every op on the GPU against the CPU, bit for bit: results, and all that it changes in place."""

import pytest
import torch
from gpu_oracles import (
    DEVICE,
    REAL,
    Twins,
    assert_same,
    forced,
    lengths_of,
    moved,
    off_by,
    same,
)
from oracles import DTYPES, MODELS, flat_support, numels, random_support, rng, take, tensors

import sparse_ft_kernels as ops
from sparse_ft_kernels import dispatch

# A model of millions of elements with whole tiles, rests and vectors; less where kernels are
# interpreted.
LARGE = [(2500, 1021), (768,), (1300, 1031), (0,), (65536,), (3,)] if REAL else [(70_001,), (9,)]
SHAPES = {**{name: MODELS[name] for name in MODELS if name != "empty"}, "large": LARGE}
DENSITIES = (0.001, 0.028, 0.3, 1.1)  # above 1: all entries


def model_and_support(name, dtype, density=0.1, what="model"):
    generator = rng(name, dtype, density, what)
    model = tensors(SHAPES[name], generator, dtype)
    return model, *random_support(numels(model), density, generator), generator


def deltas_of(model, count, density, generator, dtypes=(torch.float32,)):
    supports = [random_support(numels(model), density, generator) for _ in range(count)]
    vals = [
        (torch.randn(len(idx), generator=generator) * 0.1).to(dtypes[j % len(dtypes)])
        for j, (idx, _, _) in enumerate(supports)
    ]
    return [s[0] for s in supports], [s[1] for s in supports], vals


def logs_of(idx, dtype):
    return [torch.zeros(len(i), dtype=dtype) for i in idx]


def test_every_op_is_served_by_triton(cuda):
    rows = dispatch.explain("cuda")
    assert {op for op, backend, state in rows if backend == "triton" and state == "chosen"} == set(
        dispatch.OPS
    ), rows


# --- selection ------------------------------------------------------------------------------------


def select_topk(**arguments):
    """The op, without the word whether a backend took its slow way."""
    idx, ptr, info = ops.select_topk(**arguments)
    return idx, ptr, info.index_fill(0, torch.tensor([6]), 0)


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


# --- the optimizer steps --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gather(name, dtype):
    for density in DENSITIES if name == "large" else (0.1,):
        model, idx, ptr, _, generator = model_and_support(name, dtype, density)
        twins = Twins(
            grads=model, numels=numels(model), idx=idx, ptr=ptr, out=torch.randn(len(idx))
        )
        twins.run(ops.gather)
        twins.run(ops.gather, accumulate=True)
        twins.run(
            ops.gather,
            grad_scale=torch.tensor(1024.0),
            delta=torch.randn(len(idx), generator=generator).round(),
            l1=0.125,
        )


def test_gather_of_missing_gradients_and_infinities():
    model, idx, ptr, chosen, _ = model_and_support("large", torch.float32)
    sizes = numels(model)
    missing = [torch.empty(0), *model[1:]]
    twins = Twins(numels=sizes, idx=idx, ptr=ptr, out=torch.zeros(len(idx)))
    twins.run(ops.gather, grads=missing)
    twins.run(ops.gather, grads=[], grad_scale=torch.tensor(4.0), accumulate=True)
    model[0].view(-1)[int(chosen[0][-1])] = float("inf")
    _, found_inf = twins.run(ops.gather, grads=model)
    assert float(found_inf) == 1


class Step:
    """The arguments of masked_adamw_ for some model, with its gradients left to each call."""

    def __init__(self, name, dtype, density=0.1):
        self.model, idx, ptr, self.chosen, self.generator = model_and_support(name, dtype, density)
        self.dtype, self.n = dtype, len(idx)
        state = {part: torch.zeros(self.n) for part in ("exp_avg", "exp_avg_sq", "delta")}
        theta0 = take(self.model, self.chosen)
        self.twins = Twins(
            weights=self.model, idx=idx, ptr=ptr, **state, theta0=theta0, step=torch.zeros(())
        )

    def gradients(self, compact, dtype=None):
        grads = [
            torch.randn(t.shape, generator=self.generator).to(dtype or self.dtype)
            for t in self.model
        ]
        return take(grads, self.chosen).float() if compact else grads


FULL = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "l1": 0.01}


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_masked_adamw(name, dtype, compact):
    step = Step(name, dtype)
    scale, clip, lr = (torch.tensor(x) for x in (8.0, 0.5, 1e-3))
    for _ in range(2):
        step.twins.run(
            ops.masked_adamw_,
            grad=step.gradients(compact),
            lr=lr.double(),
            grad_scale=scale,
            clip=clip,
            **FULL,
        )


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_steps_of_masked_adamw(dtype, density):
    step = Step("large", dtype, density)
    lr = torch.tensor(1e-3, dtype=torch.float64)
    for i in range(20 if REAL else 3):
        if i % 5 == 3:  # an overflow: nothing may change
            step.twins.run(
                ops.masked_adamw_,
                grad=torch.full((step.n,), float("inf")),
                lr=lr,
                found_inf=torch.tensor(1.0),
            )
        step.twins.run(
            ops.masked_adamw_,
            grad=step.gradients(i % 3 == 0, DTYPES[i % 2]),
            lr=lr * (20 - i) / 20,
            found_inf=torch.tensor(0.0),
            **(FULL if i % 2 else {}),
        )
    assert float(step.twins.gpu["step"]) == (20 if REAL else 3)


def test_masked_adamw_with_missing_and_mixed_gradients():
    step = Step("large", torch.bfloat16)
    grads = step.gradients(False)
    grads[0] = torch.empty(0)
    grads[2] = grads[2].float()
    for _ in range(2):
        step.twins.run(ops.masked_adamw_, grad=grads, lr=torch.tensor(1e-2, dtype=torch.float64))


def test_masked_adamw_of_consecutive_entries():
    """Heads and whole rows, which begin at any offset, take the body of dense blocks."""
    shapes = [(300_000,), (5, 1000), (65536,)]
    model = tensors(shapes, rng("rows"))
    chosen = [torch.zeros(n, dtype=torch.bool) for n in numels(model)]
    chosen[0][1000:9000] = True
    chosen[0][20_001:30_001] = True
    chosen[0][65_000:140_000] = True
    chosen[1][:] = True
    chosen[2][8:] = True
    flat = [c.nonzero().view(-1).numpy() for c in chosen]
    idx, ptr = flat_support(numels(model), flat)
    for dtype in DTYPES:
        weights = [t.to(dtype) for t in model]
        twins = Twins(
            weights=weights,
            idx=idx,
            ptr=ptr,
            exp_avg=torch.zeros(len(idx)),
            exp_avg_sq=torch.zeros(len(idx)),
            delta=torch.zeros(len(idx)),
            theta0=take(weights, flat),
            step=torch.zeros(()),
        )
        for i in range(3):
            grads = tensors(shapes, rng("g", i), dtype)
            twins.run(ops.masked_adamw_, grad=grads, lr=torch.tensor(1e-2, dtype=torch.float64))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("dtype", "master"),
    [
        *((dtype, kind) for dtype in DTYPES for kind in ("none", "fp32")),
        (torch.bfloat16, "split"),
    ],
    ids=str,
)
def test_dense_adamw(dtype, master, moments):
    for name in ("many", "large") if REAL else ("65537",):
        generator = rng(name, dtype, master)
        model = tensors(SHAPES[name], generator, dtype)
        kept = {
            "none": [],
            "fp32": [t.float().clone() for t in model],
            "split": [torch.zeros(t.shape, dtype=torch.int16) for t in model],
        }[master]
        twins = Twins(
            weights=model,
            exp_avg=[torch.zeros(t.shape, dtype=moments) for t in model],
            exp_avg_sq=[torch.zeros(t.shape, dtype=moments) for t in model],
            master=kept,
            step=torch.zeros(()),
        )
        start = [t.clone() for t in model]
        for i in range(5 if REAL else 2):
            grads = tensors(SHAPES[name], generator, dtype)
            if i == 1:
                grads[0] = torch.empty(0, dtype=dtype)
            twins.run(
                ops.dense_adamw_,
                grads=grads,
                anchors=start if i % 2 else [],
                lr=torch.tensor(1e-2, dtype=torch.float64),
                betas=(0.9, 0.99),
                weight_decay=0.1 * (i % 2),
                l1=0.01 * (i % 2),
                grad_scale=torch.tensor(2.0) if i % 2 else None,
                clip=torch.tensor(0.7) if i % 2 else None,
                found_inf=torch.tensor(float(i == 3)),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_anchor_l1(name, dtype):
    generator = rng(name, dtype)
    weights, anchors, grads = (tensors(SHAPES[name], generator, dtype) for _ in range(3))
    for w, a in zip(weights, anchors, strict=True):
        w.view(-1)[::3] = a.view(-1)[::3]
    same(ops.anchor_l1_, grads=grads, weights=weights, anchors=anchors, coeff=0.25)
    same(ops.anchor_l1_, grads=[], weights=weights, anchors=anchors, coeff=0.25)


# --- composition ----------------------------------------------------------------------------------


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


# --- sparse deltas by themselves ------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_merge(name, count):
    model = tensors(SHAPES[name], rng(name))
    idx, ptr, val = deltas_of(model, count, 0.05, rng(name, count), DTYPES[:count])
    same(
        ops.merge,
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


# --- where tensors lie ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_at_odd_addresses_give_the_same_bits(dtype):
    """Views that begin one element after an aligned address, compact arrays among them."""
    model, idx, ptr, chosen, generator = model_and_support("large", dtype, 0.1, "odd")
    grads = [torch.randn(t.shape, generator=generator).to(dtype) for t in model]
    n = len(idx)
    cases = [
        (
            ops.masked_adamw_,
            {
                "weights": model,
                "idx": idx,
                "ptr": ptr,
                "grad": grads,
                "exp_avg": torch.zeros(n),
                "exp_avg_sq": torch.zeros(n),
                "delta": torch.zeros(n),
                "theta0": take(model, chosen),
                "step": torch.zeros(()),
                "lr": torch.tensor(1e-2, dtype=torch.float64),
            },
        ),
        (
            ops.gather,
            {
                "grads": grads,
                "numels": numels(model),
                "idx": idx,
                "ptr": ptr,
                "out": torch.zeros(n),
            },
        ),
        (
            ops.dense_adamw_,
            {
                "weights": model,
                "grads": grads,
                "exp_avg": [torch.zeros(t.shape) for t in model],
                "exp_avg_sq": [torch.zeros(t.shape) for t in model],
                "master": [t.float() for t in model],
                "anchors": [],
                "step": torch.zeros(()),
                "lr": torch.tensor(1e-2, dtype=torch.float64),
            },
        ),
        (ops.anchor_l1_, {"grads": grads, "weights": model, "anchors": model, "coeff": 0.5}),
        (ops.digest, {"weights": model, "idx": idx, "ptr": ptr}),
        (select_topk, {"a": model, "b": grads, "k": n}),
        (
            ops.compose_,
            {
                "weights": model,
                "idx": [idx],
                "ptr": [ptr],
                "val": [torch.randn(n, generator=generator)],
                "alphas": [1.0],
                "undo": [torch.zeros(n, dtype=dtype)],
            },
        ),
    ]
    for op, arguments in cases:
        # The CPU's copies must not change: the next case begins from the same values.
        twins = Twins(**moved_all(arguments))
        twins.gpu = {name: odd(value) for name, value in twins.gpu.items()}
        twins.run(op)


def moved_all(arguments):
    return {name: moved(value, torch.device("cpu")) for name, value in arguments.items()}


def odd(value):
    if isinstance(value, torch.Tensor):
        return off_by(value, 1) if value.dim() else value
    return [odd(v) for v in value] if isinstance(value, list) else value
