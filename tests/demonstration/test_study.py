"""`headscope study` on the bundled models: small, whole, and the same after any number of kills."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from headscope import Scope
from headscope.demonstration import StudyConfig, is_study, report_study, report_sweep, run_study
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
ABLATED = {"pixeldit": TIED, "unet": {"lfw", "faces_grey"}, "planted:pairs": {"lfw"}}
# of the model that is always tested: as few sweeps as a study can have
FEWER = {"planted:pairs": {"ablate_groups": ("lfw",), "role_groups": ("twins", "distinct")}}
SMALL = {
    "full": True,
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
    config = StudyConfig(**SMALL, **FEWER.get(model, {}), model=model)
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
        *("curves", "doses", "roles_names", "roles_excess", "roles_clusters", "claims"),
        *(("roles_ties",) if config.tied_groups else ()),
    }
    # too few sources for names, and never for circuits
    names = pl.read_csv(tmp_path / "study" / "tables" / "roles_names.csv")
    assert set(names["group"]) == set(config.role_groups)
    assert set(names["role"]) == {"none"}
    assert ("circuits", "circuits") in found
    for group in config.curve_groups:
        searched = found["circuits", "circuits"].filter(pl.col("group") == group)
        drawn = (tmp_path / "study" / f"circuit-{group}.svg").is_file()
        refused = tmp_path / "study" / "tables" / "circuits_refused.csv"
        without = pl.read_csv(refused)["group"].to_list() if refused.is_file() else []
        assert drawn == (searched["chosen"].any() and group not in without)
        assert (f"circuit-{group}", "paths") in found or not drawn
    with pytest.raises(ValueError, match=r"another configuration.*\n  seed: 0 there, 1 now"):
        run_study(replace(config, seed=1), tmp_path / "study", progress=False)
    assert "not finished" not in text
    out = tmp_path / "study"
    looked = "ties" if config.tied_groups else "roles"
    # a stage by itself is a sweep, and says what heads do, too
    assert 'id="roles"' in report_sweep(out / looked).read_text()
    # another stage's run in the place of one
    (out / "circuits").rename(out / "kept")
    shutil.copytree(out / "observe", out / "circuits")
    with pytest.raises(ValueError, match="its stage 'circuits' holds a run with groups "):
        report_study(out)
    shutil.rmtree(out / "circuits")
    (out / "kept").rename(out / "circuits")
    shutil.rmtree(out / "confirm")
    assert "This study is not finished (confirm)" in report_study(out).read_text()
    # of what isn't there any more no table is left
    assert not (out / "tables" / "effects.csv").exists()
    settings = json.loads((out / "study.json").read_text())
    (out / "study.json").write_text(json.dumps(settings | {"seed": 7}))
    with pytest.raises(ValueError, match="its stage 'observe' holds a run with seed 0, expected 7"):
        report_study(out)


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
    with pytest.raises(ValueError, match="role_groups: got lfw, lfw, expected each once"):
        StudyConfig(role_groups=("lfw", "lfw"))
    with pytest.raises(ValueError, match="confirm_items: got 300 of each split, expected at most the groups' 20"):
        StudyConfig(ablate_groups=("tiled", "untiled"), discover_items=300, confirm_items=300)
    with pytest.raises(ValueError, match="seed: got -5"):
        StudyConfig(seed=-5)
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
