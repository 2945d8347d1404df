"""Launches on a GPU that isn't there: what the driver is given the second time, and that reports compile what runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/kernels/dry_launches.py prints, from a process without the interpreter.

    Triton's cache is its own: a binary holds the time of its source file, which a cached one may have from another
    checkout of the same source.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "kernels"), environment.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("dry_launches.py"))],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", ["plain", "descriptors", "split", "specialised", "everything"])
def test_repeated(cases: dict[str, Any], name: str):
    """The second call's own tensors, and everything else as Triton bound it for the first."""
    first, again = cases[name]["first"], cases[name]["again"]
    assert (first.pop("new"), again.pop("new")) == (1, 0)
    assert again == first
    assert cases[name]["alive"] == 0


def test_what_is_told_apart(cases: dict[str, Any]):
    plain = cases["plain"]["first"]
    assert cases["unaligned"]["new"] == cases["longer"]["new"] == 1
    assert cases["unaligned"]["binary"] != plain["binary"]
    assert cases["longer"]["arguments"] != plain["arguments"]


def test_chosen_by_the_table(cases: dict[str, Any]):
    """A launcher's own choice follows the table where the entry's schedule serves the call."""
    specialised = cases["specialised"]["first"]["binary"]
    assert cases["by table"]["binary"] == specialised
    assert cases["not in table"]["new"] == 1
    assert cases["not in table"]["binary"] != specialised


def test_aliased(cases: dict[str, Any]):
    """A key that was also the value in one call isn't in the next."""
    assert cases["aliased"]["new"] == cases["apart"]["new"] == 0
    assert cases["aliased"]["arguments"][1] == cases["aliased"]["arguments"][2]
    assert cases["apart"]["arguments"][1:3] == ["key", "value"]


@pytest.mark.parametrize("name", ["static", "static, descriptors", "static, specialised"])
def test_reports_compile_what_runs(cases: dict[str, Any], name: str):
    assert cases[name]["launched"] == cases[name]["static"]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", ["key_value", "query"])
def test_reports_compile_what_runs_backward(cases: dict[str, Any], kernel: str, dim: int):
    binaries = cases["backward"][f"{kernel}, {dim}"]
    assert binaries["launched"] == binaries["static"]
