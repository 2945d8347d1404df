"""What each head does: its role, or none, and whether its removal says so, too."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from headscope.report.marks import (
    DIVERGING,
    FIRST,
    SECOND,
    by_group,
    colour_bar,
    dots_of,
    estimate_note,
    head_notes,
    heads_of,
)
from headscope.report.naming import Names, fitted, interval, number, percent, plot_text, probability, significant
from headscope.report.panels import Line, View, curve_panels, dot_panels, heat_maps
from headscope.report.role_marks import RoleMarks, role_grids
from headscope.report.role_ties import ties_sentences, ties_table
from headscope.report.section import Section
from headscope.report.tables import INTERVAL, Table, estimate
from headscope.study.analysis import StudyResult
from headscope.study.claims import CONFIRMED, content_roles, untested, verdicts_of
from headscope.study.inference import SIGNIFICANT
from headscope.study.roles import Roles
from headscope.study.roles.causal import CAUSAL
from headscope.study.roles.clusters import CAVEAT, CLUSTERING
from headscope.study.roles.counterparts import COUNTERPART, NAME
from headscope.study.roles.excess import EXCESS, PAIRING
from headscope.study.roles.forms import FORM_TESTS, FORMS
from headscope.study.roles.gating import GATING
from headscope.study.roles.kinds import ABSTRACT_COUNT, ABSTRACT_KINDS, KINDS, SIGNED_ROLE, abstract_kind
from headscope.study.roles.maps import RESIDUAL
from headscope.study.roles.naming import NAMING, NONE
from headscope.study.roles.ties import AGAINST_CONTROL

_DEFINITIONS = {
    "residual": RESIDUAL,
    "excess_definition": EXCESS,
    "pairing": PAIRING,
    "naming": NAMING,
    "against_control": AGAINST_CONTROL,
    "forms": FORMS,
    "form_tests": FORM_TESTS,
    "gating_definition": GATING,
    "causal_definition": CAUSAL,
    "kinds_definition": KINDS,
    "clustering": CLUSTERING,
    "cluster_caveat": CAVEAT,
}
# named heads in one panel of curves
_MOST_CURVES = 8
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
# of t: beyond these all colours are alike
_LEAST_TOP, _MOST_TOP = 6.0, 20.0


def section(result: StudyResult, names: Names, groups: Sequence[str]) -> Section | None:
    """The section, where roles were looked for."""
    roles = result.roles
    if roles is None or not len(roles.names):
        return None
    effects = None if result.role_effects is None else verdicts_of(result.role_effects, roles.names)
    marks = RoleMarks(roles.names["role"].to_list())
    named = roles.names.filter(pl.col("role") != NONE)
    figures: dict[str, Any] = {
        "role_grid": grid_of(roles.names, names, groups, marks),
        "role_excess": excess_maps(roles.excess, roles.names, names, groups),
        "role_gating": None
        if roles.excess_timesteps is None
        else gating_curves(roles.excess_timesteps, named, names, groups, marks),
        "role_causal": None if effects is None else causal_views(effects, names, groups),
    }
    values: dict[str, Any] = {
        "summary": [
            *(sentence_of(roles.names, group) for group in groups if len(of_group(roles.names, group))),
            *ties_sentences(roles, groups),
        ],
        "ties": ties_table(roles, names, groups),
        "names": names_table(named, names) if len(named) else None,
        "excess": excess_table(roles.excess, names),
        "causal": None if effects is None else causal_table(effects, names, groups),
        "kinds": kinds_table(roles.kinds, groups),
        "clusters": clusters_table(roles.clusters, roles.names, groups),
        "agreement": agreement_table(roles.cluster_agreement, groups) if len(roles.cluster_agreement) else None,
        "found_kinds": kinds_sentences(roles.names, groups),
        "cluster_counts": clusters_sentence(roles.cluster_agreement, groups),
        "verdicts": None if effects is None else verdicts_said(effects, groups),
        "left_out": left_out_table(roles, groups),
        "counterpart_definition": COUNTERPART if (roles.excess["feature"] == NAME).any() else None,
        "top": f"±{_MOST_TOP:g}",
        "most_curves": _MOST_CURVES,
    }
    return Section("roles", "What heads do", {**values, **_DEFINITIONS}, figures)


def of_group(table: pl.DataFrame, group: str) -> pl.DataFrame:
    return table.filter(pl.col("group") == group)


def counts_of(names: pl.DataFrame) -> list[tuple[str, int]]:
    """The roles of one group and how many heads have each, the most frequent first; without those that have none."""
    found = names.filter(pl.col("role") != NONE).select(SIGNED_ROLE).group_by("role").agg(pl.len().alias("count"))
    return list(found.sort(["count", "role"], descending=[True, False]).iter_rows())


def sentence_of(names: pl.DataFrame, group: str) -> str:
    """How many heads have which role on a group."""
    rows = of_group(names, group)
    reason = untested(names, group)
    if reason is not None:
        return f"On {group} no head was tested: {reason}."
    found, void = counts_of(rows), int((rows["void"].fill_null(0) > 0).sum())
    beside = f" {void} more {'is' if void == 1 else 'are'} void: rows are missing or not finite." if void else ""
    if not found:
        return f"On {group} no head of {len(rows)} has a role.{beside}"
    counted = ", ".join(f"{count} {role}" for role, count in found)
    total = sum(count for _, count in found)
    return f"On {group} {total} of {len(rows)} heads {'has' if total == 1 else 'have'} a role: {counted}.{beside}"


def kinds_sentences(names: pl.DataFrame, groups: Sequence[str]) -> list[str]:
    """Which of the abstract's kinds are found where, and how many features heads of each group are named for."""
    said, seeking = [], names.filter(pl.col("sign") > 0)
    for kind in ABSTRACT_KINDS:
        found = []
        for group, rows in by_group(seeking, groups):
            roles = [role for role in content_roles(rows, group) if abstract_kind(role) == kind]
            if roles:
                count = len(rows.filter(pl.col("role").is_in(roles)))
                found.append(f"{group} ({count} {'head' if count == 1 else 'heads'}: {', '.join(roles)})")
        where = f"found on {'; on '.join(found)}" if found else "found on no group"
        said.append(f"{kind.capitalize()}: {where}.")
    others = {group: [role for role in content_roles(names, group) if abstract_kind(role) is None] for group in groups}
    beside = [f"{', '.join(roles)} on {group}" for group, roles in others.items() if roles]
    said += [f"Features that are of none of these: {'; '.join(beside)}."] if beside else []
    counts = [f"{group} {len(content_roles(names, group))}" for group, _ in by_group(names, groups)]
    said.append(
        f"Different features that heads of a group are named for, where the abstract has {ABSTRACT_COUNT} mechanisms:"
        f" {', '.join(counts)}."
    )
    return said


def verdicts_said(verdicts: pl.DataFrame, groups: Sequence[str]) -> str:
    """How many roles are confirmed on each group, by their own sets."""
    said = []
    for group, table in by_group(verdicts.filter("main"), groups):
        confirmed, tested = table.filter(verdict=CONFIRMED)["role"].to_list(), table["tested"].sum()
        listed = f" ({', '.join(confirmed)})" if confirmed else ""
        rest = f", {len(table) - tested} could not be tested" if tested < len(table) else ""
        said.append(f"on {group} {len(confirmed)} of {tested}{listed}{rest}")
    return f"Named and confirmed by removal: {'; '.join(said)}."


def left_out_table(roles: Roles, groups: Sequence[str]) -> Table | None:
    """The features that weren't looked for, and why."""
    lacking = roles.features.filter(~pl.col("kept"))
    rows = [
        [row["feature"], group, f"{row['grid_height']} x {row['grid_width']}", row["split"], row["reason"]]
        for group, part in by_group(lacking, groups)
        for row in part.unique(["feature", "grid_height", "grid_width"], keep="first", maintain_order=True).to_dicts()
    ]
    columns = [("feature", False), ("group", False), ("tokens", False), ("split", False), ("why", False)]
    return Table("Features that weren't looked for.", columns, rows) if rows else None


def grid_of(roles: pl.DataFrame, names: Names, groups: Sequence[str], marks: RoleMarks) -> list[View]:
    """Which head has which role, a panel per group."""
    panels = by_group(roles, groups)
    notes = {
        (group, row["site"], row["head"]): _role_note(row, names)
        for group, table in panels
        for row in table.iter_rows(named=True)
    }
    return role_grids(panels, names, marks, notes)


def excess_maps(excess: pl.DataFrame, roles: pl.DataFrame, names: Names, groups: Sequence[str]) -> list[View]:
    """Excess over its standard error of every head on every feature, confirm split; a view per group."""
    key = ["group", "site", "head", "feature"]
    named = roles.filter(pl.col("feature").is_not_null()).select(*key, mark=pl.lit("●"))
    table = _shown_split(excess).join(named, on=key, how="left", maintain_order="left")
    error = pl.when(pl.col("standard_error") > 0).then(pl.col("standard_error"))
    table = table.with_columns(note=_excess_notes(names), mark=pl.col("mark").fill_null(""), t=pl.col("value") / error)
    views = []
    for group, part in by_group(table, groups):
        size = part["t"].abs().max()
        top = min(max(size, _LEAST_TOP), _MOST_TOP) if isinstance(size, float) else _LEAST_TOP
        axis = {"colorscale": DIVERGING, "cmin": -top, "cmax": top, "colorbar": colour_bar("excess / error")}
        features = sorted(part["feature"].unique())
        panels = [(group, part)]
        figure = heat_maps(
            panels, names, heads_of(part, names), features, axis, "t", "note", across="feature", mark="mark"
        )
        views.append(View(group, figure))
    return views


def gating_curves(
    timesteps: pl.DataFrame, named: pl.DataFrame, names: Names, groups: Sequence[str], marks: RoleMarks
) -> list[View] | None:
    """The excess of the named heads against the noise, a view per group."""
    table = _shown_split(timesteps)
    views = []
    for group in groups:
        # content features alone have an excess
        heads = of_group(named, group).filter(pl.col("feature").is_not_null()).to_dicts()
        heads = sorted(heads, key=lambda row: -abs(row["value"] or 0.0))[:_MOST_CURVES]
        lines, across = [], "log-SNR, nats (the larger, the less noise)"
        for index, head in enumerate(heads):
            key = {name: head[name] for name in ("group", "site", "head", "feature")}
            rows = table.filter([pl.col(name) == value for name, value in key.items()])
            step = "timestep" if rows["log_snr"].has_nulls() else "log_snr"
            across = across if step == "log_snr" else "timestep (the larger, the noisier)"
            members = rows.sort(step).to_dicts()
            title = f"{names.head(head['site'], head['head'])}, {head['role']}"
            notes = head_notes([f"{title}, {row[step]:.3g}" for row in members], members, significant)
            symbol = _SYMBOLS[index % len(_SYMBOLS)]
            dots = dots_of(title, members, notes, marks.colour(head["role"]), symbol)
            if members:
                lines.append(Line([row[step] for row in members], dots))
        if lines:
            figure = curve_panels([(group, lines)], across, "excess", tick_format=None, reference=0.0)
            views.append(View(group, figure))
    return views or None


def causal_views(causal: pl.DataFrame, names: Names, groups: Sequence[str]) -> list[View]:
    """What removing a role's heads does to its feature's pixels and to the others, a view per group."""
    views = []
    for group, table in by_group(causal, groups):
        rows = table.to_dicts()
        labels = [f"{set_of(row, names)} ({row['heads']} {'head' if row['heads'] == 1 else 'heads'})" for row in rows]
        series = []
        for shift, (name, text, colour, symbol) in zip((-0.16, 0.16), (
            ("inside", "on the feature's pixels", FIRST, "circle"),
            ("outside", "on all other pixels", SECOND, "diamond"),
        ), strict=True):  # fmt: skip
            members = [_part_of(row, name) for row in rows]
            drawn = dots_of(text, members, head_notes(labels, members, percent), colour, symbol)
            series.append(replace(drawn, filled=[row["verdict"] == CONFIRMED for row in rows], shift=shift))
        figure = dot_panels([(group, labels, series)], "change of the loss", row_height=40, tick_format=".3~p")
        views.append(View(group, figure))
    return views


def names_table(named: pl.DataFrame, names: Names) -> Table:
    """Every named head with what it was named by."""
    rows = []
    for row in _in_execution(named, names):
        write = fitted((row["low"], row["high"]))
        local = " (local, too)" if row["local"] and row["role"] != "local" else ""
        rows.append(
            [
                names.head(row["site"], row["head"]),
                row["group"],
                f"{_named(row)}{local}",
                *estimate(row, write),
                row["unit"],
                probability(row["p_maxt"]),
                number(row["entropy"], 2),
                number(row["entropy_normalised"], 3),
                number(row["distance"], 2),
                row["gating"] or "–",
                _slope(row),
            ]
        )
    columns = [("head", False), ("group", False), ("role", False), ("statistic", True), INTERVAL, ("unit", False)]
    columns += [("corrected p", True), ("entropy, nats", True), ("H / ln K", True), ("distance, tokens", True)]
    caption = (
        "Named heads, numbers of the confirm split. The statistic is what the head was named by: excess, ln K − H,"
        " mass on the sink's key, or distance over that of uniform attention."
    )
    return Table(caption, [*columns, ("gating by noise", False), ("slope per nat of log-SNR", True)], rows)


def excess_table(excess: pl.DataFrame, names: Names) -> Table:
    """The excesses with a small corrected p; all are in the table roles_excess."""
    table = _shown_split(excess)
    found = table.filter(pl.col("p_maxt") < SIGNIFICANT)
    rows = []
    for row in _in_execution(found, names):
        cells = [names.head(row["site"], row["head"]), row["group"], row["feature"], *estimate(row, significant)]
        rows.append([*cells, row["unit"], probability(row["p_value"]), probability(row["p_maxt"]), str(row["sources"])])
    columns = [("head", False), ("group", False), ("feature", False), ("excess", True), INTERVAL, ("unit", False)]
    caption = (
        f"Excesses with a corrected p below {SIGNIFICANT:g} on the confirm split, {len(found):,} of {len(table):,};"
        " all of them are in roles_excess.csv. A head has one name at most."
    )
    return Table(caption, [*columns, ("p", True), ("corrected p", True), ("sources", True)], rows)


def causal_table(causal: pl.DataFrame, names: Names, groups: Sequence[str]) -> Table:
    rows = []
    for _, table in by_group(causal, groups):
        for row in table.iter_rows(named=True):
            inside, outside = (_part_of(row, name) for name in ("inside", "outside"))
            rows.append(
                [
                    set_of(row, names),
                    row["group"],
                    row["verdict"],
                    str(row["heads"]),
                    str(row["named"]),
                    *estimate(inside, percent),
                    *estimate(outside, percent),
                    *estimate(row | {"value": row["difference"]}, percent),
                    probability(row["p_holm"]),
                    *estimate(_part_of(row, "beyond"), percent),
                    *estimate(_ratio_of(row), _times),
                    _times(row["control_ratio"]),
                    str(row["controls"]),
                    str(row["sources"]),
                ]
            )
    columns = [
        ("role", False),
        ("group", False),
        ("verdict", False),
        ("heads", True),
        ("of them named", True),
        ("on its pixels", True),
        INTERVAL,
    ]
    columns += [("elsewhere", True), INTERVAL, ("difference", True), INTERVAL, ("corrected p", True)]
    columns += [
        ("beyond control sets", True),
        INTERVAL,
        ("added error, ratio", True),
        INTERVAL,
        ("of control sets", True),
        ("control sets", True),
        ("sources", True),
    ]
    caption = (
        "Removing a role's heads together. On its pixels and elsewhere: percent of the clean loss there. Difference:"
        " the first minus the second, in percentage points, which is tested; beyond control sets: minus the mean of"
        " theirs. Ratio: of the error that is added per pixel, inside over outside; as large as that of control sets it"
        " says where the model errs, and nothing of these heads."
    )
    return Table(caption, columns, rows)


def set_of(row: dict[str, Any], names: Names) -> str:
    """What was removed: a role's own set, all heads of a larger role, or one of them."""
    role, one = row["role"], row["set"].removeprefix(f"{row['role']} heads of {row['group']}").removeprefix(": ")
    if not one:
        return role
    site, _, head = one.rpartition(" h")
    return f"{role}: {names.head(site, int(head))}" if head.isdecimal() else f"{role}: {one}"


def _ratio_of(row: dict[str, Any]) -> dict[str, Any]:
    """The ratio, where removal harms both kinds of pixels; otherwise it says nothing."""
    ratio = _part_of(row, "ratio")
    harms = all((row[name] or 0) > 0 for name in ("inside", "outside"))
    return ratio if harms else ratio | dict.fromkeys(("value", "low", "high"))


def _times(value: float | None) -> str:
    """A ratio."""
    return "–" if value is None else f"{significant(value)} ×"


def kinds_table(kinds: pl.DataFrame, groups: Sequence[str]) -> Table:
    """Entropies of the heads of each role."""
    rows = []
    for _, table in by_group(kinds, groups):
        for row in table.iter_rows(named=True):
            rows.append(
                [
                    "no role" if row["role"] == NONE else row["role"],
                    row["group"],
                    row["kind"] or "–",
                    str(row["heads"]),
                    mean_and_deviation(row, "entropy", 2),
                    interval(row["entropy_low"], row["entropy_high"], lambda value: number(value, 2)),
                    mean_and_deviation(row, "normalised", 3),
                    interval(row["normalised_low"], row["normalised_high"]),
                ]
            )
    columns = [("role", False), ("group", False), ("the abstract's kind", False), ("heads", True)]
    columns += [("entropy, nats", True), INTERVAL]
    columns += [("H / ln K", True), INTERVAL]
    caption = "Entropy of the heads of each role: mean ± SD between heads; intervals of the mean, over sources."
    return Table(caption, columns, rows)


def mean_and_deviation(row: dict[str, Any], name: str, digits: int) -> str:
    """mean ± SD, as the abstract writes entropies; without SD where there is a single head."""
    deviation = row[f"{name}_sd"]
    spread = "" if deviation is None else f" ± {number(deviation, digits)}"
    return f"{number(row[name], digits)}{spread}"


def clusters_table(clusters: pl.DataFrame, roles: pl.DataFrame, groups: Sequence[str]) -> Table:
    """What roles the heads of each cluster have."""
    rows = []
    joined = clusters.join(roles.select("group", "site", "head", "role"), on=["group", "site", "head"], how="left")
    for group, table in by_group(joined, groups):
        for (cluster,), part in table.sort("cluster").group_by("cluster", maintain_order=True):
            found = part.with_columns(pl.col("role").fill_null(NONE)).group_by("role").agg(pl.len().alias("count"))
            counts = found.sort(["count", "role"], descending=[True, False])
            members = ", ".join(
                f"{count} {'without a role' if role == NONE else role}" for role, count in counts.rows()
            )
            rows.append([str(cluster), group, str(len(part)), members])
    columns = [("cluster", False), ("group", False), ("heads", True), ("of which", False)]
    return Table("The clusters, and the roles of their heads.", columns, rows)


def agreement_table(agreement: pl.DataFrame, groups: Sequence[str]) -> Table:
    rows = []
    for _, table in by_group(agreement, groups):
        for row in table.iter_rows(named=True):
            numbers = (number(row[name], 2) for name in ("agreement", "chance", "chance_high"))
            rows.append([row["group"], str(row["clusters"]), *numbers, "taken" if row["chosen"] else "–"])
    columns = [("group", False), ("clusters", True), ("agreement of halves", True), ("mean by chance", True)]
    columns += [("95 % of chance below", True), ("", False)]
    return Table("Agreement between the clusterings of random halves of the sources.", columns, rows)


def clusters_sentence(agreement: pl.DataFrame, groups: Sequence[str]) -> str:
    """How many clusters each group has."""
    said = []
    for group, table in by_group(agreement, groups):
        chosen = table.filter(pl.col("chosen"))
        if len(chosen):
            row = chosen.row(0, named=True)
            beside = f"agreement {number(row['agreement'], 2)}, by chance {number(row['chance'], 2)}"
            said.append(f"on {group} {row['clusters']} ({beside})")
        else:
            said.append(f"on {group} 1, as no number beats chance")
    return f"Clusters (exploratory): {'; '.join(said)}." if said else ""


def _shown_split(table: pl.DataFrame) -> pl.DataFrame:
    """The rows of the confirm split, or all where there is none."""
    if "split" not in table.columns:
        return table
    confirm = table.filter(pl.col("split") == "confirm")
    return confirm if len(confirm) else table


def _excess_notes(names: Names) -> pl.Expr:
    def note(row: dict) -> str:
        head = plot_text(names.head(row["site"], row["head"]))
        return f"<b>{head}</b>, {plot_text(row['feature'])}<br>{estimate_note(row, significant)}"

    columns = ["site", "head", "feature", "value", "low", "high", "sources", "p_value", "p_maxt", "void"]
    return pl.struct(columns).map_elements(note, return_dtype=pl.String)


def _role_note(row: dict[str, Any], names: Names) -> str:
    head = plot_text(names.head(row["site"], row["head"]))
    if row["role"] == NONE:
        reason = f"<br>{plot_text(row['reason'])}" if row["reason"] else ""
        return f"<b>{head}</b>: no role{reason}"
    gating = f"<br>{plot_text(row['gating'])}" if row["gating"] else ""
    return (
        f"<b>{head}</b>: {plot_text(_named(row))}<br>{significant(row['value'])}"
        f" ({interval(row['low'], row['high'], significant)}), corrected p = {probability(row['p_maxt'])}{gating}"
    )


def _named(row: dict[str, Any]) -> str:
    """The role, and where it is a feature that the head avoids, that."""
    return f"{row['role']}, avoided" if row["sign"] is not None and row["sign"] < 0 else row["role"]


def _slope(row: dict[str, Any]) -> str:
    if row["slope"] is None:
        return "–"
    bounds = interval(row["slope_low"], row["slope_high"], significant)
    return f"{significant(row['slope'])} ({bounds}), corrected p {probability(row['slope_p_holm'])}"


def _part_of(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The estimate of one of a row's quantities, as a row."""
    return row | {
        "value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"], "p_maxt": None, "p_value": None
    }  # fmt: skip


def _in_execution(table: pl.DataFrame, names: Names) -> list[dict[str, Any]]:
    rows = table.to_dicts()
    return sorted(rows, key=lambda row: (names.group_place(row["group"]), names.place(row["site"]), row["head"]))
