"""Estimates from sources that two runs share: both runs' numbers, their difference with its test, and how alike two
rankings are.

Whatever is drawn anew is a source, with its numbers of both runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.stats import rankdata
from scipy.stats import t as student

from headscope.study.inference import settings, smooth, source_means
from headscope.study.inference.intervals import infer

RANKS = (
    "Spearman's correlation, over heads, of the two runs' means over all sources. What is estimated is how two rankings"
    " agree that are measured with so many sources, not how the true effects do: noise in either ranking lowers it, and"
    " noise that both runs share (the same images) raises it. Hence the halves: the mean over random divisions of the"
    " sources of the correlation between one half's ranking and the other half's, within each run and across the runs;"
    " where across is as large as within, the runs rank heads alike as far as this can tell. Interval: tanh(artanh r ±"
    " t s), s the standard deviation of artanh r over bootstrap draws of sources."
)
# divisions into halves, and draws of the correlations' bootstrap
_HALVES, _RANKINGS = 200, 999


@dataclass(frozen=True)
class Cells:
    """Means over the items of each source, of both runs.

    Attributes:
        frame: a row per quantity, the columns `by`.
        values: [sources, cells, bands] each; NaN throughout where a cell is void.
        void: rows whose numbers aren't finite, and missing ones, of every cell.
    """

    frame: pl.DataFrame
    by: list[str]
    values: tuple[np.ndarray, ...]
    void: np.ndarray

    @property
    def sources(self) -> int:
        return len(self.values[0])


def cells_of(rows: pl.DataFrame, names: Sequence[str], by: list[str], bands: str | None = "timestep") -> Cells:
    """Tabulate the columns `names` of a family, whose quantities the columns `by` tell apart."""
    table = source_means(rows, names, by, bands)
    values = tuple(np.where((table.void == 0)[None, :, None], array, np.nan) for array in table.values)
    return Cells(table.cells.select(by), by, values, table.void)


class Quantity(NamedTuple):
    """A smooth function of means over sources: see `inference.smooth`; columns [columns, sources, cells]."""

    columns: np.ndarray
    function: smooth.Smooth


def mean(values: np.ndarray) -> Quantity:
    """The mean over sources and bands; values [sources, cells, bands]."""
    return Quantity(values.mean(axis=2)[None], smooth.mean)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Quantity:
    """The mean over bands of sum of numerators / sum of denominators; both [sources, cells, bands]."""
    return Quantity(np.moveaxis(np.concatenate([numerator, denominator], axis=2), 2, 0), smooth.relative)


def difference(second: Quantity, first: Quantity) -> Quantity:
    """The second quantity minus the first, of the same sources."""
    count = len(second.columns)

    def function(means: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        one, (slope_of_one,) = second.function(means[:count])
        two, (slope_of_two,) = first.function(means[count:])
        return one - two, (np.concatenate([slope_of_one, -slope_of_two]),)

    return Quantity(np.concatenate([second.columns, first.columns]), function)


def estimates(cells: Cells, first: Quantity, second: Quantity, compared: Quantity, seed: int) -> pl.DataFrame:
    """Both runs' estimates and what compares them, with its test and the family's: see `inference.INTERVAL`.

    Returns a table of the columns of `by`, first, first_low, first_high, second, second_low, second_high, value, low,
    high, p_value, p_maxt, sources, exploratory, void.
    """
    count, few = len(cells.void), cells.sources < settings.FEWEST_SOURCES
    columns = [
        *interval(cells, first, "first", seed),
        *interval(cells, second, "second", seed),
        *interval(cells, compared, "", seed, tested=not few),
        pl.Series("sources", [cells.sources] * count, pl.Int64),
        pl.Series("exploratory", [few] * count, pl.Boolean),
        pl.Series("void", cells.void, pl.Int64),
    ]
    return cells.frame.hstack(columns) if cells.by else pl.DataFrame(columns)


def interval(cells: Cells, quantity: Quantity, name: str, seed: int, tested: bool | None = None) -> list[pl.Series]:
    """A quantity's NAME, NAME_low, NAME_high (or value, low, high) in every cell; null where void or undefined.

    tested: p_value and p_maxt as well, null where it is False.
    """
    sound = cells.void == 0
    found = infer([quantity.columns[:, :, sound]], quantity.function, seed, tested=bool(tested), family=bool(tested))
    columns = {f"{name}{end}" if name else end.strip("_"): getattr(found, end.strip("_")) for end in ("_low", "_high")}
    columns = {name or "value": found.value, **columns}
    if tested is not None:
        undefined = np.full(len(found.value), np.nan)
        columns |= {p: getattr(found, p) if tested else undefined for p in ("p_value", "p_maxt")}
    made = []
    for title, numbers in columns.items():
        whole = np.full(len(sound), np.nan)
        whole[sound] = np.where(np.isfinite(numbers), numbers, np.nan)
        made.append(pl.Series(title, whole, pl.Float64, nan_to_null=True))
    return made


def rankings(cells: Cells, scores: Callable[[np.ndarray], Sequence[np.ndarray]], seed: int) -> pl.DataFrame:
    """How alike two runs rank the cells: see `RANKS`.

    scores: takes weights of sources, [draws, sources], rows of sum 1; returns the two runs' scores [draws, cells].

    Returns a table of one row: value, low, high, within_first, within_second, across, heads (how many are ranked),
    sources, exploratory, void.
    """
    sound, sources = cells.void == 0, cells.sources
    generator = np.random.default_rng(seed)

    def ranked(weights: np.ndarray) -> list[np.ndarray]:
        return [_ranks(score[:, sound]) for score in scores(weights)]

    value = _correlation(*ranked(np.full((1, sources), 1 / sources)))[0]
    found = dict.fromkeys(("low", "high", "within_first", "within_second", "across"), np.nan)
    if sources >= 4 and np.isfinite(value):
        draws = generator.multinomial(sources, np.full(sources, 1 / sources), _RANKINGS) / sources
        spread = np.std(np.arctanh(np.clip(_correlation(*ranked(draws)), -1 + 1e-9, 1 - 1e-9)), ddof=1)
        # rankings that never change, or are one, bound nothing
        if np.isfinite(spread) and spread > 0 and abs(value) < 1 - 1e-12:
            half = student.ppf((1 + settings.LEVEL) / 2, sources - 1) * spread
            found["low"], found["high"] = np.tanh(np.arctanh(value) + np.array([-half, half]))
        order = generator.permuted(np.tile(np.arange(sources), (_HALVES, 1)), axis=1) < sources // 2
        one, two = (ranked(half / half.sum(axis=1, keepdims=True)) for half in (order * 1.0, ~order * 1.0))
        found["within_first"], found["within_second"] = (_correlation(one[run], two[run]).mean() for run in (0, 1))
        found["across"] = (_correlation(one[0], two[1]).mean() + _correlation(one[1], two[0]).mean()) / 2
    numbers = {"value": value, **found}
    frame = pl.DataFrame([numbers], schema=dict.fromkeys(numbers, pl.Float64)).with_columns(pl.all().fill_nan(None))
    return frame.with_columns(
        heads=pl.lit(int(sound.sum()), pl.Int64),
        sources=pl.lit(sources, pl.Int64),
        exploratory=pl.lit(sources < settings.FEWEST_SOURCES),
        void=pl.lit(int(cells.void.sum()), pl.Int64),
    )


def weighed(weights: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Weighted means over sources: [draws, sources], [sources, cells, bands] -> [draws, cells, bands]."""
    return np.tensordot(weights, array, axes=1)


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, centred."""
    ranks = rankdata(scores, axis=-1)
    return ranks - ranks.mean(axis=-1, keepdims=True)


def _correlation(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Correlations of rows of centred ranks; NaN where one doesn't vary, or where there are fewer than three."""
    if one.shape[-1] < 3:
        return np.full(len(one), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (one * two).sum(axis=-1) / np.sqrt((one**2).sum(axis=-1) * (two**2).sum(axis=-1))
