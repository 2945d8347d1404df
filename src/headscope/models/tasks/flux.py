"""Flux: joint attention over packed latents, taught by flow matching."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headscope._shapes import Conditioning, Sample
from headscope.models.tasks.latent import ShiftedLatentTask
from headscope.models.tasks.noising import FlowMatching, Timesteps
from headscope.models.tasks.task import Answer, parameters, square

# of models that were distilled with their guidance as an input: at 1 the guided prediction is the conditional one
NO_GUIDANCE = 1.0


class FluxTask(ShiftedLatentTask):
    """FluxPipeline's models.

    The transformer takes latents packed as tokens of 2 x 2 places, and each token's place; here noise, targets and
    predictions are latents [items, channels, height, width], packed for the transformer alone. Its timestep is sigma,
    t / N. The teacher-forced guidance is 1; images are drawn with the pipeline's default. The transformer takes any
    size: images have the size that the VAE's configuration gives.

    Conditioning: encoder_hidden_states [items, tokens, dim] (T5's), pooled_projections [items, dim] (CLIP's).
    """

    expects = (
        "a transformer that takes pooled_projections, img_ids and txt_ids, a vae, two text encoders, and a"
        " flow-matching scheduler (Flux)"
    )

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        needed = ("transformer", "vae", "text_encoder", "text_encoder_2", "encode_prompt", "_pack_latents")
        if any(getattr(pipeline, name, None) is None for name in needed):
            return False
        return {"pooled_projections", "img_ids", "txt_ids", "guidance"} <= parameters(pipeline.transformer.forward)

    @property
    def latent_channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4

    @property
    def sample_size(self) -> int:
        latents = square("vae", self.pipeline.vae.config.sample_size) // self._vae_factor
        return latents // 2 * 2

    def _noise_process(self, scheduler: Any) -> FlowMatching:
        return FlowMatching(scheduler)

    def _conditioning(self, prompts: list[str]) -> Mapping[str, Conditioning]:
        embeddings, pooled, _ = self.pipeline.encode_prompt(prompts, None, device=self.device, num_images_per_prompt=1)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def _answer(self, sample: Sample, timesteps: Timesteps, conditioning: Mapping[str, Conditioning]) -> Answer:
        items, _, height, width = sample.shape
        guidance = torch.full((items,), NO_GUIDANCE, device=sample.device)
        text = conditioning["encoder_hidden_states"].shape[1]
        answer = self.denoiser(
            hidden_states=self._packed(sample),
            # in the pipeline's order: rounded to the model's dtype, then scaled
            timestep=timesteps.to(sample.dtype) / self.timesteps[-1],
            guidance=guidance if self.denoiser.config.guidance_embeds else None,
            **conditioning,
            img_ids=self._places(height // 2, width // 2, sample),
            txt_ids=torch.zeros(text, 3, device=sample.device, dtype=sample.dtype),
            return_dict=False,
        )[0]
        return self.pipeline._unpack_latents(
            answer, height * self._vae_factor, width * self._vae_factor, self._vae_factor
        )

    def _packed(self, latents: Tensor) -> Tensor:
        """[items, tokens, channels]."""
        return self.pipeline._pack_latents(latents, *latents.shape)

    def _places(self, height: int, width: int, like: Tensor) -> Tensor:
        """(0, row, column) of every token, [tokens, 3]."""
        return self.pipeline._prepare_latent_image_ids(1, height, width, like.device, like.dtype)
