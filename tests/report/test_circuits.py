"""The section on circuits: its figures and cells hold what the tables hold, and what there isn't is said."""

from dataclasses import replace
from xml.etree import ElementTree

import polars as pl
import pytest

from headscope.report.lead import NOTHING, lead_of
from headscope.report.naming import Names, percent
from headscope.report.sections import circuits as section
from report import roles_and_circuits as made

NAMES = Names(made.SITES, [made.TIED, made.CONTROL])
GROUPS = [made.TIED, made.CONTROL]


@pytest.fixture(scope="module")
def result():
    return made.result()


@pytest.fixture(scope="module")
def shown(result):
    return section_of(result)


def section_of(result):
    found = section.section(result, NAMES, GROUPS)
    assert found is not None
    return found


def with_circuits(result, **tables):
    return replace(result, circuits=replace(result.circuits, **tables))


def rows_of(table):
    return [dict(zip([title for title, _ in table.columns], row, strict=True)) for row in table.rows]


def changed(result, **columns):
    """The result with other numbers of the chosen circuit."""
    rows = [row | (columns if row["kind"] == "circuit" else {}) for row in result.circuits.faithfulness.to_dicts()]
    return with_circuits(result, faithfulness=pl.DataFrame(rows, infer_schema_length=None))


def test_the_summary_is_of_the_chosen_circuit_and_says_whether_it_reaches(result, shown):
    (sentence,) = shown.values["summary"]
    assert sentence == (
        "On tiled the circuit chosen on discover has 6 heads; on confirm its faithfulness is 0.931 (0.891 to 0.971): it"
        " reaches 0.9, which its interval leaves open."
    )
    row = section.chosen_of(result.circuits, made.TIED)
    assert row is not None
    short = "it falls short of the 0.9 that it was chosen for"
    assert section.reach_of(row | {"reaches": "clearly"}) == "it reaches 0.9"
    assert section.reach_of(row | {"reaches": "no"}) == f"{short}, which its interval leaves open"
    assert section.reach_of(row | {"reaches": "no", "high": 0.89}) == short


def test_the_prediction_stands_beside_the_loss(result):
    row = result.circuits.faithfulness.row(0, named=True) | {"kind": "circuit, by prediction", "metric": "prediction"}
    rows = pl.concat([result.circuits.faithfulness, pl.DataFrame([row | {"value": 0.8, "low": 0.7, "high": 0.9}])])
    sentence = section.sentence_of(with_circuits(result, faithfulness=rows).circuits, made.TIED)
    assert sentence is not None
    assert sentence.endswith(" By the prediction it is 0.800 (0.700 to 0.900).")


def test_figures_hold_the_tables_numbers(result, shown):
    figure = shown.figures["circuit_faithfulness"]
    assert figure["data"][0]["x"] == pytest.approx(result.circuits.faithfulness["value"].to_list())
    assert figure["layout"]["shapes"][0]["x0"] == section.TARGET
    (view,) = shown.figures["circuit_curves"]
    points = {trace["name"]: trace for trace in view.figure["data"] if trace.get("mode") == "markers"}
    assert list(points) == ["greedy", "attribution", "magnitude", "random orders"]
    greedy = result.circuits.curves.filter(method="greedy").sort("size")
    assert points["greedy"]["x"] == greedy["size"].to_list()
    assert points["greedy"]["y"] == pytest.approx(greedy["value"].to_list())
    # the two random orders: their mean, and a band from the smallest to the largest
    both = [1 - 1.8 / 2, 1 - 1.7 / 2]
    assert points["random orders"]["y"][0] == pytest.approx(sum(both) / 2)
    band = next(trace for trace in view.figure["data"] if trace.get("fill") == "toself")
    assert [band["y"][0], band["y"][-1]] == pytest.approx([both[1], both[0]])
    minimal = shown.figures["circuit_minimality"]["data"][0]
    assert minimal["x"] == pytest.approx(sorted(result.circuits.minimality["value"], reverse=True))
    assert minimal["marker"]["symbol"] == ["circle"] * 4 + ["circle-open"] * 2


def test_cells_are_the_tables_numbers(result, shown):
    first = rows_of(shown.values["faithfulness"])[0]
    assert [first["heads kept"], first["faithfulness"], first["reaches 0.9"]] == ["circuit", "0.931", "just"]
    assert shown.values["rest"] == [
        "Without its circuit, the other heads of tiled keep 0.040 (0.000 to 0.080) of what all heads do."
    ]
    whole, half = rows_of(shown.values["completeness"])
    assert [whole["measure"], whole["value"]] == ["faithfulness of what is left", "0.040"]
    assert [half["measure"], half["value"]] == ["circuit − model, without both", "−0.110"]
    assert [whole["removed"], half["removed"]] == ["the circuit", "block 0.attn1 h1, block 1.attn1 h2"]
    assert shown.values["pair_counts"] == ["On tiled, of 1 pair: 1 either suffices."]
    assert [row["verdict"] for row in rows_of(shown.values["minimality"])] == ["needed"] * 4 + ["not established"] * 2
    (pair,) = rows_of(shown.values["pairs"])
    assert pair["heads"] == "block 1.attn1 h2 and block 2.attn1 h0"
    assert [pair["pair"], pair["together"], pair["together − sum"]] == ["either suffices", percent(0.8), percent(0.7)]
    edges = rows_of(shown.values["edges"])
    assert [row["effect"] for row in edges[:2]] == [percent(0.6), percent(0.45)]
    assert [edges[0]["to"], edges[0]["through its"]] == ["prediction", "straight"]
    assert [row["verdict"] for row in edges].count("established") == 6
    (overlap,) = shown.values["overlap"].rows
    assert overlap == ["tiled and untiled", "2", "0.80", "0.25", "0.10", "0.200"]


def test_the_picture_draws_established_edges_alone_with_roles_beside_heads(result, shown):
    ((group, picture, said),) = shown.values["pictures"]
    assert group == made.TIED
    assert said.startswith("6 of 7 edges that were measured are established")
    tree = ElementTree.fromstring(picture)
    classes = [one.get("class", "") for one in tree.iter()]
    assert classes.count("head") == 6
    assert classes.count("other") == 48 - 6
    # an arrow and a line each, and four lines of the legend
    assert sum("edge" in name.split() for name in classes) == 6 + 4
    texts = [one.text for one in tree.iter() if "role" in one.get("class", "").split()]
    assert texts[:-1] == ["edge", "counterpart", "counterpart", "luminance", "counterpart", "uniform"]
    assert section.pictures(result, NAMES, GROUPS) == {made.TIED: picture}
    # without roles and edges there still is one
    bare = replace(with_circuits(result, edges=None, minimality=None), roles=None)
    (text,) = section.pictures(bare, NAMES, GROUPS).values()
    assert "counterpart" not in text


def test_where_there_is_no_circuit_the_section_says_why(result):
    refused = pl.DataFrame([{"group": made.CONTROL, "reason": "removing all heads costs nothing"}])
    found = section_of(with_circuits(result, refused=refused))
    assert found.values["summary"][1] == "On untiled there is no circuit: removing all heads costs nothing."
    nothing = dict.fromkeys(result.circuits.tables())
    only = replace(result, circuits=replace(result.circuits, **nothing | {"refused": refused}))
    found = section_of(only)
    assert found.values["pictures"] == []
    assert not any(found.figures.values())
    assert any("there is no circuit" in sentence for sentence in lead_of(only, NAMES).sentences)
    assert section.section(replace(result, circuits=None), NAMES, GROUPS) is None


def test_a_void_circuit_says_so(result):
    void = changed(result, value=None, low=None, high=None, reaches=None, void=3)
    assert section.sentence_of(void.circuits, made.TIED) == (
        "On tiled the faithfulness of the circuit is void: 3 rows are missing or not finite."
    )
    found = section_of(void)
    assert rows_of(found.values["faithfulness"])[0]["faithfulness"] == "void: 3 missing or not finite"
    assert not any(tile.label.endswith("heads alone") for tile in lead_of(void, NAMES).tiles)


def test_the_lead_gives_size_faithfulness_and_the_strongest_edge(result):
    found = lead_of(replace(result, roles=None, role_effects=None), NAMES)
    (tile,) = found.tiles
    assert tile.value == "0.93"
    assert tile.label == "of the heads' effect on tiled is kept by 6 heads alone"
    assert tile.detail == "95 % interval 0.891 to 0.971; 20 sources; it reaches 0.9, which its interval leaves open"
    assert "6 heads alone, all others replaced by their mean, keep 0.931" in found.sentences[0]
    assert found.sentences[1].startswith("6 of 7 edges of tiled's circuit are established")
    assert "from block 2.attn1 h0 to the value of block 3.attn1 h3" in found.sentences[1]
    assert NOTHING not in found.sentences
    weak = with_circuits(replace(result, roles=None, role_effects=None), edges=result.circuits.edges.head(0))
    assert not any("edges" in sentence for sentence in lead_of(weak, NAMES).sentences)
    none = result.circuits.edges.with_columns(p_maxt=pl.lit(0.5))
    sentences = lead_of(with_circuits(result, edges=none), NAMES).sentences
    assert "Between the heads of tiled's circuit no edge was established, of 7 measured." in sentences


def test_an_exploratory_circuit_has_no_established_finding(result):
    few = changed(replace(result, roles=None, role_effects=None), exploratory=True, sources=7)
    found = lead_of(with_circuits(few, edges=None), NAMES)
    assert found.sentences[0] == NOTHING
    assert "exploratory" in found.sentences[1]
