"""What the lead says of circuits: how many heads are enough, and what flows between them."""

import polars as pl

from headscope.report.lead.finding import Finding, Strength, Tile, established, interval_of, sources_of, tested_of
from headscope.report.naming import Names, number, percent
from headscope.report.sections.circuits import PARTS, chosen_of, reach_of, sentence_of
from headscope.study.analysis import StudyResult
from headscope.study.circuits import Circuits


def findings(result: StudyResult, names: Names) -> list[Finding]:
    found = result.circuits
    if found is None:
        return []
    tables = (found.faithfulness, found.edges, found.refused)
    groups = {group for table in tables if table is not None for group in table["group"]}
    groups = sorted(groups, key=lambda group: (names.group_place(group), group))
    made = [_circuit(found, group) for group in groups]
    made += [_edges(found, group, names) for group in groups]
    return [finding for finding in made if finding is not None]


def _circuit(found: Circuits, group: str) -> Finding | None:
    row = chosen_of(found, group)
    if row is None or row["value"] is None:
        # none, or void
        sentence = sentence_of(found, group)
        return None if sentence is None else Finding(Strength.CONFIRMED, sentence)
    value, low = row["value"], row["low"]
    facts, reach = f"{interval_of(row)}; {sources_of(row['sources'])}", reach_of(row)
    heads = "1 head" if row["size"] == 1 else f"{row['size']} heads"
    exploratory = "; exploratory" if row["exploratory"] else ""
    sentence = (
        f"On {group} {heads} alone, all others replaced by their mean, keep {number(value)} of what all heads do for"
        f" the loss ({facts} of the confirm split{exploratory}): the circuit chosen on discover; {reach}."
    )
    sure = low is not None and low > 0 and not row["exploratory"]
    tile = Tile(number(value, 2), f"of the heads' effect on {group} is kept by {heads} alone", f"{facts}; {reach}")
    return Finding(Strength.CONFIRMED, sentence, sure, tile if sure else None)


def _edges(found: Circuits, group: str, names: Names) -> Finding | None:
    """The strongest edge that was established between two heads."""
    if found.edges is None:
        return None
    rows = found.edges.filter(pl.col("group") == group).to_dicts()
    if not rows:
        return None
    between = [row for row in rows if established(row) and row["receiver_site"] is not None]
    if not between:
        sentence = f"Between the heads of {group}'s circuit no edge was established, of {len(rows)} measured."
        return Finding(Strength.CONFIRMED, sentence)
    row = max(between, key=lambda one: abs(one["value"]))
    sender = names.head(row["sender_site"], row["sender_head"])
    receiver = names.head(row["receiver_site"], row["receiver_head"])
    count = sum(1 for one in rows if established(one))
    sentence = (
        f"{count} of {len(rows)} edges of {group}'s circuit are established (max-t). The strongest between two heads"
        f" goes from {sender} to the {PARTS.get(row['part'], row['part'])} of {receiver}: without it the loss changes"
        f" by {percent(row['value'])} ({interval_of(row, percent)}; {tested_of(row)})."
    )
    return Finding(Strength.CONFIRMED, sentence, True)
