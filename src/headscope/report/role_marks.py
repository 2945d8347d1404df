"""Every role's colour and letters, and the picture of which head has which."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from headscope.report.naming import Names, plot_text
from headscope.report.panels import Figure, View
from headscope.study.roles.naming import NONE

# roles that are no feature of an image stand last, in shades of grey and brown
PLAIN = ("local", "sink", "uniform")
_PLAIN_COLOURS = ("#8A6D4B", "#55606E", "#8A8F98")
# distinct for colour-blind readers, under white letters and on both backgrounds
_COLOURS = (
    "#4477AA",
    "#C2465A",
    "#228833",
    "#AA5599",
    "#B07A00",
    "#1F8FA6",
    "#7A6FBF",
    "#A34F2B",
    "#5B7F2B",
    "#D0568F",
)
_NO_ROLE = "rgba(128,136,150,0.16)"
# panels beside each other
_ABREAST = 3


class RoleMarks:
    """The colour and the letters of every role; alike wherever the page shows it.

    Attributes:
        roles: those that were named anywhere, features first, then `PLAIN`; without `NONE`.
    """

    def __init__(self, roles: Sequence[str]) -> None:
        found = [role for role in dict.fromkeys(roles) if role != NONE]
        self.roles = [*sorted(role for role in found if role not in PLAIN), *(role for role in PLAIN if role in found)]
        self._letters = _letters(self.roles)

    def letters(self, role: str) -> str:
        return self._letters.get(role, "")

    def colour(self, role: str) -> str:
        if role in PLAIN:
            return _PLAIN_COLOURS[PLAIN.index(role)]
        if role not in self.roles:
            return _PLAIN_COLOURS[-1]
        return _COLOURS[self.roles.index(role) % len(_COLOURS)]


def role_grids(
    panels: Sequence[tuple[str, pl.DataFrame]], names: Names, marks: RoleMarks, notes: Mapping[tuple, str]
) -> list[View]:
    """The heads by site (downwards, in the order of execution) and number, coloured by role; a panel per group.

    panels: title and table: site, head, role. notes: what hovering over a head says, by (panel's title, site, head).
    """
    chunks = [panels[start : start + _ABREAST] for start in range(0, len(panels), _ABREAST)]
    return [View(", ".join(title for title, _ in chunk), _grids(chunk, names, marks, notes)) for chunk in chunks]


def _grids(
    panels: Sequence[tuple[str, pl.DataFrame]], names: Names, marks: RoleMarks, notes: Mapping[tuple, str]
) -> Figure:
    categories = [NONE, *marks.roles]
    sites = sorted({site for _, table in panels for site in table["site"]}, key=names.place)
    count = max(int(table["head"].max() or 0) + 1 for _, table in panels)  # type: ignore[operator]
    gap = 0.04
    slots = max(2, len(panels))
    width = (1 - gap * (slots - 1)) / slots
    height = 34 * max(3, len(sites))
    layout: Figure = {"height": height + 130, "annotations": [], "shapes": [], "hovermode": "closest"}
    data: list[Figure] = []
    for index, (title, table) in enumerate(panels):
        number = "" if index == 0 else str(index + 1)
        left = index * (width + gap)
        data.append(_cells(title, table, sites, count, categories, marks, notes) | _axes(number))
        layout[f"xaxis{number}"] = {
            "domain": [left, left + width],
            "anchor": f"y{number}",
            "title": {"text": "head", "standoff": 8},
            "tickvals": list(range(count)) if count <= 16 else list(range(0, count, 4)),
            "range": [-0.5, count - 0.5],
            "showgrid": False,
            "zeroline": False,
        }
        layout[f"yaxis{number}"] = {
            "anchor": f"x{number}",
            "range": [len(sites) - 0.5, -0.5],
            "tickvals": list(range(len(sites))),
            "ticktext": [plot_text(names.sites.get(site, site)) if index == 0 else "" for site in sites],
            "showgrid": False,
            "zeroline": False,
        }
        place = {"showarrow": False, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
        layout["annotations"].append({**place, "text": f"<b>{plot_text(title)}</b>", "x": left, "y": 1.005})
    layout["showlegend"] = True
    layout["legend"] = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1 + 26 / height, "yanchor": "bottom"}
    layout["margin"] = {"l": 12, "r": 16, "t": 70, "b": 50}
    return {"data": [*data, *_key(panels, categories, marks)], "layout": layout}


def _cells(
    title: str,
    table: pl.DataFrame,
    sites: Sequence[str],
    count: int,
    categories: Sequence[str],
    marks: RoleMarks,
    notes: Mapping[tuple, str],
) -> Figure:
    colours = [_NO_ROLE, *(marks.colour(role) for role in categories[1:])]
    values: list[list[int | None]] = [[None] * count for _ in sites]
    letters, texts = ([[""] * count for _ in sites] for _ in range(2))
    for site, head, role in table.select("site", "head", "role").iter_rows():
        row = sites.index(site)
        values[row][head] = categories.index(role)
        letters[row][head] = marks.letters(role)
        texts[row][head] = notes.get((title, site, head), "")
    steps = [(place, colour) for place, colour in enumerate(colours)]
    scale: list[Any] = [[edge / len(colours), colour] for place, colour in steps for edge in (place, place + 1)]
    return {
        "type": "heatmap",
        "z": values,
        "zmin": -0.5,
        "zmax": len(colours) - 0.5,
        "colorscale": scale,
        "showscale": False,
        "text": letters,
        "texttemplate": "%{text}",
        "textfont": {"color": "#ffffff", "size": 13},
        "hovertext": texts,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "xgap": 2,
        "ygap": 2,
    }


def _key(panels: Sequence[tuple[str, pl.DataFrame]], categories: Sequence[str], marks: RoleMarks) -> list[Figure]:
    """What the colours mean."""
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [None],
            "y": [None],
            "hoverinfo": "skip",
            "name": plot_text(f"{marks.letters(role)} {role}" if role != NONE else "no role"),
            "marker": {"symbol": "square", "size": 12, "color": _NO_ROLE if role == NONE else marks.colour(role)},
        }
        for role in [*categories[1:], NONE]
    ]


def _axes(number: str) -> Figure:
    return {"xaxis": f"x{number}", "yaxis": f"y{number}"}


def _letters(roles: Sequence[str]) -> dict[str, str]:
    """Two letters for each role: its first, and the first of the others that keeps them apart."""
    found: dict[str, str] = {}
    for role in roles:
        first = role[:1].upper()
        others = [letter for letter in role[1:].lower() if letter.isalnum()]
        candidates = [f"{first}{letter}" for letter in [*others, *"123456789"]]
        free = [letters for letters in candidates if letters not in found.values()]
        found[role] = free[0] if free else first
    return found
