"""Files are written whole or not at all, and a directory belongs to one run."""

import pyarrow as pa
import pytest
import torch

from headscope._files import write_atomic
from headscope.sweep import Run
from headscope.sweep.store import MANIFEST, RunStore

IDENTITY = {"seed": 0, "timesteps": [1, 2]}
ABC, DEF = "abc".ljust(64, "0"), "def".ljust(64, "0")
UNITS = [{"id": ABC, "kind": "ablations", "group": "faces", "items": 3, "timestep": 1, "forwards": 9}]


def table(rows: int = 3) -> pa.Table:
    return pa.table({"head": pa.array(range(rows), pa.int16()), "loss": pa.array([0.5] * rows)})


def test_a_table_is_there_once_written(tmp_path):
    store = RunStore(tmp_path / "run", IDENTITY, {}, UNITS)
    assert not store.has("ablations", ABC)
    store.write_table("ablations", ABC, table())
    assert store.has("ablations", ABC)
    assert Run.open(tmp_path / "run").table("ablations").collect()["loss"].to_list() == [0.5] * 3
    assert Run.open(tmp_path / "run").kinds == ("ablations",)
    with pytest.raises(ValueError, match="kind: got 'observations', expected one of ablations"):
        Run.open(tmp_path / "run").table("observations")


def test_torn_and_foreign_tables_count_as_absent(tmp_path):
    store = RunStore(tmp_path / "run", IDENTITY, {})
    store.write_table("ablations", ABC, table())
    path = store.table_path("ablations", ABC)
    whole = path.read_bytes()
    for length in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not store.has("ablations", ABC)
    store.table_path("ablations", DEF).write_bytes(whole)
    assert not store.has("ablations", DEF)


def test_torn_and_foreign_tensors_count_as_absent(tmp_path):
    store = RunStore(tmp_path / "run", IDENTITY, {})
    assert not store.has("reference", ABC)
    store.write_tensors("reference", ABC, {"mean": torch.arange(6.0)})
    assert store.has("reference", ABC)
    assert torch.equal(store.read_tensors("reference", ABC)["mean"], torch.arange(6.0))
    path = store.tensor_path("reference", ABC)
    whole = path.read_bytes()
    for length in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not store.has("reference", ABC)
    store.tensor_path("reference", DEF).write_bytes(whole)
    assert not store.has("reference", DEF)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(file):
        file.write(b"new")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_another_configuration_is_refused(tmp_path):
    RunStore(tmp_path / "run", IDENTITY, {})
    RunStore(tmp_path / "run", dict(IDENTITY), {})
    with pytest.raises(ValueError, match=r"another configuration.*\n  seed: 0 there, 1 now"):
        RunStore(tmp_path / "run", {**IDENTITY, "seed": 1}, {})


def test_a_directory_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="isn't a headscope run"):
        RunStore(tmp_path, IDENTITY, {})
    with pytest.raises(ValueError, match="isn't a headscope run"):
        RunStore(tmp_path / "thesis.tex", IDENTITY, {})


def test_a_run_killed_before_its_manifest_can_be_started_again(tmp_path):
    (tmp_path / f".{MANIFEST}.abc.tmp").write_text("{")
    RunStore(tmp_path, IDENTITY, {})
    assert Run.open(tmp_path).manifest["identity"] == IDENTITY


def test_unreadable_runs_say_why(tmp_path):
    with pytest.raises(ValueError, match="expected a directory with a headscope run"):
        Run.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json' is damaged"):
        Run.open(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99, this headscope writes and reads 2"):
        Run.open(tmp_path)
