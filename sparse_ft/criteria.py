"""Selection criteria: by what the entries of a model are ranked. One function each, which gives a
`Criterion`; those that need no argument are known by name as well.

Scores are computed tensor by tensor, and of them only the candidates for the K largest are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_ft_kernels import select_random, select_topk

from .delta import SparseDelta
from .denoise import check_options, denoise
from .families import backbone, named_parameters
from .kept import modes_kept, random_state_kept
from .tiles import Layout, Support
from .topk import TopK

__all__ = [
    "CRITERIA",
    "Candidates",
    "Choice",
    "Criterion",
    "as_criterion",
    "bias",
    "by_score",
    "calibrate",
    "criterion",
    "denoised",
    "fisher",
    "given",
    "gradient",
    "magnitude",
    "random",
    "snip",
    "weight",
]

Score = Callable[[str, Tensor, Tensor | None], Tensor]
# idx, ptr, the info vector of select_topk where entries were ranked, and what else is to be told.
Choice = tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]
_F = TypeVar("_F", bound=Callable[..., "Criterion"])


@dataclass(frozen=True)
class Candidates:
    """What a criterion chooses from.

    Args:
        names: Names of the eligible tensors, in canonical order.
        current: Their values now.
        start: Their values at the start, on any device; None where there are none.
        k: Entries to choose.
        exclude: idx and ptr of entries that must not be chosen.
        seed: For criteria that draw at random; `draw_seed` is to be used.
        tie: "index" or "all".
        embeddings: Those of the names that are embeddings.
        group: Number of the group within which a budget selects.
        eligible: Names of all eligible tensors, those of other groups too.
    """

    names: Sequence[str]
    current: Sequence[Tensor]
    start: Sequence[Tensor] | None
    k: int
    exclude: tuple[Tensor, Tensor] | None
    seed: int
    tie: str
    embeddings: frozenset[str] = frozenset()
    group: int = 0
    eligible: Sequence[str] = ()

    def draw_seed(self, own: int | None = None) -> int:
        """A seed of a criterion's own, or the one of the selection, for this group: groups draw
        independently."""
        return (self.seed if own is None else own) + self.group * 0x9E3779B97F4A7C15

    @property
    def device(self) -> torch.device:
        return self.current[0].device

    def beginnings(self, criterion: str) -> Sequence[Tensor]:
        """The values at the start.

        Raises:
            ValueError: There are none.
        """
        if self.start is None:
            raise ValueError(
                f'select: criterion "{criterion}" needs theta0, the values at the start'
            )
        return self.start

    def largest(self, scores: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of largest |score|, of which one tensor's are held at a time."""
        top = TopK(self.k, self.tie, self.exclude, self.device)
        for score in scores:
            top.add(score)
        return top.result()


@dataclass(frozen=True, eq=False)
class Criterion:
    """A way to choose entries.

    Args:
        name: Its name.
        choose: Chooses `candidates.k` of them; None where `fixed` does it.
        needs_training: Does full tuning have to come first?
        settings: What `recipe` says besides the name, as JSON holds it.
        fixed: Which entries of a layout the criterion takes, whatever their values; K is theirs.
    """

    name: str
    choose: Callable[[Candidates], Choice] | None = field(default=None, repr=False)
    needs_training: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    fixed: Callable[[Layout], Support] | None = field(default=None, repr=False)

    def recipe(self) -> dict[str, Any]:
        """What the metadata of an SFT says of it: "criterion", its "method" where that has a name,
        and its settings."""
        return {"criterion": self.name, **self.settings}


CRITERIA: dict[str, Callable[[], Criterion]] = {}


def criterion(factory: _F) -> _F:
    """Makes a criterion that needs no argument known by its name."""
    CRITERIA[factory.__name__] = factory
    return factory


def as_criterion(what: str | Criterion | Score) -> Criterion:
    """The criterion that `select` was given.

    Args:
        what: A name, a criterion, or a function `(name, now, start) -> scores`.

    Raises:
        ValueError: There is none of that name.
        TypeError: It is none of these.
    """
    if isinstance(what, Criterion):
        return what
    if isinstance(what, str):
        if what not in CRITERIA:
            if what in ("gradient", "fisher", "snip"):
                raise ValueError(
                    f"select: criterion {what!r} needs scores: pass criteria.{what}("
                    f"criteria.calibrate(model, batches, loss, kind={what!r}))"
                )
            raise ValueError(
                f"select: unknown criterion {what!r}; there are {', '.join(sorted(CRITERIA))} by "
                "name, or pass one of sparse_ft.criteria, or a function"
            )
        return CRITERIA[what]()
    if not callable(what):
        raise TypeError(
            "select: criterion must be a name, one of sparse_ft.criteria, or a function "
            f"(name, now, start) -> scores, got {type(what).__name__}"
        )
    return by_score("custom", what, method="custom")


def by_score(name: str, score: Score, *, needs_training: bool = True, **settings: Any) -> Criterion:
    """A criterion that takes the entries of largest |score|.

    Args:
        name: Its name.
        score: `(name, now, start) -> scores`, in the shape of the tensor `now`; `start` is None
            where there is no θ0. It is asked for one tensor after another, and reads them: `now` is
            the model's own memory, so it must not write into it.
        needs_training: Does full tuning have to come first?
        **settings: What its recipe says.
    """

    def scores(candidates: Candidates) -> Iterator[Tensor]:
        for i, (name, now) in enumerate(zip(candidates.names, candidates.current, strict=True)):
            found = score(name, now, None if candidates.start is None else candidates.start[i])
            if not isinstance(found, Tensor):
                raise ValueError(
                    f"select: the criterion gave a {type(found).__name__} for {name!r}, not a "
                    "tensor of scores"
                )
            if found.shape != now.shape:
                raise ValueError(
                    f"select: the criterion gave scores of shape {tuple(found.shape)} for "
                    f"{name!r}, which has shape {tuple(now.shape)}"
                )
            yield found

    def choose(candidates: Candidates) -> Choice:
        return (*candidates.largest(scores(candidates)), {})

    return Criterion(name, choose, needs_training, settings)


# --- by how far entries moved -----------------------------------------------------------------


@criterion
def magnitude() -> Criterion:
    """The entries that moved most: the largest |θ1 − θ0| over all tensors (LT-SFT, algorithm 1)."""

    def choose(candidates: Candidates) -> Choice:
        start = candidates.beginnings("magnitude")
        k, tie, exclude = candidates.k, candidates.tie, candidates.exclude
        if _on(candidates.device, start):
            return (*select_topk(candidates.current, start, k=k, exclude=exclude, tie=tie), {})
        # A start that lies elsewhere comes over in pieces.
        top = TopK(k, tie, exclude, candidates.device)
        for now, before in zip(candidates.current, start, strict=True):
            top.add(now, before)
        return (*top.result(), {})

    return Criterion("magnitude", choose, settings={"method": "LT-SFT"})


def _on(device: torch.device, tensors: Sequence[Tensor]) -> bool:
    return all(tensor.device == device for tensor in tensors)


@criterion
def denoised(
    *,
    rank: str | int = "var:0.9",
    energy: str = "sq",
    keep_high: float = 0.05,
    embeddings: bool | str | Iterable[str] = False,
    method: str = "gram",
    seed: int = 0,
) -> Criterion:
    """The largest |ΔŴ|: each matrix θ1 − θ0 denoised by its singular values (DeFT-X, Simon and
    Jyothi, 2025).

    Tensors that are no matrices (biases, norms, convolutions) are ranked by |θ1 − θ0| itself, and
    so are embeddings, unless they are asked for. With `rank="full"` or `keep_high=1` the result is
    that of "magnitude". Defaults are ours: the paper's were not to be had.

    One matrix is held in fp32 at a time, with its lower-order part and an fp64 matrix of the
    smaller side squared. The entries are exactly reproducible on one machine with one number of
    threads; elsewhere, LAPACK's last bits may decide otherwise where scores are nearly equal.

    Args:
        rank: "var:p", the smallest rank that has a share p of the energy; an integer for all
            matrices; or "full".
        energy: "sq" (Σσ², the variance) or "abs" (Σσ).
        keep_high: Share of the entries of each matrix's higher-order part to keep, in [0, 1].
        embeddings: True: denoise embeddings too. False: leave them as they are; they are the
            weights of `nn.Embedding`, and in a mapping of tensors the names with "embed" in them.
            Patterns of `fnmatch` say what counts as an embedding, and is left as it is, instead.
        method: "gram", "svd" or "randomized" (approximate, for an integer rank), as in
            `sparse_ft.denoise`.
        seed: For "randomized".

    Raises:
        ValueError: An option is out of range.
    """
    check_options(rank, energy, keep_high, method)
    patterns = None
    if not isinstance(embeddings, bool):
        patterns = [embeddings] if isinstance(embeddings, str) else [*embeddings]

    def raw(candidates: Candidates, name: str) -> bool:
        if patterns is not None:
            return any(fnmatchcase(name, pattern) for pattern in patterns)
        return name in candidates.embeddings and not embeddings

    def choose(candidates: Candidates) -> Choice:
        start = candidates.beginnings("denoised")
        splits: dict[str, dict[str, Any]] = {}
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in candidates.eligible):
                raise ValueError(
                    f"criteria.denoised: embeddings: no eligible parameter is called {pattern!r}"
                )

        def scores() -> Iterator[Tensor]:
            for i, (name, now) in enumerate(zip(candidates.names, candidates.current, strict=True)):
                delta = now.to(torch.float32) - start[i].to(now.device, torch.float32)
                if delta.dim() == 2 and delta.numel() and not raw(candidates, name):
                    if not bool(torch.stack(delta.aminmax()).isfinite().all()):
                        raise ValueError(
                            f"select: parameter {name!r} holds NaN or infinity, so it cannot be "
                            "denoised; the training has diverged there, or exclude it with "
                            "eligible="
                        )
                    delta, split = denoise(
                        delta,
                        rank=rank,
                        energy=energy,
                        keep_high=keep_high,
                        method=method,
                        seed=seed,
                    )
                    splits[name] = {"rank": split.rank, "of": split.full, "kept": split.kept}
                yield delta

        return (*candidates.largest(scores()), {"denoised": splits})

    settings = {
        "method": "DeFT-X",
        "rank": rank,
        "energy": energy,
        "keep_high": keep_high,
        "embeddings": embeddings if patterns is None else patterns,
        "svd": method,
    }
    if method == "randomized":
        settings |= {"seed": seed, "approximation": True}
    return Criterion("denoised", choose, settings=settings)


# --- without full tuning ----------------------------------------------------------------------


@criterion
def random(seed: int | None = None) -> Criterion:
    """Entries drawn uniformly (RAND-SFT): the same for one seed on every machine. So SFTs that are
    to be composed need seeds of their own, or they share every entry.

    Args:
        seed: Any integer; default: the one that `select` is given.
    """

    def choose(candidates: Candidates) -> Choice:
        at = select_random(
            candidates.current,
            k=candidates.k,
            seed=candidates.draw_seed(seed),
            exclude=candidates.exclude,
        )
        return (*at, None, {})

    settings = {"method": "RAND-SFT"} | ({} if seed is None else {"seed": seed})
    return Criterion("random", choose, needs_training=False, settings=settings)


@criterion
def weight(largest: bool = True) -> Criterion:
    """The largest |θ| (SHiRA's WM), or the smallest (PaFi): no data, no training.

    Args:
        largest: False for the smallest.
    """

    def descending(name: str, now: Tensor, start: Tensor | None) -> Tensor:
        if largest:
            return now
        # From the largest finite number down, bit by bit: the order is exactly the reverse. What is
        # not finite comes out as NaN or infinity.
        bits = now.to(torch.float32).abs().view(torch.int32)
        return (0x7F7FFFFF - bits).view(torch.float32)

    return by_score(
        "weight", descending, needs_training=False, method="weight magnitude", largest=largest
    )


def gradient(scores: Mapping[str, Tensor]) -> Criterion:
    """The largest |Σ g| of a calibration: an approximation of LT-SFT that skips full tuning.

    Args:
        scores: What `calibrate(kind="gradient")` gave: one tensor for each eligible parameter.
    """
    return _calibrated("gradient", "gradient mask", scores)


def fisher(scores: Mapping[str, Tensor]) -> Criterion:
    """The largest diagonal of the empirical Fisher information (FISH mask, Sung et al., 2021): an
    approximation of LT-SFT that skips full tuning.

    Args:
        scores: What `calibrate(kind="fisher")` gave.
    """
    return _calibrated("fisher", "FISH mask", scores)


def snip(scores: Mapping[str, Tensor]) -> Criterion:
    """The largest |θ · Σ g| (SNIP, Lee et al., 2019): an approximation of LT-SFT that skips full
    tuning.

    Args:
        scores: What `calibrate(kind="snip")` gave.
    """
    return _calibrated("snip", "SNIP mask", scores)


def _calibrated(name: str, method: str, scores: Mapping[str, Tensor]) -> Criterion:
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"criteria.{name}: scores must map names to tensors, as criteria.calibrate(model, "
            f'batches, loss, kind="{name}") gives them, got {type(scores).__name__}'
        )

    def score(own: str, now: Tensor, start: Tensor | None) -> Tensor:
        if own not in scores:
            raise ValueError(
                f"criteria.{name}: there are no scores of {own!r}, which is eligible; calibrate "
                "and select with the same eligible="
            )
        return scores[own]

    return by_score(name, score, needs_training=False, method=method, approximation=True)


# --- whatever the values ----------------------------------------------------------------------


@criterion
def bias() -> Criterion:
    """All eligible biases (BitFit, Ben Zaken et al., 2022): parameters whose own name has "bias" in
    it. K is their number."""

    def fixed(layout: Layout) -> Support:
        names = [name for name in layout.names if "bias" in name.rpartition(".")[2]]
        if not names:
            raise ValueError('select: criterion "bias": none of the eligible parameters is a bias')
        shapes = tuple(layout.shapes[layout.ordinal(name)] for name in names)
        return Support.full(Layout(tuple(names), shapes)).expand(layout)

    return Criterion("bias", needs_training=False, settings={"method": "BitFit"}, fixed=fixed)


def given(what: Support | SparseDelta | Mapping[str, Tensor]) -> Criterion:
    """The entries of a support, of another SFT, or of boolean masks by name. K is their number."""
    if isinstance(what, SparseDelta):
        support = what.support
    else:
        support = what if isinstance(what, Support) else Support.from_masks(what)

    def fixed(layout: Layout) -> Support:
        return fitted("criterion given", support, layout)

    return Criterion("given", needs_training=False, settings={"method": "given mask"}, fixed=fixed)


def fitted(what: str, support: Support, layout: Layout) -> Support:
    """A support over the eligible tensors.

    Raises:
        ValueError: It has entries of others, or a tensor of another shape.
    """
    outside = [n for n, count in support.counts().items() if count and n not in layout]
    if outside:
        raise ValueError(
            f"select: {what}: it has entries of {outside[0]!r}, which is not eligible; name it in "
            "eligible=, or leave it out"
        )
    try:
        return support.restrict(n for n in support.layout.names if n in layout).expand(layout)
    except ValueError as error:
        raise ValueError(f"select: {what}: {error}") from None


# --- calibration ------------------------------------------------------------------------------


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    kind: str = "gradient",
    *,
    samples: int | None = None,
    eligible: Callable[[str, nn.Parameter], bool] | Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Scores from a few backward passes, for `gradient`, `fisher` and `snip`.

    With g the gradient of a batch's loss: "gradient" is |Σ g|, "snip" |θ · Σ g|, and "fisher"
    (1/n) Σ g² over n batches, of the labels that were observed (the empirical Fisher). Give batches
    of one example for the Fisher of Sung et al.

    The model runs in evaluation mode. It needs 4 bytes for each eligible entry, and one dense
    gradient at a time. Model, buffers, gradients and random state are as they were in the end,
    after an exception too.

    Args:
        model: Any module.
        batches: What `loss` takes.
        loss: `(model, batch) -> scalar`.
        kind: "gradient", "fisher" or "snip".
        samples: How many batches to use at most, whatever their size; default: all.
        eligible: As in `select`.

    Returns:
        fp32 scores by name, each in its parameter's shape and on its device.

    Raises:
        ValueError: A loss or a gradient is NaN or infinite, there is no batch, an argument is out
            of range, or, for "fisher", a parameter's gradient comes in two parts.
    """
    from .select import eligible_parameters

    if kind not in ("gradient", "fisher", "snip"):
        raise ValueError(f'calibrate: kind must be "gradient", "fisher" or "snip", got {kind!r}')
    if samples is not None and samples < 1:
        raise ValueError(f"calibrate: samples must be at least 1, got {samples}")
    rule = eligible if eligible is None or callable(eligible) else {*eligible}
    if isinstance(eligible, str):
        rule = {eligible}
    chosen = eligible_parameters(model, rule)
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in chosen.items()}

    seen: set[str] = set()

    def collect(name: str) -> Callable[[Tensor], None]:
        into = sums[name]

        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if kind == "fisher" and name in seen:
                raise ValueError(
                    f"calibrate: one backward pass gave {name!r} two gradients, and the square of "
                    "their sum is wanted; checkpoint with use_reentrant=False, or not at all"
                )
            seen.add(name)
            found = parameter.grad.to(torch.float32)
            if found.layout is not torch.strided:
                found = found.to_dense()
            if kind == "fisher":
                into.addcmul_(found, found)
            else:
                into.add_(found)
            parameter.grad = None

        return hook

    count = 0
    with _untouched(model, chosen):
        hooks = [p.register_post_accumulate_grad_hook(collect(n)) for n, p in chosen.items()]
        try:
            for batch in islice(batches, samples):
                seen.clear()
                with torch.enable_grad():
                    value = loss(model, batch)
                    if not math.isfinite(found := float(value.detach())):
                        raise ValueError(
                            f"calibrate: the loss of batch {count} is {found}; check the data and "
                            "the weights"
                        )
                    value.backward()
                count += 1
        finally:
            for handle in hooks:
                handle.remove()
    if not count:
        raise ValueError("calibrate: there is no batch; give at least one")
    for name, total in sums.items():
        if kind == "fisher":
            total.div_(count)
        elif kind == "snip":
            total.mul_(chosen[name].detach())
        total.abs_()
        if total.numel() and not math.isfinite(float(total.max())):
            raise ValueError(f"calibrate: the gradient of {name!r} holds NaN or infinity")
    return sums


@contextmanager
def _untouched(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Only the chosen parameters have gradients; on leaving, all is as it was."""
    parameters = named_parameters(model)
    trainable = {name: p.requires_grad for name, p in parameters.items()}
    grads = {name: p.grad for name, p in parameters.items()}
    # Buffers may be written to, or be replaced.
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with modes_kept(model), random_state_kept():
        try:
            for name, parameter in parameters.items():
                parameter.grad = None
                parameter.requires_grad_(name in chosen)
            model.eval()
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(trainable[name])
                parameter.grad = grads[name]
            for module, held in buffers:
                module._buffers.clear()
                module._buffers.update(held)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def embedding_names(model: nn.Module) -> frozenset[str]:
    """The parameters that are embeddings: weights of `nn.Embedding` and the input embeddings."""
    found = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for p in module.parameters(recurse=False)
    }
    get_input = getattr(backbone(model), "get_input_embeddings", None)
    if callable(get_input) and isinstance(inner := get_input(), nn.Module):
        found |= {id(p) for p in inner.parameters(recurse=False)}
    return frozenset(name for name, p in named_parameters(model).items() if id(p) in found)
