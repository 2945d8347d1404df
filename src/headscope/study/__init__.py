"""The experiments of a study and their statistics. Needs the extra study (scipy, polars)."""

from headscope.study.ablation import select_heads
from headscope.study.analysis import StudyResult, analyse, analyse_sweep
from headscope.study.inference import Estimate

__all__ = ["Estimate", "StudyResult", "analyse", "analyse_sweep", "select_heads"]
