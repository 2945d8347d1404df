"""Heads removed together: is the damage of several the sum of what each does alone?

*Joint minus sum* of a set of heads = its degradation minus the sum of the degradations of its heads, each removed
alone, on the same noisy images. Above 0 the heads stand in for each other (redundancy: each alone is missed less than
its share), below 0 they need each other (synergy: without one the others are useless already). Exactly 0 where effects
add. Bias and error of the mean fill (see `fill_error`) are those of this difference, computed from the folds' own.
"""

from collections.abc import Sequence

import polars as pl

from headscope.study.edits import Edited, head_name
from headscope.study.inference import combined

JOINT = (
    "Degradation with all heads of the set removed minus the sum of the degradations with each of them removed alone,"
    " on the same noisy images, in percent of the clean loss. Above 0: they stand in for each other (redundancy). Below"
    " 0: they need each other (synergy)."
)


def joint_losses(losses: pl.DataFrame, edits: Sequence[Edited]) -> tuple[pl.DataFrame, pl.DataFrame] | None:
    """Paired losses whose degradations are joint minus sum of every set, and the sum of its heads.

    losses: see `edits.losses`, of one split. A set of which a head wasn't removed alone is left out: its sum isn't
    known. One whose heads were removed alone on some of its images only is void there. None where no set is left.

    Returns two tables with the columns of `losses`; the rows are of the set's kind and name.
    """
    alone = set(losses.filter(pl.col("kind") == "head")["edit"].unique())
    known = set(losses.filter(pl.col("kind") != "head")["edit"].unique())
    kinds, joint, sums = {}, {}, {}
    for edit in edits:
        heads = [head_name(*head) for head in edit.heads]
        if edit.kind in ("site", "level", "set", "all") and edit.name in known and alone.issuperset(heads):
            kinds[edit.name] = edit.kind
            sums[edit.name] = {_of_head(head): 1.0 for head in heads}
            joint[edit.name] = {edit.name: 1.0} | {_of_head(head): -1.0 for head in heads}
    if not kinds:
        return None
    # a set may be called as a head is
    rows = losses.with_columns(
        edit=pl.when(pl.col("kind") == "head").then(pl.format("head {}", "edit")).otherwise("edit")
    )
    rows = rows.filter((pl.col("kind") == "head") | pl.col("edit").is_in(list(kinds))).drop("kind")
    kind = pl.col("edit").replace_strict(kinds, return_dtype=pl.String).alias("kind")

    def of(weights: dict[str, dict[str, float]]) -> pl.DataFrame:
        return combined(rows, weights).with_columns(kind).select(losses.columns)

    return of(joint), of(sums)


def _of_head(name: str) -> str:
    return f"head {name}"
