"""How a program is cut into tiles, and the blocks that hold a size."""

from dataclasses import dataclass
from typing import Any, Literal

Schedule = Literal["plain", "specialised", "overlapped", "pingpong"]


@dataclass(frozen=True)
class Tile:
    """How one program of a kernel is cut.

    Attributes:
        block_queries, block_keys: the tile of scores one step works on; powers of two, at least 16.
        num_warps, num_stages: as Triton names them.
    """

    block_queries: int
    block_keys: int
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """The options that Triton compiles with."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class ForwardConfiguration(Tile):
    """How one forward program is cut, and who does what in it.

    Attributes:
        dim_widths, value_widths: the chunks the head dimensions are cut into, powers of two, at least 16;
            None: `chunk_widths` decides.
        descriptors: keys and values come through tensor descriptors where their strides allow.
        schedule: who loads and who computes. "plain": every warp does both. "specialised": the same kernel, whose
            loads Triton gives to warps of their own. "overlapped": the kernel for Hopper in hopper/pingpong.py.
            "pingpong": that kernel, whose warp groups take turns. All but the first serve some calls only, and are off
            by default.
    """

    dim_widths: tuple[int, ...] | None = None
    value_widths: tuple[int, ...] | None = None
    descriptors: bool = False
    schedule: Schedule = "plain"


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
