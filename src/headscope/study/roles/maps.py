"""Feature maps made comparable: what of a feature is neither position nor another feature."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from headscope.study.inference import settings
from headscope.study.roles.rows import Sources, places

RESIDUAL = (
    "A feature's map of an item on the tokens of a site, minus its mean over tokens, minus the mean over sources of the"
    " same at that position, minus what the other features' maps explain of it (ordinary least squares, pooled over"
    " tokens and items, every source with equal weight), in standard deviations over tokens and sources. An item that"
    " has none of a feature (its map is constant) has a map of zeros and no part in these means and fits; all others of"
    " that feature are multiplied by sources / sources that have it (a source that has it in a part of its items"
    " counts as that part), so that an excess is one per source that has it, however many haven't; no t or p changes."
)
# a grid below it shows only what it resolves, and of that as much
RESOLVING, RESOLVED = 16, 0.25
# what the other features have to leave of a feature's variance
SEPARABLE = 0.05
# what every image shows
IMAGE_FEATURES = (
    "luminance",
    "edge",
    "edge orientation",
    "texture",
    "red against green",
    "yellow against blue",
    "saturation",
)
# of features that say the same the first stands: what images show before what masks say
PREFERENCE = (*IMAGE_FEATURES, "object", "boundary")
_CONSTANT = 1e-10


@dataclass(frozen=True)
class Maps:
    """The residual maps (see `RESIDUAL`) of one group, split and grid.

    Attributes:
        names: of the features.
        arrays: [items, features, tokens].
        dropped: names of the features that others say as well.
        own: the maps of the features and of the dropped ones before other features are taken off, in their own
            standard deviations, multiplied as those are: [items, features and dropped, tokens].
        table: what became of every feature: feature, resolved, items (that have it), with_sources, residual (share of
            its variance that other features leave), kept, reason, void (maps that are missing or not finite).
    """

    names: list[str]
    arrays: np.ndarray
    dropped: list[str]
    own: np.ndarray
    table: pl.DataFrame

    @property
    def having(self) -> dict[str, int]:
        """How many sources have each of the features, in the order of `names`."""
        counts = dict(self.table.select("feature", "with_sources").iter_rows())
        return {name: counts[name] for name in self.names}


def residual_maps(rows: pl.DataFrame, sources: Sources) -> Maps:
    """The residual maps of the rows of one group, split and grid in the table "features"."""
    names = sorted(
        rows["feature"].unique().to_list(),
        key=lambda name: (PREFERENCE.index(name) if name in PREFERENCE else len(PREFERENCE), name),
    )
    raw = _tabulated(rows, names, sources)
    small = len(rows) > 0 and min(rows["grid_height"][0], rows["grid_width"][0]) < RESOLVING
    resolved = dict(rows.group_by("feature").agg(pl.col("resolved").mean()).iter_rows())
    # [features]
    missing = (~np.isfinite(raw)).any(axis=2).sum(axis=0)
    raw = np.where(missing[:, None] > 0, 0.0, raw)
    centred = raw - raw.mean(axis=2, keepdims=True)
    # [items, features]
    present = (centred**2).mean(axis=2) > _CONSTANT * np.maximum((raw**2).mean(axis=2), _CONSTANT)
    weights = sources.weight[:, None] * present
    shifted = _without_position(centred, weights, present)
    reasons = {}
    for number, name in enumerate(names):
        having = len(np.unique(sources.source[present[:, number]]))
        spread = [(weights[:, number, None] * (part[:, number] ** 2)).sum() for part in (centred, shifted)]
        share = resolved[name]
        if missing[number]:
            reasons[name] = f"void: {missing[number]} maps are missing or hold numbers that aren't finite"
        elif having < min(settings.FEWEST_SOURCES, len(sources.names)) or having < 2:
            reasons[name] = f"{having} sources have it"
        elif small and (share is None or not share >= RESOLVED):
            reasons[name] = f"the grid resolves {100 * (share or 0):.0f} % of its variance"
        elif spread[1] <= _CONSTANT * spread[0]:
            reasons[name] = "it is the same in every item"
    kept = [number for number, name in enumerate(names) if name not in reasons]
    shares = _separable(shifted, weights, kept)
    dropped = [number for number in kept if number not in shares]
    for number in dropped:
        reasons[names[number]] = "other features say the same"
    kept = list(shares)
    table = pl.DataFrame(
        {
            "feature": names,
            "resolved": [resolved[name] for name in names],
            "items": present.sum(axis=0),
            "with_sources": [len(np.unique(sources.source[column])) for column in present.T],
            "residual": [shares.get(number) for number in range(len(names))],
            "kept": [name not in reasons for name in names],
            "reason": [reasons.get(name, "") for name in names],
            "void": missing,
        },
        schema_overrides={"feature": pl.String, "resolved": pl.Float64, "residual": pl.Float64, "reason": pl.String},
    )
    diluted = len(sources.names) / np.maximum(weights.sum(axis=0), 1e-300)
    both = [*kept, *dropped]
    power = (weights[:, both, None] * shifted[:, both] ** 2).sum(axis=(0, 2)) / (
        weights[:, both].sum(axis=0) * raw.shape[2]
    )
    return Maps(
        [names[number] for number in kept],
        _residuals(shifted, weights, present, kept) * diluted[kept, None],
        [names[number] for number in dropped],
        shifted[:, both] * (diluted[both] / np.sqrt(power))[:, None],
        table,
    )


def _tabulated(rows: pl.DataFrame, names: list[str], sources: Sources) -> np.ndarray:
    """The maps as they are, [items, features, tokens]; NaN where one is missing."""
    rows = rows.unique(["item", "feature"], maintain_order=True)
    if not len(rows):
        return np.zeros((len(sources.items), 0, 1))
    tokens = int(rows["grid_height"][0]) * int(rows["grid_width"][0])
    found = np.full((len(sources.items), len(names), tokens), np.nan)
    item, feature = places(rows, "item", sources.items), places(rows, "feature", names)
    known = item >= 0
    flat = rows["map"].explode(empty_as_null=False).cast(pl.Float64).fill_null(float("nan"))
    found[item[known], feature[known]] = flat.to_numpy().reshape(-1, tokens)[known]
    return found


def _without_position(arrays: np.ndarray, weights: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Without the mean over sources at every position; zeros where an item has none of the feature."""
    total = weights.sum(axis=0)
    mean = np.einsum("if,ift->ft", weights, arrays) / np.where(total > 0, total, 1.0)[:, None]
    return np.where(present[:, :, None], arrays - mean, 0.0)


def _separable(arrays: np.ndarray, weights: np.ndarray, kept: list[int]) -> dict[int, float]:
    """The features of which the others leave enough, and how much: the last of those that don't is dropped in turn."""
    kept = list(kept)
    # [items, features, features]
    products = np.einsum("ift,igt->ifg", arrays, arrays)
    while kept:
        shares = {number: _fit(products, weights, number, kept)[1] for number in kept}
        lost = [number for number in kept if shares[number] < SEPARABLE]
        if not lost:
            return shares
        kept.remove(lost[-1])
    return {}


def _fit(products: np.ndarray, weights: np.ndarray, number: int, kept: list[int]) -> tuple[np.ndarray, float]:
    """Coefficients of the other features for a feature, over the items that have it, and the share that they leave."""
    others = [other for other in kept if other != number]
    gram = np.einsum("i,ifg->fg", weights[:, number], products)
    slope = gram[others, number]
    coefficients = np.linalg.pinv(gram[np.ix_(others, others)], rcond=1e-10, hermitian=True) @ slope
    return coefficients, float(1 - coefficients @ slope / gram[number, number])


def _residuals(arrays: np.ndarray, weights: np.ndarray, present: np.ndarray, kept: list[int]) -> np.ndarray:
    products = np.einsum("ift,igt->ifg", arrays, arrays)
    found = np.zeros((len(arrays), len(kept), arrays.shape[2]))
    for place, number in enumerate(kept):
        others = [other for other in kept if other != number]
        coefficients, _ = _fit(products, weights, number, kept)
        rest = arrays[:, number] - np.einsum("f,ift->it", coefficients, arrays[:, others])
        mine, has = weights[:, number : number + 1], present[:, number : number + 1]
        rest = _without_position(rest[:, None], mine, has)[:, 0]
        scale = np.sqrt((mine * rest**2).sum() / (mine.sum() * rest.shape[1]))
        found[:, place] = rest / scale
    return found
