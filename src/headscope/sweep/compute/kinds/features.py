"""Every feature of every item, on the grids of tokens of the model's sites."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from headscope.features import feature_maps, on_tokens, resolved
from headscope.sweep.compute.context import Context
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import IMAGES, Advance, Asked, Planned, Unit, UnitKind, chunks
from headscope.sweep.store.rows import coded, labels
from headscope.sweep.store.store import Results

# items of a unit: they take about a millisecond each
ITEMS = 200


class Features(UnitKind):
    """A row for every item, grid of tokens and feature (`headscope.features.feature_maps`). It takes no forwards.

    Its table: the item's labels (item, group, source_id, split, replicate), feature, grid_height and grid_width; "map",
    the mean of the feature over each token, row by row; and "resolved", the share of its variance over the picture that
    lies between the tokens, 0 to 1, null where the picture has the same of it everywhere, be it nothing.

    Items without a part mask have no rows of what needs one.
    """

    name = "features"
    reads = (IMAGES,)
    optional = True
    parts = True
    grids = True

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        for items in chunks(len(group.swept), ITEMS):
            yield Planned(items, 0)

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        items = context.items(unit)
        grids = list(dict.fromkeys(context.plan.grids.values()))
        positions: list[int] = []
        names: list[str] = []
        sizes: list[tuple[int, int]] = []
        shares: list[float | None] = []
        maps: list[np.ndarray] = []
        for position, item in enumerate(items):
            for name, values in feature_maps(item, context.own_features).items():
                for grid in grids:
                    positions.append(position)
                    names.append(name)
                    sizes.append(grid)
                    shares.append(resolved(values, grid))
                    maps.append(on_tokens(values, grid).astype(np.float32).ravel())
        different = list(dict.fromkeys(names))
        number = {name: index for index, name in enumerate(different)}
        columns = labels(items, np.array(positions), unit.replicate)
        columns["feature"] = coded(different, np.array([number[name] for name in names], np.int32))
        for axis, column in enumerate(("grid_height", "grid_width")):
            columns[column] = pa.array(np.array([size[axis] for size in sizes], np.int32))
        columns["map"] = pa.array(maps, pa.list_(pa.float32()))
        columns["resolved"] = pa.array(shares, pa.float32())
        return Results(pa.table(columns))
