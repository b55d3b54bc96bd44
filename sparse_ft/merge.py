"""merge: several sparse fine-tunings as one, without building anything dense.

A rule is one decorated function. What it needs to know of an entry (how many fine-tunings have it,
the sums of their positive and negative terms, the largest) comes from one pass of the op `reduce`;
rules that drop entries first thin the fine-tunings out, each by itself.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft_kernels import TILE, Reduction, select_topk
from sparse_ft_kernels import merge as merge_entries
from sparse_ft_kernels import reduce as reduce_entries
from sparse_ft_kernels.reference import mix, shift, signed

from .compose import among, canonical_order, given, placed, weighed
from .delta import SFTError, SparseDelta
from .families import known_names
from .tiles import Layout, Support

__all__ = ["RULES", "Rule", "Terms", "merge", "rule"]

# idx, ptr and fp32 values of the result.
Entries = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Terms:
    """What a rule merges: deltas φ over the tensors of all, each with its weight α.

    They are in canonical order: by content id, then by weight. For a rule that is `ordered` they
    are in the order given.

    Args:
        lengths: int32 [tiles], elements of each tile.
        idx: uint16 [nnz] of each delta.
        ptr: int64 [tiles + 1] of each.
        val: fp32, bf16 or fp16 [nnz] of each.
        alphas: Weight of each.
        supports: The entries of each over its own tensors alone, in the same order.
        ids: Content id of each.
        origins: Where the entries of each stand in the delta itself, as `_keys` gives it; None
            where that is what `supports` says.
    """

    lengths: Tensor
    idx: Sequence[Tensor]
    ptr: Sequence[Tensor]
    val: Sequence[Tensor]
    alphas: Sequence[float]
    supports: Sequence[Support]
    ids: Sequence[str]
    origins: Sequence[Tensor | None]

    def sum(self) -> Entries:
        """Σ αφ on the union."""
        return merge_entries(self.lengths, self.idx, self.ptr, self.val, self.alphas)

    def reduce(self) -> Reduction:
        """Sums, counts and largest values on the union."""
        return reduce_entries(self.lengths, self.idx, self.ptr, self.val, self.alphas)

    def thinned(self, kept: Sequence[Tensor]) -> Terms:
        """Those entries alone at which a mask is true, bool [nnz] for each delta."""
        thin = [_where(i, p, k) for i, p, k in zip(self.idx, self.ptr, kept, strict=True)]
        return replace(
            self,
            idx=[idx for idx, _ in thin],
            ptr=[ptr for _, ptr in thin],
            val=[v[k] for v, k in zip(self.val, kept, strict=True)],
        )


@dataclass(frozen=True)
class Rule:
    """A way of merging.

    Args:
        function: Terms and options (keyword arguments) → entries.
        ordered: It depends on the order in which the deltas are given.
    """

    function: Callable[..., Entries]
    ordered: bool = False

    def options(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """All options with their values.

        Raises:
            ValueError: One is unknown, or missing.
        """
        parameters = inspect.signature(self.function).parameters.values()
        known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        for option in given:
            if option not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise ValueError(f"merge: rule {name!r} has no option {option!r}; {has}")
        for option, default in known.items():
            if default is inspect.Parameter.empty and option not in given:
                raise ValueError(f"merge: rule {name!r} needs {option}=")
        return {**known, **given}


RULES: dict[str, Rule] = {}


def rule(
    name: str, *, ordered: bool = False
) -> Callable[[Callable[..., Entries]], Callable[..., Entries]]:
    """Registers a merging rule under a name; its keyword-only arguments are its options."""

    def register(function: Callable[..., Entries]) -> Callable[..., Entries]:
        RULES[name] = Rule(function, ordered)
        return function

    return register


# --- rules that keep every entry ------------------------------------------------------------------


@rule("sum")
def total(terms: Terms) -> Entries:
    """Σ αφ: what composing all of them adds (LT-SFT §3.3; task arithmetic, Ilharco et al.,
    2023)."""
    return terms.sum()


@rule("mean")
def mean(terms: Terms) -> Entries:
    """Σ αφ / n, n deltas: an entry that a delta lacks counts as 0 (model soups, Wortsman et al.,
    2022)."""
    idx, ptr, val = terms.sum()
    # By a tensor: CUDA would multiply by the reciprocal of a number.
    return idx, ptr, val / val.new_tensor(len(terms.idx))


@rule("mean_present")
def mean_present(terms: Terms) -> Entries:
    """Σ αφ / the number of deltas that have the entry: averages on overlaps only, as the stitching
    of Localize-and-Stitch does (He et al., 2024)."""
    found = terms.reduce()
    return found.idx, found.ptr, found.total / found.n_present


@rule("magmax")
def magmax(terms: Terms) -> Entries:
    """The αφ of largest magnitude; of x and −x the positive one (MagMax, Marczak et al., 2024)."""
    found = terms.reduce()
    return found.idx, found.ptr, found.largest


@rule("priority", ordered=True)
def priority(terms: Terms) -> Entries:
    """αφ of the first delta given that has the entry."""
    idx, ptr, val = terms.sum()
    union = _keys(idx, ptr)
    for i, p, v, alpha in reversed(_columns(terms)):
        # + 0 turns −0 into +0, as in a sum that starts from +0.
        val[torch.searchsorted(union, _keys(i, p))] = v.to(torch.float32) * alpha + 0.0
    return idx, ptr, val


# --- rules that settle conflicts ------------------------------------------------------------------


@rule("disjoint")
def disjoint(terms: Terms) -> Entries:
    """αφ of the entries that exactly one delta has; what several have is dropped."""
    found = terms.reduce()
    return _kept(found.idx, found.ptr, found.total, found.n_present == 1)


@rule("ties")
def ties(
    terms: Terms,
    *,
    density: float = 1.0,
    elect: str = "sum",
    divisor: str = "count",
    scale: float = 1.0,
) -> Entries:
    """TIES (Yadav et al., 2023): trim, elect a sign, average the terms that have it.

    Of each delta round(density·nnz) entries of largest |φ| stay, over all tensors together. With
    x = αφ, s the elected sign and A the deltas with sign(x) = s: scale · Σ_A x / divisor. Where no
    sign wins the entry is dropped; where every x is 0 it stays, as 0.

    Args:
        terms: The deltas.
        density: Share of each delta's own entries that stays, in (0, 1]; 1: no trimming, because a
            sparse fine-tuning is trimmed already.
        elect: The sign is that of "sum": Σ αφ (the paper, with weights); "unweighted":
            Σ sign(α)·φ; "count": the more frequent one.
        divisor: "count": |A| (the paper); "weight": Σ_A |α|; "none": 1.
        scale: λ, any finite number.
    """
    _number("ties", "density", density, 0.0, 1.0, open_low=True)
    _check_election("ties", elect, divisor, scale)
    if density < 1:
        terms = terms.thinned([_largest(val, density) for val in terms.val])
    return _elected(terms, elect, divisor, scale)


@rule("consensus")
def consensus(terms: Terms, *, k: int = 2, threshold: float = 1.0) -> Entries:
    """Consensus merging (Wang et al., 2024): of Φ = Σ αφ the entries that at least k deltas want.

    Delta t wants an entry that it has where |φ_t| ≥ threshold · |Φ − φ_t| (its TALL mask), φ_t with
    the sign of its weight: where the merged value is nearer to its own than 0 is.

    Args:
        terms: The deltas.
        k: 1 … the number of deltas. The paper has 2, which drops what is of use to one alone: of
            deltas with disjoint supports, everything.
        threshold: λ ≥ 0; smaller keeps more.
    """
    if type(k) is not int or not 1 <= k <= len(terms.idx):
        raise ValueError(
            f"merge: rule 'consensus': k must be an integer from 1 to {len(terms.idx)}, the number "
            f"of deltas, got {k!r}"
        )
    _number("consensus", "threshold", threshold, 0.0)
    idx, ptr, val = terms.sum()
    union = _keys(idx, ptr)
    votes = torch.zeros(len(val), dtype=torch.int32, device=val.device)
    for i, p, v, alpha in _columns(terms):
        at = torch.searchsorted(union, _keys(i, p))
        own = v.to(torch.float32) * _sign(alpha)
        votes[at] += own.abs() >= (val[at] - own).abs() * threshold
    return _kept(idx, ptr, val, votes >= k)


# --- rules that thin each delta out ---------------------------------------------------------------


@rule("dare")
def dare(terms: Terms, *, p: float, seed: int = 0) -> Entries:
    """DARE (Yu et al., 2024): Σ αφ/(1 − p) over entries that are dropped with probability p each.

    The draw of an entry depends on the seed, the delta's content id and the entry's position in the
    delta alone: the same on every machine, in any order and company.

    Args:
        terms: The deltas.
        p: In [0, 1); of a delta's own entries, not of the model's.
        seed: 0 … 2^63 − 1.
    """
    _number("dare", "p", p, 0.0, 1.0, open_high=True)
    _check_seed("dare", seed)
    kept = [_uniform(terms, j, seed) >= p for j in range(len(terms.idx))]
    alphas = [alpha / (1 - p) for alpha in terms.alphas]
    return replace(terms, alphas=alphas).thinned(kept).sum()


@rule("della")
def della(
    terms: Terms,
    *,
    p: float,
    epsilon: float,
    seed: int = 0,
    scope: str = "row",
    elect: str = "sum",
    divisor: str = "none",
    scale: float = 1.0,
) -> Entries:
    """DELLA (Deep et al., 2024): MagPrune, then an elected sign as in TIES.

    Of the n entries that a delta has in a row, the one of rank r (0: largest |φ|) is dropped with
    probability p_r = p + ε((r + ½)/n − ½), and else becomes φ/(1 − p_r). The half makes their mean
    p; the paper's r/n lies ε/2n below. Draws are those of "dare".

    Args:
        terms: The deltas.
        p: Mean probability of being dropped, in [0, 1).
        epsilon: ε ≥ 0, with 0 ≤ p − ε/2 and p + ε/2 ≤ 1.
        seed: 0 … 2^63 − 1.
        scope: What is ranked: "row" (the last dimension; of a vector, all) or "tensor".
        elect: As in "ties".
        divisor: As in "ties"; "none" is the sum of the agreeing terms.
        scale: As in "ties".
    """
    _number("della", "p", p, 0.0, 1.0, open_high=True)
    _number("della", "epsilon", epsilon, 0.0, round(2 * min(p, 1 - p), 12))
    _check_seed("della", seed)
    _one_of("della", "scope", scope, ("row", "tensor"))
    _check_election("della", elect, divisor, scale)
    kept, val = [], []
    for j, v in enumerate(terms.val):
        rank, n = _ranks(terms.supports[j], v, scope)
        drop = ((rank + 0.5) / n - 0.5) * epsilon + p
        kept.append(_uniform(terms, j, seed) >= drop)
        val.append(v.to(torch.float32) / (1 - drop).to(torch.float32))
    return _elected(replace(terms, val=val).thinned(kept), elect, divisor, scale)


@rule("breadcrumbs")
def breadcrumbs(terms: Terms, *, beta: float, gamma: float) -> Entries:
    """Model Breadcrumbs (Davari and Belilovsky, 2024): Σ αφ without the extremes of each tensor.

    Of the n entries that a delta has in a tensor, the ⌊γn⌋ of largest and the ⌊βn⌋ of smallest |φ|
    are dropped; where that is 0, none.

    Args:
        terms: The deltas.
        beta: β, share of the smallest, in [0, 1).
        gamma: γ, share of the largest, in [0, 1); β + γ < 1. The paper's are shares of all entries
            of a layer, these of the entries that a delta has.
    """
    _number("breadcrumbs", "beta", beta, 0.0, 1.0, open_high=True)
    _number("breadcrumbs", "gamma", gamma, 0.0, 1.0, open_high=True)
    if beta + gamma >= 1:
        raise ValueError(
            f"merge: rule 'breadcrumbs': beta + gamma must be below 1, got {beta:g} + {gamma:g}"
        )
    kept = []
    for support, val in zip(terms.supports, terms.val, strict=True):
        rank, n = _ranks(support, val, "tensor")
        # Shares are decimals: 0.29 · 100 is 29, whatever binary makes of it.
        largest, smallest = ((n * share + 1e-9).floor() for share in (gamma, beta))
        kept.append((rank >= largest) & (rank < n - smallest))
    return terms.thinned(kept).sum()


# --- what rules share -----------------------------------------------------------------------------


def _check_election(name: str, elect: Any, divisor: Any, scale: Any) -> None:
    _one_of(name, "elect", elect, ("sum", "unweighted", "count"))
    _one_of(name, "divisor", divisor, ("count", "weight", "none"))
    _number(name, "scale", scale)


def _elected(terms: Terms, elect: str, divisor: str, scale: float) -> Entries:
    """The terms that have the elected sign, added and divided."""
    found = terms.reduce()
    if elect == "sum":
        lead = found.total
    elif elect == "count":
        lead = found.n_positive - found.n_negative
    else:
        lead = replace(terms, alphas=[_sign(alpha) for alpha in terms.alphas]).sum()[2]
    up = lead > 0
    val = torch.where(up, found.positive, found.negative)
    if divisor == "count":
        val = val / torch.where(up, found.n_positive, found.n_negative).clamp(min=1)
    elif divisor == "weight":
        # The terms |α|·sign(x): their sums are those of |α|.
        signs = [(v.to(torch.float32) * alpha).sign() for *_, v, alpha in _columns(terms)]
        shares = replace(terms, val=signs, alphas=[abs(alpha) for alpha in terms.alphas]).reduce()
        weight = torch.where(up, shares.positive, -shares.negative)
        val = val / torch.where(weight > 0, weight, 1.0)
    silent = (found.n_positive == 0) & (found.n_negative == 0)
    return _kept(found.idx, found.ptr, val * scale, (lead != 0) | silent)


def _columns(terms: Terms) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """idx, ptr, val and weight of one delta after the other."""
    return list(zip(terms.idx, terms.ptr, terms.val, terms.alphas, strict=True))


def _sign(alpha: float) -> float:
    return math.copysign(1.0, alpha) if alpha else 0.0


def _where(idx: Tensor, ptr: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """idx and ptr of the entries at which a mask is true."""
    before = torch.zeros(len(kept) + 1, dtype=torch.int64, device=kept.device)
    torch.cumsum(kept, 0, out=before[1:])
    # torch indexes no uint16.
    return idx.view(torch.int16)[kept].view(torch.uint16), before[ptr]


def _kept(idx: Tensor, ptr: Tensor, val: Tensor, kept: Tensor) -> Entries:
    # What is beyond fp32 stays, and is refused in the end.
    kept = kept | ~val.isfinite()
    if bool(kept.all()):
        return idx, ptr, val
    return *_where(idx, ptr, kept), val[kept]


def _keys(idx: Tensor, ptr: Tensor) -> Tensor:
    """Ascending numbers of entries: tile · 65,536 + offset (int64 [nnz])."""
    base = torch.arange(len(ptr) - 1, device=idx.device) * TILE
    return idx.to(torch.int64) + torch.repeat_interleave(base, ptr.diff())


def _largest(val: Tensor, density: float) -> Tensor:
    """The mask of the share of values of largest magnitude, among equals the first ones."""
    k = min(len(val), max(1, round(density * len(val))))
    idx, ptr, _ = select_topk([val], k=k)
    kept = torch.zeros(len(val), dtype=torch.bool, device=val.device)
    kept[_keys(idx, ptr)] = True
    return kept


def _ranks(support: Support, val: Tensor, scope: str) -> tuple[Tensor, Tensor]:
    """The rank of each |value| among those of its row or tensor, and how many those are.

    Returns:
        Two fp64 [nnz]; rank 0 is the largest, among equals the one at the lowest position.
    """
    ranks = [torch.zeros(0, dtype=torch.float64, device=val.device)]
    sizes = ranks.copy()
    for name, shape, numel in zip(
        support.layout.names, support.layout.shapes, support.layout.numels, strict=True
    ):
        magnitude = val[support.entries_of(name)].to(torch.float32).abs()
        if not len(magnitude):
            continue
        width = shape[-1] if scope == "row" and len(shape) > 1 else numel
        row = support.indices(name) // width
        order = torch.sort(magnitude, descending=True, stable=True).indices
        # By row, which ascends already, so that each row keeps its place.
        order = order[torch.sort(row[order], stable=True).indices]
        n = row.unique_consecutive(return_counts=True)[1]
        first = torch.repeat_interleave(n.cumsum(0) - n, n)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=val.device) - first
        ranks.append(rank.double())
        sizes.append(torch.repeat_interleave(n, n).double())
    return torch.cat(ranks), torch.cat(sizes)


def _uniform(terms: Terms, j: int, seed: int) -> Tensor:
    """One number in [0, 1) for each entry of a delta (fp64 [nnz]): the first 53 bits of
    mix(seed·c₁ + id + (position + 1)·c₂) mod 2^64, SplitMix64 (Steele, Lea and Flood, 2014) with
    the counter at the entry's position in the delta; id is the first 64 bits of the content id.
    """
    support, origin = terms.supports[j], terms.origins[j]
    start = signed(seed * 0xD1342543DE82EF95 + int(terms.ids[j][:16], 16))
    position = (_keys(support.idx, support.ptr) if origin is None else origin) + 1
    return shift(mix(position * signed(0x9E3779B97F4A7C15) + start), 11).double() * 2.0**-53


def _number(
    name: str,
    option: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Refuses what is no finite number of a range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    number = number and abs(value) <= sys.float_info.max
    above = number and (value > low if open_low else value >= low)
    if not (above and (value < high if open_high else value <= high) and math.isfinite(value)):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(
            f"merge: rule {name!r}: {option} must be a finite number in {interval}, got {value!r}"
        )


def _one_of(name: str, option: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(
            f"merge: rule {name!r}: {option} must be one of {', '.join(known)}, got {value!r}"
        )


def _check_seed(name: str, seed: Any) -> None:
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise ValueError(
            f"merge: rule {name!r}: seed must be an integer from 0 to 2^63 - 1, got {seed!r}"
        )


# --- the front door -------------------------------------------------------------------------------


@torch.no_grad()
def merge(
    deltas: Iterable[SparseDelta],
    weights: Sequence[float] | None = None,
    *,
    rule: str = "sum",
    heads: SparseDelta | None = None,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    **options: Any,
) -> SparseDelta:
    """Merges sparse fine-tunings of one base model into one.

    Applying the result gives the bits of composing the deltas (rule "sum"). The order of the list
    does not matter, but for rule "priority".

    Args:
        deltas: At least one.
        weights: One finite α for each; default 1.
        rule: On the union of the supports, with x = αφ:
            "sum": Σ x; "mean": Σ x / n; "mean_present": Σ x / those that have the entry;
            "magmax": the largest |x|; "priority": the first delta given that has the entry;
            "disjoint": entries of one delta alone; "ties", "consensus", "dare", "della",
            "breadcrumbs": the published methods. docs/merging.md has the formulas.
        heads: The delta, of those given, whose heads the result keeps; default: none.
        base: The base model, or its tensors by name: the deltas are recognised as its own, and the
            result gets the digest by which `compose` recognises it. Without it the result carries
            none, since the digests of the deltas do not tell that of their union.
        **options: Options of the rule, such as density=0.5 for "ties" or p=0.9, seed=1 for "dare".

    Returns:
        A `SparseDelta` with fp32 values; its recipe lists what it was merged from, and how.

    Raises:
        SFTError: The deltas disagree about a tensor's shape or name, a delta is no difference, or a
            sum is beyond fp32.
        ValueError: No deltas, an unknown rule or option, or a value or weights that do not fit.
    """
    chosen = some("merge", deltas)
    if rule not in RULES:
        raise ValueError(f"merge: unknown rule {rule!r}; there are {', '.join(sorted(RULES))}")
    options = RULES[rule].options(rule, options)
    chosen, alphas = weighed("merge", chosen, weights)
    if heads is not None:
        among("merge", heads, chosen)
    names = shared_names("merge", chosen)
    union = union_layout("merge", chosen, names)
    common = _common(chosen, names)
    base_values = None if base is None else _base_values(chosen, base)
    order = list(range(len(chosen)))
    if not RULES[rule].ordered:
        order = canonical_order([delta.content_id for delta in chosen], alphas)
    device = chosen[0].device
    own = [renamed(chosen[j], names[j], device) for j in order]
    wide = [support.expand(union) for support, _ in own]
    terms = Terms(
        union.lengths.to(device),
        [support.idx for support in wide],
        [support.ptr for support in wide],
        [val for _, val in own],
        [alphas[j] for j in order],
        [support for support, _ in own],
        [chosen[j].content_id for j in order],
        [_origin(chosen[j], names[j], device) for j in order],
    )
    idx, ptr, val = RULES[rule].function(terms, **options)
    # A sum from +0 has no −0; neither has what a rule makes of it.
    val = val + 0.0
    recipe: dict[str, Any] = {"method": f"merge:{rule}"}
    if options:
        recipe["options"] = options
    recipe["merged_from"] = [{"id": chosen[j].content_id, "alpha": alphas[j]} for j in order]
    merged = SparseDelta(
        Support(union, idx, ptr, check=False),
        val,
        heads=dict(heads.heads) if heads is not None else None,
        meta={**common, "recipe": recipe},
    )
    return merged if base_values is None else _with_digest(merged, base_values)


def some(op: str, deltas: SparseDelta | Iterable[SparseDelta]) -> list[SparseDelta]:
    """At least one delta, as a list.

    Raises:
        TypeError: One is something else.
        ValueError: There are none.
    """
    if not (chosen := given(op, deltas)):
        raise ValueError(f"{op}: no deltas given")
    return chosen


def _common(deltas: Sequence[SparseDelta], names: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What the metadata of all deltas say about their base model: its names, not its digest, which
    belongs to one support."""
    bases = [dict(delta.meta.get("base", {})) for delta in deltas]
    base = {
        key: value
        for key, value in bases[0].items()
        if not key.startswith("digest") and all(other.get(key) == value for other in bases)
    }
    aliases: dict[str, set[str]] = {}
    dtypes: dict[str, str] = {}
    for delta, shared in zip(deltas, names, strict=True):
        for name, dtype in delta.meta.get("dtypes", {}).items():
            dtypes[shared[name]] = dtype
        for name, others in delta.meta.get("aliases", {}).items():
            aliases.setdefault(shared[name], set()).update((name, *others))
    return {
        "base": base,
        "aliases": {name: sorted(others - {name}) for name, others in aliases.items()},
        "dtypes": dtypes,
    }


def shared_names(op: str, deltas: Sequence[SparseDelta]) -> list[dict[str, str]]:
    """One name for every tensor that several deltas have: a tied one goes by different names in
    different models, such as a language model and a classifier.

    Args:
        op: Who asks, for messages.
        deltas: The deltas.

    Returns:
        For each delta, its names of tensors → the shared ones: of the names that the deltas use,
        the first that contains "embed", or else the first.

    Raises:
        SFTError: What is one tied tensor in one delta is two tensors in another.
    """
    group: dict[str, set[str]] = {}
    for delta in deltas:
        for name, others in delta.meta.get("aliases", {}).items():
            members = {name, *others}.union(*(group.get(n, ()) for n in (name, *others)))
            for member in members:
                group[member] = members
    used = {name for delta in deltas for name in delta.layout.names}
    shared = {
        name: min(group.get(name, {name}) & used, key=lambda n: ("embed" not in n, n))
        for name in used
    }
    found = []
    for j, delta in enumerate(deltas):
        own = {name: shared[name] for name in delta.layout.names}
        taken: dict[str, str] = {}
        for name, target in own.items():
            if (other := taken.setdefault(target, name)) != name:
                raise SFTError(
                    f"{op}: {other!r} and {name!r} are two tensors in deltas[{j}], and one tied "
                    "tensor in another delta; make them from models that tie them alike"
                )
        found.append(own)
    return found


def renamed(
    delta: SparseDelta, names: Mapping[str, str], device: torch.device
) -> tuple[Support, Tensor]:
    """A delta's entries and values under other names, in their order."""
    if all(name == other for name, other in names.items()):
        return delta.support.to(device), delta.val.to(device)
    shapes = zip(delta.layout.names, delta.layout.shapes, strict=True)
    layout = Layout.of({names[name]: shape for name, shape in shapes})
    idx, ptr, val = placed(delta, names, layout, device)
    return Support(layout, idx, ptr, check=False), val


def _base_values(
    deltas: Sequence[SparseDelta], base: nn.Module | Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The base model's tensors by every name they have, once the deltas are known to be of it."""
    values: Mapping[str, Tensor] = known_names(base) if isinstance(base, nn.Module) else base
    for delta in deltas:
        delta.check_base(_tensors_of(delta, values))
    return values


def _tensors_of(delta: SparseDelta, values: Mapping[str, Tensor]) -> list[Tensor]:
    found = []
    for name, shape in zip(delta.layout.names, delta.layout.shapes, strict=True):
        known = [n for n in (name, *delta.meta.get("aliases", {}).get(name, ())) if n in values]
        if not known:
            raise SFTError(f"merge: base has no tensor {name!r}, which a delta has")
        tensor = values[known[0]]
        if tuple(tensor.shape) != shape:
            raise SFTError(
                f"merge: {known[0]!r} has shape {tuple(tensor.shape)} in base and {shape} in a "
                "delta"
            )
        found.append(tensor)
    return found


def _with_digest(delta: SparseDelta, values: Mapping[str, Tensor]) -> SparseDelta:
    tensors = _tensors_of(delta, values)
    pieces, dtypes = {}, {}
    for name, tensor in zip(delta.layout.names, tensors, strict=True):
        at = delta.indices(name).to(tensor.device)
        pieces[name] = tensor.detach().reshape(-1)[at].cpu()
        dtypes[name] = tensor.dtype
    return SparseDelta.from_compact(
        delta.support,
        delta.val,
        heads=delta.heads,
        base=pieces,
        base_dtypes=dtypes,
        meta=delta.meta,
    )


def _origin(delta: SparseDelta, names: Mapping[str, str], device: torch.device) -> Tensor | None:
    if all(name == other for name, other in names.items()):
        return None
    keys = _keys(delta.support.idx, delta.support.ptr)
    order = sorted(names, key=names.__getitem__)
    return torch.cat([keys[delta.support.entries_of(name)] for name in order]).to(device)


def union_layout(
    op: str, deltas: Sequence[SparseDelta], names: Sequence[Mapping[str, str]]
) -> Layout:
    """The tensors of all deltas together, under their shared names.

    Raises:
        SFTError: Two of them disagree about a shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for j, delta in enumerate(deltas):
        for own, shape in zip(delta.layout.names, delta.layout.shapes, strict=True):
            name = names[j][own]
            if shapes.setdefault(name, shape) != shape:
                raise SFTError(
                    f"{op}: {name!r} has shape {shapes[name]} in an earlier delta and {shape} in "
                    f"deltas[{j}]; they belong to different base models"
                )
    return Layout.of(shapes)
