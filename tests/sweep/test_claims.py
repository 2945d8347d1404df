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
