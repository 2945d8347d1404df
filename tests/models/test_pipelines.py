"""Real pipeline calls of every gating family: images as stock, steps, timesteps and guidance branches right."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

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


def with_image_prompt(unet):
    """Cross-attention that attends to the text, then to an image prompt of 4 tokens."""
    torch.manual_seed(0)
    processors = {}
    for name in unet.attn_processors:
        module = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = AttnProcessor2_0()
        if module.is_cross_attention:
            processors[name] = IPAdapterAttnProcessor2_0(module.inner_dim, 32, num_tokens=(4,), scale=1.0)
    unet.set_attn_processor(processors)
    return unet


def test_calls_of_one_module_are_told_apart():
    unet = with_image_prompt(tiny.stable_diffusion().unet)
    sample, text, image = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32), torch.randn(2, 1, 4, 32)
    scope = Scope(unet)
    site = next(site.name for site in scope.sites if site.kind == "cross")

    def run():
        with torch.inference_mode():
            return unet(sample, 5, (text, [image]), return_dict=False)[0]

    stock = run()
    with scope.record("entropy", "k", reduce=None) as recording:
        assert float((run() - stock).abs().max()) <= 1e-5
    table = recording.to_polars().filter(recording.to_polars()["site"].cast(str) == site)
    assert sorted(table.select("call", "keys").unique().iter_rows()) == [(0, 7), (1, 4)]
    to_k = unet.get_submodule(site).to_k(text).unflatten(-1, (4, -1)).transpose(1, 2)
    assert torch.allclose(recording.samples("k", site, 0, 5), to_k, atol=1e-6)
    # the second call alone
    with scope.edit({site: lambda where: range(4) if where.call == 1 else None}):
        without_image = run()
    unet.get_submodule(site).processor.scale = [0.0]
    assert float((without_image - run()).abs().max()) <= 1e-5
    assert float((without_image - stock).abs().max()) > 1e-5
