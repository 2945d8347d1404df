"""One call of the operator, as the torch operators and every backend see it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headscope.ops.statistics import Statistic, restore_statistics

# the tensors that gradients flow into, in the order in which a backward is asked for them
DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "gate", "fill", "temperature", "key_bias", "key_scale")


def autocasts(device: torch.device) -> bool:
    """Whether torch.autocast is at work for the device; for meta tensors torch has none and would raise."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


class Call(NamedTuple):
    """The arguments of a torch operator, checked and complete, in the order of its schema.

    logits = (scale / temperature) * query . key + key_bias + attn_mask;  p = softmax(logits);
    output = gate * (p * key_scale) . value + (1 - gate) * fill.

    Attributes:
        query: [batch, heads, queries, dim].
        key, value: [batch, kv_heads, keys, dim] and [batch, kv_heads, keys, dim_v].
        attn_mask: four dimensions, each 1 or that of [batch, heads, queries, keys]; bool or added to the logits.
        is_causal, scale: as in torch's SDPA.
        gate, temperature: [batch or 1, heads], float32 (float64 for float64 inputs), as are the next two.
        fill: four dimensions, each 1 or that of [batch, heads, queries, dim_v].
        key_bias, key_scale: [batch or 1, heads or 1, keys].
        statistics: specs of statistics.
        statistic_tensors: the tensors of all of them in turn, each [batch or 1, heads or 1, length].
        training: whether a backward will follow.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    gate: Tensor | None
    fill: Tensor | None
    temperature: Tensor | None
    key_bias: Tensor | None
    key_scale: Tensor | None
    statistics: list[str]
    statistic_tensors: list[Tensor]
    training: bool

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """[batch, heads, queries]."""
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries

    @property
    def statistic_dtype(self) -> torch.dtype:
        """Statistics are float32, and float64 for float64 inputs."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def restored_statistics(self) -> list[Statistic]:
        """The statistics, on their tensors."""
        return restore_statistics(self.statistics, self.statistic_tensors)

    def empty_output(self) -> Tensor:
        """An empty [batch, heads, queries, dim_v] in query's dtype and stride order, as torch's SDPA gives it.

        The order keeps `transpose(1, 2).reshape(...)` a view where the query came from the inverse of it.
        """
        query = self.query
        order = sorted(range(4), key=query.stride().__getitem__, reverse=True)
        shape = (*query.shape[:3], self.value.shape[3])
        if order == [0, 1, 2, 3]:
            return query.new_empty(shape)
        return torch.empty_permuted(shape, order, dtype=self.query.dtype, device=self.query.device)

    def empty_rows(self) -> Tensor:
        """An empty [batch, heads, queries] in the statistics' dtype."""
        return self.query.new_empty(self.row_shape, dtype=self.statistic_dtype)

    def empty_statistics(self, statistics: Sequence[Statistic] | None = None) -> list[Tensor]:
        """Uninitialised results of the statistics, which may be given if they are at hand."""
        sizes, dtype = (*self.row_shape, self.key.shape[2]), self.statistic_dtype
        statistics = self.restored_statistics() if statistics is None else statistics
        return [self.query.new_empty(statistic.shape(*sizes), dtype=dtype) for statistic in statistics]


class Cotangents(NamedTuple):
    """What a backward starts from, in the order of its schema; the Call follows.

    Attributes:
        output: the output's cotangent [batch, heads, queries, dim_v], or None.
        statistics: for each statistic its cotangent in its shape, or None.
        attention, values, saved: what the forward gave: the output before gate and fill, the statistics, and whatever
            else the backend returned for its backward. Empty where the backend starts from the inputs again.
        needed: for each of DIFFERENTIABLE whether its gradient is wanted; no absent tensor is.
    """

    output: Tensor | None
    statistics: list[Tensor | None]
    attention: Tensor | None
    values: list[Tensor]
    saved: list[Tensor]
    needed: list[bool]
