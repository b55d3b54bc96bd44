"""Token classification: first pieces, windows, unreadable words, labels, and that models learn."""

import json
import shutil
from itertools import pairwise

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import task_models

from sparse_ft.tasks import TASKS, DataError, Examples
from sparse_ft.tasks.heads import load_tokenizer
from sparse_ft.tasks.tokens import UPOS, Words, windows

TASK = TASKS["tokens"]
BASES = ["bert", "xlm_roberta", "llama"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: getattr(task_models, name)(folder / name) for name in BASES}


def named_entities(*sentences):
    """Words that begin with a capital are names; those after "in" are places."""
    rows = []
    for sentence in sentences:
        words, tags = sentence.split(), []
        for before, word in zip(["", *words], words, strict=False):
            kind = "LOC" if before == "in" else "PER"
            tags.append(f"B-{kind}" if word[0].isupper() else "O")
        rows.append({"tokens": words, "tags": tags})
    return Examples(rows, "ner.conll")


TEXT = named_entities(*task_models.TEXT)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(1, 40))
@hypothesis.example([1] * 20, 8)
def test_windows_answer_for_every_word_once(counts, room):
    found = windows(counts, room)
    assert [i for _, _, first, last in found for i in range(first, last)] == list(
        range(len(counts))
    )
    for start, end, first, last in found:
        assert start <= first <= last <= end
        assert sum(min(n, room) for n in counts[start:end]) <= room
    if sum(min(n, room) for n in counts) <= room:
        assert len(found) == 1
    for (_, end, _, last), (start, _, first, _) in pairwise(found):
        assert last == first  # the answers meet in the middle of the overlap
        assert abs((last - start) - (end - last)) <= 1
        assert sum(min(n, room) for n in counts[start:end]) <= room // 4


def test_labels_stand_on_first_pieces(bases):
    task = TASK()
    tokenizer = task.tokenizer(bases["xlm_roberta"])
    labels = task.labels(TEXT)
    assert labels == ["B-LOC", "B-PER", "O"]
    (feature,) = task.encode(TEXT[:1], tokenizer, 64, labels=labels)
    pieces = tokenizer.convert_ids_to_tokens(feature["input_ids"])
    marked = [p for p, label in zip(pieces, feature["labels"], strict=True) if label != -100]
    assert [p[0] for p in marked] == ["▁"] * 6
    assert "".join(pieces[1:-1]).split("▁")[1:] == TEXT[0]["tokens"]


@pytest.mark.parametrize("base", BASES)
def test_words_are_read_as_inside_a_text(bases, base):
    of_text = load_tokenizer(bases[base])

    def ids(text):
        return of_text(text, add_special_tokens=False)["input_ids"]

    tokenizer = TASK().tokenizer(bases[base])
    reader = Words(tokenizer)
    for example in TEXT:
        words, counts = reader.readable(example["tokens"], "x")
        pieces = ids("mat " + " ".join(example["tokens"]))[len(ids("mat")) :]
        assert sum(counts) == len(pieces)
        found = reader.encode(words, 64)["input_ids"]
        special = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id}
        assert [i for i in found if i not in special] == pieces


def test_words_of_which_nothing_is_left(bases):
    task = TASK(metric="accuracy")
    examples = Examples([{"tokens": ["the", "\u2003", "cat"], "tags": ["D", "S", "N"]}], "x.conll")
    tokenizer = task.tokenizer(bases["bert"])
    (feature,) = task.encode(examples, tokenizer, 8, labels=["D", "N", "S"])
    assert tokenizer.convert_ids_to_tokens(feature["input_ids"]) == [
        *("[CLS]", "the", "[UNK]", "cat", "[SEP]")
    ]
    assert feature["labels"] == [-100, 0, 2, 1, -100]
    tokenizer.unk_token = None
    with pytest.raises(DataError, match=r"x\.conll, example 1: the tokenizer leaves nothing of"):
        task.encode(examples, tokenizer, 8, labels=["D", "N", "S"])


@pytest.mark.parametrize("base", ["bert", "xlm_roberta"])
def test_models_learn_and_windows_score_every_word(bases, base):
    task = TASK()
    labels, tokenizer = task.labels(TEXT), task.tokenizer(bases[base])
    model = task.build(bases[base], labels)
    features = task.encode(TEXT, tokenizer, 64, labels=labels)
    task_models.fit(task, model, features, tokenizer)
    model.train()
    found = task.evaluate(model, features, TEXT, tokenizer)
    assert model.training
    words = sum(len(example["tokens"]) for example in TEXT)
    assert found == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "n": words}
    assert task.evaluate(model, features, TEXT, tokenizer, batch_size=1) == found
    # In windows of a few words, each is still trained and scored once.
    short = task.encode(TEXT, tokenizer, 12, labels=labels)
    assert len(short) > len(features)
    assert sum(label != -100 for f in short for label in f["labels"]) == words
    again = task.build(bases[base], labels)
    task_models.fit(task, again, short, tokenizer)
    assert task.evaluate(again, short, TEXT, tokenizer)["accuracy"] == 1


def test_decoders_learn(bases):
    # What a decoder knows at a word's first piece is what stands before it, and that piece.
    task = TASK(metric="accuracy", tags="before")
    examples = Examples(
        {"tokens": e["tokens"], "before": ["first", *(w[0] for w in e["tokens"][:-1])]}
        for e in TEXT
    )
    labels, tokenizer = task.labels(examples), task.tokenizer(bases["llama"])
    model = task.build(bases["llama"], labels)
    features = task.encode(examples, tokenizer, 64, labels=labels)
    task_models.fit(task, model, features, tokenizer)
    assert task.evaluate(model, features, examples, tokenizer)["accuracy"] == 1


def test_predictions_go_to_their_words(bases):
    """A model that knows each piece's label, and nothing else, must score as the words do."""
    task = TASK(metric="accuracy")
    examples = Examples({"tokens": e["tokens"], "tags": [w[0] for w in e["tokens"]]} for e in TEXT)
    labels, tokenizer = task.labels(examples), task.tokenizer(bases["bert"])
    model = task.build(bases["bert"], labels)

    def forward(input_ids, **_):
        words = [tokenizer.convert_ids_to_tokens(row) for row in input_ids.tolist()]
        logits = [
            # It knows no word that begins with "t".
            [[float(w[0] == label != "t") for label in labels] for w in row]
            for row in words
        ]
        return type("Output", (), {"logits": input_ids.new_tensor(logits)})

    model.forward = forward
    wanted = [tag != "t" for e in examples for tag in e["tags"]]
    for length in (64, 7, 4):
        features = task.encode(examples, tokenizer, length, labels=labels)
        found = task.evaluate(model, features, examples, tokenizer, batch_size=2)
        assert found["accuracy"] == pytest.approx(sum(wanted) / len(wanted))


def test_part_of_speech(bases):
    task = TASK(metric="accuracy", tags="upos")
    examples = Examples([{"tokens": ["the", "cat"], "upos": ["DET", "NOUN"]}], "a.conllu")
    assert task.labels(examples) == sorted(UPOS)
    assert len(UPOS) == 17
    tokenizer, model = task.tokenizer(bases["bert"]), task.build(bases["bert"], sorted(UPOS))
    features = task.encode(examples, tokenizer, 8, labels=sorted(UPOS))
    assert task.evaluate(model, features, examples, tokenizer).keys() == {"accuracy", "n"}


def test_files(tmp_path):
    path = tmp_path / "test.txt"  # as MasakhaNER's are called
    path.write_text("Anna B-PER\nlives O\n\nRome B-LOC\n", encoding="utf-8")
    assert [e["tags"] for e in TASK().read(path)] == [["B-PER", "O"], ["B-LOC"]]
    path = tmp_path / "x.conllu"
    path.write_text("1\tcat\t_\tNOUN\t_\t_\t0\troot\t_\t_\n", encoding="utf-8")
    assert TASK(metric="accuracy", tags="upos").read(path)[0]["upos"] == ["NOUN"]
    with pytest.raises(DataError, match=r"x\.conllu, line 1: there is no field 'tags'; there are"):
        TASK().read(path)


def test_types_that_do_not_count(tmp_path):
    file = tmp_path / "ner.conll"
    file.write_text("Monday B-DATE\nin O\nNew B-LOC\nYork I-LOC\n", encoding="utf-8")
    examples = TASK(outside=["DATE", "MISC"]).read(file)
    assert examples[0]["tags"] == ["O", "O", "B-LOC", "I-LOC"]
    assert TASK().read(file)[0]["tags"][0] == "B-DATE"
    with pytest.raises(ValueError, match="outside is 'DATE'"):
        TASK(outside="DATE")


def test_unlabelled_words_are_context_and_nothing_else(bases):
    task = TASK(metric="accuracy", tags="upos", unlabelled=["X", "PUNCT"])
    rows = [
        {"tokens": ["the", "cat", "sat", "mat"], "upos": ["DET", "X", "VERB", "PUNCT"]},
        {"tokens": ["mat", "mat"], "upos": ["X", "PUNCT"]},
        {"tokens": ["Anna"], "upos": ["PROPN"]},
    ]
    examples = Examples(rows, "a.conllu")
    labels = task.labels(examples)
    assert labels == sorted({*UPOS} - {"X", "PUNCT"})
    tokenizer, model = task.tokenizer(bases["bert"]), task.build(bases["bert"], labels)
    features = task.encode(examples, tokenizer, 16, labels=labels)
    # A sentence without a label would have no loss; of the others every word is read.
    assert [f["example"] for f in features] == [0, 2]
    assert tokenizer.convert_ids_to_tokens(features[0]["input_ids"])[1:-1] == rows[0]["tokens"]
    wanted = [labels.index("DET"), -100, labels.index("VERB"), -100]
    assert features[0]["labels"] == [-100, *wanted, -100]
    said = task.predict(model, features, examples, tokenizer)
    assert [[bool(tag) for tag in row] for row in said] == [
        [True, False, True, False],
        [False, False],
        [True],
    ]
    right = sum((said[0][0] == "DET", said[0][2] == "VERB", said[2][0] == "PROPN"))
    found = task.evaluate(model, features, examples, tokenizer)
    assert found == {"accuracy": right / 3, "n": 3}
    # In windows too, of which some have no word with a label.
    long = Examples([{"tokens": ["the"] * 20, "upos": ["DET"] + ["X"] * 18 + ["DET"]}])
    parts = task.encode(long, tokenizer, 8, labels=labels)
    assert [f["words"] for f in parts] == [[0], [19]]
    assert task.evaluate(model, parts, long, tokenizer)["n"] == 2
    with pytest.raises(DataError, match=r"a\.conllu: holds no word with a label"):
        task.encode(examples.replaced(rows[1:2]), tokenizer, 8, labels=labels)
    with pytest.raises(ValueError, match="unlabelled is 'X'; it must be a list of labels"):
        TASK(unlabelled="X")


def test_an_entity_ends_at_an_unlabelled_word(bases):
    task = TASK(unlabelled=("?",))
    tags = ["B-PER", "I-PER", "?", "I-PER", "O"]
    examples = Examples([{"tokens": ["Anna", "Omar", "cat", "Omar", "sat"], "tags": tags}])
    labels = task.labels(examples)
    assert labels == ["B-PER", "I-PER", "O"]
    tokenizer, model = task.tokenizer(bases["bert"]), task.build(bases["bert"], labels)
    features = task.encode(examples, tokenizer, 16, labels=labels)
    said = ["B-PER", "I-PER", "", "O", "O"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TASK, "predict", lambda *_: [said])
        found = task.evaluate(model, features, examples, tokenizer)
    # As in "Anna Omar" and "Omar", of which one was found.
    assert found == pytest.approx({"accuracy": 0.75, "precision": 1, "recall": 0.5, "f1": 2 / 3,
                                   "n": 4})  # fmt: skip


def test_contractions_of_datasets_are_left_out():
    rows = [{"tokens": ["del", "de", "el", "_"], "upos": ["_", "ADP", "DET", "SYM"]}]
    given = Examples(rows, "ud")
    (read,) = TASK(metric="accuracy", tags="upos").checked(given)
    assert read == {"tokens": ["de", "el", "_"], "upos": ["ADP", "DET", "SYM"]}
    assert len(given[0]["tokens"]) == 4


@pytest.mark.parametrize(
    "wrap", [torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")]
)
def test_wrapped_models_are_scored(bases, wrap):
    task = TASK(metric="accuracy")
    tokenizer, examples = (
        task.tokenizer(bases["bert"]),
        Examples([{"tokens": ["Anna", "lives"], "tags": ["X", "O"]}]),
    )
    features = task.encode(examples, tokenizer, 8, labels=["O", "X"])
    model = task.build(bases["bert"], ["O", "X"])
    found = task.evaluate(wrap(model), features, examples, tokenizer)
    assert found == task.evaluate(model, features, examples, tokenizer)


def test_errors(bases):
    task = TASK()
    tokenizer = task.tokenizer(bases["bert"])
    wider = Examples([{"tokens": ["a"], "tags": ["B-DATE"]}], "dev.conll", [7])
    with pytest.raises(DataError, match=r"dev\.conll, line 7: the label 'B-DATE' is not one of the "
                       r"model's 2 labels \(B-PER, O\)"):  # fmt: skip
        task.encode(wider, tokenizer, 8, labels=["B-PER", "O"])
    with pytest.raises(ValueError, match="labels are needed"):
        task.encode(wider, tokenizer, 8)
    with pytest.raises(DataError, match=r"pos\.conll: the label 'NOUN' is not of an entity"):
        task.labels(Examples([{"tokens": ["a", "b"], "tags": ["NOUN", "O"]}], "pos.conll"))
    with pytest.raises(DataError, match="has one label"):
        task.labels(Examples([{"tokens": ["a"], "tags": ["O"]}]))
    other = Examples([{"tokens": ["a", "b"], "tags": ["O", "S-PER"]}], "ner.conll")
    with pytest.raises(DataError, match=r"ner\.conll: the tag 'S-PER' .* scheme must be named"):
        task.labels(other)
    assert TASK(scheme="IOBES").labels(other) == ["O", "S-PER"]
    with pytest.raises(DataError, match="example 1: 2 words and 1 labels"):
        task.checked(Examples([{"tokens": ["a", "b"], "tags": ["O"]}]))
    with pytest.raises(DataError, match="words and labels must be text, found 3"):
        task.checked(Examples([{"tokens": ["a"], "tags": [3]}]))
    with pytest.raises(DataError, match="holds no sentence"):
        task.encode(Examples([]), tokenizer, 8, labels=["B-PER", "O"])
    with pytest.raises(ValueError, match="metric is 'uas'"):
        TASK(metric="uas")
    with pytest.raises(ValueError, match="scheme is 'BIO'"):
        TASK(scheme="BIO")


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer"])
def test_tokenizers_of_decoders_take_words(bases, tmp_path, kind):
    """That of GPT-2 may refuse words; that of Llama takes them, and may refuse to be told."""
    folder = shutil.copytree(bases["llama"], tmp_path / "base")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": kind}))
    tokenizer = load_tokenizer(folder, words=True)
    assert len(Words(tokenizer).readable(["cat", "mat"], "here")[1]) == 2
