"""What the backward kernels are called with. Reads shapes, strides and dtypes only, so tensors without data do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headscope_kernels.attention.arguments import (
    NO_STRIDES,
    check_operands,
    mask_arguments,
    optional_strides,
    tile_reach,
)
from headscope_kernels.attention.backward.configs import BackwardConfiguration, BackwardConfigurations
from headscope_kernels.attention.configuration import chunk_widths, covering_block
from headscope_kernels.attention.host import (
    broadcast_strides,
    dot_dtype,
    in_units,
    input_precision,
    stride_unit,
    tile_descriptors,
)
from headscope_kernels.attention.statistics import BoundStatistic, functions_key


def is_laden(
    attn_mask: Tensor | None, key_bias: Tensor | None, key_scale: Tensor | None, statistics: Sequence[BoundStatistic]
) -> bool:
    """Whether scores take more registers than the plain ones do, which the configurations want to know."""
    edited = any(tensor is not None for tensor in (attn_mask, key_bias, key_scale))
    return edited or any(bound.statistic.width for bound in statistics)


def kernel_arguments(
    kernel: Any, shared: dict[str, Any], configuration: BackwardConfiguration | None, own: dict[str, Any]
) -> dict[str, Any]:
    """One kernel's arguments by name."""
    arguments = {**shared, **own}
    if configuration is not None:
        arguments["BLOCK_QUERIES"] = configuration.block_queries
        arguments["BLOCK_KEYS"] = configuration.block_keys
        for name, rows, widths in (
            ("query", configuration.block_queries, arguments["DIM_WIDTHS"]),
            ("grad_output", configuration.block_queries, arguments["VALUE_WIDTHS"]),
            ("key", configuration.block_keys, arguments["DIM_WIDTHS"]),
            ("value", configuration.block_keys, arguments["VALUE_WIDTHS"]),
        ):
            if f"{name}_descriptor" in kernel.arg_names:
                tensor = arguments[f"{name}_ptr"]
                use = configuration.descriptors and tensor is not None
                described = tile_descriptors(tensor, rows, widths) if use else (None, None)
                arguments[f"{name}_descriptor"], arguments[f"{name}_tail_descriptor"] = described
    return {name: arguments[name] for name in kernel.arg_names}


def shared_arguments(
    grad_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    gate: Tensor | None,
    fill: Tensor | None,
    temperature: Tensor | None,
    key_bias: Tensor | None,
    key_scale: Tensor | None,
    attention: Tensor | None,
    row_max: Tensor,
    log2_sum: Tensor,
    row_constants: Tensor | None,
    statistics: Sequence[BoundStatistic],
    statistic_grads: Sequence[Tensor],
    configurations: BackwardConfigurations,
) -> dict[str, Any]:
    """What the kernels' arguments have in common, by name. Reads shapes, strides and dtypes only.

    Raises:
        ValueError: a dtype, shape, statistic or combination that the kernels have no code for.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys, dim_v = key.shape[1], key.shape[2], value.shape[3]
    check_operands(query, key, value, (grad_output, attention))
    for name, tensor in (("grad_output", grad_output), ("attention", attention)):
        if tensor is not None and tensor.shape != (batch, heads, queries, dim_v):
            raise ValueError(f"{name} must be {(batch, heads, queries, dim_v)}, got {tuple(tensor.shape)}")
    if grad_output is not None and attention is None:
        raise ValueError("the output's gradient needs the attention that the forward saved")
    for name, tensor in (("row_max", row_max), ("log2_sum", log2_sum), ("row_constants", row_constants)):
        if tensor is not None:
            require_rows(name, tensor, (batch, heads, queries))
    if len(statistics) != len(statistic_grads):
        raise ValueError(f"{len(statistics)} statistics need as many gradients, got {len(statistic_grads)}")
    for bound, grad in zip(statistics, statistic_grads, strict=True):
        if bound.statistic.gradient is None:
            raise ValueError(f"{bound.statistic} has no gradient")
        width = (bound.statistic.width,) if bound.statistic.width else ()
        require_rows("a statistic's gradient", grad, (batch, heads, queries, *width))
    chosen = [bound.statistic for bound in statistics]
    gradients = tuple(statistic.gradient for statistic in chosen)

    masking = mask_arguments(attn_mask, (batch, heads, queries, keys), is_causal)
    mask_kind, mask_strides = masking["MASK"], masking["mask_strides"]
    fill_strides = optional_strides("fill", fill, (batch, heads, queries, dim_v))
    key_bias_strides = optional_strides("key_bias", key_bias, (batch, heads, keys))
    key_scale_strides = optional_strides("key_scale", key_scale, (batch, heads, keys))
    data = [tensor for bound in statistics for tensor in bound.tensors]
    outputs = [] if grad_output is None else [grad_output, attention]
    key_value, by_query, by_mask = configurations.key_value, configurations.query, configurations.mask
    block_queries = max(
        key_value.block_queries, by_query.block_queries, by_mask.block_queries, configurations.block_rows
    )
    block_keys = max(key_value.block_keys, by_query.block_keys, by_mask.block_keys)
    reach = max(
        tile_reach(query.stride(), block_queries, dim),
        tile_reach(key.stride(), block_keys, dim),
        tile_reach(value.stride(), block_keys, dim_v),
        *(tile_reach(tensor.stride(), block_queries, dim_v) for tensor in outputs),
        tile_reach(fill_strides, block_queries, dim_v),
        tile_reach(mask_strides, block_queries, block_keys),
        # the gradient of a mask is contiguous
        keys * by_mask.block_queries if mask_kind == "additive" else 0,
        key_bias_strides[2] * block_keys,
        key_scale_strides[2] * block_keys,
    )
    unit = stride_unit((query, key, value, *outputs))
    output = grad_output is not None
    edited = output and gate is not None
    return {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "mask_ptr": masking["mask_ptr"],
        "gate_ptr": gate,
        "fill_ptr": fill,
        "temperature_ptr": temperature,
        "key_bias_ptr": key_bias,
        "key_scale_ptr": key_scale,
        "grad_output_ptr": grad_output,
        "attention_ptr": attention,
        "row_max_ptr": row_max,
        "log2_sum_ptr": log2_sum,
        "row_constants_ptr": row_constants,
        # the first kernel's, if the others need them
        "delta_ptr": None,
        "offset_ptr": None,
        "grad_ptrs": tuple(statistic_grads),
        "statistic_data": tuple(data),
        "query_strides": in_units(query, unit),
        "key_strides": in_units(key, unit),
        "value_strides": in_units(value, unit),
        "mask_strides": mask_strides,
        "gate_strides": optional_strides("gate", gate, (batch, heads)),
        "fill_strides": fill_strides,
        "temperature_strides": optional_strides("temperature", temperature, (batch, heads)),
        "key_bias_strides": key_bias_strides,
        "key_scale_strides": key_scale_strides,
        "grad_output_strides": in_units(grad_output, unit) if output else NO_STRIDES,
        "attention_strides": in_units(attention, unit) if output else NO_STRIDES,
        "statistic_data_strides": tuple(
            stride
            for tensor in data
            for stride in broadcast_strides("a statistic's tensor", tensor, (batch, heads, tensor.shape[2]))[:2]
        ),
        "scale": float(scale),
        "heads": heads,
        "heads_per_group": heads // max(kv_heads, 1),
        "queries": queries,
        "keys": keys,
        "DIM": dim,
        "DIM_WIDTHS": configurations.dim_widths or chunk_widths(dim),
        "VALUE_DIM": dim_v,
        "VALUE_WIDTHS": configurations.value_widths or chunk_widths(dim_v),
        "BLOCK_ROWS": configurations.block_rows,
        "CAUSAL": is_causal,
        "MASK": mask_kind if masking["MASK_ROWS"] else "none",
        "KEY_MASK": "none" if masking["MASK_ROWS"] else mask_kind,
        "ADDITIVE": mask_kind == "additive" or key_bias is not None,
        "HAS_OUTPUT": output,
        "HAS_GATE": edited,
        "HAS_FILL": edited and fill is not None,
        "HAS_TEMPERATURE": temperature is not None,
        "HAS_KEY_BIAS": key_bias is not None,
        "HAS_KEY_SCALE": output and key_scale is not None,
        "HAS_ROW_CONSTANTS": row_constants is not None,
        "GROUPED": heads > kv_heads,
        "SKIP_REMOVED": edited and row_constants is None and not statistics,
        "GRADIENTS": gradients,
        "CONSTANTS": tuple(tuple(statistic.constants) for statistic in chosen),
        "GRAD_WIDTHS": tuple(statistic.width for statistic in chosen),
        "PADDED_WIDTHS": tuple(covering_block(statistic.width) for statistic in chosen),
        "GRADIENTS_KEY": functions_key(gradients),
        "DOT_DTYPE": dot_dtype(query.dtype),
        "DATA_COUNTS": tuple(len(bound.tensors) for bound in statistics),
        "INPUT_PRECISION": input_precision(query.dtype),
        "STRIDE_UNIT": unit,
        "WIDE": reach >= 2**31,
    }


def require_rows(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless `tensor` is contiguous float32 of this shape."""
    if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
        came = f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"
        raise ValueError(f"{name} must be contiguous float32 {shape}, got {came}")
