"""What makes a name and what doesn't, on tables by hand."""

import polars as pl
import pytest

from headscope.study.roles.naming import chosen_cells, chosen_roles, confirmed_cells, named

CELL = {"site": "a", "head": 0, "feature": "edge", "unit": "standard deviations", "least": 0.1, "value": 0.5}
CELL |= {"low": 0.3, "high": 0.7, "p_value": 0.001, "p_maxt": 0.01, "p_chosen": 0.01, "standard_error": 0.1}
CELL |= {"own": 0.4, "own_low": 0.2, "own_high": 0.6, "rival": None, "sources": 24, "exploratory": False, "void": 0}


def cells(*changes):
    numbers = dict.fromkeys([name for name, value in CELL.items() if isinstance(value, float)], pl.Float64)
    return pl.DataFrame([CELL | change for change in changes], schema_overrides=numbers | {"rival": pl.String})


def form(*heads, p=0.01):
    rows = [
        {"site": "a", "head": head, "value": 0.01, "low": 0.0, "high": 0.02, "p_value": p, "p_holm": p}
        for head in heads
    ]
    schema = {"site": pl.String, "head": pl.Int64} | dict.fromkeys(
        ("value", "low", "high", "p_value", "p_holm"), pl.Float64
    )
    table = pl.DataFrame(rows, schema)
    return table.with_columns(
        standard_error=pl.lit(0.01), sources=pl.lit(24), exploratory=pl.lit(False), void=pl.lit(0)
    )


HEADS = pl.DataFrame({"site": ["a"], "head": [0], "void": [0], "unseen": [""], "unseen_maps": [0]})


def role(discover=None, confirm=None, few=False, heads=HEADS, ties=(None, None), **forms):
    """The name of head 0: changes of its cell on discover and confirm."""
    chosen = chosen_cells(cells(discover or {}), ties[0])
    confirmed = confirmed_cells(chosen, cells(confirm or {}), ties[1])
    return named(heads, confirmed, dict.fromkeys(("uniform", "sink", "local")) | forms, few).row(0, named=True)


def test_what_holds_on_both_splits_is_a_name():
    found = role()
    assert (found["role"], found["sign"], found["p_maxt"], found["reason"]) == ("edge", 1, 0.01, None)
    away = {"value": -0.5, "low": -0.7, "high": -0.3, "own": -0.4, "own_low": -0.6, "own_high": -0.2}
    assert role(away, away)["sign"] == -1


@pytest.mark.parametrize(
    ("discover", "confirm", "reason"),
    [
        ({"p_maxt": 0.05}, {}, "nothing was found on discover"),
        ({"p_maxt": None}, {}, "nothing was found on discover"),
        ({"value": 0.09}, {}, "nothing was found on discover"),
        ({"least": 0.6}, {}, "nothing was found on discover"),
        ({}, {"p_chosen": 0.05}, "not confirmed: edge"),
        ({}, {"p_chosen": None}, "not confirmed: edge"),
        ({}, {"low": 0.09}, "not confirmed: edge"),
        ({}, {"low": None, "high": None}, "not confirmed: edge"),
        ({}, {"value": -0.5, "low": -0.7, "high": -0.3}, "not confirmed: edge"),
        ({"own_low": -0.1}, {}, "its excess on edge is another when other features are taken off"),
        ({}, {"own_low": -0.1}, "its excess on edge is another when other features are taken off"),
        ({"own_low": None}, {}, "its excess on edge is another when other features are taken off"),
        ({"rival": "object"}, {}, "edge or object: these can't be told apart here"),
        ({}, {"rival": "object"}, "edge or object: these can't be told apart here"),
    ],
)
def test_what_doesnt_is_none_and_says_why(discover, confirm, reason):
    found = role(discover, confirm)
    assert (found["role"], found["feature"], found["reason"]) == ("none", None, reason)


def test_a_residual_that_points_away_from_its_own_map_is_no_name():
    """What suppresses: less on the residual, more on the map itself."""
    turned = {"value": -0.5, "low": -0.7, "high": -0.3}
    assert role(turned, turned)["reason"] == "its excess on edge is another when other features are taken off"


def test_the_largest_t_is_chosen_and_it_alone():
    table = cells({}, {"feature": "object", "value": 0.9, "standard_error": 0.3}, {"feature": "texture", "value": -0.3})
    found = chosen_cells(table)
    assert found.select("feature", "sign", "discover", "doubt").rows() == [("edge", 1, 0.5, None)]
    # where it is doubtful, the next isn't taken in its place
    found = chosen_cells(cells({"rival": "z"}, {"feature": "object", "value": 0.9, "standard_error": 0.3}))
    assert found["feature"].to_list() == ["edge"]
    assert found["doubt"].to_list() == ["edge or z: these can't be told apart here"]


def test_one_that_turns_is_chosen_only_where_there_is_no_other():
    turned = {"value": -0.9, "low": -1.2, "high": -0.7}
    found = chosen_cells(cells({}, turned | {"feature": "boundary"}))
    assert found.select("feature", "sign", "doubt").rows() == [("edge", 1, None)]
    found = chosen_cells(cells(turned | {"feature": "boundary"}, {"p_maxt": 0.5}))
    assert found["doubt"].to_list() == ["its excess on boundary is another when other features are taken off"]


def test_a_feature_that_holds_stands_before_uniform_sink_and_local():
    found = role(uniform=form(0), sink=form(0), local=form(0))
    assert (found["role"], found["feature"], found["local"]) == ("edge", "edge", True)
    for without in ({"p_maxt": 0.5}, {"rival": "object"}):
        found = role(without, uniform=form(0), sink=form(0), local=form(0))
        assert (found["role"], found["feature"], found["unit"]) == ("uniform", None, "nats")
        assert role(without, sink=form(0), local=form(0))["role"] == "sink"
    # one that was chosen and isn't confirmed stands before none
    assert role({}, {"p_chosen": 0.5}, uniform=form(0))["role"] == "uniform"
    found = role({"p_maxt": 0.5}, local=form(0))
    assert (found["role"], found["p_maxt"], found["unit"]) == ("local", 0.01, "of the distance of uniform attention")
    assert role({"p_maxt": 0.5}, local=form(0, p=0.06))["reason"] == "not confirmed: local"
    assert role(uniform=form(0), few=True)["role"] == "none"


def test_discover_chooses_by_the_same_order():
    def of(**forms):
        chosen = chosen_cells(cells({}))
        return chosen_roles(HEADS, chosen, dict.fromkeys(("uniform", "sink", "local")) | forms).row(0, named=True)

    assert (of()["role"], of()["feature"], of()["sign"], of()["discover"]) == ("edge", "edge", 1, 0.5)
    assert (of(local=form(0))["role"], of(local=form(0))["feature"]) == ("edge", "edge")
    assert (of(uniform=form(0), sink=form(0))["role"], of(sink=form(0))["feature"]) == ("edge", "edge")
    doubtful = chosen_cells(cells({"rival": "z"}))
    forms = {"uniform": form(0), "sink": form(0), "local": form(0)}
    found = chosen_roles(HEADS, doubtful, forms)
    assert found.select("role", "feature", "sign", "discover").row(0) == ("uniform", None, None, None)
    assert chosen_roles(HEADS, doubtful, forms | {"uniform": form(0, p=0.06)})["role"].to_list() == ["sink"]
    assert chosen_roles(HEADS, doubtful, dict.fromkeys(forms) | {"local": form(0)})["role"].to_list() == ["local"]
    assert chosen_roles(HEADS, doubtful, dict.fromkeys(("uniform", "sink", "local")))["role"].to_list() == ["none"]


def tie(value=0.2, p=0.01):
    table = {"site": ["a"], "head": [0], "value": [value], "p_maxt": [p]}
    return pl.DataFrame(table, schema_overrides={"value": pl.Float64, "p_maxt": pl.Float64})


TIED = {"feature": "counterpart", "unit": "share of attention"}


def test_a_counterpart_head_is_one_beyond_the_control_on_both_splits():
    assert role(TIED, TIED, ties=(tie(), tie()))["role"] == "counterpart"
    # without a control its own excess names it
    assert role(TIED, TIED)["role"] == "counterpart"
    for lacking in (tie(p=0.05), tie(value=-0.2), tie(value=None, p=None), tie().clear()):
        for ties in ((lacking, tie()), (tie(), lacking)):
            found = role(TIED, TIED, ties=ties)
            assert (found["role"], found["reason"]) == ("none", "not more than on its control")
        chosen = chosen_cells(cells(TIED), lacking)
        assert chosen_roles(HEADS, chosen, dict.fromkeys(("uniform", "sink", "local")))["role"].to_list() == ["none"]
    # nor is another feature's name asked of the control
    assert role(ties=(tie(p=0.5), tie(p=0.5)))["role"] == "edge"


def test_what_is_missing_is_void_and_not_none():
    void = HEADS.with_columns(void=pl.lit(3))
    found = role({"p_maxt": 0.5}, heads=void)
    assert (found["role"], found["void"], found["reason"]) == ("none", 3, "void: 3 rows are missing or not finite")
    unseen = HEADS.with_columns(unseen=pl.lit("object"), unseen_maps=pl.lit(2))
    found = role({"p_maxt": 0.5}, heads=unseen)
    assert (found["void"], found["reason"]) == (2, "void: maps of object are missing or not finite")
    # what holds by sound numbers is a name all the same
    assert [role(heads=unseen)[name] for name in ("role", "void")] == ["edge", 0]
    absent = {"value": None, "low": None, "high": None, "p_chosen": None}
    assert role({}, absent)["reason"] == "void: edge has no numbers on confirm"
    assert role({}, {"feature": "texture"})["reason"] == "void: edge has no numbers on confirm"
