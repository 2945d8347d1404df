"""The abstract and this run, line by line."""

from collections.abc import Callable, Sequence
from typing import Any

from headscope.report.naming import Names, interval, number, percent, probability, significant
from headscope.report.section import Section
from headscope.study.analysis import StudyResult
from headscope.study.claims import COMPARISON, MEASURED, NONE_FOUND

_COUNTS = ("features", "clusters", "roles")
_UNITS = {"nats": " nats", "H / ln K": " of ln K", "images": " images"}


def section(result: StudyResult, names: Names, groups: Sequence[str]) -> Section | None:
    """The section, where any of it was measured."""
    table = result.claims()
    if table is None:
        return None
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.iter_rows(named=True):
        found.setdefault(row["claim"], []).append(row)
    lines = [{**rows[0], "found": lines_of(_in_order(rows, names))} for rows in found.values()]
    return Section("claims", "The abstract", {"lines": lines})


def lines_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
    """The numbers of one claim as lines of text, and whether each is something that was found.

    What belongs together stands in one line, as do the groups on which nothing was found.
    """
    beside = [row["value"] for row in rows if row["quantity"] == COMPARISON and row["unit"] == "nats"]
    # rows of one line
    lines: list[list[dict[str, Any]]] = []
    lacking = []
    for row in rows:
        if row["status"] == NONE_FOUND and row["value"] is None and not row["quantity"]:
            lacking.append(row["group"])
        elif row["quantity"] != COMPARISON:
            if lines and _belongs(row, lines[-1][-1]):
                lines[-1].append(row)
            else:
                lines.append([row])
    found = [(line_of(line), line[0]["status"] == MEASURED) for line in lines]
    if lacking:
        found.append((f"{NONE_FOUND} on {', '.join(lacking)}", False))
    if beside:
        ends = " to ".join(dict.fromkeys(number(pick(beside), 2) for pick in (min, max)))
        found.append((f"{COMPARISON}: {ends} nats", True))
    return found


def _belongs(row: dict[str, Any], before: dict[str, Any]) -> bool:
    """True for a second number about the same: of the same heads in another unit, or of the same group's clusters."""
    same = all(row[name] == before[name] for name in ("group", "quantity", "count"))
    return (row["unit"] == "H / ln K" and same) or (row["unit"] == "clusters" and row["group"] == before["group"])


def line_of(rows: Sequence[dict[str, Any]]) -> str:
    """Numbers about the same, with their intervals, as text; or that there is none."""
    row = rows[0]
    group = "" if row["group"] is None else f"{row['group']}: "
    if row["value"] is None:
        # none found, or not measured
        reason = f" ({row['quantity']})" if row["quantity"] else ""
        return f"{group}{row['status']}{reason}"
    if row["unit"] in _COUNTS:
        counts = [f"{_number(one)} {one['quantity']}" for one in rows]
        return f"{group}{'; '.join(counts)}"
    write = _writer(row["unit"])
    details = [row["quantity"]]
    if row["chance"] is not None:
        details.append(f"by chance {write(row['chance'])}")
    if row["p_value"] is not None:
        details.append(f"p = {probability(row['p_value'])}")
    if row["unit"] == "nats" and row["count"] is not None:
        details.append(f"{row['count']} {'head' if row['count'] == 1 else 'heads'}")
    if row["sources"] is not None:
        details.append(f"{row['sources']} sources")
    numbers = ", ".join(_number(one) for one in rows)
    return f"{group}{numbers}; {', '.join(detail for detail in details if detail)}"


def _number(row: dict[str, Any]) -> str:
    """value ± spread, unit and interval."""
    write = _writer(row["unit"])
    spread = "" if row["spread"] is None else f" ± {write(row['spread'])}"
    bounds = "" if row["low"] is None else f" ({interval(row['low'], row['high'], write)})"
    return f"{write(row['value'])}{spread}{_UNITS.get(row['unit'], '')}{bounds}"


def _writer(unit: str) -> Callable[[float | None], str]:
    if unit in ("images", *_COUNTS):
        return lambda value: "–" if value is None else f"{value:,.0f}"
    if unit == "fraction of the clean loss":
        return percent
    if unit in ("nats", "H / ln K"):
        return lambda value: number(value, 2 if unit == "nats" else 3)
    return lambda value: number(value, 3) if value is not None and abs(value) < 10 else significant(value)


def _in_order(rows: Sequence[dict[str, Any]], names: Names) -> list[dict[str, Any]]:
    """The rows with the groups in the page's order; pairs of groups and all of them stay where they are."""
    return sorted(rows, key=lambda row: names.group_place(row["group"]) if row["group"] is not None else len(rows) + 99)
