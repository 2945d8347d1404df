"""Tile shapes of the backward kernels, chosen by rule like the forward's."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from headscope_kernels.attention.configuration import Tile, chunk_widths, covering_block


@dataclass(frozen=True)
class BackwardConfiguration(Tile):
    """How one program of one backward kernel is cut.

    Attributes:
        descriptors: what the loop reads comes through tensor descriptors where its strides allow.
    """

    descriptors: bool = False


@dataclass(frozen=True)
class BackwardConfigurations:
    """All kernels of one backward pass.

    Attributes:
        key_value, query, mask: of the kernels for dk and dv, for dq, and for a mask's gradient.
        block_rows: queries of one program that computes what concerns whole rows.
        dim_widths, value_widths: the chunks the head dimensions are cut into; None: `chunk_widths` decides.
        separate: dk and dv by a launch each, because one program can't hold both.
        splits: programs that share the queries of one key tile; None: enough to fill a GPU.
    """

    key_value: BackwardConfiguration
    query: BackwardConfiguration
    mask: BackwardConfiguration
    block_rows: int = 64
    dim_widths: tuple[int, ...] | None = None
    value_widths: tuple[int, ...] | None = None
    separate: bool = False
    splits: int | None = None


# A step of the interpreter costs the same for any tile, and small shapes shall still cross tile borders.
INTERPRETER = BackwardConfigurations(*[BackwardConfiguration(32, 32)] * 3, block_rows=32)
# two programs for each of an H100's 132 multiprocessors; the same on every GPU, so that results are
FULL_GPU = 264


def query_splits(programs: int, queries: int, block_queries: int) -> int:
    """How many programs should share the queries of one key tile, if there are `programs` key tiles in all.

    Cross-attention has one key tile to a head, and thousands of queries. No share is under four query tiles.
    """
    return max(1, min(FULL_GPU // max(programs, 1), queries // (4 * block_queries)))


@lru_cache
def backward_configurations(
    dtype: torch.dtype,
    dim: int,
    dim_v: int,
    queries: int,
    keys: int,
    target: tuple[str, int] | None,
    *,
    exact: bool = True,
    extra_terms: bool = False,
) -> BackwardConfigurations:
    """The configurations for this problem.

    Args:
        dtype: of query, key and value.
        dim, dim_v: head dimensions.
        queries, keys: sequence lengths.
        target: ("cuda", 90), ("hip", 942), ...: backend and architecture; None under the interpreter.
        exact: float32 products are not rounded to TensorFloat-32.
        extra_terms: every score takes more than the plain ones do, and registers with it: a mask, an edit of keys, a
            statistic of groups.
    """
    if target is None:
        return INTERPRETER
    backend, architecture = target
    # what a tile's rows take up, padding included
    width = max(sum(chunk_widths(dim)), sum(chunk_widths(dim_v)))
    if dtype == torch.float32:
        chosen = _exact(width) if exact or backend == "hip" else _tensor_float(width)
    elif backend == "hip":
        chosen = _cdna(width)
    elif architecture // 10 in (9, 10):
        chosen = _hopper(width, extra_terms, architecture)
    else:
        chosen = _ampere(width, large_shared_memory=architecture == 80)
    return replace(
        chosen,
        key_value=_shrink(chosen.key_value, queries, keys),
        query=_shrink(chosen.query, queries, keys),
        mask=_shrink(chosen.mask, queries, keys),
        block_rows=min(max(16, 8192 // covering_block(dim_v)), 128),
    )


def _exact(width: int) -> BackwardConfigurations:
    # exact products run on the FMA units, which hold whole rows of their operands in registers
    block = 32 if width <= 64 else 16
    both = BackwardConfiguration(block, block, num_warps=8, num_stages=1)
    return BackwardConfigurations(both, both, both, separate=width > 64)


def _tensor_float(width: int) -> BackwardConfigurations:
    if width <= 64:
        both = BackwardConfiguration(32, 64, num_warps=4, num_stages=1)
        return BackwardConfigurations(both, BackwardConfiguration(64, 32, num_warps=4, num_stages=1), both)
    both = BackwardConfiguration(32, 32, num_warps=4, num_stages=1)
    return BackwardConfigurations(both, both, both, separate=width > 128)


def _hopper(width: int, extra_terms: bool, architecture: int) -> BackwardConfigurations:
    mask = BackwardConfiguration(64, 32, num_warps=4, num_stages=1)
    if width <= 128:
        # two warp groups of 64 rows each
        key_value = BackwardConfiguration(32 if extra_terms else 64, 128, num_warps=8, num_stages=2)
        query = BackwardConfiguration(128, 64 if extra_terms else 128, num_warps=8, num_stages=2, descriptors=True)
        if architecture >= 100:
            # tensor memory has 512 columns for all products
            query = replace(query, block_keys=64)
        if width > 80:
            # both results take half of a thread's registers: with an entropy's cotangent this spills 30 of them, and
            # still issues 16 instructions per score where tiles of 32 queries, which don't spill, issue 20
            key_value = replace(key_value, descriptors=not extra_terms)
            query = replace(query, block_keys=64)
        return BackwardConfigurations(key_value, query, mask)
    if width <= 256:
        # one result at a time; tiles whose rows fill both warp groups issue less than smaller ones. With descriptors
        # 28 of 632 instructions spill at d 256 (20 per score), with pointers 122 of 771 (24); tiles of 32 x 64 don't
        # spill, and issue 26
        key_value = BackwardConfiguration(
            32 if extra_terms else 64, 128, num_warps=8, num_stages=1, descriptors=not extra_terms
        )
        # with edits and statistics tiles of 64 keys spill on sm_90; sm_100 keeps products in tensor memory
        few = extra_terms and architecture < 100
        query = BackwardConfiguration(128, 32 if few else 64, num_warps=8, num_stages=1, descriptors=True)
        return BackwardConfigurations(key_value, query, mask, separate=True)
    key_value = BackwardConfiguration(16, 64, num_warps=8, num_stages=1)
    query = BackwardConfiguration(64, 16 if extra_terms else 32, num_warps=8, num_stages=1)
    mask = BackwardConfiguration(32, 32, num_warps=4, num_stages=1)
    return BackwardConfigurations(key_value, query, mask, separate=True)


def _ampere(width: int, large_shared_memory: bool) -> BackwardConfigurations:
    mask = BackwardConfiguration(64, 64 if width <= 64 else 32, num_warps=4, num_stages=1)
    if width <= 64:
        return BackwardConfigurations(
            BackwardConfiguration(64, 64, num_warps=4, num_stages=2),
            BackwardConfiguration(64, 64, num_warps=4, num_stages=2),
            mask,
        )
    if width <= 128 and large_shared_memory:
        return BackwardConfigurations(
            BackwardConfiguration(32, 64, num_warps=4, num_stages=2),
            BackwardConfiguration(64, 32, num_warps=4, num_stages=2),
            mask,
        )
    small = BackwardConfiguration(32, 32 if width <= 256 else 16, num_warps=4, num_stages=1)
    return BackwardConfigurations(small, replace(small, block_queries=32), small, separate=width > 128)


def _cdna(width: int) -> BackwardConfigurations:
    # 64 KiB of shared memory; a warp has 64 threads, so four hold what eight do elsewhere
    block = 64 if width <= 64 else 32
    both = BackwardConfiguration(block, block, num_warps=4, num_stages=1)
    return BackwardConfigurations(both, both, both, separate=width > 128)


def _shrink(configuration: BackwardConfiguration, queries: int, keys: int) -> BackwardConfiguration:
    """No tile much larger than the problem: text has 77 keys, the middle of a U-Net 64 queries."""
    return replace(
        configuration,
        block_queries=min(configuration.block_queries, covering_block(queries)),
        block_keys=min(configuration.block_keys, covering_block(keys)),
    )
