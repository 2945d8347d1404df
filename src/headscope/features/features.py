"""The features there are, and those of an item: what its image shows, and what is known of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from headscope._shapes import Bool, Float64, UInt8
from headscope.features import pixels
from headscope.features.tokens import on_tokens, top_quarter

# before a part's name, what the feature of its pixels is called
PART = "part "
OBJECT, BOUNDARY, COUNTERPART = "object", "boundary", "counterpart"
# how the columns begin that hold scores on a feature's pixels, before its name with _ for spaces
ON_FEATURE = ("clean_on_", "edited_on_", "share_on_")
# what the first part of a group is called where it is no part of anything
BACKGROUND = "background"

# a feature of the user's own: numbers [height, width] of an item
OwnFeature = Callable[[Any], Any]


class FeatureItem(Protocol):
    """What features are taken of; the zoo's items and those of sweeps are such.

    Attributes:
        key: its name, for errors.
        image: uint8 [height, width, 3].
        part_mask: integers [height, width], indices of part_names; None where nothing is known of parts.
        part_names: their names; none without a mask.
        counterparts: integers [height, width, n], the pixels that each pixel's tie is to, then -1; None without ties.
    """

    @property
    def key(self) -> str: ...
    @property
    def image(self) -> np.ndarray | None: ...
    @property
    def part_mask(self) -> np.ndarray | None: ...
    @property
    def part_names(self) -> tuple[str, ...]: ...
    @property
    def counterparts(self) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Feature:
    """What a map of numbers over an image is of.

    Attributes:
        name: what it is called.
        description: in words, with its formula.
        unit: of its numbers.
        mask: True if it says of each pixel whether it belongs to something, by 1 or 0.
    """

    name: str
    description: str
    unit: str
    mask: bool = False


_IMAGE: tuple[tuple[Feature, Callable[[UInt8[np.ndarray, "height width 3"]], Float64[np.ndarray, "height width"]]], ...]
_IMAGE = (
    (
        Feature(
            "edge",
            "edge strength: sqrt(gx^2 + gy^2) of the luminance's gradient by Sobel's filter, over 8",
            "luminance per pixel",
        ),
        pixels.edge,
    ),
    (
        Feature(
            "edge orientation",
            "upright against level edges: (gx^2 - gy^2) / sqrt(gx^2 + gy^2), which is the edge strength times the"
            " cosine of twice the gradient's angle: above 0 where edges are upright, below 0 where they are level",
            "luminance per pixel",
        ),
        pixels.edge_orientation,
    ),
    (
        Feature(
            "texture",
            "texture energy: the smaller eigenvalue of the mean of [gx, gy]^T [gx, gy] over 5 x 5 pixels (the structure"
            " tensor of Foerstner and of Harris): the variation that is left along the direction in which there is"
            " least of it, so 0 along a straight edge; corners have some, too",
            "squared luminance per squared pixel",
        ),
        pixels.texture,
    ),
    (
        Feature("luminance", "luminance: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)", "0 to 1"),
        pixels.luminance,
    ),
    (
        Feature("red against green", "colour, first opponent axis: R - G", "-1 to 1"),
        pixels.red_against_green,
    ),
    (
        Feature("yellow against blue", "colour, second opponent axis: (R + G) / 2 - B", "-1 to 1"),
        pixels.yellow_against_blue,
    ),
    (
        Feature("saturation", "saturation: (max - min) / max of R, G and B, 0 where all are 0 (HSV's)", "0 to 1"),
        pixels.saturation,
    ),
)
_OBJECT = Feature(
    OBJECT, "object against ground: pixels of any part but the first, which is the background", "0 or 1", mask=True
)
_BOUNDARY = Feature(
    BOUNDARY, "boundary of parts: pixels one of whose four neighbours is of another part", "0 or 1", mask=True
)
_COUNTERPART = Feature(COUNTERPART, "pixels that have counterparts elsewhere in the image", "0 or 1", mask=True)
_OF_IMAGE = {feature.name: (feature, formula) for feature, formula in _IMAGE}
_OF_PARTS = {feature.name: feature for feature in (_OBJECT, _BOUNDARY, _COUNTERPART)}
# the names that features of the user's own can't have; those of parts begin with PART
BUILT_IN = (*_OF_IMAGE, *_OF_PARTS)


def feature_maps(
    item: FeatureItem, own: Mapping[str, OwnFeature] | None = None
) -> dict[str, Float64[np.ndarray, "height width"]]:
    """An item's maps by their features' names, of what a key may show: [height, width], masks as 0 and 1.

    Those of the image; where the item has a part mask "boundary", "part NAME" for every part and, where the first part
    is "background", "object"; and the user's own. What says the same as another is left out: the background, which is
    all that is no object, and the part of an image with one part beside the background. So is "counterpart", which is
    of a query and its keys and not of keys alone.

    Args:
        own: features of the user's own, by name.

    Raises:
        ValueError: the item has no image, or one of the user's functions gave no map of it.
    """
    names = [*_OF_IMAGE]
    if item.part_mask is not None:
        parts = [name for name in item.part_names if not (_has_background(item) and name == BACKGROUND)]
        names += [OBJECT] if _has_background(item) else []
        names += [BOUNDARY]
        names += [PART + name for name in parts if not (_has_background(item) and len(parts) == 1)]
    return {name: feature_map(item, name, own) for name in [*names, *(own or {})]}


def feature_map(
    item: FeatureItem, name: str, own: Mapping[str, OwnFeature] | None = None
) -> Float64[np.ndarray, "height width"]:
    """An item's map of one feature, [height, width]; masks as 0 and 1.

    Raises:
        ValueError: an unknown feature, one that the item has nothing of (`has_feature`), no image, or a function of the
            user's gave no map.
    """
    image = _image(item)
    if own and name in own:
        return _checked(item, name, own[name](item), image.shape[:2]).astype(np.float64)
    if name in _OF_IMAGE:
        return _OF_IMAGE[name][1](image)
    if not has_feature(item, name):
        raise ValueError(f"feature: got {name!r}, which {item.key!r} has nothing of")
    mask = item.part_mask
    assert mask is not None
    if name == OBJECT:
        return (mask != 0).astype(np.float64)
    if name == BOUNDARY:
        return pixels.boundary(mask).astype(np.float64)
    if name == COUNTERPART:
        ties = item.counterparts
        assert ties is not None
        return np.any(ties >= 0, axis=-1).astype(np.float64)
    return (mask == item.part_names.index(name.removeprefix(PART))).astype(np.float64)


def has_feature(item: FeatureItem, name: str, own: Sequence[str] = ()) -> bool:
    """True if an item has a feature of that name, or one of the user's own is called so.

    Raises:
        ValueError: no feature is called so.
    """
    if name in own or name in _OF_IMAGE:
        return True
    if name not in _OF_PARTS and not name.startswith(PART):
        raise ValueError(f"feature: got {name!r}, expected one of {', '.join([*BUILT_IN, *own])}, or {PART}NAME")
    if item.part_mask is None:
        return False
    if name == COUNTERPART:
        return item.counterparts is not None
    if name == OBJECT:
        return _has_background(item)
    return name == BOUNDARY or name.removeprefix(PART) in item.part_names


def pixels_of(
    item: FeatureItem,
    name: str,
    own: Mapping[str, OwnFeature] | None = None,
    grid: tuple[int, int] | None = None,
) -> Bool[np.ndarray, "rows columns"]:
    """An item's pixels of a feature: those of the mask, or the top quarter of the map (`top_quarter`).

    "counterpart" is of the pixels that have counterparts. None are, where the item has nothing of the feature.

    Args:
        own: features of the user's own, by name; one that gives bool is a mask.
        grid: (height, width) of places to say it of instead of pixels, such as those of latents: of a mask those that
            it covers at least half of, of another map the top quarter of its means over the places.

    Raises:
        ValueError: an unknown feature, no image, or a function of the user's gave no map.
    """
    shape = _image(item).shape[:2]
    grid = (int(shape[0]), int(shape[1])) if grid is None else grid
    if not has_feature(item, name, tuple(own or {})):
        return np.zeros(grid, bool)
    if own and name in own:
        given = _checked(item, name, own[name](item), shape)
        values, mask = given.astype(np.float64), given.dtype == bool
    else:
        values, mask = feature_map(item, name), described(name).mask
    if grid != shape:
        values = on_tokens(values, grid)
    return np.asarray(values >= 0.5) if mask else top_quarter(values)


def described(name: str, own: Sequence[str] = ()) -> Feature:
    """What the feature of a name is.

    Raises:
        ValueError: no feature is called so.
    """
    if name in own:
        return Feature(name, f"{name}, a feature of the user's own", "the user's")
    if name in _OF_IMAGE:
        return _OF_IMAGE[name][0]
    if name in _OF_PARTS:
        return _OF_PARTS[name]
    if name.startswith(PART):
        return Feature(name, f"pixels of the part {name.removeprefix(PART)!r}", "0 or 1", mask=True)
    raise ValueError(f"feature: got {name!r}, expected one of {', '.join([*BUILT_IN, *own])}, or {PART}NAME")


def columns_of(name: str) -> tuple[str, str, str]:
    """The columns of a table that has scores "on" a feature: the loss over its pixels of the clean and of the edited
    prediction, and which share of the item's pixels they are."""
    clean, edited, share = (f"{column}{name.replace(' ', '_')}" for column in ON_FEATURE)
    return clean, edited, share


def _has_background(item: FeatureItem) -> bool:
    return item.part_mask is not None and item.part_names[:1] == (BACKGROUND,)


def _image(item: FeatureItem) -> np.ndarray:
    if item.image is None:
        raise ValueError(f"item: {item.key!r} has no image, expected one")
    return item.image


def _checked(item: FeatureItem, name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """What a function of the user's gave of an item, if it is a map of finite real numbers."""
    where = f"features: {name} gave of {item.key!r}"
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} {type(values).__name__}, expected an array [{shape[0]}, {shape[1]}]") from error
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{where} an array of dtype {found.dtype}, expected real numbers")
    if found.shape != shape:
        raise ValueError(f"{where} an array {list(found.shape)}, expected {list(shape)}, as the image has")
    if not np.isfinite(found).all():
        raise ValueError(f"{where} numbers that aren't finite, expected finite ones")
    return found
