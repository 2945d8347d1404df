"""The collision (Renyi-2) entropy of a row, -ln sum p^2."""

import triton
import triton.language as tl

from headscope_kernels.attention.statistics.contract import LN2, RowStatistic, register


@triton.jit
def collision_update(
    accumulators, rescale, shift, normaliser, weights, exponents, rows, columns, keys, tensors, CONSTANTS: tl.constexpr
):
    """sum w^2, at least the square of the largest weight, which is about 1: it can't underflow."""
    return (accumulators[0] * (rescale * rescale) + tl.sum(weights * weights, 1),)


@triton.jit
def collision_finish(accumulators, normaliser, max_logit, max_exponent, CONSTANTS: tl.constexpr):
    return LN2 * (2.0 * tl.log2(normaliser) - tl.log2(accumulators[0]))


register("collision_entropy", RowStatistic(collision_finish, update=collision_update, accumulators=(0,)))
