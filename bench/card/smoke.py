"""The stage `smoke`: everything that the kernels do once, each against float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from card.ahead import compile_ahead
from card.device import Card, device_of, open_device
from card.stage import Report
from card.workers import in_processes
from contract import CASES, Case, Inputs, Truth, make_inputs, truth
from gradients import gradients_of
from headscope.ops import AttentionResult, Distance, GroupEntropy, GroupMass, attention
from ops.fuzz import bound, ratio

HALF, FLOAT = torch.float16, torch.float32
EVERY_EDIT = next(case for case in CASES if case.name == "every_edit")


def _case(name: str, *shape: int, **changes: Any) -> Case:
    return dataclasses.replace(CASES[0], name=name, shape=shape, **changes)


@dataclasses.dataclass(frozen=True)
class Check:
    """One call: a case of the contract, a dtype, the statistics asked for, and how it is made."""

    case: Case
    dtype: torch.dtype = HALF
    statistics: tuple[str, ...] = ("entropy",)
    how: str = "forward"


CHECKS = {
    "forward, d 64": Check(_case("forward_64", 2, 8, 8, 517, 517, 64, 64)),
    "forward, d 128": Check(_case("forward_128", 1, 8, 8, 300, 300, 128, 128)),
    "forward, d 40": Check(_case("forward_40", 2, 8, 8, 300, 300, 40, 40)),
    "forward, d 80": Check(_case("forward_80", 2, 8, 8, 300, 300, 80, 80)),
    "forward, 77 keys": Check(_case("forward_77", 2, 8, 8, 300, 77, 40, 40)),
    "forward, float32": Check(_case("forward_float32", 1, 8, 8, 300, 300, 64, 64), FLOAT),
    "every row statistic": Check(
        _case("statistics", 2, 4, 4, 300, 300, 64, 64),
        statistics=("entropy", "logsumexp", "max_logit", "max_prob", "collision_entropy", "distance"),
    ),
    "key mass": Check(_case("key_mass", 2, 4, 4, 300, 300, 64, 64), statistics=("key_mass",)),
    "groups": Check(_case("groups", 2, 4, 4, 300, 300, 64, 64, groups=5), statistics=("group_mass", "group_entropy")),
    "groups, 77 keys": Check(_case("groups_77", 2, 4, 4, 300, 77, 40, 40, groups=5), statistics=("group_mass",)),
    "every edit": Check(EVERY_EDIT, statistics=("entropy", "key_mass", "group_mass")),
    "every edit, float32": Check(EVERY_EDIT, FLOAT, ("entropy", "key_mass", "group_mass")),
    "every edit, no statistics": Check(EVERY_EDIT, statistics=()),
    "backward, d 64": Check(
        _case("backward_64", 1, 8, 8, 300, 300, 64, 64, gate=lambda batch, heads: torch.rand(batch, heads)),
        how="backward",
    ),
    "backward, d 128": Check(_case("backward_128", 1, 8, 8, 300, 300, 128, 128), how="backward"),
    "backward, every edit": Check(EVERY_EDIT, how="backward"),
    "a CUDA graph": Check(_case("graph", 2, 8, 8, 300, 300, 64, 64), how="graph"),
}


def run(report: Report, device: Card) -> None:
    compile_ahead(report, device, [(call, (name, "cpu", report.mode)) for name in CHECKS])
    report.wait_for_turn()
    tasks = [(name, report.mode) for name in CHECKS]
    # a process each: one that loses its card must not take others' with it
    for answer in in_processes(check, tasks, count=device.processes, seconds_each=60.0, left=report.left):
        name = answer.task[0]
        if answer.error:
            report.tell(f"FAILED {name}: {answer.error[-300:]}", check=name, right=False, error=answer.error)
            continue
        ratios: dict[str, float] = answer.result
        # NaN is the worst
        worst = max(ratios, key=lambda key: (ratios[key] != ratios[key], ratios[key]))
        right = all(value <= 1 for value in ratios.values())
        wrong = {key: float(f"{value:.3g}") for key, value in ratios.items() if not value <= 1}
        text = f"right {name}: {worst} at {ratios[worst]:.2f} of its bound" if right else f"WRONG {name}: {wrong}"
        report.tell(text, check=name, right=right, error_over_bound=ratios)


def inputs_of(name: str, mode: str) -> Inputs:
    check, device = CHECKS[name], device_of(mode)
    batch, heads, kv_heads, queries, keys, *dims = check.case.shape
    shape = (batch, min(heads, device.tokens(heads)), kv_heads, device.tokens(queries), device.tokens(keys), *dims)
    return make_inputs(dataclasses.replace(check.case, shape=shape), check.dtype)


def call(name: str, place: str, mode: str) -> Any:
    """A check's call on a device, as it is compiled and as it is checked."""
    check, inputs = CHECKS[name], inputs_of(name, mode).to(place)
    if check.how == "backward":
        return gradients_of(inputs, "triton")
    return attend(inputs, check.statistics)


def attend(inputs: Inputs, names: tuple[str, ...]) -> AttentionResult:
    assert inputs.groups is not None
    objects = {
        "distance": Distance((1, inputs.query.shape[2]), (1, inputs.key.shape[2])),
        "group_mass": GroupMass(inputs.groups, inputs.group_count),
        "group_entropy": GroupEntropy(inputs.groups, inputs.group_count),
    }
    statistics = [objects.get(name, name) for name in names]
    edit, options = inputs.edit(), inputs.options
    return attention(
        inputs.query, inputs.key, inputs.value, edit=edit, statistics=statistics, backend="triton", **options
    )


def check(task: tuple[str, str]) -> dict[str, float]:
    """The largest error of each result over what the contract allows; of gradients, over what is stated below."""
    name, mode = task
    device = open_device(mode)
    how: dict[str, Callable[..., dict[str, float]]] = {"forward": _forward, "backward": _backward, "graph": _graph}
    return how[CHECKS[name].how](name, device, mode)


def _forward(name: str, device: Card, mode: str) -> dict[str, float]:
    inputs = inputs_of(name, mode)
    return _ratios(call(name, device.torch_device, mode), truth(inputs), inputs.query.dtype)


def _ratios(result: AttentionResult, expected: Truth, dtype: torch.dtype) -> dict[str, float]:
    found = {"output": ratio(result.output.cpu(), expected.output, expected.output_tolerance)}
    for name, values in result.statistics.items():
        found[name] = ratio(values.cpu(), expected.statistics[name], bound(expected, name, dtype))
    return found


def _backward(name: str, device: Card, mode: str) -> dict[str, float]:
    """Over 16 roundings of the largest gradient: cotangents and probabilities are rounded before their products."""
    inputs = inputs_of(name, mode).to(device.torch_device)
    expected, got = gradients_of(inputs, "reference"), gradients_of(inputs, "triton")
    unit = torch.finfo(inputs.query.dtype).eps
    found = {}
    for leaf, gradient in expected.items():
        allowed = (16 * unit + 1e-5) * max(1.0, float(gradient.abs().max()))
        found[leaf] = ratio(got[leaf].cpu(), gradient.double().cpu(), torch.tensor(allowed, dtype=torch.float64))
    return found


def _graph(name: str, device: Card, mode: str) -> dict[str, float]:
    """Replayed on other numbers than it was captured with."""
    inputs = inputs_of(name, mode)
    expected = truth(inputs)
    moved = inputs.to(device.torch_device)
    query = moved.query.clone()
    # on a CPU moving is the same tensor
    moved = dataclasses.replace(moved, query=torch.zeros_like(query))
    attend(moved, CHECKS[name].statistics)
    device.synchronise()
    results: list[AttentionResult] = []
    replay = device.graph(lambda: results.append(attend(moved, CHECKS[name].statistics)))
    moved.query.copy_(query)
    replay()
    device.synchronise()
    return _ratios(results[-1], expected, inputs.query.dtype)
