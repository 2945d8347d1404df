"""The sweeps of a study, in the order they run, and what each takes from those before it.

Reading order: sweeping (what they have in common), entropies, removal, roles, circuits.
"""

from headscope.demonstration.stages.circuits import circuit, circuits
from headscope.demonstration.stages.entropies import observe, untrained
from headscope.demonstration.stages.removal import (
    carriers_name,
    confirm,
    control_of,
    curves,
    discover,
    drawn,
    selected_sets,
    targets_of,
    top_name,
    wholes_of,
)
from headscope.demonstration.stages.roles import causal, roles, ties

__all__ = [
    "carriers_name",
    "causal",
    "circuit",
    "circuits",
    "confirm",
    "control_of",
    "curves",
    "discover",
    "drawn",
    "observe",
    "roles",
    "selected_sets",
    "targets_of",
    "ties",
    "top_name",
    "untrained",
    "wholes_of",
]
