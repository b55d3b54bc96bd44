"""select: how many entries, of which parameters, by which rule; and what it refuses."""

import warnings

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
    with pytest.raises(ValueError, match="unknown criterion 'best'; there are magnitude, random"):
        sf.select(model, start, k=1, criterion="best")
    with pytest.raises(ValueError, match="needs theta0"):
        sf.select(model, k=1)


def test_a_warning_where_fewer_entries_moved_than_wanted(model):
    start = sf.snapshot(model)
    with torch.no_grad():
        model.body.lin.view(-1)[[3, 70]] += 1.0
    with pytest.warns(UserWarning, match="only 2 entries moved, fewer than the 5 wanted") as caught:
        support = sf.select(model, start, k=5)
    assert caught[0].filename == __file__
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
    with pytest.raises(TypeError, match=r"theta0 must be a mapping.*Linear"):
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
    with pytest.raises(ValueError, match="the 0 eligible entries"):
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
