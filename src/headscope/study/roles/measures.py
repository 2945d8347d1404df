"""One group and split: every source's excess of every head on every feature, and the test of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from headscope.study.inference import means, settings
from headscope.study.roles.counterparts import NAME, UNIT, Counterparts, counterparts_of, least_share
from headscope.study.roles.excess import ROUNDING, corrected, excess_by_source, permuted_pairs
from headscope.study.roles.maps import Maps, residual_maps
from headscope.study.roles.masses import masses_of
from headscope.study.roles.rows import HEAD, Sources, sources_of

OF_MAPS = "standard deviations"
# a dependence on a map that is smaller makes no name
LEAST = 0.1
CELL = (*HEAD, "feature")


@dataclass(frozen=True)
class Measured:
    """What was measured in one group and split.

    Attributes:
        sources: of the split.
        timesteps: sorted.
        cells: site, head, feature, unit, least (the excess that makes a name), rival (a feature that isn't there, as
            others say as much of its map, and that explains more of what the head does; null: none), having (how many
            sources have the feature), void.
        values: a source's part in the excess, [sources, timesteps, cells]; NaN where void, or where a source has no
            counterparts.
        own: the same on the feature's own map, before other features are taken off, mean over timesteps: [sources,
            cells].
        features: see `maps.Maps.table`, with grid_height and grid_width; one row per grid and feature.
        sinks: of every head the key that it looks at most (site, head, sink_key, keys), all void heads left out.
        on_sink: a source's mass on that key: source_id, site, head, value.
        regions: what the counterparts are made of; None where there are none.
    """

    sources: Sources
    timesteps: list[int]
    cells: pl.DataFrame
    values: np.ndarray
    own: np.ndarray
    features: pl.DataFrame
    sinks: pl.DataFrame
    on_sink: pl.DataFrame
    regions: Counterparts | None
    _tests: Iterator[tuple[np.ndarray, np.ndarray]]

    def tested(self, chosen: pl.DataFrame, seed: int) -> pl.DataFrame:
        """The excess of every cell with its interval and tests.

        chosen: site, head, feature of the cells that are a family of their own. Can be called once. Returns a table:
        site, head, feature, unit, least, value, low, high, p_value, p_maxt, p_chosen, standard_error, own, own_low,
        own_high, rival, having, sources, exploratory, void.
        """
        marked = self.cells.join(
            chosen.select(CELL).with_columns(_in=True), on=list(CELL), how="left", maintain_order="left"
        )
        mine = marked["_in"].fill_null(False).to_numpy()
        p_values = corrected(self._tests, len(self.cells), mine)
        found = _intervals(self.cells, self.sources.names, self.values.mean(axis=1), seed)
        own = _intervals(self.cells, self.sources.names, self.own, seed)
        found = found.with_columns(own=own["value"], own_low=own["low"], own_high=own["high"])
        few = found["sources"].to_numpy() < settings.FEWEST_SOURCES
        columns = {
            name: pl.Series(name, np.where(few, np.nan, p), pl.Float64, nan_to_null=True)
            for name, p in zip(("p_value", "p_maxt", "p_chosen"), p_values, strict=True)
        }
        found = found.with_columns(**columns)
        order = [*CELL, "unit", "least", "value", "low", "high", "p_value", "p_maxt", "p_chosen", "standard_error"]
        return found.select(*order, "own", "own_low", "own_high", "rival", "having", "sources", "exploratory", "void")

    def at_timesteps(self, heads: pl.DataFrame, seed: int) -> pl.DataFrame:
        """The excess of some heads on every feature at every timestep, without tests; heads: site, head."""
        wanted = self.cells.with_row_index("_at").join(
            heads.select(HEAD), on=list(HEAD), how="semi", maintain_order="left"
        )
        at = wanted["_at"].to_list()
        frames = []
        for number, timestep in enumerate(self.timesteps):
            found = _intervals(wanted.drop("_at"), self.sources.names, self.values[:, number, at], seed)
            columns = [*CELL, "unit", pl.lit(timestep).alias("timestep"), "value", "low", "high", "standard_error"]
            frames.append(found.select(*columns, "sources", "exploratory", "void"))
        return pl.concat(frames) if frames else pl.DataFrame()

    def rows_of(self, cell: int) -> pl.DataFrame:
        """A cell's numbers: source_id, timestep, value."""
        array = self.values[:, :, cell]
        there = np.isfinite(array).any(axis=1)
        return pl.DataFrame(
            {
                "source_id": np.repeat(np.array(self.sources.names, object)[there], len(self.timesteps)),
                "timestep": self.timesteps * int(there.sum()),
                "value": array[there].ravel(),
            },
            schema_overrides={"source_id": pl.String},
        )


def measure(
    features: pl.DataFrame,
    key_mass: pl.DataFrame,
    counterparts: pl.DataFrame | None,
    sinks: Mapping[tuple[str, int], int],
    seed: int,
) -> Measured:
    """Measure one group and split; all tables are of it, key_mass of images that aren't translated.

    sinks: the keys whose mass is wanted, by site and head; of other heads the key that they look at most here.
    """
    sources = sources_of(key_mass)
    timesteps = key_mass["timestep"].unique().sort().to_list()
    maps: dict[tuple[int, int], Maps] = {}
    cells, values, owns, tests, tables, keys, on_sink = [], [], [], [], [], [], []
    start = 0
    for (site,), rows in key_mass.sort("site", maintain_order=True).group_by("site", maintain_order=True):
        grid = rows["grid_height"][0], rows["grid_width"][0]
        if rows.select("grid_height", "grid_width").n_unique() > 1:
            raise ValueError(f"key_mass: got site {site} with grids of several sizes in one group and split")
        if grid not in maps:
            of_grid = features.filter(pl.col("grid_height") == grid[0], pl.col("grid_width") == grid[1])
            maps[grid] = residual_maps(of_grid, sources)
            size = {"grid_height": pl.lit(grid[0]), "grid_width": pl.lit(grid[1])}
            tables.append(maps[grid].table.with_columns(**size))
        found, of_site = masses_of(rows, sources, timesteps), maps[grid]
        for head, mass, void in zip(found.heads, found.arrays, found.void, strict=True):
            at = np.arange(start, start + len(of_site.names))
            start += len(at)
            if void or len(sources.names) < 2:
                cells += [
                    (site, head, name, OF_MAPS, LEAST, None, count, int(void)) for name, count in of_site.having.items()
                ]
                values.append(np.full((len(sources.names), len(timesteps), len(at)), np.nan))
                owns.append(np.full((len(sources.names), len(at)), np.nan))
                continue
            values.append(excess_by_source(mass, of_site.arrays, sources))
            own = excess_by_source(mass.mean(axis=1), of_site.own, sources)
            owns.append(own[:, : len(at)])
            rivals = _rivals(own, of_site)
            cells += [
                (site, head, name, OF_MAPS, LEAST, rival, count, 0)
                for (name, count), rival in zip(of_site.having.items(), rivals, strict=True)
            ]
            if len(at):
                tests.append((at, mass.mean(axis=1), of_site.arrays))
            mean = sources.averaged(mass.mean(axis=1))
            key = sinks.get((site, head), int(mean.mean(axis=0).argmax()))
            keys.append((site, head, key, mass.shape[2]))
            on_sink += [
                (name, site, head, float(number)) for name, number in zip(sources.names, mean[:, key], strict=True)
            ]
    regions = None if counterparts is None else counterparts_of(counterparts, sources, timesteps)
    if regions is not None:
        least = least_share(regions)
        cells += [
            (*head, NAME, UNIT, least, None, len(regions.sources), int(void))
            for head, void in zip(regions.heads.iter_rows(), regions.void, strict=True)
        ]
        values.append(_on_all_sources(regions, sources))
        owns.append(values[-1].mean(axis=1))
    schema = {"site": pl.String, "head": pl.Int64, "feature": pl.String, "unit": pl.String}
    schema |= {"least": pl.Float64, "rival": pl.String, "having": pl.Int64, "void": pl.Int64}
    sink = {"site": pl.String, "head": pl.Int64, "sink_key": pl.Int64, "keys": pl.Int64}
    mass_on = {"source_id": pl.String, "site": pl.String, "head": pl.Int64, "value": pl.Float64}
    return Measured(
        sources,
        timesteps,
        pl.DataFrame(cells, schema, orient="row"),
        np.concatenate(values, axis=2),
        np.concatenate(owns, axis=1),
        pl.concat(tables),
        pl.DataFrame(keys, sink, orient="row"),
        pl.DataFrame(on_sink, mass_on, orient="row"),
        regions,
        _statistics(tests, regions, start, sources, seed),
    )


def _rivals(own: np.ndarray, maps: Maps) -> list[str | None]:
    """Of every feature the dropped one on whose own map the head's excess has a larger |t|: own [sources, features]."""
    t = np.abs(own.mean(axis=0)) / np.sqrt(own.var(axis=0, ddof=1) / len(own) + ROUNDING**2)
    count = len(maps.names)
    if len(t) == count or not count:
        return [None] * count
    best = int(t[count:].argmax())
    return [maps.dropped[best] if t[count + best] > length else None for length in t[:count]]


def _statistics(
    tests: list, regions: Counterparts | None, start: int, sources: Sources, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for at, mass, maps in tests:
        yield at, permuted_pairs(mass, maps, sources, seed)
    if regions is not None:
        sound = regions.void == 0
        yield start + np.flatnonzero(sound), regions.exchanged(seed)[:, sound]


def _on_all_sources(regions: Counterparts, sources: Sources) -> np.ndarray:
    """[sources, timesteps, heads], NaN for sources without counterparts and for void heads."""
    found = np.full((len(sources.names), regions.values.shape[3], len(regions.heads)), np.nan)
    at = [sources.names.index(name) for name in regions.sources]
    found[at] = np.where(regions.void == 0, regions.own(), np.nan)
    return found


def _intervals(cells: pl.DataFrame, names: list[str], values: np.ndarray, seed: int) -> pl.DataFrame:
    """The mean over sources of every cell with its interval: values [sources, cells]. Void cells have no numbers."""
    numbered = cells.with_row_index("_number")
    source, cell = (index.ravel() for index in np.indices(values.shape))
    rows = pl.DataFrame(
        {"source_id": pl.Series(names, dtype=pl.String)[source], "_number": cell, "value": values.ravel()},
        schema_overrides={"_number": pl.UInt32},
    )
    found = means(rows.filter(pl.col("value").is_finite()), "value", ["_number"], seed=seed, leave_out=True)
    found = numbered.join(found.drop("void", "left_out"), on="_number", how="left", maintain_order="left")
    found = found.with_columns(pl.col("sources").fill_null(0), pl.col("exploratory").fill_null(True))
    return found.drop("_number")
