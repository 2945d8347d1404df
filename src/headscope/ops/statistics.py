"""The statistics of one attention row: p = softmax(logits), logits = scale * query . key + mask.

Each is a small object with its torch formula, which the plain-torch backends evaluate directly; the compiled
backends look their own code up by the object's name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistic:
    """One number per attention row.

    Attributes:
        name: the key it has in `result.statistics`.
        unit: its unit, for tables and axes.
        description: its definition in a line.
        differentiable: whether gradients flow through it.
        formula: (logits [..., queries, keys], probabilities [..., queries, keys]) -> [..., queries].
            A row without any valid key has logits of -inf and probabilities of 0.
    """

    name: str
    unit: str
    description: str
    differentiable: bool
    formula: Callable[[Tensor, Tensor], Tensor]


def entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """-sum_j p ln p, with 0 ln 0 = 0 in the value and in the gradient. Nats, [..., queries]."""
    logarithm = torch.where(probabilities == 0, 1, probabilities).log()
    return -(probabilities * logarithm).sum(-1)


def logsumexp(logits: Tensor, probabilities: Tensor) -> Tensor:
    """ln sum_j exp(logit), -inf (with a gradient of 0) where no key is valid. Nats, [..., queries]."""
    dead = max_logit(logits, probabilities) == -torch.inf
    finite = torch.where(dead.unsqueeze(-1), 0, logits)
    return torch.where(dead, -torch.inf, finite.logsumexp(-1)) if logits.shape[-1] else finite.logsumexp(-1)


def max_logit(logits: Tensor, probabilities: Tensor) -> Tensor:
    """max_j logit, -inf where no key is valid. Nats, [..., queries]."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], -torch.inf)
    return logits.amax(-1)


def max_prob(logits: Tensor, probabilities: Tensor) -> Tensor:
    """max_j p, in 0..1, 0 where no key is valid. [..., queries]."""
    if probabilities.shape[-1] == 0:
        return probabilities.new_zeros(probabilities.shape[:-1])
    return probabilities.amax(-1)


STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Statistic("entropy", "nats", "-sum_j p ln p", True, entropy),
        Statistic("logsumexp", "nats", "ln sum_j exp(logit)", True, logsumexp),
        Statistic("max_logit", "nats", "max_j logit", False, max_logit),
        Statistic("max_prob", "probability", "max_j p", False, max_prob),
    )
}


def statistic_names(statistics: Sequence[str | Statistic] | str) -> tuple[str, ...]:
    """The names of the requested statistics, in the order asked for.

    Raises:
        TypeError: an entry is neither a name nor a Statistic.
        ValueError: a name is unknown or asked for twice.
    """
    if isinstance(statistics, str):
        statistics = (statistics,)
    names: list[str] = []
    for statistic in statistics:
        name = statistic.name if isinstance(statistic, Statistic) else statistic
        if not isinstance(name, str):
            raise TypeError(
                f"statistics: got an entry of type {type(statistic).__name__}, expected names or Statistics"
            )
        if name not in STATISTICS:
            raise ValueError(f"statistics: got {name!r}, expected some of {', '.join(STATISTICS)}")
        if name in names:
            raise ValueError(f"statistics: {name!r} is asked for twice, expected each name once")
        names.append(name)
    return tuple(names)
