"""Importance from gradients."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from headscope.report.marks import dots_of, estimate_note, head_notes, read_as
from headscope.report.naming import Names, interval, number, percent, plot_text, significant
from headscope.report.panels import View, dot_panels
from headscope.report.scatter import Points, scatter_views
from headscope.report.section import Section
from headscope.report.tables import INTERVAL, SUBJECT, Table, estimate, subject
from headscope.study import attributions
from headscope.study.ablation import FILLS, headline_fill
from headscope.study.analysis import StudyResult
from headscope.study.attributions import TERMS, Attributions

_TITLES = {"value": "Relative", "importance": "g + c", "g": "g", "c": "c", "integrated": "Integrated"}


def section(result: StudyResult, names: Names, groups: Sequence[str]) -> Section | None:
    """The section, where heads were attributed to."""
    found = result.attributions
    if found is None:
        return None
    fill = headline_fill(found.heads)
    terms = [name for name in TERMS if name in found.heads.columns]
    values = {
        "terms": [(_TITLES[name], TERMS[name]) for name in terms],
        "share": attributions.SHARE,
        "means": attributions.MEANS,
        "agreement_definition": attributions.AGREEMENT,
        "fill": fill,
        "fills": FILLS,
        "heads": heads_table(found.heads, terms, names),
        "agreement": None if found.agreement is None else agreement_table(found.agreement),
    }
    figures = {
        "attribution_ranking": ranking(found.heads, terms, names, groups, fill),
        "attribution_measured": against_measured(found, names, groups, fill),
    }
    return Section("attribution", "Attributions", values, figures)


def ranking(
    heads: pl.DataFrame, terms: Sequence[str], names: Names, groups: Sequence[str], fill: str, most: int = 20
) -> list[View]:
    """The most important heads of every group, a view for every number."""
    table = heads.filter(pl.col("fill") == fill)
    views = []
    for column in ("value", *terms):
        low, high = ("low", "high") if column == "value" else (f"{column}_low", f"{column}_high")
        write, tick = (percent, ".3~p") if column == "value" else (significant, None)
        panels = []
        for group in groups:
            rows = table.filter(pl.col("group") == group)
            rows = rows.sort([column, "site", "head"], descending=[True, False, False], nulls_last=True)
            members = [read_as(row, column, low, high) for row in rows.head(most).to_dicts()]
            if members:
                titles = [names.head(row["site"], row["head"]) for row in members]
                notes = head_notes(titles, members, write)
                panels.append((group, titles, [dots_of("", members, notes, names.colour(group), names.symbol(group))]))
        axis = "estimated degradation of the loss" if column == "value" else f"{_TITLES[column]}, units of the loss"
        views.append(View(_TITLES[column], dot_panels(panels, axis, tick_format=tick)))
    return views


def against_measured(found: Attributions, names: Names, groups: Sequence[str], fill: str) -> list[View]:
    """Estimated against measured degradation, a point per head."""
    if found.measured is None or found.agreement is None:
        return []
    key = ["group", "fill", "site", "head"]
    measured = found.measured.select(*key, measured="value", measured_low="low", measured_high="high")
    both = found.heads.join(measured, on=key, how="inner").filter(pl.col("fill") == fill)
    both = both.drop_nulls(["value", "measured"])
    panels = []
    for group in groups:
        rows = both.filter(pl.col("group") == group).to_dicts()
        if not rows:
            continue
        notes = []
        for row in rows:
            effect = f"{percent(row['measured'])} ({interval(row['measured_low'], row['measured_high'], percent)})"
            head = plot_text(names.head(row["site"], row["head"]))
            notes.append(f"<b>{head}</b><br>estimated: {estimate_note(row, percent)}<br>measured: {effect}")
        estimated, effects = ([row[name] for row in rows] for name in ("value", "measured"))
        agreed = found.agreement.filter((pl.col("group") == group) & (pl.col("fill") == fill))["value"].to_list()
        title = f"{group}, Spearman {number(agreed[0], 2)}" if agreed else group
        panels.append(Points(title, estimated, effects, [False] * len(rows), notes, names.colour(group)))
    return scatter_views(panels, "estimated from gradients", "measured by removal", percent=True)


def heads_table(heads: pl.DataFrame, terms: Sequence[str], names: Names) -> Table:
    """Every head's importance and its terms."""
    rows = []
    for row in heads.iter_rows(named=True):
        cells: list[Any] = [*subject(row, names), str(row["rank"]), *estimate(row, percent)]
        for name in terms:
            cells += estimate(row, significant, name)
        rows.append([*cells, str(row["sources"])])
    columns = [*SUBJECT, ("rank", True), ("relative", True), INTERVAL]
    for name in terms:
        columns += [(_TITLES[name], True), INTERVAL]
    caption = "Importance of every head, mean over timesteps; exploratory."
    return Table(caption, [*columns, ("sources", True)], rows)


def agreement_table(agreement: pl.DataFrame) -> Table:
    """How the estimates agree with what was measured."""
    rows = []
    for row in agreement.iter_rows(named=True):
        halves = [number(row[name], 2) for name in ("across", "within_first", "within_second")]
        found = [number(row["value"]), interval(row["low"], row["high"])]
        rows.append([row["group"], row["fill"], *found, *halves, str(row["heads"]), str(row["sources"])])
    columns = [("group", False), ("fill", False), ("Spearman", True), INTERVAL, ("estimate against measurement", True)]
    columns += [("estimate with itself", True), ("measurement with itself", True), ("heads", True), ("sources", True)]
    return Table("Estimated against measured degradation; the middle columns are between halves.", columns, rows)
