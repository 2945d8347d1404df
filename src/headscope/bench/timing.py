"""Interleaved timing: every round runs every call once, so that a busy machine slows all of them alike."""

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Samples:
    """What one call took, one entry per round.

    Attributes:
        seconds: wall time on a CPU, the device's own time on a GPU.
        cpu_seconds: the process's CPU time over all threads; steadier where others share the machine.
    """

    seconds: np.ndarray
    cpu_seconds: np.ndarray

    def milliseconds(self) -> list[float]:
        """The 20th, 50th and 80th percentile."""
        return (np.quantile(self.seconds, [0.2, 0.5, 0.8]) * 1e3).tolist()

    def ratio_to(self, other: "Samples") -> list[float]:
        """Quartiles of this call's time over the other's, round by round."""
        return np.quantile(self.seconds / other.seconds, [0.25, 0.5, 0.75]).tolist()

    def cpu_ratio_to(self, other: "Samples") -> float:
        """The median ratio of CPU times."""
        return float(np.median(self.cpu_seconds / np.maximum(other.cpu_seconds, 1e-9)))


def interleaved(calls: Mapping[str, Call], rounds: int, device: str, *, warmup: int = 2) -> dict[str, Samples]:
    """Time the calls in turn, `rounds` times after `warmup` rounds that don't count."""
    timer = _on_cpu if device == "cpu" else _on_gpu
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for round_ in range(warmup + rounds):
        for name, call in calls.items():
            times = timer(call)
            if round_ >= warmup:
                found[name].append(times)
    return {name: Samples(*np.array(times).T) for name, times in found.items()}


def _on_cpu(call: Call) -> tuple[float, float]:
    before, started = _cpu_seconds(), time.perf_counter()
    call()
    return time.perf_counter() - started, _cpu_seconds() - before


def _on_gpu(call: Call) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before = _cpu_seconds()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, _cpu_seconds() - before


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_bytes(call: Call, device: str) -> int | None:
    """The most memory that is alive at once during a call beyond what was before, results included.

    On a CPU the process's resident memory counts, reset through /proc; None where that isn't to be had.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    result = call()
    del result
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
