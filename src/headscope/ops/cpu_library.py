"""The C++ kernel of csrc/ behind ctypes: found, loaded when first used, called with torch tensors.

Calls release the interpreter lock. The kernel runs on as many threads as torch does, in the OpenMP runtime that
torch has loaded; a forked child, in which that runtime would hang, runs it on one.
"""

import ctypes
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope._shapes import FillTensor, Float, Mask, PerHead, PerKey, RowValue, StatisticValue
from headscope.ops.cpu_structs import (
    ATTENTION,
    FILL_DTYPES,
    GRADIENTS,
    INPUT_DTYPES,
    MASK_DTYPES,
    MAX_DIM,
    MAX_STATISTICS,
    NO_TENSOR,
    GroupCotangent,
    StatisticSpec,
    broadcast_fields,
    check,
    contiguous_address,
    edit_fields,
    group_cotangent_struct,
    stack_fields,
    statistic_struct,
    tensor_fields,
)

ABI_VERSION = 3
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
        functions.headscope_attention_backward.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
        functions.headscope_attention_backward.restype = ctypes.c_int
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
    attention: Float[Tensor, "batch heads queries dim_v"] | None = None,
    row_max: RowValue | None = None,
    log2_sum: RowValue | None = None,
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
        attention: query's dtype, any strides, the output before gate and fill: what `attention_backward` needs where
            there is a gate; with row_max and log2_sum only.
        row_max, log2_sum: float32 contiguous: what `attention_backward` needs, each row's largest logit and log2 of its
            sum relative to that (0 and inf where no key is valid).
        threads: None for torch.get_num_threads(). The result doesn't depend on it.

    Raises:
        ValueError: an argument that the kernel can't take.
        MemoryError: no memory for its working buffers (below 16 MiB per thread; group statistics that would take more
            together come in several passes).
        RuntimeError: the library is unavailable.
    """
    library = load()
    sizes = _sizes(query, key, value)
    batch, heads, _, queries, keys, _, dim_v = sizes
    check("output", output, (batch, heads, queries, dim_v), (query.dtype,))
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
    call = _pack(
        *(sizes, query, key, value, output, attn_mask, fill, gate, temperature, key_bias, key_scale),
        *(attention, row_max, log2_sum, scale, is_causal, threads, library.instruction_set, len(described)),
    )
    status = library.functions.headscope_attention_forward(b"".join((call, *described)))
    if status:
        raise _error(library, status)


def attention_backward(
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
    attention: Float[Tensor, "batch heads queries dim_v"],
    row_max: RowValue,
    log2_sum: RowValue,
    grad_output: Float[Tensor, "cotangents batch heads queries dim_v"] | None = None,
    row_constants: Float[Tensor, "cotangents batch heads queries"] | None = None,
    grad_entropy: Float[Tensor, "cotangents batch heads queries"] | None = None,
    group_cotangents: Sequence[GroupCotangent] = (),
    gradients: Mapping[str, Tensor],
    threads: int | None = None,
) -> None:
    """The gradients of `attention_forward` for one or more cotangents of its results.

    With dp the gradient of p and ds that of the logits,
    dp_j = key_scale_j * (gate * d output . value_j) - ln(p_j) * d entropy + sum of d group_mass of j's groups,
    ds_j = p_j * (dp_j - gate * d output . attention - row_constant). A row without a valid key has gradients of 0.

    Args:
        query, key, value, attn_mask, is_causal, scale, gate, fill, temperature, key_bias, key_scale: as the forward
            got them.
        attention: the output before gate and fill: the forward's `attention`, or its output where it had no gate.
        row_max, log2_sum: as the forward wrote them.
        grad_output: the output's cotangents, query's dtype, any strides; None is 0.
        row_constants: float32 contiguous: sum_j p_j dp_j of the statistics' cotangents dp, where a logsumexp counts as
            minus its cotangent; None is 0.
        grad_entropy: the entropy's cotangents, float32 contiguous; None is 0.
        group_cotangents: (constants, tensors, cotangents) of each group_mass, as in `statistics` of the forward; the
            cotangents float32 contiguous [cotangents, batch, heads, queries, count].
        gradients: where the gradients that are wanted go, by name; every element is written. "query", "key" and "value"
            in query's dtype, any strides, [cotangents, *sizes]; the others float32 contiguous: "gate" and "temperature"
            (which needs "query" beside it) [cotangents, batch, heads], "key_bias" and "key_scale" [cotangents, batch,
            heads, keys], whatever sizes of 1 the edit has, and "attn_mask" [cotangents, *the mask's sizes].
        threads: None for torch.get_num_threads(). The bits don't depend on it.

    Raises:
        ValueError, MemoryError, RuntimeError: as the forward.
    """
    if not gradients:
        return
    library = load()
    sizes = _sizes(query, key, value)
    batch, heads, _, queries, keys, _, _ = sizes
    named = {"attn_mask": attn_mask, "gate": gate, "temperature": temperature, "key_bias": key_bias}
    named["key_scale"] = key_scale
    if "temperature" in gradients and "query" not in gradients:
        raise ValueError("gradients: got 'temperature' without 'query', expected both: one is found along the other")
    for name in gradients:
        if name not in _INPUTS and named.get(name) is None:
            expected = ", ".join([*_INPUTS, *(name for name, tensor in named.items() if tensor is not None)])
            raise ValueError(f"gradients: got {name!r}, expected some of {expected}")
    count = next(iter(gradients.values())).shape[0]
    if len(group_cotangents) > MAX_STATISTICS:
        raise ValueError(f"group_cotangents: got {len(group_cotangents)}, expected at most {MAX_STATISTICS}")
    groups = [group_cotangent_struct(entry, count, batch, heads, queries, keys) for entry in group_cotangents]
    dtype, rows = (query.dtype,), (count, batch, heads, queries)
    wanted = gradients.get
    mask_sizes = _mask_sizes(attn_mask) if "attn_mask" in gradients else (0, 0, 0, 0)
    by_head, by_key = (count, batch, heads), (count, batch, heads, keys)
    packed = GRADIENTS.pack(
        count,
        *stack_fields("grad_output", grad_output, (*rows, value.shape[3]), dtype),
        contiguous_address("row_constants", row_constants, rows),
        contiguous_address("grad_entropy", grad_entropy, rows),
        *stack_fields("gradients['query']", wanted("query"), (count, *query.shape), dtype),
        *stack_fields("gradients['key']", wanted("key"), (count, *key.shape), dtype),
        *stack_fields("gradients['value']", wanted("value"), (count, *value.shape), dtype),
        contiguous_address("gradients['gate']", wanted("gate"), by_head),
        contiguous_address("gradients['temperature']", wanted("temperature"), by_head),
        contiguous_address("gradients['key_bias']", wanted("key_bias"), by_key),
        contiguous_address("gradients['key_scale']", wanted("key_scale"), by_key),
        contiguous_address("gradients['attn_mask']", wanted("attn_mask"), (count, *mask_sizes)),
        *mask_sizes,
        len(groups),
    )
    if not batch * heads * queries:
        # torch gives tensors without elements no address, and then the kernel sees edits and masks as absent
        for gradient in gradients.values():
            gradient.zero_()
        return
    call = _pack(
        *(sizes, query, key, value, attention, attn_mask, fill, gate, temperature, key_bias, key_scale),
        *(attention, row_max, log2_sum, scale, is_causal, threads, library.instruction_set, 0),
    )
    status = library.functions.headscope_attention_backward(call, b"".join((packed, *groups)))
    if status:
        raise _error(library, status)


_INPUTS = ("query", "key", "value")


def _mask_sizes(mask: Mask | None) -> tuple[int, ...]:
    """The sizes of an additive mask, whose gradient has them, too."""
    if mask is None or mask.dtype == torch.bool:
        raise ValueError("gradients: got 'attn_mask' of a bool mask, expected it of an additive one only")
    return tuple(mask.shape)


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """The sizes of a headscope_attention, of tensors that fit each other and the kernel.

    Raises:
        ValueError: they don't.
    """
    check("query", query, (None, None, None, None), INPUT_DTYPES)
    batch, heads, queries, dim = query.shape
    dtype = (query.dtype,)
    check("key", key, (batch, None, None, dim), dtype)
    kv_heads, keys = key.shape[1:3]
    check("value", value, (batch, kv_heads, keys, None), dtype)
    dim_v = value.shape[3]
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"key: got {kv_heads} heads, expected a divisor of query's {heads}")
    if max(dim, dim_v) > MAX_DIM:
        raise ValueError(f"query, value: got head dims {dim} and {dim_v}, expected at most {MAX_DIM}")
    return batch, heads, kv_heads, queries, keys, dim, dim_v


def _pack(
    sizes: tuple[int, int, int, int, int, int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    mask: Mask | None,
    fill: FillTensor | None,
    gate: PerHead | None,
    temperature: PerHead | None,
    key_bias: PerKey | None,
    key_scale: PerKey | None,
    attention: Tensor | None,
    row_max: RowValue | None,
    log2_sum: RowValue | None,
    scale: float,
    is_causal: bool,
    threads: int | None,
    instruction_set: str,
    statistic_count: int,
) -> bytes:
    """A headscope_attention but for its statistics; `sizes`, query, key, value and output are checked, None: no such.

    Raises:
        ValueError: one of the others doesn't fit the sizes.
    """
    batch, heads, _, queries, keys, _, dim_v = sizes
    if attention is not None:
        check("attention", attention, (batch, heads, queries, dim_v), (query.dtype,))
    rows = (batch, heads, queries)
    return ATTENTION.pack(
        *sizes,
        *tensor_fields(query),
        *tensor_fields(key),
        *tensor_fields(value),
        *tensor_fields(output),
        *broadcast_fields("attn_mask", mask, (batch, heads, queries, keys), MASK_DTYPES),
        *broadcast_fields("fill", fill, (batch, heads, queries, dim_v), FILL_DTYPES),
        *edit_fields("gate", gate, (batch, heads)),
        *edit_fields("temperature", temperature, (batch, heads)),
        *edit_fields("key_bias", key_bias, (batch, heads, keys)),
        *edit_fields("key_scale", key_scale, (batch, heads, keys)),
        *(NO_TENSOR if attention is None else tensor_fields(attention)),
        contiguous_address("row_max", row_max, rows),
        contiguous_address("log2_sum", log2_sum, rows),
        scale,
        bool(is_causal),
        1 if _forked else torch.get_num_threads() if threads is None else threads,
        INSTRUCTION_SETS[instruction_set],
        statistic_count,
    )


def _error(library: Library, status: int) -> Exception:
    """What a status other than 0 means."""
    message = library.functions.headscope_status_message(status).decode()
    return MemoryError(message) if status == _NO_MEMORY else ValueError(message)
