"""Several changes to one attention call, as one call of headscope's operator and gates after it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headscope._shapes import Float, SiteKey, SiteQuery, SiteValue
from headscope.models.editing.edits import FACTORS
from headscope.models.editing.rows import Change
from headscope.ops import HeadEdit


class Combined(NamedTuple):
    """Changes as one attention call.

    Attributes:
        query, key, value: patched.
        edit: the operator's.
        later: gates, each with its fill, that come after the operator.
    """

    query: SiteQuery
    key: SiteKey
    value: SiteValue
    edit: HeadEdit | None = None
    later: tuple[HeadEdit, ...] = ()


def combine(changes: Sequence[Change], query: SiteQuery, key: SiteKey, value: SiteValue) -> Combined:
    """Apply the changes' patches, and merge their gates and factors as far as that is the same.

    Raises:
        ValueError: a patch of a shape that doesn't broadcast to the head's own tensor.
    """
    query, key, value = _patched(changes, query, key, value)
    factors, gates = _factors(changes), _gates(changes)
    if not gates:
        return Combined(query, key, value, HeadEdit(**factors) if factors else None)
    return Combined(query, key, value, replace(gates[0], **factors), tuple(gates[1:]))


def _patched(changes: Sequence[Change], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tensors = {"q": query, "k": key, "v": value}
    for change in changes:
        for quantity, heads, patch in change.patches:
            stock = tensors[quantity]
            if any(size not in (1, expected) for size, expected in zip(patch.shape[1:], stock.shape[1:], strict=True)):
                raise ValueError(
                    f"patch: got {quantity} of shape {list(patch.shape)}, expected {list(stock.shape)} or what"
                    " broadcasts to it"
                )
            stock, patch = (_for_every_head(tensor, heads.shape[1]) for tensor in (stock, patch))
            tensors[quantity] = torch.where(heads[..., None, None], patch.to(stock.dtype), stock)
    most = max(tensors["k"].shape[1], tensors["v"].shape[1])
    return tensors["q"], _for_every_head(tensors["k"], most), _for_every_head(tensors["v"], most)


def _factors(changes: Sequence[Change]) -> dict[str, Tensor]:
    """Temperatures and key_scales multiplied, key_biases added."""
    merged: dict[str, Tensor] = {}
    for change in changes:
        for name in FACTORS:
            factor: Tensor | None = getattr(change.edit, name)
            if factor is None:
                continue
            if name not in merged:
                merged[name] = factor
            elif name == "key_bias":
                merged[name] = merged[name] + factor
            else:
                merged[name] = merged[name] * factor
    return merged


def _gates(changes: Sequence[Change]) -> list[HeadEdit]:
    """The gates with their fills, in order; neighbours of the same fill as one."""
    merged: list[tuple[Tensor, Any]] = []
    for change in changes:
        gate, fill = change.edit.gate, change.edit.fill
        if gate is None:
            continue
        # of one fill, two gates are one: g2 (g1 a + (1 - g1) f) + (1 - g2) f
        if merged and merged[-1][1] is fill:
            merged[-1] = (merged[-1][0] * gate, fill)
        else:
            merged.append((gate, fill))
    return [HeadEdit(gate, fill) for gate, fill in merged]


def _for_every_head(
    tensor: Float[Tensor, "rows _heads tokens dim"], heads: int
) -> Float[Tensor, "rows _each_head tokens dim"]:
    """Keys or values that groups of heads share, as each head's own."""
    if tensor.shape[1] == 1:
        return tensor.expand(-1, heads, -1, -1)
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)
