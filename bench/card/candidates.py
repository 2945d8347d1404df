"""Every candidate configuration, checked and timed beside torch's kernels, each in a separate process.

Processes of a wave check side by side; one that says nothing hangs, and is killed. Then those that are right are timed,
one process after the other, while the others are idle. choices.json holds the table from which configs.py chooses.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from card.calls import DTYPE, errors_of, launcher, row_of
from card.device import Card, Tensors, interleaved, open_device
from card.stage import Report
from card.workers import Worker
from headscope_kernels.attention import choices
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.forward.candidates import candidates as configurations
from headscope_kernels.attention.forward.configs import forward_configuration
from peers import STOCK, Shape, forwards

SHAPES = [
    Shape(2, 10, 4096, 4096, 64, "SDXL 1024 px"),
    Shape(2, 24, 4608, 4608, 128, "Flux 1024 px"),
    Shape(2, 20, 1024, 1024, 64, "SDXL 1024 px"),
    Shape(2, 10, 4096, 77, 64, "SDXL 1024 px, cross"),
    Shape(2, 8, 4096, 4096, 40, "SD1.5 512 px"),
    Shape(2, 8, 4096, 77, 40, "SD1.5 512 px, cross"),
    Shape(2, 8, 1024, 1024, 80, "SD1.5 512 px"),
]
STARTS_WITHIN = 60.0
# of a candidate on a shape: a graph is captured and replayed
SECONDS_TO_TIME = 20.0
CHOSEN = "the rule's choice"

# name, shape, configuration
Candidate = tuple[str, Shape, ForwardConfiguration]


def find(device: Card) -> list[Candidate]:
    """All of them, in order of the shapes' value."""
    found = []
    for shape in device.shapes(SHAPES):
        problem = (DTYPE, shape.dim, shape.dim, shape.queries, shape.keys)
        found += [(name, shape, value) for name, value in device.candidates(configurations, *problem).items()]
    return found


def measure(report: Report, device: Card, tried: list[Candidate]) -> None:
    """A row for each candidate and shape, and choices.json after each."""
    rows: list[dict[str, Any]] = []
    # one process takes a candidate through all shapes of a head dimension
    taken: dict[tuple[int, str], list[Candidate]] = {}
    for candidate in tried:
        taken.setdefault((candidate[1].dim, candidate[0]), []).append(candidate)
    processes = list(taken.values())
    for first in range(0, len(processes), device.processes):
        _wave(report, device, processes[first : first + device.processes], rows)
    report.facts["candidates"] = len(tried)


def _wave(report: Report, device: Card, wave: list[list[Candidate]], rows: list[dict[str, Any]]) -> None:
    if report.left() < device.candidate_seconds / 2:
        report.tell(f"candidates {', '.join(cases[0][0] for cases in wave)}: out of time")
        return
    workers = [Worker() for _ in wave]
    sound: list[tuple[Worker, Candidate]] = []
    try:
        for worker in workers:
            worker.send(ready, report.mode)
        for worker in workers:
            worker.answer(min(STARTS_WITHIN, report.left()))
        for index in range(max(map(len, wave))):
            asked = [
                (worker, cases[index])
                for worker, cases in zip(workers, wave, strict=True)
                if index < len(cases) and worker.alive
            ]
            for worker, candidate in asked:
                worker.send(check, (*candidate, report.mode))
            end = time.monotonic() + min(device.candidate_seconds, report.left())
            for worker, candidate in asked:
                answer = worker.answer(end - time.monotonic())
                if answer.error or any(not value <= 1 for value in answer.result.values()):
                    _report_candidate(report, rows, candidate, None, answer.error or f"wrong: {answer.result}")
                else:
                    sound.append((worker, candidate))
        for worker, candidate in sound:
            if not worker.alive:
                _report_candidate(report, rows, candidate, None, "its process ended at another shape")
                continue
            worker.send(timed, (*candidate, report.mode))
            answer = worker.answer(min(SECONDS_TO_TIME, report.left()))
            _report_candidate(report, rows, candidate, answer.result, answer.error)
    finally:
        for worker in workers:
            worker.end()


def _report_candidate(
    report: Report, rows: list[dict[str, Any]], candidate: Candidate, times: dict[str, Any] | None, error: str | None
) -> None:
    name, shape, configuration = candidate
    row = {
        "target": ["cuda", 90],
        "triton": choices.triton_version(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "dim": shape.dim,
        "queries": shape.queries,
        "keys": shape.keys,
        "name": name,
        "configuration": dataclasses.asdict(configuration),
        "milliseconds": times["milliseconds"][1] if times else None,
        "default_milliseconds": times["default_milliseconds"] if times else None,
        "sound": times is not None,
    }
    rows.append(row)
    choices.write(report.out / "choices.json", rows)
    if times is None:
        text = f"{shape!s:24} candidate {name}: NOT SOUND, {str(error)[-250:]}"
        report.tell(text, shape=str(shape), candidate=name, sound=False, error=error)
        return
    gain = row["default_milliseconds"] / row["milliseconds"]
    report.tell(
        f"{shape!s:24} candidate {name:24} {row['milliseconds'] * 1e3:9.1f} us {times['tflops_per_second']:5.0f} TF"
        f"  {gain:.2f} of the rule's choice, {times['speed_over_best_stock'][1]:.2f} of {times['best_stock']}",
        candidate=name,
        sound=True,
        speed_over_the_rule=gain,
        **times,
    )


# what the process checked, by shape: what is timed is the same
_tensors: dict[Shape, Tensors] = {}


def ready(mode: str) -> None:
    """In the candidate's process: all that isn't the candidate's time."""
    open_device(mode).synchronise()


def check(task: tuple[str, Shape, ForwardConfiguration, str]) -> dict[str, float]:
    """In the candidate's process: its errors over what they may be."""
    name, shape, configuration, mode = task
    device = open_device(mode)
    device.before_candidate(name)
    tensors = _tensors[shape] = shape.tensors(device.torch_device, DTYPE)
    result = launcher(shape, configuration, tensors)()
    device.synchronise()
    return errors_of(shape, tensors, *result)


def timed(task: tuple[str, Shape, ForwardConfiguration, str]) -> dict[str, Any]:
    """In the candidate's process: its times, the rule's and torch's, interleaved."""
    name, shape, configuration, mode = task
    device = open_device(mode)
    sets = device.input_sets(shape, DTYPE)
    stock = [forwards(*tensors, flex=False, only=(STOCK, "SDPA flash", "SDPA cuDNN")) for tensors in sets]
    calls: dict[str, list[Callable[[], object]]] = {key: [made[key] for made in stock] for key in stock[0]}
    rule = forward_configuration(DTYPE, shape.dim, shape.dim, shape.queries, shape.keys, device.target)
    for key, chosen in ((name, configuration), (CHOSEN, rule)):
        calls[key] = [launcher(shape, chosen, tensors) for tensors in sets]
    times = interleaved({key: device.replay(made) for key, made in calls.items()}, device.rounds)
    return row_of(shape, name, times) | {"default_milliseconds": float(np.median(times[CHOSEN])) * 1e3}
