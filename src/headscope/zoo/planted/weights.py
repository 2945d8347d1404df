"""The weights of planted heads, written by hand: exact in float32, and but for signs powers of two.

A head's logits are q . k / sqrt(HEAD_DIM). Places and colour codes are bits of +-1, so the dot product of two of them
falls by 2 for each bit in which they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headscope.counter import counter_uniform
from headscope.zoo.planted.designs import (
    COORDINATE_BITS,
    DESIGNS,
    FIXED_KEY,
    FOLLOW,
    GAP,
    GRID,
    HEAD_DIM,
    RING_SQUARED,
    SLOTS,
    THRESHOLDS,
)

__all__ = ["FEATURES", "WIDTH", "Projections", "coordinate_bits", "places", "projections", "random_projections"]


class Projections(NamedTuple):
    """What a head's query, key and value are of a token's features, each float64 [HEAD_DIM, WIDTH]."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


def _features() -> dict[str, slice]:
    sizes = {
        "one": 1,
        "row": GRID,
        "column": GRID,
        "ring": 1,
        "channels": 3,
        "luminance": 1,
        "edge": 1,
        "code": 3 * len(THRESHOLDS),
        "code above": 3 * len(THRESHOLDS),
        "below": 1,
    }
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = slice(start, start + size)
        start += size
    return found


# where in the stream each feature of a token stands; what the heads write follows
FEATURES = _features()
WIDTH = max(part.stop for part in FEATURES.values())
_SCALE = HEAD_DIM**-0.5
# a query of bits: 2 * _ASKED * _SCALE = GAP
_ASKED = GAP / (2 * _SCALE)


def coordinate_bits(coordinate: int) -> np.ndarray:
    """A coordinate of the grid as bits of +-1, float64 [COORDINATE_BITS]."""
    return np.array([1.0 if coordinate >> bit & 1 else -1.0 for bit in range(COORDINATE_BITS)])


def places() -> np.ndarray:
    """What is fixed of each token's features, those of `one` to `ring`: float64 [tokens, features]."""
    rows, columns = (axis.ravel() for axis in np.mgrid[:GRID, :GRID])
    middle = (GRID - 1) / 2
    on_ring = (rows - middle) ** 2 + (columns - middle) ** 2 == RING_SQUARED
    identity = np.eye(GRID)
    return np.column_stack([np.ones(len(rows)), identity[rows], identity[columns], on_ring])


def _zeros() -> np.ndarray:
    return np.zeros((HEAD_DIM, WIDTH))


def _places_asked(rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
    """The projection to the bits of a place: of each row and each column of the grid, that which stands here."""
    found = _zeros()
    for name, start, targets in (("row", 0, rows), ("column", COORDINATE_BITS, columns)):
        bits = np.stack([coordinate_bits(target) for target in targets], 1)
        found[start : start + COORDINATE_BITS, FEATURES[name]] = bits
    return found


def _copied(feature: str) -> np.ndarray:
    """The projection to a feature itself."""
    found = _zeros()
    part = FEATURES[feature]
    found[: part.stop - part.start, part] = np.eye(part.stop - part.start)
    return found


def _at(row: int, column: int) -> np.ndarray:
    """The projection to the bits of one place, whatever the token."""
    found = _zeros()
    bits = [coordinate_bits(row), coordinate_bits(column)]
    found[: 2 * COORDINATE_BITS, FEATURES["one"]] = np.concatenate(bits)[:, None]
    return found


def random_projections() -> tuple[np.ndarray, np.ndarray]:
    """The random head's query and key: entries of +-1/2 and +-1/4, of place and colour code and of place alone."""
    signs = np.where(counter_uniform("planted", "random", shape=(2, HEAD_DIM, WIDTH)) < 0.5, -1.0, 1.0)
    mask = np.zeros((2, WIDTH))
    mask[:, FEATURES["row"]] = mask[:, FEATURES["column"]] = 1.0
    mask[0, FEATURES["code"]] = 1.0
    return signs[0] * mask[0] / 2, signs[1] * mask[1] / 4


def _query_and_key(attends: str) -> tuple[np.ndarray, np.ndarray]:
    every = range(GRID)
    own = _places_asked(every, every)
    before, after = [max(i - 1, 0) for i in every], [min(i + 1, GRID - 1) for i in every]
    match attends:
        case "uniform":
            return _zeros(), _zeros()
        case "fixed":
            return _ASKED * _at(*FIXED_KEY), own
        case "left":
            return _ASKED * _places_asked(every, before), own
        case "right":
            return _ASKED * _places_asked(every, after), own
        case "up":
            return _ASKED * _places_asked(before, every), own
        case "code":
            return _ASKED * _copied("code"), _copied("code")
        case "code above":
            return _ASKED * _copied("code above"), _copied("code")
        case "edge" | "luminance":
            return FOLLOW / _SCALE * _copied("one"), _copied(attends)
        case "ring":
            return GAP / _SCALE * _copied("one"), _copied("ring")
        case "ring below":
            return GAP / _SCALE * _copied("below"), _copied("ring")
        case "random":
            return random_projections()
    raise ValueError(f"attends: got {attends!r}, expected one of designs.ATTENTION")


def _value(value: str, channel: int) -> np.ndarray:
    found = _zeros()
    if value == "channel":
        found[0, FEATURES["channels"].start + channel] = 1.0
    elif value == "one":
        found[0, FEATURES["one"]] = 1.0
    else:
        # a bit of +-1 as 0 or 1
        level = THRESHOLDS.index({"middle": 0.0, "high": 0.5}[value])
        found[0, FEATURES["code"].start + channel * len(THRESHOLDS) + level] = 0.5
        found[0, FEATURES["one"]] = 0.5
    return found


def projections(name: str) -> Projections:
    """The projections of the head of that name, a key of DESIGNS."""
    design = DESIGNS[name]
    channel = SLOTS[design.slot].channel if design.slot is not None else 0
    return Projections(*_query_and_key(design.attends), _value(design.value, channel))
