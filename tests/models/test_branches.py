"""Guidance branches of real pipeline calls: switched off half way, in passes of their own, perturbed, skipping."""

import pytest
import torch
from diffusers import (
    FluxControlPipeline,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
)

import tiny
from headscope import Scope

PROMPTS = ["a red fox", "a blue boat"]


def branches_by_step(recording):
    """{(step, branch): samples}"""
    found = {}
    for step, branch, sample in recording.to_polars().select("step", "branch", "sample").unique().sort("sample").rows():
        found.setdefault((step, branch), []).append(sample)
    return found


def latents(count=2):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def without_guidance_after(step):
    """A step callback, as diffusers' own example of switching guidance off has it."""

    def callback(pipeline, index, timestep, tensors):
        if index == step:
            pipeline._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


def test_guidance_that_is_switched_off_half_way_leaves_the_branch_with_the_prompt():
    pipeline = tiny.stable_diffusion()
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent", "latents": latents()}
    options |= without_guidance_after(1)
    stock = pipeline(PROMPTS, **options).images
    scope = Scope(pipeline)
    site = scope.sites[0].name
    with scope.record("entropy", sites=[site]) as recording:
        assert torch.allclose(pipeline(PROMPTS, **options).images, stock, atol=1e-5)
        # a call of its own, without guidance from the start
        pipeline(PROMPTS, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    expected = {(step, branch): [0, 1] for step in range(2) for branch in ("uncond", "cond")}
    expected |= {(2, "cond"): [0, 1], (0, None): [0, 1]}
    assert branches_by_step(recording) == expected
    # edits of a branch know it as well
    with scope.edit({site: [0]}, steps=range(2, 3), branches="cond"):
        assert not torch.equal(pipeline(PROMPTS, **options).images, stock)
    with (
        pytest.raises(ValueError, match=r"'uncond', which never ran in the context: expected some of cond$"),
        scope.edit({site: [0]}, steps=range(2, 3), branches="uncond"),
    ):
        pipeline(PROMPTS, **options)


def test_the_guidance_of_a_call_says_nothing_of_the_next():
    pipeline = tiny.stable_diffusion()
    options = {"num_inference_steps": 1, "output_type": "latent"}
    with Scope(pipeline).record("entropy") as recording:
        pipeline(PROMPTS, guidance_scale=5.0, **options)
        pipeline(PROMPTS, guidance_scale=1.0, **options)
    table = recording.to_polars()
    assert table.filter(table["forward"] == 1)["branch"].null_count() == len(table.filter(table["forward"] == 1))


@pytest.mark.parametrize("images", [1, 2])
def test_passes_without_a_name_are_told_by_the_text_they_are_given(images):
    pipeline = FluxImg2ImgPipeline(**tiny.flux().components)
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "image": torch.rand(1, 3, 16, 16),
        "prompt": "a red fox",
        "num_inference_steps": 2,
        "strength": 1.0,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "output_type": "latent",
        "num_images_per_prompt": images,
    }
    with Scope(pipeline).record("entropy") as recording:
        pipeline(negative_prompt="a boat", true_cfg_scale=4.0, **options)
    both = {(step, branch): list(range(images)) for step in range(2) for branch in ("cond", "uncond")}
    assert branches_by_step(recording) == both
    with Scope(pipeline).record("entropy") as recording:
        pipeline(**options)
    assert set(branches_by_step(recording)) == {(0, None), (1, None)}


def test_names_that_guiders_of_modular_pipelines_give_to_their_passes():
    transformer = tiny.flux_transformer()
    with Scope(transformer).record("entropy") as recording, torch.inference_mode():
        for name in ("pred_cond", "pred_uncond", "pred_cond_skip", "uncond_stg"):
            with transformer.cache_context(name):
                transformer(**tiny.flux_inputs())
    branches = recording.to_polars().select("forward", "branch").unique().sort("forward")["branch"].cast(str).to_list()
    assert branches == ["cond", "uncond", "skip", "perturbed"]


def test_the_pass_that_skips_layers():
    pipeline = tiny.stable_diffusion_3(layers=3)
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent", "height": 16, "width": 16}
    options |= {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.5}
    scope = Scope(pipeline)
    kept, skipped = scope.sites[0].name, next(site.name for site in scope.sites if ".1." in site.name)
    stock = pipeline(PROMPTS, latents=latents(), **options).images
    with scope.record("entropy") as recording:
        assert torch.allclose(pipeline(PROMPTS, latents=latents(), **options).images, stock, atol=1e-5)
    table = recording.to_polars().with_columns(site=recording.to_polars()["site"].cast(str))
    found = branches_by_step(recording)
    # diffusers skips where the step is past the start
    assert found == {
        **{(step, branch): [0, 1] for step in range(3) for branch in ("uncond", "cond")},
        (1, "skip"): [0, 1],
    }
    for site, branches in ((kept, {"uncond", "cond", "skip"}), (skipped, {"uncond", "cond"})):
        assert set(table.filter(table["site"] == site)["branch"].cast(str)) == branches
    # before the first skipped layer, the pass sees what the conditional branch sees
    step = table.filter((table["site"] == kept) & (table["step"] == 1)).sort("sample", "head", "query_group")
    same = [step.filter(step["branch"].cast(str) == branch)["entropy_mean"] for branch in ("skip", "cond")]
    assert same[0].to_numpy() == pytest.approx(same[1].to_numpy(), abs=1e-6)
    with scope.edit({kept: [0]}, branches="skip"):
        edited = pipeline(PROMPTS, latents=latents(), **options).images
    assert not torch.equal(edited, stock)


def test_other_pipelines_may_share_the_denoiser():
    pipeline = tiny.stable_diffusion()
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    options = {"image": torch.rand(2, 3, 16, 16), "num_inference_steps": 4, "strength": 0.5, "output_type": "latent"}
    scope = Scope(pipeline)
    site = next(site.name for site in scope.sites if site.kind == "cross")
    with scope.record("entropy", sites=[site]) as recording, scope.record_tokens(sites=[site]) as maps:
        other(PROMPTS, **options)
    assert branches_by_step(recording) == {(s, branch): [0, 1] for s in range(2) for branch in ("uncond", "cond")}
    assert list(maps.prompts) == PROMPTS


def test_a_pipeline_inside_of_another_one():
    class Combined:
        def __init__(self, inner):
            self.unet = inner.unet
            self.inner = inner

        def __call__(self, prompts, **options):
            batch_size = len(prompts) + 1
            return self.inner(prompts[:batch_size], **options)

    pipeline = Combined(tiny.stable_diffusion())
    with Scope(pipeline).record("entropy") as recording:
        pipeline(PROMPTS, num_inference_steps=2, guidance_scale=5.0, output_type="latent")
    assert branches_by_step(recording) == {(s, branch): [0, 1] for s in range(2) for branch in ("uncond", "cond")}


def test_a_scale_that_is_an_input_of_the_denoiser_is_no_guidance():
    flux = tiny.flux(guidance=True)
    # diffusers would put defaults back into what its configuration names there
    config = {**flux.transformer.config, "in_channels": 32, "out_channels": 16, "_use_default_values": []}
    names = ("vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = FluxControlPipeline(
        transformer=FluxTransformer2DModel.from_config(config).eval(),
        **{name: getattr(flux, name) for name in names},
    )
    pipeline.set_progress_bar_config(disable=True)
    with Scope(pipeline).record("entropy") as recording:
        pipeline(
            "a red fox",
            control_image=torch.rand(1, 3, 16, 16),
            height=16,
            width=16,
            num_inference_steps=2,
            guidance_scale=30.0,
            max_sequence_length=16,
            output_type="latent",
        )
    assert branches_by_step(recording) == {(step, None): [0] for step in range(2)}


def test_several_waveforms_of_a_prompt():
    """Sound pipelines name them so."""

    class Sound:
        do_classifier_free_guidance = True

        def __init__(self):
            self.unet = tiny.stable_diffusion().unet

        def __call__(self, batch_size, num_waveforms_per_prompt):
            latents = torch.randn(batch_size * num_waveforms_per_prompt, 4, 8, 8)
            with torch.inference_mode():
                self.unet(torch.cat([latents] * 2), 5, torch.randn(2 * len(latents), 7, 32))

    pipeline = Sound()
    with Scope(pipeline).record("entropy") as recording:
        pipeline(1, 2)
    assert branches_by_step(recording) == {(0, branch): [0, 1] for branch in ("uncond", "cond")}


@pytest.mark.parametrize("passes", [("pred_cond", "pred_uncond"), ("pred_cond",)])
def test_passes_that_a_pipelines_guider_asks_for(passes):
    class Guided:
        def __init__(self):
            self.transformer = tiny.flux_transformer()

        def __call__(self, guider_state, batch_size=2):
            for name in guider_state:
                with self.transformer.cache_context(name), torch.inference_mode():
                    self.transformer(**tiny.flux_inputs(batch_size))

    pipeline = Guided()
    with Scope(pipeline).record("entropy") as recording:
        pipeline(list(passes))
    branches = recording.to_polars().select("forward", "branch").unique().sort("forward")["branch"].cast(str).to_list()
    assert branches == (["cond", "uncond"] if len(passes) > 1 else [None])


def test_passes_that_nothing_names_are_not_taken_for_each_other():
    class Unnamed:
        """Casts its text, so that nothing tells which is which."""

        do_classifier_free_guidance = True

        def __init__(self):
            self.transformer = tiny.flux_transformer()

        def __call__(self, batch_size, timesteps):
            inputs = tiny.flux_inputs(batch_size)
            texts = inputs.pop("encoder_hidden_states"), torch.zeros(batch_size, 5, 32)
            for i in range(len(timesteps)):  # noqa: B007
                for text in texts:
                    with torch.inference_mode():
                        self.transformer(**inputs, encoder_hidden_states=text.clone())

    pipeline = Unnamed()
    scope = Scope(pipeline)
    with scope.record("entropy") as recording:
        pipeline(2, [500.0, 400.0])
    assert branches_by_step(recording) == {(step, f"part_{part}"): [0, 1] for step in range(2) for part in range(2)}
    said = "'cond', which never ran in the context: expected some of part_0, part_1$"
    with pytest.raises(ValueError, match=said), scope.edit({"*": [0]}, branches="cond"):
        pipeline(2, [500.0])
    with scope.record_tokens("a red fox", sites="*") as maps, pytest.warns(UserWarning, match="prompts: "):
        pipeline(2, [500.0])
    with pytest.raises(ValueError, match="nothing was recorded"):
        maps.map([0])
