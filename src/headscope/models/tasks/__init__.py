"""A denoiser's inputs, target and scores for an image, the same for every family of pipelines.

Reading order: noising (the noise and the targets, with the formulas of every score), task (what all families share, and
`Task.of`, which finds the family of a pipeline), parts (scores of a part of the image), images, then latent (what
families in a VAE's latent space share) and a file for each family.

A new family is a file with a subclass of `Task` that defines `fits`, and its name here: all else follows from these.
"""

from headscope.models.tasks.latent import LatentTask
from headscope.models.tasks.noising import Diffusion, FlowMatching, Noising
from headscope.models.tasks.parts import part_means
from headscope.models.tasks.task import NoisyInputs, Prepared, Task, TaskItem

# the families, in the order in which errors list them
# isort: off
from headscope.models.tasks.pixel import PixelTask
from headscope.models.tasks.stable_diffusion import StableDiffusionTask
from headscope.models.tasks.stable_diffusion_xl import StableDiffusionXLTask
from headscope.models.tasks.stable_diffusion_3 import StableDiffusion3Task
from headscope.models.tasks.flux import FluxTask
# isort: on

__all__ = [
    "Diffusion",
    "FlowMatching",
    "FluxTask",
    "LatentTask",
    "Noising",
    "NoisyInputs",
    "PixelTask",
    "Prepared",
    "StableDiffusion3Task",
    "StableDiffusionTask",
    "StableDiffusionXLTask",
    "Task",
    "TaskItem",
    "part_means",
]
