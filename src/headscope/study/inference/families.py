"""Families of tests: corrections of p-values, and the selection of what to test."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from headscope.study.inference.settings import SIGNIFICANT

HOLM = (
    "Holm's step-down correction: the smallest of m p-values is multiplied by m, the next by m - 1, and so on, none"
    " falling below one before it, none above 1. It bounds the chance of one or more false findings in the family."
)
MAX_T = (
    "Max-t correction (Westfall and Young 1993, single step): a quantity's t is compared with the most extreme t of all"
    " quantities of the family in every draw. A draw moves whole sources, so that the dependence between quantities"
    " stays, and many alike cost little. It bounds the chance of one or more false findings in the family."
)


def is_finding(p: float | None) -> bool:
    """True if a p-value, corrected where it is one of a family, is a finding: there is one, and it is small."""
    return p is not None and p < SIGNIFICANT


def with_holm(table: pl.DataFrame) -> pl.DataFrame:
    """The table of one family with a column p_holm, corrected from its p_value: see `HOLM`."""
    return table.with_columns(pl.Series("p_holm", holm(table["p_value"].to_list()), pl.Float64))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Corrected p-values of one family, in the given order: see `HOLM`. None stays None and is not counted."""
    tested = [index for index, p in enumerate(p_values) if p is not None]
    corrected: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(tested, key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(tested) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def strongest(table: pl.DataFrame, count: int, names: Sequence[str]) -> pl.DataFrame:
    """The rows with the largest |value| / standard_error, whichever their sign; with a column score, largest first.

    A void row, and one whose standard error is unknown, has no score and is never taken. A value other than 0 whose
    standard error is 0 comes first. Ties are broken by the columns `names`, so that a repetition selects the same.
    """
    value, error = (table[name].to_numpy().astype(np.float64) for name in ("value", "standard_error"))
    with np.errstate(invalid="ignore", divide="ignore"):
        score = np.where(value == 0, 0.0 * error, np.abs(value) / error)
    scored = table.with_columns(pl.Series("score", score, nan_to_null=True)).drop_nulls("score")
    return scored.sort(["score", *names], descending=[True, *[False] * len(names)]).head(count)
