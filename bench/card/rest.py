"""The stage `rest`, as far as time allows: backward speed, lengths, determinism, compute-sanitizer, random calls."""

import contextlib
import importlib.util
import itertools
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from card import contract
from card.ahead import compile_ahead
from card.calls import DTYPE, empty, launch, row_of
from card.device import Card, Replay, interleaved, program, python
from card.speed import SHAPES
from card.stage import ROOT, Report
from headscope.ops import HeadEdit, attention
from peers import OURS, STOCK, Shape, backwards, forwards

# the long ones of models
BACKWARD = SHAPES[:4]
# 16,384 queries in all, so that the work grows with the keys alone
LENGTHS = [
    Shape(max(1, 16384 // size), 16, size, size, dim, "length")
    for size, dim in [*itertools.product((1024, 2048, 4096, 8192, 16384, 32768), (64,)), (32768, 128)]
]
DIMS = [Shape(2, 16, 4096, 4096, 40, "dim"), Shape(2, 16, 4096, 4096, 80, "dim"), Shape(2, 16, 4096, 4096, 160, "dim")]
PEERS = (STOCK, OURS, "SDPA flash", "SDPA cuDNN")
RANDOM = "random calls"
# what ops.fuzz prints of a wrong result
PAST = "past the bound of"
# of a part that could be started and not ended, seconds
PARTS_TAKE = 4.0


def run(report: Report, device: Card) -> None:
    backward, forward = device.shapes(BACKWARD), device.shapes(LENGTHS) + device.shapes(DIMS)
    jobs: list[Any] = [(train, (shape, "cpu")) for shape in backward]
    jobs += [(launch, (shape, None)) for shape in forward]
    jobs += [(sanitized, (index,)) for index in range(12)]
    compile_ahead(report, device, jobs)
    report.wait_for_turn()
    parts: list[tuple[str, Callable[[], None]]] = [
        *(("backward", lambda shape=shape: timed_backward(report, device, shape)) for shape in backward),
        ("determinism", lambda: deterministic(report, device)),
        *(("forward", lambda shape=shape: timed_forward(report, device, shape)) for shape in forward),
        ("tests", lambda: tests(report, device)),
        ("programs", lambda: programs(report, device)),
    ]
    for name, part in parts:
        if report.left() < PARTS_TAKE:
            report.tell(f"{name}: out of time", part=name, error="out of time")
            continue
        try:
            part()
        except Exception as error:
            message = f"{type(error).__name__}: {str(error)[:300]}"
            report.tell(f"{name}: {message}", part=name, error=message)


def train(shape: Shape, place: str) -> list[torch.Tensor]:
    """Forward and backward with entropy and gate: output, entropy and all gradients."""
    tensors = empty(shape) if place == "cpu" else shape.tensors(place, DTYPE)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gate = torch.ones(shape.batch, shape.heads, device=place, requires_grad=True)
    result = attention(*leaves, statistics=["entropy"], edit=HeadEdit(gate), backend="triton")
    outputs = [result.output, result.statistics["entropy"]]
    gradients = torch.autograd.grad(outputs, [*leaves, gate], [torch.ones_like(output) for output in outputs])
    return [*(output.detach() for output in outputs), *gradients]


def timed_backward(report: Report, device: Card, shape: Shape) -> None:
    """The backward alone, beside torch's kernels'."""
    # a graph of gradients is captured on the stream that the forwards ran on
    with device.beside():
        calls = backwards(*shape.tensors(device.torch_device, DTYPE), flex=False)
    replays: dict[str, Replay] = {}
    for name in (*PEERS, "headscope, output only"):
        if name not in calls:
            continue
        try:
            replays[name] = device.replay([calls[name]])
        except Exception as error:
            report.tell(f"backward {shape} {name}: {str(error)[:200]}; timed with the host's part")
            device.synchronise()
            call = calls[name]
            replays[name] = Replay(lambda call=call: device.seconds(call), device.host(call), [call])
    _rows(report, device, shape, replays, "backward")


def timed_forward(report: Report, device: Card, shape: Shape) -> None:
    sets = device.input_sets(shape, DTYPE)
    made = [forwards(*tensors, flex=False, only=PEERS) for tensors in sets]
    replays = {name: device.replay([calls[name] for calls in made]) for name in made[0]}
    _rows(report, device, shape, replays, "forward")


def _rows(report: Report, device: Card, shape: Shape, replays: dict[str, Replay], part: str) -> None:
    times = interleaved(replays, max(1, device.rounds - 4))
    for name in times:
        row = row_of(shape, name, times, backward=part == "backward")
        report.tell(
            f"{part:8} {shape!s:24} {name:26} {row['milliseconds'][1]:8.3f} ms {row['tflops_per_second']:5.0f} TF"
            f"  {row['speed_over_default_stock'][1]:.2f} of SDPA,"
            f" {row['speed_over_best_stock'][1]:.2f} of {row['best_stock']}",
            part=part,
            call=name,
            host_microseconds=replays[name].host_seconds * 1e6,
            **row,
        )


def deterministic(report: Report, device: Card) -> None:
    """The same call again and again: bit for bit the same."""
    (shape,) = device.shapes([Shape(2, 8, 1000, 1000, 64, "repeated")])
    tensors = shape.tensors(device.torch_device, DTYPE)
    different, repeats = 0, 2 * device.rounds
    first = _repeated(tensors)
    for _ in range(repeats):
        different += any(not torch.equal(again, once) for again, once in zip(_repeated(tensors), first, strict=True))
    text = f"determinism: {different} of {repeats} repetitions differ"
    report.tell(text, part="determinism", right=different == 0, different=different)


def _repeated(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    result = attention(*leaves, statistics=["entropy", "key_mass"], backend="triton")
    total = result.output.float().square().sum() + result.statistics["entropy"].sum()
    found = [result.output, *result.statistics.values(), *torch.autograd.grad(total, leaves)]
    return [tensor.detach() for tensor in found]


def tests(report: Report, device: Card) -> None:
    """For which the first stages have no time; programs get half of what is left."""
    with tempfile.TemporaryDirectory() as folder:
        more = device.more_tests(Path(folder))
        for some in more:
            report.tell(f"tests: {' '.join(some.files)}")
            contract.run_tests(report, device, some, report.left() / (2 * len(more)))


def sanitized(index: int) -> None:
    """One of the calls of tests/gpu/sanitized.py, compiled ahead: the sanitizer would slow its compiler down."""
    found = importlib.util.spec_from_file_location("sanitized", ROOT / "tests" / "gpu" / "sanitized.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.call("cpu", *module.CALLS[index])


def programs(report: Report, device: Card) -> None:
    """compute-sanitizer's tools and random calls, all side by side."""
    small = python("tests/gpu/sanitized.py", device.torch_device, *device.sanitized())
    commands: dict[str, list[str] | None] = {
        f"compute-sanitizer {tool}": device.sanitizer(tool, small) for tool in ("memcheck", "racecheck")
    }
    calls = device.fuzz_calls()
    # two cores for the sanitizer
    for index in range(max(1, device.processes - 2)):
        fuzz = python("-m", "ops.fuzz", "--backend", "triton", "--first", str(index * calls), "--calls", str(calls))
        commands[f"{RANDOM} from {index * calls}"] = fuzz
    missing = [name for name, command in commands.items() if command is None]
    for name in missing:
        report.tell(f"{name}: isn't installed", part=name, right=None, error="isn't installed")
    with contextlib.ExitStack() as stack:
        running = {}
        for name, command in commands.items():
            # random calls that are interrupted print what they found
            ends = signal.SIGINT if name.startswith(RANDOM) else signal.SIGKILL
            if command:
                running[name] = stack.enter_context(program(command, device, report.left() - 4, ends=ends))
        for name, process in running.items():
            output = process.communicate()[0]
            code = process.returncode
            # killed by its limit, nothing is known
            right = None if code == -signal.SIGKILL else code == 0
            past = [line for line in output.splitlines() if PAST in line]
            why = " / ".join(past) or output[-400:]
            text = {True: "right", None: "out of time", False: f"WRONG, code {code}: {why}"}[right]
            report.tell(f"{name}: {text}", part=name, right=right, reason=why, output=output[-3000:])
