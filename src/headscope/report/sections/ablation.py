"""What removing heads costs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from headscope.report.marks import (
    SEQUENTIAL,
    by_group,
    colour_bar,
    dots_of,
    head_notes,
    heads_of,
    notes_of,
    of_fills,
    read_as,
)
from headscope.report.naming import Names, percent, probability, significant
from headscope.report.panels import Figure, View, dot_panels, heat_maps
from headscope.report.section import Section
from headscope.report.tables import INTERVAL, SUBJECT, Table, estimate, subject
from headscope.study import ablation, inference
from headscope.study.ablation import headline_fill
from headscope.study.analysis import StudyResult
from headscope.study.fill_error import FILL_ERROR


def section(result: StudyResult, names: Names, groups: Sequence[str]) -> Section | None:
    """The section, where single heads were ablated."""
    ranking, timesteps = result.ablation_ranking, result.ablation_timesteps
    heads = result.interventions.of_heads() if result.interventions else None
    confirmed = heads if heads is not None and len(heads) else None
    if ranking is None and confirmed is None:
        return None
    fill = headline_fill(next(table for table in (ranking, confirmed) if table is not None))
    figures: dict[str, Any] = {}
    tables: dict[str, Any] = dict.fromkeys(("ranking", "confirm", "timesteps", "variance"))
    if ranking is not None and timesteps is not None:
        ablated = sorted(timesteps["timestep"].unique().to_list())
        figures["ranking"] = degradation_ranking(ranking, names, groups, fill)
        figures["degradation_maps"] = degradation_maps(timesteps, names, groups, ablated, fill)
        tables["ranking"] = ranking_table(ranking, names)
    if result.interventions and confirmed is not None:
        figures["confirm"] = degradation_confirmed(confirmed, names, groups, fill)
        tables["confirm"] = confirm_table(confirmed, names)
        steps, variance = result.interventions.timesteps, result.interventions.variance
        tables["timesteps"] = None if steps is None else timesteps_table(steps, names, groups)
        tables["variance"] = None if variance is None else variance_table(variance, names, groups)
    values = {
        "fill": fill,
        "fills": ablation.FILLS,
        "relative": inference.RELATIVE.format(of="loss"),
        "absolute": inference.ABSOLUTE.format(of="loss"),
        "effect_test": inference.EFFECT_TEST,
        "family": ablation.FAMILY,
        "components": inference.COMPONENTS,
        "fill_error": _fill_error(confirmed),
        "omitted": result.omitted.get("confirm"),
    }
    return Section("ablation", "Removing heads", {**values, **tables}, figures)


def _fill_error(confirmed: pl.DataFrame | None) -> str | None:
    measured = confirmed is not None and confirmed["fill_error"].is_not_null().any()
    return FILL_ERROR if measured else None


# label, value, low, high, axis title, how a value is written, tick format
_MEASURES: tuple[tuple[str, str, str, str, str, Callable[..., str], str | None], ...] = (
    ("Relative", "value", "low", "high", "degradation of the loss", percent, ".3~p"),
    ("Absolute", "absolute", "absolute_low", "absolute_high", "edited − clean loss", significant, None),
)


def degradation_ranking(
    ranking: pl.DataFrame, names: Names, groups: Sequence[str], fill: str, most: int = 20
) -> list[View]:
    """The heads whose removal hurts most, per group, on the split that ranks them."""
    table = ranking.filter(pl.col("fill") == fill)
    views = []
    for label, column, low, high, axis, write, tick in _MEASURES:
        panels = []
        for group in groups:
            rows = table.filter(pl.col("group") == group).sort(
                [column, "site", "head"], descending=[True, False, False], nulls_last=True
            )
            members = [read_as(row, column, low, high) for row in rows.head(most).to_dicts()]
            if members:
                titles = [names.head(row["site"], row["head"]) for row in members]
                notes = head_notes(titles, members, write)
                dots = dots_of("", members, notes, names.colour(group), names.symbol(group))
                panels.append((group, titles, [replace(dots, filled=[row["selected"] for row in members])]))
        if panels:
            views.append(View(label, dot_panels(panels, axis, tick_format=tick)))
    return views


def degradation_maps(
    by_timestep: pl.DataFrame, names: Names, groups: Sequence[str], timesteps: Sequence[int], fill: str
) -> Figure:
    """Relative degradation, head x timestep, a panel per group; logarithmic colours."""
    table = by_timestep.filter(pl.col("fill") == fill).with_columns(note=notes_of(names, "timestep", percent))
    top = math.log10(max(1e-6, table["value"].max() or 0.0))
    # three decades, more where the largest value leaves less than two of them above 0.1 %
    floor = min(-3, math.floor(top) - 2)
    # of a head without a number, the maximum would be the other
    shade = pl.when(pl.col("value").is_not_null()).then(pl.max_horizontal("value", pl.lit(10.0**floor)).log10())
    table = table.with_columns(shade=shade)
    marks = [factor * 10.0**exponent for exponent in range(floor, math.ceil(top) + 1) for factor in (1, 3)]
    labels = [f"{100 * mark:,.6g} %" for mark in marks]
    bar = colour_bar("degradation") | {"tickvals": [math.log10(mark) for mark in marks]}
    bar["ticktext"] = [f"≤ {labels[0]}", *labels[1:]]
    axis = {"colorscale": SEQUENTIAL, "cmin": floor, "cmax": top, "colorbar": bar}
    return heat_maps(by_group(table, groups), names, heads_of(table, names), timesteps, axis, "shade", "note")


def degradation_confirmed(confirmed: pl.DataFrame, names: Names, groups: Sequence[str], headline: str) -> list[View]:
    """The selected heads on the confirm split, a panel per group, a series per fill."""
    heads = confirmed.filter(pl.col("fill") == headline).group_by("site", "head").agg(pl.col("value").max())
    heads = heads.sort(["value", "site", "head"], descending=[True, False, False], nulls_last=True)
    order = list(heads.select("site", "head").iter_rows())
    titles = [names.head(site, head) for site, head in order]
    views = []
    for label, column, low, high, axis, write, tick in _MEASURES:
        panels = []
        for group in groups:
            rows = [read_as(row, column, low, high) for row in confirmed.filter(pl.col("group") == group).to_dicts()]
            if rows:
                series = of_fills(rows, lambda row: (row["site"], row["head"]), order, titles, headline, write)
                panels.append((group, titles, series))
        if panels:
            views.append(View(label, dot_panels(panels, axis, row_height=34, share_rows=True, tick_format=tick)))
    return views


def ranking_table(ranking: pl.DataFrame, names: Names) -> Table:
    """Every ablated head's degradation on the split that ranks them."""
    rows = [
        [
            *subject(row, names),
            str(row["rank"]),
            *estimate(row, percent),
            *estimate(row, significant, "absolute"),
            str(row["sources"]),
        ]
        for row in ranking.iter_rows(named=True)
    ]
    columns = [*SUBJECT, ("rank", True), ("relative", True), INTERVAL, ("absolute", True), INTERVAL]
    caption = "Degradation of every ablated head, mean over timesteps; exploratory."
    return Table(caption, [*columns, ("sources", True)], rows)


def confirm_table(confirmed: pl.DataFrame, names: Names) -> Table:
    """Every tested head, group and fill."""
    rows = [
        [
            *subject(row, names),
            percent(row["discover"]),
            *estimate(row, percent),
            percent(row["fill_error"]),
            *estimate(row, significant, "absolute"),
            probability(row["p_value"]),
            probability(row["p_maxt"]),
            str(row["sources"]),
        ]
        for row in confirmed.iter_rows(named=True)
    ]
    columns = [*SUBJECT, ("discover", True), ("confirm", True), INTERVAL, ("error of the fill", True)]
    columns += [("absolute", True), INTERVAL, ("p", True), ("corrected p", True), ("sources", True)]
    return Table("Degradation of the selected heads on the confirm split.", columns, rows)


def timesteps_table(timesteps: pl.DataFrame, names: Names, groups: Sequence[str]) -> Table:
    """The tested edits at every timestep, with the headline fill."""
    steps = sorted(timesteps["timestep"].unique().to_list())
    rows = []
    for group in groups:
        of_group = timesteps.filter(pl.col("group") == group)
        for (kind, edit), part in of_group.group_by("kind", "edit", maintain_order=True):
            found = {row["timestep"]: row for row in part.iter_rows(named=True)}
            cells = [
                [*estimate(found[step], percent), probability(found[step]["p_maxt"])] if step in found else ["–"] * 3
                for step in steps
            ]
            rows.append([names.edit(kind, edit), group, *(cell for step in cells for cell in step)])
    columns = [("edit", False), ("group", False)]
    for step in steps:
        columns += [(f"at {step}", True), INTERVAL, ("corrected p", True)]
    return Table(
        "Degradation at every timestep, confirm split; one family per group: all edits at all timesteps.", columns, rows
    )


def variance_table(variance: pl.DataFrame, names: Names, groups: Sequence[str]) -> Table:
    """Where the variance of the degradations comes from."""
    rows = []
    for group in groups:
        for row in variance.filter(pl.col("group") == group).iter_rows(named=True):
            spreads = (row[f"between_{level}"] for level in ("sources", "items", "draws"))
            rows.append(
                [
                    names.edit(row["kind"], row["edit"]),
                    group,
                    *(percent(None if value is None else math.sqrt(value)) for value in spreads),
                    *(percent(row[f"with_{which}_draws"]) for which in ("twice_the", "unlimited")),
                ]
            )
    columns = [("edit", False), ("group", False), ("between sources", True), ("between items of a source", True)]
    columns += [("between draws", True), ("error with twice the draws", True), ("with unlimited draws", True)]
    caption = (
        "Standard deviations of single degradations, and what more draws of noise would leave of the standard error."
    )
    return Table(caption, columns, rows)
