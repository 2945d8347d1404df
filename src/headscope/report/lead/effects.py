"""What the lead says of removed heads that were tested on the confirm split: heads, sites, sets, and their range."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from headscope.report.lead.finding import (
    Finding,
    Strength,
    Tile,
    clear,
    corrected_column,
    established,
    in_order,
    interval_of,
    sources_of,
    tested_of,
)
from headscope.report.naming import Names, interval, percent
from headscope.study.ablation import headline_fill
from headscope.study.analysis import StudyResult
from headscope.study.claims import ABSTRACT_RANGE, targeted
from headscope.study.interventions import Interventions

_KINDS = {"head": "single head", "site": "whole site", "level": "level", "set": "set of heads"}
_MOST_BESIDE = 3


def findings(result: StudyResult, names: Names) -> list[Finding]:
    found = result.interventions
    if found is None or not len(found.effects):
        return []
    every = in_order(found.effects, names).filter(pl.col("fill") == headline_fill(found.effects))
    table = every.drop_nulls("value")
    tested = table.filter(corrected_column(table).is_not_null())
    if not len(tested):
        # of a plain sweep, or too few sources
        return _exploratory(table, found, names)
    kinds = [kind for kind in _KINDS if kind in set(tested["kind"])]
    made = [_largest(tested.filter(pl.col("kind") == kind), found, names, kind) for kind in kinds]
    made.append(_at_a_timestep(found, names))
    made += [_not_established(tested.filter(pl.col("kind") == kind), kind) for kind in kinds]
    made += [_range(tested, found), _void(every)]
    return [finding for finding in made if finding is not None]


def _largest(tested: pl.DataFrame, found: Interventions, names: Names, kind: str) -> Finding | None:
    """The largest effect of a kind that was established, beside what the same removal costs the other groups."""
    rows = [row for row in tested.iter_rows(named=True) if established(row)]
    if not rows:
        return None
    # where all lower it, the strongest of them
    raising = [row for row in rows if row["value"] > 0]
    row = max(raising or rows, key=lambda one: abs(one["value"]))
    change, more = ("raises", "more") if raising else ("lowers", "less")
    size = percent(abs(row["value"]))
    subject = edit_label(row, found, names)
    beside = _elsewhere(tested, row)
    discover = "" if row["discover"] is None else f"; {percent(row['discover'])} on discover"
    facts = f"{interval_of(row, percent)}; {tested_of(row)}, {sources_of(row['sources'])}"
    sentence = (
        f"The largest confirmed effect of a {_KINDS[kind]}: removing {subject} ({row['fill']} fill) {change} the"
        f" denoising loss on {row['group']} by {size} ({facts} of the confirm split{discover}), among {len(tested)}"
        f" tested over all groups. {beside}"
    )
    tile = Tile(size, f"{more} loss on {row['group']} without {subject}", f"{facts}. {beside}".strip())
    return Finding(Strength.CONFIRMED, sentence.strip(), True, tile)


def _at_a_timestep(found: Interventions, names: Names) -> Finding | None:
    """The largest established effect of a single head at one timestep."""
    steps = found.timesteps
    if steps is None:
        return None
    rows = [row for row in steps.filter(pl.col("kind") == "head").iter_rows(named=True) if established(row)]
    if not rows:
        return None
    row = max(rows, key=lambda one: abs(one["value"]))
    when, subject = f"At timestep {row['timestep']} alone", edit_label(row, found, names)
    size, change = percent(abs(row["value"])), "raises" if row["value"] > 0 else "lowers"
    facts = f"{interval_of(row, percent)}; {tested_of(row)}, {sources_of(row['sources'])}"
    beside = _elsewhere(steps.filter(pl.col("timestep") == row["timestep"]), row)
    sentence = (
        f"{when}, removing {subject} ({row['fill']} fill) {change} the loss on {row['group']} by {size} ({facts} of the"
        f" confirm split), the largest effect of a single head at any timestep. {beside}"
    )
    more = "more" if row["value"] > 0 else "less"
    tile = Tile(size, f"{more} loss on {row['group']} at timestep {row['timestep']} without {subject}", facts)
    return Finding(Strength.CONFIRMED, sentence.strip(), True, tile)


def _elsewhere(tested: pl.DataFrame, row: dict[str, Any]) -> str:
    """The control: the same removal on the other groups."""
    others = tested.filter((pl.col("edit") == row["edit"]) & (pl.col("group") != row["group"]))
    shown = [
        f"{other['group']} {percent(other['value'])} ({interval(other['low'], other['high'], percent)})"
        for other in others.head(_MOST_BESIDE).iter_rows(named=True)
    ]
    return f"The same removal elsewhere: {'; '.join(shown)}." if shown else ""


def _not_established(tested: pl.DataFrame, kind: str) -> Finding | None:
    """The groups on which no effect of a kind was established, and how large one can be."""
    lacking = []
    for (group,), rows in tested.group_by("group", maintain_order=True):
        if not any(established(row) for row in rows.iter_rows(named=True)):
            low, high = rows["low"].min(), rows["high"].max()
            reach = "nothing bounds them"
            if isinstance(low, float) and isinstance(high, float):
                reach = f"95 % intervals reach from {percent(low)} to {percent(high)}"
            lacking.append(f"{group} ({len(rows)} tested, {reach})")
    if not lacking:
        return None
    sentence = f"No effect of a {_KINDS[kind]} was established on {' and on '.join(lacking)}."
    return Finding(Strength.CONFIRMED, sentence)


def _void(every: pl.DataFrame) -> Finding | None:
    """The effects that have no value, which may be the largest."""
    void = every.filter(pl.col("void") > 0) if "void" in every.columns else every.clear()
    if not len(void):
        return None
    sentence = (
        f"{len(void)} of {len(every)} effects are void, as losses are missing or not finite; what makes a model diverge"
        " matters more than any number here says."
    )
    return Finding(Strength.CONFIRMED, sentence)


def _range(tested: pl.DataFrame, interventions: Interventions) -> Finding | None:
    """What the removals of targeted sets span, beside the abstract's range."""
    sets = targeted(interventions, tested)
    if not sets:
        return None
    found = [row for row in sets if established(row) and row["value"] > 0]
    if not found:
        sentence = f"No degradation by a targeted set was established; the abstract's range is {ABSTRACT_RANGE}."
        return Finding(Strength.RANGE, sentence)
    ends = [pick(found, key=lambda row: row["value"]) for pick in (min, max)]
    texts = [f"{percent(row['value'])} ({row['edit']} on {row['group']}, {interval_of(row, percent)})" for row in ends]
    counted = f"{len(found)} of {len(sets)} removals of a targeted set from the group that it was selected for"
    if not interventions.targets:
        counted = f"{len(found)} of {len(sets)} removals of a targeted set from a group"
    sentence = (
        f"{counted[0].upper()}{counted[1:]} raise the loss (corrected p < 0.05), from {texts[0]} to {texts[1]}; the"
        f" abstract's range is {ABSTRACT_RANGE}, of other models and images."
    )
    value = " to ".join(percent(row["value"]).removesuffix(" %") for row in ends) + " %"
    detail = f"{counted}, those with a corrected p < 0.05; the abstract's range: {ABSTRACT_RANGE}"
    return Finding(Strength.RANGE, sentence, True, Tile(value, "degradation by targeted sets of heads", detail))


def _exploratory(table: pl.DataFrame, found: Interventions, names: Names) -> list[Finding]:
    """Of edits that nothing was tested of: the largest on every group."""
    made = []
    for (group,), rows in table.group_by("group", maintain_order=True):
        members = sorted(rows.to_dicts(), key=lambda row: -row["value"])
        made += _of_group(str(group), members, found, names)
    return made


def _of_group(group: str, members: Sequence[dict[str, Any]], found: Interventions, names: Names) -> list[Finding]:
    distinct = [row for row in members if clear(row)]
    if not distinct:
        ends = [percent(_end(members, name, pick)) for name, pick in (("low", min), ("high", max))]
        sentence = (
            f"On {group} no effect of {len(members)} edits of heads is clear of 0: 95 % intervals reach from {ends[0]}"
            f" to {ends[1]} (not tested)."
        )
        return [Finding(Strength.EXPLORATORY, sentence)]
    row = distinct[0]
    subject = edit_label(row, found, names)
    done = "editing" if row["kind"] in ("dose", "other") else "removing"
    sentence = (
        f"On {group}, {done} {subject} ({row['fill']} fill) changes the loss by {percent(row['value'])}"
        f" ({interval_of(row, percent)}; exploratory, {sources_of(row['sources'])}); it is the largest of"
        f" {len(members)} edits of heads, {len(distinct)} of which have an interval clear of 0."
    )
    detail = f"{interval_of(row, percent)}; {sources_of(row['sources'])}, not tested"
    tile = Tile(percent(row["value"]), f"change of the loss on {group} by {done} {subject}; exploratory", detail)
    return [Finding(Strength.EXPLORATORY, sentence, tile=tile)]


def _end(members: Sequence[dict[str, Any]], name: str, pick: Any) -> float | None:
    found = [row[name] for row in members if row[name] is not None]
    return pick(found) if found else None


def edit_label(row: dict[str, Any], found: Interventions, names: Names) -> str:
    """What was edited: a head or a site by its label, a set by its own name."""
    if row["kind"] == "head":
        head = next((edit.heads[0] for edit in found.edits if edit.name == row["edit"]), None)
        return row["edit"] if head is None else names.head(*head)
    return names.edit(row["kind"], row["edit"])
