"""What the kernels over queries and keys are called with.

Reads shapes, strides and dtypes only, so tensors without data do.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headscope_kernels.attention.configuration import ForwardConfiguration, chunk_widths
from headscope_kernels.attention.host import (
    broadcast_strides,
    dot_dtype,
    input_precision,
)

MAXIMUM_DIM = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_STRIDES = (0, 0, 0, 0)


def check_operands(query: Tensor, key: Tensor, value: Tensor | None, outputs: Sequence[Tensor | None]) -> None:
    """What the kernels have code for.

    Raises:
        ValueError: dtypes that differ or have no code, head dimensions or numbers of heads that don't fit.
    """
    present = [tensor for tensor in (query, key, value, *outputs) if tensor is not None]
    if query.dtype not in DTYPES or any(tensor.dtype != query.dtype for tensor in present):
        dtypes = [tensor.dtype for tensor in present]
        raise ValueError(f"query, key, value and output must share one of {DTYPES}, got {dtypes}")
    dim, dim_v = query.shape[3], query.shape[3] if value is None else value.shape[3]
    if not (1 <= dim <= MAXIMUM_DIM and 1 <= dim_v <= MAXIMUM_DIM):
        raise ValueError(f"head dimensions must be 1 to {MAXIMUM_DIM}, got query and key {dim}, value {dim_v}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads and heads % kv_heads:
        raise ValueError(f"query's heads ({heads}) must be a multiple of key's ({kv_heads})")


def mask_arguments(attn_mask: Tensor | None, shape: tuple[int, ...], is_causal: bool) -> dict[str, Any]:
    """The kernels' arguments that say what is masked.

    Raises:
        ValueError: a mask that doesn't broadcast to shape [batch, heads, queries, keys], or one beside is_causal.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask exclude each other")
    strides, kind = NO_STRIDES, "none"
    if attn_mask is not None:
        strides = broadcast_strides("attn_mask", attn_mask, shape)
        kind = "bool" if attn_mask.dtype == torch.bool else "additive"
    return {
        "mask_ptr": attn_mask.view(torch.uint8) if attn_mask is not None and kind == "bool" else attn_mask,
        "mask_strides": strides,
        "CAUSAL": is_causal,
        "MASK": kind,
        "MASK_ROWS": strides[2] != 0,
    }


def optional_strides(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of `tensor` read as one of `shape`; zeros if there is none."""
    return (0,) * len(shape) if tensor is None else broadcast_strides(name, tensor, shape)


def logit_arguments(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    temperature: Tensor | None,
    key_bias: Tensor | None,
    configuration: ForwardConfiguration,
    reach: int = 0,
) -> dict[str, Any]:
    """The kernels' arguments that the logits depend on, but query's and key's strides.

    `reach`: how far apart, in elements, the kernel's other tensors are read within a tile.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    masking = mask_arguments(attn_mask, (batch, heads, queries, keys), is_causal)
    key_bias_strides = optional_strides("key_bias", key_bias, (batch, heads, keys))
    # a scale of NaN keeps its sign, and makes everything NaN
    sign = 0 if scale == 0 else -1 if scale < 0 else 1
    # a scale of 0 rides on the sign
    size = abs(scale) if sign else 1.0
    block_queries, block_keys = configuration.block_queries, configuration.block_keys
    reach = max(
        reach,
        tile_reach(query.stride(), block_queries, dim),
        tile_reach(key.stride(), block_keys, dim),
        tile_reach(masking["mask_strides"], block_queries, block_keys),
        key_bias_strides[2] * block_keys,
    )
    return {
        "query_ptr": query,
        "key_ptr": key,
        "temperature_ptr": temperature,
        "key_bias_ptr": key_bias,
        "temperature_strides": optional_strides("temperature", temperature, (batch, heads)),
        "key_bias_strides": key_bias_strides,
        "scale": size,
        "exponent_scale": size * math.log2(math.e),
        "heads": heads,
        "heads_per_group": heads // max(kv_heads, 1),
        "queries": queries,
        "keys": keys,
        "DIM": dim,
        "DIM_WIDTHS": configuration.dim_widths or chunk_widths(dim),
        "BLOCK_QUERIES": block_queries,
        "BLOCK_KEYS": block_keys,
        "SIGN": sign,
        "DOT_DTYPE": dot_dtype(query.dtype),
        "INPUT_PRECISION": input_precision(query.dtype),
        "WIDE": reach >= 2**31,
        **masking,
    }


def tile_reach(strides: Sequence[int], rows: int, columns: int) -> int:
    """How far apart, in elements, the first and last element of a tile are, at most."""
    return strides[-2] * rows + strides[-1] * columns


def check_statistic_outputs(widths: Sequence[int], outputs: Sequence[Tensor], shape: tuple[int, int, int]) -> None:
    """Whether results of these widths (0: a number a row) for rows [batch, heads, queries] fit their tensors.

    Raises:
        ValueError: they don't.
    """
    if len(widths) != len(outputs):
        raise ValueError(f"{len(widths)} statistics need as many outputs, got {len(outputs)}")
    for width, output in zip(widths, outputs, strict=True):
        expected = (*shape, width) if width else shape
        if output.shape != expected or output.dtype != torch.float32 or not output.is_contiguous():
            raise ValueError(
                f"a statistic's output must be contiguous float32 {expected}, got {output.dtype} {tuple(output.shape)}"
            )
