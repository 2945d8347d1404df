"""What the lead says of roles: which were named, and which of them removal confirms, beside the groups without."""

import math
from collections.abc import Sequence
from typing import Any

import polars as pl

from headscope.report.lead.finding import Finding, Strength, Tile, in_order, interval_of, sources_of, tested_of
from headscope.report.naming import Names, interval, percent, significant
from headscope.report.sections.roles import counts_of
from headscope.study.analysis import StudyResult
from headscope.study.claims import CONFIRMED, NO_CONTROLS, UNNAMED, content_roles, untested, verdicts_of


def findings(result: StudyResult, names: Names) -> list[Finding]:
    if result.roles is None or not len(result.roles.names):
        return []
    roles = in_order(result.roles.names, names)
    made = []
    if result.role_effects is not None and len(result.role_effects):
        made += _causal(verdicts_of(in_order(result.role_effects, names), roles), roles)
    return [*made, _named(roles, result.roles.ties)]


def _causal(effects: pl.DataFrame, roles: pl.DataFrame) -> list[Finding]:
    """The role that removal confirms most clearly, beside its control sets and the other groups; or that none is."""
    main = effects.filter("main").to_dicts()
    confirmed = [row for row in main if row["verdict"] == CONFIRMED]
    others = _unconfirmed(main)
    if not confirmed:
        void = sum(1 for row in main if row["void"])
        beside = f"; {void} of them are void" if void else ""
        listed = ", ".join(f"{row['role']} on {row['group']}" for row in main)
        sentence = (
            f"No role was confirmed by removal: removing the heads of {len(main)} roles ({listed}) was not established"
            " to raise the error on their feature's pixels by more percent than on others, beyond control"
            f" sets{beside}.{others}"
        )
        return [Finding(Strength.CONFIRMED, sentence)]
    row = max(confirmed, key=lambda one: one["difference"] / (one["standard_error"] or math.inf))
    tested = (
        f"{tested_of(row)}, beyond {row['controls']} sets of as many other heads;"
        f" {sources_of(row['sources'])} of the confirm split"
    )
    also = [f"{one['role']} on {one['group']}" for one in confirmed if one is not row]
    beside = f" Confirmed in the same way: {', '.join(also)}." if also else ""
    group, role = row["group"], row["role"]
    difference = f"{_points(row['difference'])} more ({interval_of(row, _points)}; {tested})"
    sentence = (
        f"Removing {_heads_of(row)} of {group} that discover chose for {role} ({row['named']} named on confirm) changes"
        f" the error on {role} pixels by {_relative(row, 'inside')} of the clean one, on all others by"
        f" {_relative(row, 'outside')}: {difference}.{_ratios_of(row)}"
        f"{_of_all(row, effects)}{_named_elsewhere(row, roles)}{beside}{others}"
    )
    tile = Tile(
        f"{percent(row['inside'])} against {percent(row['outside'])}",
        f"change of the loss on {role} pixels and on all others without {_heads_of(row)} of {group} for {role}",
        difference,
    )
    return [Finding(Strength.CONFIRMED, sentence, True, tile)]


def _heads_of(row: dict[str, Any]) -> str:
    """How many heads a role's own set is, of how many."""
    if row["heads"] < row["chosen"]:
        return f"the {row['heads']} strongest of the {row['chosen']} heads"
    return "the 1 head" if row["heads"] == 1 else f"the {row['heads']} heads"


def _of_all(row: dict[str, Any], effects: pl.DataFrame) -> str:
    """What removing all heads of a role of more does, confirmed or not."""
    role = (pl.col("group") == row["group"]) & (pl.col("role") == row["role"])
    every = effects.filter(role, ~pl.col("main"), pl.col("heads") == row["chosen"], pl.col("heads") > row["heads"])
    said = []
    for part in every.filter(pl.col("difference").is_not_null()).iter_rows(named=True):
        less = part["difference"] < 0
        said.append(
            f" All {part['heads']} change it by {_relative(part, 'inside')} there and by"
            f" {_relative(part, 'outside')} on the others: {_points(abs(part['difference']))}"
            f" {'less' if less else 'more'} ({tested_of(part)}),"
            f" {part['verdict']}."
        )
    return "".join(said)


def _points(value: float | None) -> str:
    """A difference of percentages."""
    return percent(value).replace("%", "points")


def _relative(row: dict[str, Any], name: str) -> str:
    return f"{percent(row[name])} ({interval(row[f'{name}_low'], row[f'{name}_high'], percent)})"


def _ratios_of(row: dict[str, Any]) -> str:
    """How many times as much error a pixel of the feature gains, where both kinds gain any; beside control sets."""
    if row["ratio"] is None or min(row["inside"], row["outside"]) <= 0:
        return ""
    bounds = interval(row["ratio_low"], row["ratio_high"], significant)
    beside = "" if row["control_ratio"] is None else f", by control sets {significant(row['control_ratio'])} times"
    return f" Per pixel that is {significant(row['ratio'])} times ({bounds}) as much added error{beside}."


def _unconfirmed(rows: Sequence[dict[str, Any]]) -> str:
    """The roles that lack one half of the evidence."""
    said = []
    for row in rows:
        if row["verdict"] == NO_CONTROLS:
            said.append(
                f" On {row['group']} removing {_heads_of(row)} for {row['role']} hurts its pixels more"
                f" ({tested_of(row)}), but their sites have too few other heads for control sets, so it"
                " does not count as confirmed."
            )
        elif row["verdict"] == UNNAMED:
            said.append(
                f" On {row['group']} removing what discover chose for {row['role']} hurts its pixels more, too, but"
                " none of it is named on confirm."
            )
    return "".join(said)


def _named_elsewhere(row: dict[str, Any], roles: pl.DataFrame) -> str:
    """The control: how many heads of other groups have that role."""
    groups = roles["group"].unique(maintain_order=True)
    others = [group for group in groups if group != row["group"] and untested(roles, group) is None]
    seeking = roles.filter(pl.col("role") == row["role"], pl.col("sign") > 0)
    counts = {group: len(seeking.filter(pl.col("group") == group)) for group in others}
    listed = ", ".join(f"{count or 'none'} on {group}" for group, count in counts.items())
    return f" Heads named {row['role']} elsewhere: {listed}." if listed else ""


def _named(roles: pl.DataFrame, ties: pl.DataFrame | None) -> Finding:
    """How many heads have which role on every group."""
    # the group with the most of them has the tile
    parts, tile, most, any_feature, tested = [], None, 0, False, False
    groups = roles["group"].unique(maintain_order=True)
    for group in groups:
        rows = roles.filter(pl.col("group") == group)
        if untested(roles, group) is not None:
            parts.append(f"{group} not tested")
            continue
        tested = True
        found = counts_of(rows)
        features = content_roles(roles, group)
        counted = f" ({', '.join(f'{count} {role}' for role, count in found)})" if found else ""
        parts.append(f"{group} {sum(count for _, count in found)} of {len(rows)}{counted}")
        any_feature = any_feature or bool(features)
        count = len(rows.filter(pl.col("sign") > 0))
        if count > most:
            others = [other for other in groups if other != group and untested(roles, other) is None]
            tile, most = _tile(rows, group, features, roles, others), count
    sentence = (
        "Heads with a role, chosen on discover and tested on confirm (a feature of images by excess attention, max-t;"
        f" or uniform, sink, local): {'; '.join(parts)}. All others have none that was measured."
    )
    tile = _tile_of_ties(roles, ties) or tile
    return Finding(Strength.CONFIRMED if tested else Strength.EXPLORATORY, sentence, any_feature, tile)


def _tile_of_ties(roles: pl.DataFrame, ties: pl.DataFrame | None) -> Tile | None:
    """The tied group on which most heads look at counterparts, beside its control; None where none does."""
    named = roles.filter(role="counterpart")
    if ties is None or not len(named):
        return None
    pairs = ties.filter(split="confirm").join(named.select("group", "site", "head"), on=["group", "site", "head"])
    counts = pairs.group_by("group", "control", maintain_order=True).len().sort("len", descending=True)
    if not len(counts):
        return None
    said = []
    for group, control, count in counts.rows():
        own = pairs.filter(group=group)["value"]
        here, there = (len(named.filter(group=name)) for name in (group, control))
        assert here == count
        said.append((group, control, here, there, f"{significant(own.min())} to {significant(own.max())}"))
    group, control, here, there, more = said[0]
    heads = len(roles.filter(group=group))
    rest = "".join(f"; {one} on {name}, {two} on {other}" for name, other, one, two, _ in said[1:])
    detail = f"excess over the control {more} of attention, corrected p < 0.05 on confirm{rest}"
    return Tile(
        f"{here} of {heads}", f"heads look at counterparts on {group}, {there} on {control}, its control", detail
    )


def _tile(rows: pl.DataFrame, group: str, features: Sequence[str], roles: pl.DataFrame, others: Sequence[str]) -> Tile:
    seeking = pl.col("role").is_in(list(features)) & (pl.col("sign") > 0)
    named = rows.filter(seeking)
    elsewhere = [f"{len(roles.filter(pl.col('group') == other, seeking))} on {other}" for other in others]
    beside = f"; named for the same: {', '.join(elsewhere)}" if elsewhere else ""
    detail = f"{', '.join(features)}; corrected p < 0.05 on confirm{beside}"
    return Tile(f"{len(named)} of {len(rows)}", f"heads attend to a feature of the images of {group}", detail)
