"""A run directory: one manifest, and one file per finished unit, each written whole or not at all.

    manifest.json                       what the run is: identity, configuration, versions, device, git revision
    units.json                          the units it is made of
    execution.json                      how many rows go through the model at once, as the first process measured it
    observations/<unit>.parquet         per head: entropy
    ablations/<unit>.parquet            per head and fill: paired losses
    generations/<unit>.parquet          per head and fill: distance of images, beside <unit>.safetensors, the images
    set_ablations/, set_generations/    the same of sets of heads
    attributions/<unit>.parquet         per head and fill: g, c and the loss
    reference/<unit>.safetensors        mean head outputs
    images/<unit>.safetensors           what the model drew for the prompts
    failures/<unit>.json                what went wrong with a unit, try by try
    claims/<unit>                       who is working on a unit now

A file is written under a temporary name, flushed to disk and renamed. A unit is done when its file is valid.
"""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save

from headscope._files import write_atomic, write_first
from headscope.sweep.fitting import Fit

MANIFEST, UNITS, EXECUTION = "manifest.json", "units.json", "execution.json"
FORMAT = 1
# the kinds whose unit is a table; of the others it is tensors
TABLES = ("observations", "ablations", "generations", "attributions", "set_ablations", "set_generations")
TENSORS = ("reference", "images")
FAILURES, CLAIMS = "failures", "claims"
# in an identity, before the name of a function of the user's own
CODE = "code of "
_UNIT, _ROWS = b"headscope.unit", b"headscope.rows"


class RunStore:
    """The files of one run.

    Args:
        units: what `units.json` says of each unit; written when the run is new.

    Raises:
        ValueError: the directory holds a run of another configuration, or something that isn't a run.
    """

    def __init__(
        self, path: Path, identity: dict[str, Any], description: dict[str, Any], units: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.path = path
        manifest = path / MANIFEST
        if not manifest.is_file():
            # a run killed while its manifest was being written has left nothing but that
            strange = path.exists() and not (path.is_dir() and all(map(_is_beginning, path.iterdir())))
            # another process may have begun the same run meanwhile
            if strange and not manifest.is_file():
                raise ValueError(
                    f"out: got {str(path)!r}, which holds something that isn't a headscope run; expected a new one"
                )
            path.mkdir(parents=True, exist_ok=True)
            content = {"format": FORMAT, "identity": identity, **description}
            write_atomic(path / UNITS, json.dumps(list(units)).encode())
            write_first(manifest, json.dumps(content, indent=2).encode())
        _same_identity(path, read_manifest(path)["identity"], identity)

    def table_path(self, kind: str, unit: str) -> Path:
        return self.path / kind / f"{unit}.parquet"

    def tensor_path(self, kind: str, unit: str) -> Path:
        return self.path / kind / f"{unit}.safetensors"

    def has(self, kind: str, unit: str) -> bool:
        """Whether the unit is done: its file is there, whole and its own."""
        return self.has_tensors(kind, unit) if kind in TENSORS else self.has_table(kind, unit)

    def has_table(self, kind: str, unit: str) -> bool:
        """Whether the unit's table is there, whole and its own; a torn file counts as absent and is written again."""
        return table_problem(self.table_path(kind, unit), unit) is None

    def has_tensors(self, kind: str, unit: str) -> bool:
        return tensor_problem(self.tensor_path(kind, unit), unit) is None

    def listed(self) -> set[tuple[str, str]]:
        """(kind, unit) of every unit whose file seems to be there, without opening any."""
        found = set()
        for kind in (*TABLES, *TENSORS):
            suffix = ".safetensors" if kind in TENSORS else ".parquet"
            with contextlib.suppress(FileNotFoundError), os.scandir(self.path / kind) as entries:
                found |= {(kind, entry.name.removesuffix(suffix)) for entry in entries if entry.name.endswith(suffix)}
        return found

    def write_table(self, kind: str, unit: str, table: pa.Table) -> None:
        footer = {**(table.schema.metadata or {}), _UNIT: unit.encode(), _ROWS: str(table.num_rows).encode()}
        table = table.replace_schema_metadata(footer)
        floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
        write_atomic(
            self.table_path(kind, unit),
            lambda file: pq.write_table(
                table,
                file,
                compression="zstd",
                use_byte_stream_split=floats,
                write_page_checksum=True,
                use_dictionary=[field.name for field in table.schema if field.name not in floats],
            ),
        )

    def write_tensors(self, kind: str, unit: str, tensors: dict[str, torch.Tensor]) -> None:
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"unit": unit})
        write_atomic(self.tensor_path(kind, unit), content)

    def read_tensors(self, kind: str, unit: str) -> dict[str, torch.Tensor]:
        with safe_open(self.tensor_path(kind, unit), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def fit(self, measured: Fit | None = None) -> Fit | None:
        """How many rows go through the model at once, the same for all processes of the run: so that their numbers
        agree to the last bit. The first to measure decides; None where nobody has."""
        file = self.path / EXECUTION
        if measured is not None:
            write_first(file, json.dumps(asdict(measured)).encode())
        try:
            found = json.loads(file.read_text())
            return Fit(int(found["rows"]), int(found["clean"]))
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def failures(self) -> dict[str, list[dict[str, Any]]]:
        """Of every unit that went wrong, its tries, first to last."""
        found = {}
        for file in sorted((self.path / FAILURES).glob("*.json")):
            with contextlib.suppress(OSError, ValueError):
                found[file.stem] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def add_failure(self, unit: str, error: str, session: str, death: bool = False) -> None:
        """Record that a unit went wrong, or that the process working on it died."""
        tries = self.failures().get(unit, [])
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
        write_atomic(self.path / FAILURES / f"{unit}.json", json.dumps(tries, indent=2).encode())

    def clear_failure(self, unit: str) -> None:
        (self.path / FAILURES / f"{unit}.json").unlink(missing_ok=True)


def table_problem(path: Path, unit: str) -> str | None:
    """Why a file isn't the whole table of that unit; None if it is."""
    try:
        metadata = pq.read_metadata(path)
    except FileNotFoundError:
        return "missing"
    except (pa.ArrowInvalid, OSError):
        return "torn"
    footer = metadata.metadata or {}
    if _UNIT not in footer or _ROWS not in footer:
        return "foreign"
    if footer[_UNIT] != unit.encode():
        return "foreign"
    return None if footer[_ROWS] == str(metadata.num_rows).encode() else "torn"


def tensor_problem(path: Path, unit: str) -> str | None:
    """Why a file doesn't hold that unit's tensors, whole; None if it does."""
    try:
        with safe_open(path, "pt") as file:
            return None if (file.metadata() or {}).get("unit") == unit else "foreign"
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "torn"
    except Exception as error:  # safetensors raises its own type, which it doesn't export for torn headers
        if type(error).__name__ == "SafetensorError":
            return "torn"
        raise


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError where there is no readable manifest of this format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"run: got {str(path)!r}, expected a directory with a headscope run ({MANIFEST})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"run: {str(path / MANIFEST)!r} can't be read ({error})") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"run: {str(path)!r} has format {manifest.get('format')!r}, expected {FORMAT}")
    return manifest


def _is_beginning(entry: Path) -> bool:
    """Whether a file is one that a run writes before its manifest."""
    temporary = entry.name.endswith(".tmp") and (MANIFEST in entry.name or UNITS in entry.name)
    return entry.name == UNITS or temporary


def _same_identity(path: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    different = sorted(name for name in {*stored, *asked} if stored.get(name) != asked.get(name))
    if different:
        changes = "".join(f"\n  {name}: {_change(name, stored, asked)}" for name in different)
        raise ValueError(f"out: {str(path)!r} holds a run of another configuration; choose another directory{changes}")


def _change(name: str, stored: dict[str, Any], asked: dict[str, Any]) -> str:
    if name.startswith(CODE) and name in stored and name in asked:
        return "changed since the run began; put it back to go on with this run"
    return f"{_short(stored.get(name))} there, {_short(asked.get(name))} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
