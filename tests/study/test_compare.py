"""Two runs compared: every number against numpy on pairs that were made by hand, and what is refused or listed."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from headscope.study.compare import Side, compare
from headscope.study.compare.matching import match
from headscope.study.compare.schedules import TOLERANCE
from headscope.study.inference import settings
from study import simulated

STEPS = (100, 500)
SITES = (("down", 16), ("mid", 64))
HEADS = 3
SOURCES = 21


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(199):
        yield


def manifest(model="one", groups=("lfw",), steps=STEPS, sites=SITES, heads=HEADS, sets=(), **identity):
    """As a run writes it, as far as a comparison reads it."""
    scheduler = ["DDPMScheduler", {"num_train_timesteps": 1000, "beta_schedule": "linear"}]
    return {
        "identity": {
            "model": model,
            "version": "0.1.0",
            "scheduler": scheduler,
            "groups": [[name, f"images of {name}", f"reference of {name}"] for name in groups],
            **identity,
        },
        "config": {"groups": list(groups), "fills": ["mean"], "sets": [dict(one) for one in sets]},
        "timesteps": list(steps),
        "sites": [{"name": name, "kind": "self", "heads": heads, "head_dim": 8} for name, _ in sites],
    }


def items(groups=("lfw",), sources=SOURCES):
    return simulated.items(groups, splits=("confirm",), sources=sources)


def losses(seed, table=None, steps=STEPS, sites=SITES, replicates=(0,)):
    """Paired losses of every head, from a generator; every source has one item."""
    table = items() if table is None else table
    generator = np.random.default_rng(seed)
    rows = [
        {**item, "replicate": replicate, "timestep": step, "site": site, "head": head, "fill": "mean"}
        for item in table.iter_rows(named=True)
        for replicate in replicates
        for step in steps
        for site, _ in sites
        for head in range(HEADS)
    ]
    clean = generator.lognormal(0, 0.3, len(rows))
    effect = np.array([1 + row["head"] + (row["site"] == "mid") for row in rows]) * generator.gamma(4, 0.05, len(rows))
    return pl.DataFrame(rows).with_columns(clean=pl.Series(clean), edited=pl.Series(clean * (1 + effect)))


def entropies(seed, table=None):
    table = items() if table is None else table
    return simulated.observations(table, seed=seed, timesteps=STEPS, sites=SITES, heads=HEADS)


def sides(**tables):
    """Two runs with the tables that the functions make of seeds 1 and 2."""
    return tuple(
        Side(manifest(model), {kind: make(seed) for kind, make in tables.items()})
        for model, seed in (("one", 1), ("two", 2))
    )


def cube(table, value, site, head):
    """A column of one head as an array [sources, timesteps]."""
    rows = table.filter(site=site, head=head).sort("source_id", "timestep")
    return rows[value].to_numpy().reshape(SOURCES, len(STEPS))


def relative(table, site, head):
    change = cube(table, "edited", site, head) - cube(table, "clean", site, head)
    return (change.sum(0) / cube(table, "clean", site, head).sum(0)).mean()


def test_degradations_and_their_difference():
    first, second = sides(ablations=losses)
    found = compare([("", first, second)])
    assert found.heads is not None
    one, two = first.tables["ablations"], second.tables["ablations"]
    assert len(found.heads) == len(SITES) * HEADS
    for row in found.heads.iter_rows(named=True):
        values = [relative(table, row["site"], row["head"]) for table in (one, two)]
        assert (row["first"], row["second"]) == pytest.approx(values, rel=1e-12)
        assert row["value"] == pytest.approx(values[1] - values[0], rel=1e-12)
        changes = [cube(t, "edited", row["site"], row["head"]) - cube(t, "clean", row["site"], row["head"])
                   for t in (one, two)]  # fmt: skip
        assert row["absolute"] == pytest.approx((changes[1] - changes[0]).mean(), rel=1e-12)
        assert row["low"] < row["value"] < row["high"]
        assert row["p_value"] <= row["p_maxt"]
        assert (row["sources"], row["void"], row["exploratory"]) == (SOURCES, 0, False)


def test_entropies_and_sites():
    first, second = sides(observations=entropies)
    found = compare([("", first, second)])
    assert found.entropy is not None
    assert found.entropy_sites is not None
    tables = [side.tables["observations"] for side in (first, second)]
    by_head = {}
    for row in found.entropy.iter_rows(named=True):
        one, two = (cube(table, "entropy_mean", row["site"], row["head"]) for table in tables)
        difference = (two - one).mean(1)
        assert row["value"] == pytest.approx(difference.mean(), rel=1e-10)
        # the interval is near Student's t for numbers that are nearly normal
        half = 2.086 * difference.std(ddof=1) / np.sqrt(SOURCES)
        assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.35)
        by_head.setdefault(row["site"], []).append(difference.mean())
    for row in found.entropy_sites.iter_rows(named=True):
        assert row["value"] == pytest.approx(np.exp(np.mean(by_head[row["site"]])), rel=1e-10)
        assert row["heads"] == HEADS
        assert row["low"] < row["value"] < row["high"]


def test_clean_losses_are_compared_pair_by_pair():
    first, second = sides(ablations=losses)
    worse = second.tables["ablations"].with_columns(pl.col("clean", "edited") * 1.5)
    second = replace(second, tables={"ablations": worse})
    found = compare([("", first, second)]).clean
    assert found is not None
    assert found["timestep"].to_list() == [*STEPS, None]
    clean = [
        side.tables["ablations"].group_by("source_id", "timestep").agg(pl.col("clean").mean())
        for side in (first, second)
    ]
    expected = [
        np.divide(*(table.filter(timestep=step)["clean"].to_numpy().sum() for table in (clean[1], clean[0])))
        for step in STEPS
    ]
    assert found["value"].to_list() == pytest.approx([*expected, np.mean(expected)], rel=1e-12)


def test_identical_runs_differ_in_nothing():
    first, _ = sides(ablations=losses, observations=entropies)
    found = compare([("", first, first)])
    for table in (found.heads, found.entropy):
        assert table is not None
        assert table["value"].to_list() == [0.0] * len(table)
        assert not (table["p_maxt"] < 0.05).any()
    assert found.clean is not None
    assert found.clean["value"].to_list() == [1.0] * 3
    assert any(one.what == "weights" and one.second == "the same" for one in found.differing)


def test_a_shift_in_one_head_is_found_and_no_other():
    """Of the family's 6 heads, which otherwise differ by noise around nothing."""
    first = Side(manifest("one"), {"ablations": losses(1)})
    noise = np.random.default_rng(5).normal(0, 0.01, len(first.tables["ablations"]))
    shifted = (pl.col("site") == "mid") & (pl.col("head") == 1)
    edited = pl.col("edited") + pl.Series(noise) + pl.when(shifted).then(pl.col("clean") * 0.2).otherwise(0.0)
    second = Side(manifest("two"), {"ablations": first.tables["ablations"].with_columns(edited=edited)})
    heads = compare([("", first, second)]).heads
    assert heads is not None
    found = heads.filter(pl.col("p_maxt") < 0.05)
    assert found.select("site", "head").rows() == [("mid", 1)]
    assert found["value"].item() == pytest.approx(0.2, abs=0.02)


def test_ranks_and_their_control():
    first, second = sides(ablations=losses)
    found = compare([("", first, second)])
    assert found.heads is not None
    assert found.ranks is not None
    (row,) = found.ranks.to_dicts()
    expected = spearmanr(found.heads["first"].to_numpy(), found.heads["second"].to_numpy()).statistic
    assert row["value"] == pytest.approx(expected, rel=1e-12)
    assert row["low"] <= row["value"] <= row["high"]
    assert row["heads"] == len(SITES) * HEADS
    # a ranking made of noise alone agrees with nothing
    assert row["within_first"] > 0.7
    shuffled = np.random.default_rng(0).permutation(len(second.tables["ablations"]))
    noise = second.tables["ablations"].with_columns(pl.col("clean", "edited").gather(shuffled))
    ranks = compare([("", first, replace(second, tables={"ablations": noise}))]).ranks
    assert ranks is not None
    assert abs(ranks["within_second"].item()) < 0.4


def test_numbers_that_are_none_void_their_head_alone():
    first, second = sides(ablations=losses)
    broken = second.tables["ablations"].with_row_index("row")
    chosen = broken.filter(site="mid", head=2)["row"][3]
    edited = pl.when(pl.col("row") == chosen).then(np.inf).otherwise("edited")
    second = replace(second, tables={"ablations": broken.with_columns(edited=edited).drop("row")})
    heads = compare([("", first, second)]).heads
    assert heads is not None
    void = heads.filter(pl.col("void") > 0)
    assert void.select("site", "head", "void").rows() == [("mid", 2, 1)]
    assert void.select("value", "low", "high", "p_value", "p_maxt", "second").row(0) == (None,) * 6
    assert heads.filter(pl.col("void") == 0)["value"].null_count() == 0


def test_few_sources_are_not_tested():
    table = items(sources=settings.FEWEST_SOURCES - 1)
    first, second = (
        Side(manifest(name), {"ablations": losses(seed, table)}) for name, seed in (("one", 1), ("two", 2))
    )
    heads = compare([("", first, second)]).heads
    assert heads is not None
    assert heads["p_maxt"].null_count() == len(heads)
    assert heads["exploratory"].all()
    assert heads["low"].null_count() == 0


def listed(found, what):
    return [one for one in found.differing if one.what == what]


def test_what_one_run_lacks_is_listed():
    groups = ("lfw", "faces")
    pair = {"name": "pair", "sites": [], "heads": [["down", 0], ["mid", 1]]}
    other = {**pair, "heads": [["down", 0], ["mid", 2]]}
    one = manifest("one", groups, sets=[pair, {**pair, "name": "lone"}])
    two = manifest("two", groups[:1], steps=(500, 900), sites=(*SITES, ("up", 16)), sets=[other])
    first = Side(one, {"ablations": losses(1, items(groups), replicates=(0, 1)), "observations": entropies(1)})
    fewer = losses(2, items(), steps=(500, 900), sites=(*SITES, ("up", 16)), replicates=(1, 2))
    second = Side(two, {"ablations": fewer.filter(~((pl.col("site") == "mid") & (pl.col("head") == 0)))})
    found = match(first, second)
    assert list(found.tables) == ["ablations"]
    rows = found.tables["ablations"]
    assert rows["group"].unique().to_list() == ["lfw"]
    assert rows["timestep"].unique().to_list() == [500]
    assert rows["replicate"].unique().to_list() == [1]
    assert set(rows.select("site", "head").unique().rows()) == {
        ("down", 0),
        ("down", 1),
        ("down", 2),
        ("mid", 1),
        ("mid", 2),
    }
    assert len(rows) == SOURCES * 5
    assert listed(found, "group faces")[0][1:3] == ("there", "–")
    assert listed(found, "timesteps")[0][1:] == ("100, 500", "500, 900", "compared at 500")
    assert listed(found, "attention sites that the other lacks")[0][1:3] == ("–", "up")
    assert listed(found, "table of observations")
    assert listed(found, "noise draws (replicates) of ablations that the other lacks")[0][1:3] == ("0", "2")
    assert listed(found, "heads of ablations that the other lacks")[0][1:3] == ("mid 0", "–")
    assert listed(found, "set pair")[0].consequence == "not compared"
    assert listed(found, "set lone")[0][1:3] == ("there", "–")


def with_images(side, name, digest, folder=False, version="0.1.0"):
    identity = side.manifest["identity"] | {"groups": [[name, digest, "reference"]], "version": version}
    config = side.manifest["config"] | {"groups": [f"{name}=a/folder" if folder else name]}
    return replace(side, manifest=side.manifest | {"identity": identity, "config": config})


def test_images_are_known_to_be_the_same():
    """Those of the zoo by their number, those of folders by the digest of all of them."""
    first, second = sides(ablations=losses)
    more = with_images(first, "lfw", "other"), with_images(second, "lfw", "images")
    few = replace(more[1], tables={"ablations": losses(2, items(sources=5))})
    found = match(more[0], few)
    assert found.groups.row(0) == ("lfw", 5, 5, "by item and source of the zoo's group")
    assert listed(found, "items of ablations that the other lacks")[0][1:3] == (f"{SOURCES - 5} of lfw (confirm)", "–")
    with pytest.raises(ValueError, match=r"no group of images in common.*can't tell which images are in both"):
        match(with_images(first, "lfw", "other", folder=True), with_images(second, "lfw", "images", folder=True))
    with pytest.raises(ValueError, match="no group of images in common"):
        match(more[0], with_images(second, "lfw", "images", version="0.2.0"))
    same = (with_images(side, "mine", "same", folder=True) for side in (first, second))
    tables = ({"ablations": s.tables["ablations"].with_columns(group=pl.lit("mine"))} for s in (first, second))
    found = match(*(replace(side, tables=table) for side, table in zip(same, tables, strict=True)))
    assert len(found.tables["ablations"]) == len(first.tables["ablations"])


def test_prompts_are_matched_by_their_text():
    first, second = sides(ablations=losses)
    tables = [side.tables["ablations"].with_columns(group=pl.lit("prompts")) for side in (first, second)]
    # of another order in the file
    tables[1] = tables[1].with_columns(item=1000 - pl.col("item"))
    found = match(*(
        replace(with_images(side, "prompts", digest), tables={"ablations": table})
        for side, digest, table in zip((first, second), ("one", "two"), tables, strict=True)
    ))  # fmt: skip
    assert len(found.tables["ablations"]) == len(tables[0])
    assert found.groups["sources"].item() == SOURCES


def scheduled(side, steps, **settings):
    scheduler = ["DDPMScheduler", {"num_train_timesteps": 1000, "beta_schedule": "linear", **settings}]
    identity = side.manifest["identity"] | {"scheduler": scheduler}
    old = dict(zip(STEPS, steps, strict=True))
    rows = side.tables["ablations"].with_columns(pl.col("timestep").replace_strict(old))
    return Side(side.manifest | {"identity": identity, "timesteps": list(steps)}, {"ablations": rows})


def log_snr(step, start=0.0001, end=0.02):
    bars = np.cumprod(1 - np.linspace(start, end, 1000))
    return np.log(bars[step] / (1 - bars[step]))


def test_bands_of_other_schedules_match_where_their_log_snrs_do():
    first, second = sides(ablations=losses)
    # betas half as large
    ratios = np.array([log_snr(step, 0.00005, 0.01) for step in range(1000)])
    near = [int(np.abs(ratios - log_snr(step)).argmin()) for step in STEPS]
    assert max(abs(ratios[a] - log_snr(b)) for a, b in zip(near, STEPS, strict=True)) < TOLERANCE
    found = match(first, scheduled(second, near, beta_start=0.00005, beta_end=0.01))
    assert found.timesteps.select("first", "second").rows() == list(zip(STEPS, near, strict=True))
    assert found.timesteps["log_snr"].to_list() == pytest.approx([log_snr(step) for step in STEPS], abs=1e-4)
    assert len(found.tables["ablations"]) == len(first.tables["ablations"])
    with pytest.raises(ValueError, match="schedules differ and their timesteps"):
        match(first, scheduled(second, (near[0], near[1] + 60), beta_start=0.00005, beta_end=0.01))
    # settings that don't touch the noise don't matter
    assert len(match(first, scheduled(second, STEPS, clip_sample=False)).tables["ablations"])


def test_losses_of_another_target_are_compared_by_ratios_alone():
    first, second = sides(ablations=losses)
    second = scheduled(second, STEPS, prediction_type="v_prediction")
    found = compare([("", first, second)])
    assert found.clean is None
    assert found.heads is not None
    assert found.heads["absolute"].null_count() == len(found.heads)
    assert found.heads["value"].null_count() == 0
    assert any(one.what == "target of the loss" for one in found.differing)


def test_nothing_in_common_is_refused():
    first, second = sides(ablations=losses)
    with pytest.raises(ValueError, match="no timestep in common: 100, 500 against 7, 9"):
        match(first, scheduled(second, (7, 9)))
    with pytest.raises(ValueError, match=r"nothing in common to compare: .*attention sites"):
        match(first, Side(manifest("two", sites=(("other", 4),)), second.tables))
    with pytest.raises(ValueError, match="no group of images in common: group lfw"):
        match(first, Side(manifest("two", groups=("faces",)), second.tables))
    other_size = manifest("two", heads=4)
    with pytest.raises(ValueError, match="site down: self, 3 heads of 8 against self, 4 heads of 8"):
        match(first, Side(other_size, second.tables))
    with pytest.raises(ValueError, match="no stage in common"):
        compare([])


def test_stages_stand_beside_each_other():
    first, second = sides(ablations=losses)
    nothing = Side(manifest("two", groups=("faces",)), second.tables)
    found = compare([("discover", first, second), ("confirm", first, nothing)])
    assert found.heads is not None
    assert found.heads["part"].unique().to_list() == ["discover"]
    assert any(one.what == "confirm: stage" and "not compared" in one.consequence for one in found.differing)
