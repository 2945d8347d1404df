"""The causal clause: sets and their controls, and the numbers of it by hand."""

import numpy as np
import polars as pl
import pytest

from headscope.study.roles import RoleSet, causal, sets_of
from headscope.study.roles.causal import CONTROLS
from study import simulated


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(999):
        yield


def chosen(features, group="faces", sites=("a", "b")):
    """A table like `Roles.chosen`: features by site, None for heads without, "-x" for heads that avoid x."""
    rows = []
    for site, names in zip(sites, features, strict=True):
        for head, name in enumerate(names):
            sign = None if name is None else -1 if name.startswith("-") else 1
            rows.append((group, site, head, name and name.removeprefix("-"), sign, name and 0.1 * (head + 1)))
    schema = {"group": pl.String, "site": pl.String, "head": pl.Int64, "feature": pl.String, "sign": pl.Int64}
    return pl.DataFrame(rows, schema | {"discover": pl.Float64}, orient="row")


def test_every_role_makes_a_set_with_controls_of_the_same_sites():
    table = chosen([["edge", None, None, None, "edge"], ["edge", "-edge", "texture", None, None]])
    sets = sets_of(table, controls=2)
    own = [one for one in sets if not one.control_of]
    assert [(one.name, one.heads) for one in own] == [
        ("edge heads of faces", (("a", 0), ("a", 4), ("b", 0))),
        ("texture heads of faces", (("b", 2),)),
    ]
    for one in own:
        controls = [control for control in sets if control.control_of == one.name]
        assert [control.name for control in controls] == [f"{one.name}, control {number}" for number in (1, 2)]
        assert len({control.heads for control in controls}) == 2
        for control in controls:
            assert not set(control.heads) & set(one.heads)
            assert sorted(site for site, _ in control.heads) == sorted(site for site, _ in one.heads)
            assert control.feature == one.feature
    assert sets_of(table, controls=2) == sets
    assert {one.heads for one in sets_of(table, controls=2, seed=1)} != {one.heads for one in sets}


def test_controls_have_no_head_that_was_chosen_for_the_feature_whatever_its_sign():
    table = chosen([["edge", "-edge", "-edge", None, "texture"]], sites=("a",))
    sets = sets_of(table, controls=9)
    controls = {one.heads for one in sets if one.control_of == "edge heads of faces"}
    assert controls == {(("a", 3),), (("a", 4),)}
    # a head that looks at something else, or avoids it, may be in one
    controls = {one.heads for one in sets if one.control_of == "texture heads of faces"}
    assert controls == {(("a", head),) for head in range(4)}
    assert [one.name for one in sets_of(chosen([["edge", "-edge", "-edge"]], sites=("a",)))] == ["edge heads of faces"]


def test_where_a_site_has_too_few_others_controls_are_of_other_sites():
    table = chosen([["edge"] * 3, [None] * 4])
    controls = sets_of(table, controls=3)[1:]
    assert len(controls) == 3
    assert all(site == "b" for control in controls for site, _ in control.heads)
    # four heads make four sets of three, and no fifth
    assert len(sets_of(table, controls=9)) == 5
    assert len(sets_of(chosen([["edge"] * 3, [None] * 2]))) == 1


def test_each_head_of_a_role_can_have_a_set():
    sets = sets_of(chosen([["edge", "edge"], [None, "texture"]]), controls=0, each_head=True)
    assert [one.name for one in sets] == [
        "edge heads of faces",
        "edge heads of faces: a h0",
        "edge heads of faces: a h1",
        "texture heads of faces",
    ]
    with pytest.raises(ValueError, match="controls: got -1, expected at least 0"):
        sets_of(chosen([[None], [None]]), controls=-1)


def test_a_roles_set_is_its_strongest_heads_and_all_of_a_larger_one_another():
    table = chosen([["edge"] * 3 + [None] * 5, ["edge"] * 4 + [None] * 4])
    main, every = sets_of(table, controls=0)
    assert [main.name, every.name] == ["edge heads of faces", "edge heads of faces: all 7"]
    # of the excesses 0.4, 0.3, 0.3, 0.2, 0.2, 0.1 and 0.1
    assert main.heads == (("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3))
    assert len(every.heads) == 7
    assert sets_of(table, controls=0, strongest=7) == [main._replace(heads=every.heads)]
    assert [len(one.heads) for one in sets_of(table, controls=0, strongest=1)] == [1, 7]
    for one, count in ((main, 8), (every, 3)):
        controls = [other for other in sets_of(table) if other.control_of == one.name]
        assert [len(other.heads) for other in controls] == [len(one.heads)] * count
        # not those of the role that are not among the strongest, either
        assert all(not set(other.heads) & set(every.heads) for other in controls)
    with pytest.raises(ValueError, match="strongest: got 0, expected at least 1"):
        sets_of(table, strongest=0)


SHARE = 0.2


def ablations(inside, outside, sources=24, name="edge", seed=0, share=SHARE, group="faces"):
    """Rows of "set_ablations": by set, what is added per pixel inside and outside; the same noise for all."""
    generator = np.random.default_rng(seed)
    level = 1 + 0.1 * generator.normal(size=(sources, 2))
    frames = []
    for edit in inside:
        for source in range(sources):
            for step in range(2):
                clean_in, clean_out = 0.4 * level[source, step], 0.1 * level[source, step]
                # of its own for every set
                noise = 1 + 0.1 * generator.normal()
                edited_in, edited_out = clean_in + inside[edit] * noise, clean_out + outside[edit] * noise
                frames.append(
                    {
                        "group": group,
                        "split": "confirm",
                        "source_id": f"s{source:02}",
                        "item": source,
                        "replicate": 0,
                        "timestep": (100, 500)[step],
                        "edit": edit,
                        "fill": "mean",
                        "clean": share * clean_in + (1 - share) * clean_out,
                        "edited": share * edited_in + (1 - share) * edited_out,
                        f"clean_on_{name}": clean_in,
                        f"edited_on_{name}": edited_in,
                        f"share_on_{name}": share,
                    }
                )
    return pl.DataFrame(frames)


def a_set(name="own", feature="edge", control_of="", heads=(("a", 0),), group="faces"):
    return RoleSet(name, group, feature, heads, control_of)


SETS = [a_set(), a_set("c1", control_of="own", heads=(("a", 1),)), a_set("c2", control_of="own", heads=(("b", 1),))]


def relative(rows, edit, timestep):
    """Inside and outside, at a timestep: sums of changes over sums of clean errors."""
    own = rows.filter(pl.col("edit") == edit, pl.col("timestep") == timestep)
    clean, edited = (own[f"{kind}_on_edge"].to_numpy() for kind in ("clean", "edited"))
    others = [(own[kind].to_numpy() - SHARE * part) / (1 - SHARE) for kind, part in zip(
        ("clean", "edited"), (clean, edited), strict=True)]  # fmt: skip
    return (edited - clean).sum() / clean.sum(), (others[1] - others[0]).sum() / others[0].sum()


def test_the_clause_by_hand():
    rows = ablations({"own": 0.3, "c1": 0.1, "c2": 0.02}, {"own": 0.05, "c1": 0.03, "c2": 0.01})
    row = causal(rows, SETS).row(0, named=True)
    inside, outside, difference = {}, {}, {}
    for edit in ("own", "c1", "c2"):
        parts = np.mean([relative(rows, edit, timestep) for timestep in (100, 500)], axis=0)
        inside[edit], outside[edit], difference[edit] = *parts, parts[0] - parts[1]
    assert row["inside"] == pytest.approx(inside["own"])
    assert row["inside"] == pytest.approx(0.75, abs=0.05)
    assert row["outside"] == pytest.approx(outside["own"])
    assert row["outside"] == pytest.approx(0.5, abs=0.05)
    assert row["difference"] == pytest.approx(difference["own"])
    assert row["low"] < row["difference"] < row["high"]
    of_controls = (difference["c1"] + difference["c2"]) / 2
    assert row["control_difference"] == pytest.approx(of_controls)
    assert row["beyond"] == pytest.approx(difference["own"] - of_controls)
    assert row["confirmed"]
    assert (row["controls"], row["elsewhere"], row["heads"]) == (2, 0.5, 1)
    assert (row["sources"], row["void"], row["left_out"], row["share"]) == (24, 0, 0, pytest.approx(SHARE))
    # per pixel, in units of the loss
    added = rows.with_columns(change=pl.col("edited_on_edge") - pl.col("clean_on_edge"))
    total = pl.col("edited") - pl.col("clean")
    added = added.with_columns(rest=(total - SHARE * pl.col("change")) / (1 - SHARE))
    own, others = added.filter(pl.col("edit") == "own"), added.filter(pl.col("edit") != "own")
    (inside_mean, outside_mean), (control_inside, control_outside) = (
        part.select(pl.col("change", "rest").mean()).row(0) for part in (own, others)
    )
    assert row["absolute"] == pytest.approx(inside_mean - outside_mean)
    assert row["absolute_low"] < row["absolute"] < row["absolute_high"]
    assert row["ratio"] == pytest.approx(inside_mean / outside_mean)
    # the noise of a set is that of all its pixels
    assert row["ratio_low"] == pytest.approx(row["ratio_high"])
    assert row["control_ratio"] == pytest.approx(control_inside / control_outside)


# of the clean errors 0.4 inside and 0.1 outside; controls add as much to both, in proportion, unless said
@pytest.mark.parametrize(
    ("inside", "outside", "of_controls", "why"),
    [
        (0.1, 0.1, (0.1, 0.025), "it hurts all pixels alike, so others by more percent"),
        (0.05, 0.2, (0.1, 0.025), "it hurts other pixels more"),
        (1.2, 0.3, (0.1, 0.025), "it is strong, in proportion to the error that is there"),
        (0.4, 0.3, (0.1, 0.025), "it adds more error per pixel, but by less percent"),
        (0.1, 0.01, (0.1, 0.01), "control sets hurt these pixels as much"),
        (0.0, 0.0, (0.1, 0.025), "it changes nothing"),
        (-0.2, -0.02, (0.1, 0.025), "it helps there"),
    ],
)
def test_a_role_is_not_confirmed_where(inside, outside, of_controls, why):
    rows = ablations(
        {"own": inside, **dict.fromkeys(("c1", "c2"), of_controls[0])},
        {"own": outside, **dict.fromkeys(("c1", "c2"), of_controls[1])},
    )
    row = causal(rows, SETS).row(0, named=True)
    assert row["confirmed"] is False, why
    if "proportion" in why or "nothing" in why:
        assert row["difference"] == pytest.approx(0, abs=1e-12)
        assert row["p_value"] > 0.9
        assert (row["ratio"] is None) == ("nothing" in why)
    if "strong" in why:
        # what says nothing of these heads
        assert row["absolute_low"] > 0.8
        assert row["ratio"] == pytest.approx(row["control_ratio"])


def drawn_sets(seed, spread=0.0, specific=0.0, sources=24):
    """One set and its controls, whose damage is in proportion to the clean error but for noise of every source.

    spread: of the logarithm of a set's strength; specific: by how much more the set's own pixels suffer, as a fraction
    of its strength.
    """
    generator = np.random.default_rng(seed)
    strengths = 0.05 * np.exp(spread * generator.normal(size=1 + CONTROLS))
    clean = np.array([2.0, 1.0])[:, None] * np.exp(0.2 * generator.normal(size=(2, sources)))
    frames = []
    for number, strength in enumerate(strengths):
        damage = strength * (1 + 0.2 * generator.normal(size=(2, sources)))
        damage[0] *= 1 + (specific if number == 0 else 0)
        edited = clean * (1 + damage)
        weights = np.array([0.25, 0.75])
        frames.append(pl.DataFrame({
            "source_id": [f"s{source:02}" for source in range(sources)], "item": range(sources),
            "clean": weights @ clean, "edited": weights @ edited, "clean_on_edge": clean[0],
            "edited_on_edge": edited[0], "share_on_edge": 0.25,
        }).with_columns(
            group=pl.lit("faces"), split=pl.lit("confirm"), replicate=0, timestep=100, fill=pl.lit("mean"),
            edit=pl.lit(f"c{number}" if number else "own"),
        ))  # fmt: skip
    controls = [a_set(f"c{number}", control_of="own", heads=(("a", number),)) for number in range(1, 1 + CONTROLS)]
    return causal(pl.concat(frames), [a_set(), *controls])["confirmed"][0]


@pytest.mark.full
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_strength_alone_confirms_at_most_5_in_100(spread):
    with simulated.fewer_draws(399):
        assert sum(drawn_sets(seed, spread) for seed in range(100)) <= 5


@pytest.mark.full
def test_a_weak_but_specific_set_is_confirmed():
    """Its pixels suffer by half as much again; strengths are as those of the controls."""
    with simulated.fewer_draws(399):
        assert sum(drawn_sets(seed, 0.0, 0.5) for seed in range(40)) >= 36


def test_without_controls_and_below_20_sources_nothing_is_confirmed():
    strong = {"own": 0.3}, {"own": 0.05}
    alone = causal(ablations(*strong), [a_set()]).row(0, named=True)
    assert alone["p_holm"] < 0.05
    assert alone["beyond"] is None
    assert alone["confirmed"] is False
    both = {"own": 0.3, "c1": 0.0, "c2": 0.0}, {"own": 0.05, "c1": 0.0, "c2": 0.0}
    few = causal(ablations(*both, sources=19), SETS).row(0, named=True)
    assert few["exploratory"]
    assert few["p_value"] is None
    assert few["confirmed"] is False


def test_items_without_such_pixels_are_left_out_and_counted():
    rows = ablations({"own": 0.3, "c1": 0.0, "c2": 0.0}, {"own": 0.05, "c1": 0.0, "c2": 0.0}, sources=26)
    whole = causal(rows.filter(pl.col("item") < 24), SETS)
    nothing = pl.col("item") >= 24
    empty = {name: pl.when(~nothing).then(name) for name in ("clean_on_edge", "edited_on_edge")}
    rows = rows.with_columns(share_on_edge=pl.when(nothing).then(0.0).otherwise("share_on_edge"), **empty)
    found = causal(rows, SETS)
    assert found["left_out"].to_list() == [4]
    assert found["sources"].to_list() == [24]
    assert found["difference"][0] == pytest.approx(whole["difference"][0])


def test_where_all_pixels_are_the_features_there_are_no_others_to_compare():
    both = ablations({"own": 0.3, "c1": 0.0, "c2": 0.0}, {"own": 0.05, "c1": 0.0, "c2": 0.0}, share=1.0)
    row = causal(both, SETS).row(0, named=True)
    assert (row["sources"], row["left_out"], row["void"], row["exploratory"]) == (0, 48, 0, True)
    assert row["difference"] is None
    assert row["confirmed"] is False


@pytest.mark.parametrize("wrong", ["nan", "missing"])
def test_a_bad_row_voids_its_set(wrong):
    rows = ablations({"own": 0.3, "c1": 0.0, "c2": 0.0}, {"own": 0.05, "c1": 0.0, "c2": 0.0})
    one = (pl.col("edit") == "own") & (pl.col("item") == 3) & (pl.col("timestep") == 100)
    if wrong == "missing":
        rows = rows.filter(~one)
    else:
        rows = rows.with_columns(edited_on_edge=pl.when(one).then(float("nan")).otherwise("edited_on_edge"))
    row = causal(rows, SETS).row(0, named=True)
    assert row["void"] == 1
    assert row["difference"] is None
    assert row["inside"] is None
    assert row["confirmed"] is False
    # a control's bad row takes the comparison with it, and that alone
    other = ablations({"own": 0.3, "c1": 0.0, "c2": 0.0}, {"own": 0.05, "c1": 0.0, "c2": 0.0})
    one = (pl.col("edit") == "c1") & (pl.col("item") == 3) & (pl.col("timestep") == 100)
    row = causal(other.filter(~one), SETS).row(0, named=True)
    assert (row["void"], row["beyond"], row["confirmed"]) == (0, None, False)
    assert row["difference"] is not None


def test_a_feature_of_several_words_and_two_groups():
    rows = ablations({"own": 0.3}, {"own": 0.05}, name="part_left_eye")
    other = ablations({"own": 0.1}, {"own": 0.05}, name="part_left_eye", group="lfw")
    sets = [a_set(feature="part left eye"), a_set(feature="part left eye", group="lfw")]
    found = causal(pl.concat([rows, other]), sets)
    assert found["group"].to_list() == ["faces", "lfw"]
    assert found["difference"][0] > found["difference"][1]


def test_bad_tables_are_refused_by_name():
    rows = ablations({"own": 0.3}, {"own": 0.05})
    with pytest.raises(
        ValueError, match=r"^set_ablations: lacks clean_on_texture, edited_on_texture, share_on_texture"
    ):
        causal(rows, [a_set(feature="texture")])
    with pytest.raises(ValueError, match=r"^set_ablations: got no row of the confirm split for other"):
        causal(rows, [a_set(), a_set("other")])
    assert len(causal(rows, [])) == 0
    assert causal(rows, []).columns == causal(rows, [a_set()]).columns
