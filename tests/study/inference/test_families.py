"""Corrections of p-values, and the selection of what to test."""

import polars as pl
import pytest

from headscope.study.inference import holm, strongest, with_holm


def test_holm_by_hand():
    # sorted 0.005 0.01 0.03 0.04 times 4 3 2 1: 0.02, 0.03, 0.06, 0.04 raised to 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, None, 0.6]) == [0.8, None, 0.8]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert with_holm(pl.DataFrame({"p_value": [0.01, None]}))["p_holm"].to_list() == [0.01, None]


def test_selection_is_two_sided_and_knows_ties_and_voids():
    table = pl.DataFrame(
        {
            "head": [5, 4, 3, 2, 1, 0],
            "value": [1.0, -3.0, 3.0, None, 0.0, 9.0],
            "standard_error": [1.0, 1.0, 1.0, None, 0.0, None],
        }
    )
    chosen = strongest(table, 2, ["head"])
    assert chosen.select("head", "score").rows() == [(3, 3.0), (4, 3.0)]
    assert strongest(table.reverse(), 2, ["head"]).equals(chosen)
    assert strongest(table, 10, ["head"])["head"].to_list() == [3, 4, 5, 1]
    certain = table.with_columns(standard_error=pl.lit(0.0))
    assert strongest(certain, 9, ["head"])["head"].to_list() == [0, 3, 4, 5, 1]
