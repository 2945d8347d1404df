"""The C++ kernel of csrc/ behind ctypes: found, loaded when first used, called with torch tensors.

Calls release the interpreter lock. The kernel runs on as many threads as torch does, in the OpenMP runtime that
torch has loaded; a forked child, in which that runtime would hang, runs it on one.
"""

import ctypes
import importlib.resources
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ABI_VERSION = 2
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
INSTRUCTION_SETS = {"best": 0, "baseline": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4}
MAX_DIM = 8192
MAX_STATISTICS = 32
MAX_GROUPS = 65536
_KINDS = {name: kind for kind, name in enumerate(STATISTICS)}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.bool: 4}
_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOATING = (*_INPUT_DTYPES, torch.float64)
_NO_MEMORY = 6

# headscope_attention and headscope_statistic of csrc/include/headscope_cpu.h, field for field, every one eight bytes
# wide. Packed at once: setting a ctypes structure's fields one by one would take longer than a small call.
_TENSOR = "P4qq"
_EDIT = "P3q"
_ATTENTION = struct.Struct("7q" + 6 * _TENSOR + 4 * _EDIT + "dqqqq")
_STATISTIC = struct.Struct("qP4qP3q")
_NO_TENSOR = (0,) * 6
_NO_EDIT = (0,) * 4

# a name, or (name, constants, tensors)
StatisticSpec = str | tuple[str, Sequence[int | float], Sequence[Tensor]]

_forked = False


def _remember_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_fork)


@dataclass
class Library:
    """The loaded library.

    Attributes:
        path: the file.
        functions: its C functions.
        instruction_set: what kernels run with; the environment's HEADSCOPE_CPU_INSTRUCTIONS, or the best there is.
    """

    path: str
    functions: ctypes.CDLL
    instruction_set: str

    def instruction_set_name(self) -> str:
        """The instruction set that `instruction_set` resolves to on this machine.

        Raises:
            RuntimeError: this machine or build lacks it.
        """
        name = self.functions.headscope_instruction_set_name(INSTRUCTION_SETS[self.instruction_set])
        if name is None:
            raise RuntimeError(f"HEADSCOPE_CPU_INSTRUCTIONS: {self.instruction_set} can't run on this machine")
        return name.decode()


# what load() found: the library, or why there is none
_state: Library | str | None = None


def library_path() -> str | None:
    """Where the library is, or None if the package was installed or run without building it."""
    folder = importlib.resources.files("headscope") / "_native"
    for name in ("libheadscope_cpu.so", "libheadscope_cpu.dylib", "headscope_cpu.dll"):
        file = folder / name
        if file.is_file():
            return str(file)
    return None


def _open() -> Library | str:
    requested = os.environ.get("HEADSCOPE_CPU_INSTRUCTIONS", "best")
    if requested not in INSTRUCTION_SETS:
        return f"HEADSCOPE_CPU_INSTRUCTIONS: got {requested!r}, expected one of {', '.join(INSTRUCTION_SETS)}"
    path = library_path()
    if path is None:
        return "the C++ kernel isn't built; `pip install .` builds it where there is a C++17 compiler"
    try:
        functions = ctypes.CDLL(path)
        functions.headscope_abi_version.restype = ctypes.c_int
        version = functions.headscope_abi_version()
        if version != ABI_VERSION:
            return f"{path} has ABI version {version}, expected {ABI_VERSION}; `pip install .` rebuilds it"
        functions.headscope_attention_forward.argtypes = (ctypes.c_char_p,)
        functions.headscope_attention_forward.restype = ctypes.c_int
        functions.headscope_status_message.argtypes = (ctypes.c_int,)
        functions.headscope_status_message.restype = ctypes.c_char_p
        functions.headscope_instruction_set_name.argtypes = (ctypes.c_int,)
        functions.headscope_instruction_set_name.restype = ctypes.c_char_p
        functions.headscope_threading.restype = ctypes.c_char_p
        functions.headscope_exp2.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        functions.headscope_exp2.restype = ctypes.c_int
        library = Library(path, functions, requested)
        library.instruction_set_name()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"{path} can't be used: {error}"
    return library


def _found() -> Library | str:
    global _state
    if _state is None:
        _state = _open()
    return _state


def load() -> Library:
    """The library, loaded on the first call.

    Raises:
        RuntimeError: it isn't built, or can't be used here.
    """
    found = _found()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def unavailable_reason() -> str | None:
    """Why the library can't be used, or None when it loaded."""
    found = _found()
    return found if isinstance(found, str) else None


def build_info() -> dict[str, str | int]:
    """What is loaded and how it runs here: path, ABI version, instruction set, threading runtime.

    Raises:
        RuntimeError: the library isn't built, or can't be used here.
    """
    library = load()
    return {
        "path": library.path,
        "abi_version": library.functions.headscope_abi_version(),
        "instruction_set": library.instruction_set_name(),
        "threading": library.functions.headscope_threading().decode(),
    }


def _fits(got: Sequence[int], sizes: Sequence[int | None]) -> bool:
    if len(got) != len(sizes):
        return False
    # a loop: a generator would take three times as long, several times per call
    for g, size in zip(got, sizes, strict=True):  # noqa: SIM110
        if size is not None and size != g:
            return False
    return True


def _check(name: str, tensor: Tensor, sizes: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> None:
    """Sizes are exact; None stands for any. The kernel follows pointers, so nothing may slip past here."""
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        raise ValueError(f"{name}: got a {tensor.layout} tensor on {tensor.device}, expected a strided one on the CPU")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: got dtype {tensor.dtype}, expected {expected}")
    got = tensor.shape
    if got != sizes and not _fits(got, sizes):
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected [{expected}]")


def _broadcast(name: str, tensor: Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
    """The tensor, each of its sizes 1 or full, with strides of 0 where it repeats."""
    got = tensor.shape
    if got != sizes:
        if len(got) != len(sizes) or any(g not in (1, size) for g, size in zip(got, sizes, strict=True)):
            raise ValueError(f"{name}: got shape {list(got)}, expected 1 or the whole size in each of {list(sizes)}")
        tensor = tensor.expand(sizes)
    _check(name, tensor, sizes, dtypes)
    return tensor


def _describe(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.data_ptr(), *tensor.stride(), _DTYPES[tensor.dtype])


def _edit(name: str, tensor: Tensor | None, sizes: Sequence[int]) -> tuple[int, ...]:
    if tensor is None:
        return _NO_EDIT
    tensor = _broadcast(name, tensor, sizes, (torch.float32,))
    return (tensor.data_ptr(), *tensor.stride(), *(0,) * (3 - len(sizes)))


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


def _statistic(spec: StatisticSpec, output: Tensor, batch: int, heads: int, queries: int, keys: int) -> bytes:
    """One headscope_statistic."""
    name, constants, tensors = (spec, (), ()) if isinstance(spec, str) else spec
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
        sizes = _integers(name, constants, (0, 0))
        if not constants or len(tensors) != 1:
            raise ValueError(f"statistics: got {len(tensors)} tensors for {name}, expected its count and its groups")
        count, first = sizes[:2]
        # (count, first): a chunk of at most 128 groups, as the other backends take them
        count = min(128, count - first) if len(constants) == 2 else count
        if not 0 <= count <= MAX_GROUPS:
            raise ValueError(f"statistics: got {count} groups for {name}, expected 0 to {MAX_GROUPS}")
        sizes = (count, first, 0, 0)
        ids = _broadcast("groups", tensors[0], (batch, heads, keys), (torch.int32,))
        groups = (ids.data_ptr(), *ids.stride())
        shape = (batch, heads, queries, count)
    if output.shape != shape or output.dtype != torch.float32 or not output.is_contiguous() or output.is_meta:
        _check(f"statistic_outputs[{name!r}]", output, shape, (torch.float32,))
        raise ValueError(f"statistic_outputs[{name!r}]: got strides {output.stride()}, expected a contiguous one")
    return _STATISTIC.pack(kind, output.data_ptr(), *sizes, *groups)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    gate: Tensor | None = None,
    fill: Tensor | None = None,
    temperature: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    statistics: Sequence[StatisticSpec] = (),
    output: Tensor,
    statistic_outputs: Sequence[Tensor] = (),
    threads: int | None = None,
) -> None:
    """Attention with edits of its heads and keys, and statistics of its probabilities p.

    logits = scale / temperature * query . key + key_bias + mask;  p = softmax(logits);
    output = gate * sum_j p_j * key_scale_j * value_j + (1 - gate) * fill.

    Args:
        query: [batch, heads, queries, dim], float32, bfloat16 or float16, any strides.
        key: [batch, kv_heads, keys, dim]; heads is a multiple of kv_heads.
        value: [batch, kv_heads, keys, dim_v].
        attn_mask: bool (True attends) or floating, each size 1 or that of [batch, heads, queries, keys].
        is_causal: query i sees keys 0..i.
        gate: [batch or 1, heads], float32. Exactly 0 or 1 selects and doesn't multiply.
        fill: floating, each size 1 or that of [batch, heads, queries, dim_v]; None is zeros.
        temperature: [batch or 1, heads], float32.
        key_bias: [batch or 1, heads or 1, keys], float32; -inf mutes a key.
        key_scale: the same shape, float32; p stays as it is in the statistics.
        statistics: names, or (name, constants, tensors), at most 32: see STATISTICS. "distance" takes (height, width,
            key_height, key_width); "group_mass" and "group_entropy" take (count,), or (count, first) for at most 128
            of the groups, and int32 groups [batch or 1, heads or 1, keys].
        output: [batch, heads, queries, dim_v], query's dtype, any strides; every element is written.
        statistic_outputs: one float32 contiguous tensor per statistic, written likewise: [batch, heads, queries],
            [batch, heads, queries, count] for groups, [batch, heads, keys] for "key_mass".
        threads: None for torch.get_num_threads(). The result doesn't depend on it.

    Raises:
        ValueError: an argument that the kernel can't take.
        MemoryError: no memory for its working buffers (below 16 MiB per thread; group statistics that would take more
            together come in several passes).
        RuntimeError: the library is unavailable.
    """
    library = load()
    _check("query", query, (None, None, None, None), _INPUT_DTYPES)
    batch, heads, queries, dim = query.shape
    dtype = (query.dtype,)
    _check("key", key, (batch, None, None, dim), dtype)
    kv_heads, keys = key.shape[1:3]
    _check("value", value, (batch, kv_heads, keys, None), dtype)
    dim_v = value.shape[3]
    _check("output", output, (batch, heads, queries, dim_v), dtype)
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"key: got {kv_heads} heads, expected a divisor of query's {heads}")
    if max(dim, dim_v) > MAX_DIM:
        raise ValueError(f"query, value: got head dims {dim} and {dim_v}, expected at most {MAX_DIM}")
    mask = filled = _NO_TENSOR
    if attn_mask is not None:
        mask = _describe(_broadcast("attn_mask", attn_mask, (batch, heads, queries, keys), tuple(_DTYPES)))
    if fill is not None:
        filled = _describe(_broadcast("fill", fill, (batch, heads, queries, dim_v), _FLOATING))
    if len(statistics) != len(statistic_outputs) or len(statistics) > MAX_STATISTICS:
        raise ValueError(
            f"statistics: got {len(statistics)} and {len(statistic_outputs)} outputs,"
            f" expected at most {MAX_STATISTICS} and one output for each"
        )
    described = [
        _statistic(spec, values, batch, heads, queries, keys)
        for spec, values in zip(statistics, statistic_outputs, strict=True)
    ]
    if sum(spec == "key_mass" or spec[0] == "key_mass" for spec in statistics) > 1:
        raise ValueError("statistics: got key_mass more than once, expected it once")
    call = _ATTENTION.pack(
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        dim,
        dim_v,
        *_describe(query),
        *_describe(key),
        *_describe(value),
        *_describe(output),
        *mask,
        *filled,
        *_edit("gate", gate, (batch, heads)),
        *_edit("temperature", temperature, (batch, heads)),
        *_edit("key_bias", key_bias, (batch, heads, keys)),
        *_edit("key_scale", key_scale, (batch, heads, keys)),
        scale,
        bool(is_causal),
        1 if _forked else torch.get_num_threads() if threads is None else threads,
        INSTRUCTION_SETS[library.instruction_set],
        len(described),
    )
    status = library.functions.headscope_attention_forward(b"".join((call, *described)))
    if status:
        message = library.functions.headscope_status_message(status).decode()
        raise MemoryError(message) if status == _NO_MEMORY else ValueError(message)
