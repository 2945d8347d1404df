"""Tile shapes of the attention kernels, chosen by rule or by what was measured (choices.py), never by a search."""

from dataclasses import replace
from functools import lru_cache

import torch

from headscope_kernels.attention import choices as measured
from headscope_kernels.attention.choices import Choice
from headscope_kernels.attention.configuration import INTERPRETER, ForwardConfiguration, chunk_widths, covering_block
from headscope_kernels.attention.hopper.schedules import LIGHT, unserved


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
    accumulated: int = 0,
    features: frozenset[str] | None = None,
    choices: tuple[Choice, ...] | None = None,
) -> ForwardConfiguration:
    """The configuration for this problem.

    Args:
        dtype: of query, key and value.
        dim, dim_v: head dimensions.
        queries, keys: sequence lengths.
        target: ("cuda", 90), ("hip", 942), ...: backend and architecture; None under the interpreter.
        exact: float32 products are not rounded to TensorFloat-32.
        masked: there is a mask to load.
        accumulated: columns of the statistics' accumulators, beside the output's.
        features: what the call asks for (`forward_features`); None: unknown, and only the rule decides.
        choices: what was measured to be better than the rule; None: the package's table, (): nothing.

    Raises:
        ValueError: the package's table is malformed.
    """
    if target is None:
        return INTERPRETER
    if features is not None and not masked and not accumulated and dim == dim_v and features <= LIGHT:
        table = measured.packaged() if choices is None else choices
        for configuration in measured.nearest(table, dtype, dim, queries, keys, target):
            if configuration.schedule == "plain":
                return _shrink(configuration, queries, keys)
            if unserved(configuration, dtype, dim, dim_v, keys, target, features) is None:
                return configuration
    return _by_rule(dtype, dim, dim_v, queries, keys, target, exact, masked, accumulated)


def _by_rule(
    dtype: torch.dtype,
    dim: int,
    dim_v: int,
    queries: int,
    keys: int,
    target: tuple[str, int],
    exact: bool,
    masked: bool,
    accumulated: int,
) -> ForwardConfiguration:
    backend, architecture = target
    width = max(sum(chunk_widths(dim)), sum(chunk_widths(dim_v)))
    if dtype == torch.float32:
        configuration = _exact(width, backend) if exact or backend == "hip" else _tensor_float(width)
    elif backend == "hip":
        configuration = _cdna(width)
    elif architecture // 10 in (9, 10):
        configuration = _hopper(width, masked)
    else:
        configuration = _ampere(width, large_shared_memory=architecture == 80)
    if accumulated:
        configuration = _beside_groups(configuration, width + accumulated)
    return _shrink(configuration, queries, keys)


def _beside_groups(configuration: ForwardConfiguration, columns: int) -> ForwardConfiguration:
    """Room for accumulators of as many columns as the output and the groups have together.

    What still spills on sm_90: 128 groups beside an output of 256 (88 bytes, outside of the loop), and both group
    statistics of 128 groups in one call, whose 384 columns of 64 rows are 96 registers of each thread. Since tiles at
    borders are pipelined, also 128 groups beside an output of 64 in 16 bits (8 bytes), and entropies of 16 groups in
    exact float32 (16 bytes).
    """
    # two to six matrix operands made of a tile's weights are live at once
    configuration = replace(configuration, block_keys=min(configuration.block_keys, 64 if columns <= 192 else 32))
    if columns > 192:
        # fewer rows for as many warps: each holds fewer columns
        configuration = replace(configuration, block_queries=min(configuration.block_queries, 64))
    return configuration


def key_mass_configuration(
    dtype: torch.dtype, dim: int, queries: int, keys: int, target: tuple[str, int] | None, *, exact: bool = True
) -> ForwardConfiguration:
    """The configuration of the pass that sums over queries, for this problem; see `forward_configuration`."""
    if target is None:
        return INTERPRETER
    return forward_configuration(dtype, dim, dim, queries, keys, target, exact=exact, masked=True)


def _exact(width: int, backend: str) -> ForwardConfiguration:
    # exact products run on the FMA units, which hold whole rows of their operands in registers: small tiles, many
    # warps, or the loop spills; one stage where shared memory is 64 KiB. At 128 it does spill on sm_90, by 3 % of the
    # loop's instructions (232 bytes); the smaller tiles that don't issue 24 % more. At 16 it spills 8 bytes outside the
    # loop
    if width <= 128:
        return ForwardConfiguration(32, 32, num_warps=8, num_stages=1 if backend == "hip" else 2)
    return ForwardConfiguration(16, 16, num_warps=8, num_stages=1)


def _tensor_float(width: int) -> ForwardConfiguration:
    # twice the bytes of half precision; fits 99 KiB of shared memory
    if width > 256:
        return ForwardConfiguration(32, 16, num_warps=4, num_stages=1)
    return ForwardConfiguration(64, 32 if width <= 128 else 16, num_warps=4, num_stages=2)


def _hopper(width: int, masked: bool) -> ForwardConfiguration:
    if masked and width <= 256:
        # a mask's tile takes registers and shared memory
        return ForwardConfiguration(128 if width <= 128 else 64, 64, num_warps=8, num_stages=2, descriptors=True)
    if width <= 64:
        # two warp groups of 64 queries each; longer key tiles make rescaling and addresses cheaper per logit. Pointers
        # issue as much as descriptors here (8.6 per score against 8.5), and beside them the entropy adds 1.0 to 1.2
        # instead of 1.4
        return ForwardConfiguration(128, 128, num_warps=8, num_stages=2)
    if width <= 160:
        # with pointers, the addresses of longer rows would spill
        return ForwardConfiguration(128, 128, num_warps=8, num_stages=2, descriptors=True)
    if width <= 256:
        # such an output takes 128 registers of each thread
        return ForwardConfiguration(128, 64, num_warps=8, num_stages=2, descriptors=True)
    # half the rows for as many warps; at 512 the query's addresses still spill before the loop (56 bytes)
    return ForwardConfiguration(64, 64 if width <= 320 else 32, num_warps=8, num_stages=2, descriptors=True)


def _ampere(width: int, large_shared_memory: bool) -> ForwardConfiguration:
    if width <= 64:
        # with four warps a mask makes the loop spill
        return ForwardConfiguration(128, 64, num_warps=8, num_stages=3 if large_shared_memory else 2)
    if width <= 128:
        # 99 KiB hold two stages of 32 keys beside the query
        return ForwardConfiguration(128, 64 if large_shared_memory else 32, num_warps=8, num_stages=2)
    if width <= 256 and large_shared_memory:
        return ForwardConfiguration(64, 64, num_warps=8, num_stages=2)
    if width <= 256:
        return ForwardConfiguration(64, 32, num_warps=4, num_stages=2)
    return ForwardConfiguration(32, 32, num_warps=4, num_stages=1)


def _cdna(width: int) -> ForwardConfiguration:
    # 64 KiB of shared memory; a warp has 64 threads, so four hold what eight do elsewhere
    if width <= 128:
        return ForwardConfiguration(128, 64, num_warps=4, num_stages=1)
    if width <= 256:
        return ForwardConfiguration(64, 32, num_warps=4, num_stages=1)
    return ForwardConfiguration(32, 16, num_warps=4, num_stages=1)


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
