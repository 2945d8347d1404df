"""What the lead says of entropies: the comparison of two groups beside its controls."""

import polars as pl

from headscope.report.lead.finding import Finding, Strength, Tile, interval_of, pair, sources_of, value_of
from headscope.report.naming import Names, probability
from headscope.report.sections.contrast import answer
from headscope.study.analysis import StudyResult
from headscope.study.contrast import Comparison, Control
from headscope.study.entropy import query_groups
from headscope.study.inference import is_finding

# the controls that stand beside the comparison, in this order
_BESIDE = {"halves": "halves", "colour": "colour against grey", "matched": "matched contrast", "untrained": "untrained"}


def findings(result: StudyResult, names: Names) -> list[Finding]:
    found = []
    if result.contrast is not None:
        found.append(_omnibus(result.contrast, result.controls))
        found += _head(result.contrast, names)
    return [*found, *_spread(result, names)]


def _omnibus(contrast: Comparison, controls: list[Control]) -> Finding:
    p = contrast.omnibus["p_value"]
    established = is_finding(p)
    sentence = f"Entropy of attention on {contrast.first} and {contrast.second}. {answer(contrast)}"
    beside = _controls(controls)
    tile = None
    tested = contrast.heads.filter(pl.col("p_maxt").is_not_null())
    if established and p is not None and len(tested):
        halves = [one.comparison for one in controls if one.kind == "halves" and one.comparison is not None]
        control = f"; random halves of one group: {pair([len(one.different) for one in halves])}" if halves else ""
        tile = Tile(
            f"{len(contrast.different)} of {len(tested)}",
            f"heads spread their attention differently on {contrast.first} and on {contrast.second}",
            f"corrected p < 0.05 (max-t){control}; all heads at once p = {probability(p)};"
            f" {pair(contrast.sources)} confirm sources",
        )
    return Finding(Strength.OMNIBUS, f"{sentence}{beside}", established, tile)


def _controls(controls: list[Control]) -> str:
    """The omnibus test of every control, and how many heads differ in it."""
    made = []
    for control in controls:
        if control.kind in _BESIDE and control.comparison is not None:
            p = control.comparison.omnibus["p_value"]
            tested = "not tested" if p is None else f"p = {probability(p)}"
            made.append(f"{control.name}: {tested}, {len(control.comparison.different)} heads")
    return f" Controls, all heads at once: {'; '.join(made)}." if made else " No control of it was observed."


def _head(contrast: Comparison, names: Names) -> list[Finding]:
    """The head that differs most."""
    different = contrast.different.sort(pl.col("value").abs(), descending=True)
    if not len(different):
        return []
    row = different.row(0, named=True)
    sentence = (
        f"Of the heads that differ, {names.head(row['site'], row['head'])} differs most: {contrast.first} minus"
        f" {contrast.second} {value_of(row)} nats ({interval_of(row)}, corrected p = {probability(row['p_maxt'])},"
        f" {pair(row['sources'])} confirm sources)."
    )
    return [Finding(Strength.OMNIBUS, sentence, True)]


def _spread(result: StudyResult, names: Names) -> list[Finding]:
    """The range of entropies over heads, and the groups' means."""
    if result.entropy_heads is None or result.entropy_groups is None:
        return []
    means = result.entropy_groups.filter(pl.col("timestep").is_null()).drop_nulls("value").head(3)
    tiles = [
        Tile(value_of(row), f"normalised entropy on {row['group']}, mean over heads; exploratory",
             f"{interval_of(row)}; {sources_of(row['sources'])}")
        for row in means.iter_rows(named=True)
    ]  # fmt: skip
    overall = result.entropy_heads.filter(pl.col("timestep").is_null() & (pl.col("measure") == "normalised"))
    overall = overall.filter(pl.col("query_group") == query_groups(overall)[0])
    group = result.contrast.first if result.contrast else result.groups[0]
    rows = overall.filter(pl.col("group") == group)
    rows = (rows if len(rows) else overall).drop_nulls("value").sort(["value", "site", "head"])
    if len(rows) < 2:
        return []
    first, last = rows.row(0, named=True), rows.row(-1, named=True)
    sentence = (
        f"Across the {len(rows)} heads, on {last['group']} and averaged over timesteps, normalised entropy runs from"
        f" {value_of(first)} at {names.head(first['site'], first['head'])} ({interval_of(first)}) to"
        f" {value_of(last)} at {names.head(last['site'], last['head'])} ({interval_of(last)});"
        f" {sources_of(last['sources'])}; the extremes of many, so exploratory."
    )
    return [Finding(Strength.DESCRIPTION, sentence, tile=tiles[0] if tiles else None)]
