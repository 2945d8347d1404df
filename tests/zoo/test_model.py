"""The bundled model: its form, its weights, and the errors when they are missing or don't fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headscope import zoo
from headscope.zoo import model as zoo_model

WEIGHTS = Path(zoo_model.__file__).parent / "weights"


def test_architecture():
    model = zoo_model.build_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_611_923
    attention = [module for module in model.modules() if type(module).__name__ == "Attention"]
    assert [module.heads for module in attention] == [8] * 7
    assert zoo_model.build_scheduler().config.prediction_type == "epsilon"


def test_bundled_weights_are_small_and_half_precision():
    file = WEIGHTS / "model.safetensors"
    assert file.stat().st_size < 10_000_000
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    assert (WEIGHTS / "MODEL_CARD.md").exists()


def test_bundled_pipeline_denoises():
    pipeline = zoo.load_pipeline()
    assert not pipeline.unet.training
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.float32}
    group = zoo.open_group("faces")
    index = group.indices("discover")[0]
    image = torch.from_numpy(group.item(index).image).permute(2, 0, 1)[None].float() / 127.5 - 1
    noise = torch.from_numpy(zoo.counter_normal("test", shape=image.shape)).float()
    timestep = torch.tensor([500])
    noisy = pipeline.scheduler.add_noise(image, noise, timestep)
    with torch.no_grad():
        prediction = pipeline.unet(noisy, timestep).sample
    # predicting nothing gives 1
    assert float((prediction - noise).square().mean()) < 0.06


def test_bundled_pipeline_samples():
    generator = torch.Generator().manual_seed(0)
    result = zoo.load_pipeline()(batch_size=2, num_inference_steps=4, generator=generator, output_type="np")
    assert result.images.shape == (2, 32, 32, 3)


def test_a_folder_without_the_model_is_an_error(tmp_path):
    expected = r"path: '.*' lacks unet/config.json, scheduler/config.json, model.safetensors, expected a folder"
    with pytest.raises(FileNotFoundError, match=expected):
        zoo.load_pipeline(tmp_path)


def test_weights_of_another_model_are_an_error(tmp_path):
    for part in ("unet", "scheduler"):
        (tmp_path / part).mkdir()
    zoo_model.build_model().save_config(tmp_path / "unet")
    zoo_model.build_scheduler().save_config(tmp_path / "scheduler")
    (tmp_path / "scheduler" / "scheduler_config.json").rename(tmp_path / "scheduler" / "config.json")
    save_file({"unknown": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"the weights in '.*' don't fit unet/config.json"):
        zoo.load_pipeline(tmp_path)
