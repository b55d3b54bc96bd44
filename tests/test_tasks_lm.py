"""Language modelling: blocks, masks, losses, and that models learn."""

import dataclasses
import json
import math
import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

pytest.importorskip("transformers")

import task_models
import tiny_models

import sparse_ft as sf
from sparse_ft.families import backbone_names, named_parameters
from sparse_ft.tasks import TASKS, DataError, Examples
from sparse_ft.tasks.base import evaluating
from sparse_ft.tasks.lm import Blocks, mask_pieces

MLM, CLM = TASKS["mlm"](), TASKS["clm"]()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        make.__name__: make(folder / make.__name__)
        for make in (task_models.bert, task_models.xlm_roberta, task_models.llama)
    }


def lines(*texts):
    return Examples(({"text": text} for text in texts), "text.txt")


TEXT = lines(*task_models.TEXT)


def test_tasks_are_records_of_their_options():
    assert {*TASKS} == {"mlm", "clm", "tokens", "sequences", "qa", "parsing"}
    assert {name for name, task in TASKS.items() if task.role == "language"} == {"mlm", "clm"}
    for name, kind in TASKS.items():
        task = kind()
        assert task.name == name
        options = json.loads(json.dumps(dataclasses.asdict(task)))
        assert kind(**options) == task
        assert task.greater_is_better == (task.role == "task")


def test_a_model_that_was_evaluated_can_be_trained():
    class Cached(torch.nn.Linear):
        def forward(self, x):
            if not hasattr(self, "scale"):
                self.scale = torch.ones(x.shape)
            return super().forward(x * self.scale)

    model, x = Cached(2, 1), torch.ones(3, 2)
    with evaluating(model):
        assert not model(x).requires_grad
    model(x).sum().backward()


def test_collating_travels_to_workers(bases):
    features = MLM.encode(TEXT, MLM.tokenizer(bases["bert"]), 16)
    collate = MLM.collate(MLM.tokenizer(bases["bert"]))
    features, collate = pickle.loads(pickle.dumps((features, collate)))
    assert collate([features[0]])["input_ids"].shape == (1, 16)


@given(st.integers(1, 40), st.integers(1, 9))
def test_blocks_hold_every_piece_once(n, length):
    pieces = torch.arange(n, dtype=torch.int32)
    blocks = Blocks(pieces, length)
    rows = [blocks[i]["input_ids"] for i in range(len(blocks))]
    assert torch.cat(rows).tolist() == list(range(n))
    assert all(len(row) == length for row in rows[:-1])
    assert rows[0].dtype == torch.int64
    assert [len(row["input_ids"]) for row in blocks[:2]] == [len(row) for row in rows[:2]]
    assert blocks[-1]["input_ids"].tolist() == rows[-1].tolist()
    with pytest.raises(IndexError, match=f"block {len(blocks)} of {len(blocks)}"):
        blocks[len(blocks)]


def test_masked_blocks_are_the_lines_with_their_special_pieces(bases):
    tokenizer = MLM.tokenizer(bases["bert"])
    # A line of which the tokenizer leaves nothing leaves no special pieces either.
    features = MLM.encode(lines("the cat sat", "\u2003", "Anna lives"), tokenizer, 4)
    said = [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in features]
    assert said == [["[CLS]", "the", "cat", "sat"], ["[SEP]", "[CLS]", "Anna", "lives"]]
    # The [SEP] that was left over alone could not be learnt from.


def test_causal_blocks_end_each_line(bases):
    tokenizer = CLM.tokenizer(bases["llama"])
    assert tokenizer.pad_token == tokenizer.eos_token
    features = CLM.encode(lines("the cat", "Anna lives"), tokenizer, 64)
    pieces = tokenizer.convert_ids_to_tokens(features[0]["input_ids"])
    assert pieces[0] == "<s>"
    assert pieces[-1] == "</s>"
    assert pieces.count("</s>") == pieces.count("<s>") == 2
    assert (
        tokenizer.decode(features[0]["input_ids"], skip_special_tokens=True) == "the catAnna lives"
    )
    batch = CLM.collate(tokenizer)([{"input_ids": torch.arange(3)}, {"input_ids": torch.arange(5)}])
    assert batch["labels"].tolist() == [[0, 1, 2, -100, -100], [0, 1, 2, 3, 4]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]


def test_masking_shares():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (200, 500), generator=generator)
    special = torch.rand(ids.shape, generator=generator) < 0.1
    read, labels = mask_pieces(ids, special, 0.15, 5, 1000, generator)
    chosen = labels != -100
    assert not (chosen & special).any()
    assert (labels[chosen] == ids[chosen]).all()
    assert (read[~chosen] == ids[~chosen]).all()
    n = int((~special).sum())

    def near(share, of, wanted):  # five standard errors
        return abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / of)

    assert near(int(chosen.sum()) / n, n, 0.15)
    m = int(chosen.sum())
    assert near(int((read[chosen] == 5).sum()) / m, m, 0.8 + 0.1 / 1000)
    assert near(int((read[chosen] == ids[chosen]).sum()) / m, m, 0.1 + 0.1 / 1000)


@given(st.integers(1, 6), st.integers(0, 1000))
def test_at_least_one_piece_is_masked(n, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(10, 10 + n)[None]
    special = torch.zeros_like(ids, dtype=torch.bool)
    special[0, 1:] = True
    _, labels = mask_pieces(ids, special, 1e-9, 5, 99, generator)
    assert (labels != -100).tolist()[0] == [True, *[False] * (n - 1)]
    _, labels = mask_pieces(ids, torch.ones_like(special), 0.5, 5, 99, generator)
    assert (labels == -100).all()


def test_special_pieces_and_padding_are_never_masked(bases):
    tokenizer = MLM.tokenizer(bases["bert"])
    task = TASKS["mlm"](probability=1.0)
    features = task.encode(lines("the cat zzz", "Anna"), tokenizer, 5)
    batch = task.collate(tokenizer)([features[0], features[1]])
    said = [tokenizer.convert_ids_to_tokens(row.clamp(min=0)) for row in batch["labels"]]
    wanted = [(batch["labels"][i] != -100).tolist() for i in range(2)]
    # [CLS] the cat [UNK] [SEP] | [CLS] Anna [SEP] and padding
    assert wanted == [[False, True, True, True, False], [False, True, False, False, False]]
    assert said[0][1:4] == ["the", "cat", "[UNK]"]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_training_masks_follow_the_random_state(bases):
    tokenizer = MLM.tokenizer(bases["bert"])
    features = MLM.encode(TEXT, tokenizer, 32)
    collate = MLM.collate(tokenizer)

    def draw():
        return collate(list(features))["input_ids"]

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("base", ["bert", "xlm_roberta"])
def test_masked_loss_is_the_mean_over_masked_pieces(bases, base):
    tokenizer = MLM.tokenizer(bases[base])
    model = MLM.build(bases[base])
    features = MLM.encode(TEXT, tokenizer, 12)
    state = torch.get_rng_state()
    model.train()
    found = MLM.evaluate(model, features, TEXT, tokenizer, batch_size=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    # The same masks whatever the batch, and on every call.
    for batch_size in (1, 2, 100):
        again = MLM.evaluate(model, features, TEXT, tokenizer, batch_size)
        assert again == pytest.approx(found, rel=1e-5)
    assert MLM.evaluate(model, features, TEXT, tokenizer, 1) == found
    other = TASKS["mlm"](mask_seed=1).evaluate(model, features, TEXT, tokenizer, 1)
    assert other["loss"] != found["loss"]
    # In plain torch, one block at a time.
    total = count = 0
    model.eval()
    with torch.no_grad():
        for batch in MLM._fixed_batches(features, tokenizer, 1):
            labels = batch.pop("labels")
            logits = model(**batch).logits
            chosen = labels != -100
            total += functional.cross_entropy(
                logits[chosen], labels[chosen], reduction="sum"
            ).item()
            count += int(chosen.sum())
    assert found["n"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


_MORE = {
    "ELECTRA": ("Electra", {"embedding_size": 8}),
    "DeBERTa": ("Deberta", {}),
    "DeBERTa-v2": ("DebertaV2", {}),
    "RoBERTa": ("Roberta", {"max_position_embeddings": 20, **tiny_models._TOKENS}),
}
MASKED = [name for name, its in tiny_models.FAMILIES.items() if its.language == "ForMaskedLM"]


def masked_model(name, monkeypatch):
    if name in _MORE:
        kind, config = _MORE[name]
        family = tiny_models.Family(kind, {**tiny_models._HEADS, **config}, "ForMaskedLM", ())
        monkeypatch.setitem(tiny_models.FAMILIES, name, family)
    return tiny_models.tiny(name)


def masked_batch():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny_models.VOCABULARY, (3, 8), generator=draw)
    labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.3, ids, -100)
    mask = torch.ones_like(ids)
    mask[1, 5:], ids[1, 5:], labels[1, 5:] = 0, 1, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def seen_by_the_output_matrix(model):
    shapes = []
    output = model.get_output_embeddings()
    if output is None or type(output) is not torch.nn.Linear:
        return None
    output.register_forward_hook(lambda module, given, out: shapes.append(tuple(given[0].shape)))
    return shapes


@pytest.mark.parametrize("name", [*MASKED, *_MORE])
def test_the_loss_is_the_models_own_on_the_positions_to_predict(name, monkeypatch):
    model, batch = masked_model(name, monkeypatch), masked_batch()
    expected, wanted = loss_and_gradients(model, model(**batch).loss)
    shapes = seen_by_the_output_matrix(model)
    found, gradients = loss_and_gradients(model, MLM.loss(model, batch))
    # Means of a few terms in another order: within some ulps of the largest.
    assert found == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-6 * largest)
    n = int((batch["labels"] != -100).sum())
    assert 0 < n < 24
    assert shapes is None or shapes[-1] == (1, n, 8)


def test_training_draws_the_same_dropout(bases):
    """The head has none, so the random state after a loss is that of the model's own."""
    model, batch = MLM.build(bases["bert"]).train(), masked_batch()
    after = []
    for loss in (lambda: model(**batch).loss, lambda: MLM.loss(model, batch)):
        torch.manual_seed(0)
        found = loss()
        after.append((pytest.approx(found.item(), rel=1e-5), torch.get_rng_state().tolist()))
    assert after[0] == after[1]
    assert model.training


def test_a_head_that_looks_around_keeps_all_positions(monkeypatch):
    model, batch = masked_model("BERT", monkeypatch), masked_batch()
    dense = model.cls.predictions.transform
    own = dense.forward
    dense.forward = lambda states: own(states + 0.5 * states.roll(1, 1))
    expected, wanted = loss_and_gradients(model, model(**batch).loss)
    found, gradients = loss_and_gradients(model, MLM.loss(model, batch))
    assert found == expected
    for key, gradient in gradients.items():
        assert torch.equal(gradient, wanted[key])


def test_a_model_with_another_loss_keeps_it(monkeypatch):
    """Such as one whose experts have a term of their own."""
    model, batch = masked_model("BERT", monkeypatch), masked_batch()
    own = model.forward

    def forward(**inputs):
        found = own(**inputs)
        if found.loss is not None:
            found.loss = found.loss + 1e-2 * found.logits.square().mean()
        return found

    model.forward = forward
    term = model(**batch).loss.item() - own(**batch).loss.item()
    assert 5e-4 < term < 5e-3
    assert MLM.loss(model, batch).item() == model(**batch).loss.item()


def test_the_trial_of_a_head_leaves_nothing_in_autocast(monkeypatch):
    """Some versions of torch keep weights that were cast without gradients for what comes next."""
    model, batch = masked_model("BERT", monkeypatch), masked_batch()
    cast = []
    model.register_forward_pre_hook(
        lambda *_: cast.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    )
    with torch.autocast("cpu", torch.bfloat16):
        MLM.loss(model, batch).backward()
    assert cast[-1] == (True, True)
    assert cast[:-1] == [(False, False)] * 2
    assert model.bert.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["BART", "BERT"])
def test_what_has_no_head_of_its_own_keeps_all_positions(family):
    model, batch = tiny_models.tiny(family), masked_batch()
    wrapped = model if family == "BART" else torch.nn.DataParallel(model)
    assert MLM.loss(wrapped, batch).item() == model(**batch).loss.item()


def test_causal_loss_is_the_mean_over_following_pieces(bases):
    tokenizer = CLM.tokenizer(bases["llama"])
    model = CLM.build(bases["llama"])
    features = CLM.encode(TEXT, tokenizer, 20)
    found = CLM.evaluate(model, features, TEXT, tokenizer, batch_size=3)
    total = count = 0
    with torch.no_grad():
        for row in features:
            logits = model(row["input_ids"][None]).logits[0, :-1]
            total += functional.cross_entropy(logits, row["input_ids"][1:], reduction="sum").item()
            count += len(logits)
    assert found["n"] == count == sum(len(row["input_ids"]) for row in features) - len(features)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(("name", "base"), [("mlm", "bert"), ("clm", "llama")])
def test_models_learn(bases, name, base):
    task = TASKS[name]()
    tokenizer, model = task.tokenizer(bases[base]), task.build(bases[base])
    features = task.encode(TEXT, tokenizer, 32)
    before = task.evaluate(model, features, TEXT, tokenizer)
    task_models.fit(task, model, features, tokenizer, steps=80)
    after = task.evaluate(model, features, TEXT, tokenizer)
    assert after["loss"] < before["loss"] - 1
    assert not task.greater_is_better


@pytest.mark.parametrize(
    ("name", "base"), [("mlm", "bert"), ("mlm", "xlm_roberta"), ("clm", "llama")]
)
def test_a_language_sft_binds_under_every_head(bases, name, base):
    model = TASKS[name]().build(bases[base])
    theta0, inside = sf.snapshot(model), backbone_names(model)
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if n in inside:
                parameter += 1
    names = [n for n in named_parameters(model) if n in inside]
    support = sf.select(model, theta0, k=500, eligible=names)
    delta = sf.SparseDelta.between(theta0, model, support)
    for other in ("tokens", "sequences", "qa", "parsing"):
        labels = None if other == "qa" else ["a", "b"]
        head = TASKS[other]().build(bases[base], labels)
        binding = delta.bind(head, unused="ignore", allow_base_mismatch=True)
        assert binding.left_out == 0


def test_errors(bases):
    tokenizer = MLM.tokenizer(bases["bert"])
    with pytest.raises(ValueError, match="has no mask; use the task clm"):
        MLM.tokenizer(bases["llama"])
    with pytest.raises(DataError, match=r"text\.txt: holds no text for this tokenizer"):
        MLM.encode(lines(" ", "\u2003"), tokenizer, 8)
    with pytest.raises(ValueError, match="max_length is 65; the tokenizer says"):
        MLM.encode(TEXT, tokenizer, 65)
    with pytest.raises(ValueError, match=r"max_length is 3; 4 is the least \(2 special"):
        MLM.encode(TEXT, tokenizer, 3)
    with pytest.raises(DataError, match=r"a\.csv, line 2: there is no field 'text'; there are: x"):
        MLM.checked(Examples([{"x": "y"}], "a.csv", [2]))
    with pytest.raises(DataError, match="example 1: 'text' must be str, found '3'"):
        MLM.checked(Examples([{"text": 3}]))
    with pytest.raises(ValueError, match=r"probability must lie in \(0, 1\], got 0"):
        TASKS["mlm"](probability=0)


def test_missing_bases(tmp_path):
    with pytest.raises(OSError, match="nowhere: neither a folder with a model nor"):
        MLM.build(tmp_path / "nowhere")
    with pytest.raises(OSError, match="neither a folder with a tokenizer nor"):
        MLM.tokenizer("sparse-ft-tests/none")
    with pytest.raises(OSError, match="the folder holds no model that can be read"):
        MLM.build(tmp_path)
    with pytest.raises(OSError, match="the folder holds no tokenizer that can be read"):
        MLM.tokenizer(tmp_path)


def test_damaged_and_unfit_bases(bases, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(bases["bert"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match="cut: the folder holds no model that can be read"):
        MLM.build(folder)
    with pytest.raises(ValueError, match="llama: transformers has no AutoModelForMaskedLM"):
        MLM.build(bases["llama"])


def test_same_seed_same_head(bases):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = MLM.build(bases["bert"], seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = MLM.build(bases["bert"], seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = MLM.build(bases["bert"], seed=2).state_dict()
    assert {name for name in first if not torch.equal(first[name], other[name])} == {
        "cls.predictions.transform.dense.weight"
    }
