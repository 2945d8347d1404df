"""Processes and the jobs of a Slurm array work on a run as this process does. They start slowly, so all of it is
`full`."""

import importlib.util
import signal
import subprocess
import sys

import pytest

from headscope.sweep import Run, SweepConfig, Workers, run_sweep
from headscope.sweep.plan.units import CLAIMS, JOBS
from sweep.faults import assert_same, awaited, claimants, undisturbed

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def asked(ddpm_directory):
    return SweepConfig(
        model=ddpm_directory, groups=("faces",), items=6, timesteps=(60, 500), fills=("mean", "zero"), reference_items=8
    )


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    return undisturbed(asked, tmp_path_factory.mktemp("whole") / "run")


def needs(module: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} isn't installed")


@needs("submitit")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_slurm_arrays_through_submitit(asked, whole, tmp_path, count):
    """With submitit's local executor, which starts the jobs of an array as processes."""
    workers = Workers("slurm", count, cluster="local", parameters={"timeout_min": 10})
    run_sweep(asked, tmp_path / "run", progress=False, workers=workers)
    assert_same(tmp_path / "run", whole, exact=False)


@pytest.fixture
def short(ddpm_directory):
    return SweepConfig(model=ddpm_directory, groups=("faces",), items=1, timesteps=(60, 500), fills=("zero",))


def test_processes_say_once_whom_they_wait_for(short, tmp_path):
    expected, said = awaited(short, tmp_path / "run", Workers("processes", 2), lambda shown: shown)
    assert said.count(expected) == 1


@needs("submitit")
@pytest.mark.filterwarnings("ignore")
def test_a_slurm_job_s_log_says_whom_it_waits_for(short, tmp_path):
    def logged(shown: str) -> str:
        return "".join(file.read_text() for file in (tmp_path / "run" / JOBS).glob("*.err"))

    workers = Workers("slurm", 1, cluster="local", parameters={"timeout_min": 10})
    expected, said = awaited(short, tmp_path / "run", workers, logged)
    assert said.count(expected) == 1


# what a job of the array does, without Slurm
JOB = """
import sys
from headscope.sweep import SweepConfig
from headscope.sweep.work.executors.slurm import _Job
from headscope.sweep.compute.opened import Execution
from headscope.sweep.work.worker import WorkOrder

config = SweepConfig(
    model=sys.argv[1], groups=("faces",), items=6, timesteps=(60, 500), fills=("mean", "zero"), reference_items=8
)
print(_Job()(WorkOrder(config, sys.argv[2], Execution(threads=1), "session")))
"""


@needs("submitit")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_slurm_job_that_is_to_end_puts_its_work_away(ddpm_directory, asked, whole, tmp_path, number):
    """As scancel asks for it, and Slurm before a job's time is over."""
    command = [sys.executable, "-W", "ignore", "-c", JOB, ddpm_directory, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        next(claimants(tmp_path / "run"))
        process.send_signal(number)
        assert process.communicate(timeout=60)[0] == "stopped\n"
        assert process.returncode == 0
    assert not any((tmp_path / "run" / CLAIMS).glob("[!.]*"))
    stopped = Run.open(tmp_path / "run")
    assert not stopped.complete
    assert stopped.status().failed == {}
    run_sweep(asked, tmp_path / "run", progress=False)
    assert_same(tmp_path / "run", whole, exact=False)
