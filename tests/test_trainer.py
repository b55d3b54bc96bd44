"""LotteryTicketTrainer: the phases of LotteryTicket inside the Hugging Face Trainer."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

import sparse_ft as sf
from sparse_ft.delta import SFTError, SparseDelta
from sparse_ft.sources import MultiSource, source_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    EarlyStoppingCallback,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from sparse_ft.trainer import (  # noqa: E402
    LotteryTicketMixin,
    LotteryTicketTrainer,
    SparseFineTuningArguments,
)

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


def bert(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    config = BertConfig(
        **TINY, num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    return BertForTokenClassification(config)


def examples(n, seed=1, labels=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(50, (6,), generator=generator),
            "labels": torch.randint(labels, (6,), generator=generator),
        }
        for _ in range(n)
    ]


def arguments(folder, kind=TrainingArguments, **settings):
    defaults = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return kind(str(folder), **{**defaults, **settings})


def sft(**settings):
    return SparseFineTuningArguments(**{"density": 0.1, **settings})


def trainer_for(folder, model=None, *, sft_args=None, own=None, kind=LotteryTicketTrainer, **given):
    return kind(
        model=bert() if model is None else model,
        args=arguments(folder, **given),
        train_dataset=examples(20),
        eval_dataset=examples(8, seed=2),
        sft_args=sft_args or sft(),
        **(own or {}),
    )


def bits(model):
    return {n: p.detach().view(torch.uint8).clone() for n, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def groups_of(trainer, model, decay):
    """The Trainer's groups: biases and norms are not decayed."""
    decayed = set(trainer.get_decay_parameter_names(model))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n for n in names if n not in decayed} >= {"classifier.bias"}
    return [
        {"params": [n for n in names if n in decayed], "weight_decay": decay},
        {"params": [n for n in names if n not in decayed], "weight_decay": 0.0},
    ]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Garbage collection before each training, and threads, are most of the time here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=int))
        yield
    torch.set_num_threads(threads)


# --- the same as LotteryTicket ------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("gather", ["step", "hook"])
def test_equals_a_plain_loop_on_the_same_batches(tmp_path, accumulate, gather):
    """To the last bit: the same batches, the same optimizer, the same schedule, fp32."""
    length = {"full_max_epochs": 2, "sparse_max_steps": 7}
    args = {"gradient_accumulation_steps": accumulate, "weight_decay": 0.1, "warmup_steps": 2}
    trainer = trainer_for(
        tmp_path,
        sft_args=sft(full_l1=0.5, sparse_l1=0.3, gather=gather, iterations=2, **length),
        **args,
    )
    before = bits(trainer.model)
    output = trainer.train()

    model = bert()
    sf.freeze_norms(model)
    torch.manual_seed(42)
    loader = trainer.get_train_dataloader()
    per_epoch = -(-5 // accumulate)
    steps = {"full": 2 * per_epoch, "sparse": 7}

    def train(phase):
        optimizer = phase.optimizer(
            1.0,
            groups=groups_of(trainer, model, 0.1),
            lr=1e-2,
            gather=gather,
        )
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, steps[phase.name])
        model.train()
        done = 0
        for epoch in range(10):
            loader.set_epoch(epoch)
            batches = list(loader)
            for i in range(0, len(batches), accumulate):
                group = batches[i : i + accumulate]
                # As the Trainer: the mean over the labels of all batches of a step.
                count = torch.tensor(sum(b["labels"].numel() for b in group))
                for batch in group:
                    if trainer.model_accepts_loss_kwargs:
                        model(**batch, num_items_in_batch=count).loss.backward()
                    else:
                        (model(**batch).loss / len(group)).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                done += 1
                if done == steps[phase.name]:
                    return

    ticket = sf.LotteryTicket(model, density=0.1, l1=(0.5, 0.3), iterations=2, seed=42)
    expected = ticket.fit(train)
    assert trainer.delta == expected
    assert trainer.delta.nnz == ticket.k
    assert output.global_step == 2 * (2 * per_epoch + 7)
    with trainer.base_model() as model:
        assert same(bits(model), before)
    with sf.compose(bert(), [expected], heads=[expected]) as on:
        assert on.changed
        tuned = bert()
    sf.compose(tuned, [expected], heads=[expected])
    assert same(bits(trainer.model), bits(tuned))


def test_is_deterministic_and_seeded(tmp_path):
    def run(name, seed, draw):
        trainer = trainer_for(tmp_path / name, bert(dropout=0.1), seed=seed)
        torch.rand(draw)  # what others draw does not matter
        trainer.train()
        return trainer.delta.content_id

    assert run("a", 1, 0) == run("b", 1, 5) != run("c", 2, 0)


def test_random_criterion_skips_the_full_phase(tmp_path):
    trainer = trainer_for(tmp_path, sft_args=sft(criterion="random"))
    output = trainer.train()
    assert list(trainer.phase_states) == ["sparse-1"]
    assert output.global_step == 6
    assert trainer.delta.meta["recipe"]["method"] == "RAND-SFT"


def test_other_arguments_of_the_ticket(tmp_path):
    only = {"bert.embeddings.word_embeddings.weight"}
    trainer = trainer_for(tmp_path, own={"ticket": {"eligible": only}, "meta": {"lang": "sw"}})
    trainer.train()
    assert set(trainer.delta.layout.names) == only
    assert trainer.delta.meta["lang"] == "sw"


# --- lengths and arguments ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "given", "steps"),
    [
        ({}, {"max_steps": 7}, [7, 7]),
        ({}, {"max_steps": -1, "num_train_epochs": 2}, [10, 10]),
        ({"full_max_epochs": 1, "sparse_max_epochs": 3}, {}, [5, 15]),
        ({"full_max_epochs": 100, "full_max_steps": 4, "sparse_max_steps": 3}, {}, [4, 3]),
        ({"full_max_epochs": 1, "full_min_steps": 8, "sparse_min_steps": 9}, {}, [8, 9]),
    ],
    ids=str,
)
def test_lengths_follow_the_reference_rule(tmp_path, own, given, steps):
    trainer = trainer_for(tmp_path, sft_args=sft(**own), **given)
    trainer.train()
    states = trainer.phase_states
    assert [states[p].global_step for p in ("full-1", "sparse-1")] == steps
    assert trainer.args.max_steps == given.get("max_steps", 6), "the arguments stay the user's"
    assert trainer.args.output_dir == str(tmp_path)


def test_sparse_phases_may_have_their_own_rate(tmp_path):
    trainer = trainer_for(
        tmp_path,
        sft_args=sft(sparse_learning_rate=0.5),
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    rates = [s.log_history[0]["learning_rate"] for s in trainer.phase_states.values()]
    assert rates == pytest.approx([1e-2 * 5 / 6, 0.5 * 5 / 6]) or rates == [1e-2, 0.5]


def test_arguments_from_the_command_line_and_json(tmp_path):
    parser = HfArgumentParser((SparseFineTuningArguments, TrainingArguments))
    line = [
        "--output_dir",
        str(tmp_path),
        "--density",
        "0.04",
        "--full-l1",
        "0.1",
        "--no_freeze_norms",
    ]
    own, args = parser.parse_args_into_dataclasses([*line, "--sparse_max_epochs", "10"])
    assert own == SparseFineTuningArguments(
        density=0.04, full_l1=0.1, freeze_norms=False, sparse_max_epochs=10.0
    )
    assert args.output_dir == str(tmp_path)
    file = tmp_path / "run.json"
    file.write_text(
        json.dumps(
            {"k": 7_667_712, "source_sft": "sw", "output_dir": "x", "full_min_steps": 30_000}
        )
    )
    own, _ = parser.parse_json_file(str(file))
    assert own == SparseFineTuningArguments(k=7_667_712, source_sft="sw", full_min_steps=30_000)
    own, _ = parser.parse_dict({"k": 5, "output_dir": "x", "criterion": "random"})
    assert (own.k, own.criterion) == (5, "random")


def test_criterion_options_are_checked():
    with pytest.raises(ValueError, match="must be a JSON object, got 'rank=3'"):
        SparseFineTuningArguments(criterion_options="rank=3").ranking()
    with pytest.raises(ValueError, match=r"no criterion 'largest'; there are .*magnitude"):
        SparseFineTuningArguments(criterion="largest", criterion_options="{}").ranking()
    assert SparseFineTuningArguments(criterion="random").ranking() == "random"
    own = SparseFineTuningArguments(criterion="denoised", criterion_options='{"rank": 4}')
    assert own.ranking().recipe()["rank"] == 4


# --- evaluation and checkpoints -----------------------------------------------------------------


class Scripted:
    """Metrics by a script: the scores of the evaluations of each phase."""

    def __init__(self, *scores):
        self.scores = list(scores)

    def __call__(self, prediction):
        return {"score": self.scores.pop(0)}


@pytest.mark.parametrize("strategy", ["steps", "best", "epoch"])
def test_the_best_checkpoint_decides_mask_and_values(tmp_path, strategy):
    every = {"eval_steps": 2, "save_steps": 2} if strategy != "epoch" else {}
    trainer = trainer_for(
        tmp_path,
        sft_args=sft(full_max_steps=10, sparse_max_steps=10),
        own={"compute_metrics": Scripted(*([0.1, 0.9] + 3 * [0.2] + [0.3, 0.7, 0.8] + 2 * [0.1]))}
        if strategy != "epoch"
        else {"compute_metrics": Scripted(0.9, 0.1, 0.9, 0.1)},
        eval_strategy="epoch" if strategy == "epoch" else "steps",
        save_strategy=strategy,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        **every,
    )
    trainer.train()
    theta0 = sf.snapshot(bert())
    full, sparse = (5, 5) if strategy == "epoch" else (4, 6)
    states = trainer.phase_states
    assert [s.best_global_step for s in states.values()] == [full, sparse]
    assert [s.best_metric for s in states.values()] == [0.9, 0.9 if strategy == "epoch" else 0.8]
    best = load_file(tmp_path / "full-1" / f"checkpoint-{full}" / "model.safetensors")
    last = (
        load_file(tmp_path / "full-1" / "checkpoint-10" / "model.safetensors")
        if (strategy != "best")
        else None
    )
    eligible = set(trainer.delta.layout.names)

    def mask(tuned):
        chosen = {n: tuned[n] for n in eligible}
        return sf.select(chosen, {n: theta0[n] for n in eligible}, density=0.1)

    assert trainer.delta.support == mask(best)
    assert last is None or trainer.delta.support != mask(last)
    tuned = load_file(tmp_path / "sparse-1" / f"checkpoint-{sparse}" / "model.safetensors")
    delta = SparseDelta.between(
        {n: theta0[n] for n in eligible},
        {n: tuned[n] for n in eligible},
        trainer.delta.support,
    )
    assert torch.equal(trainer.delta.val, delta.val)
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(trainer.delta.heads[name], tuned[name])


def test_checkpoints_that_would_miss_the_best_are_refused(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 250}
    with pytest.raises(ValueError, match=r'most evaluations save none; use save_strategy="best"'):
        trainer_for(tmp_path, **best, save_strategy="steps", save_steps=1_000_000)


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_phase_shorter_than_eval_steps_is_evaluated_at_its_end(tmp_path, strategy):
    trainer = trainer_for(
        tmp_path,
        sft_args=sft(full_max_steps=5, sparse_max_steps=2),
        own={"compute_metrics": Scripted(0.1, 0.2, 0.3)},
        eval_strategy="steps",
        eval_steps=4,
        save_strategy=strategy,
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    assert [s.best_global_step for s in trainer.phase_states.values()] == [5, 2]


@pytest.mark.parametrize(
    ("strategy", "delay", "found"),
    [("steps", 3, "2 steps"), ("epoch", 1, "0.4 epochs")],
)
def test_phases_without_an_evaluation_are_refused_at_once(tmp_path, strategy, delay, found):
    trainer = trainer_for(
        tmp_path,
        sft_args=sft(full_max_steps=5, sparse_max_steps=2),
        eval_strategy=strategy,
        eval_steps=1,
        eval_delay=delay,
        save_strategy="best",
        load_best_model_at_end=True,
    )
    with pytest.raises(ValueError, match=f"a sparse phase of {found} ends before its first eval"):
        trainer.train()
    assert not trainer.phase_states


def test_no_best_checkpoint_is_an_error_and_keeps_the_base(tmp_path):
    trainer = trainer_for(
        tmp_path,
        own={"compute_metrics": Scripted(*[float("nan")] * 9)},
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    before = bits(trainer.model)
    with pytest.raises(ValueError, match="no evaluation of full-1 left a best checkpoint"):
        trainer.train()
    assert same(bits(trainer.model), before)
    assert trainer.delta is None


def test_early_stopping_counts_anew_in_each_phase(tmp_path):
    # Two evaluations without a better score end a phase.
    trainer = trainer_for(
        tmp_path,
        sft_args=sft(full_max_steps=10, sparse_max_steps=10),
        own={
            "compute_metrics": Scripted(0.5, 0.4, 0.3, 0.1, 0.2, 0.15, 0.1),
            "callbacks": [EarlyStoppingCallback(2)],
        },
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    states = trainer.phase_states
    assert [s.global_step for s in states.values()] == [3, 4]
    assert [s.best_global_step for s in states.values()] == [1, 2]


class Recorder(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_init_end(self, args, state, control, **kwargs):
        self.events.append("init")

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(f"begin {Path(args.output_dir).name} {state.max_steps}")

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        self.events.append(f"step {state.global_step} {type(inner).__name__}")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


def test_callbacks_see_one_training_per_phase(tmp_path):
    seen = Recorder()
    lengths = sft(full_max_steps=2, sparse_max_steps=1)
    trainer_for(tmp_path, sft_args=lengths, own={"callbacks": [seen]}).train()
    assert seen.events == [
        "init",
        "begin full-1 2",
        "step 1 AdamW",
        "step 2 AdamW",
        "end",
        "begin sparse-1 1",
        "step 1 MaskedAdamW",
        "end",
    ]


def test_logs_have_l1_moved_and_the_norm_of_the_tuned_gradients(tmp_path):
    trainer = trainer_for(
        tmp_path,
        sft_args=sft(full_l1=2.0, sparse_l1=3.0),
        logging_strategy="steps",
        logging_steps=1,
        max_grad_norm=1e-3,
        save_strategy="steps",
        save_steps=1,
    )
    model = trainer.model
    theta0 = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()
    eligible = list(trainer.delta.layout.names)
    trainable = [*eligible, "classifier.weight", "classifier.bias"]
    everything = sum(v.numel() for v in theta0.values())
    for phase, l1 in (("full-1", 2.0), ("sparse-1", 3.0)):
        logs = [log for log in trainer.phase_states[phase].log_history if "loss" in log]
        assert len(logs) == 6
        for log in logs:
            tuned = load_file(tmp_path / phase / f"checkpoint-{log['step']}" / "model.safetensors")
            far = sum((tuned[n] - theta0[n]).abs().double().sum() for n in trainable)
            assert log["l1"] == pytest.approx(l1 / everything * float(far), rel=1e-5)
            moved = sum(int((tuned[n] != theta0[n]).sum()) for n in eligible)
            assert log["moved"] == moved / sum(theta0[n].numel() for n in eligible)
            assert log["grad_norm"] > 1e-3, "before clipping"
    assert logs[0]["moved"] <= 0.1


def test_a_loss_that_is_nan_stops_and_keeps_the_base(tmp_path):
    class Diverging(LotteryTicketTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step >= 4 else loss

    trainer = trainer_for(tmp_path, kind=Diverging, save_strategy="steps", save_steps=1)
    before = bits(trainer.model)
    with pytest.raises(sf.TrainingDiverged, match="nan at step 5 of the full phase"):
        trainer.train()
    assert same(bits(trainer.model), before)
    kept = sorted(path.name for path in (tmp_path / "full-1").iterdir())
    assert kept == [f"checkpoint-{i}" for i in (1, 2, 3, 4)], "none is from after the divergence"


# --- going on -----------------------------------------------------------------------------------


class Interrupt(TrainerCallback):
    def __init__(self, phase, step, event):
        self.where = phase, step
        self.event = event

    def _at(self, event, args, state):
        if event == self.event and self.where == (Path(args.output_dir).name, state.global_step):
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        self._at("step", args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._at("end", args, state)


def settings_of_a_run(best=True):
    return {
        "sft_args": sft(full_max_steps=11, sparse_max_steps=9, iterations=2, full_l1=0.1),
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": best,
        "weight_decay": 0.05,
        "warmup_steps": 4,
        # A step too many would show.
        "lr_scheduler_type": "constant_with_warmup",
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run ends with that reloads its best checkpoints, and one that does not."""
    found = {}
    for best in (True, False):
        folder = tmp_path_factory.mktemp("run")
        trainer = trainer_for(folder, bert(dropout=0.1), **settings_of_a_run(best))
        trainer.train()
        found[best] = trainer.delta
    assert found[True] != found[False]
    return found


@pytest.mark.parametrize(
    ("phase", "step", "event"),
    [
        ("full-1", 2, "step"),  # before the first checkpoint
        ("full-1", 5, "step"),
        ("full-1", 11, "end"),  # the last step is stored, the phase is not
        ("sparse-1", 3, "step"),
        ("sparse-1", 7, "step"),
        ("sparse-2", 8, "step"),
        ("sparse-2", 9, "end"),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, uninterrupted, phase, step, event):
    best = event == "step"
    own = {"callbacks": [Interrupt(phase, step, event)]}
    trainer = trainer_for(tmp_path, bert(dropout=0.1), own=own, **settings_of_a_run(best))
    before = bits(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert same(bits(trainer.model), before)
    torch.rand(3)
    trainer = trainer_for(tmp_path, bert(dropout=0.1), **settings_of_a_run(best))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.delta == uninterrupted[best]
    assert next(iter(trainer.phase_states)) == phase
    again = trainer_for(tmp_path, bert(dropout=0.1), **settings_of_a_run(best))
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == 0, "it was finished"
    assert math.isnan(output.training_loss)
    assert again.delta == uninterrupted[best]
    assert same(bits(again.model), bits(trainer.model))


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path, uninterrupted):
    own = {"callbacks": [Interrupt("sparse-1", 7, "step")]}
    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path, bert(dropout=0.1), own=own, **settings_of_a_run()).train()
    torn = tmp_path / "sparse-1" / "checkpoint-6" / "trainer_state.json"
    torn.write_text(torn.read_text()[:100])
    missing = tmp_path / "sparse-1" / "checkpoint-7"
    shutil.copytree(tmp_path / "sparse-1" / "checkpoint-3", missing)
    (missing / "optimizer.pt").unlink()
    trainer = trainer_for(tmp_path, bert(dropout=0.1), **settings_of_a_run())
    with pytest.raises(ValueError, match="checkpoint-6 is not complete"):
        trainer.train(resume_from_checkpoint=str(torn.parent))
    with pytest.raises(ValueError, match="is none of the phase that the run is in"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "full-1" / "checkpoint-3"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "sparse-1" / "checkpoint-3"))
    assert trainer.delta == uninterrupted[True]


def test_a_run_goes_on_with_its_own_settings_alone(tmp_path):
    with pytest.raises(ValueError, match="there is no run in"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)
    own = {"callbacks": [Interrupt("sparse-1", 4, "step")]}
    saving = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path, own=own, **saving).train()
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01 and is 0\.02"):
        trainer_for(tmp_path, **saving, learning_rate=0.02).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"of an earlier run.*goes on with it"):
        trainer_for(tmp_path, **saving).train()
    trainer = trainer_for(tmp_path, **saving)
    trainer.train(resume_from_checkpoint=True)
    assert list(trainer.phase_states) == ["sparse-1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"lr_scheduler_kwargs": {"power": 2.0}},
            r"lr_scheduler_kwargs.* was .*1\.0.* and is .*2\.0",
        ),
        ({"dataloader_drop_last": True}, "dataloader_drop_last was false and is true"),
        ({"label_smoothing_factor": 0.5}, "label_smoothing_factor was 0.0 and is 0.5"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        ({"rows": 24}, "train_dataset was 20 and is 24"),
        ({"logging_steps": 3, "save_total_limit": 9, "per_device_eval_batch_size": 2}, None),
        ({"max_steps": -1, "num_train_epochs": 6 / 5}, None),
    ],
    ids=lambda given: next(iter(given), None) if isinstance(given, dict) else "",
)
def test_all_that_decides_the_result_is_compared(stopped, tmp_path, given, message):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    own = dict(given)
    rows = examples(own.pop("rows", 20))
    trainer = trainer_for(tmp_path, **{**POLYNOMIAL, **own})
    trainer.train_dataset = rows
    if message is None:
        trainer.train(resume_from_checkpoint=True)
        return
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


POLYNOMIAL = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 1.0}}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run without checkpoints that was stopped in its sparse phase."""
    folder = tmp_path_factory.mktemp("stopped")
    own = {"callbacks": [Interrupt("sparse-1", 4, "step")]}
    with pytest.raises(KeyboardInterrupt):
        trainer_for(folder, own=own, **POLYNOMIAL).train()
    return folder


def test_nothing_of_others_is_replaced(stopped, tmp_path):
    kept = sorted(os.listdir(stopped))
    with pytest.raises(ValueError, match=r"run\.json of an earlier run.*goes on with it"):
        trainer_for(stopped, **POLYNOMIAL).train()
    assert sorted(os.listdir(stopped)) == kept

    (tmp_path / "sft.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"sft\.safetensors would be replaced"):
        trainer_for(tmp_path).train()
    assert (tmp_path / "sft.safetensors").read_bytes() == b"mine"
    trainer = trainer_for(tmp_path / "run")
    trainer.train()
    with pytest.raises(ValueError, match="of an earlier run"):
        trainer_for(tmp_path / "run", sft_args=sft(density=0.2)).train()
    assert SparseDelta.load(tmp_path / "run") == trainer.delta


def test_an_interrupted_trainer_does_not_start_over(tmp_path):
    trainer = trainer_for(tmp_path)
    stop = Interrupt("sparse-1", 4, "step")
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    with pytest.raises(ValueError, match="of an earlier run"):
        trainer.train()
    assert trainer.train(resume_from_checkpoint=True).global_step == 6
    assert list(trainer.phase_states) == ["full-1", "sparse-1"]


def test_training_again_starts_over(tmp_path):
    mine = tmp_path / "mine-1" / "checkpoint-1"
    mine.mkdir(parents=True)
    trainer = trainer_for(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        load_best_model_at_end=True,
    )
    trainer.train()
    first = trainer.delta
    stale = tmp_path / "sparse-1" / "checkpoint-99"
    shutil.copytree(next((tmp_path / "sparse-1").glob("checkpoint-*")), stale)
    trainer.train()
    assert trainer.delta == first
    assert not stale.exists(), "none is of the run before"
    assert mine.exists()


# --- the result ---------------------------------------------------------------------------------


def test_the_result_is_on_the_model_and_in_the_folder(tmp_path):
    trainer = trainer_for(tmp_path / "run")
    before = bits(trainer.model)
    trainer.save_model(str(tmp_path / "base"))
    assert (tmp_path / "base" / "model.safetensors").exists()
    trainer.train()
    assert SparseDelta.load(tmp_path / "run") == trainer.delta
    trainer.save_model(str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == ["sft.safetensors"]
    assert SparseDelta.load(tmp_path / "out") == trainer.delta
    tuned = trainer.evaluate()["eval_loss"]
    with trainer.base_model() as model:
        assert same(bits(model), before)
        assert trainer.evaluate()["eval_loss"] != tuned
    fresh = bert()
    sf.compose(fresh, [trainer.delta], heads=[trainer.delta])
    assert same(bits(trainer.model), bits(fresh))
    # Training again starts from the base model, not from the result.
    first = trainer.delta
    trainer.train()
    assert trainer.delta == first


def test_a_composition_of_the_callers_is_the_start(tmp_path):
    model = bert()
    language = language_sft(model, 1)
    with sf.compose(model, [language]):
        on = bits(model)
        trainer = trainer_for(tmp_path, model)
        trainer.train()
        assert same(bits(model), on), "it stays, with nothing beside it"
    assert trainer.delta.meta["trained_on"] == [{"id": language.content_id, "alpha": 1.0}]
    sf.compose(model, [language, trainer.delta], heads=[trainer.delta])


# --- sources ------------------------------------------------------------------------------------


def language_sft(model, seed):
    names = [n for n, _ in model.named_parameters() if n.startswith("bert.")]
    generator = torch.Generator().manual_seed(seed)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    tuned = {n: v + 0.3 * torch.randn(v.shape, generator=generator) for n, v in base.items()}
    support = sf.select(tuned, base, density=0.2, criterion="random", seed=seed)
    return SparseDelta.between(base, tuned, support)


def test_a_source_language_is_below_the_task_and_not_in_it(tmp_path):
    language = language_sft(bert(), 1)
    language.save(tmp_path / "sw.safetensors")
    own = sft(source_sft=str(tmp_path / "sw.safetensors"))
    trainer = trainer_for(tmp_path / "a", sft_args=own)
    before = bits(trainer.model)
    trainer.train()
    model = bert()
    with sf.compose(model, [language]):
        by_hand = trainer_for(tmp_path / "b", model)
        by_hand.train()
    assert trainer.delta == by_hand.delta
    assert trainer.delta.meta["trained_on"] == [{"id": language.content_id, "alpha": 1.0}]
    with trainer.base_model():
        assert same(bits(trainer.model), before)
    both = sf.compose(bert(), [language, trainer.delta], heads=[trainer.delta])
    assert both.changed
    model = bert()
    sf.compose(model, [language, trainer.delta], heads=[trainer.delta])
    with torch.no_grad():
        batch = {
            k: torch.stack([e[k] for e in examples(8, seed=2)]) for k in ("input_ids", "labels")
        }
        expected = model.eval()(**batch).loss
    rows = examples(8, seed=2)
    for loss in (
        trainer.evaluate()["eval_loss"],
        trainer.evaluate(rows)["eval_loss"],
        trainer.evaluate({"a": rows})["eval_a_loss"],
        trainer.predict(rows).metrics["test_loss"],
    ):
        assert loss == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match="no source 'sw'; the train_dataset has none by name"):
        trainer.predict(rows, source="sw")


DATA = {"sw": examples(12, 3), "yo": examples(8, 4), "en": examples(10, 5)}


def multi(folder, model=None, sources=None, **given):
    model = bert() if model is None else model
    return LotteryTicketTrainer(
        model=model,
        args=arguments(folder, **given),
        train_dataset=DATA,
        eval_dataset={"sw": examples(8, 6), "en": examples(8, 7), "qu": examples(8, 8)},
        sft_args=sft(full_l1=0.5, sparse_l1=0.5),
        sources=sources,
        repeat={"yo": 2},
    )


def test_several_sources_each_with_its_sft(tmp_path):
    sources = {"sw": language_sft(bert(), 1), "yo": language_sft(bert(), 2), "en": None}
    deltas = {s: d for s, d in sources.items() if d}
    seen = []

    class Watching(LotteryTicketTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(bits(model))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = multi(tmp_path, sources=sources, max_steps=14)
    trainer.__class__ = Watching
    before = bits(trainer.model)
    trainer.train()

    model = bert()
    sf.freeze_norms(model)
    torch.manual_seed(42)
    stream = trainer.get_train_dataloader().dataset
    assert len(stream) == 3 + 2 * 2 + 3
    assert trainer.num_examples(trainer.get_train_dataloader()) == 12 + 2 * 8 + 10
    stream = MultiSource(stream.batches, deltas, {"yo": 2}, seed=42)
    expected, names = [], []

    def train(phase):
        # The groups' order is that of the sum of the norm to clip.
        optimizer = phase.optimizer(1.0, groups=groups_of(trainer, model, 0.0), lr=1e-2)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 14)
        model.train()
        stream.set_epoch(0)
        batches = [*stream, *stream][:14]
        for batch in batches:
            names.append(source_of(batch))
            count = {"num_items_in_batch": torch.tensor(batch["labels"].numel())}
            with stream.active(model, batch):
                expected.append(bits(model))
                model(
                    **batch, **(count if trainer.model_accepts_loss_kwargs else {})
                ).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    delta = sf.LotteryTicket(model, density=0.1, l1=0.5).fit(train)
    assert set(names) == {"sw", "yo", "en"}
    # Each batch has seen exactly the weights of then, with its source's SFT.
    assert len(seen) == len(expected) == 28
    assert all(same(a, b) for a, b in zip(seen, expected, strict=True))
    trained_on = trainer.delta.meta.pop("trained_on")
    assert [item["id"] for item in trained_on] == [d.content_id for d in deltas.values()]
    assert torch.equal(trainer.delta.val, delta.val)
    assert trainer.delta.support == delta.support
    with trainer.base_model():
        assert same(bits(trainer.model), before)

    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == (metrics["eval_sw_loss"] + metrics["eval_en_loss"]) / 2
    for source, on in (("sw", [deltas["sw"]]), ("en", []), ("qu", [])):
        model = bert()
        sf.compose(model, [delta, *on], heads=[delta])
        rows = trainer.eval_dataset[source]
        batch = {k: torch.stack([e[k] for e in rows]) for k in ("input_ids", "labels")}
        with torch.no_grad():
            loss = model.eval()(**batch).loss
        assert metrics[f"eval_{source}_loss"] == pytest.approx(float(loss), rel=1e-6)
        named = {} if source == "qu" else {"source": source}
        for own in (
            trainer.predict(rows, **named).metrics["test_loss"],
            trainer.evaluate(rows, **named)["eval_loss"],
        ):
            assert own == pytest.approx(metrics[f"eval_{source}_loss"], rel=1e-6)
    assert "eval_epoch" not in metrics
    with pytest.raises(ValueError, match="no source 'qu'; the train_dataset has 'sw', 'yo', 'en'"):
        trainer.predict(rows, source="qu")


def test_an_evaluation_of_several_sources_counts_once(tmp_path, caplog):
    class Seen(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append((state.global_step, {n for n in metrics if n.endswith("_loss")}))

    seen = []
    trainer = multi(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        load_best_model_at_end=True,
        metric_for_best_model="en_loss",
        # Never better after the first evaluation: three more are the patience.
        learning_rate=0.0,
        max_steps=8,
    )
    trainer.sft_args.criterion = "random"
    trainer.add_callback(EarlyStoppingCallback(3))
    trainer.add_callback(Seen())
    trainer.train()
    names = {"eval_loss", *(f"eval_{source}_loss" for source in ("sw", "en", "qu"))}
    assert seen == [(i, names) for i in range(1, 5)]
    assert "early stopping is disabled" not in caplog.text


def test_several_sources_are_evaluated_and_resumed(tmp_path):
    sources = {"sw": language_sft(bert(), 1), "yo": language_sft(bert(), 2)}
    given = {
        "max_steps": 14,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "gradient_accumulation_steps": 2,
    }
    whole = multi(tmp_path / "a", sources=sources, **given)
    whole.train()
    for phase, step in (("full-1", 9), ("sparse-1", 7)):
        folder = tmp_path / phase
        # The last checkpoint is in the second epoch, or in the first.
        trainer = multi(folder, sources=sources, **given)
        trainer.add_callback(Interrupt(phase, step, "step"))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer = multi(folder, sources=sources, **given)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.delta == whole.delta


class Endless(IterableDataset):
    def __iter__(self):
        return iter(DATA["en"] * 100)


def test_data_without_a_length(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.train_dataset = Endless()
    trainer.train()
    assert [s.global_step for s in trainer.phase_states.values()] == [6, 6]


def test_sources_are_checked(tmp_path):
    with pytest.raises(
        ValueError, match="deltas names the source 'qu'; there are 'sw', 'yo', 'en'"
    ):
        multi(tmp_path, sources={"qu": None})
    with pytest.raises(ValueError, match="need a train_dataset that is a mapping"):
        trainer_for(tmp_path, own={"sources": {"sw": None}})
    with pytest.raises(ValueError, match="source_sft is for one source"):
        LotteryTicketTrainer(
            model=bert(), args=arguments(tmp_path), train_dataset=DATA, sft_args=sft(source_sft="x")
        )
    other = multi(tmp_path, bert(seed=5), sources={"sw": language_sft(bert(), 1)})
    with pytest.raises(SFTError, match="another base model"):
        other.train()
    endless = multi(tmp_path)
    endless.train_dataset = {**DATA, "en": Endless()}
    with pytest.raises(TypeError, match="batches of the source 'en' have no length"):
        endless.train()
    model = bert()
    language = language_sft(model, 1)
    trainer = multi(tmp_path, model, sources={"sw": language})
    with sf.compose(model, [language]), pytest.raises(ValueError, match="is on the model; take it"):
        trainer.train()


# --- kinds of models, Trainers and precisions ---------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_languages_with_decoupled_output_embeddings(tmp_path, family):
    def model():
        torch.manual_seed(0)
        if family == "bert":
            return BertForMaskedLM(BertConfig(**TINY))
        return XLMRobertaForMaskedLM(XLMRobertaConfig(**TINY, pad_token_id=0))

    trainer = LotteryTicketTrainer(
        model=model(),
        args=arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="best",
            load_best_model_at_end=True,
        ),
        train_dataset=examples(20, labels=50),
        eval_dataset=examples(8, seed=2, labels=50),
        sft_args=sft(full_l1=0.1, sparse_l1=0.1, decouple_output_embeddings=True),
    )
    output = trainer.model.get_output_embeddings().weight
    before = output.detach().clone()
    trainer.train()
    inputs = trainer.model.get_input_embeddings().weight
    assert inputs is not trainer.model.get_output_embeddings().weight
    assert torch.equal(trainer.model.get_output_embeddings().weight, before)
    assert not torch.equal(inputs, before)
    delta = trainer.delta
    assert not any("decoder.weight" in n for n in [*delta.layout.names, *delta.heads])
    assert any("word_embeddings" in n for n, _ in delta.support)
    norms = [n for n in delta.heads if "norm" in n.lower()]
    assert norms == [], "norms are frozen by their type, in the head too"


def test_seq2seq_trainer(tmp_path):
    class Trainer(LotteryTicketMixin, Seq2SeqTrainer):
        pass

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path,
            Seq2SeqTrainingArguments,
            predict_with_generate=True,
            generation_max_length=4,
            eval_strategy="steps",
            eval_steps=3,
        ),
        train_dataset=examples(20, labels=50),
        eval_dataset=examples(8, seed=2, labels=50),
        compute_metrics=lambda p: {"length": float(p.predictions.shape[1])},
        sft_args=sft(),
    )
    trainer.train()
    assert trainer.delta.nnz
    asked = []
    generate = model.generate
    model.generate = lambda *args, **kwargs: (
        asked.append(kwargs["max_length"]) or generate(*args, **kwargs)
    )
    assert trainer.evaluate(max_length=2)["eval_length"]
    trainer.evaluate()
    assert asked == [2, 4], "its own arguments reach it"


def test_bf16(tmp_path):
    trainer = trainer_for(tmp_path, bf16=True)
    trainer.train()
    assert trainer.delta.nnz == trainer.delta.support.nnz > 0


def test_a_gradient_scaler_changes_nothing(tmp_path):
    """fp16 needs a GPU; its scaler does not. In fp32 a scale of 2¹⁰ changes no bit, if L1 and
    clipping get true gradients."""

    class Scaled(LotteryTicketTrainer):
        def create_optimizer(self, *args, **kwargs):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            self.accelerator.scaler = scaler
            optimizer = super().create_optimizer(*args, **kwargs)
            self.accelerator.unscale_gradients = lambda: scaler.unscale_(optimizer)
            return optimizer

    def run(folder, kind):
        own = sft(full_l1=0.5, sparse_l1=0.5)
        trainer = trainer_for(folder, sft_args=own, kind=kind, max_grad_norm=0.1)
        trainer.train()
        return trainer.delta

    assert run(tmp_path / "a", Scaled) == run(tmp_path / "b", LotteryTicketTrainer)


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model_init is not supported; give the model"):
        LotteryTicketTrainer(
            model_init=lambda: bert(),
            args=arguments(tmp_path),
            train_dataset=examples(4),
            sft_args=sft(),
        )
    model = bert()
    stock = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="makes its own AdamW"):
        trainer_for(tmp_path, model, own={"optimizers": (stock, None)})
    with pytest.raises(ValueError, match="optim='adafactor'"):
        trainer_for(tmp_path, optim="adafactor")
    with pytest.raises(ValueError, match="set per_device_train_batch_size"):
        trainer_for(tmp_path, auto_find_batch_size=True)
    with pytest.raises(ValueError, match="min_steps is 9, above max_steps, 5"):
        trainer_for(tmp_path, sft_args=sft(full_min_steps=9, full_max_steps=5))
    with pytest.raises(ValueError, match='gather must be "step" or "hook", got \'hoook\''):
        trainer_for(tmp_path, sft_args=sft(gather="hoook"))
    with pytest.raises(ValueError, match="sparse_learning_rate must be finite and ≥ 0, got -1"):
        trainer_for(tmp_path, sft_args=sft(sparse_learning_rate=-1.0))
    for name in ("max_grad_norm", "learning_rate"):
        with pytest.raises(ValueError, match=f"{name} must be finite and ≥ 0, got -1"):
            trainer_for(tmp_path, **{name: -1.0})
    with pytest.raises(ValueError, match="hyperparameter search"):
        trainer_for(tmp_path).train(trial={})
    with pytest.raises(ValueError, match="density"):
        trainer_for(tmp_path, sft_args=SparseFineTuningArguments()).train()
    trainer = trainer_for(tmp_path)
    trainer.train_dataset = []
    with pytest.raises(ValueError, match=r"num_samples|no batch"):
        trainer.train()
    assert trainer.args.max_grad_norm == 1.0
