"""What processes of a sweep tell the one that started them."""

import io
import multiprocessing
import signal
import struct
import time
from collections import deque

import pytest
from rich.console import Console

from headscope.sweep import SweepConfig
from headscope.sweep.compute.opened import Execution, Opened
from headscope.sweep.plan.units import Unit
from headscope.sweep.store.room import DiskFull
from headscope.sweep.work.executors import processes, ray, slurm
from headscope.sweep.work.executors.member import Telling, take_part, tell
from headscope.sweep.work.progress import Progress
from headscope.sweep.work.worker import WorkOrder, work
from sweep.faults import Destroyed

UNIT = Unit("ablations", "faces", (0, 1), 60, None, 10, "unit0")


class Heard:
    """A report that keeps what it hears."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        return lambda *content: self.calls.append((name, *content))


def test_a_report_arrives_as_it_was_made():
    messages: list[tuple] = []
    telling, heard = Telling(messages.append), Heard()
    telling.advance(3)
    telling.finished(UNIT)
    telling.failed(UNIT, "ValueError: no", True)
    telling.waiting(UNIT, "process 7")
    for message in messages:
        tell(message, {UNIT.id: UNIT}, heard)  # pyright: ignore[reportArgumentType]
    assert heard.calls == [
        ("advance", 3),
        ("finished", UNIT),
        ("failed", UNIT, "ValueError: no", True),
        ("waiting", UNIT, "process 7"),
    ]


def said_by(*sent, rest: bytes = b"") -> str:
    """What is shown of a process that sent messages, and so much of one more, and died."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    for message in sent:
        sending.send(message)
    if rest:
        processes.os.write(sending.fileno(), rest)
    sending.close()
    text = io.StringIO()
    member = processes._Process(0, None, receiving)  # pyright: ignore[reportArgumentType]
    processes._hear(member, {UNIT.id: UNIT}, Progress("sweep", (UNIT,), console=Console(file=text)))
    return text.getvalue()


def test_a_process_killed_in_the_middle_of_a_message_is_dead_and_no_more():
    waiting = ("waiting", UNIT.id, "a")
    for rest in (b"", b"\0", struct.pack("!i", 100), struct.pack("!i", 100) + b"x" * 10):
        assert said_by(waiting, rest=rest) == "sweep: waiting for unit unit0 of ablations: a\n"


def test_what_stops_a_process_stops_the_sweep():
    with pytest.raises(DiskFull, match="no room"):
        said_by(("full", 28, "no room"))
    with pytest.raises(RuntimeError, match="couldn't go on:\nTraceback"):
        said_by(("error", "Traceback"))


@pytest.fixture
def asked(ddpm_directory):
    return SweepConfig(model=ddpm_directory, groups=("faces",), items=1, timesteps=(60,), fills=(), scores=())


def test_that_nobody_is_left_to_be_told_is_no_failure_of_a_unit(asked, tmp_path):
    """As where the process that began the sweep was killed: the work ends."""
    opened = Opened(asked, Execution(rows=1))
    context = opened.context(opened.store(tmp_path / "run"))
    receiving, sending = multiprocessing.Pipe(duplex=False)
    receiving.close()
    with pytest.raises(KeyboardInterrupt):
        work(context, "ours", processes._telling(sending))
    assert context.store.failures() == {}


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR2])
def test_no_second_signal_disturbs_the_end_of_a_slurm_job(first):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    heard = []
    try:
        stop = slurm._then_stop(lambda number, frame: heard.append(number), signal.SIGUSR2)
        with pytest.raises(KeyboardInterrupt):
            stop(first, None)
        assert heard == [first]
        for number in before:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_slurm_job_ends_though_python_ignored_the_interrupt(asked, monkeypatch):
    """What comes while a destructor runs is raised where nobody hears of it."""
    pytest.importorskip("submitit")
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]

    def works(order: WorkOrder) -> None:
        Destroyed(signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(slurm, "take_part", works)
    began = time.monotonic()
    try:
        assert slurm._Job()(WorkOrder(asked, "nowhere", Execution(rows=1), "ours")) == slurm.STOPPED
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert time.monotonic() - began < 30


def test_a_member_s_log_says_what_failed(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("headscope.sweep.work.worker.compute_unit", lambda *_: 1 / 0)
    take_part(WorkOrder(asked, str(tmp_path / "run"), Execution(rows=1), "ours"))
    assert capsys.readouterr().err.count("failed, will be tried again: ZeroDivisionError") == 2


def test_an_actor_is_asked_twice_at_once():
    """By the sweep and by the end of its work: each message goes to one of them."""

    class Emptied(deque):
        def __len__(self):
            # what another thread takes meanwhile
            return super().__len__() + 1

    actor = ray._Actor()
    actor._said = Emptied([("advance", 3)])
    assert actor.news() == [("advance", 3)]
    assert actor.news() == []
