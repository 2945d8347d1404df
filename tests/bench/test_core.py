"""The measuring core: rounds, clocks, memory and records, without anything that a GPU machine may lack."""

import json
import subprocess
import sys

import numpy as np
import pytest

from headscope.bench import memory, records, timing


def test_every_clock_is_asked_once_per_round():
    asked: list[str] = []

    def clock(name: str) -> float:
        asked.append(name)
        return float(len(asked))

    clocks = {name: lambda name=name: clock(name) for name in "ab"}
    found = timing.interleaved(clocks, 2, warm_up=1)
    assert "".join(asked) == "ababab"
    assert {name: values.tolist() for name, values in found.items()} == {"a": [3, 5], "b": [4, 6]}
    asked.clear()
    rotated = timing.interleaved(clocks, 2, warm_up=0, rotated=True)
    assert "".join(asked) == "abba"
    assert {name: values.tolist() for name, values in rotated.items()} == {"a": [1, 4], "b": [2, 3]}


def test_ratios_are_of_the_same_round():
    assert timing.ratio(np.array([2.0, 20.0, 6.0]), np.array([1.0, 10.0, 2.0])) == [2.0, 2.0, 2.5]
    assert timing.percentiles(np.arange(11.0)) == pytest.approx([2.0, 5.0, 8.0])
    assert timing.quartiles(np.arange(9.0)) == [2.0, 4.0, 6.0]


def test_the_peak_of_a_call_is_noticed():
    size = 64 * 2**20
    peak = memory.peak_bytes(lambda: np.ones(size, np.uint8), "cpu")
    # None where the system doesn't allow it
    assert peak is None or size / 2 < peak < 2 * size
    assert memory.resident_bytes() <= memory.peak_resident_bytes()


def test_a_record_names_its_device_and_versions(tmp_path):
    path = records.write(tmp_path / "new" / "record.json", {**records.machine("cpu"), "rows": [1]})
    record = json.loads(path.read_text())
    assert {"device", "threads", "date", "versions", "rows"} == record.keys()
    assert record["versions"]["torch"]


def test_the_core_needs_torch_and_numpy_alone():
    heavy = "('diffusers', 'transformers', 'plotly', 'rich', 'polars', 'pyarrow', 'scipy')"
    code = "import sys, headscope.bench.memory, headscope.bench.records, headscope.bench.timing\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
