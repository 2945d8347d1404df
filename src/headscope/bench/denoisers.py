"""The denoisers that are measured: real configurations for a GPU, small stand-ins for a CPU; random weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headscope._extras import require
from headscope.bench import configurations

_NO_ENCODERS = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


@dataclass(frozen=True)
class Denoiser:
    """A denoiser, ready to run.

    Attributes:
        model: the UNet or transformer.
        arguments: the model's, for one denoising step.
        step: one denoising step of `images` images, without guidance.
        pipeline: the diffusers pipeline around it.
        sample: a whole call of the pipeline, `steps` steps, decoded where it has a decoder.
        images: how many images a step and a call make.
        description: its size and inputs.
    """

    model: nn.Module
    arguments: dict[str, Any]
    step: Callable[[], object]
    pipeline: Any
    sample: Callable[[], object]
    images: int
    steps: int
    description: str


def bundled(full: bool, device: str, dtype: torch.dtype) -> Denoiser:
    """The zoo's model, as it is."""
    from headscope.zoo import load_pipeline

    pipeline = load_pipeline("unet")
    images, steps = (256, 20) if full else (4, 2)
    config = pipeline.unet.config
    built = configurations.Configuration(
        pipeline.unet, (config.in_channels, config.sample_size, config.sample_size), lambda rows: {}
    )
    call = {"batch_size": images}
    return _assembled(pipeline, pipeline.unet, built.inputs(images), call, images, steps, device, dtype)


def sd15(full: bool, device: str, dtype: torch.dtype) -> Denoiser:
    """Stable Diffusion 1.5."""
    diffusers = require("diffusers", "diffusers")
    built = configurations.sd15(configurations.FULL if full else configurations.SMALL)
    pipeline = diffusers.StableDiffusionPipeline(
        unet=built.model,
        vae=_decoder(full),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        requires_safety_checker=False,
        **dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor")),
    )
    images, steps = (8, 20) if full else (2, 2)
    inputs = built.inputs(images)
    text = inputs["encoder_hidden_states"]
    call = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
    return _assembled(pipeline, built.model, inputs, call, images, steps, device, dtype)


def sdxl(full: bool, device: str, dtype: torch.dtype) -> Denoiser:
    """Stable Diffusion XL."""
    diffusers = require("diffusers", "diffusers")
    built = configurations.sdxl(configurations.FULL if full else configurations.SMALL)
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=built.model,
        vae=_decoder(full),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
        **_NO_ENCODERS,
    )
    images, steps = (2, 20) if full else (2, 2)
    inputs = built.inputs(images)
    text, pooled = inputs["encoder_hidden_states"], inputs["added_cond_kwargs"]["text_embeds"]
    call = {
        "prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": torch.zeros_like(text),
        "negative_pooled_prompt_embeds": torch.zeros_like(pooled),
    }
    return _assembled(pipeline, built.model, inputs, call, images, steps, device, dtype)


def flux(full: bool, device: str, dtype: torch.dtype) -> Denoiser:
    """Flux.1-dev."""
    diffusers = require("diffusers", "diffusers")
    built = configurations.flux(configurations.FULL if full else configurations.SMALL)
    images, steps = (1, 20) if full else (2, 2)
    inputs = built.inputs(images)
    tokens, channels = built.sample
    pixels = 2 * math.isqrt(tokens) * (8 if full else 2)
    pipeline = diffusers.FluxPipeline(
        transformer=built.model,
        vae=_decoder(full, channels // 4, pixels),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **_NO_ENCODERS,
    )
    text, pooled = inputs["encoder_hidden_states"], inputs["pooled_projections"]
    call = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "height": pixels, "width": pixels}
    return _assembled(pipeline, built.model, inputs, call, images, steps, device, dtype)


DENOISERS: dict[str, Callable[[bool, str, torch.dtype], Denoiser]] = {
    "bundled": bundled,
    "sd15": sd15,
    "sdxl": sdxl,
    "flux": flux,
}


def _decoder(full: bool, latent_channels: int = 4, pixels: int = 32) -> Any:
    diffusers = require("diffusers", "diffusers")
    widths = (128, 256, 512, 512) if full else (8, 16)
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2 if full else 1,
        latent_channels=latent_channels,
        norm_num_groups=32 if full else 4,
        # Flux's images have this edge unless told otherwise
        sample_size=pixels,
        shift_factor=0.0,
    )


def _assembled(
    pipeline: Any,
    model: nn.Module,
    inputs: dict[str, Any],
    call: dict[str, Any],
    images: int,
    steps: int,
    device: str,
    dtype: torch.dtype,
) -> Denoiser:
    pipeline.to(device)
    if dtype != torch.float32:
        pipeline.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    model.eval().requires_grad_(False)
    inputs, call = (_moved(values, device, dtype) for values in (inputs, call))
    arguments = {**inputs, "return_dict": False}

    def step() -> object:
        with torch.inference_mode():
            return model(**arguments)

    def whole() -> object:
        return pipeline(num_inference_steps=steps, output_type="pt", **call)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    noisy = next(iter(inputs.values()))
    description = f"{parameters / 1e6:.1f} M parameters, input {tuple(noisy.shape)}, calls of {steps} steps"
    return Denoiser(model, arguments, step, pipeline, whole, images, steps, description)


def _moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype)
    return {name: _moved(entry, device, dtype) for name, entry in value.items()} if isinstance(value, dict) else value
