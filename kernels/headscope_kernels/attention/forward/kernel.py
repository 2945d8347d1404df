"""Forward pass of attention with statistics of its rows and edits of its heads, one pass over the keys.

Row i, key j, natural logits s_ij = scale / temperature * q_i . k_j + key_bias_j + mask_ij; running maximum m, exponents

    x_ij = s_ij * log2(e) - offset,    offset = m * log2(e) rounded once
    l = sum 2^x,   o = sum 2^x key_scale_j v_j,   any accumulators of the statistics (statistics/)

When the maximum moves, the offset shifts by d <= 0, and l and o shrink by 2^d. At the end p_ij = 2^x_ij / l. The scale
rides in the exponent's FMA, so that a score costs one maximum, one FMA, one 2^x, one addition, and one FMA more for the
entropy. With a mask or a bias to add, the maximum is subtracted in natural units first: a mask may hold the lowest
float.

    output = gate * o / l + (1 - gate) * fill

Keys come in tiles; only tiles that reach past the last key or across the causal diagonal are masked.
"""

# tl.static_range exists for the compiler only, and a flag made of others is a bool to Python
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

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
    load_describing,
    load_rows,
    load_vector,
    scaled_strides,
    statistic_tensors,
    store_statistic,
    store_tile,
)
from headscope_kernels.attention.tiles import (
    Place,
    add_products,
    biased_logits,
    cast_chunks,
    dot_chunks,
    exponents_of,
    gated,
    initial_accumulators,
    masked_logits,
    softmax_step,
    tempered,
    update_accumulators,
    zero_chunks,
)


@triton.jit
def attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    gate_ptr,
    fill_ptr,
    temperature_ptr,
    key_bias_ptr,
    key_scale_ptr,
    output_ptr,
    attention_ptr,
    row_max_ptr,
    log2_sum_ptr,
    statistic_ptrs,
    statistic_data,
    key_descriptor,
    key_tail_descriptor,
    value_descriptor,
    value_tail_descriptor,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    gate_strides,
    fill_strides,
    temperature_strides,
    key_bias_strides,
    key_scale_strides,
    output_strides,
    attention_strides,
    statistic_data_strides,
    scale,
    exponent_scale,
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
    MASK_ROWS: tl.constexpr,
    SIGN: tl.constexpr,
    ACCUMULATORS: tl.constexpr,
    UPDATES: tl.constexpr,
    FINISHES: tl.constexpr,
    EMPTIES: tl.constexpr,
    RESULT_WIDTHS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    DATA_COUNTS: tl.constexpr,
    STATISTICS_KEY: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    SPECIALISED: tl.constexpr,
):
    """One program: BLOCK_QUERIES queries of one head against all of its keys.

    Pointers of what isn't asked for are None. `scale` is not negative (SIGN carries its sign onto the query),
    `exponent_scale` is scale * log2(e). SIGN = 0 means that scale was 0: the query is multiplied by 0 and both are as
    for 1. The strides of query, key, value, output and attention, except their last, are in units of STRIDE_UNIT
    elements.
    """
    ADDITIVE: tl.constexpr = MASK == "additive" or key_bias_ptr is not None
    MASKED: tl.constexpr = MASK != "none" or key_bias_ptr is not None
    HAS_OUTPUT: tl.constexpr = output_ptr is not None or attention_ptr is not None
    # Triton gives the loads of one loop only to warps of their own: there may be no tile with a border
    PASSES: tl.constexpr = 1 if SPECIALISED else 2
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

    query_strides = scaled_strides(query_strides, STRIDE_UNIT)
    key_strides = scaled_strides(key_strides, STRIDE_UNIT)
    value_strides = scaled_strides(value_strides, STRIDE_UNIT)

    rows = indices(0, BLOCK_QUERIES, WIDE)  # [queries]
    columns = indices(0, BLOCK_KEYS, WIDE)  # [keys]
    query_indices = first_query + tl.arange(0, BLOCK_QUERIES)  # [queries]
    query_limit = queries - first_query

    query_rows = from_row(head_rows(query_ptr, batch, head, query_strides), first_query)
    key_source = Source(
        head_rows(key_ptr, batch, kv_head, key_strides), key_descriptor, key_tail_descriptor, batch, kv_head
    )
    value_source = Source(
        head_rows(value_ptr, batch, kv_head, value_strides, HAS_OUTPUT),
        value_descriptor,
        value_tail_descriptor,
        batch,
        kv_head,
    )
    mask = head_rows(mask_ptr, batch, head, mask_strides, MASK != "none")
    key_bias = head_vector(key_bias_ptr, batch, head, key_bias_strides, key_bias_ptr is not None)
    key_scale = head_vector(key_scale_ptr, batch, head, key_scale_strides, key_scale_ptr is not None)
    data = statistic_tensors(statistic_data, statistic_data_strides, DATA_COUNTS, batch, head)
    if temperature_ptr is not None:
        temperature = tl.load(head_base(temperature_ptr, batch, head, temperature_strides)).to(tl.float32)
        scale = tempered(scale, temperature)
        exponent_scale = tempered(exponent_scale, temperature)

    # a tuple of [queries, width]
    if SPECIALISED:
        head_query = head_base(query_ptr, batch, head, query_strides)
        query = load_describing(head_query, first_query, queries, query_strides[2], BLOCK_QUERIES, DIM, DIM_WIDTHS)
    else:
        query = load_chunks(query_rows, rows, query_limit, DIM, DIM_WIDTHS, True, WIDE)
    query = cast_chunks(query, SIGN, DOT_DTYPE)

    # keys before `full` come in tiles without a border, keys before `limit` matter at all
    limit = keys
    full = keys // BLOCK_KEYS * BLOCK_KEYS
    if CAUSAL:
        limit = tl.minimum(keys, first_query + BLOCK_QUERIES)
        full = tl.minimum(full, (first_query + 1) // BLOCK_KEYS * BLOCK_KEYS)
    gate = 1.0
    if gate_ptr is not None:
        gate = tl.load(head_base(gate_ptr, batch, head, gate_strides)).to(tl.float32)
        if len(FINISHES) == 0 and attention_ptr is None and row_max_ptr is None:
            # nobody looks at a removed head
            limit = tl.where(gate == 0.0, 0, limit)
            full = tl.where(gate == 0.0, 0, full)

    running_max = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)  # [queries]
    offset = tl.zeros([BLOCK_QUERIES], tl.float32)  # [queries]
    normaliser = tl.zeros([BLOCK_QUERIES], tl.float32)  # [queries]
    result = ()
    if HAS_OUTPUT:
        result = zero_chunks(BLOCK_QUERIES, VALUE_WIDTHS)  # a tuple of [queries, width]
    accumulators = initial_accumulators(BLOCK_QUERIES, ACCUMULATORS)  # tuples of [queries] or [queries, width]

    for BORDER in tl.static_range(PASSES):
        begin = full if BORDER else 0
        end = limit if BORDER else full
        # pipelined also where it is short: without, tiles of different layouts follow each other at one address, which
        # CUDA 12.8's assembler gets wrong (operands.py)
        for first_key in tl.range(begin, end, BLOCK_KEYS, warp_specialize=SPECIALISED):
            key = load_rows(
                key_source, first_key, columns, keys, keys, DIM, DIM_WIDTHS, BORDER, False, WIDE
            )  # a tuple of [keys, width]
            logits = dot_chunks(query, key, DOT_DTYPE, INPUT_PRECISION)  # [queries, keys]
            mask_scale = scale
            if key_bias_ptr is not None:
                bias = load_vector(key_bias, first_key, columns, keys, BORDER)  # [keys]
                logits = biased_logits(logits, scale, bias)
                mask_scale = 1.0
            place = Place(rows, columns, first_query, first_key, queries, keys)
            logits = masked_logits(logits, mask, mask_scale, place, CAUSAL, MASK, MASK_ROWS, BORDER)
            running_max, offset, shift, weights, exponents = softmax_step(
                logits, running_max, offset, exponent_scale, ADDITIVE, BORDER or MASKED
            )
            rescale = tl.exp2(shift)  # [queries]

            accumulators = update_accumulators(
                UPDATES,
                accumulators,
                rescale,
                shift,
                normaliser,
                weights,
                exponents,
                query_indices,
                first_key + tl.arange(0, BLOCK_KEYS),
                keys,
                data,
                CONSTANTS,
            )
            normaliser = normaliser * rescale + tl.sum(weights, 1)

            if HAS_OUTPUT:
                if key_scale_ptr is not None:
                    weights = weights * load_vector(key_scale, first_key, columns, keys, BORDER)[None, :]
                value = load_rows(
                    value_source, first_key, columns, keys, keys, VALUE_DIM, VALUE_WIDTHS, BORDER, False, WIDE
                )  # a tuple of [keys, width]
                result = add_products(result, weights, value, rescale, DOT_DTYPE, INPUT_PRECISION)

    empty = normaliser == 0.0  # [queries]
    normaliser = tl.where(empty, 1.0, normaliser)

    if len(FINISHES) > 0 or row_max_ptr is not None:
        if ADDITIVE:
            max_logit = running_max
        else:
            max_logit = running_max * scale
        max_exponent = exponents_of(running_max, offset, exponent_scale, ADDITIVE)  # [queries]
        max_exponent = tl.where(empty, 0.0, max_exponent)
        row_offsets = advance(first_query, batch_head, queries) + rows
        for index in tl.static_range(len(FINISHES)):
            # [queries] or [queries, padded width]
            statistic = FINISHES[index](
                accumulators[index], normaliser, max_logit, max_exponent, entry(CONSTANTS, index)
            )
            store_statistic(
                statistic_ptrs[index],
                statistic,
                empty,
                row_offsets,
                rows < query_limit,
                entry(EMPTIES, index),
                entry(RESULT_WIDTHS, index),
            )
        if row_max_ptr is not None:
            log2_sum = tl.where(empty, float("inf"), tl.log2(normaliser) - max_exponent)
            tl.store(row_max_ptr + row_offsets, tl.where(empty, 0.0, max_logit), mask=rows < query_limit)
            tl.store(log2_sum_ptr + row_offsets, log2_sum, mask=rows < query_limit)

    if HAS_OUTPUT:
        fill_base = fill_ptr
        fill_limit = query_limit
        if fill_ptr is not None:
            # a kept head reads no fill
            fill_limit = tl.where(gate == 1.0, 0, query_limit)
            fill_base = advance(head_base(fill_ptr, batch, head, fill_strides), first_query, fill_strides[2])
        for index in tl.static_range(len(VALUE_WIDTHS)):
            columns_v = indices(chunk_start(VALUE_WIDTHS, index), entry(VALUE_WIDTHS, index), WIDE)  # [width]
            inside = (rows < query_limit)[:, None] & (columns_v < VALUE_DIM)[None, :]  # [queries, width]
            chunk = result[index] / normaliser[:, None]  # [queries, width]
            if attention_ptr is not None:
                strides = scaled_strides(attention_strides, STRIDE_UNIT)
                base = advance(head_base(attention_ptr, batch, head, strides), first_query, strides[2])
                store_tile(base, rows, columns_v, strides, chunk, inside)
            if output_ptr is not None:
                if gate_ptr is not None:
                    fill = tl.zeros([BLOCK_QUERIES, entry(VALUE_WIDTHS, index)], tl.float32)
                    if fill_ptr is not None:
                        pointers = fill_base + rows[:, None] * fill_strides[2] + columns_v[None, :] * fill_strides[3]
                        needed = inside & (rows < fill_limit)[:, None]  # [queries, width]
                        fill = tl.load(pointers, mask=needed, other=0.0).to(tl.float32)
                    chunk = gated(chunk, fill, gate)
                strides = scaled_strides(output_strides, STRIDE_UNIT)
                base = advance(head_base(output_ptr, batch, head, strides), first_query, strides[2])
                store_tile(base, rows, columns_v, strides, chunk, inside)
