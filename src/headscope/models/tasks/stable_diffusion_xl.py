"""Stable Diffusion XL: two text encoders, and the UNet is told the image's size."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headscope._shapes import Conditioning, Sample
from headscope.models.tasks.latent import LatentTask
from headscope.models.tasks.noising import Timesteps
from headscope.models.tasks.task import Answer


class StableDiffusionXLTask(LatentTask):
    """StableDiffusionXLPipeline's models.

    Conditioning: encoder_hidden_states [items, tokens, dim of both encoders], text_embeds [items, dim] (the second
    encoder's pooled one), time_ids [items, 6]: original height and width, top and left of the crop, target height and
    width. Items count as whole images of the model's size, as in the pipeline's own call.
    """

    expects = "a unet with added text and time embeddings, a vae and two text encoders (Stable Diffusion XL)"

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        needed = ("unet", "vae", "text_encoder", "text_encoder_2", "encode_prompt", "_get_add_time_ids")
        if any(getattr(pipeline, name, None) is None for name in needed):
            return False
        return pipeline.unet.config.get("addition_embed_type") == "text_time"

    def _conditioning(self, prompts: list[str]) -> Mapping[str, Conditioning]:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        size = (self.image_size, self.image_size)
        time_ids = self.pipeline._get_add_time_ids(
            size, (0, 0), size, embeddings.dtype, self.pipeline.text_encoder_2.config.projection_dim
        )
        return {
            "encoder_hidden_states": embeddings,
            "text_embeds": pooled,
            "time_ids": time_ids.to(self.device).expand(len(prompts), -1),
        }

    def _answer(self, sample: Sample, timesteps: Timesteps, conditioning: Mapping[str, Conditioning]) -> Answer:
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        text = conditioning["encoder_hidden_states"]
        return self.denoiser(sample, timesteps, text, added_cond_kwargs=added, return_dict=False)[0]

    def _scaled(self, latents: Sample) -> Sample:
        config = self.pipeline.vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return super()._scaled(latents)

        def per_channel(values: list[float]) -> Tensor:
            return torch.tensor(values, device=latents.device).view(1, -1, 1, 1)

        return (latents - per_channel(mean)) * config.scaling_factor / per_channel(deviation)
