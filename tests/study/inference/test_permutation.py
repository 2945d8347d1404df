"""The studentised permutation test: against scipy's with a Welch statistic, and its size where a plain one fails."""

import numpy as np
import pytest
import scipy.stats

from headscope.study.inference import settings, smooth
from headscope.study.inference.draws import divided
from headscope.study.inference.intervals import infer
from headscope.study.inference.permutation import permuted


def welch(x, y, axis=0):
    spread = x.var(axis=axis, ddof=1) / x.shape[axis] + y.var(axis=axis, ddof=1) / y.shape[axis]
    return (x.mean(axis=axis) - y.mean(axis=axis)) / np.sqrt(spread)


@pytest.mark.parametrize("sizes", [(20, 20), (21, 40)])
def test_p_is_that_of_scipy(sizes):
    generator = np.random.default_rng(1)
    first, second = 2 * generator.normal(0.5, 1, sizes[0]), generator.normal(0, 1, sizes[1])
    observed = np.array([welch(first, second)])
    found, _ = permuted(first[:, None], second[:, None], observed, seed=1)
    expected = scipy.stats.permutation_test(
        (first, second), welch, vectorized=True, n_resamples=20_000, batch=2000, rng=np.random.default_rng(2)
    )
    # scipy doubles the smaller tail; of nearly symmetric ones that is the share beyond either
    assert found[0] == pytest.approx(expected.pvalue, abs=4 * np.sqrt(0.25 / 9999) + 0.005)


def test_every_division_and_the_largest_of_a_family(monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", 99)
    generator = np.random.default_rng(3)
    first, second = generator.gamma(1.0, 1.0, (20, 6)), generator.gamma(1.0, 2.0, (25, 6))
    observed = welch(first, second)
    single, corrected = permuted(first, second, observed, seed=5, family=True)
    pooled = np.concatenate([first, second])
    null = np.array([welch(pooled[member == 1], pooled[member == 0]) for member in divided(5, 20, 25, 99)])
    assert single == pytest.approx((1 + (np.abs(null) >= np.abs(observed)).sum(axis=0)) / 100)
    largest = np.abs(null).max(axis=1)
    assert corrected == pytest.approx((1 + (largest[:, None] >= np.abs(observed)).sum(axis=0)) / 100)
    assert (corrected >= single).all()


def test_equal_sources_and_ties(monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", 99)
    same = np.full((20, 1), 0.1)
    assert permuted(same, same, np.zeros(1), 0)[0] == 1.0
    # all alike within, apart between: no division is as far
    assert permuted(same, same + 1.0, np.array([-np.inf]), 0)[0] == pytest.approx(0.01)


def test_size_holds_with_unequal_sizes_and_spreads():
    """A permutation of plain differences rejects a quarter here."""
    generator = np.random.default_rng(4)
    trials = 600
    first, second = 3 * generator.normal(size=(20, trials)), generator.normal(size=(80, trials))
    observed = welch(first, second)
    members = divided(0, 20, 80, 499)
    pooled = np.concatenate([first, second])
    sums = members @ pooled
    plain = sums / 20 - (pooled.sum(axis=0) - sums) / 80
    unstudentised = (np.abs(plain) >= np.abs(first.mean(axis=0) - second.mean(axis=0))).mean(axis=0) < 0.05
    assert unstudentised.mean() > 0.15
    found, _ = permuted(first, second, observed, 0)
    # 4 binomial standard errors above 5 %
    assert 0.02 < (found < 0.05).mean() < 0.05 + 4 * np.sqrt(0.05 * 0.95 / trials)


def test_skewed_groups_need_the_bootstrap_beside_it(monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", 499)
    generator = np.random.default_rng(5)
    trials = 600
    first, second = (
        scale * (generator.lognormal(0, 1, (size, trials)) - np.exp(0.5)) for scale, size in ((3, 40), (1, 40))
    )
    found = infer([first[None], second[None]], smooth.difference)
    alone, _ = permuted(first, second, found.value / found.standard_error, 0)
    both = np.maximum(alone, found.p_value)
    assert (alone < 0.05).mean() > 0.07
    assert (both < 0.05).mean() < 0.075
