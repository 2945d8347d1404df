"""The counter-based numbers: fixed values, independence of order, and distribution."""

import math
import subprocess
import sys

import numpy as np
import pytest

from headscope.counter import (
    _cos_turns,
    _log,
    counter_integers,
    counter_normal,
    counter_permutation,
    counter_uniform,
)

UNIFORM = [0.9593629628116952, 0.7680403151401083, 0.078420513085801]
NORMAL = [0.03258054171045213, -1.87582491576363, 0.3230541530173043]


def test_fixed_values():
    # recorded once: a change here changes every sweep's noise
    assert counter_uniform("noise", "faces/3", 500, 0, shape=3).tolist() == UNIFORM
    assert counter_normal("noise", "faces/3", 500, 0, shape=3).tolist() == NORMAL


def test_a_key_gives_the_same_numbers_in_any_order_and_shape():
    first = counter_normal("a", 1, shape=(4, 5))
    counter_normal("b", 2, shape=1000)
    np.testing.assert_array_equal(counter_normal("a", 1, shape=(20,)).reshape(4, 5), first)
    np.testing.assert_array_equal(counter_normal("a", 1, shape=7), first.reshape(-1)[:7])


def test_keys_do_not_run_together():
    keys = [("a", "bc"), ("ab", "c"), ("abc",), ("a", 1), ("a", "1"), ("a1",), ("a", 1, 0), ("a", -1)]
    assert len({float(counter_uniform(*key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("part", [1.5, None, True, b"x"])
def test_a_key_part_of_another_type_is_an_error(part):
    with pytest.raises(TypeError, match="key: got a part"):
        counter_uniform("a", part)


def test_uniform_distribution():
    values = counter_uniform("uniform", shape=200_000)
    assert values.dtype == np.float64
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    # chi-squared with 49 degrees of freedom: above 94 once in ten thousand
    assert ((counts - 4000) ** 2 / 4000).sum() < 94


def test_normal_distribution():
    values = counter_normal("normal", shape=200_000)
    deviation = 1 / math.sqrt(len(values))
    assert abs(values.mean()) < 4 * deviation
    assert abs(values.var() - 1) < 4 * math.sqrt(2) * deviation
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96) * deviation
    inside = (np.abs(values) < 1).mean()
    assert abs(inside - math.erf(1 / math.sqrt(2))) < 4 * 0.5 * deviation


def test_own_logarithm_and_cosine_agree_with_the_library():
    values = np.concatenate([counter_uniform("log", shape=20_000) + 2.0**-53, 2.0 ** -np.arange(1, 54.0), [1.0]])
    np.testing.assert_allclose(_log(values), np.log(values), rtol=4e-16, atol=4e-16)
    turns = np.concatenate([counter_uniform("cos", shape=20_000), np.arange(16) / 16])
    np.testing.assert_allclose(_cos_turns(turns), np.cos(2 * np.pi * turns), rtol=0, atol=1e-15)


def test_integers_and_permutations():
    values = counter_integers("integers", high=5, shape=5000)
    assert set(values.tolist()) == set(range(5))
    assert sorted(counter_permutation("p", count=37).tolist()) == list(range(37))
    assert counter_permutation("p", 1, count=37).tolist() != counter_permutation("p", 2, count=37).tolist()
    with pytest.raises(ValueError, match="high: got 0"):
        counter_integers("x", high=0)
    with pytest.raises(TypeError):
        counter_integers("x", high=2.5)


def test_shapes():
    assert counter_normal("s").shape == ()
    assert counter_normal("s", shape=(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match="shape: got"):
        counter_normal("s", shape=(-1,))


def test_importing_the_zoo_imports_nothing_heavy():
    heavy = ("torch", "diffusers", "skimage", "PIL")
    code = f"import sys, headscope.zoo; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
