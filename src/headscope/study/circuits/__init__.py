"""Circuits: sets of heads that are enough for a group of images, and how they hang together.

Reading order: trace (what the search on discover did, from its table), sets (what is removed on confirm to test it),
faithfulness (with completeness and minimality), pairs, analysis (all of it, edges and overlap).
docs/study.md defines every quantity.
"""

from headscope.study.circuits.analysis import Circuits, analyse_circuits
from headscope.study.circuits.sets import confirm_sets
from headscope.study.circuits.trace import circuit_of

__all__ = ["Circuits", "analyse_circuits", "circuit_of", "confirm_sets"]
