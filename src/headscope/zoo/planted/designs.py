"""The planted heads and the models made of them, as data.

A model sees 16 x 16 tokens of 2 x 2 pixels. Of a token it knows the place, and the colour of its upper left pixel; of
the 2 x 2 pixels of each cell of a glyph (group `twins`) one is such a pixel, wherever the glyph is. A head attends by
one of ATTENTION, carries one of VALUES, and writes into one of SLOTS, which make the prediction: each of them has one
of a token's 12 outputs (4 pixels of 3 channels) to itself.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ATTENTION", "DESIGNS", "MODELS", "PLANTED", "ROLES", "SLOTS", "VALUES", "Design", "Slot", "check_name"]

SIZE, PATCH = 32, 2
GRID = SIZE // PATCH
TOKENS = GRID * GRID
OUTPUTS = 3 * SIZE * SIZE
# its square root is a power of two: scaling the logits rounds nothing
HEAD_DIM = 16
# a coordinate of the grid in bits
COORDINATE_BITS = 4
# by how much a key's logit falls for each bit in which it isn't what a query asks for
GAP = 32.0
# logit per unit of what a head follows
FOLLOW = 4.0
# levels that a channel of the colour code tells apart, by a bit for each
THRESHOLDS = (-0.5, 0.0, 0.5)
# nats of log-SNR: the middles of the default bands are 3, 0 and -3
ABOVE, BELOW = 1.5, -1.5
# the fixed key of the one-hot head, and the squared distance of the ring's 16 keys from the image's middle
FIXED_KEY = (8, 8)
RING_SQUARED, RING_KEYS = 32.5, 16
# the pair of which either suffices: u = clamp(STEEP * (o_1 + o_2) - OFFSET, 0, 1); outputs are 0 or 1
STEEP, OFFSET = 16.0, 14.5

# how a head attends: the logit of key j for query i, but for what all keys of a query share
ATTENTION = {
    "uniform": "0",
    "fixed": "-32 for each bit in which key j's place differs from the fixed key's, (8, 8)",
    "left": "-32 for each bit in which key j's place differs from that left of query i; of the first column its own",
    "right": "-32 for each bit in which key j's place differs from that right of query i; of the last column its own",
    "up": "-32 for each bit in which key j's place differs from that above query i; of the first row its own",
    "code": "-32 for each bit in which key j's colour code differs from query i's",
    "edge": "4 times key j's gradient",
    "luminance": "4 times key j's luminance",
    "ring": "32 for the 16 keys at the ring's distance from the image's middle, sqrt(32.5) tokens",
    "random": "a random projection of query i's place and colour code times one of key j's place",
    "code above": "as code where the log-SNR is above 1.5, else 0",
    "ring below": "as ring where the log-SNR is below -1.5, else 0",
}

# the same in a few words; "none" is what a study should find of the random one
ROLES = {
    "uniform": "uniform",
    "fixed": "fixed key",
    "left": "previous position",
    "right": "next position",
    "up": "position above",
    "code": "counterpart",
    "edge": "edge",
    "luminance": "luminance",
    "ring": "fixed positions",
    "random": "none",
    "code above": "counterpart, gated by noise",
    "ring below": "fixed positions, gated by noise",
}

# what a head carries from key j; the channel is that of its slot
VALUES = {
    "channel": "the channel of key j's pixel",
    "one": "1",
    "high": "1 where the channel of key j's pixel is above 0.5, else 0",
    "middle": "1 where the channel of key j's pixel is above 0, else 0",
}


@dataclass(frozen=True)
class Design:
    """A head: how it attends, what it carries, and the slot that it writes into; None: nothing reads it."""

    attends: str
    value: str
    slot: str | None


@dataclass(frozen=True)
class Slot:
    """A part of the prediction, made of the outputs o of one or two heads.

    Attributes:
        rule: "sum" (u = sum of o), "either" (u = clamp(16 (o_1 + o_2) - 14.5, 0, 1)), "both" (u = o_1 o_2), or "gated"
            (u = sum of the o of heads that act at the forward's log-SNR).
        gain: the prediction is shrinkage * gain * u, with the `noise.shrinkage` of the timestep.
        pixel: which of a token's pixels (row by row) it predicts.
        channel: of which channel.
    """

    rule: str
    gain: float
    pixel: int
    channel: int


SLOTS = {
    "counterpart": Slot("sum", 0.5, 0, 0),
    "previous": Slot("sum", 0.5, 0, 1),
    "both": Slot("both", 0.5, 0, 2),
    "duplicate": Slot("sum", 0.25, 1, 0),
    "either": Slot("either", 0.5, 1, 1),
    "gated": Slot("gated", 1.0, 1, 2),
    "uniform": Slot("sum", 0.5, 2, 0),
    "ring": Slot("sum", 0.25, 2, 1),
    "random": Slot("sum", 0.5, 2, 2),
    "one_hot": Slot("sum", -0.125, 3, 0),
    "edge": Slot("sum", 0.125, 3, 1),
    "luminance": Slot("sum", 0.125, 3, 2),
}

DESIGNS = {
    "uniform": Design("uniform", "channel", "uniform"),
    "one_hot": Design("fixed", "one", "one_hot"),
    "previous": Design("left", "channel", "previous"),
    "counterpart": Design("code", "channel", "counterpart"),
    "edge": Design("edge", "channel", "edge"),
    "luminance": Design("luminance", "channel", "luminance"),
    "ring": Design("ring", "channel", "ring"),
    "random": Design("random", "channel", "random"),
    # attends as a head would that matters
    "dead": Design("edge", "channel", None),
    "duplicate_1": Design("right", "channel", "duplicate"),
    "duplicate_2": Design("right", "channel", "duplicate"),
    "either_1": Design("right", "high", "either"),
    "either_2": Design("right", "high", "either"),
    "both_1": Design("left", "channel", "both"),
    "both_2": Design("up", "middle", "both"),
    "above": Design("code above", "channel", "gated"),
    "below": Design("ring below", "channel", "gated"),
}

_ROLES = ("uniform", "one_hot", "previous", "counterpart", "edge", "luminance", "ring", "random")

# of each model, the heads of each site
MODELS = {
    "roles": (_ROLES, ("dead",)),
    "pairs": (("duplicate_1", "either_1", "both_1", "dead"), ("duplicate_2", "either_2", "both_2")),
    "gated": (("previous", "above", "below", "dead"),),
    "all": (
        _ROLES,
        ("duplicate_1", "either_1", "both_1", "above", "dead"),
        ("duplicate_2", "either_2", "both_2", "below"),
    ),
}

PLANTED = tuple(MODELS)


def check_name(name: str) -> None:
    """Raises ValueError for what is no planted model."""
    if name not in MODELS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(PLANTED)}")
