"""Runs that are begun by two at once, in one directory: what each of them does, importable by a process of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headscope.sweep.store.store import RunStore

_meet: Any = None


def share(meet: Any) -> None:
    """Tells a worker where it meets the other one, a barrier of two."""
    global _meet
    _meet = meet


def begin(path: Path, seed: int) -> str:
    """What comes of beginning a run whose units have the seed in their ids."""
    units = [
        {"id": f"{seed:02d}{number:062d}", "kind": "ablations", "group": "a", "items": 1, "timestep": 0, "forwards": 2}
        for number in range(50)
    ]
    try:
        RunStore(path, {"seed": seed}, {}, units)
    except ValueError as error:
        return str(error)
    return "begun"


def begin_many(paths: Sequence[Path], seed: int) -> list[str]:
    """The same in several directories, each at the same time as the other worker."""
    outcomes = []
    for path in paths:
        _meet.wait(60)
        outcomes.append(begin(path, seed))
    return outcomes
