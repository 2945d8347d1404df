"""The picture of a circuit: well-formed, the same every time, and showing what it was given."""

import itertools
import re
from xml.etree import ElementTree

import pytest

from headscope.report.circuit_picture import Edge, Node, circuit_picture

SVG = "{http://www.w3.org/2000/svg}"
EVIL = '<img src=x onerror=alert(1)></svg><script>alert("&")\x00\x0b'
SITES = {"first": 4, "second": 4, "third": 4}
LABELS = {name: name.upper() for name in SITES}
NODES = [Node("first", 1, 0.4, "edge"), Node("second", 3, 0.1), Node("third", 0, None, "counterpart")]
EDGES = [
    Edge(("first", 1), ("second", 3), "v", 0.2, "20 %"),
    Edge(("first", 1), ("third", 0), "q", -0.1),
    Edge(("second", 3), ("third", 0), "k", 0.05),
    Edge(("third", 0), None, "output", 0.3),
]


def drawn(nodes=NODES, edges=EDGES, sites=SITES, labels=LABELS, title="A circuit"):
    text = circuit_picture(nodes, edges, sites, labels, title=title)
    return text, ElementTree.fromstring(text)


def of_class(tree, name, tag=None):
    return [one for one in tree.iter() if name in one.get("class", "").split() and tag in (None, one.tag[len(SVG) :])]


def lines_of(tree, name="edge"):
    """The lines of edges: not their arrows, nor those of the legend."""
    return [one for one in of_class(tree, name, "path") if "edge" in one.get("class", "") and "C" in one.get("d", "")]


def part_of(line):
    return line.get("class", "").split()[1]


def width(path):
    return float(path.get("stroke-width"))


def test_every_head_and_every_edge_is_drawn():
    _, tree = drawn()
    assert len(of_class(tree, "head", "circle")) == 3
    assert len(of_class(tree, "other", "circle")) == 9
    numbers = [one.text for one in of_class(tree, "number")]
    assert numbers == ["1", "3", "0"]
    lines = lines_of(tree)
    assert sorted(map(part_of, lines)) == ["k", "output", "q", "v"]
    by_part = {part_of(one): one for one in lines}
    # the strongest is the widest; an unknown effect of a head has no label
    assert width(by_part["output"]) > width(by_part["v"]) > width(by_part["q"]) > width(by_part["k"])
    assert [one.text for one in of_class(tree, "effect")] == ["40.0 %", "10.0 %"]
    assert [one.text for one in of_class(tree, "role")] == ["edge", "counterpart", "prediction"]
    titles = [one.text for one in tree.iter(f"{SVG}title")]
    assert "FIRST h1 to SECOND h3, value: 20 %" in titles
    assert "THIRD h0 to prediction" in titles
    assert "a bar at the end: it lowers the loss" in "".join(tree.itertext())


def test_depth_runs_downwards_and_larger_effects_are_larger_nodes():
    _, tree = drawn()
    heads = of_class(tree, "head", "circle")
    heights = [float(one.get("cy")) for one in heads]
    assert heights == sorted(heights)
    assert len(set(heights)) == 3
    radii = [float(one.get("r")) for one in heads]
    assert radii[0] > radii[1] > radii[2] > float(of_class(tree, "other", "circle")[0].get("r"))
    assert float(of_class(tree, "result", "rect")[0].get("y")) > heights[-1]


def test_edges_run_from_the_bottom_of_a_head_to_the_top_of_a_later_one():
    _, tree = drawn()
    circles = {one.text: one for one in of_class(tree, "number")}
    line = lines_of(tree, "v")[0]
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", line.get("d"))]
    start, end = numbers[:2], numbers[-2:]
    assert start[0] == float(circles["1"].get("x"))
    assert abs(end[0] - float(circles["3"].get("x"))) < 12
    assert start[1] < end[1]


def test_the_same_numbers_give_the_same_bytes_whatever_order_edges_come_in():
    assert drawn()[0] == drawn()[0]
    distinct = drawn(edges=EDGES[::-1])[0]
    assert distinct == drawn()[0]


def test_names_are_escaped_and_what_xml_cannot_hold_is_replaced():
    sites = {EVIL: 2, "second": 2}
    nodes = [Node(EVIL, 0, 0.1, EVIL, EVIL), Node("second", 1)]
    edges = [Edge((EVIL, 0), ("second", 1), "v", 0.1, EVIL)]
    text, tree = drawn(nodes, edges, sites, {}, title=EVIL)
    tags = {one.tag[len(SVG) :] for one in tree.iter()}
    assert tags <= {"svg", "title", "style", "line", "text", "g", "path", "circle", "rect"}
    assert not [name for one in tree.iter() for name in one.attrib if name.startswith("on")]
    assert tree.get("aria-label", "").startswith("<img src=x")
    assert "\x00" not in text
    assert "href" not in text


def test_thirty_heads_at_twelve_sites_stay_inside_and_apart():
    sites = {f"block {index}": 24 for index in range(12)}
    nodes = [Node(f"block {index % 12}", (7 * index + index // 12) % 24, 0.1, "counterpart") for index in range(30)]
    edges = [
        Edge((one.site, one.head), (two.site, two.head), "v", 0.1 / (1 + place))
        for place, (one, two) in enumerate((a, b) for a in nodes for b in nodes if sites_before(a, b))
    ]
    _, tree = drawn(nodes, edges, sites, {})
    box = [float(number) for number in tree.get("viewBox", "").split()]
    circles = of_class(tree, "head", "circle") + of_class(tree, "other", "circle")
    places = [(float(one.get("cx")), float(one.get("cy")), float(one.get("r"))) for one in circles]
    assert len(places) == 12 * 24
    assert all(r < x < box[2] - r and r < y < box[3] - r for x, y, r in places)
    for height in {y for _, y, _ in places}:
        row = sorted((x, r) for x, y, r in places if y == height)
        assert all(b - a > ra + rb - 1e-6 for (a, ra), (b, rb) in itertools.pairwise(row))
    # the weakest of that many edges are left out, and that is said
    assert len(lines_of(tree)) == 80
    assert f"Left out: {len(edges) - 80} weaker edges." in "".join(tree.itertext())


def sites_before(one, two):
    return int(one.site.split()[1]) < int(two.site.split()[1])


def test_of_more_sites_those_without_any_of_the_circuit_are_left_out():
    sites = {f"block {index}": 2 for index in range(20)}
    _, tree = drawn([Node("block 3", 0), Node("block 17", 1)], [], sites, {})
    assert [one.text for one in of_class(tree, "site")] == ["block 3", "block 17"]
    assert "Left out: 18 sites without any of it." in "".join(tree.itertext())


@pytest.mark.parametrize("sites", [{}, {"first": 0}])
def test_heads_of_unknown_sites_and_no_heads_at_all(sites):
    _, tree = drawn([Node("new", 2)], [Edge(("new", 2), None, "output", 0.0)], sites, {})
    assert len(of_class(tree, "head", "circle")) == 1
    assert len(of_class(tree, "other", "circle")) == 2
    _, tree = drawn([], [], sites, {})
    assert len(of_class(tree, "result", "rect")) == 1
