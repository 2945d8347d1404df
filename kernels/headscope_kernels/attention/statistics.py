"""Statistics of one attention row that the forward pass computes while it runs: an open set.

The forward holds, for every query row, the exponents x = logit * log2(e) - offset of the keys of one tile, where
offset is the running maximum (in base 2), and the sum l of the weights w = 2^x. A statistic adds accumulators of its
own, one float32 per row each, and two functions:

    update(accumulators, rescale, shift, normaliser, weights, exponents) -> accumulators
        One tile. `shift` (<= 0) is how far the offset moved, `rescale` = 2^shift, `normaliser` the l from before this
        tile; weights and exponents are [queries, keys], with weight 0 and a finite exponent where a key is masked.
    finish(accumulators, normaliser, max_logit, max_exponent) -> [queries]
        After the last tile. `max_logit` is the row's largest logit (natural units), `max_exponent` its x: about 0, not
        exactly, because the offset was rounded. A row without any valid key gets `empty` instead.

To add one, write the two functions and an entry in STATISTICS: the kernel names none of them.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class RowStatistic:
    """One statistic of the rows.

    Attributes:
        accumulators: how many float32 per row it carries from tile to tile.
        update: jit function, see above; None where there is nothing to carry.
        finish: jit function, see above.
        empty: the value of a row without any valid key.
    """

    finish: Any
    update: Any = None
    accumulators: int = 0
    empty: float = 0.0


class StatisticSet(NamedTuple):
    """What the kernel takes: tuples that run in parallel, and a key that changes when any function does."""

    accumulators: tuple[int, ...]
    updates: tuple[Any, ...]
    finishes: tuple[Any, ...]
    empties: tuple[float, ...]
    cache_key: str


@triton.jit
def keep(accumulators, rescale, shift, normaliser, weights, exponents):
    """Nothing to accumulate: the normaliser and the maximum say it all."""
    return accumulators


@triton.jit
def entropy_update(accumulators, rescale, shift, normaliser, weights, exponents):
    """t = sum w x. Moving the offset by `shift` turns w into w * rescale and x into x + shift."""
    moved = rescale * (accumulators[0] + normaliser * shift)  # [queries]
    return (moved + tl.sum(weights * exponents, 1),)


@triton.jit
def entropy_finish(accumulators, normaliser, max_logit, max_exponent):
    """-sum p ln p = ln l - ln(2) t / l: no difference of large numbers, wherever the offset stands."""
    return LN2 * (tl.log2(normaliser) - accumulators[0] / normaliser)


@triton.jit
def logsumexp_finish(accumulators, normaliser, max_logit, max_exponent):
    # one logit of +inf makes the sum infinite; the general formula would subtract infinities
    infinite = normaliser == float("inf")
    return tl.where(infinite, normaliser, max_logit + LN2 * (tl.log2(normaliser) - max_exponent))


@triton.jit
def max_logit_finish(accumulators, normaliser, max_logit, max_exponent):
    # a hardware maximum drops NaN, the sum of the weights keeps it
    return tl.where(normaliser == normaliser, max_logit, normaliser)


@triton.jit
def max_prob_finish(accumulators, normaliser, max_logit, max_exponent):
    return tl.exp2(max_exponent) / normaliser


STATISTICS: dict[str, RowStatistic] = {
    "entropy": RowStatistic(entropy_finish, update=entropy_update, accumulators=1),
    "logsumexp": RowStatistic(logsumexp_finish, empty=float("-inf")),
    "max_logit": RowStatistic(max_logit_finish, empty=float("-inf")),
    "max_prob": RowStatistic(max_prob_finish),
}


@lru_cache
def statistic_set(names: tuple[str, ...]) -> StatisticSet:
    """The kernel's arguments for these statistics, in this order.

    Raises:
        ValueError: a name is unknown or comes twice.
    """
    unknown = [name for name in names if name not in STATISTICS]
    if unknown:
        raise ValueError(f"statistics {unknown} have no kernel; there are {sorted(STATISTICS)}")
    if len(set(names)) != len(names):
        raise ValueError(f"statistics must differ from each other, got {names}")
    chosen = [STATISTICS[name] for name in names]
    updates = tuple(keep if statistic.update is None else statistic.update for statistic in chosen)
    finishes = tuple(statistic.finish for statistic in chosen)
    # Triton's binary cache sees such a tuple by the functions' names only. The interpreter's functions have no key.
    cache_key = "-".join(getattr(function, "cache_key", "") for function in updates + finishes)
    return StatisticSet(
        tuple(statistic.accumulators for statistic in chosen),
        updates,
        finishes,
        tuple(statistic.empty for statistic in chosen),
        cache_key,
    )
