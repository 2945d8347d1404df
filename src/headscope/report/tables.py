"""The report's tables of numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from headscope.report.naming import Names, fitted, interval, number, percent, probability, significant
from headscope.study.analysis import StudyResult
from headscope.study.entropy import Contrast, query_groups
from headscope.study.further import Score


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


def contrast_table(contrast: Contrast) -> Table:
    """Natural against synthetic, per timestep and overall."""
    rows = []
    found = contrast.timesteps.select("low", "high", "ratio_low", "ratio_high").rows()
    write = fitted(*(row[:2] for row in found), least=4)
    write_ratio = fitted(*(row[2:] for row in found))
    for row in contrast.timesteps.iter_rows(named=True):
        rows.append(
            [
                str(row["timestep"]),
                write(row["natural"]),
                write(row["synthetic"]),
                *_estimate(row, write),
                probability(row["p_value"]),
                probability(row["p_holm"]),
                *_estimate(row, write_ratio, "ratio"),
            ]
        )
    difference, ratio = contrast.difference, contrast.ratio
    rows.append(
        [
            "overall",
            write(contrast.natural_mean.value),
            write(contrast.synthetic_mean.value),
            write(difference.value),
            interval(difference.low, difference.high, write),
            probability(difference.p_value),
            "–",
            write_ratio(ratio.value),
            interval(ratio.low, ratio.high, write_ratio),
        ]
    )
    sources = " and ".join(map(str, difference.sources))
    columns = [("timestep", False), (contrast.natural, True), (contrast.synthetic, True), ("difference", True)]
    columns += [_INTERVAL, ("p", True), ("corrected p", True), ("ratio", True), _INTERVAL]
    caption = f"Normalised entropy, mean over heads, confirm split ({sources} sources)."
    return Table(caption, columns, rows)


def contrast_heads_table(contrast: Contrast, names: Names) -> Table:
    """The heads that the comparison selected, and their test."""
    chosen = contrast.heads.filter(pl.col("selected")).sort(["p_holm", "site", "head"], nulls_last=True)
    write = fitted(*chosen.select("low", "high").rows(), least=4)
    several = len(query_groups(contrast.heads)) > 1
    rows = [
        [
            names.of_queries(row, several),
            write(row["discover"]),
            number(row["discover_score"], 1),
            *_estimate(row, write),
            probability(row["p_value"]),
            probability(row["p_holm"]),
        ]
        for row in chosen.iter_rows(named=True)
    ]
    columns = [("head", False), ("difference, discover", True), ("|difference| / SE", True)]
    columns += [("difference, confirm", True), _INTERVAL, ("p", True), ("corrected p", True)]
    return Table("Heads selected on the discover split, tested on the confirm split.", columns, rows)


def confirm_table(confirmed: pl.DataFrame, names: Names) -> Table:
    """Every tested head, group and fill."""
    rows = [
        [
            *_subject(row, names),
            percent(row["discover"]),
            *_estimate(row, percent),
            *_estimate(row, significant, "absolute"),
            probability(row["p_value"]),
            probability(row["p_holm"]),
            str(row["sources"]),
        ]
        for row in confirmed.iter_rows(named=True)
    ]
    columns = [*_SUBJECT, ("discover", True), ("confirm", True), _INTERVAL, ("absolute", True), _INTERVAL]
    columns += [("p", True), ("corrected p", True), ("sources", True)]
    return Table("Degradation of the selected heads on the confirm split.", columns, rows)


def ranking_table(ranking: pl.DataFrame, names: Names) -> Table:
    """Every ablated head's degradation on the split that ranks them."""
    rows = [
        [
            *_subject(row, names),
            str(row["rank"]),
            *_estimate(row, percent),
            *_estimate(row, significant, "absolute"),
            str(row["sources"]),
        ]
        for row in ranking.iter_rows(named=True)
    ]
    columns = [*_SUBJECT, ("rank", True), ("relative", True), _INTERVAL, ("absolute", True), _INTERVAL]
    caption = "Degradation of every ablated head, mean over timesteps; exploratory."
    return Table(caption, [*columns, ("sources", True)], rows)


def distance_table(ranking: pl.DataFrame, names: Names) -> Table:
    """The distance that every head's removal moves the drawn image."""
    rows = [
        [*_subject(row, names), str(row["rank"]), *_estimate(row, significant), str(row["sources"])]
        for row in ranking.iter_rows(named=True)
    ]
    columns = [*_SUBJECT, ("rank", True), ("distance", True), _INTERVAL, ("sources", True)]
    return Table("Distance of the drawn image, every head; exploratory.", columns, rows)


def entropy_table(entropy: pl.DataFrame, names: Names, groups: Sequence[str]) -> Table:
    """Every head's entropy, averaged over timesteps, groups side by side; sites in the order of execution."""
    overall = entropy.filter(pl.col("timestep").is_null() & pl.col("group").is_in(groups))
    head = ("site", "head", "query_group", "keys")
    found = {(*map(row.get, head), row["group"], row["measure"]): row for row in overall.iter_rows(named=True)}
    kinds = query_groups(overall)
    normalised = overall.filter(pl.col("measure") == "normalised")
    # the middle of the widths: one very certain head shall not decide for all
    middle = (normalised["high"] - normalised["low"]).median()
    write = fitted((0.0, middle if isinstance(middle, float) else None))
    rows = []
    heads = overall.select(head).unique(maintain_order=True).to_dicts()
    for one in sorted(heads, key=lambda row: (names.place(row["site"]), row["head"], kinds.index(row["query_group"]))):
        cells = [names.of_queries(one, len(kinds) > 1), str(one["keys"])]
        for group in groups:
            row, nats = (found.get((*one.values(), group, measure)) for measure in ("normalised", "nats"))
            cells.append("–" if row is None else f"{write(row['value'])} ({interval(row['low'], row['high'], write)})")
            cells.append("–" if nats is None else write(nats["value"]))
        rows.append(cells)
    columns = [("head", False), ("keys", True)]
    for group in groups:
        columns += [(f"{group}, H / ln K", True), (f"{group}, nats", True)]
    return Table("Entropy of every head, mean over timesteps, all observed sources (95 % interval).", columns, rows)


def further_table(score: Score, names: Names) -> Table:
    """A score of every set of heads, or of every head in the order of execution; groups in the page's order."""
    write = percent if score.fraction else significant
    of_sets = "edit" in score.values.columns
    found = list(score.values.iter_rows(named=True))
    sets = list(dict.fromkeys(row["edit"] for row in found)) if of_sets else []

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        edit = (sets.index(row["edit"]),) if of_sets else (names.place(row["site"]), row["head"])
        return *edit, names.group_place(row["group"])

    found.sort(key=place)
    rows = [
        [
            row["edit"] if of_sets else names.head(row["site"], row["head"]),
            row["group"],
            row["fill"],
            *_estimate(row, write),
            str(row["sources"]),
        ]
        for row in found
    ]
    columns = [("set of heads" if of_sets else "head", False), *_SUBJECT[1:]]
    columns += [("value", True), _INTERVAL, ("sources", True)]
    when = "" if score.kind.endswith("generations") else ", mean over timesteps"
    left_out = f" {score.left_out} values are NaN, of items that have none, and left out." if score.left_out else ""
    return Table(f"{score.title} ({score.kind}){when}; exploratory.{left_out}", columns, rows)


def sites_table(result: StudyResult, names: Names) -> Table:
    """The module behind each short label, its number of heads on the page, and its number of keys."""
    keys: dict[str, set[int]] = {}
    heads: dict[str, set[int]] = {}
    for table in (result.entropy_heads, result.ablation_ranking, result.generation_ranking):
        if table is not None:
            for site, head in table.select("site", "head").unique().iter_rows():
                heads.setdefault(site, set()).add(head)
    if result.entropy_heads is not None:
        for site, count in result.entropy_heads.select("site", "keys").unique().iter_rows():
            keys.setdefault(site, set()).add(count)
    rows = [
        [
            names.sites[site],
            site,
            str(len(heads.get(site, ()))),
            ", ".join(str(count) for count in sorted(keys.get(site, ()))) or "–",
            ", ".join(number(math.log(count), 2) for count in sorted(keys.get(site, ()))) or "–",
        ]
        for site in result.sites
    ]
    columns = [("label", False), ("module", False), ("heads shown", True), ("keys K", True), ("ln K, nats", True)]
    return Table("Attention sites, in the order of execution; h0 is a site's first head.", columns, rows)


_SUBJECT = (("head", False), ("group", False), ("fill", False))
_INTERVAL = ("95 % interval", True)


def _subject(row: dict[str, Any], names: Names) -> list[str]:
    """The cells of `_SUBJECT`."""
    return [names.head(row["site"], row["head"]), row["group"], row["fill"]]


def _estimate(row: dict[str, Any], write: Callable[[float | None], str], name: str = "") -> list[str]:
    """The cells of a number and its interval: value, low and high, or those that begin with a name."""
    value, low, high = (name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")
    return [write(row[value]), interval(row[low], row[high], write)]
