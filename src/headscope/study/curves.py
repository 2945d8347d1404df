"""More and more heads removed, in some order, and heads turned down step by step.

A *curve* of a group: the heads in order of their degradation on the discover split, removed together, 1, 2, 4, ... of
them: those that matter most first, least first, or in random orders. *Doses*: one set whose gate goes from 1 (as it is)
to 0 (removed), and beyond 1.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from headscope.counter import counter_permutation

MOST, LEAST, RANDOM = "most important first", "least important first", "random order"
CURVE = (
    "Degradation with the first 1, 2, 4, ... heads of an order removed together. Most and least important first: by the"
    " degradation that each head's removal alone costs the group on the discover split; measured on the confirm split."
    " Random: the mean over {orders} random orders, and the smallest and largest of them as a band."
    " What the mean fill's number of reference images adds is neither subtracted here nor in the interval."
)
DOSE = (
    "Degradation with the gate of a set's heads at other values than 1: output = gate x attention + (1 - gate) x fill."
    " 0 is removal; where the loss falls below the clean one, the model would do better with less (or more) of them."
    " What the mean fill's number of reference images adds is neither subtracted here nor in the interval."
)
_NAME = re.compile(r"(?:(most|least) (\d+)|random (\d+): (\d+))")
_GATE = re.compile(r"(.+) at gate (\d+(?:\.\d+)?)")


class Step(NamedTuple):
    """A point of a curve."""

    order: str
    number: int
    count: int


def curve_sets(
    ranked: Sequence[tuple[str, int]], counts: Sequence[int], orders: int, seed: int = 0
) -> dict[str, tuple[tuple[str, int], ...]]:
    """The sets of heads of a group's curves, by name: see `step_of`.

    ranked: all heads, the most important first. counts: how many are removed, those below the number of all. orders:
    how many random ones.
    """
    found: dict[str, tuple[tuple[str, int], ...]] = {}
    ranked = list(ranked)
    shuffled = [
        [ranked[place] for place in counter_permutation("curve", number, seed, count=len(ranked))]
        for number in range(orders)
    ]
    for count in (count for count in counts if count < len(ranked)):
        found[f"most {count}"] = tuple(ranked[:count])
        found[f"least {count}"] = tuple(ranked[::-1][:count])
        for number, order in enumerate(shuffled):
            found[f"random {number + 1}: {count}"] = tuple(order[:count])
    return found


def step_of(name: str) -> Step | None:
    """The point of a curve that a set's name stands for; None for other names."""
    found = _NAME.fullmatch(name)
    if not found:
        return None
    which, count, number, random_count = found.groups()
    if which:
        return Step(MOST if which == "most" else LEAST, 0, int(count))
    return Step(RANDOM, int(number), int(random_count))


def dose_name(name: str, gate: float) -> str:
    """What a set is called whose gate is neither 0 nor 1."""
    return f"{name} at gate {gate:g}"


def dose_of(name: str) -> tuple[str, float] | None:
    """The set and the gate that a name stands for; None for other names."""
    found = _GATE.fullmatch(name)
    return (found[1], float(found[2])) if found else None


def curve_losses(losses: pl.DataFrame) -> pl.DataFrame:
    """The rows of curves, with columns order, number and count; of the random orders also their mean (number 0).

    losses: see `edits.losses`.
    """
    steps = {name: step for name in losses["edit"].unique() if (step := step_of(name))}
    names = pl.DataFrame(
        [(name, *step) for name, step in steps.items()],
        schema={"edit": pl.String, "order": pl.String, "number": pl.Int64, "count": pl.Int64},
        orient="row",
    )
    rows = losses.join(names, on="edit", how="inner", maintain_order="left")
    image = ["group", "split", "source_id", "item", "replicate", "timestep", "fill"]
    random = rows.filter(pl.col("order") == RANDOM)
    orders = pl.col("number").n_unique().over("group", "count")
    mean = (
        random.with_columns(orders=orders)
        .group_by(*image, "order", "count", maintain_order=True)
        .agg(
            pl.col("clean").first(),
            pl.col("edited").fill_null(float("nan")).mean(),
            pl.col("orders").first(),
            rows=pl.len(),
        )
    )
    # what isn't there in one order isn't there in the mean, which voids it
    mean = mean.with_columns(edited=pl.when(pl.col("rows") == pl.col("orders")).then("edited"))
    mean = mean.with_columns(number=pl.lit(0, pl.Int64), edit=pl.format("random: {}", "count"), kind=pl.lit("set"))
    return pl.concat([rows, mean.select(rows.columns)])
