"""Uniform, sink and local heads: their numbers by hand, and their bounds."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import ttest_1samp

from headscope.study.roles.forms import local_heads, sink_heads, uniform_heads
from study import simulated


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(999):
        yield


def rows(**columns):
    """Rows of 24 sources at two timesteps, of head 0; columns [24, 2] or one number."""
    source, step = (index.ravel() for index in np.indices((24, 2)))
    table = {"source_id": [f"s{number:02}" for number in source], "item": source, "replicate": 0, "call": 0, "head": 0}
    table |= {"timestep": np.array([100, 500])[step], "site": "a", "grid_height": 4, "grid_width": 4}
    table |= {name: np.broadcast_to(values, (24, 2)).ravel() for name, values in columns.items()}
    return pl.DataFrame(table)


def drawn(mean, spread, seed=0):
    noise = np.random.default_rng(seed).normal(size=(24, 2))
    return mean + spread * (noise - noise.mean()) / noise.mean(axis=1).std(ddof=1)


@pytest.mark.parametrize(("deficit", "holds"), [(0.03, True), (0.049, False), (0.07, False)])
def test_uniform_is_a_bound_from_above(deficit, holds):
    entropy = np.log(16) - drawn(deficit, 0.01)
    found = uniform_heads(rows(entropy=entropy), 0).row(0, named=True)
    by_source = np.log(16) - entropy.mean(axis=1)
    assert found["value"] == pytest.approx(deficit)
    assert (found["p_holm"] < 0.05) == holds
    if holds:
        assert found["p_value"] == pytest.approx(ttest_1samp(by_source, 0.05, alternative="less").pvalue, rel=1e-6)
        assert found["high"] < 0.05
    else:
        assert found["p_value"] == 1


def test_exactly_uniform_heads_have_no_spread_and_are_uniform():
    found = uniform_heads(rows(entropy=np.log(16)), 0).row(0, named=True)
    assert (found["value"], found["p_value"]) == (pytest.approx(0, abs=1e-12), 0)


@pytest.mark.parametrize(
    ("mass", "keys", "holds"), [(0.35, 64, True), (0.305, 64, False), (0.25, 64, False), (0.35, 8, False)]
)
def test_a_sink_is_a_bound_from_below_and_beyond_small_grids(mass, keys, holds):
    values = drawn(mass, 0.05).mean(axis=1)
    on_sink = pl.DataFrame({"source_id": [f"s{n:02}" for n in range(24)], "site": "a", "head": 0, "value": values})
    sinks = pl.DataFrame({"site": ["a"], "head": [0], "sink_key": [3], "keys": [keys]})
    found = sink_heads(on_sink, sinks, 0).row(0, named=True)
    assert found["value"] == pytest.approx(mass)
    assert (found["p_holm"] < 0.05) == holds


@pytest.mark.parametrize(
    ("still", "moved", "holds"),
    [(0.3, 0.3, True), (0.3, 0.31, True), (0.3, 0.36, False), (0.3, 0.24, False), (0.6, 0.6, False), (0.0, 0.0, True)],
)
def test_local_heads_are_near_on_the_image_and_on_the_moved_one(still, moved, holds):
    parts = [
        rows(distance=4 * drawn(mean, 0.01 * (mean > 0), seed), distance_uniform=4.0).with_columns(
            translated=pl.lit(of)
        )
        for seed, (mean, of) in enumerate(((still, False), (moved, True)))
    ]
    found = local_heads(pl.concat(parts), 0)
    assert found is not None
    row = found.row(0, named=True)
    assert row["value"] == pytest.approx(still, abs=1e-9)
    assert (row["p_holm"] < 0.05) == holds


def test_local_needs_the_moved_image():
    still = rows(distance=1.0, distance_uniform=4.0).with_columns(translated=pl.lit(False))
    assert local_heads(still, 0) is None
    # and all of it
    moved = still.with_columns(translated=pl.lit(True)).filter(pl.col("item") > 0)
    found = local_heads(pl.concat([still, moved]), 0)
    assert found is not None
    assert found["p_value"][0] is None
