"""Tables of estimates, from tables with one row per item: means, differences, ratios, degradations.

Rows are polars tables with a column source_id, and item and replicate where there are several. `by` names the columns
that tell the quantities of a family apart; `bands` the column (timestep) over which a quantity is averaged, every
value with equal weight. All results have the columns of `by`, then value, low, high, p_value and p_maxt where they were
asked for, standard_error (of the sampling of sources), sources, exploratory and void (see `VOID`: where it isn't 0, all
numbers are null).
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np
import polars as pl

from headscope.study.inference import settings, smooth
from headscope.study.inference.intervals import Added, Inference, infer, t_statistic
from headscope.study.inference.permutation import permuted
from headscope.study.inference.sources import SourceMeans, source_means


def means(
    rows: pl.DataFrame,
    value: str,
    by: Sequence[str] = (),
    bands: str | None = None,
    seed: int = 0,
    *,
    test: bool = False,
    family: bool = False,
    added: pl.DataFrame | None = None,
    leave_out: bool = False,
) -> pl.DataFrame:
    """The mean over sources, per quantity: see `MEAN`.

    Args:
        rows: one row per item (and draw of noise, and quantity).
        value: the column to average.
        by, bands: see above.
        seed: of the draws.
        test: whether to test that the mean is 0, see `EFFECT_TEST`: a column p_value.
        family: whether to correct that for all quantities, see `MAX_T`: a column p_maxt.
        added: an error beside that of sampling sources: the columns of `by`, added_error (its standard error) and
            added_freedom (its degrees of freedom).
        leave_out: NaN and null mean that an item has none of the quantity: such rows, and those that are missing, are
            left out and counted in a column left_out, a source without any is not counted. Not with `family`.
    """
    if family and leave_out:
        raise ValueError("leave_out: got True with family, whose quantities have to share their sources")
    table = source_means(rows, [value], by, bands, leave_out=leave_out)
    array = _over_bands(table)
    extra = _added(added, table.cells, by, "added_error")

    def run(cells: np.ndarray, sources: np.ndarray) -> Inference:
        groups = [array[None, sources][:, :, cells]]
        return infer(groups, smooth.mean, seed, _of(extra, cells), tested=test or family, family=family)

    present = ~np.isnan(array)
    outcome = _everywhere(len(table.cells), _patterns(present, table.void == 0), run)
    columns = {"added_error": extra.standard_error} if extra else {}
    columns |= {"left_out": table.left_out} if leave_out else {}
    return _frame(table.cells, by, outcome, present.sum(axis=0), table.void, test, family, **columns)


def differences(
    first: pl.DataFrame,
    second: pl.DataFrame,
    value: str,
    by: Sequence[str] = (),
    bands: str | None = None,
    seed: int = 0,
    test: bool = True,
    *,
    family: bool = False,
    added: pl.DataFrame | None = None,
    paired: bool | None = None,
) -> pl.DataFrame:
    """Mean of the first group minus mean of the second, per quantity: see `DIFFERENCE` and `DIFFERENCE_TEST`.

    Groups of the same sources are compared in pairs: the difference of a source is then one number, tested as in
    `EFFECT_TEST`. The column sources holds both groups' number of sources, the column paired says which it was.

    Args:
        first, second, value, by, bands, seed, family, added: as in `means`.
        test: whether to test; without it, p_value is null.
        paired: None finds out from the source ids; True compares the shared sources alone; False says that equal ids
            are different sources.

    Raises:
        ValueError: where the groups share some of their sources but not all and `paired` is None, or none and it is
            True.
    """
    one, two, pairs = _both(first, second, value, by, bands, paired)
    arrays = [_over_bands(table) for table in (one, two)]
    void = one.void + two.void
    extra = _added(added, one.cells, by, "added_error")
    tested = test or family

    def run(cells: np.ndarray, _: np.ndarray) -> Inference:
        x, y = (array[:, cells] for array in arrays)
        error = _of(extra, cells)
        if pairs:
            return infer([(x - y)[None]], smooth.mean, seed, error, tested=tested, family=family)
        found = infer([x[None], y[None]], smooth.difference, seed, error, tested=tested, family=family)
        if not tested or min(len(x), len(y)) < settings.FEWEST_SOURCES:
            return found
        widened = error.widened() if error else np.zeros(len(cells))
        observed = t_statistic(found.value, found.standard_error, widened)
        p_value, p_maxt = permuted(x, y, observed, seed, family=family)
        return replace(found, p_value=np.fmax(found.p_value, p_value), p_maxt=np.fmax(found.p_maxt, p_maxt))

    outcome = _everywhere(len(one.cells), _dense(void == 0), run)
    counts = np.stack([(~np.isnan(array)).sum(axis=0) for array in arrays], axis=1)
    columns = {"added_error": extra.standard_error} if extra else {}
    return _frame(one.cells, by, outcome, counts, void, True, family, paired=pairs, **columns)


def ratios(
    first: pl.DataFrame,
    second: pl.DataFrame,
    value: str,
    by: Sequence[str] = (),
    bands: str | None = None,
    seed: int = 0,
    *,
    paired: bool | None = None,
) -> pl.DataFrame:
    """Mean of the first group divided by the mean of the second, per quantity: see `RATIO`.

    With bands, the means over the bands are divided, not the ratios averaged. The interval is that of ln(x / y), so
    that exchanging the groups inverts it; there is none where the means differ in sign or one is 0. Groups of the same
    sources are resampled in pairs; see `differences` for `paired` and for what is raised.
    """
    one, two, pairs = _both(first, second, value, by, bands, paired)
    arrays = [_over_bands(table) for table in (one, two)]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = arrays[0].mean(axis=0) / arrays[1].mean(axis=0)
    void = one.void + two.void
    # no ratio where the second mean is 0: its rows are what is wrong
    no_ratio = (void == 0) & ~np.isfinite(ratio)
    void = np.where(no_ratio, two.rows_per_band * two.values[0].shape[2], void)

    def run(cells: np.ndarray, _: np.ndarray) -> Inference:
        x, y = (array[:, cells] for array in arrays)
        groups = [np.stack([x, y])] if pairs else [x[None], y[None]]
        logs = infer(groups, smooth.paired_log_ratio if pairs else smooth.log_ratio, seed, tested=False)
        at = ratio[cells]
        low, high = np.sort([at * np.exp(logs.low - logs.value), at * np.exp(logs.high - logs.value)], axis=0)
        error = np.abs(at) * logs.standard_error
        return replace(logs, value=at, low=low, high=high, standard_error=error)

    outcome = _everywhere(len(one.cells), _dense(void == 0), run)
    counts = np.stack([(~np.isnan(array)).sum(axis=0) for array in arrays], axis=1)
    return _frame(one.cells, by, outcome, counts, void, False, False, paired=pairs)


def degradations(
    rows: pl.DataFrame,
    by: Sequence[str] = (),
    bands: str | None = None,
    seed: int = 0,
    test: bool = True,
    *,
    family: bool = False,
    added: pl.DataFrame | None = None,
    interval: bool = True,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Relative and absolute degradation of the loss, per quantity: see `RELATIVE`, `ABSOLUTE` and `EFFECT_TEST`.

    The relative one is void at a timestep whose clean losses sum to 0; the absolute one stands there.

    Args:
        rows: paired losses, columns clean and edited.
        by: the columns that tell quantities apart; without `bands` they have to name the timestep.
        bands: the timestep column for the overall degradation.
        seed, family: as in `means`.
        test: whether to test; without it, p_value is null.
        added: as in `means`, with columns added_relative and added_absolute in place of added_error.
        interval: whether intervals are needed; without them (and without tests) nothing is drawn, which is quick.

    Returns:
        Two tables, the relative one as a fraction (0.25 is 25 %), the absolute one in units of the loss.
    """
    clean = pl.col("clean").cast(pl.Float64)
    rows = rows.with_columns(clean, (pl.col("edited").cast(pl.Float64) - clean).alias("change"))
    table = source_means(rows, ["change", "clean"], by, bands)
    # [sources, cells, bands] -> [bands, sources, cells]
    change, clean = (np.moveaxis(array, 2, 0) for array in table.values)
    counts = table.counts()
    empty = (clean.sum(axis=1) == 0).sum(axis=0) * table.rows_per_band
    void = np.where(table.void == 0, empty, table.void)
    found = []
    for columns, function, offending, name in (
        (np.concatenate([change, clean]), smooth.relative, void, "added_relative"),
        (change.mean(axis=0, keepdims=True), smooth.mean, table.void, "added_absolute"),
    ):
        extra = _added(added, table.cells, by, name)

        def run(cells: np.ndarray, _: np.ndarray, columns=columns, function=function, extra=extra) -> Inference:
            groups = [columns[:, :, cells]]
            error, tested = _of(extra, cells), test or family
            return infer(groups, function, seed, error, interval=interval, tested=tested, family=family)

        outcome = _everywhere(len(table.cells), _dense(offending == 0), run)
        errors = {"added_error": extra.standard_error} if extra else {}
        found.append(_frame(table.cells, by, outcome, counts, offending, True, family, **errors))
    return found[0], found[1]


def degradation_differences(
    rows: pl.DataFrame,
    parts: tuple[str, str],
    by: Sequence[str] = (),
    bands: str | None = None,
    seed: int = 0,
    *,
    test: bool = False,
    added: pl.DataFrame | None = None,
    interval: bool = True,
) -> pl.DataFrame:
    """The relative degradation of one part of the items minus that of another part of the same: see `RELATIVE`.

    Both are drawn together, source by source. Damage in proportion to the clean loss of either part makes it 0. Void at
    a timestep at which the clean losses of a part sum to 0.

    Args:
        rows: one row per item (and draw of noise, and quantity); the columns change_PART and clean_PART of both parts.
        parts: their names.
        by, bands, seed, test, added: as in `means`.
        interval: as in `degradations`.
    """
    columns = [f"{kind}_{part}" for part in parts for kind in ("change", "clean")]
    table = source_means(rows, columns, by, bands)
    # [sources, cells, bands] -> [bands, sources, cells]
    arrays = [np.moveaxis(array, 2, 0) for array in table.values]
    empty = sum((clean.sum(axis=1) == 0).sum(axis=0) for clean in arrays[1::2]) * table.rows_per_band
    void = np.where(table.void == 0, empty, table.void)
    extra = _added(added, table.cells, by, "added_error")

    def run(cells: np.ndarray, _: np.ndarray) -> Inference:
        groups = [np.concatenate(arrays)[:, :, cells]]
        return infer(groups, smooth.relative_difference, seed, _of(extra, cells), interval=interval, tested=test)

    outcome = _everywhere(len(table.cells), _dense(void == 0), run)
    return _frame(table.cells, by, outcome, table.counts(), void, test, False)


def shares(
    rows: pl.DataFrame,
    by: Sequence[str] = (),
    bands: str | None = None,
    seed: int = 0,
    *,
    test: bool = False,
    family: bool = False,
    rounding: float = 0.0,
) -> pl.DataFrame:
    """One degradation divided by another, per quantity: see `SHARE`.

    A quantity whose divisor isn't clearly above 0 (the lower end of its interval is not) has no value and no interval.

    Args:
        rows: one row per item (and draw of noise, and quantity); columns part and whole, the changes of the loss that
            are divided, and clean.
        by, bands, seed, test, family: as in `means`.
        rounding: the standard error that rounding brings into a degradation.
    """
    table = source_means(rows, ["part", "whole", "clean"], by, bands)
    # [sources, cells, bands] -> [bands, sources, cells]
    part, whole, clean = (np.moveaxis(array, 2, 0) for array in table.values)
    below = _everywhere(
        len(table.cells),
        _dense(table.void == 0),
        lambda cells, _: infer([np.concatenate([whole, clean])[:, :, cells]], smooth.relative, seed, tested=False),
    )
    # of a single source there is no interval
    sound = (table.void == 0) & (np.where(np.isnan(below.standard_error), below.value, below.low) > rounding)
    columns = np.concatenate([part, whole, clean])

    def run(cells: np.ndarray, _: np.ndarray) -> Inference:
        error = Added(rounding / below.value[cells], np.full(len(cells), np.inf))
        groups = [columns[:, :, cells]]
        return infer(groups, smooth.share, seed, error, tested=test or family, family=family)

    outcome = _everywhere(len(table.cells), _dense(sound), run)
    return _frame(table.cells, by, outcome, table.counts(), table.void, test, family)


def _over_bands(table: SourceMeans) -> np.ndarray:
    """A single value column averaged over bands: [sources, cells]."""
    return table.values[0].mean(axis=2)


def _both(
    first: pl.DataFrame, second: pl.DataFrame, value: str, by: Sequence[str], bands: str | None, paired: bool | None
) -> tuple[SourceMeans, SourceMeans, bool]:
    """Source means of both groups over the quantities and bands of either, and whether they are of the same sources."""
    for name, rows in (("first", first), ("second", second)):
        missing = [column for column in ("source_id", *by, *([bands] if bands else [])) if column not in rows.columns]
        if missing:
            raise ValueError(f"{name}: lacks {', '.join(missing)}; it has {', '.join(rows.columns)}")
    one, two = (set(rows["source_id"].to_list()) for rows in (first, second))
    shared = one & two
    if paired is None:
        if shared and one != two:
            raise ValueError(
                f"first, second: got {len(shared)} sources in both of {len(one)} and {len(two)}, expected the same in"
                " both or none in both; paired=True compares the shared ones alone, paired=False says that equal ids"
                " are different sources"
            )
        paired = bool(shared)
    if paired and not shared:
        raise ValueError("paired: got True for groups that share no source")
    if paired:
        first, second = (rows.filter(pl.col("source_id").is_in(list(shared))) for rows in (first, second))
    cells = levels = None
    if by:
        cells = pl.concat([first.select(by), second.select(by)]).unique(maintain_order=True)
    if bands:
        levels = sorted(set(first[bands].to_list()) | set(second[bands].to_list()))
    found = [source_means(rows, [value], by, bands, cells, levels) for rows in (first, second)]
    return found[0], found[1], paired


def _added(added: pl.DataFrame | None, cells: pl.DataFrame, by: Sequence[str], name: str) -> Added | None:
    """The added error of every quantity. Raises ValueError where one has none or no number that an error can be."""
    if added is None:
        return None
    missing = [column for column in (*by, name, "added_freedom") if column not in added.columns]
    if missing:
        raise ValueError(f"added: lacks {', '.join(missing)}; it has {', '.join(added.columns)}")
    found = added.select(*by, name, "added_freedom")
    if by:
        found = cells.select(by).join(found, on=list(by), how="left", maintain_order="left", nulls_equal=True)
    if len(found) != len(cells):
        raise ValueError(f"added: got {len(added)} rows for {len(cells)} quantities, expected one for each")
    error, freedom = (found[column].cast(pl.Float64).to_numpy() for column in (name, "added_freedom"))
    if not (np.isfinite(error).all() and (error >= 0).all() and (freedom > 0).all()):
        raise ValueError(f"added: got {name} and added_freedom that aren't numbers of at least 0 for every quantity")
    return Added(error, freedom)


def _of(added: Added | None, cells: np.ndarray) -> Added | None:
    return None if added is None else Added(added.standard_error[cells], added.freedom[cells])


def _dense(live: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """All live cells at once; they have every source."""
    return [(np.flatnonzero(live), np.empty(0, np.int64))]


def _patterns(present: np.ndarray, live: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Live cells that have the same sources, [sources, cells], and those sources."""
    cells = np.flatnonzero(live)
    patterns, which = np.unique(present[:, cells], axis=1, return_inverse=True)
    which = which.reshape(-1)
    return [
        (cells[which == number], np.flatnonzero(pattern)) for number, pattern in enumerate(patterns.T) if pattern.any()
    ]


def _everywhere(
    count: int,
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    run: Callable[[np.ndarray, np.ndarray], Inference],
) -> Inference:
    """The outcome of every part at its cells, NaN at all others."""
    whole = {field.name: np.full(count, np.nan) for field in fields(Inference)}
    for cells, sources in parts:
        if len(cells):
            found = run(cells, sources)
            for name, array in whole.items():
                array[cells] = getattr(found, name)
    return Inference(**whole)


def _frame(
    cells: pl.DataFrame,
    by: Sequence[str],
    outcome: Inference,
    counts: np.ndarray,
    void: np.ndarray,
    tested: bool,
    family: bool,
    paired: bool | None = None,
    **further: np.ndarray,
) -> pl.DataFrame:
    fewest = counts.min(axis=1) if counts.ndim == 2 else counts
    few = fewest < settings.FEWEST_SOURCES
    names = ["value", "low", "high", *(["p_value"] if tested else []), *(["p_maxt"] if family else [])]
    numbers = {name: getattr(outcome, name) for name in (*names, "standard_error")} | further
    columns = []
    for name, array in numbers.items():
        hidden = np.where(few, np.nan, array) if name.startswith("p_") else array
        if np.issubdtype(hidden.dtype, np.floating):
            columns.append(pl.Series(name, hidden, pl.Float64, nan_to_null=True))
        else:
            columns.append(pl.Series(name, hidden))
    columns.append(pl.Series("sources", counts.tolist(), pl.List(pl.Int64) if counts.ndim == 2 else pl.Int64))
    columns.append(pl.Series("exploratory", few))
    if paired is not None:
        columns.append(pl.Series("paired", [paired] * len(cells), pl.Boolean))
    columns.append(pl.Series("void", void, pl.Int64))
    return cells.select(list(by)).hstack(columns) if by else pl.DataFrame(columns)
