"""The excess of a head on a feature, and its test, against loops from their definitions."""

import numpy as np
import polars as pl
import pytest

from headscope.study.inference import settings
from headscope.study.inference.draws import paired
from headscope.study.roles.excess import ROUNDING, corrected, excess_by_source, permuted_pairs
from headscope.study.roles.rows import sources_of


def sources(items):
    """Sources of so many items each."""
    names = [f"s{number}" for number, count in enumerate(items) for _ in range(count)]
    return sources_of(pl.DataFrame({"source_id": names, "item": np.arange(len(names)) + 5}))


def drawn(items, keys=6, features=3, timesteps=2, seed=0):
    generator = np.random.default_rng(seed)
    mass = generator.dirichlet(np.ones(keys), (sum(items), timesteps))
    return mass, generator.normal(size=(sum(items), features, keys)), sources(items)


def pairs(mass, maps, of):
    """A(s, t), mean over pairs of items in their order: [sources, sources, features], mass [items, keys]."""
    count, most = of.order.shape
    found = np.zeros((count, count, maps.shape[1]))
    for s in range(count):
        for t in range(count):
            for step in range(most):
                found[s, t] += maps[of.order[t, step]] @ mass[of.order[s, step]] / most
    return found


@pytest.mark.parametrize("items", [(1,) * 5, (2, 2, 2), (1, 3, 2, 3), (1, 1)])
def test_mean_of_the_sources_parts_is_the_excess_by_definition(items):
    mass, maps, of = drawn(items)
    parts = excess_by_source(mass, maps, of)
    count = len(items)
    assert parts.shape == (count, 2, 3)
    for step in range(2):
        table = pairs(mass[:, step], maps, of)
        own = np.trace(table) / count
        others = (table.sum(axis=(0, 1)) - np.trace(table)) / (count * (count - 1))
        np.testing.assert_allclose(parts[:, step].mean(axis=0), own - others, atol=1e-14)


def test_sources_with_as_many_items_weigh_every_item_alike():
    of = sources((2, 2, 2))
    np.testing.assert_array_equal(of.order, [[0, 1], [2, 3], [4, 5]])
    assert of.weight.tolist() == [0.5] * 6
    np.testing.assert_allclose(of.averaged(np.arange(6.0)), [0.5, 2.5, 4.5])


def test_a_source_of_fewer_items_repeats_its_own():
    np.testing.assert_array_equal(sources((1, 3, 2)).order, [[0, 0, 0], [1, 2, 3], [4, 5, 4]])


def test_an_item_of_two_sources_is_refused():
    with pytest.raises(ValueError, match="item 3 with two source ids"):
        sources_of(pl.DataFrame({"source_id": ["a", "b"], "item": [3, 3]}))


@pytest.mark.parametrize("items", [(1,) * 7, (1, 3, 2, 3, 1)])
def test_t_of_every_permutation_is_that_of_a_loop(items, monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", 19)
    mass, maps, of = drawn(items, timesteps=1)
    found = permuted_pairs(mass[:, 0], maps, of, seed=3)
    table = pairs(mass[:, 0], maps, of)
    centred = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean(axis=(0, 1))
    count = len(items)
    for draw, order in enumerate(paired(3, count, 19).T):
        taken = centred[np.arange(count), order]
        error = np.sqrt(taken.var(axis=0, ddof=0) / (count - 1) + ROUNDING**2)
        np.testing.assert_allclose(found[draw], taken.mean(axis=0) / error, rtol=1e-9, atol=1e-12)
    # the first is as observed, and its t that of the sources' parts
    parts = excess_by_source(mass, maps, of)[:, 0]
    t = parts.mean(axis=0) / (parts.std(axis=0, ddof=1) / np.sqrt(count))
    np.testing.assert_allclose(found[0], t, rtol=1e-6)


def test_blocks_of_sources_change_nothing(monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", 9)
    mass, maps, of = drawn((1,) * 6, timesteps=1)
    whole = permuted_pairs(mass[:, 0], maps, of, 0)
    monkeypatch.setattr("headscope.study.roles.excess._BLOCK", 1)
    np.testing.assert_allclose(permuted_pairs(mass[:, 0], maps, of, 0), whole, rtol=1e-9)


def test_looking_at_places_only_is_no_excess_but_for_rounding(monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", 99)
    _, maps, of = drawn((1,) * 20)
    places = np.random.default_rng(1).dirichlet(np.ones(6))
    mass = np.tile(places, (20, 1)) * (1 + 6e-8 * np.random.default_rng(2).normal(size=(20, 6)))
    assert np.abs(permuted_pairs(mass, maps, of, 0)).max() < 1.0
    assert np.abs(excess_by_source(mass[:, None], maps, of)).max() < 1e-6


def test_p_values_are_shares_of_draws_and_families_take_the_largest(monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", 4)
    first = np.array([[2.0, -3.0], [1, 1], [-2, 1], [0.5, 4], [0, 0]])
    second = np.array([[0.5], [0.1], [5], [0.2], [0.3]])
    chosen = np.array([True, False, False, True])
    blocks = [(np.array([0, 1]), first), (np.array([3]), second)]
    p_value, p_maxt, p_chosen = corrected(iter(blocks), 4, chosen)
    # draws' largest: 1, 5, 4, 0.3; among the chosen: 1, 5, 0.5, 0.3
    np.testing.assert_allclose(p_value, [2 / 5, 2 / 5, np.nan, 2 / 5])
    np.testing.assert_allclose(p_maxt, [3 / 5, 3 / 5, np.nan, 4 / 5])
    np.testing.assert_allclose(p_chosen, [2 / 5, np.nan, np.nan, 4 / 5])
