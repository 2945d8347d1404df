"""Who works on a unit: one at a time, and nobody for ever."""

import datetime
import io
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from rich.console import Console

from headscope.sweep import SweepConfig, run_sweep
from headscope.sweep.compute.opened import Execution, Opened
from headscope.sweep.plan.units import CLAIMS
from headscope.sweep.store import claims as module
from headscope.sweep.store.claims import Claims
from headscope.sweep.work.worker import TRIES, given_up


def test_a_unit_is_one_process_s_at_a_time(tmp_path):
    first, second = Claims(tmp_path, "a"), Claims(tmp_path, "b")
    assert first.take("unit") is True
    assert second.take("unit") is False
    assert first.take("unit") is False
    assert list(second.owners()) == ["unit"]
    first.release("unit")
    assert second.take("unit") is True
    second.take("other")
    second.close()
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_run_without_hard_links(ddpm_directory, tmp_path, monkeypatch):
    """As on exFAT: a sweep is run, and its claims are one process's at a time."""

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    asked = SweepConfig(model=ddpm_directory, groups=("faces",), items=1, timesteps=(60,), fills=(), scores=())
    run = run_sweep(asked, tmp_path / "run", progress=False)
    assert run.verify().sound
    assert run.verify().leftovers == []
    test_a_unit_is_one_process_s_at_a_time(tmp_path)


def forgetful(call):
    """A file operation as NFS does it where the first answer is lost: done, asked again, and refused."""

    def run(source, target):
        call(source, target)
        return call(source, target)

    return run


def test_a_link_that_was_made_and_refused_is_our_own_claim(tmp_path, monkeypatch):
    ours, other = Claims(tmp_path), Claims(tmp_path)
    monkeypatch.setattr(os, "link", forgetful(os.link))
    assert ours.take("unit") is True
    assert other.take("unit") is False
    # made by the same process, and yet not by this call
    assert ours.take("unit") is False
    ours.release("unit")
    assert other.take("unit") is True


def test_a_take_over_that_was_done_and_refused_is_one(tmp_path, monkeypatch):
    claimed_by(tmp_path, began="1")
    monkeypatch.setattr(os, "rename", forgetful(os.rename))
    assert isinstance(Claims(tmp_path).take("unit"), dict)
    assert [file.name for file in (tmp_path / "claims").iterdir()] == ["unit"]


def test_a_claim_that_was_taken_over_is_not_released(tmp_path):
    """As of a process that slept for long."""
    slow, other = Claims(tmp_path), Claims(tmp_path)
    slow._owner["began"] = "1"
    assert slow.take("unit") is True
    assert isinstance(other.take("unit"), dict)
    slow.release("unit")
    slow.close()
    assert list(other.owners()) == ["unit"]


def said_by(file) -> dict:
    """What a claim says of its owner."""
    claim = module._parsed(file.read_bytes(), file.name)
    assert claim is not None
    return claim


def claimed_by(folder, unit="unit", **owner) -> None:
    """A claim that somebody else has left."""
    stranger = Claims(folder, "theirs")
    stranger._owner |= owner
    assert stranger.take(unit) is True


def test_a_dead_process_of_this_machine_loses_its_claim_at_once(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    claimed_by(tmp_path, process=process.pid)
    ours = Claims(tmp_path, "ours")
    assert ours.owners() == {}
    owner = ours.take("unit")
    assert isinstance(owner, dict)
    assert owner["session"] == "theirs"
    assert said_by(tmp_path / "claims" / "unit")["process"] == os.getpid()


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path):
    claimed_by(tmp_path, began="1")
    assert isinstance(Claims(tmp_path).take("unit"), dict)


def test_of_two_that_find_a_claim_abandoned_one_gets_it(tmp_path, monkeypatch):
    """Though the second has looked at it before the first took it over."""
    claimed_by(tmp_path, began="1")
    quick, slow = Claims(tmp_path), Claims(tmp_path)
    rename = os.rename

    def late(source, target):
        monkeypatch.setattr(os, "rename", rename)
        assert isinstance(quick.take("unit"), dict)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert slow.take("unit") is False
    assert [file.name for file in (tmp_path / "claims").iterdir()] == ["unit"]
    quick.release("unit")
    assert slow.take("unit") is True


@pytest.fixture
def clock(monkeypatch):
    """Two clocks of this process: `clock.passes(seconds)` on one that only measures, and one that is a day behind."""

    class Clock:
        now = 1000.0

        def passes(self, seconds: float) -> None:
            self.now += seconds

    found = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: found.now)
    monkeypatch.setattr(module.time, "time", lambda: 0.0)
    return found


def counted(folder) -> None:
    """The owner of the claim counts on in it."""
    file = folder / "claims" / "unit"
    sealed, _, count = file.read_bytes().rpartition(b"\n")
    file.write_bytes(sealed + module._last_line(int(count) + 1))


@pytest.mark.parametrize("age", [-86400.0, 0.0, 86400.0])
def test_another_machine_s_claim_holds_while_it_is_counted_on(tmp_path, clock, age):
    """Whatever its clock and the file server's say."""
    claimed_by(tmp_path, host="elsewhere", process=1)
    file = tmp_path / "claims" / "unit"
    ours = Claims(tmp_path)
    for _ in range(5):
        os.utime(file, (age + 1e9, age + 1e9))
        assert ours.take("unit") is False
        clock.passes(module.ABANDONED_AFTER - 1)
        assert ours.take("unit") is False
        counted(tmp_path)
    assert ours.take("unit") is False
    clock.passes(module.ABANDONED_AFTER + 1)
    os.utime(file, (age + 1e9, age + 1e9))
    assert isinstance(ours.take("unit"), dict)


def test_a_container_of_the_same_name_is_another_machine(tmp_path, clock):
    """Its process numbers mean nothing here."""
    claimed_by(tmp_path, machine="another", began="1")
    ours = Claims(tmp_path)
    assert ours.take("unit") is False
    clock.passes(module.ABANDONED_AFTER + 1)
    assert isinstance(ours.take("unit"), dict)


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"null", b'{"host": "elsewh', b"\xff\xfe", b'{"host": 1}', b"[" * 100_000, b"sealed", None]
)
def test_what_is_no_claim_is_taken_over_after_as_long(tmp_path, clock, content):
    file = tmp_path / "claims" / "unit"
    file.parent.mkdir()
    if content is None:
        file.mkdir()
    else:
        # whole, so made elsewhere
        file.write_bytes(module._written({"host": 1}, "unit") if content == b"sealed" else content)
    ours = Claims(tmp_path)
    assert ours.take("unit") is False
    assert list(ours.owners()) == ["unit"]
    assert f"{str(file)!r} can't be read; should that claim stay as it is for 120 s" in ours.waits()["unit"]
    clock.passes(module.ABANDONED_AFTER + 1)
    assert ours.take("unit") == {"session": ""}
    ours.release("unit")
    assert ours.take("unit") is True


def interrupted(call):
    """A file operation that is done, and Ctrl-C or SIGTERM comes before anything else is."""

    def run(*arguments):
        call(*arguments)
        raise KeyboardInterrupt

    return run


@pytest.mark.parametrize("began", [None, "1"], ids=["free", "abandoned"])
def test_an_interrupt_in_the_middle_of_a_claim_leaves_none(tmp_path, monkeypatch, began):
    """Else a notebook that goes on with the run would wait for itself."""
    if began is not None:
        claimed_by(tmp_path, began=began)
    ours = Claims(tmp_path, "ours")
    with monkeypatch.context() as moment:
        moment.setattr(os, "link", interrupted(os.link))
        with pytest.raises(KeyboardInterrupt):
            ours.take("unit")
    ours.close()
    assert list((tmp_path / "claims").glob("[!.]*")) == []
    assert Claims(tmp_path, "later").take("unit") is True


def test_an_interrupt_in_the_middle_of_a_release_leaves_none(tmp_path, monkeypatch):
    ours = Claims(tmp_path, "ours")
    assert ours.take("unit") is True
    with monkeypatch.context() as moment:
        moment.setattr(module, "read_plain", interrupted(module.read_plain))
        with pytest.raises(KeyboardInterrupt):
            ours.release("unit")
    ours.close()
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_claim_that_nobody_may_read_is_waited_for_aloud_and_taken_over(tmp_path, clock, monkeypatch):
    """As one that another user with another umask has made."""
    claimed_by(tmp_path)

    def refused(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(module, "read_plain", refused)
    ours = Claims(tmp_path, "ours")
    assert ours.take("unit") is False
    assert "can't be read; should that claim stay as it is" in ours.waits()["unit"]
    clock.passes(module.ABANDONED_AFTER + 1)
    assert isinstance(ours.take("unit"), dict)


def test_a_folder_that_is_removed_by_whoever_has_finished_the_run_is_no_error(tmp_path, monkeypatch):
    """The sweep looks again and finds everything done."""
    link = os.link

    def finished_elsewhere(source, target):
        shutil.rmtree(tmp_path / "claims")
        link(source, target)

    ours = Claims(tmp_path, "ours")
    with monkeypatch.context() as moment:
        moment.setattr(os, "link", finished_elsewhere)
        assert ours.take("unit") is False
    assert ours.take("unit") is True


def test_claims_are_counted_on_while_their_owner_works(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COUNTED_EVERY", 0.01)
    ours = Claims(tmp_path)
    ours.take("unit")
    file = tmp_path / "claims" / "unit"
    first = said_by(file)
    until = time.monotonic() + 20
    while int(file.read_bytes()[-12:]) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert int(file.read_bytes()[-12:]) >= 3
    assert said_by(file) == first
    # a claim that is somebody else's by now isn't
    stolen = module._written({**first, "token": "another"}, "unit")
    file.write_bytes(stolen)
    time.sleep(0.1)
    assert file.read_bytes() == stolen
    ours.close()


def test_who_is_waited_for_and_how_long(tmp_path):
    claimed_by(tmp_path, host="elsewhere", process=7)
    ours, sibling, here = Claims(tmp_path, "ours"), Claims(tmp_path, "ours"), Claims(tmp_path, "other")
    sibling.take("sibling's")
    here.take("here")
    since = said_by(tmp_path / "claims" / "unit")["since"]
    now = datetime.datetime.now(datetime.UTC)
    assert 0 <= (now - datetime.datetime.fromisoformat(since)).total_seconds() < 60
    begun = said_by(tmp_path / "claims" / "here")["since"]
    assert ours.waits() == {
        "unit": f"process 7 of the machine elsewhere has claimed it since {since}; should that claim stay as it is for"
        " 120 s, its work is done here",
        "here": f"process {os.getpid()} of the machine {socket.gethostname()} has claimed it since {begun}",
    }
    owners = ours.owners()
    assert owners["here"].endswith(f", process {os.getpid()}, since {begun}")
    assert owners["unit"] == (
        f"elsewhere, process 7, since {since} (from another machine it can't be told whether it still works)"
    )


def test_a_sibling_elsewhere_that_is_quiet_is_waited_for_aloud(tmp_path, clock):
    """It may be gone; one that counts on is at work, and nobody hears of it."""
    sibling = Claims(tmp_path, "ours")
    sibling._owner |= {"host": "elsewhere", "process": 7}
    assert sibling.take("unit") is True
    ours = Claims(tmp_path, "ours")
    for _ in range(5):
        assert ours.waits() == {}
        clock.passes(module.QUIET_FOR)
        counted(tmp_path)
    assert ours.waits() == {}
    clock.passes(module.QUIET_FOR + 1)
    assert "process 7 of the machine elsewhere has claimed it" in ours.waits()["unit"]
    assert "its work is done here" in ours.waits()["unit"]


def test_a_run_says_at_once_whom_it_waits_for(ddpm_directory, tmp_path, monkeypatch):
    """And does the work of one that is gone, though its clock was a day ahead."""
    monkeypatch.setattr(module, "ABANDONED_AFTER", 0.5)
    asked = SweepConfig(model=ddpm_directory, groups=("faces",), items=1, timesteps=(60,), fills=(), scores=())
    opened = Opened(asked, Execution(rows=1))
    unit, store = opened.plan.units[0], opened.store(tmp_path / "run")
    claimed_by(store.path, unit.id, host="elsewhere", process=7)
    tomorrow = time.time() + 86400
    os.utime(store.path / CLAIMS / unit.id, (tomorrow, tomorrow))
    text = io.StringIO()
    run = run_sweep(asked, store.path, console=Console(file=text))
    told = f"sweep: waiting for unit {unit.id[:12]} of observations: process 7 of the machine elsewhere has claimed it "
    assert text.getvalue().count(told) == 1
    assert run.complete


@pytest.mark.parametrize(
    ("tries", "expected"),
    [
        ([], False),
        ([{"death": False, "session": "old"}] * (TRIES - 1), False),
        ([{"death": False, "session": "old"}] * TRIES, True),
        # a run that was killed again and again has lost nothing
        ([{"death": True, "session": "old"}] * 10, False),
        ([{"death": True, "session": "now"}] * TRIES, True),
    ],
)
def test_errors_count_for_ever_and_deaths_for_their_session(tries, expected):
    assert given_up(tries, "now") is expected
