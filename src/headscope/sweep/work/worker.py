"""One process's share of a sweep: it opens the run, and works on whatever unit is ready and nobody else's."""

from __future__ import annotations

import datetime
import errno
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from headscope._machine import device_name, versions
from headscope.counter import whole
from headscope.models import Scope, Task
from headscope.models.tasks import NoisyInputs
from headscope.sweep.compute.edits import check_keys
from headscope.sweep.compute.fitting import Fit, Rows, Sharing, fit, prefers_channels_last
from headscope.sweep.compute.scores import image_scores, own_scores
from headscope.sweep.compute.sharing import Prefix
from headscope.sweep.compute.unit import UnitRunner, learned_prefix
from headscope.sweep.plan.config import SweepConfig
from headscope.sweep.plan.items import GroupItems, PromptItem, load_task, open_items
from headscope.sweep.plan.units import ABLATE, ABLATE_SETS, Plan, Unit, make_plan
from headscope.sweep.store.claims import Claims
from headscope.sweep.store.store import RunStore
from headscope.sweep.work.behind import ReadAhead, WriteBehind
from headscope.sweep.work.revision import git_revision

# a unit that went wrong so often is left
TRIES = 3
# how long to wait before looking again where every unit left is somebody else's
PATIENCE = 0.2


class DiskFull(OSError):
    """There is no room for results: nothing is lost, but going on is of no use."""


@dataclass(frozen=True)
class Execution:
    """How a sweep is run, which changes its speed and not its numbers (beyond rounding).

    Attributes:
        rows: how many pass through the denoiser at once; None measures what fits.
        share: let edited forwards take over what the clean one computed before the edited site; not of compiled models.
        threads: of torch in each process, on a CPU; None leaves it.
    """

    rows: int | None = None
    share: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        for field, name in (("rows", "batch"), ("threads", "threads")):
            if (value := getattr(self, field)) is not None:
                # frozen for everybody else
                object.__setattr__(self, field, whole(name, value, least=1))


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


class Opened:
    """A sweep with its model, items and plan, ready to be worked on.

    Args:
        pipeline: the model, where it is one in memory.

    Raises:
        ValueError: the configuration can't be run.
    """

    def __init__(self, config: SweepConfig, execution: Execution, pipeline: Any = None) -> None:
        if execution.threads is not None:
            torch.set_num_threads(execution.threads)
        self.config = config
        self.execution = execution
        # functions of the user's own are there, before anything is written
        own_scores(config.scores)
        image_scores(config.image_scores)
        self.task: Task = load_task(config, pipeline)
        self.groups: list[GroupItems] = open_items(config, self.task)
        self.scope = Scope(self.task.denoiser)
        self.plan: Plan = make_plan(config, self.task, self.groups, self.scope.sites)
        by_key = [edit for edit in self.plan.sets if edit.key_bias or edit.key_scale]
        if by_key:
            self.plan = replace(self.plan, keys=self._keys(frozenset().union(*(edit.sites for edit in by_key))))
            check_keys(by_key, self.plan.keys)
        self._prepare_denoiser()

    def _prepare_denoiser(self) -> None:
        config, denoiser = self.config, self.task.denoiser
        if config.channels_last or (config.channels_last is None and prefers_channels_last(denoiser)):
            denoiser.to(memory_format=torch.channels_last)
        if config.autocast is not None:
            # of this module alone: encoders keep their dtype
            autocast = torch.autocast(self.task.device.type, getattr(torch, config.autocast))
            denoiser.forward = autocast(denoiser.forward)
        if config.compile:
            denoiser.compile()

    @property
    def notes(self) -> list[str]:
        """What a person should know before work starts."""
        return [group.note for group in self.groups if group.note]

    @property
    def share(self) -> bool:
        """Whether edited forwards may take over work of clean ones."""
        return self.execution.share and not self.config.compile

    def _keys(self, sites: frozenset[str]) -> dict[str, int]:
        """How many keys sites have, from a forward."""
        with torch.inference_mode(), self.scope.record("entropy", sites=sorted(sites)) as recording:
            self.forward(1)
        table = recording.to_arrow()
        return dict(zip(table["site"].to_pylist(), table["keys"].to_pylist(), strict=True))

    def store(self, out: Path) -> RunStore:
        """The run directory, made if it is new.

        Raises:
            ValueError: it holds something else.
            DiskFull: there is no room for it.
        """
        units = [{**asdict(unit), "items": len(unit.items)} for unit in self.plan.units]
        with room():
            return RunStore(out, self.plan.identity, self.describe(), units)

    def describe(self) -> dict[str, Any]:
        """What the manifest says of a run beside its identity."""
        return {
            "config": self.config.absolute().as_dict(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "git_revision": git_revision(),
            "device": device_name(self.config.device),
            "threads": torch.get_num_threads(),
            "timesteps": list(self.plan.timesteps),
            "sites": [
                {"name": s.name, "kind": s.kind, "heads": s.heads, "head_dim": s.head_dim} for s in self.scope.sites
            ],
            "groups": [
                {
                    "name": group.name,
                    "description": group.description,
                    "items": len(group.swept),
                    "sources": group.source_count,
                    "reference_items": len(group.reference),
                }
                for group in self.groups
            ],
            "forwards": sum(unit.forwards for unit in self.plan.units),
        }

    @cached_property
    def _example(self) -> NoisyInputs:
        """The first items' inputs."""
        chosen: list[Any] = list(self.groups[0].swept[:2])
        edge = self.task.image_size
        gray = np.full((edge, edge, 3), 127, np.uint8)
        chosen = [replace(item, image=gray) if isinstance(item, PromptItem) else item for item in chosen]
        return self.task.noisy_inputs(self.task.prepare(chosen), self.plan.timesteps[0], self.config.seed)

    def forward(self, rows: int) -> torch.Tensor:
        """An unedited forward of so many rows of the first item, for measuring."""
        index = torch.zeros(rows, dtype=torch.long, device=self.task.device)
        return self.task.predict(self._example.rows(index))

    @cached_property
    def prefix(self) -> Prefix:
        """What edited forwards can take over from clean ones."""
        with torch.inference_mode():
            example = self._example
        return learned_prefix(self.task, self.scope, example)

    def fit(self, store: RunStore | None = None) -> Fit:
        """How many rows go through at once, as it was chosen, or measured by whoever measured first in this run."""
        if self.execution.rows is not None:
            return Fit(self.execution.rows, self.execution.rows)
        if store is None:
            return self._measured_fit()
        with room():
            return store.fit() or store.fit(self._measured_fit()) or Fit(1, 1)

    def _measured_fit(self) -> Fit:
        with torch.inference_mode():
            self._example  # noqa: B018 (encoding it takes memory of its own, which forwards don't)
            return fit(self.task.device, self.forward, self.sharing, max(self._ablated_items, default=1))

    @property
    def _ablated_items(self) -> list[int]:
        """How many items each unit has whose edited forwards may take over work of clean ones."""
        return [len(unit.items) for unit in self.plan.units if unit.kind in (ABLATE, ABLATE_SETS)]

    @cached_property
    def sharing(self) -> Sharing:
        """The memory of what edited forwards take over: of the kind of unit that needs most."""
        if not self.share or not self._ablated_items or not self.prefix.shares:
            return Sharing()
        found = []
        for kind in {unit.kind for unit in self.plan.units} & {ABLATE, ABLATE_SETS}:
            edited = frozenset(edit.sites for edit in self.plan.edits(kind))
            with torch.inference_mode(), self.prefix.clean(edited) as kept:
                self.forward(1)
            copied = max(self.prefix.copied_bytes(kept, sites) for sites in edited)
            found.append(Sharing(kept.nbytes, copied))
        return Sharing(max(each.kept for each in found), max(each.copied for each in found))

    def runner(self, store: RunStore) -> UnitRunner:
        fit = self.fit(store)
        rows, share = Rows(fit.rows, fit.clean or fit.rows), self.share and fit.clean > 0
        # learnt already where it was measured here
        prefix = self.__dict__.get("prefix")
        return UnitRunner(
            self.config, self.task, self.groups, self.plan, store, rows, share, self.config.graphs, prefix
        )


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


@contextmanager
def room() -> Iterator[None]:
    """Raises DiskFull where there is none for what is written in here."""
    try:
        yield
    except OSError as error:
        if not _is_full(error) or isinstance(error, DiskFull):
            raise
        where = f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
        raise DiskFull(
            error.errno, f"out: no room to write results ({where}); make some and run the same command again"
        ) from error


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
            if _is_full(error):
                raise
            self._behind.take_back(unit)
            self._store.add_failure(unit.id, traceback.format_exc(), self.session)
            self._fail(unit, error)
            return False
        return True

    def _written(self, unit: Unit, error: Exception | None) -> None:
        """In the writer's thread: a unit is on disk, or couldn't be written."""
        if _is_full(error):
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
