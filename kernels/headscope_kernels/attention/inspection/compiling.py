"""Compiling a kernel for a target without its GPU, from the arguments of a launch, and reading the result."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from headscope_kernels.attention.configuration import Tile
from headscope_kernels.attention.inspection.machine_code import densest_matrix_loop, disassemble, exponentials, figure

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int32: "i32",
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


def ast_source(kernel: Any, arguments: dict[str, Any], kind: type[ASTSource] = ASTSource) -> ASTSource:
    """The source that a launch with these arguments compiles: aligned pointers, strides specialised by value."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def type_of(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(element, (*path, index)) for index, element in enumerate(value))
        if isinstance(value, Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + TYPE_NAMES[value.dtype]
        if hasattr(value, "block_shape"):
            # Gluon's descriptors say how their tiles lie in shared memory
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            return f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}{layout}>"
        if isinstance(value, float):
            return "fp32"
        if value is None:
            constants[path] = None
            return "constexpr"
        if value == 1 and path[0] not in unspecialised:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0 and path[0] not in unspecialised:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"

    signature = {}
    unspecialised = {index for index, parameter in enumerate(kernel.params) if parameter.do_not_specialize}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            constants[(index,)] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = type_of(value, (index,))
    return kind(kernel, signature, constants, attributes)


def target_key(target: GPUTarget) -> tuple[str, int]:
    """("cuda", 90) or ("hip", 942), as the configurations want it."""
    return target.backend, int(re.sub(r"\D", "", str(target.arch)))


def without_data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous tensor that says all that arguments are made from, and takes no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def mask_without_data(kind: str, queries: int, keys: int) -> Tensor | None:
    """A mask [1, 1, queries, keys], "bool" or "additive"; None if the kind is "none"."""
    if kind == "none":
        return None
    return without_data(1, 1, queries, keys, dtype=torch.bool if kind == "bool" else torch.float32)


@dataclass(frozen=True)
class Figures:
    """The figures of one compiled kernel.

    Attributes:
        registers: per thread.
        spill_bytes: stack of one thread, or spilled registers times 4 on AMD.
        shared_bytes: of one program.
        code: the instructions of one iteration over a full tile; empty on AMD.
        scores: scores of that iteration, per thread.
        assembly: the whole kernel's; empty on AMD.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    code: list[str] = field(default_factory=list)
    scores: int = 0
    assembly: str = ""


def figures(compiled: CompiledKernel, gpu: GPUTarget, tile: Tile, warps: int) -> Figures:
    """Read what the compiler made of a kernel whose program shares a tile of scores among so many warps."""
    shared = compiled.metadata.shared
    if gpu.backend == "hip":
        text = compiled.asm["amdgcn"]
        spilled = figure(r"\.vgpr_spill_count:\s*(\d+)", text)
        return Figures(figure(r"\.vgpr_count:\s*(\d+)", text), 4 * spilled, shared)
    usage, assembly = disassemble(compiled.asm["cubin"])
    registers, stack = figure(r"REG:(\d+)", usage), figure(r"STACK:(\d+)", usage)
    scores = tile.block_queries * tile.block_keys // (32 * warps)
    loop = densest_matrix_loop(assembly)
    # ptxas may unroll: every score takes one power of two (and every row a few, which tiny tiles must not mistake)
    unrolled = max(1, exponentials(loop) // scores) if scores >= 16 else 1
    return Figures(registers, stack, shared, loop, scores * unrolled, assembly)
