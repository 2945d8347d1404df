"""The error of the mean fill itself: the mean is that of some reference images, not of all there could be.

A mean of k images differs from the one of infinitely many, and a wrong fill damages. Where a run has *folds* (fills
"mean 1/4" to "mean 4/4": means of a quarter of the reference images each, on the noisy images of the first draw), with
D_g the degradation by fold g of G and D that by the whole mean on the same images:

    bias of D by their number, at every timestep
        b = (mean_g D_g - D) / (G - 1)
    standard error of D by the reference images, D at a timestep or the mean over timesteps
        sqrt(sum_g (D_g - mean D_g)^2 / (G - 1) / G), with G - 1 degrees of freedom

The folds' means average to the whole one, so what a fill's error does in proportion to it cancels in the bias; what it
does in proportion to its square is G times as large for a fold (b for the whole mean, G b for a fold's, whose
difference is (G - 1) b). Folds that hold a few images more or less than others leave a little of the first in it. The
bias is taken off the edited losses, the standard error is added to that over sources. A quantity of which a fold has no
finite degradation is void, as one whose own losses aren't.
"""

import numpy as np
import polars as pl

from headscope.study.edits import EDIT
from headscope.sweep.plan.config import fold_of

FILL_ERROR = (
    "The mean fill is the mean over finitely many reference images. How much that changes a degradation was measured"
    " with the means of some parts of them: the bias is subtracted, the standard error is part of the interval and"
    " of the test."
)
_KEY = ["group", *EDIT]


def without_folds(losses: pl.DataFrame) -> pl.DataFrame:
    """The rows whose fill is no fold of the mean one."""
    folds = [name for name in losses["fill"].unique() if fold_of(name)]
    return losses.filter(~pl.col("fill").is_in(folds)) if folds else losses


def without_bias(losses: pl.DataFrame) -> pl.DataFrame:
    """The losses without the folds, those of the mean fill less its bias, with a column fill_bias (relative).

    losses: see `edits.losses`. At every timestep edited becomes edited - bias * clean, which lowers the relative
    degradation by the bias, and the absolute one by as much of the clean loss. fill_bias is null without folds; where
    other edits have folds and this one has not, or not finite ones, it is NaN, and so is edited.
    """
    both = _compared(losses)
    rows = without_folds(losses)
    if both is None:
        return rows.with_columns(fill_bias=pl.lit(None, pl.Float64))
    key = [*_KEY, "timestep"]
    bias = both.group_by(key, maintain_order=True).agg(
        fill_bias=(pl.col("value").mean() - pl.col("whole").first()) / (pl.len() - 1)
    )
    rows = rows.join(bias, on=key, how="left", maintain_order="left")
    rows = rows.with_columns(fill_bias=pl.when(pl.col("fill") == "mean").then(pl.col("fill_bias").fill_null(np.nan)))
    return rows.with_columns(edited=pl.col("edited") - pl.col("fill_bias").fill_null(0.0) * pl.col("clean"))


def fill_errors(losses: pl.DataFrame, *, at_timesteps: bool = False) -> pl.DataFrame | None:
    """The standard errors that the reference images bring into degradations by the mean fill; None without folds.

    losses: see `edits.losses`. Those of the mean over timesteps, or `at_timesteps`. Returns a table: group, kind, edit,
    (timestep,) added_relative, added_absolute, added_freedom (degrees of freedom). Errors are 0 where the folds give
    none, which makes the degradations themselves void: see `without_bias`.
    """
    both = _compared(losses)
    if both is None:
        return None
    key = [*_KEY, "timestep"] if at_timesteps else _KEY
    overall = both.group_by(*key, "fill", maintain_order=True).agg(pl.col("value", "absolute").mean())
    errors = overall.group_by(key, maintain_order=True).agg(
        added_relative=(pl.col("value").var() / pl.len()).sqrt(),
        added_absolute=(pl.col("absolute").var() / pl.len()).sqrt(),
    )
    every = losses.filter(pl.col("fill") == "mean").select(key).unique(maintain_order=True)
    found = every.join(errors, on=key, how="left", maintain_order="left")
    return found.with_columns(
        pl.col("added_relative", "added_absolute").fill_null(0.0).fill_nan(0.0),
        added_freedom=pl.lit(both["fill"].n_unique() - 1.0),
    )


def _compared(losses: pl.DataFrame) -> pl.DataFrame | None:
    """The degradation by every fold and (whole) by the whole mean on the same images; None without folds.

    Returns a table: group, kind, edit, fill, timestep, value, absolute, whole. They are NaN where a loss isn't finite
    or a fold has fewer rows than others.
    """
    names = [name for name in losses["fill"].unique() if fold_of(name)]
    if not names:
        return None
    folds = losses.filter(pl.col("fill").is_in(names))
    whole = losses.filter(pl.col("fill") == "mean").join(folds.select("replicate").unique(), on="replicate", how="semi")
    beside = _degradations(whole).select(*_KEY, "timestep", whole="value", of="rows")
    both = _degradations(folds).join(beside, on=[*_KEY, "timestep"], how="left", maintain_order="left")
    complete = (pl.col("rows") == pl.col("of")) & (pl.len().over(*_KEY, "timestep") == len(names))
    return both.with_columns(
        pl.when(complete).then(name).otherwise(np.nan).alias(name) for name in ("value", "absolute")
    )


def _degradations(losses: pl.DataFrame) -> pl.DataFrame:
    """Relative and absolute degradation at every timestep, every source with equal weight; and the number of rows."""
    by = [*_KEY, "fill", "timestep"]
    # a mean would leave out null
    clean, edited = (pl.col(name).cast(pl.Float64).fill_null(np.nan) for name in ("clean", "edited"))
    sources = losses.group_by(*by, "source_id", maintain_order=True).agg(
        change=(edited - clean).mean(), clean=clean.mean(), rows=pl.len()
    )
    return sources.group_by(by, maintain_order=True).agg(
        value=pl.col("change").sum() / pl.col("clean").sum(),
        absolute=pl.col("change").mean(),
        rows=pl.col("rows").sum(),
    )
