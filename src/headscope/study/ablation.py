"""Experiment two: how much worse does the model denoise when heads are removed?

Heads are removed by replacing their output, at every query, by a *fill*. The denoising loss of the same noisy image,
with and without them, is a pair; the noise is the same in both.

Every head is ablated on the discover split, which ranks them. What is selected there is ablated again on the confirm
split, whose sources had no part in the choice: only those numbers are tested. Sites, levels and all heads together
aren't selected.
"""

from collections.abc import Callable, Sequence

import polars as pl

from headscope.study.edits import EDIT
from headscope.study.fill_error import fill_errors, without_bias, without_folds
from headscope.study.inference import degradations, means, plain_text
from headscope.sweep.plan.config import fold_of

HEADLINE_FILL = "mean"
FILLS = {
    "mean": "the head's mean output over reference images of the same group, at every position and timestep",
    "zero": "nothing (zeros)",
    "uniform": "the output of attending to all keys alike",
    "identity": "the value at the query's own position",
    "resample": "the head's output on another image of the same group",
}
FAMILY = (
    "One family per group of images and fill: every edit that was tested there, single heads and sets alike. The mean"
    " fill is the headline; the others stand beside it, as checks that do not rest on a mean. Losses are those of"
    " predictions in single precision: a standard error of 5e-7 of the clean loss stands for their rounding in every"
    " interval and test, so that nothing below a millionth of the loss is found."
)
# the standard error that single precision brings into a relative degradation
ROUNDING = 5e-7
DISTANCE = (
    "Mean over sources of the mean squared difference between the image drawn with the head removed and the image drawn"
    " with the whole model from the same noise, pixel values from 0 to 1."
)


def headline_fill(ablations: pl.DataFrame) -> str:
    """The fill that heads are ranked by: mean where it was used, else the first by name."""
    fills = sorted(name for name in ablations["fill"].unique().to_list() if fold_of(name) is None)
    return HEADLINE_FILL if HEADLINE_FILL in fills else fills[0]


def select_heads(ablations_discover: pl.DataFrame, count_per_group: int = 5) -> list[tuple[str, int]]:
    """The heads to test: the union over groups of those with the largest overall relative degradation, of either sign.

    Only rows of the discover split count, and only those of the headline fill. The order is that of the first group's
    ranking, then what the next groups add; ties are broken by the head's name. Raises ValueError where there is no row
    of the discover split.
    """
    rows = _of_discover(ablations_discover)
    selected: dict[tuple[str, int], None] = {}
    for group in sorted(rows["group"].unique()):
        ranked = _ranked(_relative(rows, group).with_columns(pl.col("value").abs()))
        for site, head in ranked.head(count_per_group).select("site", "head").iter_rows():
            selected.setdefault((site, int(head)))
    return list(selected)


def ranked_heads(ablations_discover: pl.DataFrame, group: str, beyond: str | None = None) -> list[tuple[str, int]]:
    """All heads by what their removal costs a group on the discover split, the largest first; ties by name.

    beyond: another group, whose degradation is subtracted: the heads that matter to the first beyond the second.
    """
    rows = _of_discover(ablations_discover)
    table = _relative(rows, group)
    if beyond is not None:
        other = _relative(rows, beyond).select("site", "head", beyond="value")
        table = table.join(other, on=["site", "head"]).with_columns(value=pl.col("value") - pl.col("beyond"))
    return [(site, int(head)) for site, head in _ranked(table).select("site", "head").iter_rows()]


def _of_discover(ablations: pl.DataFrame) -> pl.DataFrame:
    rows = plain_text(ablations).filter(pl.col("split") == "discover")
    if not len(rows):
        raise ValueError("ablations_discover: got no row whose split is discover")
    return rows.filter(pl.col("fill") == headline_fill(rows))


def _relative(rows: pl.DataFrame, group: str) -> pl.DataFrame:
    return _values(rows.filter(pl.col("group") == group), ["site", "head"])


def _values(rows: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """The relative degradations of one group with one fill, averaged over timesteps, without intervals."""
    return degradations(rows, by, "timestep", test=False, interval=False)[0].select(*by, "value")


def rank_heads(ablations: pl.DataFrame, selected: Sequence[tuple[str, int]] = (), seed: int = 0) -> pl.DataFrame:
    """Every ablated head's degradation, averaged over timesteps, without tests: exploratory, as all are looked at.

    The mean fill's bias, see `fill_error`, is in them; its folds are no fills of their own. Returns a table: group,
    fill, rank (within group and fill, 1 is the largest), site, head, value (relative), low, high, absolute,
    absolute_low, absolute_high, sources, selected, exploratory, void.
    """
    ranked = per_group_and_fill(
        without_folds(ablations),
        lambda rows: _ranked(_overall(rows, ["site", "head"], seed, test=False)).with_row_index("rank", offset=1),
    )
    names = {f"{site}\n{head}" for site, head in selected}
    name = pl.format("{}\n{}", "site", "head")
    columns = ["group", "fill", "rank", "site", "head", "value", "low", "high"]
    columns += ["absolute", "absolute_low", "absolute_high", "sources", "selected", "exploratory", "void"]
    table = ranked.with_columns(name.is_in(names).alias("selected"), pl.lit(True).alias("exploratory"))
    return table.select(columns)


def degradation_by_timestep(ablations: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Every ablated head's relative degradation at every timestep, without tests.

    Returns a table: group, fill, site, head, timestep, value, low, high, sources, exploratory.
    """
    relative = per_group_and_fill(
        without_folds(ablations),
        lambda rows: degradations(rows, ["site", "head", "timestep"], seed=seed, test=False)[0],
    )
    return relative.drop("p_value").with_columns(pl.lit(True).alias("exploratory"))


def effects(
    losses: pl.DataFrame, seed: int = 0, *, test: bool = True, before: pl.DataFrame | None = None
) -> pl.DataFrame:
    """The degradation by every edit, single heads and sets alike, averaged over timesteps; see `FAMILY`.

    losses: see `edits.losses`. before: those of the discover split, whose degradations stand beside as they are: they
    have no folds, so that the mean fill's bias is in them. Returns a table:
    group, fill, kind, edit, value (relative), low, high, absolute, absolute_low, absolute_high, p_value, p_maxt (null
    without a test), standard_error, fill_error, fill_bias (null without folds), sources, exploratory, void, discover.
    """
    errors = fill_errors(losses)
    key = ["group", "fill", *EDIT]
    frames = []
    for (group, fill), rows in without_bias(losses).group_by("group", "fill", maintain_order=True):
        mine = None if errors is None or fill != "mean" else errors.filter(pl.col("group") == group)
        found = _overall(rows, list(EDIT), seed, test, family=test, added=with_rounding(rows, EDIT, mine))
        if mine is not None:
            of_fill = mine.select(*EDIT, fill_error="added_relative")
            found = found.join(of_fill, on=list(EDIT), how="left", maintain_order="left")
        bias = (
            rows.group_by(*EDIT, "timestep", maintain_order=True)
            .agg(pl.col("fill_bias").first())
            .group_by(EDIT, maintain_order=True)
            .agg(pl.col("fill_bias").mean())
        )
        found = found.join(bias, on=list(EDIT), how="left", maintain_order="left")
        frames.append(found.select(pl.lit(group).alias("group"), pl.lit(fill).alias("fill"), pl.all()))
    table = pl.concat(frames, how="diagonal")
    discover = pl.lit(None, pl.Float64).alias("discover")
    if before is not None:
        beside = per_group_and_fill(before, lambda rows: _values(rows, list(EDIT))).rename({"value": "discover"})
        table, discover = table.join(beside, on=key, how="left", maintain_order="left"), pl.col("discover")
    nothing = {name: pl.lit(None, pl.Float64).alias(name) for name in ("p_maxt", "fill_error")}
    table = table.with_columns(*(column for name, column in nothing.items() if name not in table.columns))
    columns = [*key, "value", "low", "high", "absolute", "absolute_low", "absolute_high", "p_value", "p_maxt"]
    columns += ["standard_error", "fill_error", "fill_bias", "sources", "exploratory"]
    return table.select(*columns, "void", discover)


def effect_values(losses: pl.DataFrame, name: str) -> pl.DataFrame:
    """The values alone of `effects`, in a column of a name, by group, fill, kind and edit."""
    found = per_group_and_fill(without_bias(losses), lambda rows: _values(rows, list(EDIT)))
    return found.rename({"value": name})


def with_rounding(rows: pl.DataFrame, by: Sequence[str], added: pl.DataFrame | None = None) -> pl.DataFrame:
    """The errors beside that of sampling sources, for `inference.degradations`: those of the fill, and `ROUNDING`.

    rows: paired losses of one group and fill. added: see `fill_error.fill_errors`, of the group; None without folds.
    """
    clean = pl.col("clean").cast(pl.Float64).mean().abs().fill_nan(0.0).fill_null(0.0)
    rounding = (
        rows.group_by(by, maintain_order=True)
        .agg(added_absolute=ROUNDING * clean)
        .with_columns(
            pl.when(pl.col("added_absolute").is_finite()).then("added_absolute").otherwise(0.0),
            added_relative=pl.lit(ROUNDING),
            added_freedom=pl.lit(float("inf")),
        )
    )
    if added is None:
        return rounding
    both = rounding.join(added, on=list(by), how="left", maintain_order="left", suffix="_of_fill")
    names = ("added_relative", "added_absolute")
    squares = {name: pl.col(name) ** 2 + pl.col(f"{name}_of_fill").fill_null(0.0) ** 2 for name in names}
    freedom = pl.col("added_freedom_of_fill").fill_null(pl.col("added_freedom"))
    return both.select(*by, *(square.sqrt().alias(name) for name, square in squares.items()), added_freedom=freedom)


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


def _overall(
    rows: pl.DataFrame,
    by: list[str],
    seed: int,
    test: bool,
    family: bool = False,
    added: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Relative and absolute degradation of one group's edits with one fill, averaged over timesteps."""
    relative, absolute = degradations(rows, by, "timestep", seed, test, family=family, added=added)
    beside = absolute.select(*by, absolute="value", absolute_low="low", absolute_high="high")
    return relative.join(beside, on=by, maintain_order="left")


def _ranked(table: pl.DataFrame) -> pl.DataFrame:
    return table.sort(["value", "site", "head"], descending=[True, False, False], nulls_last=True)
