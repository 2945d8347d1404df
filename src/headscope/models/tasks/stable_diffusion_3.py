"""Stable Diffusion 3: joint attention of image and text tokens, taught by flow matching."""

from collections.abc import Mapping
from typing import Any

from headscope._shapes import Conditioning, Sample
from headscope.models.tasks.latent import ShiftedLatentTask
from headscope.models.tasks.noising import FlowMatching, Timesteps
from headscope.models.tasks.task import Answer, parameters


class StableDiffusion3Task(ShiftedLatentTask):
    """StableDiffusion3Pipeline's models.

    Conditioning: encoder_hidden_states [items, tokens, dim] (CLIP's tokens, then T5's; zeros where T5 is left out),
    pooled_projections [items, dim].
    """

    expects = (
        "a transformer that takes pooled_projections, a vae and two or three text encoders, and a flow-matching"
        " scheduler (Stable Diffusion 3)"
    )

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        needed = ("transformer", "vae", "text_encoder", "text_encoder_2", "encode_prompt")
        if any(getattr(pipeline, name, None) is None for name in needed):
            return False
        taken = parameters(pipeline.transformer.forward)
        return {"encoder_hidden_states", "pooled_projections", "skip_layers"} <= taken and "img_ids" not in taken

    def _noise_process(self, scheduler: Any) -> FlowMatching:
        return FlowMatching(scheduler)

    def _conditioning(self, prompts: list[str]) -> Mapping[str, Conditioning]:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def _answer(self, sample: Sample, timesteps: Timesteps, conditioning: Mapping[str, Conditioning]) -> Answer:
        return self.denoiser(hidden_states=sample, timestep=timesteps, **conditioning, return_dict=False)[0]
