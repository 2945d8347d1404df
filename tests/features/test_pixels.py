"""The formulas of features, against loops over pixels and closed forms."""

import colorsys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.features import pixels

# differences of float64 numbers below 1
CLOSE = 1e-12


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, 2)


def gradient_at(light: np.ndarray, row: int, column: int) -> tuple[float, float]:
    """Across and down, by Sobel's filter over 8; beyond the border the outermost pixels go on."""
    height, width = light.shape

    def at(down: int, right: int) -> float:
        return light[min(max(row + down, 0), height - 1), min(max(column + right, 0), width - 1)]

    across = sum(weight * (at(down, 1) - at(down, -1)) for down, weight in ((-1, 1), (0, 2), (1, 1)))
    down = sum(weight * (at(1, right) - at(-1, right)) for right, weight in ((-1, 1), (0, 2), (1, 1)))
    return across / 8, down / 8


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**16))
def test_every_formula_at_every_pixel(height, width, seed):
    """Odd sizes, a single pixel, a single row."""
    image = noise(height, width, seed)
    channels = image.astype(np.float64) / 255
    light = channels @ np.array([0.299, 0.587, 0.114])
    gradients = np.array([[gradient_at(light, row, column) for column in range(width)] for row in range(height)])
    found = {
        name: getattr(pixels, name)(image)
        for name in (
            *("luminance", "edge", "edge_orientation", "texture", "red_against_green", "yellow_against_blue"),
            "saturation",
        )
    }
    for name, values in found.items():
        assert values.dtype == np.float64, name
        assert values.shape == (height, width), name
    for row in range(height):
        for column in range(width):
            across, down = gradients[row, column]
            red, green, blue = channels[row, column]
            strength = np.hypot(across, down)
            angle = np.arctan2(down, across)
            assert abs(found["luminance"][row, column] - light[row, column]) < CLOSE
            assert abs(found["edge"][row, column] - strength) < CLOSE
            assert abs(found["edge_orientation"][row, column] - strength * np.cos(2 * angle)) < CLOSE
            assert abs(found["red_against_green"][row, column] - (red - green)) < CLOSE
            assert abs(found["yellow_against_blue"][row, column] - ((red + green) / 2 - blue)) < CLOSE
            assert abs(found["saturation"][row, column] - colorsys.rgb_to_hsv(red, green, blue)[1]) < CLOSE
            around = [
                gradients[min(max(row + i, 0), height - 1), min(max(column + j, 0), width - 1)]
                for i in range(-2, 3)
                for j in range(-2, 3)
            ]
            tensor = np.mean([np.outer(one, one) for one in around], 0)
            assert abs(found["texture"][row, column] - np.linalg.eigvalsh(tensor)[0]) < CLOSE


def test_a_step():
    """Half its height on both sides of it; upright, level and slanting, with no texture along it."""
    levels = np.zeros((9, 12))
    levels[:, 6:] = 200
    upright, level = grey(levels), grey(levels.T)
    height = 200 / 255
    expected = np.zeros((9, 12))
    expected[:, 5:7] = height / 2
    np.testing.assert_allclose(pixels.edge(upright), expected, atol=CLOSE)
    np.testing.assert_allclose(pixels.edge_orientation(upright), expected, atol=CLOSE)
    np.testing.assert_allclose(pixels.edge_orientation(level), -expected.T, atol=CLOSE)
    slanting = grey(np.where(np.add.outer(np.arange(15), np.arange(15)) > 14, 200, 0))
    inside = slice(3, -3), slice(3, -3)
    assert pixels.edge(slanting)[inside].max() > height / 3
    np.testing.assert_array_equal(pixels.edge_orientation(slanting)[inside], 0)
    for image in (upright, level):
        np.testing.assert_array_equal(pixels.texture(image), 0)
    # where its window meets no border
    np.testing.assert_array_equal(pixels.texture(slanting)[5:-5, 5:-5], 0)
    # a ramp's slope is everywhere the same
    ramp = grey(np.broadcast_to(np.arange(0, 80, 8), (6, 10)))
    np.testing.assert_allclose(pixels.edge(ramp)[:, 1:-1], 8 / 255, atol=CLOSE)
    np.testing.assert_array_equal(pixels.texture(ramp), 0)


def test_texture_is_what_edges_do_not_explain():
    """A checkerboard of blocks, and noise, have more of it than the sharpest straight edge, which has none."""
    blocks = grey(np.kron(np.indices((6, 6)).sum(0) % 2, np.ones((2, 2))) * 255)
    step = np.zeros((12, 12))
    step[:, 6:] = 255
    assert pixels.texture(blocks)[3:-3, 3:-3].min() > 0.01
    assert pixels.texture(noise(12, 12)).min() > 0
    assert pixels.texture(grey(step)).max() == 0


@pytest.mark.parametrize("level", [0, 1, 127, 255])
def test_what_is_constant_is_so_to_the_last_bit(level):
    flat = np.full((7, 5, 3), level, np.uint8)
    for name in ("edge", "edge_orientation", "texture", "red_against_green", "yellow_against_blue", "saturation"):
        np.testing.assert_array_equal(getattr(pixels, name)(flat), 0, name)
    assert len(np.unique(pixels.luminance(flat))) == 1
    coloured = np.broadcast_to(np.array([200, 30, level], np.uint8), (7, 5, 3))
    for name in ("luminance", "red_against_green", "yellow_against_blue", "saturation"):
        assert len(np.unique(getattr(pixels, name)(coloured))) == 1, name
    # no channel differs from another in a grey image, whatever its levels
    for name in ("red_against_green", "yellow_against_blue", "saturation"):
        np.testing.assert_array_equal(getattr(pixels, name)(grey(noise(6, 6)[..., 0])), 0, name)


def test_the_ends_of_every_scale():
    image = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]]], np.uint8)
    np.testing.assert_array_equal(pixels.luminance(image)[0, :2], [1, 0])
    np.testing.assert_array_equal(pixels.red_against_green(image)[0], [0, 0, 1, -1, 0, 0])
    np.testing.assert_array_equal(pixels.yellow_against_blue(image)[0], [0, 0, 0.5, 0.5, -1, 1])
    np.testing.assert_array_equal(pixels.saturation(image)[0], [0, 0, 1, 1, 1, 1])


def test_boundaries():
    mask = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2]], np.uint8)
    expected = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(pixels.boundary(mask), expected)
    assert not pixels.boundary(np.zeros((1, 1), np.uint8)).any()
    # 0 - 1 of unsigned numbers is no small one
    np.testing.assert_array_equal(pixels.boundary(np.array([[0, 255]], np.uint8)), [[True, True]])
