"""Models in pixel space, without text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headscope.models.tasks.images import to_images, to_signed
from headscope.models.tasks.task import Prepared, Task, TaskItem


class PixelTask(Task):
    """Models in pixel space without text, such as DDPMPipeline's.

    A transformer that knows classes (DiT) is given the label that it was taught for none.
    """

    expects = "a unet or transformer in pixel space and no text encoder (DDPM)"
    takes_prompts = False

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        others = ("vae", "vqvae", "movq", "text_encoder")
        return any(getattr(pipeline, name, None) is not None for name in ("unet", "transformer")) and all(
            getattr(pipeline, name, None) is None for name in others
        )

    def prepare(self, items: Sequence[TaskItem]) -> Prepared:
        images = to_signed(items, self.image_size).to(self.device)
        if images.shape[1] != self.denoiser.config.in_channels:
            raise ValueError(f"items: got images of 3 channels, expected {self.denoiser.config.in_channels}")
        return Prepared(tuple(item.key for item in items), images, self._conditioning(len(items)), tuple(items))

    def _conditioning(self, count: int) -> dict[str, torch.Tensor]:
        classes = getattr(self.denoiser.config, "num_embeds_ada_norm", None)
        # the embedding's last row, which training puts in the place of labels that it drops
        return {} if classes is None else {"class_labels": torch.full((count,), classes, device=self.device)}

    def generate(self, items: Sequence[TaskItem], *, steps: int = 25, seed: int = 0) -> np.ndarray:
        scheduler = self.noising.sampler()
        scheduler.set_timesteps(steps, device=self.device)
        sample = self._initial_noise(items, int(self.denoiser.config.in_channels), seed)
        conditioning = self._conditioning(len(items))
        with torch.inference_mode():
            for timestep in scheduler.timesteps:
                answer = self._answer(sample, timestep.to(self.device).expand(len(items)), conditioning)
                answer = answer[:, : sample.shape[1]]
                sample = scheduler.step(answer, timestep, sample, return_dict=False)[0]
        return to_images(sample)
