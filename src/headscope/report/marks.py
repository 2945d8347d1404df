"""Parts of figures that several sections draw: dots of estimates, notes, colours."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from headscope.report.naming import Names, fitted, interval, plot_text, probability
from headscope.report.panels import Dots
from headscope.report.tables import void_of
from headscope.study.inference import is_finding

# ordered by lightness, for colour-blind readers
SEQUENTIAL = "Viridis"
# less in blue, more in red, as strong for colour-blind readers
DIVERGING = [[0, "#2166AC"], [0.25, "#86BBDA"], [0.5, "#F2F1EE"], [0.75, "#F0A582"], [1, "#B2182B"]]
# none of them the colour of one of the first four groups
BEFORE, FIRST, SECOND = "#8A8F98", "#1F8FA6", "#B8860B"
_FILLS = ((FIRST, "circle"), (SECOND, "diamond"), (BEFORE, "square"), ("#7A6FBF", "cross"))


def by_group(table: pl.DataFrame, groups: Sequence[str]) -> list[tuple[str, pl.DataFrame]]:
    """The rows of every group that has some."""
    panels = [(group, table.filter(pl.col("group") == group)) for group in groups]
    return [(group, panel) for group, panel in panels if len(panel)]


def heads_of(table: pl.DataFrame, names: Names) -> list[tuple[str, int]]:
    """Heads in the order of execution."""
    return sorted(table.select("site", "head").unique().iter_rows(), key=lambda row: (names.place(row[0]), row[1]))


def notes_of(names: Names, step: str, write: Callable[..., str] | None) -> pl.Expr:
    """The text that is shown while hovering over a cell; step: the column of timesteps."""

    def note(row: dict) -> str:
        head = plot_text(names.head(row["site"], row["head"]))
        return f"<b>{head}</b>, {when(row[step])}<br>{estimate_note(row, write)}"

    return pl.struct("site", "head", step, "value", "low", "high", "sources").map_elements(note, return_dtype=pl.String)


def head_notes(titles: Sequence[str], rows: Sequence[dict | None], write: Callable[..., str]) -> list[str]:
    return [
        "" if row is None else f"<b>{plot_text(title)}</b><br>{estimate_note(row, write)}"
        for title, row in zip(titles, rows, strict=True)
    ]


def when(timestep: int | None) -> str:
    return "mean over timesteps" if timestep is None else f"timestep {timestep}"


def estimate_note(row: dict, write: Callable[..., str] | None = None) -> str:
    sources = row["sources"]
    counted = " and ".join(map(str, sources)) if isinstance(sources, list) else str(sources)
    if row["value"] is None and row.get("void"):
        return void_of(row["void"])
    write = write or fitted((row["low"], row["high"]))
    text = f"{write(row['value'])} ({interval(row['low'], row['high'], write)}), sources: {counted}"
    corrected = next((row[name] for name in ("p_maxt", "p_holm") if row.get(name) is not None), None)
    if corrected is not None:
        text += f"<br>p = {probability(row['p_value'])}, corrected {probability(corrected)}"
    elif row.get("p_value") is not None:
        text += f"<br>p = {probability(row['p_value'])}"
    return text


def read_as(row: dict, value: str, low: str, high: str) -> dict:
    """The row with the estimate of other columns as its value and interval."""
    return row | {"value": row[value], "low": row[low], "high": row[high]}


def dots_of(
    name: str, rows: Sequence[dict | None], notes: Sequence[str | None], colour: str, symbol: str = "circle"
) -> Dots:
    """One series; a hollow marker is an exploratory estimate."""
    columns = {column: [None if row is None else row[column] for row in rows] for column in ("value", "low", "high")}
    filled = [row is not None and not row["exploratory"] for row in rows]
    written = [note or "" for note in notes]
    return Dots(name, columns["value"], columns["low"], columns["high"], filled, written, colour, symbol)


def of_fills(
    rows: Sequence[dict],
    key: Callable[[dict], Any],
    order: Sequence[Any],
    titles: Sequence[str],
    headline: str,
    write: Callable[..., str],
) -> list[Dots]:
    """A series for each fill, the headline first: a point for each of some edits; solid where the corrected p is small.

    key: what tells the edits of rows apart; order: those to draw, with their titles.
    """
    fills = sorted({row["fill"] for row in rows}, key=lambda fill: (fill != headline, fill))
    series = []
    for index, fill in enumerate(fills):
        found = {key(row): row for row in rows if row["fill"] == fill}
        members = [found.get(edit) for edit in order]
        colour, symbol = _FILLS[index % len(_FILLS)]
        shift = (index - (len(fills) - 1) / 2) * 0.8 / max(3, len(fills))
        drawn = dots_of(f"{fill} fill", members, head_notes(titles, members, write), colour, symbol)
        filled = [row is not None and is_finding(row["p_maxt"]) for row in members]
        series.append(replace(drawn, filled=filled, shift=shift))
    return series


def colour_bar(title: str) -> dict:
    return {"title": {"text": title, "side": "top"}, "thickness": 12, "outlinewidth": 0, "len": 0.6, "y": 0.7}
