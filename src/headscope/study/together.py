"""Heads removed together: is the damage of several the sum of what each does alone?

*Joint minus sum* of a set of heads = its degradation minus the sum of the degradations of its heads, each removed
alone, on the same noisy images. Above 0 the heads stand in for each other (redundancy: each alone is missed less than
its share), below 0 they need each other (synergy: without one the others are useless already). Exactly 0 where effects
add.
"""

from collections.abc import Sequence

import polars as pl

from headscope.study.edits import EDIT, Edited, head_name

JOINT = (
    "Degradation with all heads of the set removed minus the sum of the degradations with each of them removed alone,"
    " on the same noisy images, in percent of the clean loss. Above 0: they stand in for each other (redundancy). Below"
    " 0: they need each other (synergy)."
)
# columns in which the losses of one noisy image agree
_IMAGE = ["group", "split", "source_id", "item", "replicate", "timestep", "fill"]


def joint_losses(losses: pl.DataFrame, edits: Sequence[Edited]) -> pl.DataFrame:
    """Paired losses whose degradation is that of every set minus the sum of its heads'.

    losses: see `edits.losses`. For each noisy image: clean, and edited = edited of the set - sum over its heads of
    (edited of the head - clean). Sets of which a head wasn't removed alone on the same images are left out: with it
    the sum isn't known.

    Returns a table with the columns of `losses`, empty where nothing can be compared.
    """
    alone = losses.filter(pl.col("kind") == "head").select(*_IMAGE, "edit", change=pl.col("edited") - pl.col("clean"))
    measured = set(alone["edit"].unique())
    found = [losses.clear()]
    for edit in edits:
        names = [head_name(*head) for head in edit.heads]
        if edit.kind in ("head", "dose", "other") or not measured.issuperset(names):
            continue
        rows = losses.filter((pl.col("edit") == edit.name) & (pl.col("kind") == edit.kind))
        members = alone.filter(pl.col("edit").is_in(names))
        sums = members.group_by(_IMAGE).agg(pl.col("change").sum().alias("sum"), pl.len().alias("heads"))
        # an image that a head was not removed on has no sum: missing, which voids the quantity
        whole = pl.when(pl.col("heads") == len(names)).then(pl.col("edited") - pl.col("sum"))
        joined = rows.join(sums, on=_IMAGE, how="left", maintain_order="left", nulls_equal=True)
        found.append(joined.with_columns(edited=whole).select(losses.columns))
    return pl.concat(found)


def sums_of_heads(losses: pl.DataFrame, edits: Sequence[Edited]) -> pl.DataFrame:
    """Paired losses whose degradation is the sum of those of every set's heads: edited = clean + sum of changes."""
    joint = joint_losses(losses, edits)
    keys = [*EDIT, *_IMAGE]
    rows = losses.join(
        joint.select(*keys, rest="edited"), on=keys, how="inner", maintain_order="left", nulls_equal=True
    )
    return rows.with_columns(edited=pl.col("edited") - pl.col("rest") + pl.col("clean")).select(losses.columns)
