"""Numbers that are none: a model that overflowed, in float16 for one, leaves NaN or infinite losses in its tables."""

from collections.abc import Mapping

import polars as pl

# what is compared row by row: where one isn't finite, neither counts
PAIRS = {"clean": ("clean", "edited"), "x0_clean": ("x0_clean", "x0_edited")}


def finite(table: pl.DataFrame, name: str) -> tuple[pl.DataFrame, int]:
    """The table with null, which means and sums leave out, for what isn't finite in a column or pair; and how many rows
    have some."""
    columns = [column for column in PAIRS.get(name, (name,)) if column in table.columns]
    if not columns or not all(table[column].dtype.is_float() for column in columns):
        return table, 0
    whole = pl.all_horizontal(pl.col(column).is_finite() for column in columns)
    count = int(table.select((~whole).sum()).item())
    return table.with_columns(pl.when(whole).then(pl.col(column)).alias(column) for column in columns), count


def caveats(left_out: Mapping[str, int]) -> list[str]:
    """The caveats of a page, given the number of such values by table and column."""
    if not left_out:
        return []
    counts = ", ".join(f"{count:,} of {name}" for name, count in left_out.items())
    return [
        "Some numbers are infinite or none at all (NaN), as those of a model that overflowed are, and H / ln K where"
        f" there is one key, and are left out of every mean: {counts}. A head whose removal does that changes more than"
        " any number here says."
    ]
