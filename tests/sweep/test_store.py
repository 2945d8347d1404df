"""Files are written whole or not at all, and a directory belongs to one run."""

import json
import multiprocessing
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from headscope._files import write_atomic
from headscope.sweep import Run
from headscope.sweep.store import seals
from headscope.sweep.store.manifest import MANIFEST
from headscope.sweep.store.store import EXECUTION, Fit, RunStore, unit_files
from sweep.races import begin_many, share

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
    path = unit_files(store.path, "ablations", ABC)[0]
    whole = path.read_bytes()
    for length in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not store.has("ablations", ABC)
    unit_files(store.path, "ablations", DEF)[0].write_bytes(whole)
    assert not store.has("ablations", DEF)


def test_torn_and_foreign_tensors_count_as_absent(tmp_path):
    store = RunStore(tmp_path / "run", IDENTITY, {})
    assert not store.has("reference", ABC)
    store.write_tensors("reference", ABC, {"mean": torch.arange(6.0)})
    assert store.has("reference", ABC)
    assert torch.equal(store.read_tensors("reference", ABC)["mean"], torch.arange(6.0))
    path = unit_files(store.path, "reference", ABC)[0]
    whole = path.read_bytes()
    for length in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not store.has("reference", ABC)
    unit_files(store.path, "reference", DEF)[0].write_bytes(whole)
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


def test_what_killed_processes_leave_is_listed(tmp_path):
    store = RunStore(tmp_path, IDENTITY, {}, UNITS)
    store.write_table("ablations", ABC, table())
    left = [".execution.json.a.tmp", *(f"{folder}/.{ABC}.a.tmp" for folder in ("ablations", "claims", "failures"))]
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = Run.open(tmp_path).verify()
    assert found.sound
    assert sorted(found.leftovers) == left


def test_unreadable_runs_say_why(tmp_path):
    with pytest.raises(ValueError, match="expected a directory with a headscope run"):
        Run.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json' is damaged"):
        Run.open(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99, this headscope writes and reads 2"):
        Run.open(tmp_path)


@pytest.mark.parametrize(
    "units",
    [
        None,
        {},
        [3],
        [{**UNITS[0], "id": "../../victim"}],
        [{**UNITS[0], "id": "/" + ABC[1:]}],
        [{**UNITS[0], "id": ABC + "\n"}],
        [{**UNITS[0], "id": 3}],
        [{**UNITS[0], "kind": "../ablations"}],
        [{**UNITS[0], "kind": ["ablations"]}],
        [{**UNITS[0], "forwards": "9"}],
        [{**UNITS[0], "group": "../x"}],
    ],
)
def test_manifests_that_list_no_units_are_refused(tmp_path, units):
    """One that was made elsewhere, whole as its checksum says, may say anything."""
    (tmp_path / MANIFEST).write_bytes(seals.to_json({"format": 2, "identity": {}, "units": units}, MANIFEST))
    with pytest.raises(ValueError, match=r"manifest\.json' is damaged"):
        Run.open(tmp_path)


def test_a_run_directory_may_be_a_link_itself(tmp_path):
    RunStore(tmp_path / "run", IDENTITY, {}, UNITS).write_table("ablations", ABC, table())
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert Run.open(tmp_path / "link").complete


def test_images_are_those_of_the_run_s_units(tmp_path):
    RunStore(tmp_path, IDENTITY, {}, UNITS)
    for kind, unit in (("generations", "../../x"), ("../x", ABC), ("ablations", ABC), ("generations", ABC)):
        with pytest.raises(ValueError, match=f"unit: got {kind}/{unit}, expected one of the run's with images"):
            Run.open(tmp_path).images(kind, unit)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b"3", b'"a"', b"[" * 100_000, b"\xff"])
def test_what_is_no_manifest_is_one_sentence(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json' (is damaged|has format None)") as error:
        Run.open(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b"[3]", b"\xff", b"", {"tries": []}, {"tries": [3]}, {}])
def test_what_is_no_record_of_failures_is_none(tmp_path, content):
    """The unit counts as not tried, and the next failure is recorded in its place."""
    store = RunStore(tmp_path, IDENTITY, {}, UNITS)
    record = tmp_path / "failures" / f"{ABC}.json"
    record.parent.mkdir()
    if isinstance(content, dict):
        # whole, so made elsewhere
        content = seals.to_json(content, f"failures/{ABC}.json")
    record.write_bytes(content)
    assert store.failures() == {}
    assert Run.open(tmp_path).status().failed == {ABC: f"its record {str(record)!r} is damaged: counts as untried"}
    store.add_failure(ABC, "ValueError: no", "session")
    assert [entry["error"] for entry in store.failures()[ABC]] == ["ValueError: no"]
    record.write_bytes(content)
    Run.open(tmp_path).mend()
    assert not record.exists()


def test_the_format_before_checksums_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, "identity": IDENTITY, "units": 1}))
    (tmp_path / "units.json").write_text(json.dumps(UNITS))
    for attempt in (lambda: Run.open(tmp_path), lambda: RunStore(tmp_path, IDENTITY, {}, UNITS)):
        with pytest.raises(
            ValueError, match="has format 1, this headscope writes and reads 2; use the version that wrote"
        ):
            attempt()


def test_a_damaged_or_lost_manifest_is_written_anew(tmp_path):
    """By who knows the plan; the ids of the results tell that they are of it."""
    store = RunStore(tmp_path, IDENTITY, {}, UNITS)
    manifest = tmp_path / MANIFEST
    whole = manifest.read_bytes()
    manifest.write_bytes(b"")
    with pytest.raises(ValueError, match=r"manifest\.json' is damaged.*Nothing there is of this configuration"):
        RunStore(tmp_path, IDENTITY, {}, UNITS)
    store.write_table("ablations", ABC, table())
    for damaged in (b"", b"[]", b"\xff", b"[" * 10**5, whole[:-9], whole.replace(b"faces", b"facec"), None):
        manifest.unlink()
        if damaged is not None:
            manifest.write_bytes(damaged)
        what = "is missing" if damaged is None else "is damaged.*"
        with pytest.raises(
            ValueError, match=rf"manifest\.json' {what}. The command that began the run writes it .*retry can't"
        ):
            Run.open(tmp_path)
        with pytest.raises(ValueError, match=r"Nothing there is of this configuration|isn't a headscope run"):
            RunStore(tmp_path, {"seed": 1}, {}, [{**UNITS[0], "id": DEF}])
        store = RunStore(tmp_path, IDENTITY, {}, UNITS)
        assert store.rebuilt == f"{str(manifest)!r} was {'missing' if damaged is None else 'damaged'}"
        assert store.has("ablations", ABC)
        assert manifest.read_bytes() == whole
    assert RunStore(tmp_path, IDENTITY, {}, UNITS).rebuilt is None


def test_how_many_rows_go_at_once_is_measured_again_where_that_was_lost(tmp_path):
    store = RunStore(tmp_path, IDENTITY, {}, UNITS)
    assert store.fit(Fit(64, 8)) == store.fit(Fit(3, 3)) == store.fit() == Fit(64, 8)
    file = tmp_path / EXECUTION
    file.write_bytes(file.read_bytes().replace(b"64", b"24"))
    assert store.fit() is None
    assert store.fit(Fit(32, 4)) == store.fit() == Fit(32, 4)


@pytest.mark.parametrize("content", [{"rows": 0, "clean": 0}, {"rows": -3, "clean": 1}, {"rows": "8", "clean": 1}, {}])
def test_how_many_rows_go_at_once_is_measured_again_where_it_is_none(tmp_path, content):
    """Whole, so made elsewhere: of no rows, work would never end."""
    store = RunStore(tmp_path, IDENTITY, {}, UNITS)
    (tmp_path / EXECUTION).write_bytes(seals.to_json(content, EXECUTION))
    assert store.fit() is None
    assert store.fit(Fit(32, 4)) == store.fit() == Fit(32, 4)


def assert_one_begun(paths: Sequence[Path], outcomes: dict[int, list[str]]) -> None:
    for path, one, two in zip(paths, outcomes[1], outcomes[2], strict=True):
        winner, refused = (1, two) if one == "begun" else (2, one)
        assert "begun" in (one, two)
        assert "holds a run of another configuration" in refused
        run = Run.open(path)
        assert run.manifest["identity"] == {"seed": winner}
        assert {unit["id"][:2] for unit in run.units} == {f"{winner:02d}"}


def raced(paths: Sequence[Path], executor: Executor) -> dict[int, list[str]]:
    """Two of them begin a run in each of the directories at the same time."""
    with executor:
        begun = {seed: executor.submit(begin_many, paths, seed) for seed in (1, 2)}
        return {seed: outcomes.result() for seed, outcomes in begun.items()}


def test_of_two_that_begin_a_run_one_does(tmp_path):
    paths = [tmp_path / str(number) for number in range(20)]
    assert_one_begun(paths, raced(paths, ThreadPoolExecutor(2, initializer=share, initargs=(threading.Barrier(2),))))


@pytest.mark.full
def test_of_two_processes_that_begin_a_run_one_does(tmp_path):
    paths = [tmp_path / str(number) for number in range(500)]
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(2, context, initializer=share, initargs=(context.Barrier(2),))
    assert_one_begun(paths, raced(paths, executor))
