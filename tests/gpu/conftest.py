"""Every test here needs a CUDA device; without one it is skipped, in one line."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import gpu_oracles
import pytest
import torch

HERE = Path(__file__).parent
NO_DEVICE = "torch sees no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Gives all tests that lack a device one place, so that the summary has one line for them."""
    report = yield
    if report.skipped and report.longrepr[2].endswith(NO_DEVICE):
        report.longrepr = (str(HERE), 1, report.longrepr[2])
    return report


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """Where the kernels run."""
    if not gpu_oracles.REAL and not gpu_oracles.TRIAL:
        pytest.skip(NO_DEVICE)
    return gpu_oracles.DEVICE


@pytest.fixture
def cuda() -> torch.device:
    """For what cannot be tried without a real device."""
    if not gpu_oracles.REAL:
        pytest.skip("needs a real CUDA device")
    return gpu_oracles.DEVICE


@pytest.fixture(autouse=True)
def poisoned_device_memory(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, poisoned_memory: None
) -> None:
    """`torch.empty` gives NaN (integers: -1) on the device too."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        out = empty(*args, **kwargs)  # type: ignore[call-overload]
        if out.device.type == "cuda" and out.dtype is not torch.bool:
            whole = out.view(torch.int16) if out.dtype is torch.uint16 else out
            whole.fill_(float("nan") if out.is_floating_point() else -1)
        return out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def returned_memory(device: torch.device) -> Iterator[None]:
    """Gives device memory back after each test: the large ones need most of it."""
    yield
    if gpu_oracles.REAL:
        torch.cuda.empty_cache()
