"""What the tests of faults share: a small sweep, and whether two of its runs hold the same rows."""

import contextlib
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import torch
from polars.testing import assert_frame_equal
from rich.console import Console

from headscope.sweep import Run, SweepConfig, Workers, run_sweep
from headscope.sweep.compute.opened import Execution, Opened
from headscope.sweep.plan.units import CLAIMS
from headscope.sweep.store.claims import Claims

# a script that runs the sweep of a model directory into a run directory, with so many processes (of a Ray cluster)
SWEEP = """
import os, sys
import torch
torch.set_num_threads(1)
from headscope.sweep import SweepConfig, Workers, run_sweep

if __name__ == "__main__":
    model, out, executor, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    config = SweepConfig(
        model=model, groups=("faces", "lfw"), items=6, timesteps=(60, 500), fills=("mean", "zero"), reference_items=8
    )
    print("ready", flush=True)
    address = sys.argv[5] if len(sys.argv) > 5 else None
    run_sweep(config, out, progress=False, workers=Workers(executor, count, address=address))
"""
KINDS = ("observations", "ablations")


class Destroyed:
    """Sends a signal while it is destroyed, where Python ignores what a handler raises."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


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


def awaited(config: SweepConfig, path: Path, workers: Workers, heard: Callable[[str], str]) -> tuple[str, str]:
    """Run a sweep whose last unit another session has claimed, until somebody is heard to wait for it; what was
    expected to be said, and what was said then.

    Args:
        heard: what has been said so far, from what the sweep's own console shows.
    """
    opened = Opened(config, Execution(rows=4))
    unit = opened.plan.units[-1]
    theirs = Claims(opened.store(path).path, "theirs")
    assert theirs.take(unit.id) is True
    since = json.loads((path / CLAIMS / unit.id).read_bytes().rpartition(b"\n")[0])["since"]
    expected = (
        f"sweep: waiting for unit {unit.id[:12]} of {unit.kind}: process {os.getpid()} of the machine"
        f" {socket.gethostname()} has claimed it since {since}"
    )
    text, said = io.StringIO(), []

    def listen() -> None:
        until = time.monotonic() + 120
        while expected not in heard(text.getvalue()) and time.monotonic() < until:
            time.sleep(0.05)
        running = Run.open(path).status().running
        said.append(heard(text.getvalue()) + "".join(running.values()))
        theirs.close()

    listener = threading.Thread(target=listen)
    listener.start()
    run = run_sweep(config, path, batch=4, workers=workers, console=Console(file=text))
    listener.join()
    assert run.complete
    return expected, said[0]


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
