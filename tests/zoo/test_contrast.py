"""Groups with one common histogram: each image has it exactly, and pairs with the original."""

import numpy as np
import pytest

from headscope import zoo
from headscope.zoo.contrast import HISTOGRAM, with_common_histogram
from headscope.zoo.model import MODELS

PAIRS = {"lfw_matched": "lfw", "faces_grey_matched": "faces_grey"}


def quantiles(pixels: int) -> np.ndarray:
    """The levels of the common histogram at the middles of so many equal shares, by repeating every level."""
    every = np.repeat(np.arange(256), HISTOGRAM)
    return every[[(2 * rank + 1) * len(every) // (2 * pixels) for rank in range(pixels)]]


@pytest.mark.parametrize("name", PAIRS)
def test_every_image_has_the_common_histogram(name):
    group = zoo.open_group(name)
    expected = quantiles(32 * 32)
    for index in range(0, 100, 3):
        image = group.item(index).image
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        assert (image == image[..., :1]).all()
        np.testing.assert_array_equal(np.sort(image[..., 0].ravel()), expected)


@pytest.mark.parametrize(("name", "original"), PAIRS.items())
def test_items_pair_with_the_originals(name, original):
    matched, group = zoo.open_group(name), zoo.open_group(original)
    assert len(matched) == len(group)
    for split in (None, *zoo.SPLITS):
        assert matched.indices(split) == group.indices(split)
        assert matched.sources(split) == group.sources(split)
    for index in (0, 41, 99):
        one, two = matched.item(index), group.item(index)
        assert (one.source_id, one.split, one.caption) == (two.source_id, two.split, two.caption)
        assert one.key == f"{name}/{index}"
        assert one.part_names == two.part_names
        np.testing.assert_array_equal(one.part_mask, two.part_mask)
        # levels keep their order: a darker pixel never becomes a lighter one
        before, after = two.image[..., 0].ravel().astype(int), one.image[..., 0].ravel().astype(int)
        order = np.argsort(before, kind="stable")
        highest = [after[before == level].max() for level in np.unique(before)]
        lowest = [after[before == level].min() for level in np.unique(before)]
        assert all(high <= low for high, low in zip(highest[:-1], lowest[1:], strict=True))
        assert np.corrcoef(before[order], after[order])[0, 1] > 0.9
        assert not np.array_equal(one.image, two.image)


def test_the_histogram_is_that_of_both_groups_training_images():
    counts = np.zeros(256, np.int64)
    for name in PAIRS.values():
        group = zoo.open_group(name)
        for index in group.indices("train"):
            counts += np.bincount(group.item(index).image[..., 0].ravel(), minlength=256)
    np.testing.assert_array_equal(counts, HISTOGRAM)
    assert HISTOGRAM.sum() == 2 * 60 * 32 * 32


@pytest.mark.parametrize("size", [8, 17, 64])
def test_other_sizes_have_the_histogram_of_their_size(size):
    for name in PAIRS:
        image = zoo.open_group(name, size=size).item(5).image
        np.testing.assert_array_equal(np.sort(image[..., 0].ravel()), quantiles(size * size))


def test_pixels_of_one_level_are_ordered_by_what_is_around_them():
    """A flat image by place; a spot in it lifts the pixels beside it over those further away."""
    flat = with_common_histogram(np.full((9, 9, 3), 80, np.uint8))[..., 0].ravel()
    assert (np.diff(flat.astype(int)) >= 0).all()
    spot = np.full((9, 9, 3), 80, np.uint8)
    spot[4, 4] = 200
    found = with_common_histogram(spot)[..., 0]
    rows, columns = np.indices((9, 9))
    distance = np.maximum(abs(rows - 4), abs(columns - 4))
    assert found[4, 4] == found.max()
    assert found[distance == 1].min() >= found[distance == 2].max()
    assert found[distance == 2].min() >= found[distance > 2].max()


def test_an_image_in_colour_is_refused():
    image = np.zeros((8, 8, 3), np.uint8)
    image[2, 3, 1] = 1
    with pytest.raises(ValueError, match="image: its channels differ, expected a grey one"):
        with_common_histogram(image)


def test_no_model_is_trained_on_them():
    assert not {name for model in MODELS.values() for name in model.groups} & set(PAIRS)
