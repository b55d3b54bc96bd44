"""Criteria: what each ranks by, what it refuses, what it says of itself; and calibration."""

import json
import math
import random

import numpy as np
import oracles
import pytest
import torch
from oracles import assert_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_ft as sf
from sparse_ft import criteria
from sparse_ft.criteria import Criterion

ELIGIBLE = ("body.embed.weight", "body.hidden.bias", "body.hidden.weight", "body.norm.bias")


class Net(nn.Module):
    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Module()
        self.body.embed = nn.Embedding(30, 16)
        self.body.hidden = nn.Linear(16, 24)
        self.body.norm = nn.BatchNorm1d(24)
        self.body.norm.weight.requires_grad_(False)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body.hidden(nn.functional.dropout(self.body.embed(x), 0.3, self.training))
        return self.head(torch.tanh(self.body.norm(hidden)))


def batches(n: int = 3, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    g = oracles.rng(n, size)
    return [
        (torch.randint(20, (size,), generator=g), torch.randint(3, (size,), generator=g))
        for _ in range(n)
    ]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def moved(model: nn.Module) -> dict[str, Tensor]:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    return before


def chosen(support: sf.Support, scores: dict[str, Tensor], k: int) -> None:
    """The support is that of the k largest |scores|."""
    found = oracles.top_k([scores[n] for n in support.layout.names], [], k)
    for name, flat in zip(support.layout.names, found, strict=True):
        assert support.indices(name).tolist() == flat.tolist(), name


# --- each by its formula --------------------------------------------------------------------------


def gradients(model: nn.Module, data: list) -> dict[str, list[Tensor]]:
    """One gradient for each batch, by autograd alone, in evaluation mode."""
    model = model.eval()
    own = dict(model.named_parameters())
    each = [torch.autograd.grad(loss(model, b), [own[n] for n in ELIGIBLE]) for b in data]
    return {n: [g[i] for g in each] for i, n in enumerate(ELIGIBLE)}


@pytest.mark.parametrize("kind", ["gradient", "fisher", "snip"])
def test_calibration(kind):
    model, data = Net(), batches()
    scores = criteria.calibrate(model, data, loss, kind)
    assert tuple(sorted(scores)) == ELIGIBLE
    own = dict(model.named_parameters())
    for name, each in gradients(model, data).items():
        total = torch.stack(each).double()
        wide = {
            "gradient": total.sum(0).abs(),
            "fisher": total.square().mean(0),
            "snip": (total.sum(0) * own[name].double()).abs(),
        }[kind]
        # Sums of three fp32 numbers.
        assert torch.allclose(scores[name].double(), wide, rtol=1e-5, atol=1e-9), name
        assert scores[name].dtype == torch.float32
        assert not scores[name].requires_grad
    criterion = getattr(criteria, kind)(scores)
    chosen(sf.select(model, k=100, criterion=criterion), scores, 100)
    assert criterion.recipe()["approximation"] is True
    assert not criterion.needs_training


def test_calibration_of_some_parameters_with_some_batches():
    model, data = Net(), batches(5)
    # A frozen one has no gradient otherwise.
    model.body.hidden.weight.requires_grad_(False)
    drawn = []
    scores = criteria.calibrate(
        model,
        (drawn.append(i) or b for i, b in enumerate(data)),
        loss,
        samples=2,
        eligible="body.hidden.weight",
    )
    assert drawn == [0, 1]
    assert [*scores] == ["body.hidden.weight"]
    assert not model.body.hidden.weight.requires_grad
    again = criteria.calibrate(Net(), data[:2], loss)
    assert_bits(scores["body.hidden.weight"], again["body.hidden.weight"])
    with pytest.raises(ValueError, match=r"no scores of 'body\.embed\.weight', which is eligible"):
        sf.select(model, k=3, criterion=criteria.gradient(scores))


@pytest.mark.parametrize("failing", [False, True])
def test_calibration_leaves_everything_as_it_was(failing):
    model, data = Net(), batches()
    model.body.norm.eval()
    loss(model, data[0]).backward()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {n: t.detach().clone() for n, t in tensors.items()}
    grads = {n: p.grad for n, p in model.named_parameters()}
    copies = {n: None if g is None else g.clone() for n, g in grads.items()}
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    def drawing(model, batch):
        random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
        assert not model.training
        model.body.norm.running_mean.add_(1)
        # Rotary tables are replaced as texts grow.
        model.body.norm.running_var = model.body.norm.running_var + 1
        model.body.norm.register_buffer("late", torch.ones(1))
        if failing:
            raise KeyboardInterrupt
        return loss(model, batch)

    if failing:
        with pytest.raises(KeyboardInterrupt):
            criteria.calibrate(model, data, drawing)
    else:
        criteria.calibrate(model, data, drawing)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert after.keys() == tensors.keys()
    for n, t in tensors.items():
        assert after[n] is t, n
        assert torch.equal(t, before[n]), n
    for n, p in model.named_parameters():
        assert p.grad is grads[n], n
        assert p.grad is None or torch.equal(p.grad, copies[n])
        assert not p._post_accumulate_grad_hooks
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_a_gradient_in_two_parts_is_not_squared_by_parts():
    layer, x = nn.Linear(3, 3, bias=False), torch.randn(4, 3, requires_grad=True)

    def twice(model, reentrant):
        once = checkpoint(model, x, use_reentrant=reentrant)
        return checkpoint(model, once, use_reentrant=reentrant).sum()

    whole = criteria.calibrate(layer, [False, False], twice, "gradient")["weight"]
    assert torch.allclose(criteria.calibrate(layer, [True, True], twice)["weight"], whole)
    found = criteria.calibrate(layer, [False, False], twice, "fisher")["weight"]
    torch.testing.assert_close(found, (whole / 2) ** 2)
    with pytest.raises(ValueError, match=r"gave 'weight' two gradients, .* use_reentrant=False"):
        criteria.calibrate(layer, [True], twice, "fisher")
    assert layer.weight.grad is None


def test_the_input_embeddings_are_embeddings_of_any_class():
    """Some models multiply by a matrix of their own in place of nn.Embedding."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.other = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 4)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.lin = Rows(), nn.Linear(4, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.rows

    assert criteria.embedding_names(Bare()) == {"rows.table"}


def test_one_dense_gradient_lives_at_a_time():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    criteria.calibrate(model, [torch.ones(2, 8)], lambda model, x: model(x).square().sum())
    assert alive == [1] * 6


def test_calibration_that_cannot_be():
    model, data = Net(), batches()
    for kind in ("gradients", "magnitude"):
        with pytest.raises(ValueError, match=f"got '{kind}'"):
            criteria.calibrate(model, data, loss, kind)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        criteria.calibrate(model, data, loss, samples=0)
    with pytest.raises(ValueError, match="there is no batch"):
        criteria.calibrate(model, [], loss)
    with pytest.raises(ValueError, match="the loss of batch 1 is nan"):
        criteria.calibrate(model, range(3), lambda m, i: loss(m, data[i]) * (math.nan if i else 1))

    def root(model, batch):
        return loss(model, batch) + (model.body.hidden.bias * 0).abs().sqrt().sum()

    with pytest.raises(ValueError, match=r"gradient of 'body\.hidden\.bias' holds NaN"):
        criteria.calibrate(model, data, root)
    with pytest.raises(TypeError, match=r"scores must map names to tensors.*got list"):
        criteria.fisher([1])


@pytest.mark.parametrize("dtype", oracles.DTYPES, ids=str)
def test_the_largest_and_the_smallest_weights(dtype):
    model = Net().to(dtype)
    own = {n: p.detach().float() for n, p in model.named_parameters() if n in ELIGIBLE}
    own["body.embed.weight"][0, :3] = torch.tensor([0.0, 1e-30, -1e-20])
    with torch.no_grad():
        for n, t in own.items():
            dict(model.named_parameters())[n].copy_(t)
    own = {n: p.detach().float() for n, p in model.named_parameters() if n in ELIGIBLE}
    chosen(sf.select(model, k=77, criterion="weight"), own, 77)
    # Sixteen of the norm's biases are 0: ties, and the smallest of all.
    smallest = sf.select(model, k=77, criterion=criteria.weight(largest=False))
    order = sorted(
        (abs(v), n, i) for n in ELIGIBLE for i, v in enumerate(own[n].reshape(-1).tolist())
    )
    found = {(n, i) for n, at in smallest for i in at.tolist()}
    assert found == {(n, i) for _, n, i in order[:77]}
    with torch.no_grad():
        model.body.hidden.weight[1, 1] = math.inf
    for largest in (True, False):
        with pytest.raises(ValueError, match=r"'body\.hidden\.weight' holds NaN or infinity"):
            sf.select(model, k=5, criterion=criteria.weight(largest))


def test_random_of_ones_own_seed():
    model = Net()
    own = sf.select(model, k=50, criterion=criteria.random(7), seed=1)
    assert own == sf.select(model, k=50, criterion="random", seed=7)
    assert own != sf.select(model, k=50, criterion="random", seed=1)
    assert criteria.random(7).recipe() == {"criterion": "random", "method": "RAND-SFT", "seed": 7}


def test_biases_alone():
    model = Net()
    found = sf.select(model, criterion="bias")
    assert found.counts() == dict(zip(ELIGIBLE, (0, 24, 0, 24), strict=True))
    assert sf.select(model, k=48, criterion="bias") == found
    with pytest.raises(ValueError, match='"bias" selects 48 entries, not the 40 asked for; drop k'):
        sf.select(model, k=40, criterion="bias")
    with pytest.raises(ValueError, match="none of the eligible parameters is a bias"):
        sf.select(model, criterion="bias", eligible={"body.embed.weight"})
    with pytest.raises(ValueError, match='"bias" fixes its entries; drop budgets'):
        sf.select(model, criterion="bias", budgets={"*": 3})
    rnn = nn.LSTM(3, 4)
    assert set(dict(sf.select(rnn, criterion="bias"))) == {"bias_hh_l0", "bias_ih_l0"}


def test_entries_that_are_given():
    model = Net()
    start = moved(model)
    support = sf.select(model, start, k=33)
    delta = sf.SparseDelta(support, torch.ones(33))
    masks = {n: support.mask(n) for n in ELIGIBLE}
    for what in (support, delta, masks, {n: masks[n] for n, _ in support}):
        assert sf.select(model, criterion=criteria.given(what)) == support
    some = sf.Support.from_indices(support.layout, {n: at[:1] for n, at in support})
    without = sf.select(model, criterion=criteria.given(support), exclude=some)
    assert without.nnz == 33 - some.nnz
    for name, at in support:
        assert without.indices(name).tolist() == at[1:].tolist()
    extra = sf.select(model, start, k=7, exclude=support)
    both = sf.select(model, k=40, criterion=criteria.given(support), include=extra)
    assert both == sf.select(model, start, k=40)
    with pytest.raises(ValueError, match="leaves no entry"):
        sf.select(model, criterion=criteria.given(some), exclude=support)
    with pytest.raises(ValueError, match=r"criterion given: .*'body\.embed\.weight', .* eligible"):
        sf.select(model, criterion=criteria.given(support), eligible={"body.hidden.weight"})
    with pytest.raises(ValueError, match=r"must be bool, got torch\.float32"):
        criteria.given({"body.hidden.bias": torch.ones(24)})


# --- denoised -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", oracles.DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"rank": "full"}, {"keep_high": 1.0}, {"rank": 99}], ids=str)
@pytest.mark.filterwarnings("ignore:select. .* tie at the threshold")
def test_of_full_rank_it_is_magnitude(dtype, options):
    model = Net().to(dtype)
    start = moved(model)
    expected = sf.select(model, start, k=300)
    found = sf.select(model, start, k=300, criterion=criteria.denoised(**options, embeddings=True))
    assert found == expected
    ties = ("threshold", "above", "tied", "tied_selected")
    assert {key: found.info[key] for key in ties} == expected.info


def test_what_is_denoised():
    """Matrices; embeddings where asked for; all else by its raw difference."""
    model = Net()
    start = moved(model)
    for embeddings, names in [
        (False, {"body.hidden.weight"}),
        (True, {"body.hidden.weight", "body.embed.weight"}),
        ("*hidden*", {"body.embed.weight"}),
        (["*.embed.*", "*.hidden.*"], set()),
    ]:
        criterion = criteria.denoised(keep_high=0.0, embeddings=embeddings)
        found = sf.select(model, start, k=200, criterion=criterion)
        assert set(found.info["denoised"]) == names
        own = dict(model.named_parameters())
        scores = {}
        for name in ELIGIBLE:
            delta = own[name].detach() - start[name]
            scores[name] = sf.denoise.denoise(delta, keep_high=0.0)[0] if name in names else delta
        chosen(found, scores, 200)
    split = sf.select(model, start, k=200, criterion="denoised").info["denoised"]
    assert set(split["body.hidden.weight"]) == {"rank", "of", "kept"}
    assert split["body.hidden.weight"]["of"] == 16
    assert 1 < split["body.hidden.weight"]["rank"] < 16
    assert 0.9 <= split["body.hidden.weight"]["kept"] < 1
    # A mapping says what is an embedding by its names.
    now = {n: p.detach() for n, p in model.named_parameters() if n in ELIGIBLE}
    assert sf.select(now, start, k=200, criterion="denoised") == sf.select(
        model, start, k=200, criterion="denoised"
    )


def test_a_pattern_of_embeddings_must_fit_a_name():
    now = {"a": torch.randn(9, 8), "b": torch.randn(9, 8)}
    start = {n: torch.zeros(9, 8) for n in now}
    how = criteria.denoised(embeddings=["b*"], rank=2)
    # Each group of a budget need not have one.
    sf.select(now, start, k=20, criterion=how, budgets="per_parameter")
    with pytest.raises(ValueError, match=r"embeddings: no eligible parameter is called 'embed\*'"):
        sf.select(now, start, k=20, criterion=criteria.denoised(embeddings="embed*"))


def test_denoised_needs_a_start_and_numbers():
    model = Net()
    with pytest.raises(ValueError, match='"denoised" needs theta0'):
        sf.select(model, k=3, criterion="denoised")
    start = moved(model)
    for name in ("body.hidden.weight", "body.hidden.bias", "body.embed.weight"):
        bad = {**start, name: start[name] * math.nan}
        with pytest.raises(ValueError, match=rf"'{name}' holds NaN or infinity"):
            sf.select(model, bad, k=3, criterion="denoised")


# --- what holds for all ---------------------------------------------------------------------------


def test_a_start_that_lies_elsewhere_comes_in_pieces(monkeypatch):
    model = Net()
    start = moved(model)
    expected = sf.select(model, start, k=300)
    monkeypatch.setattr(criteria, "_on", lambda device, tensors: False)
    found = sf.select(model, start, k=300)
    assert found == expected
    assert found.info == expected.info


def test_scores_of_one_tensor_at_a_time():
    """The function is asked tensor by tensor, and what it gave is let go."""
    import weakref

    tensors = {f"w{i}": torch.randn(1000) for i in range(6)}
    given: list[weakref.ref[Tensor]] = []

    def score(name, now, start):
        assert sum(ref() is not None for ref in given) <= 1
        scores = now * 2
        given.append(weakref.ref(scores))
        return scores

    assert sf.select(tensors, k=50, criterion=score) == sf.select(tensors, k=50, criterion="weight")
    assert len(given) == 6


def test_recipes_are_plain():
    scores = {"w": torch.ones(3)}
    for criterion, method in [
        (criteria.magnitude(), "LT-SFT"),
        (criteria.denoised(rank=4, embeddings=["x*"]), "DeFT-X"),
        (criteria.denoised(rank=4, method="randomized"), "DeFT-X"),
        (criteria.random(), "RAND-SFT"),
        (criteria.weight(), "weight magnitude"),
        (criteria.bias(), "BitFit"),
        (criteria.given({"w": torch.ones(3) > 0}), "given mask"),
        (criteria.gradient(scores), "gradient mask"),
        (criteria.fisher(scores), "FISH mask"),
        (criteria.snip(scores), "SNIP mask"),
        (criteria.as_criterion(lambda name, now, start: now), "custom"),
    ]:
        recipe = criterion.recipe()
        assert json.loads(json.dumps(recipe)) == recipe
        assert recipe["method"] == method
        assert isinstance(criterion, Criterion)
    assert criteria.denoised().recipe() == {
        "criterion": "denoised",
        "method": "DeFT-X",
        "rank": "var:0.9",
        "energy": "sq",
        "keep_high": 0.05,
        "embeddings": False,
        "svd": "gram",
    }
    randomized = criteria.denoised(rank=4, method="randomized", seed=3).recipe()
    assert randomized["approximation"] is True
    assert randomized["seed"] == 3
    assert {n: factory().needs_training for n, factory in criteria.CRITERIA.items()} == {
        "magnitude": True,
        "denoised": True,
        "random": False,
        "weight": False,
        "bias": False,
    }


def test_a_criterion_of_ones_own_by_name(monkeypatch):
    monkeypatch.setattr(criteria, "CRITERIA", dict(criteria.CRITERIA))

    @criteria.criterion
    def late() -> Criterion:
        return criteria.by_score("late", lambda name, now, start: now + (name == "b"))

    found = sf.select({"a": torch.ones(4), "b": torch.ones(4)}, k=3, criterion="late")
    assert found.counts() == {"a": 0, "b": 3}


@pytest.mark.parametrize("name", ["gradient", "fisher", "snip"])
def test_criteria_that_need_scores_say_so(name):
    with pytest.raises(ValueError, match=rf"needs scores: pass criteria.{name}\(criteria.calib"):
        sf.select(nn.Linear(3, 3), k=2, criterion=name)
