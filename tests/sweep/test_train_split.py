"""Training items beside held-out ones, observed and ablated as these are."""

import polars as pl
import pytest
from PIL import Image

from headscope.sweep import SweepConfig, run_sweep
from headscope.sweep.plan.items import load_task, open_items
from headscope.zoo import open_group
from sweep.faults import ordered

SITE = "mid_block.attentions.0"


@pytest.mark.parametrize("fill", ["mean", "resample"])
def test_training_items_are_swept_where_they_are_asked_for(ddpm_directory, tmp_path, fill):
    config = SweepConfig(
        model=ddpm_directory, groups=("lfw",), splits=("train", "confirm"), items=3, timesteps=(60,), fills=(fill,),
        heads=((SITE, 1),), reference_items=4,
    )  # fmt: skip
    run = run_sweep(config, tmp_path / "run", progress=False)
    training = set(open_group("lfw").sources("train"))
    for kind in ("observations", "ablations"):
        rows = ordered(run, kind).select("source_id", "split").unique()
        assert rows["split"].value_counts().sort("split").rows() == [("confirm", 3), ("train", 3)]
        assert set(rows.filter(pl.col("split") == "train")["source_id"]) <= training
        assert not set(rows.filter(pl.col("split") == "confirm")["source_id"]) & training


def test_groups_without_training_items_say_so(ddpm_directory, tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(4):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    config = SweepConfig(
        model=ddpm_directory, groups=(f"mine={tmp_path / 'images'}",), splits=("train",), fills=("zero",)
    )
    with pytest.raises(ValueError, match="groups: 'mine' has no items in the splits train"):
        open_items(config, load_task(config))


def test_held_out_items_are_the_default():
    assert SweepConfig(groups=("lfw",)).splits == ("discover", "confirm")
    with pytest.raises(ValueError, match="splits: got train, train, expected some of train, discover, confirm, each"):
        SweepConfig(groups=("lfw",), splits=("train", "train"))
