"""Putting sparse fine-tunings on a model, taking them off, exchanging them, adding them up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import sparse_ft_kernels as ops
from sparse_ft_kernels.contract import OPS

from .. import inputs
from ..case import Case, Job, Provider, Setting, Target, case

Call = Callable[[Tensor, Tensor, Tensor], object]


class Deltas:
    """Sparse fine-tunings of a model, also as positions and values per parameter.

    Args:
        setting: Density and kind of support.
        model: The model.
        count: How many.
        first_seed: Of their supports.
    """

    def __init__(
        self, setting: Setting, model: list[Tensor], count: int, first_seed: int = 0
    ) -> None:
        self.model, self.dtype = model, setting.torch_dtype
        supports = [inputs.support(setting, model, first_seed + j) for j in range(count)]
        self.idx, self.ptr = ([s[i] for s in supports] for i in range(2))
        self.val = [
            inputs.values(len(i), 2 + first_seed + j, setting.device)
            for j, i in enumerate(self.idx)
        ]
        self.alphas = [1.0] * count
        self.undo = [torch.empty(len(i), dtype=self.dtype, device=setting.device) for i in self.idx]
        self.at = [inputs.positions(model, i, p) for i, p in zip(self.idx, self.ptr, strict=True)]

    @property
    def new(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float], list[Tensor]]:
        return self.idx, self.ptr, self.val, self.alphas, self.undo

    @property
    def old(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.idx, self.ptr, self.undo

    def values(self, dtype: torch.dtype | None = None) -> list[list[Tensor]]:
        """For each delta the values of each parameter, by default rounded to the model's type."""
        return [
            [x.to(dtype or self.dtype) for x in v.split([len(i) for i in at])]
            for v, at in zip(self.val, self.at, strict=True)
        ]

    def job(self, call: Call, weights: list[Tensor]) -> Job:
        """A job that calls with (flat parameter, positions, values), for each of each delta."""
        views = [w.view(-1) for w in weights]
        values = self.values()

        def run() -> None:
            for at, pieces in zip(self.at, values, strict=True):
                for view, i, v in zip(views, at, pieces, strict=True):
                    call(view, i, v)

        return run

    def sparse(self, sign: float = 1.0, dtype: torch.dtype | None = None) -> list[list[Tensor]]:
        """For each delta a COO tensor of each parameter, by default of the model's type."""
        return [
            [
                torch.sparse_coo_tensor(
                    i[None], sign * v, (w.numel(),), is_coalesced=True, check_invariants=False
                )
                for w, i, v in zip(self.model, at, pieces, strict=True)
            ]
            for at, pieces in zip(self.at, self.values(dtype), strict=True)
        ]

    def expected(self, start: list[Tensor]) -> list[Tensor]:
        """The model with all of them on it: one fp32 sum, one rounding."""
        out = []
        pieces = [v.split([len(i) for i in at]) for v, at in zip(self.val, self.at, strict=True)]
        for i, w in enumerate(start):
            total = torch.zeros(w.numel(), device=w.device)
            for at, values in zip(self.at, pieces, strict=True):
                total[at[i]] += values[i]
            moved = (w.view(-1).float() + total).to(w.dtype)
            out.append(torch.where(total == 0, w.view(-1), moved).view(w.shape))
        return out


def _close(weights: list[Tensor], wanted: list[Tensor]) -> None:
    """Up to two roundings of a bf16 weight; peers round in their own way."""
    tolerance = 1e-6 if weights[0].dtype == torch.float32 else 2e-3
    for w, expected in zip(weights, wanted, strict=True):
        assert not w.numel() or float((w - expected).abs().max()) <= tolerance


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for w, s in zip(to, source, strict=True):
        w.copy_(s)


def _composition(op: str, setting: Setting, count: int) -> Case:
    start = inputs.tensors(setting, 0)
    weights = [w.clone() for w in start]
    deltas = Deltas(setting, weights, count)
    nnz, size = count * setting.nnz, setting.numel * setting.width

    def ours() -> object:
        return ops.compose_(weights, *deltas.new)

    def each(call: Call) -> Callable[[], Job]:
        return lambda: deltas.job(call, weights)

    def coo(dtype: torch.dtype) -> Job:
        sparse = deltas.sparse(dtype=dtype)

        def run() -> None:
            for pieces in sparse:
                for w, piece in zip(weights, pieces, strict=True):
                    w.view(-1).add_(piece)

        return run

    def dense_add() -> Job:
        dense = [[piece.to_dense() for piece in pieces] for pieces in deltas.sparse()]

        def run() -> None:
            for pieces in dense:
                for w, piece in zip(weights, pieces, strict=True):
                    w.view(-1).add_(piece)

        return run

    @cache
    def expected() -> list[Tensor]:
        return deltas.expected(start)

    def check(_: Any) -> None:
        _close(weights, expected())

    def reset() -> None:
        _copy(weights, start)

    def verify() -> None:
        ours()
        assert inputs.equal(weights, expected())
        ops.restore_(weights, *deltas.old)
        assert inputs.equal(weights, start)

    rounded = {}
    if deltas.dtype != torch.float32:
        rounded["w += COO, values rounded"] = Provider(
            lambda: coo(deltas.dtype),
            "the same with values that were rounded to the model's type beforehand",
            check,
            24 * nnz + size,
        )
    targets: list[Target] = []
    if setting.device == "cuda":
        if count == 2 and setting.shape == "xlmr-base":
            targets = [Target("floor", 1 / 3), Target("peer", 10, "index_add_")]
    else:
        targets = [Target("peer", 1.5, "index_add_"), Target("floor", 0.35)]
    return Case(
        op,
        setting,
        OPS["compose_"].bytes_moved(weights, deltas.idx) + 2 * inputs.surplus(setting, *deltas.at),
        {
            "sparse_ft, with undo": Provider(
                lambda: ours, check=check, state_bytes=setting.width * nnz, captured=True
            ),
            # Published fine-tunings hold fp32 values, whatever the model is loaded in.
            "w += COO": Provider(
                lambda: coo(torch.float32),
                "composable-sft (Ansell et al., 2022): the parameter plus a sparse fp32 COO tensor",
                check,
                24 * nnz + 2 * size,
            ),
            **rounded,
            "index_add_": Provider(
                each(lambda view, at, v: view.index_add_(0, at, v)),
                "torch.Tensor.index_add_ per parameter, no undo (SHiRA and kin)",
                check,
                12 * nnz,
                captured=True,
            ),
            "scatter_add_": Provider(
                each(lambda view, at, v: view.scatter_add_(0, at, v)),
                "torch.Tensor.scatter_add_ per parameter, no undo",
                check,
                12 * nnz,
                captured=True,
            ),
            "index_put_(accumulate)": Provider(
                each(lambda view, at, v: view.index_put_((at,), v, accumulate=True)),
                "torch.Tensor.index_put_ per parameter, no undo",
                check,
                12 * nnz,
            ),
            "dense add": Provider(
                dense_add,
                "the difference kept dense and added, no undo",
                check,
                count * (size + 24 * nnz),
                count * size,
            ),
        },
        verify,
        reset,
        targets=tuple(targets),
        note="" if count == 1 else f"{count} fine-tunings at once",
    )


def _bytes(count: int) -> Callable[[Setting], float]:
    return lambda s: 3 * s.numel * s.width + 4 * s.numel + count * 30 * s.nnz


@case("compose_", input_bytes=_bytes(1))
def compose(setting: Setting) -> Case:
    """Putting one sparse fine-tuning on a model, ready to be taken off again exactly."""
    return _composition("compose", setting, 1)


@case("compose_", input_bytes=_bytes(2))
def compose_2(setting: Setting) -> Case:
    """Putting a language and a task on a model at once, ready to be taken off again exactly."""
    return _composition("compose_2", setting, 2)


@case("restore_", input_bytes=_bytes(1))
def restore(setting: Setting) -> Case:
    """Taking a sparse fine-tuning off again."""
    start = inputs.tensors(setting, 0)
    weights = [w.clone() for w in start]
    deltas = Deltas(setting, weights, 1)
    deltas.undo = [inputs.taken(start, deltas.at[0])]
    tuned = deltas.expected(start)

    def ours() -> None:
        ops.restore_(weights, *deltas.old)

    def subtract() -> Job:
        def run(view: Tensor, at: Tensor, v: Tensor) -> object:
            return view.index_add_(0, at, v, alpha=-1)

        return deltas.job(run, weights)

    def coo() -> Job:
        sparse = deltas.sparse(-1.0)[0]

        def run() -> None:
            for w, piece in zip(weights, sparse, strict=True):
                w.view(-1).add_(piece)

        return run

    def saved(how: str) -> Job:
        """Writes values back that were saved when the fine-tuning was put on."""
        values = [s.view(-1)[at] for s, at in zip(start, deltas.at[0], strict=True)]
        views = [w.view(-1) for w in weights]

        def run() -> None:
            for view, at, v in zip(views, deltas.at[0], values, strict=True):
                if how == "put_":
                    view.put_(at, v)
                else:
                    view.index_copy_(0, at, v)

        return run

    def copy_all() -> None:
        _copy(weights, start)

    def exact(_: Any) -> None:
        assert inputs.equal(weights, start)

    def check(_: Any) -> None:
        _close(weights, start)

    def reset() -> None:
        _copy(weights, tuned)

    def verify() -> None:
        for w, at in zip(weights, deltas.at[0], strict=True):
            w.view(-1)[at] = 7.0
        ours()
        exact(None)
        reset()

    k, size = setting.nnz, setting.numel * setting.width
    return Case(
        "restore",
        setting,
        OPS["restore_"].bytes_moved(weights, deltas.idx)
        + 2 * inputs.surplus(setting, deltas.at[0]),
        {
            "sparse_ft, exact": Provider(
                lambda: ours, check=exact, state_bytes=setting.width * k, captured=True
            ),
            "put_ of saved values, exact": Provider(
                lambda: saved("put_"),
                "torch.Tensor.put_ of the saved values, per parameter",
                exact,
                24 * k,
                captured=True,
            ),
            "index_copy_ of saved values, exact": Provider(
                lambda: saved("index_copy_"),
                "torch.Tensor.index_copy_ of the saved values, per parameter",
                exact,
                24 * k,
                captured=True,
            ),
            "w −= COO, inexact": Provider(
                coo, "composable-sft: subtract the sparse COO tensor again", check, 24 * k + size
            ),
            "index_add_ of −φ, inexact": Provider(
                subtract, "subtract again, per parameter", check, 12 * k, captured=True
            ),
            "copy the whole model, exact": Provider(
                lambda: copy_all,
                "copy_ from a second model in memory",
                exact,
                0,
                size,
                captured=True,
            ),
        },
        verify,
        reset,
        targets=(Target("floor", 0.35),),
    )


@case("swap_", input_bytes=lambda s: 6 * s.numel * s.width + 4 * s.numel + 80 * s.nnz)
def swap(setting: Setting) -> Case:
    """Exchanging the sparse fine-tuning that is on a model for another one."""
    start = inputs.tensors(setting, 0)
    pair = [Deltas(setting, start, 1, first_seed=10 * j) for j in range(2)]
    fused, apart, peer = ([w.clone() for w in start] for _ in range(3))
    logs = {id(w): [[torch.empty_like(u) for u in d.undo] for d in pair] for w in (fused, apart)}
    saved: list[Tensor] = []
    # Which of the two is on each model; every call exchanges them.
    on = {"fused": 0, "apart": 0, "peer": 0}
    views = [w.view(-1) for w in peer]

    def arguments(weights: list[Tensor], key: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        old, new = pair[on[key]], pair[1 - on[key]]
        mine = logs[id(weights)]
        was = (old.idx, old.ptr, mine[on[key]])
        on[key] = 1 - on[key]
        return was, (new.idx, new.ptr, new.val, new.alphas, mine[on[key]])

    def ours() -> object:
        was, new = arguments(fused, "fused")
        return ops.swap_(fused, *was, *new)

    def two() -> object:
        was, new = arguments(apart, "apart")
        ops.restore_(apart, *was)
        return ops.compose_(apart, *new)

    add: list[Job] = []

    def put_on(which: int) -> object:
        """Saves what is there, then index_add_, per parameter."""
        saved[:] = [view[at] for view, at in zip(views, pair[which].at[0], strict=True)]
        return add[which]()

    def indexed() -> Job:
        add[:] = [d.job(lambda view, at, v: view.index_add_(0, at, v), peer) for d in pair]
        put_on(on["peer"])

        def run() -> object:
            for view, at, v in zip(views, pair[on["peer"]].at[0], saved, strict=True):
                view.index_copy_(0, at, v)
            on["peer"] = 1 - on["peer"]
            return put_on(on["peer"])

        return run

    @cache
    def expected(which: int) -> list[Tensor]:
        return pair[which].expected(start)

    def check(weights: list[Tensor], key: str) -> Callable[[Any], None]:
        return lambda _: _close(weights, expected(on[key]))

    for weights in (fused, apart):
        ops.compose_(weights, *pair[0].new[:4], logs[id(weights)][0])

    def verify() -> None:
        for wanted in (1, 0):
            ours()
            two()
            assert inputs.equal(fused, expected(wanted))
            assert inputs.equal(apart, fused)

    return Case(
        "swap",
        setting,
        OPS["swap_"].bytes_moved(start, pair[0].idx, [], [], pair[1].idx)
        + 2 * inputs.surplus(setting, *(d.at[0] for d in pair)),
        {
            "sparse_ft, one pass": Provider(lambda: ours, check=check(fused, "fused")),
            "sparse_ft, restore_ and compose_": Provider(
                lambda: two, "the two ops one after the other", check(apart, "apart")
            ),
            "index_copy_ and index_add_": Provider(
                indexed,
                "save with indexing, index_copy_ back, index_add_, per parameter",
                check(peer, "peer"),
                24 * setting.nnz,
                setting.width * setting.nnz,
            ),
        },
        verify,
    )


@case("merge", input_bytes=lambda s: 5 * s.numel + 100 * s.nnz)
def merge(setting: Setting) -> Case:
    """Two sparse fine-tunings as one."""
    model = inputs.tensors(setting, 0)
    deltas = Deltas(setting, model, 2)
    lengths = lengths_of(setting, model)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return ops.merge(lengths, deltas.idx, deltas.ptr, deltas.val, deltas.alphas)

    @cache
    def wanted() -> list[Tensor]:
        return deltas.expected([torch.zeros(w.shape, device=setting.device) for w in model])

    def coo() -> Job:
        first, second = (_one(deltas, which).sparse() for which in (0, 1))
        return lambda: [(a + b).coalesce() for a, b in zip(first[0], second[0], strict=True)]

    def check(result: Any) -> None:
        for piece, dense in zip(result, wanted(), strict=True):
            assert torch.allclose(piece.to_dense(), dense.view(-1), atol=1e-6)

    def verify() -> None:
        idx, ptr, val = ours()
        at = inputs.positions(model, idx, ptr)
        pieces = val.split([len(i) for i in at])
        for i, v, dense in zip(at, pieces, wanted(), strict=True):
            found = torch.zeros_like(dense.view(-1))
            found[i] = v
            assert torch.equal(found, dense.view(-1))

    return Case(
        "merge",
        setting,
        OPS["merge"].bytes_moved(lengths, deltas.idx, deltas.ptr, deltas.val, deltas.alphas),
        {
            "sparse_ft": Provider(lambda: ours),
            "COO + COO": Provider(
                coo,
                "composable-sft: sum of sparse COO tensors per parameter, coalesced",
                check,
                100 * setting.nnz,
            ),
        },
        verify,
        targets=(Target("peer", 2, "COO + COO"),),
    )


@case("reduce", input_bytes=lambda s: 5 * s.numel + 120 * s.nnz)
def reduce(setting: Setting) -> Case:
    """What two sparse fine-tunings say of each entry: the sums and counts of merging rules."""
    model = inputs.tensors(setting, 0)
    deltas = Deltas(setting, model, 2)
    lengths = lengths_of(setting, model)

    def ours() -> ops.Reduction:
        return ops.reduce(lengths, deltas.idx, deltas.ptr, deltas.val, deltas.alphas)

    def of_tensor(terms: Tensor) -> tuple[Tensor, ...]:
        """The same, of the dense terms of one parameter, [2, elements]."""
        up, down = terms > 0, terms < 0
        sums = (terms.sum(0), (terms * up).sum(0), (terms * down).sum(0))
        return (*sums, terms.abs().max(0).values, up.sum(0), down.sum(0))

    def dense() -> Job:
        values = [
            v.split([len(i) for i in at]) for v, at in zip(deltas.val, deltas.at, strict=True)
        ]

        def run() -> list[tuple[Tensor, ...]]:
            found = []
            for j, w in enumerate(model):
                terms = torch.zeros(2, w.numel(), device=w.device)
                for row, at, pieces in zip(terms, deltas.at, values, strict=True):
                    row[at[j]] = pieces[j]
                found.append(of_tensor(terms))
            return found

        return run

    def coo() -> Job:
        """Sums and counts as columns beside the values; the largest cannot be had in this way."""
        sparse = deltas.sparse()

        def columns(piece: Tensor) -> Tensor:
            v = piece.values()
            both = (v, v.clamp(min=0), v.clamp(max=0), torch.ones_like(v), (v > 0), (v < 0))
            values = torch.stack([x.to(v.dtype) for x in both], 1)
            size = (*piece.shape, values.shape[1])
            return torch.sparse_coo_tensor(
                piece.indices(), values, size, is_coalesced=True, check_invariants=False
            )

        return lambda: [(columns(a) + columns(b)).coalesce() for a, b in zip(*sparse, strict=True)]

    def check_coo(result: Any) -> None:
        found = ours()
        at = inputs.positions(model, found.idx, found.ptr)
        sums = (*found[2:5], *found[6:])
        for column, vector in enumerate(sums):
            for i, mine, peer in zip(at, vector.split([len(x) for x in at]), result, strict=True):
                assert torch.equal(i, peer.indices()[0])
                assert torch.allclose(mine.float(), peer.values()[:, column].float(), atol=1e-2)

    def check(result: Any) -> None:
        found = ours()
        at = inputs.positions(model, found.idx, found.ptr)
        sizes = [len(i) for i in at]
        size = found.largest.abs()
        columns = (*found[2:5], size, found.n_positive, found.n_negative)
        for column, vector in enumerate(columns):
            for i, mine, peer in zip(at, vector.split(sizes), result, strict=True):
                assert torch.equal(mine, peer[column][i].to(mine.dtype))

    def verify() -> None:
        found = ours()
        for mine, other in zip(
            found, ops.merge(lengths, *deltas.new[:3], deltas.alphas), strict=False
        ):
            assert torch.equal(mine.view(torch.int16), other.view(torch.int16))
        assert int(found.n_present.sum()) == sum(len(i) for i in deltas.idx)

    return Case(
        "reduce",
        setting,
        OPS["reduce"].bytes_moved(lengths, deltas.idx, deltas.ptr, deltas.val, deltas.alphas),
        {
            "sparse_ft": Provider(lambda: ours),
            "COO + COO": Provider(
                coo,
                "sparse COO tensors with a column for each sum and count, added and coalesced; "
                "without the largest",
                check_coo,
                200 * setting.nnz,
                whole=False,
            ),
            "dense terms": Provider(
                dense,
                "dense differences, one parameter at a time (mergekit, PEFT, FusionBench)",
                check,
                40 * max(w.numel() for w in model) + 28 * setting.numel,
            ),
        },
        verify,
    )


def _one(deltas: Deltas, which: int) -> Deltas:
    """One of the deltas in fp32, for merging."""
    out = copy.copy(deltas)
    out.dtype = torch.float32
    out.idx, out.ptr, out.val = ([x[which]] for x in (out.idx, out.ptr, out.val))
    out.at = [out.at[which]]
    return out


def lengths_of(setting: Setting, model: list[Tensor]) -> Tensor:
    """Elements of each tile."""
    out = []
    for tensor in model:
        whole, rest = divmod(tensor.numel(), ops.TILE)
        out += [ops.TILE] * whole + [rest] * (rest > 0)
    return torch.tensor(out, dtype=torch.int32, device=setting.device)
