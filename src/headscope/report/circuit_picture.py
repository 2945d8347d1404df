"""The picture of a circuit: sites by depth from top to bottom, heads as nodes, what flows between them as edges.

It is SVG written by hand: the same numbers give the same bytes, nothing runs in it, and it follows the reader's light
or dark preference, inside the page and as a file of its own. Programs that know no such preference draw the light one.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from headscope.report.naming import percent

# of more sites, those that hold nothing of the circuit are left out; of more edges, the weakest
_MOST_SITES, _MOST_EDGES = 12, 80
_WIDTH, _LEFT, _RIGHT, _TOP, _LEGEND = 980.0, 128.0, 16.0, -10.0, 58.0
_ROW, _ROW_TIGHT, _ROW_EMPTY = 104.0, 84.0, 34.0
_SMALL, _LEAST, _MORE = 4.0, 11.0, 6.0
# room between the last site and the prediction
_BEFORE = 14.0
# a circuit's head needs so much more room in its row than another, and so many pixels for a label beside it
_SHARE, _BESIDE, _LETTER = 3.2, 92.0, 5.9
_OUTPUT_WIDTH, _OUTPUT_HEIGHT = 190.0, 28.0
_PARTS = {"q": "query", "k": "key", "v": "value", "output": "prediction"}
# what XML can't hold, however it is written
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_STYLE = """
.circuit { color: #1d2330; font: 11px ui-sans-serif, system-ui, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
.circuit text { fill: #1d2330; }
.circuit .ground { fill: #ffffff; }
.circuit .site { font-size: 12px; fill: #5a6373; }
.circuit .role { font-weight: 600; }
.circuit .effect, .circuit .legend { fill: #5a6373; }
.circuit .halo { paint-order: stroke; stroke: #ffffff; stroke-width: 3px; stroke-linejoin: round; }
.circuit .rail { stroke: #e2e3df; }
.circuit .other { fill: #ffffff; stroke: #9aa1ad; }
.circuit .head { fill: #44546a; stroke: #ffffff; stroke-width: 2px; }
.circuit .number { fill: #ffffff; font-weight: 650; text-anchor: middle; }
.circuit .result { fill: #ffffff; stroke: #1d2330; }
.circuit .edge { fill: none; stroke-linecap: round; }
.circuit .q { stroke: #3f78b5; fill: #3f78b5; }
.circuit .k { stroke: #a87400; fill: #a87400; }
.circuit .v { stroke: #c2465a; fill: #c2465a; }
.circuit .output { stroke: #8a8f98; fill: #8a8f98; }
.circuit .edge.q, .circuit .edge.k, .circuit .edge.v, .circuit .edge.output { fill: none; }
.circuit .edge.q { stroke-dasharray: 7 5; }
.circuit .edge.k { stroke-dasharray: 1 6; }
@media (prefers-color-scheme: dark) {
  .circuit { color: #e6e9ef; }
  .circuit text, .circuit .role { fill: #e6e9ef; }
  .circuit .ground { fill: #191d25; }
  .circuit .site, .circuit .effect, .circuit .legend { fill: #a3acba; }
  .circuit .halo { stroke: #191d25; }
  .circuit .rail { stroke: #2c323d; }
  .circuit .other { fill: #191d25; stroke: #6d7686; }
  .circuit .head { fill: #93a4bd; stroke: #191d25; }
  .circuit .number { fill: #12151b; }
  .circuit .result { fill: #191d25; stroke: #e6e9ef; }
  .circuit .q { stroke: #7fb2ea; fill: #7fb2ea; }
  .circuit .k { stroke: #e0b04f; fill: #e0b04f; }
  .circuit .v { stroke: #f0889a; fill: #f0889a; }
  .circuit .output { stroke: #8f98a8; fill: #8f98a8; }
}
"""


@dataclass(frozen=True)
class Node:
    """A head of the circuit.

    Attributes:
        effect: what it is drawn by the size of and labelled with, a fraction; None where it isn't known.
        role: its name stands beside the node; empty for none.
        note: what hovering over it says, beside its name.
    """

    site: str
    head: int
    effect: float | None = None
    role: str = ""
    note: str = ""


@dataclass(frozen=True)
class Edge:
    """An established effect of one head through another, or straight on the prediction.

    Attributes:
        sender, receiver: (site, head); no receiver is the prediction.
        part: "q", "k" or "v" of the receiver; "output" for the prediction.
        effect: a fraction; the width of the line. Below 0 the line ends in a bar, otherwise in an arrow.
        note: what hovering over it says, beside its ends.
    """

    sender: tuple[str, int]
    receiver: tuple[str, int] | None
    part: str
    effect: float
    note: str = ""


@dataclass(frozen=True)
class _Place:
    x: float
    y: float
    radius: float
    slot: float


def circuit_picture(
    nodes: Sequence[Node], edges: Sequence[Edge], sites: Mapping[str, int], labels: Mapping[str, str], *, title: str
) -> str:
    """The picture as the text of an SVG file.

    Args:
        nodes: the circuit's heads. Edges from or to other heads are drawn, too, between hollow nodes.
        edges: the established ones; those below the strongest 80 are left out, and the picture says how many.
        sites: the model's, with their numbers of heads, in the order of execution; the picture adds those of nodes and
            edges that are missing there.
        labels: short names of sites.
        title: what the picture is called; it isn't drawn.
    """
    drawn = sorted(edges, key=lambda edge: (-abs(edge.effect), _ends(edge), edge.part))[:_MOST_EDGES]
    touched = [*((node.site, node.head) for node in nodes), *(end for edge in drawn for end in _ends(edge))]
    heads = _heads_of(sites, touched)
    held = {site for site, _ in touched}
    shown = [site for site in heads if len(heads) <= _MOST_SITES or site in held]
    levels, bottom = _levels(shown, held)
    places = _places(levels, heads, nodes)
    height = bottom + _OUTPUT_HEIGHT + _LEGEND
    label = _text(title)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="circuit" viewBox="0 0 {_WIDTH:.0f} {height:.0f}"'
        f' width="{_WIDTH:.0f}" height="{height:.0f}" role="img" aria-label="{label}">',
        f"<title>{label}</title>",
        f"<style>{_STYLE}</style>",
        '<rect class="ground" width="100%" height="100%"/>',
        *_rails(levels, labels),
        *_edges(drawn, places, labels, bottom),
        *_others(heads, shown, nodes, places, labels),
        *(line for node in nodes if node.site in shown for line in _node(node, places, labels)),
        *_result(bottom),
        *_legend(drawn, height, len(heads) - len(shown), len(edges) - len(drawn)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _ends(edge: Edge) -> list[tuple[str, int]]:
    return [edge.sender] if edge.receiver is None else [edge.sender, edge.receiver]


def _heads_of(sites: Mapping[str, int], touched: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Every site's number of heads, with room for all that are drawn."""
    counts = dict(sites)
    for site, head in touched:
        counts[site] = max(counts.get(site, 0), head + 1)
    return counts


def _levels(shown: Sequence[str], held: Collection[str]) -> tuple[dict[str, float], float]:
    """How far down every site stands, and the prediction: those that hold nothing of the circuit are close together."""
    row = _ROW if sum(site in held for site in shown) <= 8 else _ROW_TIGHT
    # above a tall first row half of it is room enough
    levels, y = {}, _TOP if shown and shown[0] in held else 8.0
    for site in shown:
        height = row if site in held else _ROW_EMPTY
        levels[site] = y + height / 2
        y += height
    return levels, y + _BEFORE


def _places(
    levels: Mapping[str, float], heads: Mapping[str, int], nodes: Sequence[Node]
) -> dict[tuple[str, int], _Place]:
    """Where every head stands: in its site's row, in the order of numbers, the circuit's with more room."""
    known = {(node.site, node.head): node for node in nodes}
    largest = max((abs(node.effect) for node in nodes if node.effect is not None), default=0.0)
    places = {}
    for site, y in levels.items():
        shares = [_SHARE if (site, head) in known else 1.0 for head in range(heads[site])]
        unit = (_WIDTH - _LEFT - _RIGHT) / max(1.0, sum(shares))
        left = _LEFT
        for head, share in enumerate(shares):
            slot = share * unit
            node = known.get((site, head))
            radius = _SMALL if node is None else _LEAST
            if node is not None and node.effect is not None and largest > 0:
                radius += _MORE * math.sqrt(abs(node.effect) / largest)
            # a label beside a node stands to its right
            beside = node is not None and slot >= _BESIDE
            x = left + (radius + 6 + (slot - _BESIDE) / 2 if beside else slot / 2)
            places[site, head] = _Place(x, y, radius, slot)
            left += slot
    return places


def _rails(levels: Mapping[str, float], labels: Mapping[str, str]) -> list[str]:
    """A line for every site, with its label."""
    lines = []
    for site, y in levels.items():
        lines.append(f'<line class="rail" x1="{_LEFT:.1f}" x2="{_WIDTH - _RIGHT:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        short = _fitting(labels.get(site, site), _LEFT - 12)
        lines.append(f'<text class="site" x="4" y="{y + 4:.1f}">{_text(short)}<title>{_text(site)}</title></text>')
    return lines


def _edges(
    edges: Sequence[Edge], places: Mapping[tuple[str, int], _Place], labels: Mapping[str, str], bottom: float
) -> list[str]:
    """The lines, the strongest on top of the others and all below the nodes."""
    strongest = max((abs(edge.effect) for edge in edges), default=0.0)
    direct = sorted((edge for edge in edges if edge.receiver is None), key=lambda edge: places[edge.sender].x)
    lines = []
    for edge in reversed(edges):
        start = places[edge.sender]
        width = 1.2 + (4.8 * abs(edge.effect) / strongest if strongest > 0 else 0.0)
        if edge.receiver is None:
            step = _OUTPUT_WIDTH / (len(direct) + 1)
            across = next(index for index, other in enumerate(direct) if other is edge)
            x, y = _WIDTH / 2 - _OUTPUT_WIDTH / 2 + step * (across + 1), bottom
        else:
            end = places[edge.receiver]
            # query, key and value enter side by side
            port = {"q": -0.55, "k": 0.0, "v": 0.55}.get(edge.part, 0.0)
            x = end.x + port * end.radius
            y = end.y - math.sqrt(1 - port**2) * end.radius
        lines += _line(edge, start, (x, y - 1), width, labels)
    return lines


def _line(edge: Edge, start: _Place, end: tuple[float, float], width: float, labels: Mapping[str, str]) -> list[str]:
    part = edge.part if edge.part in _PARTS else "output"
    tip = 4.5 + 0.8 * width
    x, y = start.x, start.y + start.radius
    tall = end[1] - y
    # a line over several sites bends outward, so that it doesn't run through the heads between
    bend = 0.0 if tall < 1.2 * _ROW else math.copysign(min(70.0, 0.16 * tall), x - _WIDTH / 2)
    stop = end[1] - (tip if edge.effect >= 0 else 2)
    curve = (
        f"M{x:.1f} {y:.1f}C{x + bend:.1f} {y + 0.42 * tall:.1f} {end[0] + bend:.1f} {end[1] - 0.42 * tall:.1f}"
        f" {end[0]:.1f} {stop:.1f}"
    )
    if edge.effect >= 0:
        head = f"M{end[0]:.1f} {end[1]:.1f}l{-tip / 2:.1f} {-tip:.1f}h{tip:.1f}z"
    else:
        head = f"M{end[0] - tip:.1f} {end[1] - 2:.1f}h{2 * tip:.1f}v2h{-2 * tip:.1f}z"
    ends = [_head(labels, *one) for one in _ends(edge)]
    to = f"{ends[1]}, {_PARTS.get(part, part)}" if len(ends) > 1 else "prediction"
    note = f": {edge.note}" if edge.note else ""
    return [
        f"<g><title>{_text(f'{ends[0]} to {to}{note}')}</title>"
        f'<path class="edge {part}" stroke-width="{width:.1f}" d="{curve}"/>'
        f'<path class="{part}" stroke="none" d="{head}"/></g>'
    ]


def _others(
    heads: Mapping[str, int],
    shown: Sequence[str],
    nodes: Sequence[Node],
    places: Mapping[tuple[str, int], _Place],
    labels: Mapping[str, str],
) -> list[str]:
    """The heads outside the circuit: hollow and small."""
    inside = {(node.site, node.head) for node in nodes}
    lines = []
    for site in shown:
        for head in range(heads[site]):
            if (site, head) not in inside:
                at = places[site, head]
                lines.append(
                    f'<circle class="other" cx="{at.x:.1f}" cy="{at.y:.1f}" r="{at.radius:.1f}">'
                    f"<title>{_text(_head(labels, site, head))}: not in the circuit</title></circle>"
                )
    return lines


def _node(node: Node, places: Mapping[tuple[str, int], _Place], labels: Mapping[str, str]) -> list[str]:
    at = places[node.site, node.head]
    words = [word for word in (node.role, node.note) if word]
    about = _head(labels, node.site, node.head) + (f": {'; '.join(words)}" if words else "")
    lines = [
        f"<g><title>{_text(about)}</title>",
        f'<circle class="head" cx="{at.x:.1f}" cy="{at.y:.1f}" r="{at.radius:.1f}"/>',
        f'<text class="number" x="{at.x:.1f}" y="{at.y + 4:.1f}">{node.head}</text>',
    ]
    effect = "" if node.effect is None else percent(node.effect)
    if at.slot >= _BESIDE:
        x, room = at.x + at.radius + 5, _BESIDE - 2 * at.radius - 8
        if node.role:
            role = _text(_fitting(node.role, room + (at.slot - _BESIDE) / 2))
            lines.append(f'<text class="role halo" x="{x:.1f}" y="{at.y - 5:.1f}">{role}</text>')
        if effect:
            y = at.y + (13 if node.role else 4)
            lines.append(f'<text class="effect halo" x="{x:.1f}" y="{y:.1f}">{effect}</text>')
    elif node.role:
        y = at.y + at.radius + 12
        role = _text(_fitting(node.role, at.slot - 2))
        lines.append(f'<text class="role halo" text-anchor="middle" x="{at.x:.1f}" y="{y:.1f}">{role}</text>')
    return [*lines, "</g>"]


def _result(bottom: float) -> list[str]:
    x = _WIDTH / 2 - _OUTPUT_WIDTH / 2
    return [
        f'<rect class="result" x="{x:.1f}" y="{bottom:.1f}" width="{_OUTPUT_WIDTH:.1f}" height="{_OUTPUT_HEIGHT:.1f}"'
        ' rx="8"/>',
        f'<text class="role" text-anchor="middle" x="{_WIDTH / 2:.1f}" y="{bottom + 18:.1f}">prediction</text>',
    ]


def _legend(edges: Sequence[Edge], height: float, hidden_sites: int, hidden_edges: int) -> list[str]:
    """What lines and nodes mean, as far as there are such, and what was left out."""
    lines = []
    x, y = 4.0, height - 26
    for part, word in _PARTS.items():
        if any(edge.part == part for edge in edges):
            text = "straight to the prediction" if part == "output" else f"through the {word}"
            lines.append(f'<path class="edge {part}" stroke-width="2.5" d="M{x:.1f} {y - 4:.1f}h34"/>')
            lines.append(f'<text class="legend" x="{x + 42:.1f}" y="{y:.1f}">{text}</text>')
            x += 60 + _LETTER * len(text)
    if any(edge.effect < 0 for edge in edges):
        lines.append(f'<text class="legend" x="{x:.1f}" y="{y:.1f}">a bar at the end: it lowers the loss</text>')
    words = ["Filled: in the circuit, number of the head inside. Hollow: not in it."]
    words += [f"Left out: {hidden_sites} sites without any of it."] if hidden_sites else []
    words += [f"Left out: {hidden_edges} weaker edges."] if hidden_edges else []
    lines.append(f'<text class="legend" x="4" y="{height - 8:.1f}">{" ".join(words)}</text>')
    return lines


def _head(labels: Mapping[str, str], site: str, head: int) -> str:
    return f"{labels.get(site, site)} h{head}"


def _fitting(text: str, room: float) -> str:
    """The text, cut where it is wider than so many pixels."""
    most = max(2, int(room / _LETTER))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _text(text: str) -> str:
    return escape(_FORBIDDEN.sub("\ufffd", text))
