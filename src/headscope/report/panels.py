"""Heat maps, dots with intervals and lines over timesteps: Plotly figures of panels, as plain dictionaries.

Colours of text, axes and backgrounds are left to the page, which follows the reader's light or dark preference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from headscope._plots import error_bars
from headscope.report.naming import Names, plot_text

Figure = dict[str, Any]
# titles of more panels than these stand aslant: they would overlap
_UPRIGHT = 6
# dot plots beside each other, with labels of their own and with shared ones, and pixels between lines of them
_ABREAST, _ABREAST_SHARED, _BETWEEN_LINES = 3, 4, 100
# characters of labels: of heads and groups, of sites, of groups aslant and of those above narrow panels; and of labels
# that fit between three panels
_LABEL, _SITE, _ASLANT, _TITLES_ABREAST, _SHORT = 30, 30, 18, 20, 24
# between labels of a logarithmic axis
_RATIO = 1.25
_TITLE = {"showarrow": False, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}


@dataclass(frozen=True)
class View:
    """One of the figures a reader may switch between at one place."""

    label: str
    figure: Figure


@dataclass(frozen=True)
class Dots:
    """One series of a dot plot: a point with an interval for every label.

    Attributes:
        values, lows, highs: aligned with the labels of the plot; None leaves the point or its interval out.
        filled: whether each marker is solid.
        notes: what hovering over each point says.
        shift: vertical displacement, in rows, to keep series apart.
    """

    name: str
    values: Sequence[float | None]
    lows: Sequence[float | None]
    highs: Sequence[float | None]
    filled: Sequence[bool]
    notes: Sequence[str]
    colour: str
    symbol: str = "circle"
    shift: float = 0.0
    size: int = 8


@dataclass(frozen=True)
class Line:
    """Points with intervals along x, connected.

    Attributes:
        places: the points' places along x.
        band: the lower and the upper edge of an area to shade.
    """

    places: Sequence[float]
    dots: Dots
    band: tuple[Sequence[float], Sequence[float]] | None = None


def heat_maps(
    panels: Sequence[tuple[str, pl.DataFrame]],
    names: Names,
    rows: Sequence[tuple[str, int]],
    columns: Sequence[Any],
    colour_axis: dict[str, Any],
    value: str,
    note: str,
    *,
    across: str = "timestep",
    mark: str | None = None,
) -> Figure:
    """Head x timestep (or another column), a panel per group on one colour scale; sites are separated by lines.

    panels: title and table (site, head, timestep, the column `value` to colour by, the column `note` to show).
    rows: the heads, top to bottom, heads of a site together. columns: the timesteps, left to right. across: the column
    that stands in place of timestep. mark: a column of short texts to write into the cells.
    """
    place = {row: index for index, row in enumerate(rows)}
    column = {name: index for index, name in enumerate(columns)}
    data, layout = [], _layout(height=max(320, 11 * len(rows)) + 130)
    gap = 0.02
    width = (1 - gap * (len(panels) - 1)) / len(panels)
    centres, labels, lines = _site_marks(rows, names)
    # narrow panels have one title for all
    titled = range(len(panels)) if len(panels) <= _UPRIGHT else (len(panels) // 2,)
    for index, (title, table) in enumerate(panels):
        number = "" if index == 0 else str(index + 1)
        cells: list[list[float | None]] = [[None] * len(columns) for _ in rows]
        texts, marks = ([[""] * len(columns) for _ in rows] for _ in range(2))
        for row in table.filter(pl.col(across).is_not_null()).iter_rows(named=True):
            y, x = place[row["site"], row["head"]], column[row[across]]
            cells[y][x], texts[y][x], marks[y][x] = row[value], row[note], row[mark] if mark else ""
        data.append(
            {
                "type": "heatmap",
                "z": cells,
                "text": texts,
                "hovertemplate": "%{text}<extra></extra>",
                "coloraxis": "coloraxis",
                "xaxis": f"x{number}",
                "yaxis": f"y{number}",
            }
        )
        if mark:
            # what stands in the cells takes the place of what hovering says
            data[-1] |= {"text": marks, "texttemplate": "%{text}", "hovertext": texts}
            data[-1] |= {"hovertemplate": "%{hovertext}<extra></extra>", "textfont": {"size": 9}}
        left = index * (width + gap)
        layout[f"xaxis{number}"] = {
            "domain": [left, left + width],
            "anchor": f"y{number}",
            "tickvals": list(range(len(columns))),
            "ticktext": [plot_text(_fitting(str(name), _LABEL)) for name in columns],
            "title": {"text": across if index in titled else "", "standoff": 8},
            "showgrid": False,
            "zeroline": False,
        }
        layout[f"yaxis{number}"] = {
            "anchor": f"x{number}",
            "range": [len(rows) - 0.5, -0.5],
            "tickvals": centres,
            "ticktext": labels if index == 0 else [""] * len(labels),
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
        }
        slope = {"textangle": -35} if len(panels) > _UPRIGHT else {}
        title = _fitting(title, _ASLANT if slope else _LABEL)
        layout["annotations"].append({**_TITLE, **slope, "text": f"<b>{plot_text(title)}</b>", "x": left, "y": 1.005})
        layout["shapes"] += [
            {"type": "line", "xref": f"x{number} domain", "x0": 0, "x1": 1, "yref": f"y{number}", "y0": y, "y1": y}
            | {"line": {"width": 2, "color": "page"}}
            for y in lines
        ]
    layout["yaxis"]["title"] = {"text": "site (its heads, first to last, downwards)", "standoff": 12}
    layout["coloraxis"] = colour_axis
    layout["margin"] |= {"t": 40 if len(panels) <= _UPRIGHT else 90, "b": 60}
    return {"data": data, "layout": layout}


def dot_panels(
    panels: Sequence[tuple[str, Sequence[str], Sequence[Dots]]],
    axis_title: str,
    *,
    reference: float | None = 0.0,
    row_height: int = 24,
    share_rows: bool = False,
    tick_format: str | None = None,
) -> Figure:
    """Horizontal dot plots in lines of a few: title, labels from top to bottom, and series of each panel.

    reference: where a line stands for "no difference". share_rows: all have the labels of the first, which stand once
    in every line.
    """
    long = any(len(label) > _SHORT for _, labels, _ in panels for label in labels)
    lines = math.ceil(len(panels) / (_ABREAST_SHARED if share_rows else 2 if long else _ABREAST))
    columns = math.ceil(len(panels) / lines)
    longest = max(len(labels) for _, labels, _ in panels)
    tall = row_height * max(3, longest)
    pixels = lines * tall + (lines - 1) * _BETWEEN_LINES
    layout = _layout(height=pixels)
    # narrow panels would cut it off
    axis_title = axis_title.replace(" of ", "<br>of ", 1) if columns > 2 else axis_title
    data = []
    gap = 0.04 if share_rows or columns == 1 else 0.28 if long else 0.17
    width = (1 - gap * (columns - 1)) / columns
    shown: set[str] = set()
    for index, (title, labels, series) in enumerate(panels):
        number = "" if index == 0 else str(index + 1)
        line, column = divmod(index, columns)
        left = column * (width + gap)
        top = 1 - line * (tall + _BETWEEN_LINES) / pixels
        for dots in series:
            trace = _dots_trace(dots, [row + dots.shift for row in range(len(labels))], horizontal=True)
            trace |= {"xaxis": f"x{number}", "yaxis": f"y{number}", "legendgroup": dots.name}
            trace["showlegend"] = dots.name not in shown and bool(dots.name)
            shown.add(dots.name)
            data.append(trace)
        layout[f"xaxis{number}"] = {
            "domain": [left, left + width],
            "anchor": f"y{number}",
            "title": {"text": axis_title, "standoff": 10},
            "zeroline": False,
        }
        if tick_format:
            layout[f"xaxis{number}"]["tickformat"] = tick_format
        if index:
            layout[f"xaxis{number}"]["matches"] = "x"
        hidden = share_rows and column > 0
        layout[f"yaxis{number}"] = {
            "domain": [max(0.0, top - tall / pixels), top],
            "anchor": f"x{number}",
            "range": [longest - 0.4, -0.6],
            "tickvals": list(range(len(labels))),
            "ticktext": [""] * len(labels) if hidden else [plot_text(_fitting(label, _LABEL)) for label in labels],
            "zeroline": False,
        }
        if title:
            shortened = _fitting(title, _LABEL if columns < 3 else _TITLES_ABREAST) if columns > 1 else title
            place = {"text": f"<b>{plot_text(shortened)}</b>", "x": left, "y": top + 0.005}
            layout["annotations"].append({**_TITLE, **place})
        if reference is not None:
            shape = {"type": "line", "yref": f"y{number} domain", "y0": 0, "y1": 1, "xref": f"x{number}"}
            layout["shapes"].append(shape | {"x0": reference, "x1": reference, "line": {"width": 1.5, "color": "axis"}})
    layout["margin"] |= {"t": 64 if any(shown) else 40, "b": 60}
    layout["height"] = pixels + layout["margin"]["t"] + layout["margin"]["b"]
    layout["legend"] = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1 + 30 / pixels, "yanchor": "bottom"}
    return {"data": data, "layout": layout}


def over_timesteps(
    labels: Sequence[str], series: Sequence[Dots], axis_title: str, *, reference: float | None = None, line: bool = True
) -> Figure:
    """Points with intervals along the timesteps; `labels` may end with the overall mean, which no line reaches."""
    layout = _layout(height=400)
    data = []
    apart = min(0.09, 0.5 / max(1, len(series)))
    for index, dots in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * apart
        trace = _dots_trace(dots, [place + shift for place in range(len(labels))], horizontal=False)
        trace["mode"] = "markers"
        trace["showlegend"] = bool(dots.name)
        if line:
            connected = [None if labels[i] == "overall" else value for i, value in enumerate(dots.values)]
            path = {"type": "scatter", "x": trace["x"], "y": connected, "mode": "lines", "hoverinfo": "skip"}
            data.append(path | {"line": {"color": dots.colour, "width": 1.5}, "opacity": 0.55, "showlegend": False})
        data.append(trace)
    layout["xaxis"] = {
        "tickvals": list(range(len(labels))),
        "ticktext": list(labels),
        "range": [-0.5, len(labels) - 0.5],
        "title": {"text": "timestep (the larger, the noisier the image)", "standoff": 10},
        "showgrid": False,
        "zeroline": False,
    }
    layout["yaxis"] = {"title": {"text": axis_title, "standoff": 10}, "zeroline": False}
    if reference is not None:
        shape = {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "yref": "y", "y0": reference, "y1": reference}
        layout["shapes"].append(shape | {"line": {"width": 1.5, "color": "axis"}})
    if labels and labels[-1] == "overall":
        edge = len(labels) - 1.5
        shape = {"type": "line", "yref": "y domain", "y0": 0, "y1": 1, "xref": "x", "x0": edge, "x1": edge}
        layout["shapes"].append(shape | {"line": {"width": 1, "color": "axis", "dash": "dot"}})
    layout["margin"] |= {"t": 44, "b": 60}
    layout["legend"] = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom"}
    return {"data": data, "layout": layout}


def curve_panels(
    panels: Sequence[
        tuple[str, Sequence[tuple[Sequence[float], Dots, tuple[Sequence[float], Sequence[float]] | None]]]
    ],
    across_title: str,
    axis_title: str,
    *,
    logarithmic: bool = False,
    tick_format: str | None = ".3~p",
    reference: float | None = None,
) -> Figure:
    """Lines with intervals side by side: titles, and the lines of each panel.

    logarithmic: along x. tick_format: along y; percentages, unless told otherwise. reference: along y, where a dotted
    line stands.
    """
    layout = _layout(height=420)
    data: list[Figure] = []
    gap = 0.1
    width = (1 - gap * (len(panels) - 1)) / len(panels)
    shown: set[str] = set()
    for index, (title, lines) in enumerate(panels):
        number = "" if index == 0 else str(index + 1)
        left = index * (width + gap)
        axes = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        for line in lines:
            places, dots = list(line.places), line.dots
            if line.band:
                low, high = line.band
                edge = {"x": [*places, *reversed(places)], "y": [*high, *reversed(low)], "fill": "toself"}
                edge |= {"type": "scatter", "mode": "none", "fillcolor": dots.colour, "opacity": 0.25}
                data.append(edge | axes | {"hoverinfo": "skip", "showlegend": False})
            path = {"type": "scatter", "x": places, "y": list(dots.values), "mode": "lines", "hoverinfo": "skip"}
            path |= {"line": {"color": dots.colour, "width": 1.5}, "opacity": 0.55, "showlegend": False}
            trace = _dots_trace(dots, places, horizontal=False) | {"legendgroup": dots.name}
            data += [path | axes, trace | axes | {"showlegend": dots.name not in shown}]
            shown.add(dots.name)
        layout[f"xaxis{number}"] = {
            "domain": [left, left + width],
            "anchor": f"y{number}",
            "title": {"text": across_title, "standoff": 10},
            "zeroline": False,
        }
        if logarithmic:
            ticks = _apart(sorted({place for line in lines for place in line.places}))
            layout[f"xaxis{number}"] |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
        layout[f"yaxis{number}"] = {"anchor": f"x{number}", "zeroline": True}
        if tick_format:
            layout[f"yaxis{number}"]["tickformat"] = tick_format
        if reference is not None:
            shape = {"type": "line", "xref": f"x{number} domain", "x0": 0, "x1": 1, "yref": f"y{number}"}
            line = {"line": {"width": 1.5, "color": "axis", "dash": "dot"}}
            layout["shapes"].append(shape | {"y0": reference, "y1": reference} | line)
        layout["annotations"].append({**_TITLE, "text": f"<b>{plot_text(title)}</b>", "x": left, "y": 1.005})
    layout["yaxis"]["title"] = {"text": axis_title, "standoff": 10}
    layout["margin"] |= {"t": 64, "b": 60}
    layout["legend"] = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.08, "yanchor": "bottom"}
    return {"data": data, "layout": layout}


def _apart(ticks: Sequence[float]) -> list[float]:
    """Those of some numbers whose labels don't overlap on a logarithmic axis."""
    found: list[float] = []
    for tick in ticks:
        if not found or tick >= _RATIO * found[-1]:
            found.append(tick)
    return found


def _layout(height: int) -> Figure:
    return {
        "height": height,
        "margin": {"l": 12, "r": 16, "t": 30, "b": 50},
        "annotations": [],
        "shapes": [],
        "hovermode": "closest",
        "showlegend": True,
    }


def _dots_trace(dots: Dots, places: Sequence[float], horizontal: bool) -> Figure:
    """Markers with asymmetric intervals, along x (horizontal) or y."""
    along, across = ("x", "y") if horizontal else ("y", "x")
    shown = [i for i, value in enumerate(dots.values) if value is not None and not math.isnan(value)]
    values: list[Any] = [dots.values[i] for i in shown]
    symbols = [dots.symbol if dots.filled[i] else f"{dots.symbol}-open" for i in shown]
    trace: Figure = {
        "type": "scatter",
        "mode": "markers",
        "name": plot_text(dots.name),
        along: values,
        across: [places[i] for i in shown],
        "text": [dots.notes[i] for i in shown],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": dots.colour, "symbol": symbols, "size": dots.size, "line": {"width": 1.6}},
    }
    trace["marker"]["line"]["color"] = dots.colour
    if any(dots.lows[i] is not None for i in shown):
        # no bar where there is no interval
        spreads = [
            [value if end is None else end for end in (dots.lows[i], value, dots.highs[i])]
            for i, value in zip(shown, values, strict=True)
        ]
        trace[f"error_{along}"] = error_bars(spreads) | {"thickness": 1.5, "width": 0, "color": dots.colour}
    return trace


def _site_marks(rows: Sequence[tuple[str, int]], names: Names) -> tuple[list[float], list[str], list[float]]:
    """The places of the sites' labels, the labels, and the lines between sites."""
    sites = list(dict.fromkeys(site for site, _ in rows))
    centres, lines = [], []
    for site in sites:
        places = [index for index, (other, _) in enumerate(rows) if other == site]
        centres.append((places[0] + places[-1]) / 2)
        lines.append(places[-1] + 0.5)
    return centres, [plot_text(_fitting(names.sites.get(site, site), _SITE)) for site in sites], lines[:-1]


def _fitting(text: str, most: int) -> str:
    """The text, without its middle where it is too long for its place; hovering says it whole."""
    if len(text) <= most:
        return text
    # the end tells heads of one site apart
    end = most // 2
    return f"{text[: most - end - 1]}…{text[-end:]}"
