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
    """The forward's."""
    return printed(tmp_path_factory)


@pytest.fixture(scope="module")
def backward_cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Those of gradients and key_mass, whose kernels compile for long."""
    return printed(tmp_path_factory, "backward")


def printed(tmp_path_factory: pytest.TempPathFactory, *arguments: str) -> dict[str, Any]:
    """What tests/kernels/dry_launches.py prints, from a process without the interpreter.

    Triton's cache is its own: a binary holds the time of its source file, which a cached one may have from another
    checkout of the same source.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT / "kernels"), str(ROOT / "tests"), environment.get("PYTHONPATH")])
    )
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("dry_launches.py")), *arguments],
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


@pytest.mark.full
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", ["key_value", "query"])
def test_reports_compile_what_runs_backward(backward_cases: dict[str, Any], kernel: str, dim: int):
    binaries = backward_cases["backward"][f"{kernel}, {dim}"]
    assert binaries["launched"] == binaries["static"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["everything", "descriptors", "key_mass"])
def test_passes_repeated(backward_cases: dict[str, Any], name: str):
    """Every kernel of a backward pass, and that of key_mass: as Triton bound it for the first call."""
    first, again = backward_cases["passes"][name]["first"], backward_cases["passes"][name]["again"]
    assert first["new"] == len(first["launches"]) == {"everything": 4, "descriptors": 3, "key_mass": 1}[name]
    assert again["new"] == 0
    assert again["launches"] == first["launches"]
    assert backward_cases["passes"][name]["alive"] == 0
    if name == "descriptors":
        described = [
            argument[0] for launch in first["launches"] for argument in launch["arguments"] if is_descriptor(argument)
        ]
        assert {"key", "value"} <= set(described)


def is_descriptor(argument: Any) -> bool:
    """Whether it is a tensor descriptor, as dry_launches.py writes one, and no tuple of numbers."""
    return isinstance(argument, list) and argument != [] and isinstance(argument[0], str)


@pytest.mark.full
def test_passes_told_apart(backward_cases: dict[str, Any]):
    passes = backward_cases["passes"]
    names = ("needed", "unaligned", "longer", "scale", "statistics")
    # the rows' kernel and the query's
    assert [passes[name]["new"] for name in names] == [2] * 5
    needed, *others = (passes[name]["launches"][-1] for name in names)
    assert all(launch["arguments"] != needed["arguments"] for launch in others[1:])
    assert others[0]["binary"] != needed["binary"] != others[3]["binary"]
    assert [passes[f"key_mass, {name}"]["new"] for name in ("scale", "causal")] == [1, 1]


@pytest.mark.full
def test_passes_aliased(backward_cases: dict[str, Any]):
    aliased, whole = backward_cases["passes"]["aliased"], backward_cases["passes"]["everything"]["first"]
    assert aliased["new"] == 0
    for launch, other in zip(aliased["launches"][1:], whole["launches"][1:], strict=True):
        assert launch["arguments"][1] == launch["arguments"][2]
        assert other["arguments"][1:3] == ["key", "value"]


def test_descriptors_of_another_class(cases: dict[str, Any]):
    """Gluon's have a layout besides."""
    found = cases["other descriptors"]
    assert "layout" in found["fields"]
    assert all(found["fields"].values())
    assert found["class"]
    assert found["base"]
    assert found["first's"]
    assert (found["grid"], found["count"]) == ([3, 1, 1], 7)
