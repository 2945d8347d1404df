"""A sweep of every head of the bundled model against the loop a researcher would write, on the same work in one run.

    python bench/sweeps.py [--device cpu] [--rounds 5] [--out bench/results]

The loop: stock diffusers with torch's SDPA, one edit per forward, a head removed by zeroing its slice before the output
projection, at the batch of images that is fastest for it (tried first). headscope: the same edits as rows of a batch,
with each of its parts taken away in turn. Contenders are interleaved round by round, so that a busy machine slows all
of them; a speed-up is the median over rounds, with its quartiles. Numbers are checked first: wrong ones stop the run.
"""

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from headscope._machine import device_name, versions
from headscope.sweep import Execution, SweepConfig
from headscope.sweep import plan as kinds
from headscope.sweep.executors.member import Silent
from headscope.sweep.worker import Opened, work

TIMESTEP = 500
ITEMS = 4
LOOP_BATCHES = (16, 32, 64)
TOLERANCE = 1e-5
VARIANTS = {
    "headscope": Execution(),
    "headscope without sharing": Execution(share=False),
    "headscope without channels_last": Execution(),
    "headscope with neither": Execution(share=False),
}
# these leave images as they lie
CONTIGUOUS = ("headscope without channels_last", "headscope with neither")


class Loop:
    """One edit per forward, as one would write it."""

    def __init__(self, device: str) -> None:
        self.opened = Opened(configuration(device, channels_last=False), Execution())
        self.task = self.opened.task

    def losses(self, inputs: Any, site: Any, head: int) -> torch.Tensor:
        width = slice(head * site.head_dim, (head + 1) * site.head_dim)

        def zero(module, args):
            hidden = args[0].clone()
            hidden[..., width] = 0
            return (hidden, *args[1:])

        projection = self.task.denoiser.get_submodule(site.name).to_out[0]
        handle = projection.register_forward_pre_hook(zero)
        try:
            return self.task.loss(inputs)
        finally:
            handle.remove()

    def inputs(self, batch: int) -> Any:
        items = self.opened.groups[0].swept
        chosen = [items[index % len(items)] for index in range(batch)]
        return self.task.noisy_inputs(self.task.prepare(chosen), TIMESTEP)

    def edits_per_second(self, batch: int) -> float:
        """One head of every site: heads of a site take the same time."""
        inputs = self.inputs(batch)
        started = time.perf_counter()
        with torch.inference_mode():
            for site in self.opened.scope.sites:
                self.losses(inputs, site, 0)
        synchronise(self.opened.config.device)
        return batch * len(self.opened.scope.sites) / (time.perf_counter() - started)


class Engine:
    """One unit of ablations, computed and kept in memory."""

    def __init__(self, config: SweepConfig, execution: Execution) -> None:
        self.opened = Opened(config, execution)
        self.folder = tempfile.TemporaryDirectory()
        store = self.opened.store(Path(self.folder.name) / "run")
        self.runner = self.opened.runner(store)
        self.unit = next(unit for unit in self.opened.plan.units if unit.kind == kinds.ABLATE)
        self.tables: list[Any] = []
        self.runner.store.write_table = lambda kind, unit, table: self.tables.append(table)

    def edits_per_second(self) -> float:
        started = time.perf_counter()
        self.runner.run(self.unit, lambda forwards: None)
        synchronise(self.opened.config.device)
        return len(self.unit.items) * len(self.opened.plan.heads) / (time.perf_counter() - started)


def configuration(device: str, channels_last: bool | None = None) -> SweepConfig:
    return SweepConfig(
        groups=("faces",),
        splits=("confirm",),
        items=ITEMS,
        timesteps=(TIMESTEP,),
        observe=False,
        fills=("zero",),
        device=device,
        channels_last=channels_last,
    )


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def check(loop: Loop, engines: dict[str, Engine]) -> float:
    """The largest relative difference of any head's loss from the loop's; stops the run where it is too large."""
    inputs = loop.inputs(ITEMS)
    expected = {}
    with torch.inference_mode():
        for site in loop.opened.scope.sites:
            for head in range(site.heads):
                expected[site.name, head] = loop.losses(inputs, site, head).cpu().numpy()
    worst = 0.0
    for name, engine in engines.items():
        engine.edits_per_second()
        table = engine.tables.pop().to_pydict()
        found: dict[tuple[str, int], list[float]] = {}
        for site, head, edited in zip(table["site"], table["head"], table["edited"], strict=True):
            found.setdefault((site, head), []).append(edited)
        for key, losses in expected.items():
            error = float(np.abs(np.array(found[key]) / losses - 1).max())
            if not error <= TOLERANCE:
                raise SystemExit(f"{name}: head {key} is off by {error:.2g}: no speeds are reported")
            worst = max(worst, error)
    return worst


def overhead(device: str) -> float:
    """The share of a sweep's time, with claims and commits to disk, that isn't spent in the denoiser's forward."""
    opened = Opened(configuration(device), Execution())
    inside = 0.0
    predict = opened.task.predict

    def timed(inputs):
        nonlocal inside
        started = time.perf_counter()
        answer = predict(inputs)
        synchronise(device)
        inside += time.perf_counter() - started
        return answer

    with tempfile.TemporaryDirectory() as folder:
        runner = opened.runner(opened.store(Path(folder) / "run"))
        unit = opened.plan.units[0]
        with torch.inference_mode():
            inputs = opened.task.noisy_inputs(opened.task.prepare(runner.items(unit)), TIMESTEP)
        # learnt once for a whole run
        runner._learned(inputs)
        opened.task.predict = timed
        started = time.perf_counter()
        work(runner, "", Silent())
        return 1 - inside / (time.perf_counter() - started)


def best_batch(loop: Loop) -> tuple[int, dict[int, float]]:
    """The number of images at which the loop is fastest, and its edits a second at each."""
    speeds: dict[int, list[float]] = {batch: [] for batch in LOOP_BATCHES}
    for _ in range(2):
        for batch in LOOP_BATCHES:
            speeds[batch].append(loop.edits_per_second(batch))
    best = {batch: max(values) for batch, values in speeds.items()}
    return max(best, key=best.__getitem__), best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    loop = Loop(arguments.device)
    engines = {
        name: Engine(configuration(arguments.device, False if name in CONTIGUOUS else None), execution)
        for name, execution in VARIANTS.items()
    }
    worst = check(loop, engines)
    batch, batches = best_batch(loop)
    contenders: dict[str, Callable[[], float]] = {"the loop": lambda: loop.edits_per_second(batch)}
    contenders |= {name: engine.edits_per_second for name, engine in engines.items()}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, call in contenders.items():
            speeds[name].append(call())
    heads = len(loop.opened.plan.heads)
    forward_rate = np.median(speeds["the loop"])
    rows = []
    shown = Table("", "edits/s", "images/s", "forward-equivalents per item", "times the loop (quartiles)")
    for name, values in speeds.items():
        rate = np.array(values)
        ratio = rate / np.array(speeds["the loop"])
        quartiles = [float(value) for value in np.quantile(ratio, (0.25, 0.5, 0.75))]
        row = {
            "contender": name,
            "edits_per_second": float(np.median(rate)),
            # an image is done when all of its heads are
            "images_per_second": float(np.median(rate) / heads),
            "forward_equivalents_per_item": float(heads * forward_rate / np.median(rate)),
            "times_the_loop": dict(zip(("p25", "p50", "p75"), quartiles, strict=True)),
        }
        rows.append(row)
        shown.add_row(
            name,
            f"{row['edits_per_second']:.1f}",
            f"{row['images_per_second']:.2f}",
            f"{row['forward_equivalents_per_item']:.1f}",
            "{1:.2f} ({0:.2f} to {2:.2f})".format(*quartiles),
        )
    result = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(arguments.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "model": "builtin",
        "dtype": "float32",
        "edits": heads,
        "items": ITEMS,
        "rows_at_once": engines["headscope"].runner.rows.most,
        "loop_batch": batch,
        "loop_edits_per_second_by_batch": batches,
        "largest_relative_difference": worst,
        "overhead_share": overhead(arguments.device),
        "rounds": arguments.rounds,
        "rows": rows,
    }
    console = Console()
    console.print(shown)
    console.print(
        f"the loop's best batch is {batch} images; largest relative difference of a loss {worst:.1e};"
        f" {result['overhead_share']:.1%} of a unit's time is outside of the denoiser"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"sweeps-{arguments.device.partition(':')[0]}-float32.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written: {file}")


if __name__ == "__main__":
    main()
