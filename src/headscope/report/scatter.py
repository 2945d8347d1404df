"""Scatter plots of heads: one number against another."""

from collections.abc import Sequence
from dataclasses import dataclass

from headscope.report.naming import plot_text
from headscope.report.panels import Figure, View

# panels beside each other
_ABREAST = 3


@dataclass(frozen=True)
class Points:
    """One panel.

    Attributes:
        across, up: the two numbers of every point.
        filled: whether each marker is solid.
        notes: what hovering over each point says.
    """

    title: str
    across: Sequence[float]
    up: Sequence[float]
    filled: Sequence[bool]
    notes: Sequence[str]
    colour: str


def scatter_views(
    panels: Sequence[Points], across: str, up: str, *, percent: bool = False, equal: bool = True
) -> list[View]:
    """Panels side by side, a view for every few of them.

    across, up: titles of the axes. percent: ticks are percentages. equal: both axes span the same, and a line stands
    where the numbers are equal.
    """
    chunks = [panels[start : start + _ABREAST] for start in range(0, len(panels), _ABREAST)]
    return [
        View(", ".join(points.title for points in chunk), _figure(chunk, across, up, percent, equal))
        for chunk in chunks
    ]


def _figure(panels: Sequence[Points], across: str, up: str, percent: bool, equal: bool) -> Figure:
    data, layout = [], _layout()
    gap = 0.11
    # a single panel isn't drawn over the whole width
    slots = max(2, len(panels))
    width = (1 - gap * (slots - 1)) / slots
    for index, points in enumerate(panels):
        number = "" if index == 0 else str(index + 1)
        left = index * (width + gap)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": list(points.across),
                "y": list(points.up),
                "text": list(points.notes),
                "hovertemplate": "%{text}<extra></extra>",
                "showlegend": False,
                "xaxis": f"x{number}",
                "yaxis": f"y{number}",
                "marker": {
                    "color": points.colour,
                    "size": 8,
                    "opacity": 0.85,
                    "symbol": ["circle" if solid else "circle-open" for solid in points.filled],
                    "line": {"width": 1.4, "color": points.colour},
                },
            }
        )
        x_range, y_range = _range(points.across), _range(points.up)
        if equal:
            x_range = y_range = [min(x_range[0], y_range[0]), max(x_range[1], y_range[1])]
            layout["shapes"].append(
                {"type": "line", "xref": f"x{number}", "yref": f"y{number}", "line": {"width": 1.2, "color": "axis"}}
                | {"x0": x_range[0], "x1": x_range[1], "y0": x_range[0], "y1": x_range[1], "layer": "below"}
            )
        ticks = {"tickformat": ".3~p"} if percent else {}
        layout[f"xaxis{number}"] = {
            "domain": [left, left + width],
            "anchor": f"y{number}",
            "range": x_range,
            "title": {"text": across, "standoff": 10},
            "zeroline": False,
            "nticks": 6,
        } | ticks
        layout[f"yaxis{number}"] = {
            "anchor": f"x{number}",
            "range": y_range,
            "title": {"text": up if index == 0 else "", "standoff": 10},
            "zeroline": False,
            "nticks": 7,
        } | (ticks if equal else {})
        layout["annotations"].append(
            {"text": f"<b>{plot_text(points.title)}</b>", "showarrow": False, "xref": "paper", "yref": "paper"}
            | {"x": left, "y": 1.02, "xanchor": "left", "yanchor": "bottom"}
        )
    return {"data": data, "layout": layout}


def _layout() -> Figure:
    return {
        "height": 430,
        "margin": {"l": 12, "r": 16, "t": 40, "b": 60},
        "annotations": [],
        "shapes": [],
        "hovermode": "closest",
        "showlegend": False,
    }


def _range(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return [low - room, high + room]
