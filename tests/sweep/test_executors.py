"""The jobs of a Slurm array work on a run as this process does. They start slowly, so all of it is `full`."""

import importlib.util

import pytest
import torch

from headscope.sweep import SweepConfig, Workers, run_sweep
from sweep.faults import assert_same

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def asked(ddpm_directory):
    return SweepConfig(model=ddpm_directory, groups=("faces",), items=6, timesteps=(60, 500), fills=("mean", "zero"))


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_sweep(asked, path, progress=False)
    torch.set_num_threads(threads)
    return path


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
