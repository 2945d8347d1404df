"""What the comparison of natural and synthetic images is read against."""

from collections.abc import Sequence

import polars as pl

from headscope.report.marks import FIRST
from headscope.report.naming import Names, fitted, interval, probability, significant
from headscope.report.panels import Dots, View, dot_panels
from headscope.report.section import Section
from headscope.report.sections.contrast import chance
from headscope.report.tables import Table
from headscope.study.analysis import StudyResult
from headscope.study.contrast import Control, controls
from headscope.study.inference import is_finding


def section(result: StudyResult, names: Names, groups: Sequence[str]) -> Section | None:
    """The section, where two groups were compared."""
    if not result.controls:
        return None
    made = controls.controls_table(result.controls)
    kinds = dict.fromkeys(control.kind for control in result.controls)
    return Section(
        "controls",
        "Controls",
        {
            "summary": summary(result.controls),
            "kinds": {_KINDS[kind]: controls.CONTROLS[kind] for kind in kinds},
            "omitted": [(control.name, control.omitted) for control in result.controls if control.omitted],
            "controls": controls_table(made),
        },
        {"controls": controls_figure(made)},
    )


_KINDS = {
    "main": "The comparison",
    "halves": "Split halves",
    "colour": "Colour and grey",
    "matched": "Matched contrast",
    "untrained": "Untrained weights",
    "training": "Training images",
}


def summary(made: Sequence[Control]) -> str:
    """In one sentence how many heads differ in the comparison and in every control that was made."""
    counts: dict[str, list[str]] = {}
    for control in made:
        found = control.comparison
        if found is not None and found.heads["p_maxt"].is_not_null().any():
            counts.setdefault(control.kind, []).append(str(len(found.different)))
    others = ((_KINDS[kind].lower(), found) for kind, found in counts.items() if kind != "main")
    beside = ", ".join(f"{name} {' and '.join(found)}" for name, found in others)
    if not beside:
        return ""
    main = f"{counts['main'][0]} in the comparison; " if "main" in counts else ""
    return f"Heads that differ (corrected p < 0.05): {main}{beside}."


def controls_figure(made: pl.DataFrame) -> list[View]:
    """The comparison and its controls: energy distances with what chance gives, pooled ratios with intervals."""
    rows = made.filter(pl.col("omitted").is_null()).to_dicts()
    titles = [row["control"] for row in rows]
    empty = [None] * len(rows)
    nulls = [{"null_mean": row["energy_null_mean"], "null_high": row["energy_null_high"]} for row in rows]
    solid = [is_finding(row["p_omnibus"]) for row in rows]
    notes = [_note(row) for row in rows]
    energy = Dots("observed", [row["energy"] for row in rows], empty, empty, solid, notes, FIRST)
    clear = [row["ratio_low"] is not None and not row["ratio_low"] <= 1 <= row["ratio_high"] for row in rows]
    bounds = ([row[f"ratio_{end}"] for row in rows] for end in ("low", "high"))
    ratio = Dots("", [row["ratio"] for row in rows], *bounds, clear, notes, FIRST)
    axis = "energy distance, all heads and timesteps, standard deviations"
    return [
        View("Energy distance", dot_panels([("", titles, [chance(nulls, notes), energy])], axis, row_height=30)),
        View("Pooled ratio", dot_panels([("", titles, [ratio])], "pooled ratio", reference=1.0, row_height=30)),
    ]


def controls_table(made: pl.DataFrame) -> Table:
    """A row per control; those that couldn't be made are empty."""
    write = fitted(*made.select("ratio_low", "ratio_high").rows())
    cells = []
    for row in made.iter_rows(named=True):
        if row["omitted"] is not None:
            cells.append([row["control"], "not made", *["–"] * 7])
            continue
        different = "–" if row["heads_different"] is None else f"{row['heads_different']} of {row['heads']}"
        cells.append(
            [
                row["control"],
                " and ".join(map(str, row["sources"])) + (", paired" if row["paired"] else ""),
                probability(row["p_omnibus"]),
                significant(row["energy"]),
                significant(row["energy_null_mean"]),
                significant(row["energy_null_high"]),
                different,
                write(row["ratio"]),
                interval(row["ratio_low"], row["ratio_high"], write),
            ]
        )
    columns = [("comparison", False), ("sources", False), ("omnibus p", True), ("energy distance", True)]
    columns += [("mean by chance", True), ("95 % of chance below", True), ("heads that differ", True)]
    columns += [("pooled ratio", True), ("95 % interval", True)]
    return Table("The comparison, and the controls that it is read against.", columns, cells)


def _note(row: dict) -> str:
    different = "" if row["heads_different"] is None else f"; {row['heads_different']} of {row['heads']} heads differ"
    return (
        f"energy distance {significant(row['energy'])}, p = {probability(row['p_omnibus'])}{different}"
        f"<br>pooled ratio {significant(row['ratio'])} ({interval(row['ratio_low'], row['ratio_high'], significant)})"
    )
