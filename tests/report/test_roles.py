"""The section on roles: its figures and cells hold what the tables hold, and what wasn't found is said."""

from dataclasses import replace

import polars as pl
import pytest

from headscope.report.lead import NOTHING, lead_of
from headscope.report.naming import Names, percent, significant
from headscope.report.role_marks import RoleMarks
from headscope.report.sections import roles as section
from report import roles_and_circuits as made

NAMES = Names(made.SITES, [made.TIED, made.CONTROL])
GROUPS = [made.TIED, made.CONTROL]
COUNTERPARTS = 3


@pytest.fixture(scope="module")
def result():
    return made.result()


@pytest.fixture(scope="module")
def shown(result):
    return section_of(result)


def section_of(result):
    found = section.section(result, NAMES, GROUPS)
    assert found is not None
    return found


def none_of(result):
    """The result with no head named."""
    kinds = result.roles.names.schema
    blank = {name: pl.lit(None, kinds[name]) for name in ("feature", "sign", "value", "low", "high", "p_maxt")}
    nobody = result.roles.names.with_columns(role=pl.lit("none"), **blank)
    return replace(result, roles=replace(result.roles, names=nobody))


def test_letters_and_colours_tell_roles_apart():
    roles = [
        "counterpart",
        "colour",
        "edge",
        "local",
        "sink",
        "uniform",
        "none",
        "part eye",
        "part ear",
        "x",
        "x 1",
        "",
    ]
    marks = RoleMarks(roles)
    features = ["", "colour", "counterpart", "edge", "part ear", "part eye", "x", "x 1"]
    assert marks.roles == [*features, "local", "sink", "uniform"]
    letters = [marks.letters(role) for role in marks.roles[1:]]
    assert len(set(letters)) == len(letters)
    assert marks.letters("none") == ""
    assert len({marks.colour(role) for role in marks.roles}) == len(marks.roles)


def test_the_grid_shows_every_heads_role(result, shown):
    (view,) = shown.figures["role_grid"]
    cells = [trace for trace in view.figure["data"] if trace["type"] == "heatmap"]
    categories = ["none", *RoleMarks(result.roles.names["role"].to_list()).roles]
    for group, trace in zip(GROUPS, cells, strict=True):
        for site, head, role in result.roles.names.filter(group=group).select("site", "head", "role").iter_rows():
            assert trace["z"][made.SITES.index(site)][head] == categories.index(role)
    tied = cells[0]
    place = made.SITES.index(made.SITES[1])
    assert tied["text"][place][2] == "Co"
    assert "counterpart" in tied["hovertext"][place][2]
    assert "nothing was found on discover" in cells[1]["hovertext"][0][0]
    # as many steps of colour as there are roles
    assert len(tied["colorscale"]) == 2 * len(categories)
    assert [tied["zmin"], tied["zmax"]] == [-0.5, len(categories) - 0.5]


def test_the_summary_counts_heads(shown):
    assert shown.values["summary"] == [
        "On tiled 8 of 48 heads have a role: 3 counterpart, 1 edge, 1 local, 1 luminance, 1 sink, 1 uniform.",
        "On untiled no head of 48 has a role.",
        "Counterparts: on tiled 3 of 48 heads have a significant excess, of up to 0.600; on untiled, its control,"
        " none of 48 heads has a significant excess. 3 of 48 heads have significantly more of it on tiled than on the"
        " control.",
    ]


def test_the_named_heads_are_held_against_the_control(result, shown):
    table = shown.values["ties"]
    named = [key for key, (role, _) in made.NAMED.items() if role == "counterpart"]
    assert {row[0] for row in table.rows} == {NAMES.head(*key) for key in named}
    ties = result.roles.ties.filter(pl.col("split") == "confirm", pl.col("tied") > 0).sort("value", descending=True)
    for row, tie in zip(table.rows, ties.iter_rows(named=True), strict=True):
        assert row[1:6] == ["tiled", "untiled", significant(tie["tied"]), "0.0500", f"{tie['value']:.3f}"]
        assert row[-1] == "24 and 21"
    without = section_of(replace(result, roles=replace(result.roles, ties=None)))
    assert without.values["ties"] is None
    assert len(without.values["summary"]) == len(shown.values["summary"]) - 1
    assert shown.values["found_kinds"] == [
        "Edge detection: found on tiled (1 head: edge).",
        "Texture analysis: found on no group.",
        "Semantic understanding: found on tiled (3 heads: counterpart).",
        "Features that are of none of these: luminance on tiled.",
        "Different features that heads of a group are named for, where the abstract has 8 mechanisms:"
        " tiled 3, untiled 0.",
    ]
    assert shown.values["left_out"].rows == [
        ["saturation", group, "8 x 8", "discover", "other features say the same"] for group in GROUPS
    ]


def test_the_map_of_excesses_marks_what_is_named(result, shown):
    tied, control = shown.figures["role_excess"]
    assert [tied.label, control.label] == GROUPS
    trace = tied.figure["data"][0]
    features = tied.figure["layout"]["xaxis"]["ticktext"]
    assert features == sorted(made.FEATURES)
    row = result.roles.excess.filter(group=made.TIED, site=made.SITES[1], head=2, feature="counterpart").row(
        0, named=True
    )
    y, x = 8 + 2, features.index("counterpart")
    assert trace["z"][y][x] == pytest.approx(row["value"] / row["standard_error"])
    assert trace["text"][y][x] == "●"
    assert significant(row["value"]) in trace["hovertext"][y][x]
    assert sum(mark == "●" for line in trace["text"] for mark in line) == 5
    assert not any(mark for line in control.figure["data"][0]["text"] for mark in line)
    # the table keeps to what was found
    assert [row[2] for row in shown.values["excess"].rows] == [
        "edge",
        "counterpart",
        "counterpart",
        "luminance",
        "counterpart",
    ]
    assert "5 of 384" in shown.values["excess"].caption


def test_curves_over_the_noise_are_those_of_named_heads(result, shown):
    (view,) = shown.figures["role_gating"]
    assert view.label == made.TIED
    lines = [trace for trace in view.figure["data"] if trace.get("mode") == "markers"]
    assert next(trace["name"] for trace in lines) == "block 0.attn1 h1, edge"
    assert len(lines) == 5
    assert lines[0]["x"] == [-3.0, 0.0, 3.0]
    assert lines[0]["y"] == pytest.approx([0.3, 0.6, 0.9])


def test_cells_are_the_tables_numbers(result, shown):
    table = shown.values["names"]
    titles = [title for title, _ in table.columns]
    row = dict(zip(titles, table.rows[1], strict=True))
    assert row["head"] == "block 1.attn1 h2"
    assert row["role"] == "counterpart (local, too)"
    assert row["statistic"] == "0.600"
    assert row["corrected p"] == "0.0004"
    assert row["gating by noise"] == "acts at high log-SNR"
    assert len(table.rows) == 8
    causal = shown.values["causal"]
    row = dict(zip([title for title, _ in causal.columns], causal.rows[0], strict=True))
    found = result.role_effects.row(0, named=True)
    assert [row["role"], row["verdict"], row["on its pixels"]] == ["counterpart", "confirmed", percent(found["inside"])]
    assert row["elsewhere"] == percent(found["outside"])
    assert [row["difference"], row["added error, ratio"], row["of control sets"]] == ["280 %", "8.00 ×", "7.00 ×"]
    assert (
        shown.values["verdicts"] == "Named and confirmed by removal: on tiled 1 of 2 (counterpart); on untiled 0 of 1."
    )
    assert [row[2:5] for row in causal.rows] == [
        ["confirmed", "3", "3"], ["not confirmed", "1", "1"], ["not confirmed", "3", "0"]
    ]  # fmt: skip
    kinds = shown.values["kinds"]
    assert kinds.rows[0][:5] == ["counterpart", made.TIED, "semantic understanding", "3", "3.20 ± 0.10"]
    # of a single head there is no deviation
    assert kinds.rows[1][4] == "3.20"


def test_inside_and_outside_stand_beside_each_other(result, shown):
    tied, _ = shown.figures["role_causal"]
    inside, outside = tied.figure["data"]
    assert inside["x"] == pytest.approx([3.2, 0.02])
    assert outside["x"] == pytest.approx([0.4, 0.03])
    assert inside["marker"]["symbol"] == ["circle", "circle-open"]
    assert inside["error_x"]["arrayminus"] == pytest.approx([0.1, 0.1])


def test_sets_of_single_heads_have_the_heads_label():
    row = {"role": "edge", "group": "g", "set": f"edge heads of g: {made.SITES[2]} h3"}
    assert section.set_of(row, NAMES) == "edge: block 2.attn1 h3"
    assert section.set_of(row | {"set": "edge heads of g"}, NAMES) == "edge"


def test_a_head_may_avoid_its_feature(result):
    avoiding = result.roles.names.with_columns(sign=-pl.col("sign"))
    found = section_of(replace(result, roles=replace(result.roles, names=avoiding)))
    assert found.values["names"].rows[0][2] == "edge, avoided"
    assert found.values["summary"][0].startswith(
        "On tiled 8 of 48 heads have a role: 3 avoiding counterpart, 1 avoiding edge"
    )
    assert found.values["found_kinds"][0] == "Edge detection: found on no group."
    assert found.values["found_kinds"][-1].endswith("tiled 0, untiled 0.")
    lead = lead_of(replace(result, roles=replace(result.roles, names=avoiding)), NAMES)
    assert not any("attend to a feature" in tile.label for tile in lead.tiles)
    # heads that avoid a feature aren't those whose removal is held against its pixels
    assert found.values["causal"].rows[0][2:5] == ["confirmed, but not named on confirm", "3", "0"]


def test_where_nothing_is_named_the_section_says_so(result):
    found = section_of(replace(none_of(result), role_effects=None))
    assert found.values["names"] is None
    assert found.values["causal"] is None
    assert found.figures["role_gating"] is None
    assert found.values["summary"][0] == "On tiled no head of 48 has a role."
    views = found.figures["role_excess"]
    assert isinstance(views, list)
    assert all(mark == "" for line in views[0].figure["data"][0]["text"] for mark in line)
    assert section.section(replace(result, roles=None), NAMES, GROUPS) is None


def test_a_void_effect_says_so(result):
    blank = ("inside", "inside_low", "inside_high", "difference", "low", "high", "p_value", "p_holm", "ratio")
    void = result.role_effects.with_columns(
        void=pl.lit(4), confirmed=pl.lit(False), **{name: pl.lit(None, pl.Float64) for name in blank}
    )
    found = section_of(replace(result, role_effects=void))
    assert found.values["causal"].rows[0][5] == "void: 4 missing or not finite"
    assert "; 3 of them are void." in lead_of(replace(result, role_effects=void), NAMES).sentences[0]


def test_the_lead_holds_a_confirmed_role_against_its_controls(result):
    found = lead_of(result, NAMES)
    assert found.tiles[0].value == "320 % against 40.0 %"
    assert found.tiles[0].label == (
        "change of the loss on counterpart pixels and on all others without the 3 heads of tiled for counterpart"
    )
    assert found.tiles[0].detail.startswith("280 points more (95 % interval 276 points to 284 points; corrected p")
    first = found.sentences[0]
    for phrase in (
        "Removing the 3 heads of tiled that discover chose for counterpart (3 named on confirm)",
        "changes the error on counterpart pixels by 320 % (310 % to 330 %) of the clean one, on all others by 40.0 %"
        " (30.0 % to 50.0 %): 280 points more (95 % interval 276 points to 284 points; corrected p = 0.0004, beyond 3"
        " sets of as many other heads; 20 sources of the confirm split).",
        "Per pixel that is 8.00 times (6.40 to 9.60) as much added error, by control sets 7.00 times.",
        "Heads named counterpart elsewhere: none on untiled.",
    ):
        assert phrase in first, phrase
    assert found.tiles[1].value == f"{COUNTERPARTS} of 48"
    assert found.tiles[1].label == "heads look at counterparts on tiled, 0 on untiled, its control"
    assert "excess over the control 0." in found.tiles[1].detail
    # without controls, the group on which most heads attend to something
    alone = lead_of(replace(result, roles=replace(result.roles, ties=None)), NAMES)
    assert alone.tiles[1].value == f"{COUNTERPARTS + 2} of 48"
    assert "named for the same: 0 on untiled" in alone.tiles[1].detail
    assert NOTHING not in found.sentences


def test_the_lead_says_where_no_role_is_confirmed_or_found(result):
    nothing = result.role_effects.with_columns(confirmed=pl.lit(False))
    found = lead_of(replace(none_of(result), role_effects=nothing, circuits=None), NAMES)
    assert found.tiles == []
    assert found.sentences[0] == NOTHING
    assert found.sentences[1].startswith("No role was confirmed by removal: removing the heads of 3 roles")
    assert "tiled 0 of 48; untiled 0 of 48" in found.sentences[2]


def changed(result, **columns):
    """The result with other numbers of what removing the counterpart heads of the tied group does."""
    rows = result.role_effects.to_dicts()
    rows[0] |= columns
    return replace(result, role_effects=pl.DataFrame(rows, infer_schema_length=None))


def test_without_control_sets_removal_confirms_nothing_and_that_is_said(result):
    alone = changed(result, confirmed=False, controls=0, beyond=None, beyond_low=None, beyond_high=None)
    assert section_of(alone).values["causal"].rows[0][2] == "not confirmed: no control sets"
    first = lead_of(alone, NAMES).sentences[0]
    assert first.startswith("No role was confirmed by removal")
    assert "removing the 3 heads for counterpart hurts its pixels more (corrected p = 0.0004), but" in first
    assert "too few other heads for control sets" in first


def test_where_there_are_no_other_pixels_nothing_is_compared(result):
    blank = ("inside", "inside_low", "inside_high", "outside", "outside_low", "outside_high", "difference", "p_holm")
    covered = changed(result, **dict.fromkeys(blank), sources=0, confirmed=False, ratio=None)
    assert section_of(covered).values["causal"].rows[0][2] == "no pixels to compare"


def test_a_ratio_of_harm_to_help_is_not_given(result):
    helped = changed(result, outside=-0.04, ratio=-28.6, ratio_low=None, ratio_high=None)
    row = section_of(helped).values["causal"]
    assert dict(zip([title for title, _ in row.columns], row.rows[0], strict=False))["added error, ratio"] == "–"
    lead = lead_of(helped, NAMES)
    assert "as much added error" not in lead.sentences[0]
    assert lead.tiles[0].value == "320 % against −4.0 %"


def test_of_a_large_role_the_strongest_heads_count_and_all_are_told(result):
    rows = result.role_effects.to_dicts()
    every = rows[0] | {"set": f"{rows[0]['set']}: all 21", "heads": 21, "difference": -0.9, "low": -1.2, "high": -0.6}
    every |= {"inside": 1.5, "inside_low": 1.4, "inside_high": 1.6, "outside": 2.4, "confirmed": False}
    large = replace(result, role_effects=pl.DataFrame([every, *rows], infer_schema_length=None))
    found, lead = section_of(large).values, lead_of(large, NAMES)
    assert found["verdicts"].startswith("Named and confirmed by removal: on tiled 1 of 2 (counterpart); on untiled")
    assert [row[0] for row in found["causal"].rows[:2]] == ["counterpart: all 21", "counterpart"]
    first = lead.sentences[0]
    assert first.startswith("Removing the 3 strongest of the 21 heads of tiled that discover chose for counterpart")
    assert "All 21 change it by 150 % (140 % to 160 %) there and by 240 % " in first
    assert "on the others: 90.0 points less (corrected p = 0.0004), not confirmed." in first
    assert lead.tiles[0].label.endswith("without the 3 strongest of the 21 heads of tiled for counterpart")
    # all heads alone are not the role
    alone = every | {"confirmed": True, "difference": 0.9}
    only = replace(result, role_effects=pl.DataFrame([alone, *(row | {"confirmed": False} for row in rows)]))
    assert lead_of(only, NAMES).sentences[0].startswith("No role was confirmed by removal: removing the heads of 3")
    assert "on tiled 0 of 2" in section_of(only).values["verdicts"]


def test_too_few_sources_are_no_absence_of_roles(result):
    """They are not tested: nothing was looked for, so nothing was missing."""
    reason = "fewer than 20 sources in a split"
    few = none_of(result).roles.names.with_columns(local=pl.lit(None, pl.Boolean), reason=pl.lit(reason))
    untested = replace(
        result, roles=replace(result.roles, names=few, kinds=result.roles.kinds.head(0)), role_effects=None
    )
    found = section_of(untested)
    assert found.values["summary"][0] == f"On tiled no head was tested: {reason}."
    sentences = lead_of(replace(untested, circuits=None), NAMES).sentences
    assert sentences[0].startswith("Heads with a role")
    assert "tiled not tested; untiled not tested" in sentences[0]
    lines = untested.claims().filter(pl.col("claim").str.contains("edge|mechanisms"))
    assert set(lines["status"]) == {"not measured here"}
    assert set(lines["quantity"]) == {reason}


def test_void_heads_are_counted(result):
    first = (pl.col("site") == made.SITES[0]) & (pl.col("head") == 0)
    void = result.roles.names.with_columns(void=pl.when(first).then(3).otherwise("void"))
    found = section_of(replace(result, roles=replace(result.roles, names=void)))
    assert found.values["summary"][1].endswith("1 more is void: rows are missing or not finite.")
