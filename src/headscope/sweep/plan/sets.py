"""Heads that a sweep edits together."""

import math
from dataclasses import dataclass

from headscope._fields import settle

# of float32, in which edits are applied: one beyond would be infinite, a temperature below 0
_LARGEST, _SMALLEST = (2.0 - 2.0**-23) * 2.0**127, 2.0**-126


@dataclass(frozen=True)
class HeadSet:
    """Heads that are edited together.

    Attributes:
        name: what its rows are called.
        sites: patterns of site names (as in a shell: * and ?), all of whose heads belong to the set.
        heads: (site, head) pairs that belong to it besides.
        keep: the gate, how much of the heads is left: 0 removes them, 0.5 halves them, 2 doubles them. None is 0, or 1
            where the set says something of the following; the fills then change nothing.
        temperature: divides their logits: above 1 flattens their attention, below 1 sharpens it.
        key_bias: numbers added to the logits of keys 0, 1, ...; -inf mutes a key. Later keys have 0.
        key_scale: numbers that multiply the probabilities of keys 0, 1, ... after the softmax, not renormalised. Later
            keys have 1.
    """

    name: str
    sites: tuple[str, ...] = ()
    heads: tuple[tuple[str, int], ...] = ()
    keep: float | None = None
    temperature: float | None = None
    key_bias: tuple[float, ...] = ()
    key_scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        settle(self)
        if not self.name:
            raise ValueError("sets.name: got an empty name, expected some text")
        if not self.sites and not self.heads:
            raise ValueError(f"sets: {self.name!r} has neither sites nor heads, expected some")
        if len(set(self.heads)) != len(self.heads):
            raise ValueError(f"sets: {self.name!r} names a head twice, expected each once")
        if self.keep is not None and not _is_float32(self.keep):
            raise ValueError(f"sets: {self.name!r}: keep: got {self.keep}, expected a finite number of float32")
        if self.temperature is not None and not (self.temperature >= _SMALLEST and _is_float32(self.temperature)):
            raise ValueError(
                f"sets: {self.name!r}: temperature: got {self.temperature}, expected a number above 0 of float32"
            )
        for number in self.key_bias:
            if number != -math.inf and not _is_float32(number):
                raise ValueError(f"sets: {self.name!r}: key_bias: got {number}, expected finite numbers or -inf")
        for number in self.key_scale:
            if not _is_float32(number):
                raise ValueError(f"sets: {self.name!r}: key_scale: got {number}, expected finite numbers of float32")

    @property
    def gate(self) -> float:
        """`keep`, or what it is by default."""
        if self.keep is not None:
            return self.keep
        return 1.0 if self.temperature is not None or self.key_bias or self.key_scale else 0.0


def _is_float32(number: float) -> bool:
    return abs(number) <= _LARGEST
