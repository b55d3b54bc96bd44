"""The report on overlap: closed forms, sets, chance, and that what is written can be read again."""

import builtins
import csv
import dataclasses
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import sparse_ft as sf
from sparse_ft.overlap import METRICS, Overlap, layer_of

SHAPES = {
    "model.embed_tokens.weight": (60, 10),
    "model.layers.2.mlp.weight": (300,),
    "model.layers.10.mlp.weight": (300,),
    "model.norm.weight": (50,),
}
LAYOUT = sf.Layout.of(SHAPES)


def flat_delta(at: np.ndarray, values: np.ndarray) -> sf.SparseDelta:
    """A delta from positions in the tensors, one after the other in canonical order."""
    ends = np.cumsum((0, *LAYOUT.numels))
    order = np.argsort(at)
    at, values = at[order], values[order]
    indices = {
        name: at[(at >= begin) & (at < end)] - begin
        for name, begin, end in zip(LAYOUT.names, ends, ends[1:], strict=False)
    }
    support = sf.Support.from_indices(LAYOUT, indices)
    return sf.SparseDelta(support, torch.tensor(values, dtype=torch.float32))


def random_delta(seed: int, k: int) -> sf.SparseDelta:
    draw = np.random.default_rng(seed)
    return flat_delta(draw.permutation(LAYOUT.numel)[:k], draw.standard_normal(k) + 0.5)


@st.composite
def pairs(draw: st.DrawFn) -> list[dict[int, float]]:
    value = st.floats(-8, 8, width=16).filter(bool)
    return [
        draw(st.dictionaries(st.integers(0, LAYOUT.numel - 1), value, min_size=1, max_size=60))
        for _ in range(2)
    ]


def from_map(entries: dict[int, float]) -> sf.SparseDelta:
    return flat_delta(np.array(list(entries), np.int64), np.array(list(entries.values())))


@settings(max_examples=60, deadline=None)
@given(pairs())
def test_against_sets_and_dense_vectors(maps):
    found = sf.overlap([from_map(m) for m in maps])
    dense = np.zeros((2, LAYOUT.numel))
    for vector, entries in zip(dense, maps, strict=True):
        for at, value in entries.items():
            vector[at] = value
    a, b = dense
    common = sorted(maps[0].keys() & maps[1].keys())
    row = found.rows()[0]
    assert row["both"] == len(common)
    assert row["expected"] == pytest.approx(len(maps[0]) * len(maps[1]) / LAYOUT.numel)
    assert row["lift"] == pytest.approx(len(common) / row["expected"])
    assert row["share_b"] == len(common) / len(maps[1])
    squares = (a**2).sum() + (b**2).sum()
    assert row["interference"] == pytest.approx(1 - ((a + b) ** 2).sum() / squares)
    if not common:
        assert row["sign_agreement"] is row["cosine_common"] is row["embedding_share"] is None
        return
    x, y = a[common], b[common]
    assert row["sign_agreement"] == (np.sign(x) == np.sign(y)).mean()
    assert row["cosine_common"] == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)))
    assert row["energy_share_a"] == pytest.approx(x @ x / (a @ a))
    # "model.embed_tokens.weight" is the first name, so its elements are the first 600.
    assert row["embedding_share"] == np.mean([at < 600 for at in common])


def test_closed_forms():
    a = random_delta(1, 100)
    found = sf.overlap([a, a, -a], names=["a", "again", "minus"])
    assert found.interference[0].tolist() == pytest.approx([-1, -1, 1])
    assert found.cosine_common[0].tolist() == pytest.approx([1, 1, -1])
    assert found.sign_agreement[0].tolist() == [1, 1, 0]
    assert found.energy_share.tolist() == np.ones((3, 3)).tolist()
    assert found.lift[0, 1] == pytest.approx(LAYOUT.numel / 100)
    even, odd = (flat_delta(np.arange(start, 800, 2), np.ones(400)) for start in (0, 1))
    found = sf.overlap([even, odd])
    assert found.interference[0, 1] == found.cosine[0, 1] == found.lift[0, 1] == 0
    assert np.isnan(found.sign_agreement[0, 1])


def test_chance_is_what_random_supports_have():
    k, n = 125, LAYOUT.numel
    deltas = [random_delta(seed, k) for seed in range(30)]
    found = sf.overlap(deltas)
    both = found.both[np.triu_indices(30, 1)]
    # Hypergeometric, and pairs of independent supports are uncorrelated.
    deviation = np.sqrt(k * (k / n) * (1 - k / n) * (n - k) / (n - 1) / len(both))
    assert abs(both.mean() - found.expected[0, 1]) < 4 * deviation
    assert abs(found.jaccard[np.triu_indices(30, 1)].mean() - found.expected_jaccard[0, 1]) < 0.01


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("roberta.encoder.layer.7.attention.self.query.weight", "roberta.encoder.layer.7"),
        ("roberta.embeddings.LayerNorm.weight", "embeddings"),
        ("model.embed_tokens.weight", "embeddings"),
        ("encoder.layer.3.attention.distance_embedding.weight", "encoder.layer.3"),
        ("decoder.block.0.layer.1.weight", "decoder.block.0"),
        ("lm_head.dense.weight", "other"),
    ],
)
def test_the_layer_of_a_name(name, layer):
    assert layer_of(name) == layer


def test_layers_are_in_order_and_add_up():
    found = sf.overlap([random_delta(seed, 300) for seed in range(3)])
    assert found.layers == ("embeddings", "model.layers.2", "model.layers.10", "other")
    assert found.by_layer(found.sizes).tolist() == [600, 300, 300, 50]
    both = found.by_layer(found.by_tensor)
    assert both.sum(-1).tolist() == found.both.tolist()
    assert found.embedding_share.tolist() == (both[..., 0] / found.both).tolist()
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [x["layer"] for x in report["layers"]] == list(found.layers)
    assert report["layers"][1]["both"] == both[..., 1].tolist()


def test_csv_can_be_read_again(tmp_path):
    names = ("a, b", 'quo"ted', "ł")
    empty = flat_delta(np.zeros(0, np.int64), np.zeros(0))
    found = sf.overlap([random_delta(1, 90), random_delta(2, 80), empty], names)
    found.to_csv(tmp_path / "pairs.csv")
    with open(tmp_path / "pairs.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    rows = found.rows()
    assert [(r["a"], r["b"]) for r in read] == list(itertools.combinations(names, 2))
    for text, row in zip(read, rows, strict=True):
        for key, value in row.items():
            assert text[key] == ("" if value is None else str(value))
    assert read[1]["sign_agreement"] == ""
    assert int(read[0]["entries_b"]) == 80


def test_labels():
    by_language = [random_delta(1, 9), random_delta(2, 9)]
    for delta, lang in zip(by_language, ("sw", "ha"), strict=True):
        delta.meta["lang"] = lang
    assert sf.overlap(by_language).labels == ("sw", "ha")
    assert sf.overlap([by_language[0]] * 2).labels == ("sw 0", "sw 1")
    assert sf.overlap([random_delta(1, 9)] * 2).labels == ("0", "1")
    assert "x (          9)" in repr(sf.overlap(by_language, ["x", "y"]))
    with pytest.raises(ValueError, match="one for each of 2 deltas"):
        sf.overlap(by_language, ["x"])
    with pytest.raises(ValueError, match="all be different"):
        sf.overlap(by_language, ["x", "x"])


def printed(table, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_table_and_progress(capsys):
    found = sf.overlap([random_delta(1, 90), random_delta(2, 80)], ["[red]", "b"], progress=True)
    assert "100%" in capsys.readouterr().err
    for metric, (title, spec) in METRICS.items():
        text = printed(found.table(metric), 60)
        assert text.splitlines()[0].rstrip() == title
        assert "[red]" in text
        assert format(float(getattr(found, metric)[0, 1]), spec) in text
    bundle = found.table()._repr_mimebundle_([], [])
    assert METRICS["share"][0] in bundle["text/plain"]
    with pytest.raises(ValueError, match=r"Overlap.table: unknown metric 'x'; there are both, "):
        found.table("x")


def long_names(n: int) -> list[str]:
    return [f"xlmr-lang-sft-l{i}-small" for i in range(n)]


@pytest.mark.parametrize("width", [45, 80, 300])
@pytest.mark.parametrize("common", [True, False])
def test_a_table_is_whole_at_any_width(width, common):
    n = 12
    names = long_names(n) if common else [f"{'x' * i}-sft-{i}" for i in range(n)]
    found = sf.overlap([random_delta(seed, 90) for seed in range(n)], names)
    lines = printed(found.table("share"), width).splitlines()
    assert max(map(len, lines)) <= width
    columns = [f"l{i}" if common else str(i + 1) for i in range(n)]
    if not common and width == 300:
        columns = names
    words = [line.split() for line in lines]
    heads = [line[1:] for line in words if line[:1] == ["entries"]]
    assert list(itertools.chain(*heads)) == columns
    assert (len(heads) == 1) == (width == 300)
    for name, row in zip(names, found.share, strict=True):
        # Each line begins with a number (if columns have one), the name and its entries.
        rows = [line for line in words if name in line[:2] and "entries" not in line]
        cells = [line[line.index(name) + 2 :] for line in rows]
        assert list(itertools.chain(*cells)) == [f"{value:.1%}" for value in row]


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        (["xlmr-sft-sw-small", "xlmr-sft-ha-small"], ["sw", "ha"]),
        (["swahili", "swati"], ["swahili", "swati"]),
        (["me/sft-sw", "me/ner.en"], ["sft-sw", "ner.en"]),
        (["sw-small", "ha_small"], ["sw-small", "ha_small"]),
        (["a-b-b", "a-b"], ["b-b", "b"]),
        (["a-", "a-b"], ["a-", "a-b"]),
        (["sft", "sft-sw"], ["sft", "sft-sw"]),
        (["sft-sw"], ["sw"]),
    ],
)
def test_columns_lose_the_words_that_all_share(labels, columns):
    assert sf.overlap([random_delta(1, 9)] * len(labels), labels).table().columns == columns


def test_what_rounds_to_zero_has_no_sign():
    found = sf.overlap([random_delta(1, 90), random_delta(2, 80)])
    found = dataclasses.replace(found, dot=found.dot * np.array([[1, -1e-9], [-1e-9, 1]]))
    assert found.cosine[0, 1] * found.interference[0, 1] < 0
    for metric in ("cosine", "interference"):
        assert "-0" not in printed(found.table(metric), 80)


@pytest.fixture
def figures(monkeypatch):
    """Figures in place of files: plots append to it."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    return drawn


@pytest.mark.parametrize("n", [1, 2, 30])
def test_plots(n, tmp_path):
    from matplotlib.image import imread

    # Dollars would make a formula, and this one an error.
    names = [f"{name} $\\x$" for name in long_names(n)]
    found = sf.overlap([random_delta(seed, 90) for seed in range(n)], names)
    found.plot(tmp_path / "share.PNG")
    found.plot(tmp_path / "cosine.svg", metric="cosine_common")
    if n == 1:
        with pytest.raises(ValueError, match="makes no pair"):
            found.plot_layers(tmp_path / "layers.png")
        return
    found.plot_layers(tmp_path / "layers.png")
    for name in ("share.PNG", "layers.png"):
        image = imread(tmp_path / name)
        # Nothing is cut off: there is white all around.
        for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
            assert (edge == 1).all()
    assert "<svg" in Path(tmp_path / "cosine.svg").read_text()


# One for each way in which values are written, and as far as its scale reaches at least.
@pytest.mark.parametrize(
    ("metric", "least"), [("both", 10), ("lift", 0.1), ("share", 0.01), ("interference", 0.05)]
)
@pytest.mark.parametrize("scale", [0.0, 1e-9, 3e-3, 0.026, 0.37, 7e5])
def test_scale_of_a_heat_map(metric, least, scale, figures, monkeypatch):
    found = sf.overlap([random_delta(1, 90), random_delta(2, 80)])
    signed = metric == "interference"
    values = np.array([[9e9, -scale if signed else scale], [scale / 2, 9e9]])
    monkeypatch.setattr(Overlap, metric, property(lambda _: values), raising=False)
    found.plot("x.png", metric)
    axes, bar = figures[0].axes
    low, high = axes.images[0].get_clim()
    assert high == pytest.approx(max(scale, least))
    assert low == (-high if signed else 0)
    figures[0].draw_without_rendering()
    ticks = [
        (tick, label.get_text())
        for tick, label in zip(bar.get_yticks(), bar.get_yticklabels(), strict=True)
        if low <= tick <= high
    ]
    assert len(ticks) > 1
    assert len({text for _, text in ticks}) == len(ticks)
    for tick, text in ticks:
        number = float(text.replace(",", "").rstrip("%")) / (100 if "%" in text else 1)
        assert number == pytest.approx(tick, rel=1e-9, abs=1e-12)
        assert not text.startswith("-0.000")


def test_names_in_plots(figures):
    found = sf.overlap([random_delta(seed, 90) for seed in range(3)], long_names(3))
    found.plot("x.png")
    found.plot_layers("x.png")
    heat, layers = figures[0].axes[0], figures[1].axes[0]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["l0", "l1", "l2"]
    assert [label.get_text() for label in heat.get_yticklabels()] == long_names(3)
    names = [label.get_text() for label in layers.get_xticklabels()]
    assert names == ["embeddings", "2", "10", "other"]


@pytest.mark.parametrize("name", ["x.gif", "x", "png", "x.png.jpg"])
def test_plots_refuse_other_files(name, tmp_path):
    found = sf.overlap([random_delta(1, 9), random_delta(2, 9)])
    for draw in (found.plot, found.plot_layers):
        with pytest.raises(ValueError, match=rf"end in .png, .svg or .pdf, found .*{name}'"):
            draw(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_plots_say_what_is_missing(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest)

    found = sf.overlap([random_delta(1, 9), random_delta(2, 9)])
    monkeypatch.setattr(builtins, "__import__", without)
    for draw in (found.plot, found.plot_layers):
        with pytest.raises(ModuleNotFoundError, match=r"sparse-ft\[plot\]"):
            draw(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
