"""Excess mass on counterparts: do queries look at what is tied to them, beyond what other items' ties would give?"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from headscope.study.inference import settings
from headscope.study.inference.draws import picked
from headscope.study.roles.rows import HEAD, Sources, places

COUNTERPART = (
    "Over queries that have counterparts, the mean attention on them minus that on as many others: the counterparts of"
    " other queries of the same part, which look alike in all but what is tied. Of that, what the same attention gives"
    " where other items (donors) have counterparts and others is taken off. A share of attention. What a donor's"
    " counterparts get from whichever item, and what an item gives whichever counterparts, is taken off first (least"
    " squares). In a group of mirrored images counterparts are mirror images. Patches that hold as"
    " much of a thing resemble each other, tied or not: heads can have an excess on an untied control, too, so a tied"
    " group is held against its control head by head."
)
EXCHANGED = (
    "In every draw each source takes one of its own and its donors' regions at random for its own, the same one for all"
    " heads, and t is computed anew."
)
NAME, UNIT = "counterpart", "share of attention"
# the least excess that makes a name: so many times what uniform attention would give, but from LEAST to ENOUGH
LEAST, LEAST_TIMES, ENOUGH = 0.02, 2.0, 0.1
# what single precision may leave of a share of attention
ROUNDING = 1e-7


@dataclass(frozen=True)
class Counterparts:
    """Every source's excess on its own and its donors' counterparts, in one group and split.

    Attributes:
        heads: site, head.
        sources: names, those with counterparts.
        values: [sources, regions, heads, timesteps]; own regions first; NaN where a donor is of the source itself.
        share: what uniform attention would give, mean over items.
        void: rows that are missing or not finite, [heads].
    """

    heads: pl.DataFrame
    sources: list[str]
    values: np.ndarray
    share: float
    void: np.ndarray

    def own(self) -> np.ndarray:
        """A source's part in the excess: [sources, timesteps, heads]."""
        return np.moveaxis(self.values[:, 0], 1, 2)

    def exchanged(self, seed: int) -> np.ndarray:
        """t of the mean over timesteps as it is and in every draw, see `EXCHANGED`: [1 + draws, heads]."""
        table = self.values.mean(axis=3)
        there = ~np.isnan(table).any(axis=2)
        picks = picked(seed, tuple(there.sum(axis=1).tolist()), settings.RESAMPLES)
        total, squares = np.zeros((2, picks.shape[1], table.shape[2]))
        for source, pick in enumerate(picks):
            taken = table[source][there[source]][pick]
            total += taken
            squares += np.square(taken, out=taken)
        count = len(table)
        mean = total / count
        variance = np.maximum(squares / count - mean**2, 0.0) / (count - 1)
        return mean / np.sqrt(variance + ROUNDING**2)


def least_share(found: Counterparts) -> float:
    """The least excess that makes a name: see `LEAST`."""
    return min(ENOUGH, max(LEAST, LEAST_TIMES * found.share))


def counterparts_of(rows: pl.DataFrame, sources: Sources, timesteps: list[int]) -> Counterparts | None:
    """From the rows of one group and split in the table "counterparts"; None where no item has counterparts.

    Raises ValueError where it has items or timesteps that the key masses haven't, lacks timesteps, or has a donor of a
    source that has no counterparts itself.
    """
    if len(rows) and rows["timestep"].unique().sort().to_list() != timesteps:
        got = ", ".join(map(str, rows["timestep"].unique().sort()))
        raise ValueError(
            f"counterparts: got timesteps {got}, expected those of key_mass, {', '.join(map(str, timesteps))}"
        )
    unknown = sorted(set(rows["item"].unique()) - set(sources.items))
    if unknown:
        raise ValueError(f"counterparts: got item {unknown[0]}, which key_mass has no row of")
    rows = rows.filter(pl.col("tokens") > 0)
    having = rows.filter(pl.col("donor") == 0)["item"].unique().sort().to_list()
    if not having or rows["donor"].max() == 0:
        return None
    rows = rows.filter(pl.col("item").is_in(having))
    heads = rows.select(HEAD).unique().sort(HEAD)
    regions = int(rows["donor"].max()) + 1
    shape = (len(heads), len(having), regions, len(timesteps))
    at_head = rows.select(HEAD).join(heads.with_row_index("_at"), on=list(HEAD), how="left", maintain_order="left")
    head, item = at_head["_at"].to_numpy().astype(np.int64), places(rows, "item", having)
    donor = rows["donor"].to_numpy().astype(np.int64)
    cell = np.ravel_multi_index((head, item, donor, places(rows, "timestep", timesteps)), shape)
    mass = rows["mass"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    order = np.lexsort((rows["call"].to_numpy(), rows["replicate"].to_numpy(), cell))
    number = np.bincount(cell, minlength=int(np.prod(shape)))
    found, starts = np.unique(cell[order], return_index=True)
    array = np.full(int(np.prod(shape)), np.nan)
    array[found] = np.add.reduceat(mass[order], starts) / number[found]
    number, array = number.reshape(shape), array.reshape(shape)
    # an item whose donor has no counterparts lacks that region for every head, draw and timestep
    there = number.sum(axis=(0, 3)) > 0
    lacking = ((number.max() - number) * there[None, :, :, None]).sum(axis=(1, 2, 3))
    void = lacking + np.bincount(head, ~np.isfinite(mass), len(heads)).astype(np.int64)
    source_of = dict(zip(sources.items, (sources.names[source] for source in sources.source), strict=True))
    own = np.array([source_of[name] for name in having], object)
    region_of = np.full((len(having), regions), "", object)
    region_of[item, donor] = rows["donor_source"].to_numpy()
    region_of[:, 0] = own
    strange = sorted(set(region_of[there]) - set(own))
    if strange:
        raise ValueError(
            f"counterparts: got donor_source {strange[0]}, expected the source of an item of the same group and split"
            " that has counterparts itself"
        )
    # a donor of the source itself says nothing of others
    there &= (region_of != own[:, None]) | (np.arange(regions) == 0)
    share = rows.filter(pl.col("donor") == 0)["share"].cast(pl.Float64).mean()
    assert isinstance(share, float)
    array = np.where(there[None, :, :, None] & (void == 0)[:, None, None, None], array, 0.0)
    names = sorted(set(own))
    table, where = _of_sources(array, there, region_of, own, names)
    values = _standardised(table, where, len(names))
    kept = np.isfinite(values).any(axis=(2, 3)).sum(axis=1) > 1
    kept &= np.isfinite(values[:, 0]).any(axis=(1, 2))
    if kept.sum() < 2:
        return None
    return Counterparts(
        heads, [name for name, keep in zip(names, kept, strict=True) if keep], values[kept], share, void
    )


def _of_sources(
    array: np.ndarray, there: np.ndarray, region_of: np.ndarray, own: np.ndarray, names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Means over the items of a source, by the source whose map says the regions, its own first.

    array [heads, items, regions, timesteps]; there and region_of [items, regions]; own: the source of every item.
    Returns [heads, sources, regions, timesteps], and whose map it is, [sources, regions], -1 for none.
    """
    number = {name: place for place, name in enumerate(names)}
    cells = []
    for name in names:
        mine = (own == name)[:, None] & there
        donors = sorted({number[donor] for donor in region_of[mine]} - {number[name]})
        cells.append([number[name], *donors])
    where = np.full((len(names), max(map(len, cells))), -1)
    table = np.zeros((array.shape[0], *where.shape, array.shape[3]))
    for source, regions in enumerate(cells):
        for place, region in enumerate(regions):
            items, donors = np.nonzero((own == names[source])[:, None] & there & (region_of == names[region]))
            if len(items):
                table[:, source, place] = array[:, items, donors].mean(axis=1)
                where[source, place] = region
    return table, where


def _standardised(table: np.ndarray, where: np.ndarray, maps: int) -> np.ndarray:
    """What effects of the source and of the map leave, by least squares, in units of an excess on one's own.

    With r the residual of a cell and h its leverage, r / sqrt(1 - h) has the same spread in every cell. The excess is
    the mean of r over own cells divided by g, what such a mean leaves of an excess of 1; its variance is that of a cell
    / (sources g). So own cells are the excess plus deviations of r / sqrt((1 - h) g), and others r / sqrt((1 - h) g):
    only then own and other cells are exchangeable, as an own cell's source and map have fewer cells in common.

    table [heads, sources, regions, timesteps]; where: whose map, [sources, regions], -1 for none, of which it is 0.
    Returns [sources, regions, heads, timesteps], NaN where there is none, or nothing is left.
    """
    there = where >= 0
    count = np.maximum(there.sum(axis=1), 1)
    incidence = np.zeros((len(where), maps))
    incidence[np.nonzero(there)[0], where[there]] = 1.0
    normal = np.diag(incidence.sum(axis=0)) - incidence.T @ (incidence / count[:, None])
    # the level of the maps that sources connect is that of the sources: any will do
    _, part = connected_components(csr_matrix(np.abs(normal) > 1e-12), directed=False)
    inverse = np.linalg.inv(normal + (part[:, None] == part) * 1.0)

    def without(numbers: np.ndarray) -> np.ndarray:
        mean = numbers.sum(axis=1, keepdims=True) / count[:, None, None]
        return np.where(there[..., None], numbers - mean, 0.0)

    cells = np.moveaxis(table, 0, 2).reshape(*where.shape, -1)
    own = ((np.arange(where.shape[1]) == 0) & there)[..., None] * 1.0
    rest = without(np.concatenate([cells, own], axis=2))
    total = np.zeros((maps, rest.shape[2]))
    np.add.at(total, where[there], rest[there])
    effects = np.zeros_like(rest)
    effects[there] = (inverse @ total)[where[there]]
    rest = rest - without(effects)
    spread = np.full(where.shape, np.nan)
    for source, (row, has) in enumerate(zip(where, there, strict=True)):
        among = inverse[np.ix_(row[has], row[has])]
        leverage = 1 / count[source] + np.diag(among) - 2 * among.mean(axis=1) + among.mean() if has.any() else []
        spread[source, has] = np.sqrt(np.maximum(1 - np.asarray(leverage), 0.0))
    # a cell that its own effects explain whole
    spread[~(spread > 1e-6)] = np.nan
    usable = there[:, 0] & np.isfinite(spread[:, 0])
    left = rest[usable, 0, -1].mean() if usable.any() else np.nan
    found = rest[..., :-1] / spread[..., None] / np.sqrt(left)
    excess = rest[usable, 0, :-1].mean(axis=0) / left if usable.any() else np.nan
    found[:, 0] += excess - found[usable, 0].mean(axis=0)
    return found.reshape(*where.shape, table.shape[0], table.shape[3])
