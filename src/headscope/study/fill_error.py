"""The error of the mean fill itself: the mean is that of some reference images, not of all there could be.

A mean of k images differs from the one of infinitely many, and a wrong fill damages. Where a run has *folds* (fills
"mean 1/4" to "mean 4/4": means of a quarter of the reference images each, on the noisy images of the first draw), with
D_g the degradation by fold g of G and D that by the whole mean on the same images:

    variance of D by the reference images    sum_g (D_g - mean D_g)^2 / (G - 1) / G, of G - 1 degrees of freedom
    bias of D by their number                (mean_g D_g - D) / (G - 1)

A fold's mean has G times the variance of the whole one. To second order in the error of the mean, the degradation grows
by something proportional to that variance: by b for the whole mean and G b for a fold's, whose difference is (G - 1) b.
The bias is subtracted from the estimate; the variance widens its interval and its standard error.
"""

import polars as pl

from headscope.study.edits import EDIT
from headscope.sweep.plan.config import fold_of

FILL_ERROR = (
    "The mean fill is the mean over finitely many reference images. How much that changes a degradation is measured"
    " with the means of {folds} parts of them: the bias is subtracted, the standard error added to that over sources."
)
_KEY = ["group", *EDIT]


def fill_errors(losses: pl.DataFrame) -> pl.DataFrame:
    """What the reference images' number does to the degradation by every edit with the mean fill, by group and edit.

    losses: see `edits.losses`. Returns a table: group, kind, edit, folds, and of the relative and the absolute
    degradation, averaged over timesteps, bias, variance, absolute_bias, absolute_variance; empty without folds.
    """
    names = {name: fold for name in losses["fill"].unique() if (fold := fold_of(name))}
    folds = losses.filter(pl.col("fill").is_in(list(names)))
    draws = folds.select("replicate").unique()
    whole = losses.filter(pl.col("fill") == "mean").join(draws, on="replicate", how="semi")
    each = _degradations(folds, [*_KEY, "fill"])
    beside = _degradations(whole, _KEY).rename({"value": "whole", "absolute": "absolute_whole"})
    rest = pl.len() - 1
    found = each.group_by(_KEY, maintain_order=True).agg(
        pl.len().alias("folds"),
        (pl.col("value").mean() / rest).alias("bias"),
        (pl.col("value").var() / pl.len()).alias("variance"),
        (pl.col("absolute").mean() / rest).alias("absolute_bias"),
        (pl.col("absolute").var() / pl.len()).alias("absolute_variance"),
    )
    found = found.join(beside, on=_KEY, how="left", maintain_order="left")
    return found.with_columns(
        bias=pl.col("bias") - pl.col("whole") / (pl.col("folds") - 1),
        absolute_bias=pl.col("absolute_bias") - pl.col("absolute_whole") / (pl.col("folds") - 1),
    ).drop("whole", "absolute_whole")


def _degradations(losses: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """Relative and absolute degradation, averaged over timesteps, every source with equal weight."""
    change = pl.col("edited") - pl.col("clean")
    sources = losses.group_by(*by, "timestep", "source_id", maintain_order=True).agg(
        change.mean().alias("change"), pl.col("clean").mean()
    )
    steps = sources.group_by(*by, "timestep", maintain_order=True).agg(
        (pl.col("change").sum() / pl.col("clean").sum()).alias("value"), pl.col("change").mean().alias("absolute")
    )
    return steps.group_by(by, maintain_order=True).agg(pl.col("value", "absolute").mean())
