"""Whether a long sweep's memory stays flat: resident memory after every unit of the bundled model.

python bench/sweep_memory.py [--minutes 5] [--out bench/results]
"""

import argparse
import contextlib
import datetime
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from headscope._machine import device_name, versions
from headscope.sweep import Execution, SweepConfig
from headscope.sweep.compute.opened import Opened
from headscope.sweep.work.executors.member import Silent
from headscope.sweep.work.worker import work

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


class Over(BaseException):
    """The time is up."""


class Sampling(Silent):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.until = time.monotonic() + seconds
        self.samples: list[float] = []

    def finished(self, unit) -> None:
        self.samples.append(resident_megabytes())
        if time.monotonic() > self.until:
            raise Over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    config = SweepConfig(
        # at many timesteps, so that the time is up before the work is done
        groups=("faces",),
        bands=200,
        observe=False,
        fills=("mean", "zero"),
        scores=("loss", "distance"),
    )
    opened = Opened(config, Execution())
    sampling = Sampling(60 * arguments.minutes)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Over):
        work(opened.context(opened.store(Path(folder) / "run")), "", sampling)
    seconds = time.monotonic() - began
    samples = np.array(sampling.samples)
    # after the first tenth, in which kinds of unit run for the first time
    settled = samples[len(samples) // 10 :]
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0]) if len(settled) > 1 else 0.0
    result = {
        "date": datetime.date.today().isoformat(),
        "device": device_name("cpu"),
        "versions": versions(),
        "minutes": round(seconds / 60, 2),
        "units": len(samples),
        "megabytes": {name: float(np.quantile(settled, q)) for name, q in (("p0", 0), ("p50", 0.5), ("p100", 1))},
        "megabytes_per_100_units": 100 * slope,
        "samples": [round(value, 1) for value in samples],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "sweep-memory.json"
    file.write_text(json.dumps(result) + "\n")
    Console().print({name: value for name, value in result.items() if name not in ("samples", "versions")}, str(file))


if __name__ == "__main__":
    main()
