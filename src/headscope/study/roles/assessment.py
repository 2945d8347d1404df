"""From the tables of a sweep to the roles of heads."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from headscope.study.inference import settings, source_means
from headscope.study.roles.clusters import cluster_heads
from headscope.study.roles.counterparts import NAME, Counterparts
from headscope.study.roles.forms import local_heads, sink_heads, uniform_heads
from headscope.study.roles.gating import gated
from headscope.study.roles.grouped import Grouped, grouped
from headscope.study.roles.kinds import kinds_of
from headscope.study.roles.measures import Measured, measure
from headscope.study.roles.naming import PRECEDENCE, among, chosen_cells, chosen_roles, confirmed_cells, named
from headscope.study.roles.rows import HEAD, SPLITS, checked
from headscope.study.roles.ties import against_control

# of every head, and `near`: its distance over that of uniform attention; `deficit`: ln K - H
_SCALARS = ("entropy", "entropy_normalised", "distance", "near", "deficit")


@dataclass(frozen=True)
class Roles:
    """What the heads of every group are for. Each table has a column group; values by source, see docs/study.md.

    Attributes:
        names: one row a head: site, head, role (a feature's name, "uniform", "sink", "local", "none"), feature, sign
            (-1: it avoids the feature), unit, value, low, high, p_maxt (of confirm, among the cells that were chosen;
            of uniform, sink and local Holm's), standard_error, sources, exploratory, void (of a head without a role the
            rows and maps of both splits that are missing or not finite), local (besides), discover (the excess there),
            reason (of none), entropy (nats), entropy_normalised, distance (tokens), gating and what belongs to it, see
            `gating.gated`.
        chosen: what the discover split alone says, for sets of heads to be removed on confirm: one row a head, see
            `naming.chosen_roles`.
        excess: split, site, head, feature, unit, value, low, high, p_value, p_maxt (over heads and features of a group
            and split), standard_error, own, own_low, own_high (on the feature's own map, before other features are
            taken off), rival (a feature left out that explains more; null: none), having (sources that have the
            feature), sources, exploratory, void.
        excess_timesteps: the same without tests, with timestep and log_snr (nats; null where it isn't known): of the
            named heads on the confirm split.
        kinds: see `kinds.kinds_of`.
        clusters: site, head, cluster.
        cluster_agreement: see `clusters.cluster_heads`.
        features: what became of every feature, see `maps.Maps.table`: split, grid_height, grid_width, feature, ...
        ties: of groups with a control in the tables: control, split, and the columns of `ties.against_control`; a head
            is named counterpart only by them. None where there are none.
    """

    names: pl.DataFrame
    chosen: pl.DataFrame
    excess: pl.DataFrame
    excess_timesteps: pl.DataFrame | None
    kinds: pl.DataFrame
    clusters: pl.DataFrame
    cluster_agreement: pl.DataFrame
    features: pl.DataFrame
    ties: pl.DataFrame | None = None

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables there are, by name."""
        names = ("names", "chosen", "excess", "excess_timesteps", "kinds", "clusters", "cluster_agreement", "features")
        return {name: table for name in (*names, "ties") if (table := getattr(self, name)) is not None}


def assess(
    features: pl.DataFrame,
    key_mass: pl.DataFrame,
    counterparts: pl.DataFrame | None = None,
    *,
    controls: Mapping[str, str] | None = None,
    log_snr: Mapping[int, float] | None = None,
    seed: int = 0,
) -> Roles | None:
    """Name every head's role, or none: see `naming.NAMING`.

    Args:
        features, key_mass, counterparts: a sweep's tables of these kinds; only the splits discover and confirm count.
            An item that one of the first two lacks is void there, and counted.
        controls: of tied groups their untied control; groups without one, or whose control isn't in the tables, are
            named by their own excess alone.
        log_snr: of every timestep, nats; without it no gating.
        seed: of permutations and draws.

    Returns:
        None where no group has both splits.

    Raises:
        ValueError: where a table lacks a column, a list isn't as long as its grid, an item is of two sources, a donor's
            source has no counterparts itself, a group is its own control, a feature
            is called as another role is, a group has no features on the grid of a site (no rows at all are no
            features), or a timestep has no log-SNR.
    """
    features, key_mass = checked("features", features), checked("key_mass", key_mass)
    taken = sorted(set(features["feature"].unique()) & {*PRECEDENCE, NAME})
    if taken:
        raise ValueError(f"features: got a feature called {', '.join(taken)}, which is a role's name; expected another")
    places = ["group", "grid_height", "grid_width"]
    bare = key_mass.select(places).unique().join(features, on=places, how="anti").sort(places)
    if len(features) and len(bare):
        group, height, width = bare.row(0)
        raise ValueError(f"features: got none of {group} on {height} x {width} tokens, which key_mass has")
    unknown = [] if log_snr is None else sorted(set(key_mass["timestep"].unique()) - set(log_snr))
    if unknown:
        raise ValueError(f"log_snr: lacks {', '.join(map(str, unknown))}, expected a number for every timestep")
    controls = dict(controls or {})
    itself = sorted(group for group, control in controls.items() if group == control)
    if itself:
        raise ValueError(f"controls: got {itself[0]} as its own control, expected another group")
    # with one key there is nowhere else to look
    key_mass = key_mass.filter(pl.col("key_mass").list.len() > 1)
    counterparts = None if counterparts is None else checked("counterparts", counterparts)
    studied = [
        group
        for group in key_mass["group"].unique().sort().to_list()
        if set(SPLITS) <= set(key_mass.filter(pl.col("group") == group)["split"].unique())
    ]
    tables = features, key_mass, counterparts
    found: dict[str, list[pl.DataFrame]] = {}
    for group in studied:
        control = controls.get(group) if counterparts is not None and controls.get(group) in studied else None
        untied = None if control is None else grouped(*tables, control).regions()
        for name, table in _of_group(grouped(*tables, group), untied, log_snr, seed).items():
            if name == "ties":
                table = table.select(pl.lit(control).alias("control"), pl.all())
            found.setdefault(name, []).append(table.select(pl.lit(group).alias("group"), pl.all()))
    if not found:
        return None
    whole = {name: pl.concat(parts) for name, parts in found.items()}
    return Roles(**({"excess_timesteps": None} | whole))


def _of_group(
    rows: Grouped,
    untied: Mapping[str, Counterparts | None] | None,
    log_snr: Mapping[int, float] | None,
    seed: int,
) -> dict[str, pl.DataFrame]:
    """The tables of one group; untied: what its control's excess on counterparts is made of."""
    both = {split: rows.key_mass.filter(pl.col("split") == split) for split in SPLITS}
    still = {split: rows.of(split)[1] for split in SPLITS}

    def measured(split: str, sinks: Mapping[tuple[str, int], int]) -> Measured:
        return measure(*rows.of(split), sinks, seed)

    def against(part: Measured, split: str) -> pl.DataFrame | None:
        return None if untied is None else against_control(part.regions, untied[split], seed)

    discover = measured("discover", {})
    nothing = pl.DataFrame(schema={"site": pl.String, "head": pl.Int64, "feature": pl.String})
    excess = {"discover": discover.tested(nothing, seed)}
    ties = {"discover": against(discover, "discover")}
    chosen = chosen_cells(excess["discover"], ties["discover"])
    keys = {(site, head): key for site, head, key, _ in discover.sinks.iter_rows()}
    confirm = measured("confirm", keys)
    excess["confirm"] = confirm.tested(chosen.filter(pl.col("doubt").is_null()), seed)
    ties["confirm"] = against(confirm, "confirm")
    parts = {"discover": discover, "confirm": confirm}
    by_split = {
        "uniform": [uniform_heads(still[split], seed) for split in SPLITS],
        "sink": [sink_heads(part.on_sink, part.sinks, seed) for part in parts.values()],
        "local": [local_heads(both[split], seed) for split in SPLITS],
    }
    forms = {role: among(*tables) for role, tables in by_split.items()}
    of_discover = {role: tables[0] for role, tables in by_split.items()}
    few = min(len(part.sources.names) for part in (discover, confirm)) < settings.FEWEST_SOURCES
    entropy = {split: _by_source(mass) for split, mass in still.items()}
    mean = entropy["confirm"].group_by(HEAD, maintain_order=True)
    beside = mean.agg(pl.col("entropy", "entropy_normalised", "distance").mean()).sort(HEAD)
    heads = _unseen(rows, parts)
    names = named(heads, confirmed_cells(chosen, excess["confirm"], ties["confirm"]), forms, few)
    names = names.join(beside, on=list(HEAD), how="left", maintain_order="left")
    gating = gated(names, confirm, (entropy["discover"], entropy["confirm"]), log_snr, seed)
    names = names.join(gating, on=list(HEAD), how="left", maintain_order="left")
    labels, agreement = _clusters(parts, entropy, seed)
    found = {
        "names": names,
        "chosen": chosen_roles(heads, chosen, of_discover),
        "excess": _of_splits({split: table.drop("p_chosen", "least") for split, table in excess.items()}),
        "kinds": kinds_of(names, still["confirm"], seed),
        "clusters": labels,
        "cluster_agreement": agreement,
        "features": _of_splits({split: part.features for split, part in parts.items()}),
    }
    compared = {split: table for split, table in ties.items() if table is not None}
    if compared:
        found["ties"] = _of_splits(compared)
    with_feature = names.filter(pl.col("feature").is_not_null())
    if len(with_feature):
        ratio = pl.col("timestep").replace_strict(log_snr or {}, default=None, return_dtype=pl.Float64)
        found["excess_timesteps"] = confirm.at_timesteps(with_feature, seed).with_columns(log_snr=ratio)
    return found


def _unseen(rows: Grouped, parts: Mapping[str, Measured]) -> pl.DataFrame:
    """Of every head what is missing: site, head, void, unseen, unseen_maps, see `naming.named`."""
    grid = ["grid_height", "grid_width"]
    maps = pl.concat(part.features for part in parts.values()).filter(pl.col("void") > 0)
    of_grid = maps.group_by(grid).agg(
        unseen=pl.col("feature").unique().sort().str.join(", "), unseen_maps=pl.col("void").sum()
    )
    of_head = rows.key_mass.select(*HEAD, *grid).unique(HEAD).join(of_grid, on=grid, how="left")
    found = rows.void().join(of_head, on=list(HEAD), maintain_order="left")
    return found.with_columns(pl.col("unseen").fill_null(""), pl.col("unseen_maps").fill_null(0))


def _of_splits(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(table.select(pl.lit(split).alias("split"), pl.all()) for split, table in tables.items())


def _by_source(rows: pl.DataFrame) -> pl.DataFrame:
    """Of every source: source_id, site, head, timestep, `_SCALARS`; null and counted in void where some lack."""
    keys = pl.col("grid_height").cast(pl.Float64) * pl.col("grid_width").cast(pl.Float64)
    rows = rows.with_columns(
        deficit=keys.log() - pl.col("entropy").cast(pl.Float64),
        near=pl.col("distance").cast(pl.Float64) / pl.col("distance_uniform").cast(pl.Float64),
    )
    found = source_means(rows, _SCALARS, HEAD, "timestep")
    source, cell, step = (index.ravel() for index in np.indices(found.values[0].shape))
    timesteps = rows["timestep"].unique().sort()
    columns = {
        "source_id": pl.Series(found.sources, dtype=pl.String)[source],
        **{name: found.cells[name][cell] for name in HEAD},
        "timestep": timesteps[step],
        "void": pl.Series(found.void)[cell],
    }
    sound = found.void[cell] == 0
    numbers = {
        name: pl.Series(name, np.where(sound, array.ravel(), np.nan), nan_to_null=True)
        for name, array in zip(_SCALARS, found.values, strict=True)
    }
    return pl.DataFrame(columns | numbers)


def _clusters(
    parts: Mapping[str, Measured], entropy: Mapping[str, pl.DataFrame], seed: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Clusters of the heads of one group: site, head, cluster (null for void heads); and their agreement."""
    profiles = {split: _profile(part, entropy[split]) for split, part in parts.items()}
    columns = [column for column in profiles["discover"][1] if column in profiles["confirm"][1]]
    heads = [head for head in profiles["discover"][0] if head in profiles["confirm"][0]]
    arrays = []
    for mine, named_columns, array in profiles.values():
        at = np.ix_(range(len(array)), [mine.index(head) for head in heads], [named_columns.index(c) for c in columns])
        arrays.append(array[at])
    blocks = np.array([column[0] for column in columns], dtype=str)
    labels, agreement = cluster_heads(np.concatenate(arrays), blocks, seed)
    every = entropy["confirm"].select(HEAD).unique().sort(HEAD)
    of_head = dict(zip(heads, labels.tolist(), strict=True))
    cluster = [of_head.get(head) for head in every.iter_rows()]
    return every.with_columns(pl.Series("cluster", cluster, pl.Int64)), agreement


def _profile(
    part: Measured, entropy: pl.DataFrame
) -> tuple[list[tuple[str, int]], list[tuple[str, str, int]], np.ndarray]:
    """Heads without void numbers, columns (kind of number, name, timestep) that all have, [sources, heads, columns]."""
    void = part.cells.filter(pl.col("void") > 0)
    sound = entropy.filter(pl.col("void") == 0).join(void, on=list(HEAD), how="anti", maintain_order="left")
    heads = sound.select(HEAD).unique().sort(HEAD)
    sound = sound.join(heads.with_row_index("_at"), on=list(HEAD)).sort("source_id", "_at", "timestep")
    shape = (len(part.sources.names), len(heads), len(part.timesteps))
    columns, arrays = [], []
    for kind in ("entropy_normalised", "near"):
        arrays.append(sound[kind].to_numpy().reshape(shape))
        columns += [(kind, kind, timestep) for timestep in part.timesteps]
    numbered = part.cells.with_row_index("_cell").join(heads, on=list(HEAD), how="semi", maintain_order="left")
    for feature in numbered["feature"].unique().sort().to_list():
        mine = numbered.filter(pl.col("feature") == feature).sort(HEAD)
        array = np.moveaxis(part.values[:, :, mine["_cell"].to_numpy()], 1, 2)
        if len(mine) == len(heads) and np.isfinite(array).all():
            arrays.append(array)
            columns += [(NAME if feature == NAME else "excess", feature, timestep) for timestep in part.timesteps]
    return list(heads.iter_rows()), columns, np.concatenate(arrays, axis=2)
