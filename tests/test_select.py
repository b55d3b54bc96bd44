"""select: how many entries, of which parameters, by which rule; and what it refuses."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from oracles import assert_bits
from torch import nn

import sparse_ft as sf
from sparse_ft.select import eligible_parameters, resolve_k

SHAPES = {"emb": (300, 257), "norm": (257,), "lin": (100, 257), "none": (0, 3), "scale": ()}


class Model(nn.Module):
    """A backbone of five tensors, and a head."""

    base_model_prefix = "body"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.body = nn.ParameterDict(
            {n: nn.Parameter(torch.randn(s, generator=g).to(dtype)) for n, s in SHAPES.items()}
        )
        self.head = nn.Linear(257, 3, dtype=dtype)


@torch.no_grad()
def moved(model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """The values before; the model moves."""
    g = torch.Generator().manual_seed(seed)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=g).to(p.dtype) * 0.1)
    return before


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.mark.filterwarnings("ignore:select. .* tie at the threshold")
@pytest.mark.parametrize("dtype", oracles.DTYPES, ids=str)
def test_the_largest_differences_of_the_whole_backbone(dtype):
    model = Model(dtype)
    start = moved(model)
    k = 1234
    support = sf.select(model, start, k=k)
    names = sorted(f"body.{n}" for n in SHAPES)
    assert support.layout.names == tuple(names)
    now = [dict(model.named_parameters())[n].detach() for n in names]
    for name, flat in zip(names, oracles.top_k(now, [start[n] for n in names], k), strict=True):
        assert support.indices(name).tolist() == flat.tolist()
    assert support.nnz == k
    scores = np.concatenate(
        [
            (a.float() - start[n].float()).abs().reshape(-1).numpy()
            for n, a in zip(names, now, strict=True)
        ]
    )
    threshold = np.sort(scores)[-k]
    assert support.info["threshold"] == threshold
    assert support.info["above"] == (scores > threshold).sum()
    assert support.info["tied"] == (scores == threshold).sum()
    assert support.info["above"] + support.info["tied_selected"] == k
    assert sf.select(model, start, k=k, tie="all").nnz == (scores >= threshold).sum()


def test_k_and_density():
    assert resolve_k(7, None, 100) == 7
    assert resolve_k(np.int64(7), None, 100) == 7
    assert resolve_k(None, 0.5, 101) == 50
    assert resolve_k(None, 1.0, 101) == 101
    assert resolve_k(None, 0.001, 101) == 1
    for k, density, message in [
        (None, None, "either k"),
        (3, 0.5, "either k"),
        (0, None, "between 1 and the 100 eligible entries, got 0"),
        (-3, None, "got -3"),
        (101, None, "got 101"),
        (True, None, "must be an integer, got True"),
        (3.0, None, r"must be an integer, got 3\.0"),
        ("3", None, "must be an integer"),
        (None, 0.0, r"\(0, 1\], got 0"),
        (None, -0.1, r"got -0\.1"),
        (None, 1.5, r"got 1\.5"),
        (None, float("nan"), "got nan"),
        (None, "0.1", "must be a number"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve_k(k, density, 100)


def test_density_is_a_share_of_the_eligible_entries_rounded_down(model):
    start = moved(model)
    n = sum(p.numel() for p in model.body.parameters())
    assert sf.select(model, start, density=0.0283).nnz == int(0.0283 * n)
    assert sf.select(model, start, density=0.1, eligible={"body.lin"}).nnz == 2570
    assert sf.select(model, start, density=1.0).nnz == n


def test_eligible_as_callable_set_and_name(model):
    start = moved(model)
    for eligible, names in [
        (
            lambda name, p: p.dim() == 2 and name.startswith("body"),
            {"body.emb", "body.lin", "body.none"},
        ),
        ({"body.lin", "head.bias"}, {"body.lin", "head.bias"}),
        (["body.lin", "body.lin"], {"body.lin"}),
        ("body.lin", {"body.lin"}),
    ]:
        assert set(sf.select(model, start, k=2, eligible=eligible).layout.names) == names
        # The same of a mapping.
        now = dict(model.named_parameters())
        assert set(sf.select(now, start, k=2, eligible=eligible).layout.names) == names
    model.body.lin.requires_grad_(False)
    assert set(sf.select(model, start, k=2).layout.names) == {
        f"body.{n}" for n in SHAPES if n != "lin"
    }
    for now in (model, dict(model.named_parameters())):
        with pytest.raises(ValueError, match=r"'body\.x'"):
            sf.select(now, start, k=2, eligible={"body.x", "body.lin"})
        with pytest.raises(ValueError, match="widen the rule"):
            sf.select(now, start, k=2, eligible=lambda name, p: False)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none is eligible"):
        sf.select(model, start, k=2)


def test_a_mapping_and_a_model_give_the_same(model):
    start = moved(model)
    names = [f"body.{n}" for n in SHAPES]
    now = {n: p.detach() for n, p in model.named_parameters() if n in names}
    assert sf.select(now, start, k=500) == sf.select(model, start, k=500)
    assert sf.select(now, sf.snapshot(model), k=500, criterion="random", seed=3) == sf.select(
        model, k=500, criterion="random", seed=3
    )


def test_excluded_entries_are_not_selected_and_rounds_add_up(model):
    start = moved(model)
    first = sf.select(model, start, k=300)
    second = sf.select(model, start, k=300, exclude=first)
    both = sf.select(model, start, k=600)
    for name in both.layout.names:
        union = torch.cat([first.indices(name), second.indices(name)]).sort().values
        assert torch.equal(union, both.indices(name)), name
    # A support over other tensors too: only the common ones count.
    head = sf.select(model, start, k=5, eligible={"head.bias", "head.weight"})
    assert sf.select(model, start, k=300, exclude=head) == first
    random = sf.select(model, k=300, criterion="random", exclude=first, seed=5)
    for name in random.layout.names:
        assert not np.intersect1d(random.indices(name), first.indices(name)).size
    n = both.layout.numel
    rest = sf.select(model, start, density=1.0, exclude=first)
    assert rest.nnz == n - 300
    with pytest.raises(ValueError, match=f"the {n - 300} eligible"):
        sf.select(model, start, k=n - 299, exclude=first)
    wrong = sf.Support.from_indices(sf.Layout.of({"body.emb": (3,)}), {"body.emb": [1]})
    with pytest.raises(ValueError, match=r"body\.emb"):
        sf.select(model, start, k=3, exclude=wrong)


def test_random_is_seeded_and_uniform(model):
    one = sf.select(model, k=5000, criterion="random", seed=1)
    assert one == sf.select(model, k=5000, criterion="random", seed=1)
    other = sf.select(model, k=5000, criterion="random", seed=2)
    assert one != other
    assert one.nnz == other.nnz == 5000
    # Each tensor gets its share, within five standard deviations.
    for name, n in zip(one.layout.names, one.layout.numels, strict=True):
        share = n / one.layout.numel
        sigma = (5000 * share * (1 - share)) ** 0.5
        assert abs(one.counts()[name] - 5000 * share) <= 5 * sigma + 1e-9, name


def test_a_function_as_criterion(model):
    start = moved(model)
    support = sf.select(model, start, k=700, criterion=lambda name, now, then: now - then)
    assert support == sf.select(model, start, k=700)
    by_size = sf.select(model, k=700, criterion=lambda name, now, then: -now)
    names = list(by_size.layout.names)
    now = [dict(model.named_parameters())[n].detach() for n in names]
    for name, flat in zip(names, oracles.top_k(now, [], 700), strict=True):
        assert by_size.indices(name).tolist() == flat.tolist()
    seen = []
    sf.select(model, k=1, criterion=lambda name, now, then: seen.append((name, then)) or now)
    assert seen == [(n, None) for n in names]
    with pytest.raises(ValueError, match=r"scores of shape \(\) for 'body\.emb'"):
        sf.select(model, k=1, criterion=lambda name, now, then: now.sum())
    with pytest.raises(ValueError, match=r"criterion gave a float for 'body\.emb'"):
        sf.select(model, k=1, criterion=lambda name, now, then: 1.0)
    with pytest.raises(ValueError, match="unknown criterion 'best'; there are bias, denoised, mag"):
        sf.select(model, start, k=1, criterion="best")
    with pytest.raises(ValueError, match="needs theta0"):
        sf.select(model, k=1)
    with pytest.raises(TypeError, match=r"or a function.*got int"):
        sf.select(model, k=1, criterion=3)


def test_scores_that_are_no_numbers_are_the_criterions(model):
    start = moved(model)
    with pytest.raises(ValueError, match=r'"custom" gives NaN or inf.*\'body\.emb\', whose values'):
        sf.select(model, start, k=1, criterion=lambda name, now, then: (now - now) / (now - now))


def test_nothing_left_to_select(model):
    every = sf.select(model, density=1.0, criterion="weight", fill=True)
    for given in ({"k": 1}, {"density": 0.5}, {"density": 0.5, "budgets": "per_parameter"}):
        for criterion in ("weight", "random"):
            with pytest.raises(ValueError, match="there is no entry to select"):
                sf.select(model, **given, criterion=criterion, exclude=every)
    with pytest.raises(ValueError, match=r'fill=True fills up .* use tie="index"'):
        sf.select(model, k=5, criterion="weight", tie="all", fill=True)


def test_names_with_and_without_the_prefix_of_the_backbone(model):
    start = moved(model)
    first = sf.select(model, start, k=300)
    bare = {n.removeprefix("body."): first.indices(n) for n in first.layout.names}
    shapes = {n.removeprefix("body."): s for n, s in zip(first.layout.names, first.layout.shapes)}  # noqa: B905
    same = sf.Support.from_indices(sf.Layout.of(shapes), bare)
    assert sf.select(model, start, k=300, include=same) == first
    second = sf.select(model, start, k=300, exclude=first)
    assert sf.select(model, start, k=300, exclude=same) == second
    # A mapping has no backbone.
    now = {n: p.detach() for n, p in model.named_parameters() if n.startswith("body.")}
    with pytest.raises(ValueError, match=r"exclude: it has entries of 'emb', .* is 'body\.emb'"):
        sf.select(now, start, k=300, exclude=same)
    with pytest.raises(ValueError, match=r"include: it has entries of 'emb', which is not elig"):
        sf.select(now, start, k=300, include=same)


def test_fewer_entries_moved_than_wanted(model):
    start = sf.snapshot(model)
    with pytest.raises(ValueError, match=r"only 0 of the 5 entries wanted moved\. Train longer, g"):
        sf.select(model, start, k=5)
    with torch.no_grad():
        model.body.lin.view(-1)[[3, 70]] += 1.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for criterion in ("magnitude", "denoised"):
        with pytest.raises(ValueError, match=r"only 2 of the 5 .* moved\. .*lower k by 3, give"):
            sf.select(model, start, k=5, criterion=criterion, eligible={"body.lin"})
    for n, value in before.items():
        assert_bits(dict(model.named_parameters())[n].detach(), value)
    scores = {"body.lin": torch.zeros(100, 257)}
    scores["body.lin"][3, 4] = -1
    gradient = sf.criteria.gradient(scores)
    with pytest.raises(ValueError, match="only 1 of the 2 entries wanted have a score other than"):
        sf.select(model, k=2, criterion=gradient, eligible={"body.lin"})
    support = sf.select(model, start, k=5, fill=True)
    assert support.nnz == 5
    assert support.indices("body.lin").tolist() == [3, 70]
    assert support.indices("body.emb").tolist() == [0, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sf.select(model, start, k=2).nnz == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_named(model, bad):
    start = moved(model)
    with torch.no_grad():
        model.body.lin[7, 7] = bad
    with pytest.raises(ValueError, match=r"'body\.lin' holds NaN or infinity"):
        sf.select(model, start, k=5)
    assert sf.select(model, start, k=5, eligible={"body.emb"}).nnz == 5
    assert sf.select(model, k=5, criterion="random").nnz == 5
    start["body.emb"][0, 0] = bad
    with pytest.raises(ValueError, match=r"'body\.emb' holds NaN or infinity"):
        sf.select(model, start, k=5, eligible={"body.emb"})


def odd_ones() -> dict[str, nn.Parameter]:
    def frozen(tensor: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(tensor, requires_grad=False)

    return {
        "int64": frozen(torch.arange(6).reshape(2, 3)),
        "float64": frozen(torch.ones(2, 3, dtype=torch.float64)),
        "complex64": frozen(torch.ones(2, 3, dtype=torch.complex64)),
        "meta": frozen(torch.ones(2, 3, device="meta")),
        "quantised": frozen(torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)),
        "sparse_coo": frozen(torch.eye(3).to_sparse()),
        "not contiguous": frozen(torch.ones(3, 2).t()),
        "no shape yet": nn.parameter.UninitializedParameter(),
    }


ODD = (
    *("int64", "float64", "complex64", "meta", "quantised", "sparse_coo", "not contiguous"),
    "no shape yet",
)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_parameters_that_cannot_be_used_are_named(model, kind):
    model.body["odd"] = parameter = odd_ones()[kind]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n != "body.odd"}
    names = set(before) | {"body.odd"}
    for now in (model, dict(model.named_parameters())):
        with pytest.raises(ValueError, match=rf"'body\.odd' .*{kind}"):
            sf.select(now, k=3, criterion="random", eligible=names)
    if kind != "no shape yet":
        good = nn.Parameter(torch.ones(parameter.shape))
        model.body["odd"] = good
        start = {**before, "body.odd": parameter}
        with pytest.raises(ValueError, match=rf"theta0.*'body\.odd' .*{kind}"):
            sf.select(model, start, k=3, eligible=names)
    for n, value in before.items():
        assert_bits(dict(model.named_parameters())[n].detach(), value)


def test_a_start_that_does_not_fit(model):
    start = moved(model)
    with pytest.raises(ValueError, match=r"theta0 has no 'body\.lin'"):
        sf.select(model, {n: t for n, t in start.items() if n != "body.lin"}, k=3)
    with pytest.raises(
        ValueError, match=r"'body\.lin' has shape \(100, 257\) in the model and \(2,\)"
    ):
        sf.select(model, {**start, "body.lin": torch.ones(2)}, k=3)
    with pytest.raises(TypeError, match=r"theta0 must be a mapping.*or the path.*got Linear"):
        sf.select(model, nn.Linear(2, 2), k=3)
    # A start in another data type is compared in fp32.
    half = {n: t.half() for n, t in start.items()}
    as_full = {n: t.float() for n, t in half.items()}
    assert sf.select(model, half, k=300) == sf.select(model, as_full, k=300)


def test_models_without_parameters():
    for empty in (nn.Module(), nn.ReLU()):
        with pytest.raises(ValueError, match="no parameters"):
            sf.select(empty, k=1, criterion="random")
    with pytest.raises(ValueError, match="no tensors"):
        sf.select({}, k=1, criterion="random")
    with pytest.raises(ValueError, match="there is no entry to select"):
        sf.select({"a": torch.zeros(0)}, k=1, criterion="random")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        sf.select([1], k=1)
    with pytest.raises(ValueError, match="no parameters"):
        eligible_parameters(nn.ReLU())


def test_a_tied_parameter_counts_once():
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight = model["a"].weight
    support = sf.select(model, density=1.0, criterion="random")
    assert support.layout.names == ("a.weight",)
    assert support.nnz == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_warning_where_ties_decide(dtype):
    model = {"w": torch.ones(1000, dtype=dtype)}
    start = {"w": model["w"].clone()}
    model["w"][::10] += 0.5
    with pytest.warns(UserWarning, match=r"50 of the 50 entries tie .* with 50 others") as caught:
        support = sf.select(model, start, k=50)
    assert caught[0].filename == __file__
    assert support.indices("w").tolist() == list(range(0, 500, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.select(model, start, k=100)  # no one is left out
        sf.select(model, start, k=50, tie="all")
        full = {n: t.float() for n, t in model.items()}
        sf.select(full, {n: t.float() for n, t in start.items()}, k=50)


# --- entries that must be in, and entries that must not -----------------------------------------


def positions(support: sf.Support) -> set[tuple[str, int]]:
    return {(name, i) for name, at in support for i in at.tolist()}


def ranking(model: nn.Module, start: dict[str, torch.Tensor]) -> list[tuple[str, int]]:
    """All entries of the backbone, the one that moved most first."""
    found = []
    for name in sorted(f"body.{n}" for n in SHAPES):
        score = (dict(model.named_parameters())[name].detach() - start[name]).abs().reshape(-1)
        found += [(-s, name, i) for i, s in enumerate(score.tolist())]
    return [(name, i) for _, name, i in sorted(found)]


@pytest.mark.parametrize("criterion", ["magnitude", lambda name, now, start: now - start])
def test_include_and_exclude(model, criterion):
    start = moved(model)
    order = ranking(model, start)
    rng = np.random.default_rng(0)
    wanted, unwanted = (
        {order[i] for i in rng.choice(2000, 300, replace=False) if i % 2 == side} for side in (0, 1)
    )
    assert wanted
    assert unwanted

    def as_support(entries):
        by_name = {n: [i for m, i in entries if m == n] for n in {m for m, _ in entries}}
        layout = sf.Layout.of({f"body.{n}": s for n, s in SHAPES.items()})
        return sf.Support.from_indices(layout, by_name)

    found = sf.select(
        model,
        start,
        k=1000,
        criterion=criterion,
        include=as_support(wanted),
        exclude=as_support(unwanted),
    )
    others = [entry for entry in order if entry not in wanted | unwanted]
    assert positions(found) == wanted | set(others[: 1000 - len(wanted)])
    # An SFT, and several of either kind.
    halves = [as_support(sorted(wanted)[::2]), as_support(sorted(wanted)[1::2])]
    delta = sf.SparseDelta(halves[0], torch.ones(halves[0].nnz))
    again = sf.select(
        model,
        start,
        k=1000,
        criterion=criterion,
        include=[delta, halves[1], halves[1]],
        exclude=[as_support(unwanted)],
    )
    assert again == found
    exactly = sf.select(model, start, k=len(wanted), criterion=criterion, include=halves)
    assert positions(exactly) == wanted


def test_include_and_exclude_that_contradict(model):
    start = moved(model)
    layout = sf.Layout.of({"body.emb": SHAPES["emb"]})
    some = sf.Support.from_indices(layout, {"body.emb": [1, 2, 3]})
    one = sf.Support.from_indices(layout, {"body.emb": [2]})
    with pytest.raises(ValueError, match=r"1 entries are in include and in exclude .*'body\.emb'"):
        sf.select(model, start, k=9, include=some, exclude=one)
    with pytest.raises(ValueError, match="include has 3 entries, more than the 2 to select"):
        sf.select(model, start, k=2, include=some)
    with pytest.raises(
        ValueError, match=r"include: it has entries of 'body\.emb', .* not eligible"
    ):
        sf.select(model, start, k=9, include=some, eligible={"body.lin"})
    with pytest.raises(TypeError, match=r"exclude must be a Support or a SparseDelta.*got str"):
        sf.select(model, start, k=9, exclude=["body.emb"])
    wrong = sf.Support.from_indices(sf.Layout.of({"body.emb": (3,)}), {"body.emb": [1]})
    for what in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"{what}.*'body\.emb' has shape \(3,\)"):
            sf.select(model, start, k=9, **{what: wrong})


# --- budgets ------------------------------------------------------------------------------------


def test_each_budget_is_a_selection_of_its_own(model):
    start = moved(model)
    found = sf.select(
        model, start, budgets={"body.lin": 40, "*.[ns]*": 0.5, "body.*": np.int64(100)}
    )
    n = 257 + 1
    parts = [
        sf.select(model, start, k=40, eligible={"body.lin"}),
        sf.select(model, start, k=n // 2, eligible={"body.norm", "body.scale", "body.none"}),
        sf.select(model, start, k=100, eligible={"body.emb"}),
    ]
    assert found.nnz == 140 + n // 2
    assert positions(found) == set.union(*map(positions, parts))
    assert {g: info["k"] for g, info in found.info["groups"].items()} == {
        "body.lin": 40,
        "*.[ns]*": n // 2,
        "body.*": 100,
    }
    assert found.info["groups"]["body.lin"]["threshold"] == parts[0].info["threshold"]
    # The rest of K is for what no pattern fits.
    rest = sf.select(model, start, k=500, budgets={"body.lin": 40})
    others = {f"body.{n}" for n in SHAPES if n != "lin"}
    both = positions(parts[0]) | positions(sf.select(model, start, k=460, eligible=others))
    assert positions(rest) == both
    exact = sf.select(model, start, k=40, budgets={"body.lin": 40})
    assert exact.counts()["body.lin"] == exact.nnz == 40
    # What must be in counts towards the budget of its group.
    include = sf.Support.from_indices(sf.Layout.of({"body.lin": SHAPES["lin"]}), {"body.lin": [5]})
    found = sf.select(model, start, k=500, budgets={"body.lin": 40}, include=include)
    assert found.counts()["body.lin"] == 40
    assert 5 in found.indices("body.lin").tolist()


@pytest.mark.parametrize("k", [1, 2, 3, 1000, 77_777, 103_058])
def test_shares_in_proportion(model, k):
    start = moved(model)
    sizes = {f"body.{n}": int(np.prod(s)) for n, s in SHAPES.items()}
    whole = sum(sizes.values())
    found = sf.select(model, start, k=k, budgets="per_parameter")
    assert found.nnz == k
    for name, count in found.counts().items():
        assert abs(count - k * sizes[name] / whole) < 1, name
        if count:
            assert found.indices(name).tolist() == (
                sf.select(model, start, k=count, eligible={name}).indices(name).tolist()
            )
    by_length = sf.select(model, start, k=k, budgets=lambda name: len(name))
    assert by_length.nnz == k
    if k == 1000:
        # 997.496, 2.494 and 0.010: the one that is left goes to the first.
        counts = {g: info["k"] for g, info in by_length.info["groups"].items()}
        assert counts == {"8": 998, "9": 2}


def test_groups_draw_independently():
    model = {f"w{i}": torch.zeros(10_000) for i in range(3)}
    found = sf.select(model, k=3000, criterion="random", budgets="per_parameter", seed=4)
    at = [set(found.indices(f"w{i}").tolist()) for i in range(3)]
    own = sf.criteria.random(seed=4)
    assert found == sf.select(model, k=3000, criterion=own, budgets="per_parameter", seed=9)
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        # Of 1000 in 10,000 each, 100 are expected in both; four standard deviations are 36.
        assert 60 < len(at[a] & at[b]) < 140
    assert at[0] == set(
        sf.select({"w0": model["w0"]}, k=1000, criterion="random", seed=4).indices("w0").tolist()
    )


def test_budgets_that_do_not_add_up(model):
    start = moved(model)
    for budgets, more, message in [
        ({"body.x*": 3}, {}, "no eligible parameter is left for 'body.x*'"),
        ({"*": 3, "body.lin": 3}, {}, "no eligible parameter is left for 'body.lin'"),
        ({"body.lin": 3}, {}, "no pattern fits 'body.emb'"),
        ({"*": 0}, {}, "'*': k must be between 1 and"),
        ({"*": 1.5}, {}, "'*': density must be in"),
        ({"*": "3"}, {}, "'*': k must be an integer"),
        ({"*": 3}, {"k": 5}, "they take 3 of the 5 .* have 0 for the other 2"),
        ({"body.lin": 7}, {"k": 5}, "they take 7 of the 5"),
        ("per_layer", {"k": 5}, "or a function from names to groups, got 'per_layer'"),
        ("per_parameter", {}, "give either k"),
    ]:
        with pytest.raises(ValueError, match=message.replace("*", r"\*").replace(r".\*", ".*")):
            sf.select(model, start, budgets=budgets, **more)
    # Where nothing is to be selected nothing can be included either.
    for name, k, budgets in [
        ("body.emb", 5, {"body.lin": 5}),
        ("body.lin", 1, "per_parameter"),
    ]:
        layout = sf.Layout.of({name: SHAPES[name[5:]]})
        include = sf.Support.from_indices(layout, {name: [5]})
        with pytest.raises(ValueError, match=r"include has 1 entries of the budget .*the 0 to sel"):
            sf.select(model, start, k=k, include=include, budgets=budgets)
    with pytest.raises(ValueError, match="only 0 of the 3 entries wanted of the budget"):
        sf.select(model, sf.snapshot(model), budgets={"body.lin": 3, "*": 5})


# --- a start on disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "denoised"])
def test_a_start_on_disk(tmp_path, model, criterion):
    kept = sf.snapshot(model, path=tmp_path / "theta0.safetensors")
    start = moved(model)
    expected = sf.select(model, start, k=500, criterion=criterion)
    assert sf.select(model, kept, k=500, criterion=criterion) == expected
    assert sf.select(model, kept.path, k=500, criterion=criterion) == expected
    assert sf.select(model, tmp_path / "theta0.safetensors", k=500, criterion=criterion) == expected
    torch.save(start, tmp_path / "pytorch_model.bin")
    assert sf.select(model, tmp_path, k=500, criterion=criterion) == expected
    with pytest.raises(ValueError, match="there is no such file"):
        sf.select(model, tmp_path / "none.safetensors", k=500)


PEAK = """
import sys, torch, sparse_ft as sf
from torch import nn

def peak(kind):
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields[kind].split()[0]) / 1024

torch.manual_seed(0)
n, where, layers = int(sys.argv[1]), sys.argv[2], 5
model = nn.ParameterDict({f"w{i}": nn.Parameter(torch.randn(n, 1024)) for i in range(layers)})
theta0 = sf.snapshot(model, path=where)
small = {"a": torch.ones(9)}
sf.select(small, {"a": torch.zeros(9)}, k=3)  # what the first call loads
with torch.no_grad():
    for p in model.parameters():
        for rows in p.split(256):
            rows += torch.randn_like(rows) * 1e-3
for t in theta0.values():
    t.sum()  # its pages count as the start's own
held = [theta0[n] for n in theta0]
open("/proc/self/clear_refs", "w").write("5")
before = peak("VmRSS")
support = sf.select(model, theta0, k=int(0.028 * 1024 * n * layers))
print(support.nnz, peak("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_selection_needs_little_memory(tmp_path, native_library):
    """On a model of 200 MB, whose start is on disk: 8 bytes an entry, and what the machine adds."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "10000", str(tmp_path / "theta0.safetensors")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"},
    )
    (tmp_path / "theta0.safetensors").unlink()
    assert done.returncode == 0, done.stderr
    nnz, megabytes = done.stdout.split()
    assert int(nnz) == 1_433_600
    assert float(megabytes) < 8 * int(nnz) / 2**20 + 20
