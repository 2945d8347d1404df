"""The tables of two runs compared."""

from collections.abc import Callable
from typing import Any

import polars as pl

from headscope.report.naming import Names, fitted, interval, number, percent, probability, significant
from headscope.report.tables import INTERVAL, Table, estimate

Write = Callable[[float | None], str]
_TESTS = [("p", True), ("corrected p", True), ("sources", True)]


def clean_table(clean: pl.DataFrame) -> Table:
    """Losses with nothing removed, and their ratio."""
    columns, place = _labels(clean, ("part", "group", "timestep"))
    columns += [("run 1", True), ("run 2", True), ("run 2 / run 1", True), INTERVAL, *_TESTS]
    write = fitted(*clean.select("low", "high").rows())
    rows = [
        [*place(row), significant(row["first"]), significant(row["second"]), *estimate(row, write), *_tests(row)]
        for row in clean.iter_rows(named=True)
    ]
    return Table("Denoising loss, nothing removed, and its ratio.", columns, rows)


def site_table(sites: pl.DataFrame, names: Names) -> Table:
    """The ratio of every site."""
    table = sites.sort(pl.col("site").map_elements(names.place, return_dtype=pl.Int64), maintain_order=True)
    table = table.with_columns(pl.col("site").replace(names.sites))
    columns, place = _labels(table, ("site", "part", "group", "query_group"))
    columns += [("keys", True), ("heads", True), ("exp(difference of H)", True), INTERVAL, *_TESTS]
    write = fitted(*table.select("low", "high").rows())
    rows = [
        [*place(row), str(row["keys"]), str(row["heads"]), *estimate(row, write), *_tests(row)]
        for row in table.iter_rows(named=True)
    ]
    return Table("Ratio of exp H per site, run 2 / run 1.", columns, rows)


def head_table(heads: pl.DataFrame, names: Names, caption: str, write: Write | None) -> Table:
    """Both runs' numbers of every head and their difference, the clearest first."""
    absolute = "absolute" in heads.columns and heads["absolute"].is_not_null().any()
    size = pl.col("value").abs() / (pl.col("high") - pl.col("low"))
    table = heads.with_columns(size=size.fill_nan(None)).sort(
        ["p_maxt", "size"], descending=[False, True], nulls_last=True, maintain_order=True
    )
    table = table.with_columns(
        head=pl.struct("site", "head").map_elements(lambda h: names.head(h["site"], h["head"]), return_dtype=pl.String)
    )
    columns, place = _labels(table, ("head", "part", "group", "fill", "quantity", "query_group"))
    columns += [("run 1", True), INTERVAL, ("run 2", True), INTERVAL, ("difference", True), INTERVAL]
    columns += [*([("absolute", True), INTERVAL] if absolute else []), *_TESTS]
    middle = (table["high"] - table["low"]).median()
    write = write or fitted((0.0, middle if isinstance(middle, float) else None))
    rows = [
        [
            *place(row),
            *estimate(row, write, "first"),
            *estimate(row, write, "second"),
            *estimate(row, write),
            *(estimate(row, significant, "absolute") if absolute else []),
            *_tests(row),
        ]
        for row in table.iter_rows(named=True)
    ]
    return Table(caption, columns, rows)


def set_table(sets: pl.DataFrame) -> Table:
    """Both runs' degradations of every set of heads and their difference."""
    absolute = sets["absolute"].is_not_null().any()
    columns, place = _labels(sets, ("edit", "part", "group", "fill"))
    columns += [("run 1", True), INTERVAL, ("run 2", True), INTERVAL, ("difference", True), INTERVAL]
    columns += [*([("absolute", True), INTERVAL] if absolute else []), *_TESTS]
    rows = [
        [
            *place(row),
            *estimate(row, percent, "first"),
            *estimate(row, percent, "second"),
            *estimate(row, percent),
            *(estimate(row, significant, "absolute") if absolute else []),
            *_tests(row),
        ]
        for row in sets.iter_rows(named=True)
    ]
    return Table("Degradation of the loss without each set of heads.", columns, rows)


def rank_table(ranks: pl.DataFrame) -> Table:
    """How alike the runs rank heads."""
    columns, place = _labels(ranks, ("quantity", "part", "group", "fill"), always=("quantity", "group"))
    columns += [("Spearman", True), INTERVAL, ("across halves", True), ("within run 1", True), ("within run 2", True)]
    columns += [("heads", True), ("sources", True)]
    rows = []
    for row in ranks.iter_rows(named=True):
        halves = [number(row[name], 2) for name in ("across", "within_first", "within_second")]
        value = [number(row["value"], 3), interval(row["low"], row["high"])]
        rows.append([*place(row), *value, *halves, str(row["heads"]), str(row["sources"])])
    return Table("Correlation of the two runs' rankings of heads.", columns, rows)


_TITLES = {"part": "stage", "query_group": "queries", "edit": "set of heads"}


def _labels(
    table: pl.DataFrame, names: tuple[str, ...], always: tuple[str, ...] = ("group",)
) -> tuple[list[tuple[str, bool]], Callable[[dict[str, Any]], list[str]]]:
    """The columns of labels, and a row's cells of them; one that is the same everywhere is left out."""
    chosen = [
        name
        for index, name in enumerate(names)
        if name in table.columns and ((index == 0 and name != "part") or name in always or table[name].n_unique() > 1)
    ]

    def cells(row: dict[str, Any]) -> list[str]:
        # of the timesteps, the mean over all
        return ["overall" if row[name] is None else str(row[name]) for name in chosen]

    return [(_TITLES.get(name, name), False) for name in chosen], cells


def _tests(row: dict[str, Any]) -> list[str]:
    return [probability(row["p_value"]), probability(row["p_maxt"]), str(row["sources"])]
