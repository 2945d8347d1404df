"""Seconds, bytes and operations of a denoiser, way by way, interleaved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from headscope.bench.denoisers import Denoiser
from headscope.bench.timing import interleaved, is_gpu, wall_seconds
from headscope.bench.ways import Way
from headscope.models.hooks.routing import HANDLE

# how CUDA's own calls that make the host wait for the device are named
_WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
WARM_UP_ROUNDS = 1


@dataclass(frozen=True)
class Counts:
    """One denoising step under torch's profiler.

    Attributes:
        operations: dispatched operators, those that others call included.
        of_headscope: those that are headscope's own.
        synchronisations: values that the host reads back from the model's device, one by one, whether there is
            a GPU to wait for or not; and what else waits for a GPU, where there is one.
        kernels: launched on the GPU; None without one.
        peak_bytes: the most that was allocated at once, beyond what stood before the step.
    """

    operations: int
    of_headscope: int
    synchronisations: int
    kernels: int | None
    peak_bytes: int


def step_seconds(denoiser: Denoiser, ways: dict[str, Way], rounds: int, device: str) -> dict[str, np.ndarray]:
    """Seconds of one denoising step in every round, inside of each way's context."""

    def clock(way: Way) -> float:
        with way.around():
            return wall_seconds(way.step or denoiser.step, device)

    return _in_turn({name: lambda way=way: clock(way) for name, way in ways.items()}, rounds)


def call_seconds(denoiser: Denoiser, ways: dict[str, Way], rounds: int, device: str) -> dict[str, np.ndarray]:
    """Seconds of a whole pipeline call in every round, entering and leaving the way's context included."""

    def whole(way: Way) -> None:
        with way.around():
            denoiser.sample()

    chosen = {name: way for name, way in ways.items() if way.calls_pipelines}
    return _in_turn(
        {name: lambda way=way: wall_seconds(lambda: whole(way), device) for name, way in chosen.items()}, rounds
    )


def _in_turn(clocks: dict[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    return interleaved(clocks, rounds, warm_up=WARM_UP_ROUNDS, rotated=True)


def step_counts(denoiser: Denoiser, way: Way, device: str) -> Counts:
    """Count what one denoising step does; it isn't timed, because profiling slows it."""
    step = way.step or denoiser.step
    cuda = is_gpu(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with way.around():
        step()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if cuda else 0
        with profile(activities=activities, profile_memory=not cuda) as profiler:
            step()
        with _Reads(denoiser) as reads:
            step()
    events = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    names = [event.name() for event in events]
    operators = [name for name in names if name.startswith(("aten::", "headscope::"))]
    on_gpu = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    return Counts(
        operations=len(operators),
        of_headscope=sum(name.startswith("headscope::") for name in operators),
        synchronisations=reads.count + sum(name.startswith(_WAITING) for name in names),
        kernels=len(on_gpu) if cuda else None,
        peak_bytes=torch.cuda.max_memory_allocated(device) - before if cuda else _highest(events),
    )


class _Reads(TorchDispatchMode):
    """Counts the values read back by the host, but for the numbers by which headscope tells modules apart.

    Those are tensors that stay on the CPU whatever device the model is on.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.count = 0
        self._numbers = {id(module.__dict__.get(HANDLE)) for module in denoiser.model.modules()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = func is torch.ops.aten._local_scalar_dense.default
        self.count += read and id(args[0]) not in self._numbers
        return func(*args, **(kwargs or {}))


def _highest(events: list) -> int:
    """The largest sum of allocations less frees, in time's order."""
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(max(0, np.cumsum([change for _, change in changes]).max(initial=0)))
