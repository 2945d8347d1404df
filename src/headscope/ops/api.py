"""headscope.attention, and the drop-in for torch's scaled_dot_product_attention."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headscope.ops.backends import Problem, select
from headscope.ops.edits import HeadEdit
from headscope.ops.schema import default_scale
from headscope.ops.statistics import Statistic, statistic_names
from headscope.ops.validation import check_edit, check_inputs, check_mask, check_scale, shape_of


class AttentionResult(NamedTuple):
    """What `attention` returns.

    Attributes:
        output: [batch, heads, queries, dim_v], in query's dtype and stride order.
        statistics: one float32 (float64 for float64 inputs) tensor [batch, heads, queries] per name asked for.
    """

    output: Tensor
    statistics: dict[str, Tensor]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    edit: HeadEdit | None = None,
    statistics: Sequence[str | Statistic] = (),
    backend: str | None = None,
) -> AttentionResult:
    """Attention, statistics of its probabilities and edits of its heads, in one pass.

    logits = scale * query . key + mask;  p = softmax(logits);  attention = p . value;
    output = gate * attention + (1 - gate) * fill. [queries, keys] is never materialised by the fused backends.

    Statistics describe p before the edit. A row with no valid key has logsumexp and max_logit -inf and all else 0;
    NaN in gives NaN out, row by row.

    Args:
        query: [batch, heads, queries, dim], float32, bfloat16, float16 or float64.
        key: [batch, kv_heads, keys, dim].
        value: [batch, kv_heads, keys, dim_v].
        attn_mask: bool (True: attend) or additive, broadcastable to [batch, heads, queries, keys].
        is_causal: row i sees keys 0..i (top left), as in torch's SDPA.
        scale: 1 / sqrt(dim) if None.
        enable_gqa: kv_heads may be a divisor of heads.
        edit: which heads to remove or fill, per sample.
        statistics: names out of entropy (nats), logsumexp (nats), max_logit (nats), max_prob (0..1).
        backend: "triton", "cpu", "portable" or "reference"; None picks the fastest that serves the whole call.

    Returns:
        AttentionResult(output, statistics).

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it, what came and what was expected.
        RuntimeError: the backend asked for can't serve the call; the message says why.
    """
    names = statistic_names(statistics)
    query, key, value = _autocast(query, key, value)
    check_inputs(query, key, value, enable_gqa)
    mask = check_mask(attn_mask, is_causal, query, key)
    check_edit(edit, query, value)
    scale = check_scale(scale, default_scale(query.shape[-1]))
    gate = edit.gate if edit else None
    if gate is not None:
        gate = gate.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    fill = edit.fill if edit else None
    inputs = (query, key, value, mask, gate, fill if isinstance(fill, Tensor) else None)
    problem = Problem(
        device=query.device,
        dtype=query.dtype,
        dim=query.shape[-1],
        dim_v=value.shape[-1],
        needs_gradient=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs),
    )
    operator = select(backend, problem)
    if gate is not None and fill == "uniform":
        fill = _uniform_fill(operator, query, key, value, mask, is_causal, gate)
    elif isinstance(fill, Tensor):
        fill = fill[(None,) * (4 - fill.ndim)]
    output, values = operator(query, key, value, mask, is_causal, scale, gate, fill, list(names))
    return AttentionResult(output, dict(zip(names, values, strict=True)))


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under torch.autocast, query, key and value in its dtype, as torch's SDPA casts them; nothing else."""
    tensors = (query, key, value)
    if isinstance(query, Tensor) and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        castable = (torch.float32, torch.bfloat16, torch.float16)
        return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in castable else t for t in tensors)  # type: ignore[return-value]
    return tensors


def _uniform_fill(operator, query, key, value, mask, is_causal, gate) -> Tensor:
    """Attention's output with q . k set to zero and masks kept, broadcastable to [batch, heads, queries, dim_v]."""
    if mask is None and not is_causal:
        keys = max(1, value.shape[2])
        mean = value.sum(2, keepdim=True, dtype=gate.dtype) / keys
        return mean.repeat_interleave(query.shape[1] // max(1, mean.shape[1]), 1)
    # heads that are kept whole need no fill, and a gate of 0 lets the backend skip them
    removed = (gate.detach() != 1).to(gate.dtype)
    return operator(query, key, value, mask, is_causal, 0.0, removed, None, [])[0]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    edit: HeadEdit | None = None,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention with head edits; same arguments, same semantics.

    Args:
        query: [..., heads, queries, dim] with any leading dimensions that broadcast with key's and value's;
            [queries, dim] is one head.
        key: [..., kv_heads, keys, dim].
        value: [..., kv_heads, keys, dim_v].
        attn_mask: bool or additive, broadcastable to [..., heads, queries, keys].
        dropout_p: must be 0: dropped probabilities would not be the ones that statistics describe.
        is_causal, scale, enable_gqa: as in torch.
        edit: gate [batch or 1, heads], where batch is the product of the leading dimensions.
        backend: as in `attention`.

    Returns:
        [..., heads, queries, dim_v].

    Raises:
        TypeError, ValueError, RuntimeError: as `attention`; ValueError for dropout_p > 0.
    """
    if dropout_p:
        raise ValueError(
            f"dropout_p: got {dropout_p}, expected 0; headscope describes and edits the probabilities themselves,"
            " and dropout would replace them with random ones"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if isinstance(tensor, Tensor) and tensor.ndim < 2:
            raise ValueError(f"{name}: got shape {shape_of(tensor)}, expected at least [tokens, dim]")
    lead, query, key, value = _four_dimensions(query, key, value, enable_gqa)
    if attn_mask is not None and isinstance(attn_mask, Tensor) and attn_mask.ndim > 2 and len(lead) != 2:
        tail = attn_mask.shape[-2:]
        attn_mask = attn_mask.expand(*lead, *tail).reshape(*query.shape[:2], *tail)
    output = attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        edit=edit,
        backend=backend,
    ).output
    return output if len(lead) == 2 else output.reshape(*lead, *output.shape[2:])


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The broadcast leading dimensions, and the tensors as [batch, heads, tokens, dim]."""
    tensors = (query, key, value)
    if enable_gqa and all(tensor.ndim >= 3 for tensor in tensors):
        batches = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in tensors))
        leads = [(*batches, tensor.shape[-3]) for tensor in tensors]
    else:
        leads = [torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in tensors))] * 3
    if len(leads[0]) == 2 and all(tensor.ndim == 4 for tensor in tensors):
        pairs = zip(tensors, leads, strict=True)
        expanded = [t if t.shape[:2] == lead else t.expand(*lead, *t.shape[2:]) for t, lead in pairs]
        return tuple(leads[0]), *expanded  # type: ignore[return-value]
    flat = []
    for tensor, lead in zip(tensors, leads, strict=True):
        heads = lead[-1] if lead else 1
        samples = 1
        for size in lead[:-1]:
            samples *= size
        flat.append(tensor.expand(*lead, *tensor.shape[-2:]).reshape(samples, heads, *tensor.shape[-2:]))
    return tuple(leads[0]), *flat  # type: ignore[return-value]
