"""The smallest set of heads that is enough for a group, searched on its discover items."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from headscope.sweep.compute.context import Context
from headscope.sweep.compute.orders import RANDOM_ORDERS, forwards_of_orders, orders_of
from headscope.sweep.compute.removals import Heads, Removals
from headscope.sweep.compute.search import GREEDY, START, Step, likely_sets, search
from headscope.sweep.plan.config import CIRCUIT_METRICS, CIRCUITS
from headscope.sweep.plan.heads import attributed_sites
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import IMAGES, REFERENCE, Advance, Asked, Planned, Unit, UnitKind
from headscope.sweep.store.rows import coded
from headscope.sweep.store.store import Results

# what can take the place of heads of every kind of site at once
FILLS = ("mean", "zero", "uniform")


class Circuits(UnitKind):
    """A row for every step of the search on one group's discover items, for each fill, of the first draw of noise.

    Its table: group, fill, method ("greedy", then "greedy, larger": what it grows the circuit to; and "attribution",
    "integrated", "magnitude", "random 1", ...), step (from 0, within group, fill and method), action ("start", "add",
    "prune", "replace"), site, head and depth (the site's place in the order of execution), partner_site and
    partner_head (of "replace", the head that this one stands in for); of the set of heads that the step gives: size,
    faithfulness (by `SweepConfig.circuit_metric`), faithfulness_loss, faithfulness_prediction, cost (the degradation
    with all other heads removed, a fraction of the clean loss) and distance (the same of predictions); kept (the step
    was taken) and chosen (the set is its method's circuit). Numbers are null where a set wasn't measured. Where
    removing all heads doesn't clearly cost anything, by the same metric, there is no circuit, and one row of action
    "start" that isn't chosen.

    With D the degradation by removing all heads but a set's, and D_all that by removing all,
    faithfulness = 1 - D / D_all, both averaged over timesteps first; by the prediction, D holds the mean squared
    difference to the clean prediction in place of edited - clean loss. Heads of sites that the configuration's `sites`
    leave out are never removed.
    """

    name = CIRCUITS
    optional = True
    reads = (IMAGES, REFERENCE)
    differentiates = True

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        for fill in asked.config.fills:
            if fill not in FILLS:
                raise ValueError(f"fills: got {fill!r} with the kind {CIRCUITS}, expected some of {', '.join(FILLS)}")
        items = [place for place, item in enumerate(group.swept) if item.split == "discover"]
        heads = len(circuit_heads(asked))
        sets = likely_sets(heads, 3 + RANDOM_ORDERS)
        each = len(asked.timesteps) * (1 + forwards_of_orders(asked.config.cotangents) + sets)
        yield Planned(items, len(asked.config.fills) * len(items) * each)

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        config, items = context.config, context.items(unit)
        heads = circuit_heads(context.plan)
        metric = CIRCUIT_METRICS.index(config.circuit_metric)
        tables = []
        for fill in config.fills:
            removals = Removals(context, unit, items, fill, heads, advance)
            every = frozenset(range(len(heads)))
            if removals.clearly_costs(every, metric):
                orders = orders_of(context, items, context.fill(unit, fill), heads, advance)
                steps = search(len(heads), orders, removals.costs, metric, config.faithfulness)
                empty = removals.costs([every])[0]
            else:
                empty = removals.costs([every])[0]
                steps = [Step(GREEDY, START, None, 0, (float(empty[0]), float(empty[1])))]
            tables.append(_table(unit.group, fill, steps, heads, empty))
        return Results(pa.concat_tables(tables).unify_dictionaries())


def circuit_heads(asked: Asked) -> list[tuple[str, int]]:
    """The heads that circuits are made of, in the order of execution."""
    names = attributed_sites(asked.config, asked.sites)
    return [(site.name, head) for site in asked.sites if site.name in names for head in range(site.heads)]


def _table(group: str, fill: str, steps: list[Step], heads: Heads, empty: np.ndarray) -> pa.Table:
    """The trace as a table; see `Circuits`."""
    sites = list(dict.fromkeys(site for site, _ in heads))
    count = np.zeros(len(steps), np.int32)
    numbers, seen = [], {}
    for step in steps:
        numbers.append(seen.get(step.method, 0))
        seen[step.method] = numbers[-1] + 1

    def head_columns(places: list[int | None], prefix: str) -> dict[str, pa.Array]:
        chosen = [None if place is None else heads[place] for place in places]
        return {
            f"{prefix}site": pa.array([one and one[0] for one in chosen], pa.string()).dictionary_encode(),
            f"{prefix}head": pa.array([None if one is None else one[1] for one in chosen], pa.int16()),
        }

    def number(values: list[float]) -> pa.Array:
        array = np.array(values, np.float64)
        return pa.array(array, mask=~np.isfinite(array))

    costs = np.array([step.costs for step in steps])
    with np.errstate(divide="ignore", invalid="ignore"):
        faithful = 1.0 - costs / empty
    depths = [None if step.head is None else sites.index(heads[step.head][0]) for step in steps]
    return pa.table(
        {
            "group": coded([group], count),
            "fill": coded([fill], count),
            "method": pa.array([step.method for step in steps], pa.string()).dictionary_encode(),
            "step": pa.array(numbers, pa.int32()),
            "action": pa.array([step.action for step in steps], pa.string()).dictionary_encode(),
            **head_columns([step.head for step in steps], ""),
            "depth": pa.array(depths, pa.int16()),
            **head_columns([step.partner for step in steps], "partner_"),
            "size": pa.array([step.size for step in steps], pa.int32()),
            "faithfulness": number([step.faithfulness for step in steps]),
            "faithfulness_loss": number(faithful[:, 0].tolist()),
            "faithfulness_prediction": number(faithful[:, 1].tolist()),
            "cost": number(costs[:, 0].tolist()),
            "distance": number(costs[:, 1].tolist()),
            "kept": pa.array([step.kept for step in steps], pa.bool_()),
            "chosen": pa.array([step.chosen for step in steps], pa.bool_()),
        }
    )
