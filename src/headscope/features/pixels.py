"""The formulas of features, at every pixel of an image, in float64.

Channels R, G and B are the file's own values over 255, without undoing their gamma. Sums and differences of them are
taken in whole numbers, so that what is constant in an image is so to the last bit. Beyond its border an image goes on
as its outermost pixels.
"""

import numpy as np

from headscope._shapes import Bool, Float64, Int64, Integer, UInt8

Image = UInt8[np.ndarray, "height width 3"]
Map = Float64[np.ndarray, "height width"]
# of luminance, in whole numbers: weights of the channels in thousandths, times 255
_WHITE = 255_000
# pixels to a side of the square over which texture is taken
WINDOW = 5
# an eigenvalue below so much of the trace is rounding
_ROUNDING = 1e-12


def luminance(image: Image) -> Map:
    """0.299 R + 0.587 G + 0.114 B, 0 to 1."""
    return _luminance(image) / _WHITE


def edge(image: Image) -> Map:
    """sqrt(gx^2 + gy^2), luminance per pixel."""
    across, down = _gradient(image)
    return np.hypot(across, down)


def edge_orientation(image: Image) -> Map:
    """(gx^2 - gy^2) / sqrt(gx^2 + gy^2), luminance per pixel; 0 where there is no gradient."""
    across, down = _gradient(image)
    strength = np.hypot(across, down)
    # a product of sum and difference: equal ones give 0
    difference = (across - down) * (across + down)
    return np.divide(difference, strength, out=np.zeros_like(strength), where=strength > 0)


def texture(image: Image) -> Map:
    """The smaller eigenvalue of the mean of [gx, gy]^T [gx, gy] over 5 x 5 pixels."""
    across, down = _gradient(image)
    xx, xy, yy = (_window_mean(product) for product in (across * across, across * down, down * down))
    trace = xx + yy
    smaller = (trace - np.hypot(xx - yy, 2 * xy)) / 2
    return np.where(smaller > _ROUNDING * trace, smaller, 0.0)


def red_against_green(image: Image) -> Map:
    """R - G, -1 to 1."""
    red, green, _ = _channels(image)
    return (red - green) / 255


def yellow_against_blue(image: Image) -> Map:
    """(R + G) / 2 - B, -1 to 1."""
    red, green, blue = _channels(image)
    return (red + green - 2 * blue) / 510


def saturation(image: Image) -> Map:
    """(max - min) / max, 0 to 1; 0 of black."""
    channels = np.stack(_channels(image))
    most, least = channels.max(0), channels.min(0)
    return np.divide(most - least, most, out=np.zeros(most.shape), where=most > 0)


def boundary(mask: Integer[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """True at a pixel one of whose four neighbours is of another part."""
    found = np.zeros(mask.shape, bool)
    upright, level = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    found[1:] |= upright
    found[:-1] |= upright
    found[:, 1:] |= level
    found[:, :-1] |= level
    return found


def _channels(image: Image) -> tuple[Int64[np.ndarray, "height width"], ...]:
    return tuple(np.moveaxis(image.astype(np.int64), 2, 0))


def _luminance(image: Image) -> Int64[np.ndarray, "height width"]:
    red, green, blue = _channels(image)
    return 299 * red + 587 * green + 114 * blue


def _gradient(image: Image) -> tuple[Map, Map]:
    """The luminance's change per pixel across and down, by Sobel's filter."""
    around = np.pad(_luminance(image), 1, mode="edge")
    across = around[:, 2:] - around[:, :-2]
    down = around[2:] - around[:-2]
    across = across[:-2] + 2 * across[1:-1] + across[2:]
    down = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return across / (8 * _WHITE), down / (8 * _WHITE)


def _window_mean(values: Map) -> Map:
    around = np.pad(values, WINDOW // 2, mode="edge")
    return np.lib.stride_tricks.sliding_window_view(around, (WINDOW, WINDOW)).mean((2, 3))
