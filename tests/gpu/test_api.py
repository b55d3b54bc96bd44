"""The public API on a GPU: selection, tuning, composition, merging and the whole recipe."""

import copy
from contextlib import nullcontext

import pytest
import torch
from gpu_oracles import DEVICE, REAL, assert_same, forced
from oracles import DTYPES
from torch import Tensor, nn

import sparse_ft as sf


@pytest.fixture(autouse=True)
def triton_in_a_trial(device):
    """On a GPU the dispatch chooses Triton by itself, and another backend for CPU tensors."""
    with forced() if not REAL else nullcontext():
        yield


class Net(nn.Module):
    """A backbone of several tiles, a norm, and a head."""

    base_model_prefix = "body"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(20, 3500), nn.LayerNorm(3500), nn.Tanh(), nn.Linear(3500, 30)
        )
        self.head = nn.Linear(30, 4)
        self.to(device=DEVICE, dtype=dtype)
        sf.freeze_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


ELIGIBLE = ("body.0.bias", "body.0.weight", "body.3.bias", "body.3.weight")


def batches(n: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(8, 20, generator=g).to(DEVICE, dtype),
            torch.randint(4, (8,), generator=g).to(DEVICE),
        )
        for _ in range(n)
    ]


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]).float(), batch[1])


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_model(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for n, p in model.named_parameters():
        assert_same(p.detach(), expected[n], n)


def supported(net: nn.Module) -> sf.Support:
    parameters = dict(net.named_parameters())
    tensors = {n: parameters[n].detach() for n in ELIGIBLE}
    return sf.select(tensors, density=0.05, criterion="random")


def test_select_gives_the_set_that_the_cpu_gives():
    now, start = values(Net()), values(Net())
    g = torch.Generator().manual_seed(1)
    for n in ELIGIBLE:
        now[n] += torch.randn(now[n].shape, generator=g).to(DEVICE)
    for settings in (
        {"k": 1000},
        {"density": 0.03, "tie": "all"},
        {"k": 500, "criterion": "random"},
    ):
        there = sf.select(
            {n: now[n] for n in ELIGIBLE}, {n: start[n] for n in ELIGIBLE}, **settings
        )
        here = sf.select(
            {n: now[n].cpu() for n in ELIGIBLE}, {n: start[n].cpu() for n in ELIGIBLE}, **settings
        )
        assert_same(there.idx, here.idx, str(settings))
        assert_same(there.ptr, here.ptr, str(settings))
        assert there.idx.device.type == DEVICE.type


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_adamw_moves_the_selected_entries_alone(dtype):
    """By step and by hook: the same bits, and nothing outside the support."""
    nets = [Net(dtype) for _ in range(2)]
    start = values(nets[0])
    support = supported(nets[0])
    optimizers = [
        sf.MaskedAdamW(
            net, support, lr=1e-2, weight_decay=0.1, l1=0.1, max_grad_norm=0.5, gather=gather
        )
        for net, gather in zip(nets, ("step", "hook"), strict=True)
    ]
    for batch in batches(6, dtype):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()
    assert_model(nets[1], values(nets[0]))
    tuned = dict(nets[0].named_parameters())
    for n in ELIGIBLE:
        mask = support.mask(n).to(DEVICE)
        assert_same(tuned[n].detach()[~mask], start[n][~mask], n)
        assert not torch.equal(tuned[n].detach()[mask], start[n][mask])
    assert_same(optimizers[0].delta().val, optimizers[1].delta().val, "the deltas")


def test_a_step_waits_for_nothing(cuda):
    net = Net(torch.bfloat16)
    optimizer = sf.MaskedAdamW(net, supported(net), lr=1e-3, max_grad_norm=1.0, l1=0.1)
    for batch in batches(3, torch.bfloat16):
        optimizer.zero_grad(set_to_none=False)
        loss_of(net, batch).backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("gather", ["step", "hook"])
def test_a_gradient_scaler_skips_what_overflows(gather):
    net = Net()
    optimizer = sf.MaskedAdamW(net, supported(net), lr=1e-2, max_grad_norm=0.5, gather=gather)
    plain = copy.deepcopy(net)
    beside = sf.MaskedAdamW(plain, supported(plain), lr=1e-2, max_grad_norm=0.5, gather=gather)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    for i, batch in enumerate(batches(4, torch.float32)):
        before = values(net)
        loss = loss_of(net, batch)
        scaler.scale(loss * float("inf") if i == 2 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if i == 2:
            assert_model(net, before)
            assert scaler.get_scale() == 512.0
            continue
        loss_of(plain, batch).backward()
        beside.step()
        beside.zero_grad()
        assert_model(net, values(plain))  # powers of two scale exactly


def test_the_whole_recipe_and_composition(tmp_path):
    """Both phases, two deltas, a file, a merge, and every way back."""
    model = Net()
    start = values(model)
    ends = []

    def train(phase):
        optimizer = phase.optimizer(lr=1e-2, max_grad_norm=1.0)
        for batch in batches(5, torch.float32):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        ends.append(values(model))

    deltas = [
        sf.LotteryTicket(model, k=k, l1=0.1).fit(train, role=role, **about)
        for k, role, about in ((2000, "task", {"task": "ner"}), (3000, "language", {"lang": "de"}))
    ]
    assert_model(model, start)
    assert [len(delta) for delta in deltas] == [2000, 3000]
    full = {n: t for n, t in ends[0].items() if n in ELIGIBLE}
    ranked = sf.select(full, {n: start[n] for n in ELIGIBLE}, k=2000)
    assert_same(deltas[0].support.idx, ranked.idx, "the support of phase 2")
    with sf.compose(model, deltas[0], heads=deltas[0]):
        assert_model(model, ends[1])
    assert_model(model, start)

    with sf.compose(model, deltas, [1.0, -0.5]):
        both = values(model)
    deltas[1].save(tmp_path)
    loaded = sf.SparseDelta.load(tmp_path)
    with sf.compose(model, sf.merge([deltas[0], loaded], [1.0, -0.5])):
        assert_model(model, both)
    assert_model(model, start)
    # The same bits as on a CPU.
    there = copy.deepcopy(model).cpu()
    with sf.compose(there, deltas, [1.0, -0.5]):
        assert_model(there, both)
    there, here = sf.overlap([d.to(DEVICE) for d in deltas]), sf.overlap(deltas)
    assert there.jaccard.tolist() == here.jaccard.tolist()


def test_compositions_leave_no_trace():
    model = Net(torch.bfloat16)
    start = values(model)
    g = torch.Generator().manual_seed(3)
    moved = {n: start[n] + torch.randn(start[n].shape, generator=g).to(start[n]) for n in ELIGIBLE}
    delta = sf.SparseDelta.between({n: start[n] for n in ELIGIBLE}, moved)
    for _ in range(50 if REAL else 2):
        with sf.compose(model, delta, [0.5]):
            pass
    assert_model(model, start)
