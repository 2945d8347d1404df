"""What two heads are to each other: each alone, both together."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from headscope.study.ablation import ROUNDING, with_rounding
from headscope.study.circuits.faithfulness import KEYS
from headscope.study.circuits.sets import PlannedSet
from headscope.study.edits import head_name
from headscope.study.inference import combined, degradations, is_finding

PAIRS = (
    "Two heads removed together and each alone, on the same noisy images of the confirm split; together − sum is the"
    " degradation by both minus the sum of the degradations by each; max-t over the pairs of a group. Either suffices:"
    " together − sum above 0, both together cost something, and each alone less than a quarter of that (upper ends)."
    " Duplicate: above a tenth of the sum (lower end), each alone costs something (lower ends above 0), and as much as"
    " the other, to within a quarter (interval of the difference). Redundant: above 0, and neither. Both are needed:"
    " below 0, and either alone costs what both cost, to within a quarter (intervals). Dependent: below 0,"
    " and not so."
    " Independent: the interval of together − sum lies within ± a tenth of the larger of what both cost and the sum of"
    " what each costs (two one-sided tests at 2.5 %). Undecided: none of these, or fewer than 20 sources. A pair holds"
    " two heads of the circuit, or one and a head that stood in for it on discover."
)
EITHER, DUPLICATE, REDUNDANT = "either suffices", "duplicate", "redundant"
BOTH, DEPENDENT = "both are needed", "dependent"
INDEPENDENT, UNDECIDED = "independent", "undecided"
# of what both cost: below it, each alone costs next to nothing, or next to as much
_LITTLE = 1 / 4
# of what both cost, or each: within it, together - sum is as good as 0
_EQUIVALENT = 1 / 10


def pairs_table(losses: pl.DataFrame, planned: Sequence[PlannedSet], seed: int) -> pl.DataFrame | None:
    """See `PAIRS`: first_site, first_head, second_site, second_head, kind, joint, sum, value (joint - sum), low, high,
    p_value, p_maxt, first and second (what each alone costs), standard_error, sources, exploratory, void; degradations
    as fractions. None where no pair was removed.

    losses: the set ablations of one group.
    """
    pairs = [one for one in planned if one.kind == "pair"]
    alone = {one.part[0]: one.name for one in planned if one.kind == "part" and len(one.part) == 1}
    pairs = [one for one in pairs if all(head in alone for head in one.part)]
    if not pairs:
        return None
    # other columns would tell rows apart
    losses = losses.select("edit", *(name for name in KEYS if name in losses.columns), "clean", "edited")
    # together - sum is a family by itself
    contrasts = {one.name: {one.name: 1.0} | {alone[head]: -1.0 for head in one.part} for one in pairs}
    tested = _effects(combined(losses, contrasts), seed, family=True)
    others = {one.name: {one.name: 1.0} for one in pairs}
    for one in pairs:
        for head in one.part:
            others[_alone(head)] = {alone[head]: 1.0}
            others[_beyond(one, head)] = {one.name: 1.0, alone[head]: -1.0}
        others[_apart(one)] = {alone[one.part[0]]: 1.0, alone[one.part[1]]: -1.0}
    beside = {row["edit"]: row for row in _effects(combined(losses, others), seed).iter_rows(named=True)}
    rows = []
    for one, row in zip(pairs, tested.iter_rows(named=True), strict=True):
        (first, second), joint = one.part, beside[one.name]
        singles = [beside[_alone(head)] for head in one.part]
        values = [single["value"] for single in singles]
        kind = _kind(row, joint, singles, [beside[_beyond(one, head)] for head in one.part], beside[_apart(one)])
        rows.append(
            {
                "first_site": first[0],
                "first_head": first[1],
                "second_site": second[0],
                "second_head": second[1],
                "kind": kind,
                "joint": joint["value"],
                "sum": None if None in values else sum(values),
                **{name: row[name] for name in ("value", "low", "high", "p_value", "p_maxt")},
                **dict(zip(("first", "second"), values, strict=True)),
                **{name: row[name] for name in ("standard_error", "sources", "exploratory", "void")},
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def _effects(rows: pl.DataFrame, seed: int, *, family: bool = False) -> pl.DataFrame:
    added = with_rounding(rows, ["edit"])
    return degradations(rows, ["edit"], "timestep", seed, test=family, family=family, added=added)[0]


def _alone(head: tuple[str, int]) -> str:
    return f"alone: {head_name(*head)}"


def _beyond(pair: PlannedSet, head: tuple[str, int]) -> str:
    return f"{pair.name} beyond {head_name(*head)}"


def _apart(pair: PlannedSet) -> str:
    return f"{pair.name}, apart"


def _kind(row: dict, joint: dict, singles: list[dict], beyond: list[dict], apart: dict) -> str:
    """What a pair is; see `PAIRS`. Each argument has value, low and high."""
    known = [row, joint, apart, *singles, *beyond]
    if row["exploratory"] or any(one["low"] is None or one["high"] is None for one in known):
        return UNDECIDED
    both, value = joint["value"], row["value"]
    if is_finding(row["p_maxt"]) and value > 0:
        if joint["low"] > 0 and all(single["high"] < _LITTLE * both for single in singles):
            return EITHER
        values = [single["value"] for single in singles]
        bound = _LITTLE * max(values)
        alike = all(single["low"] > 0 for single in singles) and -bound <= apart["low"] and apart["high"] <= bound
        return DUPLICATE if alike and row["low"] > _EQUIVALENT * sum(values) else REDUNDANT
    if is_finding(row["p_maxt"]):
        bound = _LITTLE * abs(both)
        as_much = all(-bound <= one["low"] and one["high"] <= bound for one in beyond)
        return BOTH if as_much and joint["low"] > 0 else DEPENDENT
    bound = max(_EQUIVALENT * max(abs(both), abs(sum(single["value"] for single in singles))), 4 * ROUNDING)
    return INDEPENDENT if -bound <= row["low"] and row["high"] <= bound else UNDECIDED
