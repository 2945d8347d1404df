"""The attention that each place of the image receives from every head, in the forwards of the unedited model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headscope.models import Recording
from headscope.models.tasks import Prepared
from headscope.ops import Distance
from headscope.sweep.compute.context import Context
from headscope.sweep.compute.observing import ITEMS, Items, observed
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import IMAGES, Advance, Asked, Planned, Unit, UnitKind, chunks
from headscope.sweep.store.rows import labels, prepend
from headscope.sweep.store.store import Results

# up to this edge of the denoiser's input a unit has as many items as others; of larger ones fewer, as rows grow
EDGE = 32
# what tells the rows of a recording apart, which has sums over queries in rows of their own
_PLACE = ("step", "site", "call", "sample", "head")


class KeyMasses(UnitKind):
    """A row for every item, timestep, site, head, and the image as it is or translated.

    Sites are those of self-attention whose queries and keys are the image's tokens; all queries of the grid count.

    Its table: the item's labels (item, group, source_id, split, replicate), timestep, site, call and head;
    "translated", true of the image rolled by half its height and width (rounded down) before noise of the same draw was
    added; grid_height and grid_width in tokens; and, means over queries, "entropy" (nats), "entropy_normalised" (of
    H / ln keys, null of a single key), "distance" (of sum_j p * distance(i, j), in tokens) with "distance_uniform",
    what it would be if attention were uniform, and "key_mass", of p_j for each key j, row by row: it sums to 1.
    """

    name = "key_mass"
    reads = (IMAGES,)
    optional = True
    repeated = True
    grids = True

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        size = max(1, min(ITEMS, ITEMS * EDGE**2 // asked.task.sample_size**2))
        for items in chunks(len(group.swept), size):
            yield Planned(items, 2 * len(items) * len(asked.timesteps))

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        sites_of: dict[tuple[int, int], list[str]] = {}
        for site, grid in context.plan.grids.items():
            sites_of.setdefault(grid, []).append(site)

        def record(items: Items) -> list[AbstractContextManager[Recording]]:
            record = context.loss_scope.record
            return [record("entropy", Distance(grid), "key_mass", sites=sites) for grid, sites in sites_of.items()]

        def rolled(items: Items) -> Prepared:
            return context.task.prepare([_Rolled.of(item) for item in items])

        found = []
        for translated, prepare in ((False, None), (True, rolled)):

            def tabulate(tables: Sequence[pa.Table], items: Items, translated: bool = translated) -> pa.Table:
                parts = []
                for grid, table in zip(sites_of, tables, strict=True):
                    rows = _joined(table, grid, translated)
                    parts.append(prepend(labels(items, rows["sample"].to_numpy(), unit.replicate), rows))
                return pa.concat_tables(parts).drop_columns("sample")

            found.append(observed(unit, context, advance, record, tabulate, prepare).table)
        return Results(pa.concat_tables(found).unify_dictionaries())


@dataclass(frozen=True)
class _Rolled:
    """An item whose image is rolled by half its height and width; its noise stays in place."""

    key: str
    image: np.ndarray
    caption: str

    @classmethod
    def of(cls, item) -> _Rolled:
        height, width = item.image.shape[:2]
        return cls(item.key, np.roll(item.image, (height // 2, width // 2), (0, 1)), item.caption)


def _joined(table: pa.Table, grid: tuple[int, int], translated: bool) -> pa.Table:
    """A recording's rows, of which those over queries and those of keys are one."""
    of_keys = pc.is_valid(table["key_mass"])
    keys, queries = table.filter(of_keys), table.filter(pc.invert(of_keys))
    if keys.select(_PLACE).to_pydict() != queries.select(_PLACE).to_pydict():
        raise ValueError("key_mass: a site attends in several parts, expected its queries and keys to be one image")
    tokens = grid[0] * grid[1]

    def numbers(name: str) -> np.ndarray:
        # what isn't a number stays one that isn't, and no null
        return queries[name].to_numpy().astype(np.float32)

    normalised = numbers("entropy_normalised_mean")
    masses = keys["key_mass"].combine_chunks().flatten().to_numpy().astype(np.float64) / tokens
    offsets = np.arange(len(keys) + 1, dtype=np.int32) * tokens
    columns = {name: queries[name] for name in ("sample", "timestep", "site", "call", "head")}
    columns["translated"] = pa.array(np.full(len(queries), translated))
    for axis, name in enumerate(("grid_height", "grid_width")):
        columns[name] = pa.array(np.full(len(queries), grid[axis], np.int32))
    columns["entropy"] = pa.array(numbers("entropy_mean"))
    columns["entropy_normalised"] = pa.array(normalised, mask=np.full(len(queries), tokens == 1))
    columns["distance"] = pa.array(numbers("distance_mean"))
    columns["distance_uniform"] = pa.array(np.full(len(queries), uniform_distance(grid)))
    columns["key_mass"] = pa.ListArray.from_arrays(offsets, masses.astype(np.float32))
    return pa.table(columns)


def uniform_distance(grid: tuple[int, int]) -> float:
    """The mean Euclidean distance of two tokens of a grid, each of all its tokens alike."""
    rows, columns = (np.arange(size) for size in grid)
    # how often two rows, or columns, are so far apart
    down, across = (np.where(axis > 0, 2, 1) * (len(axis) - axis) / len(axis) ** 2 for axis in (rows, columns))
    return float((down[:, None] * across * np.hypot(rows[:, None], columns)).sum())
