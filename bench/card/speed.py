"""How fast a forward with entropy and gate is, beside everything that computes attention in torch.

Graph replays of many calls over inputs rotated beyond the L2 cache, contenders interleaved round by round; a ratio is
over torch's own choice, and over its fastest kernel, of the same round, with quartiles. What is timed is checked first,
on the same tensors. Then every candidate configuration (candidates.py), then FlexAttention, which compiles for long.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import headscope
from card import candidates
from card.ahead import binaries, compile_ahead
from card.device import Card, Replay, Tensors, interleaved, percentiles, quartiles
from card.stage import Report
from card.workers import in_processes
from headscope_kernels.attention import STATISTICS, BoundStatistic, attention_forward
from headscope_kernels.attention.configs import ForwardConfiguration
from peers import FLEX, OURS, STOCK, Shape, forwards

DTYPE = torch.float16
SHAPES = [
    Shape(2, 10, 4096, 4096, 64, "SDXL 1024 px"),
    Shape(2, 24, 4608, 4608, 128, "Flux 1024 px"),
    Shape(2, 8, 4096, 4096, 40, "SD1.5 512 px"),
    Shape(2, 8, 1024, 1024, 80, "SD1.5 512 px"),
    Shape(2, 8, 4096, 77, 40, "SD1.5 512 px, cross"),
    Shape(2, 10, 4096, 77, 64, "SDXL 1024 px, cross"),
    Shape(2, 8, 256, 256, 160, "SD1.5 512 px"),
    Shape(4, 16, 16384, 16384, 64, "long"),
    Shape(4, 16, 16384, 16384, 128, "long"),
]
# FlexAttention is compiled anew for each
FLEXED = [SHAPES[0], SHAPES[1], SHAPES[3]]
# what remains for the candidates, seconds
CANDIDATES_TAKE = 50.0
CHECKED_ROWS = 64
# a statistic's, in nats, of logits of some units
ENTROPY_BOUND = 5e-5


def run(report: Report, device: Card) -> None:
    shapes = device.shapes(SHAPES)
    tried = candidates.find(device)
    jobs = [(launch, (shape, None)) for shape in shapes] + [(output_only, (shape,)) for shape in shapes]
    jobs += [(launch, (shape, configuration)) for *_, shape, configuration in tried]
    compile_ahead(report, device, jobs)
    report.wait_for_turn()
    before = binaries()
    report.facts["ceilings"] = device.ceilings()
    report.tell("ceilings: " + ", ".join(f"{name} {value:.0f}" for name, value in report.facts["ceilings"].items()))
    for shape in shapes:
        if report.left() < CANDIDATES_TAKE / 2:
            report.tell(f"{shape}: out of time")
            continue
        measure(report, device, shape, flex=False)
    candidates.measure(report, device, tried)
    flexed(report, device)
    report.facts["compiled_while_measured"] = binaries() - before


def flexed(report: Report, device: Card) -> None:
    """FlexAttention, compiled by a process for each shape into the compiler's cache, then timed."""
    shapes = device.shapes(FLEXED)
    answers = in_processes(
        compile_flex,
        [(shape, device.torch_device) for shape in shapes],
        count=device.processes,
        seconds_each=device.compile_seconds,
        left=lambda: report.left() - 10,
    )
    for answer in answers:
        if answer.error:
            shape = str(answer.task[0])
            report.tell(f"{shape} {FLEX}: {answer.error[-300:]}", shape=shape, call=FLEX, error=answer.error)
        elif report.left() > 5:
            measure(report, device, answer.task[0], flex=True)


def compile_flex(task: tuple[Shape, str]) -> None:
    shape, place = task
    forwards(*shape.tensors(place, DTYPE), flex=True, only=(FLEX,))[FLEX]()


def measure(report: Report, device: Card, shape: Shape, *, flex: bool) -> None:
    """A row for each contender on one shape."""
    # as the last shape left them
    clocks = report.facts.pop("clocks", None) or device.clocks()
    sets = device.input_sets(shape, DTYPE)
    only = (STOCK, OURS, FLEX) if flex else None
    made = [forwards(*tensors, flex=flex, only=only) for tensors in sets]
    output, statistics = cast(tuple[Tensor, dict[str, Tensor]], made[0][OURS]())
    errors = errors_of(shape, sets[0], output, statistics)
    wrong = {name: value for name, value in errors.items() if not value <= 1}
    if wrong:
        # a wrong result has no speed
        report.tell(f"WRONG {shape}: {wrong} of the bound", shape=str(shape), call=OURS, error_over_bound=errors)
        made = [{name: call for name, call in calls.items() if name != OURS} for calls in made]
    replays: dict[str, Replay] = {}
    for name in made[0]:
        try:
            replays[name] = device.replay([calls[name] for calls in made])
        except Exception as error:
            message = f"{type(error).__name__}: {str(error)[:200]}"
            report.tell(f"{shape} {name}: {message}", shape=str(shape), call=name, error=message)
            device.synchronise()
    times = interleaved(replays, device.rounds)
    report.facts["clocks"] = device.clocks()
    best = min((name for name in times if name.startswith(STOCK)), key=lambda name: np.median(times[name]))
    for name, seconds in times.items():
        row = row_of(shape, seconds, times[STOCK], times[best])
        row |= {
            "part": "flex" if flex else "forward",
            "call": name,
            "best_stock": best,
            "host_microseconds": replays[name].host_seconds * 1e6,
        }
        row |= {
            "clocks": {"before": clocks, "after": report.facts["clocks"]},
            "error_over_bound": errors if name == OURS else None,
        }
        report.tell(
            f"{shape!s:24} {name:26} {row['milliseconds'][1] * 1e3:9.1f} us {row['tflops_per_second']:5.0f} TF"
            f"  {row['speed_over_default_stock'][1]:.2f} of SDPA, {row['speed_over_best_stock'][1]:.2f} of {best};"
            f" host {row['host_microseconds']:.0f} us",
            **row,
        )


def row_of(shape: Shape, seconds: np.ndarray, default: np.ndarray, best: np.ndarray) -> dict[str, Any]:
    p50 = float(np.median(seconds))
    return {
        "shape": str(shape),
        "where": shape.where,
        "milliseconds": percentiles(seconds),
        "speed_over_default_stock": quartiles(default / seconds),
        "speed_over_best_stock": quartiles(best / seconds),
        "tflops_per_second": shape.flops(False) / p50 / 1e12,
        "gigabytes_per_second": shape.bytes(2, False) / p50 / 1e9,
    }


def errors_of(shape: Shape, tensors: Tensors, output: Tensor, statistics: dict[str, Tensor]) -> dict[str, float]:
    """Output and entropy of some rows of every head over what they may err by, against float64.

    Half precision rounds the weights and the output: eight roundings of values of about 1.
    """
    query, key, value = tensors
    rows = torch.linspace(0, shape.queries - 1, min(shape.queries, CHECKED_ROWS), device=query.device).long()
    logits = query[:, :, rows].double() @ key.double().transpose(-1, -2) * shape.dim**-0.5
    log = logits.log_softmax(-1)
    expected = {"entropy": -(log.exp() * log).sum(-1), "output": log.exp() @ value.double()}
    got = {"entropy": statistics["entropy"][:, :, rows], "output": output[:, :, rows]}
    bounds = {"entropy": ENTROPY_BOUND, "output": 8 * torch.finfo(query.dtype).eps}
    return {name: float((got[name] - values).abs().max()) / bounds[name] for name, values in expected.items()}


def launcher(
    shape: Shape, configuration: ForwardConfiguration | None, tensors: Tensors
) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
    """The kernel with entropy and gate, past the operator: nothing is allocated by a call."""
    query, key, value = tensors
    output, entropy = torch.empty_like(query), torch.empty(query.shape[:3], device=query.device)
    gate = torch.ones(query.shape[:2], device=query.device)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        attention_forward(
            query,
            key,
            value,
            attn_mask=None,
            is_causal=False,
            scale=shape.dim**-0.5,
            gate=gate,
            statistics=[BoundStatistic(STATISTICS["entropy"](()))],
            statistic_outputs=[entropy],
            output=output,
            configuration=configuration,
        )
        return output, {"entropy": entropy}

    return run


def launch(shape: Shape, configuration: ForwardConfiguration | None) -> None:
    """To be compiled ahead."""
    launcher(shape, configuration, empty(shape))()


def output_only(shape: Shape) -> None:
    headscope.attention(*empty(shape), backend="triton")


def empty(shape: Shape) -> Tensors:
    """Tensors as Shape.tensors lays them out, never written."""
    query, key, value = (
        torch.empty(shape.batch, tokens, shape.heads, shape.dim, dtype=DTYPE).transpose(1, 2)
        for tokens in (shape.queries, shape.keys, shape.keys)
    )
    return query, key, value
