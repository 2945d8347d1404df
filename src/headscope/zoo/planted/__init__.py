"""Planted models: small denoisers whose heads are written by hand, with known truth for what a study names.

Reading order: designs (the heads and the models, as data), noise, weights (the heads' projections), heads and forward
(what they do, in float64, without those), truth, module (the model as one of diffusers, which imports torch and isn't
imported here).
"""

from __future__ import annotations

from typing import Any

from headscope._extras import require
from headscope.zoo.planted.designs import PLANTED, check_name
from headscope.zoo.planted.forward import PlantedForward
from headscope.zoo.planted.heads import PlantedHead
from headscope.zoo.planted.noise import build_scheduler
from headscope.zoo.planted.truth import PlantedPair, PlantedTruth, planted_truth

__all__ = [
    "PLANTED",
    "PlantedForward",
    "PlantedHead",
    "PlantedPair",
    "PlantedTruth",
    "load_planted",
    "planted_truth",
]


def load_planted(name: str) -> Any:
    """A planted model as a diffusers DDPMPipeline, on the CPU, in float32 and evaluation mode.

    name: one of PLANTED. `pipeline.unet.truth` is what its heads do. Raises ValueError for an unknown name.
    """
    check_name(name)
    diffusers = require("diffusers", "diffusers")
    # imported here: the package itself must stay light
    from headscope.zoo.planted.module import PlantedModel

    model = PlantedModel(name).eval().requires_grad_(False)
    pipeline = diffusers.DDPMPipeline(unet=model, scheduler=build_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
