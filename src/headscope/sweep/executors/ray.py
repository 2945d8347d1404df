"""Ray Core actors, on this machine or on a cluster. Headscope and the run directory must be on all of its machines."""

from __future__ import annotations

import contextlib
from typing import Any

from headscope._extras import require
from headscope._signals import handler_kept
from headscope.sweep.executors.member import Silent, Watch, take_part
from headscope.sweep.worker import TRIES, DiskFull, WorkOrder

LOOK_EVERY = 1.0
# how long actors may take to put their work away when the sweep is stopped, which is some seconds of a unit's forward
GRACE = 10.0
# of a Ray that is started here, in bytes: orders are all that is passed around, and Ray wants no less than 75 MiB
OBJECT_STORE = 100_000_000


def run_ray(order: WorkOrder, workers: int, watch: Watch, address: str | None = None) -> None:
    """Work on a run with Ray actors until nothing is left. One that dies is replaced, and its unit done again.

    Actors that the cluster has no room for wait for some; they are given up once the others have done everything.

    Args:
        address: of a running cluster, as `ray.init` takes it; None is the Ray that runs on this machine already or,
            as "local" always does, starts one.

    Raises:
        ImportError: Ray isn't installed.
        ConnectionError: there is no cluster at that address.
        DiskFull: no results can be written.
        RuntimeError: an actor can't open the run, or actors die without end.
    """
    ray = require("ray", "ray")
    threads = order.execution.threads or 1
    gpus = 1 if order.config.device.startswith("cuda") else 0
    started = not ray.is_initialized()
    if started:
        with handler_kept():
            _connect(ray, address, threads * workers)
    try:
        # one call works while another tells it to stop
        actor = ray.remote(num_cpus=threads, num_gpus=gpus, max_concurrency=2)(_Actor)
        team = _Team(ray, actor, order)
        try:
            team.work(workers, watch)
        finally:
            team.end()
    finally:
        if started:
            ray.shutdown()


def _connect(ray: Any, address: str | None, cpus: int) -> None:
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    if address is None:
        with contextlib.suppress(ConnectionError):
            ray.init(address="auto", **quiet)
            return
    if address in (None, "local"):
        ray.init(address="local", num_cpus=cpus, object_store_memory=OBJECT_STORE, **quiet)
    else:
        ray.init(address=address, **quiet)


class _Team:
    """The actors that work on a run.

    Attributes:
        running: of each actor that hasn't ended, the reference to its end, the one to its beginning, and the actor.
    """

    def __init__(self, ray: Any, actor: Any, order: WorkOrder) -> None:
        self._ray = ray
        self._actor = actor
        self._order = order
        self.running: dict[Any, tuple[Any, Any]] = {}

    def begin(self) -> None:
        actor = self._actor.remote()
        self.running[actor.work.remote(self._order)] = (actor.began.remote(), actor)

    def work(self, workers: int, watch: Watch) -> None:
        """Until one of them has found that nothing is left: the others are about to."""
        # a death costs a unit one of its tries, so this many are possible at most
        deaths_left = TRIES * (len(watch.units) + workers)
        for _ in range(workers):
            self.begin()
        done = False
        while not done:
            ready, _ = self._ray.wait(list(self.running), timeout=LOOK_EVERY)
            watch.look()
            for reference in ready:
                del self.running[reference]
                if self._finished(reference):
                    done = True
                    continue
                deaths_left -= 1
                if deaths_left == 0:
                    raise RuntimeError("workers: Ray actors keep dying")
                self.begin()

    def _finished(self, reference: Any) -> bool:
        """Whether an actor that has ended did so by itself."""
        errors = self._ray.exceptions
        try:
            self._ray.get(reference)
        except (errors.RayActorError, errors.NodeDiedError, errors.OutOfMemoryError, errors.WorkerCrashedError):
            return False
        except errors.RayTaskError as error:
            if isinstance(error.cause, DiskFull):
                raise error.cause from None
            raise RuntimeError(f"workers: an actor couldn't go on:\n{error}") from None
        return True

    def end(self) -> None:
        """End what still runs: politely, then not. An actor that waits for room has nothing to put away."""
        try:
            working = [
                reference for reference, (began, _) in self.running.items() if self._ray.wait([began], timeout=0)[0]
            ]
            for reference in working:
                self.running[reference][1].stop.remote()
            if working:
                self._ray.wait(working, num_returns=len(working), timeout=GRACE)
        finally:
            for _, actor in self.running.values():
                self._ray.kill(actor)


class _Actor:
    def __init__(self) -> None:
        self._report = Silent()

    def began(self) -> None:
        pass

    def stop(self) -> None:
        self._report.stop()

    def work(self, order: WorkOrder) -> None:
        import torch

        # Ray itself gives each actor its GPU; on a CPU each has the threads it was promised
        torch.set_num_threads(order.execution.threads or 1)
        with contextlib.suppress(KeyboardInterrupt):
            take_part(order, self._report)
