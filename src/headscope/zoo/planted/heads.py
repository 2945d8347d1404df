"""The heads of a planted model and what is known of them beforehand: numbers, or formulas where items decide."""

from __future__ import annotations

import math
from dataclasses import dataclass

from headscope.zoo.planted.designs import (
    ATTENTION,
    COORDINATE_BITS,
    DESIGNS,
    GAP,
    MODELS,
    RING_KEYS,
    ROLES,
    SLOTS,
    TOKENS,
    VALUES,
    check_name,
)

__all__ = ["Head", "PlantedHead", "planted_heads"]

# (site, head)
Head = tuple[str, int]


def _one_hot_entropy() -> float:
    """Of 8 bits that each differ with the odds e^-32: 8 (ln (1 + e^-32) + 32 e^-32 / (1 + e^-32)) nats."""
    odds = math.exp(-GAP)
    return 2 * COORDINATE_BITS * (math.log1p(odds) + GAP * odds / (1 + odds))


def _ring_entropy() -> float:
    """Of 16 keys with the logit 32 and 240 with 0: ln 16 but for 7e-12 nats."""
    odds = (TOKENS - RING_KEYS) / RING_KEYS * math.exp(-GAP)
    return math.log(RING_KEYS) + math.log1p(odds) + GAP * odds / (1 + odds)


# of each way to attend: the entropy as a formula, and as a number of nats where it is one
_ENTROPY: dict[str, tuple[str, float | None]] = {
    "uniform": ("ln 256", math.log(TOKENS)),
    **dict.fromkeys(("fixed", "left", "right", "up"), ("0 but for 4e-12", _one_hot_entropy())),
    "ring": ("ln 16 but for 7e-12", _ring_entropy()),
    "code": ("mean over queries of ln m, where m tokens have the query's colour code", None),
    "code above": ("as counterpart above a log-SNR of 1.5, else ln 256", None),
    "ring below": ("ln 16 below a log-SNR of -1.5, else ln 256", None),
    **dict.fromkeys(("edge", "luminance", "random"), ("that of softmax(logits), by item", None)),
}
_LINEAR = "g + c, d = w gain (o - f)"
# of each slot's rule: what removing one head costs with zeros and with the mean in its place
_EFFECTS = {
    "sum": (_LINEAR, _LINEAR),
    "gated": (f"{_LINEAR} where it acts, else 0", f"{_LINEAR} where it acts, else 0"),
    "either": ("0", "0 where the mean is at most 29/32"),
    "both": ("g + c, d = w gain o_1 o_2", "g + c, d = w gain (o - f) times the other's output"),
}


@dataclass(frozen=True)
class PlantedHead:
    """A head of a planted model.

    Attributes:
        name: a key of DESIGNS.
        site, head: where it is.
        role: what it attends to, in a few words.
        attends: the logit of key j for query i.
        value: what it carries.
        slot: the part of the prediction that it makes; None: nothing reads it.
        rule, gain, pixel, channel: the slot's; None without one.
        entropy: the mean over queries, nats; None where it depends on the item or the timestep.
        entropy_formula: the same in words.
        zero_effect, mean_effect: what its removal adds to the loss, with zeros and with the mean in its place.
    """

    name: str
    site: str
    head: int
    role: str
    attends: str
    value: str
    slot: str | None
    rule: str | None
    gain: float | None
    pixel: int | None
    channel: int | None
    entropy: float | None
    entropy_formula: str
    zero_effect: str
    mean_effect: str

    @property
    def key(self) -> Head:
        return self.site, self.head


def planted_heads(name: str) -> tuple[PlantedHead, ...]:
    """The heads of the planted model of that name, in the order in which it runs them.

    Raises:
        ValueError: there is none.
    """
    check_name(name)
    return tuple(
        _head(head, f"blocks.{block}.attn", number)
        for block, site in enumerate(MODELS[name])
        for number, head in enumerate(site)
    )


def _head(name: str, site: str, number: int) -> PlantedHead:
    design = DESIGNS[name]
    formula, entropy = _ENTROPY[design.attends]
    slot = SLOTS[design.slot] if design.slot is not None else None
    zero, mean = _EFFECTS[slot.rule] if slot is not None else ("0", "0")
    if design.value == "one":
        # its output is the same for all items
        zero, mean = "g + c, d = w gain", "0"
    return PlantedHead(
        name=name,
        site=site,
        head=number,
        role=ROLES[design.attends],
        attends=ATTENTION[design.attends],
        value=VALUES[design.value],
        slot=design.slot,
        rule=slot and slot.rule,
        gain=slot and slot.gain,
        pixel=slot and slot.pixel,
        channel=slot and slot.channel,
        entropy=entropy,
        entropy_formula=formula,
        zero_effect=zero,
        mean_effect=mean,
    )
