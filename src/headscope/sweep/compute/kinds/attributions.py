"""Every head's importance, all at once, from a few backwards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from headscope.sweep.compute.context import Context
from headscope.sweep.compute.donors import Donors
from headscope.sweep.plan.config import RESAMPLE
from headscope.sweep.plan.heads import attributed_sites
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import IMAGES, REFERENCE, Advance, Asked, Planned, Unit, UnitKind, chunks
from headscope.sweep.store.rows import coded, labels, prepend
from headscope.sweep.store.store import Results

# items of a unit: they take a few forwards and backwards for each timestep, not one for each head
ITEMS = 20


class Attributions(UnitKind):
    """A row for every fill, item, timestep, site and head.

    Its table: the item's labels (item, group, source_id, split, replicate), the fill, and the columns of
    `Scope.attribute`: loss, g, c and importance.
    """

    name = "attributions"
    reads = (IMAGES, REFERENCE)
    differentiates = True
    repeated = True

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        config = asked.config
        if config.attribute:
            # a forward, and of each backward twice its work
            each = len(asked.timesteps) * (len(config.fills) * (3 + 2 * config.cotangents) + (RESAMPLE in config.fills))
            for items in chunks(len(group.swept), ITEMS):
                yield Planned(items, len(items) * each)

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        items, config, scope = context.items(unit), context.config, context.loss_scope
        sites = attributed_sites(config, scope.sites)
        each = len(context.plan.timesteps) * (3 + 2 * config.cotangents)
        tables: dict[tuple[int, int], pa.Table] = {}
        for number, fill in enumerate(config.fills):

            def attribute(piece: range, number=number, fill=fill) -> None:
                some = [items[index] for index in piece]
                if fill == RESAMPLE:
                    filled = Donors(context, unit, some, sites, context.plan.timesteps).of_all()
                    advance(len(context.plan.timesteps) * len(some))
                else:
                    filled = context.fill(unit, fill)
                found = scope.attribute(
                    context.task,
                    some,
                    context.plan.timesteps,
                    sites=sites,
                    cotangents=config.cotangents,
                    fill=filled,
                    replicate=unit.replicate,
                    batch=len(some),
                )
                table = found.to_arrow()
                described = labels(some, np.arange(len(table)) // (len(table) // len(some)), unit.replicate)
                described["fill"] = coded([fill], np.zeros(len(table), np.int32))
                tables[number, piece.start] = prepend(described, table.drop_columns("item"))
                advance(each * len(some))

            context.rows.run(len(items), attribute)
        return Results(pa.concat_tables(tables[key] for key in sorted(tables)).unify_dictionaries())
