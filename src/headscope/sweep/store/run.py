"""Reading a run: its tables, how far it is, and whether its files are whole."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from headscope._extras import require
from headscope._files import local_path
from headscope.sweep.plan.units import CLAIMS, FAILURES, KINDS, TABLE
from headscope.sweep.store.claims import Claims
from headscope.sweep.store.manifest import read_manifest
from headscope.sweep.store.store import (
    check_folders,
    check_whole,
    damaged_failures,
    file_problem,
    read_tries,
    unit_files,
    unit_problem,
)

# threads that check files
READERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        units: kind: (finished, all).
        forwards: (finished, all).
        failed: unit: the last error, of the units that went wrong and aren't finished.
        running: unit: who works on it.
    """

    units: dict[str, tuple[int, int]]
    forwards: tuple[int, int]
    failed: dict[str, str]
    running: dict[str, str]

    @property
    def complete(self) -> bool:
        return self.forwards[0] == self.forwards[1] and all(done == every for done, every in self.units.values())


@dataclass(frozen=True)
class Verification:
    """The findings of a reader of every file of a run.

    Attributes:
        rows: kind: rows of its finished units.
        missing: units without a file, as kind/unit.
        torn: files that aren't whole: the next run into the directory computes them again, and takes units for untried
            or unclaimed whose record of failures or claim is one.
        foreign: files that aren't this run's.
        leftovers: temporary files of processes that were killed.
    """

    rows: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Every unit is there, whole, and nothing else is."""
        return not (self.missing or self.torn or self.foreign)


class Run:
    """A finished or unfinished run, for reading.

    Attributes:
        path: its directory.
        manifest: what it was asked to do, with what, when.
        units: what it is made of: dictionaries with id, kind, group, items, timestep, forwards.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], units: list[dict[str, Any]]) -> None:
        self.path = path
        self.manifest = manifest
        self.units = units
        self._known = {(unit["kind"], unit["id"]) for unit in units}

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a run directory.

        Raises:
            ValueError: it isn't one, its manifest is damaged, or a folder in it is a link.
        """
        path = local_path("run", path)
        check_folders(path)
        manifest = read_manifest(path)
        return cls(path, manifest, manifest["units"])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The tables that a report is made of and that have rows: some of observations, ablations, generations."""
        return tuple(name for name in self.tables if KINDS[name].reported)

    @property
    def tables(self) -> tuple[str, ...]:
        """All tables that have rows: `kinds`, then the others, as attributions, set_ablations, set_generations."""
        kinds = sorted((kind for kind in KINDS.values() if TABLE in kind.files), key=lambda kind: not kind.reported)
        return tuple(kind.name for kind in kinds if any((self.path / kind.name).glob(f"*{TABLE}")))

    @property
    def complete(self) -> bool:
        """True if every unit of the run is finished."""
        return all(self._problem(unit) is None for unit in self.units)

    def table(self, kind: str) -> pl.LazyFrame:
        """The rows of every finished unit of a kind, as a lazy polars table.

        Files are read in the order of their names, so that two runs of one configuration give equal tables. Each is
        checked against the checksum in it first.

        Raises:
            ValueError: no unit of that kind is finished, or a file is damaged or isn't this run's.
        """
        return pl.scan_parquet(self._files(kind))

    def duckdb(self) -> Any:
        """A DuckDB connection in which each table of the run is a view.

        Raises:
            ImportError: duckdb isn't installed.
            ValueError: a file is damaged or isn't this run's.
        """
        connection = require("duckdb", "sweep").connect()
        for kind in self.tables:
            connection.read_parquet([str(file) for file in self._files(kind)]).create_view(kind)
        return connection

    def status(self) -> Status:
        """How far the run is: a unit whose file is damaged isn't finished."""
        units: dict[str, tuple[int, int]] = {}
        forwards = [0, 0]
        unfinished = []
        for unit in self.units:
            finished = self._problem(unit) is None
            done, every = units.get(unit["kind"], (0, 0))
            units[unit["kind"]] = (done + finished, every + 1)
            forwards[0] += unit["forwards"] * finished
            forwards[1] += unit["forwards"]
            if not finished:
                unfinished.append(unit["id"])
        failed = {}
        for unit in unfinished:
            record = self.path / FAILURES / f"{unit}.json"
            tries = read_tries(record)
            if tries is None:
                failed[unit] = f"its record {str(record)!r} is damaged: counts as untried"
            elif tries:
                failed[unit] = tries[-1]["error"]
        running = {unit: owner for unit, owner in Claims(self.path).owners().items() if unit in set(unfinished)}
        return Status(units, (forwards[0], forwards[1]), failed, running)

    def images(self, kind: str, unit: str) -> dict[str, np.ndarray]:
        """The images beside a finished unit's table of generations: "clean" [items, height, width, 3] and "edited", one
        for each row of the table, uint8.

        Raises:
            ValueError: no unit of the run, or a file of it is missing or damaged.
        """
        if (kind, unit) not in self._known or not KINDS[kind].images:
            raise ValueError(f"unit: got {kind}/{unit}, expected one of the run's with images")
        table, path = unit_files(self.path, kind, unit)
        for file in (table, path):
            check_whole(file)
        images = load_file(path)
        shapes = [images[name].shape for name in ("clean", "edited") if name in images]
        fits = [len(shape) == 4 and shape[-1] == 3 and shape[1:] == shapes[0][1:] for shape in shapes] == [True, True]
        rows = pq.read_metadata(table).num_rows
        if not fits or any(image.dtype != np.uint8 for image in images.values()) or shapes[1][0] != rows:
            raise ValueError(
                f"run: {str(path)!r} holds no images of {rows} rows, expected uint8 [images, height, width, 3]"
            )
        return images

    def mend(self) -> None:
        """Let units that failed too often be tried again, and drop damaged files, so that they are computed anew."""
        for record in (self.path / FAILURES).glob("*.json"):
            _drop(record)
        for name in self.verify().torn:
            _drop(self.path / name)

    def verify(self) -> Verification:
        """Check every file of the run against the checksum in it."""
        found = Verification()
        known = set()
        for unit in self.units:
            kind = unit["kind"]
            files = unit_files(self.path, kind, unit["id"])
            known.update(files)
            problems = [(file, file_problem(file)) for file in files]
            for file, problem in problems:
                if problem == "torn":
                    found.torn.append(_relative(file, self.path))
                elif problem == "foreign":
                    found.foreign.append(_relative(file, self.path))
            if any(problem == "missing" for _, problem in problems):
                found.missing.append(f"{kind}/{unit['id']}")
            elif KINDS[kind].files[0] == TABLE and problems[0][1] is None:
                found.rows[kind] = found.rows.get(kind, 0) + pq.read_metadata(files[0]).num_rows
        for path in sorted(file for kind in KINDS for file in (self.path / kind).glob("*")):
            if path.name.startswith(".") and path.name.endswith(".tmp"):
                found.leftovers.append(_relative(path, self.path))
            elif path not in known:
                found.foreign.append(_relative(path, self.path))
        for folder in (self.path, self.path / FAILURES, self.path / CLAIMS):
            found.leftovers.extend(_relative(file, self.path) for file in sorted(folder.glob(".*.tmp")))
        damaged = (*damaged_failures(self.path), *Claims(self.path).damaged())
        found.torn.extend(_relative(file, self.path) for file in damaged)
        return found

    def _problem(self, unit: dict[str, Any]) -> str | None:
        return unit_problem(self.path, unit["kind"], unit["id"])

    def _files(self, kind: str) -> list[Path]:
        if kind not in self.tables:
            raise ValueError(
                f"kind: got {kind!r}, expected one of {', '.join(self.tables) or 'none: nothing is finished'}"
            )
        units = {unit["id"] for unit in self.units if unit["kind"] == kind}
        files = sorted((self.path / kind).glob(f"*{TABLE}"))
        for file in files:
            if file.stem not in units:
                raise ValueError(f"run: {str(file)!r} isn't this run's; remove it")
        # reading and checksums leave the interpreter's lock to others
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(_check_all, (files[first::READERS] for first in range(READERS))))
        return files


@contextmanager
def as_written(run: Run) -> Iterator[None]:
    """Raises ValueError where the tables of a run, which may come from elsewhere, aren't as headscope writes them."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"run: the tables of {str(run.path)!r} aren't as headscope writes them ({reason})") from error


def _check_all(files: list[Path]) -> None:
    for file in files:
        check_whole(file)


def _drop(path: Path) -> None:
    """Remove what another process may have removed by now."""
    if path.is_dir() and not path.is_symlink():
        # in a file's place
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
