"""How fast denoisers run with headscope watching them, beside what else one could do.

Reading order: timing, memory and records (the measuring core, which the scripts of the repository's bench/ share),
configurations (models and their inputs), denoisers (pipelines around them), ways (stock, headscope and its peers),
measure (seconds, bytes and operations of a way), results (the file of a run), throughput (its table and plot).

The core needs torch and NumPy alone, so the names below are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headscope.bench.denoisers import DENOISERS
    from headscope.bench.results import Settings, run_bench

__all__ = ["DENOISERS", "Settings", "run_bench"]

_LAZY = {
    "DENOISERS": "headscope.bench.denoisers",
    "Settings": "headscope.bench.results",
    "run_bench": "headscope.bench.results",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'headscope.bench' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
