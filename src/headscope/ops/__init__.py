"""headscope.attention(): one call for the output, its statistics and head edits.

Reading order: api (the call), edits, regions and statistics (what it takes), validation, backends (who serves it), call
(what they are told), schema (registration with torch), attend and gradients (the formula in plain torch), then one file
per backend; cpu_library and cpu_structs are the C++ kernel behind ctypes.
"""

from headscope.ops.api import AttentionResult, attention, scaled_dot_product_attention
from headscope.ops.backends import backend_status
from headscope.ops.edits import HeadEdit
from headscope.ops.regions import Regions
from headscope.ops.statistics import STATISTICS, Distance, GroupEntropy, GroupMass, Statistic

__all__ = [
    "STATISTICS",
    "AttentionResult",
    "Distance",
    "GroupEntropy",
    "GroupMass",
    "HeadEdit",
    "Regions",
    "Statistic",
    "attention",
    "backend_status",
    "scaled_dot_product_attention",
]
