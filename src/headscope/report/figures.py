"""The report's figures, from the study's tables."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import polars as pl

from headscope.report.naming import Names, fitted, interval, number, percent, plot_text, probability, significant
from headscope.report.panels import Dots, Figure, View, dot_panels, heat_maps, over_timesteps
from headscope.study.entropy import Contrast, query_groups

# ordered by lightness, for colour-blind readers
_SEQUENTIAL = "Viridis"
# none of them the colour of one of the first four groups
_DISCOVER, _FIRST, _SECOND = "#8A8F98", "#1F8FA6", "#B8860B"
_SIGNIFICANT = 0.05


def entropy_maps(entropy: pl.DataFrame, names: Names, groups: Sequence[str], timesteps: Sequence[int]) -> list[View]:
    """Head x timestep, a panel per group; a view per measure and kind of queries."""
    measures = (
        ("normalised", "Normalised, H / ln K", "H / ln K"),
        ("nats", "Nats, H", "H, nats"),
        ("deficit", "From uniform, ln K − H", "ln K − H,<br>nats"),
    )
    kinds = query_groups(entropy)
    views = []
    for kind, (measure, label, title) in product(kinds, measures):
        table = entropy.filter((pl.col("measure") == measure) & pl.col("timestep").is_not_null())
        # a head's queries of the image and of the text are two things
        table = table.filter(pl.col("query_group") == kind)
        rows = _heads(table, names)
        label += f", {plot_text(kind)} queries" if len(kinds) > 1 else ""
        table = table.with_columns(note=_notes(names, "timestep", None))
        axis = {"colorscale": _SEQUENTIAL, "cmin": table["value"].min(), "cmax": table["value"].max()}
        axis["colorbar"] = _colour_bar(title)
        views.append(View(label, heat_maps(_by_group(table, groups), names, rows, timesteps, axis, "value", "note")))
    return views


def entropy_by_timestep(entropy_groups: pl.DataFrame, names: Names, groups: Sequence[str]) -> Figure:
    """Pooled normalised entropy of every group along the timesteps."""
    timesteps = sorted(entropy_groups["timestep"].drop_nulls().unique().to_list())
    order = [*timesteps, None]
    series = []
    for group in groups:
        rows = {row["timestep"]: row for row in entropy_groups.filter(pl.col("group") == group).iter_rows(named=True)}
        if not rows:
            continue
        found = [rows.get(timestep) for timestep in order]
        notes = [row and f"<b>{plot_text(group)}</b>, {_when(row['timestep'])}<br>{_estimate(row)}" for row in found]
        series.append(_dots(group, found, notes, names.colour(group), names.symbol(group)))
    return over_timesteps([*map(str, timesteps), "overall"], series, "normalised entropy, mean over heads")


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
        read = [_read_as(row, *columns) for row in rows]
        notes = [f"<b>{_when(row['timestep'])}</b><br>{_estimate(one)}" for row, one in zip(rows, read, strict=True)]
        dots = _dots("", read, notes, _FIRST)
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
        notes = [f"<b>{plot_text(t)}</b>, confirm<br>{_estimate(row)}" for t, row in zip(titles, members, strict=True)]
        found = [row["p_holm"] is not None and row["p_holm"] < _SIGNIFICANT for row in members]
        confirm = replace(_dots("confirm split", members, notes, _FIRST), filled=found)
        before = [row["discover"] for row in members]
        text = [f"{plot_text(t)}, discover: {number(value, 6)}" for t, value in zip(titles, before, strict=True)]
        empty = [None] * len(members)
        solid = [True] * len(members)
        discover = Dots("discover split", before, empty, empty, solid, text, _DISCOVER, "line-ns", size=8)
        axis = f"difference of normalised entropy, {plot_text(contrast.natural)} − {plot_text(contrast.synthetic)}"
        views.append(View(label, dot_panels([("", titles, [discover, confirm])], axis, row_height=height)))
    return views


def degradation_maps(
    by_timestep: pl.DataFrame, names: Names, groups: Sequence[str], timesteps: Sequence[int], fill: str
) -> Figure:
    """Relative degradation, head x timestep, a panel per group; logarithmic colours."""
    table = by_timestep.filter(pl.col("fill") == fill).with_columns(note=_notes(names, "timestep", percent))
    top = math.log10(max(1e-6, table["value"].max() or 0.0))
    # three decades, more where the largest value leaves less than two of them above 0.1 %
    floor = min(-3, math.floor(top) - 2)
    # of a head without a number, the maximum would be the other
    shade = pl.when(pl.col("value").is_not_null()).then(pl.max_horizontal("value", pl.lit(10.0**floor)).log10())
    table = table.with_columns(shade=shade)
    marks = [factor * 10.0**exponent for exponent in range(floor, math.ceil(top) + 1) for factor in (1, 3)]
    labels = [f"{100 * mark:,.6g} %" for mark in marks]
    bar = _colour_bar("degradation") | {"tickvals": [math.log10(mark) for mark in marks]}
    bar["ticktext"] = [f"≤ {labels[0]}", *labels[1:]]
    axis = {"colorscale": _SEQUENTIAL, "cmin": floor, "cmax": top, "colorbar": bar}
    return heat_maps(_by_group(table, groups), names, _heads(table, names), timesteps, axis, "shade", "note")


def degradation_ranking(
    ranking: pl.DataFrame, names: Names, groups: Sequence[str], fill: str, most: int = 20
) -> list[View]:
    """The heads whose removal hurts most, per group, on the split that ranks them."""
    table = ranking.filter(pl.col("fill") == fill)
    views = []
    for label, column, low, high, axis, write, tick in _MEASURES:
        panels = []
        for group in groups:
            rows = table.filter(pl.col("group") == group).sort(
                [column, "site", "head"], descending=[True, False, False], nulls_last=True
            )
            members = [_read_as(row, column, low, high) for row in rows.head(most).to_dicts()]
            if members:
                titles = [names.head(row["site"], row["head"]) for row in members]
                notes = _head_notes(titles, members, write)
                dots = _dots("", members, notes, names.colour(group), names.symbol(group))
                panels.append((group, titles, [replace(dots, filled=[row["selected"] for row in members])]))
        if panels:
            views.append(View(label, dot_panels(panels, axis, tick_format=tick)))
    return views


def degradation_confirmed(confirmed: pl.DataFrame, names: Names, groups: Sequence[str], headline: str) -> list[View]:
    """The selected heads on the confirm split, a panel per group, a series per fill."""
    heads = confirmed.filter(pl.col("fill") == headline).group_by("site", "head").agg(pl.col("value").max())
    heads = heads.sort(["value", "site", "head"], descending=[True, False, False], nulls_last=True)
    order = list(heads.select("site", "head").iter_rows())
    titles = [names.head(site, head) for site, head in order]
    fills = sorted(confirmed["fill"].unique(), key=lambda fill: (fill != headline, fill))
    views = []
    for label, column, low, high, axis, write, tick in _MEASURES:
        panels = []
        for group in groups:
            rows = confirmed.filter(pl.col("group") == group)
            if not len(rows):
                continue
            series = []
            for index, fill in enumerate(fills):
                found = {(row["site"], row["head"]): row for row in rows.filter(pl.col("fill") == fill).to_dicts()}
                members = [found.get(head) for head in order]
                members = [row and _read_as(row, column, low, high) for row in members]
                notes = _head_notes(titles, members, write)
                colour = (_FIRST, _SECOND, _DISCOVER)[index % 3]
                symbol = ("circle", "diamond", "square")[index % 3]
                shift = (index - (len(fills) - 1) / 2) * 0.26
                dots = _dots(f"{fill} fill", members, notes, colour, symbol)
                filled = [row is not None and (row["p_holm"] or 1.0) < _SIGNIFICANT for row in members]
                series.append(replace(dots, filled=filled, shift=shift))
            panels.append((group, titles, series))
        if panels:
            views.append(View(label, dot_panels(panels, axis, row_height=30, share_rows=True, tick_format=tick)))
    return views


def distance_ranking(
    ranking: pl.DataFrame, names: Names, groups: Sequence[str], fill: str, most: int = 20
) -> Figure | None:
    """The heads whose removal moves the drawn image most, per group."""
    panels = []
    for group in groups:
        rows = ranking.filter((pl.col("group") == group) & (pl.col("fill") == fill)).head(most).to_dicts()
        if rows:
            titles = [names.head(row["site"], row["head"]) for row in rows]
            notes = _head_notes(titles, rows, significant)
            panels.append((group, titles, [_dots("", rows, notes, names.colour(group), names.symbol(group))]))
    return dot_panels(panels, "mean squared pixel difference") if panels else None


# label, value, low, high, axis title, how a value is written, tick format
_MEASURES: tuple[tuple[str, str, str, str, str, Callable[..., str], str | None], ...] = (
    ("Relative", "value", "low", "high", "degradation of the loss", percent, ".3~p"),
    ("Absolute", "absolute", "absolute_low", "absolute_high", "edited − clean loss", significant, None),
)


def _by_group(table: pl.DataFrame, groups: Sequence[str]) -> list[tuple[str, pl.DataFrame]]:
    """The rows of every group that has some."""
    panels = [(group, table.filter(pl.col("group") == group)) for group in groups]
    return [(group, panel) for group, panel in panels if len(panel)]


def _heads(table: pl.DataFrame, names: Names) -> list[tuple[str, int]]:
    """Heads in the order of execution."""
    return sorted(table.select("site", "head").unique().iter_rows(), key=lambda row: (names.place(row[0]), row[1]))


def _notes(names: Names, when: str, write: Callable[..., str] | None) -> pl.Expr:
    """The text that is shown while hovering over a cell."""
    return pl.struct("site", "head", when, "value", "low", "high", "sources").map_elements(
        lambda row: (
            f"<b>{plot_text(names.head(row['site'], row['head']))}</b>, {_when(row[when])}<br>{_estimate(row, write)}"
        ),
        return_dtype=pl.String,
    )


def _head_notes(titles: Sequence[str], rows: Sequence[dict | None], write: Callable[..., str]) -> list[str]:
    return [
        "" if row is None else f"<b>{plot_text(title)}</b><br>{_estimate(row, write)}"
        for title, row in zip(titles, rows, strict=True)
    ]


def _when(timestep: int | None) -> str:
    return "mean over timesteps" if timestep is None else f"timestep {timestep}"


def _estimate(row: dict, write: Callable[..., str] | None = None) -> str:
    sources = row["sources"]
    counted = " and ".join(map(str, sources)) if isinstance(sources, list) else str(sources)
    write = write or fitted((row["low"], row["high"]))
    text = f"{write(row['value'])} ({interval(row['low'], row['high'], write)}), sources: {counted}"
    if row.get("p_holm") is not None:
        text += f"<br>p = {probability(row['p_value'])}, corrected {probability(row['p_holm'])}"
    elif row.get("p_value") is not None:
        text += f"<br>p = {probability(row['p_value'])}"
    return text


def _read_as(row: dict, value: str, low: str, high: str) -> dict:
    """The row with the estimate of other columns as its value and interval."""
    return row | {"value": row[value], "low": row[low], "high": row[high]}


def _dots(
    name: str, rows: Sequence[dict | None], notes: Sequence[str | None], colour: str, symbol: str = "circle"
) -> Dots:
    """One series; a hollow marker is an exploratory estimate."""
    columns = {column: [None if row is None else row[column] for row in rows] for column in ("value", "low", "high")}
    filled = [row is not None and not row["exploratory"] for row in rows]
    written = [note or "" for note in notes]
    return Dots(name, columns["value"], columns["low"], columns["high"], filled, written, colour, symbol)


def _colour_bar(title: str) -> dict:
    return {"title": {"text": title, "side": "top"}, "thickness": 12, "outlinewidth": 0, "len": 0.6, "y": 0.7}
