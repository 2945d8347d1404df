"""The truth about the planted models: their heads, pairs and circuits, and what happens in a forward."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from headscope.counter import whole
from headscope.zoo.planted.designs import ABOVE, BELOW, DESIGNS, MODELS, SIZE, SLOTS
from headscope.zoo.planted.forward import PlantedForward, gates
from headscope.zoo.planted.heads import Head, PlantedHead, planted_heads
from headscope.zoo.planted.noise import log_snr

__all__ = ["PlantedPair", "PlantedTruth", "planted_truth"]

_JOINT = {
    "sum": ("duplicate", "2 g + 4 c, with g and c of either head"),
    "either": ("either suffices", "mean target^2 - (target - w gain u)^2 over its outputs with zeros; alone 0"),
    "both": ("both are needed", "with zeros as one alone, not the sum of both"),
}


@dataclass(frozen=True)
class PlantedPair:
    """Two heads whose joint removal isn't the sum of their own.

    Attributes:
        name: the slot's.
        kind: "duplicate", "either suffices" or "both are needed".
        heads: (site, head) of both.
        joint: what the removal of both adds to the loss.
    """

    name: str
    kind: str
    heads: tuple[Head, Head]
    joint: str


@dataclass(frozen=True)
class PlantedTruth:
    """The truth about a planted model.

    Attributes:
        name: the model's.
        heads: in the order in which the model runs them.
        pairs: those of the heads whose effects don't add up.
    """

    name: str
    heads: tuple[PlantedHead, ...]
    pairs: tuple[PlantedPair, ...]

    def head(self, name: str) -> PlantedHead:
        """The head of that name.

        Raises:
            KeyError: the model has none.
        """
        return _named(self.heads, name)

    def pair(self, name: str) -> PlantedPair:
        """The pair of that name.

        Raises:
            KeyError: the model has none.
        """
        return _named(self.pairs, name)

    def at(self, sample: np.ndarray, timestep: int) -> PlantedForward:
        """What the heads do in a forward.

        Args:
            sample: x_t as the model sees it, [items, 3, 32, 32].
            timestep: of the scheduler.

        Raises:
            ValueError: a sample of another shape, or a timestep that there isn't.
        """
        sample = np.asarray(sample)
        if sample.ndim != 4 or sample.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"sample: got {list(sample.shape)}, expected [items, 3, {SIZE}, {SIZE}]")
        return PlantedForward(self.heads, sample.astype(np.float64), _checked_timestep(timestep))

    def circuits(self, timestep: int, fill: str = "zero") -> tuple[tuple[Head, ...], ...]:
        """The smallest sets of heads that leave every prediction at a timestep as it is when all others are removed.

        Of the pair of which either suffices one is in each. With the mean in the place of removed heads, those that
        give the same for every item aren't needed.

        Args:
            timestep: of the scheduler.
            fill: "zero" or "mean".

        Raises:
            ValueError: another fill, or a timestep that there isn't.
        """
        if fill not in ("zero", "mean"):
            raise ValueError(f"fill: got {fill!r}, expected zero or mean")
        acting = gates(_checked_timestep(timestep))
        constant = {"one"} if fill == "mean" else set()
        needed = [
            head.key
            for head in self.heads
            if head.slot is not None
            and head.rule != "either"
            and acting.get(head.name, 1.0)
            and DESIGNS[head.name].value not in constant
        ]
        choices = [pair.heads for pair in self.pairs if pair.name == "either"]
        order = [head.key for head in self.heads]
        return tuple(tuple(sorted((*needed, *chosen), key=order.index)) for chosen in product(*choices))

    def as_dict(self) -> dict[str, Any]:
        """All of it that isn't a function of items, as JSON types; circuits by fill and a timestep of each kind."""
        ratios = log_snr()
        kinds = {
            f"log-SNR above {ABOVE}": int(np.flatnonzero(ratios > ABOVE)[0]),
            "between": int(np.abs(ratios).argmin()),
            f"log-SNR below {BELOW}": int(np.flatnonzero(ratios < BELOW)[0]),
        }
        circuits = {
            fill: {kind: [list(map(list, one)) for one in self.circuits(step, fill)] for kind, step in kinds.items()}
            for fill in ("zero", "mean")
        }
        pairs = [{**asdict(pair), "heads": list(map(list, pair.heads))} for pair in self.pairs]
        return {"name": self.name, "heads": [asdict(head) for head in self.heads], "pairs": pairs, "circuits": circuits}


def _named(members: tuple[Any, ...], name: str) -> Any:
    for found in members:
        if found.name == name:
            return found
    raise KeyError(f"name: got {name!r}, expected one of {', '.join(found.name for found in members)}")


def _checked_timestep(timestep: int) -> int:
    checked, last = whole("timestep", timestep), len(log_snr()) - 1
    if not 0 <= checked <= last:
        raise ValueError(f"timestep: got {checked}, expected 0 to {last}")
    return checked


@lru_cache(maxsize=len(MODELS))
def planted_truth(name: str) -> PlantedTruth:
    """The truth about the planted model of that name.

    Raises:
        ValueError: there is none.
    """
    heads = planted_heads(name)
    pairs = []
    for slot in SLOTS:
        members = [head.key for head in heads if head.slot == slot]
        if len(members) == 2 and SLOTS[slot].rule in _JOINT:
            kind, joint = _JOINT[SLOTS[slot].rule]
            pairs.append(PlantedPair(slot, kind, (members[0], members[1]), joint))
    return PlantedTruth(name, heads, tuple(pairs))
