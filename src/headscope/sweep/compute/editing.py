"""Every edit with every fill, for each item of a unit: planned, computed in batches, and written as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, TypeVar

import pyarrow as pa

from headscope.sweep.compute.context import Context
from headscope.sweep.plan.config import SweepConfig
from headscope.sweep.plan.heads import Edit
from headscope.sweep.plan.units import IMAGES, REFERENCE, Asked, Unit, UnitKind
from headscope.sweep.store.rows import Grid

# items of a unit: some seconds of work on a laptop, so that little is lost when a run is killed
ITEMS = 4

Prepared = TypeVar("Prepared")


class EditingKind(UnitKind):
    """A kind that edits heads: a row of its table for every edit, fill and item.

    Attributes:
        of_sets: its edits are the sweep's sets of heads, instead of single heads, each in turn.
    """

    reads = (IMAGES, REFERENCE)
    repeated = True
    of_sets: ClassVar[bool] = False

    def edits(self, asked: Asked) -> tuple[Edit, ...]:
        if self.of_sets:
            return asked.sets
        return tuple(Edit(site, ((site, head),)) for site, head in asked.heads)

    def fills(self, config: SweepConfig, replicate: int) -> tuple[str, ...]:
        """The fills of a draw's rows: the configuration's unless overridden."""
        return config.fills

    def edited_rows(self, asked: Asked, replicate: int) -> int:
        """How many edited rows each item takes in a draw: one for every edit and every fill that makes a difference."""
        fills = self.fills(asked.config, replicate)
        return sum(len(edit.differing(fills)) for edit in self.edits(asked))


@dataclass(frozen=True)
class Batch:
    """Rows that pass through the denoiser together: edits of the same sites, with one fill.

    Attributes:
        edits: each row's edit.
        items: each row's item, by its place in the piece of the unit's items that is worked on.
        places: the rows' places in the unit's grid.
    """

    edits: list[Edit]
    items: list[int]
    places: tuple[list[int], int, list[int]]


class EveryEdit:
    """Every edit with every fill, for each item of a unit.

    Attributes:
        edits, items: the unit's.
        grid: the numbers found so far.
    """

    def __init__(self, kind: EditingKind, unit: Unit, context: Context) -> None:
        self.edits = kind.edits(context.plan)
        self.items = context.items(unit)
        self._single = not kind.of_sets
        self._fills = kind.fills(context.config, unit.replicate)
        self._replicate, self._rows = unit.replicate, context.rows
        self.grid = Grid(self.edits, self._fills, len(self.items))

    def run(
        self,
        piece: range,
        prepare: Callable[[str, frozenset[str]], Prepared],
        compute: Callable[[Batch, Prepared], None],
    ) -> None:
        """Compute every edit with every fill of some of the items, in batches that fit in memory.

        Args:
            piece: the items.
            prepare: makes, of a fill and the sites of some edits, what their batches have in common.
            compute: computes a batch.
        """
        for fill, pairs in self._pairs(len(piece)):
            prepared = prepare(self._fills[fill], self.edits[pairs[0][0]].sites)

            def run(rows: range, fill=fill, pairs=pairs, prepared=prepared) -> None:
                numbers, items = zip(*pairs[rows.start : rows.stop], strict=True)
                places = list(numbers), fill, [piece.start + item for item in items]
                compute(Batch([self.edits[number] for number in numbers], list(items), places), prepared)

            self._rows.run(len(pairs), run)

    def _pairs(self, items: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Every (edit, item) pair, those of the same sites together: the fill's number, and the pairs."""
        order = sorted(range(len(self.edits)), key=lambda number: sorted(self.edits[number].sites))
        for _, same in groupby(order, key=lambda number: self.edits[number].sites):
            numbers = list(same)
            for fill, name in enumerate(self._fills):
                # the grid repeats the first fill's numbers where all are the same
                different = [number for number in numbers if name in self.edits[number].differing(self._fills)]
                if different:
                    yield fill, [(number, item) for number in different for item in range(items)]

    def table(self, **constants: pa.Scalar) -> pa.Table:
        """The numbers as a table, a row for each edit, fill and item, with columns of constants."""
        return self.grid.table(self.items, self._replicate, self._single, **constants)
