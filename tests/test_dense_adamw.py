"""dense_adamw_ against fp64 arithmetic and torch's own AdamW; masters, gaps, errors."""

import math

import numpy as np
import oracles
import pytest
import torch
from oracles import DTYPES, MODELS, rng, tensors, ulps

from sparse_ft_kernels import dense_adamw_, native

# Edges of tile and run, short enough for slow backends.
SHAPES = [(7, 11), (0,), (), (1025,), (65537,)]
MASTERS = ["none", "fp32", "split"]
EPS = float(np.spacing(np.float32(1)))


class State:
    """A model with its moments and master."""

    def __init__(self, weights, master="none", moments=torch.float32):
        self.weights = [w.clone() for w in weights]
        self.exp_avg, self.exp_avg_sq = (
            [torch.zeros(w.shape, dtype=moments) for w in weights] for _ in range(2)
        )
        self.step = torch.zeros(())
        self.master = []
        if master == "fp32":
            self.master = [w.float().clone() for w in weights]
        elif master == "split":
            self.master = [torch.zeros(w.shape, dtype=torch.int16) for w in weights]

    def update(self, grads, *, anchors=(), **hyper):
        hyper.setdefault("lr", 1e-3)
        dense_adamw_(
            *(self.weights, grads, self.exp_avg, self.exp_avg_sq, self.master, anchors, self.step),
            **hyper,
        )

    def values(self):
        """The fp32 values that the weights stand for."""
        if not self.master:
            return [w.float() for w in self.weights]
        if self.master[0].dtype == torch.float32:
            return [m.clone() for m in self.master]
        return [joined(w, low) for w, low in zip(self.weights, self.master, strict=True)]

    def everything(self):
        return [*self.weights, *self.exp_avg, *self.exp_avg_sq, *self.master, self.step]


def joined(weight, low):
    high = weight.view(torch.int16).numpy().astype(np.int64) << 16
    total = np.asarray((high + low.numpy().astype(np.int64)) & 0xFFFFFFFF)
    return torch.from_numpy(total.astype(np.uint32).view(np.float32).reshape(weight.shape))


def nearest_away(values):
    """fp32 rounded to bf16, ties away from zero."""
    wide = values.numpy().view(np.uint32).astype(np.int64)
    high = np.asarray(((wide + 0x8000) >> 16).astype(np.uint16).view(np.int16))
    return torch.from_numpy(high.reshape(values.shape)).view(torch.bfloat16)


VARIANTS = [
    pytest.param(dtype, master, moments, id=f"{dtype}-{master}-{moments}")
    for dtype in DTYPES
    for master in MASTERS
    for moments in (torch.float32, torch.bfloat16)
    if master != "split" or dtype == torch.bfloat16
]


@pytest.mark.parametrize(("dtype", "master", "moments"), VARIANTS)
def test_against_float64(backend, dtype, master, moments):
    generator = rng(dtype, master, moments)
    start = tensors(SHAPES, generator, dtype)
    anchors = tensors(SHAPES, generator, DTYPES[len(master) % 3])
    state = State(start, master, moments)
    lr, betas, eps, decay, l1, scale, clip = 1e-3, (0.9, 0.99), 1e-6, 0.1, 0.25, 8.0, 0.5
    for t in range(1, 4):
        grads = tensors(SHAPES, generator, DTYPES[t % 3])
        # Each step from the same state, so that the bound is for one step.
        before = [
            [x.double().numpy() for x in part]
            for part in (state.values(), state.exp_avg, state.exp_avg_sq)
        ]
        state.update(
            grads,
            anchors=anchors,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=decay,
            l1=l1,
            grad_scale=torch.tensor(scale),
            clip=torch.tensor(clip),
        )
        assert float(state.step) == t
        found = state.values()
        for i, (x, m, v) in enumerate(zip(*before, strict=True)):
            anchor = anchors[i].double().numpy()
            g = (grads[i].double().numpy() / scale + l1 * np.sign(x - anchor)) * clip
            # What the roundings of g can be, which cancellation with the L1 term does not reduce.
            size = (np.abs(grads[i].double().numpy()) / scale + l1) * clip
            old_m, old_v = m, v
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g * g
            update = lr / (1 - betas[0] ** t) * m / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
            y = x * (1 - lr * decay) - update
            # One rounding to bf16 (2⁻⁸ at most) where the moments are stored so.
            stored = 0.0 if moments == torch.float32 else 2.0**-8
            wrong_m = 4 * EPS * (size + np.abs(old_m))
            wrong_v = 8 * EPS * (size**2 + old_v)
            m_error = np.abs(state.exp_avg[i].double().numpy() - m)
            v_error = np.abs(state.exp_avg_sq[i].double().numpy() - v)
            assert (m_error <= wrong_m + stored * np.abs(m) * 1.01).all()
            assert (v_error <= wrong_v + stored * v * 1.01).all()
            # Errors of m and √v pass to the update; x itself is rounded twice.
            root = np.sqrt(v / (1 - betas[1] ** t)) + eps
            passed = lr / (1 - betas[0] ** t) * wrong_m / root
            passed = passed + np.abs(update) * wrong_v / np.maximum(v, 1e-30)
            bound = passed + 8 * EPS * (np.abs(update) + np.abs(x))
            if not state.master and dtype != torch.float32:
                bound = bound + np.abs(y) * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11)
                bound = bound + 2.0**-24  # half a subnormal of fp16
            assert (np.abs(found[i].double().numpy() - y) <= bound).all()
            if master == "fp32":
                oracles.assert_bits(state.weights[i], found[i].to(dtype))
            elif master == "split":
                oracles.assert_bits(state.weights[i], nearest_away(found[i]))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("200003", "many")])
def test_every_shape(backend, name):
    generator = rng(name)
    start = tensors(MODELS[name], generator)
    state = State(start)
    grads = tensors(MODELS[name], generator)
    state.update(grads, lr=0.5, eps=0.0)
    assert float(state.step) == 1
    for weight, w0, g, m in zip(state.weights, start, grads, state.exp_avg, strict=True):
        # The first step moves every entry by lr against its gradient.
        assert torch.allclose(weight, w0 - 0.5 * g.sign(), atol=1e-5)
        oracles.assert_bits(m, g * np.float32(1 - 0.9))


@pytest.mark.parametrize(("dtype", "master", "moments"), VARIANTS)
def test_all_backends_give_the_same_bits(
    dtype, master, moments, monkeypatch, native_library, other_backends
):
    best, results = native.isa(), []
    for name, isa, threads in [
        *(("cpu", isa, n) for isa in ("avx512", "avx2", "portable") for n in (1, 5)),
        *((name, best, 1) for name in other_backends),
    ]:
        monkeypatch.setenv("SPARSE_FT_BACKEND", name)
        monkeypatch.setattr(native, "_threads", lambda n=threads: n)
        try:
            native.set_isa(isa)
        except ValueError:
            continue
        generator = rng("same", dtype, master, moments)
        state = State(tensors(SHAPES, generator, dtype), master, moments)
        anchors = tensors(SHAPES, generator, dtype)
        for t in range(4):
            grads = tensors(SHAPES, generator, DTYPES[t % 3])
            everything = {
                "anchors": anchors,
                "l1": 1e-2,
                "weight_decay": 0.01,
                "grad_scale": torch.tensor(3.0),
                "clip": torch.tensor(0.7),
            }
            state.update(grads, **(everything if t % 2 else {}))
        results.append(torch.cat([oracles.bits(x).long() for x in state.everything()]))
    native.set_isa(best)
    assert len(results) >= 3
    for found in results[1:]:
        assert torch.equal(found, results[0])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_ten_steps_beside_torch(backend, weight_decay):
    generator = rng("torch", weight_decay)
    shapes = [(300, 61), (4097,), (5,)]
    start = tensors(shapes, generator)
    state = State(start)
    dense = [torch.nn.Parameter(t.clone()) for t in start]
    optimizer = torch.optim.AdamW(dense, lr=1e-3, weight_decay=weight_decay, foreach=False)
    for _ in range(10):
        grads = tensors(shapes, generator)
        for p, g in zip(dense, grads, strict=True):
            p.grad = g
        optimizer.step()
        state.update(grads, weight_decay=weight_decay)
    for p, w, v in zip(dense, state.weights, state.exp_avg_sq, strict=True):
        # Each step rounds weight and update once or twice; torch's order differs a little.
        distance = (w - p.detach()).abs().numpy()
        scale = np.maximum(np.abs(p.detach().numpy()), 1e-2)
        assert (distance <= 8 * np.spacing(scale)).all()
        # torch may fuse the multiplication and addition: one rounding less, ten times.
        assert (ulps(v, optimizer.state[p]["exp_avg_sq"].double().numpy()) <= 10).all()


def test_a_split_master_is_an_fp32_master(backend):
    generator = rng("split")
    shapes = [(1000,), (33, 5)]
    start = tensors(shapes, generator, torch.bfloat16)
    # Zeros, the largest number and a subnormal: the rounding carries, wraps and must come back.
    start[0][:3] = torch.tensor([0.0, -0.0, torch.finfo(torch.bfloat16).max])
    start[0][3] = 1e-40
    full, split = State(start, "fp32"), State(start, "split")
    halves_seen = 0
    for _ in range(50):
        grads = tensors(shapes, generator, torch.bfloat16)
        for state in (full, split):
            state.update(grads, lr=1e-3, weight_decay=0.01, anchors=start, l1=0.01)
        for f, s, w, low in zip(
            full.master, split.values(), split.weights, split.master, strict=True
        ):
            oracles.assert_bits(s, f)
            oracles.assert_bits(w, nearest_away(f))
            halves_seen += int((low < 0).sum())
    assert halves_seen > 0
    for a, b in zip(full.exp_avg + full.exp_avg_sq, split.exp_avg + split.exp_avg_sq, strict=True):
        oracles.assert_bits(a, b)


def test_ties_of_a_split_master_round_away_from_zero(backend):
    values = np.array([0x3F808000, 0xBF808000, 0x3F818000, 0x7F7FFFFF, 0x3F807FFF], np.uint32)
    expected = np.array([0x3F81, 0xBF81, 0x3F82, 0x7F80, 0x3F80], np.uint16)
    high = ((values.astype(np.int64) + 0x8000) >> 16).astype(np.uint16)
    weight = torch.from_numpy(high.view(np.int16).copy()).view(torch.bfloat16)
    low = torch.from_numpy(values.astype(np.uint16).view(np.int16).copy())
    state = State([weight], "split")
    state.master = [low.clone()]
    # A gradient of 0 without decay: every value stays, and is joined and split again.
    state.update([torch.zeros(5)])
    assert state.weights[0].view(torch.int16).numpy().view(np.uint16).tolist() == expected.tolist()
    assert torch.equal(state.master[0], low)


@pytest.mark.parametrize("master", MASTERS)
def test_a_missing_gradient_leaves_its_tensor_alone(backend, master):
    generator = rng("missing", master)
    shapes = [(70_000,), (65,), (30,)]
    state = State(tensors(shapes, generator, torch.bfloat16), master)
    state.update(tensors(shapes, generator))
    before = [x.clone() for x in state.everything()]
    grads = [torch.empty(0), torch.ones(65), torch.empty(0, dtype=torch.float16)]
    state.update(grads, weight_decay=0.1, lr=0.1)
    after = state.everything()
    for i, (old, new) in enumerate(zip(before[:-1], after[:-1], strict=True)):
        if i % 3 == 1:
            assert not torch.equal(old, new)
        else:
            oracles.assert_bits(new, old)
    assert float(state.step) == 2


@pytest.mark.parametrize("master", MASTERS)
def test_found_inf_freezes_everything(backend, master):
    generator = rng("inf", master)
    state = State(tensors(SHAPES, generator, torch.bfloat16), master)
    state.update(tensors(SHAPES, generator))
    before = [x.clone() for x in state.everything()]
    grads = tensors(SHAPES, generator)
    grads[3][:] = float("inf")
    state.update(grads, found_inf=torch.tensor(1.0), weight_decay=0.1)
    for old, new in zip(before, state.everything(), strict=True):
        oracles.assert_bits(new, old)
    state.update(tensors(SHAPES, generator), found_inf=torch.tensor(0.0))
    assert float(state.step) == 2


def test_l1_pulls_toward_the_anchor_and_is_silent_there(backend):
    generator = rng("l1")
    anchor = torch.randn(1000, generator=generator)
    away = torch.where(torch.arange(1000) % 2 == 0, 0.5, -0.5)
    away[::5] = 0.0
    state = State([anchor + away])
    state.update([torch.zeros(1000)], anchors=[anchor], l1=0.5, lr=0.01)
    distance = (state.weights[0] - anchor).abs()
    oracles.assert_bits(state.weights[0][::5], anchor[::5])
    moved = away != 0
    assert (distance[moved] < 0.5).all()
    assert torch.allclose(distance[moved], torch.tensor(0.49), atol=1e-5)


def test_nothing_at_all(backend):
    step = torch.zeros(1)
    dense_adamw_([], [], [], [], [], [], step, lr=0.1)
    assert float(step) == 1


def test_a_fixed_number_by_hand(backend):
    state = State([torch.tensor([2.0])])
    state.update([torch.tensor([0.5])], lr=0.125, betas=(0.5, 0.75), eps=0.0, weight_decay=1.0)
    assert float(state.exp_avg[0]) == 0.25
    assert float(state.exp_avg_sq[0]) == 0.0625
    # 2·(1 − 0.125) − 0.125·(0.25/0.5)/√(0.0625/0.25)
    assert float(state.weights[0]) == pytest.approx(1.75 - 0.125, rel=1e-6)
    assert math.isfinite(float(state.step))


def test_what_does_not_fit_is_refused():
    half = torch.bfloat16

    def call(**changes):
        given = {
            "weights": [torch.ones(4), torch.ones(2, 3)],
            "grads": [torch.ones(4), torch.empty(0)],
            "exp_avg": [torch.zeros(4), torch.zeros(2, 3)],
            "exp_avg_sq": [torch.zeros(4), torch.zeros(2, 3)],
            "master": [],
            "anchors": [],
            "step": torch.zeros(1),
            "lr": 0.1,
            **changes,
        }
        before = [x.clone() for x in given["weights"]]
        try:
            dense_adamw_(**given)
        finally:
            for old, new in zip(before, given["weights"], strict=True):
                oracles.assert_bits(new, old)

    low = [torch.zeros(4, dtype=torch.int16), torch.zeros(2, 3, dtype=torch.int16)]
    for changes, message in [
        ({"weights": [torch.ones(4), torch.ones(2, 3).half()]}, "mix.*one call for each data type"),
        ({"grads": [torch.ones(4)]}, "1 gradients for 2 tensors"),
        ({"grads": [torch.ones(4), torch.ones(5)]}, r"grads\[1\] has 5 elements, its tensor 6"),
        ({"exp_avg": [torch.zeros(4)]}, "exp_avg has 1 tensors and weights 2"),
        ({"exp_avg": [torch.zeros(4), torch.zeros(6)]}, r"exp_avg\[1\] has shape \(6,\)"),
        (
            {"exp_avg_sq": [torch.zeros(4), torch.zeros(2, 3, dtype=half)]},
            r"exp_avg_sq\[1\] has dtype torch.bfloat16.*all be float32 or all bfloat16",
        ),
        (
            {"exp_avg": [torch.zeros(4).half(), torch.zeros(2, 3).half()]},
            r"exp_avg\[0\] has dtype torch.float16",
        ),
        ({"master": low}, "low halves of bfloat16 weights, but these are torch.float32"),
        ({"master": low[:1]}, "master has 1 tensors and weights 2"),
        (
            {"master": [torch.ones(4), low[1]]},
            r"master\[1\] has dtype torch.int16.*all must be float32, or all int16",
        ),
        (
            {"master": [torch.ones(4, dtype=half), torch.ones(2, 3, dtype=half)]},
            r"master\[0\] has dtype torch.bfloat16",
        ),
        (
            {"master": [torch.ones(4), torch.ones(3, 2).t()]},
            r"master\[1\] is not contiguous",
        ),
        ({"l1": 0.1}, "l1 = 0.1 needs anchors"),
        ({"l1": 0.1, "anchors": [torch.ones(4)]}, "anchors has 1 tensors and weights 2"),
        ({"step": torch.zeros(1, dtype=torch.int64)}, "step must be one torch.float32"),
        ({"lr": torch.tensor(0.1)}, "lr must be one torch.float64"),
        ({"clip": torch.ones(2)}, "clip must be one torch.float32"),
        ({"eps": -1.0}, "eps must be in"),
    ]:
        with pytest.raises(ValueError, match=f"^dense_adamw_: .*{message}"):
            call(**changes)
