"""Configurations of the forward that are timed against the rule's; choices.py keeps the faster ones."""

from dataclasses import replace

import torch

from headscope_kernels.attention.configuration import ForwardConfiguration, chunk_widths, covering_block
from headscope_kernels.attention.forward.configs import forward_configuration
from headscope_kernels.attention.hopper.schedules import GROUP_ROWS, HALF, HOPPER, unserved


def candidates(
    dtype: torch.dtype, dim: int, dim_v: int, queries: int, keys: int, target: tuple[str, int] | None
) -> dict[str, ForwardConfiguration]:
    """Configurations to be timed against the rule's for such a problem without a mask, by name; none but on Hopper.

    Args: as `forward_configuration`'s.
    """
    if target != HOPPER or dtype not in HALF or queries < 2 * GROUP_ROWS or not keys:
        return {}
    block_keys = min(128, covering_block(keys))
    overlapped = ForwardConfiguration(128, block_keys, 4, 2, descriptors=True, schedule="overlapped")
    known = {
        "descriptors": ForwardConfiguration(128, 128, num_warps=8, descriptors=True),
        # two programs on a multiprocessor, each at another place of its loop; beyond 80 channels it spills
        "128x64, 4 warps": ForwardConfiguration(128, 64, num_warps=4, descriptors=True),
        "specialised": ForwardConfiguration(128, 128, num_warps=4, descriptors=True, schedule="specialised"),
        "overlapped": overlapped,
        # more tiles in flight: five more instructions in the loop, and loads that may take longer
        "overlapped, deep": replace(overlapped, num_stages=4 if dim <= 64 else 3),
        "overlapped, padded": replace(overlapped, dim_widths=(covering_block(dim),)),
        "ping-pong": replace(overlapped, schedule="pingpong"),
        "ping-pong, three": replace(overlapped, block_queries=192, schedule="pingpong"),
    }
    largest = {"descriptors": 128, "128x64, 4 warps": 80, "ping-pong, three": 64}
    rule = forward_configuration(dtype, dim, dim_v, queries, keys, target, choices=())
    return {
        name: configuration
        for name, configuration in known.items()
        if max(dim, dim_v) <= largest.get(name, 512)
        and configuration != rule
        # padding is the same where there is one chunk; a tile twice as long as the keys is waste
        and configuration.dim_widths != chunk_widths(dim)
        and keys >= configuration.block_keys // 2
        and unserved(configuration, dtype, dim, dim_v, keys, target) is None
    }
