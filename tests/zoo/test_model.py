"""The bundled models: their form, its weights, and the errors when they are missing or don't fit."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headscope import zoo
from headscope.models import Scope, Task
from headscope.zoo import model as zoo_model
from headscope.zoo.train import TrainConfig, _State

WEIGHTS = Path(zoo_model.__file__).parent / "weights"


@pytest.mark.parametrize(("name", "parameters", "sites"), [("pixeldit", 2_124_464, 6), ("unet", 2_611_923, 7)])
def test_architecture(name, parameters, sites):
    model = zoo.MODELS[name].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    attention = [module for module in model.modules() if type(module).__name__ == "Attention"]
    assert [module.heads for module in attention] == [8] * sites
    assert zoo_model.build_scheduler().config.prediction_type == "epsilon"


def test_the_untrained_transformer_answers_with_its_input():
    bundled = zoo.MODELS["pixeldit"]
    images = torch.from_numpy(zoo.counter_normal("test", shape=(2, 3, 32, 32))).float()
    with torch.no_grad():
        answer = bundled.denoise(bundled.build().eval(), images, torch.tensor([10, 900]))
    scale = (answer * images).sum((1, 2, 3)) / images.square().sum((1, 2, 3))
    # the last layer norm divides each patch by its own size
    assert (answer / scale[:, None, None, None] - images).square().mean() < 0.05
    assert (scale > 0.5).all()


@pytest.mark.parametrize("name", zoo.MODELS)
def test_untrained_weights_are_those_that_training_begins_with(name, tmp_path):
    before = torch.get_rng_state()
    pipeline, bundled = zoo.load_pipeline(f"untrained:{name}"), zoo.MODELS[name]
    assert torch.equal(torch.get_rng_state(), before)
    denoiser = getattr(pipeline, bundled.part)
    assert not denoiser.training
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    # no step of a run of the default seed
    config = TrainConfig(tmp_path, model=name, steps=1)
    began = _State(config).model.state_dict()
    assert began.keys() == denoiser.state_dict().keys()
    for key, tensor in denoiser.state_dict().items():
        torch.testing.assert_close(tensor, began[key], rtol=0, atol=0)
    trained = zoo.load_pipeline(name)
    noising, expected = (
        {key: value for key, value in one.scheduler.config.items() if not key.startswith("_")}
        for one in (pipeline, trained)
    )
    assert noising == expected
    shapes = {key: tensor.shape for key, tensor in getattr(trained, bundled.part).state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in denoiser.state_dict().items()}
    assert any(
        not torch.equal(tensor, denoiser.state_dict()[key])
        for key, tensor in getattr(trained, bundled.part).state_dict().items()
    )


def test_removing_heads_of_the_untrained_transformer_changes_nothing():
    """Its blocks begin as the identity, so its losses say nothing of heads; its entropies do."""
    task = Task.of(zoo.load_pipeline("untrained:pixeldit"))
    scope = Scope(task.denoiser)
    inputs = task.noisy_inputs(task.prepare([zoo.open_group("lfw").item(3)]), 500)
    with torch.inference_mode():
        with scope.record("entropy") as recording:
            clean = task.predict(inputs)
        with scope.edit({site.name: range(8) for site in scope.sites}):
            edited = task.predict(inputs)
    assert torch.equal(clean, edited)
    entropy = recording.to_polars()["entropy_mean"]
    assert ((entropy > 0) & (entropy < math.log(64))).all()
    assert entropy.n_unique() == 48


@pytest.mark.parametrize("name", zoo.MODELS)
def test_bundled_weights_are_small_and_half_precision(name):
    file = WEIGHTS / name / "model.safetensors"
    assert file.stat().st_size < 10_000_000
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    assert (WEIGHTS / name / "MODEL_CARD.md").exists()


@pytest.mark.parametrize("name", zoo.MODELS)
def test_bundled_pipeline_denoises(name):
    pipeline, bundled = zoo.load_pipeline(name), zoo.MODELS[name]
    denoiser = getattr(pipeline, bundled.part)
    assert not denoiser.training
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float32}
    group = zoo.open_group("faces")
    index = group.indices("discover")[0]
    image = torch.from_numpy(group.item(index).image).permute(2, 0, 1)[None].float() / 127.5 - 1
    noise = torch.from_numpy(zoo.counter_normal("test", shape=image.shape)).float()
    timestep = torch.tensor([500])
    noisy = pipeline.scheduler.add_noise(image, noise, timestep)
    with torch.no_grad():
        prediction = bundled.denoise(denoiser, noisy, timestep)
    # predicting nothing gives 1
    assert float((prediction - noise).square().mean()) < 0.06


@pytest.mark.parametrize("name", zoo.MODELS)
def test_bundled_pipeline_samples(name):
    generator = torch.Generator().manual_seed(0)
    result = zoo.load_pipeline(name)(batch_size=2, num_inference_steps=4, generator=generator, output_type="np")
    assert result.images.shape == (2, 32, 32, 3)


def test_a_folder_without_the_model_is_an_error(tmp_path):
    expected = r"model: '.*' lacks transformer/config.json, scheduler/config.json, model.safetensors, expected a folder"
    with pytest.raises(FileNotFoundError, match=expected):
        zoo.load_pipeline(tmp_path)
    with pytest.raises(
        ValueError, match=r"model: got 'vit', expected one of pixeldit, unet, .* or an exported model's"
    ):
        zoo.load_pipeline("vit")


def test_weights_of_another_model_are_an_error(tmp_path):
    for part in ("unet", "scheduler"):
        (tmp_path / part).mkdir()
    zoo.MODELS["unet"].build().save_config(tmp_path / "unet")
    zoo_model.build_scheduler().save_config(tmp_path / "scheduler")
    (tmp_path / "scheduler" / "scheduler_config.json").rename(tmp_path / "scheduler" / "config.json")
    save_file({"unknown": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"the weights in '.*' don't fit unet/config.json"):
        zoo.load_pipeline(tmp_path)
