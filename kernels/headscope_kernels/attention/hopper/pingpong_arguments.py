"""The arguments of the kernel in pingpong.py. Reads shapes, strides and dtypes only."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headscope_kernels.attention.arguments import check_operands, check_statistic_outputs, optional_strides
from headscope_kernels.attention.configuration import ForwardConfiguration, chunk_widths
from headscope_kernels.attention.hopper.schedules import GROUP_ROWS, query_stages
from headscope_kernels.attention.host import tile_descriptors

DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
# of a warp group that computes, by how many there are: all there are, less what the loading warp keeps
REGISTERS = {2: 240, 3: 160}


def pingpong_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    *,
    scale: float,
    gate: Tensor | None,
    statistic_outputs: Sequence[Tensor],
    configuration: ForwardConfiguration,
) -> dict[str, Any]:
    """The kernel's arguments by name, for a call that it serves.

    Raises:
        ValueError: tensors that don't go together, or chunks that don't hold the head dimension.
    """
    check_operands(query, key, value, (output,))
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    groups = configuration.block_queries // GROUP_ROWS
    check_statistic_outputs([0] * len(statistic_outputs), statistic_outputs, (batch, heads, queries))
    widths = configuration.dim_widths or chunk_widths(dim)
    if key.shape[3] != dim or value.shape[2] != keys or output.shape != query.shape or sum(widths) < dim:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, output "
            f"{tuple(output.shape)} and chunks {widths} don't go together"
        )
    described: dict[str, TensorDescriptor | None] = {}
    for name, tensor, rows in (
        ("query", query, GROUP_ROWS),
        ("key", key, configuration.block_keys),
        ("value", value, configuration.block_keys),
        ("output", output, GROUP_ROWS),
    ):
        first, tail = tile_descriptors(tensor, rows, widths)
        described[f"{name}_descriptor"], described[f"{name}_tail_descriptor"] = _laid_out(first), _laid_out(tail)
    query_tiles = triton.cdiv(queries, configuration.block_queries)
    return {
        **described,
        "statistic_ptrs": tuple(statistic_outputs),
        "gate_ptr": gate,
        "gate_strides": optional_strides("gate", gate, (batch, heads)),
        "exponent_scale": scale * math.log2(math.e),
        "tiles": batch * heads * query_tiles,
        "query_tiles": query_tiles,
        "heads": heads,
        "heads_per_group": heads // max(kv_heads, 1),
        "queries": queries,
        "keys": keys,
        "WIDTHS": widths,
        "BLOCK_KEYS": configuration.block_keys,
        "STAGES": configuration.num_stages,
        "QUERY_STAGES": query_stages(configuration, dim),
        "CONSUMERS": groups,
        "TURNS": configuration.schedule == "pingpong",
        "REGISTERS": REGISTERS[groups],
    }


def _laid_out(descriptor: Any) -> TensorDescriptor | None:
    """The descriptor with the layout that its tiles have in shared memory, which Gluon wants to know."""
    if descriptor is None:
        return None
    layout = gl.NVMMASharedLayout.get_default_for(descriptor.block_shape, DTYPES[descriptor.base.dtype])
    return TensorDescriptor(descriptor.base, descriptor.shape, descriptor.strides, descriptor.block_shape, layout)
