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

ABI_VERSION = 1
STATISTICS = ("entropy", "logsumexp", "max_logit", "max_prob")
INSTRUCTION_SETS = {"best": 0, "baseline": 1, "avx2": 2, "avx512": 3}
MAX_DIM = 8192
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.bool: 4}
_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_MEMORY = 6

_forked = False


def _remember_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_fork)


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4), ("dtype", ctypes.c_int64))


class _Attention(ctypes.Structure):
    # headscope_attention of csrc/include/headscope_cpu.h, field for field
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "dim", "dim_v")),
        *((name, _Tensor) for name in ("query", "key", "value", "output", "mask", "fill")),
        ("gate", ctypes.c_void_p),
        ("gate_strides", ctypes.c_int64 * 2),
        ("scale", ctypes.c_double),
        ("is_causal", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in STATISTICS),
        ("threads", ctypes.c_int64),
        ("instruction_set", ctypes.c_int64),
    )


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
        functions.headscope_attention_forward.argtypes = (ctypes.POINTER(_Attention),)
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


def _check(name: str, tensor: Tensor, sizes: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> None:
    """Sizes are exact; None stands for any. The kernel follows pointers, so nothing may slip past here."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"{name}: got a {tensor.layout} tensor on {tensor.device}, expected a strided one on the CPU")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: got dtype {tensor.dtype}, expected {expected}")
    fits = tensor.ndim == len(sizes) and all(size in (None, got) for got, size in zip(tensor.shape, sizes, strict=True))
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected [{expected}]")


def _broadcast(name: str, tensor: Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
    """The tensor, each of its sizes 1 or full, with strides of 0 where it repeats."""
    got = tensor.shape
    fits = tensor.ndim == len(sizes) and all(g in (1, size) for g, size in zip(got, sizes, strict=True))
    if not fits:
        raise ValueError(f"{name}: got shape {list(got)}, expected 1 or the whole size in each of {list(sizes)}")
    tensor = tensor.expand(sizes)
    _check(name, tensor, sizes, dtypes)
    return tensor


def _describe(tensor: Tensor) -> _Tensor:
    return _Tensor(tensor.data_ptr(), (ctypes.c_int64 * 4)(*tensor.stride()), _DTYPES[tensor.dtype])


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    gate: Tensor | None,
    fill: Tensor | None,
    statistics: Sequence[str],
    output: Tensor,
    statistic_outputs: Sequence[Tensor],
    threads: int | None = None,
) -> None:
    """Writes gate * softmax(scale * query . key + mask) . value + (1 - gate) * fill, and statistics of its rows.

    Args:
        query: [batch, heads, queries, dim], float32, bfloat16 or float16, any strides.
        key: [batch, kv_heads, keys, dim]; heads is a multiple of kv_heads.
        value: [batch, kv_heads, keys, dim_v].
        attn_mask: bool (True attends) or floating, each size 1 or that of [batch, heads, queries, keys].
        is_causal: query i sees keys 0..i.
        gate: [batch or 1, heads], float32. Exactly 0 or 1 selects and doesn't multiply.
        fill: floating, each size 1 or that of [batch, heads, queries, dim_v]; None is zeros.
        statistics: some of "entropy", "logsumexp", "max_logit" (nats) and "max_prob", each once.
        output: [batch, heads, queries, dim_v], query's dtype, any strides; every element is written.
        statistic_outputs: one float32 contiguous [batch, heads, queries] per statistic, written likewise.
        threads: None for torch.get_num_threads(). The result doesn't depend on it.

    Raises:
        ValueError: an argument that the kernel can't take.
        MemoryError: no memory for its working buffers (below 16 MiB per thread).
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
    call = _Attention(batch, heads, kv_heads, queries, keys, dim, dim_v)
    call.query, call.key, call.value = _describe(query), _describe(key), _describe(value)
    call.output = _describe(output)
    if attn_mask is not None:
        attn_mask = _broadcast("attn_mask", attn_mask, (batch, heads, queries, keys), tuple(_DTYPES))
        call.mask = _describe(attn_mask)
    if fill is not None:
        floating = (*_INPUT_DTYPES, torch.float64)
        fill = _broadcast("fill", fill, (batch, heads, queries, dim_v), floating)
        call.fill = _describe(fill)
    if gate is not None:
        gate = _broadcast("gate", gate, (batch, heads), (torch.float32,))
        call.gate = gate.data_ptr()
        call.gate_strides = (ctypes.c_int64 * 2)(*gate.stride())
    if len(statistics) != len(statistic_outputs) or len(set(statistics)) != len(statistics):
        raise ValueError(
            f"statistics: got {list(statistics)} and {len(statistic_outputs)} outputs,"
            " expected different names and one output for each"
        )
    for name, values in zip(statistics, statistic_outputs, strict=True):
        if name not in STATISTICS:
            raise ValueError(f"statistics: got {name!r}, expected some of {', '.join(STATISTICS)}")
        _check(f"statistic_outputs[{name!r}]", values, (batch, heads, queries), (torch.float32,))
        if not values.is_contiguous():
            raise ValueError(f"statistic_outputs[{name!r}]: got strides {values.stride()}, expected a contiguous one")
        setattr(call, name, values.data_ptr())
    call.scale = scale
    call.is_causal = bool(is_causal)
    call.threads = 1 if _forked else torch.get_num_threads() if threads is None else threads
    call.instruction_set = INSTRUCTION_SETS[library.instruction_set]
    status = library.functions.headscope_attention_forward(ctypes.byref(call))
    if status:
        message = library.functions.headscope_status_message(status).decode()
        raise MemoryError(message) if status == _NO_MEMORY else ValueError(message)
