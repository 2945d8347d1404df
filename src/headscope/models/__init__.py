"""diffusers models: attention sites, recording, edits, tasks and the drop-in attention processor.

A site is an attention module of the denoiser. Reading order, each importing only those before it:

- structure: the sites that there are, and what their tokens are (image, text, frames).
- hooks: how a site's attention is reached while the model runs, and what the contexts of a Scope are told.
- recording: statistics and tensors of the attention, as tables, maps and plots.
- editing: changes to the attention of some heads.
- attending: one attention call, edited and recorded.
- tasks: what a model is asked to do with an image; each family of pipelines has a file.
- attribution: what the model's loss says of every head, from gradients.
- scope: `Scope`, which opens the contexts.

Beside them: processor (the drop-in attention processor).
"""

from headscope.models import tasks
from headscope.models.attribution import Attribution
from headscope.models.editing.edits import Patch, Where
from headscope.models.processor import AttnProcessor
from headscope.models.recording.recording import Recording
from headscope.models.recording.regions import CounterpartMass
from headscope.models.scope import Scope
from headscope.models.structure.sites import Site
from headscope.models.tasks import *  # noqa: F403

__all__ = ["AttnProcessor", "Attribution", "CounterpartMass", "Patch", "Recording", "Scope", "Site", "Where"]
# every family of tasks
__all__ += tasks.__all__
