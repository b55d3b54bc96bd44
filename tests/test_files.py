"""The SFT file: what is written, what is read, and that nothing malformed gets in."""

import contextlib
import errno
import io
import json
import os
import re
import stat
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hostile import sft_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as library_save
from torch import nn

import sparse_ft.files
from sparse_ft.delta import SFTError, SparseDelta
from sparse_ft.files import FILE_NAME, SFTFileError, describe, load
from sparse_ft.tiles import Layout, Support

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "a.empty": (0, 3),
    "b.scalar": (),
    "c.one": (1,),
    "d.tile": (65535,),
    "e.tile": (65536,),
    "f.tile": (65537,),
    "g.long": (200003,),
    "h.cube": (7, 5, 3),
}


def make(shapes=None, density=0.1, dtype=torch.float32, seed=0, **meta) -> SparseDelta:
    rng = np.random.default_rng(seed)
    layout = Layout.of(SHAPES if shapes is None else shapes)
    chosen = {}
    for name, numel in zip(layout.names, layout.numels, strict=True):
        k = min(numel, max(1, int(density * numel))) if density else 0
        chosen[name] = rng.choice(numel, k, replace=False)
    support = Support.from_indices(layout, chosen)
    val = torch.from_numpy(rng.standard_normal(support.nnz, dtype=np.float32)).to(dtype)
    return SparseDelta(support, val, meta=meta)


def heads() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "head.w": torch.randn(3, 4, generator=g),
        "head.b": torch.randn(3, generator=g).bfloat16(),
        "head.t": torch.randn(4, 3, generator=g).half().T,
        "head.s": torch.tensor(2.5, dtype=torch.float64),
        "head.z": torch.zeros(0, 3),
    }


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 1.0])
@pytest.mark.parametrize("with_heads", [False, True])
def test_round_trip(tmp_path, dtype, density, with_heads):
    delta = make(density=density, dtype=dtype, role="language", lang="sw")
    delta = SparseDelta(delta.support, delta.val, heads() if with_heads else None, delta.meta)
    path = delta.save(tmp_path / "x.safetensors")
    again = SparseDelta.load(path)
    assert again == delta
    assert again.content_id == delta.content_id
    assert again.meta["lang"] == "sw"
    assert again.val.dtype == dtype
    for name, head in delta.heads.items():
        assert again.heads[name].dtype == head.dtype
        assert again.heads[name].shape == head.shape
        assert torch.equal(again.heads[name], head)
    for (n1, i1, v1), (n2, i2, v2) in zip(delta, again, strict=True):
        assert n1 == n2
        assert torch.equal(i1, i2)
        assert torch.equal(v1, v2)
    again.save(tmp_path / "y.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


@pytest.mark.parametrize("numel", [0, 1, 65535, 65536, 65537, 131072, 200003])
@pytest.mark.parametrize("which", ["none", "first", "last", "all"])
def test_round_trip_at_tile_borders(tmp_path, numel, which):
    positions = {"none": [], "first": range(min(numel, 1)), "last": range(numel)[-1:]}
    layout = Layout.of({"w": (numel,)})
    support = Support.from_indices(layout, {"w": list(positions.get(which, range(numel)))})
    delta = SparseDelta(support, torch.arange(1, support.nnz + 1, dtype=torch.float32) / 100)
    again = load(delta.save(tmp_path / "x.safetensors"))
    assert again == delta
    assert torch.equal(again.indices("w"), support.indices("w"))


def test_no_parameters_at_all(tmp_path):
    layout = Layout.of({})
    delta = SparseDelta(Support.from_indices(layout, {}), torch.zeros(0), heads())
    assert load(delta.save(tmp_path / "x.safetensors")) == delta


def test_special_values_keep_their_bits(tmp_path):
    val = torch.tensor([-0.0, 1e-45, 3.4e38, -1e-38])
    support = Support.from_indices(Layout.of({"w": (9,)}), {"w": [1, 2, 3, 8]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = load(SparseDelta(support, val).save(tmp_path / "x.safetensors"))
    assert torch.equal(again.val.view(torch.int32), val.view(torch.int32))


def test_metadata_survives(tmp_path):
    meta = {
        "kind": "replace",
        "base": {"id": "some/model", "revision": "abc", "arch": "XLMR", "digest_f32": "0" * 16},
        "trained_on": [{"id": "ab" * 32, "alpha": 1}, {"id": "cd" * 32, "alpha": -0.5}],
        "role": "task",
        "lang": "zh-Hans",
        "task": "NER “quoted” ünïcode 漢",
        "license": "Apache-2.0",
        "recipe": {"a": [1, 2.5, None, True, "x"], "b": {"c": 0.1}},
        "value_loss": "ternary",
        "aliases": {"h.cube": ["other", "third"]},
        "dtypes": {"h.cube": "BF16"},
        "dense_roles": {"head.w": "param"},
    }
    delta = make()
    delta = SparseDelta(delta.support, delta.val, heads(), meta)
    again = load(delta.save(tmp_path / "x.safetensors"))
    assert again.meta == delta.meta == meta
    assert again == delta


def test_loaded_tensors_are_private_and_writable(tmp_path):
    path = make().save(tmp_path / "x.safetensors")
    before = Path(path).read_bytes()
    delta = load(path)
    delta.val.zero_()
    delta.support.ptr.add_(1)
    assert Path(path).read_bytes() == before


# --- mapped ---


@pytest.mark.parametrize("density", [0.0, 0.1])
def test_mapped_is_read(tmp_path, density):
    delta = make(density=density, lang="sw")
    delta = SparseDelta(delta.support, delta.val, heads(), delta.meta)
    path = delta.save(tmp_path / "x.safetensors")
    again = SparseDelta.load(path, mmap=True)
    assert again == delta
    assert again.content_id == delta.content_id


def test_mapped_shares_the_file_until_it_is_written(tmp_path):
    path = make().save(tmp_path / "x.safetensors")
    before = Path(path).read_bytes()
    delta, copy = load(path, mmap=True), load(path)
    delta.val[1] = 7.0  # of our own now
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)  # the last tensor is idx
        file.write(b"\x12\x34")
    assert delta.support.idx[-1] == 0x3412
    assert copy.support.idx[-1] != 0x3412
    assert Path(path).read_bytes()[:-2] == before[:-2]


def test_mapped_files_survive_a_save(tmp_path):
    path = make(seed=1).save(tmp_path / "x.safetensors")
    delta = load(path, mmap=True)
    make(seed=2).save(path)
    assert delta == make(seed=1)


def test_mapped_tensors_between_two_elements(tmp_path):
    # A writer that pads no header: the tensors begin at an odd byte.
    file = sft_files.valid()
    file.header = json.dumps(file.header_dict(), separators=(",", ":")).encode()
    file.header += b" " * (1 - len(file.header) % 2)
    path = tmp_path / "x.safetensors"
    path.write_bytes(file.build())
    delta = load(path, mmap=True)
    assert delta == load(path)
    assert delta.val.data_ptr() % 4 == delta.support.idx.data_ptr() % 2 == 0


def test_a_file_that_shrinks_before_it_is_mapped(tmp_path, monkeypatch):
    path = make().save(tmp_path / "x.safetensors")
    original = sparse_ft.files._Reader._document

    def shrink(self, text):
        os.truncate(path, 3000)
        return original(self, text)

    monkeypatch.setattr(sparse_ft.files._Reader, "_document", shrink)
    with pytest.raises(SFTFileError, match="became shorter"):
        load(path, mmap=True)


# --- bytes --------------------------------------------------------------------------------------


def test_the_safetensors_library_reads_it(tmp_path):
    delta = make(dtype=torch.bfloat16)
    delta = SparseDelta(delta.support, delta.val, heads())
    path = delta.save(tmp_path / "x.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert list(metadata) == ["sparse_ft"]
    assert set(tensors) == {"idx", "ptr", "val", *(f"dense.{i}" for i in range(5))}
    assert torch.equal(tensors["idx"].view(torch.int16), delta.support.idx.view(torch.int16))
    assert torch.equal(tensors["ptr"].to(torch.int64), delta.support.ptr)
    assert torch.equal(tensors["val"], delta.val)
    for i, head in enumerate(delta.heads.values()):
        assert torch.equal(tensors[f"dense.{i}"], head)
    # A file that the library writes from the same parts is an SFT too.
    rewritten = tmp_path / "y.safetensors"
    rewritten.write_bytes(library_save(tensors, metadata))
    assert load(rewritten) == delta


def test_data_are_aligned(tmp_path):
    delta = make(dtype=torch.float16)
    delta = SparseDelta(delta.support, delta.val, heads())
    raw = Path(delta.save(tmp_path / "x.safetensors")).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    assert (8 + size) % 8 == 0
    header = json.loads(raw[8 : 8 + size])
    del header["__metadata__"]
    for entry in header.values():
        assert entry["data_offsets"][0] % sft_files.WIDTHS[entry["dtype"]] == 0


def test_equals_the_independent_encoder(tmp_path):
    file = sft_files.valid()
    (tmp_path / "a.safetensors").write_bytes(file.build())
    delta = load(tmp_path / "a.safetensors")
    for name, positions in sft_files.POSITIONS.items():
        assert delta.indices(name).tolist() == positions
    assert delta.values("b").tolist() == [0.125, 0.75]
    assert delta.heads["head.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    delta.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == file.build()


def test_content_id_is_fixed_for_ever(tmp_path):
    # Files are named, ordered and cached by it: a change of this value is a new format version.
    wanted = "ae6d838c33ca67d69f1275e656ff5dce7ea4dbe87629126d84c4a8d1a711aa23"
    assert sft_files.valid().document["content_id"] == wanted
    (tmp_path / "a.safetensors").write_bytes(sft_files.valid().build())
    assert load(tmp_path / "a.safetensors").content_id == wanted


SCRIPT = """
import sys, torch
from sparse_ft.delta import SparseDelta
from sparse_ft.tiles import Layout, Support
names = [f"layer.{i}.weight" for i in range(40)]
order = names if sys.argv[2] == "up" else names[::-1]
layout = Layout.of({n: (50, 7) for n in order})
support = Support.from_indices(layout, {n: [3, 1, 349] for n in order})
meta = {"lang": "sw", "base": {"id": "m", "revision": "r"}, "recipe": {"b": 1, "a": 2}}
meta = dict(meta.items() if sys.argv[2] == "up" else reversed(list(meta.items())))
heads = {n: torch.ones(2) for n in ("xy" if sys.argv[2] == "up" else "yx")}
SparseDelta(support, torch.arange(120.0), heads, meta).save(sys.argv[1])
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    found = []
    for seed, order in (("1", "up"), ("2", "down")):
        path = tmp_path / f"{seed}.safetensors"
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path), order],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
            check=True,
        )
        found.append(path.read_bytes())
    assert found[0] == found[1]


def test_content_id_ignores_rewrites_that_keep_values(tmp_path):
    delta = make(lang="sw", recipe={"method": "LT-SFT"}, base={"id": "m"})
    same = SparseDelta(
        delta.support,
        delta.val,
        meta={"base": {"id": "m"}, "lang": "sr", "role": "x", "kind": "diff"},
    )
    assert same.content_id == delta.content_id
    assert same == delta
    file = sft_files.valid()
    plain = file.document["content_id"]
    file.document["license"] = "MIT"
    file.document["recipe"] = {"other": 1}
    file.text = json.dumps(file.document, indent=1, sort_keys=False)  # not canonical
    (tmp_path / "a.safetensors").write_bytes(file.build())
    assert load(tmp_path / "a.safetensors").content_id == plain


@pytest.mark.parametrize(
    "what", ["value", "position", "shape", "name", "head", "base", "kind", "loss"]
)
def test_content_id_tells_contents_apart(what):
    layout = Layout.of({"v": (10,), "w": (10,)})

    def build(layout=layout, at=3, value=1.0, head=1.0, **meta):
        support = Support.from_indices(layout, {layout.names[-1]: [at]})
        return SparseDelta(support, torch.tensor([value]), {"h": torch.tensor([head])}, meta)

    other = {
        "value": lambda: build(value=-1.0),
        "position": lambda: build(at=4),
        "shape": lambda: build(Layout.of({"v": (10,), "w": (5, 2)})),
        "name": lambda: build(Layout.of({"v": (10,), "x": (10,)})),
        "head": lambda: build(head=2.0),
        "base": lambda: build(base={"id": "m"}),
        "kind": lambda: build(kind="replace"),
        "loss": lambda: build(value_loss="bf16"),
    }[what]()
    assert other.content_id != build().content_id
    assert other != build()


def test_minor_versions_may_say_more(tmp_path):
    file = sft_files.valid()
    wanted = file.document["content_id"]
    file.document["version"] = [1, 7]
    file.document["novelty"] = {"x": [1]}
    for item in (*(file.document[key][0] for key in ("params", "dense", "trained_on")),):
        item["q"] = 3
    file.document["base"]["q"] = file.document["base"]["files"][0]["q"] = {"x": 1}
    path = tmp_path / "a.safetensors"
    path.write_bytes(file.build())
    assert load(path).content_id == wanted
    file.document["nnz"] = 7
    path.write_bytes(file.build())
    with pytest.raises(SFTFileError, match=r"nnz: .* format version 1.7, newer than the 1.0"):
        load(path)


@pytest.mark.parametrize(("a", "b"), [(1, 1.0), (0.0, -0.0), (2, 2.0)])
def test_equal_deltas_have_equal_ids(tmp_path, a, b):
    first, second = (make(trained_on=[{"id": "ab" * 32, "alpha": n}]) for n in (a, b))
    assert first == second
    assert first.content_id == second.content_id
    assert load(first.save(tmp_path / "x.safetensors")) == second


def test_ptr_is_64_bit_from_two_to_the_32_entries_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_ft.files, "WIDE", 100)
    delta = make()
    path = delta.save(tmp_path / "x.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        assert file.get_tensor("ptr").dtype == torch.uint64
    assert load(path) == delta
    monkeypatch.undo()
    with pytest.raises(SFTFileError, match="tensor 'ptr': must be U32"):
        load(path)


# --- writing ------------------------------------------------------------------------------------


def test_save_into_a_folder(tmp_path):
    delta = make()
    assert delta.save(tmp_path) == str(tmp_path / FILE_NAME)
    assert load(tmp_path) == delta
    assert load(str(tmp_path)) == delta


@pytest.mark.parametrize("at", ["write", "replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, at):
    path = tmp_path / "x.safetensors"
    old = make(seed=1)
    old.save(path)

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, {"write": "fsync", "replace": "replace"}[at], fail)
    with pytest.raises(OSError, match="no space left"):
        make(seed=2).save(path)
    monkeypatch.undo()
    assert load(path) == old
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("limit", [0, 4000, 60_000])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, limit):
    """No space for the header, for its end, for the tensors."""
    path = tmp_path / "x.safetensors"
    old = make(seed=1)
    old.save(path)

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + memoryview(data).nbytes > limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def full(name, mode):
        return io.BufferedWriter(Full(name, mode))

    monkeypatch.setattr(sparse_ft.files, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        make(seed=2).save(path)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert load(path) == old
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.skipif(resource is None, reason="no limits here")
def test_a_write_that_the_system_refuses(tmp_path):
    path = tmp_path / "x.safetensors"
    old = make(seed=1)
    old.save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            make(seed=2).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load(path) == old
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_save_replaces_and_keeps_open_files_whole(tmp_path):
    path = tmp_path / "x.safetensors"
    make(seed=1).save(path)
    with open(path, "rb") as file:
        before = path.read_bytes()
        make(seed=2).save(path)
        assert file.read() == before
    assert load(path) == make(seed=2)


def test_save_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "x.safetensors"
    link.symlink_to(tmp_path / "real" / "y.safetensors")
    make().save(link)
    assert link.is_symlink()
    assert load(tmp_path / "real" / "y.safetensors") == make() == load(link)


def test_saved_files_obey_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = make().save(tmp_path / "x.safetensors")
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640


def test_save_says_what_a_path_must_be(tmp_path):
    delta = make()
    with pytest.raises(SFTError, match=r"must end in .safetensors, or be an existing folder"):
        delta.save(tmp_path / "x.bin")
    with pytest.raises(SFTError, match="there is no folder"):
        delta.save(tmp_path / "none" / "x.safetensors")
    (tmp_path / "x.safetensors").mkdir()
    (tmp_path / "x.safetensors" / FILE_NAME).mkdir()
    with pytest.raises(SFTError, match="not a regular file"):
        delta.save(tmp_path / "x.safetensors")
    with pytest.raises(TypeError):
        delta.save(3)


def test_save_checks_what_it_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    layout = Layout.of({"w": (9,)})
    backwards = torch.tensor([3, 1]).to(torch.uint16)
    support = Support(layout, backwards, torch.tensor([0, 2]), check=False)
    with pytest.raises(SFTError, match=r"not strictly ascending .*'w'"):
        SparseDelta(support, torch.ones(2)).save(path)
    delta = make()
    delta.val[0] = float("nan")
    with pytest.raises(SFTError, match=r"'b.scalar' at flat index 0 is nan"):
        delta.save(path)
    delta = make()
    delta.meta["lang"] = "not a tag"
    with pytest.raises(SFTError, match=r"lang: .* language tag"):
        delta.save(path)
    delta = make(recipe={"x": [["y" * 4000] * 4500]})
    with pytest.raises(SFTError, match=r"header takes .* bytes, and 16,777,216 are the limit"):
        delta.save(path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("shapes", "heads", "recipe", "message"),
    [
        ({"w": [1] * 33}, {}, {}, r"params\[0\] 'w'.*at most 32 sizes"),
        ({"w": (1 << 60, 0)}, {}, {}, "more than 2\\^48 elements"),
        ({}, {"h": torch.ones([1] * 33)}, {}, "at most 32 sizes"),
        ({}, {"h": torch.ones(0, 1 << 60)}, {}, "more than 2\\^48 elements"),
        ({}, {}, {"x": ["[" * 4096] * 300}, "1,048,576 lists and objects"),
        ({f"{i}": () for i in range(101)}, {}, {}, "at most 100 items"),
    ],
)
def test_save_writes_nothing_that_load_refuses(
    tmp_path, monkeypatch, shapes, heads, recipe, message
):
    monkeypatch.setattr(sparse_ft.files, "MAX_TENSORS", 100)
    path = tmp_path / "x.safetensors"
    make().save(path)
    support = Support.from_indices(Layout.of(shapes), {})
    delta = SparseDelta(support, torch.zeros(0), heads, {"recipe": recipe})
    with pytest.raises(SFTError, match=f"^SparseDelta.save: .*{message}"):
        delta.save(path)
    assert load(path) == make()
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_type_for_each_of_many_parameters(tmp_path):
    names = [f"{i:x}" for i in range(70_000)]
    support = Support.from_indices(Layout.of(dict.fromkeys(names, ())), {"7": [0]})
    delta = SparseDelta(support, torch.ones(1), meta={"dtypes": dict.fromkeys(names, "F16")})
    assert load(delta.save(tmp_path / "x.safetensors")) == delta


def test_names_as_long_as_the_system_takes_them(tmp_path):
    path = tmp_path / ("漢" * 80 + ".safetensors")  # 252 bytes of 255
    make().save(path)
    assert load(path) == make()


# --- reading: what is no file -------------------------------------------------------------------


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(SFTFileError, match=r"none.safetensors: there is no such file.*folder"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(SFTFileError, match=r"there is no such file.*id of a Hub repository"):
        load("cambridgeltl/xlmr-lang-sft-sw-small")
    with pytest.raises(SFTFileError, match=r"the folder holds no file sft.safetensors"):
        load(tmp_path)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SFTFileError, match=r"is a link to .*nowhere.*, which does not exist"):
        load(tmp_path / "link.safetensors")
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(SFTFileError, match="not a regular file"):
        load(tmp_path)
    with pytest.raises(SFTFileError, match="NUL"):
        load("a\0b")
    with pytest.raises(TypeError):
        load(None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(SFTFileError, match="not a regular file"):
        load(tmp_path / FILE_NAME)
    with pytest.raises(SFTError, match="not a regular file"):
        make().save(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_unreadable_file(tmp_path):
    path = tmp_path / "x.safetensors"
    make().save(path)
    path.chmod(0)
    with pytest.raises(SFTFileError, match="cannot be opened: Permission denied"):
        load(path)


def test_legacy_files_are_read_by_their_name(tmp_path):
    entry = {"size": torch.Size([3]), "index_steps": [1], "values": torch.tensor([0.5])}
    torch.save({"diffs": {"w": entry}, "abs": {}}, tmp_path / "pytorch_diff.bin")
    for source in (tmp_path, tmp_path / "pytorch_diff.bin"):
        with pytest.warns(UserWarning, match="which base model"):
            delta = load(source)
        assert [(n, i.tolist(), v.tolist()) for n, i, v in delta] == [("w", [1], [0.5])]
    # The folder's own file comes first.
    make().save(tmp_path)
    assert load(tmp_path) == make()
    os.rename(tmp_path / "pytorch_diff.bin", tmp_path / "x.safetensors")
    with pytest.raises(SFTFileError, match=r"PyTorch .pickle. file.* name that ends in .bin"):
        load(tmp_path / "x.safetensors")


def test_checkpoints_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(library_save({"w": torch.ones(3)}, {"format": "pt"}))
    with pytest.raises(SFTFileError, match=r"not an SFT.*SparseDelta.between"):
        load(path)


def test_max_bytes(tmp_path):
    path = make().save(tmp_path / "x.safetensors")
    with pytest.raises(SFTFileError, match="max_bytes = 1,000"):
        load(path, max_bytes=1000)


def test_a_file_of_holes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SFTFileError, match="bytes long, and max_bytes"):
        load(path)


def test_a_file_that_shrinks_meanwhile(tmp_path, monkeypatch):
    path = make().save(tmp_path / "x.safetensors")
    original = sparse_ft.files._Reader._document

    def shrink(self, text):
        os.truncate(path, 3000)
        return original(self, text)

    monkeypatch.setattr(sparse_ft.files._Reader, "_document", shrink)
    with pytest.raises(SFTFileError, match="became shorter"):
        load(path)


# --- reading: malformed files -------------------------------------------------------------------


def test_the_file_that_is_broken_is_right(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(sft_files.valid().build())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", sorted(sft_files.CASES))
def test_hostile(tmp_path, name, mmap):
    path = tmp_path / "x.safetensors"
    path.write_bytes(sft_files.build(name))
    message = sft_files.CASES[name][0]
    with pytest.raises(SFTFileError, match=message) as caught:
        load(path, mmap=mmap)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert len(said) < 1000
    assert said.isprintable()
    with pytest.raises(SFTFileError, match=message):
        describe(path)


def boundaries() -> list[int]:
    raw = sft_files.valid().build()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    del header["__metadata__"]
    points = {0, 1, 7, 8, 9, 8 + size - 1, 8 + size}
    for entry in header.values():
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        points |= {start, start + 1, end - 1, end}
    return sorted(points - {len(raw)})


@pytest.mark.parametrize("low", [0x50, 0x80])
def test_any_header_length_is_read(tmp_path, low):
    # The lowest byte of the length may look like the first byte of a pickle or an archive.
    for pad in range(64):
        file = sft_files.valid()
        file.document["license"] = "x" * (pad * 8 + 1)
        raw = file.build()
        if raw[0] == low:
            break
    assert raw[0] == low
    (tmp_path / "x.safetensors").write_bytes(raw)
    assert load(tmp_path / "x.safetensors").nnz == 8


@pytest.mark.parametrize("length", boundaries())
def test_truncated(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(sft_files.valid().build()[:length])
    with pytest.raises(SFTFileError, match=r"too short|truncated"):
        load(path)


MEMORY = """
import resource, sys, torch
from pathlib import Path
from sparse_ft.files import SFTFileError, load
import numpy, sparse_ft_kernels
paths = sorted(Path(sys.argv[1]).glob("*.safetensors"))
load(paths[0])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20),) * 2)
for path in paths[1:]:
    try:
        load(path)
    except SFTFileError:
        continue
    raise AssertionError(path)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(paths), grown)
assert grown < 400 << 10, grown
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_bounded(tmp_path):
    (tmp_path / "0.safetensors").write_bytes(sft_files.valid().build())
    for i, name in enumerate(sorted(sft_files.CASES)):
        (tmp_path / f"1-{i:04}.safetensors").write_bytes(sft_files.build(name))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


VALID = sft_files.valid().build()
HEADER_END = 8 + struct.unpack("<Q", VALID[:8])[0]
PLACES = st.one_of(
    st.integers(0, 8), st.integers(8, HEADER_END - 1), st.integers(0, len(VALID) - 1)
)


def outcome(path: Path, raw: bytes, wanted: SparseDelta) -> None:
    path.write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            delta = load(path)
        except SFTFileError:
            return
    assert delta == wanted


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(PLACES, st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_are_seen(tmp_path, flips):
    (tmp_path / "valid").write_bytes(VALID)
    raw = bytearray(VALID)
    for place, change in flips:
        raw[place] ^= change
    outcome(tmp_path / "x", bytes(raw), load(tmp_path / "valid"))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(PLACES, PLACES, st.binary(max_size=40))
def test_spliced_bytes_are_seen(tmp_path, start, stop, middle):
    (tmp_path / "valid").write_bytes(VALID)
    raw = VALID[: min(start, stop)] + middle + VALID[max(start, stop) :]
    outcome(tmp_path / "x", raw, load(tmp_path / "valid"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_json_in_any_field(tmp_path, data):
    file = sft_files.valid()
    (tmp_path / "valid").write_bytes(VALID)
    target = file.document
    key = data.draw(st.sampled_from(sorted(target)))
    while isinstance(target[key], dict | list) and target[key] and data.draw(st.booleans()):
        target = target[key]
        key = data.draw(
            st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target)))
        )
    target[key] = data.draw(JSON)
    # Signed or not: with a right content id no damage is assumed, and other content may load.
    if data.draw(st.booleans()):
        outcome(tmp_path / "x", file.build(), load(tmp_path / "valid"))
        return
    try:
        file.sign()
    except (TypeError, KeyError, ValueError):
        return
    (tmp_path / "x").write_bytes(file.build())
    with contextlib.suppress(SFTFileError):
        load(tmp_path / "x")


def test_a_model_is_untouched_by_a_bad_file(tmp_path):
    model = nn.Linear(3, 3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name in ("idx beyond b", "val nan F32", "val changed", "nnz another"):
        path = tmp_path / "x.safetensors"
        path.write_bytes(sft_files.build(name))
        with pytest.raises(SFTFileError):
            load(path).bind(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# --- warnings and describe ----------------------------------------------------------------------


def test_improbable_values_are_mentioned(tmp_path):
    support = Support.from_indices(Layout.of({"w": (9,)}), {"w": [1, 2, 3, 8]})
    path = tmp_path / "x.safetensors"
    SparseDelta(support, torch.tensor([1.0, -2e4, 0.0, 0.0])).save(path)
    with pytest.warns(UserWarning, match=r"x.safetensors: val runs from -2e\+04 to 1"):
        load(path)
    SparseDelta(support, torch.tensor([1.0, 0.0, -0.0, 0.0])).save(path)
    with pytest.warns(UserWarning, match="3 of 4 values are 0"):
        load(path)
    SparseDelta(support, torch.tensor([1.0, 0.0, 0.0, 2.0])).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path)


def test_describe(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(sft_files.valid().build())
    said = describe(path)
    assert list(said) == [
        *("file", "bytes", "format", "kind", "role", "lang", "task", "license", "entries"),
        *("density", "parameters", "heads", "base", "trained on", "values"),
        *("recipe: frozen", "recipe: k_requested", "recipe: l1", "recipe: method", "content id"),
        *("a", "b", "s"),
    ]
    assert said["entries"] == "8 of 80,004"
    assert said["parameters"] == "4, 3 of them with entries"
    assert said["heads"] == "head.bias 2 float32, head.weight 2×3 float16"
    assert said["a"] == "5 of 80,000 entries, 62.5% of all"
    assert re.match(r"1 × cdcd", str(said["trained on"]))
    assert all(isinstance(value, str | int) for value in said.values())
    empty = SparseDelta(Support.from_indices(Layout.of({"w": (3,)}), {}), torch.zeros(0))
    said = describe(empty.save(tmp_path / "y.safetensors"))
    assert said["heads"] == "none"
    assert said["base"] == "not recorded"
    assert said["trained on"] == "the base alone"


def run_documented(which: int, what, folder: Path, monkeypatch) -> dict:
    """The names that a Python block of the specification leaves, run on a file of a delta."""
    text = (ROOT / "docs" / "file-format.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    path = folder / "swahili.safetensors"
    what.save(path) if isinstance(what, SparseDelta) else path.write_bytes(what.build())
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(blocks[which], "file-format.md", "exec"), names)
    return names


def test_the_documented_reader_reads(tmp_path, monkeypatch):
    delta = make()
    names = run_documented(0, delta, tmp_path, monkeypatch)
    assert set(names["differences"]) == set(SHAPES)
    for name, (positions, values) in names["differences"].items():
        assert positions.tolist() == delta.indices(name).tolist()
        assert values.tolist() == delta.values(name).tolist()


def test_the_documented_content_id_of_a_later_version(tmp_path, monkeypatch):
    file = sft_files.valid()
    wanted = file.document["content_id"]
    file.document |= {"version": [1, 7], "novelty": {"x": [1]}}
    for key in ("params", "dense", "trained_on"):
        file.document[key][0]["q"] = 3
    file.document["base"]["q"] = file.document["base"]["files"][0]["q"] = {"x": 1}
    names = run_documented(1, file, tmp_path, monkeypatch)
    assert names["state"].hexdigest() == wanted


@pytest.mark.parametrize("density", [0.0, 0.1])
def test_the_documented_content_id(tmp_path, monkeypatch, density):
    # 0.1: idx and val have several pieces, the last of them short.
    meta = {"lang": "sw", "task": "ünïcode 漢", "recipe": {"a": 1}, "base": {"id": "m"}}
    delta = make(density=density)
    delta = SparseDelta(delta.support, delta.val, heads(), meta)
    names = run_documented(1, delta, tmp_path, monkeypatch)
    assert names["state"].hexdigest() == delta.content_id
