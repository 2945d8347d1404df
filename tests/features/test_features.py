"""Which features an item has, and which of its pixels are of one."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from headscope.features import (
    BUILT_IN,
    columns_of,
    described,
    feature_map,
    feature_maps,
    has_feature,
    on_tokens,
    pixels_of,
)
from headscope.zoo import open_group

OF_IMAGES = (
    *("edge", "edge orientation", "texture", "luminance", "red against green", "yellow against blue", "saturation"),
)


@dataclass
class Pictured:
    """An item."""

    image: Any
    key: str = "mine/3"
    part_mask: Any = None
    part_names: tuple[str, ...] = ()
    counterparts: Any = None


@pytest.fixture
def picture():
    image = np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8)
    mask = np.zeros((6, 8), np.uint8)
    mask[:3, :4], mask[3:, 5:] = 1, 2
    ties = np.full((6, 8, 2), -1, np.int32)
    ties[0, 0, 0] = 29
    return Pictured(image, part_mask=mask, part_names=("background", "leaf", "far twig"), counterparts=ties)


@pytest.mark.parametrize(
    ("group", "further"),
    [
        ("lfw", ()),
        ("twins", ("object", "boundary", *(f"part glyph {number}" for number in range(1, 5)))),
        ("tiled", ("boundary", *(f"part {row} {side}" for row in ("upper", "lower") for side in ("left", "right")))),
        (
            "faces",
            (
                *("object", "boundary", "part clothes", "part skin", "part hair", "part brows", "part eyes"),
                *("part nose", "part mouth", "part glasses"),
            ),
        ),
    ],
)
def test_the_maps_of_the_zoo_s_items(group, further):
    item = open_group(group).item(2)
    found = feature_maps(item)
    assert tuple(found) == (*OF_IMAGES, *further)
    for name, values in found.items():
        assert values.dtype == np.float64
        assert values.shape == (32, 32)
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(values, feature_map(item, name))
        assert has_feature(item, name)
        if described(name).mask:
            assert set(np.unique(values)) <= {0, 1}
    if "object" in further:
        # the background is all that is no object: it has no map
        np.testing.assert_array_equal(found["object"], sum(found[name] for name in further if name[:5] == "part "))


def test_masks(picture):
    found = feature_maps(picture)
    np.testing.assert_array_equal(found["part leaf"], picture.part_mask == 1)
    np.testing.assert_array_equal(found["part far twig"], picture.part_mask == 2)
    np.testing.assert_array_equal(found["object"], picture.part_mask > 0)
    assert found["boundary"][0, 3] == found["boundary"][0, 4] == 1
    assert found["boundary"][0, 2] == found["boundary"][0, 5] == 0
    np.testing.assert_array_equal(feature_map(picture, "part background"), picture.part_mask == 0)
    expected = np.zeros((6, 8), bool)
    expected[0, 0] = True
    np.testing.assert_array_equal(pixels_of(picture, "counterpart"), expected)
    # of one part beside the background the object says the same
    picture.part_names, picture.part_mask = ("background", "leaf"), picture.part_mask % 2
    assert tuple(feature_maps(picture)) == (*OF_IMAGES, "object", "boundary")
    # and of parts without a background there is no object
    picture.part_names = ("ground", "leaf")
    assert tuple(feature_maps(picture)) == (*OF_IMAGES, "boundary", "part ground", "part leaf")


def test_pixels(picture):
    """Of masks the mask, of others the top quarter; none where the item has nothing of it."""
    edge = feature_map(picture, "edge")
    found = pixels_of(picture, "edge")
    assert found.sum() == 12
    assert edge[found].min() > edge[~found].max()
    np.testing.assert_array_equal(pixels_of(picture, "part leaf"), picture.part_mask == 1)
    assert not pixels_of(picture, "part stem").any()
    picture.part_mask, picture.counterparts = None, None
    for name in ("object", "boundary", "counterpart", "part leaf"):
        assert not has_feature(picture, name)
        found = pixels_of(picture, name, grid=(3, 4))
        assert found.shape == (3, 4)
        assert not found.any()
        with pytest.raises(ValueError, match=f"feature: got '{name}', which 'mine/3' has nothing of"):
            feature_map(picture, name)
    # nothing is the most of what is everywhere the same
    picture.image = np.full((6, 8, 3), 9, np.uint8)
    assert not pixels_of(picture, "luminance").any()


def test_places_of_latents(picture):
    """A mask's are those that it covers half of; of other maps the means count."""
    np.testing.assert_array_equal(
        pixels_of(picture, "part leaf", grid=(2, 2)), np.array([[True, False], [False, False]])
    )
    # 3 of 4 columns of the last rows' right half, and 1.5 of 2 rows of a third
    np.testing.assert_array_equal(
        pixels_of(picture, "part far twig", grid=(3, 2)), np.array([[False, False], [False, False], [False, True]])
    )
    coarse = on_tokens(feature_map(picture, "texture"), (3, 4))
    found = pixels_of(picture, "texture", grid=(3, 4))
    assert found.sum() == 3
    assert coarse[found].min() > coarse[~found].max()


def test_features_of_the_user_s_own(picture):
    own = {"dark": lambda item: item.image.sum(2) < 100, "red": lambda item: item.image[..., 0]}
    found = feature_maps(picture, own)
    assert tuple(found)[-2:] == ("dark", "red")
    np.testing.assert_array_equal(found["red"], picture.image[..., 0])
    np.testing.assert_array_equal(found["dark"], picture.image.sum(2) < 100)
    np.testing.assert_array_equal(pixels_of(picture, "dark", own), picture.image.sum(2) < 100)
    # numbers are no mask, even where they are 0 and 1
    ones = {"ones": lambda item: (item.image[..., 0] > 10).astype(int)}
    np.testing.assert_array_equal(pixels_of(picture, "ones", ones), picture.image[..., 0] > 10)
    assert described("dark", ["dark"]).description == "dark, a feature of the user's own"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((6, 7)), "features: own gave of 'mine/3' an array [6, 7], expected [6, 8], as the image has"),
        (np.zeros((6, 8, 1)), "features: own gave of 'mine/3' an array [6, 8, 1], expected [6, 8], as the image has"),
        (None, "features: own gave of 'mine/3' an array of dtype object, expected real numbers"),
        (np.zeros((6, 8), complex), "features: own gave of 'mine/3' an array of dtype complex128, expected real"),
        (np.full((6, 8), np.nan), "features: own gave of 'mine/3' numbers that aren't finite, expected finite ones"),
        ([[1, 2], [3]], "features: own gave of 'mine/3' list, expected an array [6, 8]"),
    ],
)
def test_a_function_that_gives_no_map_is_named(picture, values, said):
    own = {"own": lambda item: values}
    for call in (lambda: feature_maps(picture, own), lambda: pixels_of(picture, "own", own)):
        with pytest.raises(ValueError, match="^" + re.escape(said)):
            call()


def test_unknown_features_and_items_without_an_image(picture):
    said = r"feature: got 'edges', expected one of edge, .*, counterpart, or part NAME"
    for call in (has_feature, feature_map, pixels_of):
        with pytest.raises(ValueError, match=said):
            call(picture, "edges")
    with pytest.raises(ValueError, match="feature: got 'edges'"):
        described("edges")
    picture.image = None
    with pytest.raises(ValueError, match="item: 'mine/3' has no image, expected one"):
        feature_maps(picture)


def test_names():
    assert columns_of("part far twig") == tuple(f"{what}_on_part_far_twig" for what in ("clean", "edited", "share"))
    for name in BUILT_IN:
        feature = described(name)
        assert feature.name == name
        assert feature.description
        assert feature.unit
