"""dq, and what is summed over keys: one program owns a tile of queries and goes over the keys.

With p, dP and dS as in launch.py, T the temperature:

    dq_i = (scale / T) sum_j dS_ij k_j,   row sum_i = sum_j dS_ij,   d T = -1/T sum_i q_i . dq_i
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
from headscope_kernels.attention.tiles import Place, cast_chunks, dot_chunks, zero_chunks


@triton.jit
def query_gradient_kernel(
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
    query_grad_ptr,
    row_sums_ptr,
    temperature_grad_ptr,
    key_descriptor,
    key_tail_descriptor,
    value_descriptor,
    value_tail_descriptor,
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
    query_grad_strides,
    scale,
    heads,
    heads_per_group,
    queries,
    keys,
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
    NEED_QUERY: tl.constexpr,
    NEED_ROW_SUMS: tl.constexpr,
    NEED_TEMPERATURE: tl.constexpr,
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
    """BLOCK_QUERIES queries of one head against all of its keys: dq, the rows' sums of dS, the temperature's part.

    d temperature = -1/T * sum_i q_i . dq_i; every query's share of it is written.
    """
    query_tiles = tl.cdiv(queries, BLOCK_QUERIES)
    batch_head = tl.program_id(0) // query_tiles
    query_tile = tl.program_id(0) % query_tiles
    if CAUSAL:
        # the longest rows first, so that the last programs to finish are short
        query_tile = query_tiles - 1 - query_tile
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = head // heads_per_group
    first_query = query_tile * BLOCK_QUERIES
    query_limit = queries - first_query

    query_strides = scaled_strides(query_strides, STRIDE_UNIT)
    key_strides = scaled_strides(key_strides, STRIDE_UNIT)
    value_strides = scaled_strides(value_strides, STRIDE_UNIT)
    grad_output_strides = scaled_strides(grad_output_strides, STRIDE_UNIT)
    query_grad_strides = scaled_strides(query_grad_strides, GRAD_UNIT)

    rows = indices(0, BLOCK_QUERIES, WIDE)  # [queries]
    columns = indices(0, BLOCK_KEYS, WIDE)  # [keys]
    FEATURES: tl.constexpr = Features(
        CAUSAL, MASK, KEY_MASK, ADDITIVE, HAS_OUTPUT, HAS_GATE, HAS_KEY_BIAS, HAS_KEY_SCALE, GRADIENTS, CONSTANTS
    )
    HAS_MASK: tl.constexpr = MASK != "none" or KEY_MASK != "none"
    NEED_DOT: tl.constexpr = NEED_QUERY or NEED_TEMPERATURE

    gate = load_head_scalar(gate_ptr, batch, head, gate_strides, HAS_GATE)
    temperature = load_head_scalar(temperature_ptr, batch, head, temperature_strides, HAS_TEMPERATURE)
    logit_scale = scale / temperature
    key_bias = head_vector(key_bias_ptr, batch, head, key_bias_strides, HAS_KEY_BIAS)
    key_scale = head_vector(key_scale_ptr, batch, head, key_scale_strides, HAS_KEY_SCALE)
    mask = head_rows(mask_ptr, batch, head, mask_strides, HAS_MASK)
    data = statistic_tensors(statistic_data, statistic_data_strides, DATA_COUNTS, batch, head)
    key_source = Source(
        head_rows(key_ptr, batch, kv_head, key_strides), key_descriptor, key_tail_descriptor, batch, kv_head
    )
    value_source = Source(
        head_rows(value_ptr, batch, kv_head, value_strides), value_descriptor, value_tail_descriptor, batch, kv_head
    )

    # keys before `full` come in tiles without a border, keys before `limit` matter at all
    limit = keys
    full = keys // BLOCK_KEYS * BLOCK_KEYS
    if CAUSAL:
        limit = tl.minimum(keys, first_query + BLOCK_QUERIES)
        full = tl.minimum(full, (first_query + 1) // BLOCK_KEYS * BLOCK_KEYS)
    # a removed head's output says nothing about it: see key_value_gradient.py
    output_limit = query_limit
    value_limit = keys
    if HAS_GATE:
        output_limit = tl.where(gate == 0.0, 0, query_limit)
        value_limit = tl.where(gate == 0.0, 0, keys)
        if SKIP_REMOVED:
            limit = tl.where(gate == 0.0, 0, limit)
            full = tl.where(gate == 0.0, 0, full)

    # tuples of [queries, width]
    query_rows = from_row(head_rows(query_ptr, batch, head, query_strides), first_query)
    query = load_chunks(query_rows, rows, query_limit, DIM, DIM_WIDTHS, True, WIDE)
    query = cast_chunks(query, 1, DOT_DTYPE)
    grad_output = ()
    if HAS_OUTPUT:
        grad_rows = from_row(head_rows(grad_output_ptr, batch, head, grad_output_strides), first_query)
        grad_output = load_chunks(grad_rows, rows, output_limit, VALUE_DIM, VALUE_WIDTHS, True, WIDE)
        grad_output = cast_chunks(grad_output, 1, DOT_DTYPE)

    row_base = advance(first_query, batch_head, queries)
    row_max = 0.0
    if ADDITIVE:
        row_max = load_numbers(row_max_ptr + row_base, rows, query_limit, 1, 0.0, True)  # [queries]
    offset = load_numbers(offset_ptr + row_base, rows, query_limit, 1, EMPTY_ROW, True)  # [queries]
    delta = load_numbers(delta_ptr + row_base, rows, query_limit, 1, 0.0, True)  # [queries]
    grads = load_row_grads(grad_ptrs, row_base, rows, query_limit, GRAD_WIDTHS, PADDED_WIDTHS, True)

    result = ()
    if NEED_DOT:
        result = zero_chunks(BLOCK_QUERIES, DIM_WIDTHS)  # a tuple of [queries, width]
    row_sums = tl.zeros([BLOCK_QUERIES], tl.float32)  # [queries]

    for BORDER in tl.static_range(2):
        begin = full if BORDER else 0
        end = limit if BORDER else full
        for first_key in tl.range(begin, end, BLOCK_KEYS, num_stages=1 if BORDER else None):
            key = load_rows(
                key_source, first_key, columns, keys, keys, DIM, DIM_WIDTHS, BORDER, False, WIDE
            )  # a tuple of [keys, width]
            products = dot_chunks(query, key, DOT_DTYPE, INPUT_PRECISION)  # [queries, keys]
            weight, bias, allowed = load_key_terms(
                key_bias, key_scale, mask, gate, first_key, columns, keys, FEATURES, BORDER
            )
            output_products = products
            if HAS_OUTPUT:
                value = load_rows(
                    value_source,
                    first_key,
                    columns,
                    keys,
                    value_limit,
                    VALUE_DIM,
                    VALUE_WIDTHS,
                    BORDER,
                    HAS_GATE and not SKIP_REMOVED,
                    WIDE,
                )  # a tuple of [keys, width]
                output_products = dot_chunks(grad_output, value, DOT_DTYPE, INPUT_PRECISION)  # [queries, keys]
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
                CHECK_ROWS=True,
                CHECK_COLUMNS=BORDER,
                DROP_COLUMNS=BORDER,
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
                MASKED=HAS_MASK or HAS_KEY_BIAS or BORDER,
                TRANSPOSED=False,
            )  # [queries, keys]
            if NEED_ROW_SUMS:
                row_sums += tl.sum(scores, 1)
            if NEED_DOT:
                result = add_weighted(result, scores, key, DOT_DTYPE, INPUT_PRECISION)

    if NEED_ROW_SUMS:
        tl.store(row_sums_ptr + row_base + rows, row_sums, mask=rows < query_limit)
    along_query = tl.zeros([BLOCK_QUERIES], tl.float32)  # [queries], q . dq
    if NEED_DOT:
        for index in tl.static_range(len(DIM_WIDTHS)):
            chunk = result[index] * logit_scale  # [queries, width]
            if NEED_TEMPERATURE:
                along_query += tl.sum(query[index].to(tl.float32) * chunk, 1)
            if NEED_QUERY:
                base = head_base(query_grad_ptr, batch, head, query_grad_strides)
                base = advance(base, first_query, query_grad_strides[2])
                channels = indices(chunk_start(DIM_WIDTHS, index), entry(DIM_WIDTHS, index), WIDE)  # [width]
                pointers = base + rows[:, None] * query_grad_strides[2] + channels[None, :] * query_grad_strides[3]
                inside = (rows < query_limit)[:, None] & (channels < DIM)[None, :]  # [queries, width]
                tl.store(pointers, chunk.to(query_grad_ptr.dtype.element_ty), mask=inside)
    if NEED_TEMPERATURE:
        if HAS_GATE and SKIP_REMOVED:
            # its query may be NaN
            along_query = tl.where(gate == 0.0, 0.0, along_query)
        # a sum over rows here would make Triton 3.7.1 fail on sm_100
        tl.store(temperature_grad_ptr + row_base + rows, -along_query / temperature, mask=rows < query_limit)
