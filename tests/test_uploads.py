"""What kernels read from small vectors: right on every stream, and in graphs that outlive them."""

import gc
import weakref
from importlib import import_module

import pytest
import torch

from sparse_ft_kernels import uploads
from sparse_ft_kernels.tile_table import TILE, TileTable, tile_table
from sparse_ft_kernels.uploads import Kept, upload

CPU = torch.device("cpu")


class Value:
    """Something that is made and kept."""


@pytest.fixture
def graph(monkeypatch):
    """A switch: is a graph being recorded?"""
    recording = [False]
    for module in (uploads, import_module("sparse_ft_kernels.tile_table")):
        monkeypatch.setattr(module, "capturing", lambda _: recording[0])
    monkeypatch.setattr(uploads, "_IN_GRAPHS", {})

    def switch(on: bool) -> None:
        recording[0] = on

    return switch


def test_the_latest_used_values_are_kept():
    kept: Kept[Value] = Kept(2)
    a, b = (kept.get(key, CPU, Value) for key in "ab")
    assert kept.get("a", CPU, Value) is a
    kept.get("c", CPU, Value)
    assert kept.get("a", CPU, Value) is a
    assert kept.get("b", CPU, Value) is not b


def test_values_are_kept_by_what_they_cost():
    kept: Kept[list[int]] = Kept(10, cost=len)
    few = kept.get("few", CPU, lambda: [1, 2])
    kept.get("many", CPU, lambda: [0] * 8)
    assert kept.get("few", CPU, list) is few
    kept.get("more", CPU, lambda: [0] * 9)
    assert kept.get("few", CPU, lambda: [5]) == [5]
    # One that exceeds the room is kept as long as it is the latest.
    large = kept.get("large", CPU, lambda: [0] * 50)
    assert kept.get("large", CPU, list) is large


def test_a_value_is_used_on_the_stream_that_made_it(monkeypatch):
    kept: Kept[Value] = Kept(8)
    first = kept.get("a", CPU, Value)
    monkeypatch.setattr(uploads, "_stream", lambda _: 7)
    second = kept.get("a", CPU, Value)
    assert second is not first
    assert kept.get("a", CPU, Value) is second


def test_what_a_graph_was_given_is_never_dropped(graph):
    kept: Kept[Value] = Kept(1)
    given = weakref.ref(kept.get("given", CPU, Value))
    graph(True)
    assert kept.get("given", CPU, Value) is given()
    own = weakref.ref(kept.get("own", CPU, Value))
    graph(False)
    other = weakref.ref(kept.get("other", CPU, Value))
    kept.get("another", CPU, Value)
    gc.collect()
    assert given() is not None
    assert own() is None, "it belongs to the graph"
    assert other() is None


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, (1 << 47) + 12345, -5, -(1 << 63), (1 << 63) - 1] * 50, torch.int64),
        ([0.1, 1e-300, -2.5, float("inf")] * 50, torch.float64),
        ([1.0], torch.float32),
        ([], torch.int64),
    ],
    ids=["int64", "fp64", "fp32", "none"],
)
def test_in_a_graph_values_are_arguments_of_kernels(graph, monkeypatch, values, dtype):
    graph(True)
    monkeypatch.setattr(torch, "tensor", None)  # a copy would read host memory at each replay
    found = upload(values, dtype, CPU)
    assert found.dtype == dtype
    assert found.tolist() == values


def test_the_table_of_a_graph_is_that_of_an_ordinary_step(graph):
    numels = [TILE + 3, 5, 0, TILE]

    def gradients():
        return [torch.ones(n) for n in (TILE + 3, 0, 0)] + [torch.ones(TILE).half()]

    def rows(table, tensors):
        starts = [t.data_ptr() for t in tensors]
        assert table.base.tolist() == [starts[0], starts[0] + 4 * TILE, 0, starts[3]]
        assert table.length.tolist() == [TILE, 3, 5, TILE]
        assert table.dtype.tolist() == [0, 0, 0, 2]
        assert (table.n, table.codes) == (4, 5)

    first, second = gradients(), gradients()
    eager = tile_table(first, numels)
    rows(eager, first)
    graph(True)
    assert tile_table(first, numels) is eager
    # A capture makes new gradients, at addresses of their own.
    rows(tile_table(second, numels), second)


def test_a_graph_of_unknown_tensors_is_refused(graph):
    graph(True)
    with pytest.raises(RuntimeError, match="run the same step once before the capture"):
        TileTable([torch.ones(123)], [123])
    with pytest.raises(RuntimeError, match="run the same step once before the capture"):
        tile_table([torch.ones(124)])
