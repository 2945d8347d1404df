"""Divergences of two groups of sources: values against scipy and plain numpy, nulls against plain permutations."""

import numpy as np
import polars as pl
import pytest
from scipy.spatial.distance import cdist, jensenshannon, pdist
from scipy.stats import wasserstein_distance

from headscope.study.contrast.arrays import Sources, arrays_of
from headscope.study.contrast.divergence import BINS, divergences
from headscope.study.inference.draws import divided, flipped
from study import simulated

STEPS = [100, 500, 900]
DRAWS = 60


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(DRAWS):
        yield


def group(count, shift=0.0, seed=0, heads=5):
    generator = np.random.default_rng(seed)
    nats = 2 + shift + generator.normal(0, 0.3, (count, len(STEPS), heads)) * generator.uniform(0.5, 2, heads)
    return Sources([f"{seed}-{number}" for number in range(count)], nats, nats / np.log(64))


def row(table, measure, step):
    found = table.filter(pl.col("measure") == measure, pl.col("timestep").eq_missing(step))
    return found.row(0, named=True)


def energy(one, two, paired=False):
    both = np.concatenate([one, two])
    scale = both.std(axis=0)
    one, two = one / scale, two / scale
    between = cdist(one, two)
    across = between[~np.eye(len(one), dtype=bool)] if paired else between
    return 2 * across.mean() - pdist(one).mean() - pdist(two).mean()


def wasserstein(one, two):
    return np.mean([wasserstein_distance(a, b) for a, b in zip(one.T, two.T, strict=True)])


def jensen_shannon(one, two):
    values = np.concatenate([one.ravel(), two.ravel()])
    counts = [np.histogram(part, BINS, (values.min(), values.max()))[0] for part in (one, two)]
    return jensenshannon(*counts) ** 2


def pooled(one, two):
    return jensen_shannon(one.mean(axis=1), two.mean(axis=1))


REFERENCES = {"wasserstein": ("nats", wasserstein), "jensen_shannon": ("normalised", jensen_shannon),
              "jensen_shannon_pooled": ("normalised", pooled)}  # fmt: skip


@pytest.mark.parametrize("sizes", [(20, 20), (23, 31)])
def test_values_are_scipy_s(sizes):
    one, two = group(sizes[0]), group(sizes[1], 0.2, 1)
    found = divergences(one, two, STEPS)
    for place, step in enumerate(STEPS):
        assert row(found, "energy", step)["value"] == pytest.approx(
            energy(one.nats[:, place], two.nats[:, place]), rel=1e-9
        )
        for measure, (values, reference) in REFERENCES.items():
            pair = (getattr(part, values)[:, place] for part in (one, two))
            assert row(found, measure, step)["value"] == pytest.approx(reference(*pair), rel=1e-9)
    every = (part.nats.reshape(len(part.nats), -1) for part in (one, two))
    assert row(found, "energy", None)["value"] == pytest.approx(energy(*every), rel=1e-9)
    for measure in REFERENCES:
        mean = np.mean([row(found, measure, step)["value"] for step in STEPS])
        assert row(found, measure, None)["value"] == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_nulls_are_those_of_permuted_sources(paired):
    one, two = group(21), group(21, 0.1, 1)
    found = divergences(one, two, STEPS, seed=3, paired=paired)
    step = 1
    for measure, (values, reference) in {**REFERENCES, "energy": ("nats", energy)}.items():
        both = np.concatenate([getattr(part, values)[:, step] for part in (one, two)])
        members = divided(3, 21, 21, DRAWS) > 0
        if paired:
            swapped = flipped(3, 21, DRAWS) > 0
            members = np.concatenate([swapped, ~swapped], axis=1)
        # the order within a group is that of the pairs
        null = []
        for member in members:
            if paired:
                first = np.where(member[:21, None], both[:21], both[21:])
                second = np.where(member[:21, None], both[21:], both[:21])
                null.append(energy(first, second, True) if measure == "energy" else reference(first, second))
            else:
                null.append(reference(both[member], both[~member]))
        at = row(found, measure, STEPS[step])
        assert at["null_mean"] == pytest.approx(np.mean(null), rel=1e-9, abs=1e-12)
        assert at["null_high"] == pytest.approx(np.quantile(null, 0.95), rel=1e-9)
        exceeded = np.sum(np.array(null) >= at["value"] - 1e-12)
        assert at["p_value"] == (1 + exceeded) / (1 + DRAWS)


def test_timesteps_are_a_family_of_each_measure():
    found = divergences(group(20), group(20, 0.2, 1), STEPS)
    for measure in ("energy", *REFERENCES):
        at = found.filter(measure=measure).drop_nulls("timestep")
        assert min(at["p_holm"]) == pytest.approx(min(1.0, min(at["p_value"]) * len(STEPS)))
        assert row(found, measure, None)["p_holm"] is None


def test_what_isn_t_finite_voids_its_timestep_and_is_counted():
    one, two = group(20), group(20, 0.2, 1)
    one.nats[3, 1, 2] = np.nan
    one.normalised[3, 1, 2] = np.nan
    found = divergences(one, two, STEPS)
    whole = divergences(group(20), two, STEPS)
    for measure in ("energy", *REFERENCES):
        for step in (STEPS[1], None):
            at = row(found, measure, step)
            assert at["void"] == 1
            assert [at[name] for name in ("value", "null_mean", "null_high", "p_value", "p_holm")] == [None] * 5
        assert row(found, measure, STEPS[0])["value"] == row(whole, measure, STEPS[0])["value"]


def test_few_sources_have_no_p_value_and_their_null_all_the_same():
    found = divergences(group(19), group(40, 0.2, 1), STEPS)
    assert found["p_value"].is_null().all()
    assert found["null_high"].is_not_null().all()


def test_equal_values_of_all_sources_are_no_divergence():
    still = Sources(["a", "b"], np.ones((2, 1, 3)), np.full((2, 1, 3), 0.5))
    found = divergences(still, still, [100])
    assert found["value"].to_list() == [0.0] * len(found)


def test_the_plug_in_is_mostly_chance_where_sources_are_few():
    """About (bins - 1) / 8 * (1 / n + 1 / m) nats between groups of one distribution: the range of published values."""
    one, two = group(20, seed=5, heads=1), group(20, seed=6, heads=1)
    assert 0.15 < row(divergences(one, two, STEPS), "jensen_shannon_pooled", None)["null_mean"] < 0.35


def items(rows):
    """A table of item means from (source, item, timestep, head, nats)."""
    frame = pl.DataFrame(rows, schema=["source_id", "item", "timestep", "head", "nats"], orient="row")
    constants = {"group": "g", "split": "confirm", "site": "mid", "query_group": "image", "keys": 64}
    return frame.with_columns(pl.lit(value).alias(name) for name, value in constants.items()).with_columns(
        normalised=pl.col("nats") / np.log(64)
    )


def test_arrays_are_source_means_and_void_where_an_item_lacks_a_row():
    one = items(
        [("b", 0, 5, 0, 1.0), ("b", 1, 5, 0, 3.0), ("a", 2, 5, 0, 5.0), ("b", 0, 5, 1, 7.0), ("a", 2, 5, 1, 9.0)]
    )
    two = items([("c", 0, 5, 0, 2.0), ("c", 0, 5, 1, np.nan)])
    heads, timesteps, first, second = arrays_of(one, two)
    assert timesteps == [5]
    assert heads["head"].to_list() == [0, 1]
    assert first.names == ["a", "b"]
    # head 1 of source b has the number of one of its two items
    np.testing.assert_array_equal(first.nats[:, 0], [[5.0, 9.0], [2.0, np.nan]])
    np.testing.assert_array_equal(second.nats[:, 0], [[2.0, np.nan]])
