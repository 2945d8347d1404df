"""The part masks of a group's items, at the model's size: read when they are asked for, the last ones kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from headscope._images import nearest_parts
from headscope.zoo import ImageGroup, Item

# of the masks and counterparts of a group
KEPT_BYTES = 64 * 2**20


class Parts(NamedTuple):
    """The part mask of an item and the counterparts of its pixels, None where it has none."""

    mask: np.ndarray | None
    counterparts: np.ndarray | None


class GroupParts:
    """The part masks of a group's items, at an edge of so many pixels: each pixel's are those of the nearest one."""

    def __init__(self, source: ImageGroup, size: int) -> None:
        self._source, self._size = source, size
        self._kept: OrderedDict[int, Parts] = OrderedDict()
        self._bytes = 0

    def see(self, item: Item) -> None:
        """An item is read for its image: its parts are kept where they needn't be resized."""
        if item.part_mask is not None and len(item.part_mask) == self._size:
            self._keep(item)

    def of(self, index: int, digest: str | None) -> Parts:
        """An item's parts.

        Args:
            digest: the hash of what they were when the run was opened.

        Raises:
            ValueError: they are no longer that.
        """
        if digest is None:
            return Parts(None, None)
        if index not in self._kept:
            item = self._source.item(index)
            if parts_digest(item) != digest:
                raise ValueError(
                    f"groups: the part mask of {item.source_id!r} of {item.group!r} has changed since the run was"
                    " opened"
                )
            self._keep(item)
        self._kept.move_to_end(index)
        # copies: what one score does in place, others would see
        return Parts(*(None if array is None else array.copy() for array in self._kept[index]))

    def _keep(self, item: Item) -> None:
        assert item.part_mask is not None
        found = Parts(*nearest_parts(item.part_mask, item.counterparts, self._size))
        self._kept[item.index] = found
        self._bytes += _bytes(found)
        while len(self._kept) > 1 and self._bytes > KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _bytes(oldest)


def parts_digest(item: Item) -> str | None:
    """A hash of an item's part mask, its parts' names and its pixels' counterparts; None where it has no mask."""
    if item.part_mask is None:
        return None
    digest = hashlib.sha256(repr(item.part_names).encode())
    for array in (item.part_mask, item.counterparts):
        described = None if array is None else (array.dtype.str, array.shape)
        digest.update(repr(described).encode() + (b"" if array is None else array.tobytes()))
    return digest.hexdigest()[:16]


def _bytes(parts: Parts) -> int:
    return sum(array.nbytes for array in parts if array is not None)
