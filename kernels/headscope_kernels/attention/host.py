"""Strides, alignment, precision and device, read off tensors and settings. Nothing touches data."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def cdiv(size: int, block: int) -> int:
    """How many blocks cover a size; Triton's own takes longer than a tensor's allocation."""
    return -(-size // block)


def broadcast_strides(name: str, tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of `tensor` read as one of `shape`, 0 wherever it repeats.

    Raises:
        ValueError: it doesn't broadcast to shape.
    """
    if tensor.shape == shape:
        return tensor.stride()
    try:
        return tensor.expand(shape).stride()
    except RuntimeError as error:
        raise ValueError(f"{name} must broadcast to {shape}, got {tuple(tensor.shape)}") from error


def stride_unit(tensors: Sequence[Tensor]) -> int:
    """The elements of 16 bytes if all rows begin at multiples of that, else 1.

    Triton looks at integers for multiples of 16, which a head of 40 channels is not; its rows can still be read
    16 bytes at a time.
    """
    unit = 16 // tensors[0].element_size()
    aligned = all(stride % unit == 0 for tensor in tensors for stride in tensor.stride()[:3])
    return unit if aligned else 1


def in_units(tensor: Tensor, unit: int) -> tuple[int, ...]:
    """A tensor's strides, all but the last divided by unit."""
    batch, head, row, column = tensor.stride()
    return (batch // unit, head // unit, row // unit, column)


def tile_descriptors(
    tensor: Tensor, rows: int, widths: tuple[int, ...]
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Tensor descriptors of [batch, heads, rows, columns] for tiles [rows, width], one for each of at most two chunks.

    The launcher encodes them on the host into the kernel's parameters: nothing is allocated, and a CUDA graph keeps
    them. Both are None where the hardware can't address the tensor.
    """
    if len(widths) > 2 or not addressable(tensor):
        return None, None
    strides = [*_used_strides(tensor), 1]
    described = [TensorDescriptor(tensor, list(tensor.shape), strides, [1, 1, rows, width]) for width in widths]
    return described[0], described[1] if len(described) > 1 else None


def addressable(tensor: Tensor) -> bool:
    """True if a tensor descriptor can address this [batch, heads, rows, columns].

    Addresses must be multiples of 16 bytes, rows contiguous, and nothing expanded or empty.
    """
    unit = 16 // tensor.element_size()
    return (
        min(tensor.shape) > 0
        and (tensor.stride(3) == 1 or tensor.shape[3] == 1)
        and all(
            stride > 0 and stride % unit == 0 and stride < 2**40 // tensor.element_size()
            for stride in _used_strides(tensor)
        )
        and tensor.data_ptr() % 16 == 0
    )


def _used_strides(tensor: Tensor) -> list[int]:
    """The stride of a dimension of one entry is never used, and may be anything."""
    unit = 16 // tensor.element_size()
    return [stride if size > 1 else unit for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True)]


def float32_precision() -> str:
    """ "tf32" if torch's matrix products of float32 may round their inputs, else "ieee": tl.dot's names."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def input_precision(dtype: torch.dtype) -> str:
    """tl.dot's argument of that name for operands of this type; AMD's newest chips know "ieee" only."""
    return float32_precision() if dtype == torch.float32 and torch.version.hip is None else "ieee"


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The operands' type in matrix products: their own, but the interpreter can't multiply bfloat16."""
    if dtype == torch.float16:
        return tl.float16
    return tl.bfloat16 if dtype == torch.bfloat16 and not triton.knobs.runtime.interpret else tl.float32


def device_target(tensor: Tensor) -> tuple[str, int] | None:
    """("cuda", 90) and the like; None for a tensor that only the interpreter can work on.

    Raises:
        ValueError: the tensor is not on a GPU, and the interpreter is off.
    """
    if tensor.is_cuda:
        target = triton.runtime.driver.active.get_current_target()
        digits = "".join(letter for letter in str(target.arch) if letter.isdigit())
        return target.backend, int(digits)
    if not triton.knobs.runtime.interpret:
        raise ValueError(f"Triton kernels need tensors on a GPU, got {tensor.device} (TRITON_INTERPRET is off)")
    return None


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; those of an H100 where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def launch_context(tensor: Tensor) -> AbstractContextManager:
    """The tensor's GPU is current inside: Triton launches on the current one, wherever the tensors are.

    Under the interpreter NumPy's warnings about NaN and infinity are off; a GPU has none.
    """
    if not tensor.is_cuda:
        return _without_warnings()
    if tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device_of(tensor)


_NOTHING = nullcontext()


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
