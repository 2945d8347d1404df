"""Entropies of items, heads and groups, and what they vary with: against plain numpy."""

import math

import numpy as np
import polars as pl
import pytest

from headscope.study.entropy import entropy_by_head, item_means, pooled_items, variance_components
from study import simulated


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(199):
        yield


def table(values, keys=64, group="g", step=100, split="confirm"):
    """Observations of one head; values: nats by (source, item, replicate)."""
    rows = [
        {"item": item, "group": group, "source_id": source, "split": split, "timestep": step, "replicate": replicate}
        | {"site": "mid", "head": 0, "query_group": "image", "keys": keys, "entropy_mean": nats}
        | {"entropy_normalised_mean": None if nats is None or keys == 1 else nats / math.log(keys)}
        for (source, item, replicate), nats in values.items()
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def nested(sources, items, draws, parts=(1.0, 1.0, 1.0), seed=0):
    """Nested normal effects with the given standard deviations; items and draws: counts, cycled through."""
    generator = np.random.default_rng(seed)
    values, number = {}, 0
    for source in range(sources):
        of_source = generator.normal(0, parts[0])
        for _ in range(items[source % len(items)]):
            of_item = of_source + generator.normal(0, parts[1])
            for draw in range(draws[number % len(draws)]):
                values[f"s{source}", number, draw] = 3 + of_item + generator.normal(0, parts[2])
            number += 1
    return values


def test_an_item_counts_once_whatever_its_draws():
    draws = {("a", 0, 0): 1.0, ("a", 0, 1): 3.0, ("a", 1, 0): 4.0, ("a", 1, 1): 4.0, ("b", 2, 0): 9.0, ("b", 2, 1): 5.0}
    found = item_means(table(draws))
    assert dict(found.select("item", "nats").iter_rows()) == {0: 2.0, 1: 4.0, 2: 7.0}
    assert found["normalised"].to_list() == pytest.approx([nats / math.log(64) for nats in (2, 4, 7)])
    # 5.0: a source's items weigh alike, and the sources
    value = entropy_by_head(found).filter(pl.col("timestep").is_null(), pl.col("measure") == "nats")["value"].item()
    assert value == 5.0


def test_a_draw_that_is_absent_voids_its_item():
    draws = {("a", 0, 0): 1.0, ("a", 0, 1): 3.0, ("b", 1, 0): 4.0}
    found = item_means(table(draws))
    np.testing.assert_array_equal(found["nats"], [2.0, np.nan])
    # the training images may have other draws than the held-out ones
    found = item_means(pl.concat([table(draws), table({("t", 7, 0): 8.0}, split="train")]))
    np.testing.assert_array_equal(found["nats"], [2.0, np.nan, 8.0])


@pytest.mark.parametrize("broken", [math.nan, math.inf, None])
def test_a_draw_that_is_no_number_voids_its_item(broken):
    observed = table({("a", 0, 0): 1.0, ("a", 0, 1): broken, ("a", 1, 0): 4.0, ("a", 1, 1): 4.0})
    found = item_means(observed.with_columns(entropy_normalised_mean=pl.lit(0.5)))
    assert found.filter(item=0)["nats"].is_nan().all()
    assert found.filter(item=1)["nats"].item() == 4.0
    assert found["normalised"].to_list() == [0.5, 0.5]


def test_a_single_key_has_no_normalised_entropy_and_no_part_in_pooling():
    one = table({("a", 0, 0): 0.0}, keys=1).with_columns(pl.col("entropy_normalised_mean").cast(pl.Float64))
    both = pl.concat([one.with_columns(site=pl.lit("text")), table({("a", 0, 0): 2.0})])
    items = item_means(both)
    assert items.filter(site="text")["normalised"].is_nan().all()
    assert pooled_items(items)["normalised"].to_list() == [2.0 / math.log(64)]


def test_the_deficit_has_the_interval_of_the_entropy():
    observed = simulated.observations(simulated.items(("lfw",)), timesteps=(100,), sites=simulated.SITES[:2], heads=2)
    found = entropy_by_head(item_means(observed)).drop_nulls("timestep").sort("site", "head")
    nats, deficit = (found.filter(measure=name) for name in ("nats", "deficit"))
    most = np.log(nats["keys"].to_numpy())
    for value, other in (("value", "value"), ("low", "high"), ("high", "low")):
        np.testing.assert_allclose(deficit[value], most - nats[other].to_numpy(), rtol=1e-12)


def test_components_are_means_over_whole_heads():
    one, two = (nested(6, [2], [3], (3.0, 1.0, spread), seed=1) for spread in (0.2, 0.3))
    broken = dict(nested(6, [2], [3], seed=3))
    broken["s0", 0, 1] = math.nan
    tables = [table(values).with_columns(head=pl.lit(head)) for head, values in enumerate((one, two, broken))]
    found = variance_components(pl.concat(tables)).row(0, named=True)
    assert [found[name] for name in ("heads", "sources", "items", "draws", "void")] == [3, 6, 12, 36, 1]
    balanced = np.mean([analysis_of_variance(values, 6, 2, 3) for values in (one, two)], axis=0)
    parts = [found[f"between_{name}"] for name in ("sources", "items", "draws")]
    assert parts == pytest.approx(balanced, rel=1e-9)


def test_components_are_of_the_mean_over_timesteps():
    one, two = (nested(6, [2], [3], (3.0, 1.0, 0.2), seed=seed) for seed in (1, 2))
    found = variance_components(pl.concat([table(one, step=1), table(two, step=2)])).row(0, named=True)
    mean = {key: (one[key] + two[key]) / 2 for key in one}
    parts = [found[f"between_{name}"] for name in ("sources", "items", "draws")]
    assert parts == pytest.approx(analysis_of_variance(mean, 6, 2, 3), rel=1e-9)


def analysis_of_variance(values, sources, items, draws):
    """The textbook's balanced nested one."""
    array = np.array(list(values.values())).reshape(sources, items, draws)
    of_draws = array.var(axis=2, ddof=1).mean()
    of_items = array.mean(2).var(axis=1, ddof=1).mean() - of_draws / draws
    return array.mean((1, 2)).var(ddof=1) - of_items / items - of_draws / (items * draws), of_items, of_draws


def test_what_the_design_cannot_tell_is_in_the_level_above():
    values = nested(30, [1], [1])
    found = variance_components(table(values)).row(0, named=True)
    assert found["between_items"] is None
    assert found["between_draws"] is None
    assert found["between_sources"] == pytest.approx(np.var(list(values.values()), ddof=1))
