"""LotteryTicket: full tuning, exact rewind, sparse tuning; the model is given back bit for bit."""

import copy

import pytest
import torch
from oracles import DTYPES, assert_bits
from torch import Tensor, nn
from tuned import ELIGIBLE, Net, same, values

import sparse_ft as sf
from sparse_ft import phases
from sparse_ft_kernels import native

pytestmark = pytest.mark.usefixtures("one_thread")


class Training:
    """A training function that keeps what it saw."""

    def __init__(self, steps: int = 6, settings: dict | None = None, seed: int = 1) -> None:
        self.steps, self.settings, self.seed = steps, settings or {}, seed
        self.names: list[str] = []
        self.starts: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []
        self.optimizers: list[torch.optim.Optimizer] = []

    def __call__(self, phase) -> None:
        model = phase.model
        self.names.append(phase.name)
        self.starts.append(values(model))
        assert all(p.grad is None for p in model.parameters())
        torch.manual_seed(self.seed)
        opt = phase.optimizer(**{"lr": 1e-2, **self.settings})
        assert not opt.state or all(int(s["step"]) == 0 for s in opt.state.values())
        self.optimizers.append(opt)
        model.train()
        dtype = model.head.weight.dtype
        for i in range(self.steps):
            opt.zero_grad()  # before the pass, so that a gradient is left over at the end
            x, y = torch.randn(8, 20).to(dtype), torch.randint(4, (8,))
            nn.functional.cross_entropy(model(x).float(), y).backward()
            opt.step()
            if phase.name == "sparse":
                out = {n: ~phase.support.mask(n) for n in phase.support.layout.names}
                for n, p in model.named_parameters():
                    if n in out:
                        assert_bits(p.detach()[out[n]], self.starts[-1][n][out[n]], f"{n}, {i}")
        self.ends.append(values(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather", ["step", "hook"])
def test_both_phases(dtype, gather):
    model = Net(dtype)
    before = values(model)
    train = Training(settings={"gather": gather, "max_grad_norm": 1.0})
    ticket = sf.LotteryTicket(model, k=300, l1=0.1)
    delta = ticket.fit(train, role="task", task="ner")
    # Phase 2 starts where phase 1 did: parameters, head and buffers.
    assert train.names == ["full", "sparse"]
    for start in train.starts:
        for n, t in start.items():
            assert torch.equal(t, before[n]), n
    full, tuned = train.ends
    assert not torch.equal(full["head.weight"], before["head.weight"])
    assert not torch.equal(full["body.1.running_mean"], before["body.1.running_mean"])
    assert isinstance(train.optimizers[0], torch.optim.AdamW)
    assert isinstance(train.optimizers[1], sf.MaskedAdamW)
    # The support is the global top K of phase 1 over the trainable backbone.
    assert ticket.support.layout.names == ELIGIBLE
    assert ticket.support == sf.select(
        {n: full[n] for n in ELIGIBLE}, {n: before[n] for n in ELIGIBLE}, k=300
    )
    assert delta.support == ticket.support
    assert len(delta) == 300
    # The frozen norm stayed; the head moved whole.
    assert_bits(tuned["body.1.weight"], before["body.1.weight"])
    assert set(delta.heads) == {"head.weight", "head.bias"}
    for n in delta.heads:
        assert_bits(delta.heads[n], tuned[n], n)
    # The model is as it was, without gradients or hooks, and φ gives the tuned one.
    same(model, before)
    assert all(p.grad is None for p in model.parameters())
    model.eval()(torch.zeros(2, 20).to(dtype)).sum().backward()
    assert model.body[0].weight.grad is not None
    with sf.compose(model, delta, heads=delta):
        for n, p in model.named_parameters():
            assert_bits(p.detach(), tuned[n], n)
    same(model, before)
    assert delta.meta["task"] == "ner"
    recipe = {"method": "LT-SFT", "criterion": "magnitude", "k_requested": 300, "seed": 0}
    assert delta.meta["recipe"] == {**recipe, "l1": 0.1, "eps": 0.0, "iterations": 1}
    assert "trained_on" not in delta.meta


def test_both_phases_have_the_same_settings_by_default():
    ticket = sf.LotteryTicket(Net(), k=10)
    seen = []

    @torch.no_grad()
    def train(phase):
        seen.append(phase.optimizer().param_groups[0])
        phase.model.body[0].weight += 1

    ticket.fit(train)
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert seen[0][key] == seen[1][key], key
    assert seen[0]["lr"] == 5e-5
    assert seen[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("where", ["full", "sparse"])
@pytest.mark.parametrize("gather", ["step", "hook"])
def test_an_exception_gives_the_model_back(where, gather):
    model = Net()
    before = values(model)
    inner = Training(settings={"gather": gather})

    def train(phase):
        inner(phase)
        if phase.name == where:
            model(torch.randn(4, 20)).sum().backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sf.LotteryTicket(model, k=50).fit(train)
    same(model, before)
    assert all(p.grad is None for p in model.parameters())
    model(torch.randn(4, 20)).sum().backward()
    assert model.body[0].weight.grad is not None


def test_the_best_checkpoint_decides():
    """A training function that ends by putting its best weights back."""
    model = Net()
    before = values(model)
    best = {}

    def train(phase):
        opt = phase.optimizer(lr=1e-2)
        for i in range(6):
            nn.functional.cross_entropy(
                model(torch.randn(8, 20)), torch.randint(4, (8,))
            ).backward()
            opt.step()
            opt.zero_grad()
            if i == 2:
                best[phase.name] = values(model)
        model.load_state_dict(best[phase.name])

    ticket = sf.LotteryTicket(model, k=200)
    delta = ticket.fit(train)
    assert ticket.support == sf.select(
        {n: best["full"][n] for n in ELIGIBLE}, {n: before[n] for n in ELIGIBLE}, k=200
    )
    for n in ELIGIBLE:
        flat = delta.indices(n)
        wanted = (best["sparse"][n] - before[n]).reshape(-1)[flat]
        assert_bits(delta.values(n), wanted, n)
    for n, head in delta.heads.items():
        assert_bits(head, best["sparse"][n], n)
    same(model, before)


def test_weights_put_in_by_assignment_count_too():
    model = Net()
    before = values(model)
    end = {}

    def train(phase):
        opt = phase.optimizer(lr=1e-2)
        model(torch.randn(8, 20)).sum().backward()
        opt.step()
        end.update(values(model))
        model.load_state_dict(
            {n: t + 1 if n in ELIGIBLE else t for n, t in end.items()}, assign=True
        )
        end.update(values(model))

    delta = sf.LotteryTicket(model, k=20).fit(train)
    for n, flat, val in delta:
        assert_bits(val, (end[n] - before[n]).reshape(-1)[flat], n)
    same(model, before)


def test_a_training_function_that_makes_no_optimizer():
    model = Net()
    before = values(model)

    @torch.no_grad()
    def train(phase):
        model.body[0].weight[0] += torch.arange(20.0)

    delta = sf.LotteryTicket(model, k=5).fit(train)
    assert delta.indices("body.0.weight").tolist() == [15, 16, 17, 18, 19]
    same(model, before)


def test_random_needs_no_full_phase():
    model = Net()
    train = Training()
    ticket = sf.LotteryTicket(model, density=0.1, criterion="random", seed=7)
    delta = ticket.fit(train)
    assert train.names == ["sparse"]
    assert ticket.k == sum(dict(model.named_parameters())[n].numel() for n in ELIGIBLE) // 10
    assert ticket.support == sf.select(model, k=ticket.k, criterion="random", seed=7)
    assert delta.meta["recipe"]["method"] == "RAND-SFT"
    assert delta.meta["recipe"]["seed"] == 7


def test_a_criterion_of_ones_own():
    ticket = sf.LotteryTicket(
        Net(), k=12, criterion=lambda name, now, start: now * 0 + (name == "body.4.bias")
    )
    delta = ticket.fit(Training())
    assert ticket.support.counts()["body.4.bias"] == 12
    assert delta.meta["recipe"]["criterion"] == "custom"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("best", [False, True])
def test_a_source_language_is_under_the_task_and_not_in_it(dtype, best):
    model = Net(dtype)
    before = values(model)
    source = sf.LotteryTicket(model, k=200).fit(Training(seed=5), role="language", lang="en")
    same(model, before)
    train = Training()

    def ends_elsewhere(phase):
        train(phase)
        if best and phase.name == "sparse":
            with torch.no_grad():
                model.body[4].bias += 0.5
        train.ends[-1] = values(model)

    with sf.compose(model, source, [0.5]):
        shifted = values(model)
        task = sf.LotteryTicket(model, k=150).fit(
            ends_elsewhere, role="task", base={"id": "org/model", "revision": "1"}
        )
        same(model, shifted)
    same(model, before)
    for start in train.starts:
        for n, t in start.items():
            assert torch.equal(t, shifted[n]), n
    tuned = train.ends[1]
    for n, flat, val in task:
        moved = (tuned[n].double() - shifted[n].double()).reshape(-1)[flat]
        room = tuned[n].double().abs().max() * torch.finfo(dtype).eps
        assert ((val.double() - moved).abs() <= room).all(), n
    assert task.meta["trained_on"] == [{"id": source.content_id, "alpha": 0.5}]
    # Its base is the model without the source, by name and by digest.
    assert task.meta["base"].items() >= {"id": "org/model", "revision": "1"}.items()
    pristine = Net(dtype)
    with sf.compose(pristine, [task, source]):
        pass
    with sf.compose(pristine, source) as under:
        wrong = copy.deepcopy(pristine)
    assert under.changed
    with pytest.raises(sf.SFTError, match="made for the base model 'org/model'"):
        sf.compose(wrong, task)
    direct = sf.SparseDelta.between(
        {n: before[n] for n in task.layout.names},
        {n: before[n] for n in task.layout.names},
        task.support,
    )
    for key in ("digest_f32", "digest_bf16"):
        assert task.meta["base"][key] == direct.meta["base"][key]


def test_the_same_seed_gives_the_same_bits_whatever_the_threads(monkeypatch):
    ids = set()
    for threads in (1, 2, 3, 2):
        monkeypatch.setattr(native, "_threads", lambda n=threads: n)
        delta = sf.LotteryTicket(Net(), k=300, l1=10.0).fit(
            Training(settings={"max_grad_norm": 0.5, "weight_decay": 0.1})
        )
        ids.add(delta.content_id)
    assert len(ids) == 1
    other = sf.LotteryTicket(Net(), k=300, l1=10.0).fit(Training(seed=2))
    assert other.content_id not in ids


def test_l1_pulls_towards_the_start_in_both_phases():
    distances = []
    for l1 in (0.0, 3000.0):
        train = Training(steps=12)
        delta = sf.LotteryTicket(Net(), k=300, l1=l1).fit(train)
        start, full = train.starts[0], train.ends[0]
        distances.append(
            (
                sum(float((full[n] - start[n]).abs().sum()) for n in ELIGIBLE),
                float(delta.val.abs().sum()),
            )
        )
    assert distances[1][0] < 0.5 * distances[0][0]
    assert distances[1][1] < 0.5 * distances[0][1]


@pytest.mark.parametrize("heads", [False, True])
def test_l1_holds_the_heads_only_where_it_is_told_to(heads):
    """ε so large that the step is linear in the gradient, and gradients of zero: L1 is all."""
    model = Net()
    before = values(model)
    seen = {}

    def train(phase):
        opt = phase.optimizer(lr=1.0, eps=1e3)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5)
        if phase.name == "sparse":
            opt = phase.optimizer(lr=1.0, eps=1e3)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        moved = values(model)
        opt.step()
        seen[phase.name] = {n: t - moved[n] for n, t in values(model).items()}
        if phase.name == "full":
            with torch.no_grad():  # something to rank
                model.body[0].weight.add_(torch.rand(50, 20))

    ticket = sf.LotteryTicket(model, k=40, l1=1e5, l1_heads=heads)
    ticket.fit(train)
    numel = sum(p.numel() for p in model.parameters())
    g = 1e5 / numel
    for phase, found in seen.items():
        for n in ELIGIBLE:
            wanted = torch.full_like(before[n], -g / (g + 1e3))
            if phase == "sparse":
                wanted *= ticket.support.mask(n)
            torch.testing.assert_close(found[n], wanted, rtol=1e-3, atol=1e-6)
        wanted = -g / (g + 1e3) if heads else 0.0
        torch.testing.assert_close(
            found["head.bias"], torch.full((4,), wanted), rtol=1e-3, atol=1e-6
        )


def test_clipping_of_the_full_phase_is_torchs():
    results = []
    for own in (False, True):
        model = Net()

        def train(phase, own=own, model=model):
            torch.manual_seed(3)
            opt = phase.optimizer(lr=1e-2, max_grad_norm=None if own else 0.05)
            for _ in range(3):
                opt.zero_grad()
                model(torch.randn(8, 20)).square().sum().backward()
                if own:
                    nn.utils.clip_grad_norm_(
                        [p for p in model.parameters() if p.requires_grad], 0.05
                    )
                opt.step()
            results.append(values(model))
            raise StopIteration

        with pytest.raises(StopIteration):
            sf.LotteryTicket(model, k=5).fit(train)
    for n, t in results[0].items():
        assert torch.equal(t, results[1][n]), n


def test_a_start_that_is_kept_elsewhere_comes_in_pieces(monkeypatch):
    """No copy of θ0 on the device: what `snapshot_device` saves stays saved."""
    monkeypatch.setattr(phases, "CHUNK", 100)
    sizes = []

    class Elsewhere:
        device = torch.device("cuda")

        def __init__(self, tensor):
            self.tensor = tensor

        def detach(self):
            return self

        def view(self, *shape):
            return Elsewhere(self.tensor.view(*shape))

        def split(self, size):
            return [Elsewhere(part) for part in self.tensor.split(size)]

        def to(self, device):
            sizes.append(self.tensor.numel())
            return self.tensor

    grads = []
    for where in (lambda tensor: tensor, Elsewhere):
        model = Net()
        tuned = {n: p for n, p in model.named_parameters() if n in ELIGIBLE}
        theta0 = {n: where(torch.full_like(p, 0.01)) for n, p in tuned.items()}
        model(torch.ones(2, 20)).sum().backward()
        optimizer = torch.optim.AdamW(tuned.values())
        phases._AnchorAndClip(tuned, tuned, theta0, 0.3, None)(optimizer, (), {})
        grads.append(torch.cat([p.grad.view(-1) for p in tuned.values()]))
    assert_bits(*grads)
    assert max(sizes) == 100
    assert sum(sizes) == 2580


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": -1.0}, r"max_grad_norm must be positive, got -1\.0; None is no"),
        ({"max_grad_norm": 0}, "max_grad_norm must be positive, got 0"),
        ({"gather": "hoook"}, "gather must be 'step' or 'hook', got 'hoook'"),
    ],
)
def test_what_the_sparse_phase_would_refuse_the_full_one_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        sf.LotteryTicket(Net(), k=5).fit(Training(settings=options))


def test_a_scaler_has_to_unscale_in_the_full_phase():
    model = Net()
    before = values(model)
    unscale = False

    def train(phase):
        opt = phase.optimizer(lr=1e-2, max_grad_norm=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(model(torch.randn(8, 20)).square().sum()).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()

    with pytest.raises(RuntimeError, match=r"scaler\.unscale_\(optimizer\)"):
        sf.LotteryTicket(model, k=5).fit(train)
    same(model, before)
    unscale = True
    assert len(sf.LotteryTicket(model, k=5).fit(train)) == 5


def test_small_differences_are_cut():
    train = Training()
    whole = sf.LotteryTicket(Net(), k=300).fit(train)
    eps = float(whole.val.abs().median())
    cut = sf.LotteryTicket(Net(), k=300, eps=eps).fit(Training())
    assert cut.nnz == int((whole.val.abs() > eps).sum())
    assert cut.meta["recipe"]["eps"] == eps


@pytest.mark.parametrize("best", [False, True])
def test_a_tied_parameter_keeps_its_names(best):
    model = nn.ModuleDict({"x": nn.Linear(9, 9, bias=False), "y": nn.Linear(9, 9, bias=False)})
    model["y"].weight = model["x"].weight

    def train(phase):
        opt = phase.optimizer(lr=1e-2)
        model["y"](model["x"](torch.randn(3, 9))).sum().backward()
        opt.step()
        if best:
            with torch.no_grad():
                model["x"].weight += 1

    delta = sf.LotteryTicket(model, k=5).fit(train)
    assert delta.meta["aliases"] == {"x.weight": ["y.weight"]}


def test_what_cannot_be_tuned_is_refused_at_once():
    def net(change):
        model = Net()
        change(model)
        return model

    def lazy(model):
        model.body.append(nn.LazyLinear(3))

    def turned(model):
        model.head.weight = nn.Parameter(torch.ones(30, 4).t())

    for model, more, kind, message in [
        (Net(), {"k": 0}, ValueError, "between 1 and the 2580"),
        (Net(), {"k": 2581}, ValueError, "between 1 and the 2580"),
        (Net(), {}, ValueError, "either k"),
        (Net(), {"density": 1.5}, ValueError, r"\(0, 1\]"),
        (Net(), {"k": 1, "l1": -0.1}, ValueError, "l1 must not be negative"),
        (Net(), {"k": 1, "l1": float("nan")}, ValueError, "l1 must not be negative"),
        (Net(), {"k": 1, "l1": (0.1, -1)}, ValueError, "l1 must not be negative"),
        (Net(), {"k": 1, "l1": (0.1,)}, ValueError, r"a pair \(full, sparse\)"),
        (Net(), {"k": 1, "l1_numel": "some"}, ValueError, "l1_numel must be"),
        (Net(), {"k": 1, "l1_numel": 0}, ValueError, "l1_numel must be"),
        (Net(), {"k": 5, "iterations": 0}, ValueError, "iterations must be an integer ≥ 1"),
        (Net(), {"k": 5, "iterations": 6}, ValueError, "6 iterations cannot share 5 entries"),
        (Net(), {"k": 1, "criterion": "magic"}, ValueError, "unknown criterion 'magic'"),
        (
            Net(),
            {"k": 1, "eligible": {"body.1.weight"}},
            ValueError,
            r"'body\.1\.weight' is eligible but frozen",
        ),
        (Net(), {"k": 1, "eligible": {"x"}}, ValueError, "no parameter 'x'"),
        (net(lazy), {"k": 1}, ValueError, r"'body\.5\.weight' has no shape yet"),
        (net(turned), {"k": 1}, ValueError, r"'head\.weight' is not contiguous"),
        (net(lambda m: m.double()), {"k": 1}, ValueError, "float64"),
        (net(lambda m: m.to("meta")), {"k": 1}, ValueError, "meta"),
        (net(lambda m: m.requires_grad_(False)), {"k": 1}, ValueError, "none is eligible"),
        (nn.ReLU(), {"k": 1}, ValueError, "no parameters"),
        ([1], {"k": 1}, TypeError, "Module, got list"),
    ]:
        with pytest.raises(kind, match=message):
            sf.LotteryTicket(model, **more)


def test_training_that_diverges_is_named():
    model = Net()
    before = values(model)

    @torch.no_grad()
    def train(phase):
        model.body[4].weight[0, 0] = float("nan")

    with pytest.raises(sf.TrainingDiverged, match=r"'body\.4\.weight' holds NaN or infinity"):
        sf.LotteryTicket(model, k=5).fit(train)
    same(model, before)


@pytest.mark.parametrize("where", ["full", "sparse"])
@pytest.mark.parametrize("best", [False, True])
def test_the_last_update_of_a_phase_diverges(where, best):
    model = Net()
    before = values(model)
    inner = Training()

    def train(phase):
        inner(phase)
        if best:
            phase.offer(1.0)
        if phase.name == where:
            with torch.no_grad():
                model.head.weight[0, 0] = float("inf")

    ticket = sf.LotteryTicket(model, k=5)
    if best:
        assert ticket.fit(train).heads["head.weight"].isfinite().all()
    else:
        with pytest.raises(sf.TrainingDiverged, match=f"'head.weight' holds.*of the {where} phase"):
            ticket.fit(train)
    same(model, before)


def test_what_a_training_function_freezes_is_thawed():
    model = Net()
    before = values(model)
    inner = Training()

    def train(phase):
        inner(phase)
        for parameter in model.head.parameters():
            parameter.requires_grad_(False)
        model.body[1].weight.requires_grad_(True)

    delta = sf.LotteryTicket(model, k=50).fit(train)
    assert set(delta.heads) == {"head.weight", "head.bias"}
    assert all(p.requires_grad for p in model.head.parameters())
    assert not model.body[1].weight.requires_grad
    same(model, before)


def three(model, k=301, record=None, **options):
    """Three iterations, recorded: each phase's start, its support, and its end."""
    seen = []
    inner = Training()

    def train(phase):
        begin = values(phase.model)
        inner(phase)
        seen.append((phase, begin, values(phase.model)))

    ticket = sf.LotteryTicket(model, k=k, iterations=3, **options)
    return ticket, ticket.fit(train), seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_iterations(dtype):
    model = Net(dtype)
    before = values(model)
    ticket, delta, seen = three(model)
    assert [(p.name, p.iteration, p.iterations) for p, _, _ in seen] == [
        (name, i, 3) for i in range(3) for name in ("full", "sparse")
    ]
    sparse = [phase.support for phase, _, _ in seen[1::2]]
    assert [len(s) for s in sparse] == [100, 200, 301]
    assert ticket.support == sparse[-1] == delta.support
    for i, (phase, begin, _) in enumerate(seen):
        held = sparse[i // 2 - 1] if i > 1 else None
        end = seen[i // 2 * 2 - 1][2]
        for n, t in begin.items():
            wanted = before[n]
            if held is not None and n in held.layout:
                # The sparse values learnt so far; head and buffers start afresh.
                wanted = torch.where(held.mask(n), end[n], wanted)
            assert_bits(t, wanted, f"{phase.title}: {n}") if t.is_floating_point() else None
    for i in range(3):
        full = seen[2 * i][2]
        chosen = sf.select(
            {n: full[n] for n in ELIGIBLE},
            {n: before[n] for n in ELIGIBLE},
            k=[100, 100, 101][i],
            exclude=sparse[i - 1] if i else None,
        )
        for n in ELIGIBLE:
            known = sparse[i - 1].mask(n) if i else torch.zeros(before[n].shape, dtype=torch.bool)
            assert not (known & chosen.mask(n)).any()
            assert torch.equal(sparse[i].mask(n), known | chosen.mask(n))
    same(model, before)
    with sf.compose(model, delta, heads=delta):
        for n, p in model.named_parameters():
            assert_bits(p.detach(), seen[-1][2][n], n)


def test_the_first_iteration_is_that_of_a_smaller_k():
    _, _, seen = three(Net(), k=302)
    once = sf.LotteryTicket(Net(), k=100).fit(Training())
    phase, _, end = seen[1]
    assert phase.support == once.support
    before = values(Net())
    for n, at, value in once:
        assert_bits(end[n].reshape(-1)[at], before[n].reshape(-1)[at] + value, n)
    for n, head in once.heads.items():
        assert_bits(end[n], head, n)


def test_what_bfloat16_rounds_off_is_carried_to_the_next_iteration():
    deltas = []

    def train(phase):
        Training()(phase)
        if phase.name == "sparse":
            deltas.append(phase.made.delta())

    def still(phase):
        """Learns in the first iteration alone."""
        if phase.iteration == 0 or phase.name == "full":
            return train(phase)
        deltas.append(phase.optimizer().delta())

    sf.LotteryTicket(Net(torch.bfloat16), k=200, iterations=2).fit(still)
    first, second = deltas
    lost = 0
    for n, at, value in first:
        place = torch.searchsorted(second.indices(n), at)
        assert_bits(second.values(n)[place], value, n)
        start = dict(Net(torch.bfloat16).named_parameters())[n].detach().reshape(-1)[at]
        lost += int(((start.float() + value).bfloat16().float() - start.float() != value).sum())
    assert lost > 10


def test_the_sign_of_zero_stays():
    """At entries for which nothing was learnt, θ0 is not θ0 + 0."""
    model = Net()
    zero = torch.full((50,), -0.0)
    with torch.no_grad():
        model.body[0].bias.copy_(zero)

    @torch.no_grad()
    def train(phase):
        bias = phase.model.body[0].bias
        assert_bits(bias.detach(), zero, phase.title)
        if phase.name == "full":
            bias += torch.arange(50.0)

    sf.LotteryTicket(model, k=40, iterations=2).fit(train)


def test_a_random_support_grows_too():
    ticket, delta, seen = three(Net(), criterion="random", seed=3)
    assert [phase.name for phase, _, _ in seen] == ["sparse"] * 3
    assert len(delta) == len(ticket.support) == 301
    assert seen[0][0].support == sf.select(Net(), k=100, criterion="random", seed=3)


@pytest.mark.parametrize("l1", [0.2, (0.2, 0.2), (0.3, 0.1), (0.0, 0.5)])
@pytest.mark.parametrize(
    ("l1_numel", "n"), [("all", 2804), ("trainable", 2704), ("eligible", 2580), (100, 100)]
)
def test_what_the_l1_term_counts(l1, l1_numel, n):
    """The step is linear in the gradient where ε is huge, so it shows λ/N."""
    found = {}

    def train(phase):
        opt = phase.optimizer(lr=1.0, eps=1e4)
        bias = phase.model.head.bias
        with torch.no_grad():
            bias += 0.5
            phase.model.body[0].weight += 1
        if phase.name == "sparse":
            opt = phase.optimizer(lr=1.0, eps=1e4)
        bias.grad = torch.zeros(4)
        before = bias.detach().clone().double()
        opt.step()
        found[phase.name] = float((before - bias.detach())[0])

    scale = 1e6
    pair = l1 if isinstance(l1, tuple) else (l1, l1)
    given = tuple(scale * v for v in l1) if isinstance(l1, tuple) else scale * l1
    delta = sf.LotteryTicket(Net(), k=40, l1=given, l1_numel=l1_numel).fit(train)
    for value, phase in zip(pair, ("full", "sparse"), strict=True):
        g = scale * value / n
        assert found[phase] == pytest.approx(g / (g + 1e4), rel=1e-3, abs=1e-6)
    assert delta.meta["recipe"]["l1"] == (
        scale * pair[0] if pair[0] == pair[1] else [scale * v for v in pair]
    )


def test_a_given_mask_needs_neither_k_nor_a_full_phase():
    chosen = sf.select(Net(), k=77, criterion="random", seed=5)
    train = Training()
    ticket = sf.LotteryTicket(Net(), criterion=sf.criteria.given(chosen))
    delta = ticket.fit(train)
    assert train.names == ["sparse"]
    assert ticket.k == len(delta) == 77
    assert delta.support == chosen
    assert delta.meta["recipe"]["method"] == "given mask"
    some = sf.select(Net(), k=900, criterion="random", seed=6)
    left = sf.LotteryTicket(Net(), criterion=sf.criteria.given(chosen), exclude=some)
    delta = left.fit(Training())
    assert 0 < left.k == len(delta) == delta.meta["recipe"]["k_requested"] < 77
    with pytest.raises(ValueError, match=r'"bias" fixes its entries.* leave iterations at 1'):
        sf.LotteryTicket(Net(), criterion="bias", iterations=2)
    biases = sf.LotteryTicket(Net(), criterion="bias").fit(Training())
    assert len(biases) == 80
    assert set(biases.support.counts()) == set(ELIGIBLE)


def test_entries_that_must_be_in_and_entries_that_must_not():
    inside = sf.select(Net(), k=50, criterion="random", seed=1)
    outside = sf.select(Net(), k=60, criterion="random", seed=2, exclude=inside)
    options = {"include": inside, "exclude": iter([outside])}
    ticket, delta, seen = three(Net(), **options)
    assert len(delta) == 301
    for n in ELIGIBLE:
        first = seen[1][0].support.mask(n)
        assert not (inside.mask(n) & ~first).any()
        assert not (outside.mask(n) & ticket.support.mask(n)).any()


def test_modes_come_back():
    model = Net()
    model.body.eval()
    modes = {m: m.training for m in model.modules()}

    def train(phase):
        Training()(phase)
        model.body[3].eval()

    sf.LotteryTicket(model, k=10).fit(train)
    assert {m: m.training for m in model.modules()} == modes


def test_too_few_entries_moved(tmp_path):
    model = Net()
    before = values(model)

    @torch.no_grad()
    def train(phase):
        optimizer = phase.optimizer(lr=1e-2)
        for _ in phase.batches([0], steps=2):
            phase.model.body[4].bias.grad = torch.ones(30)
            optimizer.step()

    with pytest.raises(ValueError, match=r"only 30 of the 50 entries wanted moved"):
        sf.LotteryTicket(model, k=50).fit(train, tmp_path)
    same(model, before)
    # Nothing is lost: the full phase is stored, and what to do about it is not a setting.
    steps = []

    def rest(phase):
        optimizer = phase.optimizer(lr=1e-2)
        assert phase.resumed == (phase.name == "full")
        for _ in phase.batches([0], steps=2):
            steps.append(phase.name)
            phase.model.body[4].bias.grad = torch.ones(30)
            optimizer.step()

    delta = sf.LotteryTicket(model, k=50, fill=True).fit(rest, tmp_path)
    assert steps == ["sparse"] * 2
    assert delta.support.counts()["body.4.bias"] == 30
    assert len(delta) == 50


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"colour": "red"}, "no field 'colour'"),
        ({"lang": 5}, "lang"),
        ({"recipe": {"x": object()}}, "recipe"),
    ],
)
def test_mistakes_in_the_metadata_show_before_training(meta, message):
    def never(phase):
        raise AssertionError

    with pytest.raises(sf.SFTError, match=message):
        sf.LotteryTicket(Net(), k=5).fit(never, **meta)


def test_the_recipe_of_a_user_is_added():
    delta = sf.LotteryTicket(Net(), k=5).fit(Training(), recipe={"lr": 1e-2, "method": "mine"})
    recipe = delta.meta["recipe"]
    assert (recipe["lr"], recipe["method"], recipe["k_requested"]) == (1e-2, "mine", 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": 3}, "need a folder"),
        ({"fresh": True}, "need a folder"),
        ({"save_every": 0, "folder": "x"}, "save_every must be an integer ≥ 1, got 0"),
    ],
)
def test_options_of_a_run_need_a_folder(options, message):
    with pytest.raises(ValueError, match=message):
        sf.LotteryTicket(Net(), k=5).fit(Training(), **options)
