"""Every head's entropy in the forwards of the unedited model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from headscope.sweep.compute.context import Context
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import IMAGES, Advance, Asked, Planned, Unit, UnitKind, chunks
from headscope.sweep.store.rows import labels, prepend
from headscope.sweep.store.store import Results

# items of a unit: they take one forward for each timestep, not one for each head
ITEMS = 20


class Observations(UnitKind):
    """A row for every item, timestep, site, head and query group.

    Its table: the item's labels (item, group, source_id, split, replicate), and the columns of a recording of
    "entropy" (nats; `Recording.to_arrow`).
    """

    name = "observations"
    reported = True
    reads = (IMAGES,)

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        if asked.config.observe:
            for items in chunks(len(group.swept), ITEMS):
                yield Planned(items, len(items) * len(asked.timesteps))

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        items = context.items(unit)
        seed, timesteps = context.config.seed, context.plan.timesteps
        tables: dict[int, pa.Table] = {}

        def observe(piece: range) -> None:
            some = [items[index] for index in piece]
            prepared = context.task.prepare(some)
            with context.loss_scope.record("entropy") as recording:
                for timestep in timesteps:
                    context.task.predict(context.noisy_inputs(prepared, timestep))
                    advance(len(some))
            table = recording.to_arrow()
            described = labels(some, table["sample"].to_numpy(), seed)
            # the scheduler's: some models take sigma instead
            timestep = pa.array(np.array(timesteps, np.int32)[table["step"].to_numpy()])
            table = table.set_column(table.schema.get_field_index("timestep"), "timestep", timestep)
            tables[piece.start] = prepend(described, table.drop_columns(["step", "sample"]))

        context.rows.run(len(items), observe)
        return Results(pa.concat_tables(tables[start] for start in sorted(tables)).unify_dictionaries())
