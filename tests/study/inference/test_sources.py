"""From rows to one number per source: what is averaged, and what makes a quantity void."""

import math

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from headscope.study.inference import degradations, differences, means, ratios, source_means
from study.inference.rows import losses, one_item_each

BROKEN = [None, math.nan, math.inf, -math.inf]


@pytest.fixture
def rows():
    return losses(np.random.default_rng(0), draws=2)


def one_row(head=1, timestep=100, item=3, replicate=1):
    named = {"head": head, "timestep": timestep, "item": item, "replicate": replicate}
    return pl.all_horizontal(pl.col(name) == value for name, value in named.items())


def test_a_source_is_the_mean_of_its_items():
    rows = pl.DataFrame({"source_id": ["b", "a", "b", "a"], "head": [0, 0, 1, 1], "value": [1.0, 2.0, 3.0, 4.0]})
    rows = pl.concat([rows, rows.with_columns(pl.col("value") + 10)])
    table = source_means(rows, ["value"], ["head"])
    assert table.sources == ["a", "b"]
    assert table.values[0][:, :, 0].tolist() == [[7.0, 9.0], [6.0, 8.0]]
    assert table.counts().tolist() == [2, 2]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("column", ["clean", "edited"])
def test_one_number_that_is_none_voids_its_quantity_and_no_other(rows, broken, column):
    worse = rows.with_columns(pl.when(one_row()).then(pl.lit(broken, pl.Float64)).otherwise(column).alias(column))
    for whole, table in zip(
        degradations(rows, ["head"], "timestep"), degradations(worse, ["head"], "timestep"), strict=True
    ):
        assert table["void"].to_list() == [0, 1, 0]
        assert table.row(1, named=True) | {"sources": 0} == {
            **dict.fromkeys(table.columns), "head": 1, "exploratory": False, "void": 1, "sources": 0,
        }  # fmt: skip
        assert_frame_equal(table[[0, 2]], whole[[0, 2]], rel_tol=1e-12)
    at = degradations(worse, ["head", "timestep"])[0]
    assert at.filter(pl.col("void") > 0).select("head", "timestep").rows() == [(1, 100)]


@pytest.mark.parametrize("what", ["item", "replicate", "timestep", "source"])
def test_missing_rows_void_their_quantity(rows, what):
    gone = {
        "item": one_row() | one_row(replicate=0),
        "replicate": one_row(),
        "timestep": (pl.col("head") == 1) & (pl.col("timestep") == 100),
        "source": (pl.col("head") == 1) & (pl.col("source_id") == "s001"),
    }[what]
    count = int(rows.select(gone.sum()).item())
    table, _ = degradations(rows.filter(~gone), ["head"], "timestep")
    assert table["void"].to_list() == [0, count, 0]
    assert table["value"].is_null().to_list() == [False, True, False]


def test_what_no_quantity_has_is_not_missing(rows):
    """A timestep or an item that was never swept."""
    fewer = rows.filter((pl.col("item") != 3) & (pl.col("timestep") == 100))
    assert degradations(fewer, ["head"], "timestep")[0]["void"].to_list() == [0, 0, 0]


def test_a_call_that_is_missing_counts():
    """Rows of an item are as many in all items; quantities may have different numbers of calls."""
    rows = losses(np.random.default_rng(1)).filter(pl.col("timestep") == 100)
    twice = pl.concat([rows, rows.filter(pl.col("head") == 1).with_columns(pl.col("edited") + 0.1)])
    assert degradations(twice, ["head"])[0]["void"].to_list() == [0, 0, 0]
    lacking = twice.with_row_index().filter(pl.col("index") != len(twice) - 1).drop("index")
    assert degradations(lacking, ["head"])[0]["void"].to_list() == [0, 1, 0]


def test_clean_losses_of_zero_void_the_relative_degradation_alone():
    rows = losses(np.random.default_rng(2), items=1).with_columns(
        pl.when(pl.col("timestep") == 100).then(0.0).otherwise("clean").alias("clean")
    )
    relative, absolute = degradations(rows, ["head"], "timestep")
    # 24 sources of one item at that timestep
    assert relative["void"].to_list() == [24] * 3
    assert relative["value"].is_null().all()
    assert absolute["void"].to_list() == [0] * 3
    assert absolute["p_value"].is_not_null().all()


def test_groups_void_each_other_and_absent_quantities_are_said():
    generator = np.random.default_rng(3)
    first, second = (
        pl.concat(
            [one_item_each(generator.gamma(2.0, 1.0, 20), prefix=name).with_columns(head=head) for head in (0, 1)]
        )
        for name in "ab"
    )
    whole = differences(first, second, "value", ["head"])
    assert whole["void"].to_list() == [0, 0]
    worse = second.with_columns(pl.when(pl.int_range(pl.len()) == 0).then(np.nan).otherwise("value").alias("value"))
    for table in (differences(first, worse, "value", ["head"]), ratios(worse, first, "value", ["head"])):
        assert table["void"].to_list() == [1, 0]
        assert table["value"].is_null().to_list() == [True, False]
    absent = differences(first, second.filter(pl.col("head") == 0), "value", ["head"])
    assert absent.select("head", "void").rows() == [(0, 0), (1, 20)]
    # beside other quantities a matrix product rounds otherwise
    assert_frame_equal(differences(first, worse, "value", ["head"])[1], whole[1], rel_tol=1e-12)


def test_groups_at_different_timesteps_have_no_overall_difference():
    generator = np.random.default_rng(4)
    first = pl.concat([one_item_each(generator.normal(size=20), prefix="a").with_columns(timestep=t) for t in (1, 2)])
    second = one_item_each(generator.normal(size=20), prefix="b").with_columns(timestep=1)
    assert differences(first, second, "value", bands="timestep")["void"].item() == 20
    both = differences(first, second, "value", ["timestep"])
    assert both["void"].to_list() == [0, 20]


def test_a_score_that_items_may_lack_is_averaged_over_the_others():
    rows = pl.DataFrame(
        {"source_id": ["a", "b", "c"] * 2, "head": [0] * 3 + [1] * 3, "value": [1.0, 2.0, 6.0, 1.0, 2.0, math.nan]}
    )
    assert means(rows, "value", ["head"])["void"].to_list() == [0, 1]
    table = means(rows, "value", ["head"], leave_out=True)
    assert table["value"].to_list() == [3.0, 1.5]
    assert table["sources"].to_list() == [3, 2]
    assert table["left_out"].to_list() == [0, 1]
    assert table["void"].to_list() == [0, 0]
    infinite = rows.with_columns(pl.col("value").fill_nan(math.inf))
    assert means(infinite, "value", ["head"], leave_out=True)["void"].to_list() == [0, 1]
    with pytest.raises(ValueError, match="leave_out"):
        means(rows, "value", ["head"], leave_out=True, family=True)
    nothing = means(rows.with_columns(value=pl.lit(math.nan)), "value", ["head"], leave_out=True)
    assert nothing["value"].is_null().all()
    assert nothing["left_out"].to_list() == [3, 3]


def test_unknown_columns_are_named():
    with pytest.raises(ValueError, match="lacks entropy"):
        source_means(one_item_each([1.0]), ["entropy"])
    with pytest.raises(ValueError, match="second: lacks head"):
        differences(one_item_each([1.0]).with_columns(head=1), one_item_each([1.0]), "value", ["head"])
