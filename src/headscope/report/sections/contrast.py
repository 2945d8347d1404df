"""Natural against synthetic images: all heads at once, single heads, sites, timesteps, and the pooled ratio last."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from headscope.report.marks import BEFORE, FIRST, dots_of, estimate_note, when
from headscope.report.naming import Names, fitted, interval, plot_text, probability, significant
from headscope.report.panels import Dots, View, dot_panels, over_timesteps
from headscope.report.section import Section
from headscope.report.tables import INTERVAL, Table, estimate, void_of
from headscope.study import entropy
from headscope.study.analysis import StudyResult
from headscope.study.contrast import comparison, divergence
from headscope.study.contrast.comparison import Comparison
from headscope.study.entropy import query_groups
from headscope.study.inference import SIGNIFICANT, is_finding

_DIVERGENCES = {
    "energy": ("Energy distance", "energy distance,<br>standard deviations"),
    "wasserstein": ("Wasserstein-1", "Wasserstein-1, nats"),
    "jensen_shannon": ("Jensen-Shannon, all heads", "Jensen-Shannon, nats"),
    "jensen_shannon_pooled": ("Jensen-Shannon, one value a source", "Jensen-Shannon, nats"),
}


def section(result: StudyResult, names: Names, groups: Sequence[str]) -> Section | None:
    """The section, where two groups were compared, or were to be."""
    title, contrast = "Natural and synthetic", result.contrast
    if contrast is None:
        reason = result.omitted.get("contrast")
        return Section("contrast", title, {"contrast": None, "omitted": reason}) if reason else None
    return Section(
        "contrast",
        title,
        {
            "contrast": contrast,
            "answer": answer(contrast),
            "omnibus": comparison.OMNIBUS,
            "heads_words": comparison.HEADS,
            "sites_words": comparison.SITES,
            "ratio_words": comparison.POOLED_RATIO,
            "cancels": comparison.CANCELS,
            "pooled_words": entropy.POOLED,
            "divergences": {_DIVERGENCES[name][0]: text for name, text in divergence.DIVERGENCES.items()},
            "permuted": divergence.PERMUTED,
            "paper_range": " to ".join(map(str, divergence.PAPER_RANGE)),
            "paper_ratio": comparison.PAPER_RATIO,
            "heads": heads_table(contrast, names),
            "sites": sites_table(contrast, names),
            "timesteps": divergence_table(contrast),
            "pooled": pooled_table(contrast),
        },
        {
            "contrast_heads": differences_by_head(contrast, names),
            "contrast_sites": ratios_by_site(contrast, names),
            "contrast_divergence": divergence_by_timestep(contrast),
        },
    )


def answer(contrast: Comparison) -> str:
    """What the comparison found, strongest first: all heads at once, single heads, the pooled ratio."""
    omnibus, ratio = contrast.omnibus, contrast.ratio
    if omnibus["value"] is None:
        return f"All heads at once: {void_of(omnibus['void'])}."
    if omnibus["p_value"] is None:
        first = "All heads at once: too few sources for a test"
    else:
        differ = "differ" if omnibus["p_value"] < SIGNIFICANT else "can't be told apart"
        first = f"All heads at once, the groups {differ} (p = {probability(omnibus['p_value'])})"
    first += (
        f"; energy distance {significant(omnibus['value'])} standard deviations, by chance"
        f" {significant(omnibus['null_mean'])} and in 95 % of permutations below {significant(omnibus['null_high'])}."
    )
    tested = contrast.heads.filter(pl.col("p_maxt").is_not_null())
    found = contrast.different
    higher = len(found.filter(pl.col("value") > 0))
    second = (
        f" {len(found)} of {len(tested)} heads differ (max-t): {higher} with the higher entropy on {contrast.first},"
        f" {len(found) - higher} on {contrast.second}."
        if len(tested)
        else ""
    )
    write = fitted((ratio["low"], ratio["high"]))
    third = (
        f" Pooled over heads, the ratio is {write(ratio['value'])} ({interval(ratio['low'], ratio['high'], write)})."
    )
    return first + second + third


def differences_by_head(contrast: Comparison, names: Names) -> list[View]:
    """Differences of all heads, by size and in the order of execution; solid where max-t finds one."""
    rows = contrast.heads.to_dicts()
    several = len(query_groups(contrast.heads)) > 1
    by_place = sorted(rows, key=lambda row: (names.place(row["site"]), row["head"]))
    by_size = sorted(by_place, key=lambda row: -(row["value"] or 0.0))
    axis = f"difference of entropy, nats, {plot_text(contrast.first)} − {plot_text(contrast.second)}"
    views = []
    for label, members in (("By size", by_size), ("In the order of execution", by_place)):
        titles = [names.of_queries(row, several) for row in members]
        dots = _dots(titles, members)
        views.append(View(label, dot_panels([("", titles, [dots])], axis, row_height=15)))
    return views


def ratios_by_site(contrast: Comparison, names: Names) -> list[View]:
    """exp of the difference of every site; a view for the mean over timesteps and for each of them."""
    views = []
    for timestep in (None, *contrast.timesteps):
        table = contrast.sites.filter(pl.col("timestep").eq_missing(timestep))
        rows = sorted(table.to_dicts(), key=lambda row: names.place(row["site"]))
        titles = [names.sites.get(row["site"], row["site"]) for row in rows]
        axis = f"exp(H {plot_text(contrast.first)} − H {plot_text(contrast.second)})"
        label = "Mean over timesteps" if timestep is None else f"Timestep {timestep}"
        views.append(View(label, dot_panels([("", titles, [_dots(titles, rows)])], axis, reference=1.0)))
    return views


def divergence_by_timestep(contrast: Comparison) -> list[View]:
    """A view per divergence: observed, and what chance gives, from its mean to its 95 % quantile."""
    views = []
    for measure, (label, axis) in _DIVERGENCES.items():
        rows = contrast.divergences.filter(pl.col("measure") == measure).to_dicts()
        labels = ["overall" if row["timestep"] is None else str(row["timestep"]) for row in rows]
        notes = [f"<b>{when(row['timestep'])}</b><br>{_divergence_note(row)}" for row in rows]
        empty = [None] * len(rows)
        found = [(row["p_value"] if row["p_holm"] is None else row["p_holm"]) for row in rows]
        solid = [is_finding(p) for p in found]
        observed = Dots("observed", [row["value"] for row in rows], empty, empty, solid, notes, FIRST)
        figure = over_timesteps(labels, [chance(rows, notes), observed], axis, reference=0.0)
        views.append(View(label, figure))
    return views


def chance(rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> Dots:
    """The null of divergences: dots at its mean, bars to its 95 % quantile."""
    means = [row["null_mean"] for row in rows]
    highs = [row["null_high"] for row in rows]
    return Dots(
        "chance: mean, and up to its 95 % quantile", means, means, highs, [True] * len(rows), notes, BEFORE, size=6
    )


def heads_table(contrast: Comparison, names: Names) -> Table:
    """Every head, the clearest difference first."""
    rows = contrast.heads.sort(["p_maxt", "site", "head"], nulls_last=True)
    several = len(query_groups(contrast.heads)) > 1
    write = fitted(*rows.select("low", "high").rows(), least=4)
    cells = [
        [
            names.of_queries(row, several),
            *estimate(row, write),
            probability(row["p_value"]),
            probability(row["p_maxt"]),
        ]
        for row in rows.iter_rows(named=True)
    ]
    columns = [("head", False), ("difference, nats", True), INTERVAL, ("p, alone", True), ("corrected p", True)]
    return Table(f"Difference of every head's entropy, {_of(contrast)}, mean over timesteps.", columns, cells)


def sites_table(contrast: Comparison, names: Names) -> Table:
    """Every site, in the order of execution: the ratio at the mean over timesteps, and at each timestep."""
    rows = sorted(contrast.sites.to_dicts(), key=lambda row: names.place(row["site"]))
    found = {(row["site"], row["keys"], row["timestep"]): row for row in rows}
    cells = []
    for row in rows:
        if row["timestep"] is not None:
            continue
        steps = [found.get((row["site"], row["keys"], timestep)) for timestep in contrast.timesteps]
        cells.append(
            [
                names.sites.get(row["site"], row["site"]),
                str(row["keys"]),
                *estimate(row, _ratio_writer(rows)),
                probability(row["p_value"]),
                probability(row["p_maxt"]),
                *("–" if step is None else " (".join(estimate(step, _ratio_writer(rows))) + ")" for step in steps),
            ]
        )
    columns = [("site", False), ("keys", True), ("ratio", True), INTERVAL, ("p, alone", True), ("corrected p", True)]
    columns += [(f"at {timestep}", True) for timestep in contrast.timesteps]
    return Table(f"exp(difference of H) of every site, {_of(contrast)}.", columns, cells)


def divergence_table(contrast: Comparison) -> Table:
    """Every divergence at every timestep, with its null."""
    rows = [
        [
            _DIVERGENCES[row["measure"]][0],
            "overall" if row["timestep"] is None else str(row["timestep"]),
            *(significant(row[name]) for name in ("value", "null_mean", "null_high")),
            probability(row["p_value"]),
            probability(row["p_holm"]),
        ]
        for row in contrast.divergences.iter_rows(named=True)
    ]
    columns = [("divergence", False), ("timestep", False), ("observed", True), ("mean by chance", True)]
    columns += [("95 % of chance below", True), ("p", True), ("corrected p", True)]
    return Table(f"Divergence between the groups, {_of(contrast)}.", columns, rows)


def pooled_table(contrast: Comparison) -> Table:
    """The pooled ratio, per timestep and overall."""
    rows = contrast.pooled.to_dicts()
    write = _ratio_writer(rows)
    cells = [
        [
            "overall" if row["timestep"] is None else str(row["timestep"]),
            *(significant(row[name]) for name in ("first", "second")),
            *estimate(row, write),
            probability(row["p_value"]),
        ]
        for row in rows
    ]
    columns = [
        ("timestep", False),
        (contrast.first, True),
        (contrast.second, True),
        ("ratio", True),
        INTERVAL,
        ("p", True),
    ]
    return Table(f"Normalised entropy, mean over heads, and its ratio, {_of(contrast)}.", columns, cells)


def _of(contrast: Comparison) -> str:
    plural = "s" if len(contrast.splits) > 1 else ""
    sources = " and ".join(map(str, contrast.sources))
    return f"{' and '.join(contrast.splits)} split{plural}, {sources} sources"


def _ratio_writer(rows: Sequence[dict[str, Any]]):
    return fitted(*((row["low"], row["high"]) for row in rows))


def _dots(titles: Sequence[str], rows: Sequence[dict[str, Any]]) -> Dots:
    """Estimates with intervals, solid where the corrected p is below 0.05."""
    notes = [f"<b>{plot_text(title)}</b><br>{estimate_note(row)}" for title, row in zip(titles, rows, strict=True)]
    solid = [is_finding(row["p_maxt"]) for row in rows]
    return replace(dots_of("", rows, notes, FIRST), filled=solid)


def _divergence_note(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return void_of(row["void"])
    value, mean, high = (significant(row[name]) for name in ("value", "null_mean", "null_high"))
    text = f"{value}; by chance {mean}, 95 % below {high}"
    if row["p_value"] is not None:
        text += f"<br>p = {probability(row['p_value'])}"
    return text if row["p_holm"] is None else f"{text}, corrected {probability(row['p_holm'])}"
