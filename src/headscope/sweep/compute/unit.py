"""Computing one unit of work."""

import torch

from headscope.sweep.compute.calls import Diverged
from headscope.sweep.compute.context import Context
from headscope.sweep.compute.kinds import KINDS
from headscope.sweep.plan.units import Advance, Unit
from headscope.sweep.store.store import Results


def compute_unit(unit: Unit, context: Context, advance: Advance) -> Results:
    """Compute a unit; `advance` is called with the rows of every batch of forwards."""
    kind = KINDS[unit.kind]
    with torch.inference_mode(not kind.differentiates):
        try:
            return kind.compute(unit, context, advance)
        except Diverged as error:
            # the model runs differently on these inputs: from here on, whole forwards
            assert context.prefix is not None
            context.prefix.reason = str(error)
            return kind.compute(unit, context, advance)
