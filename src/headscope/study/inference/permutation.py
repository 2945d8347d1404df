"""The studentised permutation test of a difference of means between two groups of sources."""

import numpy as np

from headscope.study.inference import settings
from headscope.study.inference.draws import divided
from headscope.study.inference.intervals import counts_at_least

DIFFERENCE_TEST = (
    "Two-sided test that both groups have one mean. The sources of both are divided at random into groups of their"
    " sizes, and Welch's t, the difference over the square root of s₁²/n₁ + s₂²/n₂, is computed anew each time (Janssen"
    " 1997; Chung and Romano 2013: of its size also where spreads and sizes differ); p is the share of |t| at or above"
    " the observed one. As that fails with few and skewed sources of unequal spread, p is at least that of the"
    " bootstrap-t test of the difference. Groups of the same sources are tested in pairs, by the bootstrap-t alone."
)
# rounding in a statistic that equals the observed one, as a share of it
_TOLERANCE = 1e-10
_BLOCK = 4_000_000


def permuted(
    first: np.ndarray, second: np.ndarray, observed: np.ndarray, seed: int, *, family: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """p-values of observed Welch statistics and, with `family`, their single-step max-t correction, each [cells].

    Whole sources change groups, the same ones in every cell, which keeps the dependence between cells: the corrected p
    is the share of divisions whose largest |t| over all cells reaches the cell's own (Westfall and Young 1993).

    Args:
        first, second: [sources, cells].
        observed: value / standard error, [cells].
        seed: of the divisions.
        family: whether to correct for all cells.
    """
    draws = settings.RESAMPLES
    members = divided(seed, len(first), len(second), draws)
    pooled = np.concatenate([first, second])
    pooled = pooled - pooled.mean(axis=0)
    p_values = np.full(pooled.shape[1], np.nan)
    largest = np.zeros(draws)
    bar = np.abs(observed) * (1 - _TOLERANCE)
    step = max(1, _BLOCK // draws)
    for start in range(0, pooled.shape[1], step):
        cells = slice(start, start + step)
        lengths = np.abs(_welch(pooled[:, cells], members, len(first)))
        p_values[cells] = (1 + (lengths >= bar[cells]).sum(axis=0)) / (draws + 1)
        largest = np.maximum(largest, lengths.max(axis=1))
    corrected = np.full_like(p_values, np.nan)
    if family:
        corrected = (1 + counts_at_least(largest, bar)) / (draws + 1)
    undefined = np.isnan(observed)
    return np.where(undefined, np.nan, p_values), np.where(undefined, np.nan, corrected)


def _welch(pooled: np.ndarray, members: np.ndarray, first: int) -> np.ndarray:
    """Welch's t of every division, [divisions, cells]; pooled [sources, cells] is centred."""
    second = len(pooled) - first
    squares = pooled**2
    sums, squared = members @ pooled, members @ squares
    mean_first, mean_second = sums / first, -sums / second
    variance = (squared / first - mean_first**2) / (first - 1)
    variance += ((squares.sum(axis=0) - squared) / second - mean_second**2) / (second - 1)
    floor = 1e-13 * squares.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = mean_first - mean_second
        t = distance / np.sqrt(variance)
        equal = np.abs(distance) <= 1e-12 * np.sqrt(squares.mean(axis=0))
        return np.where(variance <= floor, np.where(equal, 0.0, np.copysign(np.inf, distance)), t)
