"""`pytorch_diff.bin`: read as its writer meant it, refused where it is malformed, and written so
that the reference implementation reads it."""

import os
import random
import resource
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import torch_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_ft import legacy
from sparse_ft.delta import SFTError, SparseDelta
from sparse_ft.files import SFTFileError
from sparse_ft.tiles import Layout, Support

FUZZ = int(os.environ.get("SPARSE_FT_FUZZ", "2000"))
pytestmark = pytest.mark.filterwarnings("ignore:.*does not say which base model")


def sparse(shape, density=0.3, seed=0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=g)
    return dense * (torch.rand(shape, generator=g) < density)


def encoded(dense: torch.Tensor, first=np.int64) -> dict:
    """What the reference implementation writes for a tensor: gaps between positions in Fortran's
    order, of which the first is one of numpy's numbers."""
    flat = dense.numpy().reshape(-1, order="F")
    place = np.flatnonzero(flat)
    steps = np.diff(place, prepend=0).tolist()
    return {
        "size": dense.shape,
        "index_steps": [first(n) for n in steps[:1]] + steps[1:],
        "values": torch.from_numpy(flat[place].copy()),
    }


def decoded(entry: dict) -> torch.Tensor:
    """What the reference implementation makes of an entry, in its own 32-bit arithmetic."""
    place = np.cumsum(entry["index_steps"], dtype=np.int32)
    products = np.cumprod(list(entry["size"]), dtype=np.int32)
    below = np.concatenate([[1], products[:-1]], dtype=np.int32)
    at = place[None] // below[:, None] % products[:, None]
    dense = torch.zeros(entry["size"])
    dense[tuple(torch.from_numpy(at).long())] = entry["values"]
    return dense


def saved(folder: Path, tensors: dict[str, torch.Tensor], **heads: torch.Tensor) -> Path:
    content = {"diffs": {name: encoded(tensor) for name, tensor in tensors.items()}, "abs": heads}
    torch.save(content, folder / "pytorch_diff.bin")
    return folder / "pytorch_diff.bin"


# --- reading ------------------------------------------------------------------------------------


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    first=st.sampled_from([int, np.int64]),
    seed=st.integers(0, 99),
)
def test_every_shape_is_decoded(tmp_path, shape, density, first, seed):
    dense = sparse(shape, density, seed)
    torch.save({"diffs": {"w": encoded(dense, first)}, "abs": {}}, tmp_path / "x.bin")
    delta = legacy.read(tmp_path / "x.bin")
    assert torch.equal(delta.dense("w"), dense)
    assert delta.nnz == int((dense != 0).sum())
    assert delta.layout.shapes == (shape,)


def test_long_lists_and_tiles_are_decoded(tmp_path):
    tensors = {
        "a": sparse((700, 301), 0.03),
        "b": sparse((301, 700), 0.5, 1),
        "c": sparse((65537,), 0.001, 2),
        "d": sparse((40, 50, 60), 0.2, 3),
        "e": sparse((3, 5, 70, 90), 0.004, 4),
    }
    delta = legacy.read(saved(tmp_path, tensors))
    for name, dense in tensors.items():
        assert torch.equal(delta.dense(name), dense), name


def test_tensors_without_entries_stay_in_the_layout(tmp_path):
    tensors = {"a": torch.zeros(4, 5), "b": sparse((3,), 1.0), "z": torch.zeros(0, 7)}
    delta = legacy.read(saved(tmp_path, tensors))
    assert delta.layout == Layout.of(tensors)
    assert delta.support.counts() == {"a": 0, "b": 3, "z": 0}


def test_either_key_may_be_absent(tmp_path):
    torch.save({"diffs": {"w": encoded(sparse((3, 4)))}}, tmp_path / "x.bin")
    assert not legacy.read(tmp_path / "x.bin").heads
    torch.save({"abs": {"h": torch.ones(2)}}, tmp_path / "x.bin")
    delta = legacy.read(tmp_path / "x.bin")
    assert torch.equal(delta.heads["h"], torch.ones(2))
    assert len(delta.layout) == 0


def test_heads_keep_type_and_shape(tmp_path):
    heads = {
        "h.a": torch.randn(3, 4).T,
        "h.b": torch.randn(5).bfloat16(),
        "h.c": torch.tensor(2.5, dtype=torch.float64),
    }
    path = saved(tmp_path, {}, **heads)
    found = legacy.read(path).heads
    for name, head in heads.items():
        assert found[name].dtype == head.dtype
        assert torch.equal(found[name], head)
        assert found[name].is_contiguous()
    found["h.a"].zero_()
    assert torch.equal(legacy.read(path).heads["h.a"], heads["h.a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_keep_type_and_bits(tmp_path, dtype):
    values = torch.tensor([-0.0, 1e-45, -1.5, 0.1]).to(dtype)
    entry = {"size": torch.Size([9]), "index_steps": [1, 2, 1, 4], "values": values}
    torch.save({"diffs": {"w": entry}}, tmp_path / "x.bin")
    found = legacy.read(tmp_path / "x.bin").val
    assert found.dtype == dtype
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(integer), values.view(integer))


def test_mixed_types_become_fp32(tmp_path):
    entries = {
        name: {
            "size": torch.Size([4]),
            "index_steps": [1, 1],
            "values": torch.ones(2).to(dtype) / 3,
        }
        for name, dtype in (("a", torch.float16), ("b", torch.float32), ("c", torch.bfloat16))
    }
    torch.save({"diffs": entries}, tmp_path / "x.bin")
    delta = legacy.read(tmp_path / "x.bin")
    assert delta.val.dtype == torch.float32
    wanted = torch.cat([entry["values"].float() for entry in entries.values()])
    assert torch.equal(delta.val, wanted)


def test_the_base_is_recognised(tmp_path):
    torch.manual_seed(0)
    base, other = (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)) for _ in range(2))
    difference = sparse((8, 6)) / 8
    path = saved(tmp_path, {"0.weight": difference, "1.bias": sparse((3,), 1.0) / 8})
    for given_base in (base, base.state_dict()):
        delta = legacy.read(tmp_path, base=given_base, base_id="some/model", lang="sw")
        assert delta.meta["base"]["id"] == "some/model"
        assert delta.meta["lang"] == "sw"
        assert delta.meta["dtypes"] == {"0.weight": "F32", "1.bias": "F32"}
        delta.bind(base)
        with pytest.raises(SFTError, match="made for the base model 'some/model'"):
            delta.bind(other)
    # The digest is that of the values themselves.
    tuned = {"0.weight": base[0].weight + 1, "1.bias": base[1].bias + 1}
    support = delta.support
    again = SparseDelta.between(base.state_dict(), tuned, support)
    for key in ("digest_f32", "digest_bf16"):
        assert again.meta["base"][key] == delta.meta["base"][key]
    with pytest.warns(UserWarning, match="does not say which base model"):
        unbound = legacy.read(path)
    assert "base" not in unbound.meta
    unbound.bind(other)


def test_a_base_that_does_not_fit(tmp_path):
    path = saved(tmp_path, {"w": sparse((3, 4))})
    for base, message in (
        ({"v": torch.ones(3, 4)}, "base: has no tensor 'w'"),
        ({"w": torch.ones(4, 3)}, r"base: 'w' has shape \(4, 3\), and \(3, 4\) in the SFT"),
        ({"w": torch.ones(3, 4, dtype=torch.int32)}, "base: 'w' .*int32"),
        ({"w": torch.ones(3, 4, device="meta")}, "base: 'w' .*meta"),
    ):
        with pytest.raises(SFTError, match=message):
            legacy.read(path, base=base)
    # A view of a larger tensor will do.
    legacy.read(path, base={"w": torch.ones(4, 3).T})


def test_metadata_are_checked(tmp_path):
    path = saved(tmp_path, {"w": sparse((3, 4))})
    with pytest.raises(SFTError, match="there is no field 'language'"):
        legacy.read(path, language="sw")


# --- writing ------------------------------------------------------------------------------------


def make(shapes, density=0.3, dtype=torch.float32, heads=None) -> SparseDelta:
    tensors = {name: sparse(shape, density, i) for i, (name, shape) in enumerate(shapes.items())}
    support = Support.from_masks({name: tensor != 0 for name, tensor in tensors.items()})
    g = torch.Generator().manual_seed(7)
    return SparseDelta(support, torch.randn(support.nnz, generator=g).to(dtype), heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_implementation_reads_what_is_written(tmp_path, dtype):
    shapes = {"a": (7, 300), "b": (65537,), "c": (1, 5), "d": (300, 7), "z": (0, 3), "s": ()}
    delta = make({**shapes, "e": (20, 80)}, dtype=dtype, heads={"h": torch.randn(2, 3).bfloat16()})
    keep = [name for name in delta.layout.names if name != "s"]
    support = delta.support.restrict(keep).expand(delta.layout)
    positions = torch.cat([torch.arange(delta.nnz)[delta.support.entries_of(n)] for n in keep])
    delta = SparseDelta(support, delta.val[positions], delta.heads)
    delta.val[:2] = torch.tensor([-0.0, 2.0**-24])
    path = legacy.write(delta, tmp_path)
    assert path == str(tmp_path / "pytorch_diff.bin")
    content = torch.load(path, weights_only=True)
    assert list(content) == ["diffs", "abs"]
    for name, entry in content["diffs"].items():
        assert all(type(n) is int for n in entry["index_steps"])
        assert entry["values"].dtype == torch.float32
        assert entry["values"].untyped_storage().nbytes() == 4 * len(entry["values"])
        if name != "s":
            assert torch.equal(decoded(entry), delta.dense(name).float())
    assert torch.equal(content["abs"]["h"], delta.heads["h"])
    again = legacy.read(path)
    assert again == SparseDelta(delta.support, delta.val.float(), delta.heads)


def test_what_is_written_needs_few_instructions(tmp_path, monkeypatch):
    # Or a file with very many entries or tensors could be written, but not read.
    delta = make({f"w.{i:03}": (60, 70) for i in range(300)})
    path = legacy.write(delta, tmp_path / "x.bin")
    monkeypatch.setattr("sparse_ft.torch_zip.MAX_INSTRUCTIONS", 300 * 60)
    assert legacy.read(path) == delta


def test_equal_deltas_give_equal_bytes(tmp_path):
    for name in ("a.bin", "b.bin"):
        legacy.write(make({"w": (9, 9)}, heads={"h": torch.ones(3)}), tmp_path / name)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_heads_do_not_bring_their_storage(tmp_path):
    delta = make({"w": (3, 4)}, heads={"h": torch.randn(100_000)[:5]})
    assert os.path.getsize(legacy.write(delta, tmp_path / "x.bin")) < 10_000


def test_the_reference_decoder_is_wrong_in_three_dimensions():
    # Why `write` refuses them: the coordinates leave the tensor.
    with pytest.raises(IndexError):
        decoded(encoded(sparse((3, 4, 5))))


@pytest.mark.parametrize("shape", [(), (3, 4, 5), (2, 2, 2, 2)])
def test_what_the_reference_implementation_cannot_read_is_refused(tmp_path, shape):
    delta = make({"w": shape}, density=1.0)
    with pytest.raises(SFTError, match=r"'w' has entries and the shape .*decodes one and two"):
        legacy.write(delta, tmp_path / "x.bin")
    assert not os.listdir(tmp_path)


def test_tensors_of_2_to_the_31_elements_are_refused(tmp_path):
    layout = Layout.of({"w": (1 << 16, 1 << 15)})
    delta = SparseDelta(Support.from_indices(layout, {"w": [5]}), torch.ones(1))
    with pytest.raises(SFTError, match=r"2\^31"):
        legacy.write(delta, tmp_path / "x.bin")
    empty = SparseDelta(Support.from_indices(layout, {}), torch.zeros(0))
    assert legacy.read(legacy.write(empty, tmp_path / "x.bin")) == empty


def test_replacing_values_are_refused(tmp_path):
    delta = make({"w": (3, 4)})
    delta = SparseDelta(delta.support, delta.val, meta={"kind": "replace"})
    with pytest.raises(SFTError, match="of kind 'replace'"):
        legacy.write(delta, tmp_path / "x.bin")


def test_write_says_what_a_path_must_be(tmp_path):
    delta = make({"w": (3, 4)})
    (tmp_path / "folder.bin").mkdir()
    os.mkfifo(tmp_path / "pipe.bin")
    for path, message in (
        (tmp_path / "x.safetensors", "must end in .bin"),
        (tmp_path / "absent" / "x.bin", "there is no folder"),
        (tmp_path / "pipe.bin", "not a regular file"),
    ):
        with pytest.raises(SFTError, match=message):
            legacy.write(delta, path)
    assert legacy.write(delta, tmp_path / "folder.bin").endswith("folder.bin/pytorch_diff.bin")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = legacy.write(make({"w": (3, 4)}), tmp_path / "x.bin")
    before = Path(path).read_bytes()

    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space left"):
        legacy.write(make({"v": (9, 9)}), path)
    assert Path(path).read_bytes() == before
    assert os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"w": [1] * 33}, "a torch.Size must be a tuple of at most 32"),
        ({"w": (1 << 60, 0)}, "product 2\\^48 at most"),
        ({f"{i}": (1 << 36,) for i in range(5)}, "elements; at most"),
    ],
)
def test_nothing_is_written_that_read_refuses(tmp_path, shapes, message):
    path = legacy.write(make({"w": (3, 4)}), tmp_path / "x.bin")
    before = Path(path).read_bytes()
    layout = Layout.of(shapes)
    support = Support.from_indices(layout, {})
    with pytest.raises(SFTError, match=f"^legacy.write: .*{message}"):
        legacy.write(SparseDelta(support, torch.zeros(0)), path)
    assert Path(path).read_bytes() == before
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_delta_that_was_broken_is_not_written(tmp_path):
    delta = make({"w": (3, 4)})
    delta.val[1] = float("nan")
    with pytest.raises(SFTError, match="must be finite"):
        legacy.write(delta, tmp_path / "x.bin")


# --- wrong files --------------------------------------------------------------------------------


def test_the_file_that_is_broken_is_right(tmp_path):
    for steps in (torch_files.STEPS, [torch_files.scalar(2), *torch_files.STEPS[1:]]):
        (tmp_path / "x.bin").write_bytes(torch_files.sft(steps).build())
        delta = legacy.read(tmp_path / "x.bin")
        assert torch.equal(delta.dense("w"), torch.from_numpy(torch_files.DENSE))


@pytest.mark.parametrize("name", torch_files.LEGACY)
def test_hostile(tmp_path, name):
    build, wanted = torch_files.LEGACY[name]
    path = tmp_path / "pytorch_diff.bin"
    path.write_bytes(build().build())
    tracemalloc.start()
    try:
        with pytest.raises(SFTFileError) as caught:
            legacy.read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    for fragment in (str(path), *wanted):
        assert fragment in str(caught.value), caught.value
    assert len(str(caught.value)) < 500 + len(str(path))


def test_tiles_take_no_memory_that_is_not_there(tmp_path):
    (tmp_path / "x.bin").write_bytes(torch_files.sft(shape=torch_files.size(1 << 38)).build())
    tracemalloc.start()
    try:
        assert legacy.read(tmp_path / "x.bin").nnz == 3
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def test_paths_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "pytorch_diff.bin").symlink_to(tmp_path / "nothing")
    with pytest.raises(SFTFileError, match=r"pytorch_diff\.bin: cannot be opened"):
        legacy.read(tmp_path)
    with pytest.raises(SFTFileError, match=r"pipe\.bin: (is not a regular|cannot be opened)"):
        legacy.read(tmp_path / "pipe.bin")
    with pytest.raises(SFTFileError, match=r"absent: cannot be opened"):
        legacy.read(tmp_path / "absent")


def test_max_bytes(tmp_path):
    path = saved(tmp_path, {"w": sparse((3, 4))})
    with pytest.raises(SFTFileError, match="max_bytes = 100"):
        legacy.read(path, max_bytes=100)


def test_a_file_named_to_load_may_be_no_larger(tmp_path, monkeypatch):
    path = saved(tmp_path, {"w": sparse((3, 4))})
    monkeypatch.setattr(legacy, "MAX_BYTES", 100)
    with pytest.raises(SFTFileError, match="max_bytes = 100"):
        SparseDelta.load(path)


def test_fuzz(tmp_path):
    rng = random.Random(int(os.environ.get("SPARSE_FT_FUZZ_SEED", "1")))
    whole = torch_files.seeds(tmp_path)
    whole = [whole[0], whole[2]]
    parts = [torch_files.members_of(raw) for raw in whole]
    path = tmp_path / "x.bin"
    read = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(FUZZ):
            i = rng.randrange(len(whole))
            path.write_bytes(torch_files.mutant(rng, whole[i], parts[i]))
            try:
                delta = legacy.read(path)
            except SFTFileError:
                continue
            read += 1
            assert torch.isfinite(delta.val).all()
    assert FUZZ < 100 or 0.02 * FUZZ < read < 0.98 * FUZZ
    if FUZZ > 2000:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{FUZZ:,} files, {read:,} readable, peak {peak >> 10} MB", file=sys.stderr)
