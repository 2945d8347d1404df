"""Tasks: the target a model was taught, noise that depends on the item alone, generation that starts alike."""

from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

import headscope
import tiny
from headscope import models
from headscope.models import (
    FluxTask,
    PixelTask,
    Scope,
    StableDiffusion3Task,
    StableDiffusionTask,
    StableDiffusionXLTask,
    Task,
)
from headscope.models.tasks import task as task_module
from headscope.zoo import counter_normal, open_group
from tiny import Picture, pictures


@pytest.fixture(scope="module")
def pixel():
    return Task.of(tiny.ddpm())


@pytest.fixture(scope="module")
def latent():
    return Task.of(tiny.stable_diffusion())


@pytest.fixture(scope="module")
def xl():
    return Task.of(tiny.stable_diffusion_xl())


@pytest.fixture(scope="module")
def sd3():
    return Task.of(tiny.stable_diffusion_3())


@pytest.fixture(scope="module")
def flux():
    return Task.of(tiny.flux())


FAMILIES = {
    "pixel": PixelTask,
    "latent": StableDiffusionTask,
    "xl": StableDiffusionXLTask,
    "sd3": StableDiffusion3Task,
    "flux": FluxTask,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fitting_task_is_found(name, request):
    assert type(request.getfixturevalue(name)) is FAMILIES[name]


def test_every_family_is_tested_exported_and_in_the_docs():
    bundled = [family for family in Task.families() if family.__module__.startswith("headscope.")]
    assert set(bundled) == set(FAMILIES.values())
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    for family in bundled:
        assert family.__name__ in models.__all__
        assert f"`{family.__name__}`" in page
        assert family.expects
        assert family.takes_prompts == (family is not PixelTask)


class HalvedPipeline(DDPMPipeline):
    """A pipeline that a bundled family would fit, too."""


def define_own_family() -> type[Task]:
    class HalvedTask(PixelTask):
        expects = "a pipeline whose denoiser answers twice the target"

        @classmethod
        def fits(cls, pipeline):
            return isinstance(pipeline, HalvedPipeline)

        def predict(self, inputs):
            return super().predict(inputs) / 2

    return HalvedTask


@pytest.fixture
def own_family():
    bundled = list(task_module._FAMILIES)
    yield define_own_family()
    task_module._FAMILIES[:] = bundled


def test_a_family_is_known_once_it_is_defined(own_family, pixel):
    pipeline = HalvedPipeline(unet=pixel.denoiser, scheduler=pixel.scheduler)
    assert type(Task.of(pipeline)) is own_family
    assert type(Task.of(pixel.pipeline)) is PixelTask
    with pytest.raises(TypeError, match=r"\(Flux\); a pipeline whose denoiser answers twice the target"):
        Task.of(object())
    # as a notebook cell that runs again
    replacing = define_own_family()
    assert type(Task.of(pipeline)) is replacing
    assert own_family not in Task.families()


def test_a_family_of_ones_own_can_be_swept(own_family, tmp_path):
    stock = tiny.ddpm(size=32)
    pipeline = HalvedPipeline(unet=stock.unet, scheduler=stock.scheduler)
    asked = {"groups": ["faces"], "splits": ["confirm"], "items": 2, "timesteps": [60], "fills": ["zero"]}
    run = headscope.sweep(tmp_path / "run", model=pipeline, progress=False, observe=False, **asked)
    assert run.complete
    clean = dict(run.table("ablations").select("item", "clean").collect().iter_rows())
    task, faces = own_family(pipeline), open_group("faces")
    assert len(clean) == 2
    for index, loss in clean.items():
        item = faces.item(index)
        inputs = task.noisy_inputs(task.prepare([item]), 60)
        with torch.inference_mode():
            assert loss == pytest.approx(float(task.loss(inputs)), rel=1e-5)
    # a run belongs to the task that it was made with
    named = f"code of {own_family.__module__}.{own_family.__qualname__}"
    assert named in run.manifest["identity"]
    task_module._FAMILIES.remove(own_family)
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        headscope.sweep(tmp_path / "run", model=pipeline, progress=False, observe=False, **asked)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_target_and_noisy_sample_by_their_formulas(pixel, prediction):
    pipeline = DDPMPipeline(unet=pixel.denoiser, scheduler=DDPMScheduler(prediction_type=prediction))
    task = PixelTask(pipeline)
    prepared = task.prepare(pictures(2))
    inputs = task.noisy_inputs(prepared, 300, replicate=4)
    clean = prepared.clean.double()
    noise = torch.stack(
        [torch.from_numpy(counter_normal("noise", k, 300, 4, shape=(3, 16, 16))) for k in prepared.keys]
    )
    alpha_bar = float(task.scheduler.alphas_cumprod[300])
    a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    target = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}[prediction]
    torch.testing.assert_close(inputs.sample.double(), a * clean + s * noise, rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs.target.double(), target, rtol=0, atol=1e-5)
    assert task.log_snr(300) == pytest.approx(np.log(a**2 / s**2))


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler],
)
def test_the_loss_does_not_depend_on_the_sampler(pixel, scheduler):
    """Samplers give add_noise meanings of their own; a model is trained by one formula."""
    expected = pixel.noisy_inputs(pixel.prepare(pictures(1)), 900)
    task = PixelTask(DDPMPipeline(unet=pixel.denoiser, scheduler=scheduler.from_config(pixel.scheduler.config)))
    inputs = task.noisy_inputs(task.prepare(pictures(1)), 900)
    torch.testing.assert_close(inputs.sample, expected.sample)
    assert task.log_snr(900) == pytest.approx(pixel.log_snr(900))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flow_matching_by_its_formulas(name, request):
    """sigma = t / 1000; x_t = (1 - sigma) x_0 + sigma n; the target is n - x_0."""
    task = request.getfixturevalue(name)
    prepared = task.prepare(pictures(2))
    assert prepared.clean.shape == (2, 4, 8, 8)
    for timestep in (1, 250, 1000):
        inputs = task.noisy_inputs(prepared, timestep, replicate=4)
        drawn = [counter_normal("noise", key, timestep, 4, shape=(4, 8, 8)) for key in prepared.keys]
        noise, clean, sigma = torch.from_numpy(np.stack(drawn)), prepared.clean.double(), timestep / 1000
        sample = (1 - sigma) * clean + sigma * noise
        torch.testing.assert_close(inputs.sample.double(), sample, rtol=0, atol=1e-5)
        torch.testing.assert_close(inputs.target.double(), noise - clean, rtol=0, atol=1e-5)
        # Euler's step from here to sigma 0 along the target is the clean sample
        torch.testing.assert_close(sample - sigma * inputs.target, clean, rtol=0, atol=1e-5)
    assert task.log_snr(250) == pytest.approx(np.log(0.75**2 / 0.25**2))
    assert task.log_snr(1000) == -np.inf
    assert task.timesteps == range(1, 1001)
    with pytest.raises(ValueError, match="timestep: got 0, expected 1 to 1000"):
        task.noisy_inputs(prepared, 0)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [*product(["pixel", "latent", "xl"], ["epsilon", "v_prediction", "sample"]), ("sd3", "flow"), ("flux", "flow")],
)
def test_the_error_of_the_implied_clean_image(name, prediction, request):
    """x0_factor against the clean image worked out of a prediction."""
    task = request.getfixturevalue(name)
    flow = prediction == "flow"
    if not flow:
        scheduler = DDPMScheduler.from_config(task.scheduler.config, prediction_type=prediction)
        task = type(task)(SimpleNamespace(**{**task.pipeline.components, "scheduler": scheduler}))
    rng = torch.Generator().manual_seed(3)
    clean, noise, wrong = torch.randn(3, 2, 4, 8, 8, generator=rng, dtype=torch.float64)
    timestep = 300
    sample = task.noising.add(clean, noise, timestep)
    prediction_error = wrong - task.noising.target(clean, noise, timestep)
    snr = np.exp(task.log_snr(timestep))
    if flow:
        implied = sample - timestep / 1000 * wrong
    else:
        a, s = (snr / (1 + snr)) ** 0.5, (1 / (1 + snr)) ** 0.5
        implied = {"epsilon": (sample - s * wrong) / a, "v_prediction": a * sample - s * wrong, "sample": wrong}[
            prediction
        ]
    expected = (implied - clean).square().mean() / prediction_error.square().mean()
    assert task.x0_factor(timestep) == pytest.approx(float(expected), rel=1e-5)


def test_pipelines_that_are_not_known_are_refused(pixel, latent, sd3):
    with pytest.raises(TypeError, match="pipeline: got object, expected one of: a unet or transformer in pixel space"):
        Task.of(object())
    with pytest.raises(TypeError, match=r"got DiTPipeline \(with scheduler, transformer, vae\), expected one of"):
        Task.of(tiny.dit())
    with pytest.raises(TypeError, match="scheduler: got FlowMatchEulerDiscreteScheduler, expected one with alphas"):
        PixelTask(SimpleNamespace(unet=pixel.denoiser, scheduler=FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(TypeError, match="scheduler: got DDIMScheduler, expected a flow-matching one"):
        Task.of(with_parts(sd3, scheduler=DDIMScheduler()))
    with pytest.raises(ValueError, match="prediction_type: got 'flow_prediction'"):
        Task.of(with_parts(latent, scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction")))
    with pytest.raises(ValueError, match="StableDiffusionControlNetPipeline, whose call takes an image"):
        Task.of(tiny.controlnet())
    with pytest.raises(ValueError, match="whose UNet2DConditionModel takes 9 channels, expected the VAE's 4"):
        Task.of(with_parts(latent, unet=conditional_unet(in_channels=9)))
    # an encoder that the unet isn't made for
    with pytest.raises(TypeError, match="text_encoder_2"):
        Task.of(with_parts(latent, text_encoder_2=object()))


def conditional_unet(in_channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=in_channels,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=32,
    )


def with_parts(task: Task, **parts) -> SimpleNamespace:
    """A stand-in for a pipeline of these parts."""
    components = {**task.pipeline.components, **parts}
    return SimpleNamespace(**components, components=components, encode_prompt=task.pipeline.encode_prompt)


def test_loss_is_the_mean_squared_error_per_item(pixel):
    inputs = pixel.noisy_inputs(pixel.prepare(pictures(3)), 100)
    with torch.inference_mode():
        answer = pixel.denoiser(inputs.sample, torch.full((3,), 100)).sample
        expected = (answer - inputs.target).double().square().flatten(1).mean(1)
        torch.testing.assert_close(pixel.loss(inputs), expected)


def test_a_transformer_that_knows_classes_is_given_none():
    task = Task.of(tiny.pixel_dit())
    assert type(task) is PixelTask
    items = pictures(3)
    prepared = task.prepare(items)
    classes = task.denoiser.config.num_embeds_ada_norm
    assert prepared.conditioning["class_labels"].tolist() == [classes] * 3
    inputs = task.noisy_inputs(prepared, 100)
    with torch.inference_mode():
        labels = torch.full((3,), classes)
        answer = task.denoiser(inputs.sample, torch.full((3,), 100), class_labels=labels).sample
        expected = (answer - inputs.target).double().square().flatten(1).mean(1)
        torch.testing.assert_close(task.loss(inputs), expected)
        # the label is what dropped labels become in training, and differs from every class's
        other = task.denoiser(
            inputs.sample, torch.full((3,), 100), class_labels=torch.zeros(3, dtype=torch.long)
        ).sample
        assert not torch.allclose(answer, other)
    two, one = task.generate(items[:2], steps=3), task.generate(items[1:2], steps=3)
    assert two.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(two[1].astype(int), one[0].astype(int), atol=1)
    kinds = [(site.kind, site.heads) for site in Scope(task.pipeline).sites]
    assert kinds == [("self", 2)] * 2


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_depends_on_the_item_alone(name, request):
    task = request.getfixturevalue(name)
    items = pictures(3)
    together = task.noisy_inputs(task.prepare(items), 250)
    alone = task.noisy_inputs(task.prepare(items[2:]), 250)
    assert torch.allclose(together.sample[2:], alone.sample, atol=1e-5)
    assert not torch.equal(task.noise(task.prepare(items), 250), task.noise(task.prepare(items), 251))
    assert not torch.equal(task.noise(task.prepare(items), 250), task.noise(task.prepare(items), 250, replicate=1))


def test_latent_inputs_are_conditioned_on_the_caption(latent):
    items = pictures(2)
    prepared = latent.prepare(items)
    assert prepared.clean.shape == (2, 4, 8, 8)
    assert prepared.conditioning["encoder_hidden_states"].shape == (2, 77, 32)
    empty = latent.prepare([Picture(item.key, item.image, "") for item in items])
    assert torch.equal(*empty.conditioning["encoder_hidden_states"].chunk(2))
    assert not torch.equal(*prepared.conditioning["encoder_hidden_states"].chunk(2))
    rows = prepared.rows(torch.tensor([1, 1, 0]))
    assert rows.keys == ("test/1", "test/1", "test/0")
    assert torch.equal(rows.clean[0], prepared.clean[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_repeats_and_depends_on_item_and_seed(name, request):
    task = request.getfixturevalue(name)
    items = pictures(2)
    first = task.generate(items, steps=2)
    assert first.shape == (2, 16, 16, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, task.generate(items, steps=2))
    assert not np.array_equal(first, task.generate(items, steps=2, seed=1))
    assert np.abs(task.generate(items[1:], steps=2)[0].astype(int) - first[1]).max() <= 1
    scope = Scope(task.denoiser if name == "pixel" else task.pipeline)
    edits = {site.name: range(site.heads) for site in scope.sites}
    with scope.edit(edits):
        assert not np.array_equal(first, task.generate(items, steps=2))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("xl", {"encoder_hidden_states": (2, 77, 64), "text_embeds": (2, 32), "time_ids": (2, 6)}),
        # CLIP's 77 tokens and zeros in place of T5's 256
        ("sd3", {"encoder_hidden_states": (2, 333, 64), "pooled_projections": (2, 64)}),
        ("flux", {"encoder_hidden_states": (2, 512, 32), "pooled_projections": (2, 32)}),
    ],
)
def test_conditioning_of_several_encoders(name, shapes, request):
    task = request.getfixturevalue(name)
    prepared = task.prepare(pictures(2))
    assert {key: tuple(tensor.shape) for key, tensor in prepared.conditioning.items()} == shapes
    for key, tensor in prepared.conditioning.items():
        assert torch.equal(tensor[0], tensor[1]) == (key == "time_ids"), key
        assert not tensor.is_inference()
    rows = task.noisy_inputs(prepared, 500).rows(torch.tensor([1, 0, 1]))
    with torch.inference_mode():
        together = task.predict(rows)
        alone = task.predict(rows.rows(torch.tensor([0])))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[2], together[0], rtol=1e-4, atol=1e-5)


def test_xl_is_told_the_images_size(xl):
    assert xl.prepare(pictures(1)).conditioning["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


def test_flux_tokens_are_patches_of_the_latents(flux):
    """The transformer sees 2 x 2 latents a token, each at its place; with guidance as an input it is told 1."""
    seen = {}
    task = Task.of(tiny.flux(guidance=True))
    handle = task.denoiser.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    inputs = task.noisy_inputs(task.prepare(pictures(2)), 250)
    with torch.inference_mode():
        task.predict(inputs)
    handle.remove()
    assert seen["hidden_states"].shape == (2, 16, 16)
    # the token of row 1 and column 3: channels x 2 x 2
    expected = inputs.sample[:, :, 2:4, 6:8].flatten(1)
    assert torch.equal(seen["hidden_states"][:, 7], expected)
    assert seen["img_ids"][7].tolist() == [0, 1, 3]
    assert seen["timestep"].tolist() == [0.25, 0.25]
    assert seen["guidance"].tolist() == [1, 1]
    handle = flux.denoiser.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    with torch.inference_mode():
        flux.predict(flux.noisy_inputs(flux.prepare(pictures(1)), 250))
    handle.remove()
    assert seen["guidance"] is None


@pytest.mark.parametrize("name", ["latent", "xl", "sd3", "flux"])
def test_latents_decode_to_the_image_as_the_pipeline_decodes(name, request):
    """The pipeline's own scaling before it decodes takes the task's latents back to the VAE's."""
    task = request.getfixturevalue(name)
    seen = []
    handle = task.pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    items = pictures(2)
    prepared = task.prepare(items)
    pipeline = task.pipeline
    with torch.inference_mode(), one_step_to(task, prepared.clean):
        pipeline([""] * 2, latents=task._packed(prepared.clean), num_inference_steps=1, height=16, width=16)
        handle.remove()
        images = np.stack([item.image for item in items])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        encoded = pipeline.vae.encode(pixels).latent_dist.mode()
        expected = pipeline.vae.post_quant_conv(encoded)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


@contextmanager
def one_step_to(task: Task, latents: torch.Tensor):
    """The pipeline's scheduler leaves the latents as they are."""
    scheduler = task.pipeline.scheduler
    stock = scheduler.step
    scheduler.step = lambda answer, timestep, sample, **options: (sample,)
    try:
        yield
    finally:
        scheduler.step = stock


def test_latents_with_a_mean_and_deviation_of_their_own(xl):
    """As of VAEs that SDXL's pipeline undoes channel by channel."""
    plain = xl.prepare(pictures(1)).clean
    pipeline = tiny.stable_diffusion_xl()
    pipeline.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    found = Task.of(pipeline).prepare(pictures(1)).clean
    scale = pipeline.vae.config.scaling_factor
    mean, deviation = (torch.tensor(values).view(1, 4, 1, 1) for values in ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(found, (plain / scale - mean) * scale / deviation)


@pytest.mark.parametrize("name", ["latent", "xl", "sd3", "flux"])
def test_the_pipeline_is_left_as_it_was(name, request):
    pipeline = request.getfixturevalue(name).pipeline
    pipeline.watermark = mark = SimpleNamespace(apply_watermark=lambda image: 1 / 0)
    before = pipeline.scheduler
    request.getfixturevalue(name).generate(pictures(1), steps=1)
    assert pipeline.scheduler is before
    assert pipeline.watermark is mark
    pipeline.watermark = None


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["pixel", "latent"])
def test_images_that_are_none_are_an_error(name, broken, request):
    """As 8-bit pixels they would be black or white, and as good as any."""
    task = request.getfixturevalue(name)
    last = next(task.pipeline.vae.decoder.parameters() if name == "latent" else task.denoiser.conv_out.parameters())
    with torch.no_grad():
        kept = last.clone()
        last[0] = broken
    try:
        with pytest.raises(ValueError, match=r"generate: the model made NaN or infinite pixels in torch\.float32"):
            task.generate(pictures(1), steps=1)
    finally:
        with torch.no_grad():
            last.copy_(kept)


def test_bad_items_get_one_clear_error(pixel):
    with pytest.raises(ValueError, match="'test/x' has no image"):
        pixel.prepare([Picture("test/x", None)])
    with pytest.raises(ValueError, match=r"\[8, 8, 3\] of uint8, expected \[16, 16, 3\]"):
        pixel.prepare(pictures(1, size=8))
    with pytest.raises(ValueError, match="timestep: got 1000, expected 0 to 999"):
        pixel.noisy_inputs(pixel.prepare(pictures(1)), 1000)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDIMScheduler])
def test_latents_are_clipped_only_where_the_scheduler_says_so(scheduler):
    """DDIM clips the clean image that it predicts to [-1, 1] by default; Euler and DPM-Solver have no such setting."""
    pipeline = tiny.stable_diffusion()
    plain = {name: pipeline.scheduler.config[name] for name in ("beta_schedule", "beta_start", "beta_end")}
    plain |= {"clip_sample": False} if scheduler is DDIMScheduler else {}
    pipeline.scheduler = scheduler(**plain)
    assert not Task.of(pipeline).noising.sampler().config.clip_sample
    pipeline.scheduler = DDIMScheduler(**{**plain, "clip_sample": True})
    assert Task.of(pipeline).noising.sampler().config.clip_sample
