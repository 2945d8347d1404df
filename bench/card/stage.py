"""A stage: a separate process, which reports its results as they come.

    python -m card.stage NAME --out DIR --mode measure|rehearse|compile

is what `supervise` starts. A stage may prepare (compile) before its turn comes: `Report.wait_for_turn` returns when the
supervisor has written until when it may, in the system's monotonic seconds. Where it is only to compile, it ends there.
"""

import argparse
import ctypes
import importlib
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PARENT_DIES = 1  # PR_SET_PDEATHSIG


def die_with_parent() -> None:
    """Nothing goes on measuring when the command that started it was killed."""
    ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGKILL)


class Report:
    """The results of a stage: lines on the standard output and rows of gpu-STAGE.json, both at once.

    Attributes:
        facts: everything beside the rows in the file.
        rows: one for each result.
    """

    def __init__(self, name: str, out: Path, mode: str) -> None:
        self.name, self.out, self.path, self.mode = name, out, out / f"gpu-{name}.json", mode
        self.facts: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self._started, self._end = time.monotonic(), float("inf")
        # only a stage has the package on its path
        from headscope.bench import records

        self._software, self._write = records.software(), records.write

    def wait_for_turn(self) -> None:
        """Until the supervisor says that the stage may use the card, and for how long."""
        self.facts["seconds_prepared"] = round(time.monotonic() - self._started, 1)
        line = sys.stdin.readline()
        if not line:
            raise SystemExit("the supervisor is gone")
        self._started, self._end = time.monotonic(), float(line)
        if self.mode == "compile":
            self.write("compiled")
            raise SystemExit(0)

    def left(self) -> float:
        """Seconds that remain to the stage; infinite before its turn."""
        return self._end - time.monotonic()

    def tell(self, text: str, **row: Any) -> None:
        """A result: a line, and a row if there is one."""
        if row:
            self.rows.append(row)
        # first, so that what was read on the screen is in the file as well
        self.write("running")
        print(f"{self.name:9} {text}", flush=True)

    def write(self, state: str) -> None:
        record = {
            "what": f"GPU, {self.name}",
            "mode": self.mode,
            "state": state,
            "seconds": round(time.monotonic() - self._started, 1),
            **self._software,
            **self.facts,
            "rows": self.rows,
        }
        self._write(self.path, record)


def _own_package() -> None:
    """An editable install of another checkout stands before PYTHONPATH."""
    import headscope
    import headscope_kernels

    for package in (headscope, headscope_kernels):
        file = Path(package.__file__ or "").resolve()
        if ROOT not in file.parents and "site-packages" not in file.parts:
            raise RuntimeError(f"{package.__name__} comes from {file}, expected {ROOT}: nothing is measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mode", choices=("measure", "rehearse", "compile"), required=True)
    options = parser.parse_args()
    die_with_parent()
    report = Report(options.name, options.out, options.mode)
    try:
        from card.device import open_device

        _own_package()
        device = open_device(options.mode)
        report.facts["device"] = device.name()
        importlib.import_module(f"card.{options.name}").run(report, device)
    except Exception as error:
        traceback.print_exc()
        report.write(f"failed: {type(error).__name__}: {str(error)[:500]}")
        sys.stderr.flush()
        raise SystemExit(1) from None
    report.write("done")


if __name__ == "__main__":
    main()
