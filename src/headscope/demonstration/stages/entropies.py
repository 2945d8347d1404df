"""The sweeps that look at entropies: of the model, and of the same model before it was trained."""

from __future__ import annotations

from headscope.demonstration.config import MATCHED, StudyConfig
from headscope.demonstration.stages.sweeping import sweeping
from headscope.sweep import SweepConfig
from headscope.sweep.plan.config import SPLITS


def observe(config: StudyConfig) -> SweepConfig:
    """Every head's entropy, all groups, training items as well as held-out ones."""
    groups = tuple(dict.fromkeys((*config.groups, *config.contrast, *MATCHED.values())))
    return sweeping(
        config,
        groups=groups,
        splits=("train", *SPLITS),
        items=config.items,
        bands=config.observe_bands,
        fills=(),
        scores=(),
    )


def untrained(config: StudyConfig) -> SweepConfig:
    """The contrast's groups seen by the model before it was trained."""
    return sweeping(
        config,
        model=f"untrained:{config.model}",
        groups=config.contrast,
        items=config.items,
        bands=config.observe_bands,
        fills=(),
        scores=(),
    )
