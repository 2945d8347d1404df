"""A unit's numbers as the rows of a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from headscope.sweep.plan.heads import Edit


class Grid:
    """Numbers of every (edit, fill, item), which arrive in any order and leave as a table in this one.

    Numbers on a device stay there until the table is made: reading each would wait for the device every time.
    """

    def __init__(self, edits: Sequence[Edit], fills: Sequence[str], items: int) -> None:
        self._edits = tuple(edits)
        self._fills = tuple(fills)
        self._items = items
        self._given: dict[str, list[tuple[Any, np.ndarray | Tensor]]] = {}

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self._edits), len(self._fills), self._items

    def put(self, name: str, edits: Any, fills: Any, items: Any, values: np.ndarray | Tensor) -> None:
        """Some values, one for each of these places: numbers, lists of as many, or a slice for all. The last counts."""
        self._given.setdefault(name, []).append(((edits, fills, items), values))

    def _values(self, name: str) -> np.ndarray:
        """[edits, fills, items], NaN where nothing was put."""
        places, values = zip(*self._given[name], strict=True)
        if all(isinstance(part, Tensor) for part in values):
            lengths = [len(part) for part in values]
            values = np.split(torch.cat(values).cpu().numpy(), np.cumsum(lengths)[:-1])
        whole = np.full(self.shape, np.nan)
        for place, part in zip(places, values, strict=True):
            whole[place] = part
        return self.repeated(whole)

    def repeated(self, values: np.ndarray) -> np.ndarray:
        """[edits, fills, items, ...] with an edit's values of the first fill at all that give the same."""
        for number, edit in enumerate(self._edits):
            if len(edit.differing(self._fills)) == 1:
                values[number, 1:] = values[number, :1]
        return values

    def table(self, items: Sequence[Any], replicate: int, single: bool, **constants: pa.Scalar) -> pa.Table:
        """Columns: the items' labels, the constants, (site, head) or the edit's name, fill, and the numbers.

        Args:
            single: every edit is of a single head.
        """
        edit, fill, item = (index.ravel() for index in np.indices(self.shape))
        columns = labels(items, item, replicate)
        columns |= {name: pa.repeat(value, len(item)) for name, value in constants.items()}
        columns["site" if single else "edit"] = coded([chosen.name for chosen in self._edits], edit)
        if single:
            columns["head"] = pa.array(np.array([chosen.heads[0][1] for chosen in self._edits], np.int16)[edit])
        columns["fill"] = coded(self._fills, fill)
        return pa.table({**columns, **{name: pa.array(self._values(name).ravel()) for name in self._given}})


def labels(items: Sequence[Any], positions: np.ndarray, replicate: int) -> dict[str, pa.Array]:
    """The columns that say which item a row is about."""
    numbers = np.array([item.index for item in items], np.int32)[positions]
    texts = {
        name: coded([getattr(item, name) for item in items], positions) for name in ("group", "source_id", "split")
    }
    return {"item": pa.array(numbers), **texts, "replicate": pa.array(np.full(len(positions), replicate, np.int32))}


def coded(values: Sequence[str], positions: np.ndarray) -> pa.DictionaryArray:
    """values[positions], as a dictionary of the different ones."""
    different = list(dict.fromkeys(values))
    codes = np.array([different.index(value) for value in values], np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(codes[positions]), pa.array(different, pa.string()))


def prepend(first: dict[str, pa.Array], table: pa.Table) -> pa.Table:
    return pa.table({**first, **{name: table[name] for name in table.column_names}})
