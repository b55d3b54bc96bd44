"""Whole runs on tiny models: language, task, evaluation; stopped and continued; what is refused."""

import json
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("seqeval")

from tiny_bases import bert_folder, llama_folder, write_data

import sparse_ft as sf
from sparse_ft.tasks import runner
from sparse_ft.tasks.recipes import recipe
from sparse_ft.tasks.runner import RunError, Source, evaluate, read_sources, train


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with a base model, a decoder, and data; and SFTs of a language and of a task."""
    folder = tmp_path_factory.mktemp("there")
    bert_folder(folder / "bert")
    llama_folder(folder / "llama")
    write_data(folder)
    language(folder, folder / "sw.safetensors", lang="sw")
    ner(folder, folder / "ner.safetensors", sft=folder / "sw.safetensors")
    return folder


SHORT = {"density": 0.1, "max_length": 16, "batch_size": 4}


def language(there, output, preset="lt-sft-language", settings=None, **options):
    # Far enough from the base that it shows in the figures of a task.
    given = {**SHORT, "steps": 6, "evaluate_every": 3, "lr": 0.05, **(settings or {})}
    base = options.pop("base", there / "bert")
    options = {"lang": "en", **options}
    return train(there / "text.txt", base, output, recipe=recipe(preset, **given), **options)


def ner(there, output, settings=None, **options):
    given = {**SHORT, "max_length": 32, "steps": (4, 8), "lr": 1e-3, "evaluate_every": 4}
    options = {"valid": there / "test.conll", "name": "ner", **options}
    return train(
        options.pop("data", there / "train.conll"),
        options.pop("base", there / "bert"),
        output,
        recipe=recipe("lt-sft-ner", **{**given, **(settings or {})}),
        **options,
    )


KINDS = {
    "lt-sft-pos": ("conllu", "accuracy", 32),
    "lt-sft-ner": ("conll", "f1", 32),
    "lt-sft-dp": ("conllu", "las", 32),
    "lt-sft-sentiment": ("csv", "f1", 16),
    "lt-sft-nli": ("jsonl", "accuracy", 32),
    "lt-sft-qa": ("json", "f1", 32),
}


@pytest.mark.parametrize("preset", KINDS)
def test_a_language_goes_with_every_kind_of_task(there, tmp_path, preset):
    """As the paper does it: a task on a source language's SFT, scored with another's."""
    suffix, metric, length = KINDS[preset]
    options = {"options": {"stride": 4}} if preset == "lt-sft-qa" else {}
    given = {"max_length": length, "steps": (5, 60), "evaluate_every": 20, "lr": 1e-2}
    made = train(
        *(there / f"train.{suffix}", there / "bert", tmp_path / "x.safetensors"),
        recipe=recipe(preset, density=0.5, batch_size=8, **given),
        valid=there / f"train.{suffix}",
        sft=there / "sw.safetensors",
        **options,
    )
    other = language(there, tmp_path / "other.safetensors", lang="yo").path
    sw = there / "sw.safetensors"
    rows = evaluate(there / "bert", made.path, there / f"train.{suffix}", langs=[sw, None, other])
    assert {row["metric"] for row in rows} == {metric}
    assert rows[0][metric] == pytest.approx(made.phases[-1]["best"], abs=1e-12)
    # It has learnt: always the commonest label (or the first words) would give less.
    assert rows[0][metric] > {"f1": 0.5, "accuracy": 0.6, "las": 0.3}[metric]


# --- what a run leaves --------------------------------------------------------------------------


def test_a_language(there):
    delta = sf.SparseDelta.load(there / "sw.safetensors")
    assert delta.nnz == int(0.1 * delta.layout.numel)
    assert {key: delta.meta[key] for key in ("role", "lang")} == {"role": "language", "lang": "sw"}
    assert delta.meta["base"]["id"] == "bert"
    # Trained whole, but for the decoupled output matrix and the frozen norms.
    assert sorted(delta.heads) == [
        "cls.predictions.bias",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.dense.weight",
    ]
    assert not any("LayerNorm" in name for name in delta.layout.names)
    said = delta.meta["recipe"]
    assert said["method"] == "LT-SFT"
    assert said["preset"] == "lt-sft-language"
    assert said["task"]["name"] == "mlm"
    assert said["data"]["train"]["examples"] + said["data"]["valid"]["examples"] == 120


def test_a_task_is_learnt_on_its_language_and_does_not_contain_it(there):
    sw, task = (sf.SparseDelta.load(there / f"{name}.safetensors") for name in ("sw", "ner"))
    assert task.meta["trained_on"] == [{"id": sw.content_id, "alpha": 1.0}]
    assert {key: task.meta[key] for key in ("role", "lang", "task")} == {
        "role": "task",
        "lang": "sw",
        "task": "ner",
    }
    assert task.meta["recipe"]["labels"] == ["B-LOC", "B-PER", "O"]
    # As many entries as were selected, where the language's SFT has as many others again.
    assert task.nnz == int(0.1 * task.layout.numel)
    assert sw.support != task.support
    # It belongs to the bare base: what is evaluated below checks its digest there.
    model = sf_model(there)
    with sf.compose(model, [task], heads=task):
        pass


def sf_model(there):
    from sparse_ft.tasks import TASKS

    return TASKS["tokens"]().build(there / "bert", ["B-LOC", "B-PER", "O"])


def test_evaluation_repeats_the_figures_of_the_training(there, tmp_path):
    made = ner(there, tmp_path / "ner.safetensors", sft=there / "sw.safetensors")
    (row,) = evaluate(
        there / "bert", made.path, there / "test.conll", langs=[there / "sw.safetensors"]
    )
    assert row["metric"] == "f1"
    assert row["f1"] == pytest.approx(made.phases[-1]["best"], abs=1e-12)
    (bare,) = evaluate(there / "bert", made.path, there / "test.conll")
    assert bare["lang"] is None
    words = [line for line in (there / "test.conll").read_text("utf-8").splitlines() if line]
    assert bare["n"] == row["n"] == len(words)


def test_the_perplexity_of_a_language_is_that_of_the_training(there, tmp_path):
    lines = (there / "text.txt").read_text("utf-8").splitlines()
    (tmp_path / "valid.txt").write_text("\n".join(lines[:20]), "utf-8")
    made = language(there, tmp_path / "x.safetensors", valid=tmp_path / "valid.txt")
    (row,) = evaluate(there / "bert", made.delta, tmp_path / "valid.txt")
    # The training keeps φ in fp32; θ0 + φ is the same fp32 weight.
    assert row["loss"] == pytest.approx(made.phases[-1]["best"], rel=1e-6)


def test_a_decoder_learns_a_language(there, tmp_path):
    made = language(there, tmp_path / "x.safetensors", "causal-language", base=there / "llama")
    assert made.delta.meta["recipe"]["task"]["name"] == "clm"
    assert made.delta.nnz == int(0.1 * made.delta.layout.numel)
    (row,) = evaluate(there / "llama", made.path, there / "text.txt")
    assert 0 < row["loss"] < 10


def test_the_log_has_what_happened(there, tmp_path):
    made = language(there, tmp_path / "x.safetensors", settings={"steps": (6, 9)})
    log = [json.loads(line) for line in (made.folder / "log.jsonl").read_text().splitlines()]
    assert {r["step"] for r in log if r["phase"] == "full" and "eval_loss" in r} == {3, 6}
    ends = [r for r in log if "loss" in r]
    assert [(r["phase"], r["step"]) for r in ends] == [("full", 6), ("sparse", 9)]
    assert all({"lr", "l1", "moved", "grad_norm", "time"} <= r.keys() for r in ends)
    assert ends[1]["moved"] <= 0.1 < ends[0]["moved"]
    phases = [(p["phase"], p["step"], p["loss"]) for p in made.phases]
    assert phases == [(r["phase"], r["step"], r["loss"]) for r in ends]
    best = min((r for r in log if r["phase"] == "sparse" and "eval_loss" in r),
               key=lambda r: r["eval_loss"])  # fmt: skip
    assert (made.phases[1]["best"], made.phases[1]["best_step"]) == (
        best["eval_loss"],
        best["step"],
    )


def test_random_entries_need_no_full_phase(there, tmp_path):
    made = ner(there, tmp_path / "x.safetensors", {"criterion": "random"})
    assert [p["phase"] for p in made.phases] == ["sparse"]
    assert made.delta.meta["recipe"]["method"] == "RAND-SFT"
    other = ner(there, tmp_path / "y.safetensors", {"criterion": "random"}, seed=1)
    assert made.delta.support != other.delta.support


@pytest.mark.parametrize("name", ["gradient", "fisher", "snip", "weight", "bias", "denoised"])
def test_other_criteria(there, tmp_path, name):
    settings = {"criterion": name, **({"density": None} if name == "bias" else {})}
    made = ner(there, tmp_path / "x.safetensors", settings)
    said = made.delta.meta["recipe"]
    assert said["criterion"] == name
    assert said.get("approximation", False) == (name in ("gradient", "fisher", "snip"))
    assert [p["phase"] for p in made.phases] == ["full", "sparse"][name != "denoised" :]
    counts = made.delta.support.counts()
    assert said["k_requested"] == made.delta.nnz
    if name == "bias":
        assert {n for n, c in counts.items() if c} == {n for n in counts if "bias" in n}
    else:
        assert made.delta.nnz == int(0.1 * made.delta.layout.numel)
    again = ner(there, tmp_path / "y.safetensors", settings)
    assert again.delta.content_id == made.delta.content_id


def test_the_denoised_mask_is_that_of_deft_x(there, tmp_path):
    """At full rank it is the mask of LT-SFT; at a low one it is another."""
    masks = {}
    for rank in ("full", 1):
        options = {"rank": rank, "keep_high": 0.0}
        settings = {"criterion_options": options, "epochs": None, "steps": 6}
        made = language(there, tmp_path / f"{rank}.safetensors", "deft-x-language", settings)
        assert made.delta.meta["recipe"]["method"] == "DeFT-X"
        assert made.delta.meta["recipe"]["rank"] == rank
        masks[rank] = made.delta.support
    plain = language(there, tmp_path / "plain.safetensors").delta.support
    assert masks["full"] == plain != masks[1]


def test_full_tuning_moves_every_entry(there, tmp_path):
    full = {"density": None, "full": True}
    made = ner(there, tmp_path / "x.safetensors", full)
    assert [p["phase"] for p in made.phases] == ["sparse"]
    said = made.delta.meta["recipe"]
    assert (said["method"], said["criterion"], said["l1"]) == ("full", "full", 0)
    assert made.delta.nnz == made.delta.layout.numel
    assert any("LayerNorm" in name for name in made.delta.layout.names)
    (row,) = evaluate(there / "bert", made.path, there / "test.conll")
    assert row["f1"] == pytest.approx(made.phases[-1]["best"], abs=1e-12)


def test_iterations(there, tmp_path):
    made = language(there, tmp_path / "x.safetensors", settings={"iterations": 2})
    assert [(p["phase"], p["iteration"]) for p in made.phases] == [
        ("full", 0),
        ("sparse", 0),
        ("full", 1),
        ("sparse", 1),
    ]


def test_without_validation_data_the_last_state_counts(there, tmp_path):
    said = []
    made = ner(there, tmp_path / "x.safetensors", valid=None, note=said.append)
    assert said == [
        "there are no validation data, so the last state of each phase counts, not the best"
    ]
    assert "best" not in made.phases[-1]
    assert "evaluate_every" not in made.delta.meta["recipe"]


# --- the same bits ------------------------------------------------------------------------------


def test_seeds(there, tmp_path):
    first = ner(there, tmp_path / "a.safetensors").delta
    again = ner(there, tmp_path / "b.safetensors").delta
    other = ner(there, tmp_path / "c.safetensors", seed=1).delta
    assert first.content_id == again.content_id != other.content_id
    assert not torch.equal(first.heads["classifier.weight"], other.heads["classifier.weight"])


class Stop(BaseException):
    """What a signal does to a process, as far as a test in the same process can have it."""


@pytest.mark.parametrize("at", [1, 5, 8, 11])
def test_a_stopped_run_continues_to_the_same_bits(there, tmp_path, monkeypatch, at):
    whole = ner(there, tmp_path / "whole.safetensors", sft=there / "sw.safetensors")
    kind = type(runner.TASKS["tokens"]())
    loss, calls = kind.loss, []

    def stops(self, model, batch):
        calls.append(1)
        if len(calls) == at:
            raise Stop
        return loss(self, model, batch)

    options = {"sft": there / "sw.safetensors", "save_every": 2}
    monkeypatch.setattr(kind, "loss", stops)
    with pytest.raises(Stop):
        ner(there, tmp_path / "x.safetensors", **options)
    assert not (tmp_path / "x.safetensors").exists()
    seen = len(calls)
    made = ner(there, tmp_path / "x.safetensors", **options)
    assert made.delta.content_id == whole.delta.content_id
    assert (tmp_path / "x.safetensors").read_bytes() == whole.path.read_bytes()
    # The loss that is logged is the mean over the steps of one process.
    told = [[{**p, "loss": None} for p in run.phases] for run in (made, whole)]
    assert told[0] == told[1]
    # What was stored was not computed again: 12 steps, of which at most 2 are done twice.
    assert len(calls) - seen <= 12 - (at - 1) + 2


@pytest.mark.parametrize("criterion", ["magnitude", "fisher"])
def test_a_finished_run_is_not_computed_again(there, tmp_path, monkeypatch, criterion):
    settings = {"criterion": criterion}
    first = ner(there, tmp_path / "x.safetensors", settings)
    monkeypatch.setattr(type(runner.TASKS["tokens"]()), "loss", None)
    again = ner(there, tmp_path / "x.safetensors", settings)
    assert again.delta.content_id == first.delta.content_id
    assert again.phases == first.phases
    (tmp_path / "x.safetensors").unlink()
    ner(there, tmp_path / "x.safetensors", settings)
    assert (tmp_path / "x.safetensors").exists()


def test_what_only_names_the_result_is_no_other_run(there, tmp_path, monkeypatch):
    first = ner(there, tmp_path / "x.safetensors")
    monkeypatch.setattr(type(runner.TASKS["tokens"]()), "loss", None)
    again = ner(there, tmp_path / "x.safetensors", name="entities", license="mit")
    stored = sf.SparseDelta.load(tmp_path / "x.safetensors")
    assert (stored.meta["task"], stored.meta["license"]) == ("entities", "mit")
    assert torch.equal(stored.val, first.delta.val)
    assert again.delta.content_id == stored.content_id


SELECTIONS = {
    "magnitude": {},
    "denser": {"density": 0.3, "fill": True},
    "denoised": {"criterion": "denoised", "criterion_options": {"rank": 2, "keep_high": 0.2}},
    "randomized": {
        "criterion": "denoised",
        "criterion_options": {"rank": 2, "method": "randomized", "seed": 3},
    },
}


@pytest.mark.parametrize("first", ["magnitude", "randomized"])
def test_selections_of_one_full_phase_are_those_of_runs_of_their_own(there, tmp_path, first):
    full = tmp_path / "full.safetensors"
    for name in sorted(SELECTIONS, key=lambda name: name != first):
        settings = SELECTIONS[name]
        shared = ner(there, tmp_path / f"{name}.safetensors", settings, full_model=full)
        assert [p["phase"] for p in shared.phases] == ["full", "sparse"][name != first :]
        own = ner(there, tmp_path / f"{name}-own.safetensors", settings)
        assert shared.delta.content_id == own.delta.content_id, name
    made = full.read_bytes()
    # Presets that tune alike share it, whatever they are called; those that do not are refused.
    deft = recipe("lt-sft-ner", **{**SHORT, "max_length": 32, "steps": (4, 8), "lr": 1e-3})
    deft = deft.changed(evaluate_every=4, criterion="denoised")
    files = (there / "train.conll", there / "bert", tmp_path / "deft.safetensors")
    train(*files, recipe=replace(deft, name="mine", origin="ours"), valid=there / "test.conll",
          name="ner", full_model=full)  # fmt: skip
    for settings, options in (({"lr": 2e-3}, {}), ({}, {"seed": 1})):
        with pytest.raises(ValueError, match=r"full.safetensors' was tuned with other settings"):
            ner(there, tmp_path / "x.safetensors", settings, full_model=full, **options)
    assert full.read_bytes() == made


def test_the_full_model_gives_the_dense_difference(there, tmp_path, recwarn):
    full = tmp_path / "full.safetensors"
    sparse = language(there, tmp_path / "x.safetensors", full_model=full).delta
    dense = sf.diff(there / "bert", full, eligible="*", role="language", lang="en")
    assert not [str(w.message) for w in recwarn if "diff" in str(w.message)]
    assert dense.layout == sparse.layout
    # What LT-SFT selects is the largest of it.
    flat = torch.cat([dense.dense(name).flatten().abs() for name in dense.layout.names])
    selected = torch.cat([sparse.support.mask(name).flatten() for name in sparse.layout.names])
    largest = flat.sort(descending=True, stable=True).indices[: sparse.nnz]
    assert torch.equal(selected.nonzero()[:, 0], largest.sort().values)
    # And it goes where the sparse one goes.
    langs = [dense, sparse, None]
    rows = evaluate(there / "bert", there / "ner.safetensors", there / "test.conll", langs=langs)
    assert len({row["accuracy"] for row in rows}) > 1


@pytest.mark.parametrize(
    "settings",
    [{"criterion": "random"}, {"criterion": "bias"}, {"criterion": "snip"}, {"full": True}],
    ids=lambda settings: next(iter(settings.values())),
)
def test_what_needs_no_full_phase_leaves_the_full_model_alone(there, tmp_path, settings):
    if settings.get("criterion") in (None, "bias"):
        settings = {"density": None, **settings}
    full = tmp_path / "full.safetensors"
    shared = ner(there, tmp_path / "x.safetensors", settings, full_model=full)
    own = ner(there, tmp_path / "own.safetensors", settings)
    assert shared.delta.content_id == own.delta.content_id
    assert not full.exists()


# --- several sources ----------------------------------------------------------------------------


def test_several_sources(there, tmp_path):
    # So loud that a head of few steps scores another accuracy with it than without.
    sw = sf.merge([sf.SparseDelta.load(there / "sw.safetensors")], weights=[5.0])
    sw.save(there / "loud.safetensors")
    (there / "sources.json").write_text(
        json.dumps(
            {
                "sw": {"data": "test.conll", "valid": "train.conll", "sft": "loud.safetensors"},
                "en": {"data": ["train.conll"], "repeat": 2},
            }
        )
    )
    sources = read_sources(there / "sources.json")
    assert sources["en"] == Source((str(there / "train.conll"),), repeat=2)
    settings = {"metric": "accuracy"}
    made = ner(there, tmp_path / "x.safetensors", settings, data=sources, valid=None)
    assert made.delta.meta["trained_on"] == [{"id": sw.content_id, "alpha": 1.0}]
    assert set(made.delta.meta["recipe"]["data"]) == {"sw", "en"}
    # Evaluated with the SFT of its source on it.
    langs = [there / "loud.safetensors", None]
    rows = evaluate(there / "bert", made.path, there / "train.conll", langs=langs)
    assert rows[0]["accuracy"] == pytest.approx(made.phases[-1]["best"], abs=1e-12)
    assert rows[1]["accuracy"] != rows[0]["accuracy"]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object, one entry for each source"),
        ('{"et": {"data": {"train": "x", "sft": "y"}}}', "source 'et': data must be a file or a"),
        ('{"et": {"data": "x", "stf": "y"}}', "source 'et': there is no key 'stf'; there are data"),
        ('{"et": {"data": "x", "repeat": 0}}', "source 'et': repeat must be a whole number"),
        ('{"et": {}}', "source 'et': data must be"),
        ('{"et": "x"}', "source 'et': must be an object"),
    ],
)
def test_sources_are_checked(tmp_path, document, said):
    (tmp_path / "sources.json").write_text(document)
    with pytest.raises(RunError, match=said):
        read_sources(tmp_path / "sources.json")


# --- evaluation ---------------------------------------------------------------------------------


def test_languages_and_tests_pair(there):
    base, task = there / "bert", there / "ner.safetensors"
    sw, conll = there / "sw.safetensors", there / "test.conll"
    rows = evaluate(base, task, conll, langs=[None, sw])
    assert [row["lang"] for row in rows] == [None, str(sw)]
    rows = evaluate(base, task, [conll, there / "train.conll"], langs=[sw, None])
    assert [(row["data"], row["lang"]) for row in rows] == [
        (str(conll), str(sw)),
        (str(there / "train.conll"), None),
    ]
    with pytest.raises(RunError, match="2 test data and 3 languages"):
        evaluate(base, task, [conll, conll], langs=[sw, sw, None])


def test_the_model_of_evaluation_is_the_sum(there):
    """The figures are those of a model that was added up by hand."""
    from sparse_ft.tasks import TASKS

    sw, task = (sf.SparseDelta.load(there / f"{name}.safetensors") for name in ("sw", "ner"))
    kind = TASKS["tokens"]()
    model = kind.build(there / "bert", task.meta["recipe"]["labels"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for delta, alpha in ((task, 1.0), (sw, 0.5)):
                if name in delta.layout:
                    parameter += alpha * delta.dense(name)
            if name in task.heads:
                parameter.copy_(task.heads[name])
    tokenizer = kind.tokenizer(there / "bert")
    examples = kind.read(there / "train.conll")
    features = kind.encode(examples, tokenizer, 32, labels=task.meta["recipe"]["labels"])
    expected = kind.evaluate(model, features, examples, tokenizer)
    (row,) = evaluate(there / "bert", task, there / "train.conll", langs=[sw], weight=0.5)
    assert {key: row[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    (other,) = evaluate(there / "bert", task, there / "train.conll", langs=[sw])
    assert other["accuracy"] != row["accuracy"]


@pytest.mark.parametrize("preset", KINDS)
def test_predictions_are_what_is_scored(there, tmp_path, preset):
    from sklearn.metrics import accuracy_score

    suffix, metric, length = KINDS[preset]
    options = {"options": {"stride": 4}} if preset == "lt-sft-qa" else {}
    given = {"max_length": length, "steps": 3, "evaluate_every": None}
    made = train(
        *(there / f"train.{suffix}", there / "bert", tmp_path / "x.safetensors"),
        recipe=recipe(preset, density=0.5, batch_size=8, **given),
        **options,
    )
    arguments = (there / "bert", made.path, there / f"test.{suffix}")
    (row,) = evaluate(*arguments, predictions=True)
    gold, said = row.pop("gold"), row.pop("predictions")
    assert [row] == evaluate(*arguments)
    assert json.loads(json.dumps(said)) == said
    assert len(said) == len(gold) == 12
    if suffix in ("conll", "conllu"):
        assert [len(words) for words in said] == [len(words) for words in gold]
        pairs = [p for s, g in zip(said, gold, strict=True) for p in zip(s, g, strict=True)]
        right = sum(s == g for s, g in pairs) / len(pairs)
        assert right == pytest.approx(row["las" if metric == "las" else "accuracy"])
    elif suffix == "json":
        right = sum(s in g for s, g in zip(said, gold, strict=True)) / 12
        assert right == pytest.approx(row["exact_match"])
    else:
        assert accuracy_score(gold, said) == pytest.approx(row["accuracy"])


def test_a_language_predicts_nothing_of_a_line(there):
    arguments = (there / "bert", there / "sw.safetensors", there / "text.txt")
    with pytest.raises(RunError, match=r"sw.safetensors: mlm predicts nothing of an example; leav"):
        evaluate(*arguments, predictions=True)
    with pytest.raises(TypeError, match="mlm predicts nothing of an example; it is scored by its"):
        runner.TASKS["mlm"]().predict(None, [], [], None)


def test_an_sft_that_records_nothing_is_described(there, tmp_path):
    task = sf.SparseDelta.load(there / "ner.safetensors")
    bare = sf.SparseDelta(task.support, task.val, task.heads, {"base": task.meta["base"]})
    with pytest.raises(RunError, match="records no kind of task"):
        evaluate(there / "bert", bare, there / "test.conll")
    described = {"kind": "tokens", "labels": ["B-LOC", "B-PER", "O"], "max_length": 32}
    rows = [
        evaluate(there / "bert", delta, there / "test.conll", **options)
        for delta, options in ((bare, described), (task, {}))
    ]
    assert rows[0] == rows[1]


def test_labels_that_the_head_has_not_are_refused(there):
    task = sf.SparseDelta.load(there / "ner.safetensors")
    for labels in (["B-PER", "B-LOC", "O"], ["B-LOC", "B-PER"]):
        with pytest.raises(RunError, match="records the labels B-LOC, B-PER, O, in this order"):
            evaluate(there / "bert", task, there / "test.conll", labels=labels)
    same = evaluate(there / "bert", task, there / "test.conll", labels=["B-LOC", "B-PER", "O"])
    assert same == evaluate(there / "bert", task, there / "test.conll")
    bare = sf.SparseDelta(task.support, task.val, task.heads, {"base": task.meta["base"]})
    with pytest.raises(RunError, match="records no labels; give each with --label"):
        evaluate(there / "bert", bare, there / "test.conll", kind="tokens")


def test_what_has_no_effect_is_said(there, tmp_path):
    with pytest.raises(RunError, match="weight is of the languages' SFTs, and none is given"):
        evaluate(there / "bert", there / "sw.safetensors", there / "text.txt", weight=0.5)
    with pytest.raises(ValueError, match="max_length is 0"):
        evaluate(there / "bert", there / "ner.safetensors", there / "test.conll", max_length=0)
    said = []
    ner(there, tmp_path / "x.safetensors", {"evaluate_every": None}, note=said.append)
    assert said == [
        "the recipe evaluates nothing (evaluate_every), so the validation data are not used"
    ]


def test_an_error_names_the_one_of_several_files(there, tmp_path):
    (tmp_path / "b.conll").write_text("Anna B-PER\n\nthe O\nLima B-ORG\n")
    files = [there / "train.conll", tmp_path / "b.conll"]
    with pytest.raises(ValueError, match=r"^\S*/b.conll, line 3: .*'B-ORG'.*outside=\[\"ORG\"\]"):
        ner(there, tmp_path / "x.safetensors", data=files, labels=["B-LOC", "B-PER", "O"])


# --- what is refused ----------------------------------------------------------------------------


def test_another_base_is_refused(there, tmp_path):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(there / "bert")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    model.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((there / "bert" / name).read_bytes())
    with pytest.raises(sf.SFTError, match="base"):
        evaluate(tmp_path / "other", there / "ner.safetensors", there / "test.conll")
    evaluate(
        *(tmp_path / "other", there / "ner.safetensors", there / "test.conll"),
        allow_base_mismatch=True,
    )


def test_an_output_of_another_run_is_not_replaced(there, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((there / "sw.safetensors").read_bytes())
    with pytest.raises(FileExistsError, match=r"x.safetensors exists, and .*x.run holds no run"):
        ner(there, path)
    assert path.read_bytes() == (there / "sw.safetensors").read_bytes()
    made = ner(there, path, force=True)
    assert path.read_bytes() != (there / "sw.safetensors").read_bytes()
    # Something else in the place of a finished run's output.
    path.write_bytes((there / "sw.safetensors").read_bytes())
    with pytest.raises(FileExistsError, match=r"x.run holds no run that it is of; --force rep"):
        ner(there, path)
    ner(there, path, force=True)
    assert sf.SparseDelta.load(path).content_id == made.delta.content_id


def test_fresh_replaces_nothing_of_another_run(there, tmp_path):
    path, folder = tmp_path / "x.safetensors", tmp_path / "own.run"
    path.write_bytes((there / "sw.safetensors").read_bytes())
    with pytest.raises(FileExistsError, match="holds no run that it is of"):
        ner(there, path, run=folder, fresh=True)
    made = ner(there, tmp_path / "y.safetensors", run=folder)
    with pytest.raises(FileExistsError, match="holds no run that it is of"):
        ner(there, path, run=folder, fresh=True)
    assert path.read_bytes() == (there / "sw.safetensors").read_bytes()
    assert ner(there, made.path, run=folder, fresh=True).delta.content_id == made.delta.content_id


def test_fresh_leaves_the_log_of_a_run_that_is_at_work(there, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    made = ner(there, tmp_path / "x.safetensors")
    log = (made.folder / "log.jsonl").read_bytes()
    monkeypatch.setattr("sparse_ft.runs.WAIT", 0.0)
    lock = os.open(made.folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process works on this run"):
            ner(there, tmp_path / "x.safetensors", fresh=True)
    finally:
        os.close(lock)
    assert (made.folder / "log.jsonl").read_bytes() == log


def test_another_run_in_the_folder_is_refused(there, tmp_path):
    path = tmp_path / "x.safetensors"
    first = ner(there, path)
    kept = path.read_bytes()
    for settings, options in (
        ({"lr": 2e-3}, {}),
        ({}, {"seed": 1}),
        ({}, {"data": there / "test.conll"}),
    ):
        with pytest.raises(ValueError, match=r"x\.run: holds a run with other settings"):
            ner(there, path, settings, **options)
    assert path.read_bytes() == kept
    other = ner(there, path, {"lr": 2e-3}, fresh=True)
    assert other.delta.content_id != first.delta.content_id
    assert sf.SparseDelta.load(path).content_id == other.delta.content_id
    log = [json.loads(line) for line in (other.folder / "log.jsonl").read_text().splitlines()]
    assert len([r for r in log if r["phase"] == "sparse" and "loss" in r]) == 1


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"k": 1_000_000}, {}, r"k is 1,000,000 \(preset lt-sft-ner\), and the model has \d\d,\d"),
        ({"options": {"tag": "x"}}, {}, "tokens has no option 'tag'; it has metric, scheme"),
        ({"criterion_options": {"no": 1}}, {}, "criterion 'magnitude': .*'no'"),
        ({"criterion": "nonsense"}, {}, "no criterion 'nonsense'; there are bias, denoised, fish"),
        ({"criterion": "snip", "criterion_options": {"n": 1}}, {}, "criterion 'snip': its one"),
        ({"criterion": "denoised", "criterion_options": {"rank": 0}}, {}, "rank"),
        ({"metric": "las"}, {}, "metric is 'las'"),
        ({}, {"sft": "ner.safetensors"}, r"ner.safetensors: is the SFT of a task \(ner\), not of"),
        ({}, {"labels": ["O", "B-PER"]}, "train.conll, line .*the label 'B-LOC' is not one of"),
        ({}, {"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({}, {"lang": "e n"}, "lang: 'e n' is no language tag"),
        ({}, {"options": {"foo": 1}}, "neither the task tokens .* nor the reader .* takes foo=1"),
        ({}, {"valid": "text.txt"}, "text.txt, line 1"),
        ({}, {"labels": ["O", "B-PER", "B-LOC", "O"]}, "labels: 'O' stands there twice"),
        ({}, {"options": {"tag": "x"}}, r"train.conll: neither the task .* takes tag='x' \("),
        ({}, {"options": {"tokens": 1}}, "tokens: the option tokens must be str; found 1"),
        ({}, {"options": {"scheme": 2}}, r"tokens: the option scheme must be str \| None; found 2"),
        ({"iterations": 2}, {"full_model": "full.safetensors"}, "full_model is of one full phase"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(there, tmp_path, settings, options, said):
    files = {key: there / options[key] for key in ("sft", "valid") if key in options}
    if "k" in settings:
        settings = {"density": None, **settings}
    with pytest.raises(ValueError, match=said):
        ner(there, tmp_path / "x.safetensors", settings, **{**options, **files})
    assert not (tmp_path / "x.safetensors").exists()


def test_places_are_checked_first(there, tmp_path):
    with pytest.raises(RunError, match=r"x.bin: the output must end in .safetensors"):
        ner(there, tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ner(there, tmp_path / "no" / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_no_number_stops_the_run(there, tmp_path, monkeypatch):
    kind = type(runner.TASKS["tokens"]())
    loss, calls = kind.loss, []

    def diverges(self, model, batch):
        calls.append(1)
        return loss(self, model, batch) * (float("nan") if len(calls) == 10 else 1)

    monkeypatch.setattr(kind, "loss", diverges)
    with pytest.raises(RuntimeError, match=r"step 6 of the sparse phase.*state of step 4 is in"):
        ner(there, tmp_path / "x.safetensors", save_every=2)
    assert not (tmp_path / "x.safetensors").exists()
    monkeypatch.setattr(kind, "loss", loss)
    whole = ner(there, tmp_path / "y.safetensors")
    assert ner(there, tmp_path / "x.safetensors", save_every=2).delta.content_id == (
        whole.delta.content_id
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vocab_size": 20}, r"gives the piece \d+, and the model has 20 embeddings"),
        ({"max_position_embeddings": 9}, "the model has 9 positions; set max_length to at most 9"),
    ],
)
def test_data_that_the_model_cannot_read(there, tmp_path, config, said):
    """A tokenizer of another model, and one that knows no limit: on a GPU it would just die."""
    from transformers import BertConfig, BertForMaskedLM

    base = bert_folder(tmp_path / "bert")
    other = BertConfig.from_pretrained(base)
    other.update(config)
    BertForMaskedLM(other).save_pretrained(base)
    with pytest.raises(RunError, match=said):
        ner(there, tmp_path / "x.safetensors", base=base, sft=None)
    assert not (tmp_path / "x.safetensors").exists()
