"""The formula itself in plain torch, in whatever dtype the tensors have. It materialises [queries, keys]."""

import torch
from torch import Tensor

from headscope.ops.call import Call
from headscope.ops.edits import blend


def attend(call: Call, first_query: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The output [batch, heads, queries, dim_v] and the statistics of a call, or of a piece of one.

    Args:
        call: whose tensors share one dtype (int32 and bool aside).
        first_query: where the piece's queries begin in the whole call, for causal masks and statistics.
    """
    query, key, value = call.query, call.key, call.value
    groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = call.scale if call.temperature is None else call.scale / call.temperature[..., None, None]
    logits = (query * scale) @ key.transpose(-1, -2)
    rows = torch.arange(first_query, first_query + logits.shape[-2], device=logits.device)
    if call.key_bias is not None:
        logits = logits + call.key_bias[..., None, :]
    if call.is_causal:
        future = torch.arange(logits.shape[-1], device=logits.device) > rows[:, None]
        logits = logits.masked_fill(future, -torch.inf)
    if call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~call.attn_mask, -torch.inf)
    elif call.attn_mask is not None:
        logits = logits + call.attn_mask.to(logits.dtype)
    dead = (logits == -torch.inf).all(-1, keepdim=True)
    probabilities = torch.where(dead, 0, torch.where(dead, 0, logits).softmax(-1))
    weights = probabilities if call.key_scale is None else probabilities * call.key_scale[..., None, :]
    output = blend(weights @ value, call.gate, call.fill)
    values = []
    for statistic in call.restored_statistics():
        result = statistic.formula(logits, probabilities, rows, statistic.tensors)
        values.append(result if statistic.differentiable else result.detach())
    return output, values
