"""Roles of planted heads, and of none, from tables without a model."""

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from headscope.study.inference import means
from headscope.study.roles import assess
from headscope.study.roles.kinds import kinds_of
from study import simulated
from study.simulated_roles import FEATURES, GRID, SITE, Head, smooth, together, world

LOG_SNR = {100: 2.0, 500: -1.0}
HEADS = {
    "edge": Head("follows", "edge", 1.0),
    "dark": Head("follows", "luminance", -0.7),
    "early": Head("follows", "texture", 0.8, (100,)),
    "places": Head("position"),
    "uniform": Head("uniform"),
    "random": Head("random"),
    "others": Head("other", "edge", 1.0),
    "sink": Head("sink"),
    "local": Head("local"),
    "middle": Head("middle"),
    "tied": Head("counterpart", effect=0.3),
    "sometimes": Head("position", at=(500,)),
}
NAMES = list(HEADS)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(499):
        yield


@pytest.fixture(scope="module")
def tables():
    return world(list(HEADS.values()), sources=24, draws=2)


@pytest.fixture(scope="module")
def roles(tables):
    found = assess(*tables, log_snr=LOG_SNR)
    assert found is not None
    return found


def of(roles, name):
    return roles.names.row(NAMES.index(name), named=True)


def test_planted_heads_have_their_names_and_all_others_none(roles):
    expected = {"edge": "edge", "dark": "luminance", "early": "texture", "uniform": "uniform", "sink": "sink"}
    expected |= {"local": "local", "tied": "counterpart"}
    assert dict(zip(NAMES, roles.names["role"], strict=True)) == {name: expected.get(name, "none") for name in NAMES}
    assert of(roles, "dark")["sign"] == -1
    assert of(roles, "edge")["sign"] == 1
    assert of(roles, "random")["reason"] == "nothing was found on discover"
    assert roles.names.filter(pl.col("role") == "none")["value"].null_count() == 5
    named = roles.names.filter(pl.col("feature").is_not_null())
    assert (named["p_maxt"] < 0.05).all()
    assert named["unit"].to_list() == ["standard deviations"] * 3 + ["share of attention"]


def test_the_chosen_of_discover_dont_need_confirm(roles, tables):
    """What other images are in the confirm split changes nothing that sets of heads are made of."""
    assert roles.chosen["role"].to_list() == roles.names["role"].to_list()
    other = world(list(HEADS.values()), sources=24, draws=2, seed=1)
    confirm = [pl.col("split") == split for split in ("discover", "confirm")]
    mixed = [
        pl.concat([one.filter(confirm[0]), two.filter(confirm[1])]) for one, two in zip(tables, other, strict=True)
    ]
    again = assess(*mixed, log_snr=LOG_SNR)
    assert again is not None
    assert_frame_equal(again.chosen, roles.chosen)


def test_values_are_means_over_sources_with_their_intervals(roles):
    tied = of(roles, "tied")
    assert tied["value"] == pytest.approx(0.3, abs=0.005)
    assert tied["low"] < 0.3 < tied["high"]
    cell = roles.excess.filter(pl.col("split") == "confirm", pl.col("head") == 0, pl.col("feature") == "edge")
    edge = of(roles, "edge")
    assert [edge[name] for name in ("value", "low", "high")] == [cell[name][0] for name in ("value", "low", "high")]
    assert len(roles.excess) == 2 * len(HEADS) * (len(FEATURES) + 1)
    # the chosen cells are a smaller family
    assert edge["p_maxt"] <= cell["p_maxt"][0]


def test_forms_are_what_they_are_by_definition(roles, tables):
    assert of(roles, "uniform")["value"] == pytest.approx(0, abs=1e-6)
    mass = tables.key_mass.filter(pl.col("head") == NAMES.index("sink"), ~pl.col("translated"))["key_mass"][0]
    assert of(roles, "sink")["value"] == pytest.approx(mass.max(), rel=1e-6)
    assert of(roles, "local")["value"] == pytest.approx(0.2, abs=0.005)
    assert of(roles, "local")["local"]
    # near to its keys on the image, and less so where the image has moved
    assert of(roles, "middle")["local"] is False


def test_gating_is_seen_where_it_is(roles):
    assert of(roles, "early")["gating"] == "acts at high log-SNR"
    assert of(roles, "early")["at_low"] == pytest.approx(0, abs=1e-6)
    # with two timesteps the slope is the difference over 3 nats
    early = of(roles, "early")
    assert early["slope"] == pytest.approx((early["at_high"] - early["at_low"]) / 3)
    assert of(roles, "edge")["gating"] == "no gating found"
    assert of(roles, "sometimes")["gating"] == "acts at low log-SNR"
    assert of(roles, "sometimes")["gating_of"] == "ln K − H"
    assert of(roles, "random")["gating"] is None
    steps = roles.excess_timesteps.filter(pl.col("head") == NAMES.index("early"), pl.col("feature") == "texture")
    assert steps.sort("timestep")["value"].to_list() == [pytest.approx(early["at_high"]), pytest.approx(0, abs=1e-6)]


def test_kinds_hold_entropies_by_role(roles, tables):
    rows = tables.key_mass.filter(pl.col("split") == "confirm", ~pl.col("translated"))
    content = rows.filter(
        pl.col("head").is_in([NAMES.index(name) for name in NAMES if of(roles, name)["role"] == "none"])
    )
    kind = roles.kinds.filter(pl.col("role") == "none")
    by_head = content.group_by("head").agg(pl.col("entropy").mean())["entropy"]
    assert kind["heads"][0] == 5
    assert kind["entropy"][0] == pytest.approx(by_head.mean())
    assert kind["entropy_sd"][0] == pytest.approx(by_head.std())
    by_source = means(content.group_by("source_id").agg(pl.col("entropy").mean()), "entropy")
    assert kind["entropy_low"][0] == pytest.approx(by_source["low"][0])
    assert dict(roles.kinds.select("role", "kind").iter_rows()) == {
        "edge": "edge detection",
        "texture": "texture analysis",
        "counterpart": "semantic understanding",
        # the head that is named for it avoids it
        **dict.fromkeys(("avoiding luminance", "uniform", "sink", "local", "none")),
    }


def test_a_head_that_avoids_a_feature_has_no_part_in_its_kind():
    """Of two heads of one role, one seeks and one avoids: neither's entropy is in the other's."""
    names = pl.DataFrame(
        {"site": "a", "head": [0, 1, 2], "role": ["edge", "edge", "none"], "sign": [1, -1, None]}
        | {"entropy": [2.0, 3.0, 1.0], "entropy_normalised": [0.5, 0.75, 0.25]}
    )
    rows = names.drop("role", "sign").join(pl.DataFrame({"source_id": [f"s{i}" for i in range(24)]}), how="cross")
    found = kinds_of(names, rows.with_columns(item="source_id", replicate=0, timestep=1, call=0), 0)
    columns = ("role", "kind", "heads", "entropy", "entropy_sd", "normalised")
    assert found.select(columns).rows() == [
        ("avoiding edge", None, 1, 3.0, None, 0.75),
        ("edge", "edge detection", 1, 2.0, None, 0.5),
        ("none", None, 1, 1.0, None, 0.25),
    ]


def test_rows_in_another_order_give_the_same_to_the_last_bit(roles, tables):
    shuffled = assess(*(table.sample(fraction=1, shuffle=True, seed=1) for table in tables), log_snr=LOG_SNR)
    assert shuffled is not None
    for name, table in roles.tables().items():
        assert_frame_equal(table, shuffled.tables()[name], check_exact=True)


def test_a_group_is_assessed_by_itself():
    heads = [HEADS["edge"], HEADS["random"]]
    one, two = (world(heads, group=group, seed=seed) for seed, group in enumerate(("faces", "lfw")))
    both, alone = assess(*together(one, two)), assess(*one)
    assert both is not None
    assert alone is not None
    assert_frame_equal(both.names.filter(pl.col("group") == "faces"), alone.names)
    assert both.names["group"].to_list() == ["faces"] * 2 + ["lfw"] * 2


def test_below_20_sources_there_are_no_names():
    few = assess(*world([HEADS["edge"], HEADS["uniform"], HEADS["local"]], sources=19))
    assert few is not None
    assert few.names["role"].to_list() == ["none"] * 3
    assert set(few.names["reason"]) == {"fewer than 20 sources in a split"}
    assert few.excess["exploratory"].all()
    assert few.excess["p_value"].null_count() == len(few.excess)
    assert few.excess["value"].null_count() == 0


def test_items_of_a_source_are_no_sources():
    few = assess(*world([HEADS["edge"]], sources=10, items=4))
    assert few is not None
    assert few.names["role"].to_list() == ["none"]
    assert few.excess["sources"].unique().to_list() == [10]


@pytest.mark.parametrize("wrong", ["missing", "nan", "nan in a list"])
def test_a_missing_row_and_a_number_that_isnt_finite_void_the_head_alone(tables, roles, wrong):
    one = (pl.col("head") == 0) & (pl.col("split") == "confirm") & (pl.col("item") == 10_003) & ~pl.col("translated")
    one &= (pl.col("timestep") == 100) & (pl.col("replicate") == 1)
    if wrong == "missing":
        mass = tables.key_mass.filter(~one)
    elif wrong == "nan":
        mass = tables.key_mass.with_columns(entropy=pl.when(one).then(float("nan")).otherwise("entropy"))
    else:
        bad = pl.lit([float("nan")] * 64, pl.List(pl.Float32))
        mass = tables.key_mass.with_columns(key_mass=pl.when(one).then(bad).otherwise("key_mass"))
    found = assess(tables.features, mass, tables.counterparts, log_snr=LOG_SNR)
    assert found is not None
    assert found.names["role"].to_list()[1:] == roles.names["role"].to_list()[1:]
    cells = found.excess.filter(pl.col("split") == "confirm", pl.col("head") == 0, pl.col("feature") != "counterpart")
    if wrong == "nan":
        # its masses are sound, its entropy isn't
        assert cells["void"].to_list() == [0] * len(FEATURES)
        assert found.names["entropy"][0] is None
        assert found.names["role"][0] == "edge"
    else:
        assert cells["void"].to_list() == [1] * len(FEATURES)
        assert cells["value"].null_count() == len(FEATURES)
        assert found.names["role"][0] == "none"
        assert found.names["reason"][0].startswith("void") or found.names["reason"][0].startswith("not confirmed")
    assert found.clusters["cluster"].null_count() == 1


def test_bad_tables_are_refused_by_name(tables):
    features, mass, tied = tables
    with pytest.raises(ValueError, match=r"^features: lacks map; it has item"):
        assess(features.drop("map"), mass)
    with pytest.raises(
        ValueError, match=r"^key_mass: got 4608 rows whose key_mass isn't as long as their grid, as 64 num"
    ):
        assess(features, mass.with_columns(grid_height=pl.lit(7)))
    with pytest.raises(ValueError, match=r"^features: got a feature called sink, which is a role's name"):
        assess(features.with_columns(feature=pl.col("feature").replace("edge", "sink")), mass)
    with pytest.raises(ValueError, match=r"^features: got none of faces on 8 x 8 tokens, which key_mass has"):
        assess(features.with_columns(grid_height=pl.lit(4), grid_width=pl.lit(16)), mass)
    with pytest.raises(ValueError, match=r"^log_snr: lacks 500"):
        assess(features, mass, log_snr={100: 1.0})
    with pytest.raises(ValueError, match=r"^counterparts: got timesteps 100, expected those of key_mass, 100, 500"):
        assess(features, mass, tied.filter(pl.col("timestep") == 100))
    with pytest.raises(ValueError, match=r"^counterparts: got item 777"):
        assess(features, mass, tied.with_columns(item=pl.col("item").replace(3, 777)))


def test_one_split_alone_and_no_rows_are_no_study(tables):
    assert assess(tables.features, tables.key_mass.filter(pl.col("split") == "discover")) is None
    assert assess(tables.features.clear(), tables.key_mass.clear()) is None


def test_without_features_forms_are_still_told(tables):
    found = assess(tables.features.clear(), tables.key_mass)
    assert found is not None
    assert set(found.names["role"]) == {"none", "uniform", "sink", "local"}
    assert found.excess_timesteps is None
    assert len(found.excess) == 0


@pytest.mark.full
def test_of_heads_without_content_hardly_any_is_named():
    """40 worlds of 12 such heads: 5 % of worlds may have a cell below 0.05 on discover, none has a name."""
    heads = [Head("position")] * 3 + [Head("random", effect=e) for e in (0.5, 2, 8)]
    heads += [Head("other", feature, 1.0) for feature in FEATURES] + [Head("uniform")] * 2
    found = 0
    for seed in range(40):
        roles = assess(*world(heads, sources=20 + 4 * (seed % 2), items=1 + seed % 2, seed=seed))
        assert roles is not None
        assert roles.names["feature"].null_count() == len(heads)
        found += (roles.excess.filter(pl.col("split") == "discover")["p_maxt"] < 0.05).any()
    # more than 6 of 40 at 5 % has a chance of 0.3 %
    assert found <= 6


def test_the_site_is_part_of_a_head(tables):
    """Heads of two sites of one number are two heads."""
    heads = [HEADS["edge"], HEADS["random"]]
    one, two = (world(given, site=site) for site, given in ((SITE, heads), ("blocks.1", heads[::-1])))
    found = assess(one.features, pl.concat([one.key_mass, two.key_mass]))
    assert found is not None
    # both worlds have the same images, and the second its heads in the other order
    assert found.names["role"].to_list() == ["edge", "none", "none", "edge"]
    assert found.names.select("site", "head").rows() == [(site, head) for site in (SITE, "blocks.1") for head in (0, 1)]


def test_p_values_keep_to_draws(roles):
    p = roles.excess["p_value"].drop_nulls().to_numpy()
    assert p.min() >= 1 / 500
    assert np.all(roles.excess["p_maxt"].to_numpy() >= p)


def suppressed(rest, seed=0, sources=30):
    """A world in which "edge" is all but the sum of "luminance" and "texture", and a head follows it.

    rest: how much of its own "edge" has besides.
    """
    generator = np.random.default_rng(seed)
    maps = {}
    for split in ("discover", "confirm"):
        maps[split] = np.stack([smooth(generator, sources, GRID) for _ in FEATURES], axis=1)
        maps[split][:, 1] = maps[split][:, 0] + maps[split][:, 2] + rest * maps[split][:, 1]
    return world([Head("follows", "edge", 0.5), Head("random")], sources=sources, maps=maps, seed=seed)


def test_two_features_that_cant_be_told_apart_are_no_name():
    found = assess(*suppressed(0.1))
    assert found is not None
    # texture, the last of the three that say the same, is left out; edge follows from what the head does
    lost = found.features.filter(~pl.col("kept"))
    assert set(lost["feature"]) == {"texture"}
    assert found.names["role"].to_list() == ["edge", "none"]
    # the head follows what was left out
    one, *rest = suppressed(0.1)
    renamed = one.with_columns(feature=pl.col("feature").replace({"edge": "texture", "texture": "edge"}))
    found = assess(renamed, *rest)
    assert found is not None
    assert set(found.features.filter(~pl.col("kept"))["feature"]) == {"texture"}
    assert found.names["role"].to_list() == ["none", "none"]
    assert found.names["reason"][0].endswith("or texture: these can't be told apart here")
    assert found.chosen["role"].to_list() == ["none", "none"]
    assert set(found.excess.filter(pl.col("head") == 0)["rival"].drop_nulls()) == {"texture"}


@pytest.fixture(scope="module")
def against():
    """A tied group and its control: one head looks at counterparts on both alike, one more on the tied, one less."""
    heads = [Head("counterpart", effect=effect) for effect in (0.3, 0.2, 0.15)] + [Head("random")]
    untied = [Head("counterpart", effect=effect) for effect in (0.0, 0.2, 0.25)] + [Head("random")]
    one = world(heads, group="twins", timesteps=(100,))
    two = world(untied, group="distinct", seed=1, timesteps=(100,))
    return together(one, two)


def test_a_counterpart_head_looks_more_than_on_its_control(against):
    found = assess(*against, controls={"twins": "distinct", "tiled": "untiled"})
    assert found is not None
    names = found.names.filter(pl.col("group") == "twins")
    assert names["role"].to_list() == ["counterpart", "none", "none", "none"]
    assert names["reason"].to_list()[1:3] == ["not more than on its control"] * 2
    assert found.chosen.filter(pl.col("group") == "twins")["role"].to_list() == names["role"].to_list()
    # a control's own heads have their excess, and their names
    control = found.names.filter(pl.col("group") == "distinct")["role"]
    assert control.to_list() == ["none", "counterpart", "counterpart", "none"]
    assert found.ties is not None
    ties = found.ties.filter(pl.col("split") == "confirm")
    assert ties.select("group", "control").unique().rows() == [("twins", "distinct")]
    assert ties["value"].to_list() == pytest.approx([0.3, 0.0, -0.1, 0.0], abs=0.006)
    assert (ties["p_maxt"] < 0.05).to_list() == [True, False, True, False]
    excess = found.excess.filter(pl.col("split") == "confirm", pl.col("feature") == "counterpart")
    sides = [excess.filter(pl.col("group") == group) for group in ("twins", "distinct")]
    assert ties["tied"].to_list() == pytest.approx(sides[0]["value"].to_list())
    assert ties["control_value"].to_list() == pytest.approx(sides[1]["value"].to_list())
    assert (ties["tied"] - ties["control_value"]).to_list() == pytest.approx(ties["value"].to_list())
    welch = np.hypot(*(side["standard_error"].to_numpy() for side in sides))
    np.testing.assert_allclose(ties["standard_error"], welch, rtol=1e-9)
    assert ties["sources"].to_list() == [[24, 24]] * 4
    # without the control's tables its own excess names a head, and there is no such table
    alone = assess(*(table.filter(pl.col("group") == "twins") for table in against), controls={"twins": "distinct"})
    assert alone is not None
    assert alone.ties is None
    assert alone.names["role"].to_list() == ["counterpart"] * 3 + ["none"]
    with pytest.raises(ValueError, match=r"^controls: got twins as its own control"):
        assess(*against, controls={"twins": "twins"})


def test_a_head_that_is_void_on_the_control_is_not_compared(against):
    bad = (pl.col("group") == "distinct") & (pl.col("head") == 0) & (pl.col("item") == 10_002)
    tied = against.counterparts.with_columns(mass=pl.when(bad).then(float("nan")).otherwise("mass"))
    found = assess(against.features, against.key_mass, tied, controls={"twins": "distinct"})
    assert found is not None
    assert found.ties is not None
    ties = found.ties.filter(pl.col("split") == "confirm")
    assert ties["void"].to_list() == [4, 0, 0, 0]
    assert ties["value"].is_null().to_list() == [True, False, False, False]
    assert found.names.filter(pl.col("group") == "twins")["reason"][0] == "not more than on its control"


def quick_world():
    heads = [HEADS["edge"], HEADS["random"], HEADS["tied"]]
    return world(heads, timesteps=(100,), draws=2)


@pytest.mark.parametrize("split", ["discover", "confirm"])
def test_a_head_that_one_split_lacks_has_a_row_and_is_void(split):
    features, mass, tied = quick_world()
    gone = (pl.col("split") == split) & (pl.col("head") < 2)
    found = assess(features, mass.filter(~gone), tied)
    assert found is not None
    assert found.names["head"].to_list() == [0, 1, 2]
    assert found.names["role"].to_list() == ["none", "none", "counterpart"]
    # 24 items, two draws, as they are and rolled
    assert found.names["void"].to_list() == [96, 96, 0]
    assert found.names["reason"].to_list() == ["void: 96 rows are missing or not finite"] * 2 + [None]
    found = assess(features, mass, tied.filter(~((pl.col("split") == split) & (pl.col("head") == 2))))
    assert found is not None
    assert found.names["role"].to_list() == ["edge", "none", "none"]
    # 24 items, two draws, four regions
    assert found.names["void"].to_list() == [0, 0, 192]


def test_a_row_that_discover_lacks_is_void_and_not_nothing():
    features, mass, tied = quick_world()
    one = (pl.col("item") == 3) & (pl.col("head") == 0) & (pl.col("replicate") == 1) & ~pl.col("translated")
    found = assess(features, mass.filter(~one), tied)
    assert found is not None
    assert found.names["role"].to_list() == ["none", "none", "counterpart"]
    assert found.names["reason"].to_list()[:2] == [
        "void: 1 rows are missing or not finite",
        "nothing was found on discover",
    ]


def test_an_item_of_one_table_alone_is_void_and_counted():
    features, mass, tied = quick_world()
    found = assess(features, mass.filter(pl.col("item") != 3), None)
    assert found is not None
    assert found.names["role"].to_list() == ["none"] * 3
    assert found.names["void"].to_list() == [4] * 3
    assert (found.excess.filter(pl.col("split") == "discover")["void"] == 2).all()
    found = assess(features.filter(pl.col("item") != 3), mass, tied)
    assert found is not None
    lost = found.features.filter(pl.col("split") == "discover")
    assert not lost["kept"].any()
    assert lost["void"].to_list() == [1] * len(FEATURES)
    assert found.names["role"].to_list() == ["none", "none", "counterpart"]
    assert found.names["reason"][1] == "void: maps of edge, luminance, saturation, texture are missing or not finite"
    assert found.names["void"].to_list() == [4, 4, 0]
    with pytest.raises(ValueError, match=r"^features, key_mass: got item 3 with two source ids"):
        assess(
            features.with_columns(source_id=pl.when(pl.col("item") == 3).then(pl.lit("x")).otherwise("source_id")), mass
        )


def test_an_excess_is_that_of_sources_that_have_the_feature():
    """Where a quarter of the sources has flat maps, the others' excess is what it was, and so are t and p."""
    heads = [HEADS["edge"], Head("random")]
    features, mass, _ = world(heads, sources=32, timesteps=(100,), splits=("discover", "confirm"))
    flat = (pl.col("feature") == "edge") & (pl.col("item") % 10_000 % 4 == 3)
    blank = features.with_columns(map=pl.when(flat).then(pl.lit([0.0] * 64, pl.List(pl.Float32))).otherwise("map"))
    few = blank.filter(pl.col("item") % 10_000 % 4 != 3)
    some = assess(blank, mass)
    alone = assess(few, mass.filter(pl.col("item") % 10_000 % 4 != 3))
    assert some is not None
    assert alone is not None
    cells = [
        found.excess.filter(pl.col("split") == "confirm", pl.col("feature") == "edge", pl.col("head") == 0)
        for found in (some, alone)
    ]
    assert cells[0].select("having", "sources").row(0) == (24, 32)
    assert cells[1].select("having", "sources").row(0) == (24, 24)
    # diluted, it would be three quarters of it
    assert cells[0]["value"][0] == pytest.approx(cells[1]["value"][0], rel=0.1)
    assert cells[0]["own"][0] == pytest.approx(cells[1]["own"][0], rel=0.1)
