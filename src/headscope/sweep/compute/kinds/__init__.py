"""The kinds of unit, one file each, in the order they run: what a later kind reads, an earlier one has written.

A new kind is a file here with a subclass of `UnitKind`, and a line below, after the kinds that it reads. Plans, the run
directory, status, estimates and progress know it from then on. One with `optional = True` runs only where it is named:
`SweepConfig.kinds`, `headscope sweep --kind NAME`. That changes no ids of other sweeps; a new field of `SweepConfig`
would change all of them, unless `plan.config` lists it among the later ones.

One with `repeated = True` has units for every draw of the noise, and takes `unit.replicate` for noise and labels.

`Context` has the items, the model and what else units need; `observations` is a plain example. Work that goes through
`context.rows.run` is done again with fewer rows where memory ran out, so write a result to its place, never append it.
"""

from headscope.sweep.plan.units import KINDS as KINDS

# isort: off
from headscope.sweep.compute.kinds import images as images
from headscope.sweep.compute.kinds import reference as reference
from headscope.sweep.compute.kinds import observations as observations
from headscope.sweep.compute.kinds import attributions as attributions
from headscope.sweep.compute.kinds import ablations as ablations
from headscope.sweep.compute.kinds import generations as generations
from headscope.sweep.compute.kinds import regions as regions
from headscope.sweep.compute.kinds import features as features
from headscope.sweep.compute.kinds import key_mass as key_mass
from headscope.sweep.compute.kinds import counterparts as counterparts
from headscope.sweep.compute.kinds import circuits as circuits
from headscope.sweep.compute.kinds import paths as paths
