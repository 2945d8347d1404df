"""headscope: see and edit what every attention head of a diffusion model does."""

import importlib
from typing import TYPE_CHECKING

from headscope._version import __version__

if TYPE_CHECKING:
    from headscope.models import AttnProcessor, Attribution, CounterpartMass, Patch, Recording, Scope, Site, Task, Where
    from headscope.ops import (
        AttentionResult,
        Distance,
        GroupEntropy,
        GroupMass,
        HeadEdit,
        Regions,
        Statistic,
        attention,
        backend_status,
        scaled_dot_product_attention,
    )
    from headscope.sweep.api import SweepModule

    sweep: SweepModule

# public name -> the module it is loaded from when first used
_LAZY = {
    "AttentionResult": "headscope.ops",
    "AttnProcessor": "headscope.models",
    "Attribution": "headscope.models",
    "CounterpartMass": "headscope.models",
    "Distance": "headscope.ops",
    "GroupEntropy": "headscope.ops",
    "GroupMass": "headscope.ops",
    "HeadEdit": "headscope.ops",
    "Patch": "headscope.models",
    "Recording": "headscope.models",
    "Regions": "headscope.ops",
    "Scope": "headscope.models",
    "Site": "headscope.models",
    "Statistic": "headscope.ops",
    "Task": "headscope.models",
    "Where": "headscope.models",
    "attention": "headscope.ops",
    "backend_status": "headscope.ops",
    "scaled_dot_product_attention": "headscope.ops",
}

__all__ = [
    "AttentionResult",
    "AttnProcessor",
    "Attribution",
    "CounterpartMass",
    "Distance",
    "GroupEntropy",
    "GroupMass",
    "HeadEdit",
    "Patch",
    "Recording",
    "Regions",
    "Scope",
    "Site",
    "Statistic",
    "Task",
    "Where",
    "__version__",
    "attention",
    "backend_status",
    "scaled_dot_product_attention",
]


def __getattr__(name: str):
    # a package that can be called; not in __all__, because it needs the extra "diffusers"
    if name == "sweep":
        return importlib.import_module("headscope.sweep")
    if name not in _LAZY:
        raise AttributeError(f"module 'headscope' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return found
