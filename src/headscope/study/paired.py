"""Estimates from sources that two runs share: intervals, a family's tests, and how alike two rankings are.

An estimate is a mean over sources of numbers that stand for it, its *influence values*: the source's own number where
the estimate is a mean, that of the delta method where it is a ratio. They are what intervals and tests are made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.stats import rankdata
from scipy.stats import t as student

from headscope.study import inference
from headscope.study.inference import FEWEST_SOURCES, LEVEL, source_means

MAX_T = (
    "Two-sided. The signs of whole sources' differences are flipped at random, all heads of a source together; a head's"
    " corrected p is the share of flips in which the largest |t| of the whole family reaches the head's own, t being"
    " the difference divided by its standard error."
)
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
# flips of so many numbers at once
_BLOCK = 2**22


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

    def means(self) -> list[np.ndarray]:
        """Every value's mean over bands: [sources, cells]."""
        return [array.mean(axis=2) for array in self.values]


def cells_of(rows: pl.DataFrame, names: Sequence[str], by: list[str], bands: str | None = "timestep") -> Cells:
    """Tabulate the columns `names` of a family, whose quantities the columns `by` tell apart."""
    table = source_means(rows, names, by, bands)
    sources, _, levels = table.values[0].shape
    whole = pl.all_horizontal(pl.col(name).is_finite().fill_null(False) for name in names)
    places = pl.struct("source_id", *([bands] if bands else [])).n_unique()
    # in the order of the cells
    grouped = rows.group_by(by or [pl.lit(0)], maintain_order=True)
    counts = grouped.agg((~whole).sum().alias("broken"), places.alias("there"))
    void = counts["broken"].to_numpy() + sources * levels - counts["there"].to_numpy()
    values = tuple(np.where((void == 0)[None, :, None], array, np.nan) for array in table.values)
    return Cells(table.cells.select(by), by, values, void)


def influence(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Influence values of the mean over bands of sum of numerators / sum of denominators: [sources, cells]."""
    below = denominator.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(below == 0, np.nan, numerator.mean(axis=0) / below)
        return ((numerator - ratio * denominator) / below + ratio).mean(axis=2)


def estimates(
    cells: Cells,
    first: np.ndarray,
    second: np.ndarray,
    seed: int,
    compared: np.ndarray | None = None,
    null: float = 0.0,
) -> pl.DataFrame:
    """Both runs' estimates and what is compared, by default their difference, with its test against `null`.

    first, second, compared: influence values [sources, cells]. Returns a table of the columns of `by`, first,
    first_low, first_high, second, second_low, second_high, value, low, high, p_value, p_max_t, sources, exploratory,
    void.
    """
    compared = second - first if compared is None else compared
    p_value, p_max_t = sign_flips(compared - null, seed)
    count = len(cells.void)
    columns = [
        *interval(first, "first"),
        *interval(second, "second"),
        *interval(compared),
        pl.Series("p_value", p_value, pl.Float64, nan_to_null=True),
        pl.Series("p_max_t", p_max_t, pl.Float64, nan_to_null=True),
        pl.Series("sources", [cells.sources] * count, pl.Int64),
        pl.Series("exploratory", [cells.sources < FEWEST_SOURCES] * count, pl.Boolean),
        pl.Series("void", cells.void, pl.Int64),
    ]
    return cells.frame.hstack(columns) if cells.by else pl.DataFrame(columns)


def interval(values: np.ndarray, name: str = "") -> list[pl.Series]:
    """Estimates and their t intervals from influence values [sources, cells]: value, low and high, or NAME, NAME_low,
    NAME_high; null where undefined."""
    mean, error = values.mean(axis=0), _standard_error(values)
    half = student.ppf((1 + LEVEL) / 2, max(1, len(values) - 1)) * error
    titles = (name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")
    return [
        pl.Series(title, np.where(np.isfinite(found), found, np.nan), pl.Float64, nan_to_null=True)
        for title, found in zip(titles, (mean, mean - half, mean + half), strict=True)
    ]


def sign_flips(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """p-values of the hypothesis that influence values lie around 0: each cell's own, and `MAX_T`; [cells] each.

    NaN for void cells, cells that don't vary, and fewer sources than `FEWEST_SOURCES`.
    """
    sources, cells = values.shape
    p_value, p_max_t = np.full(cells, np.nan), np.full(cells, np.nan)
    observed = np.abs(_t(values.mean(axis=0), (values**2).mean(axis=0), sources))
    tested = np.isfinite(observed)
    if sources < FEWEST_SOURCES or not tested.any():
        return p_value, p_max_t
    values, observed = values[:, tested], observed[tested]
    squares = (values**2).mean(axis=0)
    generator = np.random.default_rng(seed)
    own, largest = np.zeros(len(observed)), np.zeros(len(observed))
    left = inference.RESAMPLES
    while left:
        count = min(left, max(1, _BLOCK // values.size))
        signs = generator.integers(0, 2, (count, sources)) * 2.0 - 1.0
        flipped = np.abs(_t(signs @ values / sources, squares, sources))
        # but for rounding, as flips that give the observed differences do
        reached = observed * (1 - 1e-10)
        own += (flipped >= reached).sum(axis=0)
        largest += (flipped.max(axis=1, keepdims=True) >= reached).sum(axis=0)
        left -= count
    p_value[tested] = (own + 1) / (inference.RESAMPLES + 1)
    p_max_t[tested] = (largest + 1) / (inference.RESAMPLES + 1)
    return p_value, p_max_t


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
        centre, half = np.arctanh(value), student.ppf((1 + LEVEL) / 2, sources - 1) * spread
        if np.isfinite(centre + half):
            found["low"], found["high"] = np.tanh(centre - half), np.tanh(centre + half)
        order = generator.permuted(np.tile(np.arange(sources), (_HALVES, 1)), axis=1) < sources // 2
        one, two = (ranked(half / half.sum(axis=1, keepdims=True)) for half in (order * 1.0, ~order * 1.0))
        found["within_first"], found["within_second"] = (_correlation(one[run], two[run]).mean() for run in (0, 1))
        found["across"] = (_correlation(one[0], two[1]).mean() + _correlation(one[1], two[0]).mean()) / 2
    numbers = {"value": value, **found}.items()
    frame = pl.DataFrame([pl.Series(name, [one], pl.Float64, nan_to_null=True) for name, one in numbers])
    return frame.with_columns(
        heads=pl.lit(int(sound.sum()), pl.Int64),
        sources=pl.lit(sources, pl.Int64),
        exploratory=pl.lit(sources < FEWEST_SOURCES),
        void=pl.lit(int(cells.void.sum()), pl.Int64),
    )


def weighed(weights: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Weighted means over sources: [draws, sources], [sources, cells, bands] -> [draws, cells, bands]."""
    return np.tensordot(weights, array, axes=1)


def _standard_error(values: np.ndarray) -> np.ndarray:
    if len(values) < 2:
        return np.full(values.shape[1], np.nan)
    return values.std(axis=0, ddof=1) / np.sqrt(len(values))


def _t(mean: np.ndarray, squares: np.ndarray, sources: int) -> np.ndarray:
    """Student's t from means and mean squares: NaN where nothing varies; flips leave the squares as they are."""
    variance = np.maximum(squares - mean**2, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(variance > 1e-24 * squares, mean * np.sqrt((sources - 1) / variance), np.nan)


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
