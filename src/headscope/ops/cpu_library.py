"""The C++ kernel of csrc/ behind ctypes: found, loaded when first used, called with torch tensors.

Calls release the interpreter lock. The kernel runs on as many threads as torch does, in the OpenMP runtime that
torch has loaded; a forked child, in which that runtime would hang, runs it on one.
"""

import ctypes
import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope._shapes import FillTensor, Float, Mask, PerHead, PerKey, StatisticValue
from headscope.ops.cpu_structs import (
    ATTENTION,
    FILL_DTYPES,
    INPUT_DTYPES,
    MASK_DTYPES,
    MAX_DIM,
    MAX_STATISTICS,
    StatisticSpec,
    broadcast_fields,
    check,
    edit_fields,
    statistic_struct,
    tensor_fields,
)

ABI_VERSION = 2
INSTRUCTION_SETS = {"best": 0, "baseline": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4}
_NO_MEMORY = 6

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
        instruction_set: the kernels' instructions: the environment's HEADSCOPE_CPU_INSTRUCTIONS, or the best there is.
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


# the library, or the reason why there is none; None before the first load()
_state: Library | str | None = None


def library_path() -> str | None:
    """The library's file, or None if the package was installed or run without building it."""
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
    """The reason why the library can't be used, or None when it loaded."""
    found = _found()
    return found if isinstance(found, str) else None


def build_info() -> dict[str, str | int]:
    """The loaded library and how it runs here: path, ABI version, instruction set, threading runtime.

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


def attention_forward(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys dim_v"],
    *,
    attn_mask: Mask | None,
    is_causal: bool,
    scale: float,
    gate: PerHead | None = None,
    fill: FillTensor | None = None,
    temperature: PerHead | None = None,
    key_bias: PerKey | None = None,
    key_scale: PerKey | None = None,
    statistics: Sequence[StatisticSpec] = (),
    output: Float[Tensor, "batch heads queries dim_v"],
    statistic_outputs: Sequence[StatisticValue] = (),
    threads: int | None = None,
) -> None:
    """Attention with edits of its heads and keys, and statistics of its probabilities p.

    logits = scale / temperature * query . key + key_bias + mask;  p = softmax(logits);
    output = gate * sum_j p_j * key_scale_j * value_j + (1 - gate) * fill.

    Args:
        query, key, value: float32, bfloat16 or float16, all of one, any strides; heads is a multiple of kv_heads.
        attn_mask: bool (True attends) or floating.
        is_causal: query i sees keys 0..i.
        gate, temperature, key_bias, key_scale: float32. A gate of exactly 0 or 1 selects and doesn't multiply; a
            key_bias of -inf mutes a key; p stays as it is in the statistics, whatever the key_scale.
        fill: floating; None is zeros.
        statistics: names, or (name, constants, tensors), at most 32: see cpu_structs.STATISTICS. "distance" takes
            (height, width, key_height, key_width); "group_mass" and "group_entropy" take (count,), or (count, first)
            for at most 128 of the groups, and int32 groups [batch or 1, heads or 1, keys].
        output: query's dtype, any strides; every element is written.
        statistic_outputs: one float32 contiguous tensor for each statistic, written likewise: [batch, heads, queries],
            [batch, heads, queries, count] for groups, [batch, heads, keys] for "key_mass".
        threads: None for torch.get_num_threads(). The result doesn't depend on it.

    Raises:
        ValueError: an argument that the kernel can't take.
        MemoryError: no memory for its working buffers (below 16 MiB per thread; group statistics that would take more
            together come in several passes).
        RuntimeError: the library is unavailable.
    """
    library = load()
    check("query", query, (None, None, None, None), INPUT_DTYPES)
    batch, heads, queries, dim = query.shape
    dtype = (query.dtype,)
    check("key", key, (batch, None, None, dim), dtype)
    kv_heads, keys = key.shape[1:3]
    check("value", value, (batch, kv_heads, keys, None), dtype)
    dim_v = value.shape[3]
    check("output", output, (batch, heads, queries, dim_v), dtype)
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"key: got {kv_heads} heads, expected a divisor of query's {heads}")
    if max(dim, dim_v) > MAX_DIM:
        raise ValueError(f"query, value: got head dims {dim} and {dim_v}, expected at most {MAX_DIM}")
    mask = broadcast_fields("attn_mask", attn_mask, (batch, heads, queries, keys), MASK_DTYPES)
    filled = broadcast_fields("fill", fill, (batch, heads, queries, dim_v), FILL_DTYPES)
    if len(statistics) != len(statistic_outputs) or len(statistics) > MAX_STATISTICS:
        raise ValueError(
            f"statistics: got {len(statistics)} and {len(statistic_outputs)} outputs,"
            f" expected at most {MAX_STATISTICS} and one output for each"
        )
    described = [
        statistic_struct(spec, values, batch, heads, queries, keys)
        for spec, values in zip(statistics, statistic_outputs, strict=True)
    ]
    if sum(spec == "key_mass" or spec[0] == "key_mass" for spec in statistics) > 1:
        raise ValueError("statistics: got key_mass more than once, expected it once")
    call = ATTENTION.pack(
        *(batch, heads, kv_heads, queries, keys, dim, dim_v),
        *tensor_fields(query),
        *tensor_fields(key),
        *tensor_fields(value),
        *tensor_fields(output),
        *mask,
        *filled,
        *edit_fields("gate", gate, (batch, heads)),
        *edit_fields("temperature", temperature, (batch, heads)),
        *edit_fields("key_bias", key_bias, (batch, heads, keys)),
        *edit_fields("key_scale", key_scale, (batch, heads, keys)),
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
