"""A thousand compositions and swaps, failures among them, end in the bits of the base."""

import itertools
import sys

import numpy as np
import pytest
import torch
from composed import Model, made, pristine, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import DTYPES, assert_bits
from torch import nn

import sparse_ft as sf
from sparse_ft.compose import active
from sparse_ft.registry import DeltaRegistry
from sparse_ft.tiles import Layout, Support

compose_module = sys.modules["sparse_ft.compose"]
OPS = ("compose_", "swap_")

pytestmark = pytest.mark.usefixtures("one_thread")


class Broken:
    """Ops that fail on demand: before they write, after half of what they write, or afterwards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = -1  # until the failure; negative: none
        self.when = ""
        self.failed = 0
        for name in OPS:
            monkeypatch.setattr(compose_module, name, self.op(getattr(compose_module, name)))

    def op(self, real):
        def broken(weights, *args):
            self.calls -= 1
            if self.calls != 0:
                return real(weights, *args)
            self.failed += 1
            if self.when != "before":
                real(weights, *args)
            if self.when == "half" and (logs := args[-1]):
                # As the reference is interrupted: the whole log, but not all of the weights.
                idx, ptr = args[-5][0], args[-4][0]
                layout = Layout.of({f"{i:03}": w for i, w in enumerate(weights)})
                support = Support(layout, idx, ptr, check=False)
                for i, w in enumerate(weights[::2]):
                    name = f"{2 * i:03}"
                    log = logs[0][support.entries_of(name)]
                    w.view(-1)[support.indices(name)] = log
            raise (KeyboardInterrupt if self.failed % 2 else RuntimeError)("injected")

        return broken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_steps_end_in_the_bits_of_the_base(dtype, monkeypatch, tmp_path):
    model = Model(dtype)
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float16}.get(dtype, torch.float32)
    model.lin.to(other)  # two kinds of weights: a failure may come between them
    with torch.no_grad():
        model.emb.weight[0, :4] = torch.tensor([torch.inf, -0.0, 6e-8, torch.nan]).to(dtype)
    before = values(model)
    start = Model(dtype)
    start.lin.to(other)
    pool = [made(start, seed, 0.02, size) for seed, size in enumerate((1e-4, 1e-2, 1.0, 1e3))]
    registry = DeltaRegistry(model, host_budget_bytes=0)
    for i, delta in enumerate(pool):
        delta.save(tmp_path / f"{i}.safetensors")
        registry.add(tmp_path / f"{i}.safetensors", str(i), allow_base_mismatch=True)
    registry._host.budget = None
    random = np.random.default_rng(7)
    broken = Broken(monkeypatch)
    outcomes = {"done": 0, "failed": 0, "missing": 0}
    for _ in range(1000):
        chosen = [i for i in range(4) if random.random() < 0.5]
        alphas = (random.normal(size=len(chosen)) * 10.0 ** random.integers(-3, 3)).tolist()
        heads = chosen[:1] if random.random() < 0.5 else []
        broken.calls = int(random.integers(1, 4)) if random.random() < 0.2 else -1
        broken.when = str(random.choice(["before", "half", "after"]))
        gone = chosen and random.random() < 0.05
        step = random.integers(4)
        at = values(model) if broken.calls > 0 or gone else {}
        was_on = active(model)
        try:
            if step == 0:
                registry.deactivate()
                deltas = [pool[i] for i in chosen]
                with sf.compose(
                    *(model, deltas, alphas),
                    heads=[pool[i] for i in heads],
                    compat="sequential" if random.random() < 0.3 else None,
                    allow_base_mismatch=True,
                ):
                    pass
            elif gone:
                registry._host.drop(pool[chosen[-1]].content_id)
                path = tmp_path / f"{chosen[-1]}.safetensors"
                path.rename(tmp_path / "away")
                try:
                    registry.activate([(str(chosen[-1]), 0.125)])
                finally:
                    (tmp_path / "away").rename(path)
            else:
                pairs = [(str(i), a) for i, a in zip(chosen, alphas, strict=True)]
                registry.activate(pairs, [str(i) for i in heads])
        except (RuntimeError, KeyboardInterrupt):
            outcomes["failed"] += 1
            pristine(model, before)
            assert active(model) is None
        except sf.SFTError:
            outcomes["missing"] += 1
            assert active(model) is was_on
            pristine(model, at)
        else:
            outcomes["done"] += 1
    assert outcomes["failed"] > 50
    assert outcomes["missing"] > 5
    registry.deactivate()
    pristine(model, before)


SHAPES = {"a": (65_537,), "b": (300, 7), "c": (), "d": (0, 3), "e": (131_072,)}


def module(dtype):
    model = nn.Module()
    g = torch.Generator().manual_seed(3)
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=g).to(dtype)
        model.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return model


def near_each_other(seed, count, overlap):
    """Deltas of some of the tensors, with a share of their entries in common."""
    random = np.random.default_rng(seed)
    layout = Layout.of(SHAPES)
    shared = {
        n: random.integers(0, k, 40) if k else np.zeros(0, np.int64)
        for n, k in zip(layout.names, layout.numels, strict=True)
    }
    deltas = []
    for j in range(count):
        names = [n for n in layout.names if random.random() < 0.8] or ["a"]
        own = Layout.of({n: SHAPES[n] for n in names})
        indices = {}
        for name, numel in zip(own.names, own.numels, strict=True):
            among = shared[name]
            mine = random.integers(0, max(numel, 1), len(among))
            at = np.where(random.random(len(among)) < overlap, among, mine)
            indices[name] = np.unique(at)
        support = Support.from_indices(own, indices)
        val = torch.from_numpy(random.normal(size=support.nnz).astype(np.float32))
        deltas.append(sf.SparseDelta(support, val.to(DTYPES[(seed + j) % 3])))
    return deltas


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 1 << 30),
    count=st.integers(1, 4),
    overlap=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_every_order_and_the_merged_delta_give_the_same_bits(backend, seed, count, overlap, dtype):
    deltas = near_each_other(seed, count, overlap)
    alphas = np.random.default_rng(seed).normal(size=count).tolist()
    model = module(dtype)
    before = values(model)
    orders = list(itertools.permutations(range(count)))
    if backend == "triton":  # its interpreter is slow
        orders = orders[:: max(1, len(orders) // 3)]
    found = []
    for order in orders:
        with sf.compose(model, [deltas[j] for j in order], [alphas[j] for j in order]):
            found.append(values(model))
    with sf.compose(model, sf.merge(deltas, alphas)):
        found.append(values(model))
    registry = DeltaRegistry(model)
    names = [registry.add(delta, str(j)) for j, delta in enumerate(deltas)]
    registry.activate(names[-1])
    registry.activate(list(zip(names, alphas, strict=True))[::-1])
    found.append(values(model))
    registry.deactivate()
    pristine(model, before)
    for other in found[1:]:
        for name, value in other.items():
            assert_bits(value, found[0][name], name)
