"""The architecture as tests: who imports whom, where an op's files lie, what an import loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_ft_kernels import contract, native, reference

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "sparse_ft_kernels"
LIBRARY = ROOT / "sparse_ft"
HEAVY = (
    *("transformers", "triton", "tokenizers", "matplotlib", "rich", "typer", "numba", "pandas"),
    *("datasets", "seqeval", "sklearn"),
)

# Ops that are written in another op's files, because they share its code.
TOGETHER = {"restore_": "compose_", "swap_": "compose_"}


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path, *, top_level: bool = False) -> list[tuple[int, str]]:
    """(level, module) of the imports of a file, or of those alone that run when it is imported."""
    found = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if (
                top_level
                and isinstance(child, ast.If)
                and "TYPE_CHECKING" in ast.unparse(child.test)
            ):
                continue
            if isinstance(child, ast.Import):
                found.extend((0, alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.module:
                    found.append((child.level, child.module))
                else:  # `from . import x`
                    found.extend((child.level, alias.name) for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


def test_kernels_is_a_plain_folder():
    # With an __init__.py it would shadow the Hub's library `kernels`, which transformers looks for.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("path", modules(KERNELS), ids=lambda p: p.name)
def test_kernel_layer_knows_only_torch_and_triton(path):
    for level, module in imports(path):
        if level:
            assert level <= len(path.relative_to(KERNELS).parts), f"{path}: leaves the package"
            continue
        assert top(module) in {*sys.stdlib_module_names, "torch", "triton"}, f"{path}: {module}"
        if top(module) == "triton":
            assert path.name.startswith("triton_") or path.name == "aot.py", (
                f"{path}: triton belongs in triton_*.py"
            )


def test_build_needs_only_the_standard_library():
    for level, module in imports(KERNELS / "build.py"):
        assert level == 0, module
        assert top(module) in sys.stdlib_module_names, module


@pytest.mark.parametrize("path", modules(LIBRARY), ids=lambda p: str(p.relative_to(LIBRARY)))
def test_library_imports_downwards(path):
    place = path.relative_to(LIBRARY).parts
    for level, module in imports(path):
        assert level or top(module) not in ("benchmarks", "tests", "conftest"), f"{path}: {module}"
        if not level and top(module) == "transformers":
            # The command imports what it needs when it runs.
            allowed = ("trainer.py", "tasks", "quickstart", "cli", "cli.py")
            assert place[0] in allowed, f"{path}: {module}"


@pytest.mark.parametrize("package", [KERNELS, LIBRARY], ids=lambda p: p.name)
def test_no_cycles(package):
    def name(path: Path) -> str:
        parts = path.relative_to(package).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    known = {name(path) for path in modules(package)}
    graph: dict[str, set[str]] = {}
    for path in modules(package):
        here = name(path)
        folder = list(path.relative_to(package).parts[:-1])
        graph[here] = set()
        for level, module in imports(path, top_level=True):
            if level:
                target = ".".join([*folder[: len(folder) - level + 1], module])
            elif top(module) == package.name:
                target = module.partition(".")[2]
            else:
                continue
            if target in known and target != here:
                graph[here].add(target)

    done: set[str] = set()

    def walk(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, " -> ".join((*trail, node))
        if node not in done:
            for following in sorted(graph[node]):
                walk(following, (*trail, node))
            done.add(node)

    for node in graph:
        walk(node, ())


@pytest.mark.parametrize("package", ["sparse_ft", "sparse_ft.tasks", "sparse_ft_kernels"])
def test_import_is_light(package):
    paths = [str(ROOT), str(ROOT / "kernels")]
    code = f"""
import sys, torch
sys.path[:0] = {paths!r}
before = set(sys.modules)
import {package}
print(*{{name.partition(".")[0] for name in set(sys.modules) - before}} & {{*{HEAVY!r}}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert done.stderr == ""


@pytest.mark.parametrize("op", sorted(contract.OPS))
def test_one_op_one_stem(op):
    stem = TOGETHER.get(op, op).rstrip("_")
    assert callable(getattr(reference, op, None)), f"reference.py has no {op}"
    assert callable(getattr(native, op, None)), f"native.py has no {op}"
    assert (ROOT / "csrc" / "cpu" / f"{stem}.cpp").is_file()
    assert (ROOT / "tests" / f"test_{stem}.py").is_file()


def test_every_op_is_measured():
    from benchmarks import case, cases  # noqa: F401  (cases registers them)

    assert {op for recipe in case.RECIPES.values() for op in recipe.ops} == set(contract.OPS)


def test_files_of_an_op_belong_to_an_op():
    stems = {TOGETHER.get(op, op).rstrip("_") for op in contract.OPS}
    files = [
        *ROOT.glob("csrc/cpu/*.cpp"),
        *ROOT.glob("csrc/cuda/*.cu"),
        *KERNELS.glob("triton_*.py"),
    ]
    for path in files:
        stem = path.stem.removeprefix("triton_")
        assert stem in {*stems, "dispatch", "common", "backend"}, f"{path} is named after no op"


def test_c_functions_are_named_after_ops():
    header = (ROOT / "csrc" / "sparse_ft.h").read_text(encoding="utf-8")
    functions = re.findall(r"\bsft_(?:cpu|cuda)_(\w+)\s*\(", header)
    stems = sorted((op.rstrip("_") for op in contract.OPS), key=len, reverse=True)
    for function in functions:
        assert function in ("isa", "set_isa") or function.startswith(tuple(stems)), function
