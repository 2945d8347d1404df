"""Compiling a kernel for a target without its GPU, from the arguments of a launch."""

import re
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
    """What a launch with these arguments would compile: aligned pointers, strides specialised by value."""
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
