"""DeltaRegistry: the bits of compose, files read once, budgets kept, and no failure that shows."""

import copy
import gc
import os
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch
from composed import HEADS, Model, made, pristine, values
from oracles import DTYPES, assert_bits
from torch import nn

import sparse_ft as sf
from sparse_ft import registry as registry_module
from sparse_ft.compose import active
from sparse_ft.registry import DeltaRegistry
from sparse_ft.tiles import Layout, Support

compose_module = sys.modules["sparse_ft.compose"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The files that a registry opens, in order."""
    names: list[str] = []
    real = sf.SparseDelta.load

    def load(path):
        names.append(os.path.basename(path))
        return real(path)

    monkeypatch.setattr(registry_module.SparseDelta, "load", load)
    return names


def files(folder, model, count):
    paths = [folder / f"{'abcdefgh'[i]}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        made(model, i).save(path)
    return paths


def composed(model, deltas, alphas=None, heads=()):
    """What the model holds under compose."""
    twin = copy.deepcopy(model)
    with sf.compose(twin, deltas, alphas, heads=heads):
        return values(twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_set_has_the_bits_of_compose(backend, dtype):
    model = Model(dtype)
    before = values(model)
    deltas = [made(model, seed) for seed in range(3)]
    registry = DeltaRegistry(model)
    a, b, c = (registry.add(delta, name) for delta, name in zip(deltas, "abc", strict=True))
    addresses = [p.data_ptr() for p in model.parameters()]
    steps = [
        (a, (), ([0], None, ())),
        ([(b, 0.5), (c, -2.0)], (), ([1, 2], [0.5, -2.0], ())),
        ([(c, -2.0), (a, 0.0), (b, 0.5)], b, ([1, 2], [0.5, -2.0], [1])),
        ((a, 3), [a], ([0], [3.0], [0])),
        ([a, b, c, a], c, ([0, 1, 2, 0], None, [2])),
        (b, (), ([1], None, ())),
    ]
    for chosen, heads, (numbers, alphas, with_heads) in steps:
        registry.activate(chosen, heads)
        twin = Model(dtype)
        with sf.compose(
            twin, [deltas[j] for j in numbers], alphas, heads=[deltas[j] for j in with_heads]
        ) as composition:
            pristine(model, values(twin))
        on = active(model)
        assert (on.changed, on.swallowed) == (composition.changed, composition.swallowed)
        assert [p.data_ptr() for p in model.parameters()] == addresses
    registry.deactivate()
    registry.deactivate()
    pristine(model, before)
    assert active(model) is None


def test_the_same_set_again_is_no_work(monkeypatch):
    model = Model()
    registry = DeltaRegistry(model)
    for seed, name in enumerate("ab"):
        registry.add(made(model, seed), name)
    first = registry.activate([("a", 0.5), "b"], "a")
    for op in ("swap_", "compose_", "restore_"):
        monkeypatch.setattr(compose_module, op, None)
    assert registry.activate(["b", ("a", 0.5)], ["a"]) is first
    assert registry.activate(["b", ("a", 0.5)], ["a", "a"]) is first
    with pytest.raises(RuntimeError):
        registry.activate(["b", ("a", 0.5)])


def test_one_call_swaps_all_weights_of_one_kind(monkeypatch):
    model = Model()
    model.lin.bfloat16()
    registry = DeltaRegistry(model)
    for seed, name in enumerate("abcd"):
        registry.add(made(model, seed), name)
    real, calls = compose_module.swap_, []

    def counted(weights, *args):
        calls.append(weights[0].dtype)
        return real(weights, *args)

    monkeypatch.setattr(compose_module, "swap_", counted)
    before = values(model)
    registry.activate(["a", "b"])
    assert calls == []
    registry.activate(["c", "d"])
    assert sorted(calls, key=str) == [torch.bfloat16, torch.float32]
    registry.deactivate()
    pristine(model, before)


def test_ids_and_contents(tmp_path, opened):
    model = Model()
    paths = files(tmp_path, model, 2)
    registry = DeltaRegistry(model)
    delta = made(model, 0)
    assert registry.add(paths[0]) == delta.content_id
    assert registry.add(paths[0], "a") == "a"
    assert registry.add(paths[0], "a") == "a"
    assert opened == ["a.safetensors"]
    assert registry.add(delta, "again") == "again"
    shutil.copy(paths[0], tmp_path / "copy.safetensors")
    assert registry.add(tmp_path / "copy.safetensors", "copy") == "copy"
    assert registry.add(paths[1], "b") == "b"
    assert opened == ["a.safetensors", "copy.safetensors", "b.safetensors"]
    assert registry.ids == (delta.content_id, "a", "again", "copy", "b")
    assert len(registry) == 5
    assert list(registry) == list(registry.ids)
    assert "a" in registry
    assert "x" not in registry
    assert "2 deltas" in repr(registry)
    with pytest.raises(ValueError, match=rf"'a' is the delta {delta.content_id[:12]}…; remove"):
        registry.add(paths[1], "a")
    first = registry.activate("a")
    assert registry.activate("copy") is first
    registry.remove("a")
    registry.remove("again")
    registry.remove("copy")
    with pytest.raises(RuntimeError, match="is on the model"):
        registry.remove(delta.content_id)
    registry.activate("b")
    registry.remove(delta.content_id)
    for call in (registry.remove, registry.activate, registry.prefetch):
        with pytest.raises(KeyError, match=r"no delta 'a' among the 1 ids"):
            call("a")
    assert len(registry) == 1
    assert opened == ["a.safetensors", "copy.safetensors", "b.safetensors"]
    registry.add(paths[0], "a")
    assert opened[3:] == ["a.safetensors"]


def test_a_budget_evicts_the_least_recently_used(tmp_path, opened):
    model = Model()
    before = values(model)
    paths = files(tmp_path, model, 3)
    one = DeltaRegistry(model)
    one.add(paths[0])
    # Room for two and a half.
    registry = DeltaRegistry(model, host_budget_bytes=int(one._host.nbytes * 2.5))
    opened.clear()
    a, b, c = (registry.add(path, path.stem) for path in paths)
    assert len(registry._host) == 2
    registry.activate(b)
    registry.activate(c)
    assert len(opened) == 3
    registry.activate(a)  # evicts b
    assert opened[3:] == ["a.safetensors"]
    registry.activate(c)
    registry.activate(b)  # evicts a
    assert opened[4:] == ["b.safetensors"]
    # What is on the model stays, in spite of the budget.
    registry.activate([a, b, c])
    assert len(registry._host) == 3
    opened.clear()
    registry.activate([a, (b, 2.0), c])
    assert opened == []
    registry.deactivate()
    assert len(registry._host) == 2
    assert registry._host.nbytes <= registry._host.budget
    pristine(model, before)
    nothing = DeltaRegistry(model, host_budget_bytes=0)
    nothing.add(paths[0], "a")
    nothing.add(made(model, 7), "object")
    for _ in range(2):
        nothing.activate("a")
        nothing.activate("object")
    # An object has no file to come back from.
    assert opened == ["a.safetensors"] * 3
    assert len(nothing._host) == 1
    nothing.deactivate()
    pristine(model, before)


def test_prefetch_reads_in_the_background(tmp_path, opened):
    model = Model()
    paths = files(tmp_path, model, 2)
    registry = DeltaRegistry(model, host_budget_bytes=0)
    registry.add(paths[0], "a")
    registry._host.budget = None
    (done,) = registry.prefetch("a")
    assert done.result(10) is None
    registry.activate("a")
    assert opened == ["a.safetensors"] * 2
    registry.deactivate()
    registry._host.budget = 0
    registry._trim()
    paths[0].unlink()
    done, _ = registry.prefetch(["a", "a"])
    with pytest.raises(sf.SFTError, match=r"a\.safetensors"):
        done.result(10)


@pytest.mark.parametrize("active_before", [False, True])
def test_a_file_that_changed_is_refused_and_the_model_stays(tmp_path, active_before):
    model = Model()
    before = values(model)
    a, b = files(tmp_path, model, 2)
    registry = DeltaRegistry(model, host_budget_bytes=0)
    registry.add(a, "a")
    registry.add(made(model, 5), "c")
    if active_before:
        registry.activate("c")
    expected = values(model)
    good = a.read_bytes()
    cases = [
        (lambda: shutil.copy(b, a), "holds the delta .* now, and .* when it was added"),
        (lambda: a.write_bytes(good[:-7]), "a.safetensors"),
        (lambda: a.write_bytes(good[:-9] + b"\1" + good[-8:]), "a.safetensors"),
        (a.unlink, "no such file"),
    ]
    for spoil, message in cases:
        spoil()
        for chosen in ("a", ["c", ("a", 0.5)]):
            with pytest.raises(sf.SFTError, match=message):
                registry.activate(chosen)
            pristine(model, expected)
            assert (active(model) is not None) == active_before
    a.write_bytes(good)
    registry.activate("a")
    pristine(model, composed(Model(), made(Model(), 0)))
    registry.deactivate()
    pristine(model, before)


@pytest.mark.parametrize("when", ["before the call", "after the call", "no memory"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_failure_in_a_swap_leaves_the_base(monkeypatch, when, error, nth):
    model = Model()
    model.lin.bfloat16()
    with torch.no_grad():
        model.emb.weight[0, :9] = torch.nan  # a log that holds NaN is whole all the same
    before = values(model)
    registry = DeltaRegistry(model)
    for seed, name in enumerate("ab"):
        registry.add(made(Model(), seed), name, allow_base_mismatch=True)
    registry.activate("a", "a")
    on_a = values(model)
    name = "swap_" if when != "no memory" else "_UNWRITTEN"
    real, calls = getattr(compose_module, name), []

    def breaks(*args):
        calls.append(1)
        if len(calls) == nth:
            if when == "after the call":
                real(*args)
            raise error("stop")
        return real(*args)

    if when == "no memory":
        monkeypatch.setattr(compose_module.Group, "prepare", breaks)
        nth = 1
        with pytest.raises(error, match="stop"):
            registry.activate("b", "b")
        pristine(model, on_a)
        monkeypatch.undo()
        assert registry.activate("a", "a") is active(model)
        registry.deactivate()
    else:
        monkeypatch.setattr(compose_module, name, breaks)
        message = "base model again" if error is RuntimeError else "stop"
        with pytest.raises(error, match=message):
            registry.activate("b", "b")
        assert len(calls) == nth
        monkeypatch.undo()
    pristine(model, before)
    assert active(model) is None
    assert "active: none" in repr(registry)
    registry.activate("a", "a")
    pristine(model, on_a)
    registry.deactivate()
    pristine(model, before)


def test_a_model_has_one_owner():
    model = Model()
    delta = made(model, 1)
    registry = DeltaRegistry(model)
    registry.add(delta, "a")
    registry.activate("a")
    on_a = values(model)
    with pytest.raises(RuntimeError, match="is on this model already"):
        sf.compose(model, delta)
    with pytest.raises(RuntimeError, match="is on this model"):
        DeltaRegistry(model)
    for other in (nn.Sequential(model), torch.compile(model, backend="eager"), model.emb):
        with pytest.raises(RuntimeError, match="is on this model"):
            sf.compose(other, [])
    pristine(model, on_a)
    registry.deactivate()
    with sf.compose(model, delta):
        with pytest.raises(RuntimeError, match="not of this registry"):
            registry.activate("a")
        registry.deactivate()
        pristine(model, on_a)
    registry.activate("a")
    pristine(model, on_a)


def test_heads_follow_the_set():
    model = Model()
    before = values(model)
    tasks = [made(model, seed) for seed in range(2)]
    registry = DeltaRegistry(model)
    for task, name in zip(tasks, "ab", strict=True):
        registry.add(task, name)
    # A third that holds entries in the head that the others replace.
    entries = Support.from_indices(Layout.of({"head.weight": (3, 30)}), {"head.weight": [0, 7, 89]})
    registry.add(sf.SparseDelta(entries, torch.ones(3)), "entries")
    sets = [("a", "a"), ("entries", ()), (["entries", "b"], "b"), ("entries", ()), ("b", "b")]
    for chosen, heads in [*sets, *reversed(sets)]:
        registry.activate(chosen, heads)
        for name in HEADS:
            expected = before[name].clone()
            if heads:
                expected = tasks["ab".index(heads)].heads[name]
            elif chosen == "entries" and name == "head.weight":
                expected.view(-1)[[0, 7, 89]] += 1
            assert_bits(model.state_dict()[name], expected, name)
    registry.deactivate()
    pristine(model, before)
    with pytest.raises(ValueError, match="'b', which is not among the deltas"):
        registry.activate("a", "b")
    with pytest.raises(ValueError, match=r"two deltas of heads bring the head 'head\.bias'"):
        registry.activate(["a", "b"], ["a", "b"])
    pristine(model, before)
    # A model without that head takes the entries, and refuses the head.
    model.head = nn.Linear(30, 4)
    registry = DeltaRegistry(model)
    registry.add(tasks[0], "a")
    registry.activate("a")
    with pytest.raises(sf.SFTError, match=r"head\.bias"):
        registry.activate("a", "a")
    registry.deactivate()


def test_groups_of_a_batch():
    model = Model()
    before = values(model)
    deltas = {name: made(model, seed) for seed, name in enumerate("abc")}
    registry = DeltaRegistry(model)
    for name, delta in deltas.items():
        registry.add(delta, name)
    x = torch.arange(40).reshape(8, 5)
    batch = ["b", None, "a", ("b", 1.0), [("a", 0.5), "c"], ["c", ("a", 0.5)], "a", ("b", 2)]

    def run():
        out = torch.full((8, 3), torch.nan)
        order = []
        with torch.no_grad():
            for chosen, rows in registry.grouped(batch):
                order.append((chosen, rows.tolist()))
                out[rows] = model(x[rows])
        return out, order

    expected = torch.full((8, 3), torch.nan)
    for row, item in enumerate(batch):
        if item is not None:
            registry.activate(item)
        with torch.no_grad():
            expected[row] = model(x[row : row + 1])
        registry.deactivate()
    out, order = run()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # other batches, other sums
    assert [rows for _, rows in order] == [[1], [0, 3], [2, 6], [4, 5], [7]]
    assert order[3][0] == [("a", 0.5), "c"]
    pristine(model, before)
    assert active(model) is None
    registry.activate("a", "a")
    on_a = values(model)
    registry.activate("a")
    on = values(model)
    out, order = run()
    assert [rows for _, rows in order] == [[2, 6], [0, 3], [1], [4, 5], [7]]
    pristine(model, on)
    registry.activate("a", "a")
    for _ in registry.grouped(batch, heads="b"):
        break
    pristine(model, on_a)

    def fail():
        for _ in registry.grouped(["b", "c"]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    pristine(model, on_a)
    with pytest.raises(KeyError, match="'x'"):
        list(registry.grouped(["b", "x"]))
    pristine(model, on_a)
    heads = []
    for chosen, _ in registry.grouped(["c", ["b", "c"]], heads="b"):
        heads.append((chosen, torch.equal(model.head.weight, deltas["b"].heads[HEADS[0]])))
    assert heads == [("c", False), (["b", "c"], True)]


def test_blocks_nest_and_come_back_after_an_exception():
    model = Model()
    before = values(model)
    registry = DeltaRegistry(model)
    for seed, name in enumerate("ab"):
        registry.add(made(model, seed), name)
    with registry.active("a") as first:
        on_a = values(model)

        def fail():
            with registry.active([("b", 0.5)]):
                assert active(model) is not first
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        pristine(model, on_a)
        with pytest.raises(KeyError), registry.active("x"):
            pass
        pristine(model, on_a)
    pristine(model, before)
    assert not registry.activate([]).is_on


def test_a_delta_is_verified_against_the_base_also_while_others_are_on():
    for dtypes in (None, torch.bfloat16):
        model = Model()
        if dtypes is not None:
            model.lin.to(dtypes)
        fresh = [made(model, seed, share=0.3) for seed in range(4)]
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            tuned.emb.weight[5, 5] += 1
        foreign = made(tuned, 9, share=1.0)
        registry = DeltaRegistry(model)
        registry.add(fresh[0], "a")
        registry.add(fresh[1], "b")
        registry.activate(["a", "b"], "a")
        on = values(model)
        registry.add(fresh[2], "c")
        with pytest.raises(sf.SFTError, match="another base model"):
            registry.add(foreign, "d")
        assert "d" not in registry
        registry.add(foreign, "d", allow_base_mismatch=True)
        pristine(model, on)
        registry.deactivate()
        registry.add(fresh[3], "e")
        with pytest.raises(sf.SFTError, match="another base model"):
            DeltaRegistry(model).add(foreign, "d")


def test_names_are_mapped_and_left_out():
    model = Model()
    delta = made(model, 1)

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.z = Model()

    other = Renamed()
    registry = DeltaRegistry(other)
    with pytest.raises(sf.SFTError, match=r"no parameter 'emb\.weight'"):
        registry.add(delta, "a")
    registry.add(delta, "a", key_map={"": "z."})
    registry.activate("a", "a")
    with sf.compose(model, delta, heads=delta):
        pristine(other.z, values(model))
    registry.deactivate()
    del other.z.scale
    registry = DeltaRegistry(other)
    with pytest.raises(sf.SFTError, match="cannot be recognised"):
        registry.add(delta, "a", key_map={"": "z."}, unused="ignore")
    with pytest.warns(UserWarning, match=r"lacks 1 of the SFT's 5 tensors \('scale'\); 1 of"):
        registry.add(delta, "a", key_map={"": "z."}, unused="ignore", allow_base_mismatch=True)
    registry.activate("a")


def test_a_delta_has_one_place_in_the_model():
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(5)) for name in "ab"})
    entry = Support.from_indices(Layout.of({"a": (5,)}), {"a": [3]})
    registry = DeltaRegistry(model)
    registry.add(sf.SparseDelta(entry, torch.ones(1)), "there", key_map={"a": "b"})
    with pytest.raises(ValueError, match="under another key_map"):
        registry.add(sf.SparseDelta(entry, torch.ones(1)), "here")
    registry.activate("there")
    assert model["b"].tolist() == [0, 0, 0, 1, 0]
    assert model["a"].tolist() == [0] * 5


def test_what_cannot_be_is_refused():
    model = Model()
    before = values(model)
    delta = made(model, 1)
    registry = DeltaRegistry(model)
    registry.add(delta, "a")
    # On the CPU the model's memory is the host's.
    assert DeltaRegistry(model, budget_bytes=1)._host.budget == 1
    assert DeltaRegistry(model, 5, host_budget_bytes=3)._host.budget == 3
    with pytest.raises(ValueError, match="host_budget_bytes must be ≥ 0"):
        DeltaRegistry(model, host_budget_bytes=-1)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        DeltaRegistry({})
    with pytest.raises(sf.SFTError, match="'replace'"):
        registry.add(sf.SparseDelta(delta.support, delta.val, meta={"kind": "replace"}))
    for alpha in (float("nan"), 1e300):
        with pytest.raises(ValueError, match="weight of 'a' must be a finite fp32 number"):
            registry.activate(("a", alpha))
    with pytest.raises(TypeError, match=r"an id or a pair \(id, weight\), got 3"):
        registry.activate([3])
    pristine(model, before)
    registry.activate("a")
    model.bfloat16()
    for chosen in ("a", ("a", 2.0)):
        with pytest.raises(sf.SFTError, match="'scale' is at another address"):
            registry.activate(chosen)
    with pytest.raises(sf.SFTError, match="another address"):
        registry.add(made(Model(), 2))
    registry.deactivate()
    for name, value in model.state_dict().items():
        assert_bits(value, before[name].bfloat16(), name)


def test_threads_take_turns(tmp_path):
    model = Model()
    before = values(model)
    paths = files(tmp_path, model, 4)
    expected = {p.stem: composed(Model(), sf.SparseDelta.load(p)) for p in paths}
    registry = DeltaRegistry(model, host_budget_bytes=150_000)
    for path in paths[:2]:
        registry.add(path, path.stem)
    wrong: list[object] = []

    def serve(name, turns):
        for _ in range(turns):
            try:
                with registry.active(name):
                    time.sleep(0)
                    pristine(model, expected[name])
            except BaseException as error:
                wrong.append(error)
                return

    def grow():
        for path in paths[2:]:
            registry.add(path, path.stem)
            registry.prefetch(registry.ids)
            serve(path.stem, 5)

    threads = [threading.Thread(target=serve, args=("ab"[i % 2], 15)) for i in range(3)]
    threads.append(threading.Thread(target=grow))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert len(registry) == 4
    pristine(model, before)


@pytest.mark.parametrize("how", ["a parameter", "a module", "assign"])
def test_a_parameter_that_was_replaced_is_noticed(how):
    model = Model()
    registry = DeltaRegistry(model)
    for seed, name in enumerate("ab"):
        registry.add(made(model, seed), name)
    registry.activate("a")
    first = {"a parameter": "lin.bias", "a module": "lin.weight", "assign": "scale"}[how]
    if how == "a parameter":
        model.lin.bias = nn.Parameter(torch.ones(30))
    elif how == "a module":
        model.lin = nn.Linear(100, 30)
    else:
        model.load_state_dict(values(model), assign=True)
    on = values(model)
    calls = [lambda: registry.activate("a"), lambda: registry.activate("b")]
    calls.append(lambda: registry.add(made(model, 2), "c"))
    for call in calls:
        with pytest.raises(sf.SFTError, match=f"parameter '{first}' is another one"):
            call()
        pristine(model, on)
    with pytest.raises(sf.SFTError, match="has replaced parameters while SFTs were on it"):
        registry.deactivate()
    assert active(model) is None
    registry = DeltaRegistry(model)
    # What is added beside the registry's parameters does not disturb it, nor is it the registry's.
    model.more = nn.Linear(2, 2)
    with pytest.raises(sf.SFTError, match=r"'more\.\w+' is newer than the registry"):
        registry.add(made(model, 1), "a")


def test_a_handle_goes_through_its_registry():
    model = Model()
    before = values(model)
    registry = DeltaRegistry(model)
    for seed, name in enumerate("ab"):
        registry.add(made(model, seed), name)
    with registry.activate("a") as handle:
        assert handle.is_on
    pristine(model, before)
    assert "active: none" in repr(registry)
    first = registry.activate("a")
    registry.activate("b")
    on_b = values(model)
    first.restore()  # swapped away: does nothing
    pristine(model, on_b)
    inside, restored = threading.Event(), []

    def other():
        inside.wait(10)
        active(model).restore()
        restored.append(values(model))

    thread = threading.Thread(target=other)
    thread.start()
    with registry.active("a") as handle:
        on_a = values(model)
        inside.set()
        thread.join(0.2)
        assert not restored  # it waits for the block
        pristine(model, on_a)
    thread.join(10)
    assert restored
    pristine(model, on_b)
    assert not handle.is_on


@pytest.mark.parametrize("block", ["active", "grouped"])
def test_a_block_brings_back_what_was_on_whatever_became_of_it(tmp_path, block):
    model = Model()
    before = values(model)
    registry = DeltaRegistry(model, host_budget_bytes=0)
    a, b = files(tmp_path, model, 2)
    registry.add(a, "a")
    registry.add(a, "again")
    registry.add(b, "b")
    handle = registry.activate(["a", ("b", 0.5)], "a")
    on_a = values(model)

    def run():
        if block == "active":
            with registry.active("b"):
                yield
        else:
            for _ in registry.grouped(["b"]):
                yield

    for _ in run():
        registry.remove("a")
        with pytest.raises(RuntimeError, match="'again' comes back when an open block"):
            registry.remove("again")
        a.unlink()
        registry.deactivate()
        pristine(model, before)
    pristine(model, on_a)
    assert handle.is_on
    registry.deactivate()
    registry.remove("again")
    pristine(model, before)
    assert len(registry._host) == 0


def test_what_cannot_come_back_leaves_the_base(monkeypatch):
    model = Model()
    before = values(model)
    registry = DeltaRegistry(model)
    for seed, name in enumerate("ab"):
        registry.add(made(model, seed), name)

    def run(error=None):
        registry.activate("a")
        with registry.active("b"):
            monkeypatch.setattr(compose_module.Group, "prepare", breaks)
            if error is not None:
                raise error

    def breaks(_):
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        run()
    pristine(model, before)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="no room"), pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError())
    monkeypatch.undo()
    pristine(model, before)
    # A cast in the block: what was on cannot come back, and the base is cast as well.
    registry.activate("a")
    cast = copy.deepcopy(Model()).bfloat16().state_dict()
    with pytest.raises(sf.SFTError, match="another address"), registry.active("b"):
        model.bfloat16()
    pristine(model, cast)
    assert active(model) is None


def test_a_failed_rollback_is_not_called_the_base(monkeypatch):
    model = Model()
    before = values(model)
    registry = DeltaRegistry(model)
    for seed, name in enumerate("ab"):
        registry.add(made(model, seed), name)
    registry.activate("a")

    def breaks(*_):
        raise OSError("stop")

    for name in ("swap_", "restore_"):
        monkeypatch.setattr(compose_module, name, breaks)
    with pytest.raises(RuntimeError, match="is not the base model any more"):
        registry.activate("b")
    assert active(model) is not None
    # Its logs are kept, and those of the set that it was to replace.
    monkeypatch.undo()
    registry.deactivate()
    pristine(model, before)


def test_a_known_file_is_checked_again_where_more_is_asked(tmp_path, opened):
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(5)) for name in "ab"})
    entry = Support.from_indices(Layout.of({"a": (5,)}), {"a": [3]})
    pieces = {"a": torch.ones(1)}
    delta = sf.SparseDelta.from_compact(entry, torch.ones(1), base=pieces)
    path = delta.save(tmp_path / "a.safetensors")
    registry = DeltaRegistry(model)
    key_map = {"a": "b"}
    registry.add(path, "x", key_map=key_map, allow_base_mismatch=True)
    assert registry.add(path, "y", key_map=dict(key_map), allow_base_mismatch=True) == "y"
    assert len(opened) == 1
    for source in (path, delta):
        with pytest.raises(ValueError, match="under another key_map"):
            registry.add(source, "z", allow_base_mismatch=True)
        with pytest.raises(sf.SFTError, match="another base model"):
            registry.add(source, "z", key_map=key_map)
    assert registry.ids == ("x", "y")
    with torch.no_grad():
        model["b"].fill_(1)
    registry.add(path, "z", key_map=key_map)
    reads = len(opened)
    registry.add(path, "zz", key_map=key_map)
    assert len(opened) == reads
    with pytest.raises(TypeError, match="an id must be a string, got 5"):
        registry.add(delta, 5)


def test_a_late_prefetch_does_not_stand_in_for_another(tmp_path, monkeypatch):
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(5)) for name in "ab"})
    entry = Support.from_indices(Layout.of({"a": (5,)}), {"a": [3]})
    path = sf.SparseDelta(entry, torch.ones(1)).save(tmp_path / "a.safetensors")
    registry = DeltaRegistry(model, host_budget_bytes=0)
    registry.add(path, "x")
    registry._host.budget = None
    reading, go, real = threading.Event(), threading.Event(), sf.SparseDelta.load

    def slow(path):
        delta = real(path)
        if not reading.is_set():
            reading.set()
            go.wait(10)
        return delta

    monkeypatch.setattr(registry_module.SparseDelta, "load", slow)
    (done,) = registry.prefetch("x")
    assert reading.wait(10)
    registry.remove("x")
    registry.add(path, "x", key_map={"a": "b"})
    go.set()
    done.result(10)
    registry.activate("x")
    assert model["a"].tolist() == [0] * 5
    assert model["b"].tolist() == [0, 0, 0, 1, 0]


def test_a_loop_over_groups_ends_in_any_thread():
    model = Model()
    before = values(model)
    registry = DeltaRegistry(model)
    registry.add(made(model, 1), "a")
    for _ in range(2):
        groups = registry.grouped(["a"])
        next(groups)
        thread = threading.Thread(target=groups.close, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        pristine(model, before)
    # The turn is free again, for this thread and for others.
    thread = threading.Thread(target=registry.activate, args=("a",), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    registry.deactivate()


def test_pairs_and_names():
    model = Model()
    registry = DeltaRegistry(model)
    registry.add(made(model, 1), "swahili")
    half = registry.activate(("swahili", 0.5))
    for chosen in (("swahili", np.float32(0.5)), [("swahili", np.float64(0.5))]):
        assert registry.activate(chosen) is half
    with pytest.raises(TypeError, match="an id or a pair"):
        registry.activate([("swahili", "hausa")])
    with pytest.raises(KeyError, match="no delta 'swahli' among the 1 ids; the nearest is 'swah"):
        registry.activate("swahli")


def test_an_entry_takes_six_bytes(tmp_path):
    """60 SFTs of 100,000 entries each, over 64 tiles, from files and as objects: 2 bytes of idx, 4
    of val (2 in bf16), and 8 a tile."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(64, 65536), requires_grad=False)
    layout = Layout.of({"w": (64, 65536)})
    random = np.random.default_rng(0)
    per_tile = 100_000 // 64
    n = per_tile * 64
    pool = [np.sort(random.permutation(65536)[:per_tile]).astype(np.uint16) for _ in range(16)]
    ptr = torch.arange(0, n + 1, per_tile)

    def delta(seed):
        idx = np.concatenate([pool[(seed + t) % 16] for t in range(64)])
        val = torch.full((n,), 1.0 + seed)
        return sf.SparseDelta(Support(layout, torch.from_numpy(idx), ptr, check=False), val)

    for form, most in ((torch.float32, 6.1), (torch.bfloat16, 4.1)):
        registry = DeltaRegistry(model)
        for seed in range(60):
            delta(seed).astype(form).save(tmp_path / f"{seed}.safetensors")
        registry.add(tmp_path / "0.safetensors")  # whatever the first one loads
        gc.collect()
        start = resident()
        for seed in range(1, 60):
            registry.add(tmp_path / f"{seed}.safetensors")
        gc.collect()
        assert len(registry) == 60
        entries = registry._host.nbytes / 60 / n
        assert entries <= most
        grown = (resident() - start) / 59 / n
        assert grown <= most + 0.6, "pages are whole: 4 KiB for each array, and the allocator's"


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
