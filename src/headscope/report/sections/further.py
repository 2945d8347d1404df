"""Scores without a section of their own."""

from collections.abc import Sequence
from typing import Any

from headscope.report.naming import Names, percent, significant
from headscope.report.section import Section
from headscope.report.tables import INTERVAL, SUBJECT, Table, estimate
from headscope.study.analysis import StudyResult
from headscope.study.further import Score


def section(result: StudyResult, names: Names, groups: Sequence[str]) -> Section | None:
    """The section, where there are such scores."""
    if not result.further:
        return None
    scores = [(score.title, score.definition, further_table(score, names)) for score in result.further]
    return Section("further", "Further scores", {"scores": scores})


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
            *estimate(row, write),
            str(row["sources"]),
        ]
        for row in found
    ]
    columns = [("set of heads" if of_sets else "head", False), *SUBJECT[1:]]
    columns += [("value", True), INTERVAL, ("sources", True)]
    when = "" if score.kind.endswith("generations") else ", mean over timesteps"
    left_out = f" {score.left_out} values are NaN, of items that have none, and left out." if score.left_out else ""
    return Table(f"{score.title} ({score.kind}){when}; exploratory.{left_out}", columns, rows)
