"""The command for a short-lived GPU, rehearsed without one: what it writes, what it survives, what it needs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.full, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
# a process imports this first; another one of the environment's goes on being imported
PREAMBLE = """
import os, sys
for _folder in sys.path[1:]:
    _file = os.path.join(_folder, "sitecustomize.py")
    if os.path.exists(_file) and not os.path.samefile(_file, __file__):
        exec(open(_file).read())
        break
"""
# what the first three stages do without, as if it weren't installed
BLOCKED = {
    *("rich", "plotly", "scipy", "polars", "pydantic", "pyarrow", "pandas", "diffusers", "transformers", "typer"),
    *("duckdb", "PIL", "skimage"),
}
BLOCKER = f"""
class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in {BLOCKED} else self.finder.find_spec(name, *rest)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
# a stage that dies as of a segmentation fault
CRASHER = """
if "card.stage" in sys.orig_argv and "smoke" in sys.orig_argv:
    os._exit(11)
"""


def _command(out: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "bench" / "gpu.py"), "--rehearse", "--out", str(out), *options]


def _environment(folder: Path, first: str = "") -> dict[str, str]:
    """An environment in which every process of Python runs some code first."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(PREAMBLE + first)
    path = [str(site), os.environ.get("PYTHONPATH", "")]
    caches = {"TRITON_CACHE_DIR": str(folder / "triton"), "OMP_NUM_THREADS": "1"}
    # the interpreter is for the command to choose
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, **caches, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _run(folder: Path, first: str, *options: str) -> str:
    command = _command(folder / "out", *options)
    run = subprocess.run(
        command, env=_environment(folder, first), capture_output=True, text=True, timeout=1200, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[[str], dict[str, Any]], Path, str]:
    """Reads a stage's record; the folder; all that was printed."""
    light, heavy = (tmp_path_factory.mktemp(name) for name in ("light", "heavy"))
    text = _run(light, BLOCKER, "--budget", "900", "--stages", "smoke,speed,contract")
    text += _run(heavy, "", "--budget", "900", "--stages", "model,sweep,rest")

    def record(stage: str) -> dict[str, Any]:
        folder = light if stage in ("smoke", "speed", "contract") else heavy
        return json.loads((folder / "out" / f"gpu-{stage}.json").read_text())

    return record, light / "out", text


@pytest.mark.parametrize("stage", ["smoke", "speed", "contract", "model", "sweep", "rest"])
def test_a_stage_tells_all_of_its_rows(rehearsal, stage: str):
    record, _, text = rehearsal
    found = record(stage)
    assert found["state"] == "done"
    assert found["mode"] == "rehearse"
    assert found["rows"]
    assert {"device", "versions", "date", "seconds"} <= found.keys()
    assert f"== {stage}: done" in text


def test_smoke(rehearsal):
    rows = rehearsal[0]("smoke")["rows"]
    assert len(rows) == 17
    assert all(row["right"] for row in rows)
    assert all(value <= 1 for row in rows for value in row["error_over_bound"].values())
    assert rehearsal[0]("smoke")["compiled_ahead"]["kernels"] >= 1
    assert rehearsal[0]("smoke")["compiled_ahead"]["failed"] == []


def test_speed(rehearsal):
    record, out, _ = rehearsal
    rows = record("speed")["rows"]
    calls = {row["call"] for row in rows if "call" in row and "milliseconds" in row}
    assert {"SDPA", "headscope, entropy + gate", "two SDPA calls", "materialised", "FlexAttention"} <= calls
    for row in rows:
        if "milliseconds" in row:
            low, middle, high = row["milliseconds"]
            assert 0 < low <= middle <= high
            assert row["tflops_per_second"] > 0
    ours = [row for row in rows if row.get("call") == "headscope, entropy + gate"]
    assert all(0 <= row["error_over_bound"]["entropy"] <= 1 for row in ours)
    assert all(row["host_microseconds"] > 0 for row in ours)
    sound = {row["candidate"]: row["sound"] for row in rows if "candidate" in row}
    assert sound == {"sound": True, "hanging": False, "refused": False}
    reasons = {row["candidate"]: row.get("error") for row in rows if "candidate" in row}
    assert "no answer in time" in reasons["hanging"]
    json.loads((out / "choices.json").read_text())


def test_contract(rehearsal):
    record = rehearsal[0]("contract")
    assert record["outcomes"] == [{"passed": 1, "failed": 1, "skipped": 0, "lost the card": 2}]
    right = {row["test"].rpartition("::")[2]: row["right"] for row in record["rows"]}
    # one fails; one lost the card, for another's fault; one loses it by itself
    assert right == {
        "test_that_fails": False,
        "test_that_breaks_the_card_once": True,
        "test_that_breaks_the_card": False,
    }
    assert "output: 2.5 > 1" in next(row["reason"] for row in record["rows"] if "fails" in row["test"])


def test_model(rehearsal):
    rows = rehearsal[0]("model")["rows"]
    assert not [row for row in rows if "error" in row]
    ways = {(row["how"], row["way"]) for row in rows}
    assert {("as it is", "headscope, entropy at every site"), ("as it is", "stock SDPA")} <= ways
    assert ("graphs", "headscope, a head removed per site, a CUDA graph") in ways
    assert ("compiled", "headscope, entropy at every site, compiled") in ways
    # of the spans that stand in for kernels: 0 to 20 and 30 to 40
    assert all(row["idle_share"] == 0.25 for row in rows if row["how"] == "as it is")


def test_sweep(rehearsal):
    record = rehearsal[0]("sweep")
    contenders = {row["contender"]: row["times_the_loop"]["p50"] for row in record["rows"]}
    assert contenders["the loop"] == 1
    assert contenders["headscope"] > 0
    assert record["result"]["model"] == "bundled"


def test_rest(rehearsal):
    rows = rehearsal[0]("rest")["rows"]
    assert not [row for row in rows if "error" in row]
    parts = {row["part"]: row for row in rows}
    assert {"backward", "forward", "determinism", "compute-sanitizer memcheck", "random calls from 0"} <= parts.keys()
    assert all(row["right"] for row in rows if "right" in row)
    assert rehearsal[0]("rest")["outcomes"] == [{"passed": 1, "failed": 0, "skipped": 0, "lost the card": 0}]


def test_the_summary_names_what_is_wrong(rehearsal):
    text = rehearsal[2]
    assert "next: the first wrong result, before any speed is believed: contract" in text
    assert "candidate hanging" in text


def test_a_stage_that_dies_stops_nothing(tmp_path: Path):
    text = _run(tmp_path, CRASHER, "--budget", "600", "--stages", "smoke,contract")
    assert "== smoke: failed, code 11" in text
    assert "== contract: done" in text
    assert not (tmp_path / "out" / "gpu-smoke.json").exists()
    assert "next: the first wrong result" in text


def test_a_stage_that_the_budget_does_not_hold_is_skipped(tmp_path: Path):
    text = _run(tmp_path, CRASHER, "--budget", "50", "--stages", "contract,smoke,sweep")
    assert "== contract skipped: " in text
    assert "== sweep skipped: " in text
    # a shorter one behind it is not
    assert "== smoke: failed, code 11" in text
    assert not (tmp_path / "out" / "gpu-contract.json").exists()
    assert "why these stages ended: smoke (failed, code 11)" in text


def test_killed_it_has_told_all(tmp_path: Path):
    """And nothing goes on."""
    command = _command(tmp_path / "out", "--budget", "600", "--stages", "smoke")
    told = []
    with subprocess.Popen(command, env=_environment(tmp_path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while len(told) < 2:
            line = process.stdout.readline()
            assert line, told
            if line.split()[:2] == ["smoke", "right"]:
                told.append(line)
        process.send_signal(signal.SIGKILL)
    record = json.loads((tmp_path / "out" / "gpu-smoke.json").read_text())
    assert record["state"] == "running"
    assert len(record["rows"]) >= 2
    assert not [file for file in (tmp_path / "out").iterdir() if file.suffix == ".json" and not file.read_text()]
    end = time.monotonic() + 30
    while _alive(str(tmp_path)):
        assert time.monotonic() < end, _alive(str(tmp_path))
        time.sleep(0.2)


def _alive(text: str) -> list[str]:
    """Processes whose command or environment names the text."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                seen = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:
                continue
            if text.encode() in seen:
                found.append(seen[:200].decode(errors="replace"))
    return found


def test_needs():
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--needs"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    stages = {line.split()[0]: line.split()[2:] for line in lines}
    assert all("==" in package for package in stages)
    assert all(set(names) <= {"model", "sweep"} and names for names in stages.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "smoke,fast"], "--stages: got fast, expected names out of smoke, speed"),
        (["--budget", "-1"], "--budget: got -1, expected a positive number of seconds"),
    ],
)
def test_bad_options(tmp_path: Path, options: list[str], message: str):
    run = subprocess.run(_command(tmp_path, *options), capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert message in run.stderr
