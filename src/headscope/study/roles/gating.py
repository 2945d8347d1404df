"""Does a head act at some noise levels only? Its excess, or how far it is from uniform, against log-SNR."""

from collections.abc import Mapping

import numpy as np
import polars as pl

from headscope.study.inference import means, settings, with_holm
from headscope.study.roles.forms import UNIFORM
from headscope.study.roles.measures import CELL, Measured
from headscope.study.roles.rows import HEAD

# the weaker half of the noise levels is below this share of the stronger one
WEAK = 0.5
GATING = (
    "The slope over log-SNR (nats) of a named head's excess, times the name's sign, or of ln K − H of a head that is"
    f" uniform at some timestep and not at all of them (below {UNIFORM} nats on discover): least squares within every"
    " source, mean over sources on confirm, bootstrap-t, Holm over the heads of a group. A head 'acts at high log-SNR'"
    " or at low where that slope isn't 0 and the mean over the half of the timesteps where it is weaker is below half"
    " of that over the other (a timestep in the middle counts to neither)."
)
_SCHEMA = {"site": pl.String, "head": pl.Int64, "gating": pl.String, "gating_of": pl.String} | dict.fromkeys(
    ("slope", "slope_low", "slope_high", "slope_p_holm", "at_high", "at_low"), pl.Float64
)


def gated(
    names: pl.DataFrame,
    confirm: Measured,
    entropies: tuple[pl.DataFrame, pl.DataFrame],
    log_snr: Mapping[int, float] | None,
    seed: int,
) -> pl.DataFrame:
    """The gating of the heads of one group: see `GATING`.

    Args:
        names: see `naming.named`.
        confirm: the confirm split's.
        entropies: ln K - H by source of the discover and of the confirm split: source_id, site, head, timestep,
            deficit.
        log_snr: of every timestep, nats.
        seed: of the draws.

    Returns:
        site, head, gating (a sentence; null where it isn't asked), gating_of, slope (unit per nat), slope_low,
        slope_high, slope_p_holm, at_high and at_low (the means over both halves).
    """
    if log_snr is None or len(confirm.timesteps) < 2:
        return pl.DataFrame(schema=_SCHEMA)
    ratios = np.array([log_snr[timestep] for timestep in confirm.timesteps])
    numbered = confirm.cells.with_row_index("_at")
    parts = []
    for row in names.filter(pl.col("feature").is_not_null()).iter_rows(named=True):
        mine = numbered.filter(*(pl.col(name) == row[name] for name in CELL))
        values = confirm.rows_of(mine["_at"][0]).with_columns(value=pl.col("value") * row["sign"])
        parts.append(_labelled(values, row, "excess"))
    for row in _sometimes_uniform(entropies[0], names).iter_rows(named=True):
        values = entropies[1].filter(*(pl.col(name) == row[name] for name in HEAD)).drop_nulls("deficit")
        parts.append(_labelled(values.with_columns(value="deficit"), row, "ln K − H"))
    if not parts:
        return pl.DataFrame(schema=_SCHEMA)
    return _slopes(pl.concat(parts), confirm.timesteps, ratios, seed)


def _sometimes_uniform(entropies: pl.DataFrame, names: pl.DataFrame) -> pl.DataFrame:
    """Heads without a feature's name that are uniform at some timestep and not at all of them: site, head."""
    mean = entropies.group_by(*HEAD, "timestep", maintain_order=True).agg(pl.col("deficit").mean())
    below = mean.group_by(HEAD).agg((pl.col("deficit") < UNIFORM).mean().alias("share"))
    some = below.filter(pl.col("share") > 0, pl.col("share") < 1).sort(HEAD)
    return some.join(names.filter(pl.col("feature").is_null()), on=list(HEAD), how="semi", maintain_order="left")


def _labelled(values: pl.DataFrame, row: dict, what: str) -> pl.DataFrame:
    labels = (
        pl.lit(row["site"]).alias("site"),
        pl.lit(row["head"], pl.Int64).alias("head"),
        pl.lit(what).alias("gating_of"),
    )
    return values.select(*labels, "source_id", "timestep", "value")


def _slopes(rows: pl.DataFrame, timesteps: list[int], ratios: np.ndarray, seed: int) -> pl.DataFrame:
    centred = ratios - ratios.mean()
    if not (centred**2).sum() > 0:
        return pl.DataFrame(schema=_SCHEMA)
    order = np.argsort(ratios, kind="stable")
    half = len(ratios) // 2
    high, low = np.zeros((2, len(ratios)))
    high[order[-half:]], low[order[:half]] = 1 / half, 1 / half
    weights = pl.DataFrame({"timestep": timesteps, "_slope": centred / (centred**2).sum(), "_high": high, "_low": low})
    rows = rows.join(weights, on="timestep", maintain_order="left")
    of_source = rows.group_by(*HEAD, "gating_of", "source_id", maintain_order=True).agg(
        (pl.col("value") * pl.col(name)).sum().alias(name) for name in ("_slope", "_high", "_low")
    )
    by = [*HEAD, "gating_of"]
    # heads of fewer sources (with counterparts) have their own draws
    found = pl.concat(
        means(part, "_slope", by, seed=seed, test=True) for part in of_source.partition_by(by, maintain_order=True)
    )
    halves = of_source.group_by(by, maintain_order=True).agg(
        at_high=pl.col("_high").mean(), at_low=pl.col("_low").mean()
    )
    found = with_holm(found).join(halves, on=by, maintain_order="left")
    strong, weak = pl.max_horizontal("at_high", "at_low"), pl.min_horizontal("at_high", "at_low")
    differs = (pl.col("p_holm") < settings.SIGNIFICANT) & (weak < WEAK * strong)
    text = (
        pl.when(pl.col("p_holm").is_null())
        .then(pl.lit("not tested: too few sources"))
        .when(~differs)
        .then(pl.lit("no gating found"))
        .when(pl.col("at_high") > pl.col("at_low"))
        .then(pl.lit("acts at high log-SNR"))
        .otherwise(pl.lit("acts at low log-SNR"))
    )
    columns = {"slope": "value", "slope_low": "low", "slope_high": "high", "slope_p_holm": "p_holm"}
    found = found.with_columns(gating=text, **{name: pl.col(column) for name, column in columns.items()})
    return found.select(list(_SCHEMA))
