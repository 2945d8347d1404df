"""Which tokens are counterparts of which, counted pixel by pixel, and what attention on them is held against."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from headscope.features import relation
from headscope.zoo import open_group

GROUPS = ("twins", "distinct", "tiled", "untiled", "mirrored", "unmirrored")
Pairs = Mapping[int, Mapping[int, float]]


def pairs_of(item: Any, grid: tuple[int, int]) -> tuple[Pairs, Pairs]:
    """Of every query that counts, its counterparts, each with weight 1; and the other keys with theirs."""
    mask, counterparts = item.part_mask, item.counterparts
    height, width = mask.shape

    def token(pixel: int) -> int:
        row, column = divmod(pixel, width)
        return int((row + 0.5) / height * grid[0]) * grid[1] + int((column + 0.5) / width * grid[1])

    pixels: dict[int, list[int]] = {}
    for pixel in range(height * width):
        pixels.setdefault(token(pixel), []).append(pixel)
    own: dict[int, set[int]] = {}
    part: dict[int, int] = {}
    for query, members in pixels.items():
        ties = {pixel: [int(tie) for tie in counterparts[divmod(pixel, width)] if tie >= 0] for pixel in members}
        met = Counter(key for of_pixel in ties.values() for key in {token(tie) for tie in of_pixel})
        own[query] = {key for key, number in met.items() if key != query and 2 * number >= len(members)}
        # those without ties have no keys to give, whatever part they are of
        parts = Counter(int(mask[divmod(pixel, width)]) for pixel, of_pixel in ties.items() if of_pixel)
        part[query] = min(parts, key=lambda one: (-parts[one], one)) if parts else 0
    found: dict[int, dict[int, float]] = {}
    others: dict[int, dict[int, float]] = {}
    for query, keys in own.items():
        if not keys:
            continue
        same = [other for other in own if part[other] == part[query]]
        rest = [other for other in own if other not in keys]
        for alike in (same, rest):
            weights = Counter(key for other in alike for key in own[other] if key != query and key not in keys)
            if weights:
                found[query] = dict.fromkeys(keys, 1.0)
                total = sum(weights.values())
                others[query] = {key: number * len(keys) / total for key, number in weights.items()}
                break
    return found, others


@dataclass
class Tied:
    """A picture of parts, some of whose pixels have counterparts."""

    part_mask: Any
    counterparts: Any


def assert_as_counted(item: Any, grid: tuple[int, int]) -> int:
    """How many queries count."""
    found = relation(item, grid)
    own, others = pairs_of(item, grid)
    if not own:
        assert found is None
        return 0
    assert found is not None
    assert found.queries == len(own)
    count = grid[0] * grid[1]
    for name, sets in (("own", own), ("other", others)):
        expected = np.zeros((count, count))
        for query, keys in sets.items():
            for key, weight in keys.items():
                expected[query, key] = weight / len(own)
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-12, err_msg=name)
    assert found.share == pytest.approx(sum(len(keys) for keys in own.values()) / len(own) / count)
    # uniform attention gives as much to the others as to a query's own
    assert found.other.sum() == pytest.approx(found.own.sum())
    return len(own)


@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (4, 4), (5, 7)])
@pytest.mark.parametrize("group", ["twins", "distinct", "mirrored", "tiled", "odd_eyes"])
def test_the_zoo_s_ties(group, grid):
    found = [assert_as_counted(open_group(group).item(index), grid) for index in range(3)]
    # fine enough for all but eyes, which hardly cover a token
    assert any(found) or grid != (16, 16) or group == "odd_eyes"


def test_half_of_a_token_s_pixels_say_whose_counterpart_it_is():
    """Of a picture of 2 x 8 pixels on 1 x 4 tokens of four pixels."""
    mask = np.array([[0, 0, 1, 1, 1, 1, 2, 2]] * 2, np.uint8)
    ties = np.full((2, 8, 1), -1, np.int32)
    # two of the first token's four pixels have counterparts in the second, one has one in the third
    ties[0, 0, 0], ties[1, 0, 0], ties[0, 1, 0] = 2, 3, 4
    # and all of the last one's in the third, which is the others' for want of another query of the first one's part
    ties[:, 6:, 0] = 5
    item = Tied(mask, ties)
    found = relation(item, (1, 4))
    assert found is not None
    assert found.queries == 2
    own, other = np.zeros((4, 4)), np.zeros((4, 4))
    own[0, 1] = own[3, 2] = other[0, 2] = other[3, 1] = 0.5
    np.testing.assert_array_equal(found.own, own)
    np.testing.assert_array_equal(found.other, other)
    assert assert_as_counted(item, (1, 4)) == 2


@pytest.mark.parametrize("seed", range(6))
def test_ties_at_random(seed):
    random = np.random.default_rng(seed)
    height, width = random.integers(3, 9, 2)
    ties = random.integers(-6, height * width, (height, width, 3)).clip(-1).astype(np.int32)
    # as the zoo has them: those there are come first
    ties = -np.sort(-ties, axis=-1)
    # neighbours are tied to neighbours, as a rule
    ties[1:, :, 0] = np.where(random.random((height - 1, width)) < 0.8, ties[:-1, :, 0], ties[1:, :, 0])
    item = Tied(random.integers(0, 3, (height, width)).astype(np.uint8), ties)
    for grid in ((2, 2), (3, 2), (1, 4)):
        assert_as_counted(item, grid)


def first(group):
    opened = open_group(group)
    return opened.item(opened.indices("discover")[0])


@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (5, 7)])
@pytest.mark.parametrize("group", GROUPS)
def test_what_is_the_same_for_own_and_other_keys_has_no_contrast(group, grid):
    found = relation(first(group), grid)
    if found is None:
        pytest.skip("nothing to tell apart on this grid")
    np.testing.assert_allclose(found.own.sum(1), found.other.sum(1), atol=1e-12)
    tokens = grid[0] * grid[1]
    uniform = np.full((tokens, tokens), 1 / tokens)
    assert abs(((found.own - found.other) * uniform).sum()) < 1e-12
    assert found.share == pytest.approx((found.own * uniform).sum())
    assert 0 < found.queries <= tokens
    # own counterparts, oneself, and what they are held against have nothing in common
    assert not ((found.own > 0) & (found.other > 0)).any()
    assert not np.diag(found.own + found.other).any()


def test_a_head_that_looks_at_any_glyph_has_no_contrast_and_one_that_copies_has():
    item = first("twins")
    found = relation(item, (16, 16))
    assert found is not None
    assert item.counterparts is not None
    tied = (item.counterparts[..., 0] >= 0).reshape(16, 2, 16, 2).all((1, 3)).ravel()
    glyphs = np.tile(tied / tied.sum(), (256, 1))
    copying = (found.own > 0) / np.maximum((found.own > 0).sum(1, keepdims=True), 1)
    assert abs(((found.own - found.other) * glyphs).sum()) < 1e-12
    assert ((found.own - found.other) * copying).sum() == pytest.approx(1.0)


def test_a_whole_part_with_one_set_of_counterparts_is_held_against_other_parts():
    """Two rows of two pixels, the upper left tied to the lower left, the others, too; each a part."""
    mask = np.array([[0, 1], [2, 3]], np.uint8)
    ties = np.array([[[2], [3]], [[0], [1]]], np.int32)
    found = relation(Tied(mask, ties), (2, 2))
    assert found is not None
    expected = np.zeros((4, 4))
    expected[[0, 1, 2, 3], [2, 3, 0, 1]] = 1 / 4
    np.testing.assert_array_equal(found.own, expected)
    # query 0's others are the counterparts of 1 and 3, which aren't its own: 3 and 1
    np.testing.assert_array_equal(found.other[0], [0, 1 / 8, 0, 1 / 8])


def test_items_without_ties_have_no_relation():
    mask = np.zeros((4, 4), np.uint8)
    nothing = np.full((4, 4, 1), -1, np.int32)
    for item in (Tied(None, None), Tied(mask, None), Tied(None, nothing), Tied(mask, nothing)):
        assert relation(item, (2, 2)) is None
