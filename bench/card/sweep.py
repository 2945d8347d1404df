"""The stage `sweep`: bench/sweeps.py, a sweep of every head against a researcher's loop, in a separate program."""

import json
import signal
import tempfile
from pathlib import Path

from card.device import Card, program, python
from card.stage import Report


def run(report: Report, device: Card) -> None:
    report.wait_for_turn()
    with tempfile.TemporaryDirectory() as folder:
        command = python("bench/sweeps.py", *device.sweep(), "--out", folder)
        with program(command, device, report.left()) as process:
            assert process.stdout is not None
            for line in process.stdout:
                report.facts.setdefault("output", []).append(line.rstrip())
                report.tell(line.rstrip()[:160])
            code = process.wait()
        for file in Path(folder).glob("*.json"):
            result = json.loads(file.read_text())
            report.rows += result.pop("rows")
            report.facts["result"] = result
    if code:
        raise RuntimeError(
            f"{' '.join(command[1:])} ended with code {code}" + " (out of time)" * (code == -signal.SIGKILL)
        )
