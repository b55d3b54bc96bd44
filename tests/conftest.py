"""Builds missing or outdated native libraries, so that a plain checkout can be tested."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch.utils._device import _device_constructors

from sparse_ft_kernels import build

# No test may download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU, Triton's kernels run in its interpreter; the flag must stand before they are
# decorated.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Compiles where a compiler is; SPARSE_FT_CPU and SPARSE_FT_CUDA decide."""
    build.install()


@pytest.fixture(params=["cpu:avx512", "cpu:avx2", "cpu:portable", "triton", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every backend, and every instruction set of the native one that this machine has."""
    from sparse_ft_kernels import native, triton_backend

    name, _, isa = request.param.partition(":")
    monkeypatch.setenv("SPARSE_FT_BACKEND", name)
    if name == "triton" and (why := triton_backend.unavailable(torch.device("cpu"))):
        pytest.skip(why)
    if name != "cpu":
        yield name
        return
    library, reason = native.load()
    if library is None:
        pytest.skip(reason)
    best = native.isa()
    try:
        native.set_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield request.param
    finally:
        native.set_isa(best)


@pytest.fixture
def native_library() -> None:
    """Skips a test that needs the C++ library where there is none."""
    from sparse_ft_kernels import native

    library, reason = native.load()
    if library is None:
        pytest.skip(reason)


@pytest.fixture
def other_backends() -> list[str]:
    """The backends besides the native one that serve CPU tensors here."""
    from sparse_ft_kernels import triton_backend

    triton = [] if triton_backend.unavailable(torch.device("cpu")) else ["triton"]
    return [*triton, "reference"]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN (integers: the largest), so that an output left unwritten cannot
    pass.
    """
    # torch looks once for the functions that a device context, such as meta, changes: these must be
    # torch's own.
    _device_constructors()
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        out = empty(*args, **kwargs)  # type: ignore[call-overload]
        if out.device.type == "cpu" and type(out) is torch.Tensor:
            out.fill_(
                float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max
            ) if out.dtype not in (torch.bool, torch.uint16, torch.uint32, torch.uint64) else None
        return out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads would only wait for one another; and for results that must
    be those of another process, since torch's sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
