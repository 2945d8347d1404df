"""The attention of groups of keys: text tokens, image regions, frames."""

from typing import Any

import torch
from torch import Tensor

from headscope._shapes import Float, GroupValue, Int32, Integer, RowGradient, RowIndices, Scores, StatisticTensors
from headscope.ops.regions import Regions
from headscope.ops.statistics.statistic import Statistic

# group statistics of one fused pass: wider accumulators would not fit a program's registers
MOST_GROUPS = 128
_INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


class GroupStatistic(Statistic):
    """A statistic of groups of keys: a number for each row and group.

    Attributes:
        regions: of the picture, which a Scope brings to the keys of each attention call (`of_keys`); None where the
            groups of keys are given.
    """

    tensor_count = 1
    regions: Regions | None = None

    def __init__(
        self,
        groups: Integer[Tensor, " keys"] | Integer[Tensor, "#batch keys"] | Regions,
        count: int | None = None,
        *,
        name: str | None = None,
    ) -> None:
        if isinstance(groups, Regions):
            if count is not None:
                raise ValueError(f"count: got {count!r} with regions, expected none: there are {len(groups)}")
            super().__init__((len(groups),), (), name)
            self.regions = groups
            return
        if not isinstance(groups, Tensor) or groups.dtype not in _INTEGERS:
            kind = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
            raise TypeError(f"groups: got {kind}, expected an integer tensor of one group id per key")
        if groups.layout is not torch.strided or groups.is_nested:
            kind = "nested" if groups.is_nested else groups.layout
            raise TypeError(f"groups: got a {kind} tensor, expected a dense one")
        if groups.ndim not in (1, 2):
            raise ValueError(f"groups: got shape {list(groups.shape)}, expected [keys] or [batch or 1, keys]")
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"count: got {count!r}, expected the number of groups, at least 1")
        # torch compares few of the unsigned ones; what a uint64 has beyond int64 becomes negative, which is in no group
        # either
        groups = groups.to(torch.int64)
        # before the cast, which would wrap
        groups = torch.where((groups < 0) | (groups >= count), -1, groups)
        by_sample = groups if groups.ndim == 2 else groups[None]
        super().__init__((count,), (by_sample[:, None].to(torch.int32).contiguous(),), name)

    def shape(self, batch: int, heads: int, queries: int, keys: int) -> tuple[int, ...]:
        return (batch, heads, queries, int(self.constants[0]))

    def check(
        self, query: Float[Tensor, "batch heads queries dim"], key: Float[Tensor, "batch kv_heads keys dim"]
    ) -> None:
        if self.regions is not None:
            raise ValueError(
                f"statistics: {self.name!r} has regions of the picture, which scope.record brings to a site's tokens;"
                " expected the group of each key here"
            )
        super().check(query, key)
        if self.tensors[0].shape[2] != key.shape[2]:
            raise ValueError(
                f"statistics: {self.name!r} has groups for {self.tensors[0].shape[2]} keys, expected {key.shape[2]}"
            )

    def of_keys(self, groups: Int32[Tensor, "#batch keys"]) -> "GroupStatistic":
        """This statistic of regions, of keys whose regions are known."""
        return type(self)(groups, int(self.constants[0]), name=self.name)

    def members(
        self, groups: Int32[Tensor, "#batch #heads keys"], dtype: torch.dtype
    ) -> Float[Tensor, "#batch #heads keys groups"]:
        """1 where a key belongs to a group, else 0."""
        ids = torch.arange(int(self.constants[0]), device=groups.device, dtype=groups.dtype)
        return (groups[..., None] == ids).to(dtype)

    def kernel(self) -> Any:
        return self.kernel_pieces()[0][0]

    def kernel_pieces(self) -> list[tuple[Any, slice]]:
        from headscope_kernels.attention import STATISTICS

        count = int(self.constants[0])
        if count <= MOST_GROUPS:
            return [(STATISTICS[self.key]((count,)), slice(None))]
        return [
            (STATISTICS[self.key]((count, first)), slice(first, min(first + MOST_GROUPS, count)))
            for first in range(0, count, MOST_GROUPS)
        ]


class GroupMass(GroupStatistic):
    """sum of p over the keys of each group.

    Args:
        groups: integers, the group of each key, 0 to count - 1; -1: in none. One row of them, or one for each sample.
            In a Scope's recording also `Regions` of the picture, which are brought to the keys of each site; attention
            calls without image keys, such as those to a text, don't have the statistic.
        count: the number of groups; of regions None.
        name: its key in `result.statistics`.

    Raises:
        TypeError, ValueError: groups or count of another kind or shape; at the call, another number of keys.
    """

    key = "group_mass"
    unit = "probability"
    description = "sum of p over the keys of each group"
    differentiable = True

    def formula(self, logits: Scores, probabilities: Scores, rows: RowIndices, tensors: StatisticTensors) -> GroupValue:
        return probabilities @ self.members(tensors[0], probabilities.dtype)

    def row_constant(
        self, grad: Float[Tensor, "*several batch heads queries groups"], value: GroupValue
    ) -> RowGradient:
        # gradient_j is the cotangent of j's group
        return (grad * value).sum(-1)


class GroupEntropy(GroupStatistic):
    """The entropy of p renormalised within each group. Nats.

    0 for a group without mass. In float32 a weight below 2^-126 of the row's largest counts as nothing: a group is
    right as long as its own largest weight is at least 2^-96 of the row's; a fainter one loses its faintest keys and,
    on a GPU, digits of the others, and below 2^-126 it has an entropy of 0.

    Args, raises: as GroupMass.
    """

    key = "group_entropy"
    unit = "nats"
    description = "entropy of p renormalised within each group"

    def formula(self, logits: Scores, probabilities: Scores, rows: RowIndices, tensors: StatisticTensors) -> GroupValue:
        if not logits.shape[-1]:
            return logits.new_zeros((*logits.shape[:-1], int(self.constants[0])))
        # weights relative to the row's largest, and their logarithms: small probabilities have few digits
        largest = logits.detach().amax(-1, keepdim=True)
        exponents = logits.detach() - torch.where(largest == -torch.inf, 0, largest)
        # one NaN or infinity makes all of its row NaN; 0 * -inf would, too
        exponents = exponents.masked_fill_(probabilities.isnan(), torch.nan).clamp_(min=-1e4)
        weights = exponents.exp()
        weights.masked_fill_(weights < torch.finfo(weights.dtype).tiny, 0)
        members = self.members(tensors[0], weights.dtype)
        mass, moment = weights @ members, exponents.mul_(weights) @ members
        empty = mass == 0
        safe = torch.where(empty, 1, mass)
        # of a single key it is 0 but for rounding
        return torch.where(empty, 0, safe.log() - moment / safe).clamp(min=0)
