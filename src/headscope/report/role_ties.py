"""Tied groups against their controls: which heads look at counterparts more where regions are tied."""

from collections.abc import Sequence

import polars as pl

from headscope.report.marks import by_group
from headscope.report.naming import Names, fitted, probability, significant
from headscope.report.tables import INTERVAL, Table, estimate
from headscope.study.inference import SIGNIFICANT
from headscope.study.roles import Roles
from headscope.study.roles.counterparts import NAME

_HEAD = ["group", "site", "head"]


def ties_sentences(roles: Roles, groups: Sequence[str]) -> list[str]:
    """How many heads have a significant excess on counterparts on each tied group and on its control."""
    return [
        f"Counterparts: {_found_on(roles, group)}; {_found_on(roles, table['control'][0], ', its control,')}."
        f" {len(_more(table))} of {len(table)} heads have significantly more of it on {group} than on the control."
        for group, table in _compared(roles, groups)
    ]


def ties_table(roles: Roles, names: Names, groups: Sequence[str]) -> Table | None:
    """The named heads' excess on counterparts on a tied group minus that on its control; None without such groups."""
    compared = _compared(roles, groups)
    if not compared:
        return None
    named = roles.names.filter(pl.col("role") == NAME).select(_HEAD)
    rows, said = [], []
    for group, table in compared:
        said.append(f"{_found_on(roles, group)}, {_found_on(roles, table['control'][0])}")
        mine = table.join(named, on=_HEAD, how="semi", maintain_order="left")
        for row in mine.sort("value", descending=True, nulls_last=True).iter_rows(named=True):
            cells = [names.head(row["site"], row["head"]), group, row["control"]]
            cells += [significant(row["tied"]), significant(row["control_value"])]
            cells += [*estimate(row, fitted((row["low"], row["high"]))), probability(row["p_maxt"])]
            rows.append([*cells, " and ".join(map(str, row["sources"]))])
    columns = [("head", False), ("group", False), ("control", False), ("excess", True), ("on the control", True)]
    columns += [("difference", True), INTERVAL, ("corrected p", True), ("sources", True)]
    caption = (
        f"Tied against control: the heads named {NAME}, shares of attention, confirm split; all heads are in"
        f" roles_ties.csv. Heads with a corrected p of their own excess below {SIGNIFICANT:g}: {'; '.join(said)}."
    )
    return Table(caption, columns, rows)


def _compared(roles: Roles, groups: Sequence[str]) -> list[tuple[str, pl.DataFrame]]:
    """The rows of the confirm split, by group."""
    return [] if roles.ties is None else list(by_group(roles.ties.filter(pl.col("split") == "confirm"), groups))


def _more(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("value") > 0, pl.col("p_maxt") < SIGNIFICANT)


def _found_on(roles: Roles, group: str, who: str = "") -> str:
    """How many heads of a group have an excess on counterparts, and of how much at most."""
    mine = pl.col("group") == group, pl.col("split") == "confirm", pl.col("feature") == NAME
    table = roles.excess.filter(mine)
    found = _more(table)
    if not len(found):
        return f"on {group}{who} none of {len(table)} heads has a significant excess"
    most = found["value"].max()
    assert isinstance(most, float)
    has = "head has" if len(found) == 1 else "heads have"
    return f"on {group}{who} {len(found)} of {len(table)} {has} a significant excess, of up to {significant(most)}"
