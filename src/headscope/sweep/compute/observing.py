"""A unit's items in the forwards of the unedited model, recorded at every timestep in pieces that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import pyarrow as pa

from headscope.models import Recording
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
    record: Callable[[Items], AbstractContextManager[Recording]],
    tabulate: Callable[[pa.Table, Items], pa.Table],
) -> Results:
    """Record every item of a unit at every timestep.

    Args:
        record: opens the recording of some items.
        tabulate: makes, of that recording's table and its items, the rows of the unit's table.
    """
    items, timesteps = context.items(unit), context.plan.timesteps
    tables: dict[int, pa.Table] = {}

    def observe(piece: range) -> None:
        some = [items[index] for index in piece]
        prepared = context.prepared(some)
        with record(some) as recording:
            for timestep in timesteps:
                context.task.predict(context.noisy_inputs(prepared, timestep, unit.replicate))
                advance(len(some))
        table = recording.to_arrow()
        # the scheduler's: some models take sigma instead
        timestep = pa.array(np.array(timesteps, np.int32)[table["step"].to_numpy()])
        table = table.set_column(table.schema.get_field_index("timestep"), "timestep", timestep)
        tables[piece.start] = tabulate(table, some)

    context.rows.run(len(items), observe)
    return Results(pa.concat_tables(tables[start] for start in sorted(tables)).unify_dictionaries())
