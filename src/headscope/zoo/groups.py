"""Image groups: small sets of images addressed by an integer, each with its source and its split.

A *source* is what an image came from: a photograph, an identity, a file. A split never shares a source with another,
so what is learned or selected on one is tested on material that had no part in it.

Every resampling is Pillow's bicubic filter on 8-bit values. When it shrinks an image it widens the filter by the same
factor (antialiasing), and it computes in fixed point, so that every machine gets the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from headscope._extras import require
from headscope._images import nearest_parts, read_image, resized
from headscope.counter import counter_permutation, counter_uniform
from headscope.zoo.base import SPLITS, ImageGroup, Item, checked_size
from headscope.zoo.contrast import with_common_histogram
from headscope.zoo.faces import PART_NAMES, face_attributes, render_face
from headscope.zoo.folders import FolderGroup
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

# of every hundred sources: 60 train, 20 discover, 20 confirm
_SPLIT_OF_RANK = ("train",) * 60 + ("discover",) * 20 + ("confirm",) * 20


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
    group.size = checked_size(size)
    return group
