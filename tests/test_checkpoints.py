"""Checkpoints on disk: mapped, compared and merged to the bits of a model in memory; what they say
is not trusted."""

import copy
import errno
import fnmatch
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, assert_bits, top_k
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sparse_ft as sf
from sparse_ft import checkpoints
from sparse_ft.checkpoints import Checkpoint, diff, export
from sparse_ft.files import SFTFileError

ROOT = Path(__file__).resolve().parent.parent


class Model(nn.Module):
    """Two tiles of embedding, which may be tied to an output; two data types; a buffer; a head."""

    def __init__(self, dtype=torch.float32, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(700, 100, dtype=dtype)
        self.lin = nn.Linear(100, 30, dtype=dtype)
        self.norm = nn.LayerNorm(30)
        self.out = nn.Linear(100, 700, bias=False, dtype=dtype)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.head = nn.Linear(30, 3)
        self.register_buffer("steps", torch.arange(5))
        if tied:
            self.out.weight = self.emb.weight


HEADS = ("head.weight", "head.bias")


@torch.no_grad()
def tuned(model, seed=1, share=0.1, size=0.1):
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    for p in other.parameters():
        step = torch.randn(p.shape, generator=g) * (torch.rand(p.shape, generator=g) < share)
        p.add_((step * size).to(p.dtype))
    return other


def weights_of(model):
    """As transformers writes them: a tied tensor once."""
    first = {p.data_ptr(): n for n, p in reversed([*model.state_dict().items()]) if p.numel()}
    return {
        n: t.clone()
        for n, t in model.state_dict().items()
        if not t.numel() or first[t.data_ptr()] == n
    }


def saved(folder, tensors, shards=1, config=True):
    """A checkpoint folder as transformers lays it out."""
    folder.mkdir()
    if config:
        (folder / "config.json").write_text('{"torch_dtype": "float32", "sub": {"dtype": null}}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def indexed(folder, weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(weight_map if isinstance(weight_map, str) else json.dumps(weight_map))
    return path


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_is_a_mapping_of_its_tensors(tmp_path, shards):
    expected = weights_of(Model(torch.bfloat16))
    checkpoint = Checkpoint(saved(tmp_path / "m", expected, shards))
    assert list(checkpoint) == sorted(expected)
    assert len(checkpoint) == len(expected)
    assert len(checkpoint.files) == shards
    for name, tensor in expected.items():
        assert checkpoint[name].dtype == tensor.dtype
        assert torch.equal(checkpoint[name], tensor)
    with pytest.raises(KeyError):
        checkpoint["absent"]
    assert f"{len(expected)} tensors in {shards} file" in repr(checkpoint)


def test_a_file_an_index_and_a_folder_are_the_same_model(tmp_path):
    folder = saved(tmp_path / "m", weights_of(Model()), 2)
    index = folder / "model.safetensors.index.json"
    assert list(Checkpoint(str(index))) == list(Checkpoint(folder))
    first = next(folder.glob("*.safetensors"))
    assert set(Checkpoint(first)) < set(Checkpoint(folder))


def test_writing_into_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    folder = saved(tmp_path / "m", {"w": torch.ones(1000)})
    before = (folder / "model.safetensors").read_bytes()
    Checkpoint(folder)["w"].zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert torch.equal(Checkpoint(folder)["w"], torch.ones(1000))


def test_a_misaligned_tensor_is_copied(tmp_path):
    values = np.arange(6, dtype=np.float32)
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [6], "data_offsets": [1, 25]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" + values.tobytes())
    tensor = Checkpoint(path)["w"]
    assert tensor.data_ptr() % 4 == 0
    assert torch.equal(tensor, torch.from_numpy(values))


def handmade(path, header, data=b""):
    """A safetensors file with this text as its header."""
    text = header.encode() + b" " * (-len(header) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_headers_that_the_library_lets_pass(tmp_path):
    entry = '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    twice = f"{{{entry},{entry}}}"
    with pytest.raises(SFTFileError, match=r"header: .*'w' stands there twice"):
        Checkpoint(handmade(tmp_path / "a.safetensors", twice, bytes(4)))
    huge = '{"w":{"dtype":"F32","shape":[9223372036854775808,0],"data_offsets":[0,0]}}'
    with pytest.raises(SFTFileError, match="tensor 'w' cannot be read"):
        Checkpoint(handmade(tmp_path / "b.safetensors", huge))["w"]


def test_identity_is_the_sha256_of_each_file(tmp_path):
    folder = saved(tmp_path / "m", weights_of(Model()), 2)
    found = Checkpoint(folder).identity()
    assert found == [
        {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.glob("*.safetensors"))
    ]
    assert Checkpoint(folder).identity(progress=True) == found


def test_a_hub_cache_is_read_through_its_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, blobs / ("0" * 64))
    (snapshot / "model-1.safetensors").symlink_to(f"../../blobs/{'0' * 64}")
    (blobs / ("1" * 40)).write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    (snapshot / "model.safetensors.index.json").symlink_to(f"../../blobs/{'1' * 40}")
    (blobs / ("2" * 40)).write_text("{}")
    (snapshot / "config.json").symlink_to(f"../../blobs/{'2' * 40}")
    assert torch.equal(Checkpoint(snapshot)["w"], torch.ones(3))
    delta = diff(snapshot, {"w": torch.tensor([1.0, 2.0, 1.0])})
    out = tmp_path / "out"
    export(snapshot, delta, out)
    assert load_file(out / "model.safetensors")["w"].tolist() == [1.0, 2.0, 1.0]
    assert (out / "config.json").read_text() == "{}"


HOSTILE_INDEX = {
    "up": ({"weight_map": {"w": "../secret.safetensors"}}, "plain file name"),
    "absolute": ({"weight_map": {"w": "/tmp/secret.safetensors"}}, "plain file name"),
    "backslash": ({"weight_map": {"w": "..\\secret.safetensors"}}, "plain file name"),
    "subfolder": ({"weight_map": {"w": "sub/secret.safetensors"}}, "plain file name"),
    "nul": ({"weight_map": {"w": "a\0.safetensors"}}, "plain file name"),
    "link": ({"weight_map": {"w": "link.safetensors"}}, "is a link to .*secret.*outside"),
    "missing": ({"weight_map": {"w": "gone.safetensors"}}, "gone.safetensors: there is no such"),
    "folder": ({"weight_map": {"w": "sub.safetensors"}}, "not a regular file"),
    "kind": ({"weight_map": {"w": "config.json"}}, "'w': must be a .safetensors file"),
    "no text": ({"weight_map": {"w": 3}}, "'w': must be a .safetensors file, found 3"),
    "a list": ({"weight_map": ["w"]}, "weight_map: must map names"),
    "empty": ({"weight_map": {}}, "weight_map: must map names"),
    "no map": ({}, "weight_map: must map names"),
    "lies": ({"weight_map": {"v": "good.safetensors"}}, "no tensor 'v', which the index"),
    "twice": (
        '{"weight_map": {"w": "good.safetensors", "w": "b.safetensors"}}',
        "'w' stands th.* twice",
    ),
    "no json": ("{", "is not valid JSON"),
    "no object": ("[]", "must be a JSON object"),
    "deep": ("[" * 100_000, "is nested too deep"),
    "no utf-8": ('{"\udcff"', "is not valid JSON"),
    "both": (
        {"weight_map": {"w": "good.safetensors", "x": "same.safetensors"}},
        "same.safetensors: tensor 'w' is in .*good.safetensors' as well",
    ),
    "no safetensors": ({"weight_map": {"w": "bad.safetensors"}}, "bad.safetensors: is not a safet"),
}


@pytest.mark.parametrize("case", HOSTILE_INDEX, ids=str)
def test_a_hostile_index_is_refused(tmp_path, case):
    weight_map, message = HOSTILE_INDEX[case]
    save_file({"w": torch.ones(3)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub.safetensors").mkdir()
    save_file({"w": torch.ones(3)}, folder / "sub" / "secret.safetensors")
    save_file({"w": torch.ones(3)}, folder / "good.safetensors")
    save_file({"w": torch.ones(3), "x": torch.ones(3)}, folder / "same.safetensors")
    (folder / "link.safetensors").symlink_to("../secret.safetensors")
    (folder / "bad.safetensors").write_bytes(b"\xff" * 100)
    if isinstance(weight_map, str):
        path = folder / "model.safetensors.index.json"
        path.write_text(weight_map, "utf-8", "surrogateescape")
    else:
        path = indexed(folder, weight_map)
    for given_path in (path, folder):
        with pytest.raises(SFTFileError, match=message):
            Checkpoint(given_path)


def test_a_repeated_name_among_many_is_found_at_once(tmp_path):
    names = ",".join(f'"{i}":"a"' for i in range(100_000))
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(f'{{"weight_map":{{{names},"99999":"a"}}}}')
    begun = time.perf_counter()
    with pytest.raises(SFTFileError, match="'99999' stands there twice"):
        Checkpoint(path)
    assert time.perf_counter() - begun < 10  # a search for each name would take minutes


def test_an_index_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = indexed(tmp_path, {"w": "a.safetensors"})
    monkeypatch.setattr(checkpoints, "open", refused, raising=False)
    with pytest.raises(SFTFileError, match="cannot be read: Permission denied"):
        Checkpoint(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(SFTFileError, match=r"holds none of model\.safetensors"):
        Checkpoint(tmp_path)
    with pytest.raises(SFTFileError, match="there is no such file"):
        Checkpoint("no.such.bin")
    for name in ("xlm-roberta-base", "FacebookAI/xlm-roberta-base"):
        with pytest.raises(SFTFileError, match=f"hf download {name} --local-dir xlm-roberta-base"):
            Checkpoint(name)
    with pytest.raises(SFTFileError, match="NUL"):
        Checkpoint("a\0b")
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(SFTFileError, match="must end in"):
        Checkpoint(tmp_path / "w.npz")
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(SFTFileError, match="is not a safetensors file"):
        Checkpoint(tmp_path / "w.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(SFTFileError, match="is not a regular file"):
        Checkpoint(tmp_path / "pipe.safetensors")
    save_file({"bad\nname": torch.ones(1)}, tmp_path / "name.safetensors")
    with pytest.raises(SFTFileError, match="printable"):
        Checkpoint(tmp_path / "name.safetensors")


@pytest.mark.parametrize("shards", [1, 2])
def test_files_of_torch_save_are_mapped_too(tmp_path, shards):
    model = Model(torch.bfloat16, tied=True)
    names = sorted(n for n, t in model.state_dict().items())
    folder = tmp_path / "m"
    folder.mkdir()
    files = ["pytorch_model.bin"] if shards == 1 else ["a.bin", "b.bin"]
    for i, file in enumerate(files):
        own = [n for n in names if (n[0] > "l") == bool(i)] if shards == 2 else names
        torch.save({n: model.state_dict()[n] for n in own}, folder / file)
    if shards == 2:
        weight_map = {n: files[n[0] > "l"] for n in names}
        text = json.dumps({"weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(text)
    checkpoint = Checkpoint(folder)
    assert list(checkpoint) == names
    for name, tensor in model.state_dict().items():
        assert_bits(checkpoint[name].float(), tensor.float(), name)
    delta = diff(folder, tuned(model), k=70)
    delta.bind(model)
    out = export(folder, delta, tmp_path / "out")
    found = load_file(Path(out) / "model.safetensors")
    expected = composed(model, delta)
    assert found.keys() == expected.keys()
    if shards == 1:
        assert delta.meta["aliases"] == {"emb.weight": ["out.weight"]}
        # Tied in the file: the sum stands under both names.
        for name in expected:
            assert_bits(found[name].float(), expected[name].float(), name)
        parts = {"emb.weight": [0], "out.weight": [1]}
        both = sf.Support.from_indices(sf.Layout.of(dict.fromkeys(parts, (700, 100))), parts)
        with pytest.raises(sf.SFTError, match=r"'emb\.weight' and 'out\.weight' are two tensors"):
            export(folder, sf.SparseDelta(both, torch.ones(2)), tmp_path / "no")


def test_a_file_of_torch_save_must_be_a_state_dict(tmp_path):
    for content in ([torch.ones(2)], {"state_dict": {"w": torch.ones(2)}}, {3: torch.ones(2)}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(SFTFileError, match=r"pytorch_model\.bin.*state dict"):
            Checkpoint(tmp_path)
    torch.save({"__metadata__": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SFTFileError, match="keeps for itself"):
        Checkpoint(tmp_path)


# --- the difference of two ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [1, 2])
def test_diff_has_the_k_largest_differences(tmp_path, dtype, shards):
    base, new = Model(dtype), tuned(Model(dtype), share=0.5)
    a = saved(tmp_path / "a", weights_of(base), shards)
    b = saved(tmp_path / "b", weights_of(new))
    delta = diff(a, b, k=3000, heads=HEADS, lang="sw", recipe={"seed": 3})
    names = [n for n in sorted(weights_of(base)) if n not in (*HEADS, "steps")]
    before, after = base.state_dict(), new.state_dict()
    chosen = top_k([after[n] for n in names], [before[n] for n in names], 3000)
    assert delta.nnz == 3000
    for name, flat in zip(names, chosen, strict=True):
        assert delta.indices(name).tolist() == flat.tolist()
        taken = [side[name].reshape(-1)[torch.from_numpy(flat)].float() for side in (after, before)]
        assert_bits(delta.values(name), taken[0] - taken[1], name)
    assert {n: torch.equal(h, after[n]) for n, h in delta.heads.items()} == dict.fromkeys(
        sorted(HEADS), True
    )
    assert delta.meta["recipe"] == {
        "method": "diff",
        "eps": 0.0,
        "criterion": "magnitude",
        "k_requested": 3000,
        "seed": 3,
    }
    assert delta.meta["lang"] == "sw"
    # The digest is the base's: it binds to that and to nothing else.
    delta.bind(base)
    with pytest.raises(sf.SFTError, match="another base model"):
        delta.bind(new)


def test_diff_without_k_has_every_entry_that_differs(tmp_path):
    base, new = Model(), tuned(Model())
    a, b = saved(tmp_path / "a", weights_of(base)), saved(tmp_path / "b", weights_of(new))
    delta = diff(a, b)
    assert delta == sf.SparseDelta.between(weights_of(base), weights_of(new))
    assert delta.content_id == sf.SparseDelta.between(base, new).content_id
    assert delta == diff(weights_of(base), Checkpoint(b))
    assert delta == diff(base, b, progress=True)
    small = diff(a, b, eps=0.05)
    assert 0 < small.nnz < delta.nnz
    assert float(small.val.abs().min()) > 0.05
    again = diff(a, b, support=small.support)
    assert again.support == small.support
    assert_bits(again.val, small.val)
    assert diff(a, b, density=0.01).nnz == int(0.01 * again.layout.numel)


def test_diff_of_two_data_types_is_taken_in_fp32(tmp_path):
    base, new = Model(torch.float32), tuned(Model(torch.bfloat16))
    a, b = saved(tmp_path / "a", weights_of(base)), saved(tmp_path / "b", weights_of(new))
    name = "lin.weight"
    delta = diff(a, b, k=500, eligible={name})
    flat = delta.indices(name)
    exact = new.lin.weight.detach().float() - base.lin.weight.detach()
    assert_bits(delta.values(name), exact.reshape(-1)[flat])
    assert delta.layout.names == (name,)
    assert delta.meta["dtypes"] == {name: "F32"}


def test_diff_compares_what_is_eligible(tmp_path):
    before, after = weights_of(Model()), weights_of(tuned(Model()))
    # A masked language model, and a classifier that was made from it.
    del after["out.weight"], before["head.weight"], before["head.bias"]
    a, b = saved(tmp_path / "a", before), saved(tmp_path / "b", after)
    with pytest.warns(UserWarning, match=r"left out 'out\.weight', which base has") as warned:
        common = diff(a, b, heads=HEADS, k=10)
    assert len(warned) == 1
    assert common == diff(a, b, heads="head.*", k=10, exclude="out*")
    assert common.layout.names == tuple(sorted({*before} & {*after} - {"steps"}))
    delta = diff(a, b, heads=HEADS, k=10, eligible=lambda n, t: n in before and t.dim() == 2)
    assert delta.layout.names == ("emb.weight", "lin.weight", "none")
    assert sorted(delta.heads) == sorted(HEADS)
    for heads, said in ((), r"2 tensors \('head\.bias', 'head"), ("head.bias", r"'head\.weight'"):
        with pytest.raises(sf.SFTError, match=rf"tuned has {said}.* which base lacks; .* heads="):
            diff(a, b, k=10, heads=heads)
    with pytest.raises(sf.SFTError, match=r"eligible: base has no tensor 'head\.bias'"):
        diff(a, b, eligible=lambda n, t: True)
    for argument in ("eligible", "exclude", "heads"):
        with pytest.raises(
            sf.SFTError, match=f"{argument}: .*no tensor 'lin.weigth'.*'lin.weight'"
        ):
            diff(a, b, **{argument: ["lin.weigth"]})
    with pytest.raises(sf.SFTError, match="heads: tuned has no tensor 'nowhere'"):
        diff(a, b, heads="nowhere")


def test_patterns_of_names_are_those_of_fnmatch():
    before, after = weights_of(Model()), weights_of(tuned(Model()))
    names = sorted(n for n in before if n != "steps")
    for pattern in ("lin*", "*.weight", "[ln]o*", "lin.bias", "l?n.bias"):
        hit = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
        assert hit
        only = diff(before, after, eligible=pattern)
        assert list(only.layout.names) == hit
        rest = diff(before, after, exclude=[pattern, "steps"], k=5)
        assert list(rest.layout.names) == sorted({*names} - {*hit})
        both = diff(before, after, eligible=["lin*", "norm*"], exclude=["norm*"], k=5)
        assert both.layout.names == ("lin.bias", "lin.weight")
        # Heads are stored, not compared, whatever is left out.
        whole = diff(before, after, heads=pattern, exclude=pattern)
        assert sorted(whole.heads) == hit


@pytest.mark.parametrize("dropped", ["emb*", "out*"])
def test_a_tied_tensor_is_left_out_only_under_all_of_its_names(dropped):
    base, new = Model(tied=True), tuned(Model(tied=True))
    kept = {"emb*": "out.weight", "out*": "emb.weight"}[dropped]
    delta = diff(base, new, k=7_000, exclude=dropped)
    assert kept in delta.layout
    assert delta.support.counts()[kept] > 6000
    delta.bind(base)
    # A base that has it under the name to be left out alone: it is the same tensor.
    once = {name: t for name, t in base.state_dict().items() if name != kept}
    again = diff(once, new, k=7_000, exclude=dropped)
    assert_bits(again.val.sort().values, delta.val.sort().values)
    assert not {"emb.weight", "out.weight"} & {
        *diff(base, new, exclude=["emb*", "out*"]).layout.names
    }


def test_diff_of_equal_models_is_refused(tmp_path):
    a = saved(tmp_path / "a", weights_of(Model()))
    for options in ({}, {"k": 10}, {"density": 0.1}, {"exclude": "emb*"}):
        with pytest.raises(sf.SFTError, match="base and tuned are equal: none of the"):
            diff(a, weights_of(Model()), **options)
    with pytest.raises(sf.SFTError, match=r"equal up to differences of 1e\+09"):
        diff(a, weights_of(tuned(Model())), eps=1e9)
    # A probe: nothing but a head was trained.
    moved = weights_of(Model())
    moved["head.bias"] = moved["head.bias"] + 1
    probe = diff(a, moved, heads="head*")
    assert probe.nnz == 0
    assert sorted(probe.heads) == sorted(HEADS)


def test_diff_takes_no_entry_that_did_not_change(tmp_path):
    before = weights_of(Model())
    after = before | {"lin.bias": before["lin.bias"] + 1}
    with pytest.warns(UserWarning, match="only 30 entries differ, not 31 as wanted") as warned:
        delta = diff(before, after, k=31)
    assert len(warned) == 1
    assert delta.nnz == delta.support.counts()["lin.bias"] == 30
    assert delta.meta["recipe"]["k_requested"] == 31
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert diff(before, after, k=30) == delta


def test_diff_refuses_what_does_not_fit(tmp_path):
    before, after = weights_of(Model()), weights_of(tuned(Model()))
    a, b = saved(tmp_path / "a", before), saved(tmp_path / "b", after)
    with pytest.raises(sf.SFTError, match=r"'lin\.bias' has shape"):
        diff(before | {"lin.bias": torch.zeros(7)}, b)
    with pytest.raises(ValueError, match=r"'lin\.bias' has shape"):
        diff(before | {"lin.bias": torch.zeros(7)}, b, k=10)
    with pytest.raises(sf.SFTError, match="'steps' has dtype"):
        diff(before | {"steps": torch.zeros(5, dtype=torch.int64)}, b)
    with pytest.raises(ValueError, match="float64"):
        diff(a, after | {"lin.bias": after["lin.bias"].double()}, k=10)
    with pytest.raises(ValueError, match="NaN"):
        diff(a, after | {"lin.bias": after["lin.bias"] * torch.nan}, k=10)
    with pytest.raises(ValueError, match="either support, or k"):
        diff(a, b, k=3, support=diff(a, b).support)
    with pytest.raises(ValueError, match="either support, or k"):
        diff(a, b, exclude="lin*", support=diff(a, b).support)
    with pytest.raises(ValueError, match=r"k or density, not both; got k=3 and density=0\.5"):
        diff(a, b, k=3, density=0.5)
    with pytest.raises(ValueError, match="k must be between 1"):
        diff(a, b, k=0)
    with pytest.raises(TypeError, match="needs a path"):
        diff(before, b, identify=True)


def test_diff_gives_a_tied_tensor_one_name(tmp_path):
    tied, new = Model(tied=True), tuned(Model(tied=True))
    delta = diff(tied, new, k=50, eligible={"emb.weight"})
    assert delta.meta["aliases"] == {"emb.weight": ["out.weight"]}
    # Files of one side say so, files of the other leave the second name out.
    once = weights_of(new)
    assert "emb.weight" not in once or "out.weight" not in once
    twice = dict(new.state_dict())
    for base, tensors in ((tied, once), (weights_of(tied), twice), (tied, twice)):
        found = diff(base, tensors, k=50)
        kept = found.meta["aliases"]
        assert kept in ({"emb.weight": ["out.weight"]}, {"out.weight": ["emb.weight"]})
        assert found.bind(tied)
    # Untied by training: each goes its own way.
    apart = copy.deepcopy(new.state_dict())
    apart["out.weight"] = apart["emb.weight"] + 1
    found = diff(tied, apart)
    assert {"emb.weight", "out.weight"} <= {*found.layout.names}
    assert "aliases" not in found.meta
    # Tied by training, from values that differ: no difference says that.
    with pytest.raises(sf.SFTError, match="are one tensor in tuned"):
        diff(Model(tied=False), new)
    loose = Model(tied=False)
    apart = diff(loose, new, exclude="out*")
    assert "aliases" not in apart.meta
    assert apart.bind(loose)
    moved = new.emb.weight.detach() - loose.emb.weight.detach()
    assert_bits(apart.values("emb.weight"), moved[moved != 0])


def test_diff_records_the_files_of_the_base(tmp_path):
    a = saved(tmp_path / "a", weights_of(Model()), 2)
    delta = diff(a, tuned(Model()), k=10, identify=True, base={"id": "org/model"})
    assert delta.meta["base"]["files"] == Checkpoint(a).identity()
    assert delta.meta["base"]["id"] == "org/model"
    delta.save(tmp_path / "d.safetensors")
    assert sf.SparseDelta.load(tmp_path / "d.safetensors") == delta


PEAK = """
import re, sys, threading, time, torch
from sparse_ft import checkpoints
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
a, b, out, what = sys.argv[1:]
delta = checkpoints.diff(a, b, k=1000)
before, peak, done = anonymous(), 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
if what == "diff":
    checkpoints.diff(a, b, k=2000)
else:
    checkpoints.export(a, delta, out)
done = True
thread.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("what", "limit"), [("diff", 8), ("export", 24)])
def test_nothing_of_the_models_stays_in_memory(tmp_path, what, limit):
    # 12 tensors of 16 MiB in each of two models: 384 MiB. The allocator is told to keep nothing
    # that was freed.
    base = {f"w{i:02}": torch.randn(1 << 22) for i in range(12)}
    a = saved(tmp_path / "a", base, 2)
    b = saved(tmp_path / "b", {n: t + 0.1 for n, t in base.items()})
    del base
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(a), str(b), str(tmp_path / "out"), what],
        env={**os.environ, "PYTHONPATH": paths, "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < limit, f"{done.stdout} MiB of private memory"


# --- a merged checkpoint ------------------------------------------------------------------------


def composed(model, deltas, weights=None, heads=()):
    with sf.compose(model, deltas, weights, heads=heads):
        return {n: t.detach().clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("weights", [None, [0.7, -1.3, 0.0]], ids=str)
def test_export_gives_the_bits_of_compose(tmp_path, dtype, shards, weights):
    model = Model(dtype)
    base = saved(tmp_path / "a", weights_of(model), shards)
    deltas = [
        sf.SparseDelta.between(model, tuned(model, seed), heads=HEADS).astype(kind)
        for seed, kind in enumerate((torch.float32, torch.bfloat16, torch.float32))
    ]
    expected = composed(model, deltas, weights, heads=deltas[1])
    for order in ([0, 1, 2], [2, 0, 1]):
        out = export(
            base,
            [deltas[j] for j in order],
            tmp_path / f"out{order[0]}",
            weights=weights and [weights[j] for j in order],
            heads=[deltas[1]],
            progress=True,
        )
        found = load_file(Path(out) / "model.safetensors")
        assert found.keys() == expected.keys()
        for name in expected:
            assert_bits(found[name].float(), expected[name].float(), name)
            assert found[name].dtype == expected[name].dtype
    first, second = ((tmp_path / f"out{i}" / "model.safetensors").read_bytes() for i in (0, 2))
    assert first == second


def test_untouched_values_keep_every_bit(tmp_path):
    odd = torch.tensor([-0.0, 1e-45, torch.inf, -torch.inf, torch.nan, 3.0])
    odd[4:5].view(torch.int32)[0] = 0x7FC12345
    tensors = {"w": odd, "other": odd.to(torch.bfloat16), "b": torch.tensor([True, False])}
    base = saved(tmp_path / "a", tensors)
    support = sf.Support.from_indices(sf.Layout.of({"w": (6,)}), {"w": [0, 5]})
    delta = sf.SparseDelta(support, torch.tensor([0.0, 1.0]))
    export(base, delta, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_bits(found["w"][:5], odd[:5])
    assert found["w"][5] == 4.0
    assert_bits(found["other"], tensors["other"])
    assert torch.equal(found["b"], tensors["b"])


@given(st.integers(1, 400))
@settings(max_examples=25, deadline=None)
def test_shards_hold_each_tensor_once_and_no_more_than_they_may(limit):
    specs = {f"w{i}": (torch.float32, (i,)) for i in range(12)}
    files = checkpoints._shards(specs, limit)
    assert sorted(n for names in files.values() for n in names) == sorted(specs)
    for names in files.values():
        assert (
            sum(4 * specs[n][1][0] for n in names) <= limit
            or sum(specs[n][1][0] > 0 for n in names) == 1
        )
    if len(files) > 1:
        assert {re.sub(r"\d{5}", "#", f) for f in files} == {"model-#-of-#.safetensors"}


def test_large_exports_are_cut_into_shards(tmp_path):
    model = Model()
    base = saved(tmp_path / "a", weights_of(model))
    delta = sf.SparseDelta.between(model, tuned(model))
    out = Path(export(base, delta, tmp_path / "out", max_shard_bytes=100_000))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    expected = composed(model, delta)
    assert sorted(index["weight_map"]) == sorted(expected)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert {*index["weight_map"].values()} == {p.name for p in out.glob("*.safetensors")}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    again = Checkpoint(out)
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_rounded_once_to_another_data_type(tmp_path, dtype):
    model = Model()
    delta = sf.SparseDelta.between(model, tuned(model))
    out = export(saved(tmp_path / "a", weights_of(model)), delta, tmp_path / "out", dtype=dtype)
    found = load_file(Path(out) / "model.safetensors")
    for name, tensor in composed(model, delta).items():
        assert_bits(found[name], tensor.to(dtype) if tensor.is_floating_point() else tensor, name)
    said = str(dtype).removeprefix("torch.")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"torch_dtype": said, "sub": {"dtype": said}}


def test_a_wider_data_type_keeps_what_the_base_would_swallow(tmp_path):
    base = saved(tmp_path / "a", {"w": torch.ones(4, dtype=torch.bfloat16)})
    support = sf.Support.from_indices(sf.Layout.of({"w": (4,)}), {"w": [1]})
    delta = sf.SparseDelta(support, torch.tensor([1e-4]))
    export(base, delta, tmp_path / "same")
    assert load_file(tmp_path / "same" / "model.safetensors")["w"].tolist() == [1.0] * 4
    export(base, delta, tmp_path / "wide", dtype=torch.float32)
    found = load_file(tmp_path / "wide" / "model.safetensors")["w"]
    assert found.tolist() == [1.0, float(np.float32(1) + np.float32(1e-4)), 1.0, 1.0]
    large = sf.SparseDelta(support, torch.tensor([1e6]))
    with pytest.raises(sf.SFTError, match=r"'w' goes beyond the range of torch\.float16"):
        export(base, large, tmp_path / "narrow", dtype=torch.float16)
    assert not (tmp_path / "narrow").exists()


def test_the_files_beside_the_weights_are_copied(tmp_path):
    model = Model()
    base = saved(tmp_path / "a", weights_of(model), 2)
    kept = ["tokenizer.json", "vocab.txt", "spiece.model", "chat_template.jinja", "LICENSE", "m.py"]
    left = ["README.md", "pytorch_model.bin", "training_args.bin", "adapter_config.json"]
    for name in kept + left:
        (base / name).write_text(name)
    (base / "sub").mkdir()
    delta = sf.SparseDelta.between(model, tuned(model))
    out = Path(export(base, delta, tmp_path / "out"))
    assert {p.name for p in out.iterdir()} == {*kept, "config.json", "model.safetensors"}
    assert (out / "LICENSE").read_text() == "LICENSE"
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    # A link to a secret, in a folder that somebody else made, is not published with the model.
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(SFTFileError, match="outside its folder"):
        export(base, delta, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("names", [("emb.weight",), ("out.weight",), ("emb.weight", "out.weight")])
def test_a_tied_tensor_is_found_by_any_of_its_names(tmp_path, names):
    model = Model(tied=True)
    new = tuned(model)
    delta = sf.SparseDelta.between(model, new)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    base = {n: t for n, t in tensors.items() if n in names or "weight" not in n or "lin" in n}
    base |= {n: t for n, t in tensors.items() if n.startswith(("norm", "head"))}
    folder = saved(tmp_path / "a", base)
    out = export(folder, delta, tmp_path / "out")
    found = load_file(Path(out) / "model.safetensors")
    for name in names:
        assert_bits(found[name], new.emb.weight.detach(), name)
    if len(names) == 2:
        base["out.weight"] = base["out.weight"] + 1
        with pytest.raises(sf.SFTError, match="one tied tensor in the base model"):
            export(saved(tmp_path / "b", base), delta, tmp_path / "out2")


def test_heads_are_added_or_replaced_whole(tmp_path):
    model = Model()
    new = tuned(model)
    delta = sf.SparseDelta.between(model, new, heads=HEADS)
    tensors = weights_of(model)
    with_head = saved(tmp_path / "a", tensors)
    bare = saved(tmp_path / "b", {n: t for n, t in tensors.items() if n not in HEADS})
    for i, base in enumerate((with_head, bare)):
        out = export(base, delta, tmp_path / f"out{i}", heads=delta)
        found = load_file(Path(out) / "model.safetensors")
        assert all(torch.equal(found[n], new.state_dict()[n]) for n in HEADS)
        plain = load_file(Path(export(base, delta, tmp_path / f"plain{i}")) / "model.safetensors")
        assert all(torch.equal(plain[n], tensors[n]) for n in HEADS if n in plain)
    half = load_file(
        Path(export(bare, delta, tmp_path / "half", heads=delta, dtype=torch.bfloat16))
        / "model.safetensors"
    )
    assert_bits(half["head.weight"], new.head.weight.detach().bfloat16())
    other = saved(tmp_path / "c", tensors | {"head.bias": torch.zeros(5)})
    with pytest.raises(sf.SFTError, match=r"'head\.bias' has shape \(5,\)"):
        export(other, delta, tmp_path / "no", heads=delta)


def test_a_head_is_rounded_once(tmp_path):
    third = torch.full((3,), 1 / 3)
    base = saved(tmp_path / "a", {"w": torch.zeros(3), "h": torch.zeros(3).bfloat16()})
    delta = sf.SparseDelta.between({"w": torch.zeros(3)}, {"w": torch.ones(3)}, heads={"h": third})
    out = Path(export(base, delta, tmp_path / "out", heads=delta, dtype=torch.float32))
    assert_bits(load_file(out / "model.safetensors")["h"], third)
    out = Path(export(base, delta, tmp_path / "kept", heads=delta))
    assert_bits(load_file(out / "model.safetensors")["h"], third.bfloat16())


def test_a_head_may_not_take_the_name_of_the_metadata(tmp_path):
    base = saved(tmp_path / "a", {"w": torch.zeros(3)})
    heads = {"__metadata__": torch.ones(2)}
    delta = sf.SparseDelta.between({"w": torch.zeros(3)}, {"w": torch.ones(3)}, heads=heads)
    with pytest.raises(sf.SFTError, match="'__metadata__', which safetensors keeps for itself"):
        export(base, delta, tmp_path / "out", heads=delta)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_export_refuses_what_does_not_fit(tmp_path):
    model = Model()
    tensors = weights_of(model)
    base = saved(tmp_path / "a", tensors)
    delta = sf.SparseDelta.between(model, tuned(model))
    out = tmp_path / "out"
    for message, kind, arguments in (
        ("no deltas", ValueError, {"deltas": []}),
        ("2 weights for 1", ValueError, {"weights": [1, 2]}),
        ("finite", ValueError, {"weights": [float("nan")]}),
        ("not among the deltas", ValueError, {"heads": [-delta]}),
        ("must be float32", ValueError, {"dtype": torch.int8}),
        ("positive", ValueError, {"max_shard_bytes": 0}),
        (
            "replaces values",
            sf.SFTError,
            {"deltas": [sf.SparseDelta(delta.support, delta.val, meta={"kind": "replace"})]},
        ),
    ):
        with pytest.raises(kind, match=message):
            export(base, **({"deltas": delta, "out": out} | arguments))
    changed = tensors | {"lin.weight": tensors["lin.weight"] + 1}
    another = saved(tmp_path / "b", changed)
    with pytest.raises(sf.SFTError, match="another base model"):
        export(another, delta, out)
    shapes = saved(tmp_path / "c", tensors | {"lin.bias": torch.zeros(7)})
    with pytest.raises(sf.SFTError, match=r"'lin\.bias' has shape \(7,\)"):
        export(shapes, delta, out)
    renamed = {n.replace("lin.bias", "line.bias"): t for n, t in tensors.items()}
    with pytest.raises(sf.SFTError, match=r"no tensor 'lin\.bias'.*nearest name is 'line\.bias'"):
        export(saved(tmp_path / "d", renamed), delta, out)
    wide = saved(tmp_path / "e", tensors | {"lin.bias": tensors["lin.bias"].double()})
    with pytest.raises(sf.SFTError, match=r"'lin\.bias' has dtype torch\.float64"):
        export(wide, delta, out)
    assert not out.exists()
    export(another, delta, out, allow_base_mismatch=True)
    assert out.exists()


def test_a_misaligned_base_is_copied_one_tensor_at_a_time(tmp_path, monkeypatch):
    base = {f"w{i}": torch.randn(500) for i in range(8)}
    new = {name: tensor + 1 for name, tensor in base.items()}
    folder = saved(tmp_path / "a", base)
    raw = (folder / "model.safetensors").read_bytes()
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode()
    # One blank more, and no tensor is aligned.
    start = (len(text) + 1).to_bytes(8, "little") + text.encode() + b" "
    (folder / "model.safetensors").write_bytes(start + raw[8 + len(text) :])
    delta = sf.SparseDelta.between(base, new)
    at_once, seen, original = 0, [], Checkpoint.__getitem__

    def watched(self, name):
        nonlocal at_once
        tensor = original(self, name)
        seen.append(weakref.ref(tensor))
        at_once = max(at_once, sum(reference() is not None for reference in seen))
        return tensor

    monkeypatch.setattr(Checkpoint, "__getitem__", watched)
    out = export(folder, delta, tmp_path / "out")
    assert at_once <= 2
    assert len(seen) >= 8
    found = load_file(Path(out) / "model.safetensors")
    for name, tensor in new.items():
        assert_bits(found[name], tensor, name)
    other = saved(tmp_path / "b", {n: t + 1 for n, t in base.items()})
    with pytest.raises(sf.SFTError, match="made for another base model"):
        export(other, delta, tmp_path / "no")


def small():
    return sf.SparseDelta.between({"w": torch.zeros(3)}, {"w": torch.ones(3)})


@pytest.mark.parametrize("wrong", ["link", "config"])
def test_the_files_beside_are_checked_before_a_weight_is_written(tmp_path, monkeypatch, wrong):
    base = saved(tmp_path / "a", {"w": torch.zeros(3)})
    if wrong == "link":
        (base / "notes.txt").symlink_to("nowhere")
    else:
        (base / "config.json").write_text("{")

    def none(*_):
        raise AssertionError("a weight was written")

    monkeypatch.setattr(checkpoints, "write_safetensors", none)
    with pytest.raises(SFTFileError, match=r"notes\.txt: there is no|config\.json: is not valid"):
        export(base, small(), tmp_path / "out", dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_replaced_is_refused(tmp_path, monkeypatch):
    base = saved(tmp_path / "a", {"w": torch.zeros(3)})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(sf.SFTError, match="is the working folder"):
        export(base, small(), ".")
    assert os.listdir(".") == []
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(tmp_path / "disk"))
    with pytest.raises(sf.SFTError, match="a file system is mounted"):
        export(base, small(), tmp_path / "disk")


def test_infinities_of_a_configuration_are_kept(tmp_path):
    base = saved(tmp_path / "a", {"w": torch.zeros(3)})
    (base / "config.json").write_text('{"limit": [0.0, Infinity], "torch_dtype": "float32"}')
    out = Path(export(base, small(), tmp_path / "out", dtype=torch.bfloat16))
    assert json.loads((out / "config.json").read_text()) == {
        "limit": [0.0, float("inf")],
        "torch_dtype": "bfloat16",
    }


def test_export_overwrites_nothing(tmp_path):
    model = Model()
    base = saved(tmp_path / "a", weights_of(model))
    delta = sf.SparseDelta.between(model, tuned(model))
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    for out in (full, file, link, base):
        with pytest.raises(sf.SFTError, match="exists and is no empty folder"):
            export(base, delta, out)
    with pytest.raises(sf.SFTError, match="there is no folder"):
        export(base, delta, tmp_path / "no" / "out")
    assert (full / "x").read_text() == "x"
    empty = tmp_path / "empty"
    empty.mkdir()
    export(base, delta, empty)
    assert (empty / "model.safetensors").exists()


@pytest.mark.parametrize("moment", ["tensor", "copy", "rename"])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, moment):
    model = Model()
    base = saved(tmp_path / "a", weights_of(model))
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    delta = sf.SparseDelta.between(model, tuned(model))
    calls = []

    def interrupted(*_):
        calls.append(1)
        raise KeyboardInterrupt

    if moment == "tensor":
        monkeypatch.setattr(checkpoints, "compose_", interrupted)
    else:
        monkeypatch.setattr(
            *{"copy": (checkpoints.shutil, "copyfile"), "rename": (os, "rename")}[moment],
            interrupted,
        )
    with pytest.raises(KeyboardInterrupt):
        export(base, delta, tmp_path / "out")
    assert calls
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before


def test_one_delta_with_several_weights_is_added_in_the_order_of_compose(tmp_path):
    model = Model()
    base = saved(tmp_path / "a", weights_of(model), 1)
    # The sum of these terms rounds by their order.
    delta, weights = sf.SparseDelta.between(model, tuned(model, 1)), [0.7, -0.3, 0.1]
    expected = composed(model, [delta] * 3, weights)
    for n, order in enumerate(itertools.permutations(weights)):
        out = export(base, [delta] * 3, tmp_path / f"out{n}", weights=order)
        for name, tensor in Checkpoint(out).items():
            assert_bits(tensor, expected[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_loads_what_export_writes(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    config = transformers.XLMRobertaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.XLMRobertaForMaskedLM(config).to(dtype)
    model.save_pretrained(tmp_path / "base")
    model = transformers.XLMRobertaForMaskedLM.from_pretrained(tmp_path / "base")
    new = tuned(model)
    new.save_pretrained(tmp_path / "tuned")
    delta = diff(tmp_path / "base", tmp_path / "tuned", k=2000)
    second = diff(tmp_path / "base", tmp_path / "tuned", k=300)
    out = export(
        tmp_path / "base",
        [delta, second],
        tmp_path / "out",
        weights=[1, 0.5],
        max_shard_bytes=40000,
    )
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    loaded = transformers.XLMRobertaForMaskedLM.from_pretrained(out)
    assert loaded.lm_head.decoder.weight is loaded.get_input_embeddings().weight
    for name, tensor in composed(model, [delta, second], [1, 0.5]).items():
        assert_bits(loaded.state_dict()[name], tensor, name)
    # A task model, whose classifier the base lacks.
    task = transformers.XLMRobertaForTokenClassification.from_pretrained(
        tmp_path / "base", config=config
    )
    grown = tuned(task, 3)
    heads = ("classifier.weight", "classifier.bias")
    ner = sf.SparseDelta.between(task, grown, heads=heads)
    out = export(tmp_path / "base", [delta, ner], tmp_path / "ner", heads=ner)
    loaded = transformers.XLMRobertaForTokenClassification.from_pretrained(out, num_labels=3)
    shared = delta.support.restrict(
        n for n in delta.layout.names if n in dict(task.named_parameters())
    )
    own = sf.SparseDelta.between(
        {n: t for n, t in model.state_dict().items() if n in shared.layout},
        {n: t for n, t in new.state_dict().items() if n in shared.layout},
        support=shared,
    )
    # Two terms add up to the same in either order, so that the other content id is no matter.
    with sf.compose(task, [own, ner], heads=ner):
        for name, tensor in task.state_dict().items():
            assert_bits(loaded.state_dict()[name], tensor, name)


@pytest.mark.filterwarnings("ignore:diff. left out 5 tensors .'lm_head:UserWarning")
def test_the_documented_way_from_a_language_model_to_a_task(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.XLMRobertaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    base = transformers.XLMRobertaForMaskedLM(config)
    base.save_pretrained("xlm-roberta-base")
    swahili = tuned(base)
    swahili.save_pretrained("my-swahili-model")
    token_classifier = transformers.XLMRobertaForTokenClassification
    task = token_classifier.from_pretrained("xlm-roberta-base", num_labels=7)
    ner = tuned(task, seed=2)
    ner.save_pretrained("my-ner-model")

    page = (ROOT / "docs" / "exchange.md").read_text("utf-8")
    block = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]
    names = {}
    exec(compile(block, "exchange.md", "exec"), names)
    k = int(0.028 * names["ner"].layout.numel)
    assert names["ner"].nnz == names["swahili"].nnz == k
    assert names["swahili"].layout == names["ner"].layout
    assert all(name.startswith("roberta.") for name in names["ner"].layout.names)
    loaded = token_classifier.from_pretrained("merged/", num_labels=7)
    assert torch.equal(loaded.classifier.weight, ner.classifier.weight)
    with sf.compose(task, [names["swahili"], names["ner"]], heads=names["ner"]):
        for name, tensor in task.state_dict().items():
            assert_bits(loaded.state_dict()[name], tensor, name)
    # With the output layer in it, the task's model has no place for the language's entries.
    whole = diff("xlm-roberta-base/", "my-swahili-model/", density=0.028)
    with pytest.raises(sf.SFTError, match="lm_head"):
        sf.compose(task, [whole, names["ner"]])
