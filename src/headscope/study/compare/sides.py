"""The two runs of a comparison, and what is said of what they don't share."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl


@dataclass(frozen=True)
class Side:
    """One of the two runs: its manifest and its tables by kind."""

    manifest: Mapping[str, Any]
    tables: Mapping[str, pl.DataFrame]


class Differing(NamedTuple):
    """Something that one run lacks or has otherwise.

    Attributes:
        what: the thing.
        first, second: what each run has.
        consequence: what the comparison does about it.
    """

    what: str
    first: str
    second: str
    consequence: str


def listing(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values)) or "–"
