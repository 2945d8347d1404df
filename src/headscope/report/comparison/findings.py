"""The sentences at the top of the page of two runs compared, each computed from the numbers."""

from collections.abc import Callable

import polars as pl

from headscope.report.lead import Tile
from headscope.report.naming import Names, fitted, interval, number, percent, probability
from headscope.study.ablation import headline_fill
from headscope.study.compare import Comparison
from headscope.study.inference import SIGNIFICANT

Write = Callable[[float | None], str]


def tiles(comparison: Comparison, names: Names) -> list[Tile]:
    """How alike heads are ranked, with its control, and what differs: nothing whose interval spans no change."""
    found = []
    if comparison.ranks is not None:
        for row in _first_of_groups(_by_size(comparison.ranks).drop_nulls("across").filter(_clear(0.0)))[:2]:
            halves = f"halves of the images: {number(row['across'], 2)} across the runs"
            within = f"{number(row['within_first'], 2)} and {number(row['within_second'], 2)} within them"
            found.append(
                Tile(
                    number(row["value"], 2),
                    f"correlation of the heads' {row['quantity']} on {_where(row)}",
                    f"95 % interval {interval(row['low'], row['high'], lambda v: number(v, 2))}; {halves}, {within}",
                )
            )
    if comparison.clean is not None:
        overall = comparison.clean.filter(pl.col("timestep").is_null() & _clear(1.0))
        for row in _first_of_groups(overall)[:2]:
            write = fitted((row["low"], row["high"]))
            found.append(
                Tile(
                    f"× {write(row['value'])}",
                    f"denoising loss on {_where(row)}, run 2 over run 1",
                    _beside(row, write),
                )
            )
    for table, what in ((comparison.heads, "head"), (comparison.sets, "edit")):
        row = _largest(table)
        if row is not None:
            subject = names.head(row["site"], row["head"]) if what == "head" else row["edit"]
            found.append(
                Tile(
                    points(row["value"]),
                    f"difference of the degradation without {subject} on {_where(row)}",
                    _beside(row, points),
                )
            )
    return found


def findings(comparison: Comparison, names: Names) -> list[str]:
    """The answer first: are heads ranked alike, do the models denoise alike, which heads differ.

    Of several fills, the headline's; the tables have all.
    """
    sentences = []
    if comparison.ranks is not None:
        sentences += [_rank_sentence(row) for row in _by_size(comparison.ranks).iter_rows(named=True)]
    if comparison.clean is not None:
        overall = comparison.clean.filter(pl.col("timestep").is_null())
        sentences += [_clean_sentence(row) for row in overall.iter_rows(named=True)]
    for table, singular in ((comparison.heads, "head"), (comparison.sets, "set")):
        if table is not None:
            sentences += _family_sentences(_of_headline(table), names, singular, "degradation", points)
    if comparison.entropy is not None:
        sentences += _family_sentences(comparison.entropy, names, "head", "entropy", None)
    if comparison.entropy_sites is not None:
        sentences += _site_sentences(comparison.entropy_sites, names)
    return sentences


def points(value: float | None) -> str:
    """A difference of percentages."""
    text = percent(value)
    return text if text == "–" else f"{'+' if value and value > 0 else ''}{text.removesuffix(' %')} points"


def _rank_sentence(row: dict) -> str:
    place = f"on {_where(row)}, by {row['quantity']}"
    if row["value"] is None or row["low"] is None:
        return f"How alike the runs rank heads {place}, can't be said: {row['heads']} heads, {row['sources']} sources."
    spans = row["low"] <= 0 <= row["high"]
    lead = f"The runs' rankings of heads correlate {'positively' if row['low'] > 0 else 'negatively'}"
    if spans:
        lead = "No correlation of the runs' rankings of heads was established"
    halves = (
        f"control, between halves of the images: {number(row['across'], 2)} across the runs,"
        f" {number(row['within_first'], 2)} and {number(row['within_second'], 2)} within each"
    )
    bounds = interval(row["low"], row["high"], lambda value: number(value, 2))
    note = "; exploratory, too few sources" if row["exploratory"] else ""
    return (
        f"{lead} {place}: Spearman {number(row['value'], 2)} (95 % interval {bounds}) over {row['heads']} heads;"
        f" {halves}{note}."
    )


def _clean_sentence(row: dict) -> str:
    if row["value"] is None:
        return f"The clean losses on {_where(row)} can't be compared: {_void(row)}."
    write = fitted((row["low"], row["high"]))
    if row["low"] is None or row["low"] <= 1 <= row["high"]:
        return f"No difference in clean loss was established on {_where(row)}: run 2 / run 1 {_beside(row, write)}."
    better = "less" if row["value"] < 1 else "more"
    return f"On {_where(row)} run 2 has {better} denoising loss: × {write(row['value'])} ({_beside(row, write)})."


def _family_sentences(table: pl.DataFrame, names: Names, singular: str, what: str, write: Write | None) -> list[str]:
    """How many of a family differ, and the largest; where none does, how large a difference can be."""
    sentences = []
    labels = [name for name in ("part", "group", "fill", "query_group") if name in table.columns]
    for _, rows in table.group_by(labels, maintain_order=True):
        tested = rows.filter(pl.col("p_maxt").is_not_null())
        first = rows.row(0, named=True)
        void = rows.filter(pl.col("void") > 0)
        note = f" {len(void)} could not be compared, as losses or entropies are not finite." if len(void) else ""
        if not len(tested):
            sentences.append(
                f"Whether the {what} of a {singular} differs on {_where(first)} was not tested:"
                f" {first['sources']} sources.{note}"
            )
            continue
        different = tested.filter(pl.col("p_maxt") < SIGNIFICANT)
        if len(different):
            row = different.sort(pl.col("value").abs(), descending=True).row(0, named=True)
            written = write or fitted((row["low"], row["high"]))
            unit = "" if write else " nats"
            sentences.append(
                f"On {_where(first)} the {what} differs for {len(different)} of {len(tested)} {singular}s (corrected"
                f" p < 0.05); most for {_subject(row, names)}: {written(row['value'])}{unit}"
                f" ({_beside(row, written)}).{note}"
            )
        else:
            widest = tested.select(pl.max_horizontal(pl.col("low").abs(), pl.col("high").abs()).max()).item()
            bound = (write or number)(widest)
            sentences.append(
                f"On {_where(first)} no difference in {what} was established for any of {len(tested)} {singular}s"
                f" (smallest corrected p {probability(tested['p_maxt'].min())}); single 95 % intervals reach"
                f" {bound.lstrip('+')}{'' if write else ' nats'}.{note}"
            )
    return sentences


def _site_sentences(sites: pl.DataFrame, names: Names) -> list[str]:
    sentences = []
    for _, rows in sites.group_by("part", "group", "query_group", maintain_order=True):
        found = rows.drop_nulls("value").sort("value")
        if len(found) < 2:
            continue
        first, last = found.row(0, named=True), found.row(-1, named=True)
        write = fitted((first["low"], first["high"]), (last["low"], last["high"]))
        ends = " to ".join(
            f"{write(row['value'])} ({interval(row['low'], row['high'], write)}) at {names.sites[row['site']]}"
            for row in (first, last)
        )
        sentences.append(
            f"By site, on {_where(first)}, exp H changes by factors from {ends}; the extremes of {len(found)}."
        )
    return sentences


def _largest(table: pl.DataFrame | None) -> dict | None:
    """The largest of the differences that are clear of 0 and whose corrected p is below 0.05."""
    if table is None:
        return None
    clear = _of_headline(table).filter(_clear(0.0) & (pl.col("p_maxt") < SIGNIFICANT))
    rows = clear.sort(pl.col("value").abs(), descending=True)
    return rows.row(0, named=True) if len(rows) else None


def _clear(null: float) -> pl.Expr:
    return (pl.col("low") > null) | (pl.col("high") < null)


def _by_size(ranks: pl.DataFrame) -> pl.DataFrame:
    """The rankings of most heads first, those that can't be compared last."""
    order = [pl.col("low").is_null(), -pl.col("heads").cast(pl.Int64)]
    return _of_headline(ranks).sort(order, maintain_order=True)


def _of_headline(table: pl.DataFrame) -> pl.DataFrame:
    """The rows of every stage's headline fill."""
    parts = table.partition_by("part", maintain_order=True)
    return pl.concat(part.filter(pl.col("fill") == headline_fill(part)) for part in parts)


def _first_of_groups(table: pl.DataFrame) -> list[dict]:
    return table.unique(["part", "group"], keep="first", maintain_order=True).to_dicts()


def _where(row: dict) -> str:
    """The group of a row, and its stage, fill and kind of queries where they say something."""
    fill = f"{row['fill']} fill" if row.get("fill") else ""
    queries = f"{row['query_group']} queries" if row.get("query_group") not in (None, "image") else ""
    within = ", ".join(part for part in (row["part"], fill, queries) if part)
    return f"{row['group']} ({within})" if within else row["group"]


def _subject(row: dict, names: Names) -> str:
    return row["edit"] if "edit" in row else names.head(row["site"], row["head"])


def _beside(row: dict, write: Write) -> str:
    tested = "" if row["p_maxt"] is None else f", corrected p = {probability(row['p_maxt'])}"
    bounds = interval(row["low"], row["high"], write).replace(" points to ", " to ")
    return f"95 % interval {bounds}{tested}, {row['sources']} sources"


def _void(row: dict) -> str:
    return f"{row['void']} losses are not finite" if row["void"] else "there are too few sources"
