"""The commands `train` and `evaluate`: whole runs, stopped runs, and what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("seqeval")

from tiny_bases import bert_folder, write_data
from typer.testing import CliRunner

from sparse_ft import SparseDelta
from sparse_ft.cli import app
from sparse_ft.tasks import TASKS
from sparse_ft.tasks.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--density", 0.1, "--steps", "4,8", "--lr", 1e-3, "--batch-size", 4, "--max-length", 32]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with a base model, data, and the SFTs that the commands made of them."""
    folder = tmp_path_factory.mktemp("there")
    bert_folder(folder / "bert")
    write_data(folder)
    for arguments in (language(folder, "sw.safetensors"), ner(folder, "ner.safetensors")):
        result = run(folder, *arguments)
        assert result.exit_code == 0, result.output
    return folder


def run(folder, *arguments):
    before = os.getcwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "100"})
    finally:
        os.chdir(before)


def language(folder, output, *more):
    base = ["--base", folder / "bert", "--lang", "sw", "--output", output]
    return ["train", "language", folder / "text.txt", *base, *SHORT, "--evaluate-every", 4, *more]


def ner(folder, output, *more, data="train.conll"):
    files = [folder / data, "--base", folder / "bert", "--output", output]
    sft = ["--source-sft", folder / "sw.safetensors", "--valid", folder / "test.conll"]
    return ["train", "task", "tokens", *files, *sft, *SHORT, "--evaluate-every", 4, *more]


def refused(result, status=1):
    """The one line that a command ends with."""
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("sparse-ft: ")


# --- whole runs ---------------------------------------------------------------------------------


def test_language_and_task_and_evaluation(there):
    result = run(
        there, "evaluate", "test.conll", "--base", "bert", "--task", "ner.safetensors",
        "--lang", "none", "--lang", "sw.safetensors", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["lang"] for row in rows] == [None, "sw.safetensors"]
    assert all(row["metric"] == "f1" and 0 <= row["f1"] <= 1 for row in rows)
    result = run(there, *ner(there, "ner.safetensors", "--json"))
    told = json.loads(result.stdout)
    assert told["content_id"] == SparseDelta.load(there / "ner.safetensors").content_id
    assert told["phases"][-1]["best"] == pytest.approx(rows[1]["f1"], abs=1e-12)


def test_what_is_printed(there):
    result = run(there, *ner(there, "ner.safetensors"))
    assert [line.split("│")[1].strip() for line in result.stdout.splitlines() if "│ " in line] == [
        "full",
        "sparse",
    ]
    assert "ner.safetensors" in result.stdout
    task = ["--base", "bert", "--task", "ner.safetensors", "--lang", "sw.safetensors"]
    shown = run(there, "evaluate", "test.conll", *task).stdout
    assert re.search(r"│ test.conll │ sw +│ +[01]\.\d{4} │", shown)


def test_predictions_go_to_a_file(there, tmp_path):
    path = tmp_path / "said.jsonl"
    command = ["evaluate", "test.conll", "--base", "bert", "--task", "ner.safetensors"]
    command += ["--lang", "none", "--lang", "sw.safetensors", "--json", "--predictions", path]
    result = run(there, *command)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    figures = json.loads(result.stdout)
    assert not {"gold", "predictions"} & figures[0].keys()
    for row in figures:
        mine = [line for line in lines if line["lang"] == row["lang"]]
        assert [line["index"] for line in mine] == [*range(12)]
        assert {line["data"] for line in mine} == {"test.conll"}
        pairs = [p for x in mine for p in zip(x["predicted"], x["gold"], strict=True)]
        assert sum(a == b for a, b in pairs) / len(pairs) == pytest.approx(row["accuracy"])
    before = path.read_bytes()
    assert refused(run(there, *command)) == f"{path} exists; --force replaces it"
    command[command.index("test.conll")] = "missing.conll"
    refused(run(there, *command, "--force"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["said.jsonl"]


def test_a_task_alone_with_random_entries_or_all_of_them(there, tmp_path):
    alone = ["train", "task", "tokens", "train.conll", "--base", "bert", *SHORT[2:]]
    result = run(there, *alone, "-o", tmp_path / "r.safetensors", "--random", "-k", 100)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("sparse-ft: note: there are no validation data")
    assert SparseDelta.load(tmp_path / "r.safetensors").nnz == 100
    result = run(there, *alone, "-o", tmp_path / "f.safetensors", "--full")
    assert result.exit_code == 0, result.output
    assert SparseDelta.load(tmp_path / "f.safetensors").density == 1


def test_several_sources(there, tmp_path):
    entry = {"data": "train.conll", "valid": "test.conll"}
    document = {"sw": {**entry, "sft": "sw.safetensors"}, "en": entry}
    (there / "sources.json").write_text(json.dumps(document))
    several = ["train", "task", "tokens", "--sources", "sources.json", "--base", "bert", *SHORT]
    result = run(there, *several, "-o", tmp_path / "x.safetensors", "--evaluate-every", 4)
    assert result.exit_code == 0, result.output
    (there / "sources.json").write_text(json.dumps({"sw": {**entry, "SFT": "sw.safetensors"}}))
    result = run(there, *several, "-o", tmp_path / "y.safetensors")
    assert "source 'sw': there is no key 'SFT'" in refused(result)


def test_presets_are_listed():
    result = run(".", "train", "presets")
    assert [line.split()[0] for line in result.stdout.splitlines() if line[0] != " "] == [*RECIPES]
    assert "14,155,776" in result.stdout
    assert " ".join(result.stdout.split()).count("left open there, so ours: max_length") == sum(
        r.unstated == ("max_length",) for r in RECIPES.values()
    )
    listed = json.loads(run(".", "train", "presets", "--json").stdout)
    assert listed["lt-sft-language"]["k"] == 7_667_712


def test_settings_of_the_shell_reach_the_recipe(there, tmp_path):
    more = ["--set", "warmup=0.25", "--set", "metric=accuracy", "--accumulate", 2, "--l1", "0,0.1"]
    result = run(there, *ner(there, tmp_path / "x.safetensors", *more, "--option", "scheme=IOB2"))
    assert result.exit_code == 0, result.output
    recipe = SparseDelta.load(tmp_path / "x.safetensors").meta["recipe"]
    assert {
        key: recipe[key] for key in ("warmup", "metric", "accumulate", "l1", "steps", "lr")
    } == {
        "warmup": 0.25,
        "metric": "accuracy",
        "accumulate": 2,
        "l1": [0, 0.1],
        "steps": [4, 8],
        "lr": 1e-3,
    }
    assert recipe["task"]["scheme"] == "IOB2"


def test_each_phase_has_its_own_learning_rate(there, tmp_path):
    result = run(there, *ner(there, tmp_path / "x.safetensors", "--lr", "1e-3,2e-3"))
    assert result.exit_code == 0, result.output
    assert SparseDelta.load(tmp_path / "x.safetensors").meta["recipe"]["lr"] == [1e-3, 2e-3]
    log = [json.loads(line) for line in (tmp_path / "x.run" / "log.jsonl").open(encoding="utf-8")]
    # Falling to 0 over 4 and 8 steps, of which the last is logged.
    rates = {record["phase"]: record["lr"] for record in log if "lr" in record}
    assert rates == pytest.approx({"full": 1e-3 / 4, "sparse": 2e-3 / 8})


def test_one_full_phase_for_two_criteria(there, tmp_path):
    for name, more, phases in (("a", [], 2), ("b", ["--criterion", "denoised"], 1)):
        output = tmp_path / f"{name}.safetensors"
        result = run(there, *ner(there, output, "--full-model", tmp_path / "full", "--json", *more))
        assert result.exit_code == 0, result.output
        assert len(json.loads(result.stdout)["phases"]) == phases
    assert SparseDelta.load(tmp_path / "b.safetensors").meta["recipe"]["method"] == "DeFT-X"


# --- stopped runs -------------------------------------------------------------------------------


def test_ctrl_c_says_how_to_continue(there, tmp_path, monkeypatch):
    command = ner(there, tmp_path / "x.safetensors", "--save-every", 2)
    loss, calls = TASKS["tokens"].loss, []

    def stops(self, model, batch):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return loss(self, model, batch)

    monkeypatch.setattr(TASKS["tokens"], "loss", stops)
    said = refused(run(there, *command), status=130)
    assert said == f"note: stopped; the same command continues from {tmp_path / 'x.run'}"
    calls.clear()
    said = refused(run(there, *command, "--fresh"), status=130)
    assert said == (
        f"note: stopped; the same command, without --fresh, continues from {tmp_path / 'x.run'}"
    )
    assert run(there, *command).exit_code == 0
    ids = [SparseDelta.load(p / "x.safetensors").content_id for p in (tmp_path,)]
    assert ids == [SparseDelta.load(there / "ner.safetensors").content_id]


@pytest.mark.slow
def test_a_killed_command_continues_to_the_same_bits(there, tmp_path, one_thread):
    steps = ["--steps", "60,60", "--save-every", 1]
    command = [*ner(there, tmp_path / "x.safetensors"), *steps]
    whole = [*ner(there, tmp_path / "whole.safetensors"), *steps[:2]]
    for phase in ("full", "sparse"):
        process = subprocess.Popen(
            [sys.executable, "-m", "sparse_ft", *map(str, command)],
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
                "OMP_NUM_THREADS": "1",
            },
        )
        state = tmp_path / "x.run" / "run.json"
        at = None
        while at != phase:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
            stored = json.loads(state.read_text()) if state.exists() else {"files": {}}
            at = stored["progress"]["phase"] if "state" in stored["files"] else None
        time.sleep(0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "x.safetensors").exists()
    for arguments in (command, whole):
        assert run(there, *arguments).exit_code == 0
    ids = [SparseDelta.load(tmp_path / f"{n}.safetensors").content_id for n in ("x", "whole")]
    assert ids[0] == ids[1]


def test_a_loss_that_is_no_number(there, tmp_path, monkeypatch):
    loss, calls = TASKS["tokens"].loss, []

    def diverges(self, model, batch):
        calls.append(1)
        return loss(self, model, batch) * (float("inf") if len(calls) == 9 else 1)

    monkeypatch.setattr(TASKS["tokens"], "loss", diverges)
    said = refused(run(there, *ner(there, tmp_path / "x.safetensors", "--save-every", 2)))
    assert said.startswith("the loss is inf at step 5 of the sparse phase")
    assert f"state of step 4 is in {tmp_path / 'x.run'}" in said


def test_a_full_device(there, tmp_path, monkeypatch):
    def full(self, model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has …")

    monkeypatch.setattr(TASKS["tokens"], "loss", full)
    said = refused(run(there, *ner(there, tmp_path / "x.safetensors")))
    assert said.startswith("CUDA out of memory; a smaller --batch-size")


# --- what is refused ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(there):
    (there / "latin.conll").write_bytes("Zoë B-PER\n".encode("latin-1"))
    (there / "empty.conll").write_bytes(b"")
    (there / "blank.txt").write_bytes(b"\n \n")
    (there / "wide.conll").write_text("Anna B-ORG\n")
    (there / "broken.safetensors").write_bytes(b"not an SFT")
    return there


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--preset", "lt-sft-pso"], "there is no preset 'lt-sft-pso'; did you mean lt-sft-pos?"),
        (["--preset", "lt-sft-nli"], "preset lt-sft-nli is for sequences; for tokens: lt-sft-pos"),
        (["--density", 2], "density must be a share in (0, 1], 0.02 for 2 %; found 2.0"),
        (["--density", 0.1, "-k", 5], "give k or density, not both"),
        (["--steps", "3,x"], "steps must be one number, or one for the full and one for"),
        (["--criterion", "luck"], "there is no criterion 'luck'; there are bias"),
        (["--set", "color=red"], "there is no setting 'color'; there are k, density"),
        (
            ["--option", "foo=1"],
            "neither the task tokens (options: metric, scheme, tokens, tags, outside, unlabelled)",
        ),
        (["--valid", "latin.conll"], "latin.conll, line 1: byte 2 (0xeb) is not UTF-8; convert"),
        (["--valid", "empty.conll"], "empty.conll: holds no sentence"),
        (["--valid", "wide.conll"], "wide.conll, line 1: the label 'B-ORG' is not one of the mod"),
        (["--valid", "missing.conll"], "missing.conll: no such file or folder"),
        (["--source-sft", "broken.safetensors"], "broken.safetensors"),
        (["--source-sft", "ner.safetensors"], "ner.safetensors: is the SFT of a task (tokens), no"),
        (["--base", "nothing"], "nothing: neither a folder with a tokenizer nor a model"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--max-length", 1000], "max_length is 1000; the tokenizer says that the model reads"),
        (["--lang", "e n"], "lang: 'e n' is no language tag"),
        (["--output", "x.bin"], "x.bin: the output must end in .safetensors"),
        (["--output", "no/x.safetensors"], "there is no folder no; create it first"),
        (["--output", "."], ".: the output must end in .safetensors"),
        (["--option", "tag=x"], "takes tag='x'"),
        (["--set", "k=null", "--set", "density=null"], "k or density is needed; full=true tunes"),
        (["--output", "sw.safetensors", "--run", "o.run"], "sw.safetensors exists, and o.run hol"),
        (["--output", "sw.safetensors"], "sw.run: holds a run with other settings: "),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_one_line_says_what_is_wrong(damaged, more, said):
    before = {p: p.read_bytes() for p in damaged.glob("*.safetensors")}
    assert said in refused(run(damaged, *ner(damaged, "new.safetensors"), *more))
    assert {p: p.read_bytes() for p in damaged.glob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        (["sequences", "train.csv"], ["--option", "delimiter=;;"], "takes delimiter=';;'"),
        (["qa", "train.json"], ["--option", "stride=big"], "stride must be int; found 'big'"),
        (["mlm"], ["--option", "probability=high"], "probability must be float; found 'high'"),
        (["mlm"], ["--set", "metric=accuracy"], "metric is 'accuracy'; mlm has \"loss\" and"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_of_another_kind_is_refused(there, tmp_path, command, more, said):
    output = tmp_path / "x.safetensors"
    files = ["train", "task", *command, "--base", "bert", "--output", output, *SHORT]
    if command == ["mlm"]:
        files = language(there, output)
    assert said in refused(run(there, *files, *more))
    assert list(tmp_path.iterdir()) == []


def test_a_text_without_text(damaged):
    command = language(damaged, "new.safetensors")
    command[2] = damaged / "blank.txt"
    assert refused(run(damaged, *command)).endswith("blank.txt: holds no text")


def test_more_entries_than_moved(there, tmp_path):
    """Pieces that no text has do not move."""
    (there / "dogs.txt").write_text("the dog\nthe dog sees\n" * 9, "utf-8")
    command = language(there, tmp_path / "x.safetensors", "--density", 1.0)
    command[2] = there / "dogs.txt"
    said = refused(run(there, *command))
    assert re.match(r"only 1\d,?\d{3} of the 19,?872 entries wanted moved", said)
    assert "pass --set fill=true to fill up" in said
    result = run(there, *command, "--set", "fill=true", "--fresh")
    assert result.exit_code == 0, result.output
    assert SparseDelta.load(tmp_path / "x.safetensors").density == 1


def test_a_published_k_needs_a_model_of_its_size(there):
    command = [*language(there, "new.safetensors"), "--preset", "lt-sft-language"]
    i = command.index("--density")
    said = refused(run(there, *command[:i], *command[i + 2 :]))
    assert re.match(
        r"k is 7,667,712 \(preset lt-sft-language\), and the model has 19,872 eligible "
        "entries; give a smaller k, or a density",
        said,
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--task", "broken.safetensors"], "broken.safetensors"),
        (["--lang", "ner.safetensors"], "ner.safetensors: is the SFT of a task"),
        (["--lang", "none", "--lang", "none", "wide.conll", "wide.conll"], "3 test data and 2 lan"),
        (["--kind", "juggling"], "there is no kind of task 'juggling'; there are mlm, clm"),
        (["wide.conll"], "wide.conll, line 1: the label 'B-ORG' is not one of the model's 3"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_an_evaluation_that_cannot_be(damaged, more, said):
    task = ["--base", "bert", "--task", "ner.safetensors"]
    assert said in refused(run(damaged, "evaluate", "test.conll", *task, *more))


@pytest.mark.parametrize(
    "more",
    [
        ["--random", "--full"],
        ["--random", "--criterion", "denoised"],
        ["--full", "--density", "0.1"],
        ["--set", "warmup"],
        ["--sources", "sources.json"],
        ["--save-every", "0"],
    ],
    ids=" ".join,
)
def test_options_that_exclude_one_another(there, more):
    result = run(there, *ner(there, "new.safetensors"), *more)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert not (there / "new.safetensors").exists()


def test_without_the_extra(there, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("sparse_ft.tasks.runner")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = refused(run(there, *ner(there, "new.safetensors")))
    assert "'transformers'" in said
    assert said.endswith('pip install "sparse-ft[tasks]"')


# --- the sweep ----------------------------------------------------------------------------------


def swept(folder, there, *more):
    settings = ["steps=[3,4]", "lr=0.02", "batch_size=4", "max_length=32"]
    each = [x for name in ("language", "task") for s in settings for x in (f"--{name}-set", s)]
    return run(
        there, "sweep", "text.txt", "--base", "bert", "--kind", "tokens", "--data", "train.conll",
        "--test", "test.conll", "--valid", "test.conll", "--output", folder, *each, *more,
    )  # fmt: skip


def test_a_sweep_of_densities(there, tmp_path):
    pytest.importorskip("matplotlib")
    accuracy = ["--task-set", "metric=accuracy"]
    result = swept(tmp_path, there, "--density", "0.1,0.5", "--json", *accuracy)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["language"], row["task"]) for row in rows] == [
        *((0.1, 0.1), (0.5, 0.1), (0.1, 0.5), (0.5, 0.5)),
    ]
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert len((tmp_path / "grid.csv").read_text().splitlines()) == 5
    small, large = (SparseDelta.load(tmp_path / f"task-{d}.safetensors") for d in (0.1, 0.5))
    assert large.nnz > 4 * small.nnz
    for name in small.layout.names:
        # One full phase ranks the entries for both.
        assert {*small.support.indices(name).tolist()} <= {*large.support.indices(name).tolist()}

    # The figures are those of `evaluate`, whatever made the SFTs.
    scored = run(
        there, "evaluate", "test.conll", "--base", "bert", "--json",
        "--task", tmp_path / "task-0.5.safetensors",
        "--lang", tmp_path / "language-0.1.safetensors",
    )  # fmt: skip
    assert json.loads(scored.stdout)[0]["accuracy"] == rows[2]["score"]

    # Other test data are other cells.
    also = ["--test", "train.conll", "--json", *accuracy]
    other = swept(tmp_path, there, "--density", "0.1,0.5", *also)
    assert json.loads(other.stdout) != rows
    cells = (tmp_path / "cells.jsonl").read_text()
    assert len(cells.splitlines()) == 8

    # A fully tuned model of other settings is not taken for this one's.
    settings = ["--density", "0.3", "--language-set", "lr=0.3", *accuracy]
    said = swept(tmp_path, there, *settings).stderr
    assert re.search(r"language-full.safetensors' was tuned with other settings: .*lr was", said)
    assert not (tmp_path / "language-0.3.safetensors").exists()

    # One more density of the language costs one sparse phase and two cells.
    full = (tmp_path / "language-full.safetensors").stat().st_mtime_ns
    more = swept(
        tmp_path, there, "--density", "0.1,0.5,0.2", "--task-density", "0.1,0.5", *accuracy
    )
    assert more.exit_code == 0, more.output
    assert (tmp_path / "cells.jsonl").read_text().startswith(cells)
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 10
    assert (tmp_path / "language-full.safetensors").stat().st_mtime_ns == full


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--density", "0.1,2"], r"densities must be in \(0, 1\]"),
        (["--density", "0.1,0.1"], "densities has a density twice"),
        (["--language-preset", "lt-sft-ner"], "preset lt-sft-ner is for tokens"),
        (["--test", "typo.conll"], "typo.conll: no such file or folder"),
        (["--data", "typo.conll"], "typo.conll: no such file or folder"),
        (["--source-sft", "nope.safetensors"], "nope.safetensors"),
        (["--language-set", "iterations=2"], "language has iterations; a sweep has one full phase"),
        (["--task-set", "full=true"], "task ranks no entries; a sweep needs selection"),
    ],
)
def test_sweeps_that_cannot_be(there, tmp_path, more, said):
    assert re.search(said, refused(swept(tmp_path / "new", there, *more)))
    assert not (tmp_path / "new").exists()


def test_help_groups_the_options(there):
    shown = run(there, "train", "task", "-h").output
    assert "Recipe: settings over those of the preset" in shown
    assert "─ Run ─" in shown
    assert "─ Run ─" not in run(there, "evaluate", "-h").output


def test_messages_name_what_the_shell_has(there, tmp_path):
    said = refused(run(there, *ner(there, tmp_path / "x.safetensors"), "--density", 2))
    assert "0.02 for 2 %" in said
