"""One call of the operator, as the torch operators and every backend see it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headscope._shapes import (
    FillTensor,
    Float,
    Mask,
    PerHead,
    PerKey,
    RowGradient,
    RowValue,
    StatisticGradient,
    StatisticTensor,
    StatisticValue,
)
from headscope.ops.statistics import Statistic, restore_statistics

# the tensors that gradients flow into, in the order in which a backward is asked for them
DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "gate", "fill", "temperature", "key_bias", "key_scale")


def autocasts(device: torch.device) -> bool:
    """True if torch.autocast is at work for the device; for meta tensors torch has none and would raise."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


class Call(NamedTuple):
    """The arguments of a torch operator, checked and complete, in the order of its schema.

    logits = (scale / temperature) * query . key + key_bias + attn_mask;  p = softmax(logits);
    output = gate * (p * key_scale) . value + (1 - gate) * fill.

    Attributes:
        is_causal, scale: as in torch's SDPA.
        gate, temperature, key_bias, key_scale: float32 (float64 for float64 inputs).
        statistics: specs of statistics.
        statistic_tensors: the tensors of all of them in turn.
        training: True if a backward will follow.
    """

    query: Float[Tensor, "batch heads queries dim"]
    key: Float[Tensor, "batch kv_heads keys dim"]
    value: Float[Tensor, "batch kv_heads keys dim_v"]
    attn_mask: Mask | None
    is_causal: bool
    scale: float
    gate: PerHead | None
    fill: FillTensor | None
    temperature: PerHead | None
    key_bias: PerKey | None
    key_scale: PerKey | None
    statistics: list[str]
    statistic_tensors: list[StatisticTensor]
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

    def empty_output(self) -> Float[Tensor, "batch heads queries dim_v"]:
        """An empty output in query's dtype and stride order, as torch's SDPA gives it.

        The order keeps `transpose(1, 2).reshape(...)` a view where the query came from the inverse of it.
        """
        query = self.query
        order = sorted(range(4), key=query.stride().__getitem__, reverse=True)
        shape = (*query.shape[:3], self.value.shape[3])
        if order == [0, 1, 2, 3]:
            return query.new_empty(shape)
        return torch.empty_permuted(shape, order, dtype=self.query.dtype, device=self.query.device)

    def empty_rows(self) -> RowValue:
        """An empty number for each row, in the statistics' dtype."""
        return self.query.new_empty(self.row_shape, dtype=self.statistic_dtype)

    def empty_saved(self) -> list[Tensor]:
        """What a forward saves for a backward that doesn't start from the inputs again, empty; nothing if none follows.

        Each row's largest logit and log2 of its sum; with a gate also the output before gate and fill.
        """
        if not self.training:
            return []
        saved = [self.empty_rows(), self.empty_rows()]
        return saved if self.gate is None else [*saved, self.empty_output()]

    def empty_statistics(self, statistics: Sequence[Statistic] | None = None) -> list[StatisticValue]:
        """Uninitialised results of the statistics, which may be given if they are at hand."""
        sizes, dtype = (*self.row_shape, self.key.shape[2]), self.statistic_dtype
        statistics = self.restored_statistics() if statistics is None else statistics
        return [self.query.new_empty(statistic.shape(*sizes), dtype=dtype) for statistic in statistics]


# a forward's: the output, the statistics, and tensors that the backend saves for its backward
Results = tuple[Float[Tensor, "batch heads queries dim_v"], list[StatisticValue], list[Tensor]]


class Cotangents(NamedTuple):
    """The arguments of a backward operator that come before the Call's, in the order of its schema.

    Attributes:
        output: the output's cotangent, or None for 0.
        statistics: for each statistic its cotangent in its shape, or None for 0.
        several: the size of a dimension in front of all cotangents, and so of all gradients; None: there is none.
        attention, values, saved: the forward's results: the output before gate and fill, the statistics, and whatever
            else the backend returned for its backward. Empty where the backend starts from the inputs again.
        needed: for each of DIFFERENTIABLE True if its gradient is wanted; no absent tensor's is.
    """

    output: Float[Tensor, "*several batch heads queries dim_v"] | None
    statistics: list[StatisticGradient | None]
    several: int | None
    attention: Float[Tensor, "batch heads queries dim_v"] | None
    values: list[StatisticValue]
    saved: list[Tensor]
    needed: list[bool]

    def wanted(self) -> list[str]:
        """The names of DIFFERENTIABLE whose gradients are wanted."""
        return [name for name, need in zip(DIFFERENTIABLE, self.needed, strict=True) if need]

    def apart(self) -> list["Cotangents"]:
        """Each of several by itself."""
        return [
            self._replace(
                output=None if self.output is None else self.output[index],
                statistics=[None if grad is None else grad[index] for grad in self.statistics],
                several=None,
            )
            for index in range(self.several or 0)
        ]

    def of_differentiable(
        self, statistics: Sequence[Statistic]
    ) -> list[tuple[Statistic, StatisticGradient, StatisticValue]]:
        """(statistic, contiguous cotangent, value) of the statistics that a gradient comes through."""
        entries = zip(statistics, self.statistics, self.values, strict=True)
        return [
            (statistic, grad.contiguous(), value)
            for statistic, grad, value in entries
            if grad is not None and statistic.differentiable
        ]


def row_constants(
    entries: Sequence[tuple[Statistic, StatisticGradient, StatisticValue]],
) -> RowGradient | None:
    """The sum of the statistics' row constants, contiguous, None where there are none; of `of_differentiable`."""
    total: Tensor | None = None
    for statistic, grad, value in entries:
        constant = statistic.row_constant(grad, value)
        total = constant if total is None else total + constant
    return None if total is None else total.contiguous()
