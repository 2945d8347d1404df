"""The formula's gradients, written out: portable's backward of one piece of the queries.

With P = probabilities, dP the gradient with respect to them and dS the one with respect to the logits,

    dP = key_scale * (gate * dO . V^T) + the statistics' share        dS = P * (dP - rowsum(P * dP))
    dQ = scale dS . K        dK = scale dS^T . Q        dV = (P * key_scale)^T . (gate * dO)

and everything else is a sum of these. Only the statistics' formulas are differentiated by torch, so that users' own
need nothing more.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from headscope._shapes import Bool, Float, PerHead, RowIndices, Scores, StatisticValue
from headscope.ops.attend import for_every_head, scale_of, scores, weights_of
from headscope.ops.call import Call


def gradients(
    call: Call,
    first_query: int,
    grad_output: Float[Tensor, "batch heads queries dim_v"] | None,
    grad_statistics: Sequence[StatisticValue | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    """The gradients of those of DIFFERENTIABLE that are wanted, each in its tensor's shape.

    Args:
        call: a piece of a call, whose tensors share one dtype (int32 and bool aside).
        first_query: the index of its first query in the whole call.
        grad_output: the output's cotangent, or None for 0.
        grad_statistics: for each statistic its cotangent in its shape, or None for 0.
    """
    logits, probabilities, rows = scores(call, first_query)
    found: dict[str, Tensor] = {}
    grad_probabilities, grad_logits = _of_statistics(call, logits, probabilities, rows, grad_statistics)
    # a removed head may hold NaN; its statistics still look at it
    removed = None if call.gate is None else (call.gate == 0)[..., None, None]
    silent = removed if grad_probabilities is None and grad_logits is None else None
    if grad_output is not None:
        attention_grad = _of_blend(call, probabilities, grad_output, wanted, found)
        if "value" in wanted:
            weights = _without(removed, weights_of(call, probabilities))
            found["value"] = _over_group(weights.transpose(-1, -2) @ attention_grad, call)
        products = attention_grad @ for_every_head(call.value, call).transpose(-1, -2)
        products = _without(removed, products)
        if call.key_scale is not None:
            if "key_scale" in wanted:
                by_head = _without(removed, probabilities * products).sum(-2)
                found["key_scale"] = by_head.sum_to_size(call.key_scale.shape)
            products *= call.key_scale[..., None, :]
        grad_probabilities = products if grad_probabilities is None else products.add_(grad_probabilities)
    if grad_probabilities is not None:
        constant = torch.linalg.vecdot(probabilities, grad_probabilities).unsqueeze(-1)
        softmax_grad = _without(silent, (grad_probabilities - constant).mul_(probabilities))
        grad_logits = softmax_grad if grad_logits is None else softmax_grad.add_(grad_logits)
    if grad_logits is not None:
        _of_logits(call, grad_logits, silent, wanted, found)
    return found


def _without(
    removed: Bool[Tensor, "#batch heads 1 1"] | None, tensor: Float[Tensor, "#batch heads *rest"]
) -> Float[Tensor, "#batch heads *rest"]:
    """The tensor with 0 for removed heads."""
    return tensor if removed is None else tensor.masked_fill(removed, 0)


def _of_statistics(
    call: Call,
    logits: Scores,
    probabilities: Scores,
    rows: RowIndices,
    grads: Sequence[StatisticValue | None],
) -> tuple[Scores | None, Scores | None]:
    """The statistics' share of dP and of dS, or None."""
    pairs = [
        (statistic, grad)
        for statistic, grad in zip(call.restored_statistics(), grads, strict=True)
        if grad is not None and statistic.differentiable
    ]
    if not pairs:
        return None, None
    # under a dispatch mode of torch, operators run with autograd switched off
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        leaves = (probabilities.detach().requires_grad_(), logits.detach().requires_grad_())
        values = [statistic.formula(leaves[1], leaves[0], rows, statistic.tensors) for statistic, _ in pairs]
    by_probabilities, by_logits = torch.autograd.grad(values, leaves, [grad for _, grad in pairs], allow_unused=True)
    return by_probabilities, by_logits


def _of_blend(
    call: Call,
    probabilities: Scores,
    grad_output: Float[Tensor, "batch heads queries dim_v"],
    wanted: Collection[str],
    found: dict[str, Tensor],
) -> Float[Tensor, "batch heads queries dim_v"]:
    """The gradient of the attention before gate and fill; those of gate and fill on the way."""
    if call.gate is None:
        return grad_output
    gate = call.gate[..., None, None]
    if "gate" in wanted:
        attention = weights_of(call, probabilities) @ for_every_head(call.value, call)
        difference = attention if call.fill is None else attention - call.fill
        found["gate"] = (difference * grad_output).sum((-1, -2)).sum_to_size(call.gate.shape)
    if "fill" in wanted and call.fill is not None:
        found["fill"] = fill_gradient(grad_output, call.gate, call.fill.shape)
    return torch.where(gate == 0, 0, gate * grad_output)


def fill_gradient(
    grad_output: Float[Tensor, "*several batch heads queries dim_v"], gate: PerHead, shape: Sequence[int]
) -> Tensor:
    """(1 - gate) * grad_output, summed to the fill's shape (behind any dimension in front), in the gate's dtype.

    What a gate of 1 drops may be NaN.
    """
    # one gate for all of a head: queries and channels are summed first
    inner = [dimension for dimension in (-2, -1) if shape[dimension] == 1]
    total = grad_output.sum(inner, keepdim=True, dtype=gate.dtype) if inner else grad_output
    gate = gate[..., None, None]
    return torch.where(gate == 1, 0, (1 - gate) * total).sum_to_size((*grad_output.shape[:-4], *shape))


def _of_logits(
    call: Call,
    grad_logits: Scores,
    removed: Bool[Tensor, "#batch heads 1 1"] | None,
    wanted: Collection[str],
    found: dict[str, Tensor],
) -> None:
    """The gradients of everything that the logits are made of."""
    scale = scale_of(call)
    if "query" in wanted or "temperature" in wanted:
        query_grad = _without(removed, (grad_logits @ for_every_head(call.key, call)) * scale)
        if "query" in wanted:
            found["query"] = query_grad
        if "temperature" in wanted and call.temperature is not None:
            by_head = -_without(removed, query_grad * call.query).sum((-1, -2)) / call.temperature
            found["temperature"] = by_head.sum_to_size(call.temperature.shape)
    if "key" in wanted:
        scaled = _without(removed, call.query * scale)
        found["key"] = _over_group(grad_logits.transpose(-1, -2) @ scaled, call)
    if "key_bias" in wanted and call.key_bias is not None:
        found["key_bias"] = grad_logits.sum(-2).sum_to_size(call.key_bias.shape)
    if "attn_mask" in wanted and call.attn_mask is not None:
        found["attn_mask"] = grad_logits.sum_to_size(call.attn_mask.shape)


def _over_group(tensor: Float[Tensor, "batch heads *rest"], call: Call) -> Float[Tensor, "batch kv_heads *rest"]:
    """The sum over the heads that share a key head."""
    kv_heads = call.key.shape[1]
    return tensor if kv_heads == tensor.shape[1] else tensor.unflatten(1, (kv_heads, -1)).sum(2)
