"""Who works on a unit: one at a time, and nobody for ever."""

import json
import os
import subprocess
import sys
import time

import pytest

from headscope.sweep import claims as module
from headscope.sweep.claims import Claims
from headscope.sweep.worker import TRIES, given_up


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


def claimed_by(folder, **owner) -> None:
    """A claim that somebody else has left."""
    stranger = Claims(folder, "theirs")
    stranger._owner |= owner
    assert stranger.take("unit") is True


def test_a_dead_process_of_this_machine_loses_its_claim_at_once(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    claimed_by(tmp_path, process=process.pid)
    ours = Claims(tmp_path, "ours")
    assert ours.owners() == {}
    owner = ours.take("unit")
    assert isinstance(owner, dict)
    assert owner["session"] == "theirs"
    assert json.loads((tmp_path / "claims" / "unit").read_text())["process"] == os.getpid()


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path):
    claimed_by(tmp_path, began="1")
    assert isinstance(Claims(tmp_path).take("unit"), dict)


def test_another_machine_s_claim_holds_while_it_is_touched(tmp_path, monkeypatch):
    claimed_by(tmp_path, host="elsewhere", process=1)
    ours = Claims(tmp_path)
    assert ours.take("unit") is False
    file = tmp_path / "claims" / "unit"
    long_ago = time.time() - module.ABANDONED_AFTER - 1
    os.utime(file, (long_ago, long_ago))
    assert isinstance(ours.take("unit"), dict)


def test_claims_are_touched_while_their_owner_works(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOUCHED_EVERY", 0.01)
    ours = Claims(tmp_path)
    ours.take("unit")
    file = tmp_path / "claims" / "unit"
    os.utime(file, (0, 0))
    until = time.monotonic() + 20
    while file.stat().st_mtime == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert file.stat().st_mtime > 0
    ours.close()


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
