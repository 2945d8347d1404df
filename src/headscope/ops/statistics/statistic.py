"""Statistic, the class of all statistics. A new one is one class in one file; no backend names any of them.

A statistic states its torch formula, which the plain-torch backends evaluate (and differentiate), and, if it is to run
inside the fused GPU pass, its Triton functions. Defining the class registers it under its key.
"""

import re
from ast import literal_eval
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope._shapes import (
    Bool,
    Float,
    RowGradient,
    RowIndices,
    Scores,
    StatisticGradient,
    StatisticTensor,
    StatisticTensors,
    StatisticValue,
)

# every statistic there is, by key
CLASSES: dict[str, type["Statistic"]] = {}
# those that take no arguments, and so can be asked for by name
STATISTICS: dict[str, "Statistic"] = {}


class Statistic:
    """A number (or a vector) for each attention row, or a number for each key.

    Attributes:
        key: its name among all statistics.
        unit: its unit, for tables and axes.
        description: its definition in a line.
        differentiable: True if gradients flow through it; the others are marked non-differentiable.
        constant_gradient: True if `row_constant` is all of its gradient: the Triton backward needs no function of it.
        sums_over_queries: True if the result is the sum of the formula's results over pieces of the queries (so its
            shape has no queries in it), and comes from a second pass, as a rule.
        tensor_count: how many tensors it works with.
        constants: ints and floats that the formula depends on; part of what is compiled.
        tensors: its data, int32 or float32, each [batch or 1, heads or 1, length].
        name: the key it has in `result.statistics`; its own `key` unless told otherwise.
        spec: key and constants as a string, by which the torch operator knows it.

    Raises:
        ValueError: a subclass takes the key of a built-in statistic, or lacks one.
    """

    key: ClassVar[str]
    unit: ClassVar[str] = ""
    description: ClassVar[str] = ""
    differentiable: ClassVar[bool] = False
    constant_gradient: ClassVar[bool] = False
    sums_over_queries: ClassVar[bool] = False
    tensor_count: ClassVar[int] = 0

    def __init__(
        self,
        constants: tuple[int | float, ...] = (),
        tensors: StatisticTensors = (),
        name: str | None = None,
    ) -> None:
        self.constants = constants
        self.tensors = tensors
        self.name = name or self.key
        self.spec = f"{self.key}{constants}" if constants else self.key

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        key = cls.__dict__.get("key")
        if key is None:
            # a base of others
            return
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise ValueError(f"{cls.__name__}.key: got {key!r}, expected a name of letters, digits and underscores")
        known = CLASSES.get(key)
        if known is not None and _is_built_in(known) and not _is_built_in(cls):
            raise ValueError(f"{cls.__name__}.key: {key!r} is a built-in statistic, expected another key")
        # a notebook cell that is run again replaces its own class
        CLASSES[key] = cls
        if cls.__init__ is Statistic.__init__:
            STATISTICS[key] = cls()

    def shape(self, batch: int, heads: int, queries: int, keys: int) -> tuple[int, ...]:
        """The result's shape: [batch, heads, queries] unless overridden."""
        return (batch, heads, queries)

    def formula(
        self, logits: Scores, probabilities: Scores, rows: RowIndices, tensors: StatisticTensors
    ) -> StatisticValue:
        """The statistic in plain torch.

        Args:
            logits, probabilities: a row without any valid key has logits of -inf and probabilities of 0.
            rows: the indices of these queries in the whole call: formulas see a piece of them at a time.
            tensors: this statistic's tensors, cut to the same samples.

        Returns:
            The result for these queries.
        """
        raise NotImplementedError(f"{type(self).__name__} has no formula")

    def kernel(self) -> Any:
        """Its Triton functions, a `headscope_kernels.attention.RowStatistic`; None: the GPU pass can't compute it."""
        return None

    def kernel_pieces(self) -> list[tuple[Any, slice]]:
        """Its Triton functions in as many pieces as passes are needed, and which columns of the result each gives."""
        return [(self.kernel(), slice(None))]

    def row_constant(self, grad: StatisticGradient, value: StatisticValue) -> RowGradient:
        """sum_j p_j * gradient_j of each row, for the fused backwards of a differentiable statistic.

        Args:
            grad, value: the cotangent and the value of the statistic, in its shape; of a built-in statistic the
                cotangent may have a dimension for several of them in front.

        `gradient_j` is the result of the Triton function `gradient` for key j.
        """
        raise NotImplementedError(f"{type(self).__name__} has no row_constant")

    def check(
        self, query: Float[Tensor, "batch heads queries dim"], key: Float[Tensor, "batch kv_heads keys dim"]
    ) -> None:
        """Raise ValueError if it doesn't fit a call on query and key."""
        for tensor in self.tensors:
            expected = (query.shape[0], query.shape[1])
            if tensor.device != query.device:
                raise ValueError(f"statistics: {self.name!r} has a tensor on {tensor.device}, expected {query.device}")
            if any(size not in (1, whole) for size, whole in zip(tensor.shape[:2], expected, strict=True)):
                raise ValueError(
                    f"statistics: {self.name!r} has a tensor of shape {list(tensor.shape)}, expected"
                    f" [{expected[0]} or 1, {expected[1]} or 1, length]"
                )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec})"


def restore(spec: str, tensors: Sequence[StatisticTensor]) -> Statistic:
    """The statistic that `spec` names, on these tensors; the inverse of `statistic.spec`."""
    if spec in STATISTICS:
        return STATISTICS[spec]
    key, _, constants = spec.partition("(")
    statistic = object.__new__(CLASSES[key])
    Statistic.__init__(statistic, literal_eval(f"({constants}") if constants else (), tuple(tensors))
    return statistic


class BuiltIn(Statistic):
    """A statistic whose Triton functions, if it has any, are registered in headscope_kernels under its key."""

    def kernel(self) -> Any:
        from headscope_kernels.attention import STATISTICS as kernels

        return kernels[self.key](self.constants) if self.key in kernels else None


def _is_built_in(cls: type) -> bool:
    return cls.__module__.startswith("headscope.")


def dead_rows(logits: Scores) -> Bool[Tensor, "batch heads queries"]:
    """True where no key is valid."""
    return (logits == -torch.inf).all(-1)
