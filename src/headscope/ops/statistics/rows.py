"""Statistics that the softmax's running maximum and sums say almost for free: one number per row."""

import torch

from headscope._shapes import RowGradient, RowIndices, RowValue, Scores, StatisticTensors
from headscope.ops.statistics.statistic import BuiltIn, dead_rows


class Entropy(BuiltIn):
    """-sum_j p ln p, with 0 ln 0 = 0 in the value and in the gradient. Nats."""

    key = "entropy"
    unit = "nats"
    description = "-sum_j p ln p"
    differentiable = True

    def formula(self, logits: Scores, probabilities: Scores, rows: RowIndices, tensors: StatisticTensors) -> RowValue:
        logarithm = torch.where(probabilities == 0, 1, probabilities).log()
        return -(probabilities * logarithm).sum(-1)

    def row_constant(self, grad: RowGradient, value: RowValue) -> RowGradient:
        # gradient_j = -grad ln p_j
        return grad * value


class LogSumExp(BuiltIn):
    """ln sum_j exp(logit), -inf (with a gradient of 0) where no key is valid. Nats."""

    key = "logsumexp"
    unit = "nats"
    description = "ln sum_j exp(logit)"
    differentiable = True
    constant_gradient = True

    def formula(self, logits: Scores, probabilities: Scores, rows: RowIndices, tensors: StatisticTensors) -> RowValue:
        dead = dead_rows(logits)
        finite = torch.where(dead.unsqueeze(-1), 0, logits)
        if not logits.shape[-1]:
            return finite.logsumexp(-1)
        # relative to the largest: in a row of finfo.min its gradient would lose the number of keys beside 3e38
        largest = finite.detach().amax(-1)
        largest = torch.where(largest.isfinite(), largest, 0)
        return torch.where(dead, -torch.inf, (finite - largest.unsqueeze(-1)).logsumexp(-1) + largest)

    def row_constant(self, grad: RowGradient, value: RowValue) -> RowGradient:
        # d logsumexp / d logit_j = p_j, which a constant of -1 in the softmax's own gradient gives
        return torch.where(value == -torch.inf, 0, -grad)


class MaxLogit(BuiltIn):
    """max_j logit, -inf where no key is valid. Nats."""

    key = "max_logit"
    unit = "nats"
    description = "max_j logit"

    def formula(self, logits: Scores, probabilities: Scores, rows: RowIndices, tensors: StatisticTensors) -> RowValue:
        if logits.shape[-1] == 0:
            return logits.new_full(logits.shape[:-1], -torch.inf)
        return logits.amax(-1)


class MaxProb(BuiltIn):
    """max_j p, in 0..1, 0 where no key is valid."""

    key = "max_prob"
    unit = "probability"
    description = "max_j p"

    def formula(self, logits: Scores, probabilities: Scores, rows: RowIndices, tensors: StatisticTensors) -> RowValue:
        return _largest(probabilities)


class CollisionEntropy(BuiltIn):
    """-ln sum_j p^2, the Renyi entropy of order 2, at most the entropy; 0 where no key is valid. Nats."""

    key = "collision_entropy"
    unit = "nats"
    description = "-ln sum_j p^2"

    def formula(self, logits: Scores, probabilities: Scores, rows: RowIndices, tensors: StatisticTensors) -> RowValue:
        # relative to the largest, so that small probabilities don't underflow
        largest = _largest(probabilities)
        dead = largest == 0
        safe = torch.where(dead, 1, largest)
        total = (probabilities / safe.unsqueeze(-1)).square().sum(-1)
        return torch.where(dead, 0, -(torch.where(dead, 1, total).log() + 2 * safe.log()))


def _largest(probabilities: Scores) -> RowValue:
    """max_j p, 0 where there are no keys."""
    if probabilities.shape[-1] == 0:
        return probabilities.new_zeros(probabilities.shape[:-1])
    return probabilities.amax(-1)
