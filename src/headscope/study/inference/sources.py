"""From rows to arrays: one number per source, and a count of the rows that make a quantity void."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

VOID = (
    "A quantity is void where one of its rows is missing (an item, a draw of noise or a timestep that other quantities"
    " of the family have) or holds a number that isn't finite: it then has no value, no interval and no test, and the"
    " number of such rows stands in its place. Nothing is dropped in silence, as what diverges is what matters most."
)
# what tells the rows of one quantity at one timestep apart
_ROW = ("source_id", "item", "replicate")


@dataclass(frozen=True)
class SourceMeans:
    """Means over the items of each source: NaN where a source has no number for a quantity.

    Attributes:
        cells: one row per quantity, the columns of `by`, in order of first appearance.
        sources: source ids, sorted.
        values: one array [sources, cells, bands] per value column.
        void: how many rows of a quantity are missing or not finite, [cells].
        left_out: how many rows were left out, [cells]; see `source_means`.
        rows_per_band: how many rows a quantity has to have in every band.
    """

    cells: pl.DataFrame
    sources: list[str]
    values: tuple[np.ndarray, ...]
    void: np.ndarray
    left_out: np.ndarray
    rows_per_band: int

    def counts(self) -> np.ndarray:
        """The number of sources that each quantity has in every band: [cells]."""
        return (~np.isnan(self.values[0])).all(axis=2).sum(axis=0)


def source_means(
    rows: pl.DataFrame,
    values: Sequence[str],
    by: Sequence[str] = (),
    bands: str | None = None,
    cells: pl.DataFrame | None = None,
    levels: Sequence | None = None,
    leave_out: bool = False,
) -> SourceMeans:
    """Replace the items of every source by their mean, and count what is missing.

    A quantity has to have a row for every source, item and draw of noise (the columns source_id, item and replicate, as
    far as they are there) that any quantity of the family has, in every band; and, with a column item, equally many
    rows for each (calls, guidance branches). What it lacks counts as void, as do rows in which one of `values` isn't
    finite.

    Args:
        rows: one row per item, draw of noise and quantity.
        values: the columns to average.
        by: the columns that tell quantities apart.
        bands: a column over whose values quantities are averaged later.
        cells: the quantities to tabulate, None for all in `rows`; with no `by` there is one.
        levels: the values of `bands`, None for all in `rows`.
        leave_out: NaN and null mean that an item has none of the quantity. Such a row is left out and counted, and so
            is a row that isn't there; infinite values stay void.

    Raises:
        ValueError: where a column is missing.
    """
    by = list(by)
    banded = [bands] if bands else []
    missing = [name for name in ("source_id", *values, *by, *banded) if name not in rows.columns]
    if missing:
        raise ValueError(f"rows: lacks {', '.join(missing)}; it has {', '.join(rows.columns)}")
    if cells is None:
        cells = rows.select(by).unique(maintain_order=True) if by else pl.DataFrame({"": [0]})
    sources = sorted(rows["source_id"].unique().to_list())
    levels = (rows[bands].unique().sort().to_list() if levels is None else list(levels)) if bands else [0]
    keys = [name for name in _ROW if name in rows.columns]
    rows = _numbered(rows.select(*keys, *by, *banded, *(pl.col(name).cast(pl.Float64) for name in values)), cells, by)
    expected = rows.select(keys).n_unique()
    absent = pl.any_horizontal(pl.col(name).is_null() | pl.col(name).is_nan() for name in values)
    infinite = pl.any_horizontal(pl.col(name).is_infinite().fill_null(False) for name in values) & ~absent
    per_row = rows.group_by("_cell", *keys, *banded).agg(
        pl.len().alias("rows"), absent.sum().alias("absent"), infinite.sum().alias("infinite")
    )
    # without items, a source has as many rows as it has images
    lacking = pl.col("rows").max() * expected * len(levels) - pl.col("rows").sum()
    if "item" not in keys:
        lacking = expected * len(levels) - pl.len()
    counted = per_row.group_by("_cell").agg(lacking.alias("lacking"), pl.col("absent", "infinite").sum())
    numbers = np.zeros((3, len(cells)), np.int64)
    # a quantity without a single row
    numbers[0] = expected * len(levels)
    numbers[:, counted["_cell"].to_numpy()] = counted.select("lacking", "absent", "infinite").to_numpy().T
    lacks, absents, infinites = numbers
    if leave_out:
        rows = rows.filter(~absent)
    return SourceMeans(
        cells,
        sources,
        _tabulated(rows, values, bands, sources, len(cells), levels),
        infinites if leave_out else lacks + absents + infinites,
        lacks + absents if leave_out else np.zeros(len(cells), np.int64),
        expected,
    )


def _numbered(rows: pl.DataFrame, cells: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """The rows of the cells, with the cell's number."""
    if not by:
        return rows.with_columns(pl.lit(0, pl.UInt32).alias("_cell"))
    numbered = cells.select(by).with_row_index("_cell")
    return rows.join(numbered, on=by, how="inner", maintain_order="left", nulls_equal=True)


def _tabulated(
    rows: pl.DataFrame, values: Sequence[str], bands: str | None, sources: list[str], cells: int, levels: Sequence
) -> tuple[np.ndarray, ...]:
    rows = rows.with_columns(
        pl.col("source_id").replace_strict(sources, range(len(sources)), return_dtype=pl.Int64).alias("_source"),
        (
            pl.col(bands).replace_strict(levels, range(len(levels)), return_dtype=pl.Int64)
            if bands
            else pl.lit(0, pl.Int64)
        ).alias("_band"),
    )
    place = ["_source", "_cell", "_band"]
    # in one order whatever that of the rows, as sums in another order differ in their last bits
    keys = [name for name in _ROW if name in rows.columns]
    means = (
        rows.sort(*place, *keys, *values)
        .group_by(place, maintain_order=True)
        .agg(pl.col(name).mean() for name in values)
    )
    position = tuple(means[name].to_numpy().astype(np.int64) for name in place)
    arrays = []
    for name in values:
        array = np.full((len(sources), cells, len(levels)), np.nan)
        array[position] = means[name].to_numpy()
        arrays.append(array)
    return tuple(arrays)
