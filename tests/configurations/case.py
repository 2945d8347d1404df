"""What an entry of the table is, and the tensors that entries are made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A tiny configuration of a diffusers class, with inputs for its forward.

    Attributes:
        options: the class's constructor arguments; whatever is left out keeps its default.
        inputs: makes the forward's keyword arguments, batches of two wherever the class takes them.
        samples: how many samples the inputs are.
        build: makes the model from `options` where the constructor alone does not.
        frames_for_heads: attention has one head, and frames where heads stand: [batch, frames, tokens, dim].
    """

    options: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]
    samples: int = 2
    build: Callable[[type, Mapping[str, Any]], nn.Module] = field(default=lambda kind, options: kind(**options))
    frames_for_heads: bool = False


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def seen(*shape: int) -> Tensor:
    """A mask that hides nothing."""
    return torch.ones(shape, dtype=torch.bool)


def padded(batch: int, keys: int) -> Tensor:
    """A bool mask [batch, keys] that hides the last key of the last sample."""
    mask = seen(batch, keys)
    mask[-1, -1] = False
    return mask


def timesteps(batch: int = 2, value: float = 500.0) -> Tensor:
    return torch.full((batch,), value)


def steps(batch: int = 2, value: int = 500) -> Tensor:
    return torch.full((batch,), value)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


def grid_ids(height: int, width: int, axes: int = 3) -> Tensor:
    """Token positions [height * width, axes]: row and column on axes 1 and 2, 0 elsewhere."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.flatten(0, 1)
