"""Dependency parsing: trees against all trees, the head against its formulas, and learning."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import task_models

import sparse_ft as sf
from sparse_ft.families import backbone
from sparse_ft.tasks import TASKS, DataError, Examples
from sparse_ft.tasks.parsing import RELATIONS, spanning_tree

TASK = TASKS["parsing"]
BASES = ["bert", "xlm_roberta", "llama"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: getattr(task_models, name)(folder / name) for name in BASES}


def sentence(text, heads, relations):
    return {"tokens": text.split(), "heads": heads, "relations": relations.split()}


TEXT = TASK().checked(
    Examples(
        [
            sentence(task_models.TEXT[0], [2, 3, 0, 6, 6, 3], "det nsubj root case det obl"),
            sentence("Anna lives in Paris", [2, 0, 4, 2], "nsubj root case obl"),
            sentence("who wrote the book ?", [2, 0, 4, 2, 2], "nsubj root det obj punct"),
            sentence("the book was written", [2, 4, 4, 0], "det nsubj:pass aux:pass root"),
        ],
        "a.conllu",
    )
)


def is_tree(heads):
    for word in range(1, len(heads) + 1):
        seen = set()
        while word:
            if word in seen:
                return False
            seen.add(word)
            word = heads[word - 1]
    return sum(head == 0 for head in heads) == 1


def total(scores, heads):
    return sum(scores[d, h] for d, h in enumerate(heads))


@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e4, 0.0]))
@settings(deadline=None)
def test_spanning_tree_is_the_best_of_all(n, seed, root):
    generator = np.random.default_rng(seed)
    # Few distinct values make ties; a large score of the root tempts to more than one.
    scores = generator.integers(-4, 5, (n, n + 1)) / 2
    scores[:, 0] += root
    best = max(total(scores, heads) for heads in product(range(n + 1), repeat=n) if is_tree(heads))
    found = spanning_tree(scores)
    assert is_tree(found)
    assert total(scores, found) == best


@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_spanning_tree_gives_back_a_tree(n, seed):
    generator = np.random.default_rng(seed)
    order = generator.permutation(n) + 1
    heads = [0] * n
    for i in range(1, n):
        heads[order[i] - 1] = int(order[generator.integers(i)])
    scores = generator.normal(size=(n, n + 1)).astype(np.float32)
    scores[np.arange(n), np.arange(1, n + 1)] = -np.inf
    scores[np.arange(n), heads] += 20
    assert spanning_tree(scores) == heads
    scores = generator.normal(size=(n, n + 1))
    assert is_tree(spanning_tree(scores))


@pytest.fixture
def parser(bases):
    task = TASK()
    labels, tokenizer = task.labels(TEXT), task.tokenizer(bases["bert"])
    model = task.build(bases["bert"], labels).eval()
    return task, model, tokenizer, task.encode(TEXT, tokenizer, 16, labels=labels), labels


def test_scores_are_those_of_the_formulas(parser):
    task, model, tokenizer, features, labels = parser
    batch = task.collate(tokenizer)(features)
    with torch.no_grad():
        model.arc_bias.normal_()
        found = model(**batch)
        total_loss = count = 0
        arc_loss = relation_loss = 0.0
        for i, example in enumerate(TEXT):
            ids = torch.tensor(features[i]["input_ids"])[None]
            states = model.bert(ids).last_hidden_state[0].double()
            n = len(example["tokens"])
            words = states[: n + 1]  # one piece a word; [CLS] is the root
            torch.testing.assert_close(found.words[i, : n + 1].double(), words, atol=1e-5, rtol=0)
            arc = model.arc_weight.double()
            relation = model.relation_weight.double()
            linear = model.relation_bias.double()
            for d in range(1, n + 1):
                scores = torch.tensor(
                    [
                        -torch.inf
                        if h == d
                        else words[d] @ arc @ words[h] + model.arc_bias.double() @ words[h]
                        for h in range(n + 1)
                    ]
                )
                torch.testing.assert_close(
                    found.arcs[i, d - 1, : n + 1].double(), scores, atol=1e-4, rtol=1e-4
                )
                assert (found.arcs[i, d - 1, n + 1 :] == -torch.inf).all()
                head = example["heads"][d - 1]
                arc_loss -= scores.double().log_softmax(0)[head]
                scores = torch.stack([words[d] @ u @ words[head] for u in relation])
                scores = scores + linear(torch.cat((words[d], words[head])))
                label = labels.index(example["relations"][d - 1])
                relation_loss -= scores.log_softmax(0)[label]
                count += 1
            model.relation_bias.float()
        total_loss = (arc_loss + relation_loss) / count
    assert float(found.loss) == pytest.approx(float(total_loss), rel=1e-4)


def test_words_are_means_of_their_pieces(bases):
    task = TASK()
    tokenizer = task.tokenizer(bases["xlm_roberta"])
    model = task.build(bases["xlm_roberta"], RELATIONS).eval()
    (feature,) = task.encode(TEXT[:1], tokenizer, 64, labels=RELATIONS)
    batch = task.collate(tokenizer)([feature])
    with torch.no_grad():
        found = model(**batch).words[0]
        states = model.roberta(batch["input_ids"], batch["attention_mask"]).last_hidden_state[0]
    index = torch.tensor(feature["word_index"])
    assert index[0] == 0
    assert index[-1] == -1  # </s> belongs to no word
    assert (index == 0).sum() == 1
    for word in range(7):
        wanted = states[index == word].mean(0)
        torch.testing.assert_close(found[word], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("decoder", ["mst", "greedy"])
def test_models_learn(bases, base, decoder):
    if base == "llama" and decoder == "greedy":
        return  # mst has shown it
    task = TASK(decoder=decoder)
    labels, tokenizer = task.labels(TEXT), task.tokenizer(bases[base])
    model = task.build(bases[base], labels)
    features = task.encode(TEXT, tokenizer, 64, labels=labels)
    assert task.evaluate(model, features, TEXT, tokenizer)["las"] < 0.5
    task_models.fit(task, model, features, tokenizer, lr=1e-3)
    found = task.evaluate(model, features, TEXT, tokenizer)
    assert found == {"uas": 1, "las": 1, "n": 19}
    assert task.evaluate(model, features, TEXT, tokenizer, batch_size=1) == found
    without = TASK(decoder=decoder, punctuation=False)
    assert without.evaluate(model, features, TEXT, tokenizer)["n"] == 18


def test_words_that_do_not_fit_count_as_wrong(parser):
    task, model, tokenizer, _, labels = parser
    features = task.encode(TEXT, tokenizer, 6, labels=labels)
    assert features[0]["heads"] == [2, 3, 0, -100]  # "the" hangs on a word that is cut off
    task_models.fit(task, model, features, tokenizer, lr=1e-3)
    found = task.evaluate(model, features, TEXT, tokenizer)
    assert found["n"] == 19
    # Two words of the first sentence and one of the third are cut off, and a fourth hangs on them.
    assert 14 / 19 <= found["uas"] <= 16 / 19


def test_a_batch_without_a_head_within_reach_has_no_loss(parser):
    task, model, tokenizer, _, labels = parser
    far = Examples([sentence("a a a a", [4, 4, 4, 0], "dep dep dep root")])
    features = task.encode(far, tokenizer, 4, labels=labels)
    batch = task.collate(tokenizer)(features)
    assert (batch["heads"] == -100).all()
    loss = task.loss(model, batch)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_punctuation_of_every_subtype_may_be_left_out(parser):
    _, model, tokenizer, features, _ = parser
    task = TASK(punctuation=False, subtypes=True)
    text = [dict(example) for example in TEXT]
    for example in text:
        example["relations"] = [r.replace("punct", "punct:x") for r in example["relations"]]
    n = sum(len(example["tokens"]) for example in text)
    assert task.evaluate(model, features, text, tokenizer)["n"] == n - 1


def test_a_wrapped_parser_is_scored(parser):
    task, model, tokenizer, features, _ = parser
    found = task.evaluate(torch.compile(model, backend="eager"), features, TEXT, tokenizer)
    assert found == task.evaluate(model, features, TEXT, tokenizer)
    with pytest.raises(TypeError, match="must be a BiaffineParser, as build gives it, got Linear"):
        task.evaluate(torch.nn.Linear(1, 1), features, TEXT, tokenizer)


def test_scores_that_are_no_numbers_make_no_tree():
    scores = np.zeros((2, 3))
    for row, column, bad in ((1, 1, np.nan), (0, 0, np.inf), (1, 0, -np.inf)):
        broken = scores.copy()
        broken[row, column] = bad
        with pytest.raises(ValueError, match="the scores hold NaN, or infinity for the root"):
            spanning_tree(broken)


def test_contractions_of_datasets_are_left_out():
    row = sentence("del de el cat", ["None", "3", "3", "0"], "_ case det root")
    (read,) = TASK().checked(Examples([row], "ud"))
    assert read == sentence("de el cat", [3, 3, 0], "case det root")
    assert row["heads"][0] == "None"


def test_labels(parser):
    _, _, _, _, labels = parser
    assert labels == sorted(RELATIONS)
    assert len(RELATIONS) == 37
    kept = TASK(subtypes=True)
    row = sentence("the book", [2, 0], "det:x root")
    examples = kept.checked(Examples([row], "b.conllu"))
    assert "det:x" in kept.labels(examples)
    assert TASK().checked(Examples([row]))[0]["relations"] == ["det", "root"]


@pytest.mark.parametrize("base", BASES)
def test_encoder_is_found_and_named_as_in_other_heads(bases, base):
    model = TASK().build(bases[base], RELATIONS)
    assert backbone(model) is getattr(model, model.base_model_prefix)
    other = TASKS["tokens"]().build(bases[base], ["O", "B-X"])
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    prefix = model.base_model_prefix + "."
    shared = {name for name in theirs if name.startswith(prefix)}
    assert shared == {name for name in mine if name.startswith(prefix)}
    assert all(torch.equal(mine[name], theirs[name]) for name in shared)


def test_language_sfts_compose(bases):
    """A difference learnt under the language-model head works under the parser, and comes off."""
    language, task = TASKS["mlm"](), TASK()
    model = language.build(bases["bert"])
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    features = language.encode(
        Examples({"text": t} for t in task_models.TEXT), language.tokenizer(bases["bert"]), 32
    )

    def train(phase):
        optimizer = phase.optimizer(lr=1e-3)
        torch.manual_seed(0)
        for _ in range(3):
            language.loss(
                model, language.collate(language.tokenizer(bases["bert"]))(list(features))
            ).backward()
            optimizer.step()
            optimizer.zero_grad()

    delta = sf.LotteryTicket(model, density=0.05).fit(train, role="language", lang="sw")
    assert all(torch.equal(start[name], p) for name, p in model.named_parameters())
    parser = task.build(bases["bert"], RELATIONS)
    before = {name: p.detach().clone() for name, p in parser.named_parameters()}
    with sf.compose(parser, [delta]):
        changed = {n for n, p in parser.named_parameters() if not torch.equal(before[n], p)}
        assert changed
        assert all(name.startswith("bert.") for name in changed)
    assert all(torch.equal(before[name], p) for name, p in parser.named_parameters())


def test_saved_and_loaded(parser, tmp_path):
    task, model, tokenizer, features, labels = parser
    task_models.fit(task, model, features, tokenizer, steps=5)
    model.save_pretrained(tmp_path)
    again = task.build(tmp_path, labels, seed=9)
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r"parser\.safetensors: the head has other sizes"):
        task.build(tmp_path, labels[:5])


def test_seed_gives_the_head(bases):
    heads = []
    for seed in (0, 0, 1):
        model = TASK().build(bases["bert"], RELATIONS, seed=seed)
        heads.append(
            torch.cat([p.flatten() for p in (model.arc_weight, model.relation_bias.weight)])
        )
        torch.rand(3)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_errors(bases, parser):
    task, _, tokenizer, _, _ = parser

    def wrong(message, heads, relations="det root"):
        with pytest.raises(DataError, match=message):
            task.checked(Examples([sentence("the cat", heads, relations)], "c.conllu"))

    wrong(r"c\.conllu, example 1: the head of word 1 is 3; a sentence of 2 words", [3, 0])
    wrong("the head of word 2 is 2", [2, 2])
    wrong("the head of word 1 is -1", [-1, 0])
    wrong("heads must be numbers", ["x", 0])
    wrong("2 words, 1 heads and 2 relations", [0])
    wrong("2 words, 2 heads and 1 relations", [2, 0], "root")
    with pytest.raises(DataError, match="there is no field 'heads'; there are: tokens"):
        task.checked(Examples([{"tokens": ["a"]}]))
    # As the library datasets has them.
    rows = Examples([{"tokens": ["a"], "head": ["0"], "deprel": ["root"]}])
    assert TASK(heads="head", relations="deprel").checked(rows)[0]["head"] == [0]
    with pytest.raises(DataError, match=r"a\.conllu, example 1: the label 'det' is not one of"):
        task.encode(TEXT, tokenizer, 16, labels=["root", "nsubj"])
    with pytest.raises(ValueError, match='decoder is \'x\'; it must be "mst" or "greedy"'):
        TASK(decoder="x")
    with pytest.raises(ValueError, match="metric is 'f1'"):
        TASK(metric="f1")
    with pytest.raises(DataError, match="holds no sentence"):
        task.encode(Examples([]), tokenizer, 16, labels=RELATIONS)
    with pytest.raises(ValueError, match="labels are needed"):
        task.build(bases["bert"])
