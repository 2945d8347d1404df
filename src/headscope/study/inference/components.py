"""Where the variance comes from: between sources, between items of a source, between draws of noise of an item."""

from collections.abc import Sequence

import numpy as np
import polars as pl

COMPONENTS = (
    "Variance components of a nested design (draws of noise in items in sources) by the method of moments: mean squares"
    " are set equal to what they are on average (Searle, Casella and McCulloch 1992, ch. 3). A negative one is set to 0"
    " and named under truncated. What a design can't tell apart is in the level above: with one item a source, items"
    " are in sources; with one draw an item, draws are in items."
)


def components(rows: pl.DataFrame, value: str, by: Sequence[str] = (), bands: str | None = None) -> pl.DataFrame:
    """The variance components of a mean over sources, per quantity: see `COMPONENTS`.

    Args:
        rows: one row per item and draw of noise (columns source_id, item, replicate), quantity and band.
        value: the column.
        by: the columns that tell quantities apart.
        bands: a column over which the value is averaged first.

    Returns:
        A table of the columns of `by`, then between_sources, between_items, between_draws (variances, in the value's
        unit squared; null where the design can't tell), truncated (the names of negative ones, which are set to 0),
        sources, items, draws (their numbers; draws are rows), and what more draws would leave of the standard error, as
        a fraction of today's: with_twice_the_draws, with_unlimited_draws (null with one draw an item). A quantity with
        a value that isn't finite has nulls.
    """
    by = list(by)
    nested = ["source_id", "item", "replicate"]
    missing = [name for name in (*nested, value, *by, *([bands] if bands else [])) if name not in rows.columns]
    if missing:
        raise ValueError(f"rows: lacks {', '.join(missing)}; it has {', '.join(rows.columns)}")
    number = pl.col(value).cast(pl.Float64)
    # null would be left out of the mean
    draws = rows.group_by(*by, *nested, maintain_order=True).agg(number.fill_null(np.nan).mean().alias("_value"))
    found = []
    for name, part in draws.group_by(by, maintain_order=True) if by else [((), draws)]:
        found.append(dict(zip(by, name, strict=True)) | _components(part))
    schema = {name: rows.schema[name] for name in by} | _SCHEMA
    return pl.DataFrame(found, schema=schema)


def linearised(rows: pl.DataFrame, by: Sequence[str] = (), bands: str | None = None) -> pl.DataFrame:
    """The rows with a column influence: what each adds to the relative degradation, to first order, for `components`.

    influence = (d - r c) / (mean of c over the sources of its quantity and band), d = edited - clean, c = clean, r the
    band's ratio of sums. Its mean is 0 and its variance between sources is that of the delta method.
    """
    over = [*by, *([bands] if bands else [])] or [pl.lit(0)]
    clean = pl.col("clean").cast(pl.Float64)
    change = pl.col("edited").cast(pl.Float64) - clean
    # as in a degradation, a source counts once
    centre = {
        name: (column / pl.len().over([*over, "source_id"])).sum().over(over)
        / pl.col("source_id").n_unique().over(over)
        for name, column in (("change", change), ("clean", clean))
    }
    return rows.with_columns(
        ((change - centre["change"] / centre["clean"] * clean) / centre["clean"]).alias("influence")
    )


_SCHEMA = {
    "between_sources": pl.Float64,
    "between_items": pl.Float64,
    "between_draws": pl.Float64,
    "truncated": pl.List(pl.String),
    "sources": pl.Int64,
    "items": pl.Int64,
    "draws": pl.Int64,
    "with_twice_the_draws": pl.Float64,
    "with_unlimited_draws": pl.Float64,
}


def _components(draws: pl.DataFrame) -> dict:
    """Of one quantity's draws: source_id, item, _value."""
    value = draws["_value"].to_numpy()
    source = np.unique(draws["source_id"].cast(pl.String).to_numpy(), return_inverse=True)[1]
    item = draws.select(pl.struct("source_id", "item").rank("dense") - 1).to_series().to_numpy()
    sources, items, count = int(source.max()) + 1, int(item.max()) + 1, len(value)
    result = dict.fromkeys(_SCHEMA) | {"sources": sources, "items": items, "draws": count, "truncated": []}
    if not np.isfinite(value).all():
        return result
    per_item, per_source = np.bincount(item), np.bincount(source)
    source_of = np.zeros(items, np.int64)
    source_of[item] = source
    item_mean = np.bincount(item, value) / per_item
    source_mean = np.bincount(source, value) / per_source
    # of the draws in an item, the items in a source, the sources
    freedom = np.array([count - items, items - sources, sources - 1])
    squares = np.array(
        [
            ((value - item_mean[item]) ** 2).sum(),
            (per_item * (item_mean - source_mean[source_of]) ** 2).sum(),
            (per_source * (source_mean - value.mean()) ** 2).sum(),
        ]
    )
    spread = np.bincount(source_of, per_item**2.0) / per_source
    between, within, among = (sources > 1), (items > sources), (count > items)
    draws_variance = squares[0] / freedom[0] if among else 0.0
    items_variance = 0.0
    if within:
        weight = (count - spread.sum()) / freedom[1]
        items_variance = (squares[1] / freedom[1] - draws_variance) / weight
    sources_variance = 0.0
    truncated = []
    if within and items_variance < 0:
        truncated.append("between_items")
        items_variance = 0.0
    if between:
        of_items = (spread.sum() - (per_item**2.0).sum() / count) / freedom[2]
        of_sources = (count - (per_source**2.0).sum() / count) / freedom[2]
        # where items can't be told from sources they share one component
        rest = squares[2] / freedom[2] - draws_variance - (of_items * items_variance if within else 0.0)
        sources_variance = rest / of_sources
        if sources_variance < 0:
            truncated.append("between_sources")
            sources_variance = 0.0
    result["truncated"] = truncated
    result["between_sources"] = sources_variance if between else None
    result["between_items"] = items_variance if within else None
    result["between_draws"] = draws_variance if among else None
    if among and between:
        by_items = np.bincount(source_of, (per_item / per_source[source_of]) ** 2)
        # of the mean over sources, times their number squared
        fixed = sources * sources_variance + items_variance * by_items.sum()
        noise = draws_variance * (1 / per_source).sum()
        if fixed + noise > 0:
            result["with_twice_the_draws"] = float(np.sqrt((fixed + noise / 2) / (fixed + noise)))
            result["with_unlimited_draws"] = float(np.sqrt(fixed / (fixed + noise)))
    return result
