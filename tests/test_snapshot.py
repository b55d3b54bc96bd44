"""snapshot: a copy of every parameter and buffer, and the way back to the last bit."""

import copy
import os
import pickle

import pytest
import torch
from oracles import DTYPES, assert_bits
from torch import nn

import sparse_ft as sf
from sparse_ft.checkpoints import Checkpoint
from sparse_ft.snapshot import Snapshot


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(5, 7, dtype=dtype)
        self.out = nn.Linear(5, 7, dtype=dtype)
        self.out.weight = self.lin.weight
        self.norm = nn.BatchNorm1d(7, dtype=dtype)
        self.across = nn.Parameter(torch.randn(4, 3).t().to(dtype))
        self.ints = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("hidden", torch.randn(3), persistent=False)
        self.register_buffer("wide", torch.ones(3, 1).expand(3, 4))


@torch.no_grad()
def spoil(model: nn.Module) -> None:
    for t in [*model.parameters(), *model.buffers()]:
        if 0 not in t.stride():
            t.copy_(torch.randint_like(t, 100))
    for wide in (b for b in model.buffers() if 0 in b.stride()):
        wide[:, :1].fill_(8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["beside", "cpu", "disk"])
def test_every_value_comes_back(dtype, where, tmp_path):
    model = Model(dtype)
    with torch.no_grad():
        model.lin.bias[:3] = torch.tensor([float("nan"), -0.0, float("inf")]).to(dtype)
        model.lin.bias.view(torch.int32 if dtype is torch.float32 else torch.int16)[0] += 5
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {n: t.detach().clone() for n, t in tensors.items()}
    addresses = {n: t.data_ptr() for n, t in tensors.items()}
    if where == "disk":
        path = tmp_path / "theta0.safetensors"
        copy = sf.snapshot(model, path=path)
        assert [*tmp_path.iterdir()] == [path]
    else:
        copy = sf.snapshot(model, None if where == "beside" else "cpu")
    spoil(model)
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
    copy.restore(model)
    for n, t in tensors.items():
        if t.is_floating_point():
            assert_bits(t.detach().contiguous(), before[n].contiguous(), n)
        else:
            assert torch.equal(t, before[n])
    assert {n: t.data_ptr() for n, t in tensors.items()} == addresses
    assert model.out.weight is model.lin.weight


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_mapping_of_parameters_that_shares_no_memory(on_disk, tmp_path):
    model = Model()
    path = str(tmp_path / "theta0.safetensors")
    copy = sf.snapshot(model, path=path if on_disk else None)
    names = [n for n, _ in model.named_parameters()]
    assert list(copy) == (sorted(names) if on_disk else names)
    assert len(copy) == len(names)
    assert "out.weight" not in copy
    for n, p in model.named_parameters():
        assert torch.equal(copy[n], p)
        assert copy[n].data_ptr() != p.data_ptr()
        assert not copy[n].requires_grad
    with pytest.raises(KeyError):
        copy["hidden"]
    assert repr(copy) == f"Snapshot(7 parameters, 78 values{f', in {path!r}' * on_disk})"
    again = pickle.loads(pickle.dumps(copy))
    assert all(torch.equal(again[n], copy[n]) for n in copy)


@pytest.mark.parametrize("on_disk", [False, True])
def test_another_model_is_refused_before_the_first_write(on_disk, tmp_path):
    path = tmp_path / "theta0.safetensors"
    copy = sf.snapshot(Model(), path=path if on_disk else None)
    other = Model()
    other.extra = nn.Parameter(torch.zeros(2))
    lacking = Model()
    del lacking.norm
    reshaped = Model()
    reshaped.hidden = torch.zeros(4)
    half = Model()
    half.norm.half()
    for model, message in [
        (other, "new parameter 'extra'"),
        (lacking, r"no parameter 'norm\.bias' any more"),
        (reshaped, r"buffer 'hidden' was torch\.float32 of shape \(3,\) and is .*\(4,\)"),
        (half, r"'norm\.bias' was torch\.float32 .* torch\.float16"),
    ]:
        spoil(model)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            copy.restore(model)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_parameters_that_are_only_kept_may_be_of_any_kind():
    model = nn.ParameterDict(
        {
            "sparse": nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False),
            "complex": nn.Parameter(torch.ones(3, dtype=torch.complex64)),
            "empty": nn.Parameter(torch.ones(0, 3)),
        }
    )
    copy = sf.snapshot(model)
    with torch.no_grad():
        model["sparse"].zero_()
        model["complex"].zero_()
    copy.restore(model)
    assert torch.equal(model["sparse"].to_dense(), torch.eye(3))
    assert torch.equal(model["complex"], torch.ones(3, dtype=torch.complex64))


def test_what_holds_no_data_is_refused():
    with pytest.raises(ValueError, match=r"parameter 'weight' is on the meta device"):
        sf.snapshot(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"buffer 'running_mean' is on the meta device"):
        sf.snapshot(nn.BatchNorm1d(2, affine=False, device="meta"), "cpu")
    with pytest.raises(ValueError, match=r"parameter 'weight' has no shape yet"):
        sf.snapshot(nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"buffer 'running_mean' has no shape yet"):
        sf.snapshot(nn.LazyBatchNorm1d(affine=False))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        sf.snapshot({})
    assert len(sf.snapshot(nn.ReLU())) == 0


# --- on disk ------------------------------------------------------------------------------------


def test_a_file_is_opened_again(tmp_path):
    model = Model()
    path = tmp_path / "theta0.safetensors"
    before = {**model.state_dict(), "hidden": model.hidden}
    before = {n: t.detach().clone() for n, t in before.items()}
    first = sf.snapshot(model, path=path)
    for again in (Snapshot.open(path), copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        spoil(model)
        again.restore(model)
        for n, t in {**model.state_dict(), "hidden": model.hidden}.items():
            assert torch.equal(t, before[n]), n
    # Anything that reads safetensors finds values by name, the buffers too.
    stored = Checkpoint(path)
    assert {*stored} == {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert torch.equal(stored["hidden"], model.hidden)


def test_writing_into_a_tensor_leaves_the_file_alone(tmp_path):
    model = Model()
    kept = sf.snapshot(model, path=tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    kept["lin.weight"].zero_()
    assert (tmp_path / "a.safetensors").read_bytes() == data


def test_files_that_cannot_be_written(tmp_path, monkeypatch):
    model = Model()
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    with pytest.raises(
        ValueError, match=r"there\.safetensors' exists; Snapshot\.open\(path\) reads it"
    ):
        sf.snapshot(model, path=there)
    assert there.read_bytes() == b"mine"
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        sf.snapshot(model, path=tmp_path / "theta0.bin")
    with pytest.raises(ValueError, match="device or path, not both"):
        sf.snapshot(model, "cpu", path=tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="there is no folder"):
        sf.snapshot(model, path=tmp_path / "no" / "x.safetensors")
    for bad in (torch.eye(3).to_sparse(), torch.ones(3, dtype=torch.complex64)):
        model.ints = nn.Parameter(bad, requires_grad=False)
        with pytest.raises(ValueError, match=r"'ints' is torch\..*, which no safetensors file h"):
            sf.snapshot(model, path=tmp_path / "x.safetensors")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        sf.snapshot(Model(), path=tmp_path / "x.safetensors")
    assert [*tmp_path.iterdir()] == [there]


def test_files_that_are_no_snapshots(tmp_path):
    from safetensors.torch import save_file

    for name, metadata, message in [
        ("none", None, "is no snapshot"),
        ("text", {"sparse_ft_buffers": "x"}, "is no snapshot"),
        ("number", {"sparse_ft_buffers": "3"}, "is no snapshot"),
        ("unknown", {"sparse_ft_buffers": '["b"]'}, "there is no tensor 'b'"),
    ]:
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors", metadata)
        with pytest.raises(sf.SFTError, match=message):
            Snapshot.open(tmp_path / f"{name}.safetensors")
    with pytest.raises(sf.SFTError, match="there is no such file"):
        Snapshot.open(tmp_path / "absent.safetensors")


def test_an_optimizer_that_starts_from_a_file(tmp_path):
    model = nn.Linear(30, 20)
    path = tmp_path / "theta0.safetensors"
    start = sf.snapshot(model)
    sf.snapshot(model, path=path)
    spoil(model)
    support = sf.select(model, start, k=40)
    made = [sf.MaskedAdamW(model, support, theta0) for theta0 in (start, path)]
    assert_bits(made[1].delta().val, made[0].delta().val)
    for name, at in support:
        moved = (model.get_parameter(name).detach() - start[name]).reshape(-1)[at]
        assert_bits(made[1].delta().values(name), moved)
