"""The page of two runs compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from headscope._files import local_path
from headscope.report.comparison.findings import findings, tiles
from headscope.report.comparison.tables import clean_table, head_table, rank_table, set_table, site_table
from headscope.report.marks import FIRST
from headscope.report.naming import (
    Names,
    fitted,
    interval,
    listed,
    number,
    percent,
    plot_text,
    probability,
    significant,
)
from headscope.report.panels import View
from headscope.report.rendering import write_page
from headscope.report.scatter import Points, scatter_views
from headscope.report.section import Section
from headscope.report.tables import Table
from headscope.study import paired
from headscope.study.compare import Comparison
from headscope.study.compare import comparison as words
from headscope.study.inference import is_finding

SUMMARY = "Every number is of the same images in both runs, paired by source; differences are run 2 minus run 1."
CAVEATS = (
    "The unit is the source image. Intervals and tests say what other images of these groups would show of these two"
    " models. They say nothing about other trainings: two checkpoints of one training run, or one model before and"
    " after a fine-tuning, are not replicates, and a difference between them may be that of any two seeds.",
    "All heads are looked at, none is selected beforehand: read the corrected p (max-t), which holds for a whole family"
    " (all heads of a group and fill). Intervals are not corrected for their number.",
    "A degradation is relative to a model's own clean loss: where the clean losses differ, equal absolute damage is"
    " another percentage. Read the clean losses and the absolute differences beside it.",
)


def write_comparison(
    path: str | Path,
    *,
    title: str,
    comparison: Comparison,
    runs: Sequence[Mapping[str, Any]],
    sites: Sequence[str] = (),
) -> Path:
    """Write the page of two runs compared: one HTML file that opens without a network.

    runs: of both, what was run, in the order to show it. sites: the models', in the order of execution. Returns
    the path.
    """
    path = local_path("path", path)
    groups = list(dict.fromkeys(comparison.groups["group"]))
    names = Names(list(sites), groups)
    return write_page(
        path,
        "comparison.html",
        title=title,
        label="Comparison",
        summary=SUMMARY,
        tiles=tiles(comparison, names),
        findings=findings(comparison, names),
        runs=_side_by_side(runs),
        groups=_groups_table(comparison),
        timesteps=_timesteps_table(comparison),
        differing=_differing_table(comparison),
        sections=[s for s in (_clean(comparison), *_sections(comparison, names)) if s is not None],
        caveats=[*CAVEATS, *_void_caveat(comparison)],
    )


def _sections(comparison: Comparison, names: Names) -> list[Section | None]:
    return [_entropy(comparison, names), _ablation(comparison, names), _attribution(comparison, names)]


def _clean(comparison: Comparison) -> Section | None:
    if comparison.clean is None:
        return None
    return Section(
        "compared_clean", "Clean loss", {"clean": words.CLEAN, "table_of_losses": clean_table(comparison.clean)}
    )


def _entropy(comparison: Comparison, names: Names) -> Section | None:
    if comparison.entropy is None or comparison.entropy_sites is None:
        return None
    values = {
        "entropy": words.ENTROPY,
        "ratio": words.SITE_RATIO,
        "sites": site_table(comparison.entropy_sites, names),
        "heads": head_table(comparison.entropy, names, "Entropy H of every head, nats.", None),
    }
    figure = _scatter(comparison.entropy, names, None, "H, nats")
    return Section("compared_entropy", "Entropy", values, {"entropies": figure})


def _ablation(comparison: Comparison, names: Names) -> Section | None:
    if comparison.heads is None and comparison.sets is None:
        return None
    values: dict[str, Any] = {"degradation": words.DEGRADATION, "ranks_definition": paired.RANKS}
    values |= {"heads": None, "sets": None, "ranks": None}
    figures: dict[str, Any] = {}
    if comparison.heads is not None:
        values["heads"] = head_table(comparison.heads, names, "Degradation of the loss without each head.", percent)
        figures["importances"] = _scatter(comparison.heads, names, percent, "degradation without the head")
    if comparison.sets is not None:
        values["sets"] = set_table(comparison.sets)
    if comparison.ranks is not None:
        ranks = comparison.ranks.filter(pl.col("quantity") == "degradation")
        values["ranks"] = rank_table(ranks) if len(ranks) else None
    return Section("compared_ablation", "Removing heads", values, figures)


def _attribution(comparison: Comparison, names: Names) -> Section | None:
    if comparison.importance is None or comparison.ranks is None:
        return None
    ranks = comparison.ranks.filter(pl.col("quantity") != "degradation")
    values = {
        "ranks_definition": paired.RANKS,
        "ranks": rank_table(ranks),
        "heads": head_table(
            comparison.importance, names, "Attributions of every head, in units of the loss.", significant
        ),
    }
    figures = {"attributions": _scatter(comparison.importance, names, significant, "attribution, units of the loss")}
    return Section("compared_attribution", "Attributions", values, figures)


def _scatter(table: pl.DataFrame, names: Names, write: Any, axis: str) -> list[View]:
    """Run 1 against run 2, a panel per group, and stage, fill or quantity where there are several."""
    labels = [name for name in ("part", "quantity", "fill", "query_group") if name in table.columns]
    labels = [name for name in labels if table[name].n_unique() > 1]
    panels = []
    for key, rows in table.group_by([*labels, "group"], maintain_order=True):
        members = rows.drop_nulls(["first", "second"]).to_dicts()
        if members:
            title = ", ".join([str(key[-1]), *(str(value) for value in key[:-1])])
            panels.append(_points(title, members, names, str(key[-1]), write))
    return scatter_views(panels, f"run 1: {axis}", f"run 2: {axis}", percent=write is percent)


def _points(title: str, rows: list[dict], names: Names, group: str, write: Any) -> Points:
    notes = []
    for row in rows:
        written = write or fitted((row["low"], row["high"]))
        lines = [
            f"{label}: {written(row[name])} ({interval(row[low], row[high], written)})"
            for label, name, low, high in (
                ("run 1", "first", "first_low", "first_high"),
                ("run 2", "second", "second_low", "second_high"),
                ("difference", "value", "low", "high"),
            )
        ]
        corrected = f"<br>corrected p = {probability(row['p_maxt'])}" if row["p_maxt"] is not None else ""
        notes.append(f"<b>{plot_text(names.head(row['site'], row['head']))}</b><br>{'<br>'.join(lines)}{corrected}")
    filled = [is_finding(row["p_maxt"]) for row in rows]
    return Points(
        title,
        [row["first"] for row in rows],
        [row["second"] for row in rows],
        filled,
        notes,
        names.colour(group) if group else FIRST,
    )


def _side_by_side(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    every = dict.fromkeys(name for run in runs for name in run)
    first, second = runs
    return [(name, listed(first.get(name)), listed(second.get(name))) for name in every]


def _groups_table(comparison: Comparison) -> Table:
    staged = _staged(comparison.groups)
    rows = [
        [row["group"], *([row["part"]] if staged else []), str(row["items"]), str(row["sources"]), row["how"]]
        for row in comparison.groups.iter_rows(named=True)
    ]
    stage = [("stage", False)] if staged else []
    columns = [("group", False), *stage, ("items", True), ("sources", True), ("matched", False)]
    return Table("Images that both runs have.", columns, rows)


def _timesteps_table(comparison: Comparison) -> Table:
    shown = comparison.timesteps.select(pl.exclude("part")).unique(maintain_order=True).sort("first")
    rows = [[str(one), str(two), number(ratio, 2)] for one, two, ratio in shown.iter_rows()]
    return Table("Timesteps that are compared.", [("run 1", True), ("run 2", True), ("log-SNR, nats", True)], rows)


def _differing_table(comparison: Comparison) -> Table | None:
    if not comparison.differing:
        return None
    columns = [("what", False), ("run 1", False), ("run 2", False), ("what follows", False)]
    return Table("What one run lacks or has otherwise.", columns, [list(one) for one in comparison.differing])


def _staged(table: pl.DataFrame) -> bool:
    return table["part"].to_list() != [""] * len(table)


def _void_caveat(comparison: Comparison) -> list[str]:
    counts = {name: int(table["void"].sum()) for name, table in comparison.tables().items() if "void" in table.columns}
    found = ", ".join(f"{count:,} ({name.replace('_', ' ')})" for name, count in counts.items() if count)
    if not found:
        return []
    return [
        f"Some numbers are infinite or none at all (NaN): rows {found}. A quantity with one of them has no estimate, no"
        " interval and no test here; it is counted in the tables."
    ]
