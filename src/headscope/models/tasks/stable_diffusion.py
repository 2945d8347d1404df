"""Stable Diffusion 1 and 2: one text encoder, whose tokens the UNet attends to."""

from collections.abc import Mapping
from typing import Any

from headscope._shapes import Conditioning
from headscope.models.tasks.latent import LatentTask


class StableDiffusionTask(LatentTask):
    """StableDiffusionPipeline's models.

    Conditioning: encoder_hidden_states [items, tokens, dim].
    """

    expects = "a unet, a vae and one text encoder (Stable Diffusion 1 and 2)"

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        needed = ("unet", "vae", "text_encoder", "tokenizer", "encode_prompt")
        if any(getattr(pipeline, name, None) is None for name in needed):
            return False
        plain = pipeline.unet.config.get("addition_embed_type") is None
        return plain and getattr(pipeline, "text_encoder_2", None) is None

    def _conditioning(self, prompts: list[str]) -> Mapping[str, Conditioning]:
        embeddings, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings}
