"""What the sweeps of a study have in common."""

from __future__ import annotations

from typing import Any

from headscope.demonstration.config import StudyConfig
from headscope.sweep import SweepConfig


def ablating(config: StudyConfig, **fields: Any) -> SweepConfig:
    """A sweep that removes heads."""
    fields = {"groups": config.ablate_groups, **fields}
    return sweeping(config, bands=config.ablate_bands, observe=False, reference_items=config.reference_items, **fields)


def sweeping(config: StudyConfig, **fields: Any) -> SweepConfig:
    """A sweep of the study's model, with its draws, seed and device."""
    fields = {"model": config.model, "draws": config.draws, **fields}
    return SweepConfig(seed=config.seed, device=config.device, dtype=config.dtype, **fields)
