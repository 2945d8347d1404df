"""Slurm arrays, through submitit. The run directory must be one that all nodes see."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headscope._extras import require
from headscope._signals import Once
from headscope.sweep.plan.units import JOBS, Unit
from headscope.sweep.store.store import RunStore
from headscope.sweep.work.executors.member import take_part
from headscope.sweep.work.progress import Progress
from headscope.sweep.work.worker import WorkOrder

LOOK_EVERY = 2.0
# how long jobs may take to end once one of them has found that nothing is left
GRACE = 10.0
# a job's time limit, in minutes, and how often one that reaches it goes back to the queue and on
TIME_LIMIT = 240
RENEWALS = 1000
FINISHED, STOPPED = "finished", "stopped"


def run_slurm(
    order: WorkOrder,
    workers: int,
    units: tuple[Unit, ...],
    progress: Progress,
    store: RunStore,
    *,
    cluster: str = "slurm",
    parameters: dict[str, Any] | None = None,
) -> None:
    """Work on a run with an array of so many jobs, until one of them has found that nothing is left, or all have ended.

    What a job that was cancelled or died leaves, the others do. One that reaches its time limit, or is preempted, goes
    back to the queue. Jobs that still wait there when all is done are cancelled, and all of them when this is stopped.
    What failed, and whom a job waits for, its log in the run directory says.

    Args:
        cluster: as submitit names it: "slurm", or "local" for processes of this machine.
        parameters: of `submitit.AutoExecutor.update_parameters`, such as timeout_min, slurm_partition, gpus_per_node.

    Raises:
        ImportError: submitit isn't installed.
        RuntimeError: every job failed.
    """
    submitit = require("submitit", "slurm")
    remote = cluster == "slurm"
    watch = _Watch(store, units, progress)
    folder = Path(order.out) / JOBS
    executor = submitit.AutoExecutor(folder, cluster, **({"slurm_max_num_timeout": RENEWALS} if remote else {}))
    given = {"name": "headscope", "timeout_min": TIME_LIMIT, **(parameters or {})}
    if order.config.device.startswith("cuda"):
        given.setdefault("gpus_per_node", 1)
    if order.execution.threads:
        given.setdefault("cpus_per_task", order.execution.threads)
    if remote:
        given.setdefault("slurm_array_parallelism", workers)
    executor.update_parameters(**given)
    jobs = executor.map_array(_Job(), [order] * workers)
    try:
        done = False
        while not done:
            time.sleep(LOOK_EVERY if remote else 0.2)
            watch.look()
            done = any(map(_finished, jobs)) or all(job.done() for job in jobs)
        until = time.monotonic() + GRACE
        while any(map(_finished, jobs)) and not all(map(_has_result, jobs)) and time.monotonic() < until:
            time.sleep(0.2)
    finally:
        for job in jobs:
            if not job.done():
                job.cancel(check=False)
    errors = [job.exception() for job in jobs if _has_result(job)]
    if errors and all(error is not None for error in errors):
        raise RuntimeError(f"workers: every job failed, the first of them with:\n{errors[0]}")


class _Watch:
    """Progress of jobs elsewhere, read from the run directory."""

    def __init__(self, store: RunStore, units: tuple[Unit, ...], progress: Progress) -> None:
        self._store = store
        self._by_file = {(unit.kind, unit.id): unit for unit in units}
        self._progress = progress
        self._seen = store.listed()

    def look(self) -> None:
        new = {key for key in self._store.listed() - self._seen if key in self._by_file}
        self._seen |= new
        for key in new:
            unit = self._by_file[key]
            self._progress.advance(unit.forwards)
            self._progress.finished(unit)


def _has_result(job: Any) -> bool:
    """True if a job has said how it ended; one that was killed or never began doesn't."""
    return job.paths.result_pickle.exists()


def _finished(job: Any) -> bool:
    """True if a job has found that nothing is left to do."""
    return _has_result(job) and job.exception() is None and job.result() == FINISHED


class _Job:
    """The work of a job of the array. When Slurm asks it to end, it puts its work away first."""

    def __call__(self, order: WorkOrder) -> str:
        import torch
        from submitit.core.job_environment import JobEnvironment

        # not every cluster binds a job to its CPUs, and torch would use all that it sees
        if order.execution.threads is None and "SLURM_CPUS_ON_NODE" in os.environ:
            torch.set_num_threads(int(os.environ["SLURM_CPUS_ON_NODE"]))
        # sent some time before a job's limit, and to one that is preempted; submitit has set a handler, which sends
        # the job back to the queue
        warning = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
        signal.signal(warning, _then_stop(signal.getsignal(warning), warning))
        # sent by scancel, and some time before a kill
        signal.signal(signal.SIGTERM, _then_stop(None, warning))
        try:
            with Once().kept():
                take_part(order)
        except KeyboardInterrupt:
            return STOPPED
        return FINISHED

    def checkpoint(self, order: WorkOrder) -> Any:
        """The job as it comes back from the queue: submitit asks for it."""
        return require("submitit", "slurm").helpers.DelayedSubmission(self, order)


def _then_stop(handler: Any, warning: int) -> Callable[[int, Any], None]:
    """A signal handler that does what another does and ends the work as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        # nothing may disturb the end
        for other in (signal.SIGTERM, warning):
            signal.signal(other, signal.SIG_IGN)
        try:
            if callable(handler):
                handler(number, frame)
        except Exception as error:
            # it must not be taken for a unit's
            raise KeyboardInterrupt from error
        raise KeyboardInterrupt

    return stop
