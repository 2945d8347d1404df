"""A finding, and the words that findings are written with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import polars as pl

from headscope.report.naming import Names, fitted, interval, probability
from headscope.study.inference import is_finding


class Strength(IntEnum):
    """How strong a finding's design is; the smallest comes first."""

    # one planned test of everything at once, with its controls
    OMNIBUS = 0
    # an effect on images that had no part in its selection
    CONFIRMED = 1
    # what several such effects span
    RANGE = 2
    # everything that was looked at before it was chosen
    EXPLORATORY = 3
    # what there is, without a question
    DESCRIPTION = 4


@dataclass(frozen=True)
class Tile:
    """One large number at the top of the page."""

    value: str
    label: str
    detail: str


@dataclass(frozen=True)
class Finding:
    """One sentence of the lead.

    Attributes:
        strength: decides its place.
        sentence: with its interval and its control, or that nothing was established.
        established: tested, corrected p below 0.05, interval clear of no effect.
        tile: its number; None of an effect that wasn't established.
    """

    strength: Strength
    sentence: str
    established: bool = False
    tile: Tile | None = None


def in_order(table: pl.DataFrame, names: Names) -> pl.DataFrame:
    """The rows with the groups in the page's order."""
    place = pl.col("group").map_elements(names.group_place, return_dtype=pl.Int64)
    return table.sort(place, maintain_order=True)


def corrected(row: Mapping[str, Any]) -> float | None:
    """The p-value of a row after correction for its family: max-t where there is one, else Holm's."""
    return row["p_maxt"] if "p_maxt" in row else row.get("p_holm")


def corrected_column(table: pl.DataFrame) -> pl.Expr:
    """The column that `corrected` reads."""
    return pl.col("p_maxt" if "p_maxt" in table.columns else "p_holm")


def clear(row: Mapping[str, Any], null: float = 0.0) -> bool:
    """True if an estimate has an interval that leaves out the value of no effect."""
    return row["value"] is not None and row["low"] is not None and not row["low"] <= null <= row["high"]


def established(row: Mapping[str, Any]) -> bool:
    """True if an effect was tested and found, and its interval says the same."""
    p = corrected(row)
    return clear(row) and is_finding(p)


def value_of(row: Mapping[str, Any]) -> str:
    return fitted((row["low"], row["high"]))(row["value"])


def interval_of(row: Mapping[str, Any], write: Callable[..., str] | None = None) -> str:
    low, high = row["low"], row["high"]
    return "no interval" if low is None else f"95 % interval {interval(low, high, write or fitted((low, high)))}"


def tested_of(row: Mapping[str, Any]) -> str:
    p = corrected(row)
    return "exploratory" if p is None else f"corrected p {_equals(p)}"


def sources_of(count: int | Sequence[int]) -> str:
    if not isinstance(count, int):
        return f"{pair(count)} sources"
    return f"{count} source" if count == 1 else f"{count} sources"


def pair(counts: Sequence[int]) -> str:
    return " and ".join(map(str, counts))


def _equals(p: float) -> str:
    text = probability(p)
    return text if text.startswith("<") else f"= {text}"
