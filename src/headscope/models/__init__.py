"""diffusers models: attention sites, recording, edits, tasks and the drop-in attention processor.

Reading order: sites (where attention is), routing (how it is reached), scope (the contexts), recording and editing
(what they hold), processor (the drop-in), tasks (what a model is asked to do).
"""

from headscope.models.processor import AttnProcessor
from headscope.models.recording import Recording
from headscope.models.scope import Scope
from headscope.models.sites import Site
from headscope.models.tasks import LatentTask, PixelTask, Task

__all__ = ["AttnProcessor", "LatentTask", "PixelTask", "Recording", "Scope", "Site", "Task"]
