"""Interleaved timing: every round runs every call once, so that a busy machine slows all of them alike.

A clock makes a call and returns what it took; `interleaved` asks the clocks in turn; `percentiles`, `quartiles` and
`ratio` summarise the rounds.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Call = Callable[[], object]


def wait(device: str) -> None:
    """Return when the device has finished its work."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def wall_seconds(call: Call, device: str = "cpu") -> float:
    """Wall time from an idle device until it is idle again."""
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def host_seconds(call: Call, device: str = "cpu") -> float:
    """Wall time until the call returns, with the device idle at the start."""
    wait(device)
    started = time.perf_counter()
    call()
    taken = time.perf_counter() - started
    wait(device)
    return taken


def seconds(call: Call, device: str = "cpu") -> float:
    """A GPU's own time between two events, waiting for a late host included; wall time on a CPU."""
    if not is_gpu(device):
        return wall_seconds(call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def seconds_and_processor(call: Call, device: str = "cpu") -> tuple[float, float]:
    """`seconds`, and the process's CPU time over all threads, which is steadier where others share the machine."""
    before = time.process_time()
    return seconds(call, device), time.process_time() - before


def interleaved(
    clocks: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: int = 2, rotated: bool = False
) -> dict[str, np.ndarray]:
    """Ask every clock once per round.

    Args:
        clocks: by name; each makes its call and returns what it took, one number or several.
        rounds: how many rounds count, after `warm_up` rounds that don't.
        rotated: every round begins with another clock, so that none always follows the same idle time.

    Returns:
        By name, in the order of `clocks`: [rounds], or [rounds, numbers].
    """
    names = list(clocks)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        first = number % len(names) if rotated else 0
        for name in names[first:] + names[:first]:
            taken = clocks[name]()
            if number >= warm_up:
                found[name].append(taken)
    return {name: np.array(values) for name, values in found.items()}


def percentiles(values: np.ndarray) -> list[float]:
    """The 20th, 50th and 80th percentile."""
    return np.quantile(values, [0.2, 0.5, 0.8]).tolist()


def quartiles(values: np.ndarray) -> list[float]:
    """The 25th, 50th and 75th percentile."""
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist()


def ratio(values: np.ndarray, others: np.ndarray) -> list[float]:
    """Quartiles of `values` over `others`, round by round."""
    return quartiles(values / others)
