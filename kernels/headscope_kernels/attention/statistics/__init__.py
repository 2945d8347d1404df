"""Statistics of one attention row that the forward pass computes while it runs: an open set, one file for each kind.

Every file of this folder is imported, and registers the statistics that it defines.
"""

import importlib
import pkgutil

from headscope_kernels.attention.statistics.contract import (
    STATISTICS,
    BoundStatistic,
    RowStatistic,
    functions_key,
    statistic_set,
)

__all__ = ["STATISTICS", "BoundStatistic", "RowStatistic", "functions_key", "statistic_set"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
