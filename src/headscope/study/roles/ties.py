"""Tied against control: is a head's excess on counterparts larger where regions are tied than where they aren't?"""

import numpy as np
import polars as pl

from headscope.study.inference import differences
from headscope.study.roles.counterparts import Counterparts
from headscope.study.roles.rows import HEAD

AGAINST_CONTROL = (
    "The excess on counterparts of every head on a tied group minus that on its untied control: mean over sources of"
    " one minus that of the other (in pairs where they are of the same sources), Welch's t, p the larger of bootstrap"
    " and permutation, p_maxt over all heads of the group and split."
)
_NUMBERS = ("value", "low", "high", "p_value", "p_maxt", "standard_error")


def against_control(tied: Counterparts | None, control: Counterparts | None, seed: int) -> pl.DataFrame:
    """See `AGAINST_CONTROL`, of one group and split; None: no counterparts were measured there.

    Returns a table, a row for every head of either: site, head, tied, control_value, value, low, high, p_value, p_maxt,
    standard_error, sources (of the tied group and of its control), exploratory, void. A head that is void on one of
    both, or that one of both lacks, has no numbers; the second counts as one missing row.
    """
    parts = [_by_source(part) for part in (tied, control)]
    heads = pl.concat([void.select(HEAD) for _, void in parts]).unique().sort(HEAD)
    found = heads
    for (_, void), name in zip(parts, ("_tied", "_control"), strict=True):
        found = found.join(void.rename({"void": name}), on=list(HEAD), how="left", maintain_order="left")
    found = found.with_columns(void=pl.col("_tied").fill_null(1) + pl.col("_control").fill_null(1))
    sound = found.filter(pl.col("void") == 0).select(HEAD)
    if not len(sound):
        schema = dict.fromkeys(("tied", "control_value", *_NUMBERS), pl.Float64)
        lacking = [pl.lit(None, kind).alias(name) for name, kind in schema.items()]
        sources = pl.lit([0, 0], pl.List(pl.Int64)).alias("sources")
        return found.select(*HEAD, *lacking, sources, pl.lit(True).alias("exploratory"), "void")
    first, second = (rows.join(sound, on=list(HEAD), how="semi", maintain_order="left") for rows, _ in parts)
    shared = bool(set(first["source_id"].unique()) & set(second["source_id"].unique()))
    tests = differences(first, second, "value", HEAD, seed=seed, family=True, paired=shared).drop("void", "paired")
    for rows, name in ((first, "tied"), (second, "control_value")):
        mean = rows.group_by(HEAD, maintain_order=True).agg(pl.col("value").mean().alias(name))
        found = found.join(mean, on=list(HEAD), how="left", maintain_order="left")
    found = found.join(tests, on=list(HEAD), how="left", maintain_order="left")
    found = found.with_columns(pl.col("exploratory").fill_null(True), pl.col("sources").cast(pl.List(pl.Int64)))
    return found.select(*HEAD, "tied", "control_value", *_NUMBERS, "sources", "exploratory", "void")


def _by_source(found: Counterparts | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A source's part in the excess, mean over timesteps, of heads that aren't void; and how many rows void a head."""
    if found is None:
        head = {"site": pl.String, "head": pl.Int64}
        rows = pl.DataFrame(schema=head | {"source_id": pl.String, "value": pl.Float64})
        return rows, pl.DataFrame(schema=head | {"void": pl.Int64})
    array = found.own().mean(axis=1)
    source, at = (index.ravel() for index in np.indices(array.shape))
    rows = found.heads[at].with_columns(
        source_id=pl.Series(found.sources, dtype=pl.String)[source], value=pl.Series(array.ravel())
    )
    void = found.heads.with_columns(void=pl.Series(found.void, dtype=pl.Int64))
    return rows.filter(pl.Series(found.void == 0)[at]), void
