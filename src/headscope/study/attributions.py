"""Every head's importance from gradients: what its removal is estimated to add to the loss, without removing it."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from headscope.study.ablation import per_group_and_fill
from headscope.study.inference import MEAN, degradations, means
from headscope.study.paired import cells_of, rankings, weighed

# as in headscope.models.attribution; a gate is 1 where its head is as it is, 0 where the fill has taken its place
TERMS = {
    "importance": "What removing the head adds to the loss, estimated to second order.",
    "g": "−∂ loss / ∂ gate of the head. At a trained optimum it averages to about 0.",
    "c": "Gauss-Newton term of the second order: mean over outputs of (∂ prediction / ∂ gate)², from random vectors.",
    "integrated": (
        "−∫ ∂ loss / ∂ gate while all gates go from 1 to 0 together; over all heads it sums to what removing all of"
        " them adds to the loss."
    ),
}
MEANS = f"In units of the loss, averaged over timesteps with equal weight. {MEAN}"
SHARE = (
    "Sum of g + c over sources / sum of the loss, at a timestep, then the mean over timesteps: the degradation that is"
    " estimated, to be held against the measured one."
)
AGREEMENT = (
    "Spearman's correlation, over heads, of the estimated and the measured degradation on the same images. Noise in"
    " either lowers it; noise of the same images raises it. Beside it the mean over random divisions of the sources"
    " into halves: one half's estimate against the other half's measurement, and either against itself."
)


@dataclass(frozen=True)
class Attributions:
    """Importances of heads. Nothing is tested: all heads are looked at.

    Attributes:
        heads: group, fill, rank (by g + c, 1 is the largest), site, head, then for importance, g, c and, where it was
            asked for, integrated: NAME, NAME_low, NAME_high in units of the loss; value, low, high (see `SHARE`),
            sources, exploratory.
        agreement: with measured effects, where single heads were ablated on the same images: group, fill, value
            (Spearman), low, high, within_first (of the estimate), within_second (of the measurement), across, heads,
            sources, exploratory, void.
        measured: group, fill, site, head, value, low, high: the measured degradations, on the images that both have.
    """

    heads: pl.DataFrame
    agreement: pl.DataFrame | None = None
    measured: pl.DataFrame | None = None

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables there are, by name."""
        found = {"attributions": self.heads, "attributions_agreement": self.agreement}
        return {name: table for name, table in found.items() if table is not None}


def attribute(table: pl.DataFrame, ablations: pl.DataFrame | None = None, seed: int = 0) -> Attributions:
    """The importances of a run, and how they agree with what its ablations measured.

    table: of attributions. ablations: paired losses of single heads.
    """
    heads = per_group_and_fill(table, lambda rows: _ranked(rows, seed)).with_columns(exploratory=pl.lit(True))
    if ablations is None:
        return Attributions(heads)
    key = ["group", "fill", "source_id", "item", "replicate", "timestep", "site", "head"]
    both = table.select(*key, "loss", "importance").join(
        ablations.select(*key, "clean", "edited"), on=key, how="inner", maintain_order="left"
    )
    if not len(both):
        return Attributions(heads)
    measured = per_group_and_fill(both, lambda rows: degradations(rows, ["site", "head"], "timestep", seed, False)[0])
    agreement = per_group_and_fill(both, lambda rows: _agreement(rows, seed))
    return Attributions(heads, agreement, measured)


def _ranked(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    """One group's heads with one fill, the most important first."""
    by = ["site", "head"]
    paired = rows.select(
        *("source_id", "item", "replicate", "timestep", *by),
        clean=pl.col("loss").cast(pl.Float64),
        edited=pl.col("loss").cast(pl.Float64) + pl.col("importance"),
    )
    found = degradations(paired, by, "timestep", seed, test=False)[0]
    for name in TERMS:
        if name in rows.columns:
            term = means(rows, name, by, "timestep", seed)
            labels = {name: "value", f"{name}_low": "low", f"{name}_high": "high"}
            found = found.join(term.select(*by, **labels), on=by, how="left", maintain_order="left")
    order = found.sort(["importance", *by], descending=[True, False, False], nulls_last=True)
    return order.drop("p_value", strict=False).with_row_index("rank", offset=1)


def _agreement(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    """See `AGREEMENT`."""
    change = (pl.col("edited") - pl.col("clean")).alias("change")
    cells = cells_of(rows.with_columns(change), ["importance", "loss", "change", "clean"], ["site", "head"])

    def degradations_of(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        importance, loss, change, clean = (weighed(weights, array) for array in cells.values)
        return (importance / loss).mean(axis=2), (change / clean).mean(axis=2)

    return rankings(cells, degradations_of, seed)
