"""Runs, loops and criteria on a GPU: resumed to the same bits, θ0 off the device, autocast."""

from contextlib import nullcontext

import pytest
import torch
from gpu_oracles import DEVICE, REAL, forced
from torch import Tensor, nn

import sparse_ft as sf
from sparse_ft import criteria


@pytest.fixture(autouse=True)
def triton_in_a_trial(device):
    """On a GPU the dispatch chooses Triton by itself, and another backend for CPU tensors."""
    with forced() if not REAL else nullcontext():
        yield


class Net(nn.Module):
    """A backbone with dropout and buffers, and a head."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(20, 900), nn.BatchNorm1d(900), nn.Tanh(), nn.Dropout(0.1), nn.Linear(900, 80)
        )
        self.head = nn.Linear(80, 4)
        self.to(DEVICE)
        sf.freeze_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def loader() -> torch.utils.data.DataLoader:
    g = torch.Generator().manual_seed(7)
    data = torch.utils.data.TensorDataset(
        torch.randn(64, 20, generator=g), torch.randint(4, (64,), generator=g)
    )
    return torch.utils.data.DataLoader(data, 16, shuffle=True)


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = (t.to(DEVICE) for t in batch)
    return nn.functional.cross_entropy(net(x).float(), y)


def loop(loss=loss_of, **options) -> sf.Loop:
    return sf.Loop(loader(), full=6, sparse=8, loss=loss, lr=1e-2, **options)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("gather", ["step", "hook"])
@pytest.mark.parametrize("at", [3, 9])
def test_a_stopped_run_ends_at_the_same_bits(at, gather, tmp_path):
    def ticket() -> sf.LotteryTicket:
        return sf.LotteryTicket(Net(), k=2000, l1=0.1)

    whole = ticket().fit(loop(gather=gather))
    calls = []

    def stopping(net, batch):
        calls.append(1)
        if len(calls) == at:
            raise Stopped
        return loss_of(net, batch)

    with pytest.raises(Stopped):
        ticket().fit(loop(stopping, gather=gather), tmp_path, save_every=2)
    resumed = ticket().fit(loop(gather=gather), tmp_path, save_every=2)
    assert resumed.content_id == whole.content_id
    assert len(whole) == 2000


def test_a_start_off_the_device_changes_nothing(tmp_path):
    model = Net()
    beside = sf.LotteryTicket(model, k=2000).fit(loop())
    away = sf.LotteryTicket(model, k=2000, snapshot_device="cpu").fit(loop())
    assert away.content_id == beside.content_id

    theta0 = sf.snapshot(model)
    stored = sf.snapshot(model, path=tmp_path / "theta0.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    support = sf.select(model, theta0, k=2000)
    assert sf.select(model, stored, k=2000) == support
    assert support.device == DEVICE


@pytest.mark.parametrize("name", ["weight", "bias", "random", "denoised"])
def test_criteria_choose_what_they_choose_on_a_cpu(name):
    model = Net()
    theta0 = sf.snapshot(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    criterion = getattr(criteria, name)()
    here = {n: p.detach() for n, p in model.named_parameters() if n.endswith("weight")}
    if name == "bias":
        here = {n: p.detach() for n, p in model.named_parameters()}
    start = {n: theta0[n] for n in here}
    k = {"k": sum(p.numel() for n, p in here.items() if "bias" in n)} if name == "bias" else {}
    options = {"criterion": criterion, **(k or {"k": 3000})}
    there = {n: t.cpu() for n, t in here.items()}, {n: t.cpu() for n, t in start.items()}
    found = sf.select(here, start, **options)
    wanted = sf.select(*there, **options)
    if name != "denoised":
        assert found.to("cpu") == wanted
        return
    # Eigenvectors come from another library there: entries of nearly equal scores may swap.
    both = sum(len({*found.indices(n).tolist()} & {*wanted.indices(n).tolist()}) for n in here)
    assert both > 0.99 * len(wanted)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast(precision, cuda):
    delta = sf.LotteryTicket(Net(), k=2000).fit(loop(precision=precision, max_grad_norm=1.0))
    assert len(delta) == 2000
    assert bool(delta.val.isfinite().all())
    assert float(delta.val.abs().max()) > 0


def test_source_languages_are_on_for_their_batches():
    model = Net()
    start = sf.snapshot(model)
    with torch.no_grad():
        model.body[0].weight += 0.1 * torch.randn_like(model.body[0].weight)
    name = "body.0.weight"
    other = sf.SparseDelta.between({name: start[name]}, {name: model.body[0].weight.detach()})
    start.restore(model)
    seen = []

    def watched(net, batch):
        seen.append(bool((net.body[0].weight - start[name]).abs().max() > 0.05))
        return loss_of(net, batch)

    sources = sf.MultiSource({"a": loader(), "b": loader()}, {"b": other})
    delta = sf.LotteryTicket(model, k=500).fit(
        sf.Loop(sources, full=2, loss=watched, lr=1e-9, max_grad_norm=None)
    )
    assert {True, False} == {*seen}
    assert len(delta) <= 500
    assert torch.equal(model.body[0].weight, start[name])
