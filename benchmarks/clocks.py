"""How a job is timed on a CPU and on a CUDA device, how much extra memory it needs, and the
bandwidth of the memory beside it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from .case import Job


class Yardstick(NamedTuple):
    """A job that does nothing but move bytes."""

    job: Job
    bytes_moved: int


class Clock(Protocol):
    """Times jobs on one kind of device."""

    yardsticks: dict[str, Yardstick]
    """ "copy": one array to another, bytes read and written; "read": two arrays."""

    def seconds(self, job: Job) -> tuple[float, float]:
        """Seconds that a job takes with cold caches, and until the host has handed it over."""

    def begin_peak(self) -> None:
        """From here on the peak of memory counts."""

    def peak_extra_bytes(self) -> int:
        """The peak of memory beyond what was taken at begin_peak()."""

    def free_bytes(self) -> int:
        """Memory that can still be had."""

    def replay(self, job: Job) -> Job:
        """A job that repeats what a job does on the device, without the host's work, and returns
        the same tensors, with new content.

        Raises:
            RuntimeError: It cannot be captured.
        """


class CpuClock:
    """Wall time, and resident memory (Linux; 0 elsewhere)."""

    # Several times the last-level cache of one processor; more would not fit the rounds.
    SWEEP_BYTES = 128 << 20
    YARDSTICK_BYTES = 256 << 20

    def __init__(self) -> None:
        self._sweep = torch.ones(self.SWEEP_BYTES // 4)
        a, b = (torch.ones(self.YARDSTICK_BYTES // 4) for _ in range(2))
        self.yardsticks = {
            "copy": Yardstick(lambda: b.copy_(a), 2 * self.YARDSTICK_BYTES),
            "read": Yardstick(lambda: torch.dot(a, b), 2 * self.YARDSTICK_BYTES),
        }
        self._before = 0

    def seconds(self, job: Job) -> tuple[float, float]:
        # Reading leaves nothing that must be written back while the job runs.
        self._sweep.sum()
        start = time.perf_counter()
        result = job()
        taken = time.perf_counter() - start
        del result
        return taken, taken

    @staticmethod
    def _status(field: str) -> int:
        status = Path("/proc/self/status")
        if not status.exists():
            return 0
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) * 1024

    def begin_peak(self) -> None:
        gc.collect()
        # Freed pages that the allocator keeps would count as taken, and then as free of charge.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._status("VmRSS")

    def peak_extra_bytes(self) -> int:
        return max(0, self._status("VmHWM") - self._before)

    def free_bytes(self) -> int:
        info = Path("/proc/meminfo")
        if not info.exists():
            return 1 << 62
        line = next(x for x in info.read_text().splitlines() if x.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024

    def replay(self, job: Job) -> Job:
        raise RuntimeError("there are no graphs on a CPU")


class CudaClock:
    """Events around a job, with a cold second-level cache, and the allocator's own count.

    Args:
        device: The CUDA device.
    """

    # Several times the cache of any GPU there is.
    SWEEP_BYTES = 512 << 20
    YARDSTICK_BYTES = 2 << 30

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sweep = torch.ones(self.SWEEP_BYTES // 4, device=device)
        a, b = (torch.empty(self.YARDSTICK_BYTES // 4, device=device).normal_() for _ in range(2))
        self.yardsticks = {
            "copy": Yardstick(lambda: b.copy_(a), 2 * self.YARDSTICK_BYTES),
            "read": Yardstick(lambda: torch.dot(a, b), 2 * self.YARDSTICK_BYTES),
        }
        self._before = 0

    def seconds(self, job: Job) -> tuple[float, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # Reading leaves no lines to be written back while the job runs; and meanwhile the host can
        # run ahead, as it does in training.
        self._sweep.sum()
        begin.record()
        start = time.perf_counter()
        result = job()
        handed_over = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        del result
        return begin.elapsed_time(end) * 1e-3, handed_over

    def begin_peak(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak_extra_bytes(self) -> int:
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - self._before)

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def replay(self, job: Job) -> Job:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            job()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = job()

        def replayed() -> object:
            graph.replay()
            return result

        return replayed


def clock_of(device: str) -> Clock:
    """The clock of a kind of device."""
    return CpuClock() if device == "cpu" else CudaClock(torch.device(device))
