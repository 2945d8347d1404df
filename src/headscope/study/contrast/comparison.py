"""Every question about one pair of groups, the one that can't cancel first and the pooled ratio last."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from headscope.study.contrast.arrays import arrays_of
from headscope.study.contrast.divergence import divergences
from headscope.study.entropy import HEAD, pooled_items
from headscope.study.inference import SIGNIFICANT, differences, means, ratios

OMNIBUS = (
    "One test of all heads at all timesteps together: do the two groups differ in anything? Each source is the vector"
    " of its heads' entropies, each in standard deviations between the sources of both groups; the statistic is the"
    " unbiased energy distance, its null that of permuted sources. Nothing cancels in it, and it says neither which"
    " head differs nor whether in mean or in spread."
)
HEADS = (
    "Mean over the sources of the first group minus mean over the sources of the second, of a head's entropy in nats"
    " averaged over timesteps. All heads are one family: corrected p-values are those of the largest |t| over all of"
    " them under the same permutations of sources (max-t), so that no head has to be selected first."
)
SITES = (
    "exp(mean H of the first group − mean H of the second), H in nats averaged over the heads of a site: the ratio of"
    " the effective numbers of keys exp(H), each a geometric mean over queries, heads and sources. 1: no difference."
    " The interval is that of the difference, exponentiated. Corrected p-values are of the largest |t| over all sites,"
    " at the mean over timesteps."
)
POOLED_RATIO = (
    "Mean normalised entropy of the first group divided by that of the second, pooled over all heads: the abstract's"
    " complexity ratio."
)
CANCELS = (
    "Heads that differ in opposite directions cancel in the pooled ratio: it can be 1 where most heads differ. It"
    " comes last for that reason."
)
PAPER_RATIO = "1.084 ± 0.008"
_SITE = ["site", "query_group", "keys"]


@dataclass(frozen=True)
class Comparison:
    """Two groups' entropies compared; differences are first minus second, ratios first / second.

    Attributes:
        first, second: what was compared.
        splits: whose items took part.
        sources: how many, of the first and of the second.
        paired: whether both are versions of the same sources, which are then compared pair by pair.
        timesteps: at which entropies were observed.
        divergences: see `divergence.divergences`; the row of energy without a timestep is the omnibus test.
        heads: site, head, query_group, keys, value (the difference in nats, mean over timesteps), low, high,
            standard_error, p_value (of the head alone), p_maxt (max-t over all heads), sources, exploratory, void.
        sites: site, query_group, keys, timestep (null: the mean over timesteps), value (the ratio, see `SITES`), low,
            high, p_value and p_maxt (of the mean over timesteps; null elsewhere), sources, exploratory, void.
        pooled: timestep (null: the mean over timesteps), first and second (mean normalised entropy), value (the ratio,
            see `POOLED_RATIO`), low, high, p_value (of the difference), sources, exploratory, void.
    """

    first: str
    second: str
    splits: tuple[str, ...]
    sources: tuple[int, int]
    paired: bool
    timesteps: list[int]
    divergences: pl.DataFrame
    heads: pl.DataFrame
    sites: pl.DataFrame
    pooled: pl.DataFrame

    @property
    def omnibus(self) -> dict:
        """The energy distance over all heads and timesteps: a row of `divergences`."""
        return self.divergences.row(
            by_predicate=(pl.col("measure") == "energy") & pl.col("timestep").is_null(), named=True
        )

    @property
    def ratio(self) -> dict:
        """The pooled ratio over all timesteps: a row of `pooled`."""
        return self.pooled.row(by_predicate=pl.col("timestep").is_null(), named=True)

    @property
    def different(self) -> pl.DataFrame:
        """The heads whose corrected p-value is below 0.05."""
        return self.heads.filter(pl.col("p_maxt") < SIGNIFICANT)


def compare_groups(
    items: pl.DataFrame, first: str, second: str, *, splits: Sequence[str] = ("confirm",), seed: int = 0
) -> Comparison | str:
    """Compare two groups, of the sources of some splits; where that is impossible, the reason in words.

    items: see `entropy.item_means`. Groups with the same sources, two versions of the same pictures, are compared in
    pairs.
    """
    present = set(items["group"].unique())
    absent = [name for name in (first, second) if name not in present]
    if absent:
        return f"The group {' and the group '.join(absent)} was not observed, so there is nothing to compare."
    of_splits = items.filter(pl.col("split").is_in(splits))
    one, two = (of_splits.filter(pl.col("group") == name) for name in (first, second))
    if not (len(one) and len(two)):
        plural = "splits were" if len(splits) > 1 else "split was"
        return f"The {' and '.join(splits)} {plural} not observed in both {first} and {second}."
    return compare(one, two, first, second, splits=splits, seed=seed)


def compare(
    one: pl.DataFrame, two: pl.DataFrame, first: str, second: str, *, splits: Sequence[str] = (), seed: int = 0
) -> Comparison | str:
    """Compare the items of two tables of `entropy.item_means`; where that is impossible, the reason in words.

    first, second, splits: what the tables are called in the result.
    """
    for names, what in ((["timestep"], "at different timesteps"), (HEAD, "for different heads or numbers of keys")):
        if set(one.select(names).unique().iter_rows()) != set(two.select(names).unique().iter_rows()):
            return f"{first} and {second} were observed {what}."
    shared, every = (getattr(set(one["source_id"]), how)(two["source_id"]) for how in ("intersection", "union"))
    if shared and shared != every:
        return (
            f"{first} and {second} share {len(shared)} of {len(every)} sources: neither groups of different sources nor"
            " versions of the same ones."
        )
    heads, timesteps, *sources = arrays_of(one, two)
    if not len(heads):
        return "No head has more than one key to attend to, so its entropy is 0."
    # sums of the same numbers in another order differ in their last bits
    order = ["source_id", "item", "timestep", *HEAD]
    one, two = (rows.join(heads, on=HEAD, how="semi").sort(order) for rows in (one, two))
    return Comparison(
        first,
        second,
        tuple(splits),
        (len(sources[0].names), len(sources[1].names)),
        bool(shared),
        timesteps,
        divergences(*sources, timesteps, seed, paired=bool(shared)),
        differences(one, two, "nats", HEAD, "timestep", seed, family=True),
        _sites(one, two, seed),
        _pooled(one, two, seed),
    )


def _sites(one: pl.DataFrame, two: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The ratios of every site: see `SITES`."""
    one, two = _site_means(one), _site_means(two)
    overall = differences(one, two, "nats", _SITE, "timestep", seed, family=True)
    at_timesteps = differences(one, two, "nats", [*_SITE, "timestep"], seed=seed, test=False)
    at_timesteps = at_timesteps.with_columns(p_maxt=pl.lit(None, pl.Float64))
    overall = overall.with_columns(timestep=pl.lit(None, at_timesteps.schema["timestep"]))
    columns = [*_SITE, "timestep", "value", "low", "high", "p_value", "p_maxt", "sources", "exploratory", "void"]
    both = pl.concat([table.select(columns) for table in (at_timesteps, overall)])
    return both.with_columns(pl.col("value", "low", "high").exp())


def _site_means(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per item, timestep and site: the mean over its heads, NaN where the item lacks one."""
    item = ["group", "split", "source_id", "item", "timestep", *_SITE]
    found = rows.group_by(item, maintain_order=True).agg(pl.col("nats").mean(), pl.len().alias("heads"))
    whole = pl.col("heads") == pl.col("heads").max().over(_SITE)
    return found.with_columns(pl.when(whole).then("nats").otherwise(float("nan")).alias("nats"))


def _pooled(one: pl.DataFrame, two: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The pooled ratio at every timestep and over all: see `POOLED_RATIO`."""
    one, two = pooled_items(one), pooled_items(two)
    frames = []
    for by, bands in ((["timestep"], None), ([], "timestep")):
        found = ratios(one, two, "normalised", by, bands, seed)
        beside = [differences(one, two, "normalised", by, bands, seed).select(*by, "p_value")]
        for name, rows in (("first", one), ("second", two)):
            beside.append(means(rows, "normalised", by, bands, seed).select(*by, pl.col("value").alias(name)))
        for table in beside:
            # without `by` there is one row
            found = found.join(table, on=by, how="left", maintain_order="left") if by else found.hstack(table)
        frames.append(found)
    at_timesteps, overall = frames
    overall = overall.with_columns(timestep=pl.lit(None, at_timesteps.schema["timestep"]))
    columns = ["timestep", "first", "second", "value", "low", "high", "p_value", "sources", "exploratory", "void"]
    return pl.concat([at_timesteps.sort("timestep").select(columns), overall.select(columns)])
