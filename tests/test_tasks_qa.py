"""Extractive question answering: spans, windows, and that models learn."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import task_models

from sparse_ft.tasks import TASKS, DataError, Examples
from sparse_ft.tasks.qa import best_spans

TASK = TASKS["qa"]
BASES = ["bert", "xlm_roberta", "llama"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: getattr(task_models, name)(folder / name) for name in BASES}


def example(line, question, answer):
    context = task_models.TEXT[line]
    answers = {"text": [answer], "answer_start": [context.index(answer)]}
    return {"question": question, "context": context, "answers": answers}


@pytest.mark.parametrize("name", BASES)
def test_the_backbone_is_that_of_the_base(bases, name):
    """Bit for bit and by the same names, or no SFT of a language would fit."""
    from transformers import AutoModel

    model, base = TASK().build(bases[name]), AutoModel.from_pretrained(bases[name])
    own = dict(model.named_parameters())
    prefix = base.base_model_prefix
    for tensor, value in base.named_parameters():
        if "pooler" not in tensor:
            assert torch.equal(own[f"{prefix}.{tensor}"], value), tensor


def test_a_base_that_lacks_weights_is_refused(bases, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bases["bert"], tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in weights.items() if "layer.0.output.dense.weight" not in n}
    assert len(kept) == len(weights) - 1
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for 1 of the .*layer.0.output.dense.weight"):
        TASK().build(folder)


def questions():
    return TASK().checked(
        Examples(
            [
                example(5, "who wrote", "Anna"),
                example(1, "lives in", "Paris"),
                example(2, "anaishi", "Nairobi"),
                example(3, "what film", "terrible"),
                example(0, "what sat", "the cat"),
            ],
            "qa.json",
        )
    )


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 9))
def test_best_spans_are_found_among_all(seed, length, longest):
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, 3, length, generator=generator)
    inside = torch.sort(torch.randint(length, (3, 2), generator=generator))[0]
    firsts, lasts, scores = best_spans(start, end, inside, longest)
    for row in range(3):
        low, high = inside[row].tolist()
        spans = {
            (i, j): float(start[row, i] + end[row, j])
            for i in range(low, high + 1)
            for j in range(i, min(high + 1, i + longest))
        }
        best = max(spans.values())
        assert float(scores[row]) == best
        assert spans[int(firsts[row]), int(lasts[row])] == best


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("max_length", [64, 26])
def test_features_mark_the_answer(bases, base, max_length):
    """What the marked pieces say is the answer, wherever the window holds all of it."""
    task, examples = TASK(stride=6), questions()
    tokenizer = task.tokenizer(bases[base])
    features = task.encode(examples, tokenizer, max_length)
    holding = set()
    for feature in features:
        i, (first, last), offsets = (feature[key] for key in ("example", "text", "offsets"))
        assert len(feature["input_ids"]) <= max_length
        (begin, answer), *_ = examples[i]["answers"]
        start, end = feature["start_positions"], feature["end_positions"]
        whole = offsets[first][0] <= begin and begin + len(answer) <= offsets[last][1]
        if whole:
            holding.add(i)
            assert first <= start <= end <= last
            said = examples[i]["context"][offsets[start][0] : offsets[end][1]]
            assert said.strip() == answer
        else:
            assert start == end == 0
    assert holding == {*range(len(examples))}
    if max_length == 64:
        assert len(features) == len(examples)
    elif base != "bert":
        assert len(features) > len(examples)


@pytest.mark.parametrize("base", BASES)
def test_models_learn(bases, base):
    task, examples = TASK(stride=6), questions()
    tokenizer, model = task.tokenizer(bases[base]), task.build(bases[base])
    features = task.encode(examples, tokenizer, 40)
    assert task.evaluate(model, features, examples, tokenizer)["exact_match"] < 1
    task_models.fit(task, model, features, tokenizer)
    found = task.evaluate(model, features, examples, tokenizer)
    assert found == {"exact_match": 1, "f1": 1, "n": 5}
    assert task.evaluate(model, features, examples, tokenizer, batch_size=1) == found


def test_the_best_window_answers(bases):
    task, examples = TASK(stride=2), questions()[:1]
    tokenizer, model = task.tokenizer(bases["bert"]), task.build(bases["bert"])
    features = task.encode(examples, tokenizer, 10)
    assert len(features) > 1
    wanted = tokenizer.convert_tokens_to_ids("1999")

    def forward(input_ids, **_):
        logits = (input_ids == wanted).float()
        return type("Output", (), {"start_logits": logits, "end_logits": logits})

    model.forward = forward
    for feature in features:
        assert wanted in feature["input_ids"] or feature is not features[-1]
    examples[0]["answers"] = [(0, "1999")]
    assert task.evaluate(model, features, examples, tokenizer)["exact_match"] == 1


def test_files(tmp_path):
    rows = [{"id": 7, **example(1, " who? ", "Anna")}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(rows[0]), encoding="utf-8")
    (read,) = TASK().read(path)
    assert read == {
        "id": "7",
        "question": "who?",
        "context": task_models.TEXT[1],
        "answers": [(0, "Anna")],
    }
    rows[0]["answers"] = [{"text": "Paris", "answer_start": 14}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert TASK().read(path)[0]["answers"] == [(14, "Paris")]


def test_checked_examples_stay_as_they_are_and_spaces_are_no_answer():
    context = "the book by Anna "
    answers = {"text": ["Anna ", " book"], "answer_start": [12, 3]}
    given = Examples([{"question": "who", "context": context, "answers": answers}])
    once = TASK().checked(given)
    assert given[0]["answers"] is answers
    assert once[0]["answers"] == [(12, "Anna"), (4, "book")]
    assert TASK().checked(once) == once


def test_errors(bases):
    task, tokenizer = TASK(stride=2), TASK().tokenizer(bases["bert"])

    def wrong(message, **changes):
        with pytest.raises(DataError, match=message):
            task.checked(Examples([{**example(1, "who", "Anna"), **changes}], "qa.json"))

    wrong(
        "qa.json, example 1: the context does not say 'Anna' at character 3",
        answers={"text": ["Anna"], "answer_start": [3]},
    )
    wrong("has no answers", answers={"text": [], "answer_start": []})
    wrong("has no answers", answers={"text": ["Anna"], "answer_start": []})
    wrong("has no answers", answers=[{"text": "Anna"}])
    wrong("does not say", answers={"text": [""], "answer_start": [0]})
    wrong("the question or the context is empty", question=" ")
    wrong("'context' must be str", context=None)
    with pytest.raises(DataError, match="the id 'a' stands there twice"):
        task.checked(Examples([{"id": "a", **example(1, "who", "Anna")}] * 2))
    with pytest.raises(DataError, match="the question takes 8 of 9 pieces"):
        task.encode(task.checked(Examples([example(1, "the " * 8, "Anna")])), tokenizer, 12)
    with pytest.raises(ValueError, match="max_length is 130; the tokenizer says"):
        TASK().encode(questions(), tokenizer, 130)
    with pytest.raises(ValueError, match="metric is 'accuracy'"):
        TASK(metric="accuracy")
    with pytest.raises(ValueError, match="max_answer 1 or more"):
        TASK(max_answer=0)
    with pytest.raises(DataError, match="holds no question"):
        task.encode(Examples([]), tokenizer, 32)
