"""Intervals and tests whose unit of replication is the source of an image, never the image.

A *source* is the photograph, identity or file that an image came from. Crops of one photograph resemble each other,
so counting them as independent makes intervals far too narrow. Everything here therefore takes one row per item and
first replaces the items of a source by their mean; what is resampled, permuted and counted are sources.

Reading order: sources (rows to arrays, what makes a quantity void), smooth (functions of means, their standard error
and bootstrap-t distribution), intervals, permutation (of two groups), families (corrections, selection), frames (the
tables), components (variance between sources, items and draws of noise), combinations (joint effects against sums),
energy (two groups compared in everything at once). How well all of it holds: bench/statistics.py.
"""

from headscope.study.inference import settings
from headscope.study.inference.combinations import combined
from headscope.study.inference.components import COMPONENTS, components, linearised
from headscope.study.inference.energy import ENERGY, EnergyTest, energy_test
from headscope.study.inference.estimates import ABSOLUTE, DIFFERENCE, MEAN, RATIO, RELATIVE, SHARE, Estimate, plain_text
from headscope.study.inference.families import HOLM, MAX_T, holm, is_finding, strongest, with_holm
from headscope.study.inference.frames import degradation_differences, degradations, differences, means, ratios, shares
from headscope.study.inference.intervals import EFFECT_TEST, INTERVAL
from headscope.study.inference.permutation import DIFFERENCE_TEST
from headscope.study.inference.settings import FEWEST_SOURCES, LEVEL, RESAMPLES, SIGNIFICANT
from headscope.study.inference.sources import VOID, source_means

__all__ = [
    "ABSOLUTE",
    "COMPONENTS",
    "DIFFERENCE",
    "DIFFERENCE_TEST",
    "EFFECT_TEST",
    "ENERGY",
    "FEWEST_SOURCES",
    "HOLM",
    "INTERVAL",
    "LEVEL",
    "MAX_T",
    "MEAN",
    "RATIO",
    "RELATIVE",
    "RESAMPLES",
    "SHARE",
    "SIGNIFICANT",
    "VOID",
    "EnergyTest",
    "Estimate",
    "combined",
    "components",
    "degradation_differences",
    "degradations",
    "differences",
    "energy_test",
    "holm",
    "is_finding",
    "linearised",
    "means",
    "plain_text",
    "ratios",
    "settings",
    "shares",
    "source_means",
    "strongest",
    "with_holm",
]
