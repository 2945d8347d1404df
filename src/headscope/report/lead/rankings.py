"""What the lead says of rankings: all heads were looked at, nothing was tested."""

import polars as pl

from headscope.report.lead.finding import Finding, Strength, Tile, clear, in_order, interval_of, sources_of, value_of
from headscope.report.naming import Names, interval, number, percent
from headscope.study.ablation import headline_fill
from headscope.study.analysis import StudyResult
from headscope.study.attributions import Attributions

_LARGE = 0.05


def findings(result: StudyResult, names: Names) -> list[Finding]:
    found = []
    if result.ablation_ranking is not None:
        found += _ablations(in_order(result.ablation_ranking, names), names)
    if result.attributions is not None:
        found += _attributions(result.attributions, names)
    if result.generation_ranking is not None:
        found += _distances(in_order(result.generation_ranking, names), names)
    return found


def _ablations(ranking: pl.DataFrame, names: Names) -> list[Finding]:
    table = _headline(ranking).drop_nulls("value")
    made = []
    for (group,), rows in table.group_by("group", maintain_order=True):
        ranked = rows.sort("value", descending=True)
        top = ranked.row(0, named=True)
        large = len(rows.filter(pl.col("value") > _LARGE))
        head = names.head(top["site"], top["head"])
        sentence = (
            f"On {group}, {large} of {len(rows)} heads raise the loss by more than 5 % when removed alone"
            f" ({top['fill']} fill); the median head changes it by {percent(rows['value'].median())}, the first,"
            f" {head}, by {percent(top['value'])} ({interval_of(top, percent)}; exploratory ranking,"
            f" {sources_of(top['sources'])})."
        )
        void = len(_headline(ranking).filter((pl.col("group") == group) & pl.col("value").is_null()))
        if void:
            sentence += f" {void} more heads are void: losses without them are not finite."
        detail = f"{interval_of(top, percent)}; the largest of {len(rows)} heads; {sources_of(top['sources'])}"
        tile = Tile(percent(top["value"]), f"more loss on {group} without {head}; exploratory", detail)
        made.append(_finding(sentence, tile, top))
    return made


def _attributions(found: Attributions, names: Names) -> list[Finding]:
    made = []
    for (group,), rows in (
        in_order(_headline(found.heads), names).drop_nulls("value").group_by("group", maintain_order=True)
    ):
        top = rows.sort("value", descending=True).row(0, named=True)
        head = names.head(top["site"], top["head"])
        large = len(rows.filter(pl.col("value") > _LARGE))
        sentence = (
            f"By gradients, on {group}, {large} of {len(rows)} heads would raise the loss by more than 5 % if removed"
            f" ({top['fill']} fill); the first, {head}, by {percent(top['value'])} ({interval_of(top, percent)}; an"
            f" estimate, exploratory, {sources_of(top['sources'])})."
        )
        agreed = _agreement(found, str(group), top["fill"])
        detail = f"{interval_of(top, percent)}; the largest of {len(rows)} heads; {sources_of(top['sources'])}"
        label = f"more loss on {group} without {head}, estimated from gradients; exploratory"
        made.append(_finding(f"{sentence}{agreed}", Tile(percent(top["value"]), label, detail), top))
    return made


def _agreement(found: Attributions, group: str, fill: str) -> str:
    """How the estimates agree with what was measured."""
    if found.agreement is None:
        return ""
    rows = found.agreement.filter((pl.col("group") == group) & (pl.col("fill") == fill)).drop_nulls(["value", "low"])
    if not len(rows):
        return ""
    row = rows.row(0, named=True)
    bounds = interval(row["low"], row["high"], lambda value: number(value, 2))
    if row["low"] <= 0 <= row["high"]:
        return f" No agreement with measured effects was established (Spearman 95 % interval {bounds})."
    return (
        f" They rank heads as removing them does with Spearman {number(row['value'], 2)} (95 % interval {bounds};"
        f" between halves of the images {number(row['across'], 2)}, each with itself {number(row['within_first'], 2)}"
        f" and {number(row['within_second'], 2)})."
    )


def _distances(ranking: pl.DataFrame, names: Names) -> list[Finding]:
    made = []
    for (group,), rows in _headline(ranking).drop_nulls("value").group_by("group", maintain_order=True):
        row = rows.row(0, named=True)
        head = names.head(row["site"], row["head"])
        sentence = (
            f"On {group}, the drawn image moves most without {head} ({row['fill']} fill): mean squared pixel difference"
            f" {value_of(row)} ({interval_of(row)}; exploratory, {sources_of(row['sources'])})."
        )
        detail = f"{interval_of(row)}; the largest of {len(rows)} heads; {sources_of(row['sources'])}"
        label = f"mean squared pixel difference on {group} without {head}; exploratory"
        made.append(_finding(sentence, Tile(value_of(row), label, detail), row))
    return made


def _finding(sentence: str, tile: Tile, row: dict) -> Finding:
    return Finding(Strength.EXPLORATORY, sentence, tile=tile if clear(row) else None)


def _headline(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("fill") == headline_fill(table))
