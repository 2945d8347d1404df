"""Whatever happens to a run, it ends with the undisturbed run's table."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from headscope._signals import AGAIN, terminable
from headscope.sweep import DiskFull, Run, SweepConfig, SweepFailed, run_sweep
from headscope.sweep.plan.units import CLAIMS, FAILURES
from headscope.sweep.work import worker
from sweep.faults import Destroyed, assert_same, script, undisturbed


def config(model: str, **fields) -> SweepConfig:
    return SweepConfig(
        **{"model": model, "groups": ("faces",), "items": 5, "timesteps": (60, 500), "fills": ("zero",), **fields}
    )


@pytest.fixture(scope="module")
def whole(ddpm_directory, tmp_path_factory):
    """The undisturbed run of the script, in this process."""
    asked = config(ddpm_directory, groups=("faces", "lfw"), items=6, fills=("mean", "zero"), reference_items=8)
    return undisturbed(asked, tmp_path_factory.mktemp("whole") / "run")


def kill_after(command: list[str], delay: float) -> None:
    """Start a command, which prints "ready" when its work begins, and kill it so many seconds later."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()


def killed_until_finished(
    folder: Path, model: str, whole: Path, delays: list[float], executor: str, count: int
) -> None:
    command = [*script(folder), model, str(folder / "run"), executor, str(count)]
    for delay in delays:
        kill_after(command, delay)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert_same(folder / "run", whole)


@pytest.mark.full
def test_a_kill_changes_nothing(ddpm_directory, whole, tmp_path):
    killed_until_finished(tmp_path, ddpm_directory, whole, [1.0], "local", 1)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_twenty_kills_change_nothing(ddpm_directory, whole, tmp_path, seed):
    random = np.random.default_rng(seed)
    killed_until_finished(tmp_path, ddpm_directory, whole, random.uniform(0.0, 8.0, 8).tolist(), "local", 1)
    # processes of a killed one end, too
    (tmp_path / "several").mkdir()
    delays = random.uniform(3.0, 15.0, 2).tolist()
    killed_until_finished(tmp_path / "several", ddpm_directory, whole, delays, "processes", 2)


@pytest.mark.full
def test_two_processes_share_a_run(ddpm_directory, whole, tmp_path):
    command = [*script(tmp_path), ddpm_directory, str(tmp_path / "run"), "local", "1"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(200) for process in both] == [0, 0]
    assert_same(tmp_path / "run", whole)


def test_torn_and_foreign_files_are_reported_and_mended(ddpm_directory, tmp_path):
    asked = config(ddpm_directory)
    run_sweep(asked, tmp_path / "whole", progress=False)
    run = run_sweep(asked, tmp_path / "run", progress=False)
    cut, flipped, *_ = sorted((run.path / "ablations").glob("*.parquet"))
    cut.write_bytes(cut.read_bytes()[:-20])
    content = bytearray(flipped.read_bytes())
    content[40] ^= 0xFF
    flipped.write_bytes(content)
    (run.path / "ablations" / "stranger.parquet").write_bytes(
        (tmp_path / "whole" / "ablations" / cut.name).read_bytes()
    )
    found = run.verify()
    assert not found.sound
    assert sorted(found.torn) == [f"ablations/{cut.name}", f"ablations/{flipped.name}"]
    assert found.foreign == ["ablations/stranger.parquet"]
    assert not run.complete
    with pytest.raises(ValueError, match=r"is damaged: its bytes|isn't this run's"):
        run.table("ablations")
    (run.path / "ablations" / "stranger.parquet").unlink()
    run.mend()
    assert len(run.verify().missing) == 2
    run_sweep(asked, tmp_path / "run", progress=False)
    assert_same_tables(tmp_path)


def assert_same_tables(folder: Path) -> None:
    assert_same(folder / "run", folder / "whole")


def test_a_full_disk_stops_the_run_and_loses_nothing(ddpm_directory, tmp_path):
    """No file may grow past a limit, as on a disk without room."""
    asked = config(ddpm_directory)
    run_sweep(asked, tmp_path / "whole", progress=False)
    sizes = sorted(file.stat().st_size for file in (tmp_path / "whole").rglob("*.parquet"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the manifest and the small tables fit, the largest doesn't
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, before[1]))
    try:
        with pytest.raises(DiskFull, match="no room to write results"):
            run_sweep(asked, tmp_path / "run", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run = Run.open(tmp_path / "run")
    assert not run.complete
    assert run.verify().torn == []
    assert list((tmp_path / "run" / CLAIMS).iterdir()) == []
    run_sweep(asked, tmp_path / "run", progress=False)
    assert_same_tables(tmp_path)


def test_a_disk_without_room_for_the_manifest(ddpm_directory, tmp_path, monkeypatch):
    """Is named with the file, and what is left of it doesn't stand in the way of the next run."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    asked = config(ddpm_directory, items=1, timesteps=(60,), fills=(), scores=())
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(DiskFull, match=r"to write results \(No space left on device: '.*run/manifest\.json'\)"):
            run_sweep(asked, tmp_path / "run", progress=False)
    assert list((tmp_path / "run").iterdir()) == []
    assert run_sweep(asked, tmp_path / "run", progress=False).complete


@pytest.mark.full
def test_a_small_disk(ddpm_directory, whole, tmp_path):
    """A real file system of 96 KiB, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount")
    command = [*script(tmp_path), ddpm_directory, str(disk / "run"), "local", "1"]
    try:
        failed = subprocess.run(command, capture_output=True, text=True)
        assert failed.returncode
        assert "no room to write results" in failed.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        assert_same(disk / "run", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def failing(monkeypatch, times: int) -> list[str]:
    """The second ablation goes wrong so often; returns the units that were tried, as they are."""
    run_unit = worker.compute_unit
    tried: list[str] = []

    def run(unit, context, advance):
        tried.append(unit.id)
        victim = [other.id for other in context.plan.units if other.kind == "ablations"][1]
        if unit.id == victim and tried.count(victim) <= times:
            raise RuntimeError("a cosmic ray")
        return run_unit(unit, context, advance)

    monkeypatch.setattr(worker, "compute_unit", run)
    return tried


def test_a_unit_that_fails_twice_is_done_the_third_time(ddpm_directory, tmp_path, monkeypatch):
    asked = config(ddpm_directory)
    run_sweep(asked, tmp_path / "whole", progress=False)
    failing(monkeypatch, 2)
    run = run_sweep(asked, tmp_path / "run", progress=False)
    assert_same_tables(tmp_path)
    assert list((run.path / FAILURES).iterdir()) == []


def test_a_unit_that_fails_three_times_is_recorded_and_the_rest_goes_on(ddpm_directory, tmp_path, monkeypatch):
    asked = config(ddpm_directory)
    run_sweep(asked, tmp_path / "whole", progress=False)
    tried = failing(monkeypatch, 10)
    with pytest.raises(SweepFailed, match=r"1 of \d+ units failed; the first: RuntimeError: a cosmic ray"):
        run_sweep(asked, tmp_path / "run", progress=False)
    run = Run.open(tmp_path / "run")
    status = run.status()
    assert status.units["ablations"][0] == status.units["ablations"][1] - 1
    (failed,) = status.failed
    assert tried.count(failed) == 3
    assert len(json.loads((run.path / FAILURES / f"{failed}.json").read_text())["tries"]) == 3
    # the same command doesn't try again, and says so
    with pytest.raises(SweepFailed):
        run_sweep(asked, tmp_path / "run", progress=False)
    assert tried.count(failed) == 3
    monkeypatch.undo()
    run.mend()
    run_sweep(SweepConfig.from_json(run.manifest["config"]), tmp_path / "run", progress=False)
    assert_same_tables(tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_processes_gives_one_table(ddpm_directory, whole, tmp_path, count):
    command = [*script(tmp_path), ddpm_directory, str(tmp_path / "run"), "processes", str(count)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert_same(tmp_path / "run", whole)


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in listed if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.full
def test_a_dead_process_is_replaced(ddpm_directory, whole, tmp_path):
    command = [*script(tmp_path), ddpm_directory, str(tmp_path / "run"), "processes", "2"]
    claims = tmp_path / "run" / CLAIMS
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        victim = None
        until = time.monotonic() + 120
        while victim is None and time.monotonic() < until:
            time.sleep(0.02)
            for file in claims.glob("[!.]*") if claims.exists() else ():
                try:
                    victim = json.loads(file.read_bytes().rpartition(b"\n")[0])["process"]
                except (OSError, ValueError):
                    continue
        assert victim in children(process.pid)
        os.kill(victim, signal.SIGKILL)
        assert process.wait(200) == 0
    assert_same(tmp_path / "run", whole)


def alive(group: int) -> bool:
    """Whether any process of the group is."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_sigterm_puts_away_what_was_computed(ddpm_directory, tmp_path, monkeypatch):
    """From Python: the units before the one that it came in are written, nothing stays claimed, the status is 143."""
    asked = config(ddpm_directory)
    run_unit, done = worker.compute_unit, []

    def run(unit, context, advance):
        if len(done) == 2:
            signal.raise_signal(signal.SIGTERM)
        results = run_unit(unit, context, advance)
        done.append(unit.id)
        return results

    monkeypatch.setattr(worker, "compute_unit", run)
    with pytest.raises(SystemExit) as ended:
        run_sweep(asked, tmp_path / "run", progress=False)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    found = Run.open(tmp_path / "run")
    assert len(done) == 2
    assert sum(finished for finished, _ in found.status().units.values()) == 2
    assert found.status().failed == found.status().running == {}
    assert list((found.path / CLAIMS).iterdir()) == []


def test_an_interrupt_in_place_of_sigterm_s_is_sigterm(monkeypatch):
    """As Ray's, which hears of signals while it waits and raises what it takes for Ctrl-C."""

    def waits() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(SystemExit) as ended, terminable():
        waits()
    assert ended.value.code == 143
    # and Ctrl-C stays what it is
    with pytest.raises(KeyboardInterrupt), terminable():
        raise KeyboardInterrupt


INTERRUPTS = pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)


@INTERRUPTS
def test_an_interrupt_that_python_ignores_comes_again(number, raised):
    """Long before what is done there ends, and once: what puts work away isn't interrupted."""
    hook, put_away, began = sys.unraisablehook, [], time.monotonic()

    def work() -> None:
        Destroyed(number)
        try:
            time.sleep(60)
        finally:
            time.sleep(4 * AGAIN)
            put_away.append(True)

    with pytest.raises(raised), terminable():
        work()
    assert put_away
    assert time.monotonic() - began < 30
    assert sys.unraisablehook is hook
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@INTERRUPTS
def test_an_interrupt_that_python_ignores_at_the_end_is_raised_there(number, raised):
    with pytest.raises(raised), terminable():
        Destroyed(number)
    # and doesn't come again
    time.sleep(4 * AGAIN)


def test_a_process_that_works_for_another_ends_though_python_ignored_the_interrupt():
    work = f"""
import os, signal, time
from headscope._signals import end_once
class Destroyed:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
end_once()
Destroyed()
try:
    time.sleep(60)
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep({4 * AGAIN})
    print("put away")
"""
    ended = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "put away\n", "")


def test_a_handler_of_the_program_s_own_stays(ddpm_directory, tmp_path):
    """And in a thread, where none can be set, a sweep runs as ever."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        asked = config(ddpm_directory, items=1, timesteps=(60,), fills=(), scores=())
        with terminable():
            signal.raise_signal(signal.SIGTERM)
        run_sweep(asked, tmp_path / "run", progress=False)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    thread = threading.Thread(target=run_sweep, args=(asked, tmp_path / "other"), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert Run.open(tmp_path / "other").complete


# who is sent what, and how the process that was started ends
CTRL_C = (signal.SIGINT, os.killpg, -signal.SIGINT, b"KeyboardInterrupt")
SIGTERM = (signal.SIGTERM, os.kill, 143, b"")


@pytest.mark.full
@pytest.mark.parametrize(
    ("sent", "executor", "count"),
    [
        (CTRL_C, "local", 1),
        (CTRL_C, "processes", 2),
        (SIGTERM, "local", 1),
        (SIGTERM, "processes", 2),
        ((signal.SIGTERM, os.killpg, 143, b""), "processes", 2),
    ],
)
def test_ctrl_c_and_sigterm_stop_cleanly(ddpm_directory, whole, tmp_path, sent, executor, count):
    """The terminal sends Ctrl-C to every process of the group; `kill` sends SIGTERM to one, systemd to all."""
    number, send, status, said = sent
    command = [*script(tmp_path), ddpm_directory, str(tmp_path / "run"), executor, str(count)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        until = time.monotonic() + 120
        while not any((tmp_path / "run").glob("ablations/*.parquet")) and time.monotonic() < until:
            time.sleep(0.02)
        send(process.pid, number)
        assert process.wait(60) == status
        assert process.stderr is not None
        errors = process.stderr.read()
        assert said in errors
        assert said or b"Traceback" not in errors
    # multiprocessing's own tracker of resources ends a moment after its last user
    until = time.monotonic() + 30
    while alive(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(process.pid)
    assert not any((tmp_path / "run" / CLAIMS).glob("[!.]*"))
    assert Run.open(tmp_path / "run").verify().torn == []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert_same(tmp_path / "run", whole)
