"""Tables of random draws of sources. A family of quantities shares one table, which keeps their dependence."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=8)
def resampled(seed: int, sizes: tuple[int, ...], count: int) -> tuple[np.ndarray, ...]:
    """The share of a draw that every source gets, each group drawn with replacement: [count, sources] per group."""
    generator = np.random.default_rng(seed)
    return tuple(generator.multinomial(size, np.full(size, 1.0 / size), count) / size for size in sizes)


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
