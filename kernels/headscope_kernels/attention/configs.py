"""Tile shapes of the attention kernels, chosen by rule: no search at import, none at the first call."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton

# Shared memory of one program, bytes: what a Hopper or data-centre Ampere card allows, and everything else (consumer
# cards; CDNA3 has 64 KiB, but keeps the query in registers and loads through them).
SMALL_SHARED_MEMORY = 99 * 1024


@dataclass(frozen=True)
class ForwardConfiguration:
    """How one forward program is cut.

    Attributes:
        block_queries, block_keys: the tile of logits one step works on; powers of two, at least 16.
        num_warps, num_stages: as Triton names them.
        dim_widths, value_widths: the chunks the head dimensions are cut into, powers of two, at least 16;
            None: one chunk, the next power of two.
    """

    block_queries: int
    block_keys: int
    num_warps: int = 4
    num_stages: int = 2
    dim_widths: tuple[int, ...] | None = None
    value_widths: tuple[int, ...] | None = None


# A step of the interpreter costs the same for any tile, and small shapes shall still cross tile borders.
INTERPRETER = ForwardConfiguration(32, 32)


def chunk_widths(dim: int) -> tuple[int, ...]:
    """One chunk that holds dim: tl.dot wants a power of two, at least 16."""
    return (max(16, triton.next_power_of_2(dim)),)


@lru_cache
def forward_configuration(
    dtype: torch.dtype, dim: int, dim_v: int, queries: int, keys: int, target: tuple[str, int] | None
) -> ForwardConfiguration:
    """The configuration for this problem.

    Args:
        dtype: of query, key and value.
        dim, dim_v: head dimensions.
        queries, keys: sequence lengths.
        target: ("cuda", 90), ("hip", 942), ...: backend and architecture; None under the interpreter.
    """
    if target is None:
        return INTERPRETER
    backend, architecture = target
    width = max(*chunk_widths(dim), *chunk_widths(dim_v))
    if dtype == torch.float32:
        configuration = _single_precision(width)
    elif backend == "hip":
        configuration = _cdna(width)
    elif architecture in (90, 100):
        configuration = _hopper(width)
    else:
        configuration = _ampere(width, large_shared_memory=architecture == 80)
    return _shrink(configuration, queries, keys)


def _single_precision(width: int) -> ForwardConfiguration:
    # exact products run on the FMA units, which hold their operands in registers: small tiles, or they spill
    return ForwardConfiguration(32 if width <= 128 else 16, 32, num_warps=4, num_stages=2)


def _hopper(width: int) -> ForwardConfiguration:
    if width <= 128:
        # two warp groups of 64 queries each; longer key tiles make rescaling and addresses cheaper per score
        return ForwardConfiguration(128, 128, num_warps=8, num_stages=2)
    # the output alone takes 128 registers of each thread
    return ForwardConfiguration(128, 64, num_warps=8, num_stages=2)


def _ampere(width: int, large_shared_memory: bool) -> ForwardConfiguration:
    if width <= 64:
        return ForwardConfiguration(128, 64, num_warps=4, num_stages=3 if large_shared_memory else 2)
    if width <= 128:
        # eight warps share the output's registers; 99 KiB hold two stages of 32 keys beside the query
        return ForwardConfiguration(128, 64 if large_shared_memory else 32, num_warps=8, num_stages=2)
    return ForwardConfiguration(64, 32, num_warps=4, num_stages=2)


def _cdna(width: int) -> ForwardConfiguration:
    # 64 KiB of shared memory; a warp has 64 threads, so four hold what eight do elsewhere
    if width <= 128:
        return ForwardConfiguration(128, 64, num_warps=4, num_stages=1)
    return ForwardConfiguration(64, 32, num_warps=4, num_stages=1)


def _shrink(configuration: ForwardConfiguration, queries: int, keys: int) -> ForwardConfiguration:
    """No tile much larger than the problem: text has 77 keys, the middle of a U-Net 64 queries."""
    smaller = replace(
        configuration,
        block_queries=min(configuration.block_queries, max(16, triton.next_power_of_2(max(queries, 1)))),
        block_keys=min(configuration.block_keys, max(16, triton.next_power_of_2(max(keys, 1)))),
    )
    if smaller.block_queries < 128 and smaller.num_warps == 8:
        smaller = replace(smaller, num_warps=4)
    return smaller
