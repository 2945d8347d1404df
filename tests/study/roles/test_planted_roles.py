"""Planted models from the sweep to the names: every planted role found, and no other."""

import polars as pl
import pytest

import headscope
from headscope.study.roles import assess, causal, sets_of
from headscope.sweep import HeadSet

pytestmark = pytest.mark.full
# as docs/planted.md has them, at the model's first site; and dead, which looks as edge does, alone at the second
PLANTED = ("uniform", "sink", "local", "counterpart", "edge", "luminance", "none", "none", "edge")
DEAD = ("blocks.1.attn", 0)


def look(tmp_path_factory, group, items):
    """What heads of the planted model do on a group's images."""
    kinds = ["features", "key_mass", "counterparts"]
    run = headscope.sweep(
        tmp_path_factory.mktemp(group),
        model="planted:roles",
        groups=[group],
        items=items,
        splits=["discover", "confirm"],
        bands=3,
        draws=2,
        observe=False,
        fills=[],
        scores=[],
        kinds=kinds,
    )
    features, key_mass, counterparts = (run.table(kind).collect() for kind in kinds)
    found = assess(features, key_mass, counterparts)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return look(tmp_path_factory, "twins", 40)


def test_every_planted_role_is_named_where_images_are_tied(twins):
    names = twins.names.sort("site", "head")
    assert names["role"].to_list() == list(PLANTED)
    assert (names["sign"].drop_nulls() > 0).all()
    by_role = dict(zip(PLANTED, names.iter_rows(named=True), strict=True))
    assert by_role["uniform"]["value"] == pytest.approx(0, abs=1e-6)
    assert by_role["sink"]["value"] == pytest.approx(1, abs=1e-6)
    # the previous token, 15/16 tokens away on average
    assert by_role["local"]["distance"] == pytest.approx(15 / 16, abs=1e-5)
    assert twins.chosen.sort("site", "head")["role"].to_list() == list(PLANTED)


def test_counterparts_are_none_where_nothing_is_tied(tmp_path_factory):
    names = look(tmp_path_factory, "distinct", 24).names.sort("site", "head")["role"].to_list()
    assert names == ["none" if role == "counterpart" else role for role in PLANTED]


def test_a_head_that_nothing_reads_is_named_by_where_it_looks_and_never_confirmed(twins, tmp_path_factory):
    sets = sets_of(twins.chosen, each_head=True)
    features = dict.fromkeys(one.feature for one in sets)
    run = headscope.sweep(
        tmp_path_factory.mktemp("removed"),
        model="planted:roles",
        groups=["twins"],
        items=24,
        splits=["confirm"],
        bands=3,
        draws=2,
        observe=False,
        fills=["mean"],
        scores=["loss", *(f"on {feature}" for feature in features)],
        heads=[DEAD],
        sets=[HeadSet(one.name, heads=one.heads) for one in sets],
    )
    found = causal(run.table("set_ablations").collect(), sets)
    by_heads = {one.name: one.heads for one in sets}
    dead = found.filter(pl.col("set").replace_strict({name: heads == (DEAD,) for name, heads in by_heads.items()}))
    assert dead["role"].to_list() == ["edge"]
    assert dead["difference"].to_list() == [0.0]
    assert dead["p_value"][0] > 0.9
    assert dead["confirmed"].to_list() == [False]
    # beside a head that does something it adds nothing, though the set has it
    edges = found.filter(pl.col("role") == "edge", pl.col("difference") != 0)
    numbers = ["inside", "outside", "difference", "low", "high", "p_value"]
    assert sorted(len(by_heads[name]) for name in edges["set"]) == [1, 2]
    assert edges.select(numbers).n_unique() == 1
