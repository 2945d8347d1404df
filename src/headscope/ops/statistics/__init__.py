"""Statistics of attention's probabilities: an open set.

Reading order: statistic (what one is, and how to write your own), rows, distance, groups and keys (the built-in ones),
requests (from what a caller asks for to what an operator gets).
"""

from headscope.ops.statistics.distance import Distance
from headscope.ops.statistics.groups import GroupEntropy, GroupMass
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
    "KeyMass",
    "LogSumExp",
    "MaxLogit",
    "MaxProb",
    "Statistic",
    "requested_statistics",
    "restore_statistics",
]
