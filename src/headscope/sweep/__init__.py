"""Sweeps: items x timesteps observed, and heads edited in turn or in sets, resumable, in Parquet.

A sweep is a plan of small units of work, each of which is computed by itself and written whole. Four rooms tell how,
each of which imports only those named before it:

    plan       a configuration, the model and the items become a list of units
    store      the run directory: the files of every unit that is done, claims on units, and how runs are read
    compute    how a unit of each kind is computed
    work       processes that share the units of a run: here, on several GPUs, in a cluster

`headscope.sweep(...)` (api) calls all of it.
"""

import sys

from headscope.sweep.api import SweepModule
from headscope.sweep.compute.opened import Execution
from headscope.sweep.plan.config import SweepConfig
from headscope.sweep.plan.sets import HeadSet
from headscope.sweep.store.room import DiskFull
from headscope.sweep.store.run import Run
from headscope.sweep.work.launch import SweepFailed, Workers, run_sweep

__all__ = ["DiskFull", "Execution", "HeadSet", "Run", "SweepConfig", "SweepFailed", "Workers", "run_sweep"]

# headscope.sweep(...)
sys.modules[__name__].__class__ = SweepModule
