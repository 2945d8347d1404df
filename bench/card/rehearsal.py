"""A rehearsal: everything that needs a card, stood in for on a machine without one."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from card.device import CLOCKS, Card, Replay, Tensors, Tests, idle_share
from headscope._machine import device_name
from headscope.bench.timing import Call
from headscope_kernels.attention.configuration import INTERPRETER, ForwardConfiguration
from peers import Shape


class Rehearsal(Card):
    """No card: CPU tensors of tiny shapes, kernels in Triton's interpreter, wall time. Its numbers mean nothing."""

    torch_device = "cpu"
    model_size = "small"
    processes = 3
    rounds = 1
    target = None
    candidate_seconds = 20.0
    compile_seconds = 300.0

    def name(self) -> str:
        return f"no GPU, a rehearsal on {device_name('cpu')}"

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "TRITON_INTERPRET": "1"}

    def shapes(self, shapes: Iterable[Shape]) -> list[Shape]:
        return [replace(shape, batch=1, heads=2, queries=20, keys=24) for shape in list(shapes)[:1]]

    def tokens(self, count: int) -> int:
        return min(count, 12)

    def jobs(self, jobs: Sequence[Any]) -> Sequence[Any]:
        return jobs[:1]

    def clocks(self) -> dict[str, str]:
        return dict.fromkeys(CLOCKS.split(","), "0")

    def graph(self, call: Call) -> Call:
        return call

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        yield

    def replay(self, calls: Sequence[Call]) -> Replay:
        host = self.seconds(calls[0])
        return Replay(lambda: self.seconds(self.graph(calls[0])), host, calls)

    def input_sets(self, shape: Shape, dtype: torch.dtype) -> list[Tensors]:
        return [shape.tensors("cpu", dtype)]

    def ceilings(self) -> dict[str, float]:
        return {"matmul, TFLOP/s": 1.0, "copy, GB/s read and written": 1.0}

    def peak_bytes(self, call: Call) -> int:
        call()
        return 0

    def profile(self, call: Call) -> dict[str, float]:
        call()
        return idle_share([(0, 10), (5, 20), (30, 40)])

    def compile(self, model: nn.Module) -> Any:
        return torch.compile(model, backend="eager")

    def candidates(self, find: Callable[..., dict], *problem: Any) -> dict[str, ForwardConfiguration]:
        """Three candidates for the three outcomes: a right one, one that hangs, one that is refused."""
        find(*problem, ("cuda", 90))
        refused = replace(INTERPRETER, block_queries=3)
        return {"sound": replace(INTERPRETER, block_keys=16), "hanging": INTERPRETER, "refused": refused}

    def before_candidate(self, name: str) -> None:
        if name == "hanging":
            time.sleep(3600)

    def sanitizer(self, tool: str, program: Sequence[str]) -> list[str] | None:
        return [*program]

    def sanitized(self) -> list[str]:
        return ["--calls", "1", "--tokens", "8"]

    def fuzz_calls(self) -> int:
        return 1

    def sweep(self) -> list[str]:
        return ["--model", "bundled", "--sites", "1", "--rounds", "1"]

    def tests(self, folder: Path) -> Tests:
        """One case of the contract, interpreted; one failure; and a card that a test of three leaves broken once."""
        file = folder / "test_rehearsed.py"
        file.write_text(_REHEARSED_TESTS.format(mark=str(folder / "broken")))
        return Tests(folder, (file.name,), "gpu")

    def more_tests(self, folder: Path) -> list[Tests]:
        (folder / "test_passing.py").write_text("def test_that_passes():\n    pass\n")
        return [Tests(folder, ("test_passing.py",), "not gpu")]


_REHEARSED_TESTS = """
import pathlib
import pytest
import torch
from contract import CASES, assert_close, make_inputs, truth

pytestmark = pytest.mark.gpu

def test_contract():
    inputs = make_inputs(next(case for case in CASES if case.name == "one_key"), torch.float32)
    expected = truth(inputs)
    assert_close("output", inputs.attend("triton").output, expected.output, expected.output_tolerance)

def test_that_fails():
    assert 2.5 < 1.0, "output: 2.5 > 1"

def test_that_breaks_the_card_once():
    mark = pathlib.Path("{mark}")
    if not mark.exists():
        mark.touch()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_that_breaks_the_card():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
