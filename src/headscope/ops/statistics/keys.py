"""The attention that each key receives."""

from torch import Tensor

from headscope._shapes import Float, RowIndices, Scores, StatisticTensors
from headscope.ops.statistics.statistic import Statistic


class KeyMass(Statistic):
    """sum over queries of p, for each key: the attention that it receives. Queries.

    It needs every row's logsumexp first, so it comes from a second pass over the keys; on a CPU from the same pass,
    where there are at most 512 (fewer at dims above 256).
    """

    key = "key_mass"
    unit = "queries"
    description = "sum over queries of p"
    sums_over_queries = True

    def shape(self, batch: int, heads: int, queries: int, keys: int) -> tuple[int, ...]:
        return (batch, heads, keys)

    def formula(
        self, logits: Scores, probabilities: Scores, rows: RowIndices, tensors: StatisticTensors
    ) -> Float[Tensor, "batch heads keys"]:
        return probabilities.sum(-2)
