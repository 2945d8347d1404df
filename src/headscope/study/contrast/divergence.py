"""How far apart two groups' entropies are, timestep by timestep, and how far chance alone puts them."""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from scipy.special import xlogy

from headscope.study.contrast.arrays import Sources
from headscope.study.inference import energy_test, holm, settings
from headscope.study.inference.draws import divided, flipped

# at most, of the divergences but the energy distance, which has as many as every test
PERMUTATIONS = 999
BINS = 20
DIVERGENCES = {
    "energy": (
        "Unbiased energy distance of the vectors of all heads' entropies, each in standard deviations between the"
        " sources of both groups. 0 on average where both groups have one distribution, and sometimes below."
    ),
    "wasserstein": (
        "Wasserstein-1 distance between the two groups' distributions of a head's entropy over sources, in nats (the"
        " area between the two cumulative distributions), averaged over heads with equal weight. It can't be below 0,"
        " so it is above 0 by chance alone: read it against its null mean."
    ),
    "jensen_shannon": (
        f"Jensen-Shannon divergence, in nats (at most ln 2 = 0.693), between two histograms of {BINS} bins of equal"
        " width from the smallest to the largest value of both groups, of the normalised entropies of all heads and"
        " sources of a group together. Plug-in: the histograms stand in for the distributions, which makes it too"
        " large by chance."
    ),
    "jensen_shannon_pooled": (
        f"The same divergence between histograms of {BINS} bins of one value a source, its normalised entropy averaged"
        " over heads. With tens of sources nearly all of it is chance: read it against its null mean."
    ),
}
PERMUTED = (
    "The null is that of sources divided at random into groups of the same sizes, or, where the groups share their"
    " sources, swapped within pairs: its mean, its 95 % quantile and the share of it that is at least as large (p). The"
    f" energy distance has as many permutations as every test, the others {PERMUTATIONS}."
)
PAPER_RANGE = (0.015, 0.166)

Statistic = Callable[[np.ndarray], np.ndarray]


def divergences(
    first: Sources, second: Sources, timesteps: Sequence[int], seed: int = 0, *, paired: bool = False
) -> pl.DataFrame:
    """Every divergence at every timestep and over all: see `DIVERGENCES` and `PERMUTED`.

    Returns a table: measure, timestep (null: over all; of energy the distance of the vectors of all heads at all
    timesteps, of the others the mean over timesteps), value, null_mean, null_high (its 95 % quantile), p_value (null
    below `settings.FEWEST_SOURCES` sources in a group), p_holm (over the timesteps of one measure), void (how many of
    the entropies that take part aren't finite; where there is one, there are no other numbers).
    """
    steps = range(len(timesteps))
    nats = np.concatenate([first.nats, second.nats])
    normalised = np.concatenate([first.normalised, second.normalised])
    sizes = len(first.nats), len(second.nats)
    rows = []
    for step in (*steps, None):
        chosen = slice(None) if step is None else slice(step, step + 1)
        rows.append(_energy(nats[:, chosen].reshape(len(nats), -1), sizes, seed, paired))
    members = _members(sizes, seed, paired)
    makers: tuple[tuple[str, np.ndarray, Callable[[np.ndarray], Statistic]], ...] = (
        ("wasserstein", nats, _wasserstein),
        ("jensen_shannon", normalised, _jensen_shannon),
        ("jensen_shannon_pooled", normalised.mean(axis=2, keepdims=True), _jensen_shannon),
    )
    for name, values, statistic in makers:
        voids = [int((~np.isfinite(values[:, step])).sum()) for step in steps]
        found = [np.full(len(members), np.nan) if voids[i] else statistic(values[:, i])(members) for i in steps]
        for part, void in (*zip(found, voids, strict=True), (np.mean(found, axis=0), sum(voids))):
            rows.append(_against_null(name, part, void, min(sizes)))
    table = pl.DataFrame(rows, infer_schema_length=None).with_columns(
        pl.Series("timestep", [*timesteps, None] * len(DIVERGENCES), pl.Int64),
        pl.col("value", "null_mean", "null_high", "p_value").cast(pl.Float64),
    )
    families = table.filter(pl.col("timestep").is_not_null()).partition_by("measure", maintain_order=True)
    corrected = pl.concat(
        part.with_columns(pl.Series("p_holm", holm(part["p_value"].to_list()), pl.Float64)) for part in families
    )
    corrected = corrected.select("measure", "timestep", "p_holm")
    table = table.join(corrected, on=["measure", "timestep"], how="left", maintain_order="left")
    return table.select("measure", "timestep", "value", "null_mean", "null_high", "p_value", "p_holm", "void")


def _energy(values: np.ndarray, sizes: tuple[int, int], seed: int, paired: bool) -> dict:
    found = energy_test(values[: sizes[0]], values[sizes[0] :], seed, paired=paired)
    numbers = found.statistic, found.null_mean, found.null_quantiles[0.95]
    value, mean, high = (None if np.isnan(number) else number for number in numbers)
    return {"measure": "energy", "value": value, "null_mean": mean, "null_high": high} | {
        "p_value": found.p_value,
        "void": found.void,
    }


def _members(sizes: tuple[int, int], seed: int, paired: bool) -> np.ndarray:
    """Which sources are of the first group, as observed and after every permutation: [1 + permutations, sources]."""
    observed = np.repeat([1.0, 0.0], sizes)[None]
    count = min(PERMUTATIONS, settings.RESAMPLES)
    if paired:
        swapped = flipped(seed, sizes[0], count) > 0
        return np.concatenate([observed, np.concatenate([swapped, ~swapped], axis=1) * 1.0])
    return np.concatenate([observed, divided(seed, *sizes, count)])


def _against_null(measure: str, found: np.ndarray, void: int, fewest: int) -> dict:
    """A row of the table; found: the observed value, then the permuted ones."""
    if void:
        empty = dict.fromkeys(("value", "null_mean", "null_high", "p_value"))
        return {"measure": measure, **empty, "void": void}
    value, null = found[0], found[1:]
    # equal but for rounding
    reached = null >= value - 1e-10 * max(1.0, abs(value))
    p_value = (1 + int(reached.sum())) / (1 + len(null))
    return {
        "measure": measure,
        "value": float(value),
        "null_mean": float(null.mean()),
        "null_high": float(np.quantile(null, 0.95)),
        "p_value": p_value if fewest >= settings.FEWEST_SOURCES else None,
        "void": 0,
    }


def _wasserstein(values: np.ndarray) -> Statistic:
    """Mean over heads of the Wasserstein-1 distance; values [sources, heads]."""
    count = len(values)
    order = np.argsort(values, axis=0)
    gaps = np.diff(np.take_along_axis(values, order, axis=0), axis=0)
    rank = np.argsort(order, axis=0)
    # whether a source is at or below a place in the order of a head: [sources, places, heads]
    below = (rank[:, None] <= np.arange(count - 1)[None, :, None]).reshape(count, -1) * 1.0
    widths = gaps.ravel() / values.shape[1]

    def statistic(members: np.ndarray) -> np.ndarray:
        weights = _shares(members) - _shares(1 - members)
        # [permutations, places * heads] in pieces of about 30 MB
        pieces = np.array_split(weights, 1 + len(weights) * below.shape[1] // 4_000_000)
        return np.concatenate([np.abs(piece @ below) @ widths for piece in pieces])

    return statistic


def _jensen_shannon(values: np.ndarray) -> Statistic:
    """Plug-in Jensen-Shannon divergence of histograms of all of a group's values, in nats; values [sources, heads]."""
    edges = np.linspace(values.min(), values.max(), BINS + 1)
    # the last edge belongs to the last bin; where all values are one, they share a bin
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, BINS - 1)
    counts = np.stack([(bins == number).sum(axis=1) for number in range(BINS)], axis=1) / values.shape[1]

    def statistic(members: np.ndarray) -> np.ndarray:
        one, two = _shares(members) @ counts, _shares(1 - members) @ counts
        middle = (one + two) / 2
        entropy = [-xlogy(part, part).sum(axis=1) for part in (one, two, middle)]
        # rounding shall not put equal histograms below 0
        return np.maximum(entropy[2] - (entropy[0] + entropy[1]) / 2, 0.0)

    return statistic


def _shares(members: np.ndarray) -> np.ndarray:
    return members / members.sum(axis=1, keepdims=True)
