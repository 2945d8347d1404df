"""The pipeline of the bundled transformer: images from noise, without text and without a VAE."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

__all__ = ["PixelDiTPipeline"]


class PixelDiTPipeline(DiffusionPipeline):
    """An unconditional DiT in pixel space: a DDPMPipeline with a transformer in place of its unet.

    Args:
        transformer: a DiTTransformer2DModel of three channels in and out, called under its label for "no class".
        scheduler: the scheduler to sample with.
    """

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw `batch_size` images; `output_type` is "pil" or "np" (float [images, height, width, 3], 0 to 1)."""
        config = self.transformer.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        device, dtype = self._execution_device, self.transformer.dtype
        sample = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        no_class = torch.full((batch_size,), config.num_embeds_ada_norm, device=device)
        self.scheduler.set_timesteps(num_inference_steps)
        steps: Any = self.progress_bar(self.scheduler.timesteps)
        for timestep in steps:
            timesteps = timestep.to(device).expand(batch_size)
            answer = self.transformer(sample, timesteps, class_labels=no_class, return_dict=False)[0]
            sample = self.scheduler.step(answer, timestep, sample, generator=generator).prev_sample
        images = (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
