"""What a sweep measured beside the report's own sections: means by hand, all of it on the page."""

import re
import sys

import numpy as np
import polars as pl
import pytest

from headscope.demonstration import report_sweep
from headscope.report import GroupInfo, write_sweep_report
from headscope.report.naming import percent, significant
from headscope.study.further import further_scores
from headscope.sweep import HeadSet, SweepConfig, run_sweep
from study import simulated


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(99):
        yield


def rows(**columns):
    """Two sources of two items at two timesteps, of one group and fill; columns [sources, items, timesteps]."""
    source, item, timestep = (index.ravel() for index in np.indices((2, 2, 2)))
    return pl.DataFrame(
        {
            "item": 2 * source + item,
            "group": "lfw",
            "source_id": [f"s{number}" for number in source],
            "split": "confirm",
            "replicate": 0,
            "timestep": np.array([100, 500])[timestep],
            "fill": "zero",
            **{name: np.asarray(values).reshape(8) for name, values in columns.items()},
        }
    )


CLEAN = np.arange(1.0, 9.0).reshape(2, 2, 2)
CHANGE = np.array([[[0.1, 0.2], [0.3, 0.4]], [[0.5, -0.2], [0.1, 0.0]]])
OWN = np.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, np.nan]]])


def test_means_by_hand():
    tables = {
        "ablations": rows(clean=CLEAN, edited=CLEAN + CHANGE, own=OWN).with_columns(site=pl.lit("mid"), head=3),
        "set_ablations": rows(x0_clean=CLEAN, x0_edited=CLEAN + CHANGE).with_columns(edit=pl.lit("pair")),
        "observations": rows(entropy_mean=CLEAN).drop("fill"),
    }
    found = {(score.kind, score.name): score for score in further_scores(tables)}
    # losses have sections of their own
    assert list(found) == [("set_ablations", "x0_relative"), ("set_ablations", "x0_absolute"), ("ablations", "own")]
    change, clean = CHANGE.mean(1), CLEAN.mean(1)
    relative = found["set_ablations", "x0_relative"]
    assert relative.fraction
    assert relative.values["edit"].to_list() == ["pair"]
    assert relative.values["value"].item() == pytest.approx((change.sum(0) / clean.sum(0)).mean())
    assert found["set_ablations", "x0_absolute"].values["value"].item() == pytest.approx(change.mean())
    own = found["ablations", "own"]
    # of the source that has none of it at a timestep in one item, the other item counts
    assert own.values["value"].item() == pytest.approx(np.mean([[2.0, 3.0], [6.0, 6.0]]))
    assert own.values.select("group", "fill", "site", "head", "sources").row(0) == ("lfw", "zero", "mid", 3, 2)
    assert own.left_out == 1


def test_images_have_their_titles_and_attributions_a_section_of_their_own():
    tables = {
        "set_generations": rows(distance=CLEAN, psnr=CLEAN).with_columns(edit=pl.lit("pair")),
        "generations": rows(distance=CLEAN, ssim=CLEAN).with_columns(site=pl.lit("mid"), head=3),
        "attributions": rows(loss=CLEAN, g=CHANGE, c=CLEAN, importance=OWN).with_columns(site=pl.lit("mid"), head=3),
    }
    titles = [(score.kind, score.title) for score in further_scores(tables)]
    assert titles == [
        ("set_generations", "Distance of the drawn image from the clean one"),
        ("set_generations", "Peak signal-to-noise ratio of the drawn image against the clean one (psnr)"),
        ("generations", "Structural similarity of the drawn image to the clean one (ssim)"),
    ]


def test_definitions_are_of_what_stands_there():
    """No test is named where nothing is tested, and the error of the clean image is no loss."""
    both = {"clean": CLEAN, "edited": CLEAN + CHANGE, "x0_clean": CLEAN, "x0_edited": CLEAN + CHANGE}
    tables = {
        "set_ablations": rows(**both).with_columns(edit=pl.lit("pair")),
    }
    definitions = {score.name: score.definition for score in further_scores(tables)}
    assert list(definitions) == ["x0_relative", "x0_absolute"]
    assert "sum of (edited error − clean error) / sum of clean error" in definitions["x0_relative"]
    assert definitions["x0_absolute"].endswith("In squared units of what the model denoises.")
    assert not any("test" in text or "band" in text or "{" in text for text in definitions.values())


def test_groups_stand_in_the_page_s_order(tmp_path):
    """Whatever the order of the files."""
    pairs = {"clean": CLEAN, "edited": CLEAN + CHANGE, "x0_clean": CLEAN, "x0_edited": CLEAN + CHANGE}
    table = rows(**pairs).with_columns(edit=pl.lit("pair"))
    both = pl.concat([table.with_columns(group=pl.lit(name)) for name in ("second", "first")])
    groups = [GroupInfo(name, name, np.zeros((0, 1, 1, 3), np.uint8)) for name in ("first", "second")]
    page = write_sweep_report(
        tmp_path / "r.html", title="x", run_info={}, groups=groups, others={"set_ablations": both}
    )
    shown = re.findall(r'<th scope="row">pair</th><td>(\w+)</td>', page.read_text())
    assert shown == ["first", "second"] * 2


def test_what_is_not_shown_is_named(tmp_path):
    observed = rows(entropy_mean=CLEAN, entropy_normalised_mean=CLEAN / 9, entropy_std=CHANGE, max_prob_mean=CHANGE)
    observed = observed.drop("fill").with_columns(
        site=pl.lit("mid"), head=0, query_group=pl.lit("image"), queries=64, keys=64, call=0
    )
    page = write_sweep_report(tmp_path / "r.html", title="x", run_info={}, observations=observed).read_text()
    assert "not on this page: entropy_std, max_prob_mean (observations)." in page


SCORES = """
def largest_error(edited, clean, target, inputs):
    return (edited - clean).abs().flatten(1).amax(1)
"""


def test_a_run_of_sets_and_own_scores_is_on_the_page(ddpm_directory, tmp_path, monkeypatch):
    (tmp_path / "scores_of_mine.py").write_text(SCORES)
    monkeypatch.syspath_prepend(tmp_path)
    config = SweepConfig(
        model=ddpm_directory,
        groups=("lfw",),
        items=3,
        timesteps=(60,),
        observe=False,
        fills=("zero",),
        heads=(),
        scores=("loss", "scores_of_mine:largest_error"),
        sets=(HeadSet("middle & <b>", sites=("mid_block.*",)), HeadSet("warm", sites=("*",), temperature=2.0)),
    )
    run = run_sweep(config, tmp_path / "run", progress=False)
    assert "not finished" not in report_sweep(tmp_path / "run").read_text()
    file = next((tmp_path / "run" / "set_ablations").glob("*.parquet"))
    file.rename(tmp_path / "kept")
    half = report_sweep(tmp_path / "run").read_text()
    assert "This run is not finished: every number here will change. Units that are done: set_ablations 1 of 2." in half
    (tmp_path / "kept").rename(file)
    sys.modules.pop("scores_of_mine")
    page = report_sweep(tmp_path / "run").read_text()
    assert "middle &amp; &lt;b&gt;: mid_block.* (removed); warm: * (temperature 2)" in page
    table = run.table("set_ablations").with_columns(pl.col("edit").cast(pl.String)).collect()
    for edit, shown in (("middle & <b>", "middle &amp; &lt;b&gt;"), ("warm", "warm")):
        own = table.filter(edit=edit)
        degradation = float(own["edited"].to_numpy().sum() / own["clean"].to_numpy().sum() - 1)
        # sets of heads, then further scores
        kind = "a site" if edit != "warm" else "an edit"
        rows = [f'<td>{kind}</td><td class="number">[0-9]+</td><td>lfw</td><td>zero</td>', "<td>lfw</td><td>zero</td>"]
        for labels, value in zip(rows, (percent(degradation), significant(own["largest_error"].mean())), strict=True):
            assert re.search(f'<th scope="row">{shown}</th>{labels}<td class="number">{re.escape(value)}<', page), value
    assert "largest_error, a score of the user&#39;s own (set_ablations), mean over timesteps; exploratory." in page
