"""Several cotangents at once: what torch's two vmaps do with a backward operator.

torch.vmap asks for an operator's rule. `torch.autograd.grad(..., is_grads_batched=True)` has an older vmap of its own,
whose batched tensors reach an operator as they are, under a dispatch key of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Operator = Callable[..., list[Tensor]]
# torch has no more levels of the older vmap
_LEVELS = range(1, 65)


def is_mapped(tensor: Tensor) -> bool:
    """True inside either vmap, for a tensor with a batch dimension that only the vmap sees."""
    return is_batchedtensor(tensor) or is_legacy_batchedtensor(tensor)


def rule(operator: Operator) -> Callable[..., tuple[list[Tensor], list[int]]]:
    """The rule of a backward operator for torch.library.register_vmap."""

    def batched(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[list[Tensor], list[int]]:
        gradients = _mapped(operator, info.batch_size, in_dims, arguments)
        return gradients, [0] * len(gradients)

    return batched


def older_rule(operator: Operator) -> Operator:
    """The implementation of a backward operator for the dispatch key of the older vmap's tensors."""

    def batched(*arguments: Any) -> list[Tensor]:
        leaves, structure = tree_flatten(arguments)
        level, dims, size = _outermost(leaves)
        pairs = zip(leaves, dims, strict=True)
        plain = [leaf if dim is None else torch._remove_batch_dim(leaf, level, size, dim) for leaf, dim in pairs]
        gradients = _mapped(operator, size, tree_unflatten(dims, structure), tree_unflatten(plain, structure))
        return [torch._add_batch_dim(gradient, 0, level) for gradient in gradients]

    return batched


def _outermost(leaves: Sequence[Any]) -> tuple[int, list[int | None], int]:
    """The outermost level of the older vmap, for each leaf its batch dimension there or None, and the batch's size."""
    batched = [isinstance(leaf, Tensor) and is_legacy_batchedtensor(leaf) for leaf in leaves]
    for level in _LEVELS:
        # what has no such level comes out with a first dimension of the size that is told, which is 0
        sizes = [
            torch._remove_batch_dim(leaf, level, 0, 0).shape[0] if at_all else 0
            for leaf, at_all in zip(leaves, batched, strict=True)
        ]
        if any(sizes):
            return level, [0 if size else None for size in sizes], max(sizes)
    raise RuntimeError("headscope.attention: got no cotangents, expected at least one where is_grads_batched=True")


def _mapped(operator: Operator, size: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> list[Tensor]:
    """The gradients for each entry of a batch, along a dimension in front.

    Args:
        size: the number of entries.
        in_dims: the batch dimension of each argument, None where it has none; lists for lists.
        arguments: the operator's: those of call.Cotangents and then those of call.Call.
    """
    output, statistics, several, *others = arguments
    output_dim, statistic_dims, *other_dims = in_dims
    if several is None and all(dim is None for dim in tree_flatten(other_dims)[0]):
        pairs = zip(statistics, statistic_dims, strict=True)
        together = [_in_front(tensor, dim, size) for tensor, dim in pairs]
        return operator(_in_front(output, output_dim, size), together, size, *others)
    leaves, structure = tree_flatten(tuple(arguments))
    leaf_dims = tree_flatten(tuple(in_dims))[0]
    each = []
    for entry in range(size):
        pairs = zip(leaves, leaf_dims, strict=True)
        chosen = [leaf if dim is None else leaf.select(dim, entry) for leaf, dim in pairs]
        each.append(operator(*tree_unflatten(chosen, structure)))
    return [torch.stack(gradients) for gradients in zip(*each, strict=True)]


def _in_front(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The tensor with its batch dimension in front; one that has none is repeated."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
