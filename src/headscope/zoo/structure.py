"""Images whose far parts are tied to each other, so that only attention can carry what one part tells of another.

Each tied group has a control that is drawn by the same process without the tie: the same colours, shapes and places,
the same mean power spectrum within the bounds that the tests state, and the same parts and counterparts. What a model
does on the one and not on the other, it does because of the tie.

Images are 32 x 32 and drawn with additions, multiplications and roundings alone, in a fixed order, so that every
machine gets the same bytes; at other sizes they are these, resampled. What is tied stands whole patches of 4 pixels
apart, wherever in the image it begins: a transformer over such patches sees copies of a patch, where it would have to
shift and cut them otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headscope.counter import counter_integers, counter_uniform
from headscope.zoo.faces import PART_NAMES, eye_centres, face_attributes, render_face

__all__ = [
    "EYE_PARTS",
    "GLYPH_PARTS",
    "MIRROR_PARTS",
    "TILE_PARTS",
    "Drawing",
    "draw_eyes",
    "draw_glyphs",
    "draw_mirrored",
    "draw_tiles",
]

# image uint8 [32, 32, 3], part mask uint8 [32, 32], counterparts int32 [32, 32, n], attributes
Drawing = tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]

SIZE = 32
# what is tied stands whole patches apart: the bundled transformer sees patches, of so many pixels
_PATCH = 4
GLYPHS = 4
# a glyph is 3 x 3 cells of 2 x 2 pixels
_CELLS, _CELL = 3, 2
_EDGE = _CELLS * _CELL
# from one glyph's corner to another's, across or down, at least
_APART = 12
GLYPH_PARTS = ("background", *(f"glyph {number}" for number in range(1, GLYPHS + 1)))
MIRROR_PARTS = ("unpaired", *(f"{side} {ring}" for side in ("left", "right") for ring in ("near", "middle", "far")))
TILE_PARTS = ("upper left", "upper right", "lower left", "lower right")
EYE_PARTS = (*(name for name in PART_NAMES if name not in ("eyes", "glasses")), "left eye", "right eye")
# of the tied and the untied ones: other groups have other identities
_FIRST_IDENTITY = {True: 1_000_000, False: 2_000_000}


def draw_glyphs(name: str, index: int, alike: bool) -> Drawing:
    """Four random glyphs at random places on one colour: four times the same one, or four different ones.

    The first stands anywhere; from glyph to glyph it is a multiple of 4 pixels, and at least 12 across or down.

    Parts: 0 the background, 1 to 4 the glyphs. The counterparts of a glyph's pixel are the pixels at the same place of
    the three others.
    """
    key = ("structure", name, index)
    levels = counter_uniform(*key, "glyphs", shape=(GLYPHS, _CELLS, _CELLS, 3))
    cells = np.floor((levels[[0] * GLYPHS] if alike else levels) * 256.0).astype(np.uint8)
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    image[:] = np.floor(counter_uniform(*key, "background", shape=3) * 256.0).astype(np.uint8)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    counterparts = np.full((SIZE, SIZE, GLYPHS - 1), -1, np.int32)
    places = _places(key)
    # [glyphs, edge, edge]: the pixels of each glyph, in one order
    rows, columns = np.mgrid[:_EDGE, :_EDGE]
    pixels = np.stack([(top + rows) * SIZE + left + columns for top, left in places])
    for glyph, (top, left) in enumerate(places):
        inside = np.s_[top : top + _EDGE, left : left + _EDGE]
        image[inside] = cells[glyph].repeat(_CELL, 0).repeat(_CELL, 1)
        mask[inside] = glyph + 1
        counterparts[inside] = np.moveaxis(np.delete(pixels, glyph, 0), 0, -1)
    return image, mask, counterparts, {"places": [list(map(int, place)) for place in places]}


def _places(key: tuple[str | int, ...]) -> np.ndarray:
    """The glyphs' upper left corners (row, column), integers [glyphs, 2], far enough apart, in a random order."""
    offset = counter_integers(*key, "offset", high=_PATCH, shape=2)
    room = (SIZE - _EDGE - offset) // _PATCH + 1
    for attempt in range(10_000):
        drawn = np.floor(counter_uniform(*key, "places", attempt, shape=(GLYPHS, 2)) * room).astype(np.int64) * _PATCH
        apart = np.abs(drawn[:, None] - drawn[None]).max(-1) + _APART * np.eye(GLYPHS, dtype=np.int64)
        if apart.min() >= _APART:
            return drawn + offset
    # less often than once in 10^40
    raise RuntimeError(f"structure: found no place for the glyphs of {key}")


def _smooth(lattice: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A lattice's values, [height, width, 3], between its points by cubic steps, at (row, column) in its own units.

    The lattice repeats itself.
    """
    height, width = lattice.shape[:2]
    top, left = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    v, u = (rows - top)[..., None], (columns - left)[..., None]
    v, u = v * v * (3.0 - 2.0 * v), u * u * (3.0 - 2.0 * u)
    above, below, before, after = top % height, (top + 1) % height, left % width, (left + 1) % width
    upper = lattice[above, before] * (1.0 - u) + lattice[above, after] * u
    lower = lattice[below, before] * (1.0 - u) + lattice[below, after] * u
    return upper * (1.0 - v) + lower * v


def _as_image(values: np.ndarray) -> np.ndarray:
    return np.floor(values * 255.0 + 0.5).astype(np.uint8)


def draw_mirrored(name: str, index: int, alike: bool) -> Drawing:
    """A random texture that is its own mirror image about an upright axis, or one that isn't.

    The axis stands in the middle of the image, or 2 or 4 pixels from it to either side. Parts: 0 what has no
    counterpart in the image, then three rings to each side of the axis, of 4, 4 and the remaining pixels. A pixel's
    counterpart is its mirror image.
    """
    key = ("structure", name, index)
    # in half pixels: a pixel and its mirror image add up to it
    axis = SIZE - 1 + _PATCH * (int(counter_integers(*key, "axis", high=5)) - 2)
    columns = np.arange(SIZE)
    mirrored = axis - columns
    paired = (mirrored >= 0) & (mirrored < SIZE) & (mirrored != columns)
    phase = counter_uniform(*key, "phase", shape=2)
    # points of the lattice are 2.5 pixels apart
    drawn = np.minimum(columns, mirrored) if alike else columns
    # both sides of the axis can be the shorter one: coordinates from -SIZE
    where_rows, where_columns = np.meshgrid(np.arange(SIZE) / 2.5, (drawn + SIZE) / 2.5, indexing="ij")
    lattice = counter_uniform(*key, "texture", shape=(16, 32, 3))
    image = _as_image(_smooth(lattice, where_rows + phase[0], where_columns + phase[1]))
    distance = np.abs(mirrored - columns)
    ring = np.where(distance <= 8, 0, np.where(distance <= 16, 1, 2))
    part = np.where(paired, 1 + ring + 3 * (columns > mirrored), 0)
    mask = np.repeat(part[None], SIZE, 0).astype(np.uint8)
    rows = np.arange(SIZE)[:, None] * SIZE
    counterparts = np.where(paired, rows + mirrored, -1).astype(np.int32)[..., None]
    return image, mask, counterparts, {"axis": axis / 2}


def draw_tiles(name: str, index: int, alike: bool) -> Drawing:
    """A random tile that is repeated over the image, or a texture of the same grain that never repeats.

    The periods are 8 or 12 pixels, upright and across, and the tiles begin anywhere. Parts: the quarters of a tile. A
    pixel's counterparts are the pixels that are whole periods away.
    """
    key = ("structure", name, index)
    periods = _PATCH * (counter_integers(*key, "periods", high=2, shape=2) + 2)
    start = np.floor(counter_uniform(*key, "start", shape=2) * periods).astype(np.int64)
    points = 4
    # the control's lattice repeats far outside of the image
    tiles = 1 if alike else 8
    drawn = counter_uniform(*key, "texture", shape=(tiles, points, tiles, points, 3))
    # of one mean, all tiles: nothing of a repeated one has a period longer than it
    centred = drawn - drawn.mean((1, 3), keepdims=True)
    colour = 0.3 + 0.4 * counter_uniform(*key, "colour", shape=3)
    lattice = np.clip(colour + centred, 0.0, 1.0).reshape(points * tiles, points * tiles, 3)
    along = [(np.arange(SIZE) + start[axis]) * points / periods[axis] for axis in (0, 1)]
    image = _as_image(_smooth(lattice, *np.meshgrid(*along, indexing="ij")))
    places = [(np.arange(SIZE) + start[axis]) % periods[axis] for axis in (0, 1)]
    late = [place * 2 >= period for place, period in zip(places, periods, strict=True)]
    mask = (2 * late[0][:, None] + late[1][None]).astype(np.uint8)
    counterparts = _repeats(periods)
    attributes = {"period": [int(period) for period in periods], "start": [int(place) for place in start]}
    return image, mask, counterparts, attributes


def _repeats(periods: np.ndarray) -> np.ndarray:
    """The pixels of the image that are whole periods away from each, int32 [32, 32, n], -1 where there are fewer."""
    most = [(SIZE - 1) // int(period) for period in periods]
    down, across = np.meshgrid(np.arange(-most[0], most[0] + 1), np.arange(-most[1], most[1] + 1), indexing="ij")
    steps = np.stack([down.ravel(), across.ravel()], -1)
    steps = steps[(steps != 0).any(-1)] * periods
    rows = np.arange(SIZE)[:, None, None] + steps[:, 0]
    columns = np.arange(SIZE)[None, :, None] + steps[:, 1]
    inside = (rows >= 0) & (rows < SIZE) & (columns >= 0) & (columns < SIZE)
    found = np.where(inside, rows * SIZE + columns, -1)
    # those inside first, in the order of the image
    found = np.sort(np.where(found < 0, SIZE * SIZE, found), axis=-1)
    widest = int(inside.sum(-1).max())
    return np.where(found == SIZE * SIZE, -1, found)[..., :widest].astype(np.int32)


def draw_eyes(name: str, index: int, alike: bool) -> Drawing:
    """A drawn face with large eyes of one random colour, or of two.

    Parts: those of drawn faces without glasses, each eye its own. The counterparts of an eye's pixel are all pixels
    of the other eye: it is their colour that is tied.
    """
    key = ("structure", name, index)
    colours = counter_uniform(*key, "eyes", shape=(2, 3))
    attributes = face_attributes(_FIRST_IDENTITY[alike] + index) | {
        "glasses": "none",
        "eye_size": 0.17 + 0.03 * float(counter_uniform(*key, "size")),
        "eye_spacing": 0.25,
        "eye_openness": 0.9,
        "gaze": 0.0,
        "iris": 1.0,
        "eye_colour": [float(level) for level in colours[0]],
        "right_eye_colour": [float(level) for level in colours[0 if alike else 1]],
    }
    image, drawn = render_face(attributes, SIZE)
    # the parts of all faces, by the names of this group; the glasses' number doesn't occur
    renumbered = np.array([EYE_PARTS.index(part) if part in EYE_PARTS else 0 for part in PART_NAMES], np.uint8)
    mask = renumbered[drawn]
    eyes = drawn == PART_NAMES.index("eyes")
    axis = (np.arange(SIZE) * 2 + 1) / SIZE - 1.0
    left, right = (
        (axis[None] - x) * (axis[None] - x) + (axis[:, None] - y) * (axis[:, None] - y)
        for x, y in eye_centres(attributes)
    )
    mask[eyes] = np.where(left <= right, EYE_PARTS.index("left eye"), EYE_PARTS.index("right eye"))[eyes]
    pixels = [np.flatnonzero(mask == EYE_PARTS.index(f"{side} eye")).astype(np.int32) for side in ("left", "right")]
    counterparts = np.full((SIZE * SIZE, max(map(len, pixels))), -1, np.int32)
    for own, others in (pixels, pixels[::-1]):
        counterparts[own, : len(others)] = others
    return image, mask, counterparts.reshape(SIZE, SIZE, -1), attributes
