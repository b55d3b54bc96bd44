"""SparseDelta: its arithmetic, how it is made, and how it finds its tensors in a model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sparse_ft.delta import SFTError, SparseDelta
from sparse_ft.tiles import Layout, Support
from sparse_ft_kernels import digest


class Model(nn.Module):
    """An embedding of two tiles, tied to its output; tensors of other shapes; and a head."""

    def __init__(self, tied: bool = True, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.emb = nn.Embedding(700, 100)
        self.lin = nn.Linear(100, 100)
        self.out = nn.Linear(100, 700, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.head = nn.Linear(100, 3)
        self.register_buffer("steps", torch.tensor([1.0, 2.0]))
        self.register_buffer("ids", torch.arange(4))
        if tied:
            self.out.weight = self.emb.weight


HEADS = ("head.weight", "head.bias")


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@torch.no_grad()
def tune(model: nn.Module, share: float = 0.05, seed: int = 1) -> nn.Module:
    tuned = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    for p in tuned.parameters():
        moved = torch.rand(p.shape, generator=g) < share
        p.add_((torch.randn(p.shape, generator=g) * moved).to(p.dtype))
    tuned.scale.add_(1)
    return tuned


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def delta(model) -> SparseDelta:
    return SparseDelta.between(model, tune(model), heads=HEADS, role="task", task="ner")


# --- between ------------------------------------------------------------------------------------


def test_between_takes_every_entry_that_differs(model):
    tuned = tune(model)
    delta = SparseDelta.between(model, tuned, heads=HEADS)
    before, after = values_of(model), values_of(tuned)
    assert delta.layout.names == ("emb.weight", "lin.bias", "lin.weight", "none", "scale")
    for name in delta.layout.names:
        moved = (before[name] != after[name]).reshape(-1).nonzero().reshape(-1)
        assert torch.equal(delta.indices(name), moved), name
        wanted = after[name] - before[name]
        assert torch.equal(delta.dense(name), wanted), name
        assert torch.equal(delta.values(name), wanted.reshape(-1)[moved]), name
    assert set(delta.heads) == set(HEADS)
    for name in HEADS:
        assert torch.equal(delta.heads[name], after[name])
    assert delta.meta["aliases"] == {"emb.weight": ["out.weight"]}
    assert set(delta.meta["dtypes"].values()) == {"F32"}


def test_between_at_a_support(model):
    tuned = tune(model)
    layout = Layout.of({"lin.weight": (100, 100), "emb.weight": (700, 100)})
    support = Support.from_indices(layout, {"lin.weight": [0, 5, 9999], "emb.weight": [0, 69999]})
    delta = SparseDelta.between(model, tuned, support)
    assert delta.support == support
    wanted = values_of(tuned)["lin.weight"] - values_of(model)["lin.weight"]
    assert torch.equal(delta.values("lin.weight"), wanted.reshape(-1)[[0, 5, 9999]])
    # Entries that did not move stay, as zeros, unless a cut-off is given.
    same = SparseDelta.between(model, model, support)
    assert same.nnz == 5
    assert not same.val.any()
    assert SparseDelta.between(model, model, support, eps=1e-7).nnz == 0


@pytest.mark.parametrize("with_support", [False, True])
def test_between_drops_entries_up_to_eps(with_support):
    base = {"a": torch.zeros(70000), "b": torch.zeros(3)}
    tuned = copy.deepcopy(base)
    tuned["a"][[1, 65535, 65536, 69999]] = torch.tensor([1e-7, -1e-7, 2e-7, -1.0])
    tuned["b"][1] = 5e-8
    support = Support.full(Layout.of(base)) if with_support else None
    delta = SparseDelta.between(base, tuned, support, eps=1e-7)
    assert delta.indices("a").tolist() == [65536, 69999]
    assert delta.support.counts() == {"a": 2, "b": 0}
    assert torch.equal(delta.dense("a")[[65536, 69999]], tuned["a"][[65536, 69999]])
    # The digest is that of the entries that stayed.
    again = SparseDelta.between(base, tuned, delta.support)
    assert again.meta["base"] == delta.meta["base"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_between_subtracts_in_fp32(dtype):
    torch.manual_seed(0)
    base = {"w": torch.randn(300, 300).to(dtype)}
    tuned = {"w": (base["w"].float() + 0.01 * torch.randn(300, 300)).to(dtype)}
    delta = SparseDelta.between(base, tuned)
    assert delta.val.dtype == torch.float32
    assert torch.equal(delta.dense("w"), tuned["w"].float() - base["w"].float())
    assert (
        delta.meta["dtypes"]["w"]
        == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[
            str(dtype).removeprefix("torch.")
        ]
    )


def test_between_state_dicts(model):
    tuned = tune(model)
    want = SparseDelta.between(model, tuned, heads=HEADS)
    # Integer buffers that agree are no hindrance; a tensor under two names is compared once.
    base, after = (dict(m.state_dict(keep_vars=True)) for m in (model, tuned))
    for tensors in (base, after):
        del tensors["steps"]
    got = SparseDelta.between(base, after, heads=HEADS)
    assert got == want
    assert got.content_id == want.content_id


def test_between_names_a_tied_tensor_as_the_support_does(model):
    layout = Layout.of({"out.weight": (700, 100)})
    delta = SparseDelta.between(
        model, tune(model), Support.from_indices(layout, {"out.weight": [7]})
    )
    assert delta.meta["aliases"] == {"out.weight": ["emb.weight"]}
    assert delta.bind(model).tensors[0] is model.emb.weight
    both = Layout.of({"out.weight": (700, 100), "emb.weight": (700, 100)})
    with pytest.raises(SFTError, match=r"'emb.weight' and 'out.weight' are one tensor in tuned"):
        SparseDelta.between(model, tune(model), Support.full(both))


def test_between_reads_any_strides():
    base = {"w": torch.randn(40, 30).T}
    tuned = {"w": base["w"] + 1}
    delta = SparseDelta.between(base, tuned)
    assert delta.nnz == 1200
    assert torch.equal(delta.dense("w"), tuned["w"] - base["w"])


def test_between_across_chunks(monkeypatch):
    monkeypatch.setattr("sparse_ft.delta._CHUNK", 1000)
    base = {"w": torch.randn(70001)}
    tuned = {"w": torch.where(torch.rand(70001) < 0.1, torch.randn(70001), base["w"])}
    delta = SparseDelta.between(base, tuned)
    assert torch.equal(delta.dense("w"), tuned["w"] - base["w"])
    sums = digest([base["w"]], delta.support.idx, delta.support.ptr).tolist()
    assert int(delta.meta["base"]["digest_f32"], 16) == sums[0] % 2**64


def test_between_nothing(model):
    delta = SparseDelta.between(model, model)
    assert len(delta) == 0
    assert list(delta) == []
    assert len(delta.bind(model).tensors) == 7
    assert SparseDelta.between({}, {}).nnz == 0


def error_cases():
    w = torch.ones(4)
    full = Support.full(Layout.of({"w": (4,)}))
    nan = torch.tensor([1, 1, float("nan"), 1])
    yield {"w": w}, {}, None, {}, "base has 'w', which tuned lacks"
    yield {}, {"w": w}, None, {}, "tuned has 'w', which base lacks; name it in heads="
    yield {}, {"w": w}, full, {}, "base has no tensor 'w', which the support has"
    yield {"w": w}, {}, full, {}, "tuned has no tensor 'w', which the support has"
    yield {"w": w}, {"w": w[:3]}, None, {}, r"'w' has shape \(4,\) in base, \(3,\) in tuned"
    yield {"w": w[:3]}, {"w": w[:3]}, full, {}, r"'w' has shape .*\(4,\) in support"
    yield {"w": w}, {"w": nan}, None, {}, "'w' differs by nan at flat index 2"
    yield {"w": w}, {"w": nan}, full, {}, "'w' at flat index 2 is nan"
    yield {"w": w}, {"w": w / 0}, None, {}, "'w' differs by inf at flat index 0"
    yield {"w": w * -3e38}, {"w": w * 3e38}, None, {}, "'w' differs by inf"
    yield {"w": w.double()}, {"w": w.double()}, None, {}, "base: 'w' has dtype torch.float64"
    yield {"w": w}, {"w": w.to("meta")}, None, {}, "tuned: 'w' is on the meta device"
    yield {"w": w}, {"w": w.to_sparse()}, None, {}, "tuned: 'w' has layout torch.sparse_coo"
    yield {"w": w}, {"w": w.to(torch.complex64)}, None, {}, "'w' has dtype torch.complex64"
    yield {"w": w.int()}, {"w": 2 * w.int()}, None, {}, "'w' has dtype torch.int32 and differs"
    yield {"w": w}, {"w": w}, None, {"heads": ["v"]}, "heads: tuned has no tensor 'v'"
    yield {"w": w}, {"w": w}, full, {"heads": {"w": w}}, "'w' is both among the sparse tensors"
    yield {"w": w}, {"w": w}, None, {"eps": -1.0}, "eps must be a finite number"
    yield {"w": w}, {"w": w}, None, {"eps": float("nan")}, "eps must be a finite number"
    yield {"w": w}, {"w": w}, None, {"langauge": "sw"}, "there is no field 'langauge'; there are"


@pytest.mark.parametrize(("base", "tuned", "support", "more", "message"), list(error_cases()))
def test_between_refuses(base, tuned, support, more, message):
    with pytest.raises(SFTError, match=message):
        SparseDelta.between(base, tuned, support, **more)


def test_between_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="base must be a module or a mapping"):
        SparseDelta.between([1], {})
    with pytest.raises(TypeError, match=r"tuned\['w'\] must be a tensor, got int"):
        SparseDelta.between({"w": torch.ones(1)}, {"w": 3})


# --- the constructor ----------------------------------------------------------------------------


def test_parts_must_fit():
    support = Support.from_indices(Layout.of({"v": (5,), "w": (9,)}), {"v": [1], "w": [1, 8]})
    val = torch.ones(3)
    for bad, message in [
        (torch.ones(2), "2 values for 3 selected entries"),
        (torch.ones(3, dtype=torch.float64), "val must be a contiguous vector .* torch.float64"),
        (torch.ones(3, 1), r"val must be a contiguous vector .*\(3, 1\)"),
        (torch.ones(6)[::2], "val must be a contiguous vector"),
        (torch.tensor([1, 2, float("inf")]), "'w' at flat index 8 is inf"),
    ]:
        with pytest.raises(SFTError, match=message):
            SparseDelta(support, bad)
    for heads, message in [
        ({"h": torch.ones(2, dtype=torch.int64)}, "head 'h' must be a dense tensor"),
        ({"h": torch.tensor([float("nan")])}, "head 'h' holds NaN"),
        ({"h": torch.ones(2, device="meta")}, "head 'h' is on the meta device"),
        ({"h": torch.ones(2).to_sparse()}, "head 'h' must be a dense tensor"),
        ({"w": torch.ones(2)}, "'w' is both among"),
        ({"": torch.ones(2)}, "1 to 512 printable characters"),
    ]:
        with pytest.raises(SFTError, match=message):
            SparseDelta(support, val, heads)
    for meta, message in [
        ({"kind": "x"}, "kind: must be one of diff, replace"),
        ({"recipe": {"a": torch.ones(1)}}, "recipe.a: holds a Tensor"),
        ({"recipe": {"a": float("nan")}}, "recipe.a: must be a finite number"),
        ({"recipe": {3: 1}}, "recipe: a key: must be text"),
        ({"dense_roles": {"x": "head"}}, "dense_roles: there is no head 'x'"),
        ({"aliases": {"x": ["y"]}}, "aliases: there is no sparse tensor 'x'"),
        ({"dtypes": {"w": "I8"}}, "dtypes: 'w': must be F32, BF16 or F16"),
    ]:
        with pytest.raises(SFTError, match=f"SparseDelta: .*{message}"):
            SparseDelta(support, val, meta=meta)


def test_it_is_a_value(delta):
    assert len(delta) == delta.nnz == len(delta.val)
    assert 0 < delta.density < 0.1
    said = repr(delta)
    assert said.startswith("SparseDelta(task ner ")
    assert f"{delta.nnz:,} of" in said
    assert "2 heads, float32, cpu" in said
    names = [name for name, _, _ in delta]
    assert names == [name for name in delta.layout.names if delta.support.counts()[name]]
    for name, positions, values in delta:
        assert torch.equal(delta.dense(name).reshape(-1)[positions], values)
    with pytest.raises(KeyError, match="no tensor named 'nope'"):
        delta.dense("nope")
    assert copy.deepcopy(delta) == delta
    assert delta != 3
    with pytest.raises(TypeError):
        hash(delta)


def test_equality_is_of_bits(delta):
    for change in (
        lambda d: d.val.__setitem__(0, -d.val[0]),
        lambda d: d.heads["head.bias"].add_(1),
        lambda d: d.meta.update(kind="replace"),
    ):
        other = copy.deepcopy(delta)
        assert other == delta
        change(other)
        assert other != delta
    support = Support.from_indices(Layout.of({"w": (2,)}), {"w": [0]})
    assert SparseDelta(support, torch.tensor([0.0])) != SparseDelta(support, torch.tensor([-0.0]))
    assert SparseDelta(support, torch.ones(1)) != SparseDelta(support, torch.ones(1).half())


def test_content_id_follows_the_metadata(delta):
    before = delta.content_id
    delta.meta["lang"] = "sw"
    assert delta.content_id == before
    delta.meta["kind"] = "replace"
    assert delta.content_id != before
    delta.meta["kind"] = "diff"
    assert delta.content_id == before
    assert delta.to("cpu").content_id == before


def test_astype(delta):
    small = delta.astype(torch.bfloat16)
    assert small.meta["value_loss"] == "bf16"
    assert torch.equal(small.val, delta.val.bfloat16())
    assert small.astype(torch.float32).meta["value_loss"] == "bf16"
    assert delta.astype(torch.float16).meta["value_loss"] == "f16"
    assert "value_loss" not in delta.meta
    support = delta.support
    exact = SparseDelta(support, torch.ones(support.nnz)).astype(torch.bfloat16)
    assert "value_loss" not in exact.meta
    large = SparseDelta(support, torch.full((support.nnz,), 1e5))
    with pytest.raises(
        SFTError, match=r"astype\(torch.float16\): the value of 'emb.weight' .* inf"
    ):
        large.astype(torch.float16)
    with pytest.raises(SFTError, match=r"not torch.int8"):
        delta.astype(torch.int8)


def test_negation_is_exact(delta):
    negative = -delta
    assert torch.equal(negative.val, -delta.val)
    assert not negative.heads
    assert negative.support == delta.support
    assert negative.meta["recipe"]["merged_from"] == [{"id": delta.content_id, "alpha": -1.0}]
    assert torch.equal((-negative).val, delta.val)
    delta.meta["kind"] = "replace"
    with pytest.raises(SFTError, match="has no negative"):
        _ = -delta


def test_from_compact_checks_the_base(delta):
    with pytest.raises(SFTError, match=r"no base values of 'emb.weight' for its .* entries"):
        SparseDelta.from_compact(delta.support, delta.val, base={})
    count = delta.support.counts()["emb.weight"]
    with pytest.raises(SFTError, match=f"{count - 1:,} base values of 'emb.weight'"):
        SparseDelta.from_compact(
            delta.support, delta.val, base={"emb.weight": torch.ones(count - 1)}
        )


# --- the digest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_digest_is_that_of_the_kernel(dtype):
    torch.manual_seed(0)
    base = {n: torch.randn(k).to(dtype) for n, k in (("a", 70000), ("b", 1), ("c", 0), ("d", 9))}
    tuned = {n: t + (torch.rand(t.shape) < 0.2).to(dtype) for n, t in base.items()}
    delta = SparseDelta.between(base, tuned)
    sums = digest([base[n] for n in delta.layout.names], delta.support.idx, delta.support.ptr)
    full, half = (value % 2**64 for value in sums.tolist())
    assert delta.meta["base"] == {"digest_f32": f"{full:016x}", "digest_bf16": f"{half:016x}"}


def test_no_digest_where_other_sfts_were_on_the_base(model):
    # The values that it was measured from are not those of the base model then.
    trained_on = [{"id": "ab" * 32, "alpha": 1.0}]
    delta = SparseDelta.between(
        model, tune(model), heads=HEADS, trained_on=trained_on, base={"id": "m"}
    )
    assert delta.meta["base"] == {"id": "m"}
    delta.bind(tune(model))


# --- bind ---------------------------------------------------------------------------------------


def test_bind_gives_the_parameters_in_order(model, delta):
    before = values_of(model)
    binding = delta.bind(model)
    named = dict(model.named_parameters())
    assert [id(t) for t in binding.tensors] == [id(named[n]) for n in delta.layout.names]
    assert [(n, id(p)) for n, p in binding.heads] == [(n, id(named[n])) for n in sorted(HEADS)]
    assert unchanged(model, before)


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used_in", [torch.float32, torch.bfloat16])
def test_the_right_base_in_another_precision(made_in, used_in):
    model = Model().to(made_in)
    delta = SparseDelta.between(model, tune(model), heads=HEADS)
    delta.bind(copy.deepcopy(model).to(used_in))
    # Part of it in one precision and part in the other.
    mixed = copy.deepcopy(model).to(used_in)
    mixed.lin.to(torch.float32)
    delta.bind(mixed)


def test_the_base_in_half_precision():
    model = Model().half()
    delta = SparseDelta.between(model, tune(model), heads=HEADS)
    delta.bind(copy.deepcopy(model))
    model = Model()
    delta = SparseDelta.between(model, tune(model), heads=HEADS)
    with pytest.raises(SFTError, match="float16, whose rounding hides the base model"):
        delta.bind(copy.deepcopy(model).half())
    delta.bind(copy.deepcopy(model).half(), allow_base_mismatch=True)


def test_a_wrong_base_is_refused(model, delta):
    delta.meta["base"]["id"] = "right/model"
    for wrong in (Model(seed=5), tune(model)):
        before = values_of(wrong)
        with pytest.raises(SFTError, match=r"made for the base model 'right/model': .* digest"):
            delta.bind(wrong)
        delta.bind(wrong, allow_base_mismatch=True)
        assert unchanged(wrong, before)
    # One selected entry that is one last place off is enough; one that is not selected is not.
    at = int(delta.indices("lin.weight")[0])
    free = next(i for i in range(10000) if i not in set(delta.indices("lin.weight").tolist()))
    with torch.no_grad():
        model.lin.weight.reshape(-1)[free] += 1
        delta.bind(model)
        model.lin.weight.reshape(-1)[at] *= 1.05
    with pytest.raises(SFTError, match="digest"):
        delta.bind(model)


def test_without_digests_nothing_is_compared(model):
    support = Support.from_indices(Layout.of({"lin.bias": (100,)}), {"lin.bias": [3]})
    SparseDelta(support, torch.ones(1)).bind(Model(seed=9))
    SparseDelta(support, torch.ones(1), meta={"base": {"id": "x"}}).bind(Model(seed=9))


def test_one_digest_is_enough(model, delta):
    del delta.meta["base"]["digest_bf16"]
    delta.bind(model)
    with pytest.raises(SFTError, match="digest"):
        delta.bind(copy.deepcopy(model).bfloat16())


def test_a_tied_parameter_goes_by_any_of_its_names(model, delta):
    class Other(nn.Module):
        """The same tensors; the tied one goes by its other name alone."""

        def __init__(self, m: Model) -> None:
            super().__init__()
            self.lin, self.head = m.lin, m.head
            self.scale, self.none = m.scale, m.none
            self.out = nn.Linear(100, 700, bias=False)
            self.out.weight = m.emb.weight

    binding = delta.bind(Other(model))
    assert binding.tensors[0] is model.emb.weight
    untied = Model(tied=False)
    with pytest.raises(
        SFTError, match=r"'emb.weight' and 'out.weight' are one tied parameter in the"
    ):
        delta.bind(untied)


def test_two_names_of_one_tensor_are_refused():
    untied = Model(tied=False)
    delta = SparseDelta.between(untied, tune(untied), heads=HEADS)
    delta.bind(untied)
    with pytest.raises(
        SFTError, match=r"'emb.weight' and 'out.weight' are one tensor in this model"
    ):
        delta.bind(Model(tied=True))
    overlapping = Model(tied=False)
    memory = torch.zeros(700 * 100 + 50)
    overlapping.emb.weight = nn.Parameter(memory[:70000].view(700, 100))
    overlapping.out.weight = nn.Parameter(memory[50:].view(700, 100))
    with pytest.raises(SFTError, match="are one tensor in this model"):
        delta.bind(overlapping)
    neighbours = Model(tied=False)
    memory = torch.zeros(2 * 70000)
    neighbours.emb.weight = nn.Parameter(memory[:70000].view(700, 100))
    neighbours.out.weight = nn.Parameter(memory[70000:].view(700, 100))
    delta.bind(neighbours, allow_base_mismatch=True)


class Sharded(torch.Tensor):
    """Stands for the tensor classes of sharded and of quantised models."""


def replace_lin(model: Model, weight: torch.Tensor) -> None:
    del model.lin.weight
    model.lin.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: delattr(m, "lin"), "has no parameter 'lin.bias', .* shape .100,."),
        (lambda m: replace_lin(m, torch.ones(50, 200)), r"'lin.weight' has shape \(50, 200\)"),
        (lambda m: replace_lin(m, torch.ones(100, 99)), r"shape \(100, 99\) in the model and"),
        (
            lambda m: replace_lin(m, torch.ones(200, 50)[:100]),
            r"'lin.weight' has shape \(100, 50\)",
        ),
        (
            lambda m: replace_lin(m, torch.ones(100, 100).T),
            "'lin.weight' is not contig",
        ),
        (lambda m: replace_lin(m, torch.ones(100, 100).double()), "has dtype torch.float64"),
        (lambda m: replace_lin(m, torch.ones(100, 100, dtype=torch.int32)), "dtype torch.int32"),
        (lambda m: replace_lin(m, torch.ones(100, 100, dtype=torch.uint8)), "dtype torch.uint8"),
        (lambda m: replace_lin(m, torch.ones(100, 100) * 1j), "dtype torch.complex64"),
        (lambda m: replace_lin(m, torch.ones(100, 100).to_sparse()), "torch.sparse_coo"),
        (lambda m: replace_lin(m, torch.ones(100, 100).as_subclass(Sharded)), "is a Sharded; only"),
        (lambda m: m.lin.to("meta"), "'lin.bias' is on the meta device"),
        (lambda m: setattr(m, "lin", nn.LazyLinear(100)), "'lin.bias' has no shape yet"),
    ],
)
def test_bind_refuses(model, delta, change, message):
    change(model)
    with pytest.raises(SFTError, match=f"SparseDelta.bind: .*{message}"):
        delta.bind(model)
    with pytest.raises(SFTError, match=f"SparseDelta.bind: .*{message}"):
        delta.bind(model, allow_base_mismatch=True)


@pytest.mark.filterwarnings("ignore")
def test_bind_refuses_quantised_parameters(model, delta):
    weight = torch.quantize_per_tensor(torch.ones(100, 100), 0.1, 0, torch.qint8)
    del model.lin.weight
    model.lin.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(SFTError, match=r"'lin.weight' is quantised"):
        delta.bind(model)


def test_bind_explains_missing_names(model, delta):
    wrapped = nn.Sequential()
    wrapped.add_module("emb_", model.emb)
    with pytest.raises(
        SFTError, match=r"the Sequential has no parameter 'emb.weight' .nor under 'out"
    ):
        delta.bind(wrapped)
    support = Support.from_indices(Layout.of({"steps": (2,)}), {"steps": [1]})
    with pytest.raises(SFTError, match="'steps' is a buffer of this model"):
        SparseDelta(support, torch.ones(1)).bind(model)
    support = Support.from_indices(Layout.of({"lin.weigth": (2,)}), {})
    with pytest.raises(SFTError, match=r"the nearest name is 'lin.weight'"):
        SparseDelta(support, torch.ones(0)).bind(model)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got dict"):
        delta.bind({})


def test_heads_are_looked_up_when_asked_for(model, delta):
    del model.head
    binding = delta.bind(model)  # a language SFT goes onto a model without its language-model head
    with pytest.raises(SFTError, match=r"no parameter 'head.bias', which the SFT has as a head"):
        _ = binding.heads
    model.head = nn.Linear(100, 4)
    with pytest.raises(SFTError, match=r"'head.bias' has shape \(4,\) in the model and \(3,\)"):
        _ = delta.bind(model).heads
    model.head = nn.Linear(100, 3)
    model.head.bias = model.lin.bias
    with pytest.raises(SFTError, match=r"'head.bias' has shape"):
        _ = delta.bind(model).heads


def test_a_head_that_is_a_sparse_tensor_here_is_refused(model):
    layout = Layout.of({"emb.weight": (700, 100)})
    support = Support.from_indices(layout, {"emb.weight": [1]})
    delta = SparseDelta(support, torch.ones(1), {"out.weight": torch.zeros(700, 100)})
    assert delta.bind(Model(tied=False)).heads[0][0] == "out.weight"
    with pytest.raises(SFTError, match="are one tensor in this model"):
        _ = delta.bind(model).heads


def test_bind_survives_a_file(tmp_path, model, delta):
    again = SparseDelta.load(delta.save(tmp_path / "x.safetensors"))
    assert [id(t) for t in again.bind(model).tensors] == [id(t) for t in delta.bind(model).tensors]
    with pytest.raises(SFTError, match="digest"):
        again.bind(Model(seed=4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path, model, delta):
    moved = delta.to("cuda")
    assert moved.device.type == "cuda"
    assert moved == delta
    assert moved.content_id == delta.content_id
    assert SparseDelta.load(moved.save(tmp_path / "x.safetensors")) == delta
    base = copy.deepcopy(model).cuda()
    moved.bind(base)
    delta.bind(base)
    base.lin.cpu()  # one model on two devices
    delta.bind(base)
    assert SparseDelta.between(base, tune(model).cuda(), heads=HEADS).nnz
    with pytest.raises(SFTError, match="val is on"):
        SparseDelta(moved.support, delta.val)


def test_np_scalars_are_no_json():
    support = Support.from_indices(Layout.of({"w": (2,)}), {"w": [0]})
    with pytest.raises(SFTError, match=r"recipe.k: holds a (int64|long)"):
        SparseDelta(support, torch.ones(1), meta={"recipe": {"k": np.int64(3)}})
