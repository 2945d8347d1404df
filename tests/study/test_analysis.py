"""From tables to numbers: selection, contrast, ranking, and tables that lack something."""

import numpy as np
import polars as pl
import pytest

from headscope.study import analyse, analyse_sweep, select_heads
from headscope.study.entropy import entropy_by_head, item_means, pooled_items
from study import simulated

SITES = simulated.SITES[:2]
STEPS = (100, 500)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(999):
        yield


@pytest.fixture(scope="module")
def observations():
    return simulated.observations(timesteps=STEPS, sites=SITES, heads=4)


@pytest.fixture(scope="module")
def discover():
    return simulated.ablations(timesteps=STEPS, heads=2)


@pytest.fixture(scope="module")
def study(observations, discover):
    confirm = simulated.ablations(
        split="confirm", fills=("mean", "zero"), chosen=select_heads(discover, 2), timesteps=STEPS, heads=2
    )
    return analyse(observations, discover, confirm, count_per_group=2)


def contrast_of(result):
    assert result.contrast is not None
    return result.contrast


def ranking_of(result):
    assert result.ablation_ranking is not None
    return result.ablation_ranking


def losses(effects, split="discover", group="g", fill="mean", sources=4):
    """Rows of paired losses whose overall degradation is `effects[site, head]`."""
    return pl.DataFrame(
        [
            {"item": item, "group": group, "source_id": f"{split}{item}", "split": split, "timestep": 1, "replicate": 0}
            | {"site": site, "head": head, "fill": fill, "clean": 1.0, "edited": 1.0 + effect}
            for item in range(sources)
            for (site, head), effect in effects.items()
        ]
    )


def test_select_heads_takes_the_union_of_the_largest_and_breaks_ties_by_name():
    first = losses({("b", 1): 0.5, ("b", 0): 0.5, ("a", 3): 0.5, ("a", 0): 0.1}, group="g")
    second = losses({("b", 1): 0.1, ("b", 0): 0.2, ("a", 3): -0.9, ("a", 0): 0.8}, group="h")
    table = pl.concat([first, second])
    expected = [("a", 3), ("b", 0), ("a", 0)]
    assert select_heads(table, 2) == expected
    assert select_heads(table.reverse(), 2) == expected
    coded = table.with_columns(pl.col("group", "site", "fill", "split", "source_id").cast(pl.Categorical))
    assert select_heads(coded, 2) == expected


def test_select_heads_looks_at_the_discover_split_and_the_headline_fill_only():
    discover = losses({("a", 0): 0.5, ("a", 1): 0.1})
    confirm = losses({("a", 0): 0.0, ("a", 1): 99.0}, split="confirm")
    zero = losses({("a", 0): 0.0, ("a", 1): 99.0}, fill="zero")
    assert select_heads(pl.concat([confirm, zero, discover]), 1) == [("a", 0)]
    with pytest.raises(ValueError, match="discover"):
        select_heads(confirm)


def test_entropy_is_given_in_three_measures(observations, study):
    table = study.entropy_heads.filter(pl.col("group") == "lfw", pl.col("timestep") == 500, pl.col("head") == 2)
    row = dict(table.filter(pl.col("keys") == 64).select("measure", "value").rows())
    assert row["nats"] + row["deficit"] == pytest.approx(np.log(64))
    assert row["normalised"] == pytest.approx(row["nats"] / np.log(64))
    rows = observations.filter(group="lfw", timestep=500, head=2, keys=64)
    assert row["normalised"] == pytest.approx(rows["entropy_normalised_mean"].mean())


def test_overall_entropy_weighs_timesteps_alike(study):
    table = study.entropy_groups.filter(group="faces")
    overall = table.filter(pl.col("timestep").is_null())["value"].item()
    assert overall == pytest.approx(table.drop_nulls("timestep")["value"].mean())
    assert study.entropy_groups.filter(group="photographs")["exploratory"].all()


def test_contrast_is_that_of_the_confirm_split(observations, study):
    pooled = observations.filter(split="confirm").group_by("group").agg(pl.col("entropy_normalised_mean").mean())
    mean = dict(pooled.rows())
    contrast = study.contrast
    assert (contrast.first, contrast.second, contrast.sources) == ("lfw", "faces_grey", (20, 20))
    ratio = contrast.ratio
    assert [ratio["first"], ratio["second"]] == pytest.approx([mean["lfw"], mean["faces_grey"]])
    assert ratio["value"] == pytest.approx(mean["lfw"] / mean["faces_grey"])
    assert ratio["low"] < ratio["value"] < ratio["high"]
    assert contrast.timesteps == list(STEPS)
    # whatever happens on discover has no part in it
    shift = pl.when(pl.col("split") == "discover").then(0.3).otherwise(0.0)
    shifted = observations.with_columns(pl.col("entropy_normalised_mean", "entropy_mean") * (1 - shift))
    other = contrast_of(analyse(shifted))
    assert other.heads.equals(contrast.heads)
    assert other.divergences.equals(contrast.divergences)


def test_the_contrast_is_the_first_of_its_controls(study):
    first, *others = study.controls
    assert first.comparison is study.contrast
    omitted = {control.kind for control in others if control.comparison is None}
    assert omitted == {"matched", "untrained", "training"}
    assert study.tables()["contrast_controls"]["kind"].to_list() == [control.kind for control in study.controls]


def test_training_images_are_in_the_controls_only(observations, study):
    named = simulated.items(("lfw", "faces_grey"), ("train",), 30)
    named = named.with_columns(source_id=pl.lit("train ") + pl.col("source_id"), item=pl.col("item") + 5000)
    training = simulated.observations(named, 7, timesteps=STEPS, sites=SITES, heads=4)
    result = analyse(pl.concat([observations, training]))
    assert result.entropy_heads is not None
    assert result.entropy_heads.equals(study.entropy_heads)
    assert result.entropy_groups is not None
    assert result.entropy_groups.equals(study.entropy_groups)
    trained = [control.comparison for control in result.controls if control.kind == "training"]
    assert [found and found.sources for found in trained] == [(30, 40), (30, 40)]
    # of a sweep of nothing else, they are what there is
    alone = analyse_sweep(training)
    assert alone.entropy_heads is not None
    assert set(alone.entropy_heads["sources"]) == {30}


def test_draws_are_averaged_within_items(observations, study):
    """Twice every draw is no second source, and no other number."""
    twice = pl.concat([observations, observations.with_columns(replicate=pl.lit(1, pl.Int64))])
    result = analyse(twice)
    for name in ("entropy_heads", "entropy_groups", "contrast_heads", "contrast_pooled", "contrast_divergences"):
        one, two = result.tables()[name], study.tables()[name]
        assert (
            one.drop("value", "low", "high", strict=False).columns
            == two.drop("value", "low", "high", strict=False).columns
        )
        assert one["value"].to_list() == pytest.approx(two["value"].to_list(), rel=1e-12), name
    assert result.entropy_variance is not None
    assert result.entropy_variance["draws"].to_list() == [80, 80, 80, 16]
    assert result.entropy_variance["between_draws"].to_list() == [0.0] * 4


def test_ablation_is_ranked_on_discover_and_tested_on_confirm(discover, study):
    ranking = study.ablation_ranking
    assert ranking["exploratory"].all()
    assert "p_value" not in ranking.columns
    first = ranking.filter(group="lfw", rank=1).row(0, named=True)
    rows = discover.filter(group="lfw", site=first["site"], head=first["head"])
    ratio = rows.group_by("timestep").agg((pl.col("edited") - pl.col("clean")).sum() / pl.col("clean").sum())
    assert first["value"] == pytest.approx(ratio["edited"].mean())
    confirmed = study.interventions.of_heads()
    assert set(confirmed.select("site", "head").rows()) == set(select_heads(discover, 2))
    assert (confirmed["p_maxt"] >= confirmed["p_value"]).all()
    beside = confirmed.filter(fill="mean", group="lfw", site=first["site"], head=first["head"])
    assert beside["discover"].item() == first["value"]


def test_analysis_repeats(observations, discover, study):
    again = analyse(observations, discover, None, count_per_group=2)
    for name, table in again.tables().items():
        assert table.equals(study.tables()[name]), name


def test_missing_groups_and_splits_are_said(observations):
    alone = analyse(observations.filter(pl.col("group") == "lfw"))
    assert alone.contrast is None
    assert "faces_grey" in alone.omitted["contrast"]
    assert set(alone.omitted) == {"contrast", "ablation", "confirm"}
    no_confirm = analyse(observations.filter(pl.col("split") == "discover"))
    assert "confirm split" in no_confirm.omitted["contrast"]
    no_discover = analyse(observations.filter(pl.col("split") == "confirm"))
    assert contrast_of(no_discover).omnibus["p_value"] is not None
    with pytest.raises(ValueError, match="no rows"):
        analyse(None)


def test_few_sources_make_the_contrast_exploratory(observations):
    contrast = contrast_of(analyse(observations.filter(pl.col("item") % 1000 < 8)))
    assert contrast.ratio["exploratory"]
    assert contrast.ratio["p_value"] is None
    assert contrast.omnibus["p_value"] is None
    assert contrast.heads["p_value"].is_null().all()


def test_dictionary_columns_and_ragged_tables_work(observations, discover):
    names = ["group", "source_id", "split", "site", "query_group"]
    coded = observations.with_columns(pl.col(names).cast(pl.Categorical))
    assert analyse(coded).tables()["entropy_heads"].equals(analyse(observations).tables()["entropy_heads"])
    ragged = discover.filter(~((pl.col("timestep") == 500) & (pl.col("head") == 1) & (pl.col("group") == "lfw")))
    ranking = ranking_of(analyse(None, ragged))
    # an overall value needs every timestep
    assert ranking.filter(group="lfw", head=1)["value"].is_null().all()
    assert ranking.filter(group="lfw", head=0)["value"].is_not_null().all()


def test_pooling_stays_within_one_query_group(observations):
    text = observations.with_columns(pl.lit("text").alias("query_group"), pl.lit(0.0).alias("entropy_normalised_mean"))
    both = pl.concat([text, observations])
    assert pooled_items(item_means(both)).equals(pooled_items(item_means(observations)))
    assert set(entropy_by_head(item_means(both))["query_group"]) == {"image", "text"}


def test_a_plain_sweep_has_no_tests(observations, discover):
    generations = simulated.generations(simulated.items(("lfw",), sources=5), heads=2).drop("split")
    result = analyse_sweep(observations, discover, generations)
    assert result.contrast is None
    assert result.interventions is None
    assert result.generation_ranking is not None
    assert result.generation_ranking["exploratory"].all()
    assert result.generation_ranking["value"].is_sorted(descending=True)
    assert result.groups == ["faces", "faces_grey", "lfw", "photographs"]
    assert not analyse_sweep(None, None, generations).timesteps


def test_tables_can_be_written_as_csv(study):
    for name, table in study.tables().items():
        assert len(pl.read_csv(table.write_csv().encode(), infer_schema_length=None)) == len(table), name


def test_entropies_that_are_no_numbers_are_counted_and_void(observations):
    broken = (pl.col("item") == 1003) & (pl.col("group") == "lfw") & (pl.col("head") == 1) & (pl.col("timestep") == 100)
    broken &= pl.col("site") == SITES[0][0]
    measures = ("entropy_mean", "entropy_normalised_mean")
    table = observations.with_columns(pl.when(broken).then(np.inf).otherwise(name).alias(name) for name in measures)
    result = analyse(table, untrained=observations)
    assert result.left_out == {f"observations.{name}": 1 for name in measures}
    assert result.entropy_heads is not None
    at = result.entropy_heads.filter(pl.col("void") > 0)
    assert set(at.select("group", "site", "head").rows()) == {("lfw", SITES[0][0], 1)}
    # at its timestep and over all, in three measures
    assert len(at) == 6
    assert at["value"].is_null().all()
    assert contrast_of(result).heads.filter(pl.col("void") > 0)["head"].to_list() == [1]
    # a single key has no H / ln K, which is no fault
    single = observations.with_columns(
        keys=pl.lit(1, pl.Int64), entropy_mean=pl.lit(0.0), entropy_normalised_mean=pl.lit(np.nan)
    )
    assert not analyse(pl.concat([observations, single.with_columns(site=pl.lit("text"))])).left_out


def test_a_search_and_paths_between_heads_are_no_edits_of_items(discover):
    """Their tables are of a sweep, too: they have fills, and no site and head, or no item."""
    labels = {"group": "lfw", "fill": "mean", "split": "discover"}
    step = {**labels, "method": "greedy", "faithfulness": 0.5}
    steps = pl.DataFrame(
        [{**step, "step": 0, "site": None, "head": None}, {**step, "step": 1, "site": "mid", "head": 1}]
    )
    ends = {"sender_site": "mid", "sender_head": 1, "receiver_site": None, "receiver_head": None, "part": "output"}
    paths = pl.DataFrame(
        [{**labels, **ends, "item": 1, "source_id": "a", "replicate": 0, "timestep": 100, "clean": 1.0, "edited": 2.0}]
    )
    result = analyse_sweep(ablations=discover, others={"circuits": steps, "paths": paths})
    assert result.further == []
    assert result.ablation_ranking is not None
    assert result.ablation_ranking.equals(analyse_sweep(ablations=discover).ablation_ranking)
    alone = analyse_sweep(others={"circuits": steps})
    assert [alone.groups, alone.sites] == [["lfw"], ["mid"]]
    assert len(alone.sources) == 0
