"""snapshot: a copy of every parameter and buffer, and the way back to the last bit."""

import pickle

import pytest
import torch
from oracles import DTYPES, assert_bits
from torch import nn

import sparse_ft as sf


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
    model.wide[:, :1].fill_(8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_every_value_comes_back(dtype, device):
    model = Model(dtype)
    with torch.no_grad():
        model.lin.bias[:3] = torch.tensor([float("nan"), -0.0, float("inf")]).to(dtype)
        model.lin.bias.view(torch.int32 if dtype is torch.float32 else torch.int16)[0] += 5
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {n: t.detach().clone() for n, t in tensors.items()}
    addresses = {n: t.data_ptr() for n, t in tensors.items()}
    copy = sf.snapshot(model, device)
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


def test_a_mapping_of_parameters_that_shares_no_memory():
    model = Model()
    copy = sf.snapshot(model)
    names = [n for n, _ in model.named_parameters()]
    assert list(copy) == names
    assert len(copy) == len(names)
    assert "out.weight" not in copy
    for n, p in model.named_parameters():
        assert torch.equal(copy[n], p)
        assert copy[n].data_ptr() != p.data_ptr()
        assert not copy[n].requires_grad
    with pytest.raises(KeyError):
        copy["hidden"]
    assert repr(copy) == "Snapshot(7 parameters, 78 values)"
    again = pickle.loads(pickle.dumps(copy))
    assert all(torch.equal(again[n], copy[n]) for n in copy)


def test_another_model_is_refused_before_the_first_write():
    copy = sf.snapshot(Model())
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
