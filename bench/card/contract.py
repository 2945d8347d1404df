"""The stage `contract`: the tests of the operator's contract and gradients on the card, and those that need one.

A test that loses the card ends its process, not the others' (pytest_lines.py). It is then run once more by itself, and
only fails if it does so again.
"""

import json
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from card.device import Card, Tests, open_device, program, python
from card.pytest_lines import MARK
from card.stage import Report
from card.workers import in_processes, is_broken

# between lines that say how many have passed
TELL_EVERY = 10.0
CRASHED = "crashed while running"


def run(report: Report, device: Card) -> None:
    report.wait_for_turn()
    with tempfile.TemporaryDirectory() as folder:
        run_tests(report, device, device.tests(Path(folder)), report.left())


def run_tests(report: Report, device: Card, tests: Tests, seconds: float) -> None:
    """Run tests, and report which fail."""
    outcomes = {"passed": 0, "failed": 0, "skipped": 0, "lost the card": 0}
    report.facts.setdefault("outcomes", []).append(outcomes)
    lost: dict[str, str] = {}
    failed: set[str] = set()
    reported_at, ends = time.monotonic(), time.monotonic() + seconds
    # the rest of the time is for those that lost the card
    for test in outcomes_of(device, tests, 0.75 * seconds, device.processes):
        name, reason = test["test"], test["reason"]
        if CRASHED in reason and (name in lost or name in failed):
            continue
        if test["outcome"] == "failed" and (is_broken(reason) or CRASHED in reason):
            lost[name] = reason
            outcomes["lost the card"] += 1
            report.tell(f"lost the card: {short(name)}: {first_line(reason)}", test=name, right=None, reason=reason)
        elif test["outcome"] == "failed":
            failed.add(name)
            outcomes["failed"] += 1
            row = {"test": name, "right": False, "reason": reason}
            report.tell(f"FAILED {short(name)}: {first_line(reason)}", **row)
        else:
            outcomes[test["outcome"]] += 1
        if time.monotonic() - reported_at > TELL_EVERY:
            reported_at = time.monotonic()
            report.tell(f"so far {outcomes}")
    report.facts["output"] = _last.copy()
    report.tell(f"all: {outcomes}; pytest: {_last[-1] if _last else 'nothing'}")
    if not any(outcomes.values()):
        raise RuntimeError("pytest reported no test: " + " / ".join(_last[-12:]))
    again(report, device, tests, lost, ends)


def again(report: Report, device: Card, tests: Tests, lost: dict[str, str], ends: float) -> None:
    """Run each of the lost tests in a fresh process."""
    tasks = [(name, tests, report.mode) for name in lost]
    count = max(1, device.processes // 2)
    for answer in in_processes(alone, tasks, count=count, seconds_each=90.0, left=lambda: ends - time.monotonic()):
        name = answer.task[0]
        if answer.error:
            report.tell(f"not run again: {short(name)}: {answer.error}", test=name, right=None, reason=lost[name])
        elif answer.result:
            text = f"FAILED, alone as well: {short(name)}: {first_line(answer.result)}"
            report.tell(text, test=name, right=False, reason=answer.result)
        else:
            report.tell(f"passes alone: {short(name)}", test=name, right=True, reason=lost[name])


def alone(task: tuple[str, Tests, str]) -> str:
    """The reason why a test fails in a separate process; empty if it passes."""
    name, tests, mode = task
    for test in outcomes_of(open_device(mode), replace(tests, files=(name,)), 80.0, 0):
        if test["outcome"] == "failed":
            return test["reason"]
        # set up and torn down as well
        if test["when"] == "call":
            return ""
    return "its process ended without a word: " + " / ".join(_last[-5:])


# the last lines of the output that aren't of tests
_last: list[str] = []


def outcomes_of(device: Card, tests: Tests, seconds: float, processes: int) -> Iterator[dict[str, Any]]:
    """Every test's outcome as pytest reports it, until the time is over."""
    command = python(
        "-m", "pytest", "-q", "--tb=short", "-m", tests.marker, "-n", str(processes), "-p", "card.pytest_lines"
    )
    # pyproject.toml makes errors of warnings, some of which are torch's at first use
    command += ["-W", "default", "--max-worker-restart", "500", "-p", "no:cacheprovider", *tests.files]
    _last.clear()
    with program(command, device, seconds, folder=tests.root) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
            elif line.strip(" .\n"):
                _last.append(line.rstrip()[:300])
                del _last[:-60]
        if process.wait() == -signal.SIGKILL:
            _last.append("cut off")


def short(name: str) -> str:
    return name.rpartition("/")[2]


def first_line(reason: str) -> str:
    return (reason.strip().splitlines() or [""])[0][:240]
