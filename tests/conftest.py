"""Builds missing or outdated native libraries, so that a plain checkout can be tested."""

import os

import pytest

from sparse_ft_kernels import build

# No test may download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Compiles where a compiler is; SPARSE_FT_CPU and SPARSE_FT_CUDA decide."""
    build.install()
