"""The kinds of unit, one file each, in the order they run: what a later kind reads, an earlier one has written.

A new kind is a file here with a subclass of `UnitKind`, and a line below, after the kinds that it reads. Plans, the run
directory, status, estimates and progress know it from then on. If it is to run only when it is asked for, its `plan`
looks at a field of `SweepConfig`, a new one if none fits.
"""

from headscope.sweep.plan.units import KINDS as KINDS

# isort: off
from headscope.sweep.compute.kinds import images as images
from headscope.sweep.compute.kinds import reference as reference
from headscope.sweep.compute.kinds import observations as observations
from headscope.sweep.compute.kinds import attributions as attributions
from headscope.sweep.compute.kinds import ablations as ablations
from headscope.sweep.compute.kinds import generations as generations
