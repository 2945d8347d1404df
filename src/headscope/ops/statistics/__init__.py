"""Statistics of attention's probabilities: an open set.

Reading order: statistic (the class of all, and how to write your own), rows, distance, groups and keys (the built-in
ones), requests (names and objects that a caller asks for, and the specs that an operator gets). Every file of this
folder is imported, and defining a class registers it.
"""

import importlib
import pkgutil

from headscope.ops.statistics.distance import Distance
from headscope.ops.statistics.groups import GroupEntropy, GroupMass, GroupStatistic
from headscope.ops.statistics.keys import KeyMass
from headscope.ops.statistics.requests import requested_statistics, restore_statistics
from headscope.ops.statistics.rows import CollisionEntropy, Entropy, LogSumExp, MaxLogit, MaxProb
from headscope.ops.statistics.statistic import CLASSES, STATISTICS, Statistic

__all__ = [
    "CLASSES",
    "STATISTICS",
    "CollisionEntropy",
    "Distance",
    "Entropy",
    "GroupEntropy",
    "GroupMass",
    "GroupStatistic",
    "KeyMass",
    "LogSumExp",
    "MaxLogit",
    "MaxProb",
    "Statistic",
    "requested_statistics",
    "restore_statistics",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
