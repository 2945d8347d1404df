"""Experiment one: how spread out is the attention of every head, and does it differ between groups of images?

Entropy of a query's attention: H = -sum_j p_j ln p_j over the K keys it may attend to, in nats; 0 where it attends to a
single key, ln K where it attends to all alike. An item's number for a head is the mean over its queries (and over noise
replicates, calls and guidance branches).

Heads of sites with different K are never pooled in nats, where K alone would decide. Three measures stand side by side:
normalised H / ln K (0 to 1), H in nats, and ln K - H in nats, the distance from uniform attention. Means over heads are
taken of the normalised entropy only, each head with equal weight, within one query group.
"""

from dataclasses import dataclass

import polars as pl

from headscope.study.inference import DIFFERENCE, MEAN, RATIO, Estimate, differences, means, ratios, with_holm

MEASURES = {
    "normalised": "Normalised entropy H / ln K of a head's attention: 0 is one key, 1 is all keys alike. No unit.",
    "nats": "Entropy H of a head's attention, in nats; at most ln K, which differs between sites.",
    "deficit": "ln K − H, in nats: how far a head's attention is from uniform, 0 or more.",
}
POOLED = (
    "Normalised entropy H / ln K, averaged over queries (those of the image, where there are others), then over all"
    " heads with equal weight. " + MEAN + " Overall = mean over the timesteps, each with equal weight."
)
SELECTION = (
    "Heads are chosen on the discover split by |difference| / standard error (the square root of s₁²/n₁ + s₂²/n₂, s"
    " the standard deviation between sources) and tested on the confirm split, whose sources had no part in the choice."
)
_HEAD = ["site", "head", "query_group", "keys"]


@dataclass(frozen=True)
class Contrast:
    """Two groups' normalised entropies compared on the confirm split.

    Attributes:
        natural, synthetic: names of the groups; differences are natural minus synthetic, ratios natural / synthetic.
        natural_mean, synthetic_mean, difference, ratio: pooled over heads, averaged over timesteps.
        timesteps: the same at every timestep: timestep, natural, synthetic, value (the difference), low, high, p_value,
            p_holm (over timesteps), ratio, ratio_low, ratio_high, sources, exploratory.
        heads: per head, averaged over timesteps: site, head, query_group, keys, discover (the difference there),
            discover_score (|difference| / standard error), selected, value (the difference on confirm), low, high,
            p_value and p_holm (of selected heads, one family), sources, exploratory (all but the selected).
    """

    natural: str
    synthetic: str
    natural_mean: Estimate
    synthetic_mean: Estimate
    difference: Estimate
    ratio: Estimate
    timesteps: pl.DataFrame
    heads: pl.DataFrame

    def overall(self) -> pl.DataFrame:
        """The four estimates that are averaged over timesteps: quantity, value, low, high, p_value, sources,
        exploratory, unit."""
        columns = ("value", "low", "high", "p_value", "exploratory", "unit")
        found = [
            {"quantity": name, **{column: getattr(estimate, column) for column in columns}}
            | {"sources": list(estimate.sources)}
            for name, estimate in (
                (self.natural, self.natural_mean),
                (self.synthetic, self.synthetic_mean),
                ("difference", self.difference),
                ("ratio", self.ratio),
            )
        ]
        order = ["quantity", "value", "low", "high", "p_value", "sources", "exploratory", "unit"]
        return pl.DataFrame(found, schema_overrides={"p_value": pl.Float64}).select(order)


def query_groups(table: pl.DataFrame) -> list[str]:
    """The query groups of a table. The first is the one that pooled numbers are taken over: image where there is one,
    else the first by name."""
    return sorted(table["query_group"].unique().to_list(), key=lambda name: (name != "image", name))


def entropy_by_head(observations: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Every head's entropy in every group, over the sources of all splits.

    Returns a table: group, site, head, query_group, keys, timestep (null: mean over timesteps), measure (see
    `MEASURES`), value, low, high, sources, exploratory.
    """
    rows = observations.with_columns(
        pl.col("entropy_normalised_mean").alias("normalised"),
        pl.col("entropy_mean").alias("nats"),
        (pl.col("keys").cast(pl.Float64).log() - pl.col("entropy_mean")).alias("deficit"),
    )
    frames = []
    for (group,), members in rows.group_by("group", maintain_order=True):
        for measure in MEASURES:
            labels = (pl.lit(group).alias("group"), pl.lit(measure).alias("measure"))
            at_timesteps = means(members, measure, [*_HEAD, "timestep"], seed=seed)
            overall = means(members, measure, _HEAD, bands="timestep", seed=seed)
            overall = overall.with_columns(pl.lit(None, at_timesteps["timestep"].dtype).alias("timestep"))
            frames += [frame.with_columns(labels) for frame in (at_timesteps, overall.select(at_timesteps.columns))]
    columns = ["group", *_HEAD, "timestep", "measure", "value", "low", "high", "sources", "exploratory"]
    return pl.concat(frames).select(columns)


def pooled_items(observations: pl.DataFrame) -> pl.DataFrame:
    """One row per item and timestep: its normalised entropy averaged over heads, column normalised."""
    rows = observations.filter(pl.col("query_group") == query_groups(observations)[0])
    item = ["group", "split", "source_id", "item", "timestep"]
    head = rows.group_by(*item, "site", "head", maintain_order=True).agg(
        pl.col("entropy_normalised_mean").cast(pl.Float64).mean()
    )
    return (
        head.group_by(item, maintain_order=True)
        .agg(pl.col("entropy_normalised_mean").mean().alias("normalised"))
        .sort(item)
    )


def entropy_by_group(observations: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Normalised entropy pooled over heads, over the sources of all splits: see `POOLED`.

    Returns a table: group, timestep (null: mean over timesteps), value, low, high, sources, exploratory.
    """
    frames = []
    items = pooled_items(observations)
    for group in observations["group"].unique(maintain_order=True):
        members = items.filter(pl.col("group") == group)
        at_timesteps = means(members, "normalised", ["timestep"], seed=seed).sort("timestep")
        overall = means(members, "normalised", bands="timestep", seed=seed)
        overall = overall.select(pl.lit(None, at_timesteps["timestep"].dtype).alias("timestep"), *overall.columns)
        frames += [frame.select(pl.lit(group).alias("group"), pl.all()) for frame in (at_timesteps, overall)]
    return pl.concat(frames)


def contrast_groups(
    observations: pl.DataFrame, natural: str, synthetic: str, selected_heads: int = 10, seed: int = 0
) -> Contrast | str:
    """Compare two groups on the confirm split; where that is impossible, the reason in words."""
    present = set(observations["group"].unique())
    absent = [name for name in (natural, synthetic) if name not in present]
    if absent:
        return f"The group {' and the group '.join(absent)} was not observed, so there is nothing to compare."
    items = pooled_items(observations).filter(pl.col("split") == "confirm")
    one, two = (items.filter(pl.col("group") == name) for name in (natural, synthetic))
    if not (len(one) and len(two)):
        return f"The confirm split was not observed in both {natural} and {synthetic}."
    shared = set(one["timestep"]) & set(two["timestep"])
    if not shared:
        return f"{natural} and {synthetic} were observed at different timesteps."
    one, two = (rows.filter(pl.col("timestep").is_in(shared)) for rows in (one, two))
    timesteps = differences(one, two, "normalised", ["timestep"], seed=seed)
    timesteps = with_holm(timesteps)
    for name, rows in (("natural", one), ("synthetic", two)):
        mean = means(rows, "normalised", ["timestep"], seed=seed).select("timestep", pl.col("value").alias(name))
        timesteps = timesteps.join(mean, on="timestep", maintain_order="left")
    ratio = ratios(one, two, "normalised", ["timestep"], seed=seed)
    ratio = ratio.select("timestep", ratio="value", ratio_low="low", ratio_high="high")
    timesteps = timesteps.join(ratio, on="timestep", maintain_order="left").sort("timestep")
    unit = "normalised entropy"
    return Contrast(
        natural,
        synthetic,
        *(
            Estimate.from_row(means(rows, "normalised", bands="timestep", seed=seed), unit, POOLED)
            for rows in (one, two)
        ),
        Estimate.from_row(
            differences(one, two, "normalised", bands="timestep", seed=seed), unit, f"{POOLED} {DIFFERENCE}"
        ),
        Estimate.from_row(
            ratios(one, two, "normalised", bands="timestep", seed=seed), "ratio, no unit", f"{POOLED} {RATIO}"
        ),
        timesteps,
        _contrast_heads(observations, natural, synthetic, selected_heads, seed),
    )


def _contrast_heads(
    observations: pl.DataFrame, natural: str, synthetic: str, selected_heads: int, seed: int
) -> pl.DataFrame:
    value = "entropy_normalised_mean"

    def compare(split: str, cells: pl.DataFrame | None, test: bool) -> pl.DataFrame:
        rows = observations.filter(pl.col("split") == split)
        if cells is not None:
            rows = rows.join(cells.select(_HEAD), on=_HEAD, how="semi", maintain_order="left")
        one, two = (rows.filter(pl.col("group") == name) for name in (natural, synthetic))
        return differences(one, two, value, _HEAD, "timestep", seed, test)

    everything = compare("confirm", None, test=False)
    before = observations.filter((pl.col("split") == "discover") & pl.col("group").is_in([natural, synthetic]))
    # without both groups on discover nothing can be selected
    discover = compare("discover", None, test=False) if before["group"].n_unique() == 2 else everything.clear()
    score = (pl.col("value").abs() / pl.col("standard_error")).fill_nan(0.0).fill_null(0.0)
    discover = discover.select(*_HEAD, pl.col("value").alias("discover"), score.alias("discover_score"))
    # with ties, the name decides, so that a repetition selects the same heads
    ranked = discover.sort(["discover_score", *_HEAD], descending=[True, *[False] * len(_HEAD)])
    chosen = ranked.head(selected_heads)
    if len(chosen):
        tested = with_holm(compare("confirm", chosen, test=True))
        tested = tested.select(*_HEAD, "p_value", "p_holm", pl.lit(True).alias("selected"))
    else:
        tested = everything.select(
            *_HEAD, pl.lit(None, pl.Float64).alias("p_value"), pl.lit(None, pl.Float64).alias("p_holm"), selected=False
        ).clear()
    heads = everything.select(*_HEAD, "value", "low", "high", "sources", "exploratory")
    heads = heads.join(discover, on=_HEAD, how="left", maintain_order="left")
    heads = heads.join(tested, on=_HEAD, how="left", maintain_order="left")
    selected = pl.col("selected").fill_null(False)
    return heads.with_columns(selected, (pl.col("exploratory") | ~selected).alias("exploratory"))
