"""Image groups: small sets of images addressed by an integer, each with its source and its split.

A *source* is what an image came from: a photograph, an identity, a file. A split never shares a source with another,
so what is learned or selected on one is tested on material that had no part in it.

Every resampling is Pillow's bicubic filter on 8-bit values. When it shrinks an image it widens the filter by the same
factor (antialiasing), and it computes in fixed point, so that every machine gets the same bytes.
"""

from __future__ import annotations

import hashlib
import math
import operator
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from headscope._extras import require
from headscope._files import is_utf8, local_path, read_plain
from headscope._images import nearest_parts, read_image, read_square, resized
from headscope.counter import counter_permutation, counter_uniform, whole
from headscope.zoo.contrast import with_common_histogram
from headscope.zoo.faces import PART_NAMES, face_attributes, render_face
from headscope.zoo.structure import (
    EYE_PARTS,
    GLYPH_PARTS,
    MIRROR_PARTS,
    SIZE,
    TILE_PARTS,
    Drawing,
    draw_eyes,
    draw_glyphs,
    draw_mirrored,
    draw_tiles,
)

__all__ = [
    "GROUPS",
    "SPLITS",
    "Faces",
    "FacesGrey",
    "FacesGreyMatched",
    "FolderGroup",
    "ImageGroup",
    "Item",
    "Lfw",
    "LfwMatched",
    "Photographs",
    "Tied",
    "open_group",
]

SPLITS = ("train", "discover", "confirm")
# of every hundred sources: 60 train, 20 discover, 20 confirm
_SPLIT_OF_RANK = ("train",) * 60 + ("discover",) * 20 + ("confirm",) * 20


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
        self.size = _checked_size(size)

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


def _checked_size(size: int) -> int:
    size = whole("size", size)
    if size < 8:
        raise ValueError(f"size: got {size}, expected at least 8 pixels")
    return size


def _check_split(split: str | None) -> None:
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected None or one of {', '.join(SPLITS)}")


@lru_cache(maxsize=1024)
def _split_block(name: str, block: int) -> tuple[str, ...]:
    """The splits of the sources 100 * block ... 100 * block + 99 of a group."""
    ranks = counter_permutation("split", name, block, count=len(_SPLIT_OF_RANK))
    return tuple(_SPLIT_OF_RANK[rank] for rank in ranks)


def _split_of_source(name: str, source: int) -> str:
    return _split_block(name, source // 100)[source % 100]


def _grey_patch(image: np.ndarray, size: int) -> np.ndarray:
    """The path of the LFW patches: 8-bit grey, 25 x 25, resampled to `size`, repeated as three channels."""
    small = image if image.shape == (25, 25) else resized(image, 25)
    grey = resized(small, size)
    return np.repeat(grey[..., None], 3, axis=-1)


class Faces(ImageGroup):
    """Procedural faces; one source is one identity."""

    name = "faces"
    description = "Procedurally generated colour faces with controlled attributes and a part mask"
    part_names = PART_NAMES

    def __init__(self, length: int = 100, size: int = 32) -> None:
        super().__init__(length, size)

    def _source(self, index: int) -> tuple[str, str]:
        # the grey group asks under the same name, so both split alike
        return f"identity-{index:05d}", _split_of_source("faces", index)

    def _image(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return render_face(face_attributes(index), self.size)

    def _load(self, index: int) -> Item:
        source, split = self._source(index)
        attributes = face_attributes(index)
        image, mask = self._image(index)
        return Item(self.name, index, source, split, image, _face_caption(attributes), attributes, mask)


def _face_caption(attributes: dict[str, Any]) -> str:
    hair = "no hair" if attributes["hair_style"] == "bald" else f"{attributes['hair_style']} hair"
    extras = [f"{attributes['glasses']} glasses"] if attributes["glasses"] != "none" else []
    extras += [f"a {attributes['facial_hair']}"] if attributes["facial_hair"] != "none" else []
    return ", ".join([f"a drawn face with {hair}", *extras])


class FacesGrey(Faces):
    """The procedural faces through the exact path of the LFW patches: item i is face i."""

    name = "faces_grey"
    description = "The procedural faces made grey and resampled through 25 x 25, exactly as the LFW patches are"

    def _image(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        pil = require("PIL.Image", "study")
        image, mask = render_face(face_attributes(index), 32)
        if self.size != 32:
            _, mask = render_face(face_attributes(index), self.size)
        return _grey_patch(np.asarray(pil.fromarray(image).convert("L")), self.size), mask


class Lfw(ImageGroup):
    """The 100 faces of scikit-image's lfw_subset: 25 x 25 grey patches of Labeled Faces in the Wild.

    The subset does not say whose faces they are. A patch is therefore taken as its own source; two patches may show
    one person, and intervals over sources are that much too narrow.
    """

    name = "lfw"
    description = "100 grey face patches of Labeled Faces in the Wild; identities unknown, a patch counts as its source"

    def __init__(self, length: int = 100, size: int = 32) -> None:
        if length > 100:
            raise ValueError(f"length: got {length}, expected at most 100, the faces in the subset")
        super().__init__(length, size)

    def _source(self, index: int) -> tuple[str, str]:
        return f"lfw-{index:03d}", _split_of_source("lfw", index)

    def _load(self, index: int) -> Item:
        source, split = self._source(index)
        image = _grey_patch(_lfw_patches()[index], self.size)
        return Item(self.name, index, source, split, image, "a grey photograph of a face")


@lru_cache(maxsize=1)
def _lfw_patches() -> np.ndarray:
    """The subset, uint8 [200, 25, 25]; the first hundred are faces."""
    patches = require("skimage.data", "study").lfw_subset()
    if np.issubdtype(patches.dtype, np.floating):
        # stored as 0 to 1, whatever its documentation says
        patches = np.floor(patches.astype(np.float64) * 255.0 + 0.5).astype(np.uint8)
    return patches


class LfwMatched(Lfw):
    """The LFW patches with the histogram that `FacesGreyMatched` has, too: item i is that of `Lfw`."""

    name = "lfw_matched"
    description = "The LFW patches with one common histogram, the same as that of faces_grey_matched"

    def _load(self, index: int) -> Item:
        item = super()._load(index)
        return replace(item, image=with_common_histogram(item.image))


class FacesGreyMatched(FacesGrey):
    """The grey faces with the histogram that `LfwMatched` has, too: item i is face i."""

    name = "faces_grey_matched"
    description = "The grey procedural faces with one common histogram, the same as that of lfw_matched"

    def _image(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = super()._image(index)
        return with_common_histogram(image), mask


class Tied(ImageGroup):
    """Images with far parts that are tied to each other, or the control without the tie; see `headscope.zoo.structure`.

    One source is one image. A group and its control share no image and no identity.

    Attributes:
        control: the name of the group's control; of a control, "".
    """

    augmented = False

    def __init__(
        self,
        name: str,
        description: str,
        draw: Callable[[str, int, bool], Drawing],
        part_names: tuple[str, ...],
        control: str = "",
        caption: str = "",
        length: int = 2000,
        size: int = 32,
    ) -> None:
        self.name, self.description, self.part_names, self.control = name, description, part_names, control
        self._draw, self._caption = draw, caption
        super().__init__(length, size)

    def _source(self, index: int) -> tuple[str, str]:
        return f"{self.name}-{index:05d}", _split_of_source(self.name, index)

    def _load(self, index: int) -> Item:
        source, split = self._source(index)
        image, mask, counterparts, attributes = self._draw(self.name, index, bool(self.control))
        if self.size != SIZE:
            image, (mask, counterparts) = resized(image, self.size), nearest_parts(mask, counterparts, self.size)
        return Item(self.name, index, source, split, image, self._caption, attributes, mask, counterparts)


_PHOTOGRAPHS = (
    ("chelsea", "chelsea.png", "train", "a cat"),
    ("coffee", "coffee.png", "train", "a cup of coffee"),
    ("motorcycle", "motorcycle_left.png", "train", "a motorcycle"),
    ("rocket", "rocket.jpg", "discover", "a rocket on its launch pad"),
    ("astronaut", "astronaut.png", "confirm", "an astronaut"),
)


class Photographs(ImageGroup):
    """Square crops, at several scales, of the five colour photographs in scikit-image's wheel.

    Item i is a crop of photograph i % 5. Its side is 0.2 + 0.8 u^2 of the photograph's shorter side, u uniform from 0
    to 1; nearly uniform crops (empty sky) are drawn again. With five sources, and one in each held-out split, this
    group is for illustration: it carries no interval.
    """

    name = "photographs"
    description = "Crops of scikit-image's colour photographs; the photograph is the source"

    def __init__(self, length: int = 100, size: int = 32) -> None:
        super().__init__(length, size)

    def _source(self, index: int) -> tuple[str, str]:
        name, _, split, _ = _PHOTOGRAPHS[index % len(_PHOTOGRAPHS)]
        return name, split

    def _load(self, index: int) -> Item:
        name, file, split, subject = _PHOTOGRAPHS[index % len(_PHOTOGRAPHS)]
        photograph = _photograph(file)
        height, width = photograph.shape[:2]
        for attempt in range(12):
            u, v, w = (
                float(x) for x in counter_uniform("photographs", name, index // len(_PHOTOGRAPHS), attempt, shape=3)
            )
            side = int(min(height, width) * (0.2 + 0.8 * u * u))
            left, top = int(v * (width - side + 1)), int(w * (height - side + 1))
            image = resized(photograph[top : top + side, left : left + side], self.size)
            if _has_content(image):
                break
        attributes = {"left": left, "top": top, "side": side}
        return Item(self.name, index, name, split, image, f"a crop of a photograph of {subject}", attributes)


def _has_content(image: np.ndarray) -> bool:
    """True if the channels' mean varies by a standard deviation of more than 24 levels, decided in integers."""
    brightness = image.astype(np.int64).sum(axis=-1)
    count = brightness.size
    return int(count * (brightness * brightness).sum() - brightness.sum() ** 2) > (3 * 24 * count) ** 2


@lru_cache(maxsize=8)
def _photograph(file: str) -> np.ndarray:
    """One of scikit-image's photographs, uint8 [height, width, 3]."""
    folder = Path(str(require("skimage.data", "study").__file__)).parent
    return read_image(folder / file)


class FolderGroup(ImageGroup):
    """Any folder of images, searched recursively and sorted by relative path; one source is one file.

    Links to files and folders are followed; a folder that is met twice, as in a circle of links, is read once.
    Half of the sources are for discovery and half for confirmation, by a hash of the relative path; none is for
    training. An image is cropped to its central square and resized; `headscope._images` says how other kinds than 8-bit
    RGB become that, and which are refused.
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
            image = read_square(read_plain(self.folder / source), self.size)
        except (OSError, ValueError) as error:
            raise ValueError(f"path: the file {source!r} of the group {self.name!r} can't be read: {error}") from error
        return Item(self.name, index, source, split, image)


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


# of each tied group: its control, how it is drawn, its parts, what it and its control are
_TIES: tuple[tuple[str, str, Callable[[str, int, bool], Drawing], tuple[str, ...], str, str], ...] = (
    ("twins", "distinct", draw_glyphs, GLYPH_PARTS, "Four copies of one random glyph", "Four different random glyphs"),
    (
        *("mirrored", "unmirrored", draw_mirrored, MIRROR_PARTS),
        *("A random texture and its mirror image about an upright axis", "A random texture without symmetry"),
    ),
    (
        *("tiled", "untiled", draw_tiles, TILE_PARTS),
        *("A random tile, repeated", "A random texture of a tile's grain that never repeats"),
    ),
    (
        *("eyes", "odd_eyes", draw_eyes, EYE_PARTS),
        *("Drawn faces with large eyes of one random colour", "Drawn faces with large eyes of two random colours"),
    ),
)


def _tied() -> dict[str, Callable[[], ImageGroup]]:
    groups: dict[str, Callable[[], ImageGroup]] = {}
    for name, control, draw, parts, tied, untied in _TIES:
        groups[name] = partial(Tied, name, f"{tied} (control: {control})", draw, parts, control, tied.lower())
        groups[control] = partial(Tied, control, f"{untied} (control of {name})", draw, parts, "", untied.lower())
    return groups


GROUPS: dict[str, Callable[[], ImageGroup]] = {
    "faces": Faces,
    "faces_grey": FacesGrey,
    "lfw": Lfw,
    "photographs": Photographs,
    **_tied(),
    # for comparing groups, and no model's to be trained on
    "lfw_matched": LfwMatched,
    "faces_grey_matched": FacesGreyMatched,
}


def open_group(name: str, path: str | Path | None = None, size: int = 32) -> ImageGroup:
    """A built-in group by its name, or, given a path, that folder's images under the name.

    name: one of GROUPS, or any name when `path` is given. size: pixels to a side of the square images.
    Raises ValueError for an unknown name; see FolderGroup for what a folder must hold.
    """
    if path is not None:
        return FolderGroup(path, name, size)
    if name not in GROUPS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(GROUPS)}, or a path to a folder of images")
    group = GROUPS[name]()
    group.size = _checked_size(size)
    return group
