"""Results are written behind the work and items read ahead of it, and a unit is done when it is on disk."""

import threading

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from headscope.sweep import Run, SweepConfig, SweepFailed, run_sweep
from headscope.sweep.compute.opened import Execution, Opened
from headscope.sweep.plan import items as items_module
from headscope.sweep.plan.units import CLAIMS
from headscope.sweep.store.claims import Claims
from headscope.sweep.store.store import RunStore
from headscope.sweep.work import behind, worker
from headscope.sweep.work.executors.member import Silent
from headscope.sweep.work.worker import work
from sweep.faults import ordered

WAIT = 60.0


@pytest.fixture
def asked(ddpm_directory):
    return SweepConfig(
        model=ddpm_directory,
        groups=("faces",),
        splits=("confirm",),
        items=2,
        timesteps=(60, 300, 500),
        fills=("zero",),
        observe=False,
    )


@pytest.fixture
def slow_disk(monkeypatch):
    """Tables wait until the event is set."""
    write, open_now = RunStore.write_table, threading.Event()

    def wait(self, kind, unit, table):
        assert open_now.wait(WAIT)
        write(self, kind, unit, table)

    monkeypatch.setattr(RunStore, "write_table", wait)
    return open_now


def test_a_claim_is_held_until_its_unit_is_on_disk(asked, tmp_path, slow_disk, monkeypatch):
    """The second unit is computed while the first is still being written, and the first's claim is still there."""
    run_unit = worker.compute_unit
    seen = []

    def look(unit, context, advance):
        if seen:
            assert {file.name for file in (tmp_path / "run" / CLAIMS).glob("[!.]*")} == {*seen, unit.id}
            assert not context.store.has("ablations", seen[0])
            slow_disk.set()
        seen.append(unit.id)
        results = run_unit(unit, context, advance)
        if len(seen) == 2:
            monkeypatch.setattr(worker, "compute_unit", run_unit)
        return results

    monkeypatch.setattr(worker, "compute_unit", look)
    run = run_sweep(asked, tmp_path / "run", progress=False)
    assert len(seen) == 2
    assert run.complete


def test_no_more_than_two_units_wait_for_the_disk(asked, tmp_path, slow_disk, monkeypatch):
    """The third unit's results are held back until there is room for them."""
    run_unit = worker.compute_unit
    computed = []

    def count(unit, context, advance):
        results = run_unit(unit, context, advance)
        computed.append(unit.id)
        if len(computed) == 3:
            threading.Timer(0.3, look).start()
        return results

    found = []

    def look():
        found.append(len(list((tmp_path / "run" / CLAIMS).glob("[!.]*"))))
        slow_disk.set()

    monkeypatch.setattr(worker, "compute_unit", count)
    asked = SweepConfig(**{**asked.as_dict(), "timesteps": (60, 100, 300, 500), "sets": ()})
    assert run_sweep(asked, tmp_path / "run", progress=False).complete
    assert found == [3]
    assert len(computed) == 4


class Stop(BaseException):
    """Stands for whatever ends a run, as Ctrl-C does."""


def test_what_was_computed_is_written_before_the_run_stops(asked, tmp_path, slow_disk, monkeypatch):
    run_unit = worker.compute_unit
    computed = []

    def stop(unit, context, advance):
        if computed:
            threading.Timer(0.2, slow_disk.set).start()
            raise Stop
        results = run_unit(unit, context, advance)
        computed.append(unit.id)
        return results

    monkeypatch.setattr(worker, "compute_unit", stop)
    with pytest.raises(Stop):
        run_sweep(asked, tmp_path / "run", progress=False)
    run = Run.open(tmp_path / "run")
    assert [file.stem for file in (run.path / "ablations").glob("*.parquet")] == computed
    assert not list((run.path / CLAIMS).iterdir())


@pytest.mark.parametrize(("times", "fails"), [(2, False), (3, True)])
def test_a_table_that_cannot_be_written_is_its_unit_s_failure(asked, tmp_path, monkeypatch, times, fails):
    whole = run_sweep(asked, tmp_path / "whole", progress=False)
    victim = next(unit["id"] for unit in whole.units)
    write, tried = RunStore.write_table, []

    def refuse(self, kind, unit, table):
        tried.append(unit)
        if unit == victim and tried.count(victim) <= times:
            raise TypeError("not a table")
        write(self, kind, unit, table)

    monkeypatch.setattr(RunStore, "write_table", refuse)
    if fails:
        with pytest.raises(SweepFailed, match="1 of 3 units failed; the first: TypeError: not a table"):
            run_sweep(asked, tmp_path / "run", progress=False)
        assert Run.open(tmp_path / "run").status().units == {"ablations": (2, 3)}
        return
    run = run_sweep(asked, tmp_path / "run", progress=False)
    assert run.status().failed == {}
    assert_frame_equal(ordered(run, "ablations"), ordered(whole, "ablations"), check_exact=True)


def test_a_failing_disk_stops_the_run(asked, tmp_path, monkeypatch):
    """Where not even the failure can be recorded, the error reaches the caller."""

    def broken(self, *args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(RunStore, "write_table", broken)
    monkeypatch.setattr(RunStore, "add_failure", broken)
    with pytest.raises(OSError, match="Input/output error"):
        run_sweep(asked, tmp_path / "run", progress=False)
    assert not list((tmp_path / "run" / CLAIMS).iterdir())


def test_after_a_death_nothing_waits_while_the_next_unit_runs(asked, tmp_path, monkeypatch):
    """Else a unit that kills its process would take with it, again and again, one that was only waiting."""
    opened = Opened(asked, Execution(rows=8))
    context = opened.context(opened.store(tmp_path / "run"))
    first, *_ = opened.plan.units
    dead = Claims(context.store.path, "ours")
    dead._owner |= {"began": "1"}
    assert dead.take(first.id) is True
    run_unit = worker.compute_unit
    done = []

    def look(unit, context, advance):
        assert all(context.store.has(other.kind, other.id) for other in done)
        results = run_unit(unit, context, advance)
        done.append(unit)
        return results

    monkeypatch.setattr(worker, "compute_unit", look)
    work(context, "ours", Silent())
    assert done == list(opened.plan.units)


def test_a_unit_whose_process_died_after_writing_it_has_not_failed(asked, tmp_path, monkeypatch):
    """It died between the renaming of the file and the release of the claim."""
    opened = Opened(asked, Execution(rows=8))
    context = opened.context(opened.store(tmp_path / "run"))
    work(context, "before", Silent())
    first, *_ = opened.plan.units
    dead = Claims(context.store.path, "ours")
    dead._owner |= {"began": "1"}
    assert dead.take(first.id) is True
    # it was written after this process had looked
    listed, looked = RunStore.listed, []

    def late(self):
        looked.append(True)
        return listed(self) if len(looked) > 1 else set()

    monkeypatch.setattr(RunStore, "listed", late)
    work(context, "ours", Silent())
    assert context.store.failures() == {}


def test_a_record_that_another_process_has_cleared_meanwhile(asked, tmp_path, monkeypatch):
    """It tried the unit again and succeeded, or somebody has said retry."""
    write, tried = RunStore.write_table, []

    def refuse(self, kind, unit, table):
        tried.append(unit)
        if len(tried) == 1:
            raise TypeError("not a table")
        write(self, kind, unit, table)

    add = RunStore.add_failure

    def cleared(self, unit, *given, **more):
        add(self, unit, *given, **more)
        self.clear_failure(unit)

    monkeypatch.setattr(RunStore, "write_table", refuse)
    monkeypatch.setattr(RunStore, "add_failure", cleared)
    assert run_sweep(asked, tmp_path / "run", progress=False).complete
    assert len(tried) == 4


def test_images_that_are_not_kept_are_read_ahead_and_let_go(asked, tmp_path, monkeypatch):
    config = SweepConfig(**{**asked.as_dict(), "groups": ("lfw",), "items": 9, "timesteps": (60,), "sets": ()})
    kept = run_sweep(config, tmp_path / "kept", progress=False)
    monkeypatch.setattr(items_module, "KEPT_BYTES", 0)
    opened = Opened(config, Execution(rows=16))
    items = opened.groups[0].swept
    assert len(opened.plan.units) == 3
    held = []
    run_unit = worker.compute_unit

    def look(unit, context, advance):
        held.append([index for index, item in enumerate(items) if item._image is not None])
        assert set(unit.items) <= set(held[-1])
        return run_unit(unit, context, advance)

    monkeypatch.setattr(worker, "compute_unit", look)
    work(opened.context(opened.store(tmp_path / "run")), "", Silent())
    # no more than a unit and the one after it
    assert max(map(len, held)) <= 8
    assert all(item._image is None for item in items)
    found = Run.open(tmp_path / "run").table("ablations").select(pl.col("edited")).collect()["edited"]
    expected = kept.table("ablations").select(pl.col("edited")).collect()["edited"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_images_of_a_large_unit_are_read_as_they_are_needed(asked, tmp_path, monkeypatch):
    """A reference of all training items isn't held in memory; the mean is the same."""
    fields = {"groups": ("lfw",), "timesteps": (60,), "fills": ("mean",), "reference_items": 9}
    config = SweepConfig(**{**asked.as_dict(), **fields})
    kept = run_sweep(config, tmp_path / "kept", progress=False)
    monkeypatch.setattr(items_module, "KEPT_BYTES", 0)
    monkeypatch.setattr(behind, "HELD_BYTES", 8 * 32 * 32 * 3)
    opened = Opened(config, Execution(rows=4))
    reference, swept = opened.groups[0].reference, opened.groups[0].swept
    held = {}
    run_unit = worker.compute_unit

    def look(unit, context, advance):
        found = run_unit(unit, context, advance)
        held[unit.kind] = [sum(item._image is not None for item in items) for items in (reference, swept)]
        return found

    monkeypatch.setattr(worker, "compute_unit", look)
    work(opened.context(opened.store(tmp_path / "run")), "", Silent())
    # beside the reference the swept items of the next unit are read
    assert held["reference"][0] == 0
    assert held["ablations"] == [0, 2]
    found, expected = (
        run.table("ablations").select(pl.col("edited")).collect()["edited"]
        for run in (Run.open(tmp_path / "run"), kept)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
