"""The noise process that a model was taught: x_t at a timestep, and the denoiser's target.

With noise n and clean image (or latents) x_0, both kinds of model see x_t = a x_0 + s n.

| | diffusion (DDPM and its samplers) | flow matching (rectified flow) |
|---|---|---|
| timestep t | 0 to N - 1 | 1 to N, sigma = t / N, after any shift of the schedule |
| a, s | sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t) | 1 - sigma, sigma |
| target | n; or v = a n - s x_0; or x_0 | dx_t / dsigma = n - x_0 |
| x_0 that a prediction p implies | (x_t - s p) / a; a x_t - s p; p | x_t - sigma p |
| log-SNR = ln(a^2 / s^2) | ln(alpha_bar / (1 - alpha_bar)) | 2 ln((1 - sigma) / sigma) |

N is the scheduler's num_train_timesteps. The implied x_0 is linear in p, so its squared error is the prediction's times
a constant, `x0_factor`.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from headscope._extras import require
from headscope._shapes import Sample, Shaped

# one for each item, as the scheduler counts them
Timesteps = Shaped[Tensor, " items"]
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Noising(ABC):
    """The noise process of a scheduler.

    Attributes:
        timesteps: those a model was taught at.
    """

    timesteps: range

    @abstractmethod
    def add(self, clean: Sample, noise: Sample, timestep: int) -> Sample:
        """x_t."""

    @abstractmethod
    def target(self, clean: Sample, noise: Sample, timestep: int) -> Sample:
        """The denoiser's target at x_t, shaped as `clean`."""

    @abstractmethod
    def log_snr(self, timestep: int) -> float:
        """ln(a^2 / s^2), nats."""

    @abstractmethod
    def x0_factor(self, timestep: int) -> float:
        """The factor by which the squared error of a prediction gives that of the x_0 it implies."""

    @abstractmethod
    def given(self, timestep: int, items: int, device: torch.device) -> Timesteps:
        """The timestep of each row, as the pipeline holds it."""

    @abstractmethod
    def sampler(self) -> Any:
        """A deterministic scheduler of this noise process: a difference between two runs is then the edit's alone."""


class Diffusion(Noising):
    """DDPM's noise process, whichever sampler the pipeline holds.

    Args:
        clip_sample: False if the clean images it implies may go beyond [-1, 1], as latents do. Schedulers without a
            setting of it (Euler, DPM-Solver) don't clip, but the DDIM sampler made from their settings would.

    Raises:
        TypeError, ValueError: the scheduler is of another kind.
    """

    def __init__(self, scheduler: Any, *, clip_sample: bool = True) -> None:
        if not hasattr(scheduler, "alphas_cumprod"):
            raise TypeError(
                f"scheduler: got {type(scheduler).__name__}, expected one with alphas_cumprod (DDPM, DDIM, Euler, ...)"
            )
        self._kind = scheduler.config.prediction_type
        if self._kind not in PREDICTIONS:
            raise ValueError(f"prediction_type: got {self._kind!r}, expected one of {', '.join(PREDICTIONS)}")
        self._config = scheduler.config
        self._clip_sample = scheduler.config.get("clip_sample", clip_sample)
        # add_noise means something else in every sampler; models are trained by this one's formula
        self._stock = require("diffusers", "diffusers").DDPMScheduler.from_config(scheduler.config)
        self.timesteps = range(int(scheduler.config.num_train_timesteps))

    def add(self, clean: Sample, noise: Sample, timestep: int) -> Sample:
        return self._stock.add_noise(clean, noise, self.given(timestep, len(clean), clean.device))

    def target(self, clean: Sample, noise: Sample, timestep: int) -> Sample:
        if self._kind == "epsilon":
            return noise
        if self._kind == "v_prediction":
            return self._stock.get_velocity(clean, noise, self.given(timestep, len(clean), clean.device))
        return clean

    def log_snr(self, timestep: int) -> float:
        alpha_bar = float(self._stock.alphas_cumprod[timestep].double())
        # zero at the end of a schedule that was rescaled to it
        return math.log(alpha_bar) - math.log1p(-alpha_bar) if alpha_bar > 0 else -math.inf

    def x0_factor(self, timestep: int) -> float:
        if self._kind == "sample":
            return 1.0
        alpha_bar = float(self._stock.alphas_cumprod[timestep].double())
        if self._kind == "v_prediction":
            return 1.0 - alpha_bar
        return (1.0 - alpha_bar) / alpha_bar if alpha_bar > 0 else math.inf

    def given(self, timestep: int, items: int, device: torch.device) -> Timesteps:
        return torch.full((items,), timestep, device=device)

    def sampler(self) -> Any:
        return require("diffusers", "diffusers").DDIMScheduler.from_config(self._config, clip_sample=self._clip_sample)


class FlowMatching(Noising):
    """Rectified flow, as SD3 and Flux are trained.

    A shift belongs to how sigmas are spread over sampling steps or training batches; the model is told the sigma that
    came out, and a timestep here is that sigma's.

    Raises:
        TypeError: the scheduler is of another kind.
    """

    def __init__(self, scheduler: Any) -> None:
        if not hasattr(scheduler, "scale_noise"):
            raise TypeError(
                f"scheduler: got {type(scheduler).__name__}, expected a flow-matching one"
                " (FlowMatchEulerDiscreteScheduler, ...)"
            )
        self._config = scheduler.config
        # nothing is taught at sigma 0, where nothing is left to predict
        self.timesteps = range(1, int(scheduler.config.num_train_timesteps) + 1)

    def sigma(self, timestep: int) -> float:
        return timestep / self.timesteps[-1]

    def add(self, clean: Sample, noise: Sample, timestep: int) -> Sample:
        sigma = self.sigma(timestep)
        return (1.0 - sigma) * clean + sigma * noise

    def target(self, clean: Sample, noise: Sample, timestep: int) -> Sample:
        return noise - clean

    def log_snr(self, timestep: int) -> float:
        sigma = self.sigma(timestep)
        return 2.0 * (math.log1p(-sigma) - math.log(sigma)) if sigma < 1 else -math.inf

    def x0_factor(self, timestep: int) -> float:
        return self.sigma(timestep) ** 2

    def given(self, timestep: int, items: int, device: torch.device) -> Timesteps:
        return torch.full((items,), float(timestep), device=device)

    def sampler(self) -> Any:
        euler = require("diffusers", "diffusers").FlowMatchEulerDiscreteScheduler
        return euler.from_config(self._config, stochastic_sampling=False)
