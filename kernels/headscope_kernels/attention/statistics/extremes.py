"""Statistics that the online softmax has anyway, from its normaliser and its maximum. Nothing to accumulate."""

import triton
import triton.language as tl

from headscope_kernels.attention.statistics.contract import RowStatistic

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def logsumexp_finish(accumulators, normaliser, max_logit, max_exponent, CONSTANTS: tl.constexpr):
    # one logit of +inf makes the sum infinite; the general formula would subtract infinities
    infinite = normaliser == float("inf")
    return tl.where(infinite, normaliser, max_logit + LN2 * (tl.log2(normaliser) - max_exponent))


@triton.jit
def max_logit_finish(accumulators, normaliser, max_logit, max_exponent, CONSTANTS: tl.constexpr):
    # a hardware maximum drops NaN, the sum of the weights keeps it
    return tl.where(normaliser == normaliser, max_logit, normaliser)


@triton.jit
def max_prob_finish(accumulators, normaliser, max_logit, max_exponent, CONSTANTS: tl.constexpr):
    return tl.exp2(max_exponent) / normaliser


# logsumexp's gradient is p itself, a constant of the row before the softmax: the backward takes it with the row sums
LOGSUMEXP = RowStatistic(logsumexp_finish, empty=float("-inf"))
MAX_LOGIT = RowStatistic(max_logit_finish, empty=float("-inf"))
MAX_PROB = RowStatistic(max_prob_finish)
