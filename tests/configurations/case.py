"""An entry of the table, and the tensors that entries are made of."""

from collections.abc import Callable, Mapping, Sequence
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
        samples: how many samples the inputs are: two, or one where the class takes no more.
        build: makes the model from `options` where the constructor alone does not.
        frames_for_heads: attention has one head, and frames where heads stand: [batch, frames, tokens, dim].
        shared: names of inputs that all samples share though they look like a batch of two.
        folded: rows per sample of inputs whose first dimension is samples and frames.
        layers_first: names of inputs whose second dimension is the samples.
    """

    options: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]
    samples: int = 2
    build: Callable[[type, Mapping[str, Any]], nn.Module] = field(default=lambda kind, options: kind(**options))
    frames_for_heads: bool = False
    shared: frozenset[str] = frozenset()
    folded: Mapping[str, int] = field(default_factory=dict)
    layers_first: frozenset[str] = frozenset()

    def batch(self, samples: Sequence[int]) -> dict[str, Any]:
        """The inputs of some of three samples, two of which `inputs` makes."""
        inputs = self.inputs()
        if self.samples == 1:
            return inputs
        return {name: self._of(name, value, samples) for name, value in inputs.items()}

    def _of(self, name: str, value: Any, samples: Sequence[int]) -> Any:
        if name in self.shared:
            return value
        if name in self.folded:
            return _of(value.unflatten(0, (2, self.folded[name])), samples).flatten(0, 1)
        if name in self.layers_first:
            return _of(value.transpose(0, 1), samples).transpose(0, 1)
        return _of(value, samples)


def _of(value: Any, samples: Sequence[int]) -> Any:
    """Whatever is of two samples, for some of three."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != 2:
            return value
        third = value[1]
        # other than the others, but for timesteps and masks
        if value.is_floating_point() and not torch.equal(value[0], value[1]):
            third = 0.8 * value[0] - 0.6 * value[1]
        return torch.stack([*value, third])[list(samples)]
    if isinstance(value, dict):
        return {name: _of(own, samples) for name, own in value.items()}
    if isinstance(value, list) and len(value) == 2 and not all(_is_pair(own) for own in value):
        return [[*value, value[1]][sample] for sample in samples]
    if isinstance(value, (list, tuple)):
        return type(value)(_of(own, samples) for own in value)
    return value


def _is_pair(value: Any) -> bool:
    """A batch of two itself, or a number that belongs to one."""
    return not isinstance(value, (Tensor, list)) or len(value) == 2


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
