"""Whole runs of the transfer benchmark on a tiny model: rows, parts, stops, lines."""

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("seqeval")

from tiny_transfer import tiny_base, tiny_dataset, tiny_settings

from benchmarks.transfer import run as runs
from benchmarks.transfer import scores, tune
from benchmarks.transfer.arms import ARMS, by_method
from benchmarks.transfer.dataset import DatasetError
from benchmarks.transfer.run import OutOfTime, Row, Run, Sft, deadline
from sparse_ft.tasks import recipes as presets
from sparse_ft.tasks.lm import MaskedLM
from sparse_ft.tasks.runner import evaluate, train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with data and a base model, and the run of all arms in both targets."""
    folder = tmp_path_factory.mktemp("transfer")
    tiny_dataset(folder / "data")
    tiny_base(folder / "base")
    return folder


def stored(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def opened(there, **options):
    options = {"store": there / "store.jsonl", **options}
    dataset = runs.Dataset.load(there / "data")
    settings = options.pop("settings", tiny_settings())
    folder = options.pop("folder", there / "runs")
    return Run(dataset, there / "base", settings, folder, size="quick", **options)


@pytest.fixture(scope="module")
def done(there):
    study = opened(there)
    rows = study.rows([0], ["xx", "yy"], list(ARMS))
    return study, rows, study.go(rows)


def test_every_arm_has_a_line(done):
    study, rows, lines = done
    assert [(line["language"], line["arm"]) for line in lines] == [
        (language, arm) for language in ("xx", "yy") for arm in ARMS
    ]
    assert study.pending(rows) == []


def test_a_line_says_all_that_a_report_needs(done):
    study, _, lines = done
    for line in lines:
        assert json.loads(json.dumps(line)) == line
        assert (line["schema"], line["kind"], line["part"]) == (1, "transfer", "arms")
        assert (line["experiment"], line["size"], line["seed"]) == ("tiny", "quick", 0)
        assert (line["metric"], line["n"]) == ("accuracy", 12)
        assert line["data"] == {"content": study.dataset.content, "packages": {"mediawiki": "1"}}
        assert line["settings"]["base"] == "base"
        assert line["settings"]["versions"].keys() == {
            "sparse_ft", "torch", "transformers", "python"
        }  # fmt: skip
        assert line["seconds"] > 0
        # The score is that of the counts, and of a view those words count that it labels.
        total = [sum(column) for column in zip(*line["counts"], strict=True)]
        assert line["score"] == pytest.approx(total[0] / total[1])
        seen = [sum(column) for column in zip(*line["view_counts"]["unambiguous"], strict=True)]
        assert line["views"]["unambiguous"] == pytest.approx(seen[0] / seen[1])
        assert 0 < seen[1] < total[1]
    assert len({line["key"] for line in lines}) == len(lines)


def test_scores_are_those_of_the_command(there, done):
    study, _, lines = done
    task, language = Sft(0, "lt"), Sft(0, "lt", "yy")
    (found,) = evaluate(
        *(there / "base", study.path(task), study.dataset.test["xx"]), langs=[study.path(language)]
    )
    line = next(x for x in lines if (x["arm"], x["language"]) == ("wrong-language", "xx"))
    assert line["score"] == pytest.approx(found["accuracy"], abs=1e-12)


def test_lines_are_stored_once_with_what_is_resampled(there, done):
    study, rows, lines = done
    for path in (there / "store.jsonl", study.lines):
        found = stored(path)
        assert [line for line in found if line["part"] == "arms"] == lines
        groups = [line for line in found if line["part"] == "groups"]
        assert [line["language"] for line in groups] == ["xx", "yy"]
        assert groups[0]["groups"] == scores.group_ids([f"key-{i // 2}" for i in range(12)])
        label, share = groups[0]["commonest"]
        always = [[label] * len(tags) for tags in study._test("xx")]
        found = scores.counts("accuracy", study._test("xx"), always, ignore={""}).sum(0)
        assert share == scores.value("accuracy", found) > 0
    before = (there / "store.jsonl").read_bytes()
    assert study.go(rows) == lines
    assert (there / "store.jsonl").read_bytes() == before


def test_a_finished_run_trains_nothing(there, done, monkeypatch):
    def never(*args, **options):
        raise AssertionError("it was done already")

    monkeypatch.setattr(runs, "train", never)
    monkeypatch.setattr(runs, "evaluate", never)
    _, rows, lines = done
    assert opened(there).go(rows) == lines


# --- what is trained, and on what ----------------------------------------------------------------


def test_a_chain_is_of_one_method(done):
    study, _, _ = done
    assert study.needs(Row(0, "xx", "random")) == [
        Sft(0, "random", "en"), Sft(0, "random"), Sft(0, "random", "xx")
    ]  # fmt: skip
    assert study.needs(Row(0, "xx", "full-tuning")) == [Sft(0, "full")]
    assert study.needs(Row(0, "yy", "source-language"))[-1] == Sft(0, "lt")
    assert study._pair(Row(0, "yy", "source-language"))[1] == Sft(0, "lt", "en")
    assert study.needs(Row(0, "yy", "wrong-language"))[-1] == Sft(0, "lt", "xx")
    assert study.needs(Row(0, "xx", "dense-language"))[-1] == Sft(0, "lt", "xx")
    delta = runs.sf.SparseDelta.load(study.path(Sft(0, "random")))
    source = runs.sf.SparseDelta.load(study.path(Sft(0, "random", "en")))
    assert delta.meta["trained_on"] == [{"id": source.content_id, "alpha": 1.0}]


def test_the_wrong_language_is_another_target_whatever_was_asked_for(there, done):
    study, _, _ = done
    assert (study.other("xx"), study.other("yy"), study.other("zz")) == ("yy", "xx", "xx")
    rows = study.rows([0], ["xx"], ["wrong-language"])
    assert Sft(0, "lt", "yy") in study.needs(rows[0])

    def with_targets(*targets):
        study = opened(there)
        text = {**study.dataset.text, "qq": study.dataset.text["xx"]}
        test = {**study.dataset.test, "qq": study.dataset.test["xx"]}
        study.dataset = replace(study.dataset, targets=targets, text=text, test=test)
        return study

    assert [with_targets("xx", "yy", "qq").other(x) for x in ("xx", "yy", "qq")] == [
        *("yy", "xx", "yy")
    ]
    assert with_targets("xx").other("xx") == "zz"


def test_random_masks_of_a_seed_are_drawn_apart(done):
    """Two of N entries, K each, share K²/N of them by chance; of one mask they would share all."""
    study, _, _ = done
    names = ("en", "xx", "yy", None)
    deltas = [runs.sf.SparseDelta.load(study.path(Sft(0, "random", name))) for name in names]
    for row in runs.sf.overlap(deltas, list(map(str, names))).rows():
        assert row["both"] == pytest.approx(row["expected"], rel=0.15)
    again = study.recipe(Sft(1, "random", "xx")).criterion_options
    assert again != study.recipe(Sft(0, "random", "xx")).criterion_options


def test_the_dense_vector_is_the_fully_tuned_model(done):
    """It has more entries than the SFT, and the SFT's are among them."""
    study, _, _ = done
    sft = Sft(0, "lt", "xx")
    dense, sparse = study._dense(sft), runs.sf.SparseDelta.load(study.path(sft))
    assert dense.nnz > 2 * sparse.nnz
    both = runs.sf.overlap([dense, sparse]).both[0, 1]
    assert both >= 0.99 * sparse.nnz


def test_what_has_one_phase_gets_the_passes_of_both(done):
    recipe = tiny_settings().task
    for method in ("full", "bias"):
        assert by_method(recipe, method).steps == (12, 12)
        assert by_method(recipe.changed(epochs=(1, 2)), method).epochs == (3, 3)
    assert by_method(recipe, "bias").density is None
    paired = recipe.changed(lr=(1e-4, 3e-4))
    assert (by_method(paired, "full").lr, by_method(paired, "bias").lr) == (1e-4, (1e-4, 3e-4))
    paper = by_method(presets.recipe("lt-sft-language"), "bias")
    assert (paper.epochs, paper.min_steps, paper.max_steps) == ((200, 200), 60_000, 200_000)
    # But for RAND-SFT, which is LT-SFT without what selects.
    assert by_method(recipe, "random").lengths()[1] == recipe.lengths()[1]
    study, _, _ = done

    def steps(method):
        """Of the training, the source's SFT aside."""
        path = study.path(Sft(0, method)).with_suffix(".run") / "log.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return {(r["phase"], r["step"]) for r in records if "loss" in r}

    assert {max(s for p, s in steps(m)) for m in ("bias", "full")} == {12}
    assert {p for p, _ in steps("bias")} == {"sparse"}


def test_rows_that_lack_a_text_are_refused_before_anything_is_trained(there, tmp_path):
    study = opened(there, store=None, folder=tmp_path)
    text = {x: path for x, path in study.dataset.text.items() if x != "zz"}
    study.dataset = replace(study.dataset, text=text)
    with pytest.raises(DatasetError, match="no text of 'zz' to learn its SFT from; leave the"):
        study.go(study.rows([0], ["xx", "zz"], ["composed"]))
    assert not list(study.folder.glob("seed0/*"))
    study.dataset = replace(study.dataset, targets=("xx",))
    assert study.other("xx") is None
    with pytest.raises(DatasetError, match="no language whose SFT the arms wrong-language could t"):
        study.rows([0], ["xx"], ["wrong-language"])


def test_what_is_asked_for_twice_is_done_once(there):
    study = opened(there)
    rows = study.rows([0], ["xx", "yy"], list(ARMS))
    twice = study.rows([0, 0], ["xx", "yy", "xx"], [*ARMS, "composed"])
    assert twice == rows
    assert study._with_source(["en", "xx"]) == ["en", "xx"]


def test_a_base_model_of_the_users_is_known_by_its_content(there, tmp_path):
    """Tuned further, it has the same names and sizes."""
    base = tiny_base(tmp_path / "base")
    settings, dataset = tiny_settings(), runs.Dataset.load(there / "data")

    def folder():
        return Run(dataset, base, settings, tmp_path / "runs", size="own").folder

    before = folder()
    assert folder() == before
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert folder() != before


def test_the_seed_of_a_run_makes_no_other_recipe(there):
    """Of a line: a report refuses to compare what was trained in different ways."""
    study = opened(there)
    recipe = study.recipe(Sft(0, "random"))
    one, two = (runs._short(recipe.changed(criterion_options={"seed": s})) for s in (1, 2))
    assert one == two
    assert one["criterion"] == "random"
    knobs = study.recipe(Sft(0, "denoised"))
    assert runs._short(knobs)["criterion_options"] == {"rank": "var:0.9"}


def test_a_language_without_test_data_is_refused(there):
    study = opened(there)
    with pytest.raises(DatasetError, match="no test data of 'qq'; it has those of xx, yy, zz, en"):
        study.rows([0], ["qq"], ["composed"])
    test = {x: path for x, path in study.dataset.test.items() if x != "zz"}
    study.dataset = replace(study.dataset, test=test)
    with pytest.raises(DatasetError, match="no test data of 'zz'; it has those of xx, yy, en"):
        study.rows([0], ["zz"], ["composed"])


# --- the other parts ----------------------------------------------------------------------------


def test_ladder_grid_and_overlap(there, done):
    study, _, _ = done
    lines = study.go(study.rows([0], ["xx"], [], ["ladder", "grid", "overlap"]))
    by_part = {part: [x for x in lines if x["part"] == part] for part in runs.PARTS}
    assert [(x["arm"], x["of"], x["density"]) for x in by_part["ladder"]] == [
        *[("task-only", "task", 0.1), ("composed", "task", 0.1), ("composed", "both", 0.1)],
        *[("task-only", "task", 0.2), ("composed", "task", 0.2), ("composed", "both", 0.2)],
    ]
    assert {(x["language_density"], x["task_density"]) for x in by_part["grid"]} == {
        (a, b) for a in (0.1, 0.2) for b in (0.1, 0.2)
    }
    pairs = {(x["first"], x["second"]): x for x in by_part["overlap"]}
    assert pairs.keys() == {("en", "xx"), ("en", "task"), ("xx", "task")}
    one, other = (runs.sf.SparseDelta.load(study.path(Sft(0, "lt", x))) for x in ("en", "xx"))
    assert pairs["en", "xx"]["shared"] == runs.sf.overlap([one, other]).both[0, 1]


def test_settings_are_chosen_on_development_data_alone(there, done):
    study, _, _ = done
    rows = tune.candidates([0], ["zz"])
    # What the experiment has already is not trained again to be tried.
    default = Row(0, "zz", "denoised", "tune", options=(("rank", "var:0.9"),))
    assert default in rows
    assert study.needs(default) == study.needs(Row(0, "zz", "denoised"))
    assert {(row.language, row.part) for row in rows} == {("zz", "tune")}
    few = [rows[0], rows[-1]]
    lines = study.go(few)
    assert [line["n"] for line in lines] == [10, 10]
    assert lines[0]["weight"] == 0.5
    assert lines[1]["options"] == {"embeddings": True, "rank": "var:0.9"}
    said = tune.chosen(lines)
    assert said[0].startswith("composed weight=0.5: ")


# --- stops --------------------------------------------------------------------------------------


def without_times(lines):
    # A score of two runs is the same; when it was found, and how long that took, is not.
    return [{k: v for k, v in line.items() if k not in ("date", "seconds")} for line in lines]


def test_a_killed_run_continues_to_the_same_lines(there, done, tmp_path):
    """Killed in the middle of a training, without warning; the lines are those of one go."""
    _, _, lines = done
    wanted = [x for x in lines if x["language"] == "xx" and x["arm"] in ("task-only", "composed")]
    code = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]!r}
from pathlib import Path
from tiny_transfer import tiny_settings
from benchmarks.transfer.dataset import Dataset
from benchmarks.transfer.run import Run
study = Run(Dataset.load({str(there / "data")!r}), {str(there / "base")!r}, tiny_settings(),
            {str(tmp_path)!r}, size="quick", store=Path({str(tmp_path / "store.jsonl")!r}))
study.go(study.rows([0], ["xx"], ["task-only", "composed"]))
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    while child.poll() is None and not list(tmp_path.glob("*/seed0/task-*.run/log.jsonl")):
        time.sleep(0.002)
    child.kill()
    child.wait()
    assert child.returncode == -signal.SIGKILL
    study = Run(
        *(runs.Dataset.load(there / "data"), there / "base", tiny_settings(), tmp_path),
        size="quick",
        store=tmp_path / "store.jsonl",
    )
    assert study.path(Sft(0, "lt", "en")).exists()
    assert not study.path(Sft(0, "lt")).exists()
    study.go(study.rows([0], ["xx"], ["task-only", "composed"]))
    found = [x for x in stored(tmp_path / "store.jsonl") if x["part"] == "arms"]
    assert without_times(found) == without_times(wanted)


def test_the_deadline_ends_a_run_that_goes_on_later(there, done, tmp_path, monkeypatch):
    study = opened(there, store=None, folder=tmp_path)
    rows = study.rows([0], ["xx"], ["task-only"])

    def ringing(*args, **options):
        # Once more, as a callback of the interpreter may swallow the first.
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.5)
        return train(*args, **options)

    with monkeypatch.context() as patch, deadline(60):
        patch.setattr(runs, "train", ringing)
        with pytest.raises(OutOfTime):
            study.go(rows)
    assert len(study.pending(rows)) == 3
    assert len(study._stopped(0)) == 1
    (line,) = study.go(rows)
    assert without_times([line]) == without_times(done[2][:1])


def test_what_a_deadline_leaves_is_as_before():
    before = signal.getsignal(signal.SIGALRM)
    with deadline(1):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_piece_that_outlasts_every_deadline_gets_on(there, tmp_path, monkeypatch):
    """Stopped after five steps each time, it stores its state more and more often."""
    settings = tiny_settings(save_every=40)
    settings = replace(settings, source=settings.source.changed(steps=(9, 9), evaluate_every=None))
    study = opened(there, store=None, folder=tmp_path, settings=settings)
    every = []

    def short(*args, save_every, **options):
        loss, left = MaskedLM.loss, [5]
        every.append(save_every)

        def counted(self, model, batch):
            if not left[0]:
                raise OutOfTime
            left[0] -= 1
            return loss(self, model, batch)

        with monkeypatch.context() as patch:
            patch.setattr(MaskedLM, "loss", counted)
            return train(*args, save_every=save_every, **options)

    sft = Sft(0, "lt", "en")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", short)
        for _ in range(20):
            try:
                study._do(sft)
            except OutOfTime:
                continue
            break
    assert every[:5] == [40, 20, 10, 5, 2]
    assert len(every) < 12
    assert len(study._stops(sft)) == len(every) - 1
    other = opened(there, store=None, folder=tmp_path / "other", settings=settings)
    other._do(sft)
    one, two = (runs.sf.SparseDelta.load(x.path(sft)) for x in (study, other))
    assert one.content_id == two.content_id


def test_a_damaged_sft_is_made_again(there, tmp_path):
    study = opened(there, store=None, folder=tmp_path)
    sft = Sft(0, "lt", "en")
    study._do(sft)
    whole = study.path(sft).read_bytes()
    study.path(sft).write_bytes(whole[:-8])
    assert sft in study.pending([Row(0, "xx", "task-only")])
    study._do(sft)
    assert study.path(sft).read_bytes() == whole


def test_a_line_that_was_never_finished_does_no_harm(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "sc')
    runs.append(path, [{"key": "a"}, {"key": "c"}, {"key": "c"}])
    assert stored(path) == [{"key": "a"}, {"key": "c"}]
    # One that lacks its end alone is a line.
    path.write_text('{"key": "a"}\n{"key": "b"}')
    runs.append(path, [{"key": "b"}, {"key": "\u2028"}])
    assert stored(path) == [{"key": "a"}, {"key": "b"}, {"key": "\u2028"}]


@pytest.mark.parametrize("text", ["# Title\n", "a word", "[1]\n", '{"key": "a"}\n{"key"\n'])
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md holds something other than lines"):
        runs.append(path, [{"key": "a"}])
    assert path.read_text() == text


def test_processes_that_store_at_once_store_each_line_once(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "lines.jsonl"
    waiting = threading.Thread(target=runs.append, args=(path, [{"key": "a"}, {"key": "b"}]))
    with open(path, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(0.2)
        assert path.read_bytes() == b""
        other.write(b'{"key": "a"}\n')
    waiting.join()
    assert stored(path) == [{"key": "a"}, {"key": "b"}]


def test_a_recipe_is_told_without_what_it_leaves_alone_and_without_its_seed():
    recipe = tiny_settings().task
    assert "criterion_options" not in runs._short(recipe)
    drawn = recipe.changed(criterion="random", criterion_options={"seed": 3})
    assert runs._short(drawn) == {**runs._short(recipe), "criterion": "random"}
    denoised = recipe.changed(criterion="denoised", criterion_options={"rank": 2})
    assert runs._short(denoised)["criterion_options"] == {"rank": 2}
