"""The benchmark's own writers and readers of other formats keep every entry."""

import numpy as np
import pytest
import torch

import sparse_ft as sf
from benchmarks.cases import files

SHAPES = {"bias": (7,), "matrix": (5, 3), "untouched": (4,), "wide": (300, 301)}


@pytest.fixture
def delta():
    generator = torch.Generator().manual_seed(0)
    positions = {"bias": torch.tensor([0, 6]), "matrix": torch.tensor([1, 4, 5, 14])}
    positions["wide"] = torch.randperm(300 * 301, generator=generator)[:999].sort().values
    support = sf.Support.from_indices(sf.Layout.of(SHAPES), positions)
    return sf.SparseDelta(support, torch.randn(len(support), generator=generator))


def dense(found):
    return {name: sparse.to_dense().view(SHAPES[name]) for name, sparse in found.items()}


def test_the_legacy_file_has_the_published_structure(delta, tmp_path):
    files.write_legacy(delta, tmp_path / "pytorch_diff.bin")
    content = torch.load(tmp_path / "pytorch_diff.bin", weights_only=False)
    assert sorted(content) == ["abs", "diffs"]
    assert sorted(content["diffs"]) == sorted(SHAPES)
    # Positions 1, 4, 5 and 14 are (0, 1), (1, 1), (1, 2) and (4, 2); column-major 5, 6, 11 and 14.
    entry = content["diffs"]["matrix"]
    assert entry["size"] == torch.Size((5, 3))
    assert entry["index_steps"] == [5, 1, 5, 3]
    assert isinstance(entry["index_steps"][0], np.int64)
    assert all(type(step) is int for step in entry["index_steps"][1:])
    assert content["diffs"]["untouched"]["index_steps"] == []


def test_legacy_and_coo_readers_find_every_entry(delta, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "shapes_of", lambda _: SHAPES)
    files.write_legacy(delta, tmp_path / "pytorch_diff.bin")
    files.write_coo(delta, tmp_path / "coo.safetensors")
    legacy = dense(files.read_legacy(tmp_path / "pytorch_diff.bin"))
    coo = dense(files.read_coo(tmp_path / "coo.safetensors", "any"))
    for name in SHAPES:
        torch.testing.assert_close(legacy[name], delta.dense(name), rtol=0, atol=0)
        torch.testing.assert_close(coo[name], delta.dense(name), rtol=0, atol=0)
