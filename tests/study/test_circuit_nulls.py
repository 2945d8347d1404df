"""Circuits in which there is nothing to find: no pair, no head of a circuit and no edge is named."""

from itertools import combinations

import numpy as np
import polars as pl
import pytest

from headscope.study.circuits.analysis import edges_table
from headscope.study.circuits.faithfulness import minimality_table
from headscope.study.circuits.pairs import INDEPENDENT, UNDECIDED, pairs_table
from headscope.study.circuits.sets import EVERY, PlannedSet
from headscope.study.inference import settings

TIMESTEPS = (100, 500)
HEADS = [("one", head) for head in range(5)]
STUDIES = 40


class World:
    """A study of 20 or 24 sources with skewed numbers, dependent between what is removed and between timesteps."""

    def __init__(self, number):
        self._generator = np.random.default_rng(number)
        self.shape = (20 + 4 * (number % 2), len(TIMESTEPS))
        self.clean = self._generator.gamma(20, 0.01, self.shape)
        self._common = self._skewed(self.shape[0], 1)

    def _skewed(self, *shape):
        return self._generator.lognormal(0, 0.8, shape) - np.exp(0.32)

    def nothing(self):
        """A change of the loss that is 0 on average."""
        return 0.01 * self.clean * (0.5 * self._common + self._skewed(*self.shape))

    def some(self, size):
        return self.clean * size * self._generator.lognormal(0, 0.3, self.shape)

    def losses(self, changes):
        """The table of the sets of these names."""
        rows = [
            (str(source), source, timestep, name, self.clean[source, band], (self.clean + change)[source, band])
            for name, change in changes.items()
            for source in range(self.shape[0])
            for band, timestep in enumerate(TIMESTEPS)
        ]
        return pl.DataFrame(rows, ["source_id", "item", "timestep", "edit", "clean", "edited"], orient="row")


def pairs(number):
    """Heads whose effects add up, but for noise."""
    world = World(number)
    alone = [PlannedSet(f"{head}", "part", (head,), 1, part=(head,)) for head in HEADS]
    both = [PlannedSet(f"{one} {two}", "pair", (one, two), 2, part=(one, two)) for one, two in combinations(HEADS, 2)]
    changes = {one.name: world.some(0.03 * (place + 1)) for place, one in enumerate(alone)}
    changes |= {pair.name: sum(changes[f"{head}"] for head in pair.part) + world.nothing() for pair in both}
    found = pairs_table(world.losses(changes), [*alone, *both], number)
    assert found is not None
    return not found["kind"].is_in([UNDECIDED, INDEPENDENT]).all()


def minimality(number):
    """A circuit none of whose heads does anything."""
    world = World(number)
    planned = [PlannedSet(EVERY, "empty", tuple(HEADS), 0), PlannedSet("circuit", "circuit", (), len(HEADS))]
    planned += [PlannedSet(f"without {head}", "without", (head,), len(HEADS) - 1, part=(head,)) for head in HEADS]
    changes = {EVERY: world.some(0.5), "circuit": world.some(0.05)}
    changes |= {one.name: changes["circuit"] + world.nothing() for one in planned[2:]}
    return (minimality_table(world.losses(changes), planned, number)["p_maxt"] < settings.SIGNIFICANT).any()


def edges(number):
    """Thirty edges through which nothing flows."""
    world = World(number)
    rows = world.losses({str(edge): world.nothing() for edge in range(30)})
    ends = {"sender_site": pl.lit("one"), "sender_head": pl.col("edit").cast(pl.Int64), "part": pl.lit("v")}
    ends |= {"receiver_site": pl.lit("two"), "receiver_head": pl.lit(0)}
    return (edges_table(rows.with_columns(**ends).drop("edit"), number)["p_maxt"] < settings.SIGNIFICANT).any()


@pytest.mark.full
@pytest.mark.parametrize("find", [pairs, minimality, edges])
def test_nothing_is_found_where_nothing_is(find, monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", 999)
    found = sum(find(number) for number in range(STUDIES))
    # above it, a rate of 5 % would be rejected at 1 in 1,000
    assert found <= 7
