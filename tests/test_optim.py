"""MaskedAdamW against torch.optim.AdamW run densely with masked gradients, as training loops."""

import copy
import pickle
import warnings

import pytest
import torch
from oracles import DTYPES, assert_bits
from torch import Tensor, nn

import sparse_ft as sf

SELECTED = ("emb.weight", "lin.bias", "lin.weight", "norm.weight")

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """An embedding of two tiles, a norm, a layer, and a head; `still` gets no gradient ever."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(1100, 60)
        self.norm = nn.LayerNorm(60)
        self.lin = nn.Linear(60, 40)
        self.head = nn.Linear(40, 3)
        self.to(dtype)
        self.norm.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.lin(self.norm(self.emb(x).mean(1)))))


def batches(n: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(1100, (16, 5), generator=g), torch.randint(3, (16,), generator=g))
        for _ in range(n)
    ]


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]).float(), batch[1])


def supported(net: nn.Module, share: float = 0.2, names: tuple[str, ...] = SELECTED) -> sf.Support:
    g = torch.Generator().manual_seed(5)
    parameters = dict(net.named_parameters())
    return sf.Support.from_masks(
        {n: torch.rand(parameters[n].shape, generator=g) < share for n in names}
    )


def values(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def same_bits(a: nn.Module, b: nn.Module) -> None:
    for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert_bits(p.detach(), q.detach(), n)


class Dense:
    """torch's AdamW over the whole model: mask the gradients, L1 by autograd, then clip."""

    def __init__(
        self, net, support, l1=0.0, max_grad_norm=None, l1_heads=True, groups=None, **hyper
    ):
        self.net, self.max_grad_norm = net, max_grad_norm
        self.parameters = {n: p for n, p in net.named_parameters() if p.requires_grad}
        self.masks = {
            n: support.mask(n) if n in support.layout else torch.ones_like(p, dtype=torch.bool)
            for n, p in self.parameters.items()
        }
        self.start = values(net)
        self.l1, self.l1_heads = l1, l1_heads
        self.heads = [n for n in self.parameters if n not in support.layout]
        self.numel = sum(p.numel() for p in net.parameters())
        self.torch = torch.optim.AdamW(groups or list(self.parameters.values()), **hyper)

    def step(self):
        # The distance of an entry from its start as the optimizer knows it: exact in fp32 here.
        penalty = sum(
            (p - self.start[n])[self.masks[n]].abs().sum()
            for n, p in self.parameters.items()
            if self.l1_heads or n not in self.heads
        )
        if self.l1:
            (self.l1 / self.numel * penalty).backward()
        with torch.no_grad():
            for n, p in self.parameters.items():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad * self.masks[n]
        self.norm = nn.utils.clip_grad_norm_(
            self.parameters.values(), self.max_grad_norm or float("inf")
        )
        self.torch.step()
        # torch decays every entry: undo that where nothing is selected.
        with torch.no_grad():
            for n, p in self.parameters.items():
                p.copy_(torch.where(self.masks[n], p, self.start[n]))
        self.torch.zero_grad()


def both(steps=8, accumulate=1, gather="step", dense=None, schedule=None, groups=None, **hyper):
    """Trains one net sparsely and its twin densely; gives both optimizers."""
    net = Net()
    twin = copy.deepcopy(net)
    support = supported(net)
    masked = sf.MaskedAdamW(
        groups(net) if groups else net.named_parameters(), support, gather=gather, **hyper
    )
    heads = hyper.pop("l1_heads", True)
    oracle = Dense(
        twin,
        support,
        hyper.pop("l1", 0.0),
        hyper.pop("max_grad_norm", None),
        heads,
        groups=[
            {**g, "params": [p for _, p in g["params"] if p.requires_grad]} for g in groups(twin)
        ]
        if groups
        else None,
        **{"lr": 5e-5, "weight_decay": 0.0, **hyper},
    )
    schedulers = [schedule(masked), schedule(oracle.torch)] if schedule else []
    for i, batch in enumerate(batches(steps * accumulate)):
        (loss_of(net, batch) / accumulate).backward()
        (loss_of(twin, batch) / accumulate).backward()
        if i % accumulate == accumulate - 1:
            masked.step()
            masked.zero_grad()
            oracle.step()
            for s in schedulers:
                s.step()
            if masked.max_grad_norm:
                torch.testing.assert_close(masked.grad_norm.float(), oracle.norm, rtol=1e-5, atol=0)
    return net, twin, support, masked, oracle


def close(net, twin, lr, steps=8, strays=0):
    """The same weights: rounding of one Adam step is a few 1e-7 of lr, unless |g| is near ε.

    With an L1 term a few entries may stray: those that come within rounding of their start, where
    the sign of the term is that of the rounding.
    """
    found = 0
    for (n, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        far = ~torch.isclose(p, q, rtol=3e-7, atol=lr * steps * 2e-4)
        found += int(far.sum())
        assert found <= strays, f"{n}: {p[far].tolist()} and {q[far].tolist()}"


@pytest.mark.parametrize("gather", ["step", "hook"])
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-4},
        {"lr": 1e-2, "max_grad_norm": 0.05},
        {"lr": 1e-2, "max_grad_norm": 100.0},
        {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.1, "accumulate": 3},
        {"lr": 1e-2, "l1": 30.0},
        {"lr": 1e-2, "l1": 30.0, "l1_heads": False, "max_grad_norm": 0.1, "weight_decay": 0.01},
        {"lr": torch.tensor(1e-2)},
    ],
    ids=str,
)
def test_as_torch_densely_with_masked_gradients(settings, gather):
    settings = {"eps": 1e-5, **settings}
    net, twin, support, _, oracle = both(gather=gather, **settings)
    close(net, twin, 1e-2, strays=3 if "l1" in settings else 0)
    start = oracle.start
    changed = 0
    for n, p in net.named_parameters():
        if n in support.layout:
            out = ~support.mask(n)
            assert_bits(p.detach()[out], start[n][out], n)
            changed += int((p.detach() != start[n]).sum())
        elif not p.requires_grad:
            assert_bits(p.detach(), start[n], n)
    assert changed > support.nnz // 4


SCHEDULES = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=10),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(
        o, 1e-3, 1e-2, step_size_up=2, cycle_momentum=True, base_momentum=0.7, max_momentum=0.9
    ),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "warm-up": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers(name):
    schedule = SCHEDULES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "The epoch parameter")
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        net, twin, _, masked, oracle = both(lr=1e-2, eps=1e-5, schedule=schedule)
    close(net, twin, 1e-2)
    assert masked.param_groups[0]["lr"] == oracle.torch.param_groups[0]["lr"] != 1e-2
    assert masked.param_groups[0]["betas"] == oracle.torch.param_groups[0]["betas"]


def test_reduce_on_plateau_and_edits_of_the_learning_rate_take_effect():
    net = Net()
    opt = sf.MaskedAdamW(net, supported(net), lr=1e-2)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)
    for _ in range(3):
        plateau.step(1.0)
    assert opt.param_groups[0]["lr"] == 1e-2 / 4
    opt.param_groups[0]["lr"] = 0.0
    before = values(net)
    loss_of(net, batches(1)[0]).backward()
    opt.step()
    for n, p in net.named_parameters():
        assert_bits(p.detach(), before[n], n)
    assert "weight_decay: 0" in repr(opt)


def split(net):
    decay = [(n, p) for n, p in net.named_parameters() if p.dim() > 1]
    rest = [(n, p) for n, p in net.named_parameters() if p.dim() <= 1]
    return [
        {"params": decay, "weight_decay": 0.1, "lr": 5e-3},
        {"params": rest, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("gather", ["step", "hook"])
def test_groups_with_settings_of_their_own(gather):
    net, twin, support, masked, _ = both(
        groups=split, lr=1e-2, eps=1e-5, max_grad_norm=0.1, accumulate=2, gather=gather
    )
    close(net, twin, 1e-2)
    assert [g["lr"] for g in masked.param_groups] == [5e-3, 1e-2]
    assert masked.delta().support == support


def test_a_group_added_later():
    net, twin = Net(), Net()
    support = supported(net)
    names = [n for n, _ in net.named_parameters() if not n.startswith("head")]
    parameters = dict(net.named_parameters())
    masked = sf.MaskedAdamW([(n, parameters[n]) for n in names], support, lr=1e-2, eps=1e-5, l1=1.0)
    masked.add_param_group({"params": list(net.head.named_parameters(prefix="head")), "lr": 2e-2})
    q = dict(twin.named_parameters())
    groups = [
        {"params": [q[n] for n in names if q[n].requires_grad]},
        {"params": list(twin.head.parameters()), "lr": 2e-2},
    ]
    oracle = Dense(twin, support, 1.0, groups=groups, lr=1e-2, eps=1e-5, weight_decay=0.0)
    for batch in batches(5):
        loss_of(net, batch).backward()
        loss_of(twin, batch).backward()
        masked.step()
        masked.zero_grad()
        oracle.step()
    close(net, twin, 2e-2, strays=3)
    # N of the L1 term is that of all parameters given, whenever they came.
    assert masked.l1_numel == sum(p.numel() for p in net.parameters())
    assert set(masked.delta().heads) == {"head.weight", "head.bias"}


def test_l1_is_the_derivative_of_the_penalty_over_all_parameters():
    """One step with ε so large that Adam is linear: the change shows the gradient."""
    net = Net()
    support = supported(net)
    start = values(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape) * 0.01 * (torch.rand(p.shape) < 0.5))
    before = values(net)
    l1, eps = 1e6, 1e6
    opt = sf.MaskedAdamW(net, support, start, lr=1.0, eps=eps, l1=l1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    # Frozen parameters count in N and not in the sum.
    numel = sum(p.numel() for p in net.parameters())
    assert opt.l1_numel == numel
    for n, p in net.named_parameters():
        if not p.requires_grad:
            continue
        distance = (before[n] - start[n]).requires_grad_()
        (l1 / numel * distance.abs().sum()).backward()
        wanted = -distance.grad.sign() * (l1 / numel) / (l1 / numel + eps) * (distance.grad != 0)
        if n in support.layout:
            wanted *= support.mask(n)
        # Half a last place of the largest weights, below 8.
        torch.testing.assert_close(p - before[n], wanted, rtol=1e-3, atol=2.0**-22)
    assert sf.MaskedAdamW(net, support, l1=1.0, l1_numel=10).l1_numel == 10
    with pytest.raises(ValueError, match="l1_numel must be positive, got 0"):
        sf.MaskedAdamW(net, support, l1=1.0, l1_numel=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather", ["step", "hook"])
def test_untouched_entries_keep_their_bits(dtype, gather):
    net = Net(dtype)
    support = supported(net)
    with torch.no_grad():
        net.emb.weight[0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-7]).to(dtype)
    mask = support.mask("emb.weight")
    mask[0] = False
    support = sf.Support.from_masks(
        {n: mask if n == "emb.weight" else support.mask(n) for n in support.layout.names}
    )
    start = values(net)
    opt = sf.MaskedAdamW(
        net, support, lr=1e-2, weight_decay=0.5, l1=1.0, max_grad_norm=0.5, gather=gather
    )
    for i, (x, y) in enumerate(batches(45)):
        (loss_of(net, (x.clamp(min=1), y)) / 3).backward()
        if i % 3 == 2:
            opt.step()
            opt.zero_grad()
    for n in support.layout.names:
        p, chosen = dict(net.named_parameters())[n].detach(), support.mask(n)
        assert_bits(p[~chosen], start[n][~chosen], n)
        assert int((p[chosen] != start[n][chosen]).sum()) > 0.5 * int(chosen.sum())
    # The weight is round(θ0 + δ) at every tuned entry, and δ is what `delta()` gives.
    assert opt.holds()
    delta = opt.delta()
    for n, flat, val in delta:
        p = dict(net.named_parameters())[n].detach().reshape(-1)
        assert_bits(p[flat], (start[n].reshape(-1)[flat].float() + val).to(dtype), n)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_hooks_give_the_same_bits_and_free_every_dense_gradient(accumulate):
    nets = Net(), Net()
    # One trainable parameter of the layout has no selected entry, yet its gradient must go too.
    support = supported(nets[0])
    chosen = {n: f for n, f in support if n != "lin.bias"}
    support = sf.Support.from_indices(support.layout, chosen)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.2, "l1": 1.0}
    opts = [
        sf.MaskedAdamW(n, support, gather=g, **settings)
        for n, g in zip(nets, ("step", "hook"), strict=True)
    ]
    for i, batch in enumerate(batches(12)):
        for net in nets:
            loss_of(net, batch).backward()
        assert all(p.grad is None for p in nets[1].parameters())
        if i % accumulate == accumulate - 1:
            for opt in opts:
                opt.step()
                opt.zero_grad()
            same_bits(*nets)
            assert_bits(opts[0].grad_norm, opts[1].grad_norm)
    opts[1].detach_hooks()
    loss_of(nets[1], batches(1)[0]).backward()
    assert nets[1].emb.weight.grad is not None


def test_zero_grad_forgets_what_the_hooks_gathered():
    nets = Net(), Net()
    opts = [sf.MaskedAdamW(n, supported(n), lr=1e-2, gather="hook") for n in nets]
    loss_of(nets[0], batches(2)[0]).backward()
    opts[0].zero_grad()
    for net, opt in zip(nets, opts, strict=True):
        loss_of(net, batches(2)[1]).backward()
        opt.step()
        # Nothing is left over for a second step.
        before = values(net)
        opt.step()
        for n, p in net.named_parameters():
            assert_bits(p.detach(), before[n], n)
    same_bits(*nets)


def test_a_closure_is_called_and_its_loss_given_back():
    nets = Net(), Net()
    opts = [
        sf.MaskedAdamW(n, supported(n), lr=1e-2, gather=g)
        for n, g in zip(nets, ("step", "hook"), strict=True)
    ]
    for batch in batches(3):
        for net, opt in zip(nets, opts, strict=True):

            def closure(net=net, opt=opt, batch=batch):
                opt.zero_grad()
                loss = loss_of(net, batch)
                loss.backward()
                return loss

            wanted = loss_of(net, batch)
            assert torch.equal(opt.step(closure), wanted)
            assert not torch.equal(loss_of(net, batch), wanted)
    same_bits(*nets)
    assert opts[0].step() is None


def test_without_any_gradient_nothing_happens():
    net = Net()
    opt = sf.MaskedAdamW(net, supported(net), weight_decay=0.5)
    before = values(net)
    opt.step()
    for n, p in net.named_parameters():
        assert_bits(p.detach(), before[n], n)
    assert all(int(state["step"]) == 0 for state in opt.state.values())


def test_heads_are_tuned_as_torch_tunes_them():
    """A support over a parameter that gets no gradient: all the rest is a head."""
    net, twin = Net(), Net()
    with torch.no_grad():
        net.norm.bias.requires_grad_(True)
        twin.norm.bias.requires_grad_(True)
    support = sf.Support.from_indices(sf.Layout.of({"lin.bias": (40,)}), {"lin.bias": [3]})
    masked = sf.MaskedAdamW(net, support, lr=1e-2, weight_decay=0.1, eps=1e-5)
    dense = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-5)
    mask = support.mask("lin.bias")
    start = values(twin)["lin.bias"]
    for batch in batches(6):
        for n, o in ((net, masked), (twin, dense)):
            loss_of(n, batch).backward()
            o.step()
            o.zero_grad()
        with torch.no_grad():
            twin.lin.bias.copy_(torch.where(mask, twin.lin.bias, start))
    close(net, twin, 1e-2)
    heads = masked.delta().heads
    assert set(heads) == {n for n, _ in net.named_parameters()} - {"lin.bias"}
    for n, head in heads.items():
        assert_bits(head, dict(net.named_parameters())[n].detach(), n)


def test_tied_parameters_are_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.emb = nn.Embedding(50, 20)
            self.out = nn.Linear(20, 50, bias=False)
            self.out.weight = self.emb.weight

        def forward(self, x):
            return self.out(self.emb(x).mean(1))

    net, twin = Tied(), Tied()
    support = sf.Support.from_masks({"emb.weight": torch.rand(50, 20) < 0.3})
    masked = sf.MaskedAdamW(net, support, lr=1e-2, eps=1e-5)
    oracle = Dense(twin, support, lr=1e-2, eps=1e-5, weight_decay=0.0)
    for x, y in batches(5):
        for n, o in ((net, masked), (twin, oracle)):
            nn.functional.cross_entropy(n(x % 50), y).backward()
            o.step()
        masked.zero_grad()
    close(net, twin, 1e-2)
    assert net.out.weight is net.emb.weight
    assert masked.delta().meta["aliases"] == {"emb.weight": ["out.weight"]}
    # Given under both names it would be moved twice.
    with pytest.raises(ValueError, match=r"'out\.weight' is 'emb\.weight' under another name"):
        sf.MaskedAdamW(list(net.named_parameters(remove_duplicate=False)), support)


def test_mixed_data_types():
    net = Net()
    net.emb.bfloat16()
    net.lin.half()
    support = supported(net)
    start = values(net)
    opt = sf.MaskedAdamW(net, support, lr=1e-2, max_grad_norm=1.0)
    g = torch.Generator().manual_seed(3)
    for _ in range(4):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        opt.step()
    tuned = values(net)
    for n, flat, val in opt.delta():
        assert_bits(
            tuned[n].reshape(-1)[flat],
            (start[n].reshape(-1)[flat].float() + val).to(tuned[n].dtype),
        )
        out = ~support.mask(n)
        assert_bits(tuned[n][out], start[n][out], n)
    squares = sum(
        p.grad.double()[support.mask(n) if n in support.layout else ...].square().sum()
        for n, p in net.named_parameters()
        if p.requires_grad
    )
    torch.testing.assert_close(opt.grad_norm, squares.sqrt(), rtol=1e-12, atol=0)


# --- gradient scaling -----------------------------------------------------------------------------


@pytest.mark.parametrize("gather", ["step", "hook"])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_changes_nothing_but_skips_infinite_steps(gather, unscale):
    nets = Net(), Net()
    settings = {"lr": 1e-2, "weight_decay": 0.1, "gather": gather}
    if not unscale:
        settings["max_grad_norm"] = 0.3
    opts = [sf.MaskedAdamW(n, supported(n), **settings) for n in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, batch in enumerate(batches(6)):
        scaler.scale(loss_of(nets[0], batch)).backward()
        if i == 3:
            # Overflow at a selected entry, as fp16 would have it.
            before, state = values(nets[0]), copy.deepcopy(opts[0].state_dict()["state"])
            name, flat = next(iter(opts[0].support))
            if gather == "step":
                dict(nets[0].named_parameters())[name].grad.view(-1)[flat[0]] = float("inf")
            else:
                next(u.entries for _, u in opts[0]._units if name in u.names).grad[0] = float("inf")
        if unscale:
            scaler.unscale_(opts[0])
            if i != 3:
                clip(opts[0])
        scaler.step(opts[0])
        scaler.update()
        opts[0].zero_grad()
        if i == 3:
            for n, p in nets[0].named_parameters():
                assert_bits(p.detach(), before[n], n)
            for now, then in zip(opts[0].state_dict()["state"], state, strict=True):
                for key in ("step", "delta", "exp_avg", "exp_avg_sq"):
                    assert_bits(now[key], then[key], key)
            assert scaler.get_scale() == 512.0
            continue
        loss_of(nets[1], batch).backward()
        if unscale:
            clip(opts[1])
        opts[1].step()
        opts[1].zero_grad()
        # Powers of two scale exactly.
        same_bits(*nets)
    assert not hasattr(opts[0], "grad_scale") or opts[0].grad_scale is None


def clip(opt):
    """A user's own clipping: of what the optimizer holds gradients of."""
    nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 0.2)


# --- state ----------------------------------------------------------------------------------------


def through_a_file(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("gather", ["step", "hook"])
@pytest.mark.parametrize("how", [copy.deepcopy, through_a_file], ids=["memory", "file"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stored_state_continues_to_the_same_bits(how, dtype, gather):
    settings = {"lr": 1e-2, "weight_decay": 0.1, "l1": 1.0, "max_grad_norm": 0.3, "gather": gather}

    def run(net, opt, scheduler, todo):
        for batch in todo:
            loss_of(net, batch).backward()
            opt.step()
            opt.zero_grad()
            scheduler.step()

    def make(start=None):
        net = Net(dtype)
        opt = sf.MaskedAdamW(split(net), supported(net), start, **settings)
        return net, opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))

    whole, first, second = make(), make(), make(values(Net(dtype)))
    todo = batches(7)
    run(*whole, todo)
    run(*first, todo[:3])
    stored = how((first[1].state_dict(), first[2].state_dict()))
    run(*first, todo[3:5])  # going on must not change what was stored in a file
    second[1].load_state_dict(stored[0])
    second[2].load_state_dict(stored[1])
    assert second[1].holds()
    # Heads and selected entries are where the state has them; the rest never moved.
    run(*second, todo[3:])
    same_bits(whole[0], second[0])
    assert whole[1].delta() == second[1].delta()


def test_a_state_of_another_run_is_refused_and_nothing_changes():
    net = Net()
    opt = sf.MaskedAdamW(net, supported(net), lr=1e-2)
    loss_of(net, batches(1)[0]).backward()
    opt.step()
    before, state = values(net), copy.deepcopy(opt.state_dict())

    def other(change):
        wrong = copy.deepcopy(state)
        change(wrong)
        return wrong

    fresh = Net()
    with torch.no_grad():
        fresh.emb.weight += 1
    cases = [
        (torch.optim.AdamW(Net().parameters()).state_dict(), "not the state of a MaskedAdamW"),
        (sf.MaskedAdamW(Net(), supported(Net(), 0.1)).state_dict(), "has another support"),
        (sf.MaskedAdamW(fresh, supported(fresh)).state_dict(), "starts from other values"),
        (sf.MaskedAdamW(split(Net()), supported(Net())).state_dict(), "2 groups"),
        (other(lambda s: s["state"][1].update(exp_avg=torch.zeros(3))), "exp_avg does not fit"),
        (other(lambda s: s["state"][1].pop("exp_avg_sq")), "exp_avg_sq does not fit"),
        (other(lambda s: s["state"][1].pop("step")), "step does not fit"),
        (other(lambda s: s["state"][1].update(step=torch.zeros(2))), "step does not fit"),
        (other(lambda s: s["state"][0].pop("theta0")), "theta0 does not fit"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(wrong)
        for n, p in net.named_parameters():
            assert_bits(p.detach(), before[n], n)
        for now, then in zip(opt.state_dict()["state"], state["state"], strict=True):
            for key in ("step", "delta", "exp_avg", "exp_avg_sq"):
                assert_bits(now[key], then[key], key)
    opt.load_state_dict(state)


def test_state_is_twelve_bytes_for_an_entry():
    net = Net()
    support = supported(net)
    opt = sf.MaskedAdamW(net, support)
    tuned = support.nnz + sum(p.numel() for p in net.head.parameters())
    tensors = [t for state in opt.state.values() for t in state.values() if t.numel() > 1]
    assert sum(t.numel() * t.element_size() for t in tensors) == 12 * tuned


@pytest.mark.parametrize("gather", ["step", "hook"])
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_its_own_way(clone, gather):
    net = Net()
    opt = sf.MaskedAdamW(net, supported(net), lr=1e-2, gather=gather)

    def run(net, opt, batch):
        loss_of(net, batch).backward()
        opt.step()
        opt.zero_grad()

    first, second, third = batches(3)
    run(net, opt, first)
    twin, other = clone((net, opt))
    same_bits(net, twin)
    run(net, opt, second)
    before = values(net)
    run(twin, other, second)
    same_bits(net, twin)
    run(twin, other, third)
    for n, p in net.named_parameters():
        assert_bits(p.detach(), before[n], n)
    run(net, opt, third)
    same_bits(net, twin)
    assert other.delta() == opt.delta()
    assert [s["exp_avg"].data_ptr() for s in other.state.values()] == [
        s["exp_avg"].data_ptr() for s in other.state_dict()["state"]
    ]


# --- the result -----------------------------------------------------------------------------------


def test_the_delta_is_what_happened_to_the_weights():
    net = Net()
    support = supported(net)
    start = values(net)
    opt = sf.MaskedAdamW(net, support, lr=1e-2)
    for batch in batches(4):
        loss_of(net, batch).backward()
        opt.step()
        opt.zero_grad()
    delta = opt.delta(role="task", task="ner")
    assert delta.support == support
    assert delta.meta["task"] == "ner"
    assert delta.meta["base"].keys() == {"digest_f32", "digest_bf16"}
    tuned = values(net)
    base = Net()
    with sf.compose(base, delta, heads=delta):
        same_bits(base, net)
    for n, flat, val in delta:
        difference = (tuned[n].double() - start[n].double()).reshape(-1)[flat]
        assert ((val.double() - difference).abs() <= 2.0**-24 * tuned[n].double().abs().max()).all()
    # A cut drops small entries and keeps the rest.
    eps = float(delta.val[delta.val != 0].abs().median())
    short = opt.delta(eps=eps)
    kept = delta.val.abs() > eps
    assert short.nnz == int(kept.sum())
    assert_bits(short.val, delta.val[kept])
    # Independent of the optimizer.
    copied = delta.val.clone()
    loss_of(net, batches(1)[0]).backward()
    opt.step()
    assert_bits(delta.val, copied)


def test_continuing_from_moved_weights_counts_from_theta0():
    net = Net()
    support = supported(net)
    start = sf.snapshot(net)
    with torch.no_grad():
        net.lin.weight += 0.25
    opt = sf.MaskedAdamW(net, support, start)
    val = opt.delta()
    assert torch.equal(
        val.values("lin.weight"),
        (net.lin.weight.detach() - start["lin.weight"])[support.mask("lin.weight")],
    )


# --- refusals -------------------------------------------------------------------------------------


def test_bad_settings():
    net = Net()
    support = supported(net)
    for settings, message in [
        ({"lr": -1.0}, r"lr must be in \[0, inf\), got -1"),
        ({"lr": float("nan")}, "lr must be"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"l1": -1.0}, "l1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be positive"),
        ({"gather": "never"}, 'gather must be "step" or "hook"'),
    ]:
        with pytest.raises(ValueError, match=message):
            sf.MaskedAdamW(net, support, **settings)


def test_bad_parameters():
    net = Net()
    support = supported(net)
    start = values(net)
    named = dict(net.named_parameters())
    cases = [
        ([], {}, "no parameters given"),
        (list(net.parameters()), {}, "with their names"),
        (
            [(n, p) for n, p in named.items() if n != "lin.weight"],
            {},
            r"'lin\.weight', which is not among",
        ),
        (
            [*named.items(), ("lin.weight", named["lin.weight"])],
            {},
            r"'lin\.weight' is given twice",
        ),
        (
            net,
            {"theta0": {n: t for n, t in start.items() if n != "lin.weight"}},
            r"no 'lin\.weight'",
        ),
        (net, {"theta0": {**start, "lin.weight": torch.ones(3)}}, r"\['lin\.weight'\].*\(3,\)"),
        (
            net,
            {"theta0": {**start, "lin.weight": start["lin.weight"].half()}},
            r"lin\.weight.*float16",
        ),
        (
            [
                (n, p if n != "lin.weight" else nn.Parameter(torch.ones(3)))
                for n, p in named.items()
            ],
            {},
            r"'lin\.weight' has shape \(3,\), the support was made for \(40, 60\)",
        ),
    ]
    for params, more, message in cases:
        with pytest.raises(ValueError, match=message):
            sf.MaskedAdamW(params, support, **more)
    net.lin.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'lin\.weight', which is frozen"):
        sf.MaskedAdamW(net, support)
    empty = sf.Support.from_indices(sf.Layout.of({"emb.weight": (1100, 60)}), {})
    with pytest.raises(ValueError, match="nothing to tune"):
        sf.MaskedAdamW([("emb.weight", net.emb.weight)], empty)
    for odd, message in [
        (nn.Parameter(torch.ones(3, 2).t()), "not contiguous"),
        (nn.Parameter(torch.ones(3, dtype=torch.float64)), "float64"),
        (nn.Parameter(torch.ones(3, dtype=torch.complex64)), "complex64"),
        (nn.Parameter(torch.ones(3, device="meta")), "meta"),
        (nn.Parameter(torch.eye(3).to_sparse()), "sparse_coo"),
        (nn.parameter.UninitializedParameter(), "no shape yet"),
    ]:
        with pytest.raises(ValueError, match=rf"'odd' .*{message}"):
            sf.MaskedAdamW([("emb.weight", net.emb.weight), ("odd", odd)], empty)


@pytest.mark.parametrize("gather", ["step", "hook"])
def test_a_sparse_gradient_is_refused_by_name(gather):
    emb = nn.Embedding(10, 4, sparse=True)
    opt = sf.MaskedAdamW(
        emb, sf.Support.from_masks({"weight": torch.ones(10, 4) > 0}), gather=gather
    )
    before = emb.weight.detach().clone()

    def run():
        emb(torch.tensor([1])).sum().backward()
        opt.step()

    with pytest.raises(ValueError, match="'weight' is sparse"):
        run()
    assert_bits(emb.weight.detach(), before)


def test_with_accelerate():
    accelerate = pytest.importorskip("accelerate")
    nets = Net(), Net()
    opts = [sf.MaskedAdamW(n, supported(n), lr=1e-2) for n in nets]
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net, opt = accelerator.prepare(nets[0], opts[0])
    todo = batches(4)
    for batch in todo:
        with accelerator.accumulate(net):
            accelerator.backward(loss_of(net, batch))
            opt.step()
            opt.zero_grad()
    for i, batch in enumerate(todo):
        (loss_of(nets[1], batch) / 2).backward()
        if i % 2:
            opts[1].step()
            opts[1].zero_grad()
    same_bits(*nets)
