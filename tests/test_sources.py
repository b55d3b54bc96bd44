"""MultiSource: the stream of batches, and the exact swap of their sources' SFTs."""

import copy
import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import sparse_ft as sf
from sparse_ft.delta import SFTError, SparseDelta
from sparse_ft.sources import MultiSource, source_of


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16, dtype=dtype)
        self.hidden = nn.Linear(16, 16, dtype=dtype)
        self.out = nn.Linear(16, 3, dtype=dtype)

    def forward(self, x, labels):
        logits = self.out(torch.tanh(self.hidden(self.embed(x).mean(1))))
        return nn.functional.cross_entropy(logits.float(), labels)


def delta_for(model, seed, scale=0.1):
    """An SFT of a third of the backbone's entries."""
    names = [n for n, _ in model.named_parameters() if not n.startswith("out")]
    generator = torch.Generator().manual_seed(seed)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    tuned = {
        n: (v + scale * torch.randn(v.shape, generator=generator).to(v.dtype))
        for n, v in base.items()
    }
    support = sf.select(tuned, base, density=0.33, criterion="random", seed=seed)
    return SparseDelta.between(base, tuned, support)


def loader(seed, n=6, size=4):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {
            "x": torch.randint(40, (5,), generator=generator),
            "labels": torch.randint(3, (), generator=generator),
        }
        for _ in range(n * size)
    ]
    return DataLoader(rows, batch_size=size)


def bits(model):
    return {n: p.detach().view(torch.uint8).clone() for n, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), min_size=4, max_size=4),
    st.integers(0, 5),
)
def test_a_pass_holds_every_batch_as_often_as_it_repeats(lengths, repeats, seed):
    batches = {f"s{i}": [(i, j) for j in range(n)] for i, n in enumerate(lengths)}
    repeat = {source: repeats[i] for i, source in enumerate(batches)}
    stream = MultiSource(batches, repeat=repeat, seed=seed)
    items = list(stream)
    assert len(items) == len(stream) == sum(n * repeats[i] for i, n in enumerate(lengths))
    assert Counter(map(tuple, items)) == {
        (i, j): repeats[i] for i, n in enumerate(lengths) for j in range(n)
    }
    assert all(source_of(item) == f"s{item[0]}" for item in items)
    for i, (source, own) in enumerate(batches.items()):
        # A source's batches come in the order in which its loader gives them.
        assert [tuple(b) for b in items if b[0] == i] == own * repeat[source]


def test_the_order_is_drawn_from_seed_and_pass():
    batches = {"a": [[1]] * 30, "b": [[2]] * 30}

    def order(stream):
        return [source_of(batch) for batch in stream]

    stream = MultiSource(batches, seed=3)
    first, second = order(stream), order(stream)
    assert first != second
    assert sorted(first) != first, "the sources' batches are mixed"
    again = MultiSource(batches, seed=3)
    again.set_epoch(1)
    assert order(again) == second
    assert order(MultiSource(batches, seed=4)) == second, "pass e is drawn from seed + e"


def test_loaders_that_shuffle_by_epoch_are_told_each_pass():
    class Shuffled(list):
        def set_epoch(self, epoch):
            told.append(epoch)

    told: list[int] = []
    stream = MultiSource({"a": Shuffled([[0], [1]])}, repeat={"a": 2})
    list(stream), list(stream)
    assert told == [0, 1, 2, 3]


@pytest.mark.parametrize("own", [False, True], ids=["global", "generator"])
def test_the_order_hangs_on_nothing_drawn_elsewhere(own):
    generator = torch.Generator() if own else None
    loaders = {
        source: DataLoader([[source, i] for i in range(12)], 2, shuffle=True, generator=generator)
        for source in ("a", "b")
    }

    def items(stream, draw):
        state = torch.get_rng_state()
        out = []
        for batch in stream:
            out.append((source_of(batch), batch[1].tolist()))
            torch.rand(draw)
        assert draw or torch.equal(torch.get_rng_state(), state)
        return out

    stream = MultiSource(loaders, repeat={"a": 2}, seed=3)
    first, second = items(stream, 0), items(stream, 3)
    torch.manual_seed(9)
    again = MultiSource(loaders, repeat={"a": 2}, seed=3)
    again.set_epoch(1)
    assert items(again, 5) == second != first
    passes = [i for source, rows in first if source == "a" for i in rows]
    assert sorted(passes[:12]) == sorted(passes[12:]) == list(range(12))
    assert passes[:12] != passes[12:]


@pytest.mark.parametrize(
    "batch", [{"x": 1}, [1], (1, 2), torch.zeros(2)], ids=lambda b: type(b).__name__
)
def test_a_batch_stays_what_it_is(batch):
    (item,) = MultiSource({"a": [batch]})
    assert isinstance(item, type(batch))
    assert torch.equal(item, batch) if isinstance(batch, torch.Tensor) else item == batch
    assert source_of(item) == "a"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", ["plain", "accumulated", "checkpointed"])
def test_training_equals_a_loop_that_adds_and_writes_back(dtype, backward):
    model = Net(dtype)
    deltas = {"sw": delta_for(model, 1), "yo": delta_for(model, 2)}
    loaders = {"sw": loader(10), "yo": loader(11), "en": loader(12)}
    theta0 = sf.snapshot(model)
    support = sf.select(model, theta0, density=0.2, criterion="random", seed=7)
    accumulate = 3 if backward == "accumulated" else 1

    def optimizer(model):
        return sf.MaskedAdamW(model, support, theta0, lr=0.05, l1=0.1, max_grad_norm=1.0)

    def forward(model, batch):
        if backward == "checkpointed":
            return torch.utils.checkpoint.checkpoint(
                model, batch["x"], batch["labels"], use_reentrant=False
            )
        return model(**batch)

    by_hand = copy.deepcopy(model)
    dense = {
        source: {n: delta.dense(n) for n in delta.layout.names} for source, delta in deltas.items()
    }
    steps = optimizer(by_hand)
    for i, batch in enumerate(MultiSource(loaders, seed=5)):
        now = {n: p.detach().clone() for n, p in by_hand.named_parameters()}
        with torch.no_grad():
            for n, difference in dense.get(source_of(batch), {}).items():
                p = by_hand.get_parameter(n)
                p.copy_((p.float() + difference).to(p.dtype))
        (forward(by_hand, batch) / accumulate).backward()
        with torch.no_grad():
            for n, p in by_hand.named_parameters():
                p.copy_(now[n])
        if (i + 1) % accumulate == 0:
            steps.step()
            steps.zero_grad()

    stream = MultiSource(loaders, deltas, seed=5)
    steps = optimizer(model)
    for i, batch in enumerate(stream):
        with stream.active(model, batch):
            (forward(model, batch) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            steps.step()
            steps.zero_grad()
    assert same(bits(model), bits(by_hand))
    assert source_of(next(iter(MultiSource(loaders, seed=5)))) == "en", "a bare source comes first"
    assert not same(bits(model), {n: v.view(torch.uint8) for n, v in theta0.items()})


def test_a_batch_sees_exactly_its_source_and_leaves_nothing():
    model = Net()
    deltas = {"sw": delta_for(model, 1), "yo": delta_for(model, 2)}
    stream = MultiSource({s: loader(3) for s in ("sw", "yo", "en")}, {**deltas, "en": None})
    expected = {}
    for source in ("sw", "yo"):
        with sf.compose(model, [deltas[source]]):
            expected[source] = bits(model)
    expected["en"] = before = bits(model)
    for batch in stream:
        with stream.active(model, batch):
            assert same(bits(model), expected[source_of(batch)])
        assert same(bits(model), before)
        for p in model.parameters():
            # What the training does to the weights is there the next time.
            p.data.view(-1)[0] += 0
    with stream.on(model, "yo"):
        assert same(bits(model), expected["yo"])


def test_the_weights_may_move_between_batches():
    model = Net()
    delta = delta_for(model, 1)
    stream = MultiSource({"sw": loader(3)}, {"sw": delta})
    stream.bind(model)
    generator = torch.Generator().manual_seed(0)
    for batch in stream:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        moved = bits(model)
        with stream.active(model, batch):
            for n in delta.layout.names:
                want = moved[n].view(torch.float32) + delta.dense(n)
                assert torch.equal(model.get_parameter(n), want)
        assert same(bits(model), moved)


def test_an_exception_takes_the_source_off():
    model = Net()
    before = bits(model)
    stream = MultiSource({"sw": loader(3)}, {"sw": delta_for(model, 1)})
    batch = next(iter(stream))

    def fail():
        with stream.active(model, batch):
            assert not same(bits(model), before)
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        fail()
    assert same(bits(model), before)


def test_the_base_is_checked_once_and_against_the_start():
    model = Net()
    delta = delta_for(model, 1)
    stream = MultiSource({"sw": loader(3)}, {"sw": delta})
    theta0 = sf.snapshot(model)
    with torch.no_grad():
        model.hidden.weight.add_(1)
    batch = next(iter(stream))
    with pytest.raises(SFTError, match="another base model"), stream.active(model, batch):
        pass
    stream.bind(model, theta0)
    with stream.active(model, batch):
        pass
    other = {n: v + 1 for n, v in theta0.items()}
    with pytest.raises(SFTError, match="another base model"):
        MultiSource({"sw": loader(3)}, {"sw": delta}).bind(model, other)


def test_lottery_ticket_records_nothing_of_the_sources():
    """φ of a run whose batches change nothing but their source's SFT: zero."""
    model = Net()
    stream = MultiSource({s: loader(3) for s in ("sw", "en")}, {"sw": delta_for(model, 1)})
    before = bits(model)

    def train(phase):
        optimizer = phase.optimizer(lr=0.0)
        for batch in stream:
            with stream.active(phase.model, batch):
                phase.model(**batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    ticket = sf.LotteryTicket(
        model, density=0.1, criterion="random", eligible=lambda n, p: "out" not in n
    )
    delta = ticket.fit(train)
    assert not delta.val.any()
    assert same(bits(model), before)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("bare_first", [False, True])
def test_a_loop_goes_on_in_the_middle_of_a_pass(tmp_path, bare_first):
    """The stream settles its order by itself; the SFTs belong to θ0, not to the weights of then."""

    def run(folder, stop=None):
        model = Net()
        deltas = {"sw": delta_for(model, 1), "yo": delta_for(model, 2)}
        names = ("sw", "yo", "en")
        loaders = {s: DataLoader(loader(i).dataset, 4, shuffle=True) for i, s in enumerate(names)}
        # Seed 0 begins with a source that has no SFT.
        stream = MultiSource(loaders, deltas, {"yo": 2}, seed=int(not bare_first))
        steps = []

        def loss(model, batch):
            steps.append(source_of(batch))
            if len(steps) == stop:
                raise Interrupted
            return nn.functional.dropout(model(**batch) * torch.ones(5), 0.5).sum()

        ticket = sf.LotteryTicket(model, density=0.1, eligible=lambda n, p: "out" not in n)
        loop = sf.Loop(stream, 40, loss=loss, lr=0.02)
        return ticket.fit(loop, folder=folder, save_every=3), steps

    expected, steps = run(tmp_path / "whole")
    assert (steps[0] == "en") == bare_first
    for stop in (11, 62):
        folder = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            run(folder, stop)
        delta, after = run(folder)
        assert delta == expected
        assert after == steps[(stop - 1) // 3 * 3 if stop < 40 else 40 + (stop - 41) // 3 * 3 :]


def test_refusals_name_the_source():
    model = Net()
    delta = delta_for(model, 1)
    with pytest.raises(ValueError, match="no sources"):
        MultiSource({})
    with pytest.raises(ValueError, match="'sw' has no batches"):
        MultiSource({"sw": []})

    class Endless(IterableDataset):
        def __iter__(self):
            return iter([1])

    with pytest.raises(TypeError, match="batches of the source 'yo' have no length"):
        MultiSource({"sw": [1], "yo": DataLoader(Endless())})
    with pytest.raises(ValueError, match="deltas names the source 'yo'; there are 'sw'"):
        MultiSource({"sw": [1]}, {"yo": delta})
    with pytest.raises(ValueError, match="repeat names the source 'yo'"):
        MultiSource({"sw": [1]}, repeat={"yo": 2})
    for passes in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"repeat\['sw'\] must be an integer ≥ 1"):
            MultiSource({"sw": [1]}, repeat={"sw": passes})
    with pytest.raises(TypeError, match=r"deltas\['sw'\] must be a SparseDelta.*'sw.safetensors'"):
        MultiSource({"sw": [1]}, {"sw": "sw.safetensors"})
    with pytest.raises(TypeError, match="'sw' is a int, which takes no attribute"):
        next(iter(MultiSource({"sw": [1]})))
    stream = MultiSource({"sw": loader(3)}, {"sw": delta})
    moved = {k: v.clone() for k, v in next(iter(stream)).items()}
    with pytest.raises(ValueError, match="does not say its source"):
        stream.active(model, moved)
    with (
        pytest.raises(ValueError, match="no source 'yo'; there are 'sw'"),
        stream.on(model, "yo"),
    ):
        pass
    with (
        sf.compose(model, [delta]),
        pytest.raises(RuntimeError, match="on this model"),
        stream.on(model, "sw"),
    ):
        pass

    class Short(list):
        def __len__(self):
            return 3

    with pytest.raises(RuntimeError, match="'sw' gave fewer batches than the 3"):
        list(MultiSource({"sw": Short([[1], [2]])}))


def test_settings_hold_all_that_decides_the_batches():
    model = Net()
    sw, yo = delta_for(model, 1), delta_for(model, 2)
    loaders = {"sw": loader(3), "en": loader(4)}

    def settings_of(*args, **kwargs):
        return json.loads(json.dumps(MultiSource(*args, **kwargs).settings))

    own = settings_of(loaders, {"sw": sw})
    assert own == settings_of(loaders, {"sw": sw, "en": None}, {"en": 1})
    for other in (
        settings_of(loaders, {"sw": yo}),
        settings_of(loaders, {"en": sw}),
        settings_of(loaders, {"sw": sw}, {"sw": 2}),
        settings_of(loaders, {"sw": sw}, seed=1),
        settings_of({**loaders, "en": loader(4, n=7)}, {"sw": sw}),
        settings_of({"sw": loaders["sw"]}, {"sw": sw}),
    ):
        assert other != own
    assert MultiSource(loaders, {"sw": sw, "en": sw}).trained_on == [
        {"id": sw.content_id, "alpha": 1.0}
    ]


def test_repr_says_what_is_mixed():
    stream = MultiSource({"sw": loader(3), "en": loader(4)}, repeat={"en": 2})
    assert repr(stream) == "MultiSource(sw: 6 × 1 (bare), en: 6 × 2 (bare))"
