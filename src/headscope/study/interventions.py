"""Experiment two, whole: heads removed alone and together, more and more of them, and by degrees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from headscope.study.ablation import effect_values, effects, headline_fill, per_group_and_fill, with_rounding
from headscope.study.curves import curve_losses, dose_of
from headscope.study.edits import EDIT, Edited
from headscope.study.fill_error import fill_errors, without_bias
from headscope.study.inference import components, degradations, linearised
from headscope.study.together import joint_losses


@dataclass(frozen=True)
class Interventions:
    """What edits of heads cost. Degradations are fractions of the clean loss, averaged over timesteps.

    Attributes:
        edits: what was edited.
        effects: see `ablation.effects`, of the edits that the confirm split tests (or of a plain sweep's sets).
        timesteps: the relative degradation at every timestep, headline fill: group, fill, kind, edit, timestep,
            value, low, high, p_value, p_maxt (one family per group: edits and timesteps), standard_error, fill_error
            (null without folds), sources, exploratory, void.
        variance: of the degradation by every edit with the headline fill, between sources, items and draws of noise
            (`inference.components`, in squared fractions): group, kind, edit, between_sources, ...
        joint: group, split, fill, kind, edit, heads (their number), joint (degradation), sum (of its heads'), value
            (joint - sum), low, high, p_value, p_maxt, fill_error, sources, exploratory, void; None where no set's heads
            were all removed alone.
        curves: group, order, number, count, value, low, high, sources, exploratory; None without curves.
        doses: group, edit, gate, value, low, high, sources, exploratory; None without doses.
        targets: the group that each selected set was selected for, by the set's name; empty where that isn't known.
    """

    edits: Sequence[Edited]
    effects: pl.DataFrame
    timesteps: pl.DataFrame | None = None
    variance: pl.DataFrame | None = None
    joint: pl.DataFrame | None = None
    curves: pl.DataFrame | None = None
    doses: pl.DataFrame | None = None
    targets: Mapping[str, str] = field(default_factory=dict)

    def of_heads(self) -> pl.DataFrame:
        """The effects of single heads, with columns site and head."""
        names = [(edit.name, *edit.heads[0]) for edit in self.edits if edit.kind == "head"]
        heads = pl.DataFrame(names, schema={"edit": pl.String, "site": pl.String, "head": pl.Int64}, orient="row")
        rows = self.effects.filter(pl.col("kind") == "head")
        return rows.join(heads, on="edit", how="left", maintain_order="left")

    def of_sets(self) -> pl.DataFrame:
        """The effects of everything else."""
        return self.effects.filter(pl.col("kind") != "head")

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables there are, by name."""
        found = {
            "effects": self.effects,
            "effects_timesteps": self.timesteps,
            "effects_variance": self.variance,
            "joint": self.joint,
            "curves": self.curves,
            "doses": self.doses,
        }
        return {name: table for name, table in found.items() if table is not None}


def effects_by_timestep(losses: pl.DataFrame, seed: int = 0, *, test: bool = True) -> pl.DataFrame:
    """The relative degradation by every edit at every timestep, with the headline fill; one family per group."""
    headline = headline_fill(losses)
    errors = fill_errors(losses, at_timesteps=True) if headline == "mean" else None
    rows = without_bias(losses).filter(pl.col("fill") == headline)
    by = [*EDIT, "timestep"]
    nothing = pl.lit(None, pl.Float64)

    def estimate(part: pl.DataFrame) -> pl.DataFrame:
        mine = None if errors is None else errors.filter(pl.col("group") == part["group"][0])
        added = with_rounding(part, by, mine)
        found = degradations(part, by, seed=seed, test=test, family=test, added=added)[0]
        if mine is not None:
            found = found.join(mine.select(*by, fill_error="added_relative"), on=by, how="left", maintain_order="left")
        absent = [name for name in ("p_maxt", "fill_error") if name not in found.columns]
        return found.with_columns(nothing.alias(name) for name in absent)

    columns = ["group", "fill", *by, "value", "low", "high", "p_value", "p_maxt", "standard_error", "fill_error"]
    return per_group_and_fill(rows, estimate).select(*columns, "sources", "exploratory", "void")


def variance_of_effects(losses: pl.DataFrame) -> pl.DataFrame:
    """Where the variance of the degradations with the headline fill comes from."""
    rows = losses.filter(pl.col("fill") == headline_fill(losses))
    by = ["group", *EDIT]
    return components(linearised(rows, by, "timestep"), "influence", by, "timestep")


def joint_effects(
    losses: pl.DataFrame, edits: Sequence[Edited], seed: int = 0, *, test: bool = True
) -> pl.DataFrame | None:
    """Joint minus sum of every set whose heads were all removed alone on the same images: see `together.JOINT`."""
    headline = headline_fill(losses)
    mine = losses.filter((pl.col("fill") == headline) | pl.col("fill").str.starts_with(f"{headline} "))
    sizes = {edit.name: len(edit.heads) for edit in edits if edit.kind != "head"}
    key = ["group", "fill", *EDIT]
    found = []
    for (split,), part in mine.group_by("split", maintain_order=True):
        both = joint_losses(part, edits)
        if both is None:
            continue
        rest, sums = both
        table = effects(rest, seed, test=test)
        together = part.join(rest.select(EDIT).unique(), on=list(EDIT), how="semi", maintain_order="left")
        for name, rows in (("joint", together), ("sum", sums)):
            table = table.join(effect_values(rows, name), on=key, how="left", maintain_order="left")
        heads = pl.col("edit").replace_strict(sizes, return_dtype=pl.Int64)
        found.append(table.with_columns(split=pl.lit(split), heads=heads))
    if not found:
        return None
    columns = ["group", "split", "fill", *EDIT, "heads", "joint", "sum", "value", "low", "high", "p_value", "p_maxt"]
    return pl.concat(found).select(*columns, "fill_error", "sources", "exploratory", "void")


def curve_effects(losses: pl.DataFrame, seed: int = 0) -> pl.DataFrame | None:
    """The degradation at every point of the curves of every group."""
    rows = curve_losses(losses.filter(pl.col("fill") == headline_fill(losses)))
    by = ["order", "number", "count"]
    return _by_group(rows, by, seed)


def dose_effects(losses: pl.DataFrame, seed: int = 0) -> pl.DataFrame | None:
    """The degradation at every gate of every set whose gate was changed by degrees."""
    doses = [(name, *dose) for name in losses["edit"].unique() if (dose := dose_of(name))]
    schema = {"edit": pl.String, "of": pl.String, "gate": pl.Float64}
    rows = losses.join(pl.DataFrame(doses, schema=schema, orient="row"), on="edit", how="inner", maintain_order="left")
    table = _by_group(rows.filter(pl.col("fill") == headline_fill(losses)), ["of", "gate"], seed)
    return None if table is None else table.rename({"of": "edit"})


def _by_group(rows: pl.DataFrame, by: list[str], seed: int) -> pl.DataFrame | None:
    found = []
    for (group,), part in rows.group_by("group", maintain_order=True):
        table = degradations(part, by, "timestep", seed, test=False)[0].drop("p_value").sort(by)
        found.append(table.select(pl.lit(group).alias("group"), pl.all()))
    return pl.concat(found) if found else None
