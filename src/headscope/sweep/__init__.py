"""Sweeps: items x timesteps observed, and heads edited in turn or in sets, resumable, in Parquet.

Reading order: config (what is asked), items and sources (images, prompts and the model), plan (the units of work), unit
(how one is computed) with sharing (what edited forwards take over from clean ones), store and claims (the run
directory), worker (one process's share), executors (where the processes run), runner (the whole), run (reading it), api
(headscope.sweep(...), which calls this package).
"""

import sys

from headscope.sweep.api import SweepModule
from headscope.sweep.compute.opened import Execution
from headscope.sweep.plan.config import HeadSet, SweepConfig
from headscope.sweep.store.room import DiskFull
from headscope.sweep.store.run import Run
from headscope.sweep.work.launch import SweepFailed, Workers, run_sweep

__all__ = ["DiskFull", "Execution", "HeadSet", "Run", "SweepConfig", "SweepFailed", "Workers", "run_sweep"]

# headscope.sweep(...)
sys.modules[__name__].__class__ = SweepModule
