"""The schedules for Hopper, and the calls that each can serve."""

from collections.abc import Collection
from typing import NamedTuple

import torch

from headscope_kernels.attention.configuration import ForwardConfiguration, chunk_widths

HOPPER = ("cuda", 90)
HALF = (torch.float16, torch.bfloat16)

# what costs nothing in the loop over keys, or one instruction: features as forward/arguments.py names them
LIGHT = frozenset(
    (
        *("gate", "fill", "temperature", "attention", "row_max", "log2_sum"),
        *("entropy", "logsumexp", "max_logit", "max_prob", "collision_entropy"),
    )
)


# served by pingpong.py's kernel
GLUON_SCHEDULES = ("overlapped", "pingpong")
# of a warp group on Hopper, what one matrix instruction takes
GROUP_ROWS = 64
# of a program on Hopper, less what barriers take
_SHARED_BYTES = 226 * 1024


class _Limits(NamedTuple):
    """The calls that a schedule for Hopper serves, in 16 bits and through descriptors.

    Attributes:
        dims: head dimensions.
        warps, block_queries: the configurations it is written for.
        features: the features that a call may have (`forward_features`).
        gluon: the kernel of pingpong.py, which takes a last tile of keys that isn't full.
    """

    dims: range
    warps: tuple[int, ...]
    block_queries: tuple[int, ...]
    features: frozenset[str]
    gluon: bool = False


# two or three groups of four warps
_PINGPONG = _Limits(range(1, 161), (4,), (2 * GROUP_ROWS, 3 * GROUP_ROWS), frozenset(("gate", "entropy")), gluon=True)
_LIMITS = {
    # two groups of four warps with 64 queries each; Triton doesn't look at loops of other numbers of warps
    "specialised": _Limits(range(1, 129), (4,), (128,), LIGHT | {"no output", "unaligned output"}),
    "overlapped": _PINGPONG,
    "pingpong": _PINGPONG,
}

_UNALIGNED = "descriptors need addresses and strides that are multiples of 16 bytes, and rows without gaps"
_REASONS = {
    "mask": "the warps that compute would load it",
    "is_causal": "tiles across the diagonal take a loop of their own",
    "key_bias": "a row can't be loaded by warps of its own",
    "key_scale": "a row can't be loaded by warps of its own",
    "scale <= 0": "the query would have to change on its way into shared memory",
    "another statistic": "not known to survive that tiles are cut in two",
    "unaligned query": _UNALIGNED,
    "unaligned key": _UNALIGNED,
    "unaligned value": _UNALIGNED,
    "unaligned output": _UNALIGNED,
}


def query_stages(configuration: ForwardConfiguration, dim: int) -> int:
    """Tiles of queries that pingpong.py's kernel holds at once, two if shared memory takes them; 0: it takes none."""
    row = 2 * sum(configuration.dim_widths or chunk_widths(dim))
    left = _SHARED_BYTES - 2 * configuration.num_stages * configuration.block_keys * row
    return min(2, max(0, left // (configuration.block_queries * row)))


def unserved(
    configuration: ForwardConfiguration,
    dtype: torch.dtype,
    dim: int,
    dim_v: int,
    keys: int,
    target: tuple[str, int] | None,
    features: Collection[str] = (),
) -> str | None:
    """Why the configuration's schedule can't serve a call, None if it can; see `forward_configuration`."""
    limits = _LIMITS.get(configuration.schedule)
    if limits is None:
        return None
    wants = f"{configuration.block_queries} x {configuration.block_keys}, {configuration.num_warps} warps"
    demands = {
        f"target {target}, expected {HOPPER}": target == HOPPER or (target is None and not limits.gluon),
        f"{dtype}, expected float16 or bfloat16": dtype in HALF,
        f"head dimensions {dim} and {dim_v}, expected {limits.dims[0]} to {limits.dims[-1]}": (
            dim in limits.dims and dim_v in limits.dims
        ),
        f"{keys} keys, expected a multiple of {configuration.block_keys}": (
            keys > 0 and (limits.gluon or keys % configuration.block_keys == 0)
        ),
        f"head dimensions {dim} and {dim_v}, expected them to be equal": not limits.gluon or dim == dim_v,
        f"{configuration.num_stages} stages, expected at least 2": not limits.gluon or configuration.num_stages >= 2,
        f"tiles that take more than {_SHARED_BYTES} bytes of shared memory": (
            not limits.gluon or query_stages(configuration, dim) > 0
        ),
        f"a tile of {wants}, expected {limits.block_queries} queries and {limits.warps} warps": (
            configuration.num_warps in limits.warps and configuration.block_queries in limits.block_queries
        ),
        "descriptors=False, expected True": configuration.descriptors,
        "three chunks of a head dimension, expected at most two": all(
            len(widths or ()) <= 2 for widths in (configuration.dim_widths, configuration.value_widths)
        ),
        **{f"{name} ({_REASONS.get(name, 'not tried')})": False for name in sorted(set(features) - limits.features)},
    }
    missing = [demand for demand, met in demands.items() if not met]
    return f"schedule {configuration.schedule!r} can't serve {'; '.join(missing)}" if missing else None
