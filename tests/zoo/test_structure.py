"""Groups with tied parts and their controls: the tie, counterparts, parts, and the same statistics of pixels."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.zoo import Item, Tied, open_group
from headscope.zoo.structure import EYE_PARTS

PAIRS = {"twins": "distinct", "mirrored": "unmirrored", "tiled": "untiled", "eyes": "odd_eyes"}
EXACT = ("twins", "mirrored", "tiled")
EVERY = tuple(name for pair in PAIRS.items() for name in pair)
indices = st.integers(0, 1999)


def masks(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Its part mask and counterparts."""
    assert item.part_mask is not None
    assert item.counterparts is not None
    return item.part_mask, item.counterparts


def tied_pixels(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel that has a counterpart, and that counterpart: flat positions, [pairs]."""
    _, counterparts = masks(item)
    flat = counterparts.reshape(-1, counterparts.shape[-1])
    pixel, column = np.nonzero(flat >= 0)
    return pixel, flat[pixel, column]


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=15, deadline=None)
@given(index=indices)
def test_counterparts_are_of_each_other(name, index):
    item = open_group(name).item(index)
    one, other = tied_pixels(item)
    assert len(one) > 0
    assert not np.any(one == other)
    assert set(zip(one, other, strict=True)) == set(zip(other, one, strict=True))
    # -1 only behind the counterparts, each of which comes once
    _, counterparts = masks(item)
    flat = counterparts.reshape(-1, counterparts.shape[-1])
    assert np.all(np.diff((flat >= 0).astype(int), axis=1) <= 0)
    assert len(set(zip(one, other, strict=True))) == len(one)


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=15, deadline=None)
@given(index=indices)
def test_tied_pixels_are_equal_and_the_controls_are_not(name, index):
    tied, control = open_group(name).item(index), open_group(PAIRS[name]).item(index)
    for item, least, most in ((tied, 1.0, 1.0), (control, 0.0, 0.2)):
        one, other = tied_pixels(item)
        pixels = item.image.reshape(-1, 3)
        assert least <= (pixels[one] == pixels[other]).all(1).mean() <= most


def test_eyes_have_one_colour_or_two():
    left, right = EYE_PARTS.index("left eye"), EYE_PARTS.index("right eye")
    apart = {}
    for name in ("eyes", "odd_eyes"):
        items = [open_group(name).item(index) for index in range(24)]
        attributes = [item.attributes or {} for item in items]
        alike = [each["eye_colour"] == each["right_eye_colour"] for each in attributes]
        assert alike == [name == "eyes"] * 24
        # the median leaves pupils and glints out
        colours = np.array(
            [[np.median(item.image[masks(item)[0] == eye], 0) for eye in (left, right)] for item in items]
        )
        apart[name] = np.median(np.abs(colours[:, 0] - colours[:, 1]).mean(1))
    # light falls from one side and hair casts shadows
    assert apart["eyes"] < 30 < 45 < apart["odd_eyes"]


@pytest.mark.parametrize("name", EVERY)
def test_every_pixel_has_a_part_and_glyphs_have_counterparts(name):
    group = open_group(name)
    seen = set()
    for index in range(8):
        item = group.item(index)
        mask, counterparts = masks(item)
        assert item.image.dtype == mask.dtype == np.uint8
        assert counterparts.dtype == np.int32
        assert mask.max() < len(group.part_names)
        seen |= set(np.unique(mask).tolist())
        has = (counterparts >= 0).any(-1)
        named = np.array(group.part_names)[mask]
        if name in ("twins", "distinct"):
            np.testing.assert_array_equal(has, named != "background")
            assert [(named == f"glyph {number}").sum() for number in range(1, 5)] == [36] * 4
        elif name in ("mirrored", "unmirrored"):
            np.testing.assert_array_equal(has, named != "unpaired")
        elif name in ("tiled", "untiled"):
            # the counterparts of a pixel are in its own quarter of the tile
            one, other = tied_pixels(item)
            assert (named.ravel()[one] == named.ravel()[other]).all()
        else:
            np.testing.assert_array_equal(has, np.char.endswith(named, " eye"))
    assert len(seen) == len(group.part_names)


def glyph_places(name: str, index: int) -> np.ndarray:
    return np.array((open_group(name).item(index).attributes or {})["places"])


@settings(max_examples=20, deadline=None)
@given(index=indices, name=st.sampled_from(["twins", "distinct"]))
def test_glyphs_stand_far_apart_and_begin_anywhere(index, name):
    places = glyph_places(name, index)
    assert places.shape == (4, 2)
    assert (places >= 0).all()
    assert (places <= 26).all()
    assert len({tuple(place % 4) for place in places}) == 1
    apart = np.abs(places[:, None] - places[None]).max(-1)
    assert apart[~np.eye(4, dtype=bool)].min() >= 12


def test_glyphs_begin_at_every_offset_from_the_patches():
    offsets = {tuple(glyph_places("twins", index)[0] % 4) for index in range(200)}
    assert len(offsets) == 16


# radial bands, in cycles per image: [low, high); a tile has no structure wider than itself, so that below 2.5 cycles a
# repeated one has less power than its control
BANDS = (0.5, 2.5, 4.5, 8.5, 16.5)
# the number of images, and the largest accepted departure of the ratio of the mean power in each band from 1
BOUNDS = {
    "twins": (1000, (0.15, 0.15, 0.15, 0.15)),
    "mirrored": (400, (0.15, 0.1, 0.1, 0.1)),
    "tiled": (400, (0.8, 0.35, 0.15, 0.15)),
    "eyes": (60, (0.25, 0.25, 0.15, 0.15)),
}


# a thousand images, or slow ones
SLOW = ("twins", "eyes")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in SLOW else name for name in PAIRS]
)
def test_a_group_and_its_control_have_the_same_statistics_of_pixels(name):
    count, bounds = BOUNDS[name]
    moments, histograms, powers = [], [], []
    for group in (open_group(name), open_group(PAIRS[name])):
        images = np.stack([group.item(index).image for index in range(count)]).astype(np.float64) / 255.0
        moments.append(np.stack([images.mean((0, 1, 2)), images.std((0, 1, 2))]))
        histograms.append(
            np.stack([np.histogram(images[..., c], 8, (0, 1))[0] / images[..., c].size for c in range(3)])
        )
        power = (np.abs(np.fft.fft2(images, axes=(1, 2))) ** 2).mean((0, 3))
        across = np.fft.fftfreq(32) * 32
        radius = np.hypot(across[:, None], across[None])
        powers.append([power[(radius >= low) & (radius < high)].mean() for low, high in pairwise(BANDS)])
    # levels from 0 to 1; of twins one colour makes most of an image, and there are few eyes: their means vary most
    np.testing.assert_allclose(moments[0], moments[1], atol=0.04)
    np.testing.assert_allclose(histograms[0], histograms[1], atol=0.06 if name == "eyes" else 0.04)
    ratio = np.array(powers[0]) / np.array(powers[1])
    assert (np.abs(ratio - 1.0) <= bounds).all(), ratio


@pytest.mark.parametrize("name", EVERY)
def test_splits_share_no_source_and_every_hundred_are_divided_alike(name):
    group = open_group(name)
    assert len(group) == 2000
    splits = {split: group.indices(split) for split in ("train", "discover", "confirm")}
    assert {split: len(members) for split, members in splits.items()} == {
        "train": 1200,
        "discover": 400,
        "confirm": 400,
    }
    assert len({group.item(index).source_id for index in range(0, 2000, 97)}) == len(range(0, 2000, 97))
    assert [sum(index < 100 for index in members) for members in splits.values()] == [60, 20, 20]


@pytest.mark.parametrize("size", [16, 48, 64])
@pytest.mark.parametrize("name", PAIRS)
def test_other_sizes(name, size):
    small, item = open_group(name).item(3), open_group(name, size=size).item(3)
    assert item.image.shape == (size, size, 3)
    (small_mask, small_counterparts), (mask, counterparts) = masks(small), masks(item)
    assert mask.shape == (size, size)
    assert counterparts.shape[:2] == (size, size)
    # the pixel in the middle of the old one
    for row, column in ((5, 9), (20, 14), (31, 0)):
        at = (2 * row + 1) * size // 64, (2 * column + 1) * size // 64
        near = (2 * at[0] + 1) * 16 // size, (2 * at[1] + 1) * 16 // size
        assert mask[at] == small_mask[near]
        old, new = small_counterparts[near], counterparts[at]
        assert (old >= 0).sum() == (new >= 0).sum()
        for before, after in zip(old[old >= 0], new[new >= 0], strict=True):
            assert (2 * (before // 32) + 1) * size // 64 == after // size
            assert (2 * (before % 32) + 1) * size // 64 == after % size


# recorded once
DIGESTS = {
    "twins": "6cb0aaf03d74",
    "distinct": "3ea11c7e9c72",
    "mirrored": "cfcdec0d4961",
    "unmirrored": "5801c692bcb0",
    "tiled": "039bc22470d6",
    "untiled": "e42a8b23d4d3",
    "eyes": "23b57607f2a6",
    "odd_eyes": "d8ca1cbba4e4",
}


def test_the_bytes_are_the_same_everywhere():
    digests = {}
    for name in EVERY:
        digest = hashlib.sha256()
        for index in (0, 7, 1234):
            item = open_group(name).item(index)
            mask, counterparts = masks(item)
            for array in (item.image, mask, counterparts.astype("<i4")):
                digest.update(array.tobytes())
        digests[name] = digest.hexdigest()[:12]
    assert digests == DIGESTS


def test_what_a_group_is_of_the_other():
    for name, control in PAIRS.items():
        tied, untied = open_group(name), open_group(control)
        assert isinstance(tied, Tied)
        assert isinstance(untied, Tied)
        assert (tied.control, untied.control) == (control, "")
        assert tied.part_names == untied.part_names
        assert not tied.augmented
        assert not {tied.item(i).image.tobytes() for i in range(5)} & {untied.item(i).image.tobytes() for i in range(5)}
