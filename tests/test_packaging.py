"""The build of the native library, the wheel, and what the documents promise about installing."""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sparse_ft
from sparse_ft_kernels import build

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = 'pip install -c constraints.txt -e ".[quickstart]" && sparse-ft quickstart'
TEST = 'pip install -c constraints.txt -e ".[test]" && pytest'

try:
    build._cxx_compiler()
    no_compiler = ""
except build.BuildError as error:
    no_compiler = str(error)
needs_compiler = pytest.mark.skipif(bool(no_compiler), reason=no_compiler)

HEADER = '#define SFT_API extern "C" __attribute__((visibility("default")))\n'
DISPATCH = """#include "sparse_ft.h"
SFT_API const char *sft_build_id(void) { return SFT_BUILD_ID; }
int toy_portable(int);
SFT_API int sft_toy(int n) { return toy_portable(n); }
"""
TOY = """#include <vector>
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
int JOIN(toy_, SFT_ISA)(int n) {
  std::vector<int> v;
  for (int i = 0; i < n; i++) v.push_back(i);
  return static_cast<int>(v.size());
}
"""


@pytest.fixture
def toy(tmp_path):
    """build.py in a checkout of its own, with a C++ source that compiles in a second."""
    package = tmp_path / "kernels" / "sparse_ft_kernels"
    cpu = tmp_path / "csrc" / "cpu"
    package.mkdir(parents=True)
    cpu.mkdir(parents=True)
    shutil.copy(build.__file__, package)
    (tmp_path / "csrc" / "sparse_ft.h").write_text(HEADER)
    (cpu / "dispatch.cpp").write_text(DISPATCH)
    (cpu / "toy.cpp").write_text(TOY)
    spec = importlib.util.spec_from_file_location("toy_build", package / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_compiler
def test_build(toy):
    assert toy.built_id("cpu") is None
    path = toy.build("cpu")
    assert path == toy.library_path("cpu")
    assert toy.is_current("cpu")
    library = ctypes.CDLL(str(path))
    library.sft_build_id.restype = ctypes.c_char_p
    assert library.sft_build_id().decode() == toy.source_id("cpu") == toy.built_id("cpu")
    assert library.sft_toy(7) == 7
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["instruction_sets"][0] == "portable"
    assert "-ffp-contract=off" in record["flags"]
    assert not any("fast-math" in flag for flag in record["flags"])
    leftovers = {file.name for file in path.parent.iterdir()}
    assert leftovers == {".lock", path.name, path.with_suffix(".json").name}


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
@pytest.mark.skipif(sys.platform != "linux", reason="version scripts are of ELF")
def test_only_our_names_are_exported(toy):
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(toy.build("cpu"))], capture_output=True, text=True
    )
    names = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert sorted(names) == ["sft_build_id", "sft_toy"]


@needs_compiler
def test_build_again_only_when_sources_change(toy):
    path = toy.build("cpu")
    first = path.stat().st_mtime_ns
    toy.build("cpu")
    assert path.stat().st_mtime_ns == first
    with (toy.source_dir() / "cpu" / "toy.cpp").open("a") as file:
        file.write("// changed\n")
    assert not toy.is_current("cpu")
    toy.build("cpu")
    assert toy.is_current("cpu")
    assert path.stat().st_mtime_ns != first


@needs_compiler
def test_failed_build_keeps_the_old_library(toy):
    path = toy.build("cpu")
    before = path.read_bytes()
    (toy.source_dir() / "cpu" / "toy.cpp").write_text("this is not C++\n")
    with pytest.raises(toy.BuildError, match=r"failed \(exit 1\)\n.*toy\.cpp(.|\n)*error"):
        toy.build("cpu")
    assert path.read_bytes() == before
    assert {file.suffix for file in path.parent.iterdir()} <= {"", ".json", path.suffix}


@needs_compiler
def test_two_builds_at_once(toy):
    command = [sys.executable, toy.__file__, "--cpu", "--force"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].startswith("cpu: ") for process in both] == [True, True]
    assert [process.returncode for process in both] == [0, 0]
    assert toy.is_current("cpu")


def test_without_a_compiler(toy, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("SPARSE_FT_CPU", "auto")
    assert toy.install() == []
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "CXX='/nonexistent/c++' is not a program" in said
    assert "python -m sparse_ft_kernels.build --cpu" in said
    monkeypatch.setenv("SPARSE_FT_CPU", "1")
    with pytest.raises(toy.BuildError, match="CXX="):
        toy.install()
    assert toy.main(["--cpu"]) == 1
    assert not toy.library_path("cpu").exists()


def test_switched_off(toy, monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_FT_CPU", "0")
    assert toy.install() == []
    assert "SPARSE_FT_CPU=0" in capsys.readouterr().out
    monkeypatch.setenv("SPARSE_FT_CPU", "yes")
    with pytest.raises(toy.BuildError, match="SPARSE_FT_CPU='yes'; it must be 0, 1 or auto"):
        toy.install()


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind is 'gpu'; it must be one of cpu, cuda"):
        build.library_path("gpu")


def test_build_command_is_quiet(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "sparse_ft_kernels.build", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0
    assert done.stderr == ""


def test_wheel_without_a_compiler_holds_every_file(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for name in ("sparse_ft", "kernels", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "_lib", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "SPARSE_FT_CPU": "0", "SPARSE_FT_CUDA": "0"}
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(tree)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    version = sparse_ft.__version__
    wheel = tmp_path / f"sparse_ft-{version}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for folder, target in (
        ("sparse_ft", "sparse_ft"),
        ("kernels/sparse_ft_kernels", "sparse_ft_kernels"),
        ("csrc", "sparse_ft_kernels/_csrc"),
    ):
        for path in (tree / folder).rglob("*"):
            if path.is_file():
                expected.add(f"{target}/{path.relative_to(tree / folder).as_posix()}")
    about = f"sparse_ft-{version}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == expected
    assert f"{about}licenses/LICENSE" in names
    assert "sparse_ft/py.typed" in names
    assert "sparse_ft_kernels/py.typed" in names
    metadata = zipfile.ZipFile(wheel).read(f"{about}METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert re.findall(r"^Requires-Dist: (\w+)\S*$", metadata, flags=re.MULTILINE)[0] == "torch"


def test_version_is_written_once():
    version = sparse_ft.__version__
    assert f'"{version}"' in (ROOT / "sparse_ft" / "_version.py").read_text()
    assert f'version = "{version}"' not in (ROOT / "pyproject.toml").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


def test_set_up_commands_are_the_documented_ones():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert readme.count(QUICKSTART) == 1
    assert readme.count(TEST) == 1
    assert f"command='{TEST}'" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_constraints_pin_every_direct_dependency():
    pins = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[0]
    named = set(re.findall(r'^\s*"?([\w-]+)>=[\d.]+', project, re.MULTILINE))
    named |= set(re.findall(r'"([\w-]+)>=[\d.]+', project))
    assert named - {"setuptools"} <= pins
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()
