"""Every head's entropy in the forwards of the unedited model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from headscope.sweep.compute.context import Context
from headscope.sweep.compute.observing import ITEMS, Items, observed
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import IMAGES, Advance, Asked, Planned, Unit, UnitKind, chunks
from headscope.sweep.store.rows import labels, prepend
from headscope.sweep.store.store import Results


class Observations(UnitKind):
    """A row for every item, timestep, site, head and query group.

    Its table: the item's labels (item, group, source_id, split, replicate), and the columns of a recording of
    "entropy" (nats; `Recording.to_arrow`).
    """

    name = "observations"
    reported = True
    repeated = True
    reads = (IMAGES,)

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        if asked.config.observe:
            for items in chunks(len(group.swept), ITEMS):
                yield Planned(items, len(items) * len(asked.timesteps))

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        def tabulate(tables: Sequence[pa.Table], items: Items) -> pa.Table:
            (table,) = tables
            described = labels(items, table["sample"].to_numpy(), unit.replicate)
            return prepend(described, table.drop_columns(["step", "sample"]))

        return observed(unit, context, advance, lambda items: [context.loss_scope.record("entropy")], tabulate)
