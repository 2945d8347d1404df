"""What planted heads do in one forward, in float64, from their definitions: no attention code takes part, and of the
weights only the random head's.

With o_h the output of head h, u the value of its slot and d = shrinkage * gain * du/do_h * (o_h - fill_h), which its
removal takes from the prediction p to first order, the loss L = mean (p - target)^2 has

    g = -dL / d gate = -2 mean (p - target) d
    c = mean d^2

u is linear in each head but where "either" is clamped, and there d is 0 as long as outputs are 0 or 1: so removing any
one head costs exactly g + c.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from headscope.zoo.planted.designs import (
    ABOVE,
    BELOW,
    DESIGNS,
    FIXED_KEY,
    FOLLOW,
    GAP,
    GRID,
    OFFSET,
    OUTPUTS,
    PATCH,
    RING_SQUARED,
    SIZE,
    SLOTS,
    STEEP,
    THRESHOLDS,
    TOKENS,
)
from headscope.zoo.planted.heads import Head, PlantedHead
from headscope.zoo.planted.noise import log_snr, shrinkage
from headscope.zoo.planted.weights import FEATURES, random_projections

__all__ = ["Fill", "PlantedForward", "gates"]

# what takes a removed head's place: None (0), "uniform", "identity", or outputs [heads, tokens], such as their means
# over reference items, or [items, heads, tokens]
Fill = str | np.ndarray | None

_ROWS, _COLUMNS = (axis.ravel() for axis in np.mgrid[:GRID, :GRID])


def gates(timestep: int) -> Mapping[str, float]:
    """Of the heads that don't always act, 1 where they do."""
    ratio = log_snr()[timestep]
    return {"above": float(ratio > ABOVE), "below": float(ratio < BELOW)}


@dataclass(frozen=True, eq=False)
class PlantedForward:
    """What the heads of a planted model do in one forward, in float64; heads are in the order of `heads`.

    Attributes:
        heads: the model's.
        sample: x_t, [items, 3, 32, 32].
        timestep: of the scheduler.
    """

    heads: tuple[PlantedHead, ...] = field(repr=False)
    sample: np.ndarray = field(repr=False)
    timestep: int

    @cached_property
    def logits(self) -> np.ndarray:
        """[items, heads, queries, keys]."""
        items = len(self.sample)
        found = [np.broadcast_to(self._logits(head.name), (items, TOKENS, TOKENS)) for head in self.heads]
        return np.stack(found, 1)

    @cached_property
    def attention(self) -> np.ndarray:
        """The probabilities, [items, heads, queries, keys]."""
        return np.exp(self.logits - self._normaliser[..., None])

    @cached_property
    def _normaliser(self) -> np.ndarray:
        highest = self.logits.max(-1)
        return highest + np.log(np.exp(self.logits - highest[..., None]).sum(-1))

    @cached_property
    def entropy(self) -> np.ndarray:
        """Nats, [items, heads, queries]."""
        # from what each key lacks to the whole, which doesn't cancel
        lacking = self._normaliser[..., None] - self.logits
        return (self.attention * lacking).sum(-1)

    @cached_property
    def distance(self) -> np.ndarray:
        """The mean distance of the keys from the query, tokens, [items, heads, queries]."""
        apart = np.hypot(_ROWS[:, None] - _ROWS, _COLUMNS[:, None] - _COLUMNS)
        return (self.attention * apart).sum(-1)

    @cached_property
    def key_mass(self) -> np.ndarray:
        """The attention to each key, summed over queries, [items, heads, keys]."""
        return self.attention.sum(2)

    def group_mass(self, groups: np.ndarray, count: int) -> np.ndarray:
        """The attention to each group of keys, [items, heads, queries, count].

        Args:
            groups: the group of each key, [keys] or [items, keys]; -1: in none.
        """
        members = (np.asarray(groups)[..., None] == np.arange(count)).astype(np.float64)
        return self.attention @ (members if members.ndim == 2 else members[:, None])

    @cached_property
    def values(self) -> np.ndarray:
        """What the heads carry from each token, [items, heads, tokens]."""
        return np.stack([self._value(head.name) for head in self.heads], 1)

    @cached_property
    def outputs(self) -> np.ndarray:
        """The outputs of the heads, [items, heads, tokens]: the first of each one's channels; the others are 0."""
        return np.einsum("ihqk,ihk->ihq", self.attention, self.values)

    def prediction(self, removed: Iterable[Head] = (), fill: Fill = None) -> np.ndarray:
        """The prediction of x_0 with some heads removed, [items, 3, 32, 32].

        Args:
            removed: (site, head) pairs.
            fill: what takes their place, as `Fill` says.

        Raises:
            ValueError: an unknown fill or head, or a fill of another shape.
        """
        outputs = self.outputs.copy()
        numbers = self._numbers(removed)
        if numbers:
            outputs[:, numbers] = self._filled(fill)[:, numbers]
        found = np.zeros_like(self.sample)
        for name, members in self._slots.items():
            slot = SLOTS[name]
            value = shrinkage()[self.timestep] * slot.gain * self._combined(slot.rule, outputs, members)
            found[self._place(name)] = value.reshape(-1, GRID, GRID)
        return found

    def loss(self, target: np.ndarray, removed: Iterable[Head] = (), fill: Fill = None) -> np.ndarray:
        """The teacher-forced loss of each item, [items]."""
        error = self.prediction(removed, fill) - target
        return np.square(error).mean((1, 2, 3))

    def effect(self, target: np.ndarray, removed: Iterable[Head], fill: Fill = None) -> np.ndarray:
        """What the removal of some heads adds to the loss of each item, [items]."""
        return self.loss(target, removed, fill) - self.loss(target)

    def derivative(self, fill: Fill = None) -> np.ndarray:
        """d prediction / d gate of each head, [items, heads, 3, 32, 32], where gate 0 puts the fill in its place."""
        found = np.zeros((*self.outputs.shape[:2], 3, SIZE, SIZE))
        differences = self.outputs - self._filled(fill)
        for name, members in self._slots.items():
            slot = SLOTS[name]
            for number in members:
                others = [other for other in members if other != number]
                slope = self._slope(slot.rule, number, others) * differences[:, number]
                value = shrinkage()[self.timestep] * slot.gain * slope
                found[:, number][self._place(name)] = value.reshape(-1, GRID, GRID)
        return found

    def importance(self, target: np.ndarray, fill: Fill = None) -> tuple[np.ndarray, np.ndarray]:
        """g and c of each head, [items, heads]; c as it is expected, over all cotangents."""
        derivative, error = self.derivative(fill), self.prediction() - target
        g = -2 * np.einsum("ihcyx,icyx->ih", derivative, error) / OUTPUTS
        return g, np.square(derivative).sum((2, 3, 4)) / OUTPUTS

    @cached_property
    def _pixels(self) -> np.ndarray:
        """The colour that each token knows, [items, 3, tokens]."""
        return self.sample[:, :, ::PATCH, ::PATCH].reshape(len(self.sample), 3, TOKENS)

    @cached_property
    def _luminance(self) -> np.ndarray:
        red, green, blue = np.moveaxis(self._pixels, 1, 0)
        return (red + 2 * green + blue) / 4

    @cached_property
    def _gradient(self) -> np.ndarray:
        """The difference of luminance to the token below plus that to the right one, [items, tokens]."""
        picture = self._luminance.reshape(-1, GRID, GRID)
        below = np.abs(np.diff(picture, axis=1, append=picture[:, -1:]))
        right = np.abs(np.diff(picture, axis=2, append=picture[:, :, -1:]))
        return (below + right).reshape(-1, TOKENS)

    @cached_property
    def _levels(self) -> np.ndarray:
        """How many thresholds each channel is above, integers [items, 3, tokens]; a level is a bit of the code."""
        return (self._pixels[..., None] > np.array(THRESHOLDS)).sum(-1)

    def _logits(self, name: str) -> np.ndarray:
        """[queries, keys] or [items, queries, keys], or what broadcasts to it."""
        acting = gates(self.timestep)
        match DESIGNS[name].attends:
            case "fixed":
                return -GAP * _differing(np.full(TOKENS, FIXED_KEY[0]), np.full(TOKENS, FIXED_KEY[1]))
            case "left":
                return -GAP * _differing(_ROWS, np.maximum(_COLUMNS - 1, 0))
            case "right":
                return -GAP * _differing(_ROWS, np.minimum(_COLUMNS + 1, GRID - 1))
            case "up":
                return -GAP * _differing(np.maximum(_ROWS - 1, 0), _COLUMNS)
            case "code":
                return self._matching()
            case "code above":
                return acting["above"] * self._matching()
            case "edge":
                return FOLLOW * self._gradient[:, None]
            case "luminance":
                return FOLLOW * self._luminance[:, None]
            case "ring":
                return GAP * _on_ring()
            case "ring below":
                return acting["below"] * GAP * _on_ring()
            case "random":
                return self._random()
        return np.zeros(1)

    def _matching(self) -> np.ndarray:
        levels = self._levels
        return -GAP * np.abs(levels[:, :, :, None] - levels[:, :, None]).sum(1)

    def _random(self) -> np.ndarray:
        query, key = random_projections()
        places = np.zeros((TOKENS, query.shape[1]))
        every = np.arange(TOKENS)
        places[every, FEATURES["row"].start + _ROWS] = places[every, FEATURES["column"].start + _COLUMNS] = 1
        code = np.where(self._pixels[..., None] > np.array(THRESHOLDS), 1.0, -1.0)
        # [items, tokens, bits], channel by channel
        code = np.moveaxis(code, 1, 2).reshape(len(self.sample), TOKENS, -1)
        queries = places @ query.T + code @ query[:, FEATURES["code"]].T
        return queries @ (places @ key.T).T / math.sqrt(len(query))

    def _value(self, name: str) -> np.ndarray:
        design = DESIGNS[name]
        channel = self._pixels[:, SLOTS[design.slot].channel if design.slot is not None else 0]
        found = {"channel": channel, "one": np.ones_like(channel), "high": channel > 0.5, "middle": channel > 0.0}
        return found[design.value].astype(np.float64)

    @cached_property
    def _slots(self) -> dict[str, list[int]]:
        """The numbers of the heads of each slot that has some."""
        found: dict[str, list[int]] = {}
        for number, head in enumerate(self.heads):
            if head.slot is not None:
                found.setdefault(head.slot, []).append(number)
        return found

    def _place(self, slot: str) -> tuple[Any, ...]:
        """The outputs of a slot, as an index of images."""
        down, across = divmod(SLOTS[slot].pixel, PATCH)
        return slice(None), SLOTS[slot].channel, slice(down, None, PATCH), slice(across, None, PATCH)

    def _acting(self, number: int) -> float:
        return gates(self.timestep).get(self.heads[number].name, 1.0)

    def _combined(self, rule: str, outputs: np.ndarray, members: list[int]) -> np.ndarray:
        """A slot's value u, [items, tokens]."""
        if rule == "both":
            return outputs[:, members].prod(1)
        if rule == "gated":
            return sum((self._acting(number) * outputs[:, number] for number in members), np.zeros(1))
        total = outputs[:, members].sum(1)
        return np.clip(STEEP * total - OFFSET, 0, 1) if rule == "either" else total

    def _slope(self, rule: str, number: int, others: list[int]) -> np.ndarray | float:
        """du / do of a head."""
        if rule == "both":
            return self.outputs[:, others].prod(1)
        if rule == "gated":
            return self._acting(number)
        if rule == "either":
            inside = STEEP * self.outputs[:, [number, *others]].sum(1) - OFFSET
            return STEEP * ((inside > 0) & (inside < 1))
        return 1.0

    def _numbers(self, removed: Iterable[Head]) -> list[int]:
        keys, asked = [head.key for head in self.heads], [tuple(head) for head in removed]
        for key in asked:
            if key not in keys:
                raise ValueError(f"removed: got {key}, expected some of {keys}")
        return [keys.index(key) for key in asked]

    def _filled(self, fill: Fill) -> np.ndarray:
        """What takes the place of the heads' outputs, [items, heads, tokens]."""
        shape = self.values.shape
        if fill is None:
            return np.zeros(shape)
        if isinstance(fill, str):
            if fill not in ("uniform", "identity"):
                raise ValueError(f"fill: got {fill!r}, expected None, uniform, identity or an array")
            return self.values if fill == "identity" else np.broadcast_to(self.values.mean(-1, keepdims=True), shape)
        if fill.shape not in (shape[1:], shape):
            raise ValueError(f"fill: got {list(fill.shape)}, expected {list(shape[1:])} or {list(shape)}")
        return np.broadcast_to(fill, shape)


def _differing(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """In how many bits each key's place differs from that asked for by each query, [queries, keys]."""
    asked, there = rows * GRID + columns, _ROWS * GRID + _COLUMNS
    return np.bitwise_count(asked[:, None] ^ there)


def _on_ring() -> np.ndarray:
    """1 for the keys on the ring, [keys]."""
    middle = (GRID - 1) / 2
    return ((_ROWS - middle) ** 2 + (_COLUMNS - middle) ** 2 == RING_SQUARED).astype(np.float64)
