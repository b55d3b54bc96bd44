"""The contract: torch's own checks of every op, torch.compile, backends, and arguments that must be
refused.
"""

import math
import re

import pytest
import torch
from oracles import random_support, rng, tensors

from sparse_ft_kernels import BackendError, dispatch, explain, select_topk
from sparse_ft_kernels.contract import OPS

OP = torch.ops.sparse_ft
SHAPES = [(70_000,), (3, 5)]
SIZES = [70_000, 15]
LENGTHS = torch.tensor([65536, 4464, 15], dtype=torch.int32)


def arguments(name: str) -> tuple:
    generator = rng(name)
    a, b = (tensors(SHAPES, generator) for _ in range(2))
    idx, ptr, _ = random_support(SIZES, 0.01, generator)
    n = len(idx)
    vectors = [torch.rand(n, generator=generator) for _ in range(4)]
    one = torch.tensor(1.0)
    return {
        "select_topk": (a, b, 500, idx, ptr, False),
        "select_random": (a, 500, 3, idx, ptr),
        "gather": (a, SIZES, idx, ptr, vectors[0], one, True, vectors[1], 0.1),
        "masked_adamw_": (
            *(a, idx, ptr, None, b, *vectors, torch.tensor(0.0)),
            *(
                torch.tensor(1e-3, dtype=torch.float64),
                0.9,
                0.999,
                1e-8,
                0.1,
                0.1,
                one,
                one * 0,
                one,
            ),
        ),
        "dense_adamw_": (
            *(a, b, *([torch.rand(s, generator=generator) for s in SHAPES] for _ in range(3))),
            *(tensors(SHAPES, generator), torch.tensor(0.0)),
            *(torch.tensor(1e-3, dtype=torch.float64), 0.9, 0.999, 1e-8, 0.1, 0.1),
            *(one, one * 0, one),
        ),
        "anchor_l1_": (a, b, tensors(SHAPES, generator), 0.1),
        "compose_": (a, [idx], [ptr], [vectors[0]], [0.5], [torch.empty(n)]),
        "restore_": (a, [idx], [ptr], [vectors[0]]),
        "swap_": (
            *(a, [idx], [ptr], [vectors[0]]),
            *([idx.clone()], [ptr.clone()], [vectors[1]], [0.5], [torch.empty(n)]),
        ),
        "merge": (LENGTHS, [idx, idx], [ptr, ptr], vectors[:2], [1.0, 0.5]),
        "reduce": (LENGTHS, [idx, idx], [ptr, ptr], vectors[:2], [1.0, -0.5]),
        "overlap": (idx, ptr, vectors[0], idx, ptr, vectors[1]),
        "digest": (a, idx, ptr),
        "check_support": (LENGTHS, idx, ptr, vectors[0]),
        "hash_pieces": (vectors[0].view(torch.uint8),),
    }[name]


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    torch.library.opcheck(getattr(OP, name).default, arguments(name))


@pytest.mark.parametrize("name", OPS)
def test_compiled_gives_the_same_bits(name):
    op = getattr(OP, name)
    eager, compiled = arguments(name), arguments(name)
    torch._dynamo.reset()
    expected = op(*eager)
    # Older versions of torch stop at outputs whose size depends on the data, unless told not to.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(lambda *x: op(*x), fullgraph=True, backend="aot_eager")(*compiled)
    for x, y in zip(_flatten([expected, eager]), _flatten([found, compiled]), strict=True):
        assert x.dtype == y.dtype
        assert x.numpy().tobytes() == y.numpy().tobytes()


def _flatten(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in _flatten(item)]
    return []


@pytest.mark.parametrize("name", OPS)
def test_bytes_moved_are_positive(name):
    assert OPS[name].bytes_moved(*arguments(name)) > 0


@pytest.mark.parametrize("name", OPS)
def test_mutation_is_declared_and_seen_by_autograd(name):
    args = arguments(name)
    before = [t.clone() for t in _flatten(list(args))]
    versions = [t._version for t in _flatten(list(args))]
    getattr(OP, name)(*args)
    schema = getattr(OP, name).default._schema
    mutable = [
        a.alias_info is not None and a.alias_info.is_write
        for a, value in zip(schema.arguments, args, strict=True)
        for _ in _flatten([value])
    ]
    for may, old, version, new in zip(mutable, before, versions, _flatten(list(args)), strict=True):
        if may:
            assert new._version > version
        else:
            assert old.numpy().tobytes() == new.numpy().tobytes()
            assert new._version == version


BAD_TENSORS = {
    "integer": (lambda: torch.ones(4, 4, dtype=torch.int32), "dtype torch.int32; float32"),
    "double": (lambda: torch.ones(4, 4, dtype=torch.float64), "dtype torch.float64"),
    "complex": (lambda: torch.ones(4, 4, dtype=torch.complex64), "dtype torch.complex64"),
    "sparse": (lambda: torch.eye(4).to_sparse(), "layout torch.sparse_coo.*to_dense"),
    "meta": (lambda: torch.empty(4, 4, device="meta"), "meta device.*materialise"),
    "transposed": (lambda: torch.ones(4, 5).t(), r"not contiguous.*contiguous\(\)"),
    "expanded": (lambda: torch.ones(4, 1).expand(4, 4), "not contiguous"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8),
        "quantised.*dequantise",
    ),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_unusable_tensors_are_refused_by_position(kind):
    make, message = BAD_TENSORS[kind]
    with pytest.raises(ValueError, match=rf"select_topk: a\[1\].*{message}"):
        select_topk([torch.ones(3), make()], k=1)


def test_everything_else_that_does_not_fit():
    a = [torch.ones(10), torch.ones(5)]
    idx, ptr, _ = random_support([10, 5], 0.5, rng("bad"))
    n = len(idx)
    cases = [
        (OP.select_topk, (a, a[:1], 1, None, None, False), "b has 1 tensors and a 2"),
        (
            OP.select_topk,
            (a, [a[0], torch.ones(6)], 1, None, None, False),
            r"b\[1\] has shape \(6,\)",
        ),
        (OP.select_topk, (a, [], -1, None, None, False), "k must not be negative"),
        (OP.select_topk, (a, [], 1, idx, None, False), "go together"),
        (
            OP.select_topk,
            (a, [], 1, idx, ptr[:-1].clone(), False),
            "exclude_ptr must hold 3 values",
        ),
        (
            OP.gather,
            (a, [10], idx, ptr, torch.empty(n), None, False, None, 0.0),
            "2 gradients for 1",
        ),
        (
            OP.gather,
            (a, [10, 5], idx, ptr, torch.empty(n + 1), None, False, None, 0.0),
            f"out must hold {n} values, got {n + 1}",
        ),
        (
            OP.gather,
            (a, [10, 5], idx, ptr, torch.empty(n), None, False, None, 0.1),
            "l1 = 0.1 needs delta",
        ),
        (
            OP.gather,
            (a, [10, 5], idx.int(), ptr, torch.empty(n), None, False, None, 0.0),
            "torch.uint16",
        ),
        (
            OP.compose_,
            (a, [idx], [ptr], [torch.ones(n)], [float("nan")], []),
            r"alphas\[0\] must be finite",
        ),
        (OP.compose_, (a, [idx], [ptr], [torch.ones(n)], [1.0, 1.0], []), "2 alphas for 1 deltas"),
        (
            OP.compose_,
            ([a[0], a[1].half()], [idx], [ptr], [torch.ones(n)], [1.0], []),
            "mix.*one call for each data type",
        ),
        (
            OP.compose_,
            (a, [idx], [ptr], [torch.ones(n)], [1.0], [torch.ones(n).half()]),
            r"undo\[0\] must be a contiguous torch.float32",
        ),
        (OP.anchor_l1_, (a, a, a, -1.0), "coeff must be in"),
    ]
    for op, args, message in cases:
        before = [t.clone() for t in _flatten(list(args))]
        with pytest.raises(ValueError, match=message):
            op(*args)
        for old, new in zip(before, _flatten(list(args)), strict=True):
            assert old.numpy().tobytes() == new.numpy().tobytes()


@pytest.mark.parametrize("change", [(0, 1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize(
    "name", sorted(OPS.keys() - {"check_support", "anchor_l1_", "dense_adamw_", "hash_pieces"})
)
def test_a_ptr_that_would_lead_c_astray_is_refused(name, change, native_library, monkeypatch):
    monkeypatch.setenv("SPARSE_FT_BACKEND", "cpu")
    args = arguments(name)
    schema = getattr(OP, name).default._schema
    for argument, value in zip(schema.arguments, args, strict=True):
        if "ptr" in argument.name:
            (value[0] if isinstance(value, list) else value)[change[0]] += change[1]
            break
    before = [t.clone() for t in _flatten(list(args))]
    with pytest.raises(ValueError, match=rf"^{name}: ptr of (old )?support 0 runs from"):
        getattr(OP, name)(*args)
    for old, new in zip(before, _flatten(list(args)), strict=True):
        assert old.numpy().tobytes() == new.numpy().tobytes()


@pytest.mark.parametrize(("name", "first"), [("masked_adamw_", 11), ("dense_adamw_", 8)])
def test_hyperparameters_out_of_range(name, first):
    good = list(arguments(name))
    for position, (value, message) in enumerate(
        [
            (1.0, "beta1"),
            (-0.1, "beta2"),
            (-1.0, "eps"),
            (-1.0, "weight_decay"),
            (float("nan"), "l1"),
        ],
        first,
    ):
        bad = [*good]
        bad[position] = value
        with pytest.raises(ValueError, match=f"{name}: {message} must be in"):
            getattr(OP, name)(*bad)


def test_a_forced_backend_never_falls_back(monkeypatch):
    monkeypatch.setenv("SPARSE_FT_BACKEND", "nonsense")
    with pytest.raises(BackendError, match=r"no such backend; choose among cpu, .*reference"):
        select_topk([torch.ones(3)], k=1)
    monkeypatch.setenv("SPARSE_FT_BACKEND", "cpu")
    monkeypatch.setattr(dispatch.native, "load", lambda: (None, "the library is not built"))
    dispatch._resolve.cache_clear()
    with pytest.raises(BackendError, match=re.escape("cpu: the library is not built")):
        select_topk([torch.ones(3)], k=1)
    monkeypatch.delenv("SPARSE_FT_BACKEND")
    dispatch._warn_slow.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain torch, which is slow.*not built"):
        assert select_topk([torch.ones(3)], k=1)[0].tolist() == [0]  # reference serves
    dispatch._resolve.cache_clear()


def test_explain_names_one_choice_per_op():
    rows = explain("cpu")
    assert {op for op, _, _ in rows} == set(OPS)
    for op in OPS:
        assert [state for name, _, state in rows if name == op].count("chosen") == 1
    assert {
        state
        for op, backend, state in explain("cuda")
        if backend == "reference" and not OPS[op].on_host
    } == {"chosen"}


def _between_elements(n: int) -> torch.Tensor:
    """n floats whose storage begins one byte off."""
    return torch.frombuffer(bytearray(4 * n + 1), dtype=torch.float32, offset=1)


BAD_CALLS = {
    "devices mixed": (
        lambda: OP.select_topk(
            [torch.ones(4)], [torch.ones(4, device="meta")], 1, None, None, False
        ),
        r"select_topk: b\[0\] is on the meta device",
    ),
    "not contiguous": (
        lambda: OP.select_topk([torch.ones(4, 5).t()], [], 1, None, None, False),
        r"select_topk: a\[0\] is not contiguous",
    ),
    "data type": (
        lambda: OP.select_topk([torch.ones(4).double()], [], 1, None, None, False),
        r"select_topk: a\[0\] has dtype torch.float64; float32, bfloat16 and float16 work",
    ),
    "k beyond the model": (
        lambda: OP.select_topk([torch.ones(4)], [], 5, None, None, False),
        "k = 5 entries wanted, but only 4 are eligible",
    ),
    "k of nothing": (
        lambda: OP.select_topk([], [], 1, None, None, False),
        "k = 1 entries wanted, but only 0 are eligible",
    ),
    "between two elements": (
        lambda: OP.select_topk([torch.ones(4), _between_elements(4)], [], 1, None, None, False),
        r"select_topk: a\[1\] begins at address 0x\w+, which is no multiple of its element size, 4",
    ),
    "state between two elements": (
        lambda: OP.masked_adamw_(
            *(a := list(arguments("masked_adamw_")))[:5], _between_elements(len(a[5])), *a[6:]
        ),
        r"masked_adamw_: exp_avg begins at address .*clone\(\) it",
    ),
    "not finite": (
        lambda: OP.select_topk(
            [torch.ones(3), torch.tensor([1.0, math.nan])], [], 1, None, None, False
        ),
        r"select_topk: tensor 1 \(tile 1\) holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_gives_the_same_error_on_every_backend(case, backend):
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_to_do_is_no_error(backend):
    idx, ptr, info = OP.select_topk([torch.ones(5)], [], 0, None, None, False)
    assert len(idx) == 0
    assert ptr.tolist() == [0, 0]
    assert info[:5].tolist() == [0, 0, 0, 0, 0]
    idx, ptr, _ = OP.select_topk([], [], 0, None, None, False)
    assert len(idx) == 0
    assert ptr.tolist() == [0]


def test_what_passed_the_checks_passes_at_once(monkeypatch):
    checked = []
    monkeypatch.setattr(dispatch, "_require_alignment", lambda *_: checked.append(1))
    monkeypatch.setattr(dispatch, "_PASSED", {})
    weights = [torch.ones(4, 6), torch.ones(3)]
    for k in (1, 1, 2):
        OP.select_topk(weights, [], k, None, None, False)
    assert len(checked) == 2, "another number is checked"
    OP.select_topk([*weights, torch.ones(1)], [], 1, None, None, False)
    assert len(checked) == 3
    monkeypatch.setattr(dispatch, "_PASSED_TENSORS", 8)
    for k in (3, 4, 5):
        OP.select_topk(weights, [], k, None, None, False)
    assert sum(dispatch._PASSED.values()) <= 8 + 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.t_(), "is not contiguous"),
        (lambda t: t.resize_(5, 5), "has shape"),
        (lambda t: t.set_(t.view(3, 8)), "has shape"),
        (lambda t: setattr(t, "data", t.data.double()), "has dtype torch.float64"),
    ],
    ids=["transposed", "resized", "of another shape", "of another type"],
)
def test_a_tensor_that_changed_is_checked_again(change, message):
    a, b = torch.ones(4, 6), torch.zeros(4, 6)
    OP.select_topk([a], [b], 1, None, None, False)
    change(b)
    with pytest.raises(ValueError, match=message):
        OP.select_topk([a], [b], 1, None, None, False)
