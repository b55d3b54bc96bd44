"""merge and overlap of deltas: merging then applying is composing; every rule is its formula on
dense arrays; sets are counted as numpy does.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, assert_bits
from torch import nn

import sparse_ft as sf
from sparse_ft.merge import RULES

SHAPES = {"a": (300, 257), "b": (65_536,), "c": (), "d": (0, 2), "e": (65_537,)}

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for n, s in SHAPES.items():
            self.register_parameter(n, nn.Parameter(torch.randn(s, generator=g).to(dtype)))
        self.head = nn.Linear(2, 3, dtype=dtype)


@torch.no_grad()
def made(model: nn.Module, seed: int, names="abcde", **meta) -> sf.SparseDelta:
    g = torch.Generator().manual_seed(seed)
    base = {n: p.detach() for n, p in model.named_parameters() if n in names}
    tuned = {
        n: (t + torch.randn(t.shape, generator=g) * (torch.rand(t.shape, generator=g) < 0.1)).to(
            t.dtype
        )
        for n, t in base.items()
    }
    heads = {n: p + seed for n, p in model.named_parameters() if n.startswith("head")}
    return sf.SparseDelta.between(base, tuned, heads=heads, **meta)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def entries(delta: sf.SparseDelta) -> dict[tuple[str, int], float]:
    return {
        (n, i): v
        for n, flat, val in delta
        for i, v in zip(flat.tolist(), val.tolist(), strict=True)
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [None, [1.0, -0.5, 2.0]], ids=str)
def test_merging_then_applying_is_composing(dtype, weights):
    model = Model(dtype)
    before = values(model)
    deltas = [made(model, 1), made(model, 2, "ab"), made(model, 3, "bce")]
    with sf.compose(model, deltas, weights):
        composed = values(model)
    first = None
    for order in itertools.permutations(range(3)):
        merged = sf.merge([deltas[j] for j in order], weights and [weights[j] for j in order])
        first = first or merged
        assert merged == first
        with sf.compose(model, merged):
            for n, p in model.named_parameters():
                assert_bits(p.detach(), composed[n], n)
        for n, p in model.named_parameters():
            assert_bits(p.detach(), before[n], n)
    union = set().union(*(entries(d).keys() for d in deltas))
    assert entries(merged).keys() == union
    assert merged.val.dtype is torch.float32
    assert merged.heads == {}
    sources = {s["id"]: s["alpha"] for s in merged.meta["recipe"]["merged_from"]}
    assert sources == {d.content_id: a for d, a in zip(deltas, weights or [1.0] * 3, strict=True)}


def test_one_delta_is_itself():
    delta = made(Model(), 1)
    for one in (sf.merge([delta]), sf.merge(delta), sf.merge([delta], [1.0])):
        assert one.support == delta.support
        assert_bits(one.val, delta.val)
    half = delta.astype(torch.bfloat16)
    assert_bits(sf.merge([half]).val, half.val.float())
    assert_bits(sf.merge([delta], [0.5]).val, delta.val * 0.5)


def test_merging_in_groups_agrees_where_sums_are_exact():
    """Small integers add exactly, so the result must not depend on how the sum is bracketed."""
    layout = sf.Layout.of(SHAPES)
    g = torch.Generator().manual_seed(1)

    def whole(n):
        support = sf.Support.from_masks(
            {m: torch.rand(s, generator=g) < 0.1 for m, s in SHAPES.items()}
        )
        assert support.layout == layout
        return sf.SparseDelta(support, torch.randint(-50, 50, (support.nnz,), generator=g).float())

    a, b, c = whole(1), whole(2), whole(3)
    both = sf.merge([sf.merge([a, b]), c])
    assert both.support == sf.merge([a, sf.merge([b, c])]).support
    assert_bits(both.val, sf.merge([a, b, c]).val)


def test_what_a_merged_delta_says_of_itself():
    model = Model()
    base = {"id": "org/model", "revision": "1"}
    a = made(model, 1, base=base, role="task")
    b = made(model, 2, base={**base, "revision": "2"})
    assert "digest_f32" in a.meta["base"]
    merged = sf.merge([a, b])
    assert merged.meta["base"] == {"id": "org/model"}
    assert merged.meta["dtypes"] == a.meta["dtypes"]
    assert "role" not in merged.meta
    with_heads = sf.merge([a, b], heads=b)
    assert set(with_heads.heads) == {"head.weight", "head.bias"}
    for n, head in with_heads.heads.items():
        assert_bits(head, b.heads[n], n)
    with pytest.raises(ValueError, match="merge: heads names a delta that is not among"):
        sf.merge([a], heads=b)


def test_tied_names_survive_and_are_not_merged_apart():
    tied = nn.ModuleDict({"x": nn.Linear(9, 9, bias=False), "y": nn.Linear(9, 9, bias=False)})
    tied["y"].weight = tied["x"].weight
    tuned = copy.deepcopy(tied)
    with torch.no_grad():
        tuned["x"].weight[3] += 1
    delta = sf.SparseDelta.between(tied, tuned)
    merged = sf.merge([delta, delta])
    assert merged.meta["aliases"] == {"x.weight": ["y.weight"]}
    with sf.compose(tied, merged):
        pass


TIED = {"embed.weight": (300, 257), "a.bias": (70,)}


def tied_delta(name: str, seed: int, further: list[str]) -> sf.SparseDelta:
    """A delta over TIED whose embedding goes by another name, tied to further ones."""
    g = torch.Generator().manual_seed(seed)
    shapes = {name: TIED["embed.weight"], "a.bias": TIED["a.bias"]}
    masks = {n: torch.rand(shape, generator=g) < 0.1 for n, shape in shapes.items()}
    support = sf.Support.from_masks(masks)
    meta = {"aliases": {name: further}} if further else {}
    return sf.SparseDelta(support, torch.randn(support.nnz, generator=g), meta=meta)


def under(delta: sf.SparseDelta, **names: str) -> sf.SparseDelta:
    """The same entries with tensors renamed, by way of dense masks and values."""
    names = {n: names.get(n.replace(".", "_"), n) for n in delta.layout.names}
    support = sf.Support.from_masks({names[n]: delta.support.mask(n) for n in names})
    values = {names[n]: delta.values(n) for n in names}
    return sf.SparseDelta(support, torch.cat([values[n] for n in sorted(values)]))


@pytest.mark.parametrize("rule", ["sum", "mean_present", "ties", "priority"])
def test_a_tied_tensor_is_one_whatever_deltas_call_it(rule):
    # A masked language model lists its tied embedding under its head, a classifier does not.
    language = tied_delta("z_head.decoder.weight", 1, ["embed.weight"])
    task = tied_delta("embed.weight", 2, [])
    plain = under(language, z_head_decoder_weight="embed.weight")
    merged = sf.merge([language, task], rule=rule)
    wanted = sf.merge([plain, task], rule=rule)
    assert merged.layout == wanted.layout
    assert entries(merged) == entries(wanted)
    assert merged.meta["aliases"] == {"embed.weight": ["z_head.decoder.weight"]}
    found, counted = sf.overlap([language, task]), sf.overlap([plain, task])
    assert np.array_equal(found.both, counted.both)
    assert found.both[0, 1] > 500
    assert np.array_equal(found.dot, counted.dot)
    assert found.numel == counted.numel


def test_the_draw_of_dare_does_not_depend_on_what_others_call_a_tensor():
    language = tied_delta("z_head.decoder.weight", 1, ["embed.weight"])
    nothing = sf.SparseDelta(
        sf.Support.from_indices(sf.Layout.of({"embed.weight": TIED["embed.weight"]}), {}),
        torch.zeros(0),
    )
    alone = sf.merge([language], rule="dare", p=0.5)
    beside = sf.merge([language, nothing], rule="dare", p=0.5)
    assert beside.layout.names == ("a.bias", "embed.weight")
    assert entries(beside) == entries(under(alone, z_head_decoder_weight="embed.weight"))


def test_one_tied_tensor_is_not_two():
    apart = sf.SparseDelta(
        sf.Support.from_indices(sf.Layout.of({"x.weight": (9, 9), "y.weight": (9, 9)}), {}),
        torch.zeros(0),
    )
    layout = sf.Layout.of({"x.weight": (9, 9)})
    tied = sf.SparseDelta(
        sf.Support.from_indices(layout, {}),
        torch.zeros(0),
        meta={"aliases": {"x.weight": ["y.weight"]}},
    )
    for op in (sf.merge, sf.overlap):
        with pytest.raises(sf.SFTError, match=r"'x\.weight' and 'y\.weight' are two tensors in"):
            op([tied, apart])


def test_a_merged_delta_recognises_its_base():
    model, other = Model(), Model()
    with torch.no_grad():
        other.a += 1
    deltas = [made(model, 1), made(model, 2)]
    merged = sf.merge(deltas, rule="ties", base=model)
    assert merged.meta["base"]["digest_f32"]
    assert merged.meta["recipe"] == sf.merge(deltas, rule="ties").meta["recipe"]
    with sf.compose(model, merged):
        pass
    with pytest.raises(sf.SFTError, match="another base model"):
        sf.compose(other, merged)
    # Not of that base to begin with.
    with pytest.raises(sf.SFTError, match="another base model"):
        sf.merge(deltas, base=dict(other.named_parameters()))
    with pytest.raises(sf.SFTError, match="base has no tensor 'a'"):
        sf.merge(deltas, base={})


def test_merge_refuses():
    model = Model()
    delta = made(model, 1)
    replace = sf.SparseDelta(delta.support, delta.val, meta={"kind": "replace"})
    wide = sf.SparseDelta(
        sf.Support.from_indices(sf.Layout.of({"a": (7,)}), {"a": [1]}), torch.ones(1)
    )
    for kind, args, more, message in [
        (ValueError, ([],), {}, "no deltas given"),
        (ValueError, ([delta],), {"rule": "best"}, "unknown rule 'best'; there are breadcr.*sum"),
        (ValueError, ([delta], [1.0, 2.0]), {}, "2 weights for 1 deltas"),
        (ValueError, ([delta], [float("nan")]), {}, r"weights\[0\] must be a finite"),
        (ValueError, ([delta], [1e300]), {}, r"weights\[0\] must be a finite"),
        (TypeError, ([delta, "b"],), {}, r"deltas\[1\] must be a SparseDelta, got str"),
        (sf.SFTError, ([delta, replace],), {}, r"deltas\[1\] is of kind 'replace'"),
        (sf.SFTError, ([delta, wide],), {}, r"'a' has shape \(300, 257\).*\(7,\) in deltas\[1\]"),
        (sf.SFTError, ([delta, delta], [3e38, 3e38]), {}, "must be finite"),
    ]:
        with pytest.raises(kind, match=message):
            sf.merge(*args, **more)


# --- the rules ------------------------------------------------------------------------------------

# Options with which a rule drops nothing of a delta that is alone on its entries.
NEUTRAL: list[tuple[str, dict]] = [
    *((name, {}) for name in ("sum", "mean", "mean_present", "magmax", "priority", "disjoint")),
    *(("ties", {"elect": e, "divisor": "count"}) for e in ("sum", "unweighted", "count")),
    *(("ties", {"elect": e, "divisor": "weight"}) for e in ("sum", "unweighted", "count")),
    ("ties", {"divisor": "none"}),
    ("consensus", {"k": 1}),
    ("dare", {"p": 0}),
    ("della", {"p": 0.0, "epsilon": 0}),
    ("breadcrumbs", {"beta": 0, "gamma": 0}),
]
# Others, which do.
DROPPING: list[tuple[str, dict]] = [
    ("ties", {"density": 0.5, "scale": 1.5}),
    ("consensus", {"k": 2, "threshold": 0.4}),
    ("dare", {"p": 0.6, "seed": 3}),
    ("della", {"p": 0.5, "epsilon": 0.4, "seed": 3}),
    ("della", {"p": 0.5, "epsilon": 0.4, "scope": "tensor", "divisor": "count"}),
    ("breadcrumbs", {"beta": 0.4, "gamma": 0.1}),
]
SMALL = {"a": (30, 37), "b": (50,), "c": (), "d": (0, 2), "e": (5, 4, 3)}
LAYOUT = sf.Layout.of(SMALL)
AWKWARD = np.array([0, 1, -1, 2, -2, 0.1, -0.1, 1e-45, 1e-30, -3e4, 0.5, -0.5], np.float32)


def sparse(seed: int, density=0.5, dtype=torch.float32, values=None, shapes=None) -> sf.SparseDelta:
    """A delta of awkward values, so that terms tie, cancel and vanish."""
    g = torch.Generator().manual_seed(seed)
    masks = {m: torch.rand(s, generator=g) < density for m, s in (shapes or SMALL).items()}
    support = sf.Support.from_masks(masks)
    pool = torch.tensor(AWKWARD if values is None else np.array(values, np.float32))
    val = pool[torch.randint(len(pool), (support.nnz,), generator=g)]
    return sf.SparseDelta(support, val.to(dtype))


def flat(delta: sf.SparseDelta) -> tuple[np.ndarray, np.ndarray]:
    """Values and mask over all tensors of SMALL, dense."""
    values, mask = [], []
    for name, shape in SMALL.items():
        there = name in delta.layout
        values.append(
            delta.dense(name).float().flatten() if there else torch.zeros(shape).flatten()
        )
        mask.append(
            delta.support.mask(name).flatten()
            if there
            else torch.zeros(shape, dtype=torch.bool).flatten()
        )
    return torch.cat(values).numpy(), torch.cat(mask).numpy()


def canonical(deltas, weights):
    order = sorted(range(len(deltas)), key=lambda j: (deltas[j].content_id, weights[j]))
    return [deltas[j] for j in order], [np.float32(weights[j]) for j in order]


def summed(rows) -> np.ndarray:
    """In fp32, one after the other, from +0."""
    out = np.zeros(np.shape(rows)[1:], np.float32)
    for row in rows:
        out = out + row
    return out


def elected(x, phi, alphas, elect, divisor, scale):
    """TIES on dense terms: values, and where something is left."""
    lead = {
        "sum": lambda: summed(x),
        "count": lambda: (x > 0).sum(0) - (x < 0).sum(0),
        "unweighted": lambda: summed(np.sign(alphas)[:, None] * phi),
    }[elect]()
    agree = np.sign(x) == np.sign(lead)
    value = summed(np.where(agree, x, np.float32(0)))
    by = {
        "count": agree.sum(0).astype(np.float32),
        "weight": summed(np.where(agree, np.abs(alphas)[:, None], np.float32(0))),
        "none": np.ones(x.shape[1], np.float32),
    }[divisor]
    value = np.where(lead != 0, value / np.where(by > 0, by, np.float32(1)), np.float32(0))
    return value * np.float32(scale), (lead != 0) | (x == 0).all(0)


def kept_largest(values, mask, count) -> np.ndarray:
    """The mask of the `count` largest magnitudes among the masked, the lower position first."""
    at = np.flatnonzero(mask)
    order = at[np.argsort(-np.abs(values[at]).astype(np.float64), kind="stable")]
    out = np.zeros(len(mask), bool)
    out[order[:count]] = True
    return out


def groups(scope) -> list[slice]:
    """The rows, or the tensors, of SMALL in the flat arrays."""
    out, start = [], 0
    for shape in SMALL.values():
        numel = int(np.prod(shape))
        width = shape[-1] if scope == "row" and len(shape) > 1 else numel
        out += [slice(start + i, start + i + width) for i in range(0, numel, max(width, 1))]
        start += numel
    return out


def uniform(delta: sf.SparseDelta, seed: int) -> np.ndarray:
    """The draws of DARE, from their definition, in Python's integers; dense over SMALL, whose
    tensors have one tile each."""

    def mixed(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    start = seed * 0xD1342543DE82EF95 + int(delta.content_id[:16], 16)
    own, tile = {}, 0
    for name, numel in zip(delta.layout.names, delta.layout.numels, strict=True):
        own[name], tile = tile, tile + (numel > 0)
    return np.array(
        [
            (mixed((start + (own[n] * 65536 + i + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53
            if n in own
            else 1.0
            for n, shape in SMALL.items()
            for i in range(int(np.prod(shape)))
        ]
    )


def formula(name: str, deltas, weights, options) -> tuple[np.ndarray, np.ndarray]:
    """What a rule is, on dense arrays: values, and the mask of the entries that are left."""
    options = {**RULES[name].options(name, options)}
    if name != "priority":
        deltas, weights = canonical(deltas, weights)
    alphas = np.array(weights, np.float32)
    phi, there = (np.stack(rows) for rows in zip(*map(flat, deltas), strict=True))
    union = there.any(0)
    x = alphas[:, None] * phi
    if name == "sum":
        return summed(x), union
    if name == "mean":
        return summed(x) / np.float32(len(x)), union
    if name == "mean_present":
        return summed(x) / np.maximum(there.sum(0), 1).astype(np.float32), union
    if name == "magmax":
        most = np.abs(x).max(0)
        return np.where((x == most).any(0), most, -most), union
    if name == "priority":
        return np.take_along_axis(x, there.argmax(0)[None], 0)[0] + np.float32(0), union
    if name == "disjoint":
        return summed(x), there.sum(0) == 1
    if name == "consensus":
        own, merged = np.sign(alphas)[:, None] * phi, summed(x)
        want = np.abs(own) >= np.float32(options["threshold"]) * np.abs(merged - own)
        return merged, (want & there).sum(0) >= options["k"]
    if name == "ties":
        share = options.pop("density")
        for j, mask in enumerate(there if share < 1 else ()):
            there[j] = kept_largest(phi[j], mask, max(1, round(share * mask.sum())))
    if name == "dare":
        there &= np.stack([uniform(d, options["seed"]) >= options["p"] for d in deltas])
        scaled = np.array([np.float32(float(w) / (1 - options["p"])) for w in weights])
        return summed(np.where(there, scaled[:, None] * phi, np.float32(0))), there.any(0)
    if name == "della":
        p, epsilon, scope = (options.pop(key) for key in ("p", "epsilon", "scope"))
        seed = options.pop("seed")
        for j, delta in enumerate(deltas):
            drop = np.zeros(len(union))
            for g in groups(scope):
                at = np.flatnonzero(there[j][g]) + g.start
                order = at[np.argsort(-np.abs(phi[j][at]).astype(np.float64), kind="stable")]
                drop[order] = p + epsilon * ((np.arange(len(at)) + 0.5) / max(len(at), 1) - 0.5)
            there[j] &= uniform(delta, seed) >= drop
            phi[j] /= (1 - drop).astype(np.float32)
    if name == "breadcrumbs":
        for j, mask in enumerate(there):
            for g in groups("tensor"):
                n = mask[g].sum()
                most = n - int(options["beta"] * n)
                mask[g] = kept_largest(phi[j][g], mask[g], most) & ~kept_largest(
                    phi[j][g], mask[g], int(options["gamma"] * n)
                )
        return summed(np.where(there, x, np.float32(0))), there.any(0)
    phi = np.where(there, phi, np.float32(0))
    value, left = elected(alphas[:, None] * phi, phi, alphas, **options)
    return value, left & there.any(0)


def assert_same(one: sf.SparseDelta, other: sf.SparseDelta) -> None:
    assert one.support == other.support
    assert_bits(one.val, other.val)


def test_every_rule_is_tested():
    ours = {name for name, rule in RULES.items() if rule.function.__module__ == "sparse_ft.merge"}
    assert {name for name, _ in NEUTRAL} == ours


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -0.5, 2.0), (1.0, 0.0, 1.0)], ids=str)
@pytest.mark.parametrize(("rule", "options"), [*NEUTRAL, *DROPPING], ids=str)
def test_rules_are_their_formulas(rule, options, weights):
    for seed in range(3):
        deltas = [sparse(10 * seed + j, 0.2 + 0.3 * j) for j in range(3)]
        deltas[1] = sf.SparseDelta(deltas[1].support.restrict("ae"), sparse_values(deltas[1], "ae"))
        merged = sf.merge(deltas, weights, rule=rule, **options)
        want, left = formula(rule, deltas, weights, options)
        found, mask = flat(merged)
        assert np.array_equal(mask, left)
        # == and not bits: a sign of zero is no matter here.
        assert np.array_equal(found[left], want[left])
        assert merged.val.dtype is torch.float32


def sparse_values(delta: sf.SparseDelta, names: str) -> torch.Tensor:
    return torch.cat([delta.values(name) for name in names])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "options"), NEUTRAL, ids=str)
def test_rules_leave_one_delta_as_it_is(rule, options, dtype):
    delta = sparse(1, dtype=dtype)
    assert 0 in delta.val
    merged = sf.merge([delta], rule=rule, **options)
    assert merged.support == delta.support
    assert_bits(merged.val, delta.val.float())
    negative = sf.merge([delta], [-1.0], rule=rule, **options)
    assert torch.equal(negative.val, -delta.val.float())
    assert_same(
        sf.merge([delta], [-0.5], rule=rule, **options),
        sf.merge([-delta], [0.5], rule=rule, **options),
    )


@pytest.mark.parametrize(("rule", "options"), NEUTRAL, ids=str)
def test_no_rule_leaves_a_negative_zero(rule, options):
    negative = sparse(1, values=[-0.0])
    for deltas in ([negative], [negative, sparse(2, values=[-0.0])]):
        merged = sf.merge(deltas, rule=rule, **options)
        assert merged.nnz > 0
        assert_bits(merged.val, torch.zeros(merged.nnz))


def test_what_rounds_or_is_scaled_to_zero_is_positive():
    zero, tiny = sparse(1, values=[0.0]), sparse(1, values=[-1.4e-45])
    for merged in (
        sf.merge([zero], rule="ties", scale=-1.0),
        sf.merge([tiny, tiny], [1.0, 0.0], rule="mean"),
        sf.merge([tiny, tiny], [1.0, 0.0], rule="mean_present"),
    ):
        assert_bits(merged.val, torch.zeros(merged.nnz))


def test_shares_of_breadcrumbs_are_decimals():
    layout = sf.Layout.of({"w": (1000,)})
    support = sf.Support.from_indices(layout, {"w": list(range(100))})
    delta = sf.SparseDelta(support, torch.arange(1.0, 101.0))
    # 0.29 · 100 is 28.999… in binary.
    merged = sf.merge([delta], rule="breadcrumbs", beta=0.0, gamma=0.29)
    assert merged.val.tolist() == list(range(1, 72))
    with pytest.raises(ValueError, match=r"beta \+ gamma must be below 1"):
        sf.merge([delta], rule="breadcrumbs", beta=0.7, gamma=0.3)
    with pytest.raises(ValueError, match="scale must be a finite number"):
        sf.merge([delta], rule="ties", scale=10**400)


@pytest.mark.parametrize(("rule", "options"), NEUTRAL, ids=str)
def test_rules_add_deltas_with_disjoint_supports(rule, options):
    whole = sparse(1, 0.9)
    g = torch.Generator().manual_seed(2)
    owner = torch.randint(3, (whole.nnz,), generator=g)
    parts = []
    for j in range(3):
        masks = {n: whole.support.mask(n) for n in SMALL}
        for n in SMALL:
            masks[n].view(-1)[whole.indices(n)] = owner[whole.support.entries_of(n)] == j
        parts.append(sf.SparseDelta(sf.Support.from_masks(masks), whole.val[owner == j]))
    merged = sf.merge(parts, rule=rule, **options)
    assert merged.support == whole.support
    assert_bits(merged.val, whole.val / 3 if rule == "mean" else whole.val)


@pytest.mark.parametrize(
    ("rule", "options"),
    [case for case in (*NEUTRAL, *DROPPING) if not RULES[case[0]].ordered],
    ids=str,
)
def test_rules_do_not_depend_on_the_order(rule, options):
    """Also where one delta is given three times, each time with another weight."""
    a, b = sparse(1), sparse(2, dtype=torch.bfloat16)
    pairs = [(a, 1.0), (b, -0.3), (a, 0.1), (a, 0.7)]
    first = sf.merge(*zip(*pairs, strict=True), rule=rule, **options)
    for order in itertools.permutations(pairs):
        merged = sf.merge(*zip(*order, strict=True), rule=rule, **options)
        assert_same(merged, first)
        assert merged.meta["recipe"] == first.meta["recipe"]


def test_priority_is_to_the_first():
    a, b = sparse(1), sparse(2)
    for one, other in ((a, b), (b, a)):
        merged = entries(sf.merge([one, other], rule="priority"))
        assert merged == {**entries(other), **entries(one)}
        ids = [
            s["id"] for s in sf.merge([one, other], rule="priority").meta["recipe"]["merged_from"]
        ]
        assert ids == [one.content_id, other.content_id]


@pytest.mark.parametrize(("rule", "options"), [*NEUTRAL, *DROPPING], ids=str)
def test_rules_on_nothing(rule, options):
    empty = sf.SparseDelta(sf.Support.from_indices(LAYOUT, {}), torch.zeros(0))
    if options.get("k", 0) < 2:
        assert sf.merge([empty], rule=rule, **options).nnz == 0
    assert sf.merge([empty, empty], rule=rule, **options).nnz == 0
    nowhere = sf.SparseDelta(sf.Support.from_indices(sf.Layout.of({}), {}), torch.zeros(0))
    assert sf.merge([nowhere, nowhere], rule=rule, **options).nnz == 0
    if rule not in ("dare", "della") and options.get("k", 0) < 2:
        with_one = sf.merge([empty, sparse(1)], rule=rule, **options)
        assert with_one.nnz == sf.merge([sparse(1)], rule=rule, **options).nnz > 0


def test_a_draw_depends_on_the_seed_and_the_delta_alone():
    """Not on other deltas or their tensors, which move its entries to other tiles, nor on
    threads."""
    delta = sparse(1, 0.9, values=[1.0])
    company = sparse(2, 0.5, shapes={"A": (7,), "aa": (300, 300), "z": (5,)})
    for rule, options in (("dare", {"p": 0.5}), ("della", {"p": 0.5, "epsilon": 0.5})):
        alone = entries(sf.merge([delta], rule=rule, **options))
        assert 0 < len(alone) < delta.nnz
        torch.set_num_threads(2)  # the fixture sets them back
        both = entries(sf.merge([company, delta], rule=rule, **options))
        assert {at: v for at, v in both.items() if at[0] in SMALL} == alone
        other = entries(sf.merge([delta], rule=rule, **options, seed=1))
        # Two independent draws: a quarter of the entries lies in both.
        common = len(alone.keys() & other.keys()) / delta.nnz
        assert abs(common - 0.25) < 5 * (0.25 * 0.75 / delta.nnz) ** 0.5


@pytest.mark.parametrize(
    ("rule", "options"), [("dare", {}), ("della", {"epsilon": 0.2, "scope": "tensor"})], ids=str
)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_density_and_mean_are_as_expected(rule, options, p):
    """Of n entries n(1 − p) stay, and values keep their mean, within 5 sigma."""
    delta = sparse(1, 1.0, values=[1.0], shapes={"a": (300, 300)})
    n = delta.nnz
    merged = sf.merge([delta], rule=rule, p=p, **options)
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(merged.nnz / n - (1 - p)) < 5 * sigma
    assert abs(float(merged.val.double().sum()) / n - 1) < 5 * 2 * sigma / (1 - p)


def test_della_keeps_what_is_large():
    """Ranks within rows: the larger half of each row stays more often, by ε/2."""
    layout = sf.Layout.of({"a": (400, 100)})
    values = (torch.arange(400 * 100) % 100 + 1).float() * 10.0 ** (torch.arange(40_000) // 4000)
    delta = sf.SparseDelta(sf.Support.full(layout), values)
    merged = sf.merge([delta], rule="della", p=0.5, epsilon=0.8)
    column = merged.indices("a") % 100
    assert abs(float((column >= 50).float().mean()) - 0.7) < 0.02
    # The largest of a row is dropped with p − ε/2 + ε/200, and rescaled by it.
    largest = (
        merged.val[column == 99] / delta.dense("a")[merged.indices("a")[column == 99] // 100, 99]
    )
    assert len(largest) > 300
    assert torch.allclose(largest, torch.tensor(1 / (1 - 0.104)), rtol=1e-6)


def test_breadcrumbs_drops_no_one_where_the_share_is_less_than_one():
    layout = sf.Layout.of({"a": (9,), "b": (10,), "c": (1,)})
    delta = sf.SparseDelta(sf.Support.full(layout), torch.arange(1.0, 21.0))
    merged = sf.merge([delta], rule="breadcrumbs", beta=0.1, gamma=0.1)
    assert merged.support.counts() == {"a": 9, "b": 8, "c": 1}
    assert merged.values("b").tolist() == [*range(11, 19)]
    equal = sf.SparseDelta(sf.Support.full(layout), torch.ones(20))
    merged = sf.merge([equal], rule="breadcrumbs", beta=0.2, gamma=0.3)
    # Among equals the lower position ranks as the larger.
    assert merged.indices("b").tolist() == [3, 4, 5, 6, 7]


def test_ties_drops_what_cancels_and_trims_over_all_tensors():
    a, b = sparse(1, values=[1.0, -2.0]), sparse(2, values=[1.0, -2.0])
    merged = sf.merge([a, -a], rule="ties")
    assert merged.nnz == 0
    assert sf.merge([a, b], rule="ties").nnz > 0
    trimmed = sf.merge([a], rule="ties", density=0.3)
    large = int((a.val == -2).sum())
    assert large > 0.3 * a.nnz
    assert trimmed.nnz == round(0.3 * a.nnz)
    assert (trimmed.val == -2).all()
    assert (
        trimmed.indices("a").tolist() == a.indices("a")[a.values("a") == -2].tolist()[: trimmed.nnz]
    )
    assert sf.merge([a], rule="ties", density=1e-9).nnz == 1


def test_sums_beyond_fp32_are_refused_by_every_rule():
    layout = sf.Layout.of({"a": (2,)})
    huge = sf.SparseDelta(sf.Support.full(layout), torch.tensor([3e38, 1.0]))
    for rule, options in NEUTRAL:
        if rule in ("magmax", "priority", "disjoint"):
            continue
        with pytest.raises(sf.SFTError, match="must be finite"):
            sf.merge([huge, huge], rule=rule, **options)


@pytest.mark.parametrize(("rule", "options"), [*NEUTRAL, *DROPPING], ids=str)
def test_nothing_dense_is_built(rule, options):
    """Tensors of 2^34 entries: dense, they would take 64 GB each."""
    n = 1 << 17
    layout = sf.Layout.of({"a": (n, n), "b": (n * n,)})
    at = [0, 1, 65_535, 65_536, n * n // 2 + 1, n * n - 1]
    a = sf.SparseDelta(sf.Support.from_indices(layout, {"a": at, "b": at[2:]}), torch.ones(10))
    b = sf.SparseDelta(sf.Support.from_indices(layout, {"a": at[3:], "b": [7]}), torch.ones(4))
    merged = sf.merge([a, b], rule=rule, **options)
    assert merged.layout == layout
    assert set(merged.indices("a").tolist()) <= set(at)
    if (rule, options) in NEUTRAL and rule != "disjoint":
        assert merged.nnz == 11


def test_what_a_merged_delta_says_of_its_rule(tmp_path):
    a, b = sparse(1, values=[0.3]), sparse(2, values=[-0.7])
    merged = sf.merge([a, b], [1.0, 0.5], rule="dare", p=0.5)
    assert merged.meta["recipe"]["method"] == "merge:dare"
    assert merged.meta["recipe"]["options"] == {"p": 0.5, "seed": 0}
    merged.save(tmp_path / "x.safetensors")
    loaded = sf.SparseDelta.load(tmp_path / "x.safetensors")
    assert loaded == merged
    recipe = loaded.meta["recipe"]
    # The recipe is enough to do it again.
    by_id = {d.content_id: d for d in (a, b)}
    again = sf.merge(
        [by_id[s["id"]] for s in recipe["merged_from"]],
        [s["alpha"] for s in recipe["merged_from"]],
        rule=recipe["method"].removeprefix("merge:"),
        **recipe["options"],
    )
    assert again == merged
    assert "options" not in sf.merge([a, b]).meta["recipe"]


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("sum", {"p": 1}, "rule 'sum' has no option 'p'; it has none"),
        ("ties", {"lamda": 1}, "no option 'lamda'; it has density, elect, divisor, scale"),
        ("dare", {}, "rule 'dare' needs p="),
        ("breadcrumbs", {"beta": 0.1}, "rule 'breadcrumbs' needs gamma="),
        ("dare", {"p": 1.0}, r"p must be a finite number in \[0, 1\), got 1.0"),
        ("dare", {"p": -0.1}, r"p must be"),
        ("dare", {"p": float("nan")}, r"p must be"),
        ("dare", {"p": "0.5"}, r"p must be a finite number in \[0, 1\), got '0.5'"),
        ("dare", {"p": True}, r"p must be"),
        ("dare", {"p": 0.5, "seed": -1}, "seed must be an integer from 0"),
        ("dare", {"p": 0.5, "seed": 0.5}, "seed must be an integer from 0"),
        ("della", {"p": 0.1, "epsilon": 0.3}, r"epsilon must be a finite number in \[0, 0.2\]"),
        ("della", {"p": 0.5, "epsilon": 0.1, "scope": "layer"}, "scope must be one of row, tensor"),
        ("ties", {"density": 0.0}, r"density must be a finite number in \(0, 1\]"),
        ("ties", {"density": 1.1}, r"density must be"),
        ("ties", {"elect": "max"}, "elect must be one of sum, unweighted, count, got 'max'"),
        ("ties", {"divisor": 2}, "divisor must be one of count, weight, none, got 2"),
        ("ties", {"scale": float("inf")}, "scale must be"),
        ("consensus", {"k": 3}, "k must be an integer from 1 to 2, the number of deltas, got 3"),
        ("consensus", {"k": 0}, "k must be an integer"),
        ("consensus", {"threshold": -1}, "threshold must be"),
        (
            "breadcrumbs",
            {"beta": 0.6, "gamma": 0.4},
            r"beta \+ gamma must be below 1",
        ),
    ],
    ids=str,
)
def test_options_are_checked(rule, options, message):
    with pytest.raises(ValueError, match=message):
        sf.merge([sparse(1), sparse(2)], rule=rule, **options)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_ties_on_any_values(data):
    """Three deltas over ten entries, whatever values and weights hypothesis finds."""
    layout = sf.Layout.of({"b": (10,)})
    deltas, weights = [], []
    for _ in range(3):
        chosen = data.draw(st.dictionaries(st.integers(0, 9), st.sampled_from(AWKWARD.tolist())))
        at = sorted(chosen)
        deltas.append(
            sf.SparseDelta(
                sf.Support.from_indices(layout, {"b": at}),
                torch.tensor([chosen[i] for i in at], dtype=torch.float32),
            )
        )
        weights.append(data.draw(st.sampled_from([1.0, -1.0, 0.0, 0.3, -2.0])))
    options = {
        "elect": data.draw(st.sampled_from(["sum", "unweighted", "count"])),
        "divisor": data.draw(st.sampled_from(["count", "weight", "none"])),
    }
    merged = sf.merge(deltas, weights, rule="ties", **options)
    chosen, alphas = canonical(deltas, weights)
    phi = np.stack([d.dense("b").numpy() for d in chosen])
    there = np.stack([d.support.mask("b").numpy() for d in chosen]).any(0)
    x = np.array(alphas)[:, None] * phi
    want, left = elected(x, phi, np.array(alphas), **options, scale=1.0)
    left &= there
    assert merged.indices("b").tolist() == np.flatnonzero(left).tolist()
    assert merged.val.tolist() == want[left].tolist()


def test_overlap_against_sets():
    model = Model()
    deltas = [made(model, 1), made(model, 2, "ab"), made(model, 3, "bce").astype(torch.bfloat16)]
    deltas.append(-deltas[0])
    found = sf.overlap(deltas)
    maps = [entries(d) for d in deltas]
    assert found.names == tuple(SHAPES)
    assert found.numel == sum(int(np.prod(s)) for s in SHAPES.values())
    assert found.nnz.tolist() == [len(m) for m in maps]
    for i, j in itertools.product(range(4), repeat=2):
        common = maps[i].keys() & maps[j].keys()
        a, b = (np.array([m[c] for c in sorted(common)]) for m in (maps[i], maps[j]))
        assert found.both[i, j] == len(common)
        assert found.either[i, j] == len(maps[i].keys() | maps[j].keys())
        assert found.same_sign[i, j] == int((np.sign(a) == np.sign(b)).sum())
        assert found.dot[i, j] == pytest.approx((a * b).sum(), rel=1e-12, abs=1e-9)
        assert found.energy[i, j] == pytest.approx((a * a).sum(), rel=1e-12)
        assert found.jaccard[i, j] == len(common) / len(maps[i].keys() | maps[j].keys())
        assert found.share[i, j] == len(common) / len(maps[i])
        assert found.expected_share[i, j] == len(maps[j]) / found.numel
        by_tensor = [sum(n == m for n, _ in common) for m in found.names]
        assert found.by_tensor[i, j].tolist() == by_tensor
    assert found.cosine[0, 0] == pytest.approx(1.0)
    assert found.cosine[0, 3] == pytest.approx(-1.0)
    assert np.array_equal(found.cosine, found.cosine.T)
    assert "Overlap of 4 deltas over 208,174 entries" in repr(found)


def test_random_supports_overlap_by_chance():
    model = Model()
    n = sum(p.numel() for name, p in model.named_parameters() if name in SHAPES)
    supports = [
        sf.select(model, density=0.1, criterion="random", seed=s, eligible=set(SHAPES))
        for s in (1, 2)
    ]
    found = sf.overlap([sf.SparseDelta(s, torch.ones(s.nnz)) for s in supports])
    expected = found.expected_share[0, 1]
    sigma = (expected * (1 - expected) / found.nnz[0]) ** 0.5
    assert found.nnz[0] == int(0.1 * n)
    assert abs(found.share[0, 1] - expected) < 5 * sigma
    assert found.share[0, 0] == found.jaccard[1, 1] == 1.0


def test_overlap_of_nothing_and_of_what_does_not_fit():
    layout = sf.Layout.of({"a": (5,)})
    empty = sf.SparseDelta(sf.Support.from_indices(layout, {}), torch.zeros(0))
    found = sf.overlap([empty, empty])
    assert found.both.tolist() == [[0, 0], [0, 0]]
    assert found.jaccard.tolist() == found.share.tolist() == [[0, 0], [0, 0]]
    assert found.cosine.tolist() == [[0, 0], [0, 0]]
    assert sf.overlap(empty).nnz.tolist() == [0]
    with pytest.raises(ValueError, match="overlap: no deltas given"):
        sf.overlap([])
    with pytest.raises(TypeError, match=r"overlap: deltas\[0\] must be a SparseDelta, got int"):
        sf.overlap([1])
    other = sf.SparseDelta(sf.Support.from_indices(sf.Layout.of({"a": (6,)}), {}), torch.zeros(0))
    with pytest.raises(sf.SFTError, match=r"'a' has shape \(5,\)"):
        sf.overlap([empty, other])
