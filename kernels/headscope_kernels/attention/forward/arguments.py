"""What the forward's kernel is called with. Reads shapes, strides and dtypes only, so tensors without data do."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from headscope_kernels.attention.arguments import (
    NO_STRIDES,
    check_operands,
    check_statistic_outputs,
    logit_arguments,
    optional_strides,
    tile_reach,
)
from headscope_kernels.attention.configuration import ForwardConfiguration, chunk_widths
from headscope_kernels.attention.host import (
    addressable,
    broadcast_strides,
    in_units,
    stride_unit,
    tile_descriptors,
)
from headscope_kernels.attention.statistics import STATISTICS, BoundStatistic, statistic_set


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
    """What a call asks for beside attention's output, and what of it stands in a schedule's way (hopper/schedules.py).

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
