"""How a unit of work is computed.

Reading order: unit, edits (a plan's edits as a scope's), scores, sharing and calls (what edited forwards take over
from clean ones), graphs (CUDA graphs), steps (of generation), fitting (how many rows fit), estimate."""
