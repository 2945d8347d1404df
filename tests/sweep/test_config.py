"""Configurations that can't be run are refused before any work starts."""

from dataclasses import replace

import numpy as np
import pytest

from headscope.bench.results import Settings
from headscope.sweep import HeadSet, SweepConfig, Workers, run_sweep
from headscope.sweep.compute.opened import Execution
from headscope.zoo.train import TrainConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": ()}, "groups: got none and no prompts"),
        ({"groups": ("cats",)}, "groups: got 'cats', expected NAME=DIR or one of faces"),
        ({"fills": ("median",)}, "fills: got median, expected some of mean, zero, uniform"),
        ({"fills": ("mean", "mean")}, "each once"),
        ({"scores": ("fid",)}, "scores: got fid"),
        ({"splits": ()}, "splits: got none"),
        ({"splits": ("test",)}, "splits: got test"),
        ({"dtype": "int8"}, "dtype: got int8"),
        ({"items": 0}, "items: got 0, expected at least 1"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": True}, "seed: got True, expected a whole number"),
        ({"items": 1.5}, "items: got 1.5, expected a whole number"),
        ({"bands": "3"}, "bands: got '3', expected a whole number"),
        ({"timesteps": (60.0,)}, r"timesteps\.0: got 60\.0, expected a whole number"),
        ({"heads": ()}, "heads: got"),
        ({"heads": (("mid", 0), ("mid", 0))}, "each once"),
        ({"timesteps": (5, 5)}, "timesteps: got"),
        ({"timesteps": ()}, "timesteps: got an empty list"),
        ({"observe": False, "fills": ()}, "nothing to observe"),
        ({"autocast": "int8"}, "autocast: got int8"),
        ({"autocast": "bfloat16", "dtype": "float16"}, "autocast: got bfloat16 with the dtype float16"),
        ({"groups": ("a/b=images",)}, "groups: got 'a/b=images', expected a name without /"),
        ({"graphs": True}, "graphs: got true with device 'cpu', expected a cuda device"),
        ({"graphs": True, "compile": True, "device": "cuda"}, "graphs: got true with compile"),
        ({"compile": True, "attribute": True}, "compile: got true with attribute"),
        ({"compile": True, "scores": ("generate",), "generate_window": (1, 2)}, "compile: got true with a generate_wi"),
        ({"fills": (), "heads": (("mid", 0),)}, "heads: got some without anything done to them"),
        ({"scores": (), "sites": ("mid*",)}, "sites: got some without anything done to them"),
        ({"fills": ("zero",), "reference_items": 3}, "reference_items: got 3 without the fills mean and resample"),
        ({"timesteps": (60,), "bands": 5}, "bands: got 5 beside timesteps"),
        ({"cotangents": 8}, "cotangents: got 8 without attribute"),
        ({"generate_steps": 20}, "generate_steps: got 20 without the score generate and without prompts"),
        (
            {"heads": (), "sites": ("mid*",), "sets": (HeadSet("a", sites=("*",)),)},
            "sites: got some without anything done",
        ),
        ({"groups": ("lfw=images",)}, "groups: got 'lfw=images', expected another name than the zoo's own"),
        ({"prompts": ""}, "prompts: got '', expected a path"),
        ({"model": "nowhere"}, "model: got 'nowhere', expected pixeldit, unet, planted:roles, .* or a directory"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(**{"groups": ("faces",), **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": ("faces", "faces")}, "expected different names"),
        ({"groups": ("mine=nowhere",)}, "nowhere"),
        ({"groups": ("faces",), "timesteps": (1000,)}, "timesteps: got 1000, expected 0 to 999"),
        ({"groups": ("faces",), "heads": (("mid_block.attentions.0", 9),)}, "heads: got"),
        ({"groups": ("faces",), "scores": (), "attribute": True, "heads": (("mid", 0),)}, "heads: got"),
        ({"groups": ("faces",), "scores": (), "attribute": True, "sites": ("mid",)}, "sites: got 'mid'"),
        ({"groups": ("faces",), "prompts": "nowhere.txt"}, "prompts: got"),
    ],
)
def test_requests_that_do_not_fit_the_model(fields, message, ddpm_directory, tmp_path):
    config = SweepConfig(model=ddpm_directory, items=2, **fields)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_sweep(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "has no prompts"), (b"\xff\xfe\xff", "isn't UTF-8"), (b"a fox\n", "has 1 item, expected at least 2")],
)
def test_prompt_files_that_cannot_be_used(content, message, diffusion_directory, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    config = SweepConfig(model=diffusion_directory, prompts=str(tmp_path / "prompts.txt"))
    with pytest.raises(ValueError, match=message):
        run_sweep(config, tmp_path / "run", progress=False)


def test_unreadable_images_are_named(ddpm_directory, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("torn.png", "other.png"):
        (tmp_path / "images" / name).write_bytes(b"\x89PNG\r\n\x1a\n torn")
    config = SweepConfig(model=ddpm_directory, groups=(f"mine={tmp_path / 'images'}",))
    with pytest.raises(ValueError, match=r"(torn|other)\.png"):
        run_sweep(config, tmp_path / "run", progress=False)


def test_batch_must_be_positive(ddpm_directory, tmp_path):
    for batch in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match=f"batch: got {batch!r}, expected"):
            run_sweep(SweepConfig(model=ddpm_directory, groups=("faces",)), tmp_path, batch=batch)
    with pytest.raises(ValueError, match=r"workers: got 2\.0, expected a whole number"):
        Workers("processes", 2.0)


def test_counts_of_numpy_s_kinds_are_counts():
    one = np.int64(1)
    for found in (Workers(count=one).count, Execution(rows=one).rows, Execution(threads=one).threads):
        assert type(found) is int
        assert found == 1
    assert SweepConfig(groups=("faces",), items=one) == SweepConfig(groups=("faces",), items=1)
    assert type(Settings(rounds=one).rounds) is int
    config = TrainConfig("run", steps=one, seed=one)
    assert (type(config.steps), type(config.seed)) == (int, int)


def test_attributions_without_ablations_of_single_heads_keep_to_the_sites(ddpm_directory, tmp_path):
    config = SweepConfig(
        model=ddpm_directory,
        groups=("faces",),
        splits=("discover",),
        items=1,
        timesteps=(60,),
        observe=False,
        fills=("zero",),
        heads=(),
        sites=("mid_block.*",),
        sets=(HeadSet("all", sites=("*",)),),
        attribute=True,
        cotangents=1,
    )
    run = run_sweep(config, tmp_path / "run", progress=False)
    assert run.tables == ("attributions", "set_ablations")
    assert set(run.table("attributions").collect()["site"].cast(str)) == {"mid_block.attentions.0"}
    with pytest.raises(ValueError, match=r"sites: got 'middle\.\*', expected a pattern of"):
        run_sweep(replace(config, sites=("middle.*",)), tmp_path / "other", progress=False)
