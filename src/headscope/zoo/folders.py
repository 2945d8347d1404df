"""A folder of images as a group."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from functools import cached_property
from pathlib import Path

from headscope._files import is_utf8, local_path, read_plain
from headscope._images import central_square, read_image, resized
from headscope.zoo.base import ImageGroup, Item
from headscope.zoo.masks import BESIDE, MaskFolder

__all__ = ["FolderGroup", "check_names"]


class FolderGroup(ImageGroup):
    """Any folder of images, searched recursively and sorted by relative path; one source is one file.

    Links to files and folders are followed; a folder that is met twice, as in a circle of links, is read once.
    Half of the sources are for discovery and half for confirmation, by a hash of the relative path; none is for
    training. An image is cropped to its central square and resized; `headscope._images` says how other kinds than 8-bit
    RGB become that, and which are refused. A folder of masks beside it says what its parts are
    (`headscope.zoo.masks.MaskFolder`).
    """

    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

    def __init__(self, path: str | Path, name: str | None = None, size: int = 32) -> None:
        folder = local_path("path", path)
        if not folder.is_dir():
            raise FileNotFoundError(f"path: got {str(path)!r}, expected an existing folder of images")
        every = _files_below(folder)
        self.files = sorted(file for file in every if Path(file).suffix.lower() in self.suffixes)
        if not self.files:
            raise ValueError(
                f"path: got {str(path)!r}, which holds no image, expected files ending in {', '.join(self.suffixes)}"
            )
        check_names(self.files)
        self.folder = folder
        self.name = name or folder.resolve().name
        self.description = f"{len(self.files)} images of a folder"
        masks = Path(os.path.abspath(folder) + BESIDE)
        self._masks = MaskFolder(masks, self.files) if masks.is_dir() else None
        if self._masks is not None:
            self.part_names = self._masks.names
            self.description += f", with masks of {len(self.part_names)} part(s)"
        self.note = _unread(set(every) - set(self.files))
        super().__init__(len(self.files), size)

    @cached_property
    def _splits(self) -> list[str]:
        # ranked by hash, so that the halves are equal; an odd one goes to discovery
        order = sorted(range(len(self.files)), key=lambda i: hashlib.sha256(self.files[i].encode()).digest())
        splits = ["confirm"] * len(order)
        for index in order[: math.ceil(len(order) / 2)]:
            splits[index] = "discover"
        return splits

    def _source(self, index: int) -> tuple[str, str]:
        return self.files[index], self._splits[index]

    def _load(self, index: int) -> Item:
        source, split = self._source(index)
        try:
            image = read_image(read_plain(self.folder / source))
        except (OSError, ValueError) as error:
            raise ValueError(f"path: the file {source!r} of the group {self.name!r} can't be read: {error}") from error
        mask = None if self._masks is None else self._masks.of(source, image.shape[:2], self.size)
        square = resized(central_square(image), self.size)
        return Item(self.name, index, source, split, square, part_mask=mask)


def _files_below(folder: Path) -> list[str]:
    """The paths, relative to a folder, of all that is in it and in the folders below, but for folders.

    Raises:
        OSError: a folder that can't be read.
        ValueError: a link that leads nowhere: whether to an image or to a folder of them, nobody can say. Hidden ones
            are left out: editors mark so which file is open.
    """
    found, seen = [], set()
    # folders that lie there keep their own names: links come last
    waiting, links = [""], []
    while waiting or links:
        name = waiting.pop() if waiting else links.pop()
        status = (folder / name).stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder / name) as entries:
            below = sorted(entries, key=lambda entry: entry.name, reverse=True)
        for entry in below:
            path = f"{name}/{entry.name}" if name else entry.name
            if entry.is_symlink() and not os.path.exists(entry.path):
                if entry.name.startswith("."):
                    continue
                raise ValueError(f"path: {entry.path!r} is a link that leads nowhere; mend or remove it")
            if entry.is_dir():
                (links if entry.is_symlink() else waiting).append(path)
            else:
                found.append(path)
    return found


def _unread(files: set[str]) -> str:
    """Of files that are no images of a known kind, how many of each ending there are; hidden ones aside."""
    counts = Counter(Path(file).suffix.lower() or Path(file).name for file in files if Path(file).name[0] != ".")
    if not counts:
        return ""
    # the most common first; folders list their files in any order
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    kinds = [f"{count} {ending}" for ending, count in ordered[:5]]
    others = sum(count for _, count in ordered[5:])
    return f"files of other endings are not read: {', '.join(kinds)}{f', {others} others' if others else ''}"


def check_names(names: list[str]) -> None:
    """Raises ValueError for the first name that isn't UTF-8: tables and manifests hold no other text."""
    for name in names:
        if not is_utf8(name):
            raise ValueError(f"path: the name of the file {os.fsencode(name)!r} isn't UTF-8, expected it renamed")
