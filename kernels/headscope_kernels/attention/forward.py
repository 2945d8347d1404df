"""Forward pass of attention with statistics of its rows and gates on its heads, one pass over the keys.

Row i, key j, natural logits s_ij = scale * q_i . k_j + mask_ij; running maximum m, exponents

    x_ij = s_ij * log2(e) - offset,    offset = m * log2(e) rounded once
    l = sum 2^x,   o = sum 2^x v,   any accumulators of the statistics (statistics.py)

When the maximum moves, the offset shifts by d <= 0, and l and o shrink by 2^d. At the end p_ij = 2^x_ij / l. The scale
rides in the exponent's FMA, so that a score costs one maximum, one FMA, one 2^x, one addition, and one FMA more for the
entropy. With a mask to add, the maximum is subtracted in natural units first: the mask may hold the lowest float.

    output = gate * o / l + (1 - gate) * fill

Keys come in tiles; only tiles that reach past the last key or across the causal diagonal are masked.
"""

# tl.static_range exists for the compiler only
# pyright: reportGeneralTypeIssues=false

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope_kernels.attention.configs import ForwardConfiguration, chunk_widths, forward_configuration
from headscope_kernels.attention.host import (
    broadcast_strides,
    device_target,
    dot_dtype,
    float32_precision,
    in_units,
    launch_context,
    stride_unit,
)
from headscope_kernels.attention.statistics import statistic_set
from headscope_kernels.attention.tiles import (
    add_products,
    advance,
    cast_chunks,
    chunk_start,
    dot_chunks,
    entry,
    exponents_of,
    gated,
    head_base,
    indices,
    initial_accumulators,
    load_chunks,
    masked_logits,
    scaled_strides,
    softmax_step,
    update_accumulators,
    zero_chunks,
)

MAXIMUM_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    gate_ptr,
    fill_ptr,
    output_ptr,
    statistic_ptrs,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    gate_strides,
    fill_strides,
    output_strides,
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
    HAS_GATE: tl.constexpr,
    HAS_FILL: tl.constexpr,
    ACCUMULATORS: tl.constexpr,
    UPDATES: tl.constexpr,
    FINISHES: tl.constexpr,
    EMPTIES: tl.constexpr,
    STATISTICS_KEY: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: BLOCK_QUERIES queries of one head against all of its keys.

    `scale` is not negative (SIGN carries its sign onto the query), `exponent_scale` is scale * log2(e). SIGN = 0 means
    that scale was 0: the query is multiplied by 0 and both are as for 1. The strides of query, key, value and output,
    except their last, are in units of STRIDE_UNIT elements.
    """
    ADDITIVE: tl.constexpr = MASK == "additive"
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
    output_strides = scaled_strides(output_strides, STRIDE_UNIT)

    rows = indices(0, BLOCK_QUERIES, WIDE)  # [queries]
    columns = indices(0, BLOCK_KEYS, WIDE)  # [keys]
    query_limit = queries - first_query

    query_base = advance(head_base(query_ptr, batch, head, query_strides), first_query, query_strides[2])
    key_base = head_base(key_ptr, batch, kv_head, key_strides)
    value_base = head_base(value_ptr, batch, kv_head, value_strides)
    mask_base = mask_ptr
    if MASK != "none":
        mask_base = head_base(mask_ptr, batch, head, mask_strides)

    # a tuple of [queries, width]
    query = load_chunks(query_base, rows, query_limit, query_strides[2], query_strides[3], DIM, DIM_WIDTHS, True, WIDE)
    query = cast_chunks(query, SIGN, DOT_DTYPE)

    # keys before `full` come in tiles without a border, keys before `limit` matter at all
    limit = keys
    full = keys // BLOCK_KEYS * BLOCK_KEYS
    if CAUSAL:
        limit = tl.minimum(keys, first_query + BLOCK_QUERIES)
        full = tl.minimum(full, (first_query + 1) // BLOCK_KEYS * BLOCK_KEYS)
    gate = 1.0
    if HAS_GATE:
        gate = tl.load(head_base(gate_ptr, batch, head, gate_strides)).to(tl.float32)
        if len(FINISHES) == 0:
            # nobody looks at a removed head
            limit = tl.where(gate == 0.0, 0, limit)
            full = tl.where(gate == 0.0, 0, full)

    running_max = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)  # [queries]
    offset = tl.zeros([BLOCK_QUERIES], tl.float32)  # [queries]
    normaliser = tl.zeros([BLOCK_QUERIES], tl.float32)  # [queries]
    result = zero_chunks(BLOCK_QUERIES, VALUE_WIDTHS)  # a tuple of [queries, width]
    accumulators = initial_accumulators(BLOCK_QUERIES, ACCUMULATORS)  # tuples of [queries]

    for BORDER in tl.static_range(2):
        begin = full if BORDER else 0
        end = limit if BORDER else full
        for first_key in tl.range(begin, end, BLOCK_KEYS, num_stages=1 if BORDER else None):
            key = load_chunks(
                advance(key_base, first_key, key_strides[2]),
                columns,
                keys - first_key,
                key_strides[2],
                key_strides[3],
                DIM,
                DIM_WIDTHS,
                BORDER,
                WIDE,
            )
            logits = dot_chunks(query, key, DOT_DTYPE, INPUT_PRECISION)  # [queries, keys]
            logits = masked_logits(
                logits,
                mask_base,
                mask_strides,
                scale,
                rows,
                columns,
                first_query,
                first_key,
                queries,
                keys,
                CAUSAL,
                MASK,
                MASK_ROWS,
                BORDER,
            )
            running_max, offset, shift, weights, exponents = softmax_step(
                logits, running_max, offset, exponent_scale, ADDITIVE, BORDER or MASK != "none"
            )
            rescale = tl.exp2(shift)  # [queries]

            accumulators = update_accumulators(UPDATES, accumulators, rescale, shift, normaliser, weights, exponents)
            normaliser = normaliser * rescale + tl.sum(weights, 1)

            value = load_chunks(
                advance(value_base, first_key, value_strides[2]),
                columns,
                keys - first_key,
                value_strides[2],
                value_strides[3],
                VALUE_DIM,
                VALUE_WIDTHS,
                BORDER,
                WIDE,
            )
            result = add_products(result, weights, value, rescale, DOT_DTYPE, INPUT_PRECISION)

    empty = normaliser == 0.0  # [queries]
    normaliser = tl.where(empty, 1.0, normaliser)

    if len(FINISHES) > 0:
        if ADDITIVE:
            max_logit = running_max
        else:
            max_logit = running_max * scale
        max_exponent = exponents_of(running_max, offset, exponent_scale, ADDITIVE)  # [queries]
        max_exponent = tl.where(empty, 0.0, max_exponent)
        row_offsets = advance(first_query, batch_head, queries) + rows
        for index in tl.static_range(len(FINISHES)):
            statistic = FINISHES[index](accumulators[index], normaliser, max_logit, max_exponent)  # [queries]
            statistic = tl.where(empty, entry(EMPTIES, index), statistic)
            tl.store(statistic_ptrs[index] + row_offsets, statistic, mask=rows < query_limit)

    output_base = advance(head_base(output_ptr, batch, head, output_strides), first_query, output_strides[2])
    fill_base = fill_ptr
    fill_limit = query_limit
    if HAS_FILL:
        # a kept head reads no fill
        fill_limit = tl.where(gate == 1.0, 0, query_limit)
        fill_base = advance(head_base(fill_ptr, batch, head, fill_strides), first_query, fill_strides[2])
    for index in tl.static_range(len(VALUE_WIDTHS)):
        columns_v = indices(chunk_start(VALUE_WIDTHS, index), entry(VALUE_WIDTHS, index), WIDE)  # [width]
        inside = (rows < query_limit)[:, None] & (columns_v < VALUE_DIM)[None, :]  # [queries, width]
        chunk = result[index] / normaliser[:, None]  # [queries, width]
        if HAS_GATE:
            if HAS_FILL:
                pointers = fill_base + rows[:, None] * fill_strides[2] + columns_v[None, :] * fill_strides[3]
                needed = inside & (rows < fill_limit)[:, None]  # [queries, width]
                fill = tl.load(pointers, mask=needed, other=0.0).to(tl.float32)  # [queries, width]
            else:
                fill = tl.zeros([BLOCK_QUERIES, entry(VALUE_WIDTHS, index)], tl.float32)
            chunk = gated(chunk, fill, gate)
        pointers = output_base + rows[:, None] * output_strides[2] + columns_v[None, :] * output_strides[3]
        tl.store(pointers, chunk.to(output_ptr.dtype.element_ty), mask=inside)


def forward_arguments(
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
    configuration: ForwardConfiguration,
) -> dict[str, Any]:
    """The kernel's arguments by name. Reads shapes, strides and dtypes only.

    Raises:
        ValueError: dtype, head dimension, statistic or combination that the kernel has no code for.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys, dim_v = key.shape[1], key.shape[2], value.shape[3]
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype == output.dtype:
        dtypes = [tensor.dtype for tensor in (query, key, value, output)]
        raise ValueError(f"query, key, value and output must share one of {DTYPES}, got {dtypes}")
    if not (1 <= dim <= MAXIMUM_DIM and 1 <= dim_v <= MAXIMUM_DIM):
        raise ValueError(f"head dimensions must be 1 to {MAXIMUM_DIM}, got query and key {dim}, value {dim_v}")
    if kv_heads and heads % kv_heads:
        raise ValueError(f"query's heads ({heads}) must be a multiple of key's ({kv_heads})")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask exclude each other")
    if len(statistics) != len(statistic_outputs):
        raise ValueError(f"{len(statistics)} statistics need as many outputs, got {len(statistic_outputs)}")
    chosen = statistic_set(tuple(statistics))

    mask, mask_strides = None, (0, 0, 0, 0)
    if attn_mask is not None:
        mask_strides = broadcast_strides("attn_mask", attn_mask, (batch, heads, queries, keys))
        mask = attn_mask.view(torch.uint8) if attn_mask.dtype == torch.bool else attn_mask
    fill_strides = (0, 0, 0, 0)
    if fill is not None:
        fill_strides = broadcast_strides("fill", fill, (batch, heads, queries, dim_v))
    gate_strides = (0, 0) if gate is None else broadcast_strides("gate", gate, (batch, heads))

    sign = (scale > 0) - (scale < 0)
    size = abs(scale) if sign else 1.0
    block_queries, block_keys = configuration.block_queries, configuration.block_keys
    reach = max(
        strides[2] * block + strides[3] * columns
        for strides, block, columns in (
            (query.stride(), block_queries, dim),
            (key.stride(), block_keys, dim),
            (value.stride(), block_keys, dim_v),
            (mask_strides, block_queries, block_keys),
            (fill_strides, block_queries, dim_v),
            (output.stride(), block_queries, dim_v),
        )
    )
    unit = stride_unit((query, key, value, output))
    return {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "mask_ptr": query if mask is None else mask,
        "gate_ptr": query if gate is None else gate,
        "fill_ptr": query if fill is None else fill,
        "output_ptr": output,
        "statistic_ptrs": tuple(statistic_outputs),
        "query_strides": in_units(query, unit),
        "key_strides": in_units(key, unit),
        "value_strides": in_units(value, unit),
        "mask_strides": mask_strides,
        "gate_strides": gate_strides,
        "fill_strides": fill_strides,
        "output_strides": in_units(output, unit),
        "scale": size,
        "exponent_scale": size * math.log2(math.e),
        "heads": heads,
        "heads_per_group": heads // max(kv_heads, 1),
        "queries": queries,
        "keys": keys,
        "DIM": dim,
        "DIM_WIDTHS": configuration.dim_widths or chunk_widths(dim),
        "VALUE_DIM": dim_v,
        "VALUE_WIDTHS": configuration.value_widths or chunk_widths(dim_v),
        "BLOCK_QUERIES": block_queries,
        "BLOCK_KEYS": block_keys,
        "CAUSAL": is_causal,
        "MASK": "none" if attn_mask is None else "bool" if attn_mask.dtype == torch.bool else "additive",
        "MASK_ROWS": mask_strides[2] != 0,
        "SIGN": sign,
        "HAS_GATE": gate is not None,
        "HAS_FILL": fill is not None and gate is not None,
        "ACCUMULATORS": chosen.accumulators,
        "UPDATES": chosen.updates,
        "FINISHES": chosen.finishes,
        "EMPTIES": chosen.empties,
        "STATISTICS_KEY": chosen.cache_key,
        "DOT_DTYPE": dot_dtype(query.dtype),
        "INPUT_PRECISION": float32_precision() if query.dtype == torch.float32 else "tf32",
        "STRIDE_UNIT": unit,
        "WIDE": reach >= 2**31,
    }


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
    statistics: tuple[str, ...],
    output: Tensor,
    statistic_outputs: Sequence[Tensor],
    configuration: ForwardConfiguration | None = None,
) -> None:
    """Writes gate * attention + (1 - gate) * fill into output, and the statistics of attention's rows.

    Args:
        query: [batch, heads, queries, dim], float32, bfloat16 or float16, any strides.
        key: [batch, kv_heads, keys, dim]; query head h reads head h // (heads // kv_heads).
        value: [batch, kv_heads, keys, dim_v].
        attn_mask: broadcastable to [batch, heads, queries, keys]: bool (True attends) or floating (added to the
            logits), or None.
        is_causal: query i attends to keys 0..i.
        scale: multiplies query . key; any sign.
        gate: float32, broadcastable to [batch, heads]; None keeps every head.
        fill: floating, broadcastable to [batch, heads, queries, dim_v]; None: zeros.
        statistics: names out of STATISTICS.
        output: [batch, heads, queries, dim_v], query's dtype, any strides; overwritten.
        statistic_outputs: one contiguous float32 [batch, heads, queries] for each name; overwritten.
        configuration: tile shapes; None: chosen for the problem.

    Raises:
        ValueError: a dtype, head dimension, statistic or combination that the kernel has no code for.
    """
    batch, heads, queries, dim = query.shape
    keys, dim_v = value.shape[2:]
    with launch_context(query):
        if configuration is None:
            target = device_target(query)
            configuration = forward_configuration(
                query.dtype,
                dim,
                dim_v,
                queries,
                keys,
                target,
                exact=float32_precision() == "ieee",
                masked=attn_mask is not None,
            )
        arguments = forward_arguments(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            gate=gate,
            fill=fill,
            statistics=statistics,
            output=output,
            statistic_outputs=statistic_outputs,
            configuration=configuration,
        )
        programs = batch * heads * triton.cdiv(queries, configuration.block_queries)
        if programs == 0:
            return
        attention_forward_kernel[(programs,)](
            **arguments,
            num_warps=configuration.num_warps,
            num_stages=configuration.num_stages,
            enable_fp_fusion=True,
        )
