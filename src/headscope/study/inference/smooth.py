"""Smooth functions of means over sources: their standard error by the delta method, their bootstrap-t distribution.

A function takes the means over the sources of each independently drawn group, [columns, draws, cells], groups in order,
and returns its value, [draws, cells], and its derivative with respect to every mean, shaped as they are. What a draw
makes of means is linear in how often each source was drawn, hence a product of matrices for all cells of a family.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from headscope.study.inference.draws import drawn, resampled

Smooth = Callable[..., tuple[np.ndarray, tuple[np.ndarray, ...]]]
# numbers in one array of a block of cells: 32 MB
_BLOCK = 4_000_000
# what rounding leaves of a variance that is 0, as a share of its terms and of squared means
_ROUNDING, _ROUNDING_OF_MEANS = 1e-13, 1e-28


def mean(means: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """f = x; one group, one column."""
    return means[0], (np.ones_like(means),)


def difference(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """f = x - y; two groups, one column each."""
    return first[0] - second[0], (np.ones_like(first), -np.ones_like(second))


def log_ratio(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """f = ln(x / y); two groups, one column each. NaN where the means differ in sign or one is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log(first[0] / second[0]), (1 / first, -1 / second)


def paired_log_ratio(means: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """f = ln(x / y); one group with both columns."""
    value, (first, second) = log_ratio(means[:1], means[1:])
    return value, (np.concatenate([first, second]),)


def relative(means: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """f = mean over bands b of d_b / c_b; one group, whose columns are d of every band, then c of every band."""
    bands = len(means) // 2
    change, clean = means[:bands], means[bands:]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = change / clean
        return ratio.mean(axis=0), (np.concatenate([1 / clean, -ratio / clean]) / bands,)


def relative_difference(means: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """f = (mean over bands of d_b / c_b) - (mean over bands of e_b / f_b); one group, whose columns are d of every
    band, then c, e and f."""
    half = len(means) // 2
    (first, (slopes,)), (second, (others,)) = relative(means[:half]), relative(means[half:])
    return first - second, (np.concatenate([slopes, -others]),)


def share(means: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """f = (mean over bands b of d_b / c_b) / (mean over bands of e_b / c_b); one group, whose columns are d of every
    band, then e, then c."""
    bands = len(means) // 3
    part, whole, clean = means[:bands], means[bands : 2 * bands], means[2 * bands :]
    with np.errstate(invalid="ignore", divide="ignore"):
        parts, wholes = part / clean, whole / clean
        below = wholes.mean(axis=0)
        value = parts.mean(axis=0) / below
        slopes = [1 / clean, -value / clean, -(parts - value * wholes) / clean]
        return value, (np.concatenate(slopes) / (bands * below),)


@dataclass(frozen=True)
class Studentised:
    """Estimates and their bootstrap-t distribution.

    Attributes:
        value: [cells].
        standard_error: by the delta method, [cells].
        t: (value of the draw - value) / standard error of the draw, [draws, cells]; infinite where the draw's standard
            error is 0 and its value another, NaN where the draw has no value.
    """

    value: np.ndarray
    standard_error: np.ndarray
    t: np.ndarray


def estimate(groups: Sequence[np.ndarray], function: Smooth) -> tuple[np.ndarray, np.ndarray]:
    """A function's value and standard error, each [cells]; groups: [columns, sources, cells] each.

    standard error^2 = sum over groups of g' S g / n: S the covariance of the columns between sources (divisor n - 1), g
    the function's derivative at the means (the delta method: Efron and Tibshirani 1993, ch. 21).
    """
    if min(group.shape[1] for group in groups) < 2:
        value, _ = function(*(group.mean(axis=1)[:, None] for group in groups))
        return value[0], np.full(value.shape[1], np.nan)
    whole = [np.full((1, group.shape[1]), 1 / group.shape[1]) for group in groups]
    value, variance, floor, _ = _evaluate(groups, function, whole, [group.shape[1] for group in groups])
    with np.errstate(invalid="ignore"):
        return value[0], np.sqrt(np.where(variance[0] <= floor, 0.0, variance[0]))


def studentised(groups: Sequence[np.ndarray], function: Smooth, seed: int, draws: int) -> Iterator[Studentised]:
    """The bootstrap-t distribution of a function, a block of cells after the other (Efron and Tibshirani 1993, ch. 12).

    groups: [columns, sources, cells] each. Every draw takes `drawn(n)` of a group's n sources with replacement, and the
    delta method is applied anew to what was drawn.
    """
    sizes = tuple(group.shape[1] for group in groups)
    cells = groups[0].shape[2]
    step = max(1, _BLOCK // (draws * sum(len(group) for group in groups)))
    weights = resampled(seed, sizes, draws)
    for start in range(0, cells, step):
        block = [group[:, :, start : start + step] for group in groups]
        value, standard_error = estimate(block, function)
        redrawn, variance, floor, slack = _evaluate(block, function, weights, [drawn(size) for size in sizes])
        distance = redrawn - value
        with np.errstate(invalid="ignore", divide="ignore"):
            t = distance / np.sqrt(variance)
            none = variance <= floor
            t = np.where(none, np.where(np.abs(distance) <= slack, 0.0, np.copysign(np.inf, distance)), t)
        yield Studentised(value, standard_error, np.where(np.isfinite(distance), t, np.nan))


def _evaluate(
    groups: Sequence[np.ndarray], function: Smooth, weights: Sequence[np.ndarray], sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Value and variance of every draw, [draws, cells]; and for every cell the variance and the distance between values
    that may be rounding."""
    centres = [group.mean(axis=1, keepdims=True) for group in groups]
    centred = [group - centre for group, centre in zip(groups, centres, strict=True)]
    moved = [_product(weight, array) for weight, array in zip(weights, centred, strict=True)]
    value, gradients = function(*(centre + shift for centre, shift in zip(centres, moved, strict=True)))
    _, slopes = function(*centres)
    variance, floor, slack = 0.0, 0.0, 0.0
    for array, centre, weight, shift, gradient, slope, size in zip(
        centred, centres, weights, moved, gradients, slopes, sizes, strict=True
    ):
        spread = (array**2).mean(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            terms = _ROUNDING * spread + _ROUNDING_OF_MEANS * centre**2
            floor = floor + (slope**2 * terms).sum(axis=(0, 1)) * len(array) / size
            slack = slack + 1e-12 * np.abs(slope * centre).sum(axis=(0, 1))
        variance = variance + _variance(weight, array, gradient, shift) / (size - 1)
    return value, np.asarray(variance), np.asarray(floor), np.asarray(slack)


def _product(weight: np.ndarray, array: np.ndarray) -> np.ndarray:
    """weight [draws, sources], array [columns, sources, cells] -> [columns, draws, cells]."""
    return np.stack([weight @ column for column in array])


def _variance(weight: np.ndarray, array: np.ndarray, gradient: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The variance, divisor n, of what every source adds to a draw's value to first order: [draws, cells].

    weight [draws, sources], array [columns, sources, cells], gradient and shift [columns, draws, cells].
    """
    if len(array) == 1:
        # the slope of a single column comes out of the sum
        with np.errstate(invalid="ignore", over="ignore"):
            return gradient[0] ** 2 * (weight @ array[0] ** 2) - (gradient[0] * shift[0]) ** 2
    # [cells, columns, draws], whose rows lie together in memory
    slopes = np.ascontiguousarray(np.moveaxis(gradient, 2, 0))
    squares = np.empty((slopes.shape[0], slopes.shape[2]))
    with np.errstate(invalid="ignore", over="ignore"):
        for cell, slope in enumerate(slopes):
            # [draws, sources]
            parts = slope.T @ array[:, :, cell]
            squares[cell] = np.einsum("ds,ds->d", weight, np.square(parts, out=parts))
        return squares.T - (gradient * shift).sum(axis=0) ** 2
