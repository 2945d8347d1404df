"""Settings of how the denoiser runs: memory format, autocast, compilation."""

import numpy as np
import polars as pl
import pytest
import torch

import headscope
import tiny
from headscope.sweep import Execution, SweepConfig
from headscope.sweep.compute.estimate import estimate_sweep
from headscope.sweep.compute.opened import Opened
from sweep.faults import ordered

ASKED = {
    "groups": ["lfw"],
    "splits": ["confirm"],
    "items": 3,
    "timesteps": [300],
    "fills": ["zero", "mean"],
    "sites": ["mid_block.*"],
    "observe": False,
}


def losses(path, **fields) -> pl.DataFrame:
    return ordered(headscope.sweep(path, progress=False, **{**ASKED, **fields}), "ablations")


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_format_changes_rounding_only(ddpm_directory, tmp_path, channels_last):
    config = SweepConfig.from_dict({"model": ddpm_directory, **ASKED, "channels_last": channels_last})
    weight = Opened(config, Execution()).task.denoiser.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    found = losses(tmp_path / "a", model=ddpm_directory, channels_last=channels_last)
    expected = losses(tmp_path / "b", model=ddpm_directory)
    np.testing.assert_allclose(found["edited"], expected["edited"], rtol=1e-5)


def test_autocast_is_torch_s_own(ddpm_directory, tmp_path):
    """Shared and batched forwards under autocast equal whole ones under torch.autocast, and it reached them: their
    error is that of bfloat16 products."""
    table = losses(tmp_path / "a", model=ddpm_directory, autocast="bfloat16", fills=["zero"])
    config = SweepConfig.from_dict({"model": ddpm_directory, **ASKED, "fills": ["zero"]})
    opened = Opened(config, Execution())
    task, (group,) = opened.task, opened.groups
    inputs = task.noisy_inputs(task.prepare(list(group.swept)), 300)
    (site,) = [site for site in opened.scope.sites if site.name.startswith("mid_block")]
    for head in range(site.heads):
        rows = table.filter(pl.col("head") == head).sort("item")
        with torch.inference_mode(), opened.scope.edit({site.name: [head]}):
            full = task.loss(inputs)
            with torch.autocast("cpu", torch.bfloat16):
                cast = task.loss(inputs)
        order = np.argsort([item.index for item in group.swept])
        edited = rows["edited"].to_numpy()
        # between batches of other sizes a bfloat16 rounding may fall the other way, 2^-9 of a value
        np.testing.assert_allclose(edited, cast.numpy()[order], rtol=2**-8)
        assert np.abs(edited / full.numpy()[order] - 1).max() > 1e-5


def test_a_pipeline_in_memory_comes_back_uncast(tmp_path):
    pipeline = tiny.ddpm(size=32)
    losses(tmp_path / "a", model=pipeline, autocast="bfloat16")
    assert "forward" not in vars(pipeline.unet)
    assert pipeline.unet._compiled_call_impl is None


def test_compiled_models_share_nothing_and_a_dry_run_says_so(ddpm_directory, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    config = SweepConfig.from_dict({"model": ddpm_directory, **ASKED, "compile": True})
    assert not Opened(config, Execution()).share
    estimate = estimate_sweep(config, Execution(rows=4))
    assert estimate.shared is None
    assert estimate.reason == "the model is compiled"


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_give_the_same_losses(ddpm_directory, tmp_path):
    pipeline = tiny.ddpm(size=32)
    compiled = losses(tmp_path / "a", model=pipeline, compile=True)
    assert pipeline.unet._compiled_call_impl is None
    expected = losses(tmp_path / "b", model=ddpm_directory)
    np.testing.assert_allclose(compiled["edited"], expected["edited"], rtol=1e-5)
    assert len(compiled) > 0
