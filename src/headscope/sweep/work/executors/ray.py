"""Ray Core actors, on this machine or on a cluster. Headscope and the run directory must be on all of its machines."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from headscope._extras import require
from headscope._signals import handler_kept
from headscope.sweep.plan.units import Unit
from headscope.sweep.store.room import DiskFull
from headscope.sweep.work.executors.member import Telling, take_part, tell
from headscope.sweep.work.progress import Progress
from headscope.sweep.work.worker import TRIES, WorkOrder

LOOK_EVERY = 1.0
# how long actors may take to put their work away when the sweep is stopped, which is some seconds of a unit's forward
GRACE = 10.0
# of a Ray that is started here, in bytes: orders are all that is passed around, and Ray wants no less than 75 MiB
OBJECT_STORE = 100_000_000


def run_ray(
    order: WorkOrder, workers: int, units: tuple[Unit, ...], progress: Progress, address: str | None = None
) -> None:
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
    try:
        if started:
            with handler_kept():
                _connect(ray, address, threads * workers)
        # one call works while others ask for its messages, or tell it to stop
        actor = ray.remote(num_cpus=threads, num_gpus=gpus, max_concurrency=2)(_Actor)
        team = _Team(ray, actor, order, units, progress)
        try:
            team.work(workers)
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


@dataclass
class _Member:
    """An actor at work.

    Attributes:
        news: the reference to what it has said since it was last asked.
        began: it has answered, so it has had room.
    """

    actor: Any
    news: Any
    began: bool = False


class _Team:
    """The actors that work on a run.

    Attributes:
        running: the actors that haven't ended, each by the reference to its end.
    """

    def __init__(self, ray: Any, actor: Any, order: WorkOrder, units: tuple[Unit, ...], progress: Progress) -> None:
        self._ray = ray
        self._actor = actor
        self._order = order
        self._known = {unit.id: unit for unit in units}
        self._progress = progress
        self.running: dict[Any, _Member] = {}

    def begin(self) -> None:
        actor = self._actor.remote()
        self.running[actor.work.remote(self._order)] = _Member(actor, actor.news.remote())

    def work(self, workers: int) -> None:
        """Until one of them has found that nothing is left: the others are about to."""
        # a death costs a unit one of its tries, so this many are possible at most
        deaths_left = TRIES * (len(self._known) + workers)
        for _ in range(workers):
            self.begin()
        done = False
        while not done:
            ready, _ = self._ray.wait(list(self.running), timeout=LOOK_EVERY)
            for member in self._answered():
                self._hear(member)
                member.news = member.actor.news.remote()
            for reference in ready:
                # it may have been asked before its end, and answered by now
                self._hear(self.running.pop(reference))
                if self._finished(reference):
                    done = True
                    continue
                deaths_left -= 1
                if deaths_left == 0:
                    raise RuntimeError("workers: Ray actors keep dying")
                self.begin()

    def _answered(self) -> Iterator[_Member]:
        """The running actors whose answer is there."""
        for member in self.running.values():
            if self._ray.wait([member.news], timeout=0)[0]:
                member.began = True
                yield member

    def _hear(self, member: _Member) -> None:
        """Pass on what an actor has said, waiting for its answer. One that is gone has nothing to say: its end does."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._pass_on(self._ray.get(member.news, timeout=GRACE))

    def _pass_on(self, messages: list[tuple[Any, ...]]) -> None:
        for message in messages:
            tell(message, self._known, self._progress)

    def _finished(self, reference: Any) -> bool:
        """True if an actor that has ended did so by itself."""
        errors = self._ray.exceptions
        try:
            self._pass_on(self._ray.get(reference))
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
            list(self._answered())
            working = [reference for reference, member in self.running.items() if member.began]
            for reference in working:
                self.running[reference].actor.stop.remote()
            if working:
                self._ray.wait(working, num_returns=len(working), timeout=GRACE)
        finally:
            for member in self.running.values():
                self._ray.kill(member.actor)


class _Actor:
    def __init__(self) -> None:
        self._said: deque[tuple[Any, ...]] = deque()
        self._stopped = threading.Event()

    def news(self) -> list[tuple[Any, ...]]:
        """The messages since this was last called; the end of the work may ask at the same time."""
        found = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._said.popleft())
        return found

    def stop(self) -> None:
        """End the work after the next forward, as Ctrl-C does."""
        self._stopped.set()

    def _say(self, message: tuple[Any, ...]) -> None:
        self._said.append(message)
        if self._stopped.is_set() and message[0] == "advance":
            raise KeyboardInterrupt

    def work(self, order: WorkOrder) -> list[tuple[Any, ...]]:
        """Take part in the run; what was said at last."""
        import torch

        # Ray itself gives each actor its GPU; on a CPU each has the threads it was promised
        torch.set_num_threads(order.execution.threads or 1)
        with contextlib.suppress(KeyboardInterrupt):
            take_part(order, Telling(self._say))
        return self.news()
