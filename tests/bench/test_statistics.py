"""The simulation of the study's statistics runs from its first row to its record."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_the_simulation_runs_and_records(tmp_path):
    file = tmp_path / "simulation.json"
    command = [sys.executable, "bench/statistics", "--trials", "20", "--draws", "99", "--out", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=True)
    assert "| mean, normal | " in done.stdout
    record = json.loads(file.read_text())
    assert record["trials"] == 20
    cell = record["coverage"]["recorded effects, relative"]["40"]["headscope"]
    assert 0.5 < cell["covered"] <= 1
    # an effect of one and a half standard deviations is found, also in twenty trials
    assert record["power"]["effect, normal, n = 40"]["1.5"]["headscope"]["rejected"] > 0.8
    assert record["size"]["effect, normal, n = 40"]["headscope"]["rejected"] < 0.5
