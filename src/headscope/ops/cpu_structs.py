"""The structs of csrc/include/headscope_cpu.h, packed from torch tensors, which are checked before.

The kernel follows pointers: no tensor of another size, type or device may slip past here.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from headscope._shapes import PerHead, PerKey, StatisticGradient, StatisticTensor, StatisticValue

# the order is that of headscope_statistic_kind in csrc/include/headscope_cpu.h
STATISTICS = (
    "entropy",
    "logsumexp",
    "max_logit",
    "max_prob",
    "collision_entropy",
    "distance",
    "group_mass",
    "group_entropy",
    "key_mass",
)
MAX_DIM = 8192
MAX_STATISTICS = 32
MAX_GROUPS = 65536
_KINDS = {name: kind for kind, name in enumerate(STATISTICS)}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.bool: 4}
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILL_DTYPES = (*INPUT_DTYPES, torch.float64)
MASK_DTYPES = tuple(_DTYPES)
# headscope_attention, headscope_statistic, headscope_gradients and headscope_group_cotangent, field for field, every
# one eight bytes wide. Packed at once: setting a ctypes structure's fields singly would take longer than a small call.
_TENSOR = "P4qq"
_EDIT = "P3q"
_STACK = "P5qq"
ATTENTION = struct.Struct("7q" + 6 * _TENSOR + 4 * _EDIT + _TENSOR + "PPdqqqq")
STATISTIC = struct.Struct("qP4qP3q")
GRADIENTS = struct.Struct("q" + _STACK + "PP" + 3 * _STACK + "PPPPP4qq")
GROUP_COTANGENT = struct.Struct("PqqP3q")
NO_TENSOR = (0,) * 6
NO_STACK = (0,) * 7
_NO_EDIT = (0,) * 4

# a name, or (name, constants, tensors)
StatisticSpec = str | tuple[str, Sequence[int | float], Sequence[StatisticTensor]]
# the constants and tensors of a group_mass, and its cotangents [cotangents, batch, heads, queries, count]
GroupCotangent = tuple[Sequence[int | float], Sequence[StatisticTensor], StatisticGradient]


def check(name: str, tensor: Tensor, sizes: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless it is a tensor on the CPU with exactly these sizes; None stands for any."""
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        raise ValueError(f"{name}: got a {tensor.layout} tensor on {tensor.device}, expected a strided one on the CPU")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: got dtype {tensor.dtype}, expected {expected}")
    got = tensor.shape
    if got != sizes and not _fits(got, sizes):
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected [{expected}]")


def _fits(got: Sequence[int], sizes: Sequence[int | None]) -> bool:
    if len(got) != len(sizes):
        return False
    # a loop: a generator would take three times as long, several times per call
    for g, size in zip(got, sizes, strict=True):  # noqa: SIM110
        if size is not None and size != g:
            return False
    return True


def _broadcast(name: str, tensor: Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
    """The tensor, each of its sizes 1 or full, with strides of 0 where it repeats."""
    got = tensor.shape
    if got != sizes:
        if len(got) != len(sizes) or any(g not in (1, size) for g, size in zip(got, sizes, strict=True)):
            raise ValueError(f"{name}: got shape {list(got)}, expected 1 or the whole size in each of {list(sizes)}")
        tensor = tensor.expand(sizes)
    check(name, tensor, sizes, dtypes)
    return tensor


def contiguous_address(name: str, tensor: Tensor | None, sizes: Sequence[int]) -> int:
    """The address of a contiguous float32 tensor of these sizes, 0 for None."""
    if tensor is None:
        return 0
    if tensor.shape != sizes or tensor.dtype != torch.float32 or not tensor.is_contiguous() or not tensor.is_cpu:
        check(name, tensor, sizes, (torch.float32,))
        raise ValueError(f"{name}: got strides {tensor.stride()}, expected a contiguous one")
    return tensor.data_ptr()


def tensor_fields(tensor: Tensor) -> tuple[int, ...]:
    """The fields of a headscope_tensor, or of a headscope_stack."""
    return (tensor.data_ptr(), *tensor.stride(), _DTYPES[tensor.dtype])


def broadcast_fields(
    name: str, tensor: Tensor | None, sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> tuple[int, ...]:
    """The fields of the headscope_tensor of a mask or a fill, each of its sizes 1 or full."""
    return NO_TENSOR if tensor is None else tensor_fields(_broadcast(name, tensor, sizes, dtypes))


def edit_fields(name: str, tensor: PerHead | PerKey | None, sizes: Sequence[int]) -> tuple[int, ...]:
    """The fields of a headscope_edit, each of the tensor's sizes 1 or full."""
    if tensor is None:
        return _NO_EDIT
    tensor = _broadcast(name, tensor, sizes, (torch.float32,))
    return (tensor.data_ptr(), *tensor.stride(), *(0,) * (3 - len(sizes)))


def stack_fields(
    name: str, tensor: Tensor | None, sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> tuple[int, ...]:
    """The fields of a headscope_stack of these sizes."""
    if tensor is None:
        return NO_STACK
    check(name, tensor, sizes, dtypes)
    return tensor_fields(tensor)


def statistic_struct(
    spec: StatisticSpec, output: StatisticValue, batch: int, heads: int, queries: int, keys: int
) -> bytes:
    """One headscope_statistic."""
    name, constants, tensors = (spec, (), []) if isinstance(spec, str) else spec
    kind = _KINDS.get(name)
    if kind is None:
        raise ValueError(f"statistics: got {name!r}, expected some of {', '.join(STATISTICS)}")
    sizes = groups = (0, 0, 0, 0)
    shape = (batch, heads, keys if name == "key_mass" else queries)
    if name == "distance":
        sizes = _integers(name, constants, (1, 1, 1, 1))
        if len(constants) != 4:
            raise ValueError(f"statistics: got constants {tuple(constants)} for distance, expected four grid sizes")
    elif name in ("group_mass", "group_entropy"):
        sizes = _group_sizes(name, constants, tensors)
        groups = _group_ids(tensors, (batch, heads, keys))
        shape = (batch, heads, queries, sizes[0])
    if output.shape != shape or output.dtype != torch.float32 or not output.is_contiguous() or output.is_meta:
        check(f"statistic_outputs[{name!r}]", output, shape, (torch.float32,))
        raise ValueError(f"statistic_outputs[{name!r}]: got strides {output.stride()}, expected a contiguous one")
    return STATISTIC.pack(kind, output.data_ptr(), *sizes, *groups)


def group_cotangent_struct(
    cotangent: GroupCotangent, count: int, batch: int, heads: int, queries: int, keys: int
) -> bytes:
    """One headscope_group_cotangent, of as many cotangents as `count`."""
    constants, tensors, grad = cotangent
    groups, first = _group_sizes("group_mass", constants, tensors)[:2]
    address = contiguous_address("group_cotangents", grad, (count, batch, heads, queries, groups))
    return GROUP_COTANGENT.pack(address, groups, first, *_group_ids(tensors, (batch, heads, keys)))


def _integers(name: str, constants: Sequence[int | float], least: Sequence[int]) -> tuple[int, ...]:
    """Constants as the kernel takes them, four of them; each must be whole and at least its entry of `least`."""
    wrong = len(constants) > len(least) or any(
        int(value) != value or value < low for value, low in zip(constants, least, strict=False)
    )
    if wrong:
        raise ValueError(
            f"statistics: got constants {tuple(constants)} for {name}, expected integers >= {tuple(least)}"
        )
    return (*(int(value) for value in constants), *(0,) * (4 - len(constants)))


def _group_ids(tensors: Sequence[StatisticTensor], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The fields of a headscope_statistic that hold the group of each key."""
    ids = _broadcast("groups", tensors[0], sizes, (torch.int32,))
    return (ids.data_ptr(), *ids.stride())


def _group_sizes(name: str, constants: Sequence[int | float], tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The number of groups and the id of the first one, and zeros."""
    sizes = _integers(name, constants, (0, 0))
    if not constants or len(tensors) != 1:
        raise ValueError(f"statistics: got {len(tensors)} tensors for {name}, expected its count and its groups")
    count, first = sizes[:2]
    # (count, first): a chunk of at most 128 groups, as the other backends take them
    count = min(128, count - first) if len(constants) == 2 else count
    if not 0 <= count <= MAX_GROUPS:
        raise ValueError(f"statistics: got {count} groups for {name}, expected 0 to {MAX_GROUPS}")
    return (count, first, 0, 0)
