"""The tables of one group: what is missing of them, and their halves."""

from dataclasses import dataclass

import polars as pl

from headscope.study.roles.counterparts import Counterparts, counterparts_of
from headscope.study.roles.rows import HEAD, SPLITS, sources_of

_ENTROPIES = ("entropy", "entropy_normalised", "distance")
_DRAW = ("replicate", "timestep", "translated")


@dataclass(frozen=True)
class Grouped:
    """The rows of one group and both splits; of key_mass one for all that others have, see `grouped`."""

    features: pl.DataFrame
    key_mass: pl.DataFrame
    counterparts: pl.DataFrame | None

    def of(self, split: str) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame | None]:
        """Features, masses of images that aren't translated, and counterparts of a split."""
        mine = pl.col("split") == split
        tied = None if self.counterparts is None else self.counterparts.filter(mine)
        return self.features.filter(mine), self.key_mass.filter(mine, ~pl.col("translated")), tied

    def regions(self) -> dict[str, Counterparts | None]:
        """What the excess on counterparts is made of, by split; None where there are none."""
        found = {}
        for split in SPLITS:
            _, mass, tied = self.of(split)
            timesteps = mass["timestep"].unique().sort().to_list()
            found[split] = None if tied is None else counterparts_of(tied, sources_of(mass), timesteps)
        return found

    def void(self) -> pl.DataFrame:
        """How many rows of every head are missing or hold a number that isn't finite: site, head, void."""
        looks = pl.col("key_mass").list.eval(pl.element().is_finite().fill_null(False)).list.all()
        sound = pl.all_horizontal(looks, *(pl.col(name).is_finite().fill_null(False) for name in _ENTROPIES))
        found = self.key_mass.group_by(HEAD).agg((~sound).sum().cast(pl.Int64).alias("void"))
        if self.counterparts is not None and len(self.counterparts):
            found = found.join(_void_ties(self.counterparts), on=list(HEAD), how="left")
            found = found.select(*HEAD, pl.col("void") + pl.col("_ties").fill_null(0))
        return found.sort(HEAD)


def grouped(features: pl.DataFrame, key_mass: pl.DataFrame, counterparts: pl.DataFrame | None, group: str) -> Grouped:
    """The rows of one group, with a row of NaN in key_mass for every one that is missing.

    On both splits a group has the heads of either, of every one the items of key_mass and of features, and of every
    item the timesteps and draws that any has there. Raises ValueError where one item is of two sources.
    """
    mine = pl.col("group") == group, pl.col("split").is_in(SPLITS)
    tied = None if counterparts is None else counterparts.filter(mine)
    features, key_mass = features.filter(mine), key_mass.filter(mine)
    heads = key_mass.select(*HEAD, "call", "grid_height", "grid_width").unique()
    parts = [key_mass]
    for split in SPLITS:
        rows, shown = (table.filter(pl.col("split") == split) for table in (key_mass, features))
        items = pl.concat([table.select("item", "source_id") for table in (rows, shown)]).unique()
        twice = items.filter(pl.col("item").is_duplicated())["item"].sort()
        if len(twice):
            raise ValueError(f"features, key_mass: got item {twice[0]} with two source ids")
        draws = rows.select("group", "split", *_DRAW).unique()
        whole = items.join(draws, how="cross").join(heads, how="cross")
        seen = ["item", *HEAD, "call", *_DRAW]
        lost = whole.join(rows.select(seen), on=seen, how="anti").sort(seen)
        parts.append(_of_nan(lost, key_mass))
    return Grouped(features, pl.concat(parts), tied)


def _of_nan(labels: pl.DataFrame, like: pl.DataFrame) -> pl.DataFrame:
    """Rows with the columns of another table, without any number."""
    tokens = (pl.col("grid_height").cast(pl.Int64) * pl.col("grid_width").cast(pl.Int64)).cast(pl.UInt32)
    nothing = pl.lit(float("nan")).repeat_by(tokens).cast(like.schema["key_mass"]).alias("key_mass")
    numbers = [pl.lit(float("nan")).cast(like.schema[name]).alias(name) for name in (*_ENTROPIES, "distance_uniform")]
    return labels.with_columns(nothing, *numbers).select(like.columns)


def _void_ties(rows: pl.DataFrame) -> pl.DataFrame:
    """Of every head the rows in the table "counterparts" that another of its site has, or that aren't finite."""
    bad = (pl.col("tokens") > 0) & ~pl.col("mass").is_finite().fill_null(False)
    counts = rows.group_by(*HEAD, "split").agg(_has=pl.len().cast(pl.Int64), _bad=bad.sum().cast(pl.Int64))
    heads = rows.select(HEAD).unique().join(pl.DataFrame({"split": SPLITS}), how="cross")
    found = heads.join(counts, on=[*HEAD, "split"], how="left").with_columns(pl.col("_has", "_bad").fill_null(0))
    most = pl.col("_has").max()
    # a split without any lacks those of the other
    expected = pl.when(most.over("split") > 0).then(most.over("site", "split")).otherwise(most.over("site"))
    void = (expected - pl.col("_has") + pl.col("_bad")).alias("_lost")
    return found.with_columns(void).group_by(HEAD).agg(_ties=pl.col("_lost").sum())
