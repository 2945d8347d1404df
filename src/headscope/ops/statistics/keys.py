"""What each key receives."""

from torch import Tensor

from headscope.ops.statistics.statistic import Statistic


class KeyMass(Statistic):
    """sum over queries of p, [batch, heads, keys]: the attention that a key receives. Queries.

    It needs every row's logsumexp first, so it comes from a second pass over the keys.
    """

    key = "key_mass"
    unit = "queries"
    description = "sum over queries of p"
    sums_over_queries = True

    def shape(self, batch: int, heads: int, queries: int, keys: int) -> tuple[int, ...]:
        return (batch, heads, keys)

    def formula(self, logits: Tensor, probabilities: Tensor, rows: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        return probabilities.sum(-2)
