"""What the kernels over queries and keys are called with.

Reads shapes, strides and dtypes only, so tensors without data do.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headscope_kernels.attention.configs import ForwardConfiguration, chunk_widths
from headscope_kernels.attention.host import (
    addressable,
    broadcast_strides,
    dot_dtype,
    in_units,
    input_precision,
    stride_unit,
    tile_descriptors,
)
from headscope_kernels.attention.statistics import STATISTICS, BoundStatistic, statistic_set

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


def statistic_arguments(
    statistics: Sequence[BoundStatistic], outputs: Sequence[Tensor], shape: tuple[int, int, int]
) -> dict[str, Any]:
    """The forward's arguments for these statistics of rows [batch, heads, queries].

    Raises:
        ValueError: outputs or data of a shape or dtype that the statistic doesn't have.
    """
    chosen = statistic_set(tuple(bound.statistic for bound in statistics))
    check_statistic_outputs(chosen.widths, outputs, shape)
    data = tuple(tensor for bound in statistics for tensor in bound.tensors)
    strides: list[int] = []
    for tensor in data:
        if tensor.dim() != 3 or (tensor.shape[2] > 1 and tensor.stride(2) != 1):
            raise ValueError(
                "a statistic's tensors must be [batch or 1, heads or 1, length] with a last stride of 1, got "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        strides += broadcast_strides("a statistic's tensor", tensor, (*shape[:2], tensor.shape[2]))[:2]
    return {
        "statistic_ptrs": tuple(outputs),
        "statistic_data": data,
        "statistic_data_strides": tuple(strides),
        "ACCUMULATORS": chosen.accumulators,
        "UPDATES": chosen.updates,
        "FINISHES": chosen.finishes,
        "EMPTIES": chosen.empties,
        "RESULT_WIDTHS": chosen.widths,
        "CONSTANTS": chosen.constants,
        "DATA_COUNTS": tuple(len(bound.tensors) for bound in statistics),
        "STATISTICS_KEY": chosen.cache_key,
    }


def forward_features(
    pointers: Mapping[str, Any], is_causal: bool, scale: float, statistics: Sequence[BoundStatistic]
) -> frozenset[str]:
    """What a call asks for beside attention's output, and what of it stands in a schedule's way (configs.py).

    Args:
        pointers: the call's tensors by the kernel's parameters.
        is_causal, scale, statistics: as `attention_forward`'s.
    """
    tensors = {name.removesuffix("_ptr"): value for name, value in pointers.items() if isinstance(value, Tensor)}
    operands = tensors.keys() & {"query", "key", "value"}
    return frozenset(
        [*(tensors.keys() - operands - {"output"})]
        + [_NAMES.get(bound.statistic, "another statistic") for bound in statistics]
        + [f"unaligned {name}" for name in tensors.keys() & _DESCRIBED if not addressable(tensors[name])]
        + ["is_causal"] * is_causal
        + ["no output"] * tensors.keys().isdisjoint(("output", "attention"))
        + ["scale <= 0"] * (scale <= 0)
    )


_DESCRIBED = {"query", "key", "value", "output"}
# statistics without constants or data
_NAMES = {STATISTICS[name](()): name for name in ("entropy", "logsumexp", "max_logit", "max_prob", "collision_entropy")}


def forward_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    gate: Tensor | None = None,
    fill: Tensor | None = None,
    temperature: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    statistics: Sequence[BoundStatistic],
    statistic_outputs: Sequence[Tensor],
    output: Tensor | None,
    attention: Tensor | None = None,
    row_max: Tensor | None = None,
    log2_sum: Tensor | None = None,
    configuration: ForwardConfiguration,
) -> dict[str, Any]:
    """The kernel's arguments by name, for `attention_forward`'s arguments.

    Raises:
        ValueError: dtype, head dimension, statistic or combination that the kernel has no code for.
    """
    batch, heads, queries, _ = query.shape
    keys, dim_v = value.shape[2:]
    check_operands(query, key, value, (output, attention))
    if (row_max is None) != (log2_sum is None):
        raise ValueError("row_max and log2_sum come together")
    for name, rows in (("row_max", row_max), ("log2_sum", log2_sum)):
        if rows is not None and (rows.shape != query.shape[:3] or not rows.is_contiguous()):
            raise ValueError(f"{name} must be contiguous {tuple(query.shape[:3])}, got {tuple(rows.shape)}")
    # without an output there is nothing to gate
    gate, fill = (gate, fill if gate is not None else None) if output is not None else (None, None)
    fill_strides = optional_strides("fill", fill, (batch, heads, queries, dim_v))
    key_scale_strides = optional_strides("key_scale", key_scale, (batch, heads, keys))

    block_queries, block_keys = configuration.block_queries, configuration.block_keys
    written = [tensor for tensor in (output, attention) if tensor is not None]
    reach = max(
        tile_reach(value.stride(), block_keys, dim_v),
        tile_reach(fill_strides, block_queries, dim_v),
        key_scale_strides[2] * block_keys,
        *(tile_reach(tensor.stride(), block_queries, dim_v) for tensor in written),
    )
    arguments = logit_arguments(
        query,
        key,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        temperature=temperature,
        key_bias=key_bias,
        configuration=configuration,
        reach=reach,
    )
    value_widths = configuration.value_widths or chunk_widths(dim_v)
    key_descriptors = value_descriptors = (None, None)
    if configuration.descriptors:
        key_descriptors = tile_descriptors(key, block_keys, arguments["DIM_WIDTHS"])
        if written:
            value_descriptors = tile_descriptors(value, block_keys, value_widths)
    unit = stride_unit((query, key, value, *written))
    return {
        **arguments,
        "value_ptr": value if written else None,
        "gate_ptr": gate,
        "fill_ptr": fill,
        "key_scale_ptr": key_scale if written else None,
        "output_ptr": output,
        "attention_ptr": attention,
        "row_max_ptr": row_max,
        "log2_sum_ptr": log2_sum,
        "key_descriptor": key_descriptors[0],
        "key_tail_descriptor": key_descriptors[1],
        "value_descriptor": value_descriptors[0],
        "value_tail_descriptor": value_descriptors[1],
        "query_strides": in_units(query, unit),
        "key_strides": in_units(key, unit),
        "value_strides": in_units(value, unit),
        "gate_strides": optional_strides("gate", gate, (batch, heads)),
        "fill_strides": fill_strides,
        "key_scale_strides": key_scale_strides,
        "output_strides": NO_STRIDES if output is None else in_units(output, unit),
        "attention_strides": NO_STRIDES if attention is None else in_units(attention, unit),
        "VALUE_DIM": dim_v,
        "VALUE_WIDTHS": value_widths,
        "STRIDE_UNIT": unit,
        "SPECIALISED": configuration.schedule == "specialised",
        **statistic_arguments(statistics, statistic_outputs, (batch, heads, queries)),
    }
