"""The formula itself in plain torch, in whatever dtype the tensors have. It materialises [queries, keys]."""

import torch
from torch import Tensor

from headscope._shapes import Float, RowIndices, Scores, Shaped, StatisticValue
from headscope.ops.call import Call
from headscope.ops.edits import blend


def attend(call: Call, first_query: int = 0) -> tuple[Float[Tensor, "batch heads queries dim_v"], list[StatisticValue]]:
    """The output and the statistics of a call, or of a piece of one.

    Args:
        call: its tensors share one dtype (int32 and bool aside).
        first_query: the index in the whole call of the piece's first query, for causal masks and statistics.
    """
    logits, probabilities, rows = scores(call, first_query)
    output = blend(weights_of(call, probabilities) @ for_every_head(call.value, call), call.gate, call.fill)
    values = []
    for statistic in call.restored_statistics():
        result = statistic.formula(logits, probabilities, rows, statistic.tensors)
        values.append(result if statistic.differentiable else result.detach())
    return output, values


def scores(call: Call, first_query: int) -> tuple[Scores, Scores, RowIndices]:
    """Logits, probabilities, and the queries' indices in the whole call."""
    logits = (call.query * scale_of(call)) @ for_every_head(call.key, call).transpose(-1, -2)
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
    if call.attn_mask is None and call.key_bias is None and not call.is_causal:
        # every key is valid
        return logits, logits.softmax(-1), rows
    dead = (logits == -torch.inf).all(-1, keepdim=True)
    probabilities = torch.where(dead, 0, torch.where(dead, 0, logits).softmax(-1))
    return logits, probabilities, rows


def scale_of(call: Call) -> Float[Tensor, "#batch heads 1 1"] | float:
    """The factor of query . key."""
    return call.scale if call.temperature is None else call.scale / call.temperature[..., None, None]


def weights_of(call: Call, probabilities: Scores) -> Scores:
    """The factors of the values."""
    return probabilities if call.key_scale is None else probabilities * call.key_scale[..., None, :]


def for_every_head(tensor: Shaped[Tensor, "batch kv_heads *rest"], call: Call) -> Shaped[Tensor, "batch heads *rest"]:
    """Key or value, repeated for the heads that share one; a copy only where they do."""
    heads, kv_heads = call.query.shape[1], tensor.shape[1]
    groups = heads // kv_heads if kv_heads else 1
    return tensor if groups == 1 else tensor.repeat_interleave(groups, 1)
