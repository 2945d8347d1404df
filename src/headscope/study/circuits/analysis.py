"""Circuits, whole: from what was removed and patched on the confirm split to their tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np
import polars as pl
from scipy.stats import hypergeom

from headscope.study.ablation import with_rounding
from headscope.study.circuits.faithfulness import (
    completeness_table,
    curves_table,
    faithfulness_table,
    minimality_table,
)
from headscope.study.circuits.pairs import pairs_table
from headscope.study.circuits.sets import EVERY, PlannedSet, planned_sets
from headscope.study.circuits.trace import circuit_of, depth_of, every_head, fill_of, has_circuit
from headscope.study.inference import degradations, plain_text

OVERLAP = (
    "Jaccard's index of two groups' circuits, shared heads by heads of either; beside it what two sets of these sizes"
    " drawn at random from all heads would have on average, and the chance of as many shared heads or more"
    " (hypergeometric). Exploratory."
)
EDGES = (
    "Degradation when one head's output is replaced in the eyes of one later head's query, key or value alone (path"
    " patching, Wang et al. 2022; Goldowsky-Dill et al. 2023): the sender's output is replaced by the fill, the outputs"
    " of all other heads are held at what they are, and what then arrives at the receiver's query, key or value takes"
    " the place of its own; everything after the receiver is computed anew. Output: the sender's own way to the"
    " prediction, all other heads held. Paths run through the layers between (MLPs, norms), not through heads. Max-t"
    " over all edges of a group."
)


# of a circuit that may have been removed
MOST_HALVES = 32


@dataclass(frozen=True)
class Circuits:
    """The circuits of a study's groups, on the confirm split. Numbers as in `inference.frames`.

    Attributes:
        faithfulness: group, then as in `faithfulness.faithfulness_table`; the chosen circuit's rows, by the loss and by
            the prediction, come first.
        curves: group, method, size, numbers.
        nodes: group, site, head, depth (of the site in the order of execution), numbers of what removing the head alone
            from the whole model costs (a fraction of the clean loss; null where it wasn't removed), of the circuit's
            heads.
        edges: group, sender_site, sender_head, receiver_site, receiver_head (null: the prediction), part, numbers; None
            where no path was patched.
        completeness, minimality, pairs: group, then as in `faithfulness` and `pairs`.
        overlap: first, second (groups), shared, jaccard, expected, expected_shared, p_value, exploratory; None of a
            single circuit.
        refused: group, reason: those that have no circuit, or none on confirm, where its numbers are null.
    """

    faithfulness: pl.DataFrame | None = None
    curves: pl.DataFrame | None = None
    nodes: pl.DataFrame | None = None
    edges: pl.DataFrame | None = None
    completeness: pl.DataFrame | None = None
    minimality: pl.DataFrame | None = None
    overlap: pl.DataFrame | None = None
    pairs: pl.DataFrame | None = None
    refused: pl.DataFrame | None = None

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables there are, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: table for name, table in found.items() if table is not None}


def analyse_circuits(
    set_ablations: pl.DataFrame | None,
    paths: pl.DataFrame | None,
    trace: pl.DataFrame,
    *,
    target: float = 0.9,
    seed: int = 0,
) -> Circuits:
    """All numbers of the circuits that were found.

    Args:
        set_ablations: what removing the sets of `confirm_sets` cost, on the confirm split; groups whose rows aren't
            there are left out.
        paths: the table "paths", on the confirm split; None where no edges were measured.
        trace: the table "circuits" of the search on the discover split.
        target: the faithfulness that circuits were to reach.
        seed: of the resampling.

    Raises:
        ValueError: rows that hold a group's sets, and not all heads removed, or not the circuit.
    """
    trace = plain_text(trace)
    groups = trace["group"].unique(maintain_order=True).to_list()
    with_one = [group for group in groups if has_circuit(trace, group, fill_of(trace, group))]
    refused = [_refused(group, "discover") for group in groups if group not in with_one]
    for group in [group for group in with_one if len(circuit_of(trace, group)) == len(every_head(trace, group))]:
        with_one.remove(group)
        refused.append({"group": group, "reason": "no smaller set of heads than all of them is enough on discover"})
    found: dict[str, list[pl.DataFrame]] = {}
    for group in with_one:
        # whichever of them were removed, as their names say
        count = len(every_head(trace, group))
        planned = planned_sets(trace, group, sizes=range(count), beside=count, halves=MOST_HALVES, paired=count)
        losses = _of_group(set_ablations, group, fill_of(trace, group), [one.name for one in planned])
        if losses is not None:
            _check(losses, planned, group)
            there = set(losses["edit"])
            tables = _tables(losses, [one for one in planned if one.name in there], trace, group, target, seed)
            if _is_refused(tables["faithfulness"]):
                refused.append(_refused(group, "confirm"))
                tables["nodes"] = None
            for name, table in tables.items():
                if table is not None and len(table):
                    found.setdefault(name, []).append(table.select(pl.lit(group).alias("group"), pl.all()))
        patched = _of_group(paths, group, fill_of(trace, group))
        if patched is not None:
            found.setdefault("edges", []).append(
                edges_table(patched, seed).select(pl.lit(group).alias("group"), pl.all())
            )
    whole = {name: pl.concat(tables, how="diagonal_relaxed") for name, tables in found.items()}
    return Circuits(
        **whole,
        overlap=overlap_table(trace, [group for group in with_one if group not in {row["group"] for row in refused}]),
        refused=pl.DataFrame(refused) if refused else None,
    )


def edges_table(patched: pl.DataFrame, seed: int) -> pl.DataFrame:
    """See `EDGES`. patched: the rows of the table "paths" of one group and fill."""
    by = ["sender_site", "sender_head", "receiver_site", "receiver_head", "part"]
    added = with_rounding(patched, by)
    return degradations(patched, by, "timestep", seed, family=True, added=added)[0].drop("added_error")


def overlap_table(trace: pl.DataFrame, groups: list[str]) -> pl.DataFrame | None:
    """See `OVERLAP`, of every two of some groups."""
    circuits = {group: set(circuit_of(trace, group)) for group in groups}
    rows = []
    for first, second in combinations(groups, 2):
        one, two = circuits[first], circuits[second]
        every = len(set(every_head(trace, first)) | set(every_head(trace, second)))
        shared = len(one & two)
        chance = hypergeom(every, len(one), len(two))
        counts = np.arange(max(0, len(one) + len(two) - every), min(len(one), len(two)) + 1)
        expected = float((chance.pmf(counts) * counts / (len(one) + len(two) - counts)).sum())
        rows.append(
            {
                "first": first,
                "second": second,
                "shared": shared,
                "jaccard": shared / len(one | two),
                "expected": expected,
                "expected_shared": float(chance.mean()),
                "p_value": float(chance.sf(shared - 1)),
                "exploratory": True,
            }
        )
    return pl.DataFrame(rows) if rows else None


def _refused(group: str, split: str) -> dict[str, str]:
    return {"group": group, "reason": f"removing all heads does not clearly cost anything on the {split} split"}


def _is_refused(faithfulness: pl.DataFrame | None) -> bool:
    """True if the circuit has no faithfulness though nothing is missing."""
    if faithfulness is None:
        return False
    rows = faithfulness.filter((pl.col("kind") == "circuit") & (pl.col("void") == 0))
    return bool(len(rows)) and rows["value"].null_count() == len(rows)


def _tables(
    losses: pl.DataFrame, planned: list[PlannedSet], trace: pl.DataFrame, group: str, target: float, seed: int
) -> dict[str, pl.DataFrame | None]:
    """The tables of one group, by name."""
    with_seed: dict[str, Callable[..., pl.DataFrame | None]] = {
        "curves": curves_table,
        "completeness": completeness_table,
        "minimality": minimality_table,
        "pairs": pairs_table,
    }
    return {
        "faithfulness": faithfulness_table(losses, planned, target, seed),
        **{name: make(losses, planned, seed) for name, make in with_seed.items()},
        "nodes": _nodes(losses, planned, trace, group, seed),
    }


def _nodes(losses: pl.DataFrame, planned: list[PlannedSet], trace: pl.DataFrame, group: str, seed: int) -> pl.DataFrame:
    """The circuit's heads, and what removing each alone costs."""
    depths = depth_of(trace, group)
    nodes = pl.DataFrame(
        [(site, head, depths[site, head]) for site, head in circuit_of(trace, group)],
        schema={"site": pl.String, "head": pl.Int64, "depth": pl.Int64},
        orient="row",
    )
    alone = {one.name: one.part[0] for one in planned if one.kind == "part" and len(one.part) == 1}
    if not alone:
        return nodes
    rows = losses.filter(pl.col("edit").is_in(list(alone)))
    table = degradations(rows, ["edit"], "timestep", seed, family=True, added=with_rounding(rows, ["edit"]))[0]
    heads = pl.DataFrame(
        [(name, *head) for name, head in alone.items()],
        schema={"edit": pl.String, "site": pl.String, "head": pl.Int64},
        orient="row",
    )
    table = table.join(heads, on="edit", how="left").drop("edit", "added_error")
    return nodes.join(table, on=["site", "head"], how="left", maintain_order="left")


def _of_group(table: pl.DataFrame | None, group: str, fill: str, names: list[str] | None = None) -> pl.DataFrame | None:
    """A group's rows of the confirm split with one fill, of some sets; None where there are none."""
    if table is None:
        return None
    rows = plain_text(table).filter((pl.col("group") == group) & (pl.col("fill") == fill))
    if "split" in rows.columns:
        rows = rows.filter(pl.col("split") == "confirm")
    if names is not None:
        rows = rows.filter(pl.col("edit").is_in(names))
    return rows if len(rows) else None


def _check(losses: pl.DataFrame, planned: list[PlannedSet], group: str) -> None:
    """Raises ValueError where what everything else is measured by isn't there."""
    there = set(losses["edit"])
    needed = [EVERY, *(one.name for one in planned if one.kind == "circuit")]
    missing = [name for name in needed if name in {one.name for one in planned} and name not in there]
    if missing:
        raise ValueError(
            f"set_ablations: got sets of {group!r} without {', '.join(map(repr, missing))}, expected those of"
            " confirm_sets"
        )
