"""One process's share of a sweep: it works on whatever unit is ready and nobody else's."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from typing import Any, Protocol

from headscope.sweep.compute.opened import Execution
from headscope.sweep.compute.unit import UnitRunner
from headscope.sweep.plan.config import SweepConfig
from headscope.sweep.plan.units import Unit
from headscope.sweep.store.claims import Claims
from headscope.sweep.store.room import is_full, room
from headscope.sweep.work.behind import ReadAhead, WriteBehind

# a unit that went wrong so often is left
TRIES = 3
# how long to wait before looking again where every unit left is somebody else's
PATIENCE = 0.2


@dataclass(frozen=True)
class WorkOrder:
    """What another process needs to take part in a sweep; it can be pickled."""

    config: SweepConfig
    out: str
    execution: Execution
    session: str


class Report(Protocol):
    """Who hears how the work goes."""

    def advance(self, forwards: int) -> None: ...
    def finished(self, unit: Unit) -> None: ...
    def failed(self, unit: Unit, error: str, last: bool) -> None: ...
    def waiting(self, unit: Unit, what: str) -> None: ...


def work(runner: UnitRunner, session: str, report: Report) -> None:
    """Work until every unit of the run is finished or has failed too often, here or elsewhere.

    Whatever ends it, results that were computed are written first.

    Raises:
        DiskFull: no results can be written.
    """
    share = _Share(runner, session, report)
    with room():
        try:
            share.work()
        finally:
            share.close()


class _Share:
    """What one process does of a run.

    Attributes:
        finished, lost: units that are done, and those that are given up or wait for one that is.
        cautious: a process of this session died. A unit that was computed and not yet written when that happened is
            innocent, so from then on each is written before the next begins: none is counted twice for another's crash.
    """

    def __init__(self, runner: UnitRunner, session: str, report: Report) -> None:
        self.runner = runner
        self.session = session
        self.report = report
        self.finished: set[str] = set()
        self.lost: set[str] = set()
        self.cautious = False
        self._store = runner.store
        self._claims = Claims(runner.store.path, session)
        self._waited: set[str] = set()
        self._behind = WriteBehind(runner.store, self._written)
        self._ahead = ReadAhead(runner.members)
        runner.store = self._behind

    def work(self) -> None:
        left = list(self.runner.plan.units)
        while left:
            listed = self._store.listed()
            failures = self._store.failures()
            before = len(left)
            for position, unit in enumerate(left):
                self._hear()
                if self._is_ready(unit, listed, failures):
                    self._take(unit, left[position + 1] if position + 1 < len(left) else None)
            self._hear()
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
            self.runner.store = self._store
            self._claims.close()

    def _wait(self, left: dict[str, Unit]) -> None:
        """Nothing can be done for a while; say once of everybody who works on it why."""
        for unit, what in self._claims.waits().items():
            if unit in left and what not in self._waited:
                self._waited.add(what)
                self.report.waiting(left[unit], what)
        time.sleep(PATIENCE)

    def _is_ready(self, unit: Unit, listed: set[tuple[str, str]], failures: dict[str, list[dict[str, Any]]]) -> bool:
        """Whether the unit is to be done, and can be."""
        if unit.id in self.finished or unit.id in self._behind.pending:
            return False
        if (unit.kind, unit.id) in listed and self.runner.done(unit):
            self._finish(unit)
            return False
        needed = self.runner.plan.needs(unit)
        if given_up(failures.get(unit.id, []), self.session) or any(other.id in self.lost for other in needed):
            self.lost.add(unit.id)
            return False
        if any(other.id in self._behind.pending for other in needed):
            self._behind.settle()
            self._hear()
        return all(other.id in self.finished for other in needed)

    def _take(self, unit: Unit, following: Unit | None) -> None:
        """Do a unit unless somebody else does."""
        owner = self._claims.take(unit.id)
        if not owner:
            return
        handed_over = False
        try:
            died = isinstance(owner, dict) and owner["session"] == self.session
            self.cautious |= died
            if self.runner.done(unit):
                self._finish(unit)
            elif died and self._is_given_up(unit):
                self.lost.add(unit.id)
            elif self._computed(unit, following):
                handed_over = True
                self._behind.commit(unit)
        finally:
            # else its writer does, once the results are on disk
            if not handed_over:
                self._claims.release(unit.id)
        if self.cautious:
            self._behind.settle()
            self._hear()

    def _is_given_up(self, unit: Unit) -> bool:
        """A process of ours died of this unit, or beside it: whether that was the last of its tries."""
        error = "the process working on it died"
        self._store.add_failure(unit.id, error, self.session, death=True)
        last = self._was_last(unit)
        if last:
            self.report.failed(unit, error, True)
        return last

    def _computed(self, unit: Unit, following: Unit | None) -> bool:
        """Work on a unit; False, and a record of it, where that went wrong."""
        try:
            self._ahead.begin(unit, following)
            self.runner.run(unit, self.report.advance)
        except Exception as error:
            if is_full(error):
                raise
            self._behind.take_back(unit)
            self._store.add_failure(unit.id, traceback.format_exc(), self.session)
            self._fail(unit, error)
            return False
        return True

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

    def _hear(self) -> None:
        """What the writer has done since; raises what stopped it."""
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
    """Whether a unit has failed too often: errors count for ever, a process's death for its own session only, so that
    killing a run again and again loses nothing."""
    return sum(not entry["death"] or entry["session"] == session for entry in tries) >= TRIES
