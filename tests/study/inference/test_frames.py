"""Intervals and tests: agreement with scipy, coverage by source, ratios of sums, corrections, small groups."""

import numpy as np
import polars as pl
import pytest
import scipy.stats

from headscope.study.inference import (
    FEWEST_SOURCES,
    Estimate,
    degradations,
    differences,
    holm,
    means,
    ratios,
    source_means,
)
from headscope.study.inference.frames import bootstrap


def one_item_each(values, name="value", prefix="s"):
    return pl.DataFrame({"source_id": [f"{prefix}{index:04}" for index in range(len(values))], name: values})


def crops(generator, trials, sources=40, per_source=4, correlation=0.5):
    """Values around zero of crops of photographs, many independent trials: crops of a source resemble each other."""
    shared = generator.normal(0, np.sqrt(correlation), (trials, sources, 1))
    own = generator.normal(0, np.sqrt(1 - correlation), (trials, sources, per_source))
    trial, source, item = np.indices((trials, sources, per_source)).reshape(3, -1)
    columns = {"trial": trial, "source": source, "item": item, "value": (shared + own).ravel()}
    return pl.DataFrame(columns)


def scipy_interval(samples, statistic, **options):
    return scipy.stats.bootstrap(
        samples, statistic, n_resamples=60_000, batch=5000, rng=np.random.default_rng(1), **options
    )


def agrees(bounds, expected):
    """To what 60,000 draws leave to chance."""
    slack = 0.08 * expected.standard_error
    assert bounds.low[0] == pytest.approx(expected.confidence_interval.low, abs=slack)
    assert bounds.high[0] == pytest.approx(expected.confidence_interval.high, abs=slack)


def covers(table, truth=0.0):
    return np.mean(((table["low"] <= truth) & (truth <= table["high"])).to_numpy())


def test_intervals_by_source_cover_and_by_crop_do_not():
    rows = crops(np.random.default_rng(0), trials=600)
    by_source = means(rows.with_columns(pl.col("source").cast(pl.String).alias("source_id")), "value", ["trial"])
    few = rows.filter(pl.col("trial") < 200)
    by_crop = means(few.with_columns(pl.format("{}/{}", "source", "item").alias("source_id")), "value", ["trial"])
    assert by_source["sources"].unique().to_list() == [40]
    assert 0.92 <= covers(by_source) <= 0.975
    assert covers(by_crop) < 0.8


@pytest.mark.parametrize("size", [5, 24, 57])
def test_mean_interval_is_that_of_scipy(size):
    values = np.random.default_rng(size).gamma(2.0, size=size)
    found = bootstrap([[values[:, None, None]]], lambda mean: mean.mean(axis=-1), resamples=60_000)
    agrees(found, scipy_interval((values,), np.mean))
    assert found.value[0] == pytest.approx(values.mean())


def test_difference_and_ratio_intervals_are_those_of_scipy():
    generator = np.random.default_rng(3)
    a, b = generator.gamma(2.0, size=24), generator.gamma(3.0, size=31)
    groups = [[sample[:, None, None]] for sample in (a, b)]
    difference = bootstrap(groups, lambda x, y: (x - y)[..., 0], resamples=60_000)
    agrees(difference, scipy_interval((a, b), lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis)))
    ratio = bootstrap(groups, lambda x, y: (x / y)[..., 0], resamples=60_000)
    agrees(ratio, scipy_interval((a, b), lambda x, y, axis: x.mean(axis=axis) / y.mean(axis=axis)))
    first, second = one_item_each(a, prefix="a"), one_item_each(b, prefix="b")
    for table, value in ((differences(first, second, "value"), difference), (ratios(first, second, "value"), ratio)):
        assert table["value"].item() == pytest.approx(value.value[0])
        assert table["low"].item() == pytest.approx(value.low[0], abs=0.05)
        assert table["sources"].to_list() == [[24, 31]]


def test_degradation_interval_is_that_of_a_ratio_of_sums():
    generator = np.random.default_rng(4)
    clean = generator.lognormal(0, 0.5, 30)
    change = clean * generator.gamma(2.0, 0.1, 30)
    rows = one_item_each(clean, "clean").with_columns(edited=pl.Series(clean + change))
    relative, absolute = degradations(rows)
    expected = scipy_interval((change, clean), lambda d, c, axis: d.sum(axis=axis) / c.sum(axis=axis), paired=True)
    paired = [[change[:, None, None], clean[:, None, None]]]
    agrees(bootstrap(paired, lambda d, c: (d / c)[..., 0], resamples=60_000), expected)
    assert relative["value"].item() == pytest.approx(change.sum() / clean.sum())
    assert relative["low"].item() == pytest.approx(expected.confidence_interval.low, abs=expected.standard_error / 5)
    assert absolute["value"].item() == pytest.approx(change.mean())
    # every image got worse, which no random sign pattern reaches: the smallest p there is, twice 1 / (9999 + 1)
    assert relative["p_value"].item() == absolute["p_value"].item() == pytest.approx(2e-4)


def test_ratio_of_sums_is_not_the_mean_of_ratios():
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
    generator = np.random.default_rng(5)
    small = one_item_each(generator.normal(1, 1, sources), prefix="a")
    large = one_item_each(generator.normal(0, 1, 40), prefix="b")
    pair = small.select("source_id", clean=pl.lit(1.0), edited=pl.col("value"))
    for table in (differences(small, large, "value"), differences(large, small, "value"), *degradations(pair)):
        assert table["p_value"].is_null().item() is not tested
        assert table["exploratory"].item() is not tested
        assert table["low"].item() < table["value"].item() < table["high"].item()
    estimate = Estimate.from_row(differences(small, large, "value"), "unit", "definition")
    assert estimate.sources == (sources, 40)
    assert (estimate.p_value is None) is not tested


def test_one_source_has_no_interval():
    one = pl.DataFrame({"source_id": ["a"] * 50, "value": np.linspace(0, 1, 50)})
    row = means(one, "value").row(0, named=True)
    assert (row["value"], row["low"], row["high"], row["exploratory"]) == (pytest.approx(0.5), None, None, True)
    other = one_item_each(np.arange(30.0))
    assert differences(other, one, "value").select("low", "high", "p_value").row(0) == (None, None, None)


def test_missing_sources_are_left_out_of_their_quantity_only():
    rows = pl.DataFrame(
        {"source_id": ["a", "b", "c", "a", "b"], "head": [0, 0, 0, 1, 1], "value": [1.0, 2.0, 6.0, 1.0, 2.0]}
    )
    table = means(rows, "value", ["head"])
    assert table["value"].to_list() == [3.0, 1.5]
    assert table["sources"].to_list() == [3, 2]
    # an overall mean needs every band
    assert means(rows.rename({"head": "timestep"}), "value", bands="timestep")["sources"].item() == 2


def test_permutation_p_is_that_of_scipy_and_uniform_under_the_null():
    generator = np.random.default_rng(6)
    cells = 300
    first, second = (
        pl.DataFrame(
            {
                "source_id": np.repeat([f"{name}{index}" for index in range(20)], cells),
                "cell": np.tile(np.arange(cells), 20),
                "value": generator.normal(size=20 * cells),
            }
        )
        for name in "ab"
    )
    table = differences(first, second, "value", ["cell"])
    assert 0.02 <= np.mean(table["p_value"].to_numpy() < 0.05) <= 0.09
    a, b = (rows.filter(pl.col("cell") == 7)["value"].to_numpy() for rows in (first, second))
    expected = scipy.stats.permutation_test((a, b), lambda x, y: x.mean() - y.mean(), rng=np.random.default_rng(9))
    assert table["p_value"][7] == pytest.approx(expected.pvalue, abs=0.02)
    assert table["standard_error"][7] == pytest.approx(np.sqrt(a.var(ddof=1) / 20 + b.var(ddof=1) / 20))


def test_incomplete_quantities_are_tested_on_the_sources_they_have():
    generator = np.random.default_rng(7)
    a, b = one_item_each(generator.normal(1, 1, 25), prefix="a"), one_item_each(generator.normal(0, 1, 25), prefix="b")
    both = pl.concat([a.with_columns(head=0), a.head(22).with_columns(head=1)])
    table = differences(both, pl.concat([b.with_columns(head=0), b.with_columns(head=1)]), "value", ["head"])
    assert table["sources"].to_list() == [[25, 25], [22, 25]]
    assert table["p_value"][1] == differences(a.head(22), b, "value")["p_value"].item()


def test_results_repeat_and_depend_on_the_seed():
    generator = np.random.default_rng(8)
    a, b = one_item_each(generator.normal(size=22), prefix="a"), one_item_each(generator.normal(size=22), prefix="b")
    assert differences(a, b, "value", seed=1).equals(differences(a, b, "value", seed=1))
    # the order of the rows is nothing to the result
    assert differences(a.reverse(), b, "value", seed=1).equals(differences(a, b, "value", seed=1))
    assert not differences(a, b, "value", seed=1).equals(differences(a, b, "value", seed=2))


def test_a_family_gives_each_quantity_what_it_gets_alone():
    generator = np.random.default_rng(9)
    values = generator.gamma(2.0, size=(2500, 20))
    # more quantities than one block holds
    together = bootstrap([[values.T[:, :, None]]], lambda mean: mean.mean(axis=-1), seed=3, resamples=200)
    alone = bootstrap([[values[2400][:, None, None]]], lambda mean: mean.mean(axis=-1), seed=3, resamples=200)
    assert together.low[2400] == pytest.approx(alone.low[0])
    assert together.high[2400] == pytest.approx(alone.high[0])


def test_equal_values_give_an_interval_of_no_width():
    row = means(one_item_each(np.full(25, 0.3)), "value").row(0, named=True)
    assert row["low"] == pytest.approx(0.3)
    assert row["high"] == pytest.approx(0.3)


def test_holm_by_hand():
    # sorted 0.005 0.01 0.03 0.04 times 4 3 2 1: 0.02, 0.03, 0.06, 0.04 raised to 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, None, 0.6]) == [0.8, None, 0.8]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_unknown_columns_are_named():
    with pytest.raises(ValueError, match="lacks entropy"):
        source_means(one_item_each([1.0]), ["entropy"])
    with pytest.raises(ValueError, match="got 2 rows"):
        Estimate.from_row(pl.DataFrame({"value": [1, 2]}), "", "")
