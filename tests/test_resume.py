"""A run that is stopped, anywhere, however often, ends at the bits of one that was not."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler
from tuned import Net, loss_of, noisy, rows, same, values

import sparse_ft as sf
from sparse_ft import runs
from sparse_ft.kept import random_state

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    pass


class Plain:
    """A plain loop; it dies when it has computed `die_after` batches."""

    def __init__(self, loader, die_after=None, steps=11, **options):
        self.loader, self.left, self.steps, self.options = loader, die_after, steps, options
        self.end = {}

    def __call__(self, phase):
        model, options = phase.model, dict(self.options)
        accumulate, best = options.pop("accumulate", 1), options.pop("best", False)
        optimizer = phase.optimizer(lr=1e-2, max_grad_norm=1.0, **options)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=self.steps + 1)
        model.train()
        for batch in phase.batches(self.loader, self.steps, accumulate=accumulate, keep=[schedule]):
            if self.left == 0:
                raise Killed
            self.left = None if self.left is None else self.left - 1
            loss = loss_of(model, batch) / accumulate
            loss.backward()
            if phase.step_due:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                if best and phase.step % 2 == 0:
                    phase.offer(abs(phase.step - 5) + float(phase.step == 6))
            phase.log(loss)
        self.end = values(model)


def loader(**options):
    return DataLoader(rows(), **{"batch_size": 4, "shuffle": True, "collate_fn": noisy, **options})


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002
    torch.manual_seed(value)


def persistently(folder, make, ticket=None, dtype=torch.float32, lives=(), **fit):
    """The result of a run that dies again and again; in each life head and seed are others."""
    for life, die_after in enumerate([*lives, None]):
        model = Net(dtype, head=life or None)
        before = values(model)
        seed(1 if life == 0 else 99 + life)
        lottery = sf.LotteryTicket(model, **{"k": 300, "l1": 0.1, **(ticket or {})})
        train = make()
        train.left = die_after
        try:
            return lottery.fit(train, folder, **fit)
        except Killed:
            assert (folder / "run.json").exists()
        finally:
            same(model, before)
    raise AssertionError


def equal(a, b):
    assert a == b
    assert a.content_id == b.content_id
    defaults = {"kind": "diff", "value_loss": "none"}  # which a file spells out
    assert {**defaults, **a.meta} == {**defaults, **b.meta}
    for n in a.heads:
        assert torch.equal(a.heads[n], b.heads[n])


def fixed(count):
    items = rows()
    pairs = [items[4 * i : 4 * i + 4] for i in range(count)]
    return [tuple(torch.stack(part) for part in zip(*pair, strict=True)) for pair in pairs]


class Shuffled:
    """Batches that shuffle themselves, without a length."""

    def __iter__(self):
        items = rows()
        random.shuffle(items)
        for i in range(0, len(items), 4):
            yield noisy(items[i : i + 4])


def generated(**options):
    return loader(generator=torch.Generator().manual_seed(8), **options)


def sampled():
    sampler = RandomSampler(rows(), generator=torch.Generator().manual_seed(8))
    return DataLoader(rows(), batch_sampler=BatchSampler(sampler, 4, False), collate_fn=noisy)


def distributed():
    sampler = DistributedSampler(rows(), num_replicas=1, rank=0)
    return loader(shuffle=None, sampler=sampler)


class Masking:
    """A collator with a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(8)

    def __call__(self, items):
        x, y = noisy(items)
        return x * (torch.rand(x.shape, generator=self.generator) > 0.3), y


class Lazy:
    """A collator that makes its generator with its first batch, as transformers' do."""

    def __init__(self):
        self.generator = None

    def __call__(self, items):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(8)
        x, y = noisy(items)
        return x * (torch.rand(x.shape, generator=self.generator) > 0.3), y


class Ahead:
    """Draws a batch before it is asked for, as accelerate's loaders do."""

    def __iter__(self):
        ahead = None
        for batch in loader():
            if ahead is not None:
                yield ahead
            ahead = batch
        yield ahead


CASES = {
    "plain": ({}, loader, {}),
    "best": ({}, loader, {"best": True}),
    "accumulate": ({}, loader, {"accumulate": 3}),
    "iterations": ({"iterations": 3}, loader, {"best": True}),
    "hook": ({}, loader, {"gather": "hook", "accumulate": 2}),
    "random": ({"criterion": "random"}, loader, {}),
    "generator": ({}, generated, {}),
    "sampler": ({}, sampled, {}),
    "list": ({}, lambda: fixed(3), {}),
    "shuffled": ({}, Shuffled, {}),
    "distributed": ({}, distributed, {}),
    "collator": ({}, lambda: loader(collate_fn=Masking()), {}),
    "lazy": ({}, lambda: loader(collate_fn=Lazy()), {}),
    "ahead": ({}, Ahead, {}),
    "groups": (
        {},
        loader,
        {
            "groups": [
                {"params": ["body.0.bias", "body.4.bias", "head.bias"], "weight_decay": 0.0},
                {"params": ["body.0.weight", "body.4.weight", "head.weight"], "weight_decay": 0.1},
            ]
        },
    ),
}


@pytest.mark.filterwarnings("ignore:select. .* tie at the threshold")
@pytest.mark.parametrize("case", CASES)
def test_stopped_runs_end_at_the_same_bits(case, tmp_path):
    ticket, batches, options = CASES[case]
    # Sums of weights that bfloat16 has rounded are not what was learnt: δ is.
    dtype = torch.bfloat16 if case in ("iterations", "hook", "best") else torch.float32

    made = []

    def make():
        made.append(Plain(batches(), **options))
        return made[-1]

    whole = persistently(None, make, ticket, dtype)
    end = made[-1].end
    per_phase = 11 * options.get("accumulate", 1)
    chance = random.Random(case)
    lives = [chance.randint(1, per_phase)] + [chance.randint(0, per_phase) for _ in range(30)]
    equal(persistently(tmp_path / "run", make, ticket, dtype, lives, save_every=3), whole)
    for n, t in made[-1].end.items():
        assert torch.equal(t, end[n]), n  # buffers too
    assert sorted(os.listdir(tmp_path / "run")) == ["run.json", "sft.safetensors"]
    once = [per_phase + 2] if "criterion" not in ticket else [2]
    equal(persistently(tmp_path / "rarely", make, ticket, dtype, once), whole)


def test_samplers_are_told_the_epoch(tmp_path):
    told = []

    class Sampler(RandomSampler):
        def set_epoch(self, epoch):
            told.append(epoch)

    def make():
        return Plain(loader(shuffle=None, sampler=Sampler(rows())), steps=25)

    persistently(tmp_path, make, lives=[24], save_every=20)
    # Ten batches an epoch: both phases, the first of them stopped in its third epoch.
    assert told == [0, 1, 2, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("persistent", [False, True])
def test_loaders_with_workers(persistent, tmp_path):
    def make():
        return Plain(
            loader(
                num_workers=1 if persistent else 2,
                persistent_workers=persistent,
                multiprocessing_context="fork",
            )
        )

    train = make()
    whole = persistently(None, lambda: train)
    # Workers that live on begin again, too.
    if persistent:
        equal(persistently(None, lambda: train), whole)
    equal(persistently(tmp_path, make, lives=[14, 8], save_every=3), whole)


def test_each_phase_draws_what_the_first_one_draws():
    g = torch.Generator().manual_seed(5)
    seen: dict[str, list] = {"full": [], "sparse": []}
    inner = Plain(loader(generator=g))

    class Seen:
        def __init__(self, phase):
            self.phase = phase

        def __iter__(self):
            for x, y in inner.loader:
                seen[self.phase].append(x)
                yield x, y

        def __getattr__(self, name):
            return getattr(inner.loader, name)

    state = g.get_state(), torch.get_rng_state(), random.getstate()

    def train(phase):
        loop = Plain(Seen(phase.name))
        loop(phase)

    sf.LotteryTicket(Net(), k=100).fit(train)
    assert len(seen["full"]) == 11
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))
    # The caller's random state is as it was, that of the loader included.
    assert torch.equal(g.get_state(), state[0])
    torch.manual_seed(0)  # Net seeds
    assert random.getstate() == state[2]


def test_a_generator_that_comes_with_the_first_batch():
    seen: dict[str, list] = {"full": [], "sparse": []}
    batches = loader(collate_fn=Lazy())

    def train(phase):
        torch.manual_seed(3)
        phase.optimizer()
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        seen[phase.name] += [x for x, _ in phase.batches(batches, steps=12)]

    for _ in range(2):
        sf.LotteryTicket(Net(), k=100, fill=True).fit(train)
        assert batches.collate_fn.generator is None
    first = seen["full"][:12]
    again = zip(seen["full"][12:], seen["sparse"][:12], seen["sparse"][12:], strict=True)
    for x, others in zip(first, again, strict=True):
        assert all(torch.equal(x, other) for other in others)


@pytest.mark.parametrize("kind", ["new", "none", "grows"])
def test_buffers_that_the_forward_pass_makes(kind, tmp_path):
    class Caching(Net):
        def __init__(self):
            super().__init__()
            if kind != "new":
                start = None if kind == "none" else torch.zeros(1)
                self.body[0].register_buffer("seen", start, persistent=False)

        def forward(self, x):
            seen = getattr(self.body[0], "seen", None)
            if seen is None or len(seen) < 9:
                self.body[0].register_buffer("seen", torch.zeros(9), persistent=False)
            self.body[0].seen += 1
            return super().forward(x) * (1 + self.body[0].seen.mean() / 50)

    def run(die_after=None, folder=None, **options):
        model = Caching()
        before = values(model), dict(model.body[0]._buffers)
        seed(1)
        try:
            return sf.LotteryTicket(model, k=100).fit(Plain(loader(), die_after), folder, **options)
        finally:
            same(model, before[0])
            assert dict(model.body[0]._buffers) == before[1]

    whole = run()
    with pytest.raises(Killed):
        run(8, tmp_path, save_every=3)
    equal(run(folder=tmp_path, save_every=3), whole)


def test_the_callers_random_state_comes_back():
    model = Net()
    seed(4)
    state = random_state()
    sf.LotteryTicket(model, k=100).fit(Plain(loader()))
    after = random_state()
    assert torch.equal(after["torch"], state["torch"])
    assert after["python"] == state["python"]
    assert after["numpy"] == state["numpy"]


KILLED = """
import os, random, signal, sys, time
import torch
import torch._dynamo  # as the first optimizer does, so that no life pays for it
import sparse_ft as sf
from tuned import Net, loss_of, noisy, rows
from torch.utils.data import DataLoader

folder, how = sys.argv[1:]
torch.set_num_threads(1)

def run(folder):
    loader = DataLoader(rows(), batch_size=4, shuffle=True, collate_fn=noisy)
    loop = sf.Loop(
        loader, full=4, sparse=3, loss=loss_of, lr=1e-2, accumulate=2, warmup=0.2, seed=3,
        evaluate=lambda model: float(model.head.weight.sum()), evaluate_every=2,
        greater_is_better=False,
    )
    ticket = sf.LotteryTicket(Net(), k=300, l1=0.1, iterations=2)
    return ticket.fit(loop, folder, save_every=None if folder is None else 1).content_id

def dying(left):
    # Ends the process before its n-th look at the disk, as a kill would: nothing is tidied up.
    def wrapped(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os._exit(9)
            return function(*args, **kwargs)
        return call
    for name in ("fsync", "replace", "unlink", "open"):
        setattr(os, name, wrapped(getattr(os, name)))

chance = random.Random(how)
# Each life is a fork of this process, which has never computed anything.
for life in range(400):
    if life and os.path.exists(f"{folder}.done"):
        break
    child = os.fork()
    if child == 0:
        if how == "disk":
            dying([chance.randint(1, 60)])
        content = run(folder)
        with open(f"{folder}.done", "w") as file:
            file.write(content)
        os._exit(0)
    chance.random()
    if how == "clock":
        time.sleep(chance.uniform(0.02, 0.1 + life / 100))  # in time, it gets to the end
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
child = os.fork()
if child == 0:
    with open(f"{folder}.done") as file:
        os._exit(file.read() != run(None))
print(life, os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("how", ["disk", "clock"])
def test_killed_at_any_moment(how, tmp_path):
    """At each access to the disk, and at any time."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path / "run"), how],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stderr == ""
    lives, status = map(int, done.stdout.split())
    assert status == 0
    assert lives >= 3


def test_a_finished_run_gives_its_result(tmp_path):
    whole = persistently(tmp_path, lambda: Plain(loader()), lang="sw")

    def never(phase):
        raise AssertionError

    model = Net(head=5)
    again = sf.LotteryTicket(model, k=300, l1=0.1).fit(never, tmp_path, lang="sw")
    equal(again, whole)
    assert again.meta["lang"] == "sw"
    equal(sf.SparseDelta.load(tmp_path), whole)
    # What the metadata say of it may change afterwards.
    ticket = sf.LotteryTicket(Net(head=5), k=300, l1=0.1)
    named = ticket.fit(never, tmp_path, license="MIT", base={"id": "x"})
    for found in (named, sf.SparseDelta.load(tmp_path)):
        assert torch.equal(found.val, whole.val)
        assert (found.meta["lang"], found.meta["license"]) == ("sw", "MIT")
        base = {**whole.meta["base"], "id": "x"}
        assert found.meta["base"] == base
    assert ticket.support == whole.support
    fresh = persistently(tmp_path, lambda: Plain(loader(), steps=5), fresh=True, lang="sw")
    assert fresh.content_id != whole.content_id


def test_what_is_stored_is_small_in_the_sparse_phase(tmp_path):
    """K entries, the heads and the buffers, with their moments: not the model."""

    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.body[4] = nn.Linear(50, 4000)
            self.head = nn.Linear(4000, 4)

    sizes = {}

    def train(phase):
        optimizer = phase.optimizer(lr=1e-2)
        for batch in phase.batches(loader(), steps=3):
            loss_of(phase.model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        sizes[phase.name] = sum(
            p.stat().st_size for p in tmp_path.iterdir() if "run-state" in p.name
        )

    model = Wide()
    sf.LotteryTicket(model, k=200).fit(train, tmp_path, save_every=1)
    numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
    heads = sum(p.numel() for p in model.head.parameters())
    assert 12 * numel < sizes["full"] < 12 * numel + 100_000
    assert sizes["sparse"] < 20 * (200 + heads) + 100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 301}, r"k_requested was 300 and is 301"),
        ({"l1": 0.2}, r"l1 was 0\.1 and is 0\.2"),
        ({"l1_numel": 5}, r"l1_numel was \d+ and is 5"),
        ({"iterations": 2}, r"iterations was 1 and is 2"),
        ({"eps": 1e-7}, r"eps was 0\.0 and is 1e-07"),
        ({"criterion": "random"}, r'criterion was "magnitude" and is "random"'),
        ({"eligible": {"body.0.weight"}}, r"parameter 'body\.4\.bias' was \".* eligible.* a head"),
        ({"exclude": True}, r"exclude was \[\] and is \["),
        ({"recipe": {"lr": 1}}, r'meta\.recipe was null and is \{"lr": 1\}'),
        ({"lr": 0.5}, r"training\.lr was \[0\.01, 0\.01\] and is \[0\.5, 0\.5\]"),
        ({"rows": 30}, r"training\.batches was 10 and is 8"),
        ({"full": 6}, r"training\.full\.steps was 4 and is 6"),
        ({"weight": "body.4.bias"}, r"parameter 'body\.4\.bias' was \".*, values"),
        ({"frozen": "body.1.weight"}, r"parameter 'body\.1\.weight' was \".*, frozen"),
        ({"head": 5}, r"parameter 'head\.weight' was \".*\[4, 30\], a head.*\[5, 30\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_goes_on_only_with_its_own_settings(change, message, tmp_path):
    def attempt(fresh=False, **change):
        model = Net()
        if "head" in change:
            model.head = nn.Linear(30, change.pop("head"))
        with torch.no_grad():
            for name in (change.pop("weight", None), change.pop("frozen", None)):
                if name:
                    model.get_parameter(name)[0] += 1
        if "exclude" in change:
            change["exclude"] = sf.select(model, k=7, criterion="random")
        batches = DataLoader(rows(change.pop("rows", 38)), 4, collate_fn=noisy)
        loop = sf.Loop(batches, change.pop("full", 4), 4, loss=loss_of, lr=change.pop("lr", 1e-2))
        meta = {"lang": "sw", "recipe": change.pop("recipe", {})}
        ticket = sf.LotteryTicket(model, **{"k": 300, "l1": 0.1, **change})
        return ticket.fit(loop, tmp_path, fresh=fresh, **meta)

    first = attempt()
    stored = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message) as found:
        attempt(**change)
    assert str(tmp_path) in str(found.value)
    assert "fresh=True" in str(found.value)
    assert stored == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    equal(attempt(), first)
    if change != {"head": 5}:  # whose loss has another class
        attempt(fresh=True, **change)
        assert (tmp_path / "sft.safetensors").exists()


def test_data_that_are_not_those_of_the_run(tmp_path):
    def attempt(batches, die_after=None):
        seed(1)
        sf.LotteryTicket(Net(), k=300).fit(Plain(batches, die_after), tmp_path, save_every=7)

    def without_schedule(phase):
        phase.optimizer()
        list(phase.batches(loader(), steps=3))

    with pytest.raises(Killed):
        attempt(loader(), die_after=9)
    with pytest.raises(ValueError, match="at batch 7 of an epoch, and the loader has only 3"):
        attempt(DataLoader(rows(12), batch_size=4, shuffle=True))
    with pytest.raises(ValueError, match="0 generators, this one 1"):
        attempt(generated())
    with pytest.raises(ValueError, match="1 items in keep, this loop 0"):
        sf.LotteryTicket(Net(), k=300).fit(without_schedule, tmp_path)
    attempt(loader())


def test_a_full_disk(tmp_path, monkeypatch):
    whole = persistently(None, lambda: Plain(loader()))
    left = [0]

    def usage(path):
        left[0] += 1
        return shutil._ntuple_diskusage(1, 1, 1 << 40 if left[0] < 4 else 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    model = Net()
    before = values(model)
    seed(1)
    ticket = sf.LotteryTicket(model, k=300, l1=0.1)
    with pytest.raises(OSError, match="bytes are needed and 1,000 are free") as found:
        ticket.fit(Plain(loader()), tmp_path, save_every=2)
    assert found.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(found.value)
    assert "make room" in str(found.value)
    same(model, before)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
    monkeypatch.undo()
    equal(ticket.fit(Plain(loader()), tmp_path, save_every=2), whole)


def test_a_disk_that_fails_while_it_is_written(tmp_path, monkeypatch):
    whole = persistently(None, lambda: Plain(loader()))
    write, left = runs.write_safetensors, [3]

    def failing(path, *args):
        left[0] -= 1
        write(path, *args)
        if left[0] == 0:
            raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(runs, "write_safetensors", failing)
    model = Net()
    seed(1)
    ticket = sf.LotteryTicket(model, k=300, l1=0.1)
    with pytest.raises(OSError, match="Input/output error"):
        ticket.fit(Plain(loader()), tmp_path, save_every=2)
    assert len(list(tmp_path.glob("run-state-*"))) == 1
    equal(ticket.fit(Plain(loader()), tmp_path, save_every=2), whole)


def test_one_process_at_a_time(tmp_path, monkeypatch):
    mine = runs.Run(tmp_path, {})
    monkeypatch.setattr(runs, "WAIT", 0.1)
    with pytest.raises(OSError, match="another process works on this run"):
        runs.Run(tmp_path, {})
    # What a killed process leaves behind ends soon.
    monkeypatch.setattr(runs, "WAIT", 10.0)
    threading.Timer(0.2, mine.close).start()
    runs.Run(tmp_path, {}).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_workers_that_live_on_do_not_hold_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "WAIT", 0.1)
    run = runs.Run(tmp_path, {})
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    worker.start()
    try:
        run.close()
        runs.Run(tmp_path, {}).close()
    finally:
        worker.terminate()
        worker.join()


def test_numbers_of_numpy_are_settings_too(tmp_path):
    def fit(folder=None, kind=lambda value: value):
        loop = sf.Loop(loader(), kind(3), loss=loss_of, lr=kind(0.25), seed=kind(4))
        options = {"k": kind(300), "seed": kind(3), "l1": kind(0.5), "eps": kind(0.0)}
        return sf.LotteryTicket(Net(), **options, iterations=kind(2)).fit(loop, folder)

    def of_numpy(value):
        return np.int64(value) if isinstance(value, int) else np.float32(value)

    equal(fit(tmp_path / "a", of_numpy), fit())
    assert fit(tmp_path / "a").meta["recipe"]["l1"] == 0.5


def test_what_else_lies_in_the_folder_stays(tmp_path):
    mine = [
        *("notes.txt", "model-1.safetensors", "run-de-1.safetensors", "run-best-3.safetensors"),
        *("run-state-0123abcd-1.safetensors", ".0123456789abcdef.tmp"),
    ]
    for name in mine:
        (tmp_path / name).write_text("mine")
    persistently(tmp_path, lambda: Plain(loader()), lives=[5], save_every=2)
    for name in mine:
        assert (tmp_path / name).read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*mine, "run.json", "sft.safetensors"]
    )


def test_a_fresh_run_leaves_the_one_before_until_it_has_begun(tmp_path):
    persistently(tmp_path, lambda: Plain(loader(), steps=2))
    before = (tmp_path / "run.json").read_bytes()
    run = runs.Run(tmp_path, {"other": 1}, fresh=True)
    assert run.progress == {}
    run.close()
    assert (tmp_path / "run.json").read_bytes() == before


def test_one_file_of_best_weights_at_a_time(tmp_path):
    """Besides the one that the stored state names."""
    seen = []

    def train(phase):
        optimizer = phase.optimizer(lr=1e-2)
        for batch in phase.batches(loader(), steps=8):
            loss_of(phase.model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert phase.offer(-phase.step)
            seen.append(len(list(tmp_path.glob("run-best-*"))))

    sf.LotteryTicket(Net(), k=300).fit(train, tmp_path, save_every=4)
    assert seen == [1, 1, 1, 1, 2, 2, 2, 2] * 2


def test_an_sft_that_no_run_made_is_not_replaced(tmp_path):
    path = tmp_path / "sft.safetensors"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"holds sft\.safetensors"):
        persistently(tmp_path, lambda: Plain(loader()))
    assert path.read_text() == "mine"
    persistently(tmp_path, lambda: Plain(loader()), fresh=True)
    assert sf.SparseDelta.load(path).nnz == 300


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "json", "version"])
def test_a_damaged_folder_is_named(damage, tmp_path):
    seed(1)
    with pytest.raises(Killed):
        sf.LotteryTicket(Net(), k=300).fit(Plain(loader(), 8), tmp_path, save_every=3)
    (state,) = tmp_path.glob("run-state-*")
    path = state
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "gone":
        state.unlink()
    elif damage == "other":
        from safetensors.torch import save_file

        save_file({"x": torch.ones(2)}, state)
    else:
        path = tmp_path / "run.json"
        text = path.read_text()
        path.write_text(
            text[:50] if damage == "json" else text.replace('"version": 1', '"version": 7')
        )
    with pytest.raises(sf.SFTError, match=re.escape(str(path))):
        sf.LotteryTicket(Net(), k=300).fit(Plain(loader()), tmp_path)


@pytest.mark.parametrize(
    "tree",
    [
        {"a": [1, 2.5, None, True, "x"], 3: (1, (2,), []), "n": float("-inf"), "z": {}},
        {"t": torch.arange(5, dtype=torch.uint8), "e": torch.zeros(0), "s": torch.tensor(1e-40)},
        [torch.randn(3, 4).t(), torch.ones(2, dtype=torch.bfloat16), torch.tensor([True])],
        (np.float64(2.5), np.int64(3), 1 << 80, -0.0),
    ],
)
def test_trees_come_back(tree, tmp_path):
    runs.write_tree(str(tmp_path / "x"), tree)
    found = runs.read_tree(str(tmp_path / "x"))

    def alike(a, b):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        elif isinstance(a, (dict, list, tuple)):
            assert type(a) is type(b)
            assert len(a) == len(b)
            for key in a if isinstance(a, dict) else range(len(a)):
                alike(a[key], b[key])
        else:
            assert a == b
            assert str(a) == str(b)

    alike(tree, found)


@pytest.mark.parametrize("what", [object(), {1.5: 2}, {"a": [len]}])
def test_what_cannot_be_stored_is_named(what, tmp_path):
    with pytest.raises(TypeError, match=r"x.*cannot be stored"):
        runs.write_tree(str(tmp_path / "x"), what)
    assert not (tmp_path / "x").exists()


def test_settings_of_a_run_are_readable(tmp_path):
    persistently(tmp_path, lambda: Plain(loader()))
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["format"] == "sparse_ft.run"
    assert document["settings"]["k_requested"] == 300
    assert document["progress"]["done"] is True
