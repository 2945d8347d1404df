"""Running a sweep: opened, planned, handed to whoever works on it, and picked up where it stopped."""

import gc
import shutil
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from headscope._files import local_path
from headscope._signals import terminable
from headscope.counter import whole
from headscope.sweep.compute.opened import Execution, Opened
from headscope.sweep.plan.config import SweepConfig
from headscope.sweep.plan.in_memory import borrowed
from headscope.sweep.plan.units import CLAIMS, Unit
from headscope.sweep.store.run import Run
from headscope.sweep.store.store import RunStore, damaged_failures, unit_files
from headscope.sweep.work.executors import EXECUTORS
from headscope.sweep.work.executors.processes import run_processes
from headscope.sweep.work.executors.ray import run_ray
from headscope.sweep.work.executors.slurm import run_slurm
from headscope.sweep.work.progress import Progress
from headscope.sweep.work.worker import WorkOrder, work


class SweepFailed(RuntimeError):
    """Some units failed too often; all others are finished."""


@dataclass(frozen=True)
class Workers:
    """The processes that work on a sweep.

    Attributes:
        executor: "local" (this process), "processes" (of this machine), "ray" or "slurm".
        count: how many processes.
        address: of a Ray cluster; None for this machine.
        cluster: of submitit, "slurm" or "local".
        parameters: of submitit's executor, such as timeout_min or slurm_partition.
    """

    executor: str = "local"
    count: int = 1
    address: str | None = None
    cluster: str = "slurm"
    parameters: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ValueError(f"executor: got {self.executor!r}, expected one of {', '.join(EXECUTORS)}")
        # frozen for everybody else
        object.__setattr__(self, "count", whole("workers", self.count, least=1))
        if self.executor == "local" and self.count != 1:
            raise ValueError(f"workers: got {self.count} in this process, expected 1, or another executor")
        # what nobody would look at was meant for another
        if self.address is not None and self.executor != "ray":
            raise ValueError(f"address: got {self.address!r} with the executor {self.executor}, expected it with ray")
        if self.parameters and self.executor != "slurm":
            raise ValueError(
                f"job: got {', '.join(self.parameters)} with the executor {self.executor}, expected them with slurm"
            )


def run_sweep(
    config: SweepConfig,
    out: str | Path,
    *,
    batch: int | None = None,
    execution: Execution | None = None,
    workers: Workers | None = None,
    progress: bool = True,
    console: Console | None = None,
    title: str = "sweep",
    pipeline: Any = None,
) -> Run:
    """Run a sweep, or what is left of it.

    Every unit is committed as it finishes. A run that was killed goes on from there when the same configuration is
    run into the same directory, and gives the same table. Several processes may work on one directory at once.

    In the main thread of a program without a handler of SIGTERM, that signal ends the work as Ctrl-C does: what was
    computed is written, and SystemExit(143) raised.

    Args:
        config: what to do.
        out: the run directory; new, or one of the same configuration.
        batch: rows that pass through the denoiser at once; None measures how many fit.
        execution: further settings that change the speed alone.
        workers: who works on it; None for this process.
        progress: show progress: a bar on a terminal, a line of JSON every 15 seconds elsewhere.
        console: where to, and where groups are named that have fewer items than a sweep takes by itself.
        pipeline: the model where it is one in memory, for this process only.

    Raises:
        ValueError: the configuration can't be run, or the directory holds another one; before any work starts.
        SweepFailed: some units failed three times; what they said is in the directory's failures/.
        DiskFull: results can't be written.
    """
    path = local_path("out", out)
    execution = execution or Execution()
    execution = replace(execution, rows=batch if batch is not None else execution.rows)
    workers = workers or Workers()
    if pipeline is not None and workers.executor != "local":
        raise ValueError(f"executor: got {workers.executor!r} with a model in memory, expected local, or a directory")
    shown = partial(Progress, title, enabled=progress, console=console)
    with terminable(), borrowed(pipeline) if pipeline is not None else nullcontext():
        _run(config, path, execution, workers, shown, pipeline, console or Console(stderr=True))
    return Run.open(path)


def _run(
    config: SweepConfig,
    path: Path,
    execution: Execution,
    workers: Workers,
    progress: Callable[[tuple[Unit, ...]], Progress],
    pipeline: Any,
    console: Console,
) -> None:
    opened = Opened(config, execution, pipeline)
    store = opened.store(path)
    # said without progress, too: it is about what the numbers are of
    for note in opened.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    units = opened.plan.units
    session = uuid.uuid4().hex
    with progress(units) as shown:
        _look_through(store, units, shown)
        if workers.executor == "local":
            work(opened.context(store), session, shown)
        else:
            order = WorkOrder(config.absolute(), str(path.resolve()), execution, session)
            if execution.rows is None:
                # measured here, where nobody else takes memory
                opened.fit(store)
            # the workers have a model each, this process needs none
            del opened
            _free()
            _hand_over(order, workers, store, units, shown)
    _conclude(store, units)


def _look_through(store: RunStore, units: tuple[Unit, ...], shown: Progress) -> None:
    """Count what is finished already, and say what is damaged."""
    if store.rebuilt:
        shown.say(f"{store.rebuilt}; written anew from the plan, results that are whole are kept")
    for file in damaged_failures(store.path):
        shown.say(f"{str(file)!r} is damaged; what failed there counts as untried")
    listed = store.listed()
    for unit in units:
        if (unit.kind, unit.id) in listed:
            if store.has(unit.kind, unit.id):
                shown.already(unit)
            else:
                file = str(unit_files(store.path, unit.kind, unit.id)[0])
                shown.say(f"{file!r} is damaged or lacks its images; computed anew")


def _hand_over(order: WorkOrder, workers: Workers, store: RunStore, units: tuple[Unit, ...], shown: Progress) -> None:
    if workers.executor == "processes":
        run_processes(order, workers.count, units, shown)
    elif workers.executor == "ray":
        run_ray(order, workers.count, units, shown, workers.address)
    else:
        run_slurm(order, workers.count, units, shown, store, cluster=workers.cluster, parameters=workers.parameters)


def _conclude(store: RunStore, units: tuple[Unit, ...]) -> None:
    """Raises SweepFailed where units are left."""
    left = [unit for unit in units if not store.has(unit.kind, unit.id)]
    if not left:
        shutil.rmtree(store.path / CLAIMS, ignore_errors=True)
        return
    failures = store.failures()
    failed = [unit for unit in left if unit.id in failures]
    if not failed:
        raise RuntimeError(f"workers: {len(left)} units are left and nobody works on them; run the same command again")
    last = failures[failed[0].id][-1]["error"].strip().splitlines()[-1]
    waiting = f", {len(left) - len(failed)} that need them wait" if len(left) > len(failed) else ""
    raise SweepFailed(
        f"{len(failed)} of {len(units)} units failed{waiting}; the first: {last}."
        f" See {store.path / 'failures'}, and try again with: headscope sweep retry {store.path}"
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
