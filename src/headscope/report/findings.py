"""The sentences of the report, each computed from the numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

from headscope.report.naming import Names, fitted, interval, percent, probability
from headscope.report.sections.contrast import answer
from headscope.report.sections.controls import summary
from headscope.study.ablation import headline_fill
from headscope.study.analysis import StudyResult
from headscope.study.contrast import Comparison
from headscope.study.entropy import query_groups

_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Tile:
    """One large number at the top of the page."""

    value: str
    label: str
    detail: str


def tiles(result: StudyResult, names: Names) -> list[Tile]:
    """The few numbers a reader should leave with."""
    found = []
    if result.contrast:
        found += _contrast_tile(result, result.contrast)
    top = _largest(result)
    if top:
        found.append(
            Tile(
                percent(top["value"]),
                f"more loss on {top['group']} without {names.head(top['site'], top['head'])}",
                f"95 % interval {interval(top['low'], top['high'], percent)}; {top['sources']} confirm sources",
            )
        )
    confirmed = _confirmed(result)
    if confirmed is not None:
        tested = _headline(confirmed).filter(pl.col("p_maxt").is_not_null())
        if len(tested):
            raising = tested.filter((pl.col("p_maxt") < _SIGNIFICANT) & (pl.col("value") > 0))
            label = "removals of a selected head raise the loss on images that had no part in its selection"
            found.append(Tile(f"{len(raising)} of {len(tested)}", label, "each with a corrected p < 0.05"))
    if not found and result.entropy_groups is not None:
        for row in result.entropy_groups.filter(pl.col("timestep").is_null()).head(3).iter_rows(named=True):
            detail = f"{_interval(row)}; {_sources(row['sources'])}"
            found.append(Tile(_value(row), f"normalised entropy on {row['group']}", detail))
    return found


def findings(result: StudyResult, names: Names) -> list[str]:
    """Sentences for the top of the page, strongest design first."""
    sentences = []
    if result.contrast:
        sentences += _contrast_sentences(result.contrast, names)
        beside = summary(result.controls)
        sentences += [f"Controls of that comparison. {beside}"] if beside else []
    if result.entropy_heads is not None:
        sentences += _spread_sentence(result, names)
    if _confirmed(result) is not None:
        sentences += _confirm_sentences(result, names)
    if result.ablation_ranking is not None:
        sentences += _ranking_sentences(result, names)
    if result.generation_ranking is not None:
        sentences += _distance_sentences(result.generation_ranking, names)
    return sentences


def _contrast_tile(result: StudyResult, contrast: Comparison) -> list[Tile]:
    """How many heads differ, where all of them together do; beside it what random halves of a group give."""
    omnibus, tested = contrast.omnibus, contrast.heads.filter(pl.col("p_maxt").is_not_null())
    if omnibus["p_value"] is None or omnibus["p_value"] >= _SIGNIFICANT or not len(tested):
        return []
    halves = [made.comparison for made in result.controls if made.kind == "halves" and made.comparison is not None]
    beside = f"; in random halves of one group {_pair([len(half.different) for half in halves])}" if halves else ""
    return [
        Tile(
            f"{len(contrast.different)} of {len(tested)}",
            f"heads spread their attention differently on {contrast.first} and on {contrast.second}",
            f"corrected p < 0.05 (max-t), all heads at once p = {probability(omnibus['p_value'])}{beside};"
            f" {_pair(contrast.sources)} confirm sources",
        )
    ]


def _contrast_sentences(contrast: Comparison, names: Names) -> list[str]:
    sentences = [
        f"Entropy of attention on {contrast.first} (natural) and {contrast.second} (synthetic). {answer(contrast)}"
    ]
    found = contrast.different.sort(pl.col("value").abs(), descending=True)
    if len(found):
        row = found.row(0, named=True)
        sentences.append(
            f"Of the heads that differ, {names.head(row['site'], row['head'])} differs most: {contrast.first} minus"
            f" {contrast.second} {_value(row)} nats ({_interval(row)}, corrected p = {probability(row['p_maxt'])},"
            f" {_pair(row['sources'])} confirm sources)."
        )
    return sentences


def _spread_sentence(result: StudyResult, names: Names) -> list[str]:
    assert result.entropy_heads is not None
    overall = result.entropy_heads.filter(pl.col("timestep").is_null() & (pl.col("measure") == "normalised"))
    overall = overall.filter(pl.col("query_group") == query_groups(overall)[0])
    group = result.contrast.first if result.contrast else result.groups[0]
    rows = overall.filter(pl.col("group") == group)
    rows = (rows if len(rows) else overall).drop_nulls("value").sort(["value", "site", "head"])
    if len(rows) < 2:
        return []
    first, last = rows.row(0, named=True), rows.row(-1, named=True)
    return [
        f"Across the {len(rows)} heads, on {last['group']} and averaged over timesteps, normalised entropy runs from"
        f" {_value(first)} at {names.head(first['site'], first['head'])} ({_interval(first)}) to"
        f" {_value(last)} at {names.head(last['site'], last['head'])} ({_interval(last)});"
        f" {_sources(last['sources'])}; the extremes of many, so exploratory."
    ]


def _confirm_sentences(result: StudyResult, names: Names) -> list[str]:
    confirmed = _confirmed(result)
    assert confirmed is not None
    table = _headline(confirmed).drop_nulls("value")
    fill = headline_fill(confirmed)
    sentences = []
    for (group,), rows in table.group_by("group", maintain_order=True):
        row = rows.sort("value", descending=True).row(0, named=True)
        tested = (
            "exploratory, too few sources"
            if row["p_maxt"] is None
            else f"corrected p = {probability(row['p_maxt'])}, {_sources(row['sources'])}"
        )
        discover = "" if row["discover"] is None else f"; {percent(row['discover'])} where it was selected"
        change = "raises" if row["value"] >= 0 else "lowers"
        size, bounds = percent(abs(row["value"])), interval(row["low"], row["high"], percent)
        place = "the largest increase" if row["value"] >= 0 else "the smallest decrease, and none raises it,"
        sentences.append(
            f"On {group}, removing {names.head(row['site'], row['head'])} ({fill} fill) {change} the denoising loss by"
            f" {size} on the confirm split (95 % interval {bounds}; {tested}{discover}); it is {place} among the"
            f" {len(rows)} heads tested."
        )
    return sentences


def _ranking_sentences(result: StudyResult, names: Names) -> list[str]:
    assert result.ablation_ranking is not None
    table = _headline(result.ablation_ranking).drop_nulls("value")
    fill = headline_fill(result.ablation_ranking)
    sentences = []
    for (group,), rows in table.group_by("group", maintain_order=True):
        large = rows.filter(pl.col("value") > 0.05)
        top = rows.sort("value", descending=True).row(0, named=True)
        sentences.append(
            f"On {group}, {len(large)} of {len(rows)} heads raise the loss by more than 5 % when removed alone"
            f" ({fill} fill); the median head changes it by {percent(rows['value'].median())}, the first,"
            f" {names.head(top['site'], top['head'])}, by {percent(top['value'])} ({_interval(top, write=percent)};"
            f" exploratory ranking, {_sources(top['sources'])})."
        )
    return sentences


def _distance_sentences(ranking: pl.DataFrame, names: Names) -> list[str]:
    sentences = []
    fill = headline_fill(ranking)
    for (group,), rows in _headline(ranking).group_by("group", maintain_order=True):
        row = rows.row(0, named=True)
        sentences.append(
            f"On {group}, the drawn image moves most without {names.head(row['site'], row['head'])} ({fill} fill): mean"
            f" squared pixel difference {_value(row)} ({_interval(row)}; exploratory, {_sources(row['sources'])})."
        )
    return sentences


def _confirmed(result: StudyResult) -> pl.DataFrame | None:
    """The effects of the single heads that the confirm split tests."""
    heads = result.interventions.of_heads() if result.interventions else None
    return heads if heads is not None and len(heads) else None


def _headline(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("fill") == headline_fill(table))


def _largest(result: StudyResult) -> dict | None:
    """The largest tested effect on the confirm split."""
    confirmed = _confirmed(result)
    if confirmed is None:
        return None
    rows = _headline(confirmed).filter(pl.col("p_maxt").is_not_null() & (pl.col("value") > 0))
    return rows.sort("value", descending=True).row(0, named=True) if len(rows) else None


def _value(row: dict) -> str:
    return fitted((row["low"], row["high"]))(row["value"])


def _interval(row: dict, write: Callable[..., str] | None = None) -> str:
    low, high = row["low"], row["high"]
    return "no interval" if low is None else f"95 % interval {interval(low, high, write or fitted((low, high)))}"


def _pair(sources: Sequence[int]) -> str:
    return " and ".join(map(str, sources))


def _sources(count: int) -> str:
    return f"{count} source" if count == 1 else f"{count} sources"
