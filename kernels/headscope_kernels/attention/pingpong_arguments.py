"""What the kernel of pingpong.py is called with, and which calls it serves. Reads shapes, strides and dtypes only."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headscope_kernels.attention.arguments import optional_strides
from headscope_kernels.attention.configs import ForwardConfiguration, chunk_widths
from headscope_kernels.attention.host import tile_descriptors
from headscope_kernels.attention.statistics import STATISTICS, BoundStatistic

GROUP_ROWS = 64
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
LARGEST_DIM = 128
# of a warp group that computes, by how many there are: all there are, less what the loading warp keeps
REGISTERS = {2: 240, 3: 160}
# of a program on Hopper, less the barriers
SHARED_BYTES = 227 * 1024 - 1024


def unserved(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor | None,
    *,
    scale: float,
    statistics: Sequence[BoundStatistic],
    others: dict[str, object],
) -> str | None:
    """Why the kernel can't take this call; None if it can.

    Args:
        others: what it has no code for, by name: anything that isn't None or False refuses.
    """
    dim = query.shape[3]
    for name, argument in others.items():
        if argument is not None and argument is not False:
            return f"{name} was given"
    if query.dtype not in DTYPES:
        return f"query is {query.dtype}, not float16 or bfloat16"
    if value.shape[3] != dim or not 1 <= dim <= LARGEST_DIM:
        return f"head dimensions are {dim} and {value.shape[3]}, not equal and at most {LARGEST_DIM}"
    if not scale > 0:
        return f"scale is {scale}, not positive"
    if output is None:
        return "no output is asked for"
    names = [bound.statistic for bound in statistics]
    if names not in ([], [STATISTICS["entropy"](())]):
        return "statistics other than the entropy are asked for"
    for name, tensor in (("query", query), ("key", key), ("value", value), ("output", output)):
        if tile_descriptors(tensor, GROUP_ROWS, chunk_widths(dim))[0] is None:
            return f"{name} of {tuple(tensor.shape)} with strides {tensor.stride()} can't be read by tensor descriptors"
    return None


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
        ValueError: a configuration that it has no code for.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    groups, rest = divmod(configuration.block_queries, GROUP_ROWS)
    if rest or groups not in REGISTERS or configuration.num_warps != 4 or configuration.num_stages < 2:
        raise ValueError(
            "a ping-pong kernel needs block_queries 128 or 192, num_warps 4 and num_stages of at least 2, got "
            f"{configuration}"
        )
    widths = configuration.dim_widths or chunk_widths(dim)
    described: dict[str, TensorDescriptor | None] = {}
    for name, tensor, rows in (
        ("query", query, GROUP_ROWS),
        ("key", key, configuration.block_keys),
        ("value", value, configuration.block_keys),
        ("output", output, GROUP_ROWS),
    ):
        first, tail = tile_descriptors(tensor, rows, widths)
        described[f"{name}_descriptor"], described[f"{name}_tail_descriptor"] = _laid_out(first), _laid_out(tail)
    tile_bytes = query.element_size() * sum(widths)
    spare = SHARED_BYTES - tile_bytes * 2 * configuration.num_stages * configuration.block_keys
    query_stages = min(2, spare // (tile_bytes * configuration.block_queries))
    if query_stages == 0:
        raise ValueError(f"{configuration} takes more shared memory than there is for head dimension {dim}")
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
        "QUERY_STAGES": query_stages,
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
