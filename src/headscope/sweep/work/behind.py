"""What goes on beside the device's work: results written behind it, items read ahead of it.

Neither changes what a unit is: its file is flushed to disk and renamed before anybody hears that it is done, and before
its claim is released. A process killed at any moment leaves units undone, never half done.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import torch

from headscope.sweep.plan.items import SweptItem
from headscope.sweep.plan.units import Unit
from headscope.sweep.store.store import RunStore

# units that are computed and not yet on disk: results take memory
PENDING = 2

# hears of a unit whose results were written, or what went wrong, in the writer's thread
Ended = Callable[[Unit, Exception | None], None]


class WriteBehind(RunStore):
    """A run's store whose results are written by a thread of its own, in the order they came.

    Args:
        store: the run directory's.
        ended: called in the thread after a unit's last file is on disk, or a file of it could not be written. An error
            that it raises stops the writing: `check` raises it.
    """

    def __init__(self, store: RunStore, ended: Ended) -> None:
        self.path = store.path
        self.store = store
        self.pending: set[str] = set()
        self._ended = ended
        self._heard: deque[tuple[Unit, Exception | None]] = deque()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._errors: dict[str, Exception] = {}
        self._fatal: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="headscope-writer", daemon=True)
        self._thread.start()

    def write_table(self, kind: str, unit: str, table: pa.Table) -> None:
        self._later(unit, lambda: self.store.write_table(kind, unit, table))

    def write_tensors(self, kind: str, unit: str, tensors: dict[str, torch.Tensor]) -> None:
        self._later(unit, lambda: self.store.write_tensors(kind, unit, tensors))

    def commit(self, unit: Unit) -> None:
        """A unit's results have all been handed over; waits where too many units are being written."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.pending) < PENDING or self._fatal)
            self.pending.add(unit.id)

        def end() -> None:
            error = self._errors.pop(unit.id, None)
            self._ended(unit, error)
            with self._changed:
                self._heard.append((unit, error))
                self.pending.discard(unit.id)
                self._changed.notify_all()

        self._jobs.put(end)

    def take_back(self, unit: Unit) -> None:
        """A unit went wrong after some of its results were handed over: wait until they are out of the way."""
        written = threading.Event()
        self._jobs.put(written.set)
        while not written.wait(0.05) and self._fatal is None:
            pass
        self._errors.pop(unit.id, None)

    def settle(self) -> None:
        """Wait until every unit is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self.pending or self._fatal)

    def ended(self) -> list[tuple[Unit, Exception | None]]:
        """The units whose writing ended since the last call; raises what stopped the writing."""
        if self._fatal is not None:
            raise self._fatal
        found = []
        while self._heard:
            found.append(self._heard.popleft())
        return found

    def close(self) -> None:
        """Write what was handed over, and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _later(self, unit: str, write: Callable[[], None]) -> None:
        def run() -> None:
            if unit in self._errors:
                return
            try:
                write()
            except Exception as error:
                self._errors[unit] = error

        self._jobs.put(run)

    def _write(self) -> None:
        while (job := self._jobs.get()) is not None:
            # after what can't be mended nothing more is written
            if self._fatal is not None:
                continue
            try:
                job()
            except BaseException as error:
                with self._changed:
                    self._fatal = error
                    self._changed.notify_all()


class ReadAhead:
    """Reads the images of the unit after the one that is computed, where a group is too large to be kept in memory."""

    def __init__(self, items: Callable[[Unit], Sequence[Any]]) -> None:
        self._items = items
        self._held: set[SweptItem] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future[None] | None = None

    def begin(self, unit: Unit, following: Unit | None) -> None:
        """A unit is about to be computed, and probably `following` after it.

        Raises:
            ValueError: an image of the unit can't be read.
        """
        now = self._unkept(unit)
        if self._future is not None:
            # an image that can't be read is said when its own unit begins
            with contextlib.suppress(Exception):
                self._future.result()
            self._future = None
        for item in now:
            item.fetch()
        after = self._unkept(following) if following is not None else set()
        for item in self._held - now - after:
            item.drop()
        self._held = now | after
        if after - now:
            self._pool = self._pool or ThreadPoolExecutor(1, "headscope-reader")
            self._future = self._pool.submit(_fetch, after - now)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for item in self._held:
            item.drop()

    def _unkept(self, unit: Unit) -> set[SweptItem]:
        return {item for item in self._items(unit) if isinstance(item, SweptItem) and not item.kept}


def _fetch(items: set[SweptItem]) -> None:
    for item in items:
        item.fetch()
