"""Do two groups of images differ in how spread out the attention of the heads is, and by what else could they?

Reading order: arrays (entropies by source), divergence (how far apart, and how far by chance), comparison (all
questions of one pair of groups), controls (the pairs that a comparison is read against).
"""

from headscope.study.contrast.comparison import Comparison, compare_groups
from headscope.study.contrast.controls import Control, controls_of

__all__ = ["Comparison", "Control", "compare_groups", "controls_of"]
