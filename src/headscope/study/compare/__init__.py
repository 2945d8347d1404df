"""Two runs compared: two models, or two checkpoints of one.

Reading order: sides (the runs), schedules (timesteps), matching (pairs of rows, and what has none), comparison (the
numbers).
"""

from headscope.study.compare.comparison import Comparison, compare
from headscope.study.compare.matching import KINDS
from headscope.study.compare.sides import Differing, Side

__all__ = ["KINDS", "Comparison", "Differing", "Side", "compare"]
