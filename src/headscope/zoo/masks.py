"""Part masks of a folder of images, which lie in a folder beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from headscope._files import read_plain
from headscope._images import central_square, nearest_parts, read_indices

# added to the name of a folder of images
BESIDE = ".parts"
NAMES = "names.json"
# of 8 bits
MOST = 256


class MaskFolder:
    """The masks of the images in a folder: `photographs.parts` of `photographs`.

    It holds `names.json`, a list of the parts' names, and for every image a PNG of the same path and size, but for the
    ending, whose pixels are indices of the names: `photographs.parts/day/1.png` of `photographs/day/1.jpg`. Levels of
    grey of 8 bits count as they are, and colours by their place in the palette. A first part called "background" is
    what belongs to nothing.

    Args:
        folder: of the masks.
        files: the images' paths, relative to theirs.

    Attributes:
        names: of the parts.

    Raises:
        ValueError: no names, an image without a mask, or two that would share one; names them.
    """

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._folder = folder
        self.names = _names(folder / NAMES)
        of_mask: dict[str, str] = {}
        for file in files:
            mask = _mask_of(file)
            if mask in of_mask:
                raise ValueError(f"path: the mask {mask!r} would be of {of_mask[mask]!r} and of {file!r}, expected one")
            of_mask[mask] = file
        missing = [mask for mask in of_mask if not (folder / mask).is_file()]
        if missing:
            raise ValueError(
                f"path: {str(folder)!r} lacks the masks of {len(missing)} of {len(files)} images, the first"
                f" {missing[0]!r} of {of_mask[missing[0]]!r}; expected one of each"
            )

    def of(self, file: str, shape: tuple[int, int], size: int) -> np.ndarray:
        """The mask of an image, cropped as it is, at another size: uint8 [size, size].

        Args:
            shape: (height, width) of the image as a viewer shows it.

        Raises:
            ValueError: it can't be read, has another size than the image, or an index that no part has.
        """
        name = _mask_of(file)
        try:
            mask = read_indices(read_plain(self._folder / name))
        except (OSError, ValueError) as error:
            raise ValueError(f"path: the mask {name!r} in {str(self._folder)!r} can't be read: {error}") from error
        if mask.shape != shape:
            raise ValueError(
                f"path: the mask {name!r} in {str(self._folder)!r} has {mask.shape[0]} x {mask.shape[1]} pixels,"
                f" expected {shape[0]} x {shape[1]}, as {file!r} has"
            )
        if mask.max() >= len(self.names):
            raise ValueError(
                f"path: the mask {name!r} in {str(self._folder)!r} has a pixel of part {mask.max()}, expected 0 to"
                f" {len(self.names) - 1}, those of {NAMES}"
            )
        return nearest_parts(central_square(mask), None, size)[0]


def _mask_of(file: str) -> str:
    return str(PurePosixPath(file).with_suffix(".png"))


def _names(path: Path) -> tuple[str, ...]:
    try:
        found = json.loads(read_plain(path).decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"path: {str(path)!r} can't be read, expected a list of the parts' names ({error})") from None
    texts = isinstance(found, list) and all(isinstance(name, str) and name for name in found)
    if not texts or not 1 <= len(found) <= MOST or len(set(found)) != len(found):
        raise ValueError(f"path: {str(path)!r} holds {found!r}, expected a list of 1 to {MOST} names, each once")
    return tuple(found)
