"""The tables: values by hand, pairs, families, small groups, added errors, and that the order of rows is nothing."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as checked
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from headscope.study.inference import (
    FEWEST_SOURCES,
    Estimate,
    degradation_differences,
    degradations,
    differences,
    means,
    ratios,
    settings,
    smooth,
)
from headscope.study.inference.intervals import infer
from study.inference.rows import losses, one_item_each


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", 199)


def groups(seed, sizes=(22, 31), prefixes="ab"):
    generator = np.random.default_rng(seed)
    return [
        one_item_each(generator.gamma(2.0, 1.0, size), prefix=prefix)
        for size, prefix in zip(sizes, prefixes, strict=True)
    ]


def heads(seed, prefix, sources=20, count=5):
    generator = np.random.default_rng(seed)
    each = [one_item_each(generator.gamma(2.0, 1.0, sources), prefix=prefix) for _ in range(count)]
    return pl.concat([rows.with_columns(head=head) for head, rows in enumerate(each)])


def test_means_and_their_intervals_are_those_of_the_core():
    (rows,) = groups(1, (30,), "a")
    table = means(rows, "value", test=True)
    expected = infer([rows["value"].to_numpy()[None, :, None]], smooth.mean)
    for name in ("value", "low", "high", "p_value", "standard_error"):
        assert table[name].item() == getattr(expected, name)[0]
    assert table.columns == ["value", "low", "high", "p_value", "standard_error", "sources", "exploratory", "void"]


def test_differences_and_ratios_by_hand():
    first, second = groups(2)
    x, y = first["value"].to_numpy(), second["value"].to_numpy()
    table = differences(first, second, "value")
    assert table["value"].item() == pytest.approx(x.mean() - y.mean())
    assert table["standard_error"].item() == pytest.approx(np.sqrt(x.var(ddof=1) / 22 + y.var(ddof=1) / 31))
    assert table["sources"].to_list() == [[22, 31]]
    assert not table["paired"].item()
    ratio, inverse = ratios(first, second, "value"), ratios(second, first, "value")
    assert ratio["value"].item() == pytest.approx(x.mean() / y.mean())
    # ratio * sqrt(cv^2 / n + cv^2 / n)
    relative = np.sqrt(x.var(ddof=1) / 22 / x.mean() ** 2 + y.var(ddof=1) / 31 / y.mean() ** 2)
    assert ratio["standard_error"].item() == pytest.approx(ratio["value"].item() * relative)
    assert ratio["low"].item() < ratio["value"].item() < ratio["high"].item()
    # drawn in the other order, so not to the last digit
    assert 1 / inverse["high"].item() == pytest.approx(ratio["low"].item(), rel=0.1)


def test_ratios_of_one_sign_only():
    first, second = groups(3)
    negative = ratios(first.with_columns(-pl.col("value")), second, "value")
    positive = ratios(first, second, "value")
    # there the logarithm is of no number
    assert negative["value"].item() == -positive["value"].item()
    assert negative["low"].is_null().item()
    zero = ratios(first, second.with_columns(value=pl.lit(0.0)), "value")
    assert zero.select("value", "void").row(0) == (None, 31)
    both = ratios(*(rows.with_columns(-pl.col("value")) for rows in (first, second)), "value")
    assert both.select("value", "low", "high").row(0) == pytest.approx(positive.select("value", "low", "high").row(0))


def test_shared_sources_are_compared_in_pairs():
    generator = np.random.default_rng(4)
    level = generator.normal(5, 2, 25)
    first, second = one_item_each(level + 0.3 + generator.normal(0, 0.3, 25)), one_item_each(level)
    paired = differences(first, second.reverse(), "value")
    assert paired["paired"].item()
    each = first["value"].to_numpy() - level
    assert paired["value"].item() == pytest.approx(each.mean())
    assert paired["standard_error"].item() == pytest.approx(each.std(ddof=1) / 5)
    expected = infer([each[None, :, None]], smooth.mean)
    assert paired["low"].item() == pytest.approx(expected.low[0])
    assert paired["p_value"].item() == expected.p_value[0]
    apart = differences(first, second, "value", paired=False)
    assert not apart["paired"].item()
    assert apart["standard_error"].item() > 5 * paired["standard_error"].item()
    assert apart["p_value"].item() > 0.2 > paired["p_value"].item()
    ratio = ratios(first, second, "value")
    assert ratio["paired"].item()
    assert ratio["standard_error"].item() < ratios(first, second, "value", paired=False)["standard_error"].item() / 4


def test_sources_that_are_shared_in_part_are_refused_unless_it_is_said_what_they_are():
    first, second = groups(5, (25, 25), "aa")
    part = second.with_columns(pl.col("source_id").str.replace("a0000", "other"))
    with pytest.raises(ValueError, match="got 24 sources in both of 25 and 25"):
        differences(first, part, "value")
    with pytest.raises(ValueError, match="24 sources"):
        ratios(first, part, "value")
    shared = differences(first, part, "value", paired=True)
    assert shared.select("sources", "paired").row(0) == ([24, 24], True)
    assert differences(first, part, "value", paired=False).select("sources", "paired").row(0) == ([25, 25], False)
    with pytest.raises(ValueError, match="share no source"):
        differences(*groups(5), "value", paired=True)


def test_degradation_is_a_ratio_of_sums_by_hand():
    rows = pl.DataFrame(
        {
            "source_id": ["a", "b", "a", "b"],
            "timestep": [1, 1, 2, 2],
            "clean": [0.01, 0.99, 1.0, 3.0],
            "edited": [0.11, 0.99, 1.0, 5.0],
        }
    )
    at_timesteps, absolute = degradations(rows, ["timestep"])
    # the ratios of the images are 10 and 0, whose mean would be 5
    assert at_timesteps["value"].to_list() == pytest.approx([0.1 / 1.0, 2.0 / 4.0])
    assert absolute["value"].to_list() == pytest.approx([0.05, 1.0])
    overall, absolute = degradations(rows, bands="timestep")
    assert overall["value"].item() == pytest.approx((0.1 + 0.5) / 2)
    assert absolute["value"].item() == pytest.approx((0.05 + 1.0) / 2)


def test_a_source_counts_once_whatever_its_items():
    few = one_item_each(np.arange(25.0))
    # the first source has a hundred crops more, with the same mean
    more = pl.concat([few, pl.DataFrame({"source_id": ["s0000"] * 100, "value": [-1.0, 1.0] * 50})])
    assert means(few, "value").equals(means(more, "value"))


@pytest.mark.parametrize(("sources", "tested"), [(FEWEST_SOURCES - 1, False), (FEWEST_SOURCES, True)])
def test_too_few_sources_are_not_tested(sources, tested):
    generator = np.random.default_rng(6)
    small = one_item_each(generator.normal(1, 1, sources), prefix="a")
    large = one_item_each(generator.normal(0, 1, 40), prefix="b")
    pair = small.select("source_id", clean=pl.lit(1.0), edited=pl.col("value"))
    for table in (
        differences(small, large, "value", family=True),
        differences(large, small, "value", family=True),
        *degradations(pair, family=True),
        means(small, "value", test=True, family=True),
    ):
        assert table["p_value"].is_null().item() is not tested
        assert table["p_maxt"].is_null().item() is not tested
        assert table["exploratory"].item() is not tested
        assert table["low"].item() < table["value"].item() < table["high"].item()
    estimate = Estimate.from_row(differences(small, large, "value"), "unit", "definition")
    assert estimate.sources == (sources, 40)
    assert (estimate.p_value is None) is not tested
    assert (estimate.void, estimate.paired) == (0, False)


def test_one_source_has_no_interval():
    one = pl.DataFrame({"source_id": ["a"] * 50, "value": np.linspace(0, 1, 50)})
    row = means(one, "value").row(0, named=True)
    assert (row["value"], row["low"], row["high"], row["exploratory"]) == (pytest.approx(0.5), None, None, True)
    other = one_item_each(np.arange(30.0))
    assert differences(other, one, "value").select("low", "high", "p_value").row(0) == (None, None, None)


def test_families_are_corrected_over_their_quantities():
    first, second = heads(7, "a"), heads(8, "b")
    one = degradations(losses(np.random.default_rng(9)), ["head"], "timestep", family=True)[0]
    for table in (
        differences(first, second, "value", ["head"], family=True),
        differences(
            first, second.with_columns(pl.col("source_id").str.replace("b", "a")), "value", ["head"], family=True
        ),
        means(first.with_columns(pl.col("value") - 2), "value", ["head"], family=True, test=True),
        one,
    ):
        assert (table["p_maxt"] >= table["p_value"]).all()
        assert (table["p_maxt"] > table["p_value"]).any()
    alone = differences(first.filter(head=0), second.filter(head=0), "value", ["head"], family=True)
    assert alone["p_maxt"].item() == alone["p_value"].item()
    # a void quantity is in no family
    void = first.with_columns(pl.when(pl.col("head") == 0).then(np.inf).otherwise("value").alias("value"))
    without = differences(void, second, "value", ["head"], family=True)
    assert without["p_maxt"].is_null().to_list() == [True, False, False, False, False]
    rest = differences(
        first.filter(pl.col("head") > 0), second.filter(pl.col("head") > 0), "value", ["head"], family=True
    )
    assert_frame_equal(without[1:], rest, rel_tol=1e-12)


def test_an_added_error_is_joined_by_the_quantity():
    rows = losses(np.random.default_rng(10))
    added = pl.DataFrame({"head": [2, 1, 0], "added_relative": [0.0, 0.02, 0.01], "added_absolute": [0.0, 0.1, 0.2]})
    added = added.with_columns(added_freedom=pl.lit(4))
    plain, wide = (degradations(rows, ["head"], "timestep", added=given) for given in (None, added))
    for before, after, errors in zip(plain, wide, ([0.01, 0.02, 0.0], [0.2, 0.1, 0.0]), strict=True):
        assert after["added_error"].to_list() == errors
        half = before["value"] - before["low"]
        # Student's 97.5 % quantile with 4 degrees of freedom
        expected = np.hypot(half.to_numpy(), 2.7764451 * np.array(errors))
        assert (after["value"] - after["low"]).to_numpy() == pytest.approx(expected)
        assert (after["p_value"] >= before["p_value"]).all()
    with pytest.raises(ValueError, match="added: lacks added_freedom"):
        degradations(rows, ["head"], "timestep", added=added.drop("added_freedom"))
    with pytest.raises(ValueError, match="for every quantity"):
        degradations(rows, ["head"], "timestep", added=added.head(2))
    first, second = groups(11)
    one = pl.DataFrame({"added_error": [1.0], "added_freedom": [5]})
    assert differences(first, second, "value", added=one)["p_value"].item() > 0.3
    assert means(first, "value", added=one)["added_error"].item() == 1.0


def test_results_repeat_and_depend_on_the_seed():
    first, second = groups(12)
    assert differences(first, second, "value", seed=1).equals(differences(first, second, "value", seed=1))
    assert not differences(first, second, "value", seed=1).equals(differences(first, second, "value", seed=2))


@checked(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_order_of_rows_is_nothing(seed):
    rows = losses(np.random.default_rng(seed), draws=2)
    shuffled = rows.sample(fraction=1.0, shuffle=True, seed=seed)
    for one, two in zip(
        degradations(rows, ["head"], "timestep", family=True),
        degradations(shuffled, ["head"], "timestep", family=True),
        strict=True,
    ):
        # but for rounding in matrix products, whose columns are the heads as they come
        assert_frame_equal(one, two.sort("head"), rel_tol=1e-12)


def test_no_rows_at_all():
    empty = one_item_each([1.0]).clear().with_columns(head=pl.lit(1))
    assert means(empty, "value", ["head"]).is_empty()
    assert means(empty, "value")["value"].is_null().item()
    assert differences(empty, empty, "value", ["head"]).is_empty()
    with pytest.raises(ValueError, match="got 2 rows"):
        Estimate.from_row(pl.DataFrame({"value": [1, 2]}), "", "")


def test_the_difference_of_two_parts_degradations_by_hand():
    """Ratios of sums at every timestep, their mean, and the first part's minus the second's."""
    generator = np.random.default_rng(4)
    clean, other = 1 + generator.random((2, 24, 2))
    damage, beside = generator.random((2, 24, 2))
    rows = pl.DataFrame(
        {
            "source_id": [f"s{source:02}" for source in range(24) for _ in range(2)],
            "timestep": [100, 500] * 24,
            "clean_in": clean.ravel(),
            "change_in": damage.ravel(),
            "clean_out": other.ravel(),
            "change_out": beside.ravel(),
        }
    )
    parts = ("in", "out")
    found = degradation_differences(rows, parts, (), "timestep", test=True).row(0, named=True)
    first, second = damage.sum(0) / clean.sum(0), beside.sum(0) / other.sum(0)
    assert found["value"] == pytest.approx(first.mean() - second.mean())
    # what every source adds, to first order
    adds = (damage - first * clean) / clean.mean(0) - (beside - second * other) / other.mean(0)
    assert found["standard_error"] == pytest.approx(adds.mean(1).std(ddof=1) / np.sqrt(24))
    assert found["low"] < found["value"] < found["high"]
    # in proportion to the clean loss of either: none
    even = rows.with_columns(change_in=0.7 * pl.col("clean_in"), change_out=0.7 * pl.col("clean_out"))
    assert degradation_differences(even, parts, (), "timestep")["value"].item() == pytest.approx(0, abs=1e-15)
    nothing = rows.with_columns(clean_out=pl.when(pl.col("timestep") == 100).then(0.0).otherwise("clean_out"))
    void = degradation_differences(nothing, parts, (), "timestep", test=True).row(0, named=True)
    assert [void["value"], void["p_value"], void["void"]] == [None, None, 24]
