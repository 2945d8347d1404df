"""The description of the kernels' argument lists: names, order and strides, and the arguments that are made from it.

Each tensor in OPERANDS is passed as a pointer `<name>_ptr` and its strides `<name>_strides`, in this order, and to
kernels that load it through tensor descriptors also as `<name>_descriptor` and `<name>_tail_descriptor`, one for each
chunk of its head dimension. A kernel takes the part of this list that it needs. Only shapes, strides and dtypes are
read, so tensors without data do.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headscope_kernels.attention.configuration import Tile, chunk_widths
from headscope_kernels.attention.host import (
    broadcast_strides,
    dot_dtype,
    in_units,
    input_precision,
    stride_unit,
    tile_descriptors,
)
from headscope_kernels.attention.statistics import BoundStatistic

MAXIMUM_DIM = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_STRIDES = (0, 0, 0, 0)


class Operand(NamedTuple):
    """A tensor that a kernel reads or writes.

    Attributes:
        axes: the names of its dimensions.
        whole: True if it has exactly this shape; its strides, but the last one, are then passed in units of STRIDE_UNIT
            elements. False if it broadcasts to this shape; its strides are then 0 wherever it repeats.
        label: its name in error messages, where that isn't the parameter's.
    """

    axes: tuple[str, ...]
    whole: bool = False
    label: str | None = None


OPERANDS = {
    "query": Operand(("batch", "heads", "queries", "dim"), whole=True),
    "key": Operand(("batch", "kv_heads", "keys", "dim"), whole=True),
    "value": Operand(("batch", "kv_heads", "keys", "dim_v"), whole=True),
    "mask": Operand(("batch", "heads", "queries", "keys"), label="attn_mask"),
    "gate": Operand(("batch", "heads")),
    "fill": Operand(("batch", "heads", "queries", "dim_v")),
    "temperature": Operand(("batch", "heads")),
    "key_bias": Operand(("batch", "heads", "keys")),
    "key_scale": Operand(("batch", "heads", "keys")),
    "grad_output": Operand(("batch", "heads", "queries", "dim_v"), whole=True),
    "output": Operand(("batch", "heads", "queries", "dim_v"), whole=True),
    "attention": Operand(("batch", "heads", "queries", "dim_v"), whole=True),
}
# the parameter of a tensor descriptor: the pointer's of the same tensor
DESCRIBED = {
    f"{name}{tail}_descriptor": f"{name}_ptr"
    for name, operand in OPERANDS.items()
    if operand.whole
    for tail in ("", "_tail")
}


def call_arguments(
    pointers: Mapping[str, Any],
    is_causal: bool,
    tile: Tile,
    dim_widths: tuple[int, ...] | None,
    value_widths: tuple[int, ...] | None = None,
    reach: int = 0,
) -> dict[str, Any]:
    """The arguments that the kernels have in common.

    Args:
        pointers: the call's tensors by the kernels' parameters, query and key among them.
        is_causal: query i attends to keys 0..i.
        tile: as many queries and keys as a program reads at once, at most.
        dim_widths, value_widths: the chunks of the head dimensions; None: `chunk_widths` decides.
        reach: how far apart, in elements, a kernel accesses tensors within a tile that `pointers` doesn't hold.

    Raises:
        ValueError: a tensor that doesn't broadcast to its shape, or a mask beside is_causal.
    """
    query, key = pointers["query_ptr"], pointers["key_ptr"]
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    dim_v = pointers["value_ptr"].shape[3] if "value_ptr" in pointers else dim
    mask = pointers["mask_ptr"]
    if is_causal and mask is not None:
        raise ValueError("is_causal and attn_mask exclude each other")
    sizes = {
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "queries": queries,
        "keys": keys,
        "dim": dim,
        "dim_v": dim_v,
    }
    read = {"queries": tile.block_queries, "keys": tile.block_keys, "dim": dim, "dim_v": dim_v}
    tensors = {name: pointers[f"{name}_ptr"] for name in OPERANDS if f"{name}_ptr" in pointers}
    unit = stride_unit([tensor for name, tensor in tensors.items() if OPERANDS[name].whole and tensor is not None])
    arguments = dict(pointers)
    for name, tensor in tensors.items():
        axes, whole, label = OPERANDS[name]
        if whole:
            strides = NO_STRIDES if tensor is None else tensor.stride()
            arguments[f"{name}_strides"] = NO_STRIDES if tensor is None else in_units(tensor, unit)
        else:
            strides = optional_strides(label or name, tensor, tuple(sizes[axis] for axis in axes))
            arguments[f"{name}_strides"] = strides
        distance = sum(stride * read[axis] for stride, axis in zip(strides[2:], axes[2:], strict=True))
        reach = max(reach, distance)
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    return {
        **arguments,
        "mask_ptr": mask if mask is None or kind == "additive" else mask.view(torch.uint8),
        "heads": heads,
        "heads_per_group": heads // max(kv_heads, 1),
        "queries": queries,
        "keys": keys,
        "DIM": dim,
        "DIM_WIDTHS": dim_widths or chunk_widths(dim),
        "VALUE_DIM": dim_v,
        "VALUE_WIDTHS": value_widths or chunk_widths(dim_v),
        "CAUSAL": is_causal,
        "MASK": kind,
        "MASK_ROWS": arguments["mask_strides"][2] != 0,
        "DOT_DTYPE": dot_dtype(query.dtype),
        "INPUT_PRECISION": input_precision(query.dtype),
        "STRIDE_UNIT": unit,
        "WIDE": reach >= 2**31,
    }


def kernel_arguments(kernel: Any, arguments: Mapping[str, Any], configuration: Any) -> dict[str, Any]:
    """One kernel's arguments by name, in its order.

    Args:
        kernel: the jit function.
        arguments: all but its blocks and tensor descriptors; others, which it doesn't take, are left out.
        configuration: its `block_queries`, `block_keys` and `descriptors`; None if the kernel has no tiles of scores.
    """
    found = dict(arguments)
    if configuration is not None:
        blocks = {"queries": configuration.block_queries, "keys": configuration.block_keys}
        found |= {"BLOCK_QUERIES": blocks["queries"], "BLOCK_KEYS": blocks["keys"]}
        for name, operand in OPERANDS.items():
            if f"{name}_descriptor" in kernel.arg_names:
                tensor, (_, _, rows, columns) = found[f"{name}_ptr"], operand.axes
                described = (None, None)
                if configuration.descriptors and tensor is not None:
                    widths = found["DIM_WIDTHS" if columns == "dim" else "VALUE_WIDTHS"]
                    described = tile_descriptors(tensor, blocks[rows], widths)
                found[f"{name}_descriptor"], found[f"{name}_tail_descriptor"] = described
    return {name: found[name] for name in kernel.arg_names}


def scale_arguments(scale: float) -> dict[str, Any]:
    """The arguments that say what the products are multiplied by, of kernels that put its sign onto an operand."""
    # a scale of NaN keeps its sign, and makes everything NaN
    sign = 0 if scale == 0 else -1 if scale < 0 else 1
    # a scale of 0 rides on the sign
    size = abs(scale) if sign else 1.0
    return {"scale": size, "exponent_scale": size * math.log2(math.e), "SIGN": sign}


def data_arguments(statistics: Sequence[BoundStatistic], shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments that hold the data of these statistics of rows [batch, heads, queries], and their constants.

    Raises:
        ValueError: data of a shape that a statistic doesn't have.
    """
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
        "statistic_data": data,
        "statistic_data_strides": tuple(strides),
        "DATA_COUNTS": tuple(len(bound.tensors) for bound in statistics),
        "CONSTANTS": tuple(tuple(bound.statistic.constants) for bound in statistics),
    }


def optional_strides(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of `tensor` read as one of `shape`; zeros if there is none."""
    return (0,) * len(shape) if tensor is None else broadcast_strides(name, tensor, shape)


def check_operands(query: Tensor, key: Tensor, value: Tensor | None, outputs: Sequence[Tensor | None]) -> None:
    """Check that the kernels have code for these tensors.

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


def check_rows(pointers: Mapping[str, Any], shape: torch.Size) -> None:
    """Check the rows' maxima and sums, where there are any.

    Raises:
        ValueError: they aren't contiguous tensors of `shape`, [batch, heads, queries].
    """
    for name in ("row_max", "log2_sum"):
        rows = pointers[f"{name}_ptr"]
        if rows is not None and (rows.shape != shape or not rows.is_contiguous()):
            raise ValueError(f"{name} must be contiguous {tuple(shape)}, got {tuple(rows.shape)}")


def check_statistic_outputs(widths: Sequence[int], outputs: Sequence[Tensor], shape: tuple[int, int, int]) -> None:
    """Check that results of these widths (0: a number a row) for rows [batch, heads, queries] fit their tensors.

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
