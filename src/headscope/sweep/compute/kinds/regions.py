"""Where the queries of each part of an image attend to, in the forwards of the unedited model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headscope.models import CounterpartMass, Recording
from headscope.ops import GroupMass, Regions, Statistic
from headscope.sweep.compute.context import Context
from headscope.sweep.compute.observing import ITEMS, Items, observed
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import Advance, Asked, Planned, Unit, UnitKind, chunks
from headscope.sweep.store.rows import coded, labels, prepend
from headscope.sweep.store.store import Results

# beside the parts' names, what keys are called that lie in any counterpart of the queries' part
COUNTERPARTS = "counterparts"
# of a recording's columns, those that the table has as they are
_KEPT = ("timestep", "site", "call", "head", "frame")
_MASS, _TIED = "mass", "tied"


class RegionMasses(UnitKind):
    """A row for every item, timestep, site, head, part of the image with queries in it, and part with keys in it.

    Its table: the item's labels (item, group, source_id, split, replicate), timestep, site, call, head and frame;
    "queries", the part that the queries lie in, and "tokens", how many they are; "entropy", their mean (nats); "keys",
    the part that the keys lie in, or "counterparts", all that are counterparts of the queries' part; "mass", the mean
    over the queries of the sum of p over those keys; and "share", how many of all keys they are, which the mass would
    be if attention were uniform. A token belongs to the part that covers most of it (`headscope.Regions`).

    Numbers are null where there is nothing to take them of: means over no tokens, counterparts of a part without any,
    and keys where they are no image (one row for the entropy, whose keys are null, too). Groups without ties have no
    rows of counterparts.
    """

    name = "regions"
    optional = True
    repeated = True
    parts = True

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        for item in group.swept:
            if item.parts is None:
                raise ValueError(
                    f"kinds: got {self.name!r}, which needs the part mask of every item, and {item.key!r} of the group"
                    f" {group.name!r} has none; expected groups with masks alone, such as faces or twins"
                )
            if COUNTERPARTS in item.part_names:
                raise ValueError(
                    f"kinds: got {self.name!r}, in whose table {COUNTERPARTS!r} are all of a part's counterparts; the"
                    f" group {group.name!r} has a part of that name, expected another one"
                )
        for items in chunks(len(group.swept), ITEMS):
            yield Planned(items, len(items) * len(asked.timesteps))

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        def record(items: Items) -> list[AbstractContextManager[Recording]]:
            regions = Regions.of(items)
            wanted: list[str | Statistic] = ["entropy", GroupMass(regions, name=_MASS)]
            if regions.counterparts is not None:
                wanted.append(CounterpartMass(regions, name=_TIED))
            return [context.loss_scope.record(*wanted, queries=regions)]

        def tabulate(tables: Sequence[pa.Table], items: Items) -> pa.Table:
            (table,) = tables
            table = table.filter(pc.is_valid(table["query_class"]))
            described = labels(items, table["sample"].to_numpy(), unit.replicate)
            return _long(prepend(described, table), list(described), items[0].part_names)

        return observed(unit, context, advance, record, tabulate)


def _long(table: pa.Table, described: Sequence[str], names: Sequence[str]) -> pa.Table:
    """The rows of classes, each once for every part with keys in it."""
    ties = f"{_TIED}_mean" in table.column_names
    kinds = [*names, COUNTERPARTS] if ties else list(names)
    # [rows, parts]; NaN where the keys are no image
    masses, shares = (_matrix(table[f"{_MASS}_{part}"], len(names)) for part in ("mean", "share"))
    if ties:
        tied = (table[f"{_TIED}_{part}"].to_numpy(zero_copy_only=False)[:, None] for part in ("mean", "share"))
        masses, shares = (np.hstack(both) for both in zip((masses, shares), tied, strict=True))
    of_image = table[f"{_MASS}_share"].is_valid().to_numpy()
    # of other keys one row, which has the entropy
    repeats = np.where(of_image, len(kinds), 1)
    row = np.repeat(np.arange(len(table)), repeats)
    kind = np.concatenate([np.arange(count) for count in repeats]) if len(row) else row
    known = of_image[row]
    keys = coded(kinds, np.arange(len(kinds)))
    columns = {name: table[name].take(pa.array(row)) for name in (*described, *_KEPT)}
    columns["queries"] = table["query_class"].take(pa.array(row))
    columns["tokens"] = table["queries"].take(pa.array(row))
    columns["entropy"] = table["entropy_mean"].take(pa.array(row))
    columns["keys"] = pa.DictionaryArray.from_arrays(pa.array(kind.astype(np.int32), mask=~known), keys.dictionary)
    for name, values in (("mass", masses), ("share", shares)):
        numbers = values[row, kind].astype(np.float32)
        columns[name] = pa.array(numbers, mask=~known | np.isnan(numbers))
    return pa.table(columns)


def _matrix(lists: pa.ChunkedArray, width: int) -> np.ndarray:
    """A column of lists of so many numbers as [rows, numbers], NaN for null."""
    whole = lists.combine_chunks()
    found = np.full((len(whole), width), np.nan, np.float32)
    found[whole.is_valid().to_numpy(zero_copy_only=False)] = whole.flatten().to_numpy().reshape(-1, width)
    return found
