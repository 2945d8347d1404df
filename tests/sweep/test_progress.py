"""What a sweep says of itself while it runs."""

import errno
import io
import json
import os

import pytest
from rich.console import Console

from headscope.sweep import Run, SweepConfig, run_sweep
from headscope.sweep.compute.opened import Execution, Opened
from headscope.sweep.plan.units import Unit
from headscope.sweep.work.progress import Progress
from headscope.sweep.work.worker import work

UNITS = tuple(Unit("ablations", "faces", (0, 1), 60, None, 10, f"unit{index}") for index in range(4))


def test_a_line_of_json_where_there_is_no_terminal():
    text = io.StringIO()
    with Progress("sweep", UNITS, console=Console(file=text), interval=0.0) as progress:
        progress.already(UNITS[0])
        progress._started -= 10
        progress.advance(10)
        progress.finished(UNITS[1])
        # told again by another worker
        progress.finished(UNITS[1])
        progress.failed(UNITS[2], "ValueError: no", False)
        progress.failed(UNITS[2], "ValueError: no", True)
    lines = text.getvalue().splitlines()
    last = json.loads([line for line in lines if line.startswith("{")][-1])
    assert (last["units"], last["units_total"], last["forwards"], last["forwards_total"]) == (2, 4, 20, 40)
    # 2 images and 10 forwards in 10 s and a little; 20 of the 40 forwards are left
    assert last["images_per_second"] == pytest.approx(0.2, rel=0.1)
    assert last["seconds_left"] == pytest.approx(20.0, rel=0.1)
    assert progress.state()["failures"] == 1
    assert sum("failed, will be tried again: ValueError: no" in line for line in lines) == 1
    assert sum("failed, given up: ValueError: no" in line for line in lines) == 1


def test_what_several_workers_wait_for_is_said_once():
    text = io.StringIO()
    progress = Progress("sweep", UNITS, console=Console(file=text))
    for unit, what in ((UNITS[0], "a"), (UNITS[0], "a"), (UNITS[1], "a"), (UNITS[0], "b")):
        progress.waiting(unit, what)
    assert text.getvalue().count("waiting for unit unit0 of ablations: a\n") == 1
    assert len(text.getvalue().splitlines()) == 3


def test_lines_come_at_intervals():
    text = io.StringIO()
    with Progress("sweep", UNITS, console=Console(file=text), interval=3600.0) as progress:
        for unit in UNITS:
            progress.advance(10)
            progress.finished(unit)
    assert text.getvalue() == ""


def test_a_bar_on_a_terminal():
    text = io.StringIO()
    with Progress("sweep", UNITS, console=Console(file=text, force_terminal=True, width=160)) as progress:
        for unit in UNITS:
            progress.advance(10)
            progress.finished(unit)
    for word in ("4/4", "units", "images/s", "forwards/s"):
        assert word in text.getvalue()


def test_a_log_that_cannot_be_written_disturbs_no_unit(ddpm_directory, tmp_path):
    """A full disk that isn't the run's, or a terminal that is gone."""
    config = SweepConfig(model=ddpm_directory, groups=("faces",), items=1, timesteps=(60,), fills=("zero",))
    for number in (errno.ENOSPC, errno.EIO):

        class Gone(io.StringIO):
            def write(self, text: str, number=number) -> int:
                raise OSError(number, os.strerror(number))

        opened = Opened(config, Execution(rows=4))
        context = opened.context(opened.store(tmp_path / str(number)))
        progress = Progress("sweep", opened.plan.units, console=Console(file=Gone()), interval=0.0)
        work(context, "ours", progress)
        assert Run.open(tmp_path / str(number)).complete
        assert context.store.failures() == {}


def test_silence(ddpm_directory, tmp_path):
    text = io.StringIO()
    config = SweepConfig(model=ddpm_directory, groups=("faces",), items=1, timesteps=(60,), fills=("zero",))
    run_sweep(config, tmp_path / "run", progress=False, console=Console(file=text, force_terminal=True))
    assert text.getvalue() == ""
