"""Tiny configurations of every diffusers class that reaches scaled_dot_product_attention, and what is checked of them.

Reading order: case (an entry), unets ... sounds (the entries), reach (which classes must have one), examine (what is
checked of an entry), hooks (diffusers' hooks, caches and guiders), perturbed (its perturbed-attention pipelines),
watched (a spy on those), table (docs/coverage.md).
"""

from configurations import autoencoders, controls, images, sounds, unets, videos
from configurations.case import Case

# "Class" or "Class, variant" -> its case
CASES: dict[str, Case] = {
    **unets.CASES,
    **images.CASES,
    **videos.CASES,
    **controls.CASES,
    **sounds.CASES,
    **autoencoders.CASES,
}
