"""The energy distance of two groups of sources, with its permutation test: do they differ in anything at all?"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import pdist, squareform

from headscope.study.inference import settings
from headscope.study.inference.draws import divided, flipped

ENERGY = (
    "Unbiased energy distance 2 E|X − Y| − E|X − X'| − E|Y − Y'| (Székely and Rizzo 2013) between the sources of two"
    " groups, |.| the Euclidean distance over all features, each divided by its standard deviation over the sources of"
    " both groups together; own pairs are left out of every mean. It is 0 on average where the groups have one"
    " distribution, and can then be below 0. The test divides the sources at random into groups of the same sizes, or"
    " swaps the two members of random pairs where the groups share their sources."
)
QUANTILES = (0.025, 0.5, 0.95, 0.975)
# ties of a permuted statistic with the observed one but for rounding
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class EnergyTest:
    """The outcome of `energy_test`.

    Attributes:
        statistic: the unbiased energy distance, in standard deviations of the features; NaN where it is void, or where
            a group has fewer than two sources.
        p_value: of the hypothesis that both groups have one distribution; None where a group has fewer than
            `FEWEST_SOURCES` sources.
        null_mean: the statistic's mean over the permutations.
        null_quantiles: its quantiles over the permutations, by level: see `QUANTILES`.
        sources: of the first and of the second group.
        features: how many differ between sources, of those given; a constant one adds nothing.
        paired: whether members of pairs were swapped.
        void: how many numbers aren't finite. Where there is one, nothing is computed.
    """

    statistic: float
    p_value: float | None
    null_mean: float
    null_quantiles: dict[float, float]
    sources: tuple[int, int]
    features: int
    paired: bool
    void: int


def energy_test(
    first: np.ndarray, second: np.ndarray, seed: int = 0, *, paired: bool = False, resamples: int | None = None
) -> EnergyTest:
    """Compare two groups of sources in all their features at once: see `ENERGY`.

    E = 2 mean_ij |x_i - y_j| - mean_i<j |x_i - x_j| - mean_i<j |y_i - y_j|. With pairs, x_i is never compared with its
    own y_i, so that E stays unbiased although the two depend on each other.

    Args:
        first, second: [sources, features], one row per source; with `paired`, row i of both is the same source.
        seed: of the permutations.
        paired: swap the members of pairs instead of dividing the sources anew. The hypothesis is then that the two
            versions of a source are exchangeable.
        resamples: how many permutations; None is `settings.RESAMPLES`.

    Raises:
        ValueError: where the shapes don't match.
    """
    first, second = (np.asarray(array, np.float64) for array in (first, second))
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"first, second: got shapes {first.shape} and {second.shape}, expected [sources, features]")
    sizes = (len(first), len(second))
    if paired and sizes[0] != sizes[1]:
        raise ValueError(f"paired: got {sizes[0]} and {sizes[1]} sources, expected as many in both groups")
    pooled = np.concatenate([first, second])
    void = int((~np.isfinite(pooled)).sum())
    if void or min(sizes) < 2:
        missing = dict.fromkeys(QUANTILES, np.nan)
        return EnergyTest(np.nan, None, np.nan, missing, sizes, 0, paired, void)
    spread = pooled.std(axis=0)
    differs = spread > _TOLERANCE * np.abs(pooled).max(axis=0, initial=0.0)
    distances = squareform(pdist(pooled[:, differs] / spread[differs]))
    if paired:
        own = np.arange(sizes[0])
        distances[own, own + sizes[0]] = distances[own + sizes[0], own] = 0.0
    count = settings.RESAMPLES if resamples is None else resamples
    observed = np.repeat([1.0, 0.0], sizes)[None]
    statistic = _energy(distances, observed, paired)[0]
    if paired:
        swapped = flipped(seed, sizes[0], count) > 0
        members = np.concatenate([swapped, ~swapped], axis=1) * 1.0
    else:
        members = divided(seed, *sizes, count)
    null = _energy(distances, members, paired)
    slack = _TOLERANCE * max(1.0, distances.max(initial=0.0))
    p_value = (1 + int((null >= statistic - slack).sum())) / (1 + count)
    return EnergyTest(
        statistic=float(statistic),
        p_value=p_value if min(sizes) >= settings.FEWEST_SOURCES else None,
        null_mean=float(null.mean()),
        null_quantiles=dict(zip(QUANTILES, np.quantile(null, QUANTILES).tolist(), strict=True)),
        sources=sizes,
        features=int(differs.sum()),
        paired=paired,
        void=0,
    )


def _energy(distances: np.ndarray, members: np.ndarray, paired: bool) -> np.ndarray:
    """The statistic of every division: distances [sources, sources], members [divisions, sources] -> [divisions]."""
    one = members.sum(axis=1)
    two = members.shape[1] - one
    to_first = members @ distances
    within_first = (to_first * members).sum(axis=1)
    between = (to_first * (1 - members)).sum(axis=1)
    within_second = distances.sum() - within_first - 2 * between
    crossed = one * (two - 1) if paired else one * two
    return 2 * between / crossed - within_first / (one * (one - 1)) - within_second / (two * (two - 1))
