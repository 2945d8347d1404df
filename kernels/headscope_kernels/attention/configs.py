"""Tile shapes of the attention kernels, chosen by rule: no search at import, none at the first call."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class ForwardConfiguration:
    """How one forward program is cut.

    Attributes:
        block_queries, block_keys: the tile of logits one step works on; powers of two, at least 16.
        num_warps, num_stages: as Triton names them.
        dim_widths, value_widths: the chunks the head dimensions are cut into, powers of two, at least 16;
            None: `chunk_widths` decides.
        descriptors: keys and values come through tensor descriptors where their strides allow.
    """

    block_queries: int
    block_keys: int
    num_warps: int = 4
    num_stages: int = 2
    dim_widths: tuple[int, ...] | None = None
    value_widths: tuple[int, ...] | None = None
    descriptors: bool = False


# A step of the interpreter costs the same for any tile, and small shapes shall still cross tile borders.
INTERPRETER = ForwardConfiguration(32, 32)


def covering_block(size: int) -> int:
    """The smallest block that holds `size`: tl.dot wants a power of two, at least 16."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def chunk_widths(dim: int) -> tuple[int, ...]:
    """The chunks of a head dimension: so far one that holds it all."""
    return (covering_block(dim),)


@lru_cache
def forward_configuration(
    dtype: torch.dtype,
    dim: int,
    dim_v: int,
    queries: int,
    keys: int,
    target: tuple[str, int] | None,
    *,
    exact: bool = True,
    masked: bool = False,
) -> ForwardConfiguration:
    """The configuration for this problem.

    Args:
        dtype: of query, key and value.
        dim, dim_v: head dimensions.
        queries, keys: sequence lengths.
        target: ("cuda", 90), ("hip", 942), ...: backend and architecture; None under the interpreter.
        exact: float32 products are not rounded to TensorFloat-32.
        masked: there is a mask to load.
    """
    if target is None:
        return INTERPRETER
    backend, architecture = target
    width = max(*chunk_widths(dim), *chunk_widths(dim_v))
    if dtype == torch.float32:
        configuration = _exact(width, backend) if exact or backend == "hip" else _tensor_float(width)
    elif backend == "hip":
        configuration = _cdna(width)
    elif architecture // 10 in (9, 10):
        configuration = _hopper(width, masked)
    else:
        configuration = _ampere(width, large_shared_memory=architecture == 80)
    return _shrink(configuration, queries, keys)


def key_mass_configuration(
    dtype: torch.dtype, dim: int, queries: int, keys: int, target: tuple[str, int] | None, *, exact: bool = True
) -> ForwardConfiguration:
    """The configuration of the pass that sums over queries, for this problem; see `forward_configuration`."""
    if target is None:
        return INTERPRETER
    return forward_configuration(dtype, dim, dim, queries, keys, target, exact=exact, masked=True)


def _exact(width: int, backend: str) -> ForwardConfiguration:
    # exact products run on the FMA units, which hold whole rows of their operands in registers: small tiles, many
    # warps, or the loop spills; one stage where shared memory is 64 KiB
    return ForwardConfiguration(32 if width <= 128 else 16, 32, num_warps=8, num_stages=1 if backend == "hip" else 2)


def _tensor_float(width: int) -> ForwardConfiguration:
    # twice the bytes of half precision; fits 99 KiB of shared memory
    return ForwardConfiguration(64, 32 if width <= 128 else 16, num_warps=4, num_stages=2)


def _hopper(width: int, masked: bool) -> ForwardConfiguration:
    if width <= 64 or (width <= 128 and not masked):
        # two warp groups of 64 queries each; longer key tiles make rescaling and addresses cheaper per logit
        return ForwardConfiguration(128, 128, num_warps=8, num_stages=2)
    # a mask's tile takes registers and shared memory, an output wider than 128 takes 128 registers of each thread
    return ForwardConfiguration(128, 64, num_warps=8, num_stages=2)


def _ampere(width: int, large_shared_memory: bool) -> ForwardConfiguration:
    if width <= 64:
        # with four warps a mask makes the loop spill
        return ForwardConfiguration(128, 64, num_warps=8, num_stages=3 if large_shared_memory else 2)
    if width <= 128:
        # 99 KiB hold two stages of 32 keys beside the query
        return ForwardConfiguration(128, 64 if large_shared_memory else 32, num_warps=8, num_stages=2)
    if large_shared_memory:
        return ForwardConfiguration(64, 64, num_warps=8, num_stages=2)
    return ForwardConfiguration(64, 32, num_warps=4, num_stages=2)


def _cdna(width: int) -> ForwardConfiguration:
    # 64 KiB of shared memory; a warp has 64 threads, so four hold what eight do elsewhere
    if width <= 128:
        return ForwardConfiguration(128, 64, num_warps=4, num_stages=1)
    return ForwardConfiguration(64, 32, num_warps=4, num_stages=1)


def _shrink(configuration: ForwardConfiguration, queries: int, keys: int) -> ForwardConfiguration:
    """No tile much larger than the problem: text has 77 keys, the middle of a U-Net 64 queries."""
    block_queries = min(configuration.block_queries, covering_block(queries))
    # fewer queries, fewer warps: on the matrix units a warp has at least 16 of them
    warps = max(4, configuration.num_warps * block_queries // configuration.block_queries)
    return replace(
        configuration,
        block_queries=block_queries,
        block_keys=min(configuration.block_keys, covering_block(keys)),
        num_warps=min(warps, configuration.num_warps),
    )
