"""The bundled models and image groups, none of which needs a download.

Training and exporting live in `headscope.zoo.train` and `headscope.zoo.card`, which import torch and are therefore not
imported here.
"""

from headscope.counter import counter_normal, counter_uniform
from headscope.zoo.faces import face_attributes, render_face
from headscope.zoo.groups import GROUPS, SPLITS, FolderGroup, ImageGroup, Item, Tied, open_group
from headscope.zoo.loading import BUNDLED, load_pipeline
from headscope.zoo.model import DEFAULT_MODEL, MODELS

__all__ = [
    "BUNDLED",
    "DEFAULT_MODEL",
    "GROUPS",
    "MODELS",
    "SPLITS",
    "FolderGroup",
    "ImageGroup",
    "Item",
    "Tied",
    "counter_normal",
    "counter_uniform",
    "face_attributes",
    "load_pipeline",
    "open_group",
    "render_face",
]
