"""Compiles csrc/ during the build and tags the wheel; everything else is in pyproject.toml."""

import importlib.util
import shutil
from pathlib import Path

import setuptools
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# By path: importing the package would import torch, which an isolated build does not have.
_spec = importlib.util.spec_from_file_location(
    "build_native", Path(__file__).parent / "kernels" / "sparse_ft_kernels" / "build.py"
)
native = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native)


class Distribution(setuptools.Distribution):
    """Has native code once a library has been compiled, and only then."""

    has_library = False

    def has_ext_modules(self):
        return self.has_library or super().has_ext_modules()


class BuildPy(build_py):
    """Compiles last: into the build folder or, in an editable install, into the sources."""

    libraries = ()

    def run(self):
        if self.editable_mode:
            super().run()
            native.install()
            return
        build_lib = Path(self.build_lib)
        for package in ("sparse_ft", "sparse_ft_kernels"):  # what an earlier build has left there
            shutil.rmtree(build_lib / package, ignore_errors=True)
        super().run()
        folder = build_lib / "sparse_ft_kernels" / "_lib"
        self.libraries = native.install(folder)
        (folder / ".lock").unlink(missing_ok=True)

    def get_outputs(self, include_bytecode=1):
        built = [str(file) for lib in self.libraries for file in (lib, lib.with_suffix(".json"))]
        return super().get_outputs(include_bytecode) + built


class BdistWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform> with a library and py3-none-any without.

    Any Python and any torch will do: the library is loaded by ctypes and links neither.
    """

    def run(self):
        self.run_command("build")
        has_library = bool(self.get_finalized_command("build_py").libraries)
        self.distribution.has_library = has_library
        self.root_is_pure = not has_library
        super().run()

    def get_tag(self):
        platform = "any" if self.root_is_pure else super().get_tag()[2]
        return "py3", "none", platform


setuptools.setup(distclass=Distribution, cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
