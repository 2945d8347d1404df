"""RowStatistic, a statistic of one attention row as the kernels see it: a few jit functions and their accumulators.

The forward holds, for every query row, the exponents x = logit * log2(e) - offset of the keys of one tile, where
offset is the running maximum (in base 2), and the sum l of the weights w = 2^x. A statistic adds accumulators of its
own and two functions, and a third one if it can be differentiated:

    update(accumulators, rescale, shift, normaliser, weights, exponents, rows, columns, keys, tensors, CONSTANTS)
            -> accumulators
        One tile. `shift` (<= 0) is how far the offset moved, `rescale` = 2^shift, `normaliser` the l from before this
        tile, all [queries]; weights and exponents are [queries, keys], with weight 0 and a finite exponent where a key
        is masked. `rows` [queries] and `columns` [keys] are int32 indices of queries and keys; the last tile's columns
        may reach past `keys`, the number of keys, and have weight 0 there.
    finish(accumulators, normaliser, max_logit, max_exponent, CONSTANTS) -> [queries] or [queries, padded width]
        After the last tile. `max_logit` is the row's largest logit (natural units), `max_exponent` its x: about 0, not
        exactly, because the offset was rounded. A row without any valid key gets `empty` instead.
    gradient(grad, log_probability, rows, columns, keys, tensors, CONSTANTS) -> [queries, keys]
        grad * d statistic / d p_ij, up to a constant of the row (which cancels in the softmax). `grad` is [queries], or
        [queries, padded width] with 0 past the width; `log_probability` is the natural logarithm of p_ij, finite and
        very negative where p is 0.

`tensors` are pointers to the statistic's own data, advanced to this sample and head; CONSTANTS is a constexpr tuple.

To add a statistic, write such functions in a file of this folder and `register` a RowStatistic of them: no kernel names
any of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LN2 = tl.constexpr(0.6931471805599453)
Constants = tuple[int | float, ...]


@dataclass(frozen=True)
class RowStatistic:
    """One statistic of the rows.

    Attributes:
        finish, update, gradient: jit functions, see above; update is None without accumulators, gradient where the
            statistic isn't differentiable with respect to single probabilities.
        accumulators: one entry for each float32 accumulator: 0 for [queries], or a power of two of at least 16 for
            [queries, entry].
        empty: the value of a row without any valid key.
        width: 0 for a result [queries], else the last dimension of a result [queries, width].
        constants: handed to the functions.
    """

    finish: Any
    update: Any = None
    accumulators: tuple[int, ...] = ()
    empty: float = 0.0
    width: int = 0
    constants: Constants = ()
    gradient: Any = None

    def __hash__(self) -> int:
        # Triton's functions compare by identity, but each hash of one takes microseconds
        return hash((self.accumulators, self.width, self.constants))


# by name, from constants to functions
STATISTICS: dict[str, Callable[[Constants], RowStatistic]] = {}


def register(name: str, statistic: RowStatistic | Callable[[Constants], RowStatistic]) -> None:
    """Make a statistic known by the `key` of its class in headscope.ops.statistics.

    Args:
        statistic: its functions, or a function that makes them from its constants.

    Raises:
        ValueError: the name is taken.
    """
    if name in STATISTICS:
        raise ValueError(f"name: {name!r} is registered already, expected another one")
    STATISTICS[name] = (lambda constants: statistic) if isinstance(statistic, RowStatistic) else statistic


class BoundStatistic(NamedTuple):
    """A statistic with its data: int32 or float32 tensors [batch or 1, heads or 1, length], last stride 1."""

    statistic: RowStatistic
    tensors: tuple[Tensor, ...] = ()


class StatisticSet(NamedTuple):
    """The forward's arguments: tuples with an entry for each statistic, and a key that changes with any function."""

    accumulators: tuple[tuple[int, ...], ...]
    updates: tuple[Any, ...]
    finishes: tuple[Any, ...]
    empties: tuple[float, ...]
    widths: tuple[int, ...]
    cache_key: str


@triton.jit
def keep(
    accumulators, rescale, shift, normaliser, weights, exponents, rows, columns, keys, tensors, CONSTANTS: tl.constexpr
):
    """Nothing to accumulate: the normaliser and the maximum say it all."""
    return accumulators


def functions_key(functions: tuple[Any, ...]) -> str:
    """Changes when any of these jit functions does.

    Triton's binary cache sees a tuple of functions by their names only, so whoever passes one to a kernel passes this
    along. The interpreter's functions have no key.
    """
    return "-".join(getattr(function, "cache_key", "") for function in functions)


@lru_cache
def statistic_set(statistics: tuple[RowStatistic, ...]) -> StatisticSet:
    """The forward's arguments for these statistics, in this order.

    Raises:
        ValueError: one accumulates without an update, or its accumulators have a shape that the kernel has no tile for.
    """
    for statistic in statistics:
        if bool(statistic.accumulators) != (statistic.update is not None):
            raise ValueError(f"a statistic has accumulators if and only if it has an update, got {statistic}")
        if any(width and (width < 16 or width & (width - 1)) for width in statistic.accumulators):
            raise ValueError(f"accumulators are 0 or a power of two from 16 on, got {statistic.accumulators}")
    updates = tuple(keep if statistic.update is None else statistic.update for statistic in statistics)
    finishes = tuple(statistic.finish for statistic in statistics)
    return StatisticSet(
        tuple(statistic.accumulators for statistic in statistics),
        updates,
        finishes,
        tuple(statistic.empty for statistic in statistics),
        tuple(statistic.width for statistic in statistics),
        functions_key(updates + finishes),
    )
