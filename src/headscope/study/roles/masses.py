"""Recorded key masses as arrays: where every head looks, item by item."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from headscope.study.roles.rows import Sources, places


@dataclass(frozen=True)
class Masses:
    """The key masses of the heads of one site in one group and split.

    Attributes:
        heads: their numbers.
        arrays: mean over draws of noise and calls, [heads, items, timesteps, keys]; NaN where there is none.
        void: how many rows of a head are missing or hold a number that isn't finite, [heads].
    """

    heads: list[int]
    arrays: np.ndarray
    void: np.ndarray


def masses_of(rows: pl.DataFrame, sources: Sources, timesteps: list[int]) -> Masses:
    """The masses of the rows of one group, split and site in the table "key_mass", of images that aren't translated."""
    heads = rows["head"].unique().sort().to_list()
    keys = int(rows["grid_height"][0]) * int(rows["grid_width"][0])
    shape = (len(heads), len(sources.items), len(timesteps))
    at = [places(rows, name, known) for name, known in (("head", heads), ("item", sources.items))]
    cell = np.ravel_multi_index((*at, places(rows, "timestep", timesteps)), shape)
    # in one order whatever that of the rows, as sums in another order differ in their last bits
    order = np.lexsort((rows["call"].to_numpy(), rows["replicate"].to_numpy(), cell))
    flat = rows["key_mass"].explode(empty_as_null=False).cast(pl.Float64).fill_null(float("nan"))
    mass = flat.to_numpy().reshape(-1, keys)[order]
    found, starts, counts = np.unique(cell[order], return_index=True, return_counts=True)
    arrays = np.full((int(np.prod(shape)), keys), np.nan)
    arrays[found] = np.add.reduceat(mass, starts) / counts[:, None]
    number = np.zeros(int(np.prod(shape)), np.int64)
    number[found] = counts
    lacking = (number.max() - number).reshape(len(heads), -1).sum(axis=1)
    wrong = np.bincount(at[0], ~np.isfinite(flat.to_numpy().reshape(-1, keys)).all(axis=1), len(heads))
    return Masses(heads, arrays.reshape(*shape, keys), lacking + wrong.astype(np.int64))
