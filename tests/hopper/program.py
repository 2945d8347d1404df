"""One program of an emulated kernel: its partitions, who of them goes on, and what each of them knows."""

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hopper.values import EmulationError

MODES = ("random", "priority", "round robin", "eager", "lazy")
"""Who goes on next, partition or TMA load: anyone; the first in an order that changes now and then; each in turn; loads
first; loads last."""

Clock = dict[Any, int]
"""What is known to have happened: how far every partition, copy and mbarrier has certainly come."""


def learn(clock: Clock, other: Mapping[Any, int]) -> None:
    """Let `clock` know what `other` knows."""
    for key, time in other.items():
        if clock.get(key, 0) < time:
            clock[key] = time


@dataclass
class Access:
    """Of a part of an allocation, by a partition or on its behalf."""

    what: str
    write: bool
    generic: bool  # by the partition's own loads and stores; TMA and wgmma access through the async proxy
    box: tuple[tuple[int, int], ...]  # first and last + 1, along each of the allocation's axes
    key: Any  # whoever knows of (key, time) knows that the access is over
    time: int | None = None  # None: in flight
    fences: list[tuple[Any, int]] = field(default_factory=list)


class Stopped(BaseException):
    """Another partition has failed."""


class Partition:
    """Warps that execute one function; in a thread of its own, of which one at a time goes on."""

    def __init__(self, name: str, key: int, clock: Clock, warps: int) -> None:
        self.name, self.key, self.warps = name, key, warps
        self.clock = {**clock, key: 1}
        self.lock = threading.Lock()
        self.lock.acquire()
        self.done = False
        self.until: Callable[[], bool] | None = None
        self.waiting = ""
        self.awaited: Any = None  # the mbarrier it is waiting for
        self.wgmmas: list[Any] = []  # tokens of those in flight, the oldest first
        self.stores: list[tuple[Access, Callable[[], None]]] = []

    def __str__(self) -> str:
        return self.name

    def knows(self, key: Any, time: int | None) -> bool:
        return time is not None and self.clock.get(key, 0) >= time

    def released(self, kind: str, name: str) -> None:
        """After others could learn what has happened so far: what comes now they don't know."""
        self.clock[self.key] += 1
        current().log(kind, name)

    def access(self, shared: Any, what: str, *, write: bool, generic: bool, pending: bool = False) -> Access:
        """Note an access to shared memory; `pending`: its end is still to come. Raises EmulationError for a race."""
        what = f"{self}'s {what}"
        kept = []
        for old in shared.memory.accesses:
            apart = any(a >= d or c >= b for (a, b), (c, d) in zip(old.box, shared.box, strict=True))
            if not apart and (write or old.write):
                if old.time is None:
                    raise EmulationError(f"race: {what} of {shared} while {old.what} is in flight")
                if not self.knows(old.key, old.time):
                    raise EmulationError(f"race: {what} of {shared} isn't ordered after {old.what}")
                if old.write and old.generic and not generic and not any(self.knows(*at) for at in old.fences):
                    raise EmulationError(f"no fence_async_shared between {old.what} and {what} of {shared}")
            within = all(c <= a and b <= d for (a, b), (c, d) in zip(old.box, shared.box, strict=True))
            superseded = old.key == self.key and not old.write and old.time is not None and old.generic == generic
            if not (within and (write or superseded)):
                kept.append(old)
        if not write and not shared.written.all():
            raise EmulationError(f"{what} of {shared}, which holds nothing yet")
        access = Access(what, write, generic, shared.box, self.key, None if pending else self.clock[self.key])
        shared.memory.accesses = [*kept, access]
        return access

    def finish(self) -> None:
        """Raises EmulationError where the partition has left something in flight."""
        if self.wgmmas:
            raise EmulationError(f"{self} ended with {self.wgmmas[0].name} in flight")
        if self.stores:
            raise EmulationError(f"{self} ended without a store_wait for {self.stores[0][0].what}")


@dataclass(frozen=True)
class Event:
    """What a partition did, for tests of a schedule: `in_flight` are the wgmma it had issued and not waited for."""

    program: tuple[int, ...]
    partition: str
    kind: str
    what: str
    in_flight: tuple[str, ...]


class Program:
    """One program of the grid."""

    def __init__(self, program: tuple, grid: tuple, seed: int, mode: str, starve: str, warps: int, limit: int) -> None:
        self.program, self.grid, self.mode, self.starve, self.limit = program, grid, mode, starve, limit
        self.random = random.Random(f"{seed} {program}")
        self.main = self.running = Partition("main", 0, {}, warps)
        self.partitions = [self.main]
        self.keys = itertools.count(1)
        self.allocations: list[Any] = []
        self.copies: list[Any] = []  # TMA loads in flight
        self.counters: Counter = Counter()  # TMA loads so far, by the part of shared memory they filled
        self.order: dict[str, float] = {}
        self.error: BaseException | None = None
        self.steps = 0
        self.events: list[Event] = []

    def log(self, kind: str, what: str, by: str = "") -> None:
        partition = self.running
        flying = tuple(token.name for token in partition.wgmmas)
        self.events.append(Event(self.program, by or partition.name, kind, what, flying))

    def step(self, until: Callable[[], bool] | None = None, waiting: str = "") -> Partition:
        """Let others go on first, or not; return when it is this partition's turn (and `until` holds)."""
        partition = self.running
        partition.until, partition.waiting = until, waiting
        self._hand_over(partition)
        partition.until = None
        return partition

    def _hand_over(self, partition: Partition) -> None:
        """Choose who goes on, until it is this partition's turn; once, where it has ended."""
        while True:
            able = [p for p in self.partitions if not p.done and (p.until is None or p.until())]
            choice = self._choose(able, self.copies)
            self.steps += 1
            if self.steps > self.limit:
                raise EmulationError(f"still running after {self.limit} steps")
            if not isinstance(choice, Partition):
                choice.land()
                continue
            self.running = choice
            if choice is partition:
                return
            choice.lock.release()
            if not partition.done:
                partition.lock.acquire()
                if self.error is not None:
                    raise Stopped
            return

    def _choose(self, able: list[Partition], copies: list[Any]) -> Any:
        if self.starve:
            able = [p for p in able if not p.name.startswith(self.starve)] or (able if not copies else [])
        if not able and not copies:
            waiting = "; ".join(f"{p} {p.waiting}" for p in self.partitions if not p.done)
            barriers = (barrier for memory in self.allocations for barrier in memory.barriers.values())
            raise EmulationError(f"deadlock: {waiting}. mbarriers: {'; '.join(map(str, barriers))}")
        if self.mode == "eager":
            return self.random.choice(copies or able)
        if self.mode == "lazy":
            return self.random.choice(able or copies)
        if self.mode == "round robin":
            if not able or (copies and self.steps % 2):
                return copies[0]
            return min(able, key=lambda p: (p.key <= self.running.key, p.key))
        if self.mode == "priority":
            if self.random.random() < 0.05:
                self.order = {}
            names = [*(p.name for p in able), *(c.name for c in copies)]
            for name in names:
                self.order.setdefault(name, self.random.random())
            return min([*able, *copies], key=lambda choice: self.order[choice.name])
        return self.random.choice([*able, *copies])

    def finish(self) -> None:
        """Raises EmulationError where the program has left something in flight."""
        self.main.finish()
        for memory in self.allocations:
            for access in memory.accesses:
                if access.write and not self.main.knows(access.key, access.time):
                    raise EmulationError(f"the program ended without waiting for {access.what} of {memory.name}")

    def specialize(self, functions: Sequence[tuple[Callable, Sequence[Any]]], warps: Sequence[int]) -> Any:
        """Run each function as a partition of its own, the first in the caller's; returns the first's result."""
        main, names = self.running, [getattr(f, "__name__", str(f)) for f, _ in functions]
        if main is not self.main or len(self.partitions) > 1:
            raise EmulationError("warp_specialize: only the kernel itself may call it")
        if len(warps) != len(functions) - 1:
            raise EmulationError(f"warp_specialize: {len(functions) - 1} warp counts expected, got {list(warps)}")
        workers = [
            Partition(f"{name} {i}", next(self.keys), main.clock, count)
            for i, (name, count) in enumerate(zip(names[1:], warps, strict=True), 1)
        ]
        main.clock[main.key] += 1
        main.name = f"{names[0]} 0"
        threads = [
            threading.Thread(target=self._work, args=(worker, function, args), daemon=True)
            for worker, (function, args) in zip(workers, functions[1:], strict=True)
        ]
        for thread in threads:
            thread.start()
        self.partitions += workers
        try:
            result = functions[0][0](*functions[0][1])
            self.step(lambda: all(worker.done for worker in workers), "waits for the other partitions to end")
        except BaseException as error:
            self.error = self.error or error
            raise
        finally:
            for worker, thread in zip(workers, threads, strict=True):
                if not worker.done:
                    worker.lock.release()
                thread.join()
        for worker in workers:
            learn(main.clock, worker.clock)
        main.name, self.partitions = "main", [main]
        return result

    def _work(self, worker: Partition, function: Callable, args: Sequence[Any]) -> None:
        worker.lock.acquire()
        try:
            if self.error is None:
                with np.errstate(all="ignore"):
                    function(*args)
                worker.finish()
                worker.done = True
                self._hand_over(worker)
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
            worker.done = True
            self.main.lock.release()
        worker.done = True


RUNNING: list[Program] = []


def current() -> Program:
    """The one whose program is being executed."""
    return RUNNING[-1]
