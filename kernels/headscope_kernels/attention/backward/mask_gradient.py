"""The gradient of an additive mask with a number for every query and key: dS, summed over what the mask repeats for.

    d mask_ij = sum over the samples and heads that share the mask of dS_ij, which is as in launch.py

A mask that is the same for all queries, or for all keys, gets its gradient from column or row sums that the other
backward kernels have; only this one writes a matrix, as large as the mask itself.
"""

# tl.static_range exists for the compiler only
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from headscope_kernels.attention.backward.tiles import (
    EMPTY_ROW,
    Features,
    load_head_scalar,
    load_key_terms,
    load_row_grads,
    log2_probabilities,
    logit_gradients,
)
from headscope_kernels.attention.loads import (
    advance,
    from_row,
    head_base,
    head_rows,
    head_vector,
    indices,
    load_chunks,
    load_numbers,
    scaled_strides,
    statistic_tensors,
)
from headscope_kernels.attention.tiles import Place, cast_chunks, dot_chunks


@triton.jit
def mask_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    gate_ptr,
    temperature_ptr,
    key_bias_ptr,
    key_scale_ptr,
    grad_output_ptr,
    row_max_ptr,
    offset_ptr,
    delta_ptr,
    grad_ptrs,
    statistic_data,
    mask_grad_ptr,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    gate_strides,
    temperature_strides,
    key_bias_strides,
    key_scale_strides,
    grad_output_strides,
    statistic_data_strides,
    mask_grad_strides,
    scale,
    heads,
    heads_per_group,
    queries,
    keys,
    mask_heads,
    batch_repeats,
    head_repeats,
    DIM: tl.constexpr,
    DIM_WIDTHS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTHS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ADDITIVE: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    HAS_KEY_SCALE: tl.constexpr,
    SKIP_REMOVED: tl.constexpr,
    GRADIENTS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    GRAD_WIDTHS: tl.constexpr,
    PADDED_WIDTHS: tl.constexpr,
    DATA_COUNTS: tl.constexpr,
    GRADIENTS_KEY: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile [BLOCK_QUERIES, BLOCK_KEYS] of the mask's gradient, over all samples and heads that share it."""
    key_tiles = tl.cdiv(keys, BLOCK_KEYS)
    query_tiles = tl.cdiv(queries, BLOCK_QUERIES)
    first_key = tl.program_id(0) % key_tiles * BLOCK_KEYS
    first_query = tl.program_id(0) // key_tiles % query_tiles * BLOCK_QUERIES
    mask_batch_head = tl.program_id(0) // key_tiles // query_tiles
    mask_batch = mask_batch_head // mask_heads
    mask_head = mask_batch_head % mask_heads

    query_strides = scaled_strides(query_strides, STRIDE_UNIT)
    key_strides = scaled_strides(key_strides, STRIDE_UNIT)
    value_strides = scaled_strides(value_strides, STRIDE_UNIT)
    grad_output_strides = scaled_strides(grad_output_strides, STRIDE_UNIT)

    rows = indices(0, BLOCK_QUERIES, WIDE)  # [queries]
    columns = indices(0, BLOCK_KEYS, WIDE)  # [keys]
    query_limit = queries - first_query
    key_limit = keys - first_key
    # a causal tile above the diagonal has gradient 0
    repeats = batch_repeats * head_repeats
    if CAUSAL:
        repeats = tl.where(first_key >= first_query + BLOCK_QUERIES, 0, repeats)

    FEATURES: tl.constexpr = Features(
        CAUSAL, MASK, KEY_MASK, ADDITIVE, HAS_OUTPUT, HAS_GATE, HAS_KEY_BIAS, HAS_KEY_SCALE, GRADIENTS, CONSTANTS
    )
    place = Place(rows, columns, first_query, first_key, queries, keys)
    total = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)  # [queries, keys]
    for repeat in tl.range(0, repeats, num_stages=1):
        # either the mask's own sample and head, or all in turn
        batch = mask_batch + repeat // head_repeats
        head = mask_head + repeat % head_repeats
        kv_head = head // heads_per_group
        gate = load_head_scalar(gate_ptr, batch, head, gate_strides, HAS_GATE)
        temperature = load_head_scalar(temperature_ptr, batch, head, temperature_strides, HAS_TEMPERATURE)
        key_bias = head_vector(key_bias_ptr, batch, head, key_bias_strides, HAS_KEY_BIAS)
        key_scale = head_vector(key_scale_ptr, batch, head, key_scale_strides, HAS_KEY_SCALE)
        mask = head_rows(mask_ptr, batch, head, mask_strides)
        data = statistic_tensors(statistic_data, statistic_data_strides, DATA_COUNTS, batch, head)
        weight, bias, allowed = load_key_terms(
            key_bias, key_scale, mask, gate, first_key, columns, keys, FEATURES, True
        )
        query_rows = from_row(head_rows(query_ptr, batch, head, query_strides), first_query)
        query = load_chunks(query_rows, rows, query_limit, DIM, DIM_WIDTHS, True, WIDE)  # a tuple of [queries, width]
        query = cast_chunks(query, 1, DOT_DTYPE)
        key_rows = from_row(head_rows(key_ptr, batch, kv_head, key_strides), first_key)
        key = load_chunks(key_rows, columns, key_limit, DIM, DIM_WIDTHS, True, WIDE)  # a tuple of [keys, width]
        products = dot_chunks(query, key, DOT_DTYPE, INPUT_PRECISION)  # [queries, keys]
        output_products = products
        if HAS_OUTPUT:
            output_limit = query_limit
            value_limit = key_limit
            if HAS_GATE:
                # a removed head's output says nothing about it
                output_limit = tl.where(gate == 0.0, 0, query_limit)
                value_limit = tl.where(gate == 0.0, 0, key_limit)
            grad_rows = from_row(head_rows(grad_output_ptr, batch, head, grad_output_strides), first_query)
            grad_output = load_chunks(
                grad_rows, rows, output_limit, VALUE_DIM, VALUE_WIDTHS, True, WIDE
            )  # a tuple of [queries, width]
            grad_output = cast_chunks(grad_output, 1, DOT_DTYPE)
            value_rows = from_row(head_rows(value_ptr, batch, kv_head, value_strides), first_key)
            value = load_chunks(
                value_rows, columns, value_limit, VALUE_DIM, VALUE_WIDTHS, True, WIDE
            )  # a tuple of [keys, width]
            output_products = dot_chunks(grad_output, value, DOT_DTYPE, INPUT_PRECISION)  # [queries, keys]
        row_base = advance(first_query, tl.cast(batch, tl.int64) * heads + head, queries)
        row_max = load_numbers(row_max_ptr + row_base, rows, query_limit, 1, 0.0, True)  # [queries]
        offset = load_numbers(offset_ptr + row_base, rows, query_limit, 1, EMPTY_ROW, True)  # [queries]
        delta = load_numbers(delta_ptr + row_base, rows, query_limit, 1, 0.0, True)  # [queries]
        grads = load_row_grads(grad_ptrs, row_base, rows, query_limit, GRAD_WIDTHS, PADDED_WIDTHS, True)
        exponents = log2_probabilities(
            products,
            row_max,
            offset,
            bias,
            allowed,
            mask,
            scale / temperature,
            place,
            FEATURES,
            CHECK_ROWS=True,
            CHECK_COLUMNS=True,
            DROP_COLUMNS=True,
            TRANSPOSED=False,
        )  # [queries, keys]
        scores = logit_gradients(
            tl.exp2(exponents),
            exponents,
            output_products,
            weight,
            delta,
            grads,
            data,
            place,
            FEATURES,
            MASKED=True,
            TRANSPOSED=False,
        )  # [queries, keys]
        if HAS_GATE and SKIP_REMOVED:
            scores = tl.where(gate == 0.0, 0.0, scores)
        total += scores

    base = advance(
        head_base(mask_grad_ptr, mask_batch, mask_head, mask_grad_strides), first_query, mask_grad_strides[2]
    )
    base = advance(base, first_key, mask_grad_strides[3])
    pointers = base + rows[:, None] * mask_grad_strides[2] + columns[None, :] * mask_grad_strides[3]
    inside = (rows < query_limit)[:, None] & (columns < key_limit)[None, :]  # [queries, keys]
    tl.store(pointers, total.to(mask_grad_ptr.dtype.element_ty), mask=inside)
