"""Work beside the device's: results are written behind it, items are read ahead of it.

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

from headscope.sweep.plan.items import SweptItem
from headscope.sweep.plan.units import Unit
from headscope.sweep.store.store import Results, RunStore

# units that may be computed and not yet on disk while the next is computed: results take memory
PENDING = 2
# a unit's images are held while it is computed up to so many bytes; those of larger ones are read as they are needed
HELD_BYTES = 64 * 2**20

# hears of a unit whose results were written, or what went wrong, in the writer's thread
Ended = Callable[[Unit, Exception | None], None]


class WriteBehind:
    """Writes units' results in a separate thread, in the order they came.

    Args:
        store: the run directory's.
        ended: called in the thread after a unit's files are on disk, or one could not be written. An error that it
            raises stops the writing: `ended` raises it.

    Attributes:
        pending: the units whose results were handed over and aren't written yet.
    """

    def __init__(self, store: RunStore, ended: Ended) -> None:
        self.pending: set[str] = set()
        self._store = store
        self._ended = ended
        self._heard: deque[tuple[Unit, Exception | None]] = deque()
        self._jobs: queue.SimpleQueue[tuple[Unit, Results] | None] = queue.SimpleQueue()
        self._fatal: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="headscope-writer", daemon=True)
        self._thread.start()

    def write(self, unit: Unit, results: Results) -> None:
        """Have a unit's results written; waits while more units than `PENDING` are."""
        with self._changed:
            self.pending.add(unit.id)
            self._jobs.put((unit, results))
            self._changed.wait_for(lambda: len(self.pending) <= PENDING or self._fatal)

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

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                # after an error that stopped the writing nothing more is written
                if self._fatal is None:
                    self._write(*job)
            except BaseException as error:
                with self._changed:
                    self._fatal = error
                    self._changed.notify_all()
            # results that are written are let go before the next come
            del job

    def _write(self, unit: Unit, results: Results) -> None:
        failed = None
        try:
            self._store.write(unit, results)
        except Exception as error:
            failed = error
        self._ended(unit, failed)
        with self._changed:
            self._heard.append((unit, failed))
            self.pending.discard(unit.id)
            self._changed.notify_all()


class ReadAhead:
    """Reads the images of the unit after the one that is computed, where a group is too large to stay in memory."""

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
        now = self._on_disk(unit)
        if self._future is not None:
            # an image that can't be read is named when its unit begins
            with contextlib.suppress(Exception):
                self._future.result()
            self._future = None
        for item in now:
            item.fetch()
        after = self._on_disk(following) if following is not None else set()
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

    def _on_disk(self, unit: Unit) -> set[SweptItem]:
        found = {item for item in self._items(unit) if isinstance(item, SweptItem) and not item.in_memory}
        return found if sum(item.image_bytes for item in found) <= HELD_BYTES else set()


def _fetch(items: set[SweptItem]) -> None:
    for item in items:
        item.fetch()
