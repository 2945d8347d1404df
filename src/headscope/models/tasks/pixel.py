"""Unconditional models in pixel space."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headscope.models.tasks.images import to_images, to_signed
from headscope.models.tasks.task import Prepared, Task, TaskItem


class PixelTask(Task):
    """Unconditional models in pixel space, such as DDPMPipeline's."""

    expects = "a unet in pixel space and no text encoder (DDPM)"
    takes_prompts = False

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        others = ("vae", "vqvae", "movq", "text_encoder")
        return getattr(pipeline, "unet", None) is not None and all(
            getattr(pipeline, name, None) is None for name in others
        )

    def prepare(self, items: Sequence[TaskItem]) -> Prepared:
        images = to_signed(items, self.image_size).to(self.device)
        if images.shape[1] != self.denoiser.config.in_channels:
            raise ValueError(f"items: got images of 3 channels, expected {self.denoiser.config.in_channels}")
        return Prepared(tuple(item.key for item in items), images, {}, tuple(items))

    def generate(self, items: Sequence[TaskItem], *, steps: int = 25, seed: int = 0) -> np.ndarray:
        scheduler = self.noising.sampler()
        scheduler.set_timesteps(steps, device=self.device)
        sample = self._initial_noise(items, int(self.denoiser.config.in_channels), seed)
        with torch.inference_mode():
            for timestep in scheduler.timesteps:
                answer = self.denoiser(sample, timestep, return_dict=False)[0]
                answer = answer[:, : sample.shape[1]]
                sample = scheduler.step(answer, timestep, sample, return_dict=False)[0]
        return to_images(sample)
