"""The stage `speed`: a forward with entropy and gate, beside everything that computes attention in torch.

Graph replays of many calls over inputs rotated beyond the L2 cache, contenders interleaved round by round; a ratio is
over torch's own choice, and over its fastest kernel, of the same round, with quartiles. What is timed is checked first,
on the same tensors. Then every candidate configuration (candidates.py), then FlexAttention, which compiles for long.
"""

from typing import cast

from torch import Tensor

from card import candidates
from card.ahead import binaries, compile_ahead
from card.calls import DTYPE, errors_of, launch, output_only, row_of
from card.device import Card, Replay, interleaved
from card.stage import Report
from card.workers import in_processes
from peers import FLEX, OURS, STOCK, Shape, forwards

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
    for name in times:
        row = row_of(shape, name, times) | {
            "part": "flex" if flex else "forward",
            "call": name,
            "host_microseconds": replays[name].host_seconds * 1e6,
            "clocks": {"before": clocks, "after": report.facts["clocks"]},
            "error_over_bound": errors if name == OURS else None,
        }
        report.tell(
            f"{shape!s:24} {name:26} {row['milliseconds'][1] * 1e3:9.1f} us {row['tflops_per_second']:5.0f} TF"
            f"  {row['speed_over_default_stock'][1]:.2f} of SDPA,"
            f" {row['speed_over_best_stock'][1]:.2f} of {row['best_stock']}; host {row['host_microseconds']:.0f} us",
            **row,
        )
