"""The reference backend: the formula on the whole matrix in float64. Slow; every other one is tested against it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headscope.ops.attend import attend
from headscope.ops.schema import empty_output


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    gate: Tensor | None,
    fill: Tensor | None,
    statistics: Sequence[str],
) -> tuple[Tensor, list[Tensor]]:
    """Differentiable any number of times: every operation is torch's own."""
    double = [None if tensor is None else tensor.double() for tensor in (query, key, value, gate, fill)]
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.double()
    output, values = attend(*double[:3], attn_mask, 0 if is_causal else None, scale, *double[3:], statistics)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return empty_output(query, value).copy_(output), [value.to(dtype) for value in values]
