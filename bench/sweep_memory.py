"""How a long sweep's memory grows: resident memory after every unit of work of the bundled UNet.

    python bench/sweep_memory.py [--minutes 5] [--out bench/results]

There is no peer: the memory is expected to stay flat once each kind of unit has run.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from headscope.bench import records
from headscope.bench.memory import resident_bytes
from headscope.sweep import Execution, SweepConfig
from headscope.sweep.compute.opened import Opened
from headscope.sweep.work.executors.member import Silent
from headscope.sweep.work.worker import work


class Over(BaseException):
    """The time is up."""


class Sampling(Silent):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.until = time.monotonic() + seconds
        self.samples: list[float] = []

    def finished(self, unit) -> None:
        self.samples.append(resident_bytes() / 1e6)
        if time.monotonic() > self.until:
            raise Over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    config = SweepConfig(
        model="unet",
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
        **records.machine("cpu"),
        "minutes": round(seconds / 60, 2),
        "units": len(samples),
        "megabytes": {name: float(np.quantile(settled, q)) for name, q in (("p0", 0), ("p50", 0.5), ("p100", 1))},
        "megabytes_per_100_units": 100 * slope,
        "samples": [round(value, 1) for value in samples],
    }
    file = records.write(arguments.out / "sweep-memory.json", result)
    Console().print({name: value for name, value in result.items() if name not in ("samples", "versions")}, str(file))


if __name__ == "__main__":
    main()
