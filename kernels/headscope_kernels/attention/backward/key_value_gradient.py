"""dk and dv, and what is summed over queries: one program owns a tile of keys and goes over the queries.

With p, dP and dS as in launch.py, c the key scales, g the gate, T the temperature, G the output's gradient:

    dk_j = (scale / T) sum_i dS_ij q_i,   dv_j = c_j g sum_i p_ij G_i
    column sum_j = sum_i dS_ij,           d c_j = g sum_i p_ij (G_i . v_j)

Tiles are [keys, queries]: probabilities and their gradients are left operands of products as they stand, out of
registers. The output's products are launched before the exponentials, which they then run beside.
"""

# tl.static_range exists for the compiler only
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from headscope_kernels.attention.backward.tiles import (
    EMPTY_ROW,
    Features,
    add_weighted,
    load_head_scalar,
    load_key_terms,
    load_row_grads,
    log2_probabilities,
    logit_gradients,
)
from headscope_kernels.attention.loads import (
    Source,
    advance,
    chunk_start,
    entry,
    from_row,
    head_base,
    head_rows,
    head_vector,
    indices,
    load_chunks,
    load_numbers,
    load_rows,
    scaled_strides,
    statistic_tensors,
)
from headscope_kernels.attention.tiles import LOWEST_EXPONENT, Place, cast_chunks, dot_chunks, zero_chunks


@triton.jit
def key_value_gradient_kernel(
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
    key_grad_ptr,
    value_grad_ptr,
    column_sums_ptr,
    key_scale_grad_ptr,
    query_descriptor,
    query_tail_descriptor,
    grad_output_descriptor,
    grad_output_tail_descriptor,
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
    key_grad_strides,
    value_grad_strides,
    scale,
    batches,
    heads,
    heads_per_group,
    queries,
    keys,
    splits,
    split_queries,
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
    GROUPED: tl.constexpr,
    SKIP_REMOVED: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    NEED_COLUMN_SUMS: tl.constexpr,
    NEED_KEY_SCALE: tl.constexpr,
    GRADIENTS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    GRAD_WIDTHS: tl.constexpr,
    PADDED_WIDTHS: tl.constexpr,
    DATA_COUNTS: tl.constexpr,
    GRADIENTS_KEY: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """BLOCK_KEYS keys of one head against `split_queries` queries of every query head that shares them.

    Queries may be split among `splits` programs; each writes sums of its own, as if they were further samples.
    """
    key_tiles = tl.cdiv(keys, BLOCK_KEYS)
    first_key = tl.program_id(0) % key_tiles * BLOCK_KEYS
    split = tl.program_id(0) // key_tiles % splits
    batch_head = tl.program_id(0) // key_tiles // splits
    kv_heads = heads // heads_per_group
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads

    query_strides = scaled_strides(query_strides, STRIDE_UNIT)
    key_strides = scaled_strides(key_strides, STRIDE_UNIT)
    value_strides = scaled_strides(value_strides, STRIDE_UNIT)
    grad_output_strides = scaled_strides(grad_output_strides, STRIDE_UNIT)
    key_grad_strides = scaled_strides(key_grad_strides, GRAD_UNIT)
    value_grad_strides = scaled_strides(value_grad_strides, GRAD_UNIT)

    rows = indices(0, BLOCK_QUERIES, WIDE)  # [queries]
    columns = indices(0, BLOCK_KEYS, WIDE)  # [keys]
    key_limit = keys - first_key
    inside_keys = columns < key_limit  # [keys]
    NEED_SCORES: tl.constexpr = NEED_KEY or NEED_COLUMN_SUMS
    NEED_PRODUCTS: tl.constexpr = HAS_OUTPUT and (NEED_SCORES or NEED_KEY_SCALE)
    FEATURES: tl.constexpr = Features(
        CAUSAL, MASK, KEY_MASK, ADDITIVE, HAS_OUTPUT, HAS_GATE, HAS_KEY_BIAS, HAS_KEY_SCALE, GRADIENTS, CONSTANTS
    )
    HAS_MASK: tl.constexpr = MASK != "none" or KEY_MASK != "none"

    # tuples of [keys, width]
    key_rows = from_row(head_rows(key_ptr, batch, kv_head, key_strides), first_key)
    key = load_chunks(key_rows, columns, key_limit, DIM, DIM_WIDTHS, True, WIDE)
    key = cast_chunks(key, 1, DOT_DTYPE)
    value_rows = from_row(head_rows(value_ptr, batch, kv_head, value_strides), first_key)

    # this split's queries: [begin, first_full) cross the diagonal or may, [first_full, last_full) are free of any
    # border, and one tile may reach past the last query
    begin = split * split_queries
    end = tl.minimum(begin + split_queries, queries)
    if CAUSAL:
        begin = tl.maximum(begin, first_key // BLOCK_QUERIES * BLOCK_QUERIES)
        diagonal_end = tl.cdiv(first_key + BLOCK_KEYS - 1, BLOCK_QUERIES) * BLOCK_QUERIES
        first_full = tl.minimum(tl.maximum(begin, diagonal_end), tl.maximum(begin, end))
    else:
        first_full = begin
    last_full = tl.maximum(first_full, tl.minimum(end, queries // BLOCK_QUERIES * BLOCK_QUERIES))
    diagonal_tiles = tl.cdiv(first_full - begin, BLOCK_QUERIES)
    border_tiles = diagonal_tiles + tl.where(last_full < end, 1, 0)

    key_result = ()
    if NEED_KEY:
        key_result = zero_chunks(BLOCK_KEYS, DIM_WIDTHS)  # a tuple of [keys, width]
    value_result = ()
    if NEED_VALUE:
        value_result = zero_chunks(BLOCK_KEYS, VALUE_WIDTHS)  # a tuple of [keys, width]
    # the last head's are used after the loop, if it is the only one
    weight = 1.0
    if HAS_KEY_SCALE:
        weight = tl.zeros([BLOCK_KEYS], tl.float32)  # [keys]
    gate = 1.0
    logit_scale = scale

    for member in tl.range(0, heads_per_group, num_stages=1):
        head = kv_head * heads_per_group + member
        gate = load_head_scalar(gate_ptr, batch, head, gate_strides, HAS_GATE)
        temperature = load_head_scalar(temperature_ptr, batch, head, temperature_strides, HAS_TEMPERATURE)
        logit_scale = scale / temperature
        key_bias = head_vector(key_bias_ptr, batch, head, key_bias_strides, HAS_KEY_BIAS)
        key_scale = head_vector(key_scale_ptr, batch, head, key_scale_strides, HAS_KEY_SCALE)
        mask = head_rows(mask_ptr, batch, head, mask_strides, HAS_MASK)
        weight, bias, allowed = load_key_terms(
            key_bias, key_scale, mask, gate, first_key, columns, keys, FEATURES, True
        )
        query_source = Source(
            head_rows(query_ptr, batch, head, query_strides), query_descriptor, query_tail_descriptor, batch, head
        )
        grad_source = Source(
            head_rows(grad_output_ptr, batch, head, grad_output_strides, HAS_OUTPUT),
            grad_output_descriptor,
            grad_output_tail_descriptor,
            batch,
            head,
        )
        data = statistic_tensors(statistic_data, statistic_data_strides, DATA_COUNTS, batch, head)
        first_row = tl.cast(batch, tl.int64) * heads + head

        # a removed head's output says nothing about it, whatever it holds: without statistics nothing is left to do,
        # with them value and the output's gradient are as good as 0
        output_limit = queries
        value_limit = key_limit
        full_tiles_end = last_full
        borders = border_tiles
        if HAS_GATE:
            output_limit = tl.where(gate == 0.0, 0, queries)
            value_limit = tl.where(gate == 0.0, 0, key_limit)
            if SKIP_REMOVED:
                full_tiles_end = tl.where(gate == 0.0, first_full, last_full)
                borders = tl.where(gate == 0.0, 0, border_tiles)
        value = ()
        if NEED_PRODUCTS:
            value = load_chunks(
                value_rows, columns, value_limit, VALUE_DIM, VALUE_WIDTHS, True, WIDE
            )  # a tuple of [keys, width]
            value = cast_chunks(value, 1, DOT_DTYPE)
        column_sums = tl.zeros([BLOCK_KEYS], tl.float32)  # [keys]
        scale_sums = tl.zeros([BLOCK_KEYS], tl.float32)  # [keys]

        for BORDER in tl.static_range(2):
            steps = borders if BORDER else tl.cdiv(full_tiles_end - first_full, BLOCK_QUERIES)
            for step in tl.range(0, steps, num_stages=1 if BORDER else None):
                if BORDER:
                    first_query = tl.where(step < diagonal_tiles, begin + step * BLOCK_QUERIES, last_full)
                else:
                    first_query = first_full + step * BLOCK_QUERIES
                query_limit = queries - first_query
                query = load_rows(
                    query_source, first_query, rows, queries, queries, DIM, DIM_WIDTHS, BORDER, False, WIDE
                )  # a tuple of [queries, width]
                row_base = advance(first_query, first_row, queries)
                row_max = 0.0
                if ADDITIVE:
                    row_max = load_numbers(row_max_ptr + row_base, rows, query_limit, 1, 0.0, BORDER)  # [queries]
                offset = load_numbers(offset_ptr + row_base, rows, query_limit, 1, EMPTY_ROW, BORDER)  # [queries]
                products = dot_chunks(key, query, DOT_DTYPE, INPUT_PRECISION)  # [keys, queries]
                grad_output = ()
                if HAS_OUTPUT:
                    grad_output = load_rows(
                        grad_source,
                        first_query,
                        rows,
                        queries,
                        output_limit,
                        VALUE_DIM,
                        VALUE_WIDTHS,
                        BORDER,
                        HAS_GATE and not SKIP_REMOVED,
                        WIDE,
                    )  # a tuple of [queries, width]
                output_products = products
                if NEED_PRODUCTS:
                    output_products = dot_chunks(value, grad_output, DOT_DTYPE, INPUT_PRECISION)  # [keys, queries]
                place = Place(rows, columns, first_query, first_key, queries, keys)
                exponents = log2_probabilities(
                    products,
                    row_max,
                    offset,
                    bias,
                    allowed,
                    mask,
                    logit_scale,
                    place,
                    FEATURES,
                    CHECK_ROWS=BORDER,
                    CHECK_COLUMNS=True,
                    DROP_COLUMNS=CAUSAL and BORDER,
                    TRANSPOSED=True,
                )  # [keys, queries]
                if BORDER:
                    # a row past the last one has products of 0, and NaN where a key isn't finite
                    exponents = tl.where((rows < queries - first_query)[None, :], exponents, LOWEST_EXPONENT)
                probabilities = tl.exp2(exponents)  # [keys, queries]
                if NEED_VALUE:
                    weights = probabilities
                    if GROUPED and HAS_KEY_SCALE:
                        weights = probabilities * weight[:, None]
                    elif GROUPED and HAS_GATE:
                        weights = probabilities * weight
                    if GROUPED and HAS_GATE and not SKIP_REMOVED:
                        weights = tl.where(gate == 0.0, 0.0, weights)
                    value_result = add_weighted(value_result, weights, grad_output, DOT_DTYPE, INPUT_PRECISION)
                if NEED_SCORES or NEED_KEY_SCALE:
                    if NEED_KEY_SCALE:
                        scale_sums += tl.sum(probabilities * output_products, 1)
                    if NEED_SCORES:
                        delta = load_numbers(delta_ptr + row_base, rows, query_limit, 1, 0.0, BORDER)  # [queries]
                        grads = load_row_grads(
                            grad_ptrs, row_base, rows, query_limit, GRAD_WIDTHS, PADDED_WIDTHS, BORDER
                        )
                        scores = logit_gradients(
                            probabilities,
                            exponents,
                            output_products,
                            weight,
                            delta,
                            grads,
                            data,
                            place,
                            FEATURES,
                            MASKED=HAS_MASK or HAS_KEY_BIAS or (CAUSAL and BORDER),
                            TRANSPOSED=True,
                        )  # [keys, queries]
                        if NEED_COLUMN_SUMS:
                            column_sums += tl.sum(scores, 1)
                        if NEED_KEY:
                            if GROUPED and HAS_TEMPERATURE:
                                scores = scores * logit_scale
                            key_result = add_weighted(key_result, scores, query, DOT_DTYPE, INPUT_PRECISION)

        split_head = (tl.cast(split, tl.int64) * batches + batch) * heads + head
        sums_base = split_head * keys + first_key
        if NEED_COLUMN_SUMS:
            tl.store(column_sums_ptr + sums_base + columns, column_sums, mask=inside_keys)
        if NEED_KEY_SCALE:
            if HAS_GATE:
                scale_sums = tl.where(gate == 0.0, 0.0, scale_sums * gate)
            tl.store(key_scale_grad_ptr + sums_base + columns, scale_sums, mask=inside_keys)

    split_batch = split * batches + batch
    if NEED_KEY:
        factor = logit_scale
        if GROUPED:
            factor = 1.0 if HAS_TEMPERATURE else scale
        base = head_base(key_grad_ptr, split_batch, kv_head, key_grad_strides)
        base = advance(base, first_key, key_grad_strides[2])
        for index in tl.static_range(len(DIM_WIDTHS)):
            channels = indices(chunk_start(DIM_WIDTHS, index), entry(DIM_WIDTHS, index), WIDE)  # [width]
            pointers = base + columns[:, None] * key_grad_strides[2] + channels[None, :] * key_grad_strides[3]
            chunk = key_result[index] * factor  # [keys, width]
            inside = inside_keys[:, None] & (channels < DIM)[None, :]  # [keys, width]
            tl.store(pointers, chunk.to(key_grad_ptr.dtype.element_ty), mask=inside)
    if NEED_VALUE:
        base = head_base(value_grad_ptr, split_batch, kv_head, value_grad_strides)
        base = advance(base, first_key, value_grad_strides[2])
        for index in tl.static_range(len(VALUE_WIDTHS)):
            channels = indices(chunk_start(VALUE_WIDTHS, index), entry(VALUE_WIDTHS, index), WIDE)  # [width]
            pointers = base + columns[:, None] * value_grad_strides[2] + channels[None, :] * value_grad_strides[3]
            chunk = value_result[index]  # [keys, width]
            if not GROUPED:
                if HAS_KEY_SCALE:
                    chunk = chunk * weight[:, None]
                elif HAS_GATE:
                    chunk = chunk * weight
                if HAS_GATE:
                    chunk = tl.where(gate == 0.0, 0.0, chunk)
            inside = inside_keys[:, None] & (channels < VALUE_DIM)[None, :]  # [keys, width]
            tl.store(pointers, chunk.to(value_grad_ptr.dtype.element_ty), mask=inside)
