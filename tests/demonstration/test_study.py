"""`headscope study` on the bundled models: small, whole, and the same after any number of kills."""

import json
import re
import shutil

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from headscope import Scope
from headscope.demonstration import StudyConfig, is_study, report_study, run_study
from headscope.report.naming import Names
from headscope.sweep import Run
from headscope.zoo import load_pipeline
from kills import finish, kill_then_finish

# the bundled models' sites in the order of execution, by hand, and on how many groups heads are ablated
EXECUTED = {
    "pixeldit": [f"transformer_blocks.{block}.attn1" for block in range(6)],
    "unet": [
        "down_blocks.1.attentions.0",
        "down_blocks.2.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    ],
    "planted:pairs": ["blocks.0.attn", "blocks.1.attn"],
}
TIED = {"lfw", "faces_grey", "tiled", "untiled"}
ABLATED = {"pixeldit": TIED, "unet": {"lfw", "faces_grey"}, "planted:pairs": TIED}
SMALL = {
    "items": 3,
    "discover_items": 2,
    "confirm_items": 2,
    "heads_per_group": 2,
    "observe_bands": 2,
    "ablate_bands": 1,
    "draws": 2,
    "reference_items": 4,
    "drawn_images": 2,
}


def tables(out):
    found = {}
    for stage in StudyConfig(**json.loads((out / "study.json").read_text())).stages:
        run = Run.open(out / stage)
        for kind in run.tables:
            frame = run.table(kind).with_columns(pl.col(pl.Categorical).cast(pl.String)).collect()
            keys = [name for name in frame.columns if frame[name].dtype not in (pl.Float32, pl.Float64)]
            found[stage, kind] = frame.sort(keys, nulls_last=True)
    return found


@pytest.mark.parametrize(
    "model", ["planted:pairs", *(pytest.param(name, marks=pytest.mark.full) for name in ("pixeldit", "unet"))]
)
def test_a_whole_study(model, tmp_path):
    config = StudyConfig(**SMALL, model=model)
    assert StudyConfig() == StudyConfig(model="pixeldit")
    page = run_study(config, tmp_path / "study", progress=False)
    assert is_study(tmp_path / "study")
    text = page.read_text()
    assert "Demonstration" in text
    for group in ("faces_grey", "lfw", "photographs"):
        assert group in text
    executed = [site.name for site in Scope(load_pipeline(model)).sites]
    assert executed == EXECUTED[model]
    heads = sum(site.heads for site in Scope(load_pipeline(model)).sites)
    figure = json.loads(re.search(r'data-figure="entropy_maps">(.*?)</script>', text).group(1))  # type: ignore[union-attr]
    assert figure[0]["layout"]["yaxis"]["ticktext"] == list(Names(executed, []).sites.values())
    found = tables(tmp_path / "study")
    observed = found["observe", "observations"]
    groups = {*config.groups, "lfw_matched", "faces_grey_matched"}
    assert set(observed["group"]) == groups
    # 3 splits of 3 items, 2 draws, 2 timesteps
    assert observed.height == len(groups) * 3 * 3 * 2 * 2 * heads
    key = pl.struct("group", "item", "replicate", "timestep", "site", "head")
    assert observed.select(key.n_unique()).item() == observed.height
    discover, confirm = found["discover", "ablations"], found["confirm", "ablations"]
    assert set(discover["split"]) == {"discover"}
    assert set(discover["group"]) == set(confirm["group"]) == ABLATED[model]
    assert discover.height == len(ABLATED[model]) * 2 * 2 * heads
    assert set(confirm["split"]) == {"confirm"}
    folds = {f"mean {fold}/4" for fold in (1, 2, 3, 4)}
    assert set(confirm["fill"]) == {"mean", "zero", "uniform", "resample", *folds}
    assert not set(discover["source_id"]) & set(confirm["source_id"])
    # the heads tested are among those that lose most on discover, and no others
    assert 2 <= confirm.select(pl.struct("site", "head").n_unique()).item() < heads
    # every site, where there are several, and all heads, in both splits
    of_sites = {*executed, "all heads"}
    assert set(found["discover", "set_ablations"]["edit"]) >= of_sites
    assert set(found["confirm", "set_ablations"]["edit"]) > of_sites
    assert ("untrained", "observations") in found or model.startswith("planted")
    assert {path.stem for path in (tmp_path / "study" / "tables").iterdir()} >= {
        *("entropy_heads", "contrast_heads", "contrast_controls", "effects", "effects_timesteps", "joint"),
        *("curves", "doses"),
    }
    with pytest.raises(ValueError, match=r"another configuration.*\n  seed: 0 there, 1 now"):
        run_study(StudyConfig(**{**SMALL, "seed": 1}, model=model), tmp_path / "study", progress=False)
    assert "not finished" not in text
    shutil.rmtree(tmp_path / "study" / "confirm")
    assert "This study is not finished (confirm)" in report_study(tmp_path / "study").read_text()


def test_a_directory_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="isn't a study"):
        run_study(StudyConfig(**SMALL), tmp_path, progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_settings():
    with pytest.raises(ValueError, match="confirm_items: got 0"):
        StudyConfig(confirm_items=0)
    with pytest.raises(ValueError, match="groups: got cats"):
        StudyConfig(groups=("cats",))
    with pytest.raises(ValueError, match="ablate_groups: got cats"):
        StudyConfig(ablate_groups=("cats",))
    with pytest.raises(ValueError, match="reference_items: got 3, expected at least 4"):
        StudyConfig(reference_items=3)
    with pytest.raises(ValueError, match="ablate_groups: got photographs, whose training images are of 3 sources"):
        StudyConfig(ablate_groups=("photographs",))
    with pytest.raises(ValueError, match="model: got 'sd15', expected one of pixeldit, unet, planted:"):
        StudyConfig(model="sd15")


STUDY = """
import json
import sys
from pathlib import Path
from headscope import Scope
from headscope.report.naming import Names
from headscope.demonstration import StudyConfig, run_study
print("ready", flush=True)
run_study(StudyConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]), progress=False)
"""


@pytest.mark.full
# several studies long
@pytest.mark.timeout(1500)
def test_kills_at_random_moments_change_nothing(tmp_path):
    settings = json.dumps(SMALL)
    length = finish(STUDY, settings, str(tmp_path / "whole"))
    delays = length * np.random.default_rng(0).uniform(0.0, 0.7, 5)
    kill_then_finish(STUDY, settings, str(tmp_path / "killed"), delays=delays)
    expected, found = tables(tmp_path / "whole"), tables(tmp_path / "killed")
    assert expected.keys() == found.keys()
    for name, frame in expected.items():
        assert_frame_equal(found[name], frame, check_exact=True)
    assert (tmp_path / "killed" / "report.html").is_file()
