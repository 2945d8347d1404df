"""The noise process of the planted models: that of the bundled model, with the clean image as the target."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from headscope._extras import require
from headscope.zoo.model import SCHEDULER_CONFIG

__all__ = ["build_scheduler", "log_snr", "shrinkage"]


def build_scheduler() -> Any:
    """The diffusers DDPMScheduler."""
    return require("diffusers", "diffusers").DDPMScheduler(**{**SCHEDULER_CONFIG, "prediction_type": "sample"})


@lru_cache(maxsize=1)
def _alpha_bar() -> np.ndarray:
    return build_scheduler().alphas_cumprod.double().numpy()


def shrinkage() -> np.ndarray:
    """a / (a^2 + 4 s^2) at each timestep, where x_t = a x_0 + s n: the best linear estimate of a pixel of mean 0 and
    variance 1/4 is this times its x_t. Float64 [timesteps]."""
    signal, noise = _alpha_bar(), 1.0 - _alpha_bar()
    return np.sqrt(signal) / (signal + 4.0 * noise)


def log_snr() -> np.ndarray:
    """ln(a^2 / s^2) at each timestep, nats, float64 [timesteps]."""
    return np.log(_alpha_bar()) - np.log1p(-_alpha_bar())
