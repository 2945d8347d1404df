"""How much attention every key receives: the sum over queries of p, in a pass of its own after the forward.

A key's sum runs across all rows, whose normalisers are known only when the forward is done; with them

    p_ij = 2^((logit_ij - row_max_i) * log2(e) - log2_sum_i),   one FMA and one 2^x per score.

One program owns a tile of keys and walks over the queries, so that nothing is added by two programs: no atomics, the
same bits in every run. It adds up whole tiles and sums over their queries once, at the end.
"""

# a flag made of others is a bool to Python
# pyright: reportAssignmentType=false

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from headscope_kernels.attention.arguments import (
    call_arguments,
    check_operands,
    check_rows,
    kernel_arguments,
    scale_arguments,
)
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.forward.configs import key_mass_configuration
from headscope_kernels.attention.host import device_target, float32_precision, launch_context
from headscope_kernels.attention.launches import Launches, call_key
from headscope_kernels.attention.loads import (
    advance,
    from_row,
    head_base,
    head_rows,
    head_vector,
    indices,
    load_chunks,
    load_vector,
    scaled_strides,
)
from headscope_kernels.attention.tiles import (
    LOG2_E,
    Place,
    biased_logits,
    cast_chunks,
    dot_chunks,
    masked_logits,
    tempered,
)


@triton.jit
def attention_key_mass_kernel(
    query_ptr,
    key_ptr,
    mask_ptr,
    temperature_ptr,
    key_bias_ptr,
    row_max_ptr,
    log2_sum_ptr,
    output_ptr,
    query_strides,
    key_strides,
    mask_strides,
    temperature_strides,
    key_bias_strides,
    scale,
    exponent_scale,
    heads,
    heads_per_group,
    queries,
    keys,
    DIM: tl.constexpr,
    DIM_WIDTHS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    SIGN: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: BLOCK_KEYS keys of one head against all of its queries. Arguments as in the forward's kernel."""
    ADDITIVE: tl.constexpr = MASK == "additive" or key_bias_ptr is not None
    key_tiles = tl.cdiv(keys, BLOCK_KEYS)
    batch_head = tl.program_id(0) // key_tiles
    first_key = tl.program_id(0) % key_tiles * BLOCK_KEYS
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = head // heads_per_group

    query_strides = scaled_strides(query_strides, STRIDE_UNIT)
    key_strides = scaled_strides(key_strides, STRIDE_UNIT)
    rows = indices(0, BLOCK_QUERIES, WIDE)  # [queries]
    columns = indices(0, BLOCK_KEYS, WIDE)  # [keys]
    query_rows = head_rows(query_ptr, batch, head, query_strides)
    key_rows = from_row(head_rows(key_ptr, batch, kv_head, key_strides), first_key)
    mask = head_rows(mask_ptr, batch, head, mask_strides, MASK != "none")
    if temperature_ptr is not None:
        temperature = tl.load(head_base(temperature_ptr, batch, head, temperature_strides)).to(tl.float32)
        scale = tempered(scale, temperature)
        exponent_scale = tempered(exponent_scale, temperature)
    if key_bias_ptr is not None:
        key_bias = head_vector(key_bias_ptr, batch, head, key_bias_strides, True)
        bias = load_vector(key_bias, first_key, columns, keys, True)  # [keys]

    # a tuple of [keys, width]
    key = load_chunks(key_rows, columns, keys - first_key, DIM, DIM_WIDTHS, True, WIDE)
    key = cast_chunks(key, SIGN, DOT_DTYPE)

    total = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)  # [queries, keys]
    begin = 0
    if CAUSAL:
        # earlier queries see none of these keys
        begin = first_key // BLOCK_QUERIES * BLOCK_QUERIES
    for first_query in tl.range(begin, queries, BLOCK_QUERIES):
        query = load_chunks(
            from_row(query_rows, first_query), rows, queries - first_query, DIM, DIM_WIDTHS, True, WIDE
        )  # a tuple of [queries, width]
        query = cast_chunks(query, 1, DOT_DTYPE)
        row_offsets = advance(first_query, batch_head, queries) + rows
        inside = rows < queries - first_query  # [queries]
        row_max = tl.load(row_max_ptr + row_offsets, mask=inside, other=0.0)  # [queries]
        # infinite, like a row's without valid keys: weight 0 everywhere
        log2_sum = tl.load(log2_sum_ptr + row_offsets, mask=inside, other=float("inf"))  # [queries]
        # all of such a row's output is NaN
        row_max = tl.where(row_max == float("inf"), float("nan"), row_max)

        logits = dot_chunks(query, key, DOT_DTYPE, INPUT_PRECISION)  # [queries, keys]
        mask_scale = scale
        if key_bias_ptr is not None:
            logits = biased_logits(logits, scale, bias)
            mask_scale = 1.0
        # keys past the last one aren't stored, and only a mask's loads must not reach there
        place = Place(rows, columns, first_query, first_key, queries, keys)
        logits = masked_logits(logits, mask, mask_scale, place, CAUSAL, MASK, MASK_ROWS, CAUSAL or MASK != "none")
        if ADDITIVE:
            exponents = (logits - row_max[:, None]) * LOG2_E - log2_sum[:, None]
        else:
            offset = tl.fma(row_max, LOG2_E, log2_sum)  # [queries]
            exponents = tl.fma(logits, exponent_scale, -offset[:, None])
        # a row past the last one has products of 0, and 0 * inf or NaN where a key isn't finite
        total += tl.exp2(tl.where(inside[:, None], exponents, float("-inf")))

    tl.store(
        advance(output_ptr, batch_head, keys) + first_key + columns, tl.sum(total, 0), mask=columns < keys - first_key
    )


def key_mass_arguments(
    pointers: Mapping[str, Any], *, is_causal: bool, scale: float, configuration: ForwardConfiguration
) -> dict[str, Any]:
    """The kernel's arguments by name.

    Args:
        pointers: the call's tensors by the kernel's parameters.
        is_causal, scale, configuration: as `attention_key_mass`'s.

    Raises:
        ValueError: dtype, head dimension, shape or combination that the kernel has no code for.
    """
    query, key, output = pointers["query_ptr"], pointers["key_ptr"], pointers["output_ptr"]
    check_operands(query, key, None, ())
    check_rows(pointers, query.shape[:3])
    shape = (*query.shape[:2], key.shape[2])
    if output.shape != shape or not output.is_contiguous():
        raise ValueError(f"output must be contiguous {shape}, got {tuple(output.shape)}")
    # not the attention's output, whose place in the description it would take
    read = {name: tensor for name, tensor in pointers.items() if name != "output_ptr"}
    arguments = call_arguments(read, is_causal, configuration, configuration.dim_widths)
    arguments |= {"output_ptr": output, **scale_arguments(scale)}
    return kernel_arguments(attention_key_mass_kernel, arguments, configuration)


def attention_key_mass(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    temperature: Tensor | None,
    key_bias: Tensor | None,
    row_max: Tensor,
    log2_sum: Tensor,
    output: Tensor,
    configuration: ForwardConfiguration | None = None,
) -> None:
    """Writes the sum over queries of every key's probabilities into output; deterministic.

    Args:
        query: [batch, heads, queries, dim], float32, bfloat16 or float16, any strides.
        key: [batch, kv_heads, keys, dim].
        attn_mask, is_causal, scale, temperature, key_bias: as the forward had them.
        row_max, log2_sum: [batch, heads, queries] float32, what the forward wrote.
        output: contiguous float32 [batch, heads, keys]; overwritten.
        configuration: tile shapes; None: chosen for the problem.

    Raises:
        ValueError: a dtype, head dimension, shape or combination that the kernel has no code for.
    """
    pointers = {
        "query_ptr": query,
        "key_ptr": key,
        "mask_ptr": attn_mask,
        "temperature_ptr": temperature,
        "key_bias_ptr": key_bias,
        "row_max_ptr": row_max,
        "log2_sum_ptr": log2_sum,
        "output_ptr": output,
    }
    with launch_context(query):
        launch_key = call_key(pointers, query, (), is_causal, scale, configuration)
        if _LAUNCHES.repeat(launch_key, pointers):
            return
        batch, heads, queries, dim = query.shape
        keys = key.shape[2]
        if configuration is None:
            configuration = key_mass_configuration(
                query.dtype, dim, queries, keys, device_target(query), exact=float32_precision() == "ieee"
            )
        arguments = key_mass_arguments(pointers, is_causal=is_causal, scale=scale, configuration=configuration)
        programs = batch * heads * triton.cdiv(keys, configuration.block_keys)
        if programs == 0:
            return
        _LAUNCHES.first(launch_key, pointers, programs, arguments, configuration.options)


_LAUNCHES = Launches(attention_key_mass_kernel, {})
