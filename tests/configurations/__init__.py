"""Tiny configurations of every diffusers class that reaches scaled_dot_product_attention, and their checks.

Reading order: case (an entry); unets, joint_images, images, wan, videos, controls, sounds and autoencoders (the
entries); reach (the classes that must have one), examine (the checks of an entry), hooks (diffusers' hooks, caches and
guiders), perturbed (its perturbed-attention pipelines), watched (a spy on those), table (docs/coverage.md).
"""

from configurations import autoencoders, controls, images, joint_images, sounds, unets, videos, wan
from configurations.case import Case

# "Class" or "Class, variant" -> its case
CASES: dict[str, Case] = {
    **unets.CASES,
    **joint_images.CASES,
    **images.CASES,
    **wan.CASES,
    **videos.CASES,
    **controls.CASES,
    **sounds.CASES,
    **autoencoders.CASES,
}
