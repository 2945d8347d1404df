"""The denoisers that are measured: real configurations for a GPU, small stand-ins for a CPU; random weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headscope._extras import require


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

    pipeline = load_pipeline()
    images, steps = (256, 20) if full else (4, 2)
    return _assembled(pipeline, pipeline.unet, {}, {"batch_size": images}, images, steps, device, dtype)


def sd15(full: bool, device: str, dtype: torch.dtype) -> Denoiser:
    """Stable Diffusion 1.5's UNet at 512 px; the stand-in is a tenth as wide, on 32 x 32 latents."""
    diffusers = require("diffusers", "diffusers")
    small = {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 1, "norm_num_groups": 16}
    # attention_head_dim is the number of heads there: 8 at every size
    unet = diffusers.UNet2DConditionModel(
        sample_size=64 if full else 32, cross_attention_dim=768 if full else 96, **({} if full else small)
    )
    pipeline = diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=_decoder(full),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    images, steps = (8, 20) if full else (2, 2)
    width = unet.config.cross_attention_dim
    conditioning = {"encoder_hidden_states": torch.randn(images, 77, width)}
    call = {
        "prompt_embeds": conditioning["encoder_hidden_states"],
        "negative_prompt_embeds": torch.zeros(images, 77, width),
    }
    return _assembled(pipeline, unet, conditioning, call, images, steps, device, dtype)


def sdxl(full: bool, device: str, dtype: torch.dtype) -> Denoiser:
    """SDXL's UNet at 1024 px; the stand-in is a tenth as wide, on 32 x 32 latents."""
    diffusers = require("diffusers", "diffusers")
    sizes = (
        {"block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10)}
        if full
        else {"block_out_channels": (32, 64, 128), "transformer_layers_per_block": (1, 2, 4), "norm_num_groups": 16}
    )
    width, pooled, ids = (2048, 1280, 256) if full else (96, 64, 8)
    unet = diffusers.UNet2DConditionModel(
        sample_size=128 if full else 32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        # the number of heads, as above: 64 channels each, 16 in the stand-in
        attention_head_dim=(5, 10, 20) if full else (2, 4, 8),
        cross_attention_dim=width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=ids,
        projection_class_embeddings_input_dim=pooled + 6 * ids,
        **sizes,
    )
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=_decoder(full),
        scheduler=diffusers.EulerDiscreteScheduler(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )
    images, steps = (2, 20) if full else (2, 2)
    text = torch.randn(images, 77, width)
    conditioning = {
        "encoder_hidden_states": text,
        "added_cond_kwargs": {"text_embeds": torch.randn(images, pooled), "time_ids": torch.ones(images, 6)},
    }
    call = {
        "prompt_embeds": text,
        "pooled_prompt_embeds": torch.randn(images, pooled),
        "negative_prompt_embeds": torch.zeros(images, 77, width),
        "negative_pooled_prompt_embeds": torch.zeros(images, pooled),
    }
    return _assembled(pipeline, unet, conditioning, call, images, steps, device, dtype)


def flux(full: bool, device: str, dtype: torch.dtype) -> Denoiser:
    """Flux.1-dev's transformer at 1024 px; the stand-in has 6 of its 57 blocks, a 24th as wide, 16 x 16 tokens."""
    diffusers = require("diffusers", "diffusers")
    small = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 96,
        "pooled_projection_dim": 64,
        "axes_dims_rope": (4, 14, 14),
    }
    transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True, **({} if full else small))
    config = transformer.config
    pipeline = diffusers.FluxPipeline(
        transformer=transformer,
        vae=_decoder(full, config.in_channels // 4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    images, steps = (1, 20) if full else (2, 2)
    side, tokens = (64, 512) if full else (16, 64)
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)
    text, pooled = (
        torch.randn(images, tokens, config.joint_attention_dim),
        torch.randn(images, config.pooled_projection_dim),
    )
    conditioning = {
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(tokens, 3),
        "guidance": torch.full((images,), 3.5),
    }
    pixels = side * 2 * pipeline.vae_scale_factor
    call = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "height": pixels, "width": pixels}
    return _assembled(
        pipeline, transformer, conditioning, call, images, steps, device, dtype, sample=(side**2, config.in_channels)
    )


DENOISERS: dict[str, Callable[[bool, str, torch.dtype], Denoiser]] = {
    "bundled": bundled,
    "sd15": sd15,
    "sdxl": sdxl,
    "flux": flux,
}


def _decoder(full: bool, latent_channels: int = 4) -> Any:
    diffusers = require("diffusers", "diffusers")
    widths = (128, 256, 512, 512) if full else (8, 16)
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2 if full else 1,
        latent_channels=latent_channels,
        norm_num_groups=32 if full else 4,
        shift_factor=0.0,
    )


def _assembled(
    pipeline: Any,
    model: nn.Module,
    conditioning: dict[str, Any],
    call: dict[str, Any],
    images: int,
    steps: int,
    device: str,
    dtype: torch.dtype,
    sample: tuple[int, ...] | None = None,
) -> Denoiser:
    pipeline.to(device)
    if dtype != torch.float32:
        pipeline.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    model.eval().requires_grad_(False)
    config = model.config
    shape = sample or (config.in_channels, config.sample_size, config.sample_size)
    noisy = torch.randn(images, *shape, device=device, dtype=dtype)
    timestep = torch.full((images,), 500.0, device=device, dtype=dtype)
    conditioning, call = (_moved(values, device, dtype) for values in (conditioning, call))

    first = list(inspect.signature(type(model).forward).parameters)[1]
    arguments = {first: noisy, "timestep": timestep, "return_dict": False, **conditioning}

    def step() -> object:
        with torch.inference_mode():
            return model(**arguments)

    def whole() -> object:
        return pipeline(num_inference_steps=steps, output_type="pt", **call)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    description = f"{parameters / 1e6:.1f} M parameters, input {tuple(noisy.shape)}, calls of {steps} steps"
    return Denoiser(model, arguments, step, pipeline, whole, images, steps, description)


def _moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype)
    return {name: _moved(entry, device, dtype) for name, entry in value.items()} if isinstance(value, dict) else value
