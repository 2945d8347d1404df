"""The experiments of a study and their statistics. Needs the extra study (scipy, polars).

Reading order: inference (estimates with intervals, tests), finite (numbers that aren't), entropy and contrast (the
first experiment: entropies, and two groups compared beside controls), edits, ablation, fill_error, together, curves and
interventions (the second: heads removed), attributions and further (other scores), roles (what heads attend to) and
circuits (which of them are enough), analysis (all of it, from a run's tables), compare (two runs). docs/study.md
defines every quantity.
"""

from headscope.study.ablation import select_heads
from headscope.study.analysis import StudyResult, analyse, analyse_sweep
from headscope.study.inference import Estimate

__all__ = ["Estimate", "StudyResult", "analyse", "analyse_sweep", "select_heads"]
