"""Loop, Length and Phase.batches: the ready training function, and what a plain loop is given."""

import contextlib
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tuned import ELIGIBLE, Net, loss_of, noisy, rows, same, values

import sparse_ft as sf

pytestmark = pytest.mark.usefixtures("one_thread")


def loader(**options):
    return DataLoader(rows(), **{"batch_size": 4, "shuffle": True, "collate_fn": noisy, **options})


def loop(**options):
    return sf.Loop(**{"batches": loader(), "full": 6, "loss": loss_of, "lr": 1e-2, **options})


def ticket(model=None, **options):
    return sf.LotteryTicket(model or Net(), **{"k": 300, "l1": 0.1, **options})


# --- Length -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "per_epoch", "steps"),
    [
        # The reference implementation: epochs, unless max_steps is fewer or min_steps is more.
        (sf.Length(epochs=3), 100, 300),
        (sf.Length(epochs=100, max_steps=100_000), 500, 50_000),
        (sf.Length(epochs=100, max_steps=100_000), 5_000, 100_000),
        (sf.Length(epochs=100, min_steps=30_000, max_steps=100_000), 50, 30_000),
        (sf.Length(epochs=100, min_steps=30_000, max_steps=100_000), 400, 40_000),
        (sf.Length(steps=7), None, 7),
        (sf.Length(steps=7, max_steps=5), None, 5),
        (sf.Length(steps=7, min_steps=9), None, 9),
        (sf.Length(max_steps=11), None, 11),
        # len(data) · epochs // (batch · accumulation): the fraction of an epoch's step counts.
        (sf.Length(epochs=3), 10 / 4, 7),
        (sf.Length(epochs=0.5), 9, 4),
        (sf.Length(epochs=0.01), 9, 1),
        (sf.Length(epochs=0.29), 100, 29),
    ],
)
def test_length(length, per_epoch, steps):
    assert length.resolve(per_epoch) == steps


@given(
    st.integers(1, 5000), st.integers(1, 64), st.integers(1, 8), st.integers(1, 20),
    st.integers(1, 100), st.integers(0, 100),
)  # fmt: skip
def test_length_is_the_references_rule(examples, batch, accumulate, epochs, least, more):
    """sft/trainer: epochs → steps, then the maximum, then the minimum."""
    batches = math.ceil(examples / batch)
    expected = batches * epochs // accumulate
    expected = max(min(expected, least + more), least)
    length = sf.Length(epochs=epochs, min_steps=least, max_steps=least + more)
    assert length.resolve(batches / accumulate) == expected


@given(st.integers(1, 500), st.integers(1, 5000), st.integers(1, 8))
@example(29, 100, 1)
def test_parts_of_an_epoch_are_rounded_down(hundredths, batches, accumulate):
    exact = Fraction(hundredths * batches, 100 * accumulate)
    found = sf.Length(epochs=hundredths / 100).resolve(batches / accumulate)
    assert found == max(1, math.floor(exact))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give steps, epochs or max_steps"),
        ({"min_steps": 3}, "give steps, epochs or max_steps"),
        ({"steps": 3, "epochs": 2}, "not both"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"epochs": -1}, "epochs must be positive, got -1"),
        ({"epochs": float("nan")}, "epochs must be positive, got nan"),
        ({"steps": True}, "steps must be positive"),
        ({"steps": 1.5}, "must be whole, got 1.5; passes over the data are epochs"),
        ({"epochs": 1, "min_steps": 5, "max_steps": 4}, "min_steps is 5, above max_steps, 4"),
    ],
)
def test_lengths_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        sf.Length(**options)


def test_epochs_need_data_with_a_length():
    with pytest.raises(ValueError, match=r"3 epochs of data that have no length; give steps"):
        sf.Length(epochs=3).resolve(None)


# --- Loop ---------------------------------------------------------------------------------------


def test_it_is_the_loop_one_would_write():
    """Bit for bit: warm-up and decay, accumulation, clipping, L1, new optimizers and schedules."""
    model = Net()
    found = ticket(model).fit(
        loop(full=7, sparse=5, lr=(1e-2, 2e-2), warmup=0.3, accumulate=3, weight_decay=0.1, seed=5)
    )
    rates = []

    def train(phase):
        sparse = phase.name == "sparse"
        steps, lr = ((5, 2e-2), (7, 1e-2))[not sparse]
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)
        optimizer = phase.optimizer(lr=lr, max_grad_norm=1.0, weight_decay=0.1)
        phase.model.train()

        def forever():
            batches = loader()
            while True:
                yield from batches

        batches = forever()
        rise = math.ceil(0.3 * steps)
        for step in range(steps):
            share = step / rise if step < rise else (steps - step) / (steps - rise)
            for group in optimizer.param_groups:
                group["lr"] = lr * share
            rates.append((phase.name, share))
            for _ in range(3):
                (loss_of(phase.model, next(batches)) / 3).backward()
            optimizer.step()
            optimizer.zero_grad()

    wanted = ticket(model).fit(train)
    assert found == wanted
    assert all(torch.equal(found.heads[n], wanted.heads[n]) for n in wanted.heads)
    assert rates[0] == ("full", 0.0)
    assert rates[7] == ("sparse", 0.0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules(schedule):
    seen = {}

    def log(entry):
        seen.setdefault(entry["phase"], []).append(entry["lr"])

    ticket().fit(loop(full=8, schedule=schedule, warmup=0.25, lr=1.0, log=log, log_every=1))
    left = [(8 - step) / 6 for step in range(2, 8)]
    after = {
        "linear": left,
        "cosine": [(1 + math.cos(math.pi * (1 - share))) / 2 for share in left],
        "constant": [1.0] * 6,
    }[schedule]
    for phase in ("full", "sparse"):
        assert seen[phase] == pytest.approx([0.0, 0.5, *after], abs=1e-12)


def test_what_is_logged():
    model = Net()
    start = values(model)
    entries, now = [], {}

    def log(entry):
        entries.append(entry)
        if "lr" in entry:
            gaps = {n: (t - start[n]).double() for n, t in values(model).items()}
            moved = sum(int((gaps[n] != 0).sum()) for n in ELIGIBLE)
            far = sum(float(gaps[n].abs().sum()) for n in (*ELIGIBLE, "head.weight", "head.bias"))
            now[len(entries) - 1] = (moved / 2580, 0.1 / 2804 * far)

    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"accuracy": 0.5, "loss": 2.0}

    ticket(model).fit(
        loop(
            full=7, log=log, log_every=3, evaluate=evaluate, metric="accuracy", evaluate_every=2,
            greater_is_better=True,
        )
    )  # fmt: skip
    for phase in ("full", "sparse"):
        mine = [e for e in entries if e["phase"] == phase]
        reports = [e for e in mine if "lr" in e]
        assert [e["step"] for e in reports] == [3, 6, 7]
        assert [e["steps"] for e in reports] == [7, 7, 7]
        assert all(e["grad_norm"] > 0 for e in reports)
        scores = [e for e in mine if "accuracy" in e]
        assert [e["step"] for e in scores] == [2, 4, 6, 7]
        assert scores[0] == {
            "phase": phase, "iteration": 0, "step": 2, "accuracy": 0.5, "loss": 2.0
        }  # fmt: skip
    for i, (moved, l1) in now.items():
        assert entries[i]["moved"] == moved
        assert entries[i]["l1"] == pytest.approx(l1, rel=1e-6)
    assert max(e["moved"] for e in entries if e["phase"] == "sparse" and "lr" in e) <= 300 / 2580


def test_evaluation_does_not_touch_what_training_draws():
    model = Net()
    drawn = []

    def evaluate(model):
        drawn.append((random.random(), np.random.rand(), float(torch.rand(1))))  # noqa: NPY002
        return -len(drawn)  # the last weights are the best

    watched = ticket(model).fit(loop(evaluate=evaluate, evaluate_every=1, metric="loss"))
    assert len(drawn) == 12
    assert watched == ticket(model).fit(loop())


@pytest.mark.parametrize("greater", [False, True])
def test_the_best_weights_of_each_phase_decide(greater):
    """The score is best in the middle, so the last weights are not what counts."""
    model = Net()
    start = values(model)
    kept, evaluations = {}, []

    def evaluate(model):
        evaluations.append(0)
        at = (len(evaluations) - 1) % 6 + 1
        if at == 3:
            kept[len(kept)] = values(model)
        return {"far": 1.0, "score": abs(at - 3) * (-1 if greater else 1)}

    lottery = ticket(model)
    delta = lottery.fit(
        loop(evaluate=evaluate, evaluate_every=1, metric="score", greater_is_better=greater)
    )
    full, tuned = kept[0], kept[1]
    wanted = sf.select({n: full[n] for n in ELIGIBLE}, {n: start[n] for n in ELIGIBLE}, k=300)
    assert lottery.support == wanted
    last = ticket(model)
    last.fit(loop())
    assert last.support != wanted
    for name, at, value in delta:
        # δ is what was learnt; the weight has rounded θ0 + δ.
        weight = start[name].reshape(-1)[at] + value
        assert torch.equal(weight, tuned[name].reshape(-1)[at]), name
    for name, head in delta.heads.items():
        assert torch.equal(head, tuned[name])
    same(model, start)


def test_the_first_of_equal_scores_is_kept_and_nan_never_is():
    scores = iter([float("nan"), 2.0, 2.0, 3.0, float("nan"), 2.0])
    seen = []

    def train(phase):
        if phase.name == "full":
            optimizer = phase.optimizer(lr=1e-2)
            for batch in phase.batches(loader(), steps=6):
                loss_of(phase.model, batch).backward()
                optimizer.step()
                seen.append(phase.offer(next(scores)))
            assert phase.best == (2.0, 2)

    ticket().fit(train)
    assert seen == [False, True, False, False, False, False]
    with pytest.raises(ValueError, match="better must be"):
        ticket().fit(lambda phase: phase.offer(1.0, better="more"))


def test_lengths_in_epochs_and_evaluation_by_epoch():
    steps = {}
    ticket().fit(
        loop(
            full=sf.Length(epochs=2),
            sparse=sf.Length(epochs=1, min_steps=7),
            accumulate=2,
            evaluate=lambda model: 0.0,
            greater_is_better=True,
            evaluate_every="epoch",
            log=lambda entry: steps.setdefault(entry["phase"], []).append(entry["step"]),
        )
    )
    # 10 batches, two for a step; a report at the end as well.
    assert steps == {"full": [5, 10, 10], "sparse": [5, 7, 7]}


def test_batches_by_phase():
    seen = []

    def batches(phase):
        seen.append(phase.name)
        return loader()

    ticket().fit(loop(batches=batches))
    assert seen == ["full", "sparse"]


def test_data_without_a_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows())

    batches = DataLoader(Stream(), batch_size=4)
    run = loop(batches=batches)
    assert run.settings["batches"] is None
    assert ticket().fit(run) == ticket().fit(loop(batches=DataLoader(rows(), batch_size=4)))
    with pytest.raises(ValueError, match="epochs of data that have no length"):
        ticket().fit(loop(batches=batches, full=sf.Length(epochs=1)))


def test_what_batches_say_of_themselves(tmp_path):
    """Their settings are those of the run, and what was below is in the result."""
    below = [{"id": "0" * 64, "alpha": 1.0}]

    class Sources(list):
        trained_on = below

        def __init__(self, seed):
            super().__init__(noisy(rows()[4 * i : 4 * i + 4]) for i in range(3))
            self.settings = {"seed": seed}

    found = ticket().fit(loop(batches=Sources(1)), tmp_path)
    assert found.meta["trained_on"] == below
    with pytest.raises(ValueError, match=r"training\.batches\.seed was 1 and is 2"):
        ticket().fit(loop(batches=Sources(2)), tmp_path)


def test_the_loaders_of_sources_come_back():
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    items = [dict(zip("xy", row, strict=True)) for row in rows()]
    own = DataLoader(items, 4, shuffle=True, generator=generator)

    def loss(model, batch):
        return loss_of(model, (batch["x"], batch["y"]))

    ticket().fit(loop(batches=sf.MultiSource({"a": own, "b": own}), full=3, loss=loss))
    assert torch.equal(generator.get_state(), before)


def test_batches_that_bring_a_context():
    """Several sources: each batch runs inside the loader's own context, steps outside of it."""
    events = []

    class Sources(list):
        @contextlib.contextmanager
        def active(self, model, batch):
            events.append("on")
            yield
            assert model.head.bias.grad is not None
            events.append("off")

    batches = Sources(noisy(rows()[4 * i : 4 * i + 4]) for i in range(3))

    def train(phase):
        run = loop(batches=batches, full=2)
        make = phase.optimizer

        def watched(*args, **kwargs):
            optimizer = make(*args, **kwargs)
            optimizer.register_step_pre_hook(lambda *_: events.append("step"))
            return optimizer

        phase.optimizer = watched
        run(phase)

    ticket().fit(train)
    assert events == ["on", "off", "step"] * 4


def test_the_models_own_loss_and_its_device():
    class WithLoss(Net):
        def forward(self, x, y):
            class Output:
                loss = nn.functional.cross_entropy(self.head(self.body(x)), y)

            return Output()

    batches = [dict(zip("xy", noisy(rows()[:4]), strict=True))]
    delta = ticket(WithLoss()).fit(sf.Loop(batches, full=2, lr=1e-2))
    assert len(delta) == 300


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast(precision):
    seen = set()

    def loss(model, batch):
        x, y = batch
        out = model(x)
        seen.add(out.dtype)
        return nn.functional.cross_entropy(out.float(), y)

    delta = ticket().fit(loop(loss=loss, precision=precision, accumulate=2))
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    exact = ticket().fit(loop(accumulate=2))
    shared = sum(
        len(set(delta.indices(n).tolist()) & set(exact.indices(n).tolist())) for n in ELIGIBLE
    )
    assert shared > 200
    assert delta != exact


def test_a_step_that_overflows_is_skipped(tmp_path):
    """The scaler is part of the state: a stopped run continues with its scale."""
    scales = []

    class Watched(torch.amp.GradScaler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, init_scale=2.0**22, growth_interval=9, **kwargs)
            scales.append(self)

    original, torch.amp.GradScaler = torch.amp.GradScaler, Watched
    try:
        left = [20]

        def loss(model, batch):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return loss_of(model, batch)

        with pytest.raises(KeyboardInterrupt):
            ticket().fit(loop(precision="fp16", full=16, loss=loss), tmp_path, save_every=3)
        stopped = ticket().fit(loop(precision="fp16", full=16, loss=loss), tmp_path, save_every=3)
        whole = ticket().fit(loop(precision="fp16", full=16))
    finally:
        torch.amp.GradScaler = original
    assert stopped == whole
    assert 0 < scales[-1].get_scale() < 2.0**22
    assert torch.isfinite(whole.val).all()


@pytest.mark.parametrize("gather", ["step", "hook"])
@pytest.mark.parametrize("norm", [None, 0.5])
def test_the_ways_of_the_sparse_phase_agree(gather, norm):
    found = ticket().fit(loop(gather=gather, max_grad_norm=norm, accumulate=2))
    assert found == ticket().fit(loop(max_grad_norm=norm, accumulate=2))


def test_each_phase_starts_from_the_same_seed():
    seen = {"full": [], "sparse": []}
    name = []

    def loss(model, batch):
        seen[name[-1]].append(batch[0])
        return loss_of(model, batch)

    run = loop(loss=loss, seed=11)

    def train(phase):
        name.append(phase.name)
        run(phase)

    torch.manual_seed(1)
    ticket().fit(train)
    torch.manual_seed(2)
    ticket().fit(train)
    assert len(seen["full"]) == 12
    for a, b in zip(seen["full"], seen["sparse"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(seen["full"][:6], seen["full"][6:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "schedule must be one of linear, constant, cosine"),
        ({"precision": "fp8"}, "precision must be None, bf16 or fp16"),
        ({"warmup": 1.0}, "warmup must be a share"),
        ({"evaluate_every": 0, "evaluate": len}, "evaluate_every must be"),
        ({"evaluate_every": "step", "evaluate": len}, "evaluate_every must be"),
        ({"evaluate_every": 3}, "need evaluate"),
        ({"metric": "f1"}, "need evaluate"),
        ({"accumulate": 0}, "accumulate must be an integer ≥ 1"),
        ({"log_every": 2.5}, "log_every must be an integer ≥ 1"),
        ({"full": 0}, "steps must be positive"),
        ({"lr": (1, 2, 3)}, "lr must be a number, or a pair"),
        ({"lr": (1e-2, -1)}, "lr must be finite and not negative"),
        ({"lr": float("nan")}, "lr must be finite and not negative"),
        ({"weight_decay": -0.1}, "weight_decay and eps must not be negative"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"max_grad_norm": 0}, "max_grad_norm must be positive, got 0; None is no clipping"),
        ({"gather": "hoook"}, "gather must be 'step' or 'hook'"),
        ({"evaluate": len}, "greater_is_better: say whether more"),
        ({"evaluate": len, "metric": "accuracy"}, "metric is 'accuracy', which does not tell"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        loop(**options)


@pytest.mark.parametrize(
    ("scores", "metric", "message"),
    [
        ({"a": 1.0, "b": 2.0}, None, "evaluate gave 'a', 'b'; metric must name"),
        ({"a": 1.0}, "b", "got 'b'"),
        ({}, None, "evaluate gave nothing"),
    ],
)
def test_a_metric_that_is_not_there(scores, metric, message):
    with pytest.raises(ValueError, match=message):
        ticket().fit(loop(evaluate=lambda model: scores, metric=metric, greater_is_better=True))


# --- what a plain loop is given -----------------------------------------------------------------


def collected(batches, steps, accumulate):
    out = []

    def train(phase):
        phase.optimizer()
        for batch in phase.batches(batches, steps=steps, accumulate=accumulate):
            out.append((batch, phase.step, phase.step_due))

    with pytest.raises(ValueError, match="only 0 of the 300 entries wanted moved"):
        ticket().fit(train)
    return out


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 4))
def test_steps_span_epochs(count, steps, accumulate):
    found = collected(list(range(count)), steps, accumulate)
    assert [batch for batch, _, _ in found] == [i % count for i in range(steps * accumulate)]
    due = [(i + 1) % accumulate == 0 for i in range(steps * accumulate)]
    assert [d for _, _, d in found] == due
    assert [step for _, step, _ in found] == [sum(due[: i + 1]) for i in range(len(due))]


@pytest.mark.parametrize(
    ("batches", "options", "kind", "message"),
    [
        ([], {}, ValueError, "the loader gave no batch"),
        (DataLoader(rows(3), batch_size=4, drop_last=True), {}, ValueError, "gave no batch"),
        (iter([1]), {}, ValueError, "is an iterator, which ends after one epoch"),
        ([1], {"steps": 0}, ValueError, "steps must be an integer ≥ 1, got 0"),
        ([1], {"steps": 2.0}, ValueError, r"steps must be an integer ≥ 1, got 2\.0"),
        ([1], {"accumulate": 0}, ValueError, "accumulate must be an integer ≥ 1, got 0"),
    ],
)
def test_batches_that_make_no_sense(batches, options, kind, message):
    model = Net()
    before = values(model)

    def train(phase):
        phase.optimizer()
        for _ in phase.batches(batches, **{"steps": 3, **options}):
            pass

    with pytest.raises(kind, match=message):
        ticket(model).fit(train)
    same(model, before)


def test_the_loop_of_a_phase():
    def no_optimizer(phase):
        phase.batches([1], steps=1)

    def twice(phase):
        phase.optimizer()
        list(phase.batches([1], steps=1))
        phase.batches([1], steps=1)

    with pytest.raises(RuntimeError, match=r"call phase\.optimizer"):
        ticket().fit(no_optimizer)
    with pytest.raises(RuntimeError, match="a phase has one loop"):
        ticket().fit(twice)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": ["head.bias"]}], "'body.0.weight' is in 0 groups, not in one"),
        ([{"params": [*ELIGIBLE, "head.bias", "head.weight", "x"]}], "'x' is no trainable"),
        (
            [{"params": [*ELIGIBLE, "head.bias"]}, {"params": ["head.weight", "head.bias"]}],
            "'head.bias' is in 2 groups",
        ),
    ],
)
def test_groups_hold_every_parameter_once(groups, message):
    with pytest.raises(ValueError, match=message):
        ticket().fit(lambda phase: phase.optimizer(groups=groups))


# --- divergence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["full", "sparse"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(phase, value, tmp_path):
    model = Net()
    before = values(model)
    name, steps = [], []

    def loss(model, batch):
        steps.append(name[-1])
        found = loss_of(model, batch)
        return found * value if name[-1] == phase and steps.count(phase) == 8 else found

    run = loop(full=30, loss=loss)

    def train(now):
        name.append(now.name)
        run(now)

    with pytest.raises(sf.TrainingDiverged) as found:
        ticket(model).fit(train, tmp_path, save_every=3)
    text = str(found.value)
    assert f"at step 8 of the {phase} phase" in text
    state = str(next(tmp_path.glob("run-state-*")))
    assert f"The state of step 6 is in {state}" in text
    assert steps.count(phase) <= 10
    same(model, before)
    # From there it goes on, once the cause is gone.
    good = ticket(model).fit(loop(full=30, seed=0))
    name.clear()
    steps.extend([phase] * 20)
    assert ticket(model).fit(train, tmp_path, save_every=3) == good


def test_weights_that_are_no_numbers_are_not_stored(tmp_path):
    def train(phase):
        optimizer = phase.optimizer(lr=1e-2)
        for batch in phase.batches(loader(), steps=6):
            loss_of(phase.model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if phase.step == 4:
                with torch.no_grad():
                    phase.model.head.weight[1, 2] = float("nan")

    with pytest.raises(
        sf.TrainingDiverged, match=r"'head\.weight' holds NaN or infinity at step 4.*of step 2 is"
    ):
        ticket().fit(train, tmp_path, save_every=2)


def test_divergence_without_a_folder():
    run = loop(full=30, loss=lambda model, batch: loss_of(model, batch) * float("nan"))
    with pytest.raises(sf.TrainingDiverged, match=r"at step 1 of the full phase.*No state was"):
        ticket().fit(run)


# --- progress, accelerate -----------------------------------------------------------------------


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_on_a_terminal(shown, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    ticket(iterations=2).fit(loop(full=12), progress=shown)
    captured = capsys.readouterr()
    assert captured.out == ""
    if shown:
        for text in ("full phase, iteration 1 of 2", "sparse phase, iteration 2", "12/12", "loss"):
            assert text in captured.err
    else:
        assert captured.err == ""


def test_no_progress_in_a_pipe(capsys):
    ticket().fit(loop())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_accelerate(accumulate, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils import GradientAccumulationPlugin

    def train(phase, die_after=None):
        plugin = GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
        optimizer = phase.optimizer(lr=1e-2, max_grad_norm=1.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=7)
        model, optimizer, data, schedule = accelerator.prepare(
            phase.model, optimizer, loader(), schedule
        )
        assert model is phase.model
        model.train()
        for n, batch in enumerate(
            phase.batches(data, steps=7, accumulate=accumulate, keep=[schedule])
        ):
            if n == die_after:
                raise KeyboardInterrupt
            with accelerator.accumulate(model):
                assert accelerator.sync_gradients == phase.step_due
                loss = loss_of(model, batch)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            phase.log(loss)
        accelerator.free_memory()

    def seed():
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        torch.manual_seed(7)

    model = Net()
    seed()
    whole = ticket(model).fit(train)
    assert len(whole) == 300
    with pytest.raises(KeyboardInterrupt):
        ticket(model).fit(lambda phase: train(phase, 5 * accumulate), tmp_path, save_every=2)
    torch.manual_seed(8)  # which the stored state replaces
    assert ticket(model).fit(train, tmp_path, save_every=2) == whole


def test_a_loss_must_be_one_number():
    net = nn.Linear(4, 3)
    loop = sf.Loop([torch.randn(2, 4)], full=1, loss=lambda model, batch: model(batch))
    with pytest.raises(ValueError, match=r"loss must be one number, got shape \(2, 3\)"):
        sf.LotteryTicket(net, k=2).fit(loop)
