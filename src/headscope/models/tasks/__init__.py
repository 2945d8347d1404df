"""What a denoiser is asked to do with an image: inputs, target and scores, for every family alike.

Reading order: noising (what a model was taught, with the formulas of every score), task (what all families share),
images, pixel, latent and a file for each family of it, families (which one a pipeline belongs to).
"""

from headscope.models.tasks.flux import FluxTask
from headscope.models.tasks.latent import LatentTask
from headscope.models.tasks.noising import Diffusion, FlowMatching, Noising
from headscope.models.tasks.pixel import PixelTask
from headscope.models.tasks.stable_diffusion import StableDiffusionTask
from headscope.models.tasks.stable_diffusion_3 import StableDiffusion3Task
from headscope.models.tasks.stable_diffusion_xl import StableDiffusionXLTask
from headscope.models.tasks.task import NoisyInputs, Prepared, Task, TaskItem

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
]
