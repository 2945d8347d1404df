"""Numbers that aren't finite: a model that overflowed, as in float16, leaves NaN or infinite losses in its tables."""

import polars as pl

# columns that are compared row by row: where one isn't finite, neither counts
PAIRS = {"clean": ("clean", "edited"), "x0_clean": ("x0_clean", "x0_edited")}


def finite(table: pl.DataFrame, name: str) -> tuple[pl.DataFrame, int]:
    """Replace what isn't finite in a column, or in its pair of columns, by null, which makes void what it enters.

    Returns the table, and the number of rows with such a value.
    """
    columns = [column for column in PAIRS.get(name, (name,)) if column in table.columns]
    if not columns or not all(table[column].dtype.is_float() for column in columns):
        return table, 0
    whole = pl.all_horizontal(pl.col(column).is_finite() for column in columns)
    count = int(table.select((~whole).sum()).item())
    return table.with_columns(pl.when(whole).then(pl.col(column)).alias(column) for column in columns), count
