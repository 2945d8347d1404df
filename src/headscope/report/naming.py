"""The spelling of heads, sites and numbers on the page."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

# distinct for colour-blind readers and on light and dark backgrounds (after Paul Tol's bright scheme)
COLOURS = ("#AA5599", "#4477AA", "#E0656F", "#228833", "#7A6FBF", "#5B7F2B")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
_SHORTER = (
    ("down_blocks.", "down "),
    ("mid_block.", "mid "),
    ("up_blocks.", "up "),
    ("single_transformer_blocks.", "single "),
    ("transformer_blocks.", "block "),
    ("attentions.", ""),
)


class Names:
    """Short labels of sites and heads, and the colour and marker of every group.

    Labels of sites are shortened where that keeps them distinct.

    Attributes:
        sites: their labels, in the order in which they are shown.
    """

    def __init__(self, sites: Sequence[str], groups: Sequence[str]) -> None:
        short = {site: _shorten(site) for site in sites}
        self.sites = short if len(set(short.values())) == len(short) else {site: site for site in sites}
        self._places = {site: place for place, site in enumerate(sites)}
        self._groups = list(groups)

    def head(self, site: str, head: int) -> str:
        return f"{self.sites.get(site, site)} h{head}"

    def edit(self, kind: str, edit: str) -> str:
        """What was edited: a site by its label, all else by its own name."""
        return self.sites.get(edit, edit) if kind == "site" else edit

    def of_queries(self, row: Mapping[str, Any], several: bool) -> str:
        """The head of a row (site, head, query_group); if there are several kinds of queries, its kind as well."""
        return self.head(row["site"], row["head"]) + (f", {row['query_group']} queries" if several else "")

    def place(self, site: str) -> int:
        """The place of a site among all that are shown."""
        return self._places.get(site, len(self._places))

    def group_place(self, group: str) -> int:
        """The place of a group among all that are shown."""
        return self._groups.index(group) if group in self._groups else len(self._groups)

    def colour(self, group: str) -> str:
        return COLOURS[self._groups.index(group) % len(COLOURS)]

    def symbol(self, group: str) -> str:
        # shifted where colours begin anew
        rounds, place = divmod(self._groups.index(group), len(COLOURS))
        return SYMBOLS[(place + rounds) % len(SYMBOLS)]


def _shorten(site: str) -> str:
    for long, short in _SHORTER:
        site = site.replace(long, short)
    return site


def plot_text(text: str) -> str:
    """Text for a label of a figure, where markup would be obeyed."""
    return escape(text, quote=False)


def number(value: float | None, digits: int = 3) -> str:
    """A number to a fixed count of decimals, with a true minus sign; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def fitted(*intervals: tuple[float | None, float | None], least: int = 3) -> Callable[[float | None], str]:
    """A function that writes numbers so that the narrowest of some intervals shows two digits of its half-width."""
    widths = [high - low for low, high in intervals if low is not None and high is not None and high > low]
    digits = max(least, math.ceil(-math.log10(min(widths) / 2)) + 1) if widths else least
    return lambda value: number(value, min(digits, 9))


def significant(value: float | None) -> str:
    """A number to three significant digits."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def percent(value: float | None) -> str:
    """A fraction as a percentage, with as many decimals as its size deserves."""
    if value is None or math.isnan(value):
        return "–"
    size = abs(100 * value)
    if size == 0:
        return "0 %"
    digits = 0 if size >= 100 else 1 if size >= 1 else 1 - math.floor(math.log10(size))
    return f"{number(100 * value, min(digits, 9))} %"


def probability(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 0.00005:
        return "< 0.0001"
    return "1" if value >= 0.9995 else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def interval(low: float | None, high: float | None, write=number) -> str:
    return "no interval" if low is None or high is None else f"{write(low)} to {write(high)}"


def listed(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {listed(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(listed(item) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
