"""What the command for a GPU is made of, without one: processes that hang or die, budgets, what a folder comes to."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))

from card import summary, supervise  # noqa: E402
from card.device import idle_share  # noqa: E402
from card.stage import Report  # noqa: E402
from card.workers import Worker, in_processes, is_broken  # noqa: E402


def test_every_task_has_an_answer_whatever_becomes_of_its_process():
    tasks = ["1", "nothing", "2", "3"]
    answers = {a.task: a for a in in_processes(int, tasks, count=2, seconds_each=60, left=lambda: 60.0)}
    assert {task: answers[task].result for task in tasks} == {"1": 1, "nothing": None, "2": 2, "3": 3}
    assert "ValueError: invalid literal" in (answers["nothing"].error or "")
    assert [a.error for a in in_processes(os._exit, [3], count=1, seconds_each=60, left=lambda: 60.0)] == [
        "the process died, code 3"
    ]


def test_a_process_that_hangs_is_killed_and_the_next_task_gets_another():
    end = time.monotonic() + 300
    found = list(in_processes(time.sleep, [600, 0], count=1, seconds_each=5, left=lambda: end - time.monotonic()))
    assert [(a.task, a.error) for a in found] == [(600, "no answer in time"), (0, None)]


def test_tasks_that_time_is_too_short_for_are_named():
    found = list(in_processes(int, ["1"], count=1, seconds_each=5, left=lambda: 0.0))
    assert [(a.task, a.error) for a in found] == [("1", "out of time")]


def test_a_process_without_its_card_is_ended():
    worker = Worker()
    # the error quotes it
    worker.send(int, "CUDA error: an illegal memory access was encountered")
    assert is_broken(worker.answer(60).error or "")
    assert not worker.alive
    assert not is_broken("AssertionError: output: 2.5 > 1")


def test_the_share_of_time_without_a_kernel():
    # overlapping, within another, apart
    spans = [(0, 10), (5, 20), (6, 8), (30, 40)]
    assert idle_share(spans) == {"kernels": 4, "span_seconds": 40e-9, "idle_share": pytest.approx(0.25)}
    assert idle_share([])["kernels"] == 0


def test_a_report_is_whole_after_every_line(tmp_path, capsys):
    report = Report("smoke", tmp_path, "measure")
    for count in (1, 2):
        report.tell("right", check=str(count), right=True)
        assert len(json.loads((tmp_path / "gpu-smoke.json").read_text())["rows"]) == count
    assert capsys.readouterr().out == "smoke     right\nsmoke     right\n"
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-smoke.json"]


@pytest.mark.parametrize(
    ("budget", "expected"), [(540, ["smoke", "speed", "rest"]), (110, ["smoke", "rest"]), (50, ["smoke"]), (5, [])]
)
def test_stages_that_fit(budget: float, expected: list[str], monkeypatch, capsys):
    """On a clock that each stage moves on by what it is expected to take."""
    clock, run = [0.0], []

    class Running:
        def __init__(self, name, options):
            self.name = name

        def finish(self, seconds):
            run.append(self.name)
            clock[0] += supervise.STAGES[self.name].seconds
            # and a stage gets no more than there is
            assert seconds <= budget
            return "done"

        def end(self):
            pass

    monkeypatch.setattr(supervise, "Running", Running)
    monkeypatch.setattr(supervise.time, "monotonic", lambda: clock[0])
    options = argparse.Namespace(budget=budget, mode="measure")
    ends = supervise.run_stages(["smoke", "speed", "rest"], options)
    assert run == expected
    assert [name for name, end in ends.items() if end == "done"] == expected
    assert all(end.startswith("skipped: ") for name, end in ends.items() if name not in expected)


def _records(folder: Path, **rows: list[dict]) -> None:
    for name, own in rows.items():
        (folder / f"gpu-{name}.json").write_text(json.dumps({"state": "done", "rows": own}))


def test_a_wrong_result_comes_before_any_speed(tmp_path):
    wrong = {"check": "every edit", "right": False, "error_over_bound": {"output": 2.6e3, "entropy": 0.5}}
    lost = {"test": "a", "right": None, "reason": "CUDA error"}
    _records(tmp_path, smoke=[wrong], contract=[lost, lost | {"right": True}, lost | {"test": "b"}])
    text = summary.show(tmp_path, {})
    assert "wrong: 1\n  smoke: every edit: {'output': 2600.0}" in text
    # "a" passed when it was run again
    assert "not known: 1\n  contract: b: CUDA error" in text
    assert "next: the first wrong result, before any speed is believed: smoke: every edit" in text


def test_a_candidate_that_hangs_is_only_not_chosen(tmp_path):
    hangs = {"candidate": "ping-pong", "shape": "(1)", "sound": False, "error": "no answer in time"}
    fast = {"candidate": "overlapped", "shape": "(1)", "sound": True, "speed_over_the_rule": 1.2}
    _records(tmp_path, speed=[hangs, fast | {"speed_over_best_stock": [0.8, 0.9, 1.0]}])
    text = summary.show(tmp_path, {})
    assert "speed: (1) candidate ping-pong: no answer in time" in text
    assert "candidate (1): overlapped, 1.20 of the rule's, 0.90 of stock's best" in text
    assert "next: take choices.json into the kernels" in text
