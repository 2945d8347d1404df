"""How good a circuit is, on images that had no part in its choice: faithfulness, completeness, minimality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from headscope.study.ablation import ROUNDING
from headscope.study.circuits.sets import EVERY, PlannedSet
from headscope.study.edits import head_name
from headscope.study.inference import shares

FAITHFULNESS = (
    "Faithfulness of a set of heads = (L_empty − L_set) / (L_empty − L_full) = 1 − D(all heads but the set removed) /"
    " D(all heads removed), D being the degradation: at every timestep the sum over sources of edited − clean loss by"
    " that of the clean loss, then the mean over timesteps, each with equal weight. 1: the set does what the whole"
    " model does; 0: it does nothing; above 1: the model does better without the others. By the prediction, D holds the"
    " mean squared difference to the whole model's prediction in place of edited − clean loss: a set that keeps the"
    " loss by opposite errors isn't faithful by it. Where D(all heads removed) isn't clearly above 0 there is no"
    " circuit. The circuit and its size were chosen on discover; the other sets stand beside it. What the mean fill's"
    " number of reference images adds isn't in the interval."
)
COMPLETENESS = (
    "With the circuit C removed: the faithfulness of the heads that are left. And for parts K of the circuit,"
    " faithfulness of C without K minus that of the whole model M without K (Wang et al. 2022, section 4): 0 where the"
    " circuit holds all that takes part; below 0 where other heads stand in for K in the whole model. K is every single"
    " head and some random halves."
)
MINIMALITY = (
    "The faithfulness that the circuit loses without one of its heads: D(all but the circuit, and the head, removed) −"
    " D(all but the circuit removed), by D(all heads removed). Tested against 0, max-t over the circuit's heads; a head"
    " whose loss isn't established may be superfluous."
)
KEYS = ("source_id", "item", "replicate", "timestep")
LOSS, PREDICTION = "loss", "prediction"


def faithfulness_table(losses: pl.DataFrame, planned: Sequence[PlannedSet], target: float, seed: int) -> pl.DataFrame:
    """See `FAITHFULNESS`: set, kind ("circuit", "nested": sets of the greedy search beside it, "complement": the
    circuit removed; the same with ", by prediction"), metric, size, the numbers, and reaches ("clearly" where the
    interval is above the target, "just" where the value is, else "no") and smallest (of the circuit and the sets beside
    it, by the loss, the smallest whose value reaches the target on confirm; a choice on confirm, so its value is on the
    high side).

    losses: the set ablations of one group; with a column distance there are rows by the prediction, too.
    """
    labels = {}
    for one in planned:
        if one.kind in ("circuit", "complement"):
            text = "the circuit" if one.kind == "circuit" else "all but the circuit"
            labels[one.name] = (text, one.kind, one.size)
        elif one.kind == "curve" and one.method == "greedy":
            labels[one.name] = (f"greedy, {one.size} heads", "nested", one.size)
    found = []
    for metric in (LOSS, PREDICTION) if "distance" in losses.columns else (LOSS,):
        table = _faithfulness(changes(losses, metric), list(labels), seed)
        for place, name in enumerate(("set", "kind", "size")):
            kind = pl.Int64 if name == "size" else pl.String
            values = {edit: label[place] for edit, label in labels.items()}
            table = table.with_columns(pl.col("edit").replace_strict(values, return_dtype=kind).alias(name))
        if metric == PREDICTION:
            table = table.with_columns(kind=pl.col("kind") + ", by prediction")
        found.append(table.with_columns(metric=pl.lit(metric)))
    reaches = (
        pl.when(pl.col("low") >= target)
        .then(pl.lit("clearly"))
        .when(pl.col("value") >= target)
        .then(pl.lit("just"))
        .when(pl.col("value").is_not_null())
        .then(pl.lit("no"))
    )
    table = pl.concat(found).with_columns(reaches=reaches, **_UNTESTED)
    may = pl.col("kind").is_in(["circuit", "nested"]) & (pl.col("value") >= target)
    sizes = table.filter(may)["size"]
    smallest = may & (pl.col("size") == sizes.min()) if len(sizes) else pl.lit(False)
    table = table.with_columns(smallest=smallest.fill_null(False))
    order = pl.col("kind").replace_strict({"circuit": 0, "circuit, by prediction": 1}, default=2, return_dtype=pl.Int64)
    return table.sort(order, "size", maintain_order=True).select(
        "set", "kind", "metric", "size", *NUMBERS, "reaches", "smallest"
    )


NUMBERS = ("value", "low", "high", "p_value", "p_maxt", "standard_error", "sources", "exploratory", "void")


def curves_table(losses: pl.DataFrame, planned: Sequence[PlannedSet], seed: int) -> pl.DataFrame:
    """The faithfulness on confirm of every method's sets: method, size, the numbers."""
    points = {one.name: (one.method, one.size) for one in planned if one.kind == "curve"}
    points |= {one.name: ("greedy", one.size) for one in planned if one.kind == "circuit"}
    table = _faithfulness(changes(losses), list(points), seed)
    names = pl.DataFrame(
        [(edit, *point) for edit, point in points.items()],
        schema={"edit": pl.String, "method": pl.String, "size": pl.Int64},
        orient="row",
    )
    table = table.join(names, on="edit", how="left", maintain_order="left").with_columns(**_UNTESTED)
    return table.sort("method", "size").select("method", "size", *NUMBERS)


def completeness_table(losses: pl.DataFrame, planned: Sequence[PlannedSet], seed: int) -> pl.DataFrame:
    """See `COMPLETENESS`: set (what is removed), measure ("faithfulness" of what is left, or "circuit − model"), size
    (of what is removed), the numbers."""
    known = changes(losses)
    rest = [one for one in planned if one.kind == "complement"]
    found = []
    for one in rest:
        table = _faithfulness(known, [one.name], seed)
        labels = pl.lit("the circuit").alias("set"), pl.lit("faithfulness").alias("measure")
        found.append(table.select(*labels, pl.lit(len(one.removed)).alias("size"), *_given(table)))
    without = {one.part: one for one in planned if one.kind == "without"}
    parts = {one.part: one for one in planned if one.kind == "part" and one.part in without}
    pairs = {_label(part): ({parts[part].name: 1.0, without[part].name: -1.0}, len(part)) for part in parts}
    if pairs:
        table = shares(
            _combined(known, {name: weights for name, (weights, _) in pairs.items()}), ["edit"], **_ARGUMENTS, seed=seed
        )
        sizes = {name: size for name, (_, size) in pairs.items()}
        size = pl.col("edit").replace_strict(sizes, return_dtype=pl.Int64).alias("size")
        labels = pl.col("edit").alias("set"), pl.lit("circuit − model").alias("measure")
        found.append(table.select(*labels, size, *_given(table)))
    return pl.concat([table.select("set", "measure", pl.col("size").cast(pl.Int64), *NUMBERS) for table in found])


def minimality_table(losses: pl.DataFrame, planned: Sequence[PlannedSet], seed: int) -> pl.DataFrame:
    """See `MINIMALITY`: site, head, the numbers, needed (the loss is established)."""
    circuit = next(one for one in planned if one.kind == "circuit")
    without = [one for one in planned if one.kind == "without" and len(one.part) == 1]
    weights = {head_name(*one.part[0]): {one.name: 1.0, circuit.name: -1.0} for one in without}
    if not weights:
        # of one head alone: without it nothing is left
        return pl.DataFrame(schema={"site": pl.String, "head": pl.Int64, **_SCHEMA, "needed": pl.Boolean})
    rows = _combined(changes(losses), weights)
    table = shares(rows, ["edit"], **_ARGUMENTS, seed=seed, test=True, family=True)
    heads = pl.DataFrame(
        [(head_name(*one.part[0]), *one.part[0]) for one in without],
        schema={"edit": pl.String, "site": pl.String, "head": pl.Int64},
        orient="row",
    )
    needed = (pl.col("p_maxt") < 0.05) & (pl.col("value") > 0)
    table = table.join(heads, on="edit", how="left", maintain_order="left").with_columns(needed=needed.fill_null(False))
    return table.select("site", "head", *NUMBERS, "needed")


def changes(losses: pl.DataFrame, metric: str = LOSS) -> pl.DataFrame:
    """Every set's change and that of removing all heads: edit, `KEYS`, clean, change, whole."""
    keys = [name for name in KEYS if name in losses.columns]
    clean = pl.col("clean").cast(pl.Float64)
    change = pl.col("distance").cast(pl.Float64) if metric == PREDICTION else pl.col("edited").cast(pl.Float64) - clean
    rows = losses.select("edit", *keys, clean.alias("clean"), change.alias("change"))
    empty = rows.filter(pl.col("edit") == EVERY).select(*keys, whole="change")
    return rows.join(empty, on=keys, how="left", maintain_order="left")


def _faithfulness(known: pl.DataFrame, names: Sequence[str], seed: int) -> pl.DataFrame:
    """1 - the share of some sets' changes in that of all heads."""
    rows = known.filter(pl.col("edit").is_in(list(names))).rename({"change": "part"})
    table = shares(rows, ["edit"], **_ARGUMENTS, seed=seed)
    return table.with_columns(value=1 - pl.col("value"), low=1 - pl.col("high"), high=1 - pl.col("low"))


def _combined(known: pl.DataFrame, weights: Mapping[str, Mapping[str, float]]) -> pl.DataFrame:
    """Rows of weighted sums of sets' changes, by name; null where a set has no row or number, which voids the sum."""
    keys = [name for name in known.columns if name not in ("edit", "change", "clean", "whole")]
    found = []
    for name, parts in weights.items():
        mine = known.filter(pl.col("edit").is_in(list(parts)))
        weight = pl.col("edit").replace_strict(dict(parts), return_dtype=pl.Float64)
        summed = mine.group_by(keys, maintain_order=True).agg(
            pl.col("clean", "whole").first(),
            (weight * pl.col("change")).sum().alias("_sum"),
            pl.col("change").null_count().alias("_nulls"),
            pl.len().alias("_rows"),
        )
        whole = (pl.col("_rows") == len(parts)) & (pl.col("_nulls") == 0)
        found.append(
            summed.select(pl.lit(name).alias("edit"), *keys, "clean", "whole", part=pl.when(whole).then("_sum"))
        )
    return pl.concat(found)


def _label(part: Sequence[tuple[str, int]]) -> str:
    return ", ".join(head_name(*head) for head in part)


def _given(table: pl.DataFrame) -> list[pl.Expr]:
    """The columns of numbers, null for those that the table doesn't have."""
    return [pl.col(name) if name in table.columns else pl.lit(None, pl.Float64).alias(name) for name in NUMBERS]


_UNTESTED = {name: pl.lit(None, pl.Float64) for name in ("p_value", "p_maxt")}
_ARGUMENTS = {"bands": "timestep", "rounding": ROUNDING}
_SCHEMA = {
    **dict.fromkeys(NUMBERS[:6], pl.Float64),
    "sources": pl.Int64,
    "exploratory": pl.Boolean,
    "void": pl.Int64,
}
