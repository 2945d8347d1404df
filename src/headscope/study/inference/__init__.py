"""Intervals and tests whose unit of replication is the source of an image, never the image."""

from headscope.study.inference import settings
from headscope.study.inference.energy import ENERGY, EnergyTest, energy_test
from headscope.study.inference.frames import (
    ABSOLUTE,
    DIFFERENCE,
    HOLM,
    MEAN,
    RATIO,
    RELATIVE,
    SIGN_FLIPS,
    Estimate,
    degradations,
    differences,
    holm,
    means,
    plain_text,
    ratios,
    source_means,
    with_holm,
)
from headscope.study.inference.settings import FEWEST_SOURCES, LEVEL, RESAMPLES

__all__ = [
    "ABSOLUTE",
    "DIFFERENCE",
    "ENERGY",
    "FEWEST_SOURCES",
    "HOLM",
    "LEVEL",
    "MEAN",
    "RATIO",
    "RELATIVE",
    "RESAMPLES",
    "SIGN_FLIPS",
    "EnergyTest",
    "Estimate",
    "degradations",
    "differences",
    "energy_test",
    "holm",
    "means",
    "plain_text",
    "ratios",
    "settings",
    "source_means",
    "with_holm",
]
