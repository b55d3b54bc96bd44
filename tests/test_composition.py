"""compose on models: the same bits in any order, and every bit back whatever happens."""

import copy
import gc
import itertools
import sys
import weakref

import numpy as np
import pytest
import torch
from composed import HEADS, Model, made, pristine, values, wanted
from oracles import DTYPES, assert_bits
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import sparse_ft as sf
from sparse_ft.compose import active
from sparse_ft.tiles import Layout

compose_module = sys.modules["sparse_ft.compose"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, -2.0]], ids=str)
def test_the_sum_is_rounded_once_whatever_the_order(dtype, weights):
    model = Model(dtype)
    before = values(model)
    deltas = [made(model, seed) for seed in range(3)]
    alphas = weights or [1.0] * 3
    expected = wanted(before, deltas, alphas, deltas[0].layout.names)
    addresses = [p.data_ptr() for p in model.parameters()]
    for order in itertools.permutations(range(3)):
        with sf.compose(
            model, [deltas[j] for j in order], [alphas[j] for j in order] if weights else None
        ) as composition:
            for n, w in expected.items():
                assert_bits(model.state_dict()[n], w, n)
            for n in (*HEADS, "steps"):
                assert_bits(model.state_dict()[n], before[n], n)
            assert model.out.weight is model.emb.weight
            assert [p.data_ptr() for p in model.parameters()] == addresses
            assert active(model) is composition
            assert "on)" in repr(composition)
        pristine(model, before)
        assert active(model) is None
        assert "taken off)" in repr(composition)
    union = set().union(*({(n, int(i)) for n, flat in d.support for i in flat} for d in deltas))
    assert composition.changed <= len(union)
    same = sum(int((expected[n] == before[n]).sum()) for n in expected)
    total = sum(t.numel() for t in expected.values())
    assert composition.changed - composition.swallowed == total - same
    assert composition.swallowed_share == composition.swallowed / composition.changed


def test_one_delta_and_none():
    model = Model()
    before = values(model)
    delta = made(model, 1)
    with sf.compose(model, delta):
        one = values(model)
    with sf.compose(model, [delta]):
        pristine(model, one)
    with sf.compose(model, []) as nothing:
        pristine(model, before)
    assert nothing.changed == 0
    assert nothing.swallowed_share == 0.0
    with sf.compose(model, [delta, delta]):
        twice = values(model)
    with sf.compose(model, delta, [2.0]):
        pristine(model, twice)
    with sf.compose(model, [delta, -delta]):
        pristine(model, before)
    with sf.compose(model, delta, [0.0]) as none:
        pristine(model, before)
    assert none.changed == 0


def test_heads_come_only_on_request():
    model = Model()
    before = values(model)
    task, language = made(model, 1), made(model, 2)
    with sf.compose(model, [language, task], heads=task):
        for n in HEADS:
            assert_bits(model.state_dict()[n], task.heads[n], n)
    pristine(model, before)
    with sf.compose(model, [language, task], heads=[language]):
        assert_bits(model.head.bias.detach(), language.heads["head.bias"])
    with sf.compose(model, [language, task]):
        assert_bits(model.head.bias.detach(), before["head.bias"])
    pristine(model, before)
    for heads, message in [
        (made(model, 3), "not among the deltas"),
        ([task, language], r"two deltas of heads bring the head 'head\.bias'"),
    ]:
        with pytest.raises(ValueError, match=message):
            sf.compose(model, [language, task], heads=heads)
    # A model without that head takes the entries, and refuses the head.
    model.head = nn.Linear(30, 4)
    with sf.compose(model, task):
        pass
    before = values(model)
    with pytest.raises(sf.SFTError, match=r"head\.bias"):
        sf.compose(model, task, heads=task)
    pristine(model, before)
    assert active(model) is None


def test_everything_comes_back_after_an_exception():
    model = Model()
    before = values(model)
    task = made(model, 1)

    def fail():
        with sf.compose(model, task, heads=task):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    pristine(model, before)
    # Weights that were changed in the block keep the change where the composition has no entry.
    with sf.compose(model, task), torch.no_grad():
        model.steps.add_(1)
    assert_bits(model.steps, before["steps"] + 1)


@pytest.mark.parametrize("when", ["before the call", "after the call"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("compat", [None, "sequential"])
def test_a_failure_half_way_leaves_no_trace(monkeypatch, when, error, compat):
    model = Model()
    model.lin.bfloat16()
    before = values(model)
    deltas = [made(model, 1), made(model, 2)]
    real, calls = compose_module.compose_, []

    def breaks(*args):
        calls.append(len(args[0]))
        if len(calls) == 2:
            if when == "after the call":
                real(*args)
            raise error("stop")
        return real(*args)

    monkeypatch.setattr(compose_module, "compose_", breaks)
    with pytest.raises(error, match="stop"):
        sf.compose(model, deltas, heads=deltas[0], compat=compat)
    assert len(calls) == 2
    pristine(model, before)
    assert active(model) is None
    monkeypatch.undo()
    with sf.compose(model, deltas):
        pass
    pristine(model, before)


def test_a_model_carries_one_composition():
    model, other = Model(), Model()
    before = values(model)
    delta = made(model, 1)
    first = sf.compose(model, delta)
    composed = values(model)
    with pytest.raises(RuntimeError, match=r"Composition\(1 deltas.* is on this model already"):
        sf.compose(model, delta)
    pristine(model, composed)
    with sf.compose(other, delta):
        pristine(other, composed)
    pristine(model, composed)
    first.restore()
    pristine(model, before)
    second = sf.compose(model, delta, [2.0])
    first.restore()  # taken off already: does nothing to the second
    assert active(model) is second
    second.restore()
    second.restore()
    pristine(model, before)
    # A composition does not keep its model alive.
    third = sf.compose(model, delta)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    third.restore()
    assert "taken off" in repr(third)


def test_what_does_not_fit_is_refused_and_the_model_untouched():
    model = Model()
    before = values(model)
    good = made(model, 1)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.lin.weight += 1
    foreign = made(tuned, 2)
    replace = sf.SparseDelta(good.support, good.val, meta={"kind": "replace"})
    cases = [
        (ValueError, ([good], [1.0, 2.0]), {}, "2 weights for 1 deltas"),
        (
            ValueError,
            ([good], [float("nan")]),
            {},
            r"weights\[0\] must be a finite fp32 number, got nan",
        ),
        (ValueError, ([good, good], [1, float("inf")]), {}, r"weights\[1\] must be a finite"),
        (ValueError, ([good], [1e300]), {}, r"weights\[0\] .*fp32"),
        (ValueError, ([good],), {"compat": "old"}, "None or \"sequential\", got 'old'"),
        (TypeError, ([good, "delta"],), {}, r"deltas\[1\] must be a SparseDelta, got str"),
        (sf.SFTError, ([good, foreign],), {}, "another base model"),
        (sf.SFTError, ([good, replace],), {}, "'replace'"),
    ]
    for kind, args, more, message in cases:
        with pytest.raises(kind, match=message):
            sf.compose(model, *args, **more)
        pristine(model, before)
        assert active(model) is None
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        sf.compose(before, good)
    with sf.compose(model, foreign, allow_base_mismatch=True) as composition:
        assert composition.changed
    pristine(model, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequential_adds_one_after_the_other(dtype):
    model = Model(dtype)
    before = values(model)
    deltas = [made(model, seed, 0.5) for seed in range(3)]
    alphas = [1.0, -0.5, 3.0]
    with sf.compose(model, deltas, alphas, compat="sequential"):
        for n in deltas[0].layout.names:
            flat = before[n].reshape(-1).clone()
            for d, alpha in zip(deltas, alphas, strict=True):
                at = d.indices(n)
                step = d.values(n).float() * alpha
                moved = (flat[at].float() + step).to(flat.dtype)
                flat[at] = torch.where(step == 0, flat[at], moved)
            assert_bits(model.state_dict()[n].reshape(-1), flat, n)
        if dtype is torch.bfloat16:
            sequential = values(model)
    pristine(model, before)
    if dtype is torch.bfloat16:
        with sf.compose(model, deltas, alphas):
            assert any(not torch.equal(t, sequential[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_hundred_swaps_end_where_they_began(dtype):
    model = Model(dtype)
    with torch.no_grad():
        model.emb.weight[0, :3] = torch.tensor([float("inf"), -0.0, 6e-8]).to(dtype)
    before = values(model)
    start = Model(dtype)
    deltas = [made(start, seed, 0.01, size) for seed, size in enumerate((1e-4, 1.0, 1e4))]
    random = np.random.default_rng(0)
    for i in range(200):
        chosen = [d for d in deltas if random.random() < 0.6]
        alphas = random.normal(size=len(chosen)).tolist()
        compat = "sequential" if i % 3 == 0 else None
        with sf.compose(model, chosen, alphas, compat=compat, allow_base_mismatch=True):
            pass
    pristine(model, before)


def test_a_delta_made_under_another_name_of_a_tied_parameter():
    model = Model()
    before = values(model)
    delta = made(model, 1)
    assert delta.meta["aliases"] == {"emb.weight": ["out.weight"]}
    with sf.compose(model, delta):
        composed = values(model)

    class Renamed(nn.Module):
        """The same model; the tied matrix goes by its other name, and stands elsewhere in order."""

        def __init__(self):
            super().__init__()
            inner = Model()
            self.out, self.lin, self.head = inner.out, inner.lin, inner.head
            self.scale, self.none = inner.scale, inner.none

    other = Renamed()
    with sf.compose(other, delta):
        assert_bits(other.out.weight.detach(), composed["emb.weight"])
        assert_bits(other.lin.weight.detach(), composed["lin.weight"])
    assert_bits(other.out.weight.detach(), before["emb.weight"])
    # Both names at once: one delta for each, of the same parameter.
    entries = sf.Support.from_indices(Layout.of({"out.weight": (700, 100)}), {"out.weight": [0]})
    second = sf.SparseDelta(entries, torch.ones(1))
    with sf.compose(model, [delta, second]):
        expected = composed["emb.weight"].clone()
        with sf.compose(Model(), delta):
            pass
        total = delta.dense("emb.weight").clone()
        total[0, 0] += 1.0
        expected[0, 0] = before["emb.weight"][0, 0] + total[0, 0]
        assert_bits(model.emb.weight.detach(), expected)
    pristine(model, before)


def test_mixed_data_types_and_values_of_other_types():
    model = Model()
    model.lin.bfloat16()
    model.head.half()
    before = values(model)
    deltas = [made(model, 1), made(model, 2).astype(torch.bfloat16)]
    order = sorted(deltas, key=lambda d: d.content_id)
    with sf.compose(model, deltas, heads=deltas[0]):
        for n in deltas[0].layout.names:
            acc = np.zeros(before[n].numel(), np.float32)
            for d in order:
                acc[d.indices(n).numpy()] += d.values(n).float().numpy()
            after = (before[n].reshape(-1).float() + torch.from_numpy(acc)).to(before[n].dtype)
            after = torch.where(torch.from_numpy(acc != 0), after, before[n].reshape(-1))
            assert_bits(model.state_dict()[n].reshape(-1), after, n)
    pristine(model, before)


def test_pristine_gives_what_lies_beneath():
    model = Model()
    model.lin.bfloat16()
    before = values(model)
    deltas = [made(model, 1), made(model, 2)]
    for compat in (None, "sequential"):
        with sf.compose(model, deltas, heads=deltas[0], compat=compat) as composition:
            composed = {n: p.detach().clone() for n, p in model.named_parameters()}
            found = composition.pristine(composed)
            assert found.keys() == composed.keys()
            for n, value in found.items():
                assert_bits(value, before[n], n)
            for n, value in model.named_parameters():
                assert_bits(value.detach(), composed[n], n)
            part = composition.pristine({"lin.bias": composed["lin.bias"]})
            assert_bits(part["lin.bias"], before["lin.bias"])
            assert len(part) == 1
            with pytest.raises(KeyError, match="no parameter 'x'"):
                composition.pristine({"x": before["lin.bias"]})


def test_a_compiled_model_sees_the_change_and_the_restoration():
    model = Model()
    delta = made(model, 1)
    x = torch.arange(10).reshape(2, 5)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        assert torch.equal(plain, model(x))
        with sf.compose(model, delta, heads=delta):
            assert torch.equal(compiled(x), model(x))
            assert not torch.equal(compiled(x), plain)
        assert torch.equal(compiled(x), plain)


def test_a_compiled_model_is_composed_without_a_key_map_and_compiles_once():
    model = Model()
    delta = made(model, 1)
    before = values(model)
    x = torch.arange(10).reshape(2, 5)
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting)
    with torch.no_grad():
        plain = compiled(x)
        addresses = [p.data_ptr() for p in model.parameters()]
        with sf.compose(compiled, delta, heads=delta):
            assert torch.equal(compiled(x), model(x))
            assert not torch.equal(compiled(x), plain)
            assert [p.data_ptr() for p in model.parameters()] == addresses
        assert torch.equal(compiled(x), plain)
    assert len(compilations) == 1
    pristine(model, before)


def test_wrappers_need_no_key_map():
    delta = made(Model(), 1)
    with sf.compose(model := Model(), delta, heads=delta):
        expected = values(model)

    class Outer(nn.Module):
        """A wrapper inside, as a model that is compiled in part has it."""

        def __init__(self):
            super().__init__()
            inner = Model()
            inner.lin = torch.compile(inner.lin, backend="eager")
            inner.emb = nn.DataParallel(inner.emb)
            for name, child in inner.named_children():
                self.add_module(name, child)
            self.scale, self.none = inner.scale, inner.none

    wrapped = [nn.DataParallel(Model()), torch.compile(nn.DataParallel(Model())), Outer()]
    for outer in wrapped:
        before = values(outer)
        with sf.compose(outer, delta, heads=delta):
            named = dict(outer.named_parameters(remove_duplicate=False))
            for name, value in named.items():
                own = name.replace("_orig_mod.", "").replace("module.", "")
                assert_bits(value.detach(), expected[own], name)
        pristine(outer, before)


@pytest.mark.parametrize(
    "key_map",
    [
        {"": "base."},
        {"emb.": "base.emb.", "lin.": "base.lin.", "out.": "base.out.", "head.": "base.head."}
        | {"scale": "base.scale", "none": "base.none"},
        lambda name: f"base.{name}",
    ],
    ids=["prefix", "prefixes and names", "callable"],
)
def test_names_are_mapped(key_map):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = Model()

    delta = made(Model(), 1)
    with sf.compose(model := Model(), delta, heads=delta):
        expected = values(model)
    outer = Outer()
    before = values(outer)
    with pytest.raises(sf.SFTError, match=r"no parameter 'emb\.weight'.*pass a key_map"):
        sf.compose(outer, delta)
    with sf.compose(outer, delta, heads=delta, key_map=key_map):
        pristine(outer.base, expected)
    pristine(outer, before)
    layout = Layout.of({"a": (), "b": ()})
    two = sf.SparseDelta(sf.Support.from_indices(layout, {"a": [0], "b": [0]}), torch.ones(2))
    with pytest.raises(sf.SFTError, match="'a' and 'b' are one tensor in this model"):
        sf.compose(outer, two, key_map={"a": "base.scale", "b": "base.scale"})


def test_what_the_model_lacks_may_be_left_out():
    delta = made(Model(), 1)
    model = Model()
    model.lin = nn.Identity()
    before = values(model)
    lost = len(delta.values("lin.weight")) + len(delta.values("lin.bias"))
    with pytest.raises(sf.SFTError, match=r"no parameter 'lin\.bias'"):
        sf.compose(model, delta)
    # The digest is over all entries: without some of them it says nothing.
    with pytest.raises(sf.SFTError, match=rf"hold {lost:,} of .* cannot be recognised"):
        sf.compose(model, delta, unused="ignore")
    pristine(model, before)
    message = rf"lacks 2 of the SFT's \d tensors \('lin\.bias', 'lin\.weight'\); {lost:,} of its"
    with pytest.warns(UserWarning, match=message):
        composition = sf.compose(model, delta, unused="ignore", allow_base_mismatch=True)
    whole = Model()
    with sf.compose(whole, delta):
        expected = values(whole)
    for name, value in model.state_dict().items():
        assert_bits(value, expected[name], name)
    composition.restore()
    pristine(model, before)
    # A tensor without entries is no loss, and the digest still tells.
    entries = sf.Support.from_indices(Layout.of({"lin.bias": (30,), "scale": ()}), {"scale": [0]})
    pieces = {"scale": torch.tensor([1.5])}
    part = sf.SparseDelta.from_compact(entries, torch.ones(1), base=pieces)
    with pytest.warns(UserWarning, match="0 of its 1 entries"):
        composition = sf.compose(model, part, unused="ignore")
    assert model.scale.item() == 2.5
    composition.restore()
    with torch.no_grad():
        model.scale.add_(1)
    with pytest.raises(sf.SFTError, match="another base model"):
        sf.compose(model, part, unused="ignore")
    with pytest.raises(ValueError, match='"error" or "ignore", got \'skip\''):
        sf.compose(model, part, unused="skip")


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, nn.Sequential, lambda m: torch.compile(m, backend="eager")],
    ids=["DataParallel", "Sequential", "compile"],
)
def test_a_module_that_only_wraps_may_go(wrap):
    model = Model()
    before = values(model)
    delta = made(model, 1)
    key_map = {"": "0."} if wrap is nn.Sequential else None
    with sf.compose(wrap(model), delta, heads=delta, key_map=key_map) as composition:
        gc.collect()
        assert active(model) is composition
        with pytest.raises(RuntimeError, match="is on this model already"):
            sf.compose(model, delta)
        assert not torch.equal(model.emb.weight, before["emb.weight"])
    pristine(model, before)
    assert active(model) is None


def test_what_is_on_a_model_does_not_keep_it():
    model = Model()
    delta = made(model, 1)
    sf.compose(model, delta, heads=delta)
    gone = weakref.ref(model.emb.weight)
    registry = sf.DeltaRegistry(other := Model())
    registry.add(made(other, 1), "a")
    registry.activate("a", "a")
    other_gone = weakref.ref(other.head.weight)
    del model, other, registry
    gc.collect()
    assert gone() is None
    assert other_gone() is None


@pytest.mark.parametrize("compat", [None, "sequential"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_that_was_cast_becomes_the_base_that_was_cast(dtype, to, compat):
    model = Model(dtype)
    before = copy.deepcopy(model).to(to).state_dict()
    deltas = [made(model, 1), made(model, 2)]
    state = model.state_dict()
    original = values(model)
    with sf.compose(model, deltas, heads=deltas[0], compat=compat):
        model.to(to)
        model.emb.weight.data = model.emb.weight.data.t().contiguous().t()
    pristine(model, before)
    assert active(model) is None
    # Whoever holds the memory from before has the base, too.
    for name, value in state.items():
        assert_bits(value, original[name], name)


def test_a_parameter_that_was_replaced_is_named():
    model = Model()
    before = values(model)
    delta = made(model, 1)
    new = nn.Linear(100, 30)

    def replace(error=None):
        with sf.compose(model, delta, heads=delta):
            model.lin = new
            if error is not None:
                raise error

    with pytest.raises(sf.SFTError, match=r"replaced parameters .*: 'lin\.weight', 'lin\.bias'\."):
        replace()
    assert active(model) is None
    before |= {f"lin.{n}": p.detach().clone() for n, p in new.named_parameters()}
    pristine(model, before)
    delta, new = made(model, 1), nn.Linear(100, 30)
    with (
        pytest.warns(UserWarning, match="replaced parameters"),
        pytest.raises(ZeroDivisionError),
    ):
        replace(ZeroDivisionError())
    # One without entries is none of its business.
    entries = sf.Support.from_indices(Layout.of({"lin.bias": (30,), "scale": ()}), {"scale": [0]})
    with sf.compose(model, sf.SparseDelta(entries, torch.ones(1))):
        model.lin = nn.Linear(100, 30)
    composition = sf.compose(model, delta := made(model, 1))
    model.load_state_dict(before, assign=True)
    with pytest.raises(sf.SFTError, match=r"'scale', 'emb\.weight', 'lin\.weight', …"):
        composition.restore()
    composition.restore()
    pristine(model, before)


def test_memory_that_two_parameters_share_is_written_once():
    model = nn.Module()
    shared = torch.randn(4, 8)
    model.a, model.b = nn.Parameter(shared), nn.Parameter(shared[1:])
    before = values(model)
    deltas = []
    for name in "ab":
        entries = sf.Support.from_indices(Layout.of({name: model.get_parameter(name)}), {name: [9]})
        heads = {} if name == "a" else {"a": torch.zeros(4, 8)}
        deltas.append(sf.SparseDelta(entries, torch.ones(1), heads))
    registry = sf.DeltaRegistry(model)
    for name, delta in zip("ab", deltas, strict=True):
        registry.add(delta, name)
    for chosen in ([0, 1], [1, 0]):
        with pytest.raises(sf.SFTError, match=r"'a' and 'b' are one tensor .* two in the SFTs"):
            sf.compose(model, [deltas[j] for j in chosen])
        with pytest.raises(sf.SFTError, match=r"'a' and 'b' are one tensor .* two in the SFTs"):
            registry.activate(["ab"[j] for j in chosen])
        pristine(model, before)
    with pytest.raises(sf.SFTError, match="'a' and 'b'"):
        sf.compose(model, deltas[1], heads=deltas[1])
    for name, delta in zip("ab", deltas, strict=True):
        with sf.compose(model, delta):
            pass
        with registry.active(name):
            pass
        pristine(model, before)


def test_parameters_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = Model()
    before = values(model)
    delta = made(Model(), 1)
    with pytest.raises(sf.SFTError, match=r"'emb\.weight' was made under torch\.inference_mode"):
        sf.compose(model, delta)
    pristine(model, before)
    # An ordinary model may be composed there, and restored anywhere.
    model = Model()
    with torch.inference_mode():
        composition = sf.compose(model, delta, heads=delta)
    composition.restore()
    pristine(model, before)


@pytest.mark.parametrize("broken", ["head.weight", "a group"])
def test_a_failure_to_write_back_stops_nothing_else(monkeypatch, broken):
    model = Model()
    model.lin.bfloat16()
    before = values(model)
    delta = made(model, 1)
    composition = sf.compose(model, delta, heads=delta)
    composed = values(model)
    kind = compose_module.Head if broken == "head.weight" else compose_module.Group
    real, failed = kind.take_off, []

    def breaks(part, moved):
        names = sorted(part.names)
        if not failed and (kind is compose_module.Group or broken in names):
            failed.extend(names)
            raise MemoryError("stop")
        real(part, moved)

    monkeypatch.setattr(kind, "take_off", breaks)
    with pytest.raises(MemoryError, match="stop"):
        composition.restore()
    for name, value in model.state_dict().items():
        own = "emb.weight" if name == "out.weight" else name
        assert_bits(value, (composed if own in failed else before)[name], name)
    assert active(model) is composition
    composition.restore()
    pristine(model, before)
    # The same in a rollback: the model is not said to be the base.
    failed.clear()
    monkeypatch.setattr(kind, "put_on", lambda *_: (_ for _ in ()).throw(OSError("first")))
    monkeypatch.setattr(kind, "take_off", lambda *_: (_ for _ in ()).throw(OSError("second")))
    with pytest.raises(RuntimeError, match=r"written back \(second\); .* not the base model"):
        sf.compose(model, delta, heads=delta)
    assert active(model) is not None


def test_what_is_on_cannot_be_put_on():
    model = Model()
    before = values(model)
    composition = sf.compose(model, made(model, 1))
    with pytest.raises(RuntimeError, match="is on this model already"):
        composition._put_on()
    composition.restore()
    pristine(model, before)


def test_heads_are_told_apart_by_the_parameter():
    model = Model()
    before = values(model)
    entries = sf.Support.from_indices(Layout.of({"scale": ()}), {"scale": [0]})
    heads = {"emb.weight": torch.zeros(700, 100), "out.weight": torch.ones(700, 100)}
    tasks = [sf.SparseDelta(entries, torch.ones(1), {n: h}) for n, h in heads.items()]
    for order in (tasks, tasks[::-1]):
        with pytest.raises(ValueError, match=r"two deltas of heads bring the head 'emb\.weight'"):
            sf.compose(model, tasks, heads=order)
        pristine(model, before)
    with sf.compose(model, tasks, heads=tasks[1]):
        assert bool((model.emb.weight == 1).all())
    pristine(model, before)


def test_a_head_too_large_for_the_model_is_refused():
    model = Model(torch.float16)
    before = values(model)
    entries = sf.Support.from_indices(Layout.of({"scale": ()}), {"scale": [0]})
    large = sf.SparseDelta(entries, torch.ones(1), {"head.bias": torch.full((3,), 1e6)})
    message = r"'head\.bias' holds values up to 1e\+06, too large for the model's torch\.float16"
    with pytest.raises(sf.SFTError, match=message):
        sf.compose(model, large, heads=large)
    registry = sf.DeltaRegistry(model)
    registry.add(large, "large")
    with pytest.raises(sf.SFTError, match=message):
        registry.activate("large", "large")
    pristine(model, before)
    for put_on in (lambda: sf.compose(model, large), lambda: registry.activate("large")):
        with put_on():
            assert model.scale.item() == 2.5
    with sf.compose(other := Model(torch.bfloat16), large, heads=large):
        assert_bits(other.head.bias.detach(), torch.full((3,), 1e6, dtype=torch.bfloat16))


def test_sequential_counts_each_delta():
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(8))})
    entries = sf.Support.from_indices(Layout.of({"w": (8,)}), {"w": [0, 1]})
    delta = sf.SparseDelta(entries, torch.tensor([1.0, 1e-9]))
    with sf.compose(model, [delta, delta], compat="sequential") as composition:
        assert (composition.changed, composition.swallowed) == (4, 2)
    with sf.compose(model, [delta, delta]) as composition:
        assert (composition.changed, composition.swallowed) == (2, 1)


def test_messages_say_what_to_pass(tmp_path):
    model = Model()
    path = made(model, 1).save(tmp_path)
    for source in (path, tmp_path):
        with pytest.raises(TypeError, match=r"pass SparseDelta\.load of it"):
            sf.compose(model, source)
    with pytest.raises(TypeError, match=r"deltas\[0\] .* got str; SparseDelta\.load reads"):
        sf.compose(model, [path])
    with pytest.raises(TypeError, match=r"a list of one number for each delta, got 0\.5"):
        sf.compose(model, sf.SparseDelta.load(path), 0.5)
    del model.lin
    with pytest.raises(sf.SFTError, match=r"no parameter 'lin\.bias'.* or unused=\"ignore\""):
        sf.compose(model, sf.SparseDelta.load(path))
