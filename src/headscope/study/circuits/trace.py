"""What a search for circuits did, from the table "circuits" of a run: its sets of heads, and the one that it chose."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from headscope.study.ablation import headline_fill
from headscope.study.inference import plain_text

GREEDY, LARGER, ATTRIBUTION = "greedy", "greedy, larger", "attribution"
Head = tuple[str, int]


class State(NamedTuple):
    """The set of heads after a step of the search that was taken.

    Attributes:
        heads: in the order of execution.
        faithfulness: on the discover items, by the search's metric; None where it wasn't measured.
        chosen: it is its method's circuit.
    """

    heads: tuple[Head, ...]
    faithfulness: float | None
    chosen: bool


class Replacement(NamedTuple):
    """A head outside of the circuit that could stand in for one inside, by what was found on discover."""

    head: Head
    partner: Head


def circuit_of(trace: pl.DataFrame, group: str, fill: str | None = None, method: str = GREEDY) -> list[Head]:
    """The circuit that a method chose for a group, in the order of execution.

    Args:
        trace: the table "circuits".
        fill: the headline fill unless named.
        method: "greedy" for the circuit proper; others are the smallest prefixes of their orders.

    Raises:
        ValueError: no such group, fill or method, or there is no circuit: removing all heads doesn't clearly cost
            anything.
    """
    chosen = [state for state in states_of(trace, group, fill).get(method, []) if state.chosen]
    if not chosen:
        known = ", ".join(states_of(trace, group, fill))
        raise ValueError(
            f"method: got {method!r}, expected one that found a circuit of {group!r} (searched by {known}); where"
            " removing all heads doesn't clearly cost anything, there is none"
        )
    return list(chosen[-1].heads)


def has_circuit(trace: pl.DataFrame, group: str, fill: str | None = None) -> bool:
    """False where removing all heads didn't clearly cost anything on discover."""
    return any(state.chosen for state in states_of(trace, group, fill)[GREEDY])


def states_of(trace: pl.DataFrame, group: str, fill: str | None = None) -> dict[str, list[State]]:
    """By method, the sets that its steps went through, in their order; see `circuit_of` for what is raised."""
    rows = _rows(trace, group, fill)
    depths = {(site, head): (depth, head) for site, head, depth in _heads(rows)}
    found: dict[str, list[State]] = {}
    for (method,), part in rows.group_by("method", maintain_order=True):
        heads: set[Head] = set()
        states = []
        for row in part.iter_rows(named=True):
            if not row["kept"] or row["action"] == "replace":
                continue
            if row["site"] is not None:
                moved = {(row["site"], int(row["head"]))}
                heads = heads - moved if row["action"] == "prune" else heads | moved
            ordered = tuple(sorted(heads, key=depths.__getitem__))
            states.append(State(ordered, row["faithfulness"], row["chosen"]))
        found[str(method)] = states
    return found


def replacements_of(trace: pl.DataFrame, group: str, fill: str | None = None) -> list[Replacement]:
    """Heads outside of the circuit that stood in for one inside on discover."""
    rows = _rows(trace, group, fill).filter((pl.col("action") == "replace") & pl.col("kept"))
    columns = ("site", "head", "partner_site", "partner_head")
    return [Replacement((a, int(b)), (c, int(d))) for a, b, c, d in rows.select(columns).iter_rows()]


def every_head(trace: pl.DataFrame, group: str, fill: str | None = None) -> list[Head]:
    """All heads that were searched, in the order of execution; none where there is no circuit."""
    rows = _heads(_rows(trace, group, fill))
    return [(site, head) for site, head, _ in sorted(rows, key=lambda row: (row[2], row[1]))]


def depth_of(trace: pl.DataFrame, group: str, fill: str | None = None) -> dict[Head, int]:
    """The place of each head's site in the order of execution."""
    return {(site, head): depth for site, head, depth in _heads(_rows(trace, group, fill))}


def fill_of(trace: pl.DataFrame, group: str) -> str:
    """The headline fill of a group's searches."""
    return headline_fill(plain_text(trace).filter(pl.col("group") == group))


def _rows(trace: pl.DataFrame, group: str, fill: str | None) -> pl.DataFrame:
    rows = plain_text(trace)
    mine = rows.filter(pl.col("group") == group)
    if not len(mine):
        groups = ", ".join(sorted(rows["group"].unique()))
        raise ValueError(f"group: got {group!r}, expected one that was searched: {groups}")
    wanted = headline_fill(mine) if fill is None else fill
    mine = mine.filter(pl.col("fill") == wanted)
    if not len(mine):
        raise ValueError(f"fill: got {fill!r}, expected one that {group!r} was searched with")
    return mine


def _heads(rows: pl.DataFrame) -> list[tuple[str, int, int]]:
    """(site, head, depth) of every head in some rows."""
    known = rows.filter(pl.col("site").is_not_null()).select("site", "head", "depth").unique(maintain_order=True)
    return [(site, int(head), int(depth)) for site, head, depth in known.iter_rows()]
