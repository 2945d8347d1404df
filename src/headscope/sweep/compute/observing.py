"""A unit's items in the forwards of the unedited model, recorded at every timestep in pieces that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import numpy as np
import pyarrow as pa

from headscope.models import Recording
from headscope.models.tasks import Prepared
from headscope.sweep.compute.context import Context
from headscope.sweep.plan.items import PromptItem, SweptItem
from headscope.sweep.plan.units import Advance, Unit
from headscope.sweep.store.store import Results

# items of a unit: they take one forward for each timestep, not one for each head
ITEMS = 20

Items = Sequence[SweptItem | PromptItem]


def observed(
    unit: Unit,
    context: Context,
    advance: Advance,
    record: Callable[[Items], Sequence[AbstractContextManager[Recording]]],
    tabulate: Callable[[Sequence[pa.Table], Items], pa.Table],
    prepare: Callable[[Items], Prepared] | None = None,
) -> Results:
    """Record every item of a unit at every timestep.

    Args:
        record: the recordings of some items, which are open together.
        tabulate: makes, of those recordings' tables and their items, the rows of the unit's table.
        prepare: encodes items; by default as they are.
    """
    items, timesteps = context.items(unit), context.plan.timesteps
    tables: dict[int, pa.Table] = {}

    def observe(piece: range) -> None:
        some = [items[index] for index in piece]
        prepared = context.prepared(some) if prepare is None else prepare(some)
        with ExitStack() as stack:
            recordings = [stack.enter_context(recording) for recording in record(some)]
            for timestep in timesteps:
                context.task.predict(context.noisy_inputs(prepared, timestep, unit.replicate))
                advance(len(some))
        tables[piece.start] = tabulate([_at(timesteps, recording.to_arrow()) for recording in recordings], some)

    context.rows.run(len(items), observe)
    return Results(pa.concat_tables(tables[start] for start in sorted(tables)).unify_dictionaries())


def _at(timesteps: Sequence[int], table: pa.Table) -> pa.Table:
    """A recording's table with the scheduler's timesteps: some models take sigma instead."""
    timestep = pa.array(np.array(timesteps, np.int32)[table["step"].to_numpy()])
    return table.set_column(table.schema.get_field_index("timestep"), "timestep", timestep)
