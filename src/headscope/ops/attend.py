"""The formula itself in plain torch, in whatever dtype the tensors have. It materialises [queries, keys]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headscope.ops.edits import blend
from headscope.ops.statistics import STATISTICS


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    causal_from: int | None,
    scale: float,
    gate: Tensor | None,
    fill: Tensor | None,
    statistics: Sequence[str],
) -> tuple[Tensor, list[Tensor]]:
    """Attention, statistics and head edits on [batch, heads, queries, dim] and [batch, kv_heads, keys, dim].

    Args:
        attn_mask: bool or additive, broadcastable to [batch, heads, queries, keys].
        causal_from: None, or the position of the first query row: row i sees keys up to causal_from + i.

    Returns:
        The output [batch, heads, queries, dim_v] and one [batch, heads, queries] tensor per statistic.
    """
    groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = (query * scale) @ key.transpose(-1, -2)
    if causal_from is not None:
        rows = torch.arange(causal_from, causal_from + logits.shape[-2], device=logits.device)
        future = torch.arange(logits.shape[-1], device=logits.device) > rows[:, None]
        logits = logits.masked_fill(future, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask.to(logits.dtype)
    dead = (logits == -torch.inf).all(-1, keepdim=True)
    probabilities = torch.where(dead, 0, torch.where(dead, 0, logits).softmax(-1))
    output = blend(probabilities @ value, gate, fill)
    values = [(STATISTICS[name], STATISTICS[name].formula(logits, probabilities)) for name in statistics]
    return output, [value if statistic.differentiable else value.detach() for statistic, value in values]
