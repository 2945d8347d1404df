"""Intervals and tests of smooth functions of means, from their bootstrap-t distribution."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from headscope.study.inference import settings
from headscope.study.inference.smooth import Smooth, estimate, studentised

INTERVAL = (
    "Bootstrap-t (Efron and Tibshirani 1993, ch. 12; Hall 1988): sources are drawn anew with replacement, within each"
    " group, and t* = (value of the draw − value) / standard error of the draw. The interval spans both the symmetric"
    " one, value ± the 95 % quantile of |t*| standard errors, and the equal-tailed one, from value − the 97.5 %"
    " quantile of t* to value − its 2.5 % quantile, in standard errors. The standard error is that of the delta method."
    " A draw takes n − √n of n sources. Where too few sources differ to bound the value, there is no interval. Below 10"
    " sources Student's t stands in for t*."
)
EFFECT_TEST = (
    "Two-sided bootstrap-t test of the hypothesis that the value is 0, the same t* as in the interval: the larger of"
    " the symmetric p, the share of |t*| at or above |value / standard error|, and the equal-tailed p, twice the"
    " smaller share of t* beyond it. It assumes no symmetry, and is below 0.05 only where the interval leaves out 0."
)
# below, a bootstrap has too few different draws: Student's t takes its place
FEWEST_RESAMPLED = 10


@dataclass(frozen=True)
class Inference:
    """Estimates of a family, each [cells]; NaN where undefined.

    Attributes:
        value: the estimate.
        low, high: of its interval.
        standard_error: of the sampling of sources.
        p_value: of the hypothesis that the value is 0; see `EFFECT_TEST`.
        p_maxt: the same, corrected for the family; see `families.MAX_T`.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    standard_error: np.ndarray
    p_value: np.ndarray
    p_maxt: np.ndarray


@dataclass(frozen=True)
class Added:
    """An error beside that of sampling sources, independent of it, as of the fill that was estimated from other images.

    Attributes:
        standard_error: in the value's unit, [cells].
        freedom: its degrees of freedom, [cells].
    """

    standard_error: np.ndarray
    freedom: np.ndarray

    def widened(self) -> np.ndarray:
        """The standard error of a normal error whose 95 % interval is as wide: [cells]."""
        return self.standard_error * student.ppf(_upper(), self.freedom) / student.ppf(_upper(), np.inf)


def infer(
    groups: Sequence[np.ndarray],
    function: Smooth,
    seed: int = 0,
    added: Added | None = None,
    *,
    interval: bool = True,
    tested: bool = True,
    family: bool = False,
) -> Inference:
    """Intervals and tests of a function in every cell: see `INTERVAL` and `EFFECT_TEST`.

    With an added error of standard error e and f degrees of freedom, either half of the interval becomes the root of
    the sum of its square and of (t_f e)^2, t_f Student's 97.5 % quantile; tests divide the value by the root of the sum
    of both squared standard errors, e first widened by t_f over the normal quantile, and p is at least that of a normal
    statistic of this size. A family's p-value compares a
    positive value with the largest t* of all cells of a draw and a negative one with the smallest, doubled, and is at
    least the cell's own (Westfall and Young 1993, single step).

    Args:
        groups: the columns of each independently drawn group, [columns, sources, cells].
        function: see `smooth`.
        seed: of the draws.
        added: an error beside that of sampling sources.
        interval: whether to draw anew at all; without it there are values and standard errors alone.
        tested: whether to compute p-values.
        family: whether to correct them for all cells.
    """
    value, standard_error = estimate(groups, function)
    fewest = min(group.shape[1] for group in groups)
    undefined = np.full(value.shape, np.nan)
    if fewest < 2 or not len(value) or not interval:
        return Inference(value, undefined, undefined, standard_error, undefined, undefined)
    extra = np.zeros_like(value) if added is None else added.widened()
    if fewest < FEWEST_RESAMPLED:
        half = student.ppf(_upper(), fewest - 1) * standard_error
        low, high = _bounds(value, half, half, extra)
        return Inference(value, low, high, standard_error, undefined, undefined)
    draws = settings.RESAMPLES
    scaled = t_statistic(value, standard_error, extra)
    largest, smallest = np.full(draws, -np.inf), np.full(draws, np.inf)
    below, above, p_values = [], [], []
    start = 0
    for block in studentised(groups, function, seed, draws):
        cells = slice(start, start + block.t.shape[1])
        start = cells.stop
        symmetric, lower, upper = _quantiles(block.t)
        below.append(np.maximum(symmetric, upper) * standard_error[cells])
        above.append(np.maximum(symmetric, -lower) * standard_error[cells])
        if tested:
            p_values.append(_p_values(block.t, scaled[cells]))
        if family:
            largest = np.maximum(largest, np.where(np.isnan(block.t), np.inf, block.t).max(axis=1))
            smallest = np.minimum(smallest, np.where(np.isnan(block.t), -np.inf, block.t).min(axis=1))
    low, high = _bounds(value, np.concatenate(below), np.concatenate(above), extra)
    p_value = np.concatenate(p_values) if tested else undefined
    if tested and added is not None:
        # draws of sources know nothing of the added error: where it rules, t* may be far shorter than it
        p_value = np.maximum(p_value, 2 * norm.sf(np.abs(scaled)))
    p_maxt = undefined
    if family:
        over = counts_at_least(largest, scaled)
        under = counts_at_least(-smallest, -scaled)
        p_maxt = np.fmax(p_value, np.minimum(1.0, 2 * (1 + np.minimum(over, under)) / (draws + 1)))
        p_maxt[np.isnan(scaled)] = np.nan
    return Inference(value, low, high, standard_error, p_value, p_maxt)


def t_statistic(value: np.ndarray, standard_error: np.ndarray, extra: np.ndarray) -> np.ndarray:
    """The t statistic, [cells]: infinite where a value other than 0 has no error, 0 where it is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(value == 0, 0.0 * standard_error, value / np.hypot(standard_error, extra))


def counts_at_least(null: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """How many of the null's draws [draws] reach each of the observed statistics, [cells]."""
    return len(null) - np.searchsorted(np.sort(null), observed, side="left")


def _upper() -> float:
    return (1 + settings.LEVEL) / 2


def _bounds(
    value: np.ndarray, below: np.ndarray, above: np.ndarray, extra: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    error = student.ppf(_upper(), np.inf) * extra
    low, high = value - np.hypot(below, error), value + np.hypot(above, error)
    bounded = np.isfinite(low) & np.isfinite(high)
    return np.where(bounded, low, np.nan), np.where(bounded, high, np.nan)


def _quantiles(t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of t* [draws, cells]: of |t*| at the level, of t* at the lower and the upper end; finite, or infinite outward.

    The k-th smallest of R draws stands for the quantile k / (R + 1). A draw without a value (NaN) is beyond any bound.
    """
    return _quantile(np.abs(t), settings.LEVEL), -_quantile(-t, _upper()), _quantile(t, _upper())


def _quantile(draws: np.ndarray, level: float) -> np.ndarray:
    # rounding must not move a rank that is a whole number
    rank = int(np.ceil(level * (len(draws) + 1) - 1e-9))
    if rank > len(draws):
        return np.full(draws.shape[1], np.inf)
    # NaN comes last
    found = np.partition(draws, rank - 1, axis=0)[rank - 1]
    return np.where(np.isnan(found), np.inf, found)


def _p_values(t: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """The larger of the symmetric and the equal-tailed p-value: t [draws, cells], scaled [cells] -> [cells]."""
    # a draw without a value (NaN) counts against every finding
    longer = (~(np.abs(t) < np.abs(scaled))).sum(axis=0)
    tail = np.minimum((~(t < scaled)).sum(axis=0), (~(t > scaled)).sum(axis=0))
    p = np.maximum(1 + longer, 2 * (1 + tail)) / (len(t) + 1)
    return np.where(np.isnan(scaled), np.nan, np.minimum(1.0, p))
