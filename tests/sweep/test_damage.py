"""Damaged files of a run: no number of theirs is ever used, they are named, and computed anew.

Bits are flipped one at a time, at random places, in every kind of file that a run has.
"""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from typer.testing import CliRunner

from headscope.cli import app
from headscope.sweep import Run, SweepConfig, run_sweep
from headscope.sweep.plan.units import CLAIMS, FAILURES, KINDS, TABLE
from headscope.sweep.store.claims import Claims
from headscope.sweep.store.manifest import MANIFEST
from headscope.sweep.store.sheet import write_contact_sheets
from headscope.sweep.store.store import EXECUTION, RunStore
from headscope.sweep.work.worker import TRIES

# optional kinds run where they are named, and not in that run
SHARDS = tuple(name for name, kind in KINDS.items() if not kind.optional)
TABLES = tuple(name for name in SHARDS if TABLE in KINDS[name].files)
# the images that the generations are made of
DRAWN = tuple(f"{kind}, images" for kind in KINDS if KINDS[kind].images)


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
    suffix = "safetensors" if images or folder not in TABLES else "parquet"
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
        store.read_tensors(kind, file.stem) if kind not in TABLES else run.table(kind)


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


def records(run: Path, tries: int) -> tuple[Path, Path]:
    """The record of a unit that failed so often and isn't done, and the claim of a process that works on it."""
    unit = min((run / "attributions").iterdir())
    unit.unlink()
    store = RunStore(run, Run.open(run).manifest["identity"], {})
    assert Claims(run, "theirs").take(unit.stem) is True
    for _ in range(tries):
        store.add_failure(unit.stem, "ValueError: a cosmic ray", "theirs")
    return run / FAILURES / f"{unit.stem}.json", run / CLAIMS / unit.stem


def damages(content: bytes, times: int) -> Iterator[bytes]:
    """A file with a bit flipped, each in turn, and what else becomes of one."""
    random = np.random.default_rng(0)
    for place in random.integers(0, len(content), times).tolist():
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(random.integers(8))
        yield bytes(flipped)
    yield from (b"", content[: len(content) // 2], b"\xff\xfe", b"not JSON", b"[1]", b"null")


def flip_records(run: Path, times: int) -> None:
    record, claim = records(run, TRIES)
    unit = record.stem
    said = Run.open(run).status()
    assert said.failed[unit] == "ValueError: a cosmic ray"
    store, ours = RunStore(run, Run.open(run).manifest["identity"], {}), Claims(run, "ours")
    whole = record.read_bytes()
    for content in damages(whole, times):
        record.write_bytes(content)
        opened = Run.open(run)
        assert opened.status().failed == {unit: f"its record {str(record)!r} is damaged: counts as untried"}
        assert opened.verify().torn == [f"{FAILURES}/{record.name}"]
        assert store.failures() == {}
    record.write_bytes(whole)
    whole = claim.read_bytes()
    for content in damages(whole, times):
        claim.write_bytes(content)
        running, torn = Run.open(run).status().running, Run.open(run).verify().torn
        if content[:-12] == whole[:-12]:
            # all but the count
            assert (running, torn) == (said.running, [])
            continue
        assert running == {unit: "somebody whose claim can't be read"}
        assert torn == [f"{CLAIMS}/{unit}"]
        assert f"its claim {str(claim)!r} can't be read" in ours.waits()[unit]


def test_a_flipped_bit_in_a_record_or_claim_is_found(run):
    flip_records(run, 20)


@pytest.mark.full
def test_every_flipped_bit_in_a_record_or_claim_is_found(run):
    flip_records(run, 400)


@pytest.mark.parametrize("again", [False, True])
def test_units_of_damaged_records_and_claims_are_done(run, again):
    """By whoever goes on with the run, and by retry; nobody waits for a claim that retry has dropped."""
    expected = run_tables(run)
    record, claim = records(run, TRIES)
    record.write_bytes(record.read_bytes()[:-1])
    if again:
        claim.write_bytes(claim.read_bytes()[:-20])
        result = CliRunner().invoke(app, ["sweep", "retry", str(run), "--quiet"])
        assert result.exit_code == 0, result.output
    else:
        claim.unlink()
        said = io.StringIO()
        config = SweepConfig.from_json(Run.open(run).manifest["config"])
        run_sweep(config, run, console=Console(file=said, width=1000))
        assert f"{str(record)!r} is damaged; what failed there counts as untried" in said.getvalue()
    assert Run.open(run).verify().sound
    found = run_tables(run)
    assert {kind: table.equals(expected[kind]) for kind, table in found.items()} == dict.fromkeys(TABLES, True)


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
