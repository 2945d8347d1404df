"""A run directory: one manifest, and one file per finished unit, each written whole or not at all.

    manifest.json                       what the run is: identity, configuration, versions, device
    observations/<unit>.parquet         per head: entropy
    ablations/<unit>.parquet            per head and fill: paired losses
    generations/<unit>.parquet          per head and fill: distance of images, beside <unit>.safetensors, the images
    reference/<unit>.safetensors        mean head outputs
    images/<unit>.safetensors           what the model drew for the prompts

A file is written under a temporary name, flushed to disk and renamed. A unit is done when its file is valid.
"""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save

from headscope._files import write_atomic

MANIFEST = "manifest.json"
FORMAT = 1
TABLES = ("observations", "ablations", "generations")
_UNIT, _ROWS = b"headscope.unit", b"headscope.rows"


class RunStore:
    """The files of one run.

    Raises:
        ValueError: the directory holds a run of another configuration, or something that isn't a run.
    """

    def __init__(self, path: Path, identity: dict[str, Any], description: dict[str, Any]) -> None:
        self.path = path
        manifest = path / MANIFEST
        if manifest.is_file():
            _same_identity(path, read_manifest(path)["identity"], identity)
            return
        # a run killed while its manifest was being written has left nothing but that
        leftover = f".{MANIFEST}."
        if path.exists() and not (path.is_dir() and all(entry.name.startswith(leftover) for entry in path.iterdir())):
            raise ValueError(
                f"out: got {str(path)!r}, which holds something that isn't a headscope run; expected a new one"
            )
        path.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "identity": identity, **description}
        write_atomic(manifest, json.dumps(content, indent=2).encode())

    def table_path(self, kind: str, unit: str) -> Path:
        return self.path / kind / f"{unit}.parquet"

    def tensor_path(self, kind: str, unit: str) -> Path:
        return self.path / kind / f"{unit}.safetensors"

    def has_table(self, kind: str, unit: str) -> bool:
        """Whether the unit's table is there, whole and its own; a torn file counts as absent and is written again."""
        try:
            metadata = pq.read_metadata(self.table_path(kind, unit))
        except (FileNotFoundError, pa.ArrowInvalid, OSError):
            return False
        footer = metadata.metadata or {}
        return footer.get(_UNIT) == unit.encode() and footer.get(_ROWS) == str(metadata.num_rows).encode()

    def has_tensors(self, kind: str, unit: str) -> bool:
        try:
            with safe_open(self.tensor_path(kind, unit), "pt") as file:
                return (file.metadata() or {}).get("unit") == unit
        except (FileNotFoundError, OSError):
            return False
        except Exception as error:  # safetensors raises its own type, which it doesn't export for torn headers
            if type(error).__name__ == "SafetensorError":
                return False
            raise

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
                use_dictionary=[field.name for field in table.schema if field.name not in floats],
            ),
        )

    def write_tensors(self, kind: str, unit: str, tensors: dict[str, torch.Tensor]) -> None:
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"unit": unit})
        write_atomic(self.tensor_path(kind, unit), content)

    def read_tensors(self, kind: str, unit: str) -> dict[str, torch.Tensor]:
        with safe_open(self.tensor_path(kind, unit), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


class Run:
    """A finished or unfinished run, for reading.

    Attributes:
        path: its directory.
        manifest: what it was asked to do, with what, when.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a run directory.

        Raises:
            ValueError: it isn't one.
        """
        path = Path(path)
        return cls(path, read_manifest(path))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The tables that have rows: some of observations, ablations, generations."""
        return tuple(kind for kind in TABLES if any((self.path / kind).glob("*.parquet")))

    @property
    def complete(self) -> bool:
        """Whether every unit of the run is finished."""
        files = [file for kind in (*TABLES, "reference", "images") for file in (self.path / kind).glob("*")]
        # a unit of generations has a second file, its images, which doesn't count
        units = {(file.parent.name, file.stem) for file in files if not file.name.startswith(".")}
        return len(units) >= self.manifest["units"]

    def table(self, kind: str) -> pl.LazyFrame:
        """The rows of every finished unit of a kind.

        Files are read in the order of their names, so that two runs of one configuration give equal tables.

        Raises:
            ValueError: no unit of that kind is finished.
        """
        if kind not in self.kinds:
            raise ValueError(
                f"kind: got {kind!r}, expected one of {', '.join(self.kinds) or 'none: nothing is finished'}"
            )
        return pl.scan_parquet(sorted((self.path / kind).glob("*.parquet")))


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


def _same_identity(path: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    different = sorted(name for name in {*stored, *asked} if stored.get(name) != asked.get(name))
    if different:
        changes = "".join(
            f"\n  {name}: {_short(stored.get(name))} there, {_short(asked.get(name))} now" for name in different
        )
        raise ValueError(f"out: {str(path)!r} holds a run of another configuration; choose another directory{changes}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
