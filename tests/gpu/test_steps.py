"""Steps as training runs them: captured in a CUDA graph, without waiting for the device, on any
stream and device; and as exact as fp32 allows.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from gpu_oracles import DEVICE, REAL, Twins, assert_same, forced, moved, ulps
from oracles import DTYPES, numels, random_support, rng, take, tensors

import sparse_ft_kernels as ops

SHAPES = [(1000, 517), (768,), (0,), (65_537,)] if REAL else [(300, 217), (9,)]
HYPER = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "l1": 0.01}


class Training:
    """A model with all that a step needs, on a device, and one step over it.

    Args:
        seed: Models of equal seeds are equal.
        device: Where it lies.
    """

    def __init__(self, seed=0, dtype=torch.float32, device=DEVICE):
        generator = rng("training", seed, dtype)
        model = tensors(SHAPES, generator, dtype)
        idx, ptr, chosen = random_support(numels(model), 0.05, generator)
        n = len(idx)
        self.sizes = numels(model)
        self.idx, self.ptr = moved(idx, device), moved(ptr, device)
        self.weights = moved(model, device)
        self.theta0 = moved(take(model, chosen), device)
        self.grads = moved(tensors(SHAPES, generator, dtype), device)
        self.compact, self.exp_avg, self.exp_avg_sq, self.delta = (
            torch.zeros(n, device=device) for _ in range(4)
        )
        self.step, self.dense_step = (torch.zeros((), device=device) for _ in range(2))
        self.lr = torch.tensor(1e-2, dtype=torch.float64).to(device)
        self.scale = torch.tensor(4.0).to(device)
        self.other = moved(model, device)  # what the dense step moves
        self.moments = [[torch.zeros(t.shape, device=device) for t in self.other] for _ in range(2)]
        self.val = moved(torch.randn(n, generator=generator), device)
        # A graph keeps addresses: what it works on must not be made anew in each step.
        self.undo, self.other_undo = (torch.zeros(n, dtype=dtype, device=device) for _ in range(2))
        self.stats = torch.zeros(2, dtype=torch.int64, device=device)

    def once(self):
        """Every op that must not wait for the device."""
        norm_sq, found_inf = ops.gather(
            self.grads, self.sizes, self.idx, self.ptr, self.compact, grad_scale=self.scale
        )
        clip = (1.0 / (norm_sq.sqrt() + 1e-6)).clamp(max=1.0).float()
        state = (self.exp_avg, self.exp_avg_sq, self.delta, self.theta0, self.step)
        for grad in (self.compact, self.grads):
            ops.masked_adamw_(
                *(self.weights, self.idx, self.ptr, grad, *state),
                lr=self.lr,
                clip=clip,
                found_inf=found_inf,
                **HYPER,
            )
        ops.dense_adamw_(
            *(self.other, self.grads, *self.moments, [], self.weights, self.dense_step),
            lr=self.lr,
            **HYPER,
        )
        ops.anchor_l1_(self.grads, self.weights, self.other, 1e-3)
        delta = ([self.idx], [self.ptr])
        self.stats += ops.compose_(self.other, *delta, [self.val], [0.5], [self.undo])
        self.stats += ops.swap_(
            *(self.other, *delta, [self.undo], *delta, [self.val], [0.25], [self.other_undo])
        )
        ops.restore_(self.other, *delta, [self.other_undo])

    def everything(self):
        return [
            *(*self.weights, *self.other, *self.grads, *self.moments[0], *self.moments[1]),
            *(self.compact, self.exp_avg, self.exp_avg_sq, self.delta, self.step),
            *(self.dense_step, self.undo, self.other_undo, self.stats),
        ]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_step_replays_to_the_same_bits(dtype, cuda):
    with forced():
        eager, replayed = Training(dtype=dtype), Training(dtype=dtype)
        for _ in range(11):
            eager.once()
        # One ordinary step on the capturing stream compiles the kernels and uploads their tables.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            replayed.once()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            replayed.once()
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
    assert float(replayed.step) == float(eager.step) == 22
    assert_same(replayed.everything(), eager.everything(), "after ten replays")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_does_not_wait_for_the_device(dtype, cuda):
    with forced():
        Training(dtype=dtype).once()  # compiles
        fresh = Training(1, dtype)  # of other addresses: its tables are uploaded in the step
        torch.cuda.synchronize()
        with no_waiting():
            fresh.once()
            fresh.once()
    torch.cuda.synchronize()
    assert float(fresh.step) == 4


def test_the_same_bits_again(device):
    """No order of programs shows in the results."""
    with forced():
        runs = [Training(dtype=torch.bfloat16) for _ in range(3)]
        for run in runs:
            for _ in range(5 if REAL else 1):
                run.once()
    for run in runs[1:]:
        assert_same(run.everything(), runs[0].everything(), "a second run")


def test_a_stream_of_its_own(cuda):
    """Kernels go to the current stream: they see what was queued there, and nothing else."""
    with forced():
        expected, found = Training(), Training()
        late = [g.clone() for g in expected.grads]
        for _ in range(3):
            expected.once()
        for g in found.grads:
            g.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # some 25 ms
            for g, value in zip(found.grads, late, strict=True):
                g.copy_(value)
            for _ in range(3):
                found.once()
        stream.synchronize()
    assert_same(found.everything(), expected.everything(), "on another stream")


def test_a_second_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    with forced():
        first, second = Training(), Training(device=torch.device("cuda", 1))
        for _ in range(3):
            first.once()
            second.once()
    torch.cuda.synchronize(1)
    assert_same(second.everything(), first.everything(), "on device 1")


def test_tensors_of_two_devices_are_refused(cuda):
    run = Training()
    with pytest.raises(ValueError, match="the other arguments on"):
        ops.gather(run.grads, run.sizes, run.idx.cpu(), run.ptr, run.compact)


def test_one_step_is_within_two_units_of_fp64(device):
    """m, v and w after one step, from the state of a hundred; δ by the roundings of its update."""
    generator = rng("ulps")
    n = 2_000_000 if REAL else 40_000
    start = torch.randn(n, generator=generator)
    idx, ptr, chosen = random_support([n], 0.2, generator)
    k = len(idx)
    theta0 = take([start], chosen)
    lr, betas, eps, t = 1e-3, (0.9, 0.999), 1e-8, 100
    g = torch.randn(k, generator=generator)
    # Gradient and momentum of one sign: where they cancel, no fp32 step is within a few units.
    m = torch.rand(k, generator=generator) * g
    v = g * g * (0.5 + torch.rand(k, generator=generator))
    delta = torch.randn(k, generator=generator) * 1e-2
    weights = [start.clone()]
    weights[0][torch.from_numpy(chosen[0])] = theta0 + delta
    twins = Twins(
        weights=weights,
        idx=idx,
        ptr=ptr,
        grad=g,
        exp_avg=m.clone(),
        exp_avg_sq=v.clone(),
        delta=delta.clone(),
        theta0=theta0,
        step=torch.tensor(float(t - 1)),
    )
    rate = torch.tensor(lr, dtype=torch.float64)
    twins.run(ops.masked_adamw_, lr=rate, betas=betas, eps=eps)
    gd, md, vd, dd, wd = (x.double() for x in (g, m, v, delta, theta0))
    md = betas[0] * md + (1 - betas[0]) * gd
    vd = betas[1] * vd + (1 - betas[1]) * gd * gd
    update = lr / (1 - betas[0] ** t) * md / (vd.sqrt() / math.sqrt(1 - betas[1] ** t) + eps)
    dd = dd - update
    assert ulps(twins.gpu["exp_avg"], md) <= 2
    assert ulps(twins.gpu["exp_avg_sq"], vd) <= 2
    # A sum is as exact as its largest term: that one's last place is the unit.
    wrong = (twins.gpu["delta"].cpu().double() - dd).abs()
    # A quotient of rounded m, √v and corrections: eight roundings at most, before the last one.
    assert (wrong <= 8 * 2.0**-24 * update.abs() + last_place(delta, dd)).all()
    tuned = take(moved(twins.gpu["weights"], torch.device("cpu")), chosen).double()
    wrong = (tuned - (wd + dd)).abs()
    assert (wrong <= 2 * last_place(theta0, wd + dd, dd)).all()


def last_place(*values):
    """The unit in the last place of the largest of some values, as fp32."""
    largest = torch.stack([v.abs().float() for v in values]).amax(0)
    return torch.from_numpy(np.spacing(largest.numpy())).double()
