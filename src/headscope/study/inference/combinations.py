"""Joint effects against sums of effects: linear combinations of degradations that share their clean losses."""

from collections.abc import Mapping

import polars as pl

# of equal clean losses that were computed apart
_TOLERANCE = 1e-5


def combined(rows: pl.DataFrame, combinations: Mapping[str, Mapping[str, float]], edit: str = "edit") -> pl.DataFrame:
    """Rows of paired losses of linear combinations of edits, for `degradations`.

    Every combination's edited loss is clean + sum over its edits of weight * (edited - clean). As a degradation divides
    by the same clean losses for all edits, its degradation is that combination of theirs: {"both": 1, "one": -1,
    "two": -1} is what removing both adds beyond the sum of each alone, above 0 where each covers for the other
    (redundancy), below 0 where they need each other (synergy). An item that lacks one of the edits has no edited loss,
    which makes the combination void.

    Args:
        rows: one row per item (and replicate, timestep, ...) and edit; columns clean and edited. All columns but these
            two and `edit` tell the rows of an edit apart.
        combinations: by name, the weight of every edit.
        edit: the column that names edits; it names the combinations in the result.

    Raises:
        ValueError: where an edit isn't in the rows, or is twice for an item, or its clean losses differ between edits.
    """
    known = set(rows[edit].unique().to_list())
    absent = sorted({name for weights in combinations.values() for name in weights} - known)
    if absent:
        raise ValueError(f"combinations: got {', '.join(absent)}, which {edit} doesn't hold")
    keys = [name for name in rows.columns if name not in (edit, "clean", "edited")]
    frames = []
    for name, weights in combinations.items():
        taken = rows.filter(pl.col(edit).is_in(list(weights)))
        weight = pl.col(edit).cast(pl.String).replace_strict(dict(weights), return_dtype=pl.Float64)
        clean, edited = (pl.col(column).cast(pl.Float64) for column in ("clean", "edited"))
        grouped = taken.group_by(keys, maintain_order=True).agg(
            clean.first().alias("clean"),
            (clean.max() - clean.min()).alias("_apart"),
            (weight * (edited - clean)).sum().alias("_change"),
            # a sum leaves out null
            (pl.col("edited").is_null() | pl.col("clean").is_null()).any().alias("_null"),
            pl.len().alias("_rows"),
            pl.col(edit).n_unique().alias("_edits"),
        )
        twice = grouped.filter(pl.col("_rows") > pl.col("_edits"))
        if len(twice):
            raise ValueError(f"rows: got {len(twice)} items that hold an edit of {name!r} twice; name what differs")
        apart = grouped.filter(pl.col("_apart") > _TOLERANCE * pl.col("clean").abs())
        if len(apart):
            raise ValueError(f"rows: got {len(apart)} items whose clean loss differs between the edits of {name!r}")
        complete = (pl.col("_edits") == len(weights)) & ~pl.col("_null")
        frames.append(
            grouped.select(
                *keys,
                pl.lit(name).alias(edit),
                "clean",
                pl.when(complete).then(pl.col("clean") + pl.col("_change")).alias("edited"),
            )
        )
    return pl.concat(frames)
