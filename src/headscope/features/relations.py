"""Which tokens of an image are counterparts of which, and which look like some but aren't."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from headscope._shapes import Float64


class TiedItem(Protocol):
    """An item with a part mask [height, width] and counterparts [height, width, n], as the zoo's tied groups have."""

    @property
    def part_mask(self) -> np.ndarray | None: ...

    @property
    def counterparts(self) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Relation:
    """Weights of pairs of tokens, [queries, keys]; a sum of weight * p is a mean over the queries that count.

    Attributes:
        own: 1 / queries where a key is a counterpart of the query.
        other: the same sum over every query's keys, laid on the counterparts of other queries of its part.
        queries: how many queries count.
    """

    own: Float64[np.ndarray, "tokens tokens"]
    other: Float64[np.ndarray, "tokens tokens"]
    queries: int

    @property
    def share(self) -> float:
        """The sum of p over a query's counterparts if attention is uniform, mean over queries."""
        return float(self.own.sum() / len(self.own))


def relation(item: TiedItem, grid: tuple[int, int]) -> Relation | None:
    """The counterparts of an item's tokens on a grid of (height, width) tokens.

    A pixel belongs to the token that its middle lies in. Token k is a counterpart of token q where at least half of q's
    pixels have a counterpart in k. The *other* keys of q are the counterparts of the other queries of its part (the
    part of most of its pixels that have counterparts), without q and its own counterparts. Where the whole part has the
    same counterparts, they are those of all queries that aren't q's counterparts. One that belongs to several of these
    queries counts as often; together they weigh as much as q's own. A head that looks at what counterparts
    have in common (a glyph, wherever it is) has as much attention on the others as on q's own. Queries without own or
    without other keys don't count; None where no query does.
    """
    mask, counterparts = item.part_mask, item.counterparts
    if mask is None or counterparts is None:
        return None
    height, width = mask.shape
    rows, columns = (
        (2 * np.arange(size) + 1) * tokens // (2 * size) for size, tokens in zip(mask.shape, grid, strict=True)
    )
    token = (rows[:, None] * grid[1] + columns).ravel()
    count = grid[0] * grid[1]
    own = _related(token, counterparts.reshape(height * width, -1), count)
    part = _parts(token, mask.ravel(), counterparts[..., 0].ravel() >= 0, count)
    queries = own.any(1)
    weights, others = np.zeros((2, count, count))
    for query in np.flatnonzero(queries):
        free = ~own[query]
        free[query] = False
        for alike in (part == part[query], ~own[query]):
            other = own[alike].sum(0) * free
            if other.any():
                break
        if other.any():
            weights[query] = own[query]
            others[query] = other * (own[query].sum() / other.sum())
    counted = int(weights.any(1).sum())
    return Relation(weights / counted, others / counted, counted) if counted else None


def _related(token: np.ndarray, counterparts: np.ndarray, count: int) -> np.ndarray:
    """True where at least half of a token's pixels have a counterpart in another: bool [tokens, tokens]."""
    pixel, place = np.nonzero(counterparts >= 0)
    # of several counterparts of a pixel in one token, one
    pairs = np.unique(np.stack([pixel, token[counterparts[pixel, place]]], 1), axis=0)
    related = np.zeros((count, count), np.int64)
    np.add.at(related, (token[pairs[:, 0]], pairs[:, 1]), 1)
    np.fill_diagonal(related, 0)
    return (2 * related >= np.bincount(token, minlength=count)[:, None]) & (related > 0)


def _parts(token: np.ndarray, mask: np.ndarray, tied: np.ndarray, count: int) -> np.ndarray:
    """The part of most of a token's pixels that have counterparts, of equal ones the lowest: [tokens]."""
    found = np.zeros((count, int(mask.max()) + 1), np.int64)
    np.add.at(found, (token[tied], mask[tied]), 1)
    return found.argmax(1)
