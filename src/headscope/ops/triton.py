"""The triton backend: the fused GPU kernel of headscope_kernels, forward only."""

from collections.abc import Sequence

from torch import Tensor

from headscope.ops.schema import allocate
from headscope_kernels.attention import attention_forward


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
    output, values = allocate(query, value, statistics)
    attention_forward(
        query,
        key,
        value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        gate=gate,
        fill=fill,
        statistics=tuple(statistics),
        output=output,
        statistic_outputs=values,
    )
    return output, values
