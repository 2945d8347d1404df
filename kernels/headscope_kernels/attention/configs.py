"""Tile shapes of the attention kernels, chosen by rule or by what was measured (choices.py), never by a search."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from headscope_kernels.attention.choices import Choice


@dataclass(frozen=True)
class ForwardConfiguration:
    """How one forward program is cut.

    Attributes:
        block_queries, block_keys: the tile of logits one step works on; powers of two, at least 16.
        num_warps, num_stages: as Triton names them.
        dim_widths, value_widths: the chunks the head dimensions are cut into, powers of two, at least 16;
            None: `chunk_widths` decides.
        descriptors: keys and values come through tensor descriptors where their strides allow.
        schedule: who loads and who computes. "plain": every warp does both (forward.py). "specialised": the same
            kernel, whose loads Triton gives to warps of their own. "overlapped": the kernel for Hopper in pingpong.py.
            "pingpong": that kernel, whose warp groups take turns. All but the first serve some calls only, and are off
            by default.
    """

    block_queries: int
    block_keys: int
    num_warps: int = 4
    num_stages: int = 2
    dim_widths: tuple[int, ...] | None = None
    value_widths: tuple[int, ...] | None = None
    descriptors: bool = False
    schedule: Literal["plain", "specialised", "overlapped", "pingpong"] = "plain"

    @property
    def options(self) -> dict[str, Any]:
        """What Triton compiles with."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# A step of the interpreter costs the same for any tile, and small shapes shall still cross tile borders.
INTERPRETER = ForwardConfiguration(32, 32)


def covering_block(size: int) -> int:
    """The smallest block that holds `size`: tl.dot wants a power of two, at least 16."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def chunk_widths(dim: int) -> tuple[int, ...]:
    """The chunks of a head dimension: two where one would waste more: 40 = 32 + 16 - 8, 80 = 64 + 16.

    A second chunk costs instructions: on sm_90, per score and with the entropy, none at 40 (8.8 both ways, through
    pointers), 0.8 at 80 and 1.2 at 96 (through descriptors), -0.2 at 160, 0.9 at 192, -1.3 at 320. It saves a quarter
    to three eighths of the matrix work, and as much shared memory and registers, which is what larger tiles need; an
    instruction per score is worth 0.008 cycles of an SM, the matrix work saved 0.016 (40) to 0.094 (160).
    """
    whole = covering_block(dim)
    first = max(16, 1 << (dim.bit_length() - 1))
    second = covering_block(dim - first) if dim > first else 0
    return (first, second) if first + second < whole and second else (whole,)


HOPPER = ("cuda", 90)
HALF = (torch.float16, torch.bfloat16)

# what costs nothing in the loop over keys, or one instruction: features as arguments.py names them
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
    """What a schedule for Hopper serves, in 16 bits and through descriptors.

    Attributes:
        dims: head dimensions.
        warps, block_queries: the configurations it is written for.
        features: what a call may ask for.
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
    carried: int = 0,
    features: frozenset[str] | None = None,
    choices: "tuple[Choice, ...] | None" = None,
) -> ForwardConfiguration:
    """The configuration for this problem.

    Args:
        dtype: of query, key and value.
        dim, dim_v: head dimensions.
        queries, keys: sequence lengths.
        target: ("cuda", 90), ("hip", 942), ...: backend and architecture; None under the interpreter.
        exact: float32 products are not rounded to TensorFloat-32.
        masked: there is a mask to load.
        carried: columns of the statistics' accumulators, beside the output's.
        features: what the call asks for (arguments.py); None: unknown, and only the rule decides.
        choices: what was measured to be better than the rule; None: the package's table, (): nothing.

    Raises:
        ValueError: the package's table is malformed.
    """
    if target is None:
        return INTERPRETER
    if features is not None and not masked and not carried and dim == dim_v and features <= LIGHT:
        # choices.py needs this module
        from headscope_kernels.attention import choices as measured

        table = measured.packaged() if choices is None else choices
        for configuration in measured.nearest(table, dtype, dim, queries, keys, target):
            if configuration.schedule == "plain":
                return _shrink(configuration, queries, keys)
            if unserved(configuration, dtype, dim, dim_v, keys, target, features) is None:
                return configuration
    return _by_rule(dtype, dim, dim_v, queries, keys, target, exact, masked, carried)


def _by_rule(
    dtype: torch.dtype,
    dim: int,
    dim_v: int,
    queries: int,
    keys: int,
    target: tuple[str, int],
    exact: bool,
    masked: bool,
    carried: int,
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
    if carried:
        configuration = _beside_groups(configuration, width + carried)
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
