"""What removing several heads together costs: sites, levels, sets, all heads; curves and doses."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from headscope.report.marks import BEFORE, FIRST, SECOND, dots_of, head_notes, of_fills
from headscope.report.naming import Names, percent, plot_text, probability, significant
from headscope.report.panels import Dots, Figure, Line, View, curve_panels, dot_panels
from headscope.report.section import Section
from headscope.report.tables import INTERVAL, Table, estimate
from headscope.study import curves, inference, together
from headscope.study.ablation import headline_fill
from headscope.study.analysis import StudyResult
from headscope.study.edits import KINDS
from headscope.study.inference import is_finding
from headscope.study.interventions import Interventions

_KINDS = {
    "site": "a site",
    "level": "a level",
    "set": "a set",
    "all": "all heads",
    "dose": "a gate",
    "other": "an edit",
}
_VIEWS = (
    ("Sites", ("site", "level")),
    ("Sets", ("set",)),
    ("All heads", ("all",)),
    ("Other edits", ("dose", "other")),
)
_ORDERS = {curves.MOST: (FIRST, "circle"), curves.LEAST: (SECOND, "diamond"), curves.RANDOM: (BEFORE, "square")}


def section(result: StudyResult, names: Names, groups: Sequence[str]) -> Section | None:
    """The section, where sets of heads were edited."""
    found = result.interventions
    sets = found.of_sets() if found else None
    if found is None or sets is None or not len(sets):
        return None
    orders = 0 if found.curves is None else int(found.curves["number"].max() or 0)  # type: ignore[arg-type]
    values: dict[str, Any] = {
        "tested": bool(sets["p_value"].is_not_null().any()),
        "relative": inference.RELATIVE.format(of="loss"),
        "joint_definition": together.JOINT,
        "curve_definition": curves.CURVE.format(orders=orders),
        "dose_definition": curves.DOSE,
        "effects": effects_table(sets, found, names),
        "joint": None if found.joint is None else joint_table(found.joint, names),
        "curves": None if found.curves is None else curves_table(found.curves),
        "doses": None if found.doses is None else doses_table(found.doses),
    }
    figures: dict[str, Any] = {"sets": effects_of_sets(sets, names, groups)}
    if found.joint is not None:
        figures["joint"] = joint_and_sum(found.joint, names, groups)
    if found.curves is not None:
        figures["curves"] = curves_of_groups(found.curves, groups)
    if found.doses is not None:
        figures["doses"] = doses_of_groups(found.doses, groups)
    return Section("together", "Heads together", values, figures)


def effects_of_sets(sets: pl.DataFrame, names: Names, groups: Sequence[str]) -> list[View]:
    """The degradation by every set, a panel per group, a series per fill; a view for each kind of set."""
    headline = headline_fill(sets)
    views = []
    for label, kinds in _VIEWS:
        part = sets.filter(pl.col("kind").is_in(kinds))
        order = _in_order(part, names)
        titles = [names.edit(kind, edit) for kind, edit in order]
        panels = []
        for group in groups:
            rows = part.filter(pl.col("group") == group).to_dicts()
            if rows:
                series = of_fills(rows, lambda row: (row["kind"], row["edit"]), order, titles, headline, percent)
                panels.append((group, titles, series))
        if panels:
            axis = "degradation of the loss"
            views.append(View(label, dot_panels(panels, axis, row_height=34, share_rows=True, tick_format=".3~p")))
    return views


def joint_and_sum(joint: pl.DataFrame, names: Names, groups: Sequence[str]) -> list[View]:
    """Joint minus sum with its interval, and the two beside each other."""
    views = []
    order = _in_order(joint, names)
    titles = [names.edit(kind, edit) for kind, edit in order]
    for label in ("Joint − sum", "Joint and sum"):
        panels = []
        for group in groups:
            rows = {(row["kind"], row["edit"]): row for row in joint.filter(pl.col("group") == group).to_dicts()}
            if not rows:
                continue
            members = [rows.get(edit) for edit in order]
            if label == "Joint − sum":
                dots = dots_of("", members, head_notes(titles, members, percent), names.colour(group))
                filled = [row is not None and is_finding(row["p_maxt"]) for row in members]
                panels.append((group, titles, [replace(dots, filled=filled)]))
                continue
            series = []
            for name, text, colour, symbol in (
                ("joint", "together", FIRST, "circle"),
                ("sum", "sum of single heads", SECOND, "diamond"),
            ):
                values = [row and row[name] for row in members]
                notes = [
                    f"<b>{plot_text(title)}</b>, {text}<br>{percent(v)}"
                    for title, v in zip(titles, values, strict=True)
                ]
                empty = [None] * len(values)
                series.append(Dots(text, values, empty, empty, [True] * len(values), notes, colour, symbol))
            panels.append((group, titles, series))
        if panels:
            figure = dot_panels(panels, "degradation of the loss", share_rows=True, tick_format=".3~p")
            views.append(View(label, figure))
    return views


def curves_of_groups(table: pl.DataFrame, groups: Sequence[str]) -> Figure | None:
    """Degradation against the number of removed heads, a panel per group, a line per order."""
    panels = []
    for group in groups:
        rows = table.filter((pl.col("group") == group) & (pl.col("number") == 0))
        if not len(rows):
            continue
        lines = []
        for order, (colour, symbol) in _ORDERS.items():
            members = rows.filter(pl.col("order") == order).sort("count").to_dicts()
            notes = head_notes([f"{order}, {row['count']} heads" for row in members], members, percent)
            band = None
            if order == curves.RANDOM:
                each = table.filter((pl.col("group") == group) & (pl.col("order") == order) & (pl.col("number") > 0))
                spread = each.group_by("count").agg(low=pl.col("value").min(), high=pl.col("value").max()).sort("count")
                band = spread["low"].to_list(), spread["high"].to_list()
            if members:
                counts = [row["count"] for row in members]
                lines.append(Line(counts, dots_of(order, members, notes, colour, symbol), band))
        panels.append((group, lines))
    return curve_panels(panels, "heads removed", "degradation of the loss", logarithmic=True) if panels else None


def doses_of_groups(table: pl.DataFrame, groups: Sequence[str]) -> Figure | None:
    """Degradation against the gate, a panel per group, a line per set."""
    panels = []
    colours = ((FIRST, "circle"), (SECOND, "diamond"), (BEFORE, "square"))
    for group in groups:
        rows = table.filter(pl.col("group") == group)
        lines = []
        for index, edit in enumerate(rows["edit"].unique(maintain_order=True)):
            colour, symbol = colours[index % len(colours)]
            members = rows.filter(pl.col("edit") == edit).to_dicts()
            # at 1 nothing is edited
            nothing = members[0] | {"gate": 1.0, "value": 0.0, "low": None, "high": None}
            members = sorted([*members, nothing], key=lambda row: row["gate"])
            notes = head_notes([f"{edit}, gate {row['gate']:g}" for row in members], members, percent)
            gates = [row["gate"] for row in members]
            lines.append(Line(gates, dots_of(edit, members, notes, colour, symbol)))
        if lines:
            panels.append((group, lines))
    return curve_panels(panels, "gate", "degradation of the loss") if panels else None


def effects_table(sets: pl.DataFrame, found: Interventions, names: Names) -> Table:
    """Every set, group and fill."""
    sizes = {edit.name: len(edit.heads) for edit in found.edits if edit.kind != "head"}
    rows = [
        [
            names.edit(row["kind"], row["edit"]),
            _KINDS.get(row["kind"], row["kind"]),
            str(sizes.get(row["edit"], "–")),
            row["group"],
            row["fill"],
            *estimate(row, percent),
            percent(row["fill_error"]),
            *estimate(row, significant, "absolute"),
            probability(row["p_value"]),
            probability(row["p_maxt"]),
            str(row["sources"]),
        ]
        for row in _sorted(sets, names)
    ]
    columns = [("edit", False), ("what", False), ("heads", True), ("group", False), ("fill", False)]
    columns += [("degradation", True), INTERVAL, ("error of the fill", True), ("absolute", True), INTERVAL]
    columns += [("p", True), ("corrected p", True), ("sources", True)]
    return Table("Degradation with heads edited together, mean over timesteps.", columns, rows)


def joint_table(joint: pl.DataFrame, names: Names) -> Table:
    """Every set whose heads were removed alone, too."""
    rows = [
        [
            names.edit(row["kind"], row["edit"]),
            str(row["heads"]),
            row["group"],
            row["split"],
            percent(row["joint"]),
            percent(row["sum"]),
            *estimate(row, percent),
            probability(row["p_value"]),
            probability(row["p_maxt"]),
            str(row["sources"]),
        ]
        for row in _sorted(joint, names)
    ]
    columns = [("edit", False), ("heads", True), ("group", False), ("split", False), ("together", True)]
    columns += [("sum of heads", True), ("together − sum", True), INTERVAL, ("p", True), ("corrected p", True)]
    return Table("Joint effects against the sum of single heads.", [*columns, ("sources", True)], rows)


def curves_table(table: pl.DataFrame) -> Table:
    rows = [
        [row["group"], row["order"], str(row["count"]), *estimate(row, percent), str(row["sources"])]
        for row in table.filter(pl.col("number") == 0).sort("group", "order", "count").iter_rows(named=True)
    ]
    columns = [("group", False), ("order", False), ("heads removed", True), ("degradation", True), INTERVAL]
    return Table("More and more heads removed, confirm split.", [*columns, ("sources", True)], rows)


def doses_table(table: pl.DataFrame) -> Table:
    rows = [
        [row["group"], row["edit"], f"{row['gate']:g}", *estimate(row, percent), str(row["sources"])]
        for row in table.sort("group", "edit", "gate").iter_rows(named=True)
    ]
    columns = [("group", False), ("set", False), ("gate", True), ("degradation", True), INTERVAL, ("sources", True)]
    return Table("Heads turned down by degrees, confirm split.", columns, rows)


def _in_order(table: pl.DataFrame, names: Names) -> list[tuple[str, str]]:
    """The edits of a table: kinds in their order, sites as they are executed, the rest as they were planned."""
    edits = list(dict.fromkeys(table.select("kind", "edit").iter_rows()))
    return sorted(edits, key=lambda edit: (KINDS.index(edit[0]), names.place(edit[1]), edits.index(edit)))


def _sorted(table: pl.DataFrame, names: Names) -> list[dict[str, Any]]:
    order = _in_order(table, names)
    rows = table.to_dicts()
    return sorted(rows, key=lambda row: (order.index((row["kind"], row["edit"])), names.group_place(row["group"])))
