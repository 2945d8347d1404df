"""Variance components: against sums of squares, against planted variances, and in designs that can't tell."""

import numpy as np
import polars as pl
import pytest

from headscope.study.inference import components, degradations, linearised
from study.inference.rows import losses


def nested(generator, sources, items, draws, spreads, offset=3.0):
    """Rows of a balanced design; spreads of sources, items and draws."""
    shape = (sources, items, draws)
    values = offset + sum(
        spread * generator.normal(size=size)
        for spread, size in zip(spreads, ((sources, 1, 1), (sources, items, 1), shape), strict=True)
    )
    source, item, draw = (index.ravel() for index in np.indices(shape))
    return pl.DataFrame(
        {"source_id": [f"s{number}" for number in source], "item": item, "replicate": draw, "value": values.ravel()}
    ), values


def test_balanced_components_are_the_textbook_s():
    table, y = nested(np.random.default_rng(1), 7, 3, 4, (2.0, 1.0, 0.5))
    found = components(table, "value").row(0, named=True)
    draws = y.var(axis=2, ddof=1).mean()
    items = 4 * y.mean(axis=2).var(axis=1, ddof=1).mean()
    sources = 12 * y.mean(axis=(1, 2)).var(ddof=1)
    assert found["between_draws"] == pytest.approx(draws)
    assert found["between_items"] == pytest.approx((items - draws) / 4)
    assert found["between_sources"] == pytest.approx((sources - items) / 12)
    assert (found["sources"], found["items"], found["draws"], found["truncated"]) == (7, 21, 84, [])
    # the variance of the mean: what is left of it when draws double, and when they have no noise
    now = sources / 12
    assert found["with_twice_the_draws"] == pytest.approx(np.sqrt((now - draws / 12 / 2) / now))
    assert found["with_unlimited_draws"] == pytest.approx(np.sqrt((now - draws / 12) / now))


def test_planted_variances_come_back_on_average_also_unbalanced():
    generator = np.random.default_rng(2)
    spreads = (1.0, 0.8, 0.6)
    tables = []
    for trial in range(120):
        table, _ = nested(generator, 12, 3, 4, spreads)
        # a third of the rows is gone, at random
        tables.append(table.filter(pl.Series(generator.random(len(table)) > 0.33)).with_columns(trial=pl.lit(trial)))
    found = components(pl.concat(tables), "value", ["trial"])
    for name, spread in zip(("between_sources", "between_items", "between_draws"), spreads, strict=True):
        values = found[name].to_numpy()
        slack = 4 * values.std() / np.sqrt(len(values))
        # setting a few negative ones to 0 adds a little
        assert abs(values.mean() - spread**2) < slack + 0.03


def test_what_a_design_cannot_tell_is_null():
    generator = np.random.default_rng(3)
    one_item = components(nested(generator, 9, 1, 4, (1.0, 1.0, 1.0))[0], "value").row(0, named=True)
    assert one_item["between_items"] is None
    assert one_item["between_sources"] is not None
    assert one_item["between_draws"] is not None
    one_draw = components(nested(generator, 9, 3, 1, (1.0, 1.0, 1.0))[0], "value").row(0, named=True)
    assert one_draw["between_draws"] is None
    assert one_draw["with_twice_the_draws"] is None
    assert one_draw["between_items"] is not None
    one_source = components(nested(generator, 1, 3, 2, (1.0, 1.0, 1.0))[0], "value").row(0, named=True)
    assert one_source["between_sources"] is None


def test_negative_components_are_zero_and_named():
    table = pl.DataFrame(
        {
            "source_id": ["a", "a", "b", "b"],
            "item": [0, 0, 1, 1],
            "replicate": [0, 1, 0, 1],
            "value": [-1.0, 1.0, -1.0, 1.0],
        }
    )
    found = components(table, "value").row(0, named=True)
    assert (found["between_sources"], found["truncated"]) == (0.0, ["between_sources"])
    assert found["between_draws"] == 2.0
    assert found["with_unlimited_draws"] == 0.0


def test_numbers_that_are_none_leave_no_components():
    table, _ = nested(np.random.default_rng(4), 4, 2, 2, (1.0, 1.0, 1.0))
    broken = table.with_columns(pl.when(pl.int_range(pl.len()) == 3).then(None).otherwise("value").alias("value"))
    found = components(broken, "value").row(0, named=True)
    assert found["between_draws"] is None
    assert found["draws"] == 16
    with pytest.raises(ValueError, match="lacks replicate"):
        components(table.drop("replicate"), "value")


def test_influences_have_the_delta_method_s_variance():
    rows = losses(np.random.default_rng(5), items=1, draws=2)
    table = linearised(rows, ["head"], "timestep")
    per_source = table.group_by("head", "source_id", "timestep").agg(pl.col("influence").mean())
    per_source = per_source.group_by("head", "source_id").agg(pl.col("influence").mean())
    relative = degradations(rows, ["head"], "timestep")[0].sort("head")
    spread = (
        per_source.group_by("head")
        .agg(pl.col("influence").std(), pl.col("influence").mean().alias("mean"))
        .sort("head")
    )
    assert spread["mean"].to_list() == pytest.approx([0.0] * 3, abs=1e-12)
    assert (spread["influence"] / np.sqrt(24)).to_list() == pytest.approx(relative["standard_error"].to_list())
    found = components(table, "influence", ["head"], "timestep").sort("head")
    # balanced: the components add up to the variance between sources' means
    total = found["between_sources"] + found["between_draws"] / 2
    exact = [not names for names in found["truncated"].to_list()]
    assert total.filter(exact).to_list() == pytest.approx((spread["influence"] ** 2).filter(exact).to_list())
