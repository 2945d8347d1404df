"""The bundled demonstration model: a small unconditional diffusion model with 8 heads at each of 7 attention sites."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from headscope._extras import require
from headscope._files import local_path

__all__ = ["SCHEDULER_CONFIG", "UNET_CONFIG", "build_model", "build_scheduler", "load_pipeline"]

# 96 channels in heads of 12: 8 heads, at 16 x 16 and at 8 x 8
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [48, 96, 96],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 12,
    "dropout": 0.1,
}

# the cosine schedule: a linear one destroys images as small as these in its first half
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "clip_sample": True,
}


def build_model() -> Any:
    """An untrained diffusers UNet2DModel in float32: images [batch, 3, 32, 32] in, noise of the same shape out."""
    return require("diffusers", "study").UNet2DModel(**UNET_CONFIG)


def build_scheduler() -> Any:
    """The diffusers DDPMScheduler that the model is trained under."""
    return require("diffusers", "study").DDPMScheduler(**SCHEDULER_CONFIG)


def load_pipeline(path: str | Path | None = None) -> Any:
    """The bundled model as a diffusers DDPMPipeline, on the CPU, in float32 and evaluation mode.

    path: a folder that `headscope train` exported (model.safetensors, unet/config.json, scheduler/config.json);
    None is the one in the package. The stored weights are half precision. Raises FileNotFoundError naming what is
    missing, ValueError when the weights don't belong to the configuration.
    """
    # imported here: the package itself must stay light
    from safetensors.torch import load_file

    diffusers = require("diffusers", "study")
    folder = Path(str(files("headscope.zoo"))) / "weights" if path is None else local_path("path", path)
    parts = {name: folder / name for name in ("unet/config.json", "scheduler/config.json", "model.safetensors")}
    missing = [name for name, file in parts.items() if not file.is_file()]
    if missing:
        where = "the installed package" if path is None else repr(str(path))
        raise FileNotFoundError(
            f"path: {where} lacks {', '.join(missing)}, expected a folder that headscope.zoo.train.export wrote"
        )
    model = diffusers.UNet2DModel.from_config(json.loads(parts["unet/config.json"].read_text()))
    weights = {name: tensor.float() for name, tensor in load_file(parts["model.safetensors"]).items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"path: the weights in {str(folder)!r} don't fit unet/config.json: {error}") from error
    model.eval().requires_grad_(False)
    scheduler = diffusers.DDPMScheduler.from_config(json.loads(parts["scheduler/config.json"].read_text()))
    pipeline = diffusers.DDPMPipeline(unet=model, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
