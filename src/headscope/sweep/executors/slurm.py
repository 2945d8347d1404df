"""Slurm arrays, through submitit. The run directory must be one that all nodes see."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from headscope._extras import require
from headscope.sweep.executors.member import Watch, take_part
from headscope.sweep.worker import WorkOrder

LOOK_EVERY = 5.0


def run_slurm(
    order: WorkOrder, workers: int, watch: Watch, *, cluster: str = "slurm", parameters: dict[str, Any] | None = None
) -> None:
    """Work on a run with an array of so many jobs, and wait until they have ended. What a job that was preempted or
    died leaves, the others do.

    Args:
        cluster: as submitit names it: "slurm", or "local" for processes of this machine.
        parameters: of `submitit.AutoExecutor.update_parameters`, such as timeout_min, slurm_partition, gpus_per_node.

    Raises:
        ImportError: submitit isn't installed.
        RuntimeError: every job failed.
    """
    submitit = require("submitit", "slurm")
    executor = submitit.AutoExecutor(folder=Path(order.out) / "jobs", cluster=cluster)
    given = {"name": "headscope", **(parameters or {})}
    if order.config.device.startswith("cuda"):
        given.setdefault("gpus_per_node", 1)
    if order.execution.threads:
        given.setdefault("cpus_per_task", order.execution.threads)
    if cluster == "slurm":
        given.setdefault("slurm_array_parallelism", workers)
    executor.update_parameters(**given)
    jobs = executor.map_array(take_part, [order] * workers)
    try:
        while not all(job.done() for job in jobs):
            time.sleep(LOOK_EVERY if cluster == "slurm" else 0.2)
            watch.look()
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    watch.look()
    errors = [error for error in (job.exception() for job in jobs) if error is not None]
    if len(errors) == len(jobs):
        raise RuntimeError(f"workers: every job failed, the first of them with:\n{errors[0]}")
