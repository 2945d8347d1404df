"""The application above study and report: `headscope study` and `headscope report` in one call each.

Reading order: config (the settings of a study), stages (its sweeps), study (running them), results (their
analysis and the page), runs (the
page of a plain sweep, and what every page says of a run), comparison (the page of two runs), subject (what the heads of
a trained model do, for its card).
"""

from headscope.demonstration.comparison import compare_runs
from headscope.demonstration.config import StudyConfig
from headscope.demonstration.runs import report_sweep
from headscope.demonstration.study import is_study, report_study, run_study
from headscope.demonstration.subject import describe_heads

__all__ = ["StudyConfig", "compare_runs", "describe_heads", "is_study", "report_study", "report_sweep", "run_study"]
