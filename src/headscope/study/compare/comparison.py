"""Two runs compared, of two models or of two checkpoints of one: second minus first, pair by pair.

Everything is paired by source: both models saw the same images (see `compare.matching`), so what is drawn anew is
a source with its numbers of both runs. All sources that both runs have are used, of every split: nothing is selected. A
family of tests is all heads (or sets) of a group and fill.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from headscope.study.compare.matching import Matched, match
from headscope.study.compare.sides import Differing, Side
from headscope.study.paired import Cells, cells_of, difference, estimates, interval, mean, rankings, ratio, weighed

ENTROPY = (
    "Mean over sources of H of the second run minus H of the first, in nats; H of a head is averaged over an image's"
    " queries, its draws of noise, and the timesteps, each with equal weight."
)
SITE_RATIO = (
    "exp(mean over sources and heads of the difference of H): the factor by which the number of keys a head of the"
    " site spreads its attention over, exp H, changes from the first run to the second."
)
CLEAN = (
    "Sum over sources of the second model's loss divided by the sum of the first's, nothing removed. Below 1 the second"
    " model denoises better."
)
DEGRADATION = (
    "Degradation of the second run minus that of the first, in percentage points of their own clean losses. Degradation"
    " = mean over timesteps of sum of (edited loss − clean loss) / sum of clean loss, sums over sources."
)
# of an ablated head, an attribution
_IMPORTANCES = {"importance": "attribution g + c", "integrated": "integrated attribution"}


@dataclass(frozen=True)
class Comparison:
    """Two runs compared. Tables of numbers have a column part, the stage of a study ("" for sweeps).

    All of them have value (second minus first, or second / first), low, high, sources, exploratory and void (rows whose
    numbers aren't finite; where there are some the estimate is null). Tables of tests have p_value and p_maxt as well.

    Attributes:
        groups: part, group, items, sources, how.
        timesteps: part, first, second, log_snr.
        entropy: part, group, site, head, query_group, keys, and first, first_low, first_high, second, ...: H in nats.
        entropy_sites: part, group, site, query_group, keys, heads.
        clean: part, group, timestep (null: mean over timesteps), first, second.
        heads, sets: part, group, fill, site and head or edit, first, first_low, first_high, second, ..., and the
            difference of the absolute degradations: absolute, absolute_low, absolute_high.
        ranks: part, group, fill, quantity, within_first, within_second, across, heads.
        differing: what one run lacks or has otherwise.
    """

    groups: pl.DataFrame
    timesteps: pl.DataFrame
    entropy: pl.DataFrame | None = None
    entropy_sites: pl.DataFrame | None = None
    clean: pl.DataFrame | None = None
    heads: pl.DataFrame | None = None
    sets: pl.DataFrame | None = None
    importance: pl.DataFrame | None = None
    ranks: pl.DataFrame | None = None
    differing: list[Differing] = field(default_factory=list)

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables there are, by name."""
        every = {name: getattr(self, name) for name in _TABLES}
        return {name: table for name, table in every.items() if table is not None}


_TABLES = ("groups", "timesteps", "entropy", "entropy_sites", "clean", "heads", "sets", "importance", "ranks")
_QUERIES = ["site", "head", "query_group", "keys"]
_FIRST_SECOND = ["first", "first_low", "first_high", "second", "second_low", "second_high"]


def compare(pairs: Sequence[tuple[str, Side, Side]], seed: int = 0) -> Comparison:
    """Compare two runs, or two studies stage by stage.

    pairs: name of the stage ("" for a sweep), the first run, the second. seed: of the resampling.

    Raises:
        ValueError: the runs, or the two runs of every stage, have nothing in common.
    """
    found: dict[str, list[pl.DataFrame]] = {}
    differing: list[Differing] = []
    problems = []
    for part, first, second in pairs:
        label = f"{part}: " if part else ""
        try:
            matched = match(first, second)
        except ValueError as error:
            problems.append(error)
            differing.append(Differing(f"{label}stage", "there", "there", f"not compared: {error}"))
            continue
        differing += [one._replace(what=label + one.what) for one in matched.differing]
        for name, table in _tables(matched, seed).items():
            found.setdefault(name, []).append(table.select(pl.lit(part).alias("part"), pl.all()))
    if not found:
        raise problems[0] if problems else ValueError("second: the studies have no stage in common")
    return Comparison(**{name: pl.concat(tables) for name, tables in found.items()}, differing=differing)


def _tables(matched: Matched, seed: int) -> dict[str, pl.DataFrame]:
    """The tables of one pair of runs, as far as there are numbers for them."""
    found: dict[str, pl.DataFrame] = {"groups": matched.groups, "timesteps": matched.timesteps}
    ranks = []
    rows = matched.tables
    if "observations" in rows and "entropy_mean_1" in rows["observations"].columns:
        found["entropy"] = _families(rows["observations"], ["group"], lambda part: _entropy(part, seed))
        found["entropy_sites"] = _families(rows["observations"], ["group"], lambda part: _entropy_sites(part, seed))
    clean = _clean_losses(rows)
    if clean is not None and matched.same_target:
        found["clean"] = _families(clean, ["group"], lambda part: _clean(part, seed))
    for kind, name, by in (("ablations", "heads", ["site", "head"]), ("set_ablations", "sets", ["edit"])):
        if kind in rows and "edited_1" in rows[kind].columns:

            def degraded(part: pl.DataFrame, by: list[str] = by) -> pl.DataFrame:
                return _degradation(part, by, matched.same_target, seed)

            found[name] = _families(rows[kind], ["group", "fill"], degraded)
    if "heads" in found:
        ranks.append(_families(rows["ablations"], ["group", "fill"], lambda part: _degradation_ranks(part, seed)))
    # losses of other units weigh timesteps otherwise
    scores = [name for name in _IMPORTANCES if name in _scores(rows.get("attributions"))] if matched.same_target else []
    importances = []
    for score in scores:
        attributed = rows["attributions"].with_columns(quantity=pl.lit(_IMPORTANCES[score]))
        family = ["group", "fill", "quantity"]

        def means(part: pl.DataFrame, score: str = score) -> pl.DataFrame:
            return _means(cells_of(part, [f"{score}_1", f"{score}_2"], ["site", "head"]), seed)

        importances.append(_families(attributed, family, means))

        def agreement(part: pl.DataFrame, score: str = score) -> pl.DataFrame:
            cells = cells_of(part, [f"{score}_1", f"{score}_2"], ["site", "head"])
            return rankings(cells, lambda w: tuple(weighed(w, x).mean(axis=2) for x in cells.values), seed)

        ranks.append(_families(attributed, family, agreement))
    if importances:
        found["importance"] = pl.concat(importances)
    if ranks:
        order = [
            "group",
            "fill",
            "quantity",
            "value",
            "low",
            "high",
            "within_first",
            "within_second",
            "across",
            "heads",
        ]
        found["ranks"] = pl.concat(table.select(*order, "sources", "exploratory", "void") for table in ranks)
    return found


def _scores(table: pl.DataFrame | None) -> list[str]:
    return [] if table is None else [name.removesuffix("_1") for name in table.columns if name.endswith("_1")]


def _families(
    rows: pl.DataFrame, labels: Sequence[str], estimate: Callable[[pl.DataFrame], pl.DataFrame]
) -> pl.DataFrame:
    """The estimates of every family, one below the other, with its labels in front."""
    return pl.concat(
        estimate(part).select(*(pl.lit(value).alias(name) for name, value in zip(labels, key, strict=True)), pl.all())
        for key, part in rows.group_by(labels, maintain_order=True)
    )


def _entropy(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    """See `ENTROPY`."""
    return _means(cells_of(rows, ["entropy_mean_1", "entropy_mean_2"], _QUERIES), seed)


def _means(cells: Cells, seed: int) -> pl.DataFrame:
    """Means of either run, and their difference."""
    first, second = (mean(array) for array in cells.values)
    return estimates(cells, first, second, difference(second, first), seed)


def _entropy_sites(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    """See `SITE_RATIO`."""
    site = ["site", "query_group", "keys"]
    item = ["source_id", "item", "replicate", "timestep"]
    values = ["entropy_mean_1", "entropy_mean_2"]
    heads = rows.group_by(site, maintain_order=True).agg(pl.col("head").n_unique().alias("heads"))
    cells = cells_of(rows.group_by(*item, *site, maintain_order=True).agg(pl.col(values).mean()), values, site)
    table = _means(cells, seed).drop(_FIRST_SECOND).with_columns(pl.col("value", "low", "high").exp())
    return heads.join(table, on=site, maintain_order="left").select(*site, "heads", pl.exclude(*site, "heads"))


def _clean_losses(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame | None:
    """The losses with nothing removed, a row per item, draw and timestep, from the first table that has them."""
    item = ["group", "source_id", "item", "replicate", "timestep"]
    for kind, name in (("ablations", "clean"), ("set_ablations", "clean"), ("attributions", "loss")):
        rows = tables.get(kind)
        if rows is not None and f"{name}_1" in rows.columns:
            pair = (pl.col(f"{name}_{number}").mean().alias(f"clean_{number}") for number in (1, 2))
            return rows.group_by(item, maintain_order=True).agg(*pair)
    return None


def _clean(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    """See `CLEAN`."""
    at_timesteps = cells_of(rows, ["clean_1", "clean_2"], ["timestep"], bands=None)
    overall = cells_of(rows, ["clean_1", "clean_2"], [])
    frames = []
    for cells in (at_timesteps, overall):
        one, two = cells.values
        # tested as a change, which is 0 where the ratio is 1
        table = estimates(cells, mean(one), mean(two), ratio(two - one, one), seed)
        table = table.with_columns(pl.col("value", "low", "high") + 1)
        if not cells.by:
            table = table.select(pl.lit(None, pl.Int64).alias("timestep"), pl.all())
        frames.append(table)
    return pl.concat([frames[0].sort("timestep"), frames[1]])


def _degradation(rows: pl.DataFrame, by: list[str], absolute: bool, seed: int) -> pl.DataFrame:
    """See `DEGRADATION`."""
    cells = _degradation_cells(rows, by)
    change_1, clean_1, change_2, clean_2 = cells.values
    first, second = ratio(change_1, clean_1), ratio(change_2, clean_2)
    table = estimates(cells, first, second, difference(second, first), seed)
    beside = interval(cells, mean(change_2 - change_1), "absolute", seed)
    return table.with_columns(beside if absolute else [pl.lit(None, pl.Float64).alias(one.name) for one in beside])


def _degradation_cells(rows: pl.DataFrame, by: list[str]) -> Cells:
    changes = [(pl.col(f"edited_{n}") - pl.col(f"clean_{n}")).alias(f"change_{n}") for n in (1, 2)]
    return cells_of(rows.with_columns(changes), ["change_1", "clean_1", "change_2", "clean_2"], by)


def _degradation_ranks(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    cells = _degradation_cells(rows, ["site", "head"])

    def degradations(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        change_1, clean_1, change_2, clean_2 = (weighed(weights, array) for array in cells.values)
        return (change_1 / clean_1).mean(axis=2), (change_2 / clean_2).mean(axis=2)

    return rankings(cells, degradations, seed).with_columns(quantity=pl.lit("degradation"))
