"""The sets of heads whose removal on the confirm split says how good a circuit is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import polars as pl

from headscope.counter import counter_permutation
from headscope.study.circuits.trace import (
    ATTRIBUTION,
    GREEDY,
    LARGER,
    Head,
    circuit_of,
    every_head,
    fill_of,
    has_circuit,
    replacements_of,
    states_of,
)
from headscope.study.edits import head_name
from headscope.sweep import HeadSet

EVERY = "every head"
# of curves, where there are as many heads
SIZES = (1, 2, 4, 8, 16, 32)
# sets of the greedy search beside the circuit that are measured, at most so many smaller and so many larger ones
BESIDE = 3
# random halves of a circuit of more than 3 heads (of fewer they are single heads), for its completeness
HALVES = 4
# heads of the circuit that are removed in pairs: the first of these by attribution
PAIRED = 5


@dataclass(frozen=True)
class PlannedSet:
    """A set of heads that is removed on confirm.

    Attributes:
        name: the set's.
        kind: "empty" (all removed), "circuit" (all others removed), "complement" (the circuit removed), "curve" (all
            but a method's set of a size), "without" (all but the circuit, and a part of the circuit, removed), "part"
            (that part alone removed), "pair".
        removed: the heads that are removed.
        size: how many are kept; of "part" and "pair" how many are removed.
        method: of "curve".
        part: the heads that a "without", "part" or "pair" is about.
    """

    name: str
    kind: str
    removed: tuple[Head, ...]
    size: int
    method: str = ""
    part: tuple[Head, ...] = ()


def confirm_sets(
    trace: pl.DataFrame,
    group: str,
    *,
    sizes: Sequence[int] = SIZES,
    beside: int = BESIDE,
    halves: int = HALVES,
    paired: int = PAIRED,
) -> list[HeadSet]:
    """The sets to remove on the confirm split of the group that a circuit was found for; empty where there is none, or
    it is every head.

    Args:
        trace: the table "circuits" of the search on discover.
        sizes: of the curves.
        beside: how many smaller and larger sets of the greedy search are measured at most.
        halves: random halves of the circuit.
        paired: how many of the circuit's heads are removed in pairs.
    """
    planned = planned_sets(trace, group, sizes=sizes, beside=beside, halves=halves, paired=paired)
    return [HeadSet(one.name, heads=one.removed) for one in planned]


def planned_sets(
    trace: pl.DataFrame,
    group: str,
    *,
    sizes: Sequence[int] = SIZES,
    beside: int = BESIDE,
    halves: int = HALVES,
    paired: int = PAIRED,
) -> list[PlannedSet]:
    """`confirm_sets` with what each set is for."""
    fill = fill_of(trace, group)
    if not has_circuit(trace, group, fill):
        return []
    every, circuit = every_head(trace, group, fill), circuit_of(trace, group, fill)
    if len(circuit) == len(every):
        return []

    def but(kept: Iterable[Head]) -> tuple[Head, ...]:
        inside = set(kept)
        return tuple(head for head in every if head not in inside)

    name = f"the circuit of {group}"
    found = [
        PlannedSet(EVERY, "empty", tuple(every), 0),
        PlannedSet(f"all but {name}", "circuit", but(circuit), len(circuit)),
        PlannedSet(name, "complement", tuple(circuit), len(every) - len(circuit)),
    ]
    for method, kept in _curves(trace, group, fill, sizes, beside):
        found.append(PlannedSet(f"all but {method} {len(kept)} of {group}", "curve", but(kept), len(kept), method))
    parts = {head_name(*head): (head,) for head in circuit}
    for number in range(1, halves + 1 if len(circuit) > 3 else 1):
        order = counter_permutation("half of a circuit", group, number, count=len(circuit))
        chosen = sorted(int(place) for place in order[: len(circuit) // 2])
        parts[f"half {number}"] = tuple(circuit[place] for place in chosen)
    for label, part in parts.items():
        kept = [head for head in circuit if head not in part]
        found.append(PlannedSet(f"all but {name} without {label}", "without", but(kept), len(kept), part=part))
        found.append(PlannedSet(f"{label} of {name}", "part", part, len(part), part=part))
    for one, other in _pairs(trace, group, fill, circuit, paired):
        for head in (one, other):
            if head not in circuit:
                alone = PlannedSet(f"{head_name(*head)} beside {name}", "part", (head,), 1, part=(head,))
                found += [] if alone in found else [alone]
        label = f"{head_name(*one)} and {head_name(*other)}"
        found.append(PlannedSet(f"{label} of {group}", "pair", (one, other), 2, part=(one, other)))
    return [one for one in found if one.removed]


def _curves(
    trace: pl.DataFrame, group: str, fill: str, sizes: Sequence[int], beside: int
) -> list[tuple[str, tuple[Head, ...]]]:
    """(method, heads kept) of every point of the curves, but for nothing and everything kept."""
    every = every_head(trace, group, fill)
    found = []
    known = states_of(trace, group, fill)
    grown = known.pop(LARGER, [])
    for method, states in known.items():
        place = next((place for place, state in enumerate(states) if state.chosen), None)
        if place is None:
            continue
        if method == GREEDY:
            # of each size the last: what growth went through, pruning goes through again; and rather what was grown
            # from the circuit
            larger = {len(state.heads): state for state in states[:place] if state.faithfulness is not None}
            larger |= {len(state.heads): state for state in grown}
            above = sorted(size for size in larger if size > len(states[place].heads))
            points = [*(larger[size] for size in above[:beside]), *states[place + 1 :][:beside]]
        else:
            points = [state for state in states if len(state.heads) in (*sizes, len(states[place].heads))]
        for heads in dict.fromkeys(state.heads for state in points):
            if 0 < len(heads) < len(every):
                found.append((method, heads))
    return found


def _pairs(trace: pl.DataFrame, group: str, fill: str, circuit: Sequence[Head], paired: int) -> list[tuple[Head, Head]]:
    """The pairs of heads to remove: of the circuit's first by attribution, and of those that stood in for another."""
    order: list[Head] = []
    for state in states_of(trace, group, fill)[ATTRIBUTION]:
        order += [head for head in state.heads if head not in order]
    first = [head for head in order if head in circuit][:paired]
    pairs = [*combinations(sorted(first, key=list(circuit).index), 2)]
    pairs += [(one.partner, one.head) for one in replacements_of(trace, group, fill)]
    return list(dict.fromkeys(pairs))
