"""Images as the models hold them, and back."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headscope._shapes import Float, Images, Sample
from headscope.models.tasks.task import TaskItem


def to_signed(items: Sequence[TaskItem], size: int) -> Sample:
    """The items' images in [-1, 1], of that edge.

    Raises:
        ValueError: an item has no image, or one of another shape or dtype.
    """
    for item in items:
        image = item.image
        if image is None:
            raise ValueError(f"items: {item.key!r} has no image, which the teacher-forced loss needs")
        if image.dtype != np.uint8 or image.shape != (size, size, 3):
            raise ValueError(
                f"items: {item.key!r} has an image {list(image.shape)} of {image.dtype},"
                f" expected [{size}, {size}, 3] of uint8"
            )
    images = np.stack([item.image for item in items])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def check_pixels(images: Tensor | np.ndarray, dtype: torch.dtype) -> None:
    """Raises ValueError where a model of that dtype made an image that is none: as integers its pixels would be black,
    and its distance from another a number like any."""
    if not bool((abs(images) < np.inf).all()):
        raise ValueError(f"generate: the model made NaN or infinite pixels in {dtype}; float32 may not")


def to_images(sample: Float[Tensor, "items 3 height width"]) -> Images:
    """Images from a sample in [-1, 1].

    Raises:
        ValueError: a pixel is NaN or infinite.
    """
    check_pixels(sample, sample.dtype)
    scaled = sample.float().clamp(-1, 1).add(1.0).mul(127.5).round()
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
