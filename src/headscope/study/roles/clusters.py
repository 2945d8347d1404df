"""Kinds of heads without names: clusters of their profiles, and whether halves of the sources agree on them."""

import numpy as np
import polars as pl
from scipy.cluster.hierarchy import cut_tree, linkage

# of clusters that are tried, of random halves, of profiles without structure and their halves
CLUSTERS = tuple(range(2, 9))
HALVES, WITHOUT, WITHOUT_HALVES = 50, 50, 8
# of the heads, in each half's clustering
TAKEN = 0.8
CLUSTERING = (
    "A head's profile is its H / ln K, its distance over that of uniform attention and its excess on every feature that"
    " all sites have, at every timestep, averaged over the sources of both splits. Each of these three (counterparts"
    " make a fourth) has the same variance between heads in all. Ward's method (1963) makes 2 to 8 clusters; the"
    f" agreement of a number is the adjusted Rand index (Hubert and Arabie 1985) between the clusters of two random"
    f" halves of the sources, mean of {HALVES} divisions; each half clusters another random {100 * TAKEN:.0f} % of the"
    " heads (Ben-Hur, Elisseeff and Guyon 2002), as sources alone repeat any cut where there are many, and the heads of"
    " both are compared. Chance is the same on profiles without structure: one Gaussian"
    " with the heads' own covariance, and halves that differ as these do. The number whose agreement is most"
    " standard deviations above chance is taken where these are more than the 95 % quantile of the most in profiles"
    " without structure; else there is one cluster."
)
CAVEAT = (
    "Clusters say that heads form groups in these three numbers, not what they do, and a continuum of heads cut in two"
    " is stable where the cut falls into a gap by chance. Chance is Gaussian: of heads without structure whose profiles"
    " are skewed up to a quarter of simulations gave clusters, so their number is exploratory. They describe these"
    " heads: other heads are no sample."
)


def cluster_heads(profiles: np.ndarray, blocks: np.ndarray, seed: int) -> tuple[np.ndarray, pl.DataFrame]:
    """Clusters of heads: see `CLUSTERING`.

    Args:
        profiles: [sources, heads, columns], all finite.
        blocks: which of the kinds of number a column is of, [columns].
        seed: of the halves and of the profiles without structure.

    Returns:
        The clusters of the heads, from 1, [heads]; and a table: clusters, agreement, chance (its mean), chance_high
        (95 % quantile), chosen. With one cluster no row is chosen.
    """
    generator = np.random.default_rng(seed)
    sources, heads, _ = profiles.shape
    numbers = [number for number in CLUSTERS if number <= heads // 2]
    schema = {"clusters": pl.Int64, "agreement": pl.Float64, "chance": pl.Float64, "chance_high": pl.Float64}
    one = np.ones(heads, np.int64), pl.DataFrame(schema=schema | {"chosen": pl.Boolean})
    if sources < 4 or not numbers:
        return one
    profiles = _scaled(profiles, blocks)
    if profiles.shape[2] == 0:
        return one
    halves = []
    for _ in range(HALVES):
        order = generator.permutation(sources)
        halves.append([profiles[part].mean(axis=0) for part in np.array_split(order, 2)])
    agreement = np.mean([_agreements(*pair, numbers, generator) for pair in halves], axis=0)
    chance = np.stack([_without_structure(profiles, numbers, generator) for _ in range(WITHOUT)])
    # agreements of few clusters spread more by chance than those of many
    spread = np.maximum(chance.std(axis=0), 1e-12)
    above = (agreement - chance.mean(axis=0)) / spread
    largest = np.quantile(((chance - chance.mean(axis=0)) / spread).max(axis=1), 0.95)
    best = int(above.argmax()) if above.max() > largest else None
    table = pl.DataFrame(
        {
            "clusters": numbers,
            "agreement": agreement,
            "chance": chance.mean(axis=0),
            "chance_high": np.quantile(chance, 0.95, axis=0),
            "chosen": [place == best for place in range(len(numbers))],
        }
    )
    labels = np.ones(heads, np.int64) if best is None else 1 + _clusters(profiles.mean(axis=0), [numbers[best]])[0]
    return labels.astype(np.int64), table


def _scaled(profiles: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Every block's columns over the root of their variance between heads, summed; blocks without any left out."""
    mean = profiles.mean(axis=0)
    centred = profiles - mean.mean(axis=0)
    parts = []
    for block in np.unique(blocks):
        mine = blocks == block
        variance = mean[:, mine].var(axis=0).sum()
        if variance > 1e-20 * max(1.0, (mean[:, mine] ** 2).mean()):
            parts.append(centred[:, :, mine] / np.sqrt(variance))
    return np.concatenate(parts, axis=2) if parts else centred[:, :, :0]


def _without_structure(profiles: np.ndarray, numbers: list[int], generator: np.random.Generator) -> np.ndarray:
    """The agreement of halves of one Gaussian cloud of heads, mean over halves: [numbers]."""
    sources, heads, columns = profiles.shape
    mean = profiles.mean(axis=0)
    cloud = generator.standard_normal((heads, heads)) @ (mean - mean.mean(axis=0)) / np.sqrt(heads - 1)
    # what a half of the sources differs by from all of them, in opposite directions in both halves
    spread = profiles.std(axis=0, ddof=1) / np.sqrt(sources)
    found = []
    for _ in range(WITHOUT_HALVES):
        error = generator.standard_normal((heads, columns)) * spread
        found.append(_agreements(cloud + error, cloud - error, numbers, generator))
    return np.mean(found, axis=0)


def _agreements(
    first: np.ndarray, second: np.ndarray, numbers: list[int], generator: np.random.Generator
) -> list[float]:
    """The agreement of two halves' clusters of some of the heads, where both have them: [numbers]."""
    heads = len(first)
    count = max(numbers[-1] + 1, round(TAKEN * heads))
    taken = [np.sort(generator.permutation(heads)[:count]) for _ in range(2)]
    both = np.intersect1d(*taken)
    found = []
    for profile, mine in zip((first, second), taken, strict=True):
        found.append([labels[np.searchsorted(mine, both)] for labels in _clusters(profile[mine], numbers)])
    return [adjusted_rand(one, two) for one, two in zip(*found, strict=True)]


def _clusters(profile: np.ndarray, numbers: list[int]) -> list[np.ndarray]:
    return list(cut_tree(linkage(profile, method="ward"), numbers).T)


def adjusted_rand(first: np.ndarray, second: np.ndarray) -> float:
    """The adjusted Rand index of two clusterings, [heads] each (Hubert and Arabie 1985): 1 the same, 0 chance."""
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)
    pairs = [(counts * (counts - 1) / 2).sum() for counts in (table, table.sum(axis=0), table.sum(axis=1))]
    every = len(first) * (len(first) - 1) / 2
    expected, largest = pairs[1] * pairs[2] / every, (pairs[1] + pairs[2]) / 2
    return 1.0 if largest == expected else float((pairs[0] - expected) / (largest - expected))
