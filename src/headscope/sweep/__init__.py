"""Sweeps: items x timesteps observed, and heads ablated in turn, resumable, in Parquet.

Reading order: config (what is asked), items (images, prompts and the model), plan (the units of work), unit (how one
is computed), store (where it is kept), runner (the loop).
"""

from headscope.sweep.config import SweepConfig
from headscope.sweep.runner import run_sweep
from headscope.sweep.store import Run

__all__ = ["Run", "SweepConfig", "run_sweep"]
