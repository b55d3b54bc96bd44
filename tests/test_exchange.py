"""Exchange: what other libraries do with our files, re-created, and what their files may hold."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, assert_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sparse_ft as sf
from sparse_ft.exchange import read_patch, read_shira, replacing, write_patch, write_shira
from sparse_ft.files import SFTFileError

PREFIX = "base_model.model."


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(20, 40, dtype=dtype)
        self.layers = nn.ModuleList(
            [nn.Linear(40, 40, dtype=dtype), nn.Linear(40, 70, dtype=dtype)]
        )
        self.norm = nn.LayerNorm(70)
        self.classifier = nn.Linear(70, 3)
        self.out = nn.Linear(40, 20, bias=False, dtype=dtype)


LINEAR = ("layers.0.weight", "layers.1.weight")
HEADS = ("classifier.weight", "classifier.bias")


def made(model, names, density=0.05, seed=1, heads=()):
    """A random delta over some of a model's tensors, without zeros."""
    g = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters())
    support = sf.Support.from_masks(
        {n: torch.rand(tensors[n].shape, generator=g) < density for n in names}
    )
    val = torch.randn(support.nnz, generator=g) * 0.1
    return sf.SparseDelta.from_compact(
        support,
        val,
        heads={n: torch.randn(tensors[n].shape, generator=g) for n in heads},
        base={n: tensors[n].detach().reshape(-1)[support.indices(n)] for n in names},
        base_dtypes={n: tensors[n].dtype for n in names},
        meta={"base": {"id": "org/base", "revision": "abc"}},
    )


def peft_weight(folder, module, weight, dtype=torch.float32):
    """What PEFT's layer adds to a weight: a COO tensor of the shape of the weight."""
    tensors = load_file(folder / "adapter_model.safetensors")
    values = tensors[f"{PREFIX}{module}.shira_weight"].to(dtype)
    pairs = tensors[f"{PREFIX}{module}.shira_indices"].to(torch.int)
    return weight + torch.sparse_coo_tensor(pairs, values, weight.shape, check_invariants=True)


def targeted(pattern, model):
    """The modules that PEFT adapts: those whose whole name the expression matches."""
    return {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}


# --- SHiRA --------------------------------------------------------------------------------------


def test_an_adapter_is_what_peft_reads(tmp_path):
    model = Model()
    delta = made(model, LINEAR, heads=HEADS)
    folder = tmp_path / "adapter"
    assert write_shira(delta, folder, model, task_type="TOKEN_CLS") == str(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    counts = delta.support.counts()
    r = max(
        math.ceil(counts[n] / sum(s)) for n, s in zip(LINEAR, [(40, 40), (70, 40)], strict=True)
    )
    assert config["r"] == r
    assert config["peft_type"] == "SHIRA"
    assert config["base_model_name_or_path"] == "org/base"
    assert config["revision"] == "abc"
    assert config["task_type"] == "TOKEN_CLS"
    assert config["modules_to_save"] == ["classifier"]
    assert targeted(config["target_modules"], model) == {"layers.0", "layers.1"}
    tensors = load_file(folder / "adapter_model.safetensors")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert len(tensors) == 6
    for name in LINEAR:
        module = name.removesuffix(".weight")
        weight = dict(model.named_parameters())[name].detach()
        values, pairs = (tensors[f"{PREFIX}{module}.shira_{x}"] for x in ("weight", "indices"))
        assert values.shape == (r * sum(weight.shape),)
        assert values.dtype == torch.float32
        assert pairs.dtype == torch.int32
        assert torch.equal(peft_weight(folder, module, weight), weight + delta.dense(name))
        # Row by row, as torch.where lists a mask.
        mask = torch.zeros(weight.shape)
        mask[pairs[0].long(), pairs[1].long()] = 1
        assert torch.equal(torch.stack(torch.where(mask == 1)).int(), pairs)
    for name in HEADS:
        assert torch.equal(tensors[PREFIX + name], delta.heads[name])


@given(st.integers(0, 10**6), st.floats(0.001, 0.4), st.sampled_from(DTYPES))
@settings(max_examples=25, deadline=None)
def test_an_adapter_comes_back_as_it_was(tmp_path_factory, seed, density, dtype):
    folder = tmp_path_factory.mktemp("x") / "adapter"
    model = Model(dtype)
    delta = made(model, LINEAR, density, seed, HEADS)
    if not delta.nnz:
        return
    write_shira(delta, folder, model)
    again = read_shira(folder, model)
    names = [n for n, count in delta.support.counts().items() if count]
    assert again.support == delta.support.restrict(names)
    assert_bits(again.val, delta.val)
    assert again.meta["base"]["id"] == "org/base"
    assert again.meta["base"]["revision"] == "abc"
    assert again.heads.keys() == delta.heads.keys()
    again.bind(model)
    if len(names) == len(LINEAR):
        again.meta.pop("recipe")
        assert again == delta


@pytest.mark.parametrize("base", ["module", "mapping", "path"])
def test_an_adapter_of_peft_is_read(tmp_path, base):
    model = Model()
    weight = model.layers[0].weight.detach()
    g = torch.Generator().manual_seed(3)
    flat = torch.randperm(1600, generator=g)[: 2 * 80]
    values = torch.randn(160, generator=g).bfloat16()
    values[7:20] = 0
    save_file(
        {
            f"{PREFIX}layers.0.shira_weight": values,
            # In the order that it likes, as numbers that Windows can save.
            f"{PREFIX}layers.0.shira_indices": torch.stack([flat // 40, flat % 40]).float(),
            f"{PREFIX}classifier.weight": torch.ones(3, 70),
        },
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "SHIRA", "r": 2, "mask_type": "random", "future_field": [1]})
    )
    source = model
    if base != "module":
        source = {n: t.detach().clone() for n, t in model.named_parameters()}
    if base == "path":
        save_file(source, tmp_path / "base.safetensors")
        source = tmp_path / "base.safetensors"
    delta = read_shira(tmp_path, source, lang="sw")
    assert delta.nnz == 160 - 13
    assert delta.meta["lang"] == "sw"
    assert delta.meta["recipe"] == {"method": "shira", "r": 2}
    assert torch.equal(delta.heads["classifier.weight"], torch.ones(3, 70))
    expected = peft_weight(tmp_path, "layers.0", weight)
    with sf.compose(model, delta):
        assert torch.equal(model.layers[0].weight, expected)


def test_shira_refuses_what_it_cannot_hold(tmp_path):
    model = Model()
    out = tmp_path / "adapter"
    names = ("emb.weight", "layers.0.weight", "layers.0.bias", "norm.weight")
    with pytest.raises(sf.SFTError) as caught:
        write_shira(made(model, names, 0.5), out, model)
    for part in (
        "'emb.weight' (Embedding.weight)",
        "'layers.0.bias' (Linear.bias)",
        "'norm.weight'",
    ):
        assert part in str(caught.value)
    assert "'layers.0.weight'" not in str(caught.value)
    with pytest.raises(
        sf.SFTError, match=r"'layers\.0\.weight' with its .* 'classifier\.weight' can"
    ):
        write_shira(made(model, ("layers.0.weight", "classifier.weight"), 0.4), out, model)
    model.out.weight = model.emb.weight
    with pytest.raises(sf.SFTError, match=r"'out\.weight' \(tied\)"):
        write_shira(made(Model(), ("out.weight",)), out, model)
    with pytest.raises(sf.SFTError, match=r"'layers\.0\.weight' \(the model has none\)"):
        write_shira(made(model, LINEAR), out, nn.Linear(3, 3))
    empty = made(model, LINEAR, 0.0)
    with pytest.raises(sf.SFTError, match="no entries"):
        write_shira(empty, out, model)
    delta = made(model, LINEAR)
    with pytest.raises(sf.SFTError, match="is no difference"):
        write_shira(replacing(delta, model), out, model)
    with pytest.raises(sf.SFTError, match=r"no module for 'gone'"):
        write_shira(
            sf.SparseDelta(delta.support, delta.val, {"gone.weight": torch.ones(2)}), out, model
        )
    assert not out.exists()
    write_shira(delta, out, model.to("meta"), base_id="a/b", revision="main")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "a/b"
    with pytest.raises(sf.SFTError, match="is no empty folder"):
        write_shira(delta, out, model)


W, INDICES = f"{PREFIX}layers.0.shira_weight", f"{PREFIX}layers.0.shira_indices"
GOOD = {
    W: torch.arange(1.0, 81.0),
    INDICES: torch.stack([torch.arange(80) // 40, torch.arange(80) % 40]).int(),
}


def changed(row, column, value, dtype=torch.int32):
    index = GOOD[INDICES].to(dtype, copy=True)
    index[row, column] = value
    return {INDICES: index}


HOSTILE_ADAPTERS = {
    "kind": ({"peft_type": "LORA"}, {}, "peft_type: must be SHIRA, found 'LORA'"),
    "no kind": ({"peft_type": None}, {}, "peft_type: must be SHIRA"),
    "r": ({"r": 0}, {}, "r: must be a positive integer, found 0"),
    "r is true": ({"r": True}, {}, "r: must be a positive integer"),
    "another r": ({"r": 2}, {}, r"must be 2 · \(40 \+ 40\) = 160 values"),
    "huge r": ({"r": 10**30}, {}, "values"),
    "row": ({}, changed(0, 3, 40), "rows run from 0 to 40, and there are 40"),
    "column": ({}, changed(1, 3, -1), "columns run from -1 to 39"),
    "twice": ({}, changed(1, 3, 2), "a position is given twice"),
    "half": ({}, changed(1, 3, 2.5, torch.float32), "no integers"),
    "nan": ({}, changed(1, 3, torch.nan, torch.float32), "no integers"),
    "int16": ({}, {INDICES: GOOD[INDICES].short()}, "must be int32 of shape"),
    "one line": ({}, {INDICES: GOOD[INDICES][0].clone()}, "must be int32 of shape"),
    "short": ({}, {INDICES: GOOD[INDICES][:, :5].clone()}, "must be int32 of shape"),
    "square": ({}, {W: GOOD[W].reshape(8, 10)}, "found torch.float32 of shape"),
    "float64": ({}, {W: GOOD[W].double()}, "found torch.float64"),
    "infinite": (
        {},
        {W: GOOD[W] * torch.inf},
        "adapter_model.safetensors: .*values must be finite",
    ),
    "no indices": ({}, {INDICES: None}, "there is no .*shira_indices"),
    "no values": ({}, {W: None}, "there is no .*shira_weight"),
    "unknown": ({}, {f"{PREFIX}x.shira_weight": torch.ones(3)}, "base has no tensor 'x.weight'"),
    "vector": ({}, {f"{PREFIX}norm.shira_weight": torch.ones(3)}, "norm.shira_indices"),
    "integers": ({}, {f"{PREFIX}steps": torch.ones(3).long()}, "is no part of SHiRA"),
    "head": ({}, {f"{PREFIX}layers.0.weight": torch.ones(3)}, "both among the sparse tensors"),
    "revision": ({"revision": ["x"]}, {}, "base.revision"),
    "module twice": (
        {},
        {key.removeprefix(PREFIX): tensor.clone() for key, tensor in GOOD.items()},
        r"entries of 'layers\.0\.weight' twice",
    ),
    "head twice": (
        {},
        {"classifier.bias": torch.ones(3), f"{PREFIX}classifier.bias": torch.ones(3)},
        r"the tensor 'classifier\.bias' twice",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_ADAPTERS, ids=str)
def test_a_hostile_adapter_is_refused(tmp_path, case):
    fields, tensors, message = HOSTILE_ADAPTERS[case]
    model = Model()
    kept = {n: t for n, t in (GOOD | tensors).items() if t is not None}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "SHIRA", "r": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if not fields and not tensors:
        read_shira(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | fields))
    with pytest.raises(SFTFileError, match=message):
        read_shira(tmp_path, model)


def test_an_adapter_needs_its_files_and_an_untied_base(tmp_path):
    model = Model()
    with pytest.raises(SFTFileError, match=r"adapter_config\.json: there is no such file"):
        read_shira(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "SHIRA", "r": 1}')
    with pytest.raises(SFTFileError, match="neither adapter_model"):
        read_shira(tmp_path, model)
    torch.save(GOOD, tmp_path / "adapter_model.bin")
    assert read_shira(tmp_path, model).nnz == 80
    with pytest.raises(SFTFileError, match="no matrix"):
        read_shira(tmp_path, {"layers.0.weight": torch.zeros(0, 0)})
    model.twin = nn.Linear(40, 40)
    model.twin.weight = model.layers[0].weight
    with pytest.raises(SFTFileError, match="is tied to another tensor"):
        read_shira(tmp_path, model)


# --- absolute values ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_replacing_gives_the_bits_of_compose(tmp_path, dtype, kind):
    model = Model(dtype)
    names = ("emb.weight", "layers.0.weight", "norm.weight")
    delta = made(model, names, 0.3).astype(kind)
    delta.val[::5] = 0.0
    delta.val[1::5] = -0.0
    with torch.no_grad():
        model.emb.weight[0, :20] = -0.0
        model.norm.weight[:3] = -0.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = replacing(delta, before, allow_base_mismatch=True)
    assert found.kind == "replace"
    assert found.support == delta.support
    with sf.compose(model, delta, allow_base_mismatch=True):
        for name in names:
            at = delta.indices(name)
            wanted = dict(model.named_parameters())[name].detach().reshape(-1)[at]
            assert_bits(found.values(name).to(wanted.dtype), wanted, name)
            # What an engine does with it, however often.
            path = write_patch(found, tmp_path / "p.safetensors")
            patch = load_file(path)
            weight = before[name].clone()
            for _ in range(2):
                weight.view(-1).index_copy_(
                    0, patch[f"{name}.indices"].long(), patch[f"{name}.values"]
                )
            assert_bits(weight, dict(model.named_parameters())[name].detach(), name)
    assert found.val.dtype == (torch.float32 if dtype is not torch.float32 else dtype)
    assert replacing(made(model, LINEAR), model, allow_base_mismatch=True).val.dtype == dtype


def test_a_patch_is_as_engines_take_it(tmp_path):
    model = Model(torch.bfloat16)
    delta = replacing(made(model, ("layers.0.weight", "layers.1.bias", "emb.weight"), 0.05), model)
    path = write_patch(delta, tmp_path / "p.safetensors")
    tensors = load_file(path)
    names = [n for n, count in delta.support.counts().items() if count]
    assert tensors.keys() == {f"{n}.{part}" for n in names for part in ("indices", "values")}
    for name in names:
        indices, values = tensors[f"{name}.indices"], tensors[f"{name}.values"]
        assert indices.dtype == torch.int32
        assert values.dtype == torch.bfloat16
        assert indices.tolist() == delta.indices(name).tolist()
        assert_bits(values, delta.values(name))
    first = (tmp_path / "p.safetensors").read_bytes()
    write_patch(delta, path)
    assert (tmp_path / "p.safetensors").read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_patch_comes_back_as_it_was(tmp_path, dtype):
    model = Model(dtype)
    delta = replacing(made(model, ("emb.weight", "layers.1.weight", "layers.1.bias"), 0.1), model)
    again = read_patch(write_patch(delta, tmp_path / "p.safetensors"))
    assert again == delta
    again.bind(model)
    mixed = replacing(made(model, ("emb.weight", "norm.bias"), 0.5), model)
    again = read_patch(write_patch(mixed, tmp_path / "p.safetensors"))
    assert again == mixed
    empty = replacing(made(model, ("emb.weight",), 0.0), model)
    assert read_patch(write_patch(empty, tmp_path / "e.safetensors")).nnz == 0


@pytest.mark.parametrize(
    "has", [None, ("emb.weight",), ("out.weight",), ("emb.weight", "out.weight")]
)
def test_a_patch_names_a_tied_tensor_as_the_base_does(tmp_path, has):
    model = nn.ModuleDict({"emb": nn.Embedding(40, 6), "mid": nn.Linear(6, 6)})
    model["out"] = nn.Linear(6, 40, bias=False)
    model["out"].weight = model["emb"].weight
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned["emb"].weight[::3] += 1
        tuned["mid"].weight[2] -= 1
    delta = sf.SparseDelta.between(model, tuned)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    base = model
    if has is None:  # a module has all names
        has = ("emb.weight", "out.weight")
    else:
        base = tmp_path
        kept = {n: tensors[n] for n in ("mid.weight", "mid.bias", *has)}
        save_file(kept, tmp_path / "model.safetensors")
    absolute = replacing(delta, base)
    patch = load_file(write_patch(absolute, tmp_path / "p.safetensors"))
    assert {name.rpartition(".")[0] for name in patch} == {"mid.weight", *has}
    for name in ("mid.weight", *has):
        flat = tensors[name].view(-1)
        flat.index_copy_(0, patch[f"{name}.indices"].long(), patch[f"{name}.values"])
        assert_bits(tensors[name], tuned.state_dict()[name], name)
    again = read_patch(tmp_path / "p.safetensors")
    assert again == absolute
    again.bind(model)


def test_a_tied_tensor_that_the_base_has_twice_differently(tmp_path):
    tied = {"a": torch.ones(4), "b": torch.ones(4)}
    delta = sf.SparseDelta(
        sf.Support.from_indices(sf.Layout.of({"a": (4,)}), {"a": [1]}),
        torch.ones(1),
        meta={"aliases": {"a": ["b"]}},
    )
    assert replacing(delta, tied).meta["aliases"] == {"a": ["b"]}
    tied["b"][0] = 2
    with pytest.raises(sf.SFTError, match=r"'a' and 'b' are one tied tensor .* differ in base"):
        replacing(delta, tied)
    both = sf.SparseDelta(
        sf.Support.from_indices(sf.Layout.of({"a": (4,), "b": (4,)}), {"a": [1], "b": [2]}),
        torch.ones(2),
    )
    tied["b"] = tied["a"]
    with pytest.raises(sf.SFTError, match=r"'a' and 'b' are two tensors .* one, 'b', in base"):
        replacing(both, tied)


def test_a_patch_goes_where_it_is_sent_or_says_why_not(tmp_path):
    support = sf.Support.from_indices(sf.Layout.of({"w": (9,)}), {"w": [5]})
    delta = sf.SparseDelta(support, torch.ones(1), meta={"kind": "replace"})
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "real" / "p.safetensors")
    write_patch(delta, link)
    assert link.is_symlink()
    assert read_patch(tmp_path / "real" / "p.safetensors") == read_patch(link)
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(sf.SFTError, match=r"write_patch: .* is not a regular file"):
        write_patch(delta, tmp_path / "d.safetensors")
    with pytest.raises(sf.SFTError, match="write_patch: there is no folder"):
        write_patch(delta, tmp_path / "none" / "p.safetensors")
    write_patch(delta, tmp_path / ("x" * 243 + ".safetensors"))
    deep = sf.Support.from_indices(sf.Layout.of({"w": [1] * 33}), {"w": [0]})
    with pytest.raises(sf.SFTError, match=r"write_patch: params: 'w': shape"):
        write_patch(sf.SparseDelta(deep, torch.ones(1), meta={"kind": "replace"}), link)


def test_replacing_and_patches_refuse_what_does_not_fit(tmp_path):
    model = Model()
    delta = made(model, LINEAR, heads=HEADS)
    path = tmp_path / "p.safetensors"
    with pytest.raises(sf.SFTError, match="made for the base model 'org/base'"):
        replacing(delta, {n: torch.zeros_like(p) for n, p in model.named_parameters()})
    with pytest.raises(sf.SFTError, match=r"no tensor 'layers\.0\.weight'"):
        replacing(delta, {})
    with pytest.raises(sf.SFTError, match="has shape"):
        replacing(delta, {n: torch.zeros(3) for n in LINEAR})
    with pytest.raises(sf.SFTError, match="has dtype"):
        replacing(delta, {n: p.double() for n, p in model.named_parameters()})
    absolute = replacing(delta, model)
    assert absolute.heads.keys() == {*HEADS}
    with pytest.raises(sf.SFTError, match="already"):
        replacing(absolute, model)
    with pytest.raises(sf.SFTError, match="cannot be added"):
        sf.compose(model, absolute)
    with pytest.raises(sf.SFTError, match="holds differences"):
        write_patch(delta, path)
    with pytest.raises(sf.SFTError, match="the heads 'classifier"):
        write_patch(absolute, path)
    with pytest.raises(sf.SFTError, match=r"must end in \.safetensors"):
        write_patch(absolute, tmp_path / "p.bin")
    big = sf.Support.from_indices(sf.Layout.of({"w": (1 << 31,)}), {"w": [5]})
    with pytest.raises(sf.SFTError, match="2,147,483,648 elements"):
        write_patch(sf.SparseDelta(big, torch.ones(1), meta={"kind": "replace"}), path)
    inexact = sf.Support.from_indices(sf.Layout.of({"w": (9,)}), {"w": [5]})
    meta = {"kind": "replace", "dtypes": {"w": "BF16"}}
    with pytest.raises(sf.SFTError, match="are no BF16"):
        write_patch(sf.SparseDelta(inexact, torch.tensor([0.1]), meta=meta), path)
    half = {n: p.detach().half() for n, p in model.named_parameters()}
    large = sf.SparseDelta(delta.support, delta.val.sign() * 65520)
    with pytest.raises(sf.SFTError, match="must be finite"):
        replacing(large, half)
    assert not path.exists()


DOCUMENT = {"version": 1, "params": {"w": {"shape": [3, 4], "dtype": "F32"}}}
PATCH = {"w.indices": torch.tensor([1, 5, 11], dtype=torch.int32), "w.values": torch.ones(3)}
HOSTILE_PATCHES = {
    "version": ({"version": 2}, {}, "no patch of version 1"),
    "version true": ({"version": True}, {}, "no patch of version 1"),
    "version 1.0": ({"version": 1.0}, {}, "no patch of version 1"),
    "many elements": (
        {"params": {f"w{i}": {"shape": [1 << 37], "dtype": "F32"} for i in range(3)}},
        {},
        "elements; at most",
    ),
    "alias that differs": (
        {"aliases": {"w": ["v"]}},
        {"v.indices": PATCH["w.indices"].clone(), "v.values": torch.zeros(3)},
        "'v': is a name of 'w', and their entries differ",
    ),
    "alias of nothing": (
        {"aliases": {"w": ["v"]}},
        {f"v.{part}": PATCH[f"w.{part}"] for part in ("indices", "values")}
        | {"w.indices": None, "w.values": None},
        "'v': is a name of 'w', and their entries differ",
    ),
    "params": ({"params": [1]}, {}, "no patch of version 1"),
    "shape": ({"params": {"w": {"shape": [True], "dtype": "F32"}}}, {}, "'w': shape"),
    "negative": ({"params": {"w": {"shape": [-1, -12], "dtype": "F32"}}}, {}, "'w': shape"),
    "huge": ({"params": {"w": {"shape": [1 << 49], "dtype": "F32"}}}, {}, "'w': shape"),
    "empty and huge": (
        {"params": {"w": {"shape": [0, 1 << 49], "dtype": "F32"}}},
        {},
        "'w': shape",
    ),
    "dims": ({"params": {"w": {"shape": [1] * 99, "dtype": "F32"}}}, {}, "'w': shape"),
    "no item": ({"params": {"w": 3}}, {}, "'w': shape"),
    "dtype": ({"params": {"w": {"shape": [12], "dtype": "I8"}}}, {}, "'w': dtype"),
    "dtypes": ({"params": {"w": {"shape": [12], "dtype": ["F32"]}}}, {}, "'w': dtype"),
    "another dtype": ({"params": {"w": {"shape": [12], "dtype": "BF16"}}}, {}, "values of BF16"),
    "name": (
        {"params": {"w": DOCUMENT["params"]["w"], "a\n": DOCUMENT["params"]["w"]}},
        {},
        "print",
    ),
    "digest": ({"base": {"digest_f32": "x"}}, {}, "digest_f32"),
    "alias": ({"aliases": {"w": ["w"]}}, {}, "taken already"),
    "unknown": ({}, {"v.indices": torch.ones(3).int()}, "'v.indices' belongs to none"),
    "part": ({}, {"w.more": torch.ones(3).int()}, "'w.more' belongs to none"),
    "alone": ({}, {"w.values": None}, "needs both"),
    "int64": ({}, {"w.indices": PATCH["w.indices"].long()}, "indices of int32"),
    "beyond": ({}, {"w.indices": torch.tensor([1, 5, 12], dtype=torch.int32)}, "run from 1 to 12"),
    "before": ({}, {"w.indices": torch.tensor([1, 5, -1], dtype=torch.int32)}, "run from -1 to 5"),
    "twice": ({}, {"w.indices": torch.tensor([1, 5, 1], dtype=torch.int32)}, "given twice"),
    "fewer": ({}, {"w.values": torch.ones(2)}, "one each"),
    "matrix": ({}, {"w.indices": torch.ones(3, 1).int(), "w.values": torch.ones(3, 1)}, "one each"),
    "nan": ({}, {"w.values": torch.tensor([1, torch.nan, 2])}, "must be finite"),
}


@pytest.mark.parametrize("case", HOSTILE_PATCHES, ids=str)
def test_a_hostile_patch_is_refused(tmp_path, case):
    fields, tensors, message = HOSTILE_PATCHES[case]
    path = tmp_path / "p.safetensors"
    save_file(PATCH, path, {"sparse_ft_patch": json.dumps(DOCUMENT)})
    assert np.array_equal(read_patch(path).dense("w").numpy().nonzero()[0], [0, 1, 2])
    kept = {n: t for n, t in (PATCH | tensors).items() if t is not None}
    save_file(kept, path, {"sparse_ft_patch": json.dumps(DOCUMENT | fields)})
    with pytest.raises(SFTFileError, match=message):
        read_patch(path)


def test_what_is_no_patch_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    (tmp_path / "m").mkdir()
    save_file(PATCH, tmp_path / "m" / "model.safetensors")
    torch.save(PATCH, tmp_path / "m.bin")
    for other in ("m", "m.bin"):
        with pytest.raises(SFTFileError, match=f"{other}: is no patch, which"):
            read_patch(tmp_path / other)
    for metadata, message in (
        (None, "is no patch"),
        ("{", "is not valid JSON"),
        ("[" * 9999, "is nested too deep"),
    ):
        save_file(PATCH, path, metadata and {"sparse_ft_patch": metadata})
        with pytest.raises(SFTFileError, match=message):
            read_patch(path)
    path.write_bytes(b"")
    with pytest.raises(SFTFileError, match="not a safetensors file"):
        read_patch(path)
