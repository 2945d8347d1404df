"""Experiment one: how spread out is the attention of every head? (Whether groups of images differ in it: `contrast`.)

Entropy of a query's attention: H = -sum_j p_j ln p_j over the K keys it may attend to, in nats; 0 where it attends to a
single key, ln K where it attends to all alike. An item's number for a head is the mean over its queries, calls,
guidance branches and draws of noise; a source's is the mean over its items.

Heads of sites with different K are never pooled in nats, where K alone would decide. Three measures stand side by side:
normalised H / ln K (0 to 1), H in nats, and ln K - H in nats, the distance from uniform attention. Means over heads are
taken of the normalised entropy only, each head with equal weight, within one query group.
"""

import polars as pl

from headscope.study.inference import COMPONENTS, MEAN, components, means

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
    "Of a head's entropy (nats), averaged over timesteps, mean over heads. " + COMPONENTS + " As negative ones are set"
    " to 0 head by head, a small component is somewhat too large in the mean over heads."
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
    `MEASURES`), value, low, high, sources, exploratory, void.
    """
    frames = []
    columns = ["group", *HEAD, "timestep", "measure", "value", "low", "high", "sources", "exploratory", "void"]
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

    Sites with a single key have no normalised entropy and no part in it. NaN where an item lacks a head.
    """
    rows = items.filter(pl.col("query_group") == query_groups(items)[0], pl.col("keys") > 1)
    item = [*_ITEM, "timestep"]
    heads = rows.group_by(*item, "site", "head", maintain_order=True).agg(pl.col("normalised").mean())
    count = heads.select("site", "head").n_unique()
    pooled = heads.group_by(item, maintain_order=True).agg(
        normalised=pl.when(pl.len() == count).then(pl.col("normalised").mean()).otherwise(float("nan"))
    )
    return pooled.sort(item)


def entropy_by_group(items: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Normalised entropy pooled over heads, over all sources of a table of `item_means`: see `POOLED`.

    Returns a table: group, timestep (null: mean over timesteps), value, low, high, sources, exploratory, void.
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

    Returns a table: group, heads, sources, items, draws (of noise, of all items together), between_sources,
    between_items, between_draws (mean over heads, nats^2; null where the design can't tell), with_unlimited_draws (what
    unlimited draws would leave of the standard error of the mean over sources, as a fraction; mean over heads), void
    (how many heads have a number that isn't finite or is absent, and are in none of the means).
    """
    by = ["group", *HEAD]
    rows = observations.with_columns(_void("entropy_mean"))
    found = components(rows, "entropy_mean", by, bands="timestep")
    whole = rows.group_by(by).agg(whole=pl.col("entropy_mean").is_finite().all())
    found = found.join(whole, on=by, maintain_order="left")
    parts = ("between_sources", "between_items", "between_draws", "with_unlimited_draws")
    return found.group_by("group", maintain_order=True).agg(
        pl.len().alias("heads"),
        pl.col("sources", "items", "draws").max(),
        *(pl.col(name).filter(pl.col("whole")).mean() for name in parts),
        (~pl.col("whole")).sum().alias("void"),
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
