"""Real pipeline calls of every gating family: images as stock, steps, timesteps and guidance branches right."""

import numpy as np
import pytest
import torch

import tiny
from headscope import Scope

# pipeline, its arguments, the branches of its forwards in order
CALLS = {
    "ddpm": (tiny.ddpm, {"batch_size": 2}, [(None,)]),
    "stable diffusion": (
        tiny.stable_diffusion,
        {"prompt": ["a red fox", "a boat"], "guidance_scale": 5.0},
        [("uncond", "cond")],
    ),
    "controlnet": (
        tiny.controlnet,
        {"prompt": "a red fox", "image": torch.rand(1, 3, 16, 16), "guidance_scale": 5.0},
        [("uncond", "cond")],
    ),
    "sd3": (
        tiny.stable_diffusion_3,
        {"prompt": "a red fox", "height": 16, "width": 16, "guidance_scale": 5.0},
        [("uncond", "cond")],
    ),
    "flux": (
        tiny.flux,
        {"prompt": "a red fox", "height": 16, "width": 16, "max_sequence_length": 16},
        [(None,)],
    ),
    "flux, true guidance": (
        tiny.flux,
        {
            "prompt": "a red fox",
            "negative_prompt": "a boat",
            "true_cfg_scale": 4.0,
            "height": 16,
            "width": 16,
            "max_sequence_length": 16,
        },
        [("cond",), ("uncond",)],
    ),
    "dit": (tiny.dit, {"class_labels": [1, 2], "guidance_scale": 4.0}, [("cond", "uncond")]),
}
STEPS = 2


def draw(pipeline, arguments):
    generator = torch.Generator().manual_seed(0)
    return pipeline(num_inference_steps=STEPS, generator=generator, output_type="np", **arguments).images


@pytest.mark.parametrize("name", CALLS)
def test_a_pipeline_call(name):
    build, arguments, branches = CALLS[name]
    pipeline = build()
    stock = draw(pipeline, arguments)
    scope = Scope(pipeline)
    with scope.record("entropy") as recording:
        recorded = draw(pipeline, arguments)
    assert np.abs(recorded - stock).max() <= 1e-5
    assert np.array_equal(draw(pipeline, arguments), stock)
    table = recording.to_polars()
    timesteps = pipeline.scheduler.timesteps.double().tolist()
    found = table.select("forward", "step", "timestep").unique().sort("forward")
    expected = [(step * len(branches) + part, step) for step in range(STEPS) for part in range(len(branches))]
    assert [(forward, step) for forward, step, _ in found.iter_rows()] == expected
    assert found["timestep"].to_list() == pytest.approx([timesteps[step] for _, step in expected])
    for part, own in enumerate(branches):
        rows = table.filter(table["forward"] == part)
        assert rows["branch"].unique(maintain_order=True).cast(str).to_list() == list(own)
    assert "all" not in table["query_group"].cast(str)
    assert table.filter(table["query_group"].cast(str) == "image")["grid_height"].null_count() == 0
    site = scope.sites[0].name
    with scope.edit({site: [0]}):
        edited = draw(pipeline, arguments)
    assert np.abs(edited - stock).max() > 1e-7


def test_the_conditional_rows_of_dit_are_those_of_the_class():
    pipeline = tiny.dit()
    scope = Scope(pipeline)
    entropies = []
    for label in (1, 7):
        with scope.record("entropy") as recording:
            draw(pipeline, {"class_labels": [label], "guidance_scale": 4.0})
        table = recording.to_polars().filter(recording.to_polars()["step"] == 0)
        entropies.append(
            {branch: table.filter(table["branch"].cast(str) == branch)["entropy_mean"] for branch in ("cond", "uncond")}
        )
    assert np.allclose(entropies[0]["uncond"], entropies[1]["uncond"], atol=1e-6)
    assert not np.allclose(entropies[0]["cond"], entropies[1]["cond"], atol=1e-6)


@pytest.mark.parametrize("name", ["stable diffusion", "flux"])
def test_a_pipeline_with_a_compiled_denoiser(name):
    build, arguments, _ = CALLS[name]
    pipeline = build()
    denoiser = "unet" if name == "stable diffusion" else "transformer"
    with Scope(pipeline).record("entropy") as expected:
        stock = draw(pipeline, arguments)
    torch._dynamo.reset()
    setattr(pipeline, denoiser, torch.compile(getattr(pipeline, denoiser), backend="aot_eager", fullgraph=True))
    with Scope(pipeline).record("entropy") as recording:
        recorded = draw(pipeline, arguments)
    torch._dynamo.reset()
    assert np.abs(recorded - stock).max() <= 1e-5
    one, other = expected.to_polars(), recording.to_polars()
    columns = ["step", "timestep", "site", "sample", "branch", "head", "query_group"]
    assert one.select(columns).equals(other.select(columns))
    assert other["entropy_mean"].to_numpy() == pytest.approx(one["entropy_mean"].to_numpy(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Recording changes an image by no more than the precision of the dtype does."""
    pipeline = tiny.stable_diffusion()
    unet = pipeline.unet
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    with torch.inference_mode():
        exact = unet(sample, 5, text, return_dict=False)[0]
        low = unet.to(dtype)
        inputs = (sample.to(dtype), 5, text.to(dtype))
        stock = low(*inputs, return_dict=False)[0]
        with Scope(low).record("entropy") as recording:
            recorded = low(*inputs, return_dict=False)[0]
    assert recorded.dtype == dtype
    error = float((stock.float() - exact).abs().max())
    assert float((recorded.float() - exact).abs().max()) <= 2 * error
    assert recording.to_polars()["entropy_mean"].is_finite().all()
