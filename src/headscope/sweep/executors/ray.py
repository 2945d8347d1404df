"""Ray Core actors, on this machine or on a cluster. The run directory must be one that all of its machines see."""

from __future__ import annotations

from typing import Any

from headscope._extras import require
from headscope.sweep.executors.member import Watch, take_part
from headscope.sweep.worker import TRIES, WorkOrder

LOOK_EVERY = 1.0


def run_ray(order: WorkOrder, workers: int, watch: Watch, address: str | None = None) -> None:
    """Work on a run with Ray actors until nothing is left. One that dies is replaced, and its unit done again.

    Args:
        address: of a running cluster, as `ray.init` takes it; None starts one on this machine, unless Ray runs already.

    Raises:
        ImportError: Ray isn't installed.
        RuntimeError: an actor can't open the run, or actors die without end.
    """
    ray = require("ray", "ray")
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
    on_gpu = order.config.device.startswith("cuda")
    resources = {"num_cpus": order.execution.threads or 1, "num_gpus": 1 if on_gpu else 0}
    member = ray.remote(**resources)(_Member)
    deaths_left = TRIES * (len(watch.units) + workers)
    try:
        running = dict(_begin(member, order) for _ in range(workers))
        while running:
            ready, _ = ray.wait(list(running), timeout=LOOK_EVERY)
            watch.look()
            for reference in ready:
                running.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayActorError:
                    deaths_left -= 1
                    if deaths_left == 0:
                        raise RuntimeError("workers: Ray actors keep dying") from None
                    running.update([_begin(member, order)])
        watch.look()
    finally:
        if started:
            ray.shutdown()


def _begin(member: Any, order: WorkOrder) -> tuple[Any, Any]:
    """An actor at work: the reference to its end, and the actor, which lives as long as it is held."""
    actor = member.remote()
    return actor.work.remote(order), actor


class _Member:
    def work(self, order: WorkOrder) -> None:
        import torch

        # Ray itself gives each actor its GPU; on a CPU each has the threads it was promised
        torch.set_num_threads(order.execution.threads or 1)
        take_part(order)
