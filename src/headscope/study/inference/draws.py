"""Tables of random draws of sources. A family of quantities shares one table, which keeps their dependence."""

from functools import lru_cache

import numpy as np


def drawn(sources: int) -> int:
    """How many sources a draw of the bootstrap takes: n - sqrt(n), rounded, of n.

    A small sample of skewed numbers is less skewed than what it was drawn from, so that draws of n understate how
    skewed the t statistic is; draws of fewer are more skewed. As sqrt(n) / n goes to 0, what the bootstrap-t gains over
    Student's t (an error of order 1 / n, Hall 1988) stays. (Fewer draws than sources: Bickel, Götze, van Zwet 1997.)
    """
    return sources - round(sources**0.5)


@lru_cache(maxsize=8)
def resampled(seed: int, sizes: tuple[int, ...], count: int) -> tuple[np.ndarray, ...]:
    """The share of a draw that every source gets, each group drawn with replacement: [count, sources] per group."""
    generator = np.random.default_rng(seed)
    return tuple(generator.multinomial(drawn(size), np.full(size, 1.0 / size), count) / drawn(size) for size in sizes)


@lru_cache(maxsize=8)
def divided(seed: int, first: int, second: int, count: int) -> np.ndarray:
    """Random divisions of all sources of two groups into groups of their sizes: [count, first + second].

    1 where a source falls into the first group, else 0.
    """
    generator = np.random.default_rng(seed)
    member = np.zeros((count, first + second))
    order = generator.permuted(np.tile(np.arange(first + second), (count, 1)), axis=1)
    np.put_along_axis(member, order[:, :first], 1.0, axis=1)
    return member


@lru_cache(maxsize=8)
def flipped(seed: int, sources: int, count: int) -> np.ndarray:
    """Random signs, 1 or -1: [count, sources]."""
    return np.random.default_rng(seed).integers(0, 2, (count, sources)) * 2.0 - 1.0


@lru_cache(maxsize=2)
def paired(seed: int, sources: int, count: int) -> np.ndarray:
    """Which source every source is paired with: itself, then in every permutation another: [sources, 1 + count]."""
    order = np.arange(sources, dtype=np.int32)
    permuted = np.random.default_rng(seed).permuted(np.tile(order, (count, 1)), axis=1)
    return np.ascontiguousarray(np.concatenate([order[None], permuted]).T)


@lru_cache(maxsize=2)
def picked(seed: int, choices: tuple[int, ...], count: int) -> np.ndarray:
    """Which of its choices every source takes: the first, then in every draw any of them: [sources, 1 + count]."""
    found = np.random.default_rng(seed).integers(0, choices, (count, len(choices)), dtype=np.int32)
    return np.ascontiguousarray(np.concatenate([np.zeros_like(found[:1]), found]).T)
