"""What an image group is: images addressed by an integer, each with its source and its split."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from headscope.counter import whole

__all__ = ["SPLITS", "ImageGroup", "Item", "checked_size"]

SPLITS = ("train", "discover", "confirm")


@dataclass(frozen=True, eq=False)
class Item:
    """One image of a group and what is known of it."""

    group: str
    index: int
    source_id: str  # the photograph, identity or file that the image came from
    split: str  # "train", "discover" or "confirm"
    image: np.ndarray = field(repr=False)  # uint8 [size, size, 3]
    caption: str = ""
    attributes: dict[str, Any] | None = field(default=None, repr=False)
    part_mask: np.ndarray | None = field(default=None, repr=False)  # uint8 [size, size], indices of part_names
    # int32 [size, size, n]: of each pixel, the pixels that its group's tie is to (row * size + column), then -1
    counterparts: np.ndarray | None = field(default=None, repr=False)
    part_names: tuple[str, ...] = field(default=(), repr=False)  # the group's, where the item has a part mask

    @property
    def key(self) -> str:
        """The item's address, as in "faces/3": the key of its noise."""
        return f"{self.group}/{self.index}"


class ImageGroup(ABC):
    """A finite set of images. Item i is the same on every machine and whatever the group's length.

    Attributes:
        name: the group's name.
        description: what it is, in a line.
        augmented: True if training may flip and shift its images.
        note: what lies beside its images and isn't read, for a person to know; "" where nothing does.
    """

    name: str
    description: str
    note: str = ""
    augmented: bool = True
    part_names: tuple[str, ...] = ()

    def __init__(self, length: int, size: int = 32) -> None:
        length = whole("length", length)
        if length < 1:
            raise ValueError(f"length: got {length}, expected at least 1")
        self.length = length
        self.size = checked_size(size)

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} images of {self.size} x {self.size})"

    @abstractmethod
    def _source(self, index: int) -> tuple[str, str]:
        """Source and split of an item, without its image."""

    @abstractmethod
    def _load(self, index: int) -> Item:
        """The item itself; `index` is valid."""

    def item(self, index: int) -> Item:
        """Item `index`, 0 <= index < len(group). Raises IndexError outside, TypeError for what is no whole number."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 to {len(self) - 1} in the group {self.name!r}")
        item = self._load(index)
        known = item.part_mask is None or item.part_names
        return item if known else replace(item, part_names=self.part_names)

    def indices(self, split: str | None = None) -> list[int]:
        """Indices of one split's items, or of all; ascending. Raises ValueError for an unknown split."""
        _check_split(split)
        return [index for index in range(len(self)) if split is None or self._source(index)[1] == split]

    def sources(self, split: str | None = None) -> list[str]:
        """Source ids of one split, or of all, each once, in the order of their first items."""
        return list(dict.fromkeys(self._source(index)[0] for index in self.indices(split)))


def checked_size(size: int) -> int:
    size = whole("size", size)
    if size < 8:
        raise ValueError(f"size: got {size}, expected at least 8 pixels")
    return size


def _check_split(split: str | None) -> None:
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected None or one of {', '.join(SPLITS)}")
