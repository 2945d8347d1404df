"""The experiments of a study and their statistics. Needs the extra study (scipy, polars).

Reading order: inference (estimates with intervals, tests), finite (values that are left out), entropy and ablation (the
experiments), further (scores without a section of their own), analysis (all of it, from a run's tables).
"""

from headscope.study.ablation import select_heads
from headscope.study.analysis import StudyResult, analyse, analyse_sweep
from headscope.study.inference import Estimate

__all__ = ["Estimate", "StudyResult", "analyse", "analyse_sweep", "select_heads"]
