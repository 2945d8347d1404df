"""The card: its clock, its graphs, its tools; rehearsal.py stands in for all of it where there is none."""

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from card.stage import ROOT, die_with_parent
from headscope._machine import device_name
from headscope.bench import timing
from headscope.bench.memory import peak_bytes
from headscope.bench.timing import Call
from headscope_kernels.attention.configuration import ForwardConfiguration
from peers import Shape

Tensors = tuple[Tensor, Tensor, Tensor]
# inputs of one replay together, beyond the L2 of an H200 (60 MB)
ROTATED_BYTES = 192 * 2**20
REPLAY_SECONDS = 2e-3
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"


@dataclass(frozen=True)
class Replay:
    """Calls that run again and again without the host.

    Attributes:
        run: returns the device's seconds for one call.
        host_seconds: of one call made from Python.
        calls: referred to here because a graph reads their tensors.
    """

    run: Callable[[], float]
    host_seconds: float
    calls: Sequence[Call]


@dataclass(frozen=True)
class Tests:
    """Tests for pytest: the folder that it runs in, files or names of tests, and an expression of markers."""

    root: Path
    files: tuple[str, ...]
    marker: str


class Card:
    """The GPU that torch sees.

    Attributes:
        torch_device: where tensors go.
        model_size: of headscope.bench.configurations.
        processes: that compile or test at once.
        rounds: of interleaved timing.
        target: as `candidates` takes it.
        candidate_seconds: after which a candidate that has sent nothing counts as hanging.
        compile_seconds: that FlexAttention may take to compile.
    """

    torch_device = "cuda"
    model_size = "full"
    processes = os.cpu_count() or 1
    rounds = 11
    target: tuple[str, int] | None = ("cuda", 90)
    candidate_seconds = 15.0
    compile_seconds = 60.0

    def name(self) -> str:
        return device_name(self.torch_device)

    def synchronise(self) -> None:
        timing.wait(self.torch_device)

    def environment(self) -> dict[str, str]:
        """For programs that are started, many at once: kernels compiled, though a sandbox hides /dev/nvidiactl."""
        # a run of pytest inside of another is none of its processes
        outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return {**outer, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}

    def shapes(self, shapes: Iterable[Shape]) -> list[Shape]:
        return list(shapes)

    def tokens(self, count: int) -> int:
        """That number, or as many as a rehearsal can take."""
        return count

    def jobs(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """The jobs that are compiled ahead."""
        return jobs

    def clocks(self) -> dict[str, str]:
        """MHz, W and degrees, as nvidia-smi says them now."""
        command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits"]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        values = run.stdout.strip().splitlines()
        return dict(zip(CLOCKS.split(","), values[0].split(", "), strict=False)) if values else {}

    def seconds(self, call: Call) -> float:
        """The device's time of a call, host time included where the host is late."""
        return timing.seconds(call, self.torch_device)

    def wall(self, call: Call) -> float:
        """Seconds until the device is done."""
        return timing.wall_seconds(call, self.torch_device)

    def host(self, call: Call) -> float:
        """The host's seconds for a call, not waiting for the device."""
        return timing.host_seconds(call, self.torch_device)

    def graph(self, call: Call) -> Call:
        """Captured, to be replayed."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            call()
        return graph.replay

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """On the stream on which graphs are captured."""
        self.synchronise()
        with torch.cuda.stream(self._stream):
            yield
        self.synchronise()

    def replay(self, calls: Sequence[Call]) -> Replay:
        """Many calls in one graph, in turn over the inputs that they were made for."""
        for call in calls:
            call()

        def twenty() -> None:
            for _ in range(20):
                calls[0]()

        host, whole = self.host(twenty) / 20, self.wall(twenty) / 20
        count = int(np.clip(REPLAY_SECONDS / whole, len(calls), 200))

        def all_of_them() -> None:
            for call in itertools.islice(itertools.cycle(calls), count):
                call()

        replayed = self.graph(all_of_them)
        return Replay(lambda: self.seconds(replayed) / count, host, calls)

    def input_sets(self, shape: Shape, dtype: torch.dtype) -> list[Tensors]:
        """The same numbers at as many addresses as it takes to miss the L2 cache."""
        count = max(1, min(8, ROTATED_BYTES // shape.bytes(dtype.itemsize, False)))
        return [shape.tensors(self.torch_device, dtype) for _ in range(count)]

    def ceilings(self) -> dict[str, float]:
        """The speeds of a large matrix product and a large copy."""
        left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
        block = torch.empty(2**31, device="cuda", dtype=torch.int8)
        other = torch.empty_like(block)
        calls = {
            "matmul, TFLOP/s": (lambda: left @ right, 2 * 8192**3 / 1e12),
            "copy, GB/s read and written": (lambda: other.copy_(block), 2 * 2**31 / 1e9),
        }
        found = {}
        for name, (call, work) in calls.items():
            times = [self.seconds(call) for _ in range(13)][3:]
            found[name] = work / float(np.median(times))
        return found

    def peak_bytes(self, call: Call) -> int:
        """The most memory that is alive at once during a call beyond what was before."""
        return peak_bytes(call, self.torch_device) or 0

    def profile(self, call: Call) -> dict[str, float]:
        """Kernels of one call, and the share of the time from the first to the last in which none ran."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            self.synchronise()
        events = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        device = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
        return idle_share([(event.start_ns(), event.start_ns() + event.duration_ns()) for event in device])

    def compile(self, model: nn.Module) -> Any:
        return torch.compile(model)

    def candidates(self, find: Callable[..., dict], *problem: Any) -> dict[str, ForwardConfiguration]:
        return find(*problem, self.target)

    def before_candidate(self, name: str) -> None:
        """Nothing: a card's candidates hang by themselves."""

    def sanitizer(self, tool: str, program: Sequence[str]) -> list[str] | None:
        """The command that runs a program under one of compute-sanitizer's tools; None where it isn't installed."""
        found = shutil.which("compute-sanitizer")
        # the caching allocator would hide accesses past the end of a tensor
        uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        return [*uncached, found, "--tool", tool, "--error-exitcode", "9", *program] if found else None

    def sanitized(self) -> list[str]:
        """Further arguments of tests/gpu/sanitized.py."""
        return []

    def fuzz_calls(self) -> int:
        """Random calls of each of its processes."""
        return 2000

    def sweep(self) -> list[str]:
        """The arguments of bench/sweeps.py."""
        return ["--model", "sd15", "--device", "cuda", "--dtype", "float16", "--sites", "4", "--no-compile"]

    def tests(self, folder: Path) -> Tests:
        """The tests that need a card, and nothing else."""
        return Tests(ROOT, ("tests/gpu/test_device.py", "tests/gpu/test_contract.py"), "gpu")

    def more_tests(self, folder: Path) -> list[Tests]:
        """The tests of the kernels, compiled, and those of sweeps."""
        return [
            Tests(ROOT, ("tests/kernels",), "not gpu and not full"),
            Tests(ROOT, ("tests/gpu/test_sweep.py",), "gpu"),
        ]


def idle_share(spans: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of (begin, end) of kernels in nanoseconds: how many, seconds from the first to the last, and the idle share."""
    if not spans:
        return {"kernels": 0, "span_seconds": 0.0, "idle_share": 0.0}
    busy, reached = 0.0, -float("inf")
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    span = reached - min(begin for begin, _ in spans)
    return {"kernels": len(spans), "span_seconds": span / 1e9, "idle_share": 1 - busy / span if span else 0.0}


class Compiler(Card):
    """No card: only what stages compile ahead of it."""

    def name(self) -> str:
        return f"no GPU, compiled for sm_90 on {device_name('cpu')}"


def device_of(mode: str) -> Card:
    """The card of a mode, whether there is one or not."""
    if mode == "rehearse":
        from card.rehearsal import Rehearsal

        return Rehearsal()
    return Compiler() if mode == "compile" else Card()


def open_device(mode: str) -> Card:
    """Raises SystemExit where there is no GPU to measure."""
    if mode == "measure" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: torch.cuda.is_available() is False; --rehearse does without")
    return device_of(mode)


def interleaved(replays: dict[str, Replay], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of one call of each in every round, after two rounds that don't count."""
    return timing.interleaved({name: replay.run for name, replay in replays.items()}, rounds)


@contextlib.contextmanager
def program(
    command: Sequence[str], device: Card, seconds: float, *, folder: Path = ROOT, ends: signal.Signals = signal.SIGKILL
) -> Iterator[subprocess.Popen]:
    """A program whose output is read line by line; it gets the signal `ends` after so many seconds, and ends with the
    block or with this process."""
    process = subprocess.Popen(
        list(command),
        cwd=folder,
        env=device.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=die_with_parent,
    )
    timer = threading.Timer(max(1.0, seconds), process.send_signal, [ends])
    timer.daemon = True
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
