"""Which family a pipeline belongs to."""

from typing import Any

from headscope.models.tasks.flux import FluxTask
from headscope.models.tasks.pixel import PixelTask
from headscope.models.tasks.stable_diffusion import StableDiffusionTask
from headscope.models.tasks.stable_diffusion_3 import StableDiffusion3Task
from headscope.models.tasks.stable_diffusion_xl import StableDiffusionXLTask
from headscope.models.tasks.task import Task

FAMILIES: tuple[type[Task], ...] = (
    PixelTask,
    StableDiffusionTask,
    StableDiffusionXLTask,
    StableDiffusion3Task,
    FluxTask,
)


def task_of(pipeline: Any) -> Task:
    """See `Task.of`."""
    for family in FAMILIES:
        if family.fits(pipeline):
            return family(pipeline)
    known = "; ".join(family.expects for family in FAMILIES)
    parts = sorted(getattr(pipeline, "components", {}))
    described = f" (with {', '.join(parts)})" if parts else ""
    raise TypeError(f"pipeline: got {type(pipeline).__name__}{described}, expected one of: {known}")
