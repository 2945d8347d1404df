"""The sentences of the report, each computed from the numbers."""

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from headscope.report.naming import Names, fitted, interval, percent, probability
from headscope.study.ablation import headline_fill
from headscope.study.analysis import StudyResult
from headscope.study.entropy import Contrast, query_groups
from headscope.study.inference import Estimate

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
        found.append(_contrast_tile(result.contrast))
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
        tested = _headline(confirmed).filter(pl.col("p_holm").is_not_null())
        if len(tested):
            raising = tested.filter((pl.col("p_holm") < _SIGNIFICANT) & (pl.col("value") > 0))
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
        sentences += [_contrast_sentence(result.contrast), *_contrast_head_sentence(result.contrast, names)]
    if result.entropy_heads is not None:
        sentences += _spread_sentence(result, names)
    if _confirmed(result) is not None:
        sentences += _confirm_sentences(result, names)
    if result.ablation_ranking is not None:
        sentences += _ranking_sentences(result, names)
    if result.generation_ranking is not None:
        sentences += _distance_sentences(result.generation_ranking, names)
    return sentences


def _contrast_tile(contrast: Contrast) -> Tile:
    one, two = contrast.ratio, contrast.difference
    tested = "exploratory" if two.p_value is None else f"p = {probability(two.p_value)}"
    write = fitted((one.low, one.high))
    return Tile(
        f"× {write(one.value)}",
        f"attention entropy on {contrast.natural} over {contrast.synthetic}",
        f"{_interval(one)}; {tested}; {_pair(one.sources)} confirm sources",
    )


def _contrast_sentence(contrast: Contrast) -> str:
    difference, ratio = contrast.difference, contrast.ratio
    write = fitted((difference.low, difference.high))
    means = (
        f"mean normalised entropy {write(contrast.natural_mean.value)} on {contrast.natural} (natural) and"
        f" {write(contrast.synthetic_mean.value)} on {contrast.synthetic} (synthetic)"
    )
    numbers = (
        f"difference {write(difference.value)} ({_interval(difference)}"
        + (f", p = {probability(difference.p_value)}" if difference.p_value is not None else "")
        + f"), ratio {_value(ratio)} ({_interval(ratio)}), {_pair(difference.sources)} confirm sources"
    )
    if difference.exploratory:
        lead = "Too few sources to test whether attention is spread out differently on natural and synthetic images"
    elif difference.p_value is not None and difference.p_value < _SIGNIFICANT:
        lead = f"Attention was {'more' if difference.value > 0 else 'less'} spread out on natural images"
    else:
        lead = (
            "No overall difference in how spread out attention is was established between natural and synthetic images"
        )
    return f"{lead}: {means}; {numbers}."


def _contrast_head_sentence(contrast: Contrast, names: Names) -> list[str]:
    chosen = contrast.heads.filter(pl.col("selected"))
    tested = chosen.filter(pl.col("p_holm").is_not_null())
    if not len(tested):
        return []
    different = tested.filter(pl.col("p_holm") < _SIGNIFICANT)
    agree = tested.filter((pl.col("value") > 0) == (pl.col("discover") > 0))
    sentence = (
        f"Of the {len(tested)} heads whose entropy differed most clearly on the discover split, {len(different)} differ"
        f" on the confirm split (corrected p < 0.05) and {len(agree)} with the same sign"
    )
    if len(different):
        row = different.sort(pl.col("value").abs(), descending=True).row(0, named=True)
        sentence += (
            f"; the largest of them is {names.head(row['site'], row['head'])}, {_value(row)}"
            f" ({_interval(row)}, corrected p = {probability(row['p_holm'])})"
        )
    return [f"{sentence}."]


def _spread_sentence(result: StudyResult, names: Names) -> list[str]:
    assert result.entropy_heads is not None
    overall = result.entropy_heads.filter(pl.col("timestep").is_null() & (pl.col("measure") == "normalised"))
    overall = overall.filter(pl.col("query_group") == query_groups(overall)[0])
    group = result.contrast.natural if result.contrast else result.groups[0]
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
            if row["p_holm"] is None
            else f"corrected p = {probability(row['p_holm'])}, {_sources(row['sources'])}"
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
    rows = _headline(confirmed).filter(pl.col("p_holm").is_not_null() & (pl.col("value") > 0))
    return rows.sort("value", descending=True).row(0, named=True) if len(rows) else None


def _bounds(found: dict | Estimate) -> tuple[float | None, float | None]:
    return (found["low"], found["high"]) if isinstance(found, dict) else (found.low, found.high)


def _value(found: dict | Estimate) -> str:
    return fitted(_bounds(found))(found["value"] if isinstance(found, dict) else found.value)


def _interval(found: dict | Estimate, write: Callable[..., str] | None = None) -> str:
    low, high = _bounds(found)
    return "no interval" if low is None else f"95 % interval {interval(low, high, write or fitted((low, high)))}"


def _pair(sources: tuple[int, ...]) -> str:
    return " and ".join(map(str, sources))


def _sources(count: int) -> str:
    return f"{count} source" if count == 1 else f"{count} sources"
