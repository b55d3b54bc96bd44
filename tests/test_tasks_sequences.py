"""Sequence classification: texts, pairs, label sets, and that models learn."""

import dataclasses

import pytest

pytest.importorskip("transformers")

import task_models

from sparse_ft.tasks import TASKS, DataError, Examples

TASK = TASKS["sequences"]
BASES = ["bert", "xlm_roberta", "llama"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: getattr(task_models, name)(folder / name) for name in BASES}


LABELS = ["cat", "place", "place", "bad", "good", "question"]
TEXT = Examples(
    ({"text": t, "label": label} for t, label in zip(task_models.TEXT, LABELS, strict=True)),
    "s.csv",
)


@pytest.mark.parametrize("base", BASES)
def test_models_learn(bases, base):
    task = TASK()
    labels, tokenizer = task.labels(TEXT), task.tokenizer(bases[base])
    assert labels == ["bad", "cat", "good", "place", "question"]
    model = task.build(bases[base], labels)
    assert [model.config.id2label[i] for i in range(5)] == labels
    features = task.encode(TEXT, tokenizer, 32, labels=labels)
    assert task.evaluate(model, features, TEXT, tokenizer)["accuracy"] < 1
    task_models.fit(task, model, features, tokenizer)
    found = task.evaluate(model, features, TEXT, tokenizer)
    assert found == {"accuracy": 1, "f1": 1, "n": 6}
    # The padding of a batch changes nothing, nor does its size.
    assert task.evaluate(model, features, TEXT, tokenizer, batch_size=1) == found


def test_pairs(bases):
    task = TASK(text="premise", pair="hypothesis")
    rows = Examples([{"premise": "the cat sat", "hypothesis": "Anna", "label": 1}], "x.jsonl")
    examples = task.checked(rows)
    assert examples[0]["label"] == "1"
    tokenizer = task.tokenizer(bases["bert"])
    (feature,) = task.encode(examples, tokenizer, 16, labels=["0", "1"])
    assert tokenizer.convert_ids_to_tokens(feature["input_ids"]) == [
        *("[CLS]", "the", "cat", "sat", "[SEP]", "Anna", "[SEP]")
    ]
    assert feature["token_type_ids"] == [0] * 5 + [1] * 2
    # The longer of the two is cut.
    (feature,) = task.encode(examples, tokenizer, 5, labels=["0", "1"])
    assert tokenizer.convert_ids_to_tokens(feature["input_ids"]) == [
        *("[CLS]", "the", "[SEP]", "Anna", "[SEP]")
    ]


def test_macro_f1_can_choose(bases):
    task = TASK(metric="f1")
    assert task.greater_is_better
    assert dataclasses.asdict(task) == {
        "metric": "f1", "text": "text", "pair": None, "label": "label"
    }  # fmt: skip
    assert TASK(**dataclasses.asdict(task)) == task


def test_heads_have_two_layers_on_the_first_piece(bases):
    labels = ["a", "b"]
    for base, names in (
        ("bert", {"bert.pooler.dense", "classifier"}),
        ("xlm_roberta", {"classifier.dense", "classifier.out_proj"}),
    ):
        model = TASK().build(bases[base], labels)
        found = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
        assert names <= found


def test_a_base_with_a_head_of_another_size_is_refused(bases, tmp_path):
    TASK().build(bases["bert"], ["a", "b", "c"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="have other shapes than this task needs"):
        TASK().build(tmp_path, ["a", "b"])
    assert TASK().build(tmp_path, ["a", "b", "c"]).config.num_labels == 3


def test_files(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\nfine,good\npoor,bad\n", encoding="utf-8")
    assert TASK().labels(TASK().read(tmp_path, "train")) == ["bad", "good"]
    path.write_text("text,label\nfine,good\npoor,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.csv, line 3: 'label' is empty"):
        TASK().read(path)
    with pytest.raises(DataError, match=r"line 2: there is no field 'premise'; there are: text, l"):
        TASK(text="premise").read(path)


def test_errors(bases):
    task = TASK()
    with pytest.raises(DataError, match=r"s\.csv, example 1: the label 'cat' is not one of the"):
        task.encode(TEXT, task.tokenizer(bases["bert"]), 8, labels=["a", "b"])
    with pytest.raises(DataError, match="has one label, \\['x'\\]; two are needed"):
        task.labels(Examples([{"text": "a", "label": "x"}]))
    with pytest.raises(DataError, match="'label' must be str or int, found 'None'"):
        task.checked(Examples([{"text": "a", "label": None}]))
    with pytest.raises(ValueError, match="metric is 'las'"):
        TASK(metric="las")
    with pytest.raises(DataError, match="holds no example"):
        task.encode(Examples([]), task.tokenizer(bases["bert"]), 8, labels=["a", "b"])
