"""What the tests of faults share: a small sweep, and whether two of its runs hold the same rows."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import torch
from polars.testing import assert_frame_equal

from headscope.sweep import Run, SweepConfig, run_sweep
from headscope.sweep.store import CLAIMS

# a script that runs the sweep of a model directory into a run directory, with so many processes (of a Ray cluster)
SWEEP = """
import os, sys
import torch
torch.set_num_threads(1)
from headscope.sweep import SweepConfig, Workers, run_sweep

if __name__ == "__main__":
    model, out, executor, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    config = SweepConfig(
        model=model, groups=("faces", "lfw"), items=6, timesteps=(60, 500), fills=("mean", "zero")
    )
    print("ready", flush=True)
    address = sys.argv[5] if len(sys.argv) > 5 else None
    run_sweep(config, out, progress=False, workers=Workers(executor, count, address=address))
"""
KINDS = ("observations", "ablations")


def script(folder: Path) -> list[str]:
    """The command that runs `SWEEP`; a file, because spawned processes import it."""
    file = folder / "sweep_script.py"
    file.write_text(SWEEP)
    return [sys.executable, "-W", "ignore", str(file)]


def claimants(run: Path, seconds: float = 120.0) -> Iterator[int]:
    """The processes that are seen to have claimed a unit, over and over, as they are seen."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)
        for file in (run / CLAIMS).glob("[!.]*"):
            # it may be gone by now
            with contextlib.suppress(OSError, ValueError):
                yield json.loads(file.read_bytes().rpartition(b"\n")[0])["process"]


def undisturbed(config: SweepConfig, path: Path) -> Path:
    """Run a sweep in this process, on a thread as its workers do; its directory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_sweep(config, path, progress=False)
    torch.set_num_threads(threads)
    return path


def ordered(run: Run, kind: str) -> pl.DataFrame:
    frame = run.table(kind).collect()
    frame = frame.with_columns(pl.col(pl.Categorical).cast(pl.String))
    keys = [name for name in frame.columns if frame[name].dtype not in (pl.Float32, pl.Float64)]
    return frame.sort(keys, nulls_last=True)


def assert_same(found: Path, expected: Path, exact: bool = True) -> None:
    """No row lost, none twice, and the numbers are those of the undisturbed run."""
    one, two = Run.open(found), Run.open(expected)
    assert one.complete
    verification = one.verify()
    assert verification.sound
    for kind in KINDS:
        assert verification.rows[kind] == two.verify().rows[kind]
        assert_frame_equal(ordered(one, kind), ordered(two, kind), check_exact=exact, rel_tol=1e-5, abs_tol=1e-7)
