"""The tables that roles are made from: what they have to hold, and their sources."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from headscope.study.inference import plain_text

HEAD = ("site", "head")
SPLITS = ("discover", "confirm")
_LABELS = ("item", "group", "source_id", "split", "replicate")
_OF_HEADS = (*_LABELS, "timestep", "site", "call", "head")
COLUMNS = {
    "features": (*_LABELS, "feature", "grid_height", "grid_width", "map", "resolved"),
    "key_mass": (
        *(*_OF_HEADS, "translated", "grid_height", "grid_width", "entropy", "entropy_normalised", "distance"),
        *("distance_uniform", "key_mass"),
    ),
    "counterparts": (*_OF_HEADS, "donor", "donor_source", "tokens", "mass", "share"),
}


def checked(name: str, table: pl.DataFrame) -> pl.DataFrame:
    """The table with plain strings and whole numbers of one kind.

    Raises ValueError where it lacks a column, or a list isn't as long as its grid.
    """
    missing = [column for column in COLUMNS[name] if column not in table.columns]
    if missing:
        raise ValueError(f"{name}: lacks {', '.join(missing)}; it has {', '.join(table.columns)}")
    for column in {"features": ("map",), "key_mass": ("key_mass",)}.get(name, ()):
        tokens = pl.col("grid_height").cast(pl.Int64) * pl.col("grid_width").cast(pl.Int64)
        wrong = table.filter(pl.col(column).list.len() != tokens)
        if len(wrong):
            row = wrong.row(0, named=True)
            raise ValueError(
                f"{name}: got {len(wrong)} rows whose {column} isn't as long as their grid, as {len(row[column])}"
                f" numbers for {row['grid_height']} x {row['grid_width']} tokens"
            )
    whole = [column for column in ("item", "timestep", "head", "call", "replicate") if column in table.columns]
    return plain_text(table).select(COLUMNS[name]).with_columns(pl.col(whole).cast(pl.Int64))


@dataclass(frozen=True)
class Sources:
    """The items of one group and split, and the sources they are of.

    Attributes:
        names: of the sources, sorted.
        items: item numbers, ordered by source, then by number.
        source: of every item, the number of its source, [items].
        weight: of every item, 1 / (its source's items), [items]; they sum to the number of sources.
        order: the items of every source, [sources, most items of a source]; a source with fewer repeats its own.
    """

    names: list[str]
    items: list[int]
    source: np.ndarray
    weight: np.ndarray
    order: np.ndarray

    def averaged(self, numbers: np.ndarray) -> np.ndarray:
        """The mean over the items of every source: [items, ...] -> [sources, ...]."""
        total = np.zeros((len(self.names), *numbers.shape[1:]))
        np.add.at(total, self.source, numbers * self.weight.reshape(-1, *[1] * (numbers.ndim - 1)))
        return total

    def together(self, numbers: np.ndarray) -> np.ndarray:
        """A source's items one after the other: [items, ..., tokens] -> [sources, ..., most items * tokens].

        The inner product of a source's masses and another's maps is then the sum over pairs of items in their order.
        """
        found = np.moveaxis(numbers[self.order], 1, -2)
        return found.reshape(*found.shape[:-2], -1)


def sources_of(rows: pl.DataFrame) -> Sources:
    """The sources of a table's rows. Raises ValueError where one item is of two sources."""
    pairs = rows.select("source_id", "item").unique().sort("source_id", "item")
    if pairs["item"].n_unique() != len(pairs):
        twice = pairs.filter(pl.col("item").is_duplicated())["item"][0]
        raise ValueError(f"key_mass: got item {twice} with two source ids")
    names = pairs["source_id"].unique().sort().to_list()
    source = pairs["source_id"].replace_strict(names, range(len(names)), return_dtype=pl.Int64).to_numpy()
    counts = np.bincount(source, minlength=len(names))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else counts
    order = np.stack([starts + step % np.maximum(counts, 1) for step in range(counts.max(initial=0))], axis=1)
    return Sources(names, pairs["item"].to_list(), source, 1.0 / counts[source], order)


def places(rows: pl.DataFrame, column: str, values: Sequence) -> np.ndarray:
    """Where each row's value stands in a list; -1 where it doesn't: [rows]."""
    at = pl.DataFrame({column: values}, schema={column: rows.schema[column]}).with_row_index("_at")
    found = rows.select(column).join(at, on=column, how="left", maintain_order="left")["_at"]
    return found.cast(pl.Int64).fill_null(-1).to_numpy()
