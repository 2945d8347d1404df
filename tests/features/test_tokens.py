"""Maps on grids of tokens, against exact areas pixel by pixel."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.features import on_tokens, position_maps, resolved, top_quarter


def overlap(token: int, tokens: int, pixel: int, pixels: int) -> Fraction:
    start = max(Fraction(token, tokens), Fraction(pixel, pixels))
    return max(Fraction(0), min(Fraction(token + 1, tokens), Fraction(pixel + 1, pixels)) - start)


def means(values: np.ndarray, grid: tuple[int, int]) -> list[list[Fraction]]:
    """Of whole numbers, exact."""
    height, width = values.shape
    return [
        [
            sum(
                (
                    overlap(row, grid[0], y, height) * overlap(column, grid[1], x, width) * int(values[y, x])
                    for y in range(height)
                    for x in range(width)
                ),
                Fraction(0),
            )
            * grid[0]
            * grid[1]
            for column in range(grid[1])
        ]
        for row in range(grid[0])
    ]


maps = st.integers(1, 6).flatmap(
    lambda height: st.integers(1, 6).flatmap(
        lambda width: st.lists(st.integers(-9, 9), min_size=height * width, max_size=height * width).map(
            lambda numbers: np.array(numbers, np.float64).reshape(height, width)
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(maps, st.integers(1, 7), st.integers(1, 7))
def test_a_token_has_the_mean_of_its_rectangle(values, height, width):
    """On grids coarser and finer than the pixels, whether they divide or not; and how much of it they resolve."""
    exact = means(values, (height, width))
    found = on_tokens(values, (height, width))
    np.testing.assert_allclose(found, np.array(exact, np.float64), rtol=0, atol=1e-13)
    of_pixels = [Fraction(int(value)) for value in values.ravel()]
    mean = sum(of_pixels, Fraction(0)) / len(of_pixels)
    variance = sum(((value - mean) ** 2 for value in of_pixels), Fraction(0)) / len(of_pixels)
    share = resolved(values, (height, width))
    if variance == 0:
        assert share is None
    else:
        between = sum(((value - mean) ** 2 for row in exact for value in row), Fraction(0)) / (height * width)
        assert share is not None
        assert share == pytest.approx(float(between / variance), abs=1e-12)
        assert 0 <= share <= 1


def test_what_a_grid_resolves():
    fine = np.indices((8, 8)).sum(0) % 2.0
    assert resolved(fine, (8, 8)) == 1
    assert resolved(fine, (4, 4)) == 0
    assert resolved(np.kron(fine, np.ones((3, 3))), (8, 8)) == pytest.approx(1, abs=1e-12)
    assert resolved(np.full((5, 7), 0.1), (2, 3)) is None


@pytest.mark.parametrize(
    ("values", "chosen"),
    [
        ([[0, 1, 2, 3]], [[False, False, False, True]]),
        ([[3, 1, 2, 3]], [[True, False, False, True]]),  # the largest alone are more than a quarter
        ([[0, 0, 0, 0, 0, 0, 0, 1]], [[False] * 7 + [True]]),  # fewer than a quarter are above the rest
        ([[5, 4, 4, 0, 0, 0, 0, 0]], [[True] + [False] * 7]),  # equal ones together or not at all
        ([[5, 4, 3, 0, 0, 0, 0, 0]], [[True, True] + [False] * 6]),
        ([[-1, -2, -2, -2]], [[True, False, False, False]]),
        ([[0, 0], [0, 0]], [[False, False], [False, False]]),
        ([[7]], [[False]]),
    ],
)
def test_the_top_quarter(values, chosen):
    np.testing.assert_array_equal(top_quarter(np.array(values, np.float64)), chosen)


@settings(max_examples=60, deadline=None)
@given(maps)
def test_the_top_quarter_is_the_largest_set_above_a_value_that_is_no_more(values):
    found = top_quarter(values)
    levels = np.unique(values)
    sets = [values >= level for level in levels]
    allowed = [one for one in sets if 4 * one.sum() <= values.size]
    if len(levels) == 1:
        expected = np.zeros(values.shape, bool)
    else:
        expected = max(allowed, key=np.sum) if allowed else sets[-1]
    np.testing.assert_array_equal(found, expected)


def test_places():
    found = position_maps((2, 3))
    assert list(found) == ["row", "column", "centre distance", "border distance"]
    np.testing.assert_array_equal(found["row"], [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(found["column"], [[0, 1, 2], [0, 1, 2]])
    far, near = np.hypot(0.5, 1), 0.5
    np.testing.assert_allclose(found["centre distance"], [[far, near, far]] * 2)
    np.testing.assert_array_equal(found["border distance"], np.full((2, 3), 0.5))
    five = position_maps((5, 5))["border distance"]
    np.testing.assert_array_equal(five[2], [0.5, 1.5, 2.5, 1.5, 0.5])
