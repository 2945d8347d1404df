"""The diffusion models that benchmarks build, with random weights: their sizes, and the inputs of a forward.

Each comes in three sizes: FULL is the published one, DEEP has all of its modules and a fraction of its width, so
that its calls come in the order of the real one's, SMALL runs in a moment on a CPU. They are built on
whatever device torch has as its default, the meta device included.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headscope._extras import require

FULL, DEEP, SMALL = "full", "deep", "small"


@dataclass(frozen=True)
class Configuration:
    """A model of one size.

    Attributes:
        model: the UNet or transformer.
        sample: the shape of one noisy input.
        conditioning: the model's further inputs beside the timestep, for a number of rows.
        timestep: one that it was trained at, in the model's own units.
    """

    model: nn.Module
    sample: tuple[int, ...]
    conditioning: Callable[[int], dict[str, Any]]
    timestep: float = 500.0

    def inputs(self, rows: int) -> dict[str, Any]:
        """The model's arguments for a number of rows."""
        first = list(inspect.signature(type(self.model).forward).parameters)[1]
        noisy = torch.randn(rows, *self.sample)
        return {first: noisy, "timestep": torch.full((rows,), self.timestep), **self.conditioning(rows)}


def sd15(size: str) -> Configuration:
    """Stable Diffusion 1.5's UNet at 512 px; small, a tenth as wide, on 32 x 32 latents."""
    # attention_head_dim is the number of heads there: 8 at every size
    options = {
        FULL: {"sample_size": 64, "cross_attention_dim": 768},
        DEEP: {
            "sample_size": 8,
            "cross_attention_dim": 16,
            "block_out_channels": (16, 32, 64, 64),
            "norm_num_groups": 4,
        },
        SMALL: {
            "sample_size": 32,
            "cross_attention_dim": 96,
            "norm_num_groups": 16,
            "block_out_channels": (32, 64, 128, 128),
            "layers_per_block": 1,
        },
    }
    unet = _diffusers().UNet2DConditionModel(**options[size])
    return Configuration(unet, _latents(unet), lambda rows: {"encoder_hidden_states": _text(unet, rows)})


def sdxl(size: str) -> Configuration:
    """SDXL's UNet at 1024 px; small, a tenth as wide, on 32 x 32 latents."""
    # the number of heads again: 64 channels each, 16 in the small one
    options = {
        FULL: {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
        },
        DEEP: {
            "sample_size": 16,
            "cross_attention_dim": 16,
            "block_out_channels": (20, 40, 80),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "norm_num_groups": 4,
        },
        SMALL: {
            "sample_size": 32,
            "cross_attention_dim": 96,
            "block_out_channels": (32, 64, 128),
            "transformer_layers_per_block": (1, 2, 4),
            "attention_head_dim": (2, 4, 8),
            "norm_num_groups": 16,
        },
    }
    pooled, ids = {FULL: (1280, 256), DEEP: (16, 4), SMALL: (64, 8)}[size]
    unet = _diffusers().UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=ids,
        projection_class_embeddings_input_dim=pooled + 6 * ids,
        **options[size],
    )

    def conditioning(rows: int) -> dict[str, Any]:
        added = {"text_embeds": torch.randn(rows, pooled), "time_ids": torch.ones(rows, 6)}
        return {"encoder_hidden_states": _text(unet, rows), "added_cond_kwargs": added}

    return Configuration(unet, _latents(unet), conditioning)


def sd3(size: str) -> Configuration:
    """Stable Diffusion 3 medium's transformer at 1024 px; small is the deep one."""
    narrow = {
        "sample_size": 8,
        "pos_embed_max_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 48,
        "pooled_projection_dim": 16,
    }
    real = {
        "sample_size": 128,
        "pos_embed_max_size": 192,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
    }
    transformer = _diffusers().SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, patch_size=2, **(real if size == FULL else narrow)
    )
    config = transformer.config
    text = 333 if size == FULL else 5

    def conditioning(rows: int) -> dict[str, Any]:
        pooled = torch.randn(rows, config.pooled_projection_dim)
        return {
            "encoder_hidden_states": torch.randn(rows, text, config.joint_attention_dim),
            "pooled_projections": pooled,
        }

    return Configuration(transformer, _latents(transformer), conditioning)


def flux(size: str) -> Configuration:
    """Flux.1-dev's transformer at 1024 px; small has 6 of its 57 blocks, a 24th as wide, 16 x 16 tokens."""
    options = {
        FULL: {},
        DEEP: {
            "in_channels": 4,
            "attention_head_dim": 8,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (2, 2, 4),
        },
        SMALL: {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 96,
            "pooled_projection_dim": 64,
            "axes_dims_rope": (4, 14, 14),
        },
    }
    transformer = _diffusers().FluxTransformer2DModel(guidance_embeds=True, **options[size])
    config = transformer.config
    side, text = {FULL: (64, 512), DEEP: (4, 5), SMALL: (16, 64)}[size]

    def conditioning(rows: int) -> dict[str, Any]:
        places = torch.zeros(side, side, 3)
        places[..., 1], places[..., 2] = torch.arange(side)[:, None], torch.arange(side)
        return {
            "encoder_hidden_states": torch.randn(rows, text, config.joint_attention_dim),
            "pooled_projections": torch.randn(rows, config.pooled_projection_dim),
            "img_ids": places.flatten(0, 1),
            "txt_ids": torch.zeros(text, 3),
            "guidance": torch.full((rows,), 3.5),
        }

    return Configuration(transformer, (side**2, config.in_channels), conditioning, timestep=0.5)


CONFIGURATIONS: dict[str, Callable[[str], Configuration]] = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def _diffusers() -> Any:
    return require("diffusers", "diffusers")


def _latents(model: Any) -> tuple[int, int, int]:
    return (model.config.in_channels, model.config.sample_size, model.config.sample_size)


def _text(unet: Any, rows: int) -> torch.Tensor:
    """Random text embeddings of the shape of CLIP's, [rows, 77, dim]."""
    return torch.randn(rows, 77, unet.config.cross_attention_dim)
