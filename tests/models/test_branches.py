"""Guidance branches of real pipeline calls: switched off half way, in passes of their own, perturbed, skipping."""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

import tiny
from headscope import Scope
from headscope.models.hooks.branches import _named_parts

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


def first_step(recording):
    """{branch: entropies of the first step, in one order}"""
    table = recording.to_polars()
    table = table.filter(table["step"] == 0).sort("site", "call", "sample", "head", "query_group")
    return {
        branch: table.filter(table["branch"].cast(str) == branch)["entropy_mean"].to_numpy()
        for branch in table["branch"].cast(str).unique()
    }


def changed(pipeline, one, other):
    """The branches whose entropies at the first step differ between two calls."""
    found = []
    for options in (one, other):
        with Scope(pipeline).record(
            "entropy", sites="*attention*" if hasattr(pipeline, "transformer") else None
        ) as seen:
            pipeline(**options)
        found.append(first_step(seen))
    assert found[0].keys() == found[1].keys()
    return {name for name in found[0] if abs(found[0][name] - found[1][name]).max() > 1e-4}, set(found[0])


def test_texts_in_lists_are_told_one_by_one():
    """Z-Image puts the prompt first, and may leave guidance out at some steps."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    ).eval()
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny.autoencoder(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    prompt, negative, other = (3 * torch.randn(5, 12, generator=generator) for _ in range(3))
    options = {
        "prompt_embeds": [prompt],
        "negative_prompt_embeds": [negative],
        "guidance_scale": 5.0,
        "num_inference_steps": 2,
        "height": 16,
        "width": 16,
        "latents": torch.randn(1, 4, 8, 8, generator=generator),
        "output_type": "latent",
    }
    assert changed(pipeline, options, options | {"negative_prompt_embeds": [other]}) == ({"uncond"}, {"cond", "uncond"})
    assert changed(pipeline, options, options | {"prompt_embeds": [other]}) == ({"cond"}, {"cond", "uncond"})
    with Scope(pipeline).record("entropy", sites="*attention*") as recording:
        pipeline(**options, cfg_truncation=0.4)
    assert set(branches_by_step(recording)) == {(0, "cond"), (0, "uncond"), (1, "cond")}


def test_parts_are_told_by_what_the_pipelines_source_calls_them():
    """InstructPix2Pix puts the prompt first, then the picture without it, then neither."""
    components = tiny.stable_diffusion().components
    components["unet"] = tiny.conditional_unet(
        in_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    components["scheduler"] = DDPMScheduler()
    pipeline = StableDiffusionInstructPix2PixPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(1, 3, 16, 16, generator=generator) for _ in range(2)]
    options = {
        "prompt": "a red fox",
        "image": pictures[0],
        "num_inference_steps": 1,
        "guidance_scale": 5.0,
        "image_guidance_scale": 1.5,
        "output_type": "latent",
        "latents": latents(1),
    }
    every = {"cond", "image", "uncond"}
    assert changed(pipeline, options, options | {"prompt": "a blue boat on a lake"}) == ({"cond"}, every)
    assert changed(pipeline, options, options | {"image": pictures[1]}) == ({"cond", "image"}, every)


def test_the_source_of_a_call():
    def call(self):
        negative_embeds, embeds = self.prompt_embeds.chunk(2)
        first, second = self.noise.chunk(2)
        noise_text, noise_negative = self.noise.chunk(2)
        noise_uncond, noise_cond = torch.split(self.noise, 2)
        eps_cond, eps_uncond, eps_image, rest = torch.split(self.eps, 1, dim=0)
        predictions = noise_text, noise_negative, noise_uncond, noise_cond, eps_cond, eps_uncond, eps_image, rest
        return negative_embeds, embeds, first, second, predictions

    assert _named_parts(call) == {2: ("cond", "uncond"), 4: ("cond", "uncond", "image", "part_3")}


def test_a_pass_of_guidance_that_is_not_told_is_unknown():
    class Pipeline:
        """Guidance in passes of their own, by texts that it doesn't name."""

        do_classifier_free_guidance = True

        def __init__(self):
            self.transformer = tiny.sd3_transformer()

        def __call__(self, batch_size):
            for text in (1.0, -1.0):
                inputs = tiny.sd3_inputs(batch_size)
                self.transformer(**inputs | {"encoder_hidden_states": text * inputs["encoder_hidden_states"]})

    pipeline = Pipeline()
    scope = Scope(pipeline)
    site = scope.sites[0].name
    with torch.inference_mode():
        with scope.record("entropy") as recording:
            pipeline(2)
        assert set(recording.to_polars()["branch"].cast(str)) == {"unknown"}
        said = "'cond', which never ran in the context: expected some of unknown"
        with pytest.raises(ValueError, match=said), scope.edit({site: [0]}, branches="cond"):
            pipeline(2)


@pytest.mark.parametrize("same", [True, False])
def test_passes_of_a_pipeline_that_has_nothing_but_a_scale(same):
    """As Kandinsky 5 runs them; a pipeline that converts its texts leaves no trace of which one it was."""

    class Pipeline:
        def __init__(self):
            self.transformer = tiny.sd3_transformer()

        def __call__(self, batch_size, guidance_scale):
            inputs = tiny.sd3_inputs(batch_size)
            prompt_embeds = inputs["encoder_hidden_states"]
            negative_prompt_embeds = -prompt_embeds if guidance_scale > 1 else None
            for text in (prompt_embeds, negative_prompt_embeds):
                if text is not None:
                    self.transformer(**inputs | {"encoder_hidden_states": text if same else text.clone()})

    pipeline = Pipeline()
    for scale, expected in ((5.0, ["cond", "uncond"] if same else ["unknown"]), (1.0, [None])):
        with torch.inference_mode(), Scope(pipeline).record("entropy") as recording:
            pipeline(2, scale)
        assert recording.to_polars()["branch"].cast(str).unique().sort().to_list() == expected


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
