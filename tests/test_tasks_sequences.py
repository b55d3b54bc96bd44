"""Sequence classification: texts, pairs, label sets, and that models learn."""

import dataclasses
import json

import pytest

pytest.importorskip("transformers")

import task_models
import torch
from transformers import BertConfig, BertModel

from sparse_ft.tasks import TASKS, DataError, Examples
from sparse_ft.tasks.recipes import recipe
from sparse_ft.tasks.runner import evaluate, train

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
        "metric": "f1", "text": "text", "pair": None, "label": "label", "pooling": None
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


@pytest.mark.parametrize("base", BASES)
def test_the_mean_of_the_states_can_be_read(bases, base):
    task = TASK(pooling="mean")
    labels, tokenizer = task.labels(TEXT), task.tokenizer(bases[base])
    model = task.build(bases[base], labels).eval()
    assert not any("pooler" in name for name, _ in model.named_parameters())
    features = task.encode(TEXT, tokenizer, 32, labels=labels)
    # By hand, of one text without padding: the layer is linear, and so is the mean.
    (layer,) = (m for m in model.children() if isinstance(m, torch.nn.Linear))
    inputs = {k: torch.tensor([v]) for k, v in features[0].items() if k != "labels"}
    states = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state
    wanted = layer(states.mean(1))
    assert torch.allclose(task.scores(model, inputs), wanted, rtol=0, atol=1e-5)
    loss = task.loss(model, {**inputs, "labels": torch.tensor([features[0]["labels"]])})
    assert torch.allclose(loss, -wanted.log_softmax(1)[0, features[0]["labels"]], atol=1e-5)
    # Padding is no part of the mean.
    batch = task.collate(tokenizer)([features[0], max(features, key=lambda f: len(f["input_ids"]))])
    assert (batch["attention_mask"][0] == 0).any()
    del batch["labels"]
    assert torch.allclose(task.scores(model, batch)[:1], wanted, rtol=0, atol=1e-5)
    task_models.fit(task, model, features, tokenizer)
    found = task.evaluate(model, features, TEXT, tokenizer)
    assert found == {"accuracy": 1, "f1": 1, "n": 6}
    assert task.evaluate(model, features, TEXT, tokenizer, batch_size=1) == found


def test_a_tuned_mean_is_read_again(bases, tmp_path):
    task = TASK(pooling="mean")
    assert TASK(**dataclasses.asdict(task)) == task
    model = task.build(bases["bert"], ["a", "b"], seed=3)
    model.save_pretrained(tmp_path)
    again = task.build(tmp_path, ["a", "b"], seed=4).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"pooling": "mean"}])
def test_a_run_is_scored_as_it_was_trained(tmp_path, options):
    """On a base without a pooler, with a seed that is not the default, on an SFT of a language."""
    base = task_models.bert(tmp_path / "bert")
    bare = BertModel(BertConfig.from_pretrained(base), add_pooling_layer=False)
    bare.save_pretrained(base)
    data, text = tmp_path / "data.jsonl", tmp_path / "text.txt"
    data.write_text("".join(json.dumps(row) + "\n" for row in TEXT), encoding="utf-8")
    text.write_text("\n".join(task_models.TEXT), encoding="utf-8")
    short = {"density": 0.2, "batch_size": 3, "max_length": 16}
    phi = train(
        *(text, base, tmp_path / "language.safetensors"),
        recipe=recipe("lt-sft-language", steps=2, lr=0.01, evaluate_every=None, **short),
    ).path
    made = train(
        *(data, base, tmp_path / "task.safetensors"),
        recipe=recipe("lt-sft-sentiment", steps=(4, 40), lr=0.01, evaluate_every=40, **short),
        valid=data,
        sft=phi,
        options={"metric": "accuracy", **options},
        seed=1,
    )
    (row,) = evaluate(base, made.path, data, langs=[phi])
    assert row["accuracy"] == made.phases[-1]["best"] > 0.6
    assert any("pooler" in name for name in made.delta.layout.names) == (not options)


def test_a_pooler_that_the_base_lacks_is_of_the_base(tmp_path):
    """θ0 must not depend on the seed of the head: an SFT fits one θ0 alone."""
    bare = BertModel(
        BertConfig.from_pretrained(task_models.bert(tmp_path)), add_pooling_layer=False
    )
    bare.save_pretrained(tmp_path)
    one, two = (dict(TASK().build(tmp_path, ["a", "b"], seed=s).named_parameters()) for s in (1, 2))
    assert not torch.equal(one["classifier.weight"], two["classifier.weight"])
    for name in one.keys() - {"classifier.weight"}:
        assert torch.equal(one[name], two[name]), name
    drawn = one["bert.pooler.dense.weight"]
    assert drawn.std().item() == pytest.approx(BertConfig().initializer_range, rel=0.2)
    assert (one["bert.pooler.dense.bias"] == 0).all()


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
    with pytest.raises(ValueError, match="pooling is 'max'; it must be \"mean\", or none"):
        TASK(pooling="max")
    with pytest.raises(DataError, match="holds no example"):
        task.encode(Examples([]), task.tokenizer(bases["bert"]), 8, labels=["a", "b"])
