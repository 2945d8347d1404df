"""How spread out attention is: entropies of heads and groups."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import polars as pl

from headscope.report.marks import SEQUENTIAL, by_group, colour_bar, dots_of, estimate_note, heads_of, notes_of, when
from headscope.report.naming import Names, fitted, interval, percent, plot_text, significant
from headscope.report.panels import Figure, View, heat_maps, over_timesteps
from headscope.report.section import Section
from headscope.report.tables import Table, void_of
from headscope.study import entropy, inference
from headscope.study.analysis import StudyResult
from headscope.study.entropy import query_groups


def section(result: StudyResult, names: Names, groups: Sequence[str]) -> Section | None:
    """The section, where entropies were recorded."""
    heads, pooled = result.entropy_heads, result.entropy_groups
    if heads is None or pooled is None:
        return None
    observed = sorted(heads["timestep"].drop_nulls().unique().to_list())
    present = set(heads["group"])
    return Section(
        "entropy",
        "Entropy",
        {
            "measures": entropy.MEASURES,
            "pooled": entropy.POOLED,
            "variance_words": entropy.VARIANCE,
            "variance": None if result.entropy_variance is None else variance_table(result.entropy_variance, groups),
            "fewest": inference.FEWEST_SOURCES,
            "heads": entropy_table(heads, names, [group for group in groups if group in present]),
        },
        {
            "entropy_groups": entropy_by_timestep(pooled, names, groups),
            "entropy_maps": entropy_maps(heads, names, groups, observed),
        },
    )


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
        notes = [row and f"<b>{plot_text(group)}</b>, {when(row['timestep'])}<br>{estimate_note(row)}" for row in found]
        series.append(dots_of(group, found, notes, names.colour(group), names.symbol(group)))
    return over_timesteps([*map(str, timesteps), "overall"], series, "normalised entropy, mean over heads")


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
        rows = heads_of(table, names)
        label += f", {plot_text(kind)} queries" if len(kinds) > 1 else ""
        table = table.with_columns(note=notes_of(names, "timestep", None))
        axis = {"colorscale": SEQUENTIAL, "cmin": table["value"].min(), "cmax": table["value"].max()}
        axis["colorbar"] = colour_bar(title)
        views.append(View(label, heat_maps(by_group(table, groups), names, rows, timesteps, axis, "value", "note")))
    return views


def _cell(row: dict[str, Any], write: Callable[[float | None], str]) -> str:
    # a single key has no normalised entropy, which nothing is wrong with
    if row["void"] and row["keys"] > 1:
        return void_of(row["void"])
    return f"{write(row['value'])} ({interval(row['low'], row['high'], write)})"


def entropy_table(entropy: pl.DataFrame, names: Names, groups: Sequence[str]) -> Table:
    """Every head's entropy, averaged over timesteps, groups side by side; sites in the order of execution."""
    overall = entropy.filter(pl.col("timestep").is_null() & pl.col("group").is_in(groups))
    head = ("site", "head", "query_group", "keys")
    found = {(*map(row.get, head), row["group"], row["measure"]): row for row in overall.iter_rows(named=True)}
    kinds = query_groups(overall)
    normalised = overall.filter(pl.col("measure") == "normalised")
    # the middle of the widths: one very certain head shall not decide for all
    middle = (normalised["high"] - normalised["low"]).median()
    write = fitted((0.0, middle if isinstance(middle, float) else None))
    rows = []
    heads = overall.select(head).unique(maintain_order=True).to_dicts()
    for one in sorted(heads, key=lambda row: (names.place(row["site"]), row["head"], kinds.index(row["query_group"]))):
        cells = [names.of_queries(one, len(kinds) > 1), str(one["keys"])]
        for group in groups:
            row, nats = (found.get((*one.values(), group, measure)) for measure in ("normalised", "nats"))
            cells.append("–" if row is None else _cell(row, write))
            cells.append("–" if nats is None else write(nats["value"]))
        rows.append(cells)
    columns = [("head", False), ("keys", True)]
    for group in groups:
        columns += [(f"{group}, H / ln K", True), (f"{group}, nats", True)]
    return Table("Entropy of every head, mean over timesteps, all observed sources (95 % interval).", columns, rows)


def variance_table(variance: pl.DataFrame, groups: Sequence[str]) -> Table:
    """What a head's entropy varies with, a row per group."""
    found = {row["group"]: row for row in variance.iter_rows(named=True)}
    parts = ("between_sources", "between_items", "between_draws")
    rows = []
    for row in (found[group] for group in groups if group in found):
        total = sum(row[part] or 0.0 for part in parts)
        cells = []
        for part in parts:
            share = "" if row[part] is None or total <= 0 else f" ({percent(row[part] / total)})"
            cells.append(f"{significant(row[part])}{share}")
        counts = [str(row[name]) for name in ("sources", "items", "draws")]
        rows.append([row["group"], *counts, *cells, percent(row["with_unlimited_draws"]), str(row["void"])])
    columns = [("group", False), ("sources", True), ("items", True), ("draws of noise", True)]
    columns += [(f"between {part.partition('_')[2]}, nats²", True) for part in parts]
    columns += [("standard error with unlimited draws", True), ("void", True)]
    return Table("Variance of a head's entropy, mean over heads (share of the sum).", columns, rows)
