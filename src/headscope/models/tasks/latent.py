"""Text-to-image models in a VAE's latent space: what their families have in common."""

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headscope._shapes import Conditioning, Float, Images, Sample
from headscope.models.tasks.images import check_pixels, to_signed
from headscope.models.tasks.noising import Diffusion, Noising
from headscope.models.tasks.task import Prepared, Task, TaskItem, parameters

# parts of a pipeline that change its images after they are made, which no distance should see: a checker that blackens
# them, a mark
_AFTERWARDS = ("safety_checker", "watermark")


class LatentTask(Task):
    """Text-to-image models in a VAE's latent space.

    Latents are the mode of the VAE's distribution; prompts are encoded by the pipeline's own `encode_prompt`, without
    guidance. Images are drawn by the pipeline's own call, with its default guidance and a deterministic sampler.
    """

    def __init__(self, pipeline: Any) -> None:
        if callable(pipeline) and "image" in parameters(type(pipeline).__call__):
            raise ValueError(
                f"pipeline: got {type(pipeline).__name__}, whose call takes an image, expected one that draws from"
                " prompts alone (a text-to-image pipeline's from_pipe makes one of the same parts)"
            )
        super().__init__(pipeline)
        latent = int(pipeline.vae.config.latent_channels)
        if self.latent_channels != latent:
            raise ValueError(
                f"pipeline: got {type(pipeline).__name__}, whose {type(self.denoiser).__name__} takes"
                f" {self.latent_channels} channels, expected the VAE's {latent}: one that makes images of prompts alone"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the denoiser takes."""
        return int(self.denoiser.config.in_channels)

    @property
    def image_size(self) -> int:
        return self.sample_size * self._vae_factor

    @property
    def sampling_rows(self) -> int:
        pipeline = self.pipeline
        default = inspect.signature(type(pipeline).__call__).parameters.get("guidance_scale")
        # models that were distilled with their guidance as an input have no such property
        if default is None or not hasattr(type(pipeline), "do_classifier_free_guidance"):
            return 1
        # the pipeline's own rule, which reads what its call was given
        before = getattr(pipeline, "_guidance_scale", None)
        pipeline._guidance_scale = default.default
        try:
            return 2 if pipeline.do_classifier_free_guidance else 1
        finally:
            if before is None:
                del pipeline._guidance_scale
            else:
                pipeline._guidance_scale = before

    @property
    def _vae_factor(self) -> int:
        """Pixels of an image to one of its latents, along an edge."""
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    def prepare(self, items: Sequence[TaskItem]) -> Prepared:
        images = to_signed(items, self.image_size).to(self.device)
        with torch.inference_mode():
            latents = self._scaled(self._encoded(images)).float()
            conditioning = self._conditioning([item.caption for item in items])
        # clones: tensors made in inference mode can't take part in a later backward
        conditioning = {name: tensor.to(self.dtype).clone() for name, tensor in conditioning.items()}
        return Prepared(tuple(item.key for item in items), latents.clone(), conditioning, tuple(items))

    def generate(self, items: Sequence[TaskItem], *, steps: int = 25, seed: int = 0) -> Images:
        latents = self._initial_noise(items, self.latent_channels, seed)
        with self._sampling():
            images = self.pipeline(
                prompt=[item.caption for item in items],
                latents=self._packed(latents),
                height=self.image_size,
                width=self.image_size,
                num_inference_steps=steps,
                output_type="np",
                **self._call_options(),
            ).images
        check_pixels(images, self.dtype)
        return np.rint(images * 255).astype(np.uint8)

    def _call_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's call when it draws images: none unless overridden."""
        return {}

    def _noise_process(self, scheduler: Any) -> Noising:
        return Diffusion(scheduler, clip_sample=False)

    @abstractmethod
    def _conditioning(self, prompts: list[str]) -> Mapping[str, Conditioning]:
        """The denoiser's inputs for each prompt."""

    def _encoded(
        self, images: Float[Tensor, "items 3 _height _width"]
    ) -> Float[Tensor, "items _channels _latent_height _latent_width"]:
        """The VAE's latents of images in [-1, 1]."""
        vae = self.pipeline.vae
        # some overflow in float16, as their configuration says; their pipelines decode in float32 then
        upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
        if upcast:
            vae.to(torch.float32)
        try:
            return vae.encode(images.to(vae.dtype)).latent_dist.mode().float()
        finally:
            if upcast:
                vae.to(torch.float16)

    def _scaled(self, latents: Sample) -> Sample:
        """The VAE's latents on the denoiser's scale: the inverse of what the pipeline does before it decodes."""
        return latents * self.pipeline.vae.config.scaling_factor

    def _packed(self, latents: Sample) -> Float[Tensor, "items ..."]:
        """Latents as the pipeline's call takes them."""
        return latents

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Inside, the pipeline has a deterministic sampler, shows no progress bar and changes none of its images."""
        pipeline = self.pipeline
        replaced = {"scheduler": self.noising.sampler()}
        replaced |= {name: None for name in _AFTERWARDS if getattr(pipeline, name, None) is not None}
        stock = {name: getattr(pipeline, name) for name in replaced}
        bar = dict(getattr(pipeline, "_progress_bar_config", {}))
        pipeline.set_progress_bar_config(**{**bar, "disable": True})
        try:
            for name, value in replaced.items():
                setattr(pipeline, name, value)
            yield
        finally:
            for name, value in stock.items():
                setattr(pipeline, name, value)
            pipeline.set_progress_bar_config(**bar)


class ShiftedLatentTask(LatentTask):
    """Families whose latents are shifted before they are scaled, (latents - shift) * scale."""

    def _scaled(self, latents: Sample) -> Sample:
        config = self.pipeline.vae.config
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor
