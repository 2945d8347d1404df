"""Experiment two: how much worse does the model denoise when one head is removed?

A head is removed by replacing its output, at every query, by a *fill*: its mean output over reference images of the
same group (mean), nothing (zero), what it gives when it attends to all keys alike (uniform), or its own value
(identity). The denoising loss of the same noisy image, with and without the head, is a pair; the noise is the same in
both.

Every head is ablated on the discover split, which ranks them. The largest are ablated again on the confirm split, whose
sources had no part in the choice: only those numbers are tested.
"""

from collections.abc import Callable, Sequence

import polars as pl

from headscope.study.inference import degradations, means, plain_text, with_holm

HEADLINE_FILL = "mean"
FILLS = {
    "mean": "the head's mean output over reference images of the same group, at every position and timestep",
    "zero": "nothing (zeros)",
    "uniform": "the output of attending to all keys alike",
    "identity": "the value at the query's own position",
}
FAMILY = (
    "One family per fill: every (group, head) pair that was tested with it. The mean fill is the headline; zero stands"
    " beside it, as a check that does not rest on reference images."
)
DISTANCE = (
    "Mean over sources of the mean squared difference between the image drawn with the head removed and the image drawn"
    " with the whole model from the same noise, pixel values from 0 to 1."
)
_HEAD = ["site", "head", "fill"]


def headline_fill(ablations: pl.DataFrame) -> str:
    """The fill that heads are ranked by: mean where it was used, else the first by name."""
    fills = sorted(ablations["fill"].unique().to_list())
    return HEADLINE_FILL if HEADLINE_FILL in fills else fills[0]


def select_heads(ablations_discover: pl.DataFrame, count_per_group: int = 5) -> list[tuple[str, int]]:
    """The heads to test: the union over groups of those with the largest overall relative degradation.

    Only rows of the discover split count, and only those of the headline fill. The order is that of the first group's
    ranking, then what the next groups add; ties are broken by the head's name. Raises ValueError where there is no row
    of the discover split.
    """
    rows = plain_text(ablations_discover).filter(pl.col("split") == "discover")
    if not len(rows):
        raise ValueError("ablations_discover: got no row whose split is discover")
    rows = rows.filter(pl.col("fill") == headline_fill(rows))
    selected: dict[tuple[str, int], None] = {}
    for group in sorted(rows["group"].unique()):
        ranked = _ranked(_overall(rows.filter(pl.col("group") == group), 0, test=False))
        for site, head in ranked.head(count_per_group).select("site", "head").iter_rows():
            selected.setdefault((site, int(head)))
    return list(selected)


def rank_heads(ablations: pl.DataFrame, selected: Sequence[tuple[str, int]] = (), seed: int = 0) -> pl.DataFrame:
    """Every ablated head's degradation, averaged over timesteps, without tests: exploratory, as all are looked at.

    Returns a table: group, fill, rank (within group and fill, 1 is the largest), site, head, value (relative), low,
    high, absolute, absolute_low, absolute_high, sources, selected, exploratory.
    """
    ranked = per_group_and_fill(
        ablations, lambda rows: _ranked(_overall(rows, seed, test=False)).with_row_index("rank", offset=1)
    )
    names = {f"{site}\n{head}" for site, head in selected}
    name = pl.format("{}\n{}", "site", "head")
    columns = ["group", "fill", "rank", "site", "head", "value", "low", "high"]
    columns += ["absolute", "absolute_low", "absolute_high", "sources", "selected", "exploratory"]
    table = ranked.with_columns(name.is_in(names).alias("selected"), pl.lit(True).alias("exploratory"))
    return table.select(columns)


def degradation_by_timestep(ablations: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Every ablated head's relative degradation at every timestep, without tests.

    Returns a table: group, fill, site, head, timestep, value, low, high, sources, exploratory.
    """
    relative = per_group_and_fill(
        ablations, lambda rows: degradations(rows, ["site", "head", "timestep"], seed=seed, test=False)[0]
    )
    return relative.drop("p_value").with_columns(pl.lit(True).alias("exploratory"))


def confirm_heads(ablations_confirm: pl.DataFrame, ranking: pl.DataFrame | None = None, seed: int = 0) -> pl.DataFrame:
    """The degradation of the selected heads on the confirm split, tested; Holm's correction per fill, over all groups.

    ranking: the table of `rank_heads`, whose values stand beside. Returns a table: group, fill, site, head, value
    (relative), low, high, absolute, absolute_low, absolute_high, p_value, p_holm, sources, exploratory, discover.
    """
    tested = per_group_and_fill(ablations_confirm, lambda rows: _overall(rows, seed, test=True))
    corrected = pl.concat(with_holm(family) for _, family in tested.group_by("fill", maintain_order=True))
    key = ["group", "fill", "site", "head"]
    if ranking is None:
        corrected = corrected.with_columns(pl.lit(None, pl.Float64).alias("discover"))
    else:
        beside = ranking.select(*key, pl.col("value").alias("discover"))
        corrected = corrected.join(beside, on=key, how="left", maintain_order="left")
    columns = [*key, "value", "low", "high", "absolute", "absolute_low", "absolute_high"]
    table = corrected.select(*columns, "p_value", "p_holm", "sources", "exploratory", "discover")
    return table.sort(["fill", "group", "value", "site", "head"], descending=[False, False, True, False, False])


def rank_distances(generations: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """The distance that removing a head moves the drawn image: see `DISTANCE`. Exploratory.

    Returns a table: group, fill, rank, site, head, value, low, high, sources, exploratory.
    """
    ranked = per_group_and_fill(
        generations,
        lambda rows: _ranked(means(rows, "distance", ["site", "head"], seed=seed)).with_row_index("rank", offset=1),
    )
    return ranked.with_columns(pl.lit(True).alias("exploratory"))


def per_group_and_fill(rows: pl.DataFrame, estimate: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    """The estimates of every group and fill, one table below the other, with the columns group and fill in front."""
    return pl.concat(
        estimate(part).select(pl.lit(group).alias("group"), pl.lit(fill).alias("fill"), pl.all())
        for (group, fill), part in rows.group_by("group", "fill", maintain_order=True)
    )


def _overall(rows: pl.DataFrame, seed: int, test: bool) -> pl.DataFrame:
    """Relative and absolute degradation of one group's heads with one fill, averaged over timesteps."""
    relative, absolute = degradations(rows, ["site", "head"], "timestep", seed, test)
    beside = absolute.select("site", "head", absolute="value", absolute_low="low", absolute_high="high")
    return relative.join(beside, on=["site", "head"], maintain_order="left")


def _ranked(table: pl.DataFrame) -> pl.DataFrame:
    return table.sort(["value", "site", "head"], descending=[True, False, False], nulls_last=True)
