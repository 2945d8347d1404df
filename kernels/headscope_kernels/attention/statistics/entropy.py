"""The entropy of a row: how many keys it spreads over."""

import triton
import triton.language as tl

from headscope_kernels.attention.statistics.contract import LN2, RowStatistic, register


@triton.jit
def entropy_update(
    accumulators, rescale, shift, normaliser, weights, exponents, rows, columns, keys, tensors, CONSTANTS: tl.constexpr
):
    """t = sum w x. Moving the offset by `shift` turns w into w * rescale and x into x + shift."""
    moved = rescale * (accumulators[0] + normaliser * shift)  # [queries]
    return (moved + tl.sum(weights * exponents, 1),)


@triton.jit
def entropy_finish(accumulators, normaliser, max_logit, max_exponent, CONSTANTS: tl.constexpr):
    """-sum p ln p = ln l - ln(2) t / l: no difference of large numbers, wherever the offset stands."""
    return LN2 * (tl.log2(normaliser) - accumulators[0] / normaliser)


@triton.jit
def entropy_gradient(grad, log_probability, rows, columns, keys, tensors, CONSTANTS: tl.constexpr):
    """d/dp_ij of -sum p ln p is -(ln p_ij + 1); the 1 is the same for the whole row."""
    return -grad[:, None] * log_probability


register("entropy", RowStatistic(entropy_finish, update=entropy_update, accumulators=(0,), gradient=entropy_gradient))
