"""Natural against synthetic images."""

from collections.abc import Sequence
from dataclasses import replace

import polars as pl

from headscope.report.marks import BEFORE, FIRST, SIGNIFICANT, dots_of, estimate_note, read_as, when
from headscope.report.naming import Names, fitted, interval, number, plot_text, probability
from headscope.report.panels import Dots, View, dot_panels, over_timesteps
from headscope.report.section import Section
from headscope.report.tables import INTERVAL, Table, estimate
from headscope.study import entropy, inference
from headscope.study.analysis import StudyResult
from headscope.study.entropy import Contrast, query_groups


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
            "difference": inference.DIFFERENCE,
            "ratio": inference.RATIO,
            "pooled": entropy.POOLED,
            "selection": entropy.SELECTION,
            "timesteps": contrast_table(contrast),
            "heads": contrast_heads_table(contrast, names),
        },
        {"contrast": contrast_by_timestep(contrast), "contrast_heads": contrast_by_head(contrast, names)},
    )


def contrast_by_timestep(contrast: Contrast) -> list[View]:
    """Natural against synthetic at every timestep and overall: difference and ratio."""
    overall = contrast.difference, contrast.ratio
    rows = [
        *contrast.timesteps.iter_rows(named=True),
        {
            "timestep": None,
            **{name: getattr(overall[0], name) for name in ("value", "low", "high", "exploratory", "p_value")},
            "p_holm": None,
            "sources": list(overall[0].sources),
            "ratio": overall[1].value,
            "ratio_low": overall[1].low,
            "ratio_high": overall[1].high,
        },
    ]
    labels = ["overall" if row["timestep"] is None else str(row["timestep"]) for row in rows]
    views = []
    pair = f"{contrast.natural} − {contrast.synthetic}", f"{contrast.natural} / {contrast.synthetic}"
    for label, name, columns, reference in (
        ("Difference", pair[0], ("value", "low", "high"), 0.0),
        ("Ratio", pair[1], ("ratio", "ratio_low", "ratio_high"), 1.0),
    ):
        read = [read_as(row, *columns) for row in rows]
        notes = [f"<b>{when(row['timestep'])}</b><br>{estimate_note(one)}" for row, one in zip(rows, read, strict=True)]
        dots = dots_of("", read, notes, FIRST)
        axis = f"{label.lower()} of normalised entropy<br>{plot_text(name)}"
        views.append(View(label, over_timesteps(labels, [dots], axis, reference=reference)))
    return views


def contrast_by_head(contrast: Contrast, names: Names) -> list[View]:
    """Differences per head: those selected on discover and tested on confirm, and all of them."""
    rows = contrast.heads.to_dicts()
    several = len(query_groups(contrast.heads)) > 1
    chosen = sorted((row for row in rows if row["selected"]), key=lambda row: -(row["value"] or 0.0))
    everything = sorted(rows, key=lambda row: -(row["value"] or 0.0))
    views = []
    for label, members, height in (("Selected heads", chosen, 26), ("All heads", everything, 15)):
        if not members:
            continue
        titles = [names.of_queries(row, several) for row in members]
        notes = [
            f"<b>{plot_text(t)}</b>, confirm<br>{estimate_note(row)}" for t, row in zip(titles, members, strict=True)
        ]
        found = [row["p_holm"] is not None and row["p_holm"] < SIGNIFICANT for row in members]
        confirm = replace(dots_of("confirm split", members, notes, FIRST), filled=found)
        before = [row["discover"] for row in members]
        text = [f"{plot_text(t)}, discover: {number(value, 6)}" for t, value in zip(titles, before, strict=True)]
        empty = [None] * len(members)
        solid = [True] * len(members)
        discover = Dots("discover split", before, empty, empty, solid, text, BEFORE, "line-ns", size=8)
        axis = f"difference of normalised entropy, {plot_text(contrast.natural)} − {plot_text(contrast.synthetic)}"
        views.append(View(label, dot_panels([("", titles, [discover, confirm])], axis, row_height=height)))
    return views


def contrast_table(contrast: Contrast) -> Table:
    """Natural against synthetic, per timestep and overall."""
    rows = []
    found = contrast.timesteps.select("low", "high", "ratio_low", "ratio_high").rows()
    write = fitted(*(row[:2] for row in found), least=4)
    write_ratio = fitted(*(row[2:] for row in found))
    for row in contrast.timesteps.iter_rows(named=True):
        rows.append(
            [
                str(row["timestep"]),
                write(row["natural"]),
                write(row["synthetic"]),
                *estimate(row, write),
                probability(row["p_value"]),
                probability(row["p_holm"]),
                *estimate(row, write_ratio, "ratio"),
            ]
        )
    difference, ratio = contrast.difference, contrast.ratio
    rows.append(
        [
            "overall",
            write(contrast.natural_mean.value),
            write(contrast.synthetic_mean.value),
            write(difference.value),
            interval(difference.low, difference.high, write),
            probability(difference.p_value),
            "–",
            write_ratio(ratio.value),
            interval(ratio.low, ratio.high, write_ratio),
        ]
    )
    sources = " and ".join(map(str, difference.sources))
    columns = [("timestep", False), (contrast.natural, True), (contrast.synthetic, True), ("difference", True)]
    columns += [INTERVAL, ("p", True), ("corrected p", True), ("ratio", True), INTERVAL]
    caption = f"Normalised entropy, mean over heads, confirm split ({sources} sources)."
    return Table(caption, columns, rows)


def contrast_heads_table(contrast: Contrast, names: Names) -> Table:
    """The heads that the comparison selected, and their test."""
    chosen = contrast.heads.filter(pl.col("selected")).sort(["p_holm", "site", "head"], nulls_last=True)
    write = fitted(*chosen.select("low", "high").rows(), least=4)
    several = len(query_groups(contrast.heads)) > 1
    rows = [
        [
            names.of_queries(row, several),
            write(row["discover"]),
            number(row["discover_score"], 1),
            *estimate(row, write),
            probability(row["p_value"]),
            probability(row["p_holm"]),
        ]
        for row in chosen.iter_rows(named=True)
    ]
    columns = [("head", False), ("difference, discover", True), ("|difference| / SE", True)]
    columns += [("difference, confirm", True), INTERVAL, ("p", True), ("corrected p", True)]
    return Table("Heads selected on the discover split, tested on the confirm split.", columns, rows)
