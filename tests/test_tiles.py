"""Layout and Support: order, tiles, and every way to make a selection or to look at one."""

import copy
import pickle

import numpy as np
import pytest
import torch
from oracles import MODELS
from torch import Tensor

from sparse_ft import Layout, Support
from sparse_ft.tiles import TILE

SHAPES = {"c": (200_003,), "a": (7, 11, 13), "b": (0, 4), "d": (), "e": (256, 256), "f": (65_537,)}


@pytest.fixture
def layout() -> Layout:
    return Layout.of(SHAPES)


def some(layout: Layout, seed: int = 0, share: float = 0.01) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        n: (torch.rand(k, generator=g) < share).nonzero().reshape(-1)
        for n, k in zip(layout.names, layout.numels, strict=True)
    }


def test_tensors_stand_in_the_order_of_their_names_and_tiles_never_span_two(layout):
    assert layout.names == ("a", "b", "c", "d", "e", "f")
    assert layout.numels == (1001, 0, 200_003, 1, 65_536, 65_537)
    assert layout.tile_starts.tolist() == [0, 1, 1, 5, 6, 7, 9]
    assert layout.lengths.tolist() == [1001, TILE, TILE, TILE, 3395, 1, TILE, TILE, 1]
    assert layout.numel == sum(layout.numels)
    assert layout.n_tiles == 9
    assert layout.tiles_of("c") == slice(1, 5)
    assert layout.tiles_of("b") == slice(1, 1)
    assert [layout.locate(t) for t in range(9)] == [
        *[("a", 0), ("c", 0), ("c", TILE), ("c", 2 * TILE), ("c", 3 * TILE)],
        *[("d", 0), ("e", 0), ("f", 0), ("f", TILE)],
    ]
    assert "a" in layout
    assert "z" not in layout
    assert len(layout) == 6
    assert layout == Layout.of({n: torch.zeros(s) for n, s in SHAPES.items()})
    assert hash(layout) == hash(Layout.of(SHAPES))
    with pytest.raises(KeyError, match="'z'"):
        layout.ordinal("z")


def test_a_layout_refuses_names_out_of_order_and_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="'b' stands before 'a'"):
        Layout(("b", "a"), ((1,), (1,)))
    with pytest.raises(ValueError, match="stands before"):
        Layout(("a", "a"), ((1,), (1,)))
    with pytest.raises(ValueError, match="1 names and 2 shapes"):
        Layout(("a",), ((1,), (1,)))
    with pytest.raises(ValueError, match=r"'a' has a negative dimension"):
        Layout(("a",), ((-1,),))


@pytest.mark.parametrize("name", MODELS)
def test_indices_masks_and_arrays_describe_the_same_selection(name):
    layout = Layout.of({f"p{i}": shape for i, shape in enumerate(MODELS[name])})
    chosen = some(layout, share=0.1)
    shuffled = {n: flat[torch.randperm(len(flat))] for n, flat in chosen.items()}
    support = Support.from_indices(layout, shuffled)
    assert support.nnz == len(support) == sum(map(len, chosen.values()))
    for n, flat in chosen.items():
        assert torch.equal(support.indices(n), flat)
        assert torch.equal(support.mask(n).reshape(-1).nonzero().reshape(-1), flat)
        assert support.mask(n).shape == layout.shapes[layout.ordinal(n)]
        assert support.counts()[n] == len(flat)
        assert len(support.idx[support.entries_of(n)]) == len(flat)
    assert Support.from_masks({n: support.mask(n) for n in layout.names}) == support
    assert Support(layout, support.idx, support.ptr) == support
    assert [n for n, _ in support] == [n for n in layout.names if len(chosen[n])]
    assert all(torch.equal(flat, chosen[n]) for n, flat in support)
    full = Support.full(layout)
    assert full.nnz == layout.numel
    for n, k in zip(layout.names, layout.numels, strict=True):
        assert torch.equal(full.indices(n), torch.arange(k))
    assert full.density == (1.0 if layout.numel else 0.0)


def test_from_indices_takes_lists_and_arrays_and_refuses_what_is_no_position(layout):
    wanted = Support.from_indices(layout, {"c": torch.tensor([5, 70_000]), "d": torch.tensor([0])})
    assert Support.from_indices(layout, {"c": [70_000, 5], "d": [0]}) == wanted
    assert Support.from_indices(layout, {"d": np.array([0]), "c": np.array([5, 70_000])}) == wanted
    assert Support.from_indices(layout, {"c": []}).nnz == 0
    assert Support.from_indices(layout, {}).nnz == 0
    with pytest.raises(KeyError, match="'z'"):
        Support.from_indices(layout, {"z": [1]})
    with pytest.raises(ValueError, match=r"'c' is given twice"):
        Support.from_indices(layout, {"c": [1, 1]})
    with pytest.raises(ValueError, match=r"'c' run from -1 to -1"):
        Support.from_indices(layout, {"c": [-1]})
    with pytest.raises(ValueError, match=r"200003.*200003 elements"):
        Support.from_indices(layout, {"c": [200_003]})
    with pytest.raises(ValueError, match=r"'b'"):
        Support.from_indices(layout, {"b": [0]})
    # Neither fractions nor masks are positions.
    with pytest.raises(ValueError, match=r"'c' must be integers"):
        Support.from_indices(layout, {"c": [1.5]})
    with pytest.raises(ValueError, match=r"'e' must be integers.*from_masks"):
        Support.from_indices(layout, {"e": torch.ones(256, 256, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"mask of 'd' must be bool"):
        Support.from_masks({"d": torch.ones(())})


def test_arrays_that_do_not_fit_are_refused_by_tensor(layout):
    good = Support.from_indices(layout, {"c": [5, 70_000], "f": [65_536]})
    idx, ptr = good.idx, good.ptr

    def changed(at, value):
        out = ptr.clone()
        out[at] = value
        return out

    with pytest.raises(ValueError, match="uint16"):
        Support(layout, idx.to(torch.int64), ptr)
    with pytest.raises(ValueError, match=r"\(10,\)"):
        Support(layout, idx, ptr[:-1])
    with pytest.raises(ValueError, match="from 0 to nnz"):
        Support(layout, idx[:-1], ptr)
    with pytest.raises(ValueError, match="decreases"):
        Support(layout, idx, changed(2, 3))
    with pytest.raises(ValueError, match=r"'f'"):
        Support(layout, torch.tensor([5, 4464, 1], dtype=torch.uint16), ptr)
    with pytest.raises(ValueError, match=r"ascending.*'c'"):
        Support(layout, torch.tensor([5, 5, 0], dtype=torch.uint16), changed(2, 2))


def test_restrict_and_expand_keep_each_tensors_entries(layout):
    support = Support.from_indices(layout, some(layout))
    part = support.restrict(["f", "a", "c"])
    assert part.layout.names == ("a", "c", "f")
    for n in part.layout.names:
        assert torch.equal(part.indices(n), support.indices(n))
    back = part.expand(layout)
    assert back.layout == layout
    for n in layout.names:
        wanted = support.indices(n) if n in part.layout else torch.zeros(0, dtype=torch.int64)
        assert torch.equal(back.indices(n), wanted)
    assert Support(back.layout, back.idx, back.ptr) == back
    assert support.restrict(layout.names) == support
    assert support.restrict([]).nnz == 0
    wide = Layout.of({**SHAPES, "0": (3,), "dd": (70_000,), "z": (2,)})
    for n in layout.names:
        assert torch.equal(support.expand(wide).indices(n), support.indices(n))
    with pytest.raises(KeyError, match="'z'"):
        support.restrict(["z"])
    with pytest.raises(ValueError, match=r"lacks 'c'"):
        support.expand(Layout.of({n: s for n, s in SHAPES.items() if n != "c"}))
    with pytest.raises(ValueError, match=r"'c' has shape \(200003,\) here and \(3,\)"):
        support.expand(Layout.of({**SHAPES, "c": (3,)}))


def test_a_support_is_an_ordinary_value(layout):
    support = Support.from_indices(layout, {"c": [5, 70_000]})
    same = Support.from_indices(layout, {"c": [5, 70_000]})
    assert support == same
    assert support != Support.from_indices(layout, {"c": [5, 70_001]})
    # The same offsets in another tile.
    assert support != Support.from_indices(layout, {"c": [5, 70_000 + TILE]})
    assert support != Support.from_indices(Layout.of({**SHAPES, "z": (1,)}), {"c": [5, 70_000]})
    assert support != "support"
    assert support.to("cpu") == support
    support.info["tied"] = 3
    for copied in (copy.deepcopy(support), pickle.loads(pickle.dumps(support))):
        assert copied == support
        assert copied.info == {"tied": 3}
    assert support.density == 2 / layout.numel
    assert repr(support) == "Support(2 of 332,078 entries, 0.001%, 6 tensors, cpu)"
    assert repr(layout) == "Layout(6 tensors, 332,078 elements, 9 tiles)"
    with pytest.raises(TypeError, match="unhashable"):
        hash(support)
