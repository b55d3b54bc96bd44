"""Compiles csrc/ into the libraries that ctypes loads: `python -m sparse_ft_kernels.build`.

Needs a C++ compiler (and nvcc for CUDA), never torch: setup.py loads this file by its path. The
libraries know nothing of Python or torch either, so one build serves every version of both.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["BuildError", "build", "built_id", "is_current", "library_path", "request", "source_id"]

KINDS = ("cpu", "cuda")
PACKAGE = Path(__file__).resolve().parent

# No option here may change a value: contraction is off, and so is all of -ffast-math that could.
# The last two say that nobody reads errno or the exception flags; otherwise sqrt and comparisons
# do not vectorise.
CPU_FLAGS = [
    *("-std=c++17", "-O3", "-Wall", "-Wextra"),
    *("-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]

# Every operation is compiled once for each of these; csrc/cpu/dispatch.cpp chooses at run time.
AVX2 = ["-mavx2", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi2"]
INSTRUCTION_SETS = {"portable": [], "avx2": AVX2, "avx512": AVX512}

# -fmad=false is nvcc's -ffp-contract=off.
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-cudart=static", "--shared", "--threads=0"]
CUDA_HOST_FLAGS = "-fPIC,-fvisibility=hidden,-ffp-contract=off,-static-libgcc,-static-libstdc++"
CUDA_TARGETS = (80, 90, 100)

LINK_FLAGS = ["-static-libgcc", "-static-libstdc++", "-Wl,-z,defs"]
# Without it templates of the standard library would be exported, and bound to another library's.
EXPORTS = "{ global: sft_*; local: *; };\n"


class BuildError(RuntimeError):
    """A library cannot be built; the message says why and what would help."""


def sources(kind: str) -> list[Path]:
    """The files that are compiled for `kind`, sorted; empty where csrc/ has none."""
    pattern = "cpu/*.cpp" if kind == "cpu" else "cuda/*.cu"
    return sorted(source_dir().glob(pattern))


def source_dir() -> Path:
    """csrc/: beside this file in an installed package, at the top of the repository otherwise."""
    for folder in (PACKAGE / "_csrc", PACKAGE.parents[1] / "csrc"):
        if (folder / "sparse_ft.h").is_file():
            return folder
    raise BuildError(f"the C++ sources are missing: neither {PACKAGE / '_csrc'} nor csrc/ has them")


def library_path(kind: str, directory: Path | None = None) -> Path:
    """Where the library of `kind` ("cpu" or "cuda") lies, whether or not it has been built.

    Args:
        kind: "cpu" or "cuda".
        directory: The folder of libraries; by default the one inside this package.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return (directory or PACKAGE / "_lib") / f"libsparse_ft_{kind}{suffix}"


def source_id(kind: str) -> str:
    """The build id of a library compiled now: a digest of sources and compiler options."""
    folder = source_dir()
    digest = hashlib.sha256()
    if kind == "cpu":
        digest.update(repr((CPU_FLAGS, INSTRUCTION_SETS, LINK_FLAGS, EXPORTS)).encode())
    else:
        digest.update(repr((CUDA_FLAGS, CUDA_HOST_FLAGS, CUDA_TARGETS)).encode())
    for path in sorted([folder / "sparse_ft.h", *folder.glob(f"{kind}/*")]):
        if path.suffix in (".h", ".inl", ".cpp", ".cu", ".cuh"):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def built_id(kind: str, directory: Path | None = None) -> str | None:
    """The build id of the library that is there, or None where there is none."""
    path = library_path(kind, directory)
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(record["build_id"]) if path.is_file() else None


def is_current(kind: str, directory: Path | None = None) -> bool:
    """Whether the library is there and was compiled from the sources that are there."""
    return built_id(kind, directory) == source_id(kind)


def request(kind: str) -> str:
    """What SPARSE_FT_CPU or SPARSE_FT_CUDA asks of an installation.

    Returns:
        "0": never build; "1": build, or fail; "auto" (the default): build where a compiler is.
    """
    variable = f"SPARSE_FT_{kind.upper()}"
    value = os.environ.get(variable, "auto")
    if value not in ("0", "1", "auto"):
        raise BuildError(f"{variable}={value!r}; it must be 0, 1 or auto")
    return value


def build(
    kind: str, directory: Path | None = None, *, force: bool = False, verbose: bool = False
) -> Path:
    """Compiles the library of `kind`, unless the one that is there is current.

    The finished library replaces the old one in one step, under a lock: a process that loads it, or
    builds it at the same time, never meets half a file.

    Args:
        kind: "cpu" or "cuda".
        directory: Where the library goes; by default the folder inside this package.
        force: Compile even if the library is current.
        verbose: Print every command.

    Returns:
        The path of the library.

    Raises:
        BuildError: There is no compiler or no source, or the compiler failed.
    """
    path = library_path(kind, directory)
    if not sources(kind):
        raise BuildError(f"{source_dir() / kind} holds no source")
    if is_current(kind, directory) and not force:
        return path
    with _lock(path.parent):
        if force or not is_current(kind, directory):  # another process may have built it meanwhile
            with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as scratch:
                compile_kind = _compile_cpu if kind == "cpu" else _compile_cuda
                record = compile_kind(Path(scratch) / path.name, verbose)
                record_path = Path(scratch) / "record.json"
                record_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                os.replace(Path(scratch) / path.name, path)
                os.replace(record_path, path.with_suffix(".json"))
    return path


def _compile_cpu(output: Path, verbose: bool) -> dict[str, object]:
    """Compiles csrc/cpu into `output`; returns the record that is written beside it."""
    compiler = _cxx_compiler()
    scratch = output.parent
    build_id = source_id("cpu")

    def accepts(*flags: str, text: str = "int main() { return 0; }\n") -> bool:
        probe = scratch / "probe.cpp"
        probe.write_text(text)
        command = [*compiler, *flags, str(probe), "-o", str(scratch / "probe")]
        return subprocess.run(command, capture_output=True).returncode == 0

    isas = {"portable": INSTRUCTION_SETS["portable"]}
    machine = _output([*compiler, "-dumpmachine"])
    if machine.startswith(("x86_64", "amd64")):
        isas |= {name: flags for name, flags in INSTRUCTION_SETS.items() if accepts(*flags)}
    flags = list(CPU_FLAGS)
    openmp = accepts(
        "-fopenmp", text="#include <omp.h>\nint main() { return omp_in_parallel(); }\n"
    )
    if openmp:
        flags.append("-fopenmp")
    exports = scratch / "exports.map"
    exports.write_text(EXPORTS)
    link = [flag for flag in [*LINK_FLAGS, f"-Wl,--version-script={exports}"] if accepts(flag)]

    defines = [f"-DSFT_HAS_{name.upper()}=1" for name in isas] + [f'-DSFT_BUILD_ID="{build_id}"']
    operations = [source for source in sources("cpu") if source.stem != "dispatch"]
    jobs = [(source_dir() / "cpu" / "dispatch.cpp", "dispatch", defines)]
    # Portable objects first: of a template that several objects hold, the linker keeps the first,
    # which must run on any machine.
    for name, isa_flags in isas.items():
        for source in operations:
            jobs.append((source, f"{source.stem}-{name}", [f"-DSFT_ISA={name}", *isa_flags]))
    objects = [scratch / f"{stem}.o" for _, stem, _ in jobs]
    commands = [
        [*compiler, *flags, *extra, f"-I{source_dir()}", "-c", str(source), "-o", str(target)]
        for (source, _, extra), target in zip(jobs, objects, strict=True)
    ]
    _run_all(commands, verbose)
    openmp_flag = ["-fopenmp"] if openmp else ["-pthread"]
    _run(
        [*compiler, "-shared", *openmp_flag, *map(str, objects), *link, "-o", str(output)], verbose
    )
    return {
        "build_id": build_id,
        "compiler": _output([*compiler, "--version"]).splitlines()[0],
        "machine": machine,
        "instruction_sets": list(isas),
        "openmp": openmp,
        "flags": flags,
    }


def _compile_cuda(output: Path, verbose: bool) -> dict[str, object]:
    """Compiles csrc/cuda into `output`; returns the record that is written beside it."""
    nvcc = _nvcc()
    known = {int(code) for code in re.findall(r"sm_(\d+)\b", _output([nvcc, "--list-gpu-code"]))}
    targets = [target for target in CUDA_TARGETS if target in known]
    if not targets:
        raise BuildError(
            f"{nvcc} compiles for none of {', '.join(f'sm_{t}' for t in CUDA_TARGETS)}"
        )
    codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    # The newest target also as PTX, which the driver compiles for GPUs that come later.
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    build_id = source_id("cuda")
    command = [nvcc, *CUDA_FLAGS, "-Xcompiler", CUDA_HOST_FLAGS, *codes, f"-I{source_dir()}"]
    command += [f'-DSFT_BUILD_ID="{build_id}"', *map(str, sources("cuda")), "-o", str(output)]
    _run(command, verbose)
    return {
        "build_id": build_id,
        "compiler": _output([nvcc, "--version"]).splitlines()[-1],
        "targets": targets,
        "flags": list(CUDA_FLAGS),
    }


def _cxx_compiler() -> list[str]:
    """The start of a command: $CXX if set, else the first of c++, g++, clang++ on the path."""
    if "CXX" in os.environ:
        command = shlex.split(os.environ["CXX"])
        if command and shutil.which(command[0]):
            return command
        raise BuildError(f"CXX={os.environ['CXX']!r} is not a program on this machine")
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler (c++, g++, clang++ or $CXX) was found")


def _nvcc() -> str:
    """The path of nvcc: $CUDA_HOME/bin, then the path, then /usr/local/cuda/bin."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    for candidate in (*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate)
        if found:
            return found
    raise BuildError("no nvcc was found (on the path or in $CUDA_HOME/bin)")


def _run_all(commands: Sequence[list[str]], verbose: bool) -> None:
    """Runs the commands, one a core; raises the first failure once all have ended."""
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        for future in [pool.submit(_run, command, verbose) for command in commands]:
            future.result()


def _run(command: list[str], verbose: bool) -> None:
    if verbose:
        print(shlex.join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise _failure(command, done)
    if verbose and done.stderr:
        print(done.stderr, end="", file=sys.stderr, flush=True)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise _failure(command, done)
    return done.stdout.strip()


def _failure(command: list[str], done: subprocess.CompletedProcess[str]) -> BuildError:
    """The error of a failed command: a first line that can stand alone, then what it said."""
    said = (done.stderr or done.stdout).rstrip()
    return BuildError(
        f"{command[0]} failed (exit {done.returncode})\n{shlex.join(command)}\n{said}"
    )


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Holds the build lock of `directory`, which it creates; waits while another builds."""
    try:
        import fcntl
    except ImportError:
        raise BuildError(
            "the native libraries are built on Linux and macOS only; the other backends work here"
        ) from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise BuildError(f"cannot write to {directory}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def install(directory: Path | None = None) -> list[Path]:
    """Builds what SPARSE_FT_CPU and SPARSE_FT_CUDA ask for; prints a line for each not built.

    Args:
        directory: Where the libraries go; by default the folder inside this package.

    Returns:
        The libraries that are there now.

    Raises:
        BuildError: A library that was asked for by "1" cannot be built.
    """
    built = []
    for kind in filter(sources, KINDS):
        wanted = request(kind)
        if wanted == "0":
            print(f"sparse_ft: no {kind} library: SPARSE_FT_{kind.upper()}=0", flush=True)
            continue
        try:
            built.append(build(kind, directory))
        except BuildError as error:
            if wanted == "1":
                raise
            reason = str(error).splitlines()[0]
            print(
                f"sparse_ft: no {kind} library: {reason}. Everything works without it, slower; "
                f"`python -m sparse_ft_kernels.build --{kind}` adds it later.",
                flush=True,
            )
    return built


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sparse_ft_kernels.build",
        description="Compile the native libraries; by default, what can be built here.",
    )
    parser.add_argument("--cpu", action="store_true", help="the CPU library, or an error")
    parser.add_argument("--cuda", action="store_true", help="the CUDA library, or an error")
    parser.add_argument("--force", action="store_true", help="compile even if nothing has changed")
    parser.add_argument("--verbose", action="store_true", help="print every command")
    options = parser.parse_args(arguments)
    asked = [kind for kind in KINDS if getattr(options, kind)]
    failed = False
    for kind in asked or filter(sources, KINDS):
        try:
            path = build(kind, force=options.force, verbose=options.verbose)
            print(f"{kind}: {path} (build {built_id(kind)})")
        except BuildError as error:
            print(f"{kind}: not built: {error}", file=sys.stderr)
            failed = failed or kind in asked or kind == "cpu"
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
