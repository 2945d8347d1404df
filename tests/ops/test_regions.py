"""Regions of the picture on grids of tokens, against areas in whole numbers, pixel by pixel."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headscope
from headscope import GroupEntropy, GroupMass, Regions
from headscope.zoo import open_group

NAMES = ("left", "right", "sky")


def overlap(token: int, tokens: int, pixel: int, pixels: int) -> Fraction:
    """The length that a token and a pixel share of an edge of length 1."""
    start = max(Fraction(token, tokens), Fraction(pixel, pixels))
    return max(Fraction(0), min(Fraction(token + 1, tokens), Fraction(pixel + 1, pixels)) - start)


def region_of_token(mask: np.ndarray, grid: tuple[int, int], place: tuple[int, int], least: Fraction) -> int:
    """The rule in words: the largest share wins; then the lower number; none last; `least` of the token at least."""
    height, width = mask.shape
    shares = dict.fromkeys([*range(len(NAMES)), -1], Fraction(0))
    for row in range(height):
        down = overlap(place[0], grid[0], row, height)
        for column in range(width):
            shares[int(mask[row, column])] += down * overlap(place[1], grid[1], column, width)
    whole = sum(shares.values())
    largest = max(shares.values())
    first = next(region for region, share in shares.items() if share == largest)
    return first if largest >= least * whole else -1


@st.composite
def pictures(draw):
    samples, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    numbers = draw(st.lists(st.integers(-1, 2), min_size=samples * height * width, max_size=samples * height * width))
    return np.array(numbers, np.int64).reshape(samples, height, width)


@settings(max_examples=80, deadline=None)
@given(pictures(), st.integers(1, 7), st.integers(1, 7), st.sampled_from([(0, 1), (1, 2), (3, 4), (1, 1)]))
def test_a_token_belongs_to_the_region_that_covers_most_of_it(masks, height, width, least):
    """Any masks on any grid, finer and coarser; ties are common among numbers as small as these."""
    least = Fraction(*least)
    found = Regions(torch.from_numpy(masks), NAMES, least=float(least)).on_grid((height, width))
    expected = [
        [
            region_of_token(mask, (height, width), (row, column), least)
            for row in range(height)
            for column in range(width)
        ]
        for mask in masks
    ]
    assert found.dtype == torch.int32
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("mask", "token"),
    [
        ([[0, 0], [1, 1]], 0),  # two regions, half each: the lower number
        ([[2, 1], [1, 2]], 1),
        ([[-1, -1], [2, 2]], 2),  # a region comes before none
        ([[-1, -1], [-1, 2]], -1),
        ([[-1, -1], [0, 1]], -1),  # none covers most
        ([[-1, 0], [1, 2]], 0),
    ],
)
def test_ties(mask, token):
    assert Regions(torch.tensor([mask]), NAMES).on_grid((1, 1)).tolist() == [[token]]


def test_a_region_may_have_to_cover_more():
    mask = torch.tensor([[[0, 0, 0, 1]]])
    for least, token in ((0, 0), (0.75, 0), (0.76, -1), (1, -1)):
        assert Regions(mask, NAMES, least=least).on_grid((1, 1)).tolist() == [[token]]
    assert Regions(mask, NAMES, least=1).on_grid((1, 2)).tolist() == [[0, -1]]


def test_grids_are_worked_out_once():
    regions = Regions(torch.zeros(1, 4, 4, dtype=torch.uint8), NAMES)
    assert regions.on_grid((2, 2)) is regions.on_grid((2, 2))
    # an ordinary tensor, wherever it was made
    with torch.inference_mode():
        assert not regions.on_grid((3, 2)).is_inference()


@dataclass
class Drawn:
    key: str
    part_mask: np.ndarray | None
    part_names: tuple[str, ...] = NAMES
    counterparts: np.ndarray | None = None


def related(regions: Regions) -> list:
    assert regions.counterparts is not None
    return regions.counterparts.tolist()


def test_counterparts_are_those_of_pixels():
    mask = np.array([[0, 1, 2]], np.uint8)
    # the first pixel is tied to the second, the second to both others
    pixels = np.array([[[1, -1], [0, 2], [-1, -1]]], np.int32)
    regions = Regions.of([Drawn("a/0", mask, counterparts=pixels), Drawn("a/1", mask)])
    assert related(regions) == [
        [[False, True, False], [True, False, True], [False, False, False]],
        [[False] * 3] * 3,
    ]
    assert Regions.of([Drawn("a/0", mask)]).counterparts is None
    some = regions.only(["sky", "right"])
    assert some.masks.tolist() == [[[-1, 1, 0]]] * 2
    assert related(some) == [[[False, False], [True, False]], [[False, False], [False, False]]]
    again = regions.take([1, 0, 0])
    assert again.masks.shape == (3, 1, 3)
    assert [one != [[False] * 3] * 3 for one in related(again)] == [False, True, True]
    named = Regions(torch.from_numpy(mask)[None], NAMES, {"left": ["right", "sky"], "sky": "left"})
    assert related(named) == [[[False, True, True], [False, False, False], [True, False, False]]]


@pytest.mark.parametrize(
    ("group", "pairs"),
    [
        ("twins", {(a, b) for a in range(1, 5) for b in range(1, 5) if a != b}),
        ("mirrored", {(a, (a + 2) % 6 + 1) for a in range(1, 7)}),
    ],
)
def test_of_the_zoo_s_items(group, pairs):
    opened = open_group(group)
    items = [opened.item(index) for index in (0, 3)]
    regions = Regions.of(items)
    assert regions.names == opened.part_names
    assert regions.masks.tolist() == np.stack([item.part_mask for item in items]).tolist()
    for relation in related(regions):
        found = {(one, other) for one, other in np.argwhere(relation).tolist()}
        # a ring of a mirrored image may lie outside of it
        assert found <= pairs
        assert len(found) >= len(pairs) - 2
    assert Regions.of([open_group("faces").item(0)]).counterparts is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda mask: Regions(mask[0], NAMES), ValueError, r"masks: got shape \[2, 2\], expected \[samples or 1"),
        (lambda mask: Regions(mask.float(), NAMES), TypeError, "masks: got torch.float32, expected an integer tensor"),
        (lambda mask: Regions(mask + 2, NAMES), ValueError, "masks: got numbers from 2 to 4, expected 0 to 2"),
        (lambda mask: Regions(mask - 2, NAMES), ValueError, "masks: got numbers from -2 to 0"),
        (
            lambda mask: Regions(mask, ["a", "b", "a"]),
            ValueError,
            "names: got .*, expected at least one name, each once",
        ),
        (lambda mask: Regions(mask, "abc"), TypeError, "names: got 'abc', expected a list of texts"),
        (lambda mask: Regions(mask, NAMES, least=1.5), ValueError, "least: got 1.5, expected a share"),
        (
            lambda mask: Regions(mask, NAMES, {"left": ["down"]}),
            ValueError,
            "counterparts: got 'down', expected some of",
        ),
        (
            lambda mask: Regions(mask, NAMES, torch.ones(2, 2, dtype=torch.bool)),
            ValueError,
            r"counterparts: got torch.bool of shape \[2, 2\], expected bool \[1 or 1, 3, 3\]",
        ),
        (lambda mask: Regions(mask, NAMES).only(["down"]), ValueError, "parts: got 'down', expected some of left"),
        (lambda mask: Regions(mask, NAMES).take([1]), ValueError, "samples: got 1, expected 0 to 0"),
        (lambda mask: Regions(mask, NAMES).take([]), ValueError, "samples: got none"),
        (lambda mask: GroupMass(Regions(mask, NAMES), 3), ValueError, "count: got 3 with regions, expected none"),
        (lambda mask: GroupMass(mask[0, 0]), ValueError, "count: got None, expected the number of groups"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(torch.tensor([[[0, 1], [2, 0]]]))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "items: got none"),
        ([Drawn("lfw/3", None)], "items: 'lfw/3' has no part mask"),
        (
            [Drawn("a/0", np.zeros((2, 2), np.uint8)), Drawn("a/1", np.zeros((2, 3), np.uint8))],
            r"items: 'a/1' has a mask of shape \[2, 3\], expected \[2, 2\]",
        ),
        (
            [Drawn("a/0", np.zeros((2, 2), np.uint8)), Drawn("b/1", np.zeros((2, 2), np.uint8), ("x",))],
            "items: 'b/1' has the parts .*, expected those of the first one",
        ),
        ([Drawn("a/0", np.zeros((2, 2), np.uint8), ())], "names: got none, and 'a/0' doesn't say"),
    ],
)
def test_items_that_do_not_fit_are_named(items, message):
    with pytest.raises(ValueError, match=message):
        Regions.of(items)


@pytest.mark.parametrize("kind", [GroupMass, GroupEntropy])
def test_the_operator_takes_the_groups_of_keys_alone(kind):
    regions = Regions(torch.zeros(1, 2, 2, dtype=torch.uint8), NAMES)
    tensors = [torch.ones(1, 1, 4, 8)] * 3
    with pytest.raises(ValueError, match=r"has regions of the picture, .*; expected the group of each key here"):
        headscope.attention(*tensors, statistics=[kind(regions)])
    whole = kind(regions).of_keys(torch.zeros(1, 4, dtype=torch.int32))
    assert headscope.attention(*tensors, statistics=[whole]).statistics[whole.name].shape == (1, 1, 4, 3)
