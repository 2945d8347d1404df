"""Values of an emulated Gluon kernel: tensors in registers, pointers, global memory, and the operations on them.

A value keeps its Triton dtype and its layout, and an operation refuses what Gluon refuses: operands of unlike layouts
or ranks, `x[:, None]` along an axis that the layout isn't a slice of. Integers that leave their type are refused too.
16-bit floats are held in float32 and rounded to nearest even after every operation.
"""

import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.experimental.gluon import language as gl

DTYPES = {
    getattr(torch, name): getattr(gl, gluon)
    for name, gluon in [
        ("float64", "float64"),
        ("float32", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("float8_e4m3fn", "float8e4nv"),
        ("int64", "int64"),
        ("int32", "int32"),
        ("int16", "int16"),
        ("int8", "int8"),
        ("uint8", "uint8"),
        ("bool", "int1"),
    ]
}
STAND_INS: dict[int, Any] = {}
"""What a kernel gets for what it names, by the id of that."""


def stand_in(name: str, *modules: Any) -> Callable:
    """What is decorated stands for `name` of `modules` (default: Gluon's language and Triton's), where they have it."""

    def register(replacement: Any) -> Any:
        for module in modules or (gl, tl):
            if hasattr(module, name):
                STAND_INS[id(getattr(module, name))] = replacement
        return replacement

    return register


TORCH = {gluon: dtype for dtype, gluon in DTYPES.items()}


class EmulationError(Exception):
    """What a kernel did that it must not do on the card, or that the emulator doesn't model."""


def rounded(data: Any, dtype: Any) -> np.ndarray:
    """`data` as values of `dtype`; OverflowError where an integer doesn't fit."""
    if dtype is gl.float32:  # most of them: dtypes' == is slow
        return np.asarray(data, dtype=np.float32)
    if dtype == gl.int1:
        return np.asarray(data).astype(bool)
    if dtype.is_floating():
        if dtype.primitive_bitwidth >= 32:
            return np.asarray(data, dtype=np.float64 if dtype == gl.float64 else np.float32)
        exact = torch.from_numpy(np.array(data, dtype=np.float32, order="C"))
        return exact.to(TORCH[dtype]).float().numpy()
    data = np.asarray(data).astype(np.int64)  # a float is truncated, as a cast on the card does
    bits = dtype.primitive_bitwidth
    low, high = (0, 2**bits - 1) if dtype.is_int_unsigned() else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if data.size and bits < 64 and (data.min() < low or data.max() > high):
        raise OverflowError(f"a value between {low} and {high} ({dtype}) was expected, got {data.min()}..{data.max()}")
    return data


def _common(a: Any, b: Any) -> Any:
    """The dtype of an operation on two tensors."""
    if a is b or a == b:
        return a
    if a.is_floating() != b.is_floating():
        return a if a.is_floating() else b
    if {a, b} == {gl.float16, gl.bfloat16}:
        return gl.float32
    return max(a, b, key=lambda dtype: (dtype.primitive_bitwidth, dtype.is_int_unsigned()))


def tensor(value: Any, beside: Any = None) -> "Tensor":
    """A Python number as a scalar, of the dtype that Triton gives it `beside` a tensor of that dtype."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, bool | int | float):
        raise EmulationError(f"a number or a tensor was expected, got {value!r}")
    if isinstance(value, bool):
        dtype = gl.int1
    elif isinstance(value, float):
        dtype = beside if beside is not None and beside.is_floating() else gl.float32
    elif beside is not None and beside != gl.int1 and (beside.is_floating() or beside.is_int()):
        dtype = beside
    else:
        dtype = gl.int32 if -(2**31) <= value < 2**31 else gl.int64
    return Tensor(rounded(value, dtype), dtype)


def _layout(*values: "Tensor") -> Any:
    """The layout that all blocks among `values` share; None is Gluon's AutoLayout, which takes any."""
    blocks = [value for value in values if value.data.ndim]
    if len({value.data.ndim for value in blocks}) > 1:
        raise EmulationError(f"blocks of one rank were expected, got shapes {[value.shape for value in blocks]}")
    layouts = [value.layout for value in blocks if value.layout is not None]
    for other in layouts[1:]:
        if other != layouts[0]:
            raise EmulationError(f"blocks of one layout were expected, got {layouts[0]} and {other}")
    return layouts[0] if layouts else None


def elementwise(function: Callable, *values: Any, dtype: Any = None) -> "Tensor":
    """function of the broadcast operands in their common dtype, rounded to `dtype` (default: the common one)."""
    known = [value.dtype for value in values if isinstance(value, Tensor)]
    beside = known[0] if known else None
    operands = [tensor(value, beside) for value in values]
    common = operands[0].dtype
    for operand in operands[1:]:
        common = _common(common, operand.dtype)
    result = function(*(x.data if x.dtype is common else rounded(x.data, common) for x in operands))
    return Tensor(rounded(result, dtype or common), dtype or common, _layout(*operands))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integer division as the card does it: towards zero."""
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


@stand_in("tensor")
class Tensor:
    """A block (or, with rank 0, a scalar) in registers; with a `buffer`, pointers: element offsets into it."""

    __array_ufunc__ = None

    def __init__(self, data: Any, dtype: Any, layout: Any = None, buffer: "Buffer | None" = None) -> None:
        self.data, self.dtype, self.layout, self.buffer = np.asarray(data), dtype, layout, buffer
        if layout is not None and not isinstance(layout, gl.AutoLayout) and layout.rank != self.data.ndim:
            raise EmulationError(f"a layout of rank {self.data.ndim} was expected, got {layout}")
        self.layout = None if isinstance(layout, gl.AutoLayout) else layout

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def numel(self) -> int:
        return self.data.size

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=self.layout, shape=self.shape, element_ty=self.dtype, scalar=self.dtype)

    @property
    def T(self) -> "Tensor":
        return permute(self, (1, 0))

    def _with(self, data: Any, layout: Any) -> "Tensor":
        return Tensor(data, self.dtype, layout, self.buffer)

    def to(self, dtype: Any, bitcast: bool = False) -> "Tensor":
        if bitcast:
            raise EmulationError("bitcasts aren't modelled")
        return Tensor(rounded(self.data, dtype), dtype, self.layout)

    def __getitem__(self, key: Any) -> "Tensor":
        result = self
        for axis, item in enumerate(key if isinstance(key, tuple) else (key,)):
            if item is None:
                result = expand_dims(result, axis)
            elif item != slice(None):
                raise EmulationError(f"only None and : index a tensor, got {key}")
        return result

    def __bool__(self) -> bool:
        if self.data.ndim:
            raise EmulationError(f"a scalar condition was expected, got a block of shape {self.shape}")
        return bool(self.data)

    def __neg__(self) -> "Tensor":
        return elementwise(np.negative, self)

    def __invert__(self) -> "Tensor":
        return elementwise(np.invert, self)

    def __repr__(self) -> str:
        return f"Tensor({self.data}, {self.dtype})"


def _add_operator(name: str, function: Callable, dtype: Any = None) -> None:
    def plain(self: Tensor, other: Any) -> Tensor:
        if isinstance(other, Tensor) and other.buffer is not None and self.buffer is None:
            return plain(other, self) if name == "add" else NotImplemented
        if self.buffer is None:
            return elementwise(function, self, other, dtype=dtype)
        other = tensor(other, gl.int64)
        if name not in ("add", "sub") or not other.dtype.is_int() or other.buffer is not None:
            raise EmulationError(f"pointer {name} {other}: only integers are added to pointers")
        return Tensor(function(self.data, other.data), self.dtype, _layout(self, other), self.buffer)

    setattr(Tensor, f"__{name}__", plain)
    if dtype is None:  # comparisons have no mirrored form: Python swaps them
        setattr(Tensor, f"__r{name}__", lambda self, other: plain(tensor(other, self.dtype), self))


for _name in ("add", "sub", "mul", "and_", "or_", "xor", "lshift", "rshift"):
    _add_operator(_name.strip("_"), getattr(operator, _name))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _add_operator(_name, getattr(operator, _name), gl.int1)
_add_operator("floordiv", _divide)
_add_operator("mod", lambda a, b: np.fmod(a, b))


def _true_divide(a: Any, b: Any) -> Tensor:
    kind = {True: None, False: gl.float32}[any(isinstance(x, Tensor) and x.dtype.is_floating() for x in (a, b))]
    return elementwise(np.divide, a, b, dtype=kind)


Tensor.__truediv__ = _true_divide
Tensor.__rtruediv__ = lambda self, other: _true_divide(tensor(other, self.dtype), self)


class Buffer:
    """A tensor's memory behind a pointer; elements that the tensor doesn't have can't be reached."""

    def __init__(self, memory: Any, name: str) -> None:
        memory = torch.from_numpy(memory) if isinstance(memory, np.ndarray) else memory.detach()
        self.name, self.dtype = name, DTYPES[memory.dtype]
        reach = 1 + sum((size - 1) * stride for size, stride in zip(memory.shape, memory.stride(), strict=True))
        self.flat = memory.as_strided((reach if memory.numel() else 0,), (1,))
        owned = torch.zeros(len(self.flat), dtype=torch.bool)
        owned.as_strided(memory.shape, memory.stride()).fill_(True)
        self.owned = owned.numpy()

    def _indices(self, offsets: np.ndarray, mask: np.ndarray) -> torch.Tensor:
        wanted = offsets[mask]
        outside = (wanted < 0) | (wanted >= len(self.owned))
        if not outside.any():
            outside = ~self.owned[wanted]
        if outside.any():
            raise EmulationError(f"{self.name}: element {wanted[outside][0]} isn't the tensor's")
        return torch.from_numpy(wanted)

    def load(self, offsets: np.ndarray, mask: np.ndarray, other: Any) -> np.ndarray:
        # what a masked load returns without `other` is undefined
        result = np.full(offsets.shape, other if other is not None else (np.nan if self.dtype.is_floating() else 0))
        values = self.flat[self._indices(offsets, mask)]
        result[mask] = values.to(torch.float64 if self.dtype.is_floating() else torch.int64).numpy()
        return rounded(result, self.dtype)

    def store(self, offsets: np.ndarray, mask: np.ndarray, values: np.ndarray) -> None:
        self.flat[self._indices(offsets, mask)] = torch.from_numpy(values[mask]).to(self.flat.dtype)


def _pointers(pointer: Any, mask: Any, *values: Any) -> tuple[Buffer, list[np.ndarray]]:
    if not isinstance(pointer, Tensor) or pointer.buffer is None:
        raise EmulationError(f"pointers were expected, got {pointer!r}")
    rest = [tensor(True if mask is None else mask), *(tensor(value, pointer.buffer.dtype) for value in values)]
    _layout(pointer, *rest)
    arrays = np.broadcast_arrays(pointer.data, *(value.data for value in rest))
    if arrays[0].shape != pointer.data.shape:
        raise EmulationError(f"pointers of shape {arrays[0].shape} were expected, got {pointer.shape}")
    return pointer.buffer, list(arrays)


@stand_in("load")
def load(pointer: Any, mask: Any = None, other: Any = None, **hints: Any) -> Tensor:
    buffer, (offsets, mask, *other) = _pointers(pointer, mask, *([] if other is None else [other]))
    data = buffer.load(offsets, mask, other[0] if other else None)
    return Tensor(data, buffer.dtype, pointer.layout)


@stand_in("store")
def store(pointer: Any, value: Any, mask: Any = None, **hints: Any) -> None:
    buffer, (offsets, mask, values) = _pointers(pointer, mask, value)
    buffer.store(offsets, mask, rounded(values, buffer.dtype))


@stand_in("atomic_add")
def atomic_add(pointer: Any, value: Any, mask: Any = None, **hints: Any) -> Tensor:
    buffer, (offsets, mask, values) = _pointers(pointer, mask, value)
    before = buffer.load(offsets, mask, None)
    for place in np.ndindex(*offsets.shape):  # pointers of one block may coincide
        one = (offsets[place].reshape(1), mask[place].reshape(1))
        buffer.store(*one, rounded(buffer.load(*one, None) + values[place], buffer.dtype))
    return Tensor(before, buffer.dtype, pointer.layout)


@stand_in("arange")
def arange(start: int, end: int, layout: Any = None) -> Tensor:
    return Tensor(np.arange(start, end), gl.int32, layout)


@stand_in("full")
def full(shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Tensor:
    data = value.data if isinstance(value, Tensor) else value
    return Tensor(np.broadcast_to(rounded(data, dtype), tuple(shape)), dtype, layout if len(shape) else None)


@stand_in("zeros")
def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Tensor:
    return full(shape, 0, dtype, layout)


@stand_in("full_like")
def full_like(input: Tensor, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    return full(shape or input.shape, value, dtype or input.dtype, layout or input.layout)


@stand_in("zeros_like")
def zeros_like(input: Tensor, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    return full_like(input, 0, shape, dtype, layout)


@stand_in("convert_layout")
@stand_in("set_auto_layout")
def convert_layout(value: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    if not isinstance(value, Tensor) or not value.data.ndim:
        raise EmulationError(f"a block was expected, got {value!r}")
    return value._with(value.data, layout)


@stand_in("expand_dims")
def expand_dims(value: Tensor, axis: int) -> Tensor:
    layout = value.layout
    if layout is not None:
        if not isinstance(layout, gl.SliceLayout) or layout.dim != axis:
            raise EmulationError(f"a slice along axis {axis} was expected, got {layout}")
        layout = layout.parent
    return value._with(np.expand_dims(value.data, axis), layout)


@stand_in("broadcast")
def broadcast(a: Tensor, b: Any) -> Any:
    """`a` in the shape `b` (a tensor's, then both are broadcast)."""
    if isinstance(b, Tensor):
        layout, (x, y) = _layout(a, b), np.broadcast_arrays(a.data, b.data)
        return a._with(x, layout), b._with(y, layout)
    return a._with(np.broadcast_to(a.data, tuple(b)), a.layout)


def _axes(rest: tuple) -> tuple:
    return tuple(rest[0]) if len(rest) == 1 and not isinstance(rest[0], int) else rest


@stand_in("permute")
def permute(value: Tensor, *order: Any) -> Tensor:
    # the compiler infers a layout, which only the compiler knows
    return value._with(np.transpose(value.data, _axes(order)), None)


@stand_in("reshape")
def reshape(value: Tensor, *shape: Any) -> Tensor:
    return value._with(value.data.reshape(_axes(shape)), None)


@stand_in("split")
def split(value: Tensor) -> tuple[Tensor, Tensor]:
    return value._with(value.data[..., 0], None), value._with(value.data[..., 1], None)


@stand_in("join")
def join(a: Tensor, b: Tensor) -> Tensor:
    _layout(a, b)
    return a._with(np.stack(np.broadcast_arrays(a.data, b.data), -1), None)


def _reduction(function: Callable) -> Callable:
    def reduced(input: Tensor, axis: int | None = None, keep_dims: bool = False, **options: Any) -> Tensor:
        # Triton's reductions of bfloat16 are in float32
        dtype = gl.float32 if input.dtype == gl.bfloat16 else input.dtype
        layout = None if axis is None or input.layout is None else gl.SliceLayout(axis, input.layout)
        result = function(input.data, axis=axis)
        layout = layout if result.ndim else None
        reduced = Tensor(rounded(result, dtype), dtype, layout)
        return expand_dims(reduced, axis) if keep_dims and axis is not None else reduced

    return reduced


sum_, max_, min_ = _reduction(np.sum), _reduction(np.max), _reduction(np.min)

for _name, _member in [("sum", sum_), ("max", max_), ("min", min_)]:
    setattr(Tensor, _name, stand_in(_name)(_member))
for _member in (expand_dims, split, reshape, permute):
    setattr(Tensor, _member.__name__, _member)


@stand_in("fma")
def fma(x: Any, y: Any, z: Any) -> Tensor:
    return elementwise(lambda a, b, c: a.astype(np.float64) * b + c, x, y, z)


def _chosen(function: Callable) -> Callable:
    def chosen(a: Any, b: Any, **options: Any) -> Any:
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return type(a + b)(function(a, b))
        return elementwise(function, a, b)

    return chosen


@stand_in("where")
def where(condition: Any, x: Any, y: Any) -> Tensor:
    beside = next((value.dtype for value in (x, y) if isinstance(value, Tensor)), None)
    x, y = tensor(x, beside), tensor(y, beside)
    condition, dtype = tensor(condition), _common(x.dtype, y.dtype)
    result = np.where(condition.data, rounded(x.data, dtype), rounded(y.data, dtype))
    return Tensor(result, dtype, _layout(condition, x, y))


@stand_in("cdiv")
def cdiv(x: Any, div: Any) -> Any:
    return (x + (div - 1)) // div


for _function in (np.exp, np.exp2, np.log, np.log2, np.sqrt, np.sin, np.cos, np.floor, np.ceil):
    stand_in(_function.__name__)(lambda value, _function=_function: elementwise(_function, value))
stand_in("abs")(lambda value: elementwise(np.abs, value))
stand_in("sqrt_rn")(lambda value: elementwise(np.sqrt, value))
stand_in("rsqrt")(lambda value: elementwise(lambda x: 1 / np.sqrt(x), value))
for _name in ("fdiv", "div_rn"):
    stand_in(_name)(lambda x, y, **options: _true_divide(x, y))
# of a NaN and a number, Triton's maximum is the number
maximum, minimum = stand_in("maximum")(_chosen(np.fmax)), stand_in("minimum")(_chosen(np.fmin))
stand_in("clamp")(lambda x, min, max, **options: minimum(maximum(x, min), max))
stand_in("broadcast_to")(lambda value, *shape: broadcast(value, _axes(shape)))
stand_in("trans")(lambda value, *order: permute(value, *(order or (1, 0))))
stand_in("to_tensor")(tensor)
stand_in("cast")(Tensor.to)
for _name in ("multiple_of", "max_contiguous", "max_constancy"):
    stand_in(_name)(lambda value, *hint: value)
