"""How a job is timed on a CPU and on a CUDA device, and how much extra memory it needs."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

Job = Callable[[], object]


class Clock(Protocol):
    """Times jobs on one kind of device."""

    def seconds(self, job: Job) -> tuple[float, float]:
        """Seconds that a job takes, and seconds until the host has handed it over."""

    def peak_extra_bytes(self, job: Job) -> int:
        """Memory that a job needs beyond what was taken before."""

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by a large copy, the yardstick of a run."""

    def replay(self, job: Job) -> Job:
        """A job that repeats what a job does on the device, without the host's work.

        Raises:
            RuntimeError: It cannot be captured.
        """


class CpuClock:
    """Wall time, and resident memory (Linux; 0 elsewhere)."""

    def seconds(self, job: Job) -> tuple[float, float]:
        start = time.perf_counter()
        result = job()
        taken = time.perf_counter() - start
        del result
        return taken, taken

    def peak_extra_bytes(self, job: Job) -> int:
        status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        if not status.exists():
            return 0

        def field(name: str) -> int:
            line = next(x for x in status.read_text().splitlines() if x.startswith(name))
            return int(line.split()[1]) * 1024

        gc.collect()
        try:
            clear.write_text("5")
        except OSError:
            return 0
        before = field("VmRSS")
        result = job()
        peak = field("VmHWM")
        del result
        return max(0, peak - before)

    def copy_bandwidth(self) -> float:
        source, target = torch.ones(64_000_000), torch.empty(64_000_000)
        times = [self.seconds(lambda: target.copy_(source))[0] for _ in range(7)]
        return 2 * source.numel() * 4 / statistics.median(times[1:])

    def replay(self, job: Job) -> Job:
        raise RuntimeError("there are no graphs on a CPU")


class CudaClock:
    """Events around a job, with a cold second-level cache, and the allocator's own count.

    Args:
        device: The CUDA device.
    """

    # Several times the cache of any GPU there is.
    FLUSH_BYTES = 512 << 20
    COPY_BYTES = 4 << 30

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(self.FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def seconds(self, job: Job) -> tuple[float, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flush.fill_(1)  # while it runs, the host can run ahead, as it does in training
        begin.record()
        start = time.perf_counter()
        result = job()
        handed_over = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        del result
        return begin.elapsed_time(end) * 1e-3, handed_over

    def peak_extra_bytes(self, job: Job) -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = job()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return max(0, peak - before)

    def copy_bandwidth(self) -> float:
        source, target = (
            torch.empty(self.COPY_BYTES // 4, dtype=torch.int32, device=self.device)
            for _ in range(2)
        )
        source.random_()
        times = [self.seconds(lambda: target.copy_(source))[0] for _ in range(12)]
        return 2 * self.COPY_BYTES / statistics.median(times[2:])

    def replay(self, job: Job) -> Job:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            job()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            job()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay


def clock_of(device: torch.device) -> Clock:
    """The clock of a kind of device."""
    return CpuClock() if device.type == "cpu" else CudaClock(device)
