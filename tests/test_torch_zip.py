"""Reading what `torch.save` wrote: right files as torch.load reads them, wrong ones refused, and
none of them run, waited for, or given memory."""

import collections
import os
import random
import resource
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import torch_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_ft import torch_zip
from sparse_ft.files import SFTFileError
from sparse_ft.torch_zip import load

FUZZ = int(os.environ.get("SPARSE_FT_FUZZ", "2000"))
DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def same(a, b) -> bool:
    """Equality of types, bits and structure; ordered dicts are dicts."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.stride() == b.stride()
            and a.contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(b.detach().contiguous().reshape(-1).view(torch.uint8))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def outcome(path: Path, **options) -> object:
    """What is read, or the error; any other exception is a fault."""
    try:
        return load(path, **options)
    except SFTFileError as error:
        return error


# --- right files --------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_those_of_torch_load(tmp_path, dtype, mapped):
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (96,), dtype=torch.uint8)
    flat = bits.view(dtype)
    square = flat[: len(flat) // 4 * 4].reshape(4, -1)
    saved = {
        "flat": flat,
        "square": square,
        "turned": square.T,
        "part": square[1:3, ::2],
        "scalar": flat[5],
        "empty": flat[:0].reshape(0, 7),
        "owned": square.clone(),
    }
    torch.save(saved, tmp_path / "x.bin")
    found = load(tmp_path / "x.bin", mapped=mapped)
    wanted = torch.load(tmp_path / "x.bin", weights_only=True)
    for name, tensor in wanted.items():
        assert same(found[name].contiguous(), tensor.contiguous()), name
        if tensor.numel():
            assert found[name].stride() == tensor.stride()
    # One storage stays one piece of memory.
    found["flat"].view(torch.uint8)[0] ^= 1
    assert same(found["square"][0, 0], found["flat"][0])


@pytest.mark.parametrize("packed", [False, True])
def test_values_are_those_of_torch_load(tmp_path, packed):
    saved = {
        "text": "ünïcode 漢 \n",
        "numbers": [0, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**31, -(2**63), 2**63 - 1],
        "floats": (0.0, -0.0, 1e308, float("inf")),
        "others": [None, True, False, (), [], {}, "", ((1, 2), (3,))],
        "size": torch.Size([3, 0, 5]),
        5: {"a": {"b": ["c"]}},
    }
    torch.save(saved, tmp_path / "x.bin")
    found = load(tmp_path / "x.bin", packed=packed)
    assert same(found, saved)
    assert type(found["size"]) is tuple


def test_state_dicts(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model.register_parameter("tied", model[0].weight)
    for saved in (model.state_dict(), dict(model.named_parameters()), collections.OrderedDict()):
        torch.save(saved, tmp_path / "x.bin")
        found = load(tmp_path / "x.bin")
        assert type(found) is dict
        assert same(found, {name: tensor.detach() for name, tensor in saved.items()})
        assert not any(tensor.requires_grad for tensor in found.values())


def test_the_file_is_left_alone(tmp_path):
    torch.save({"w": torch.arange(5.0)}, tmp_path / "x.bin")
    raw = (tmp_path / "x.bin").read_bytes()
    load(tmp_path / "x.bin")["w"].fill_(7)
    assert (tmp_path / "x.bin").read_bytes() == raw
    assert torch.equal(load(tmp_path / "x.bin")["w"], torch.arange(5.0))


def test_a_map_outlives_the_name_of_its_file(tmp_path):
    torch.save({"w": torch.arange(5.0)}, tmp_path / "x.bin")
    found = load(tmp_path / "x.bin")
    os.unlink(tmp_path / "x.bin")
    assert torch.equal(found["w"], torch.arange(5.0))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_checkpoint_costs_nothing_before_it_is_read(tmp_path):
    torch.save({"w": torch.zeros(50_000_000)}, tmp_path / "x.bin")
    before = resident()
    found = load(tmp_path / "x.bin")
    assert resident() - before < 20 << 20
    assert len(found["w"]) == 50_000_000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_checksums_can_be_left_out(tmp_path):
    # As torch.serialization.set_crc32_options(False) does.
    (tmp_path / "x.bin").write_bytes(
        torch_files.archive(
            {"a": torch_files.tensor()}, torch_files.floats(1, 2, 3), crc=False
        ).build()
    )
    for mapped in (True, False):
        assert load(tmp_path / "x.bin", mapped=mapped)["a"].tolist() == [1, 2, 3]


def test_archives_in_64_bits(tmp_path):
    members = torch_files.archive({"a": torch_files.tensor()}, torch_files.floats(1, 2, 3)).members
    (tmp_path / "x.bin").write_bytes(torch_files.Zip(members, wide=True).build())
    assert load(tmp_path / "x.bin")["a"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_of_numpy(tmp_path, module):
    raw = torch_files.archive([torch_files.scalar(-5, module)]).build()
    (tmp_path / "x.bin").write_bytes(raw)
    (found,) = load(tmp_path / "x.bin")
    assert type(found) is np.int64
    assert found == -5


def unpacked(items) -> list[int]:
    out = []
    for item in items:
        out += item.tolist() if isinstance(item, np.ndarray) else [item]
    return out


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 255, 256, 0x2865, 65535, 65536, -1, 2**31 - 1, 2**31, 0x65286528]),
            st.integers(1, 900),
        ),
        max_size=12,
    )
)
def test_packed_integers_are_the_same_integers(tmp_path, runs):
    # 0x2865 is written in the bytes that end one batch and begin the next.
    items = [value for value, times in runs for _ in range(times)]
    torch.save({"a": items, "b": [3, *items], "c": ["x", *items, "y"]}, tmp_path / "x.bin")
    found = load(tmp_path / "x.bin", packed=True)
    assert load(tmp_path / "x.bin") == {"a": items, "b": [3, *items], "c": ["x", *items, "y"]}
    assert unpacked(found["a"]) == items
    assert unpacked(found["b"]) == [3, *items]
    assert unpacked(found["c"]) == ["x", *items, "y"]


def test_long_lists_come_packed(tmp_path):
    items = np.random.default_rng(0).geometric(1 / 36, 100_000).tolist()
    first = np.int64(5)
    torch.save([items, [first, *items[1:]]], tmp_path / "x.bin")
    found, published = load(tmp_path / "x.bin", packed=True)
    assert unpacked(found) == items
    assert len(found) == 100
    assert unpacked(published) == [5, *items[1:]]
    assert len(published) == 1000 + 99


# --- wrong files --------------------------------------------------------------------------------


def write(path: Path, what) -> Path:
    if isinstance(what, torch_files.Zip):
        what = what.build()
    path.write_bytes(what)
    return path


def test_the_files_that_are_broken_are_right(tmp_path):
    path = write(tmp_path / "x.bin", torch_files.sft())
    assert same(load(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("name", torch_files.ARCHIVES)
def test_hostile_archives(tmp_path, name):
    build, wanted = torch_files.ARCHIVES[name]
    path = write(tmp_path / "x.bin", build())
    refused(path, wanted)


@pytest.mark.parametrize("name", torch_files.PICKLES)
def test_hostile_pickles(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    build, wanted = torch_files.PICKLES[name]
    raw = torch_files.floats(*torch_files.VALUES)
    path = write(tmp_path / "x.bin", torch_files.archive(build(), raw))
    refused(path, ("data.pkl, byte" if "storage '" not in "".join(wanted) else "", *wanted))
    assert sorted(os.listdir(tmp_path)) == ["x.bin"]


def refused(path: Path, wanted: tuple[str, ...]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(SFTFileError) as caught:
            load(path, mapped=False, packed=True)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    for fragment in (str(path), *wanted):
        assert fragment in str(caught.value), caught.value
    assert len(str(caught.value)) < 400 + len(str(path))


def test_only_instructions_of_the_list_are_known(tmp_path):
    known = set(b"KMJqrhjt)XRQc]}aesubN\x88\x89G.(\x85\x86\x87\x8a")
    for code in set(range(256)) - known:
        file = torch_files.archive(torch_files.pickled(b"](K\1" + bytes([code]) + bytes(20)))
        path = write(tmp_path / "x.bin", file)
        with pytest.raises(SFTFileError, match="has the instruction"):
            load(path)


def test_too_many_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_zip, "MAX_INSTRUCTIONS", 100)
    write(tmp_path / "x.bin", torch_files.archive([1] * 99))
    with pytest.raises(SFTFileError, match="more than 100 instructions"):
        load(tmp_path / "x.bin")


def test_a_pickle_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_zip, "MAX_PICKLE", 100)
    write(tmp_path / "x.bin", torch_files.archive([1] * 99))
    with pytest.raises(SFTFileError, match=r"data.pkl: is \d+ bytes long; at most 100"):
        load(tmp_path / "x.bin")


# Nothing but places where a run could begin; and runs that begin inside one another.
@pytest.mark.parametrize("pattern", [b"(", b"K\1" * 30 + b"J\1\1e("], ids=["marks", "runs"])
def test_a_search_for_runs_costs_little(pattern):
    code = b"\x80\x02]" + pattern * ((16 << 20) // len(pattern)) + b"."
    tracemalloc.start()
    try:
        torch_zip._Runs(code)
        assert tracemalloc.get_traced_memory()[1] < 6 * len(code)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pattern", [b"e(", b"Me(", b"e(K\1", b"]e(K\1K\1e"])
def test_false_runs_cost_little(tmp_path, pattern):
    raw = torch_files.archive(b"\x80\x02]" + pattern * 200_000 + b".")
    write(tmp_path / "x.bin", raw)
    tracemalloc.start()
    try:
        outcome(tmp_path / "x.bin", packed=True)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def test_truncated(tmp_path):
    raw = torch_files.sft().build()
    for length in sorted({*range(0, len(raw), 7), *range(len(raw) - 200, len(raw))}):
        path = write(tmp_path / "x.bin", raw[:length])
        assert isinstance(outcome(path, mapped=False), SFTFileError), length


def test_paths_that_are_no_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("absent", "link", "loop"):
        with pytest.raises(SFTFileError, match=f"{name}: cannot be opened"):
            load(tmp_path / name)
    for name in ("folder", "pipe"):
        with pytest.raises(SFTFileError, match=f"{name}: (is not a regular|cannot be opened)"):
            load(tmp_path / name)
    with pytest.raises(SFTFileError, match="NUL"):
        load("a\0b")


def test_max_bytes(tmp_path):
    size = write(tmp_path / "x.bin", torch_files.sft()).stat().st_size
    load(tmp_path / "x.bin", max_bytes=size)
    with pytest.raises(SFTFileError, match=f"is {size:,} bytes long, and max_bytes = {size - 1:,}"):
        load(tmp_path / "x.bin", max_bytes=size - 1)


def test_files_of_old_torch(tmp_path):
    torch.save({"a": 1}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(SFTFileError, match=r"PyTorch 1\.5 or older"):
        load(tmp_path / "x.bin")


# --- fuzzing ------------------------------------------------------------------------------------


def touch(value) -> None:
    """Reads every tensor to the end."""
    if isinstance(value, torch.Tensor):
        value.to(torch.float64).sum()
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            touch(item)


def test_fuzz(tmp_path):
    rng = random.Random(int(os.environ.get("SPARSE_FT_FUZZ_SEED", "0")))
    whole = torch_files.seeds(tmp_path)
    parts = [torch_files.members_of(raw) for raw in whole]
    path = tmp_path / "x.bin"
    read = 0
    for _ in range(FUZZ):
        i = rng.randrange(len(whole))
        raw = torch_files.mutant(rng, whole[i], parts[i])
        write(path, raw)
        found = outcome(path, mapped=rng.random() < 0.5, packed=rng.random() < 0.5)
        if not isinstance(found, SFTFileError):
            read += 1
            touch(found)
    # Were all refused for one trivial reason, nothing would have been tried.
    assert FUZZ < 100 or 0.02 * FUZZ < read < 0.98 * FUZZ
    if FUZZ > 2000:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{FUZZ:,} files, {read:,} readable, peak {peak >> 10} MB", file=sys.stderr)
