"""Excess mass on a feature: what a head gives this item's map beyond other items' maps, and is it chance?"""

from collections.abc import Iterator

import numpy as np

from headscope.study.inference import settings
from headscope.study.inference.draws import paired
from headscope.study.roles.rows import Sources

EXCESS = (
    "With m the mean attention that the keys of item i get from all queries and F a feature's residual map, A(i, j) ="
    " sum over keys k of m_i(k) F_j(k), the items of a source taken in pairs in their order. The excess is the mean"
    " over sources of A(s, s) minus the mean of A(s, t) over all pairs of different sources: mass on the item's own map"
    " beyond other items' maps under the same attention, in standard deviations of the map, per source that has the"
    " feature. A head that looks where it"
    " looks whatever the image shows has an excess of 0."
)
PAIRING = (
    "The pairing of masses and maps is permuted by source, the same permutations for all heads and features, and t ="
    " mean / standard error computed anew each time; p is the share of |t| at or above the observed one, p_maxt that of"
    " the largest |t| of all heads and features of a group and split (Westfall and Young 1993)."
)
# what single precision may leave of an excess that is 0, in standard deviations of the map
ROUNDING = 1e-6
_BLOCK = 4_000_000


def excess_by_source(mass: np.ndarray, maps: np.ndarray, sources: Sources) -> np.ndarray:
    """Every source's part in the excess, whose mean is the excess: see `EXCESS`.

    n / (n - 1) (A(s, s) - mean_t A(s, t) - mean_t A(t, s) + mean A): what a source adds to the mean over pairs to first
    order (Hoeffding 1948), so that its spread is that of the excess.

    Args:
        mass: [items, ..., keys].
        maps: [items, features, keys].
        sources: of the items.

    Returns:
        [sources, ..., features].
    """
    given, map_of = mass[sources.order], maps[sources.order]
    items = given.shape[1]
    own = np.einsum("sm...k,smfk->s...f", given, map_of) / items
    rows = np.einsum("sm...k,mfk->s...f", given, map_of.mean(axis=0)) / items
    columns = np.einsum("m...k,smfk->s...f", given.mean(axis=0), map_of) / items
    count = len(sources.names)
    return count / (count - 1) * (own - rows - columns + rows.mean(axis=0))


def permuted_pairs(mass: np.ndarray, maps: np.ndarray, sources: Sources, seed: int) -> np.ndarray:
    """t of the excess of one head as it is and in every permutation: see `PAIRING`.

    mass [items, keys], maps [items, features, keys] -> [1 + permutations, features].
    """
    given, map_of = sources.together(mass), sources.together(maps)
    share = 1 / len(sources.order.T)
    count, features = len(given), map_of.shape[1]
    rows = given @ map_of.mean(axis=0).T * share
    columns = map_of @ given.mean(axis=0) * share
    orders = paired(seed, count, settings.RESAMPLES)
    total, squares = np.zeros((2, orders.shape[1], features))
    flat = map_of.reshape(count * features, -1).T
    step = max(1, _BLOCK // (count * features))
    for start in range(0, count, step):
        block = (given[start : start + step] @ flat).reshape(-1, count, features) * share
        block += rows.mean(axis=0) - rows[start : start + step, None] - columns
        for offset, table in enumerate(block):
            taken = table[orders[start + offset]]
            total += taken
            squares += np.square(taken, out=taken)
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0.0) / (count - 1)
    return mean / np.sqrt(variance + ROUNDING**2)


def corrected(
    blocks: Iterator[tuple[np.ndarray, np.ndarray]], count: int, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p-values from statistics as observed and in every draw of the null.

    Args:
        blocks: cells and their statistics, the observed one first: [cells], [1 + draws, cells].
        count: of the cells.
        chosen: which cells are a family of their own besides, bool [count].

    Returns:
        p, p among all cells, p among the chosen ones (NaN for others), each [count]; NaN for cells of no block.
    """
    draws = settings.RESAMPLES
    p_value, observed = np.full((2, count), np.nan)
    largest, largest_chosen = np.zeros((2, draws))
    for cells, statistics in blocks:
        length = np.abs(statistics)
        # equal but for rounding
        bar = length[0] * (1 - 1e-9)
        observed[cells] = bar
        p_value[cells] = (1 + (length[1:] >= bar).sum(axis=0)) / (1 + draws)
        largest = np.maximum(largest, length[1:].max(axis=1, initial=0.0))
        mine = length[1:, chosen[cells]]
        largest_chosen = np.maximum(largest_chosen, mine.max(axis=1, initial=0.0))
    found = [
        (1 + len(null) - np.searchsorted(np.sort(null), observed)) / (1 + draws) for null in (largest, largest_chosen)
    ]
    p_maxt, p_chosen = (np.where(np.isnan(observed), np.nan, p) for p in found)
    return p_value, p_maxt, np.where(chosen, p_chosen, np.nan)
