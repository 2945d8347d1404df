"""The mean Euclidean distance, in tokens, between a query and the keys it attends to, both on grids."""

import triton
import triton.language as tl

from headscope_kernels.attention.statistics.contract import RowStatistic, register


@triton.jit
def distance_update(
    accumulators, rescale, shift, normaliser, weights, exponents, rows, columns, keys, tensors, CONSTANTS: tl.constexpr
):
    """sum w * distance. Query i stands at (i // width, i % width), key j at (j // key_width, j % key_width)."""
    width = CONSTANTS[1]
    key_width = CONSTANTS[3]
    down = (rows // width).to(tl.float32)[:, None] - (columns // key_width).to(tl.float32)[None, :]  # [queries, keys]
    across = (rows % width).to(tl.float32)[:, None] - (columns % key_width).to(tl.float32)[None, :]  # [queries, keys]
    distances = tl.sqrt(down * down + across * across)  # [queries, keys]
    return (accumulators[0] * rescale + tl.sum(weights * distances, 1),)


@triton.jit
def distance_finish(accumulators, normaliser, max_logit, max_exponent, CONSTANTS: tl.constexpr):
    return accumulators[0] / normaliser


def distance(constants: tuple[int | float, ...]) -> RowStatistic:
    """Constants are (height, width, key_height, key_width)."""
    _height, _width, _key_height, _key_width = constants
    return RowStatistic(distance_finish, update=distance_update, accumulators=(0,), constants=constants)


register("distance", distance)
