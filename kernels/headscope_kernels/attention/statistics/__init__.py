"""Statistics of one attention row that the forward pass computes while it runs: an open set, one file for each kind."""

from collections.abc import Callable

from headscope_kernels.attention.statistics.collision_entropy import COLLISION_ENTROPY
from headscope_kernels.attention.statistics.contract import BoundStatistic, RowStatistic, functions_key, statistic_set
from headscope_kernels.attention.statistics.distance import distance
from headscope_kernels.attention.statistics.entropy import ENTROPY
from headscope_kernels.attention.statistics.extremes import LOGSUMEXP, MAX_LOGIT, MAX_PROB
from headscope_kernels.attention.statistics.groups import group_entropy, group_mass

__all__ = ["STATISTICS", "BoundStatistic", "RowStatistic", "functions_key", "statistic_set"]


def _without_constants(statistic: RowStatistic) -> Callable[[tuple[int | float, ...]], RowStatistic]:
    return lambda constants: statistic


# from a statistic's constants to its functions
STATISTICS: dict[str, Callable[[tuple[int | float, ...]], RowStatistic]] = {
    "entropy": _without_constants(ENTROPY),
    "logsumexp": _without_constants(LOGSUMEXP),
    "max_logit": _without_constants(MAX_LOGIT),
    "max_prob": _without_constants(MAX_PROB),
    "collision_entropy": _without_constants(COLLISION_ENTROPY),
    "distance": distance,
    "group_mass": group_mass,
    "group_entropy": group_entropy,
}
