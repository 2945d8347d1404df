"""HeadEdit: the changes to the heads of one attention call."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headscope._shapes import FillTensor, Float, PerHead, PerKey

Fill = Float[Tensor, "..."] | Literal["uniform", "identity"] | None


@dataclass(frozen=True)
class HeadEdit:
    """An edit of heads, per sample and per head.

        p = softmax((scale / temperature) * query . key + key_bias + mask)
        attention = sum_j p_j * key_scale_j * value_j
        output = gate * attention + (1 - gate) * fill

    Gradients flow into every tensor of it. gate and temperature are [batch or 1, heads], key_bias and key_scale
    [batch or 1, heads or 1, keys]; all are floating-point.

    Attributes:
        gate: 1 keeps a head, 0 removes it. A gate of exactly 0 or 1 selects instead of multiplying, so NaN in the
            branch that isn't selected stays out. None keeps every head.
        fill: takes a removed head's place: None (zeros), "uniform" (attention with q . k set to zero and masks,
            key_bias and key_scale unchanged: the mean of the values a row may see), "identity" (each query's own
            value, as if attention were the identity; self-attention only), or a tensor broadcastable to
            [batch, heads, queries, dim_v] (a mean, a patch, another sample's output).
        temperature: positive (not checked: that would wait for the device); above 1 flattens a head's attention, below
            1 sharpens it.
        key_bias: added to the logits; -inf mutes a key.
        key_scale: multiplies the probabilities after the softmax, which are not renormalised; statistics don't see it.
    """

    gate: PerHead | None = None
    fill: Fill = None
    temperature: PerHead | None = None
    key_bias: PerKey | None = None
    key_scale: PerKey | None = None

    @classmethod
    def remove(
        cls, heads: Iterable[int], of: int, *, fill: Fill = None, device: torch.device | str | None = None
    ) -> "HeadEdit":
        """The edit that removes `heads` out of `of` heads in every sample.

        Raises:
            ValueError: a head is not in 0..of-1.
        """
        gate = torch.ones(1, of, device=device)
        for head in heads:
            if not 0 <= head < of:
                raise ValueError(f"heads: got {head}, expected indices from 0 to {of - 1}")
            gate[0, head] = 0.0
        return cls(gate, fill)


class _Blend(torch.autograd.Function):
    """gate * attention + (1 - gate) * fill that selects at exactly 0 and 1, yet passes the gate its gradient."""

    @staticmethod
    def forward(ctx, attention: Tensor, fill: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(attention, fill, gate)
        mixed = gate * attention + (1 - gate) * fill
        return torch.where(gate == 1, attention, torch.where(gate == 0, fill, mixed))

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        attention, fill, gate = ctx.saved_tensors
        grad_attention = torch.where(gate == 0, 0, gate * grad_output)
        grad_fill = torch.where(gate == 1, 0, (1 - gate) * grad_output)
        grad_gate = (attention - fill) * grad_output
        return (
            grad_attention.sum_to_size(attention.shape),
            grad_fill.sum_to_size(fill.shape),
            grad_gate.sum_to_size(gate.shape),
        )


def blend(
    attention: Float[Tensor, "batch heads queries dim_v"], gate: PerHead | None, fill: FillTensor | None
) -> Float[Tensor, "batch heads queries dim_v"]:
    """Attention's output with removed heads filled."""
    if gate is None:
        return attention
    if fill is None:
        fill = attention.new_zeros(())
    return _Blend.apply(attention, fill.to(attention.dtype), gate.to(attention.dtype)[..., None, None])
