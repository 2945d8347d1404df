"""Tasks: the scheduler's own target, noise that depends on the item alone, generation that starts alike."""

from dataclasses import dataclass
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
    UniPCMultistepScheduler,
)

import tiny
from headscope.models import LatentTask, PixelTask, Scope, Task
from headscope.zoo import counter_normal


@dataclass(frozen=True)
class Picture:
    key: str
    image: np.ndarray | None
    caption: str = ""


def pictures(count: int, size: int = 16) -> list[Picture]:
    rng = np.random.default_rng(0)
    return [Picture(f"test/{i}", rng.integers(0, 256, (size, size, 3), np.uint8), f"picture {i}") for i in range(count)]


@pytest.fixture(scope="module")
def pixel():
    return Task.of(tiny.ddpm())


@pytest.fixture(scope="module")
def latent():
    return Task.of(tiny.stable_diffusion())


def test_the_fitting_task_is_found(pixel, latent):
    assert type(pixel) is PixelTask
    assert type(latent) is LatentTask
    with pytest.raises(TypeError, match="pipeline: got object"):
        Task.of(object())


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


def test_pipelines_that_are_not_known_are_refused(pixel, latent):
    with pytest.raises(TypeError, match="scheduler: got FlowMatchEulerDiscreteScheduler"):
        PixelTask(SimpleNamespace(unet=pixel.denoiser, scheduler=FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(TypeError, match="two text encoders"):
        Task.of(SimpleNamespace(**latent.pipeline.components, text_encoder_2=object()))


def test_loss_is_the_mean_squared_error_per_item(pixel):
    inputs = pixel.noisy_inputs(pixel.prepare(pictures(3)), 100)
    with torch.inference_mode():
        answer = pixel.denoiser(inputs.sample, torch.full((3,), 100)).sample
        expected = (answer - inputs.target).double().square().flatten(1).mean(1)
        torch.testing.assert_close(pixel.loss(inputs), expected)


@pytest.mark.parametrize("name", ["pixel", "latent"])
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


@pytest.mark.parametrize("name", ["pixel", "latent"])
def test_generation_repeats_and_depends_on_item_and_seed(name, request):
    task = request.getfixturevalue(name)
    items = pictures(2)
    first = task.generate(items, steps=2)
    assert first.shape == (2, 16, 16, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, task.generate(items, steps=2))
    assert not np.array_equal(first, task.generate(items, steps=2, seed=1))
    assert np.abs(task.generate(items[1:], steps=2)[0].astype(int) - first[1]).max() <= 1
    scope = Scope(task.pipeline if name == "latent" else task.denoiser)
    edits = {site.name: range(site.heads) for site in scope.sites}
    with scope.edit(edits):
        assert not np.array_equal(first, task.generate(items, steps=2))


def test_the_pipeline_keeps_its_scheduler(latent):
    before = latent.pipeline.scheduler
    latent.generate(pictures(1), steps=1)
    assert latent.pipeline.scheduler is before


def test_bad_items_get_one_clear_error(pixel):
    with pytest.raises(ValueError, match="'test/x' has no image"):
        pixel.prepare([Picture("test/x", None)])
    with pytest.raises(ValueError, match=r"\[8, 8, 3\] of uint8, expected \[16, 16, 3\]"):
        pixel.prepare(pictures(1, size=8))
    with pytest.raises(ValueError, match="timestep: got 1000, expected 0 to 999"):
        pixel.noisy_inputs(pixel.prepare(pictures(1)), 1000)
