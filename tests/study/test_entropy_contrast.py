"""Comparisons of two groups and their controls: values by hand, planted truths, nulls, and what can't be compared."""

import math

import numpy as np
import polars as pl
import pytest

from headscope.study.contrast import Comparison, compare_groups, controls_of
from headscope.study.contrast.controls import CONTROLS, controls_table, split_halves
from headscope.study.entropy import item_means
from study import simulated

SITES = (("up", 256), ("mid", 64))
STEPS = (100, 500)
HEADS = 3


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(199):
        yield


def items(nats, group="a", split="confirm", name="", crops=1):
    """A table of `item_means`; nats [sources * crops, timesteps, sites, heads], the crops of a source together."""
    rows = [
        (group, split, f"{name or group}-{split}-{item // crops}", item, step, site, head, "image", keys,
         nats[item, place, number, head], nats[item, place, number, head] / math.log(keys))
        for item in range(len(nats))
        for place, step in enumerate(STEPS)
        for number, (site, keys) in enumerate(SITES)
        for head in range(nats.shape[3])
    ]  # fmt: skip
    names = ["group", "split", "source_id", "item", "timestep", "site", "head", "query_group", "keys"]
    return pl.DataFrame(rows, schema=[*names, "nats", "normalised"], orient="row")


def noise(count, seed=0, spread=0.2, heads=HEADS):
    generator = np.random.default_rng(seed)
    level = np.random.default_rng(99).uniform(1.5, 3.5, (1, len(STEPS), len(SITES), heads))
    of_source = generator.normal(0, spread, (count, 1, 1, 1))
    return level + of_source + generator.normal(0, 0.1, (count, len(STEPS), len(SITES), heads))


def made(outcome) -> Comparison:
    assert isinstance(outcome, Comparison), outcome
    return outcome


def of_row(table, **chosen):
    (found,) = table.filter(pl.all_horizontal(pl.col(k).eq_missing(v) for k, v in chosen.items())).to_dicts()
    return found


def test_numbers_by_hand():
    one, two = noise(42, 1), noise(23, 2) + 0.1
    # two crops of a source weigh as one source
    found = made(compare_groups(pl.concat([items(one, "a", crops=2), items(two, "b")]), "a", "b"))
    assert (found.sources, found.paired, found.timesteps) == ((21, 23), False, list(STEPS))
    one = one.reshape(21, 2, *one.shape[1:]).mean(1)
    change = one.mean(0) - two.mean(0)
    for number, (site, keys) in enumerate(SITES):
        for head in range(HEADS):
            row = of_row(found.heads, site=site, head=head)
            assert row["value"] == pytest.approx(change[:, number, head].mean(), rel=1e-9)
            assert (row["keys"], row["void"], list(row["sources"])) == (keys, 0, [21, 23])
        for place, step in enumerate(STEPS):
            row = of_row(found.sites, site=site, timestep=step)
            assert row["value"] == pytest.approx(math.exp(change[place, number].mean()), rel=1e-9)
            assert row["low"] < row["value"] < row["high"]
            assert row["p_maxt"] is None
        row = of_row(found.sites, site=site, timestep=None)
        assert row["value"] == pytest.approx(math.exp(change[:, number].mean()), rel=1e-9)
        assert row["p_maxt"] >= row["p_value"]
    scale = np.log([keys for _, keys in SITES])[:, None]
    means = [(part / scale).mean((0, 2, 3)) for part in (one, two)]
    for place, step in enumerate(STEPS):
        row = of_row(found.pooled, timestep=step)
        assert [row["first"], row["second"]] == pytest.approx([means[0][place], means[1][place]], rel=1e-9)
        assert row["value"] == pytest.approx(means[0][place] / means[1][place], rel=1e-9)
    assert found.ratio["value"] == pytest.approx(means[0].mean() / means[1].mean(), rel=1e-9)
    assert (found.heads["p_maxt"] >= found.heads["p_value"]).all()


def test_what_cancels_in_the_pooled_ratio_is_found_by_the_others():
    shift = np.zeros((len(SITES), 8))
    # the same in normalised entropy, up in one head and down in another
    shift[:, 0], shift[:, 1] = 0.04 * np.log([keys for _, keys in SITES]) * np.array([[1], [-1]])
    one, two = (noise(20, seed, 0.02, 8) for seed in (3, 4))
    found = made(compare_groups(pl.concat([items(one + shift, "a"), items(two, "b")]), "a", "b"))
    ratio = found.ratio
    assert ratio["low"] < 1 < ratio["high"]
    assert ratio["p_value"] > 0.05
    assert found.omnibus["p_value"] == 1 / 200
    planted = {(site, head): np.sign(shift[number, head]) for number, (site, _) in enumerate(SITES) for head in (0, 1)}
    rows = found.different.to_dicts()
    signs = {(row["site"], row["head"]): np.sign(row["value"]) for row in rows}
    assert signs == planted


def test_versions_of_the_same_sources_are_compared_in_pairs():
    one = noise(20, 5, spread=1.0)
    two = one + 0.1 + np.random.default_rng(6).normal(0, 0.02, one.shape)
    pairs = pl.concat([items(one, "a", name="drawing"), items(two, "b", name="drawing")])
    found = made(compare_groups(pairs, "a", "b"))
    assert found.paired
    assert found.omnibus["p_value"] == 1 / 200
    assert len(found.different) == len(found.heads)
    # as other sources, the shift is a tenth of what sources differ by
    apart = made(compare_groups(pl.concat([items(one, "a"), items(two, "b")]), "a", "b"))
    assert not apart.paired
    assert apart.omnibus["p_value"] > 0.05
    assert not len(apart.different)
    assert apart.heads["value"].to_list() == pytest.approx(found.heads["value"].to_list(), rel=1e-9)


def test_what_cannot_be_compared_is_said():
    one, two = items(noise(20, 1), "a"), items(noise(20, 2), "b")
    both = pl.concat([one, two])

    def reason(table, first="a", second="b", **splits):
        outcome = compare_groups(table, first, second, **splits)
        assert isinstance(outcome, str)
        return outcome

    assert "group c was not observed" in reason(both, "a", "c")
    assert "group c and the group d" in reason(both, "c", "d")
    assert "train split was not observed" in reason(both, splits=("train",))
    assert "different timesteps" in reason(pl.concat([one, two.filter(pl.col("timestep") == 100)]))
    other = two.with_columns(keys=pl.when(pl.col("site") == "up").then(81).otherwise("keys"))
    assert "numbers of keys" in reason(pl.concat([one, other]))
    shared = pl.lit("a-confirm-") + pl.col("item").cast(pl.String)
    half = two.with_columns(source_id=pl.when(pl.col("item") < 5).then(shared).otherwise("source_id"))
    assert "share 5 of 35 sources" in reason(pl.concat([one, half]))
    assert "more than one key" in reason(both.with_columns(keys=pl.lit(1), normalised=pl.lit(math.nan)))


def test_entropies_that_are_no_numbers_void_what_they_enter_and_are_counted():
    one, two = noise(20, 1), noise(20, 2) + 0.5
    one[4, 0, 1, 2] = math.nan
    found = made(compare_groups(pl.concat([items(one, "a"), items(two, "b")]), "a", "b"))
    broken = of_row(found.heads, site="mid", head=2)
    assert [broken[name] for name in ("value", "low", "high", "p_value", "p_maxt")] == [None] * 5
    assert broken["void"] == 1
    assert len(found.different) == len(found.heads) - 1
    for step, void in ((100, 1), (500, 0), (None, 1)):
        assert (of_row(found.sites, site="mid", timestep=step)["value"] is None) == bool(void)
        assert of_row(found.sites, site="up", timestep=step)["value"] is not None
        assert (of_row(found.pooled, timestep=step)["value"] is None) == bool(void)
    assert found.omnibus["void"] == 1
    assert found.omnibus["p_value"] is None


def test_a_row_that_is_missing_voids_what_it_would_enter():
    one, two = noise(20, 1), noise(20, 2) + 0.5
    table = pl.concat([items(one, "a"), items(two, "b")])
    # of the first item, whose rows come first everywhere
    gone = (pl.col("group") == "a") & (pl.col("item") == 0) & (pl.col("timestep") == 100)
    whole = made(compare_groups(table, "a", "b"))
    for gap, heads in ((gone & (pl.col("site") == "mid") & (pl.col("head") == 2), 1), (gone, len(SITES) * HEADS)):
        found = made(compare_groups(table.filter(~gap), "a", "b"))
        assert (found.heads["void"] > 0).sum() == heads
        for step in (100, None):
            assert of_row(found.sites, site="mid", timestep=step)["value"] is None
            assert of_row(found.pooled, timestep=step)["value"] is None
            assert found.divergences.filter(pl.col("timestep").eq_missing(step))["value"].is_null().all()
        for name in ("value", "first", "second", "p_value"):
            assert of_row(found.pooled, timestep=500)[name] == of_row(whole.pooled, timestep=500)[name]
        assert of_row(found.sites, site="mid", timestep=500) == of_row(whole.sites, site="mid", timestep=500)


def test_few_sources_are_not_tested():
    found = made(compare_groups(pl.concat([items(noise(19, 1), "a"), items(noise(40, 2) + 1, "b")]), "a", "b"))
    assert found.omnibus["p_value"] is None
    assert found.heads["p_maxt"].is_null().all()
    assert found.sites["p_maxt"].is_null().all()
    assert found.heads["exploratory"].all()
    assert not len(found.different)


GROUPS = ("lfw", "faces_grey", "faces", "lfw_matched", "faces_grey_matched")


def every(seed=0):
    """All groups in all splits, no two of them different but for a shift of the synthetic ones."""
    tables = []
    for place, group in enumerate(GROUPS):
        for number, split in enumerate(("discover", "confirm", "train")):
            nats = noise(20, 100 * seed + 10 * place + number) + (0.4 if "grey" in group else 0)
            tables.append(items(nats, group, split, "face" if group in ("faces", "faces_grey") else group))
    return pl.concat(tables)


def test_every_control_is_made_and_named():
    table = every()
    main = made(compare_groups(table, "lfw", "faces_grey"))
    untrained = pl.concat([items(noise(20, 1), "lfw"), items(noise(20, 2), "faces_grey")])
    found = controls_of(table, main, untrained=untrained)
    assert [control.kind for control in found] == ["main", "halves", "halves", "colour", "matched", "untrained",
                                                   "training", "training"]  # fmt: skip
    assert set(CONTROLS) == {control.kind for control in found}
    rows = controls_table(found).to_dicts()
    assert rows[0]["heads_different"] == rows[0]["heads"] == len(SITES) * HEADS
    assert [row["omitted"] for row in rows] == [None] * 8
    assert [row["paired"] for row in rows] == [False, False, False, True, False, False, False, False]
    assert [row["sources"] for row in rows] == [[20, 20]] * 6 + [[20, 40]] * 2
    assert rows[1]["splits"] == "discover and confirm"
    # planted: only what the grey faces are shifted by
    assert [row["heads_different"] > 0 for row in rows] == [True, False, False, True, True, False, False, False]
    assert [row["p_omnibus"] < 0.05 for row in rows] == [True, False, False, True, True, False, False, False]
    for row in rows:
        assert row["ratio_low"] < row["ratio"] < row["ratio_high"]


def test_halves_are_drawn_by_the_counter_and_share_no_source():
    table = every()
    main = made(compare_groups(table, "lfw", "faces_grey"))
    found = controls_of(table, main)
    again = controls_of(table.reverse(), main)
    assert controls_table(found).equals(controls_table(again))
    other = controls_of(table, main, seed=1)
    assert controls_table(other)["energy"][1] != controls_table(found)["energy"][1]


def test_a_control_without_data_says_what_it_lacks():
    table = every().filter(pl.col("group").is_in(["lfw", "faces_grey"]) & (pl.col("split") != "train"))
    found = controls_of(table, made(compare_groups(table, "lfw", "faces_grey")))
    reasons = {control.name: control.omitted for control in found if control.omitted}
    assert reasons == {
        "faces against faces_grey": "The group faces was not observed, so there is nothing to compare.",
        "lfw_matched against faces_grey_matched": "The group lfw_matched and the group faces_grey_matched was not"
        " observed, so there is nothing to compare.",
        "lfw against faces_grey, untrained weights": "No model with untrained weights was observed.",
        "lfw, training against held-out items": "No training items of lfw were observed.",
        "faces_grey, training against held-out items": "No training items of faces_grey were observed.",
    }
    shown = controls_table(found).filter(pl.col("omitted").is_not_null())
    assert shown["energy"].is_null().all()


def halves_found(studies, seed):
    """Of null studies: in how many the omnibus test of halves finds something, and in how many max-t does."""
    omnibus = heads = 0
    for number in range(studies):
        nats = np.exp(noise(40, seed + number, spread=0.5, heads=4))
        found = made(split_halves(items(nats, "lfw", "discover"), "lfw", number))
        omnibus += found.omnibus["p_value"] < 0.05
        heads += len(found.different) > 0
    return omnibus, heads


def test_nothing_is_found_in_halves():
    # 95 % of binomial(20, 0.05) are at most 3
    assert max(halves_found(20, 1000)) <= 3


@pytest.mark.full
def test_nothing_is_found_in_halves_at_the_stated_rate():
    # binomial(200, 0.05): mean 10, standard deviation 3.1
    assert max(halves_found(200, 5000)) <= 17


def test_a_comparison_is_of_the_first_query_group():
    observed = simulated.observations(simulated.items(("lfw", "faces_grey")), timesteps=STEPS, heads=2)
    text = observed.with_columns(query_group=pl.lit("text"), entropy_mean=pl.lit(0.5))
    alone, both = (
        compare_groups(item_means(table), "lfw", "faces_grey") for table in (observed, pl.concat([text, observed]))
    )
    assert made(both).heads.equals(made(alone).heads)
    assert made(both).divergences.equals(made(alone).divergences)
