"""The bundled demonstration model and image groups, none of which needs a download.

Training and exporting live in `headscope.zoo.train` and `headscope.zoo.card`, which import torch and are therefore not
imported here.
"""

from headscope.counter import counter_normal, counter_uniform
from headscope.zoo.faces import face_attributes, render_face
from headscope.zoo.groups import GROUPS, SPLITS, FolderGroup, ImageGroup, Item, open_group
from headscope.zoo.model import load_pipeline

__all__ = [
    "GROUPS",
    "SPLITS",
    "FolderGroup",
    "ImageGroup",
    "Item",
    "counter_normal",
    "counter_uniform",
    "face_attributes",
    "load_pipeline",
    "open_group",
    "render_face",
]
