"""What the tables cost from which roles are found: features, and key masses at three timesteps, of so many images.

    python bench/roles.py [--images 400 4000] [--out bench/results] [--folder DIR]

Of the bundled model on a tied group and its control, half of the images of each, held out from training; one draw of
noise. Every number of images is measured in a process of its own, whose largest memory (ru_maxrss) holds torch's
libraries, too; how much of it the work takes is the difference to what was resident before it began. There is no peer:
the memory is expected to stay flat, and the time to grow as the number of images.
"""

import argparse
import multiprocessing
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from headscope.bench import records
from headscope.bench.memory import peak_resident_bytes, resident_bytes
from headscope.sweep import Execution, Run, SweepConfig
from headscope.sweep.compute.opened import Opened
from headscope.sweep.work.executors.member import Silent
from headscope.sweep.work.worker import work
from headscope.zoo import GROUPS

CHOSEN = ("tiled", "untiled")
SPLITS = ("discover", "confirm")
KINDS = ("features", "key_mass")
MEGABYTE = 1e6


class Sampling(Silent):
    """The process's memory after every unit of work, and when each kind was done."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[float] = []
        self.until: dict[str, float] = {}

    def finished(self, unit) -> None:
        self.samples.append(resident_bytes() / MEGABYTE)
        self.until[unit.kind] = time.perf_counter()


def measured(images: int, folder: str | None) -> dict[str, Any]:
    """Seconds, memory, rows and bytes of a run over so many images."""
    each = images // (len(CHOSEN) * len(SPLITS))
    # of every hundred images 20 are in each of these splits
    for name in CHOSEN:
        GROUPS[name] = partial(GROUPS[name], length=5 * each)
    config = SweepConfig(groups=CHOSEN, splits=SPLITS, items=each, observe=False, fills=(), kinds=KINDS)
    began = time.perf_counter()
    opened = Opened(config, Execution())
    sampling = Sampling()
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        path = Path(directory) / "run"
        context = opened.context(opened.store(path))
        ready, before = time.perf_counter(), resident_bytes() / MEGABYTE
        work(context, "", sampling)
        verification = Run.open(path).verify()
        assert verification.sound
        sizes = {kind: sum(file.stat().st_size for file in (path / kind).iterdir()) for kind in KINDS}
    samples = np.array(sampling.samples)
    # after the first tenth, in which kinds of unit run for the first time
    settled = samples[len(samples) // 10 :]
    ends = [ready, *(sampling.until[kind] for kind in KINDS)]
    return {
        "images": len(CHOSEN) * len(SPLITS) * each,
        "timesteps": len(opened.plan.timesteps),
        "forwards": sum(unit.forwards for unit in opened.plan.units),
        "seconds": {
            "open": round(ready - began, 2),
            **{kind: round(ends[index + 1] - ends[index], 2) for index, kind in enumerate(KINDS)},
        },
        "megabytes": {
            "before": round(before, 1),
            "p50": round(float(np.median(settled)), 1),
            "peak": round(peak_resident_bytes() / MEGABYTE, 1),
        },
        "megabytes_per_1000_images": round(1000 * float(settled[-1] - settled[0]) / images, 3),
        "rows": {kind: int(verification.rows[kind]) for kind in KINDS},
        "bytes": sizes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[400, 4000])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--folder", help="where the runs are written for the while")
    arguments = parser.parse_args()
    for images in arguments.images:
        if images < 4 or images % 4:
            parser.error(f"--images: got {images}, expected multiples of 4: two groups of two splits")
    rows = []
    for images in arguments.images:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measured, (images, arguments.folder)))
        Console().print(rows[-1])
    result = {
        **records.machine("cpu"),
        "model": SweepConfig(groups=CHOSEN).model,
        "groups": list(CHOSEN),
        "splits": list(SPLITS),
        "runs": rows,
    }
    Console().print(str(records.write(arguments.out / "roles-cpu-float32.json", result)))


if __name__ == "__main__":
    main()
