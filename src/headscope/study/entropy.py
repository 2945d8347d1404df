"""Experiment one: how spread out is the attention of every head? (Whether groups of images differ in it: `contrast`.)

Entropy of a query's attention: H = -sum_j p_j ln p_j over the K keys it may attend to, in nats; 0 where it attends to a
single key, ln K where it attends to all alike. An item's number for a head is the mean over its queries, calls,
guidance branches and draws of noise; a source's is the mean over its items.

Heads of sites with different K are never pooled in nats, where K alone would decide. Three measures stand side by side:
normalised H / ln K (0 to 1), H in nats, and ln K - H in nats, the distance from uniform attention. Means over heads are
taken of the normalised entropy only, each head with equal weight, within one query group.
"""

import polars as pl

from headscope.study.inference import MEAN, means

MEASURES = {
    "normalised": "Normalised entropy H / ln K of a head's attention: 0 is one key, 1 is all keys alike. No unit.",
    "nats": "Entropy H of a head's attention, in nats; at most ln K, which differs between sites.",
    "deficit": "ln K − H, in nats: how far a head's attention is from uniform, 0 or more.",
}
POOLED = (
    "Normalised entropy H / ln K, averaged over queries (those of the image, where there are others) and draws of"
    " noise, then over all heads with equal weight. "
    + MEAN
    + " Overall = mean over the timesteps, each with equal weight."
)
VARIANCE = (
    "Variance of a head's entropy (nats²) between sources, between the items of a source and between the noise draws"
    " of an item, estimated by moments so that each is unbiased: the variance between the draws of an item; the"
    " variance between the items' means less what draws add to it; the variance between the sources' means less what"
    " items and draws add. Averaged over heads and timesteps with equal weight. What the data can't tell apart is in"
    " the part above it: items in sources where every source has one, draws in items or sources where every item has"
    " one. An estimate below 0, which chance can give, is shown as it is."
)
HEAD = ["site", "head", "query_group", "keys"]
ENTROPIES = ("entropy_mean", "entropy_normalised_mean")
_ITEM = ["group", "split", "source_id", "item"]


def query_groups(table: pl.DataFrame) -> list[str]:
    """The query groups of a table. The first is the one that pooled numbers are taken over: image where there is one,
    else the first by name."""
    return sorted(table["query_group"].unique().to_list(), key=lambda name: (name != "image", name))


def item_means(observations: pl.DataFrame) -> pl.DataFrame:
    """One row per item, timestep, head and query group: its mean over noise draws, calls and guidance branches.

    Returns a table: group, split, source_id, item, timestep, site, head, query_group, keys, nats, normalised. Both are
    NaN where a number isn't finite or an item has fewer draws than others of its group and split; normalised also where
    there is a single key.
    """
    measures = ("nats", "normalised")
    found = observations.group_by([*_ITEM, "timestep", *HEAD], maintain_order=True).agg(
        *(_void(name).mean().alias(short) for name, short in zip(ENTROPIES, measures, strict=True)), rows=pl.len()
    )
    whole = pl.col("rows") == pl.col("rows").max().over("group", "split", *HEAD)
    found = found.with_columns(pl.when(whole).then(name).otherwise(float("nan")).alias(name) for name in measures)
    several = pl.when(pl.col("keys") > 1)
    return found.with_columns(normalised=several.then("normalised").otherwise(float("nan"))).drop("rows")


def entropy_by_head(items: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Every head's entropy in every group, over all sources of a table of `item_means`.

    Returns a table: group, site, head, query_group, keys, timestep (null: mean over timesteps), measure (see
    `MEASURES`), value, low, high, sources, exploratory.
    """
    frames = []
    columns = ["group", *HEAD, "timestep", "measure", "value", "low", "high", "sources", "exploratory"]
    for (group,), members in items.group_by("group", maintain_order=True):
        for measure in ("normalised", "nats"):
            at_timesteps = means(members, measure, [*HEAD, "timestep"], seed=seed)
            overall = means(members, measure, HEAD, bands="timestep", seed=seed)
            overall = overall.with_columns(timestep=pl.lit(None, at_timesteps["timestep"].dtype))
            for table in (at_timesteps, overall):
                frames.append(table.with_columns(group=pl.lit(group), measure=pl.lit(measure)).select(columns))
                if measure == "nats":
                    frames.append(_deficit(frames[-1]))
    return pl.concat(frames)


def pooled_items(items: pl.DataFrame) -> pl.DataFrame:
    """One row per item and timestep: its normalised entropy averaged over heads, column normalised.

    Sites with a single key have no normalised entropy and no part in it.
    """
    rows = items.filter(pl.col("query_group") == query_groups(items)[0], pl.col("keys") > 1)
    item = [*_ITEM, "timestep"]
    return rows.group_by(item, maintain_order=True).agg(pl.col("normalised").mean()).sort(item)


def entropy_by_group(items: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Normalised entropy pooled over heads, over all sources of a table of `item_means`: see `POOLED`.

    Returns a table: group, timestep (null: mean over timesteps), value, low, high, sources, exploratory.
    """
    frames = []
    pooled = pooled_items(items)
    for group in items["group"].unique(maintain_order=True):
        members = pooled.filter(pl.col("group") == group)
        at_timesteps = means(members, "normalised", ["timestep"], seed=seed).sort("timestep")
        overall = means(members, "normalised", bands="timestep", seed=seed)
        overall = overall.select(pl.lit(None, at_timesteps["timestep"].dtype).alias("timestep"), *overall.columns)
        frames += [frame.select(pl.lit(group).alias("group"), pl.all()) for frame in (at_timesteps, overall)]
    return pl.concat(frames)


def variance_components(observations: pl.DataFrame) -> pl.DataFrame:
    """What the entropies of a group's heads vary with: see `VARIANCE`.

    Returns a table: group, heads, sources, items, draws (the most of an item), between_sources, between_items (null
    where every source has one item), between_draws (null where every item has one draw), all in nats^2, void (how many
    heads at a timestep have a number that isn't finite, and are in none of the means).
    """
    quantity = ["group", "timestep", *HEAD]
    draws = observations.group_by([*quantity, "source_id", "item", "replicate"], maintain_order=True).agg(
        nats=_void("entropy_mean").mean()
    )
    items = draws.group_by([*quantity, "source_id", "item"], maintain_order=True).agg(
        mean=pl.col("nats").mean(),
        squares=((pl.col("nats") - pl.col("nats").mean()) ** 2).sum(),
        draws=pl.len().cast(pl.Float64),
    )
    # variance of the mean of an item from one draw's variance, and so on upwards
    sources = items.group_by([*quantity, "source_id"], maintain_order=True).agg(
        mean=pl.col("mean").mean(),
        squares=((pl.col("mean") - pl.col("mean").mean()) ** 2).sum(),
        items=pl.len().cast(pl.Float64),
        spare_draws=(pl.col("draws") - 1).sum(),
        draw_squares=pl.col("squares").sum(),
        # sum over items of 1 / draws
        shares=(1 / pl.col("draws")).sum(),
        most_draws=pl.col("draws").max(),
    )
    of_draws = pl.when(pl.col("spare_draws").sum() > 0).then(pl.col("draw_squares").sum() / pl.col("spare_draws").sum())
    spare = (pl.col("items") - 1).sum()
    # E of the squares within a source is (k - 1) of_items + (1 - 1/k) shares of_draws
    added = ((1 - 1 / pl.col("items")) * pl.col("shares")).sum()
    within = pl.col("squares").sum()
    cells = sources.group_by(quantity, maintain_order=True).agg(
        draws=pl.col("most_draws").max(),
        sources=pl.len(),
        items=pl.col("items").sum(),
        between_draws=of_draws,
        within=within,
        spare=spare,
        added=added,
        of_means=pl.col("mean").var(),
        per_item=(1 / pl.col("items")).mean(),
        per_draw=(pl.col("shares") / pl.col("items") ** 2).mean(),
        whole=pl.col("mean").is_finite().all(),
    )
    from_draws = pl.col("between_draws").fill_null(0.0)
    cells = cells.with_columns(
        between_items=pl.when(pl.col("spare") > 0).then(
            (pl.col("within") - pl.col("added") * from_draws) / pl.col("spare")
        )
    )
    from_items = pl.col("between_items").fill_null(0.0)
    # with one item a source the draws' part is taken off all the same
    cells = cells.with_columns(
        between_sources=pl.col("of_means") - pl.col("per_item") * from_items - pl.col("per_draw") * from_draws
    )
    parts = ("between_sources", "between_items", "between_draws")
    return (
        cells.group_by("group", maintain_order=True)
        .agg(
            pl.struct(*HEAD).n_unique().alias("heads"),
            pl.col("sources").max(),
            pl.col("items").max().cast(pl.Int64),
            pl.col("draws").max().cast(pl.Int64),
            *(pl.col(name).filter(pl.col("whole")).mean() for name in parts),
            (~pl.col("whole")).sum().alias("void"),
        )
        .sort("group")
    )


def _void(name: str) -> pl.Expr:
    """A column with NaN for every number that isn't finite or is absent, so that no mean passes over one."""
    value = pl.col(name).cast(pl.Float64)
    return pl.when(value.is_finite()).then(value).otherwise(float("nan"))


def _deficit(nats: pl.DataFrame) -> pl.DataFrame:
    """ln K - H with its interval, from that of H."""
    most = pl.col("keys").cast(pl.Float64).log()
    return nats.with_columns(
        measure=pl.lit("deficit"),
        value=most - pl.col("value"),
        low=most - pl.col("high"),
        high=most - pl.col("low"),
    )
