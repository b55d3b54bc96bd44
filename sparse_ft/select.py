"""select: which K of a model's entries a sparse fine-tuning may change."""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_ft_kernels import NonFiniteError, merge

from .criteria import Candidates, Criterion, as_criterion, embedding_names, fitted
from .delta import SparseDelta
from .families import backbone_names, check_usable, known_names, named_parameters
from .snapshot import starting_values
from .tiles import Layout, Support

__all__ = ["Budgets", "Eligible", "Entries", "eligible_parameters", "resolve_k", "select"]

Eligible = Callable[[str, nn.Parameter], bool] | Collection[str] | None
Entries = Support | SparseDelta | Iterable[Support | SparseDelta] | None
Budgets = str | Callable[[str], str] | Mapping[str, int | float] | None
_T = TypeVar("_T", bound=Tensor)
# Of the entries selected, the share that may tie at the threshold without a word.
_TIED = 0.05


def eligible_parameters(model: nn.Module, eligible: Eligible = None) -> dict[str, nn.Parameter]:
    """The parameters among which entries may be selected, in canonical order.

    Args:
        model: Any module.
        eligible: A callable `(name, parameter) -> bool` or a set of names; default: the trainable
            parameters of the backbone.

    Raises:
        ValueError: A name is unknown, or nothing is eligible.
    """
    parameters = named_parameters(model)
    if not parameters:
        raise ValueError(f"the model {type(model).__name__} has no parameters")
    if eligible is not None:
        return _chosen(type(model).__name__, parameters, eligible)
    inside = backbone_names(model)
    trainable = {n: p for n, p in sorted(parameters.items()) if n in inside and p.requires_grad}
    if not trainable:
        raise ValueError(
            f"no parameter of the backbone of {type(model).__name__} is trainable, so none is "
            "eligible; "
            "set requires_grad on some, or name them with eligible="
        )
    return trainable


def _chosen(
    what: str,
    tensors: Mapping[str, _T],
    eligible: Callable[[str, _T], bool] | Collection[str],
) -> dict[str, _T]:
    """The tensors that a rule or a set of names lets through, in canonical order."""
    if callable(eligible):
        chosen = {n for n, t in tensors.items() if eligible(n, t)}
    else:
        chosen = {eligible} if isinstance(eligible, str) else set(eligible)
        if unknown := sorted(chosen - tensors.keys()):
            raise ValueError(
                f"eligible: the {what} has no parameter {unknown[0]!r}"
                + (f" (and {len(unknown) - 1} more unknown names)" if len(unknown) > 1 else "")
            )
    if not chosen:
        raise ValueError("eligible: no parameter is eligible; widen the rule")
    return {name: tensors[name] for name in sorted(chosen)}


def resolve_k(k: int | None, density: float | None, numel: int) -> int:
    """Entries to select: a count, or a share of `numel` (rounded down, at least 1).

    Raises:
        ValueError: Both or neither are given, or the one given is out of range.
    """
    if numel < 1:
        raise ValueError("there is no entry to select: none is eligible, or exclude has them all")
    if (k is None) == (density is None):
        raise ValueError("give either k (a count) or density (a share), not both or neither")
    if k is not None:
        try:
            k = operator.index(None if isinstance(k, bool) else k)  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(f"k must be an integer, got {k!r}") from None
        if not 1 <= k <= numel:
            raise ValueError(f"k must be between 1 and the {numel} eligible entries, got {k}")
        return k
    assert density is not None
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise ValueError(f"density must be a number in (0, 1], got {density!r}")
    if not (0.0 < density <= 1.0):
        hint = f" ({density:g} % is {density / 100:g})" if 1.0 < density <= 100 else ""
        raise ValueError(f"density must be in (0, 1], got {density}{hint}")
    return max(1, math.floor(density * numel))


@torch.no_grad()
def select(
    model: nn.Module | Mapping[str, Tensor],
    theta0: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    *,
    k: int | None = None,
    density: float | None = None,
    criterion: str | Criterion | Callable[[str, Tensor, Tensor | None], Tensor] = "magnitude",
    eligible: Eligible = None,
    include: Entries = None,
    exclude: Entries = None,
    budgets: Budgets = None,
    seed: int = 0,
    tie: str = "index",
    fill: bool = False,
) -> Support:
    """Selects the K entries of a model that rank highest, over all eligible parameters at once.

    Of scores it holds only the candidates for the K largest: by magnitude about 8 bytes for each of
    the K (60 MB for 7.7 million) beside the model and θ0, which may stay on disk.

    Args:
        model: A module, or a mapping from names to tensors (all of which are then eligible): the
            values now. Give fp32 values where an fp32 master exists: differences of bf16 weights
            are mostly tied.
        theta0: The values at the start: a `Snapshot`, other tensors by name, or the path of a
            checkpoint, which is read tensor by tensor.
        k: Entries to select.
        density: Their share of the eligible entries that `exclude` leaves instead, in (0, 1].
        criterion: "magnitude" (largest |θ1 − θ0|), "denoised", "random", "weight", "bias", one of
            `sparse_ft.criteria`, or a function `(name, now, start) -> scores` whose largest
            |scores| are taken; scores have the tensor's shape.
        eligible: `(name, parameter) -> bool`, or names; default: the trainable parameters of the
            backbone.
        include: A support or an SFT, or several, whose entries are selected in any case; they
            count towards K.
        exclude: A support or an SFT, or several, whose entries must not be selected (later rounds
            of iterative LT-SFT; disjoint tasks). Those of other tensors do not matter. Names are
            matched as `SparseDelta.bind` does, with the prefix of a backbone before them or not.
        budgets: Selects within groups of parameters. A mapping gives each group its K (an integer)
            or density (a float), by patterns of `fnmatch` of which the first that fits counts;
            what `k` or `density` leave is for the parameters that none fits, and without these two
            each must fit one. "per_parameter", or a function from names to groups, shares K out by
            the sizes of the groups.
        seed: For "random".
        tie: "index" selects exactly K, the first by (name, position) among equals; "all" selects
            every entry that reaches the threshold, as the LT-SFT reference implementation does.
        fill: Where fewer than K entries have a score other than 0 (did move), fill up in order of
            (name, position) instead of failing. With tie="index".

    Returns:
        The support, over the eligible parameters. Its `info` holds threshold and ties, by group if
        there are several, and what the criterion has to tell.

    Raises:
        ValueError: Unusable parameters, k or density out of range, fewer than K entries that moved,
            NaN or infinity (with the parameter's name), a start that does not fit, or `include`,
            `exclude` and `budgets` that contradict each other.
    """
    if isinstance(model, Mapping):
        tensors: dict[str, Tensor] = {name: model[name] for name in sorted(model)}
        if not tensors:
            raise ValueError("select: the mapping holds no tensors")
        if eligible is not None:
            rule: Any = eligible
            tensors = _chosen("mapping", tensors, rule)
        embeddings = frozenset(name for name in tensors if "embed" in name)
    else:
        tensors = dict(eligible_parameters(model, eligible))
        embeddings = embedding_names(model)
    check_usable("select", iter(tensors.items()))
    layout = Layout.of(tensors)
    current = {name: tensors[name].detach() for name in layout.names}
    devices = sorted({str(t.device) for t in current.values()})
    if len(devices) > 1:
        raise ValueError(
            f"select: the parameters lie on {', '.join(devices)}; selection ranks them together, "
            "so move them to one "
            "device, or name those of one device with eligible="
        )
    if tie not in ("index", "all"):
        raise ValueError(f'select: tie must be "index" or "all", got {tie!r}')
    if fill and tie == "all":
        raise ValueError(
            'select: fill=True fills up among entries that all tie at 0, and tie="all" would take '
            'every one; use tie="index"'
        )
    device = next(iter(current.values())).device
    start = None if theta0 is None else _checked(starting_values("select", theta0), current)
    how = as_criterion(criterion)

    known = _canonical_names(model)
    kept = _union(layout, _supports("include", include, layout, known), device)
    out = _union(layout, _supports("exclude", exclude, layout, known), device)
    both = _union(layout, [kept, out], device)
    if both.nnz < kept.nnz + out.nnz:
        found, a, b = both.counts(), kept.counts(), out.counts()
        name = next(n for n in layout.names if found[n] < a[n] + b[n])
        raise ValueError(
            f"select: {kept.nnz + out.nnz - both.nnz} entries are in include and in exclude as "
            f"well, of {name!r} for one; take them out of one of the two"
        )
    if how.fixed is not None:
        if budgets is not None:
            raise ValueError(f'select: criterion "{how.name}" fixes its entries; drop budgets')
        taken = _without(how.fixed(layout).to(device), out)
        support = _union(layout, [taken, kept], device)
        _check_count(how.name, support.nnz, k, density, layout.numel - out.nnz)
        return support

    groups = _grouped(layout, out, k, density, budgets)
    parts = [kept]
    told: dict[str, Any] = {}
    for i, (label, names, count) in enumerate(groups):
        inside = kept.restrict(names).nnz
        if inside > count:
            raise ValueError(
                f"select: include has {inside} entries{_of(label)}, more than the {count} to select"
            )
        if inside == count:
            continue
        skip = both.restrict(names)
        candidates = Candidates(
            names=names,
            current=[current[name] for name in names],
            start=None if start is None else [start[name] for name in names],
            k=count - inside,
            exclude=(skip.idx, skip.ptr) if skip.nnz else None,
            seed=seed,
            tie=tie,
            embeddings=embeddings,
            group=i,
            eligible=layout.names,
        )
        part, info = _choose(how, candidates, label, fill)
        parts.append(part)
        for key, value in info.items():
            if isinstance(value, dict):
                told[key] = {**told.get(key, {}), **value}
            elif label is None:
                told[key] = value
            else:
                told.setdefault("groups", {}).setdefault(label, {"k": count})[key] = value
    support = _union(layout, parts, device)
    support.info = told
    return support


def _check_count(name: str, count: int, k: int | None, density: float | None, numel: int) -> None:
    """K, if it was given, must be the number of entries that a criterion fixes."""
    if not count:
        raise ValueError(f'select: criterion "{name}" leaves no entry to select')
    if (k is None and density is None) or (wanted := resolve_k(k, density, numel)) == count:
        return
    raise ValueError(
        f'select: criterion "{name}" selects {count} entries, not the {wanted} asked for; drop k '
        "and density"
    )


def _choose(
    how: Criterion, candidates: Candidates, label: str | None, fill: bool
) -> tuple[Support, dict[str, Any]]:
    """What a criterion chooses of one group, and what is to be told of it."""
    names, k = candidates.names, candidates.k
    assert how.choose is not None
    try:
        idx, ptr, info, more = how.choose(candidates)
    except NonFiniteError as error:
        name = names[error.ordinal]
        if candidates.current[error.ordinal].isfinite().all() and (
            candidates.start is None or candidates.start[error.ordinal].isfinite().all()
        ):
            raise ValueError(
                f'select: criterion "{how.name}" gives NaN or infinity for entries of {name!r}, '
                "whose values are finite; such scores cannot be ranked"
            ) from error
        raise ValueError(
            f"select: parameter {name!r} holds NaN or infinity, so its entries cannot be ranked; "
            "the training has diverged there, or exclude it with eligible="
        ) from error
    layout = Layout.of(dict(zip(names, candidates.current, strict=True)))
    support = Support(layout, idx, ptr, check=False)
    if info is None:
        return support, more
    threshold = float(info[:1].to(torch.int32).view(torch.float32))
    above, tied, tied_selected = info[2:5].tolist()
    if threshold == 0.0 and not fill:
        what = "moved" if how.needs_training else "have a score other than 0"
        lower = f"lower k by {k - above}, " if above else ""
        raise ValueError(
            f"select: only {above} of the {k} entries wanted{_of(label)} {what}. Train longer, "
            f"{lower}give fp32 values where the weights are in half precision, or pass fill=True "
            "to fill up in order of (name, position)"
        )
    coarse = sorted({str(t.dtype)[6:] for t in candidates.current if t.dtype != torch.float32})
    if coarse and tied > tied_selected > _TIED * k and threshold > 0.0:
        warnings.warn(
            f"select: {tied_selected} of the {k} entries{_of(label)} tie at the threshold with "
            f"{tied - tied_selected} others, and were chosen by position: differences of "
            f"{' and '.join(coarse)} weights are coarse. Give fp32 values where a master exists.",
            stacklevel=4,  # the caller of select, beyond torch.no_grad's wrapper
        )
    told = {"threshold": threshold, "above": above, "tied": tied, "tied_selected": tied_selected}
    return support, {**told, **more}


def _of(label: str | None) -> str:
    return "" if label is None else f" of the budget {label!r}"


def _checked(theta0: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The start, after a look at all of it."""
    for name, now in current.items():
        if name not in theta0:
            raise ValueError(f"select: theta0 has no {name!r}")
        value = theta0[name]
        check_usable("select: theta0", iter([(name, value)]))
        if value.shape != now.shape:
            raise ValueError(
                f"select: {name!r} has shape {tuple(now.shape)} in the model and "
                f"{tuple(value.shape)} in theta0"
            )
    return theta0


# --- supports ---------------------------------------------------------------------------------


def _canonical_names(model: nn.Module | Mapping[str, Tensor]) -> dict[str, str]:
    """The names that `named_parameters` gives to parameters, by all that a file may have."""
    if not isinstance(model, nn.Module):
        return {}
    own = {id(p): name for name, p in named_parameters(model).items()}
    return {name: own[id(p)] for name, p in known_names(model).items()}


def _supports(
    what: str, entries: Entries, layout: Layout, known: Mapping[str, str]
) -> list[Support]:
    """What include or exclude was given, over the eligible tensors."""
    given = [entries] if isinstance(entries, Support | SparseDelta) else [*(entries or ())]
    found = []
    for item in given:
        if not isinstance(item, Support | SparseDelta):
            raise TypeError(
                f"select: {what} must be a Support or a SparseDelta, or several, got "
                f"{type(item).__name__}"
            )
        support = _renamed(item if isinstance(item, Support) else item.support, known)
        if what == "exclude":
            inside = support.restrict(n for n in support.layout.names if n in layout)
            if support.nnz and not inside.nnz:
                _check_other_names(support, layout, known)
            support = inside
        found.append(fitted(what, support, layout))
    return found


def _renamed(support: Support, known: Mapping[str, str]) -> Support:
    """The same entries under the names of a model."""
    names = {name: known.get(name, name) for name in support.layout.names}
    if all(name == own for name, own in names.items()) or len({*names.values()}) < len(names):
        return support
    shapes = dict(zip(names.values(), support.layout.shapes, strict=True))
    entries = {own: support.indices(name) for name, own in names.items()}
    return Support.from_indices(Layout.of(shapes), entries)


def _check_other_names(support: Support, layout: Layout, known: Mapping[str, str]) -> None:
    """Refuses what excludes nothing, if that is for the prefix of its names alone."""
    for name, count in support.counts().items():
        if not count or name in known:
            continue
        for own in layout.names:
            if own.endswith(f".{name}") or name.endswith(f".{own}"):
                raise ValueError(
                    f"select: exclude: it has entries of {name!r}, but of the eligible tensors "
                    f"the nearest is {own!r}; give both the same names, or leave it out if it is "
                    "of another model"
                )


def _union(layout: Layout, supports: Sequence[Support], device: torch.device) -> Support:
    """The entries of any of several supports, over a wider layout."""
    wide = [s.to(device).expand(layout) for s in supports if s.nnz]
    if len(wide) == 1:
        return wide[0]
    if not wide:
        none = torch.zeros(layout.n_tiles + 1, dtype=torch.int64, device=device)
        return Support(layout, torch.zeros(0, dtype=torch.uint16, device=device), none, check=False)
    zeros = [torch.zeros(s.nnz, dtype=torch.bfloat16, device=device) for s in wide]
    idx, ptr, _ = merge(
        layout.lengths.to(device),
        [s.idx for s in wide],
        [s.ptr for s in wide],
        zeros,
        [1.0] * len(wide),
    )
    return Support(layout, idx, ptr, check=False)


def _without(support: Support, other: Support) -> Support:
    """The entries of one support that are not in another of the same layout."""
    if not other.nnz:
        return support
    left = {
        name: at[~torch.isin(at, other.indices(name), assume_unique=True)] for name, at in support
    }
    return Support.from_indices(support.layout, left).to(support.device)


# --- budgets ----------------------------------------------------------------------------------

# A label (None where there are no budgets), the names of its parameters, and its K.
_Group = tuple[str | None, list[str], int]


def _grouped(
    layout: Layout, out: Support, k: int | None, density: float | None, budgets: Budgets
) -> list[_Group]:
    """The groups within which entries are selected."""
    gone = out.counts()
    sizes = {n: size - gone[n] for n, size in zip(layout.names, layout.numels, strict=True)}
    if budgets is None:
        return [(None, [*layout.names], resolve_k(k, density, sum(sizes.values())))]
    if isinstance(budgets, Mapping):
        return _given_budgets(sizes, k, density, budgets)
    if budgets == "per_parameter":
        budgets = str
    if not callable(budgets):
        raise ValueError(
            'select: budgets must be a mapping from patterns to k or density, "per_parameter", or '
            f"a function from names to groups, got {budgets!r}"
        )
    members: dict[str, list[str]] = {}
    for name in layout.names:
        members.setdefault(str(budgets(name)), []).append(name)
    total = resolve_k(k, density, sum(sizes.values()))
    shares = _shared_out(total, [sum(sizes[n] for n in names) for names in members.values()])
    return [
        (label, names, share) for (label, names), share in zip(members.items(), shares, strict=True)
    ]


def _given_budgets(
    sizes: Mapping[str, int],
    k: int | None,
    density: float | None,
    budgets: Mapping[str, int | float],
) -> list[_Group]:
    members: dict[str, list[str]] = {pattern: [] for pattern in budgets}
    rest: list[str] = []
    for name in sizes:
        fits = [p for p in budgets if p == name or fnmatchcase(name, p)]
        (members[fits[0]] if fits else rest).append(name)
    groups: list[_Group] = []
    for pattern, names in members.items():
        if not names:
            raise ValueError(
                f"select: budgets: no eligible parameter is left for {pattern!r}; the first "
                "pattern that fits a name takes it"
            )
        budget, size = budgets[pattern], sum(sizes[name] for name in names)
        try:
            if isinstance(budget, float):
                count = resolve_k(None, budget, size)
            else:
                count = resolve_k(budget, None, size)
        except ValueError as error:
            raise ValueError(f"select: budgets: {pattern!r}: {error}") from None
        groups.append((pattern, names, count))
    spent = sum(count for _, _, count in groups)
    if k is None and density is None:
        if rest:
            raise ValueError(
                f'select: budgets: no pattern fits {rest[0]!r}; add one ("*" fits all), narrow '
                "eligible, or give k or density for all together"
            )
        return groups
    total = resolve_k(k, density, sum(sizes.values()))
    left, room = total - spent, sum(sizes[name] for name in rest)
    if not 0 <= left <= room:
        raise ValueError(
            f"select: budgets: they take {spent} of the {total} entries to select, and the "
            f"{len(rest)} parameters that no pattern fits have {room} for the other {left}"
        )
    return [*groups, ("the rest", rest, left)] if rest else groups


def _shared_out(total: int, sizes: Sequence[int]) -> list[int]:
    """Shares of a total in proportion to sizes: rounded down, and what is left to those that lost
    most, the first among equals."""
    whole = sum(sizes)
    shares = [total * size // whole for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % whole), i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares
