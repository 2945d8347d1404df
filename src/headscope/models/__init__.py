"""diffusers models: attention sites, recording, edits, tasks and the drop-in attention processor.

Reading order: sites (where attention is), layout (what its tokens are), routing and wrapping (how it is reached),
forwards (when it ran), scope (the contexts), recording, tensors and tables (what they keep), editing, processor (the
drop-in), tasks (what a model is asked to do).
"""

from headscope.models.attribution import Attribution
from headscope.models.editing.edits import Patch, Where
from headscope.models.processor import AttnProcessor
from headscope.models.recording.recording import Recording
from headscope.models.scope import Scope
from headscope.models.structure.sites import Site
from headscope.models.tasks import (
    FluxTask,
    LatentTask,
    PixelTask,
    StableDiffusion3Task,
    StableDiffusionTask,
    StableDiffusionXLTask,
    Task,
)

__all__ = [
    "AttnProcessor",
    "Attribution",
    "FluxTask",
    "LatentTask",
    "Patch",
    "PixelTask",
    "Recording",
    "Scope",
    "Site",
    "StableDiffusion3Task",
    "StableDiffusionTask",
    "StableDiffusionXLTask",
    "Task",
    "Where",
]
