"""The noise of a run's timesteps, from its manifest."""

from collections.abc import Mapping
from typing import Any

from headscope._extras import require
from headscope.models.tasks import Diffusion, FlowMatching


def log_snr_of(manifest: Mapping[str, Any]) -> dict[int, float] | None:
    """The log-SNR at every timestep of a run, in nats; None where its scheduler isn't one of diffusers', or has no such
    timesteps (manifests may come from anywhere)."""
    noising, steps = noising_of(manifest), manifest["timesteps"]
    if noising is None or not all(isinstance(step, int) and step in noising.timesteps for step in steps):
        return None
    return {step: noising.log_snr(step) for step in steps}


def noising_of(manifest: Mapping[str, Any]) -> Any:
    """The noise process of a run's scheduler (`headscope.models.tasks`); None where it isn't one of diffusers'."""
    name, settings = manifest["identity"].get("scheduler") or (None, {})
    kind = getattr(require("diffusers", "study"), str(name), None)
    if kind is None:
        return None
    try:
        scheduler = kind.from_config(dict(settings))
        return FlowMatching(scheduler) if hasattr(scheduler, "scale_noise") else Diffusion(scheduler)
    except (TypeError, ValueError):
        return None
