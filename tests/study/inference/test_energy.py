"""The energy distance: against a double loop and scipy, its permutation test against scipy's, and what must hold."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from headscope.study.inference import FEWEST_SOURCES, energy_test


def by_loops(first, second, paired=False):
    """The unbiased energy distance as it is written down, one distance at a time."""
    pooled = np.concatenate([first, second])
    spread = pooled.std(axis=0)
    first, second = (array[:, spread > 0] / spread[spread > 0] for array in (first, second))
    between = [np.linalg.norm(x - y) for i, x in enumerate(first) for j, y in enumerate(second) if not paired or i != j]
    within = [
        np.mean([np.linalg.norm(x - y) for i, x in enumerate(group) for j, y in enumerate(group) if i != j])
        for group in (first, second)
    ]
    return 2 * np.mean(between) - sum(within)


def groups(seed, sizes=(21, 33), features=4, shift=0.0):
    generator = np.random.default_rng(seed)
    first, second = (generator.gamma(2.0, size=(size, features)) for size in sizes)
    return first + shift, second


def p_value(first, second, **options):
    found = energy_test(first, second, **options).p_value
    assert found is not None
    return found


@pytest.mark.parametrize("sizes", [(2, 2), (2, 9), (21, 33)])
@pytest.mark.parametrize("features", [1, 5])
def test_statistic_is_that_of_a_double_loop(sizes, features):
    first, second = groups(1, sizes, features)
    assert energy_test(first, second, resamples=9).statistic == pytest.approx(by_loops(first, second), rel=1e-12)


def test_paired_statistic_leaves_out_own_pairs():
    first, second = groups(2, (24, 24))
    found = energy_test(first, second, paired=True, resamples=9)
    assert found.statistic == pytest.approx(by_loops(first, second, paired=True), rel=1e-12)


def test_plug_in_form_is_scipys():
    """scipy's squares and roots it and counts own pairs: 2 E|X - Y| - E|X - X'| - E|Y - Y'| of the two samples."""
    first, second = groups(3, features=1)
    spread = np.concatenate([first, second]).std()
    n, m = len(first), len(second)
    first, second = first / spread, second / spread
    inside = [np.abs(group - group.T).mean() for group in (first, second)]
    plug_in = scipy.stats.energy_distance(first[:, 0], second[:, 0]) ** 2
    unbiased = plug_in - inside[0] / (n - 1) - inside[1] / (m - 1)
    assert energy_test(first, second, resamples=9).statistic == pytest.approx(unbiased, rel=1e-10)


@pytest.mark.parametrize("paired", [False, True])
def test_p_value_and_null_are_those_of_scipy(paired):
    first, second = groups(4, (22, 22) if paired else (20, 30), 2, shift=0.25)
    pooled = np.concatenate([first, second])
    count = len(first)
    # the pooled spread is the same, whichever source is in which group
    distance = cdist(pooled / pooled.std(axis=0), pooled / pooled.std(axis=0))

    def statistic(one, two):
        one, two = one.astype(int), two.astype(int)
        between = distance[np.ix_(one, two)]
        if paired:
            between = between[~np.eye(count, dtype=bool)]
        within = [distance[np.ix_(group, group)].sum() / (len(group) * (len(group) - 1)) for group in (one, two)]
        return 2 * between.mean() - sum(within)

    expected = scipy.stats.permutation_test(
        (np.arange(count), np.arange(count, len(pooled))),
        statistic,
        permutation_type="samples" if paired else "independent",
        alternative="greater",
        n_resamples=2000,
        rng=np.random.default_rng(5),
    )
    found = energy_test(first, second, seed=1, paired=paired)
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.04)
    null = expected.null_distribution
    assert found.null_mean == pytest.approx(null.mean(), abs=4 * null.std() / np.sqrt(len(null)))
    assert found.null_quantiles[0.5] == pytest.approx(np.median(null), abs=0.2 * null.std())
    assert found.null_quantiles[0.025] < found.null_quantiles[0.5] < found.null_quantiles[0.95]


def test_it_is_unbiased_and_of_its_size_under_the_null():
    found = [energy_test(*groups(100 + trial, (20, 26), 3), seed=trial, resamples=199) for trial in range(300)]
    values = np.array([test.statistic for test in found])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    rejected = np.mean(np.array([test.p_value for test in found], float) <= 0.05)
    # 4 binomial standard errors around 5 %
    assert abs(rejected - 0.05) < 4 * np.sqrt(0.05 * 0.95 / len(found))


def test_pairs_see_a_small_shift_that_independent_groups_do_not():
    generator = np.random.default_rng(6)
    shared = generator.normal(0, 5, (25, 3))
    first, second = shared + 0.5, shared + generator.normal(0, 0.3, (25, 3))
    assert p_value(first, second, paired=True) < 0.001
    assert p_value(first, second) > 0.5


def test_a_difference_of_spread_alone_is_seen():
    generator = np.random.default_rng(7)
    assert p_value(generator.normal(0, 1, (60, 2)), generator.normal(0, 3, (60, 2))) < 0.001


def test_void_few_and_constant():
    first, second = groups(8)
    first[3, 1], second[0, 0] = np.nan, np.inf
    void = energy_test(first, second)
    assert (void.void, void.p_value) == (2, None)
    assert np.isnan(void.statistic)
    few = energy_test(*groups(9, (FEWEST_SOURCES - 1, 30)))
    assert few.p_value is None
    assert np.isfinite(few.statistic)
    assert np.isnan(energy_test(*groups(9, (1, 30))).statistic)
    one, two = groups(10, (20, 20), 2)
    one[:, 1] = two[:, 1] = 0.1
    constant = energy_test(one, two)
    assert constant.features == 1
    assert constant.statistic == pytest.approx(energy_test(one[:, :1], two[:, :1]).statistic)
    same = energy_test(np.full((20, 2), 0.3), np.full((20, 2), 0.3))
    assert (same.statistic, same.p_value, same.features) == (0.0, 1.0, 0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 1\)"):
        energy_test(np.zeros((3, 2)), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="20 and 21"):
        energy_test(np.zeros((20, 2)), np.zeros((21, 2)), paired=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_unit_origin_and_order_of_rows_are_nothing(seed, scale, shift):
    first, second = groups(seed, (20, 22), 3)
    before = energy_test(first, second, resamples=49)
    moved = energy_test(first * scale + shift, second * scale + shift, resamples=49)
    assert moved.statistic == pytest.approx(before.statistic, rel=1e-6, abs=1e-9)
    shuffled = energy_test(first[np.random.default_rng(seed).permutation(20)], second, resamples=49)
    assert shuffled.statistic == pytest.approx(before.statistic, rel=1e-9, abs=1e-12)
    swapped = energy_test(second, first, resamples=49)
    assert swapped.statistic == pytest.approx(before.statistic, rel=1e-9, abs=1e-12)
