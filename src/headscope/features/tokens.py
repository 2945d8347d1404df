"""Maps of pixels on the tokens of a grid, and maps of places alone."""

import numpy as np

from headscope._shapes import Bool, Float64
from headscope.ops.regions import overlaps

Map = Float64[np.ndarray, "height width"]


def on_tokens(values: Map, grid: tuple[int, int]) -> Float64[np.ndarray, "rows columns"]:
    """The mean of a map over each token of a grid.

    A token covers its rectangle of the picture; a pixel that several tokens share counts in each by how much of it
    lies there, which is an exact fraction.

    Args:
        grid: (height, width) in tokens.
    """
    height, width = values.shape
    down, across = overlaps(grid[0], height).numpy(), overlaps(grid[1], width).numpy()
    return down @ values @ across.T / (height * width)


def resolved(values: Map, grid: tuple[int, int]) -> float | None:
    """The share of a map's variance over the picture that lies between the tokens of a grid, 0 to 1: the variance of
    the tokens' means over that of the pixels. None of a map that is the same everywhere."""
    if values.min() == values.max():
        return None
    return float(min(1.0, on_tokens(values, grid).var() / values.var()))


def top_quarter(values: Map) -> Bool[np.ndarray, "height width"]:
    """True at the places with the largest values, as many as are at most a quarter of all, and equal ones together.

    Where the places of the largest value alone are more than a quarter, those. None where all are equal.
    """
    different, counts = np.unique(values, return_counts=True)
    if len(different) == 1:
        return np.zeros(values.shape, bool)
    # how many places have each of the values, or a larger one
    above = counts[::-1].cumsum()[::-1]
    within = different[4 * above <= values.size]
    return values >= (within[0] if len(within) else different[-1])


def position_maps(grid: tuple[int, int]) -> dict[str, Float64[np.ndarray, "rows columns"]]:
    """Maps of the places on a grid alone, the same for every image: [rows, columns], in tokens.

    "row" and "column", from 0; "centre distance", to the middle of the grid; "border distance", of a token's middle to
    the nearest border.
    """
    rows, columns = (axis.astype(np.float64) for axis in np.mgrid[: grid[0], : grid[1]])
    return {
        "row": rows,
        "column": columns,
        "centre distance": np.hypot(rows - (grid[0] - 1) / 2, columns - (grid[1] - 1) / 2),
        "border distance": np.minimum.reduce([rows, columns, grid[0] - 1 - rows, grid[1] - 1 - columns]) + 0.5,
    }
