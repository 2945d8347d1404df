"""The bundled models by name, as pipelines."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from headscope._extras import require
from headscope._files import local_path
from headscope.zoo.model import DEFAULT_MODEL, MODELS, BundledModel, build_scheduler
from headscope.zoo.planted import PLANTED, load_planted

__all__ = ["BUNDLED", "load_pipeline"]

_PLANTED = {f"planted:{name}": name for name in PLANTED}
_UNTRAINED = {f"untrained:{name}": model for name, model in MODELS.items()}
# of untrained weights, as of a training that isn't told otherwise
_UNTRAINED_SEED = 0
# what load_pipeline and sweeps know by name
BUNDLED: tuple[str, ...] = (*MODELS, *_PLANTED, *_UNTRAINED)


def load_pipeline(model: str | Path = DEFAULT_MODEL) -> Any:
    """A bundled model as a diffusers pipeline, on the CPU, in float32 and evaluation mode.

    model: a bundled model's name ("pixeldit", "unet", or as in "planted:roles" one of `headscope.zoo.planted`),
    "untrained:pixeldit" or "untrained:unet" for one with the weights that its training began from, or a folder that
    `headscope train` exported (model.safetensors, unet/ or transformer/config.json, scheduler/config.json). The stored
    weights are half precision.

    Raises ValueError for what is neither, or when the weights don't belong to the configuration, and FileNotFoundError
    naming what is missing.
    """
    if str(model) in _PLANTED:
        return load_planted(_PLANTED[str(model)])
    if str(model) in _UNTRAINED:
        return _untrained(_UNTRAINED[str(model)])
    # imported here: the package itself must stay light
    from safetensors.torch import load_file

    diffusers = require("diffusers", "study")
    bundled = str(model) in MODELS
    folder = Path(str(files("headscope.zoo"))) / "weights" / str(model) if bundled else local_path("model", model)
    if not folder.is_dir():
        raise ValueError(
            f"model: got {str(model)!r}, expected one of {', '.join(BUNDLED)} or an exported model's folder"
        )
    spec = next((known for known in MODELS.values() if (folder / known.part).is_dir()), MODELS[DEFAULT_MODEL])
    parts = {name: folder / name for name in (f"{spec.part}/config.json", "scheduler/config.json", "model.safetensors")}
    missing = [name for name, file in parts.items() if not file.is_file()]
    if missing:
        where = "the installed package" if bundled else repr(str(model))
        raise FileNotFoundError(
            f"model: {where} lacks {', '.join(missing)}, expected a folder that headscope.zoo.card.export wrote"
        )
    settings, scheduling, _ = (
        json.loads(file.read_text()) if file.suffix == ".json" else None for file in parts.values()
    )
    denoiser = getattr(diffusers, spec.class_name).from_config(settings)
    weights = {name: tensor.float() for name, tensor in load_file(parts["model.safetensors"]).items()}
    try:
        denoiser.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"model: the weights in {str(folder)!r} don't fit {spec.part}/config.json: {error}") from error
    return _pipeline(spec.part, denoiser, diffusers.DDPMScheduler.from_config(scheduling))


def _untrained(spec: BundledModel) -> Any:
    """A bundled model as its training begins, from torch's CPU generator, whose state stays as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_UNTRAINED_SEED)
        denoiser = spec.build()
    return _pipeline(spec.part, denoiser, build_scheduler())


def _pipeline(part: str, denoiser: Any, scheduler: Any) -> Any:
    denoiser.eval().requires_grad_(False)
    if part == "unet":
        pipeline = require("diffusers", "study").DDPMPipeline(unet=denoiser, scheduler=scheduler)
    else:
        from headscope.zoo.pixel_pipeline import PixelDiTPipeline

        pipeline = PixelDiTPipeline(denoiser, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
