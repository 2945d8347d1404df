"""Bootstrap-t: against a slow loop in float64, draws without spread, added errors, and what must not matter."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import settings as checked
from hypothesis import strategies as st

from headscope.study.inference import settings, smooth
from headscope.study.inference.draws import drawn, resampled
from headscope.study.inference.intervals import FEWEST_RESAMPLED, Added, infer
from headscope.study.inference.smooth import estimate, studentised

DRAWS = 199


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", DRAWS)


def plain_mean(x):
    return x[0].mean()


def plain_difference(x, y):
    return x.mean(axis=1)[0] - y.mean(axis=1)[0]


def plain_log_ratio(x, y):
    return np.log(x.mean(axis=1)[0] / y.mean(axis=1)[0])


def plain_paired_log_ratio(x):
    return np.log(x[0].mean() / x[1].mean())


def plain_relative(x):
    change, clean = np.split(x.sum(axis=1), 2)
    return (change / clean).mean()


def plain_relative_difference(x):
    first, second = np.split(x, 2)
    return plain_relative(first) - plain_relative(second)


CASES = {
    "mean": (smooth.mean, plain_mean, (1,)),
    "difference": (smooth.difference, plain_difference, (1, 1)),
    "log ratio": (smooth.log_ratio, plain_log_ratio, (1, 1)),
    "paired log ratio": (smooth.paired_log_ratio, plain_paired_log_ratio, (2,)),
    "relative, one band": (smooth.relative, plain_relative, (2,)),
    "relative, three bands": (smooth.relative, plain_relative, (6,)),
    "relative difference, one band": (smooth.relative_difference, plain_relative_difference, (4,)),
    "relative difference, three bands": (smooth.relative_difference, plain_relative_difference, (12,)),
}


def samples(seed, columns, cells=2, sizes=(23, 31)):
    generator = np.random.default_rng(seed)
    return [
        generator.gamma(2.0, 1.0, (count, size, cells)) + 0.1
        for count, size in zip(columns, sizes[: len(columns)], strict=True)
    ]


def by_differences(function, groups):
    """Value and delta-method standard error with derivatives by central differences."""
    value = function(*groups)
    variance = 0.0
    for position, group in enumerate(groups):
        gradient = np.zeros(len(group))
        for column in range(len(group)):
            moved = []
            for step in (1e-5, -1e-5):
                changed = [array.copy() for array in groups]
                changed[position][column] += step
                moved.append(function(*changed))
            gradient[column] = (moved[0] - moved[1]) / 2e-5
        covariance = np.atleast_2d(np.cov(group))
        variance += gradient @ covariance @ gradient / group.shape[1]
    return value, np.sqrt(variance)


@pytest.mark.parametrize("name", CASES)
def test_estimates_and_draws_are_those_of_a_slow_loop(name):
    function, plain, columns = CASES[name]
    groups = samples(1, columns)
    sizes = tuple(group.shape[1] for group in groups)
    value, error = estimate(groups, function)
    t = np.concatenate([part.t for part in studentised(groups, function, 3, DRAWS)], axis=1)
    weights = resampled(3, sizes, DRAWS)
    for cell in range(2):
        alone = [group[:, :, cell] for group in groups]
        expected = by_differences(plain, alone)
        assert value[cell] == pytest.approx(expected[0], rel=1e-12)
        assert error[cell] == pytest.approx(expected[1], rel=1e-6)
        for draw in (0, 57, DRAWS - 1):
            again = []
            for group, weight, size in zip(alone, weights, sizes, strict=True):
                times = np.rint(weight[draw] * drawn(size)).astype(int)
                assert times.sum() == drawn(size)
                again.append(np.repeat(group, times, axis=1))
            redrawn = by_differences(plain, again)
            assert t[draw, cell] == pytest.approx((redrawn[0] - value[cell]) / redrawn[1], rel=1e-5)


def test_bounds_and_p_values_follow_from_the_draws():
    """The hull of the symmetric and the equal-tailed interval, ranks k / (R + 1); p is the larger of both."""
    groups = samples(2, (1,), cells=5)
    groups[0] -= 2.0
    found = infer(groups, smooth.mean, seed=4, family=True)
    t = np.concatenate([part.t for part in studentised(groups, smooth.mean, 4, DRAWS)], axis=1)
    for cell in range(5):
        ordered, lengths = np.sort(t[:, cell]), np.sort(np.abs(t[:, cell]))
        half, low, high = lengths[189], ordered[4], ordered[194]
        error, value = found.standard_error[cell], found.value[cell]
        assert found.low[cell] == pytest.approx(value - max(half, high) * error)
        assert found.high[cell] == pytest.approx(value + max(half, -low) * error)
        observed = value / error
        symmetric = 1 + (np.abs(t[:, cell]) >= abs(observed)).sum()
        tail = 1 + min((t[:, cell] >= observed).sum(), (t[:, cell] <= observed).sum())
        expected = min(1.0, max(symmetric, 2 * tail) / (DRAWS + 1))
        assert found.p_value[cell] == pytest.approx(expected)
        extreme = 1 + min((t.max(axis=1) >= observed).sum(), (t.min(axis=1) <= observed).sum())
        assert found.p_maxt[cell] == pytest.approx(max(expected, min(1.0, 2 * extreme / (DRAWS + 1))))


def test_p_below_five_percent_only_where_the_interval_leaves_out_zero():
    generator = np.random.default_rng(3)
    sample = generator.lognormal(0, 1, (1, 20, 400)) - 1.2
    found = infer([sample], smooth.mean)
    rejected = found.p_value < 0.05
    outside = (found.low > 0) | (found.high < 0)
    assert rejected.any()
    assert not rejected.all()
    assert (outside | ~rejected).all()


def test_draws_without_spread_are_infinitely_far_or_equal():
    """Nine tenths of the sources are alike: many draws hold only those."""
    sample = np.zeros((1, 20, 3))
    sample[0, 0, 0] = 1.0
    sample[0, :10, 1] = 1.0
    sample[:, :, 2] = 0.3
    t = np.concatenate([part.t for part in studentised([sample], smooth.mean, 0, DRAWS)], axis=1)
    weights = resampled(0, (20,), DRAWS)[0]
    without = weights[:, 0] == 0
    assert without.any()
    assert (t[without, 0] == -np.inf).all()
    assert np.isfinite(t[~without, 0]).all()
    assert (t[:, 2] == 0).all()
    found = infer([sample], smooth.mean)
    # nothing bounds what was seen once; p counts the infinite ones
    assert np.isnan(found.low[0])
    assert np.isnan(found.high[0])
    assert found.p_value[0] >= without.mean()
    assert found.low[1] < 0.5 < found.high[1]
    assert found.low[2] == found.high[2] == pytest.approx(0.3)
    assert found.p_value[2] == pytest.approx(2 / (DRAWS + 1))
    assert infer([np.zeros((1, 20, 1))], smooth.mean).p_value[0] == 1.0


def test_a_proportional_change_has_no_error():
    """Its relative degradation is the same in every draw, though neither sum is."""
    clean = np.random.default_rng(4).lognormal(0, 1, (2, 25, 1))
    found = infer([np.concatenate([0.3 * clean, clean])], smooth.relative)
    assert found.value[0] == pytest.approx(0.3)
    assert found.low[0] == pytest.approx(0.3)
    assert found.high[0] == pytest.approx(0.3)


def test_draws_without_a_value_are_beyond_every_bound():
    """The logarithm of a ratio whose first mean is negative in a tenth of the draws."""
    generator = np.random.default_rng(5)
    first, second = generator.normal(0.3, 1.0, (1, 25, 1)), generator.normal(5, 1, (1, 25, 1))
    t = next(studentised([first, second], smooth.log_ratio, 0, DRAWS)).t
    assert 0.02 < np.isnan(t).mean() < 0.5
    assert np.isnan(infer([first, second], smooth.log_ratio).low[0])


@pytest.mark.parametrize("sources", [2, 3, FEWEST_RESAMPLED - 1])
def test_few_sources_have_students_interval_and_no_test(sources):
    sample = np.random.default_rng(6).normal(size=sources)
    found = infer([sample[None, :, None]], smooth.mean)
    expected = scipy.stats.ttest_1samp(sample, 0.0).confidence_interval()
    assert found.low[0] == pytest.approx(expected.low)
    assert found.high[0] == pytest.approx(expected.high)
    assert np.isnan(found.p_value[0])


def test_one_source_has_no_interval():
    found = infer([np.ones((1, 1, 1))], smooth.mean)
    assert found.value[0] == 1.0
    assert np.isnan([found.low[0], found.high[0], found.standard_error[0]]).all()


def test_an_added_error_widens_in_quadrature():
    sample = np.random.default_rng(7).normal(0.6, 1.0, (1, 30, 2))
    plain = infer([sample], smooth.mean)
    added = Added(np.array([0.2, 0.0]), np.array([3.0, 3.0]))
    wide = infer([sample], smooth.mean, added=added)
    quantile = scipy.stats.t.ppf(0.975, 3)
    for side in ("low", "high"):
        half = np.abs(getattr(plain, side) - plain.value)
        expected = np.hypot(half, quantile * added.standard_error)
        assert np.abs(getattr(wide, side) - wide.value) == pytest.approx(expected)
    assert wide.p_value[0] > plain.p_value[0]
    assert wide.p_value[1] == plain.p_value[1]
    # the column is of the sampling of sources alone
    assert wide.standard_error == pytest.approx(plain.standard_error)


def test_blocks_are_nothing_to_the_result(monkeypatch):
    sample = np.random.default_rng(8).gamma(2.0, 1.0, (1, 20, 37)) - 1.5
    whole = infer([sample], smooth.mean, family=True)
    monkeypatch.setattr(smooth, "_BLOCK", 5 * DRAWS)
    parts = infer([sample], smooth.mean, family=True)
    for name in ("value", "low", "high", "p_value", "p_maxt", "standard_error"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12)


@checked(max_examples=30, deadline=None)
@given(seed=st.integers(0, 500), scale=st.floats(1e-6, 1e6), shift=st.floats(-100, 100))
def test_unit_and_origin_are_nothing(seed, scale, shift):
    sample = np.random.default_rng(seed).gamma(1.0, 1.0, (1, 20, 1))
    before = infer([sample], smooth.mean)
    after = infer([scale * sample], smooth.mean)
    assert after.low[0] == pytest.approx(scale * before.low[0], rel=1e-9)
    assert after.p_value[0] == before.p_value[0]
    moved = infer([sample + shift], smooth.mean)
    assert moved.low[0] - shift == pytest.approx(before.low[0], rel=1e-6, abs=1e-9)
    assert moved.high[0] - shift == pytest.approx(before.high[0], rel=1e-6, abs=1e-9)
    mirrored = infer([-sample], smooth.mean)
    assert -mirrored.high[0] == pytest.approx(before.low[0])


@checked(max_examples=30, deadline=None)
@given(seed=st.integers(0, 500), scale=st.floats(1e-3, 1e3))
def test_a_relative_degradation_has_no_unit(seed, scale):
    groups = samples(seed, (4,), cells=1)
    before, after = infer(groups, smooth.relative), infer([scale * groups[0]], smooth.relative)
    assume(np.isfinite(before.low[0]))
    for name in ("value", "low", "high", "p_value"):
        assert getattr(after, name)[0] == pytest.approx(getattr(before, name)[0], rel=1e-9)
