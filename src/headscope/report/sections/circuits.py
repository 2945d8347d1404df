"""Which heads are enough: circuits, how faithful they are, and what flows between their heads."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import polars as pl
from markupsafe import Markup

from headscope.report.circuit_picture import Edge, Node, circuit_picture
from headscope.report.marks import BEFORE, FIRST, SECOND, by_group, dots_of, head_notes
from headscope.report.naming import Names, interval, number, percent, probability
from headscope.report.panels import Dots, Figure, Line, View, curve_panels, dot_panels
from headscope.report.section import Section
from headscope.report.tables import INTERVAL, Table, estimate
from headscope.study.analysis import StudyResult
from headscope.study.circuits import Circuits
from headscope.study.circuits.analysis import EDGES, OVERLAP
from headscope.study.circuits.faithfulness import COMPLETENESS, FAITHFULNESS, LOSS, MINIMALITY
from headscope.study.circuits.pairs import PAIRS
from headscope.study.inference import is_finding
from headscope.study.roles.naming import NONE
from headscope.sweep.plan.config import SweepConfig

_DEFINITIONS = {
    "faithfulness_definition": FAITHFULNESS,
    "completeness_definition": COMPLETENESS,
    "minimality_definition": MINIMALITY,
    "pairs_definition": PAIRS,
    "overlap_definition": OVERLAP,
    "edges_definition": EDGES,
}
# what circuits are searched for, unless a sweep says otherwise
TARGET = SweepConfig.faithfulness
# the methods of the curves, in the order they are drawn; random ones are a band
_METHODS = {
    "greedy": (FIRST, "circle"),
    "attribution": (SECOND, "diamond"),
    "integrated": ("#7A6FBF", "cross"),
    "magnitude": ("#A34F2B", "triangle-up"),
}
_RANDOM = "random"
PARTS = {"q": "query", "k": "key", "v": "value", "output": "straight"}
_MEASURES = {"faithfulness": "faithfulness of what is left", "circuit − model": "circuit − model, without both"}
_ABREAST = 3


def section(result: StudyResult, names: Names, groups: Sequence[str]) -> Section | None:
    """The section, where circuits were looked for."""
    found = result.circuits
    if found is None or (found.faithfulness is None and found.refused is None):
        return None
    tables = {
        "faithfulness": _made(faithfulness_table, found.faithfulness, groups),
        "completeness": _made(completeness_table, found.completeness, names, groups),
        "rest": [] if found.completeness is None else rest_sentences(found.completeness, groups),
        "minimality": _made(minimality_table, found.minimality, names, groups),
        "pairs": _made(pairs_table, found.pairs, names, groups),
        "pair_counts": [] if found.pairs is None else pairs_sentences(found.pairs, groups),
        "overlap": _made(overlap_table, found.overlap),
        "edges": _made(edges_table, found.edges, names, groups),
        "curves": _made(curves_table, found.curves, groups),
    }
    figures: dict[str, Any] = {
        "circuit_faithfulness": _made(faithfulness_figure, found.faithfulness, groups),
        "circuit_curves": _made(curves_figure, found.curves, groups),
        "circuit_minimality": _made(minimality_figure, found.minimality, names, groups),
    }
    values: dict[str, Any] = {
        "summary": [sentence for group in groups if (sentence := sentence_of(found, group)) is not None],
        "target": number(TARGET, 1),
        "pictures": [
            (group, Markup(text), _edges_said(found.edges, group))
            for group, text in pictures(result, names, groups).items()
        ],
    }
    return Section("circuits", "Circuits", {**values, **_DEFINITIONS, **tables}, figures)


def pictures(result: StudyResult, names: Names, groups: Sequence[str]) -> dict[str, str]:
    """The picture of every group's circuit, as the text of an SVG file."""
    found = result.circuits
    if found is None or found.nodes is None:
        return {}
    sizes = _heads_of_sites(result, found.nodes)
    drawn = {}
    for group, table in by_group(found.nodes, groups):
        effects = _drops(found.minimality, group)
        roles = _roles(result, group)
        nodes = [
            Node(row["site"], row["head"], effects.get(head), roles.get(head, ""), _node_note(row, effects.get(head)))
            for row in sorted(table.to_dicts(), key=lambda row: (names.place(row["site"]), row["head"]))
            for head in [(row["site"], row["head"])]
        ]
        edges = [] if found.edges is None else [_edge(row) for row in _established(_of(found.edges, group))]
        drawn[group] = circuit_picture(nodes, edges, sizes, names.sites, title=f"The circuit of {group}")
    return drawn


def sentence_of(circuits: Circuits, group: str) -> str | None:
    """The chosen circuit of a group in one sentence."""
    row = chosen_of(circuits, group)
    refused = [] if circuits.refused is None else _of(circuits.refused, group)["reason"].to_list()
    if refused:
        return f"On {group} there is no circuit: {refused[0]}."
    if row is None:
        return None
    if row["value"] is None:
        return f"On {group} the faithfulness of the circuit is void: {row['void']} rows are missing or not finite."
    bounds = interval(row["low"], row["high"], lambda value: number(value, 3))
    return (
        f"On {group} the circuit chosen on discover has {row['size']} {'head' if row['size'] == 1 else 'heads'}; on"
        f" confirm its faithfulness is {number(row['value'], 3)} ({bounds}): {reach_of(row)}."
        f"{_by_prediction(circuits, group)}"
    )


def reach_of(row: dict[str, Any]) -> str:
    """Whether a circuit's faithfulness on confirm reaches what it was chosen for."""
    if row["reaches"] == "clearly":
        return f"it reaches {TARGET:g}"
    if row["reaches"] == "just":
        return f"it reaches {TARGET:g}, which its interval leaves open"
    leaves_open = ", which its interval leaves open" if row["high"] is not None and row["high"] >= TARGET else ""
    return f"it falls short of the {TARGET:g} that it was chosen for{leaves_open}"


def _by_prediction(circuits: Circuits, group: str) -> str:
    rows = _of(circuits.faithfulness, group).filter(pl.col("kind") == "circuit, by prediction").drop_nulls("value")
    if not len(rows):
        return ""
    row = rows.row(0, named=True)
    return f" By the prediction it is {number(row['value'], 3)} ({interval(row['low'], row['high'], _three)})."


def chosen_of(circuits: Circuits, group: str) -> dict[str, Any] | None:
    """The row of the chosen circuit's faithfulness on confirm, by the loss."""
    if circuits.faithfulness is None:
        return None
    rows = _of(circuits.faithfulness, group).filter(pl.col("kind") == "circuit")
    return rows.row(0, named=True) if len(rows) else None


def faithfulness_figure(table: pl.DataFrame, groups: Sequence[str]) -> Figure | None:
    panels = []
    for group, part in by_group(table, groups):
        rows = part.to_dicts()
        labels = [_set_label(row) for row in rows]
        dots = dots_of("", rows, head_notes(labels, rows, _three), FIRST)
        panels.append((group, labels, [dots]))
    return dot_panels(panels, "faithfulness", reference=TARGET, row_height=30) if panels else None


def curves_figure(curves: pl.DataFrame, groups: Sequence[str]) -> list[View]:
    """Faithfulness against the number of heads kept, a line per method, random orders as a band."""
    panels = []
    for group, table in by_group(curves, groups):
        lines = []
        for method, (colour, symbol) in _METHODS.items():
            rows = table.filter(pl.col("method") == method).sort("size").to_dicts()
            notes = head_notes([f"{method}, {row['size']} heads" for row in rows], rows, _three)
            if rows:
                lines.append(Line([row["size"] for row in rows], dots_of(method, rows, notes, colour, symbol)))
        random = table.filter(pl.col("method").str.starts_with(_RANDOM)).drop_nulls("value")
        if len(random):
            spread = random.group_by("size").agg(
                value=pl.col("value").mean(), low=pl.col("value").min(), high=pl.col("value").max(), orders=pl.len()
            )
            # a size at which one of the orders alone was measured has no band
            rows = spread.filter(pl.col("orders") == random["method"].n_unique()).sort("size").to_dicts()
            empty = [None] * len(rows)
            notes = [f"{row['size']} random heads: {_three(row['low'])} to {_three(row['high'])}" for row in rows]
            means = [row["value"] for row in rows]
            dots = Dots("random orders", means, empty, empty, [True] * len(rows), notes, BEFORE, "square", size=5)
            band = [row["low"] for row in rows], [row["high"] for row in rows]
            lines.append(Line([row["size"] for row in rows], dots, band))
        panels.append((group, lines))
    chunks = [panels[start : start + _ABREAST] for start in range(0, len(panels), _ABREAST)]
    return [
        View(
            ", ".join(group for group, _ in chunk),
            curve_panels(chunk, "heads kept", "faithfulness", logarithmic=True, tick_format=None, reference=TARGET),
        )
        for chunk in chunks
    ]


def minimality_figure(table: pl.DataFrame, names: Names, groups: Sequence[str]) -> Figure | None:
    """What the circuit loses without each of its heads."""
    panels = []
    for group, part in by_group(table, groups):
        rows = part.sort("value", descending=True, nulls_last=True).to_dicts()
        labels = [names.head(row["site"], row["head"]) for row in rows]
        dots = dots_of("", rows, head_notes(labels, rows, _three), FIRST)
        panels.append((group, labels, [replace(dots, filled=[row["needed"] for row in rows])]))
    return dot_panels(panels, "faithfulness lost") if panels else None


def faithfulness_table(table: pl.DataFrame, groups: Sequence[str]) -> Table:
    rows = [
        [
            row["set"],
            group,
            row["metric"],
            str(row["size"]),
            *estimate(row, _three),
            row["reaches"] or "–",
            str(row["sources"]),
        ]
        for group, part in by_group(table, groups)
        for row in part.iter_rows(named=True)
    ]
    columns = [
        ("heads kept", False),
        ("group", False),
        ("by", False),
        ("heads", True),
        ("faithfulness", True),
        INTERVAL,
    ]
    columns += [(f"reaches {TARGET:g}", False), ("sources", True)]
    return Table("Faithfulness on the confirm split.", columns, rows)


def _set_label(row: Mapping[str, Any]) -> str:
    by = "" if row["metric"] == LOSS else ", by prediction"
    return row["set"] if str(row["size"]) in row["set"] else f"{row['set']} ({row['size']}){by}"


def curves_table(table: pl.DataFrame, groups: Sequence[str]) -> Table:
    rows = [
        [row["method"], group, str(row["size"]), *estimate(row, _three), str(row["sources"])]
        for group, part in by_group(table, groups)
        for row in part.sort("method", "size").iter_rows(named=True)
    ]
    columns = [("order", False), ("group", False), ("heads kept", True), ("faithfulness", True), INTERVAL]
    return Table("Faithfulness of more and more heads, confirm split.", [*columns, ("sources", True)], rows)


def rest_sentences(table: pl.DataFrame, groups: Sequence[str]) -> list[str]:
    """What is left of every group's model without its circuit."""
    return [
        f"Without its circuit, the other heads of {group} keep {_three(row['value'])}"
        f" ({interval(row['low'], row['high'], _three)}) of what all heads do."
        for group, part in by_group(table.filter(measure="faithfulness").drop_nulls("value"), groups)
        for row in part.iter_rows(named=True)
    ]


def _parts_label(row: Mapping[str, Any], names: Names) -> str:
    """What was removed: heads by their labels."""
    heads = [name.rpartition(" h") for name in row["set"].split(", ")]
    if not all(number.isdecimal() for _, _, number in heads):
        return row["set"]
    return ", ".join(names.head(site, int(number)) for site, _, number in heads)


def completeness_table(table: pl.DataFrame, names: Names, groups: Sequence[str]) -> Table:
    rows = [
        [
            _parts_label(row, names),
            group,
            _MEASURES.get(row["measure"], row["measure"]),
            str(row["size"]),
            *estimate(row, _three),
        ]
        for group, part in by_group(table, groups)
        for row in part.iter_rows(named=True)
    ]
    # the longest last
    rows = [[*row[1:], row[0]] for row in rows]
    columns = [("group", False), ("measure", False), ("heads", True), ("value", True), INTERVAL, ("removed", False)]
    return Table("Completeness, confirm split.", columns, rows)


def minimality_table(table: pl.DataFrame, names: Names, groups: Sequence[str]) -> Table:
    rows = [
        [
            names.head(row["site"], row["head"]),
            group,
            *estimate(row, _three),
            probability(row["p_maxt"]),
            "needed" if row["needed"] else "not established",
        ]
        for group, part in by_group(table, groups)
        for row in part.sort("value", descending=True, nulls_last=True).iter_rows(named=True)
    ]
    columns = [("head", False), ("group", False), ("faithfulness lost", True), INTERVAL, ("corrected p", True)]
    caption = "Minimality: what the circuit loses without each of its heads, confirm split."
    return Table(caption, [*columns, ("verdict", False)], rows)


def pairs_table(table: pl.DataFrame, names: Names, groups: Sequence[str]) -> Table:
    rows = [
        [
            f"{names.head(row['first_site'], row['first_head'])} and"
            f" {names.head(row['second_site'], row['second_head'])}",
            group,
            row["kind"],
            percent(row["first"]),
            percent(row["second"]),
            percent(row["joint"]),
            *estimate(row, percent),
            probability(row["p_maxt"]),
        ]
        for group, part in by_group(table, groups)
        for row in part.iter_rows(named=True)
    ]
    columns = [("heads", False), ("group", False), ("pair", False), ("first alone", True), ("second alone", True)]
    columns += [("together", True), ("together − sum", True), INTERVAL, ("corrected p", True)]
    return Table("Pairs of the circuit's heads, removed together and alone, confirm split.", columns, rows)


def pairs_sentences(table: pl.DataFrame, groups: Sequence[str]) -> list[str]:
    """How many pairs of each group are what."""
    said = []
    for group, part in by_group(table, groups):
        counts = part.group_by("kind").agg(pl.len().alias("count")).sort(["count", "kind"], descending=[True, False])
        listed = ", ".join(f"{count} {kind}" for kind, count in counts.select("kind", "count").iter_rows())
        said.append(f"On {group}, of {len(part)} {'pair' if len(part) == 1 else 'pairs'}: {listed}.")
    return said


def overlap_table(table: pl.DataFrame) -> Table:
    rows = [
        [
            f"{row['first']} and {row['second']}",
            str(row["shared"]),
            number(row["expected_shared"], 2),
            number(row["jaccard"], 2),
            number(row["expected"], 2),
            probability(row["p_value"]),
        ]
        for row in table.iter_rows(named=True)
    ]
    columns = [("circuits", False), ("heads shared", True), ("by chance", True), ("Jaccard index", True)]
    columns += [("by chance", True)]
    return Table("What circuits of two groups share; exploratory.", [*columns, ("p", True)], rows)


def edges_table(table: pl.DataFrame, names: Names, groups: Sequence[str]) -> Table:
    rows = [
        [
            names.head(row["sender_site"], row["sender_head"]),
            "prediction" if row["receiver_site"] is None else names.head(row["receiver_site"], row["receiver_head"]),
            group,
            PARTS.get(row["part"], row["part"]),
            *estimate(row, percent),
            probability(row["p_maxt"]),
            "established" if _is_established(row) else "–",
        ]
        for group, part in by_group(table, groups)
        for row in part.sort(pl.col("value").abs(), descending=True, nulls_last=True).iter_rows(named=True)
    ]
    columns = [("from", False), ("to", False), ("group", False), ("through its", False), ("effect", True), INTERVAL]
    return Table("Edges, by size.", [*columns, ("corrected p", True), ("verdict", False)], rows)


def _edge(row: Mapping[str, Any]) -> Edge:
    receiver = None if row["receiver_site"] is None else (row["receiver_site"], row["receiver_head"])
    note = f"{percent(row['value'])} ({interval(row['low'], row['high'], percent)}), p = {probability(row['p_maxt'])}"
    return Edge((row["sender_site"], row["sender_head"]), receiver, row["part"], row["value"], note)


def _established(edges: pl.DataFrame) -> list[dict[str, Any]]:
    return [row for row in edges.to_dicts() if _is_established(row)]


def _is_established(row: Mapping[str, Any]) -> bool:
    clear = row["low"] is not None and not row["low"] <= 0 <= row["high"]
    return row["value"] is not None and clear and is_finding(row["p_maxt"])


def _edges_said(edges: pl.DataFrame | None, group: str) -> str:
    """How many of the edges that were tested are drawn."""
    if edges is None:
        return "No edges were measured."
    rows = _of(edges, group)
    return f"{len(_established(rows))} of {len(rows)} edges that were measured are established (max-t) and drawn."


def _drops(minimality: pl.DataFrame | None, group: str) -> dict[tuple[str, int], float]:
    if minimality is None:
        return {}
    rows = _of(minimality, group).drop_nulls("value").select("site", "head", "value").rows()
    return {(site, head): value for site, head, value in rows}


def _node_note(row: Mapping[str, Any], drop: float | None) -> str:
    """What the circuit loses without a head, and what the whole model does."""
    words = [] if drop is None else [f"the circuit loses {_three(drop)} of its faithfulness without it"]
    if row.get("value") is not None:
        words.append(f"removing it alone costs {percent(row['value'])} of the loss")
    return "; ".join(words)


def _roles(result: StudyResult, group: str) -> dict[tuple[str, int], str]:
    """The names of a group's heads that have one."""
    if result.roles is None:
        return {}
    rows = _of(result.roles.names, group).filter(pl.col("role") != NONE).select("site", "head", "role").rows()
    return {(site, head): role for site, head, role in rows}


def _heads_of_sites(result: StudyResult, nodes: pl.DataFrame) -> dict[str, int]:
    """The number of heads of every site, as far as the tables tell."""
    counts = dict.fromkeys(result.sites, 0)
    names = None if result.roles is None else result.roles.names
    for table in (result.entropy_heads, result.ablation_ranking, names, nodes):
        if table is not None:
            for site, head in table.select("site", "head").unique().iter_rows():
                counts[site] = max(counts.get(site, 0), head + 1)
    return counts


def _of(table: pl.DataFrame, group: str) -> pl.DataFrame:
    return table.filter(pl.col("group") == group)


def _three(value: float | None) -> str:
    return number(value, 3)


def _made(make, table: pl.DataFrame | None, *rest):
    """What a function makes of a table that has rows."""
    return None if table is None or not len(table) else make(table, *rest)
