"""Ray and Slurm work on a run as this process does. They start slowly, so all of it is `full`."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from headscope.sweep import SweepConfig, Workers, run_sweep
from headscope.sweep.store import CLAIMS
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


@needs("ray")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("count", "kill"), [(1, False), (2, False), (4, False), (2, True)])
def test_ray_actors(asked, whole, tmp_path, count, kill):
    """One of them killed while it works, too."""
    watcher = None
    if kill:
        watcher = subprocess.Popen(
            [sys.executable, "-c", KILLER, str(tmp_path / "run" / CLAIMS)], stdout=subprocess.PIPE
        )
    run_sweep(asked, tmp_path / "run", progress=False, workers=Workers("ray", count))
    if watcher:
        assert watcher.communicate(timeout=30)[0] == b"killed\n"
    assert_same(tmp_path / "run", whole, exact=False)


# kills the first process that claims a unit
KILLER = """
import json, os, pathlib, signal, sys, time
claims = pathlib.Path(sys.argv[1])
until = time.monotonic() + 120
while time.monotonic() < until:
    time.sleep(0.01)
    for file in claims.glob("[!.]*") if claims.exists() else ():
        try:
            owner = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        os.kill(owner["process"], signal.SIGKILL)
        print("killed", flush=True)
        sys.exit()
"""
