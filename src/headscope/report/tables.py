"""Tables of numbers: what a table is, and the cells that several sections write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from headscope.report.naming import Names, interval


@dataclass(frozen=True)
class Table:
    """A table for the page.

    Attributes:
        columns: headings, and whether the column is of numbers.
        rows: cells as text; the first of each row is its heading.
    """

    caption: str
    columns: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[str]]


def void_of(count: int) -> str:
    """Why a quantity has no value."""
    return f"void: {count:,} missing or not finite"


SUBJECT = (("head", False), ("group", False), ("fill", False))
INTERVAL = ("95 % interval", True)


def subject(row: dict[str, Any], names: Names) -> list[str]:
    """The cells of `SUBJECT`."""
    return [names.head(row["site"], row["head"]), row["group"], row["fill"]]


def estimate(row: dict[str, Any], write: Callable[[float | None], str], name: str = "") -> list[str]:
    """The cells of a number and its interval: value, low and high, or those that begin with a name.

    Where a quantity is void, they say so.
    """
    value, low, high = (name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")
    if row[value] is None and row.get("void"):
        return [void_of(row["void"]), "–"]
    return [write(row[value]), interval(row[low], row[high], write)]
