"""Damaged files of a run: no number of theirs is ever used, they are named, and computed anew.

Bits are flipped one at a time, at random places, in every kind of file that a run has.
"""

import io
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from typer.testing import CliRunner

from headscope.cli import app
from headscope.sweep import Run, SweepConfig, run_sweep
from headscope.sweep.claims import Claims
from headscope.sweep.sheet import write_contact_sheets
from headscope.sweep.store import CLAIMS, EXECUTION, FAILURES, GENERATED, MANIFEST, TABLES, TENSORS, RunStore

SHARDS = (*TABLES, *TENSORS)
# the images that the generations are made of
DRAWN = tuple(f"{kind}, images" for kind in GENERATED)


@pytest.fixture
def whole(run_of_every_kind) -> Path:
    return run_of_every_kind


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def file_of(run: Path, kind: str) -> Path:
    """A file of that kind."""
    if kind in (MANIFEST, EXECUTION):
        return run / kind
    folder, _, images = kind.partition(", ")
    suffix = "safetensors" if images or kind in TENSORS else "parquet"
    return min((run / folder).glob(f"*.{suffix}"))


def assert_named_not_used(path: Path, kind: str, file: Path) -> None:
    """Whatever reads the damaged file says so, and which it is; what doesn't read it works."""
    if kind == MANIFEST:
        with pytest.raises(ValueError, match=r"manifest\.json' is damaged"):
            Run.open(path)
        return
    run = Run.open(path)
    store = RunStore(path, run.manifest["identity"], {})
    if kind == EXECUTION:
        assert store.fit() is None
        return
    assert run.verify().torn == [f"{file.parent.name}/{file.name}"]
    done, every = run.status().units[file.parent.name]
    assert done == every - 1
    assert not run.complete
    assert not store.has(file.parent.name, file.stem)
    if kind in DRAWN:
        with pytest.raises(ValueError, match=rf"{file.name}' is damaged"):
            write_contact_sheets(run)
        return
    with pytest.raises(ValueError, match=rf"{file.name}' is damaged"):
        store.read_tensors(kind, file.stem) if kind in TENSORS else run.table(kind)


def flip_bits(run: Path, kind: str, times: int) -> None:
    file = file_of(run, kind)
    content = file.read_bytes()
    random = np.random.default_rng(len(kind))
    # half of them at the end, where a Parquet file says what it holds, or the beginning, where the others do
    places = random.integers(0, len(content), times)
    notes = random.integers(0, min(len(content), 2000), times // 2)
    places[: times // 2] = len(content) - 1 - notes if file.suffix == ".parquet" else notes
    for place in places.tolist():
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        assert_named_not_used(run, kind, file)
    file.write_bytes(content)
    assert Run.open(run).verify().sound


@pytest.mark.parametrize("kind", [*SHARDS, *DRAWN, MANIFEST, EXECUTION])
def test_a_flipped_bit_is_found_before_its_file_is_used(run, kind):
    flip_bits(run, kind, 10)


@pytest.mark.full
@pytest.mark.parametrize("kind", [*SHARDS, *DRAWN, MANIFEST, EXECUTION])
def test_every_flipped_bit_is_found_before_its_file_is_used(run, kind):
    flip_bits(run, kind, 400)


@pytest.mark.parametrize("folder", [FAILURES, CLAIMS])
def test_flipped_bits_where_no_numbers_are_change_none(run, folder):
    """Records of failures and claims aren't sealed: damaged ones say something else, or nothing."""
    expected = run_tables(run)
    unit = Run.open(run).units[-1]
    file = min((run / unit["kind"]).iterdir())
    file.unlink()
    store = RunStore(run, Run.open(run).manifest["identity"], {})
    claims = Claims(run, "theirs")
    assert claims.take(unit["id"])
    store.add_failure(unit["id"], "ValueError: a cosmic ray", "theirs")
    path = run / folder / (f"{unit['id']}.json" if folder == FAILURES else unit["id"])
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        status = Run.open(run).status()
        assert set(status.failed) == {unit["id"]}
        assert set(status.running) <= {unit["id"]}
        store.failures()
        Claims(run, "ours").waits()
    path.write_bytes(content)
    claims.close()
    result = CliRunner().invoke(app, ["sweep", "retry", str(run), "--quiet"])
    assert result.exit_code == 0, result.output
    assert {kind: table.equals(expected[kind]) for kind, table in run_tables(run).items()} == dict.fromkeys(
        TABLES, True
    )


def run_tables(run: Path) -> dict[str, pl.DataFrame]:
    opened = Run.open(run)
    return {kind: opened.table(kind).collect() for kind in opened.tables}


def test_damaged_files_are_computed_anew(run, whole):
    files = [file_of(run, kind) for kind in (*SHARDS, *DRAWN)]
    for number, file in enumerate(files):
        content = bytearray(file.read_bytes())
        content[len(content) // 2 + number] ^= 1
        file.write_bytes(content)
    result = CliRunner().invoke(app, ["sweep", "verify", str(run)])
    assert result.exit_code == 1
    assert all(f"torn: {file.parent.name}/{file.name}" in result.output for file in files)
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 2
    assert "is damaged: its bytes don't give the checksum in it" in result.output
    result = CliRunner().invoke(app, ["sweep", "retry", str(run), "--quiet"])
    assert result.exit_code == 0, result.output
    assert_as_before(run, whole)


def assert_as_before(run: Path, whole: Path) -> None:
    assert Run.open(run).verify().sound
    for kind in (*SHARDS, *DRAWN):
        assert file_of(run, kind).read_bytes() == file_of(whole, kind).read_bytes()


def test_a_run_that_is_gone_on_with_says_what_it_computes_anew(run, whole):
    damaged = file_of(run, "ablations")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    config = SweepConfig.from_json(Run.open(run).manifest["config"])
    (run / MANIFEST).write_text("{")
    said = io.StringIO()
    run_sweep(config, run, console=Console(file=said, width=1000))
    assert f"{str(run / MANIFEST)!r} was damaged; written anew from the plan, results that are whole" in said.getvalue()
    assert f"{str(damaged)!r} is damaged or lacks its images; computed anew" in said.getvalue()
    assert_as_before(run, whole)
