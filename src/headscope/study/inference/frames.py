"""Intervals and tests whose unit of replication is the source of an image, never the image.

A *source* is the photograph, identity or file that an image came from. Crops of one photograph resemble each other,
so counting them as independent makes intervals far too narrow. Everything here therefore takes one row per item and
first replaces the items of a source by their mean; what is resampled, permuted or sign-flipped are sources.

- Intervals: 95 %, bias-corrected and accelerated bootstrap (BCa, Efron 1987) of `RESAMPLES` draws of sources with
  replacement, within each group. All quantities of a family (heads, timesteps) share one table of draws, which makes
  a family one matrix product; the arithmetic is that of scipy.stats.bootstrap. Where BCa is undefined (all draws
  equal, or all on one side of the estimate) the percentile interval of the same draws stands in.
- Tests: scipy.stats.permutation_test, two-sided, `RESAMPLES` random permutations, or all where there are fewer.
- Families of tests: Holm's correction.
- A group of fewer than `FEWEST_SOURCES` sources gets no p-value and its interval is marked exploratory; a group of one
  source gets no interval.

Rows are polars tables with a column source_id. `by` names the columns that tell the quantities of a family apart;
`bands` the column (timestep) over which a quantity is averaged, every value with equal weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import polars as pl
from scipy.special import ndtr, ndtri
from scipy.stats import permutation_test

from headscope.study.inference import settings
from headscope.study.inference.settings import FEWEST_SOURCES, LEVEL

# keeps the table of draws of one block of quantities below about 160 MB
_BLOCK = 2000

MEAN = "Mean over sources; a source counts once, with the mean of its items."
DIFFERENCE = (
    "Mean over the sources of the first group minus mean over the sources of the second; two-sided permutation test"
    " of the hypothesis that sources are exchangeable between the groups."
)
RATIO = (
    "Mean over the sources of the first group divided by the mean over the sources of the second (a ratio of means,"
    " not a mean of ratios). It equals 1 where the difference is 0, and the test of the difference is its test."
)
# {of}: the loss, or the error
RELATIVE = (
    "Degradation at a timestep = sum of (edited {of} − clean {of}) / sum of clean {of}, both sums over sources (a ratio"
    " of sums, not a mean of ratios: that mean is ruled by the images with the smallest {of}). Overall = mean over the"
    " timesteps, each with equal weight."
)
ABSOLUTE = (
    "Mean over sources of edited {of} − clean {of}, at a timestep; overall = mean over the timesteps, each with equal"
    " weight."
)
SIGN_FLIPS = (
    "Two-sided sign-flip permutation test of the relative degradation, over sources, of the hypothesis that the edit"
    " changes the loss symmetrically around zero."
)
HOLM = (
    "Holm's step-down correction: the smallest of m p-values is multiplied by m, the next by m - 1, and so on, none"
    " falling below one before it, none above 1. It bounds the chance of one or more false findings in the family."
)


@dataclass(frozen=True)
class Estimate:
    """One number and how far it can be trusted.

    Attributes:
        value: the estimate.
        low, high: its 95 % interval; None where there is only one source.
        p_value: two-sided; None where nothing was tested or there are too few sources.
        sources: how many sources each of the compared groups has.
        exploratory: too few sources, or a quantity that was looked at before it was chosen.
        unit: of the value and its interval.
        definition: what the number is, in words.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float | None
    sources: tuple[int, ...]
    exploratory: bool
    unit: str
    definition: str

    @classmethod
    def from_row(cls, frame: pl.DataFrame, unit: str, definition: str) -> "Estimate":
        """The single row of a family of one quantity. Raises ValueError for any other number of rows."""
        if len(frame) != 1:
            raise ValueError(f"frame: got {len(frame)} rows, expected 1")
        row = frame.row(0, named=True)
        sources = row["sources"]
        return cls(
            value=float("nan") if row["value"] is None else row["value"],
            low=row["low"],
            high=row["high"],
            p_value=row.get("p_value"),
            sources=tuple(sources) if isinstance(sources, list) else (sources,),
            exploratory=row["exploratory"],
            unit=unit,
            definition=definition,
        )


def plain_text(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with plain strings in place of dictionary-coded ones, which stores of tables prefer."""
    return rows.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))


@dataclass(frozen=True)
class SourceMeans:
    """Means over the items of each source: NaN where a source has no item for a quantity.

    Attributes:
        cells: one row per quantity, the columns of `by`, in order of first appearance.
        sources: source ids, sorted.
        values: one array [sources, cells, bands] per value column.
    """

    cells: pl.DataFrame
    sources: list[str]
    values: tuple[np.ndarray, ...]

    def counts(self) -> np.ndarray:
        """The number of sources that each quantity has in every band: [cells]."""
        return (~np.isnan(self.values[0])).all(axis=2).sum(axis=0)


def source_means(
    rows: pl.DataFrame,
    values: Sequence[str],
    by: Sequence[str] = (),
    bands: str | None = None,
    cells: pl.DataFrame | None = None,
) -> SourceMeans:
    """Replace the items of every source by their mean.

    rows: one row per item (and noise replicate, and quantity). values: the columns to average. cells: the quantities to
    tabulate, None for all in `rows`; with no `by` there is one.
    """
    missing = [name for name in ("source_id", *values, *by, *([bands] if bands else [])) if name not in rows.columns]
    if missing:
        raise ValueError(f"rows: lacks {', '.join(missing)}; it has {', '.join(rows.columns)}")
    by = list(by)
    if cells is None:
        cells = rows.select(by).unique(maintain_order=True) if by else pl.DataFrame({"": [0]})
    sources = sorted(rows["source_id"].unique().to_list())
    levels = rows[bands].unique().sort().to_list() if bands else [0]
    # in the order of the rows, as sums in another order differ in their last bits
    grouped = rows.group_by("source_id", *by, *([bands] if bands else []), maintain_order=True)
    means = grouped.agg(pl.col(name).cast(pl.Float64).mean() for name in values)
    means = means.with_columns(
        pl.col("source_id").replace_strict(sources, list(range(len(sources))), return_dtype=pl.Int64).alias("_source")
    )
    if bands:
        band = pl.col(bands).replace_strict(levels, list(range(len(levels))), return_dtype=pl.Int64)
        means = means.with_columns(band.alias("_band"))
    else:
        means = means.with_columns(pl.lit(0, pl.Int64).alias("_band"))
    if by:
        means = means.join(cells.select(by).with_row_index("_cell"), on=by, how="inner")
    else:
        means = means.with_columns(pl.lit(0, pl.Int64).alias("_cell"))
    position = tuple(means[name].to_numpy().astype(np.int64) for name in ("_source", "_cell", "_band"))
    arrays = []
    for name in values:
        array = np.full((len(sources), len(cells), len(levels)), np.nan)
        array[position] = means[name].cast(pl.Float64).to_numpy()
        arrays.append(array)
    return SourceMeans(cells, sources, tuple(arrays))


def means(
    rows: pl.DataFrame, value: str, by: Sequence[str] = (), bands: str | None = None, seed: int = 0
) -> pl.DataFrame:
    """The mean over sources, per quantity: see `MEAN`.

    Returns a table of the columns of `by`, value, low, high, sources, exploratory.
    """
    table = source_means(rows, [value], by, bands)
    bounds = bootstrap([table.values], lambda mean: mean.mean(axis=-1), seed)
    return _frame(table.cells, by, bounds, table.counts())


def differences(
    first: pl.DataFrame,
    second: pl.DataFrame,
    value: str,
    by: Sequence[str] = (),
    bands: str | None = None,
    seed: int = 0,
    test: bool = True,
) -> pl.DataFrame:
    """Mean of the first group minus mean of the second, per quantity: see `DIFFERENCE`.

    Returns a table of the columns of `by`, value, low, high, p_value, standard_error, sources (of both), exploratory;
    standard_error = sqrt(s1^2 / n1 + s2^2 / n2), s the standard deviation between sources, n their number.
    """
    one, two = _pair(first, second, value, by, bands)
    bounds = bootstrap([one.values, two.values], lambda a, b: a.mean(axis=-1) - b.mean(axis=-1), seed)
    samples = [table.values[0].mean(axis=2).T for table in (one, two)]
    counts = np.stack([one.counts(), two.counts()], axis=1)
    p_values = _permuted(samples, counts.min(axis=1), seed) if test else np.full(len(counts), np.nan)
    frame = _frame(one.cells, by, bounds, counts, p_values)
    return frame.with_columns(pl.Series("standard_error", _welch(samples), pl.Float64, nan_to_null=True))


def ratios(
    first: pl.DataFrame,
    second: pl.DataFrame,
    value: str,
    by: Sequence[str] = (),
    bands: str | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """Mean of the first group divided by the mean of the second, per quantity: see `RATIO`.

    With bands, the means over the bands are divided, not the ratios averaged. Returns a table of the columns of `by`,
    value, low, high, sources (of both), exploratory.
    """
    one, two = _pair(first, second, value, by, bands)
    bounds = bootstrap([one.values, two.values], lambda a, b: _divide(a.mean(axis=-1), b.mean(axis=-1)), seed)
    return _frame(one.cells, by, bounds, np.stack([one.counts(), two.counts()], axis=1))


def degradations(
    rows: pl.DataFrame, by: Sequence[str] = (), bands: str | None = None, seed: int = 0, test: bool = True
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Relative and absolute degradation of the loss, per quantity: see `RELATIVE`, `ABSOLUTE` and `SIGN_FLIPS`.

    rows: paired losses, columns clean and edited. bands: the timestep column for the overall degradation; without it
    `by` must name the timestep. Returns two tables of the columns of `by`, value, low, high, p_value, sources,
    exploratory; the relative one is a fraction (0.25 is 25 %), the absolute one in units of the loss.
    """
    change = pl.col("edited") - pl.col("clean")
    # of a pair that isn't one of numbers, the clean loss doesn't count either
    rows = rows.with_columns(
        pl.when(change.is_finite()).then(column).alias(name)
        for name, column in (("change", change), ("clean", pl.col("clean")))
    )
    table = source_means(rows, ["change", "clean"], by, bands)
    change, clean = table.values
    counts = table.counts()
    relative = bootstrap([table.values], lambda d, c: _divide(d, c).mean(axis=-1), seed)
    absolute = bootstrap([(change,)], lambda d: d.mean(axis=-1), seed)
    p_relative = p_absolute = np.full(len(counts), np.nan)
    if test:
        # the clean losses stay when a source's sign flips, so the relative statistic is a mean of weighted changes
        with np.errstate(invalid="ignore", divide="ignore"):
            weighted = change / _weighted_mean(np.ones((1, len(clean))), clean)
        p_relative = _permuted([weighted.mean(axis=2).T], counts, seed)
        p_absolute = _permuted([change.mean(axis=2).T], counts, seed)
    return (
        _frame(table.cells, by, relative, counts, p_relative),
        _frame(table.cells, by, absolute, counts, p_absolute),
    )


def with_holm(table: pl.DataFrame) -> pl.DataFrame:
    """The table of one family with a column p_holm, corrected from its p_value: see `holm`."""
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


@dataclass(frozen=True)
class Bounds:
    """Estimates and their intervals, each [cells]; NaN where undefined."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bootstrap(
    groups: Sequence[Sequence[np.ndarray]],
    statistic: Callable[..., np.ndarray],
    seed: int = 0,
    resamples: int | None = None,
    level: float = LEVEL,
) -> Bounds:
    """Bootstrap intervals of functions of group means, for a whole family at once.

    groups: for each independently drawn group its arrays [sources, cells, bands], which share the group's draws.
    statistic: takes the mean of every array over sources, [draws, cells, bands], groups in order; returns
    [draws, cells]. A source that lacks a quantity (NaN) is left out of that quantity. resamples: None is `RESAMPLES`.
    """
    resamples = settings.RESAMPLES if resamples is None else resamples
    cells = groups[0][0].shape[1]
    blocks = [
        _bootstrap_block(
            [[array[:, start : start + _BLOCK] for array in group] for group in groups],
            statistic,
            seed,
            resamples,
            level,
        )
        for start in range(0, cells, _BLOCK)
    ]
    if not blocks:
        empty = np.zeros(0)
        return Bounds(empty, empty, empty)
    return Bounds(*(np.concatenate([getattr(block, name) for block in blocks]) for name in ("value", "low", "high")))


def _bootstrap_block(groups, statistic, seed: int, resamples: int, level: float) -> Bounds:
    def evaluate(weights: Sequence[np.ndarray]) -> np.ndarray:
        return statistic(*(_weighted_mean(w, a) for w, group in zip(weights, groups, strict=True) for a in group))

    sizes = [len(group[0]) for group in groups]
    whole = [np.ones((1, size)) for size in sizes]
    value = evaluate(whole)[0]
    counts = np.array([(~np.isnan(group[0])).all(axis=2).sum(axis=0) for group in groups]).min(axis=0)
    if min(sizes) < 2:
        undefined = np.full_like(value, np.nan)
        return Bounds(value, undefined, undefined)
    draws = evaluate(_draw(seed, tuple(sizes), resamples))
    draws.sort(axis=0)
    outer = np.array([(1 - level) / 2, (1 + level) / 2])[:, None]
    adjusted = _bca_levels(draws, value, _acceleration(evaluate, sizes), outer)
    low, high = _quantile(draws, np.where(np.isfinite(adjusted).all(axis=0), adjusted, outer))
    too_few = counts < 2
    return Bounds(value, np.where(too_few, np.nan, low), np.where(too_few, np.nan, high))


@lru_cache(maxsize=8)
def _draw(seed: int, sizes: tuple[int, ...], resamples: int) -> list[np.ndarray]:
    """The number of times that every source is drawn, for each group: [draws, sources]."""
    generator = np.random.default_rng(seed)
    return [generator.multinomial(size, np.full(size, 1.0 / size), resamples) * 1.0 for size in sizes]


def _weighted_mean(weights: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Means over sources: weights [draws, sources], array [sources, cells, bands] -> [draws, cells, bands]."""
    flat = array.reshape(len(array), -1)
    present = ~np.isnan(flat)
    if present.all():
        mean = weights @ flat / weights.sum(axis=1, keepdims=True)
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = weights @ np.where(present, flat, 0.0) / (weights @ present)
    return mean.reshape(len(weights), *array.shape[1:])


def _acceleration(evaluate: Callable[..., np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """BCa's acceleration from the jackknife over sources, groups combined as in scipy.stats.bootstrap."""
    cubes, squares = 0.0, 0.0
    for position, size in enumerate(sizes):
        weights = [np.ones((size, other)) for other in sizes]
        weights[position] = 1.0 - np.eye(size)
        left_out = evaluate(weights)
        influence = (size - 1) * (left_out.mean(axis=0) - left_out)
        cubes = cubes + (influence**3).sum(axis=0) / size**3
        squares = squares + (influence**2).sum(axis=0) / size**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return cubes / (6 * squares**1.5)


def _bca_levels(draws: np.ndarray, value: np.ndarray, acceleration: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """The quantiles of the draws that bound the BCa interval: [2, cells]."""
    # draws that equal the estimate but for rounding count half, as equal ones do
    tolerance = 1e-12 * np.abs(value)
    valid = (~np.isnan(draws)).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        below = (draws < value - tolerance).sum(axis=0) + (draws <= value + tolerance).sum(axis=0)
        bias = ndtri(below / (2 * valid))
        shifted = bias + ndtri(outer)
        levels = ndtr(bias + shifted / (1 - acceleration * shifted))
    spread = np.nanmax(draws, axis=0, initial=-np.inf) - np.nanmin(draws, axis=0, initial=np.inf)
    return np.where(spread > 2 * tolerance, levels, np.nan)


def _quantile(draws: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Linearly interpolated quantiles of sorted draws, NaNs last: [draws, cells], [2, cells] -> [2, cells]."""
    valid = (~np.isnan(draws)).sum(axis=0)
    place = levels * np.maximum(valid - 1, 0)
    lower = np.floor(place).astype(np.int64)
    upper = np.minimum(lower + 1, np.maximum(valid - 1, 0))
    at_lower, at_upper = (np.take_along_axis(draws, index, axis=0) for index in (lower, upper))
    return at_lower + (place - lower) * (at_upper - at_lower)


def _permuted(samples: Sequence[np.ndarray], counts: np.ndarray, seed: int) -> np.ndarray:
    """Two-sided p-values, [cells]: of a difference of means (two samples), of sign flips (one); NaN for few sources.

    samples: [cells, sources]. counts: of the smaller group, for every cell.
    """
    p_values = np.full(len(samples[0]), np.nan)
    enough = counts >= FEWEST_SOURCES
    complete = enough & np.all([~np.isnan(sample).any(axis=1) for sample in samples], axis=0)
    batches = [np.flatnonzero(complete)] + [np.array([cell]) for cell in np.flatnonzero(enough & ~complete)]
    for cells in batches:
        if not len(cells):
            continue
        data = [sample[cells] for sample in samples]
        data = [sample[:, ~np.isnan(sample).any(axis=0)] for sample in data]
        result = permutation_test(
            data,
            (lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis)) if len(data) == 2 else np.mean,
            permutation_type="independent" if len(data) == 2 else "samples",
            vectorized=True,
            n_resamples=settings.RESAMPLES,
            # [cells, batch, sources] stays below about 40 MB
            batch=max(1, 5_000_000 // max(1, sum(sample.size for sample in data))),
            axis=1,
            rng=np.random.default_rng(seed),
        )
        p_values[cells] = result.pvalue
    return p_values


def _welch(samples: Sequence[np.ndarray]) -> np.ndarray:
    total = np.zeros(len(samples[0]))
    for sample in samples:
        present = ~np.isnan(sample)
        count = present.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(present, sample, 0.0).sum(axis=1) / count
            squares = np.where(present, (sample - mean[:, None]) ** 2, 0.0).sum(axis=1)
            total = total + squares / (count - 1) / count
    return np.sqrt(total)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def _pair(first: pl.DataFrame, second: pl.DataFrame, value: str, by: Sequence[str], bands: str | None):
    """Source means of both groups, over the quantities (and bands) that both have."""
    if bands:
        shared = set(first[bands].to_list()) & set(second[bands].to_list())
        first, second = (rows.filter(pl.col(bands).is_in(shared)) for rows in (first, second))
    cells = None
    if by:
        cells = first.select(by).unique(maintain_order=True)
        cells = cells.join(second.select(by).unique(), on=list(by), how="semi", maintain_order="left")
    return source_means(first, [value], by, bands, cells), source_means(second, [value], by, bands, cells)


def _frame(
    cells: pl.DataFrame, by: Sequence[str], bounds: Bounds, counts: np.ndarray, p_values: np.ndarray | None = None
) -> pl.DataFrame:
    fewest = counts.min(axis=1) if counts.ndim == 2 else counts
    columns = [
        pl.Series("value", bounds.value, pl.Float64, nan_to_null=True),
        pl.Series("low", bounds.low, pl.Float64, nan_to_null=True),
        pl.Series("high", bounds.high, pl.Float64, nan_to_null=True),
    ]
    if p_values is not None:
        columns.append(pl.Series("p_value", p_values, pl.Float64, nan_to_null=True))
    columns.append(pl.Series("sources", counts.tolist(), pl.List(pl.Int64) if counts.ndim == 2 else pl.Int64))
    columns.append(pl.Series("exploratory", fewest < FEWEST_SOURCES))
    return cells.select(list(by)).hstack(columns) if by else pl.DataFrame(columns)
