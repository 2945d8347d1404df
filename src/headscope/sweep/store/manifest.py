"""The manifest of a run directory: what the run is, and the units that it is made of."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from headscope.sweep.plan.functions import CODE
from headscope.sweep.plan.units import KIND_NAME, KINDS
from headscope.sweep.store import seals

MANIFEST = "manifest.json"
# 1 had no checksums, and the units in a separate file
FORMAT = 2
# ids are digests: a name made of one leads nowhere else
_ID = re.compile(r"[0-9a-f]{64}")


class DamagedManifest(ValueError):
    """A run's manifest isn't what headscope wrote, or is gone."""


def read_manifest(path: Path) -> dict[str, Any]:
    """A run's manifest.

    Raises:
        DamagedManifest: it isn't whole, or gone from a directory with results.
        ValueError: there is none, or one of another format.
    """
    file = path / MANIFEST
    problem = seals.problem(file, MANIFEST)
    begun = any((path / kind).is_dir() for kind in KINDS)
    if problem == "missing" and not begun:
        raise ValueError(f"run: got {str(path)!r}, expected a directory with a headscope run ({MANIFEST})")
    manifest: Any = None
    # those of older formats have no seal
    with contextlib.suppress(ValueError, RecursionError, OSError):
        manifest = json.loads(file.read_text(encoding="utf-8"))
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if problem is None or (isinstance(found, int) and "seal" not in manifest):
        if found != FORMAT:
            raise ValueError(
                f"run: {str(path)!r} has format {found!r}, this headscope writes and reads {FORMAT}; use the version"
                " that wrote it, or begin a new run"
            )
        if problem is None:
            _check_kinds(path, manifest)
        if problem is None and _is_manifest(manifest):
            return manifest
    what = "is missing" if problem == "missing" else "is damaged: it isn't what headscope wrote"
    raise DamagedManifest(
        f"run: {str(file)!r} {what}. The command that began the run writes it anew and keeps all results that are"
        " whole; status, verify, report and retry can't, as only the manifest told them what the run is"
    )


def _check_kinds(path: Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError where a run has units of a kind that isn't there: its results are whole, and not to be lost."""
    units = manifest.get("units")
    for unit in units if isinstance(units, list) else []:
        kind = unit.get("kind") if isinstance(unit, dict) else None
        if isinstance(kind, str) and KIND_NAME.fullmatch(kind) and kind not in KINDS:
            raise ValueError(
                f"run: {str(path)!r} has units of the kind {kind!r}, expected those that this headscope has:"
                f" {', '.join(KINDS)}"
            )


def _is_manifest(manifest: dict[str, Any]) -> bool:
    """True if a whole manifest has the parts that one has, in the right types: it may have been made elsewhere."""
    units = manifest.get("units")
    return (
        isinstance(manifest.get("identity"), dict)
        and isinstance(units, list)
        and all(isinstance(unit, dict) and _is_unit(unit) for unit in units)
    )


def _is_unit(unit: dict[str, Any]) -> bool:
    return (
        unit.get("kind") in tuple(KINDS)
        and isinstance(unit.get("id"), str)
        and _ID.fullmatch(unit["id"]) is not None
        and isinstance(unit.get("group"), str)
        and "/" not in unit["group"]
        and all(isinstance(unit.get(name), int) for name in ("items", "forwards"))
    )


def check_identity(path: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises ValueError where a run directory is of another configuration than the one asked for; says what differs."""
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
