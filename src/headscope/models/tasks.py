"""What a denoiser is asked to do with an image: inputs, target and scores, for every family alike."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from headscope._extras import require
from headscope.counter import counter_normal
from headscope.models.sites import find_denoiser


@runtime_checkable
class TaskItem(Protocol):
    """What a task needs of an item: the zoo's items have it.

    Attributes:
        key: its name, the same on every machine; noise is drawn from it.
        image: uint8 [height, width, 3], or None where only a prompt is given.
        caption: the prompt, "" for none.
    """

    @property
    def key(self) -> str: ...
    @property
    def image(self) -> np.ndarray | None: ...
    @property
    def caption(self) -> str: ...


@dataclass(frozen=True)
class Prepared:
    """Items turned into what the denoiser works on.

    Attributes:
        keys: the items' keys, for their noise.
        clean: the images or latents without noise, [items, channels, height, width].
        conditioning: further inputs of the denoiser; their tensors are [items, ...].
    """

    keys: tuple[str, ...]
    clean: Tensor
    conditioning: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, indices: Tensor) -> "Prepared":
        """The items at these indices, repeats allowed."""
        chosen = indices.tolist()
        conditioning = {name: tensor[indices] for name, tensor in self.conditioning.items()}
        return Prepared(tuple(self.keys[i] for i in chosen), self.clean[indices], conditioning)


@dataclass(frozen=True)
class NoisyInputs:
    """A denoiser's inputs at one timestep, and what it should answer; all [items, channels, height, width]."""

    sample: Tensor
    timestep: int
    conditioning: Mapping[str, Tensor]
    target: Tensor

    def rows(self, indices: Tensor) -> "NoisyInputs":
        """The items at these indices, repeats allowed."""
        conditioning = {name: tensor[indices] for name, tensor in self.conditioning.items()}
        return NoisyInputs(self.sample[indices], self.timestep, conditioning, self.target[indices])


class Task(ABC):
    """Teacher-forced denoising and generation with one model.

    Noise comes from a counter-based generator keyed by (item, timestep, replicate): the same for the clean and every
    edited run, on every machine.

    Attributes:
        pipeline: the diffusers pipeline.
        denoiser: its unet or transformer.
        scheduler: its scheduler, for the noise and the target.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.denoiser: Any = find_denoiser(pipeline)
        self.scheduler = pipeline.scheduler
        if not hasattr(self.scheduler, "alphas_cumprod"):
            raise TypeError(
                f"scheduler: got {type(self.scheduler).__name__}, expected one with alphas_cumprod"
                " (DDPM, DDIM, Euler, ...)"
            )
        expected = ("epsilon", "v_prediction", "sample")
        kind = self.scheduler.config.prediction_type
        if kind not in expected:
            raise ValueError(f"prediction_type: got {kind!r}, expected one of {', '.join(expected)}")
        # add_noise means something else in every sampler; models are trained by this one's formula
        self._noising = require("diffusers", "diffusers").DDPMScheduler.from_config(self.scheduler.config)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def train_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def sample_size(self) -> int:
        """The edge of the denoiser's input, in its own pixels."""
        size = self.denoiser.config.sample_size
        edges = {int(edge) for edge in (size if isinstance(size, (list, tuple)) else [size])}
        if len(edges) != 1:
            raise ValueError(f"model: got a sample size of {size}, expected a square one")
        return edges.pop()

    @property
    def image_size(self) -> int:
        """The edge of the images it takes and makes, in pixels."""
        return self.sample_size

    def log_snr(self, timestep: int) -> float:
        """ln(alpha_bar / (1 - alpha_bar)) at a timestep of the scheduler."""
        alpha_bar = float(self._noising.alphas_cumprod[timestep].double())
        return float(np.log(alpha_bar) - np.log1p(-alpha_bar))

    @abstractmethod
    def prepare(self, items: Sequence[TaskItem]) -> Prepared:
        """Encode items; guidance is off, and items without a caption get the empty prompt.

        Raises:
            ValueError: an item lacks what the model needs.
        """

    def noise(self, prepared: Prepared, timestep: int, replicate: int = 0) -> Tensor:
        """Standard normal noise like `prepared.clean`, float32, keyed by (item, timestep, replicate)."""
        shape = tuple(prepared.clean.shape[1:])
        drawn = [counter_normal("noise", key, timestep, replicate, shape=shape) for key in prepared.keys]
        return torch.from_numpy(np.stack(drawn).astype(np.float32)).to(self.device)

    def noisy_inputs(self, prepared: Prepared, timestep: int, replicate: int = 0) -> NoisyInputs:
        """The denoiser's inputs and the scheduler's own target (epsilon, v or the clean sample)."""
        if not 0 <= timestep < self.train_timesteps:
            raise ValueError(f"timestep: got {timestep}, expected 0 to {self.train_timesteps - 1}")
        noise = self.noise(prepared, timestep, replicate)
        timesteps = torch.full((len(prepared),), timestep, device=self.device)
        clean = prepared.clean.float()
        sample = self._noising.add_noise(clean, noise, timesteps)
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            target = noise
        elif kind == "v_prediction":
            target = self._noising.get_velocity(clean, noise, timesteps)
        else:
            target = clean
        return NoisyInputs(sample.to(self.dtype), timestep, prepared.conditioning, target)

    def predict(self, inputs: NoisyInputs) -> Tensor:
        """The denoiser's answer [items, channels, height, width]; a learned variance is left out."""
        timesteps = torch.full((inputs.sample.shape[0],), inputs.timestep, device=self.device)
        answer = self.denoiser(inputs.sample, timesteps, **inputs.conditioning, return_dict=False)[0]
        return answer[:, : inputs.target.shape[1]]

    def loss(self, inputs: NoisyInputs) -> Tensor:
        """The teacher-forced loss: mean squared error of the prediction over its elements, float64 [items]."""
        error = self.predict(inputs).double() - inputs.target.double()
        return error.square().flatten(1).mean(1)

    @abstractmethod
    def generate(self, items: Sequence[TaskItem], *, steps: int = 25, seed: int = 0) -> np.ndarray:
        """Images from each item's prompt and its own initial noise, uint8 [items, height, width, 3].

        The noise is keyed by (item, seed), so an edited run starts where the clean one did; the sampler is
        deterministic. Wrap the call in `scope.edit(..., steps=range(a, b))` to edit a window of its steps.
        """

    def _initial_noise(self, items: Sequence[TaskItem], size: int, seed: int) -> Tensor:
        shape = (int(self.denoiser.config.in_channels), size, size)
        drawn = [counter_normal("generate", item.key, seed, shape=shape) for item in items]
        return torch.from_numpy(np.stack(drawn).astype(np.float32)).to(self.device, self.dtype)

    def _deterministic_scheduler(self) -> Any:
        """DDIM with this model's noise schedule: a difference between two runs is then the edit's alone."""
        return require("diffusers", "diffusers").DDIMScheduler.from_config(self.scheduler.config)

    @staticmethod
    def of(pipeline: Any) -> "Task":
        """The task that fits a pipeline.

        Raises:
            TypeError: no task is known for it.
        """
        has_text = all(getattr(pipeline, name, None) is not None for name in ("vae", "text_encoder", "tokenizer"))
        if getattr(pipeline, "text_encoder_2", None) is not None:
            raise TypeError(
                f"pipeline: got {type(pipeline).__name__} with two text encoders, expected one with a single one"
                " (Stable Diffusion 1 and 2); its further conditioning isn't known yet"
            )
        if getattr(pipeline, "unet", None) is not None and has_text:
            return LatentTask(pipeline)
        if getattr(pipeline, "unet", None) is not None and getattr(pipeline, "vae", None) is None:
            return PixelTask(pipeline)
        raise TypeError(
            f"pipeline: got {type(pipeline).__name__}, expected one with a unet in pixel space (DDPM) or with vae,"
            " text encoder and tokenizer (Stable Diffusion)"
        )


class PixelTask(Task):
    """Unconditional models in pixel space, such as DDPMPipeline's."""

    def prepare(self, items: Sequence[TaskItem]) -> Prepared:
        images = to_signed(items, self.image_size).to(self.device)
        if images.shape[1] != self.denoiser.config.in_channels:
            raise ValueError(f"items: got images of 3 channels, expected {self.denoiser.config.in_channels}")
        return Prepared(tuple(item.key for item in items), images, {})

    def generate(self, items: Sequence[TaskItem], *, steps: int = 25, seed: int = 0) -> np.ndarray:
        scheduler = self._deterministic_scheduler()
        scheduler.set_timesteps(steps, device=self.device)
        sample = self._initial_noise(items, self.sample_size, seed)
        with torch.inference_mode():
            for timestep in scheduler.timesteps:
                answer = self.denoiser(sample, timestep, return_dict=False)[0]
                answer = answer[:, : sample.shape[1]]
                sample = scheduler.step(answer, timestep, sample, return_dict=False)[0]
        return to_images(sample)


class LatentTask(Task):
    """Text-to-image models in a VAE's latent space, such as StableDiffusionPipeline's."""

    def prepare(self, items: Sequence[TaskItem]) -> Prepared:
        vae = self.pipeline.vae
        images = to_signed(items, self.image_size).to(self.device, vae.dtype)
        with torch.inference_mode():
            latents = vae.encode(images).latent_dist.mode()
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            latents = ((latents - shift) * vae.config.scaling_factor).float()
            embeddings, _ = self.pipeline.encode_prompt(
                [item.caption for item in items], self.device, 1, do_classifier_free_guidance=False
            )
        # clones: tensors made in inference mode can't take part in a later backward
        conditioning = {"encoder_hidden_states": embeddings.to(self.dtype).clone()}
        return Prepared(tuple(item.key for item in items), latents.clone(), conditioning)

    def generate(self, items: Sequence[TaskItem], *, steps: int = 25, seed: int = 0) -> np.ndarray:
        latents = self._initial_noise(items, self.sample_size, seed)
        stock, self.pipeline.scheduler = self.pipeline.scheduler, self._deterministic_scheduler()
        # a checker would replace images by black ones, which no distance should see
        checker, self.pipeline.safety_checker = self.pipeline.safety_checker, None
        bar = dict(getattr(self.pipeline, "_progress_bar_config", {}))
        self.pipeline.set_progress_bar_config(**{**bar, "disable": True})
        try:
            images = self.pipeline(
                prompt=[item.caption for item in items], latents=latents, num_inference_steps=steps, output_type="np"
            ).images
        finally:
            self.pipeline.scheduler = stock
            self.pipeline.safety_checker = checker
            self.pipeline.set_progress_bar_config(**bar)
        if not np.isfinite(images).all():
            raise ValueError(f"generate: the model made NaN or infinite pixels in {self.dtype}; float32 may not")
        return np.rint(images * 255).astype(np.uint8)

    @property
    def image_size(self) -> int:
        return self.sample_size * 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)


def to_signed(items: Sequence[TaskItem], size: int) -> Tensor:
    """The items' images as float32 in [-1, 1], [items, 3, size, size].

    Raises:
        ValueError: an item has no image, or one of another shape or dtype.
    """
    for item in items:
        image = item.image
        if image is None:
            raise ValueError(f"items: {item.key!r} has no image, which the teacher-forced loss needs")
        if image.dtype != np.uint8 or image.shape != (size, size, 3):
            raise ValueError(
                f"items: {item.key!r} has an image {list(image.shape)} of {image.dtype},"
                f" expected [{size}, {size}, 3] of uint8"
            )
    images = np.stack([item.image for item in items])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def to_images(sample: Tensor) -> np.ndarray:
    """[items, 3, height, width] in [-1, 1] as uint8 [items, height, width, 3]."""
    scaled = sample.float().clamp(-1, 1).add(1.0).mul(127.5).round()
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
