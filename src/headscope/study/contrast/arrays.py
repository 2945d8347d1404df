"""The entropies of two groups' sources as arrays, over the same heads and timesteps."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from headscope.study.entropy import HEAD, query_groups

MEASURES = ("nats", "normalised")


@dataclass(frozen=True)
class Sources:
    """The entropies of one group's sources.

    Attributes:
        names: of the sources, sorted.
        nats: [sources, timesteps, heads], H; NaN where a number of the source isn't finite, or is absent.
        normalised: H / ln K, likewise.
    """

    names: list[str]
    nats: np.ndarray
    normalised: np.ndarray


def arrays_of(first: pl.DataFrame, second: pl.DataFrame) -> tuple[pl.DataFrame, list[int], Sources, Sources]:
    """The heads (see `entropy.HEAD`), the timesteps and the sources of two tables of `entropy.item_means`.

    The heads are those of either table whose queries are of the first query group and have more than one key; one that
    a source lacks is NaN there.
    """
    both = pl.concat([first, second])
    both = both.filter(pl.col("query_group") == query_groups(both)[0], pl.col("keys") > 1)
    heads = both.select(HEAD).unique().sort(HEAD)
    timesteps = sorted(both["timestep"].unique().to_list())
    return heads, timesteps, _sources(first, heads, timesteps), _sources(second, heads, timesteps)


def _sources(rows: pl.DataFrame, heads: pl.DataFrame, timesteps: list[int]) -> Sources:
    items = rows.group_by("source_id").agg(pl.col("item").n_unique().alias("items")).sort("source_id")
    items = items.with_row_index("_source")
    places = pl.DataFrame({"timestep": timesteps}, schema={"timestep": rows.schema["timestep"]}).with_row_index("_step")
    cells = rows.join(heads.with_row_index("_head"), on=HEAD).sort("item").group_by("source_id", "timestep", "_head")
    found = cells.agg(pl.col(MEASURES).mean(), pl.len().alias("rows"))
    found = found.join(items, on="source_id").join(places, on="timestep")
    where = tuple(found[name].to_numpy() for name in ("_source", "_step", "_head"))
    whole = (found["rows"] == found["items"]).to_numpy()
    arrays = []
    for measure in MEASURES:
        array = np.full((len(items), len(timesteps), len(heads)), np.nan)
        # a source whose items aren't all there has no number
        array[where] = np.where(whole, found[measure].to_numpy(), np.nan)
        arrays.append(array)
    return Sources(items["source_id"].to_list(), *arrays)
