"""One process's share of a sweep: it works on whatever unit is ready and nobody else's."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

from headscope.sweep.compute.context import Context
from headscope.sweep.compute.opened import Execution
from headscope.sweep.compute.unit import compute_unit
from headscope.sweep.plan.config import SweepConfig
from headscope.sweep.plan.units import Unit
from headscope.sweep.store.claims import Claims
from headscope.sweep.store.room import is_full, room
from headscope.sweep.store.store import Results
from headscope.sweep.work.behind import ReadAhead, WriteBehind

# a unit that went wrong so often is left
TRIES = 3
# how long to wait before looking again where every unit left is somebody else's
PATIENCE = 0.2


@dataclass(frozen=True)
class WorkOrder:
    """All that another process needs to take part in a sweep; it can be pickled."""

    config: SweepConfig
    out: str
    execution: Execution
    session: str


class Report(Protocol):
    """Is told how the work goes."""

    def advance(self, forwards: int) -> None: ...
    def finished(self, unit: Unit) -> None: ...
    def failed(self, unit: Unit, error: str, last: bool) -> None: ...
    def waiting(self, unit: Unit, what: str) -> None: ...


def work(context: Context, session: str, report: Report) -> None:
    """Work until every unit of the run is finished or has failed too often, here or elsewhere.

    Whatever ends it, results that were computed are written first.

    Raises:
        DiskFull: no results can be written.
    """
    share = _Share(context, session, report)
    with room():
        try:
            share.work()
        finally:
            share.close()


class _Share:
    """One process's share of a run.

    A unit passes through `_is_ready` (what it reads is on disk, and it is neither done nor given up), `_take` (this
    process claims it) and `_computed`, then through the writer's thread, which calls `_written`, and last `_collect`,
    which tells the report. A unit that another process has claimed is looked at again until it is done.

    Attributes:
        finished: units that are done.
        lost: units that are given up, or wait for one that is.
        one_by_one: write each unit before the next begins, which is so once a process of this session has died. A unit
            that was computed and not yet written at that moment had nothing to do with it, and none is to be counted
            twice for another's crash.
    """

    def __init__(self, context: Context, session: str, report: Report) -> None:
        self.context = context
        self.session = session
        self.report = report
        self.finished: set[str] = set()
        self.lost: set[str] = set()
        self.one_by_one = False
        self._store = context.store
        self._claims = Claims(context.store.path, session)
        self._waited: set[str] = set()
        self._behind = WriteBehind(context.store, self._written)
        self._ahead = ReadAhead(context.members)

    def work(self) -> None:
        left = list(self.context.plan.units)
        while left:
            listed = self._store.listed()
            failures = self._store.failures()
            before = len(left)
            for unit, following in zip_longest(left, left[1:]):
                self._collect()
                if self._is_ready(unit, listed, failures):
                    self._take(unit, following)
            self._collect()
            left = [unit for unit in left if unit.id not in self.finished and unit.id not in self.lost]
            if len(left) == before:
                if self._behind.pending:
                    self._behind.settle()
                else:
                    self._wait({unit.id: unit for unit in left})

    def close(self) -> None:
        """Write what was computed, and release what is claimed."""
        try:
            self._ahead.close()
            self._behind.close()
        finally:
            self._claims.close()

    def _wait(self, left: dict[str, Unit]) -> None:
        """Wait for other processes, and say once of each of them what it works on."""
        for unit, what in self._claims.waits().items():
            if unit in left and what not in self._waited:
                self._waited.add(what)
                self.report.waiting(left[unit], what)
        time.sleep(PATIENCE)

    def _is_ready(self, unit: Unit, listed: set[tuple[str, str]], failures: dict[str, list[dict[str, Any]]]) -> bool:
        """True if the unit is to be done, and can be."""
        if unit.id in self.finished or unit.id in self._behind.pending:
            return False
        if (unit.kind, unit.id) in listed and self._is_done(unit):
            self._finish(unit)
            return False
        needed = self.context.plan.needs(unit)
        if given_up(failures.get(unit.id, []), self.session) or any(other.id in self.lost for other in needed):
            self.lost.add(unit.id)
            return False
        if any(other.id in self._behind.pending for other in needed):
            self._settle()
        return all(other.id in self.finished for other in needed)

    def _is_done(self, unit: Unit) -> bool:
        return self._store.has(unit.kind, unit.id)

    def _take(self, unit: Unit, following: Unit | None) -> None:
        """Do a unit unless somebody else does."""
        owner = self._claims.take(unit.id)
        if not owner:
            return
        handed_over = False
        try:
            died = isinstance(owner, dict) and owner["session"] == self.session
            self.one_by_one |= died
            if self._is_done(unit):
                self._finish(unit)
            elif died and self._is_given_up(unit):
                self.lost.add(unit.id)
            elif (results := self._computed(unit, following)) is not None:
                handed_over = True
                self._behind.write(unit, results)
        finally:
            # else its writer does, once the results are on disk
            if not handed_over:
                self._claims.release(unit.id)
        if self.one_by_one:
            self._settle()

    def _is_given_up(self, unit: Unit) -> bool:
        """Record that a process of ours died of this unit, or beside it; True if that was the last of its tries."""
        error = "the process working on it died"
        self._store.add_failure(unit.id, error, self.session, death=True)
        last = self._was_last(unit)
        if last:
            self.report.failed(unit, error, True)
        return last

    def _computed(self, unit: Unit, following: Unit | None) -> Results | None:
        """A unit's results; None, and a record of it, where computing them went wrong."""
        try:
            self._ahead.begin(unit, following)
            return compute_unit(unit, self.context, self.report.advance)
        except Exception as error:
            if is_full(error):
                raise
            self._store.add_failure(unit.id, traceback.format_exc(), self.session)
            self._fail(unit, error)
            return None

    def _written(self, unit: Unit, error: Exception | None) -> None:
        """In the writer's thread: a unit is on disk, or couldn't be written."""
        if is_full(error):
            assert error is not None
            raise error
        if error is None:
            self._store.clear_failure(unit.id)
        else:
            self._store.add_failure(unit.id, "".join(traceback.format_exception(error)), self.session)
        self._claims.release(unit.id)

    def _settle(self) -> None:
        """Wait until all results are on disk."""
        self._behind.settle()
        self._collect()

    def _collect(self) -> None:
        """Take note of the units that were written since; raises what stopped the writer."""
        for unit, error in self._behind.ended():
            if error is None:
                self._finish(unit)
            else:
                self._fail(unit, error)

    def _finish(self, unit: Unit) -> None:
        self.finished.add(unit.id)
        self.report.finished(unit)

    def _fail(self, unit: Unit, error: Exception) -> None:
        self.report.failed(unit, f"{type(error).__name__}: {error}", self._was_last(unit))

    def _was_last(self, unit: Unit) -> bool:
        # the record may be gone: another process has finished the unit since, or is to try again
        return given_up(self._store.failures().get(unit.id, []), self.session)


def given_up(tries: list[dict[str, Any]], session: str) -> bool:
    """True if a unit has failed too often. Errors count for ever, a process's death for its session only, so that
    killing a run again and again loses nothing."""
    return sum(not entry["death"] or entry["session"] == session for entry in tries) >= TRIES
