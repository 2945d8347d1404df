"""Importances from gradients: means by hand, and how they agree with what was measured."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from headscope.report import write_sweep_report
from headscope.study.attributions import attribute
from study import simulated

STEPS = (100, 500)
HEADS = 2


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(199):
        yield


@pytest.fixture(scope="module")
def ablations():
    return simulated.ablations(timesteps=STEPS, heads=HEADS)


def attributed(ablations, noise=0.02, seed=0):
    """Importances near the measured changes, with the loss of the whole model."""
    generator = np.random.default_rng(seed)
    change = pl.col("edited") - pl.col("clean")
    spread = pl.Series(generator.normal(0, noise, len(ablations))) * pl.col("clean")
    table = ablations.with_columns(loss=pl.col("clean"), g=spread, c=change, importance=change + spread)
    return table.drop("clean", "edited")


def by_source(table, value, group, site, head):
    """[sources, timesteps]; every source has one item."""
    rows = table.filter(group=group, site=site, head=head).sort("source_id", "timestep")
    return rows[value].to_numpy().reshape(-1, len(STEPS))


def test_importances_by_hand(ablations):
    table = attributed(ablations)
    found = attribute(table).heads
    assert found.columns[:6] == ["group", "fill", "rank", "site", "head", "value"]
    assert len(found) == 2 * len(simulated.SITES) * HEADS
    for row in found.iter_rows(named=True):
        parts = {name: by_source(table, name, row["group"], row["site"], row["head"])
                 for name in ("loss", "g", "c", "importance")}  # fmt: skip
        share = (parts["importance"].sum(0) / parts["loss"].sum(0)).mean()
        assert row["value"] == pytest.approx(share, rel=1e-10)
        for name in ("g", "c", "importance"):
            assert row[name] == pytest.approx(parts[name].mean(), rel=1e-10, abs=1e-15)
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
        assert row["exploratory"]
    for _, rows in found.group_by("group"):
        assert rows.sort("rank")["importance"].to_list() == sorted(rows["importance"], reverse=True)
        assert sorted(rows["rank"]) == list(range(1, len(rows) + 1))


def test_agreement_with_what_was_measured(ablations):
    found = attribute(attributed(ablations), ablations)
    assert found.agreement is not None
    assert found.measured is not None
    for row in found.agreement.iter_rows(named=True):
        estimated = found.heads.filter(group=row["group"]).sort("site", "head")["value"].to_numpy()
        measured = found.measured.filter(group=row["group"]).sort("site", "head")["value"].to_numpy()
        assert row["value"] == pytest.approx(spearmanr(estimated, measured).statistic, rel=1e-12)
        assert row["low"] <= row["value"] <= row["high"]
        assert row["across"] > 0.5
        assert (row["heads"], row["sources"], row["void"]) == (len(simulated.SITES) * HEADS, 20, 0)


def test_only_images_that_both_have_are_compared(ablations):
    some = ablations.filter(pl.col("source_id").str.ends_with("1") | (pl.col("group") == "lfw"))
    found = attribute(attributed(ablations), some)
    assert found.agreement is not None
    assert dict(found.agreement.select("group", "sources").iter_rows()) == {"faces_grey": 2, "lfw": 20}
    # too few to say anything of
    assert found.agreement.filter(group="faces_grey")["low"].to_list() == [None]
    other = attribute(attributed(ablations), ablations.with_columns(fill=pl.lit("zero")))
    assert other.agreement is None


def test_importances_that_are_none_are_void(ablations):
    table = attributed(ablations).with_row_index("row")
    chosen = table.filter(group="lfw", site=simulated.SITES[2][0], head=1)["row"][0]
    importance = pl.when(pl.col("row") == chosen).then(np.nan).otherwise("importance")
    heads = attribute(table.with_columns(importance=importance).drop("row"), ablations).heads
    void = heads.filter(pl.col("void") > 0)
    assert void.select("group", "site", "head", "void").rows() == [("lfw", simulated.SITES[2][0], 1, 1)]
    assert void.select("value", "importance", "low").row(0) == (None, None, None)
    # g and c are whole
    assert void["c"].null_count() == 0
    # the last of its group
    assert void["rank"].item() == len(simulated.SITES) * HEADS


def test_the_page_has_a_section_of_them(ablations, tmp_path):
    others = {"attributions": attributed(ablations)}
    alone = write_sweep_report(tmp_path / "a.html", title="t", run_info={}, others=others).read_text()
    assert '<a href="#attribution">Attributions</a>' in alone
    assert 'data-figure="attribution_ranking"' in alone
    assert 'data-figure="attribution_measured"' not in alone
    assert "estimated from gradients; exploratory" in alone
    assert '<a href="#further">' not in alone
    both = write_sweep_report(
        tmp_path / "b.html", title="t", run_info={}, others=others, ablations=ablations
    ).read_text()
    assert 'data-figure="attribution_measured"' in both
    assert "They rank heads as removing them does with Spearman" in both
