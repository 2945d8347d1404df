"""What removing a head does to drawn images."""

from collections.abc import Sequence

import polars as pl

from headscope.report.marks import dots_of, head_notes
from headscope.report.naming import Names, significant
from headscope.report.panels import Figure, dot_panels
from headscope.report.section import Section
from headscope.report.tables import INTERVAL, SUBJECT, Table, estimate, subject
from headscope.study import ablation
from headscope.study.ablation import headline_fill
from headscope.study.analysis import StudyResult


def section(result: StudyResult, names: Names, groups: Sequence[str]) -> Section | None:
    """The section, where images were drawn."""
    ranking = result.generation_ranking
    if ranking is None:
        return None
    fill = headline_fill(ranking)
    values = {"distance": ablation.DISTANCE, "fill": fill, "table_of_heads": distance_table(ranking, names)}
    return Section("generation", "Drawn images", values, {"distances": distance_ranking(ranking, names, groups, fill)})


def distance_ranking(
    ranking: pl.DataFrame, names: Names, groups: Sequence[str], fill: str, most: int = 20
) -> Figure | None:
    """The heads whose removal moves the drawn image most, per group."""
    panels = []
    for group in groups:
        rows = ranking.filter((pl.col("group") == group) & (pl.col("fill") == fill)).head(most).to_dicts()
        if rows:
            titles = [names.head(row["site"], row["head"]) for row in rows]
            notes = head_notes(titles, rows, significant)
            panels.append((group, titles, [dots_of("", rows, notes, names.colour(group), names.symbol(group))]))
    return dot_panels(panels, "mean squared pixel difference") if panels else None


def distance_table(ranking: pl.DataFrame, names: Names) -> Table:
    """The distance that every head's removal moves the drawn image."""
    rows = [
        [*subject(row, names), str(row["rank"]), *estimate(row, significant), str(row["sources"])]
        for row in ranking.iter_rows(named=True)
    ]
    columns = [*SUBJECT, ("rank", True), ("distance", True), INTERVAL, ("sources", True)]
    return Table("Distance of the drawn image, every head; exploratory.", columns, rows)
