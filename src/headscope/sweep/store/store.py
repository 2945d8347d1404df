"""A run directory: one manifest, and one or two files per finished unit, each written whole or not at all.

    manifest.json                       what the run is: identity, configuration, versions, device, git revision, and
                                        the units it is made of
    execution.json                      how many rows go through the model at once, as the first process measured it
    <kind>/<unit>.parquet               a unit's table, <kind>/<unit>.safetensors its tensors; which of the two there
                                        are, and what is in them, `sweep/compute/kinds` says
    failures/<unit>.json                the errors of a unit, try by try
    claims/<unit>                       who is working on a unit now
    jobs/                               the output of Slurm's jobs

A file is written under a temporary name, flushed to disk and renamed. A unit is done when its files are there and
whole, as the checksums in them say (`seals`), which all files have but Slurm's.
"""

import contextlib
import datetime
import io
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save

from headscope._files import read_plain, write_atomic, write_first
from headscope.sweep.plan.units import FAILURES, FOLDERS, KINDS, TABLE, TENSORS, Unit
from headscope.sweep.store import seals
from headscope.sweep.store.manifest import FORMAT, MANIFEST, DamagedManifest, check_identity, read_manifest

EXECUTION = "execution.json"
_SEAL = "headscope.seal"


@dataclass(frozen=True)
class Fit:
    """How much passes through a denoiser at once.

    Attributes:
        rows: of a forward.
        clean: of a clean forward whose outputs are cached for edited ones; 0 where not even one's fit in memory.
    """

    rows: int
    clean: int


@dataclass(frozen=True)
class Results:
    """The results of a unit, one for each file that its kind writes.

    Attributes:
        table: the rows.
        tensors: by name.
    """

    table: pa.Table | None = None
    tensors: dict[str, torch.Tensor] | None = None


class RunStore:
    """The files of one run.

    Args:
        units: what the manifest says of each unit; written when the run is new, and where its manifest was damaged or
            lost: the results there tell that it is this run.

    Attributes:
        rebuilt: why the manifest was written anew, None where it wasn't.

    Raises:
        ValueError: the directory holds a run of another configuration, something that isn't a run, or a folder that is
            a link.
    """

    def __init__(
        self, path: Path, identity: dict[str, Any], description: dict[str, Any], units: Sequence[dict[str, Any]] = ()
    ) -> None:
        check_folders(path)
        self.path = path
        self.rebuilt: str | None = None
        manifest = path / MANIFEST
        said = {"format": FORMAT, "identity": identity, **description, "units": list(units)}
        content = seals.to_json(said, MANIFEST)
        if not manifest.is_file():
            # a run killed while its manifest was being written has left nothing but that
            strange = path.exists() and not (path.is_dir() and all(map(_is_beginning, path.iterdir())))
            lost = strange and self._has_results_of(units)
            # another process may have begun the same run meanwhile
            if strange and not lost and not manifest.is_file():
                raise ValueError(
                    f"out: got {str(path)!r}, which holds something that isn't a headscope run; expected a new one"
                )
            path.mkdir(parents=True, exist_ok=True)
            # of several processes that begin one, one's manifest stands, and the units are in it
            if write_first(manifest, content) and lost:
                self.rebuilt = f"{str(manifest)!r} was missing"
        try:
            found = read_manifest(path)
        except DamagedManifest as error:
            if not self._has_results_of(units):
                raise ValueError(
                    f"out: {error}. Nothing there is of this configuration; choose another directory"
                ) from None
            write_atomic(manifest, content)
            found = read_manifest(path)
            self.rebuilt = f"{str(manifest)!r} was damaged"
        check_identity(path, found["identity"], identity)

    def _has_results_of(self, units: Sequence[dict[str, Any]]) -> bool:
        """True if there are results in the directory, all of units of this plan: their ids are digests of it."""
        results = {unit for _, unit in self.listed()}
        return bool(results) and results <= {unit["id"] for unit in units}

    def has(self, kind: str, unit_id: str) -> bool:
        """True if the unit is done: its files are there, whole, and written for it. A damaged one counts as absent and
        is written again."""
        return unit_problem(self.path, kind, unit_id) is None

    def listed(self) -> set[tuple[str, str]]:
        """(kind, unit) of every unit whose file seems to be there, without opening any."""
        found = set()
        for name, kind in KINDS.items():
            suffix = kind.files[0]
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path / name) as entries:
                found |= {(name, entry.name.removesuffix(suffix)) for entry in entries if entry.name.endswith(suffix)}
        return found

    def write(self, unit: Unit, results: Results) -> None:
        """Write what a unit has computed; from then on it is done."""
        writers = {TABLE: (self.write_table, results.table), TENSORS: (self.write_tensors, results.tensors)}
        # the first file comes last: it is what makes the unit done
        for suffix in reversed(KINDS[unit.kind].files):
            write, content = writers[suffix]
            if content is None:
                raise ValueError(
                    f"{unit.kind}: compute gave nothing for its {suffix} file, expected what `files` names"
                )
            write(unit.kind, unit.id, content)

    def write_table(self, kind: str, unit_id: str, table: pa.Table) -> None:
        path = self.path / kind / f"{unit_id}{TABLE}"
        footer = {**(table.schema.metadata or {}), _SEAL: seals.blank(_name(path))}
        floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
        content = io.BytesIO()
        pq.write_table(
            table.replace_schema_metadata(footer),
            content,
            compression="zstd",
            use_byte_stream_split=floats,
            write_page_checksum=True,
            use_dictionary=[field.name for field in table.schema if field.name not in floats],
        )
        _write_sealed(path, content.getvalue())

    def write_tensors(self, kind: str, unit_id: str, tensors: dict[str, torch.Tensor]) -> None:
        path = self.path / kind / f"{unit_id}{TENSORS}"
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        _write_sealed(path, save(whole, {_SEAL: seals.blank(_name(path))}))

    def read_tensors(self, kind: str, unit_id: str) -> dict[str, torch.Tensor]:
        """A unit's tensors.

        Raises:
            ValueError: the file is missing, damaged, or another's.
        """
        path = self.path / kind / f"{unit_id}{TENSORS}"
        check_whole(path)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def fit(self, measured: Fit | None = None) -> Fit | None:
        """How many rows go through the model at once, the same for all processes of the run: so that their numbers
        agree to the last bit. The first to measure decides; None where nobody has."""
        file = self.path / EXECUTION
        if measured is not None:
            if file.is_file() and self.fit() is None:
                file.unlink(missing_ok=True)
            write_first(file, seals.to_json({"rows": measured.rows, "clean": measured.clean}, EXECUTION))
        found = _read_json(file, EXECUTION)
        if not found:
            return None
        rows, clean = found.get("rows"), found.get("clean")
        # a whole one may have been made elsewhere; of no rows, work would never end
        if isinstance(rows, int) and isinstance(clean, int) and rows >= 1 and clean >= 0:
            return Fit(rows, clean)
        return None

    def failures(self) -> dict[str, list[dict[str, Any]]]:
        """Of every unit that went wrong, its tries, first to last. A damaged record counts as none."""
        return {file.stem: tries for file in _records(self.path) if (tries := read_tries(file))}

    def add_failure(self, unit_id: str, error: str, session: str, death: bool = False) -> None:
        """Record that a unit went wrong, or that the process working on it died."""
        file = self.path / FAILURES / f"{unit_id}.json"
        tries = read_tries(file) or []
        tries.append(
            {
                "error": error,
                "death": death,
                "session": session,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "host": socket.gethostname(),
                "process": os.getpid(),
            }
        )
        write_atomic(file, seals.to_json({"tries": tries}, _name(file)))

    def clear_failure(self, unit_id: str) -> None:
        (self.path / FAILURES / f"{unit_id}.json").unlink(missing_ok=True)


def check_folders(run: Path) -> None:
    """Raises ValueError where a folder of a run is a link: what is written or dropped there would be elsewhere."""
    for name in (*KINDS, *FOLDERS):
        if (run / name).is_symlink():
            raise ValueError(f"run: {str(run / name)!r} is a link, expected a folder of the run's own")


def read_tries(file: Path) -> list[dict[str, Any]] | None:
    """A unit's record of what went wrong, try by try: empty where there is none, None where it is damaged."""
    record = _read_json(file, _name(file))
    if not record:
        return [] if record is None else None
    tries = record.get("tries")
    return tries if isinstance(tries, list) and tries and all(map(_is_try, tries)) else None


def damaged_failures(run: Path) -> list[Path]:
    """A run's records of failures that say nothing any more."""
    return [file for file in _records(run) if read_tries(file) is None]


def _records(run: Path) -> list[Path]:
    return sorted((run / FAILURES).glob("*.json"))


def _read_json(file: Path, name: str) -> dict[str, Any] | None:
    """The content of a sealed JSON file: None where there is none, empty where it is damaged or can't be read."""
    try:
        return seals.from_json(read_plain(file), name) or {}
    except FileNotFoundError:
        return None
    except OSError:
        return {}


def _is_try(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("death"), bool):
        return False
    texts = [entry.get(name) for name in ("error", "session")]
    return all(isinstance(text, str) for text in texts) and bool(entry["error"].strip())


def unit_files(run: Path, kind: str, unit_id: str) -> list[Path]:
    """The files of a unit; the first makes it done."""
    return [run / kind / f"{unit_id}{suffix}" for suffix in KINDS[kind].files]


def unit_problem(run: Path, kind: str, unit_id: str) -> str | None:
    """Why a unit isn't done: a file of it is "missing", "torn" or "foreign"; None if it is done."""
    return next(filter(None, map(file_problem, unit_files(run, kind, unit_id))), None)


def file_problem(path: Path) -> str | None:
    """The fault of a unit's file, which is read to its end: "missing", "torn" or "foreign"; None if there is none."""
    return seals.problem(path, _name(path))


def check_whole(path: Path) -> None:
    """Raises ValueError where a unit's file isn't there, is damaged or was written for another."""
    problem = file_problem(path)
    if problem:
        what = {
            "missing": "isn't there",
            "torn": "is damaged: its bytes don't give the checksum in it",
            "foreign": "isn't this run's",
        }[problem]
        raise ValueError(f"run: {str(path)!r} {what}; headscope sweep retry computes what is missing or damaged")


def _name(path: Path) -> str:
    """The name that a unit's file is sealed under: its place in the run."""
    return f"{path.parent.name}/{path.name}"


def _write_sealed(path: Path, content: bytes) -> None:
    parts = seals.sealed(content, path.suffix)
    write_atomic(path, lambda file: file.writelines(parts))


def _is_beginning(entry: Path) -> bool:
    """True if a file is one that a run writes before its manifest."""
    return entry.name.endswith(".tmp") and MANIFEST in entry.name
