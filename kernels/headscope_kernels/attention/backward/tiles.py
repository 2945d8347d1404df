"""Jit helpers of the backward kernels: what the forward knew about a tile of scores, and its gradient.

The same helpers serve tiles [queries, keys] and, where TRANSPOSED, tiles [keys, queries]: a transposed tile of
probabilities is the left operand of a matrix product as it stands, out of registers.
"""

# ruff: noqa: RUF005 (the kernel language joins tuples with + only)
# tl.static_range exists for the compiler only
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from headscope_kernels.attention.tiles import LOG2_E, LOWEST_EXPONENT, advance, entry, load_chunks, load_described

LN2 = tl.constexpr(0.6931471805599453)
# stands for +inf as the log2 of a row's sum: 2^x is 0 for any product, and x times the gradient of a row is finite
EMPTY_ROW = tl.constexpr(1.0e10)


@triton.jit
def by_query(vector, TRANSPOSED: tl.constexpr):
    """[queries] as it broadcasts against a tile."""
    if TRANSPOSED:
        result = vector[None, :]
    else:
        result = vector[:, None]
    return result


@triton.jit
def by_key(vector, TRANSPOSED: tl.constexpr):
    """[keys] as it broadcasts against a tile."""
    if TRANSPOSED:
        result = vector[:, None]
    else:
        result = vector[None, :]
    return result


@triton.jit
def load_rows(
    descriptor,
    tail,
    base,
    strides,
    batch,
    head,
    first_row,
    rows,
    size,
    limit,
    COLUMNS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    LIMITED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tuple of tiles [ROWS, width] from `first_row` on, of the head at `base`; 0 outside.

    Comes through tensor descriptors of [batch, heads, size, COLUMNS] if there are any. If LIMITED, `limit` is either 0,
    for a tile of zeros, or `size`.
    """
    if descriptor is None:
        tiles = load_chunks(
            advance(base, first_row, strides[2]),
            rows,
            limit - first_row,
            strides[2],
            strides[3],
            COLUMNS,
            WIDTHS,
            CHECK_ROWS or LIMITED,
            WIDE,
        )
    else:
        place = first_row
        if LIMITED:
            # past the end, all is 0
            place = tl.where(limit == 0, size, first_row)
        tiles = load_described(descriptor, tail, batch, head, place, ROWS, WIDTHS)
    return tiles


@triton.jit
def load_vector(base, positions, limit, stride, OTHER: tl.constexpr, CHECK: tl.constexpr):
    """[positions], float32; OTHER outside of limit, if checked."""
    if CHECK:
        vector = tl.load(base + positions * stride, mask=positions < limit, other=OTHER)
    else:
        vector = tl.load(base + positions * stride)
    return vector.to(tl.float32)


@triton.jit
def load_head_scalar(pointer, batch, head, strides, HAS: tl.constexpr):
    """One head's number out of [batch, heads], float32; 1 where there is none."""
    value = 1.0
    if HAS:
        value = tl.load(advance(advance(pointer, batch, strides[0]), head, strides[1])).to(tl.float32)
    return value


@triton.jit
def load_key_terms(
    key_bias_base,
    key_scale_base,
    mask_base,
    key_bias_stride,
    key_scale_stride,
    mask_stride,
    gate,
    first_key,
    columns,
    keys,
    KEY_MASK: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    HAS_KEY_SCALE: tl.constexpr,
    CHECK: tl.constexpr,
):
    """What is the same for all queries of a head, each [keys] or a number:

    what multiplies grad_output . value, what is added to the logits, and whether a key is attended to.
    """
    limit = keys - first_key
    weight = gate
    if HAS_KEY_SCALE:
        base = advance(key_scale_base, first_key, key_scale_stride)
        weight = gate * load_vector(base, columns, limit, key_scale_stride, 0.0, CHECK)
    bias = 0.0
    if HAS_KEY_BIAS:
        base = advance(key_bias_base, first_key, key_bias_stride)
        bias = load_vector(base, columns, limit, key_bias_stride, 0.0, CHECK)
    allowed = 1.0
    if KEY_MASK != "none":
        base = advance(mask_base, first_key, mask_stride)
        mask = load_vector(base, columns, limit, mask_stride, 0, CHECK)
        if KEY_MASK == "bool":
            allowed = mask
        else:
            bias = bias + mask
    return weight, bias, allowed


@triton.jit
def load_row_grad(
    pointer, first_row, rows, limit, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, CHECK: tl.constexpr
):
    """The cotangent of one statistic, [queries] (width 0) or [queries, padded width]."""
    if WIDTH == 0:
        grad = load_vector(advance(pointer, first_row, 1), rows, limit, 1, 0.0, CHECK)
    else:
        members = tl.arange(0, PADDED_WIDTH)  # [padded width]
        inside = (rows < limit)[:, None] & (members < WIDTH)[None, :]  # [queries, padded width]
        pointers = advance(pointer, first_row, WIDTH) + rows[:, None] * WIDTH + members[None, :]
        grad = tl.load(pointers, mask=inside, other=0.0)
    return grad


@triton.jit
def load_row_grads(
    grad_ptrs, first_row, rows, limit, WIDTHS: tl.constexpr, PADDED_WIDTHS: tl.constexpr, CHECK: tl.constexpr
):
    """A tuple of the statistics' cotangents; `first_row` counts over all heads."""
    grads = ()
    for index in tl.static_range(len(WIDTHS)):
        grad = load_row_grad(
            grad_ptrs[index], first_row, rows, limit, entry(WIDTHS, index), entry(PADDED_WIDTHS, index), CHECK
        )
        grads = grads + (grad,)
    return grads


@triton.jit
def log2_probabilities(
    products,
    row_max,
    log2_sum,
    bias,
    allowed,
    mask_base,
    mask_strides,
    logit_scale,
    rows,
    columns,
    first_query,
    first_key,
    queries,
    keys,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ADDITIVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
    DROP_COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """log2 of the probabilities, a tile; -inf where masked.

    Without anything to add, log2_sum has the row's maximum in it and all is one FMA. Otherwise the maximum is
    subtracted in natural units first: masks may hold the lowest float. DROP_COLUMNS masks what lies past the last key
    (a tile that ends up in rows of its own needn't), and, if CAUSAL, past the diagonal.
    """
    if ADDITIVE:
        logits = products * logit_scale
        if HAS_BIAS:
            logits = products * logit_scale + by_key(bias, TRANSPOSED)
        if MASK == "additive":
            mask = load_mask_tile(
                mask_base,
                mask_strides,
                rows,
                columns,
                first_query,
                first_key,
                queries,
                keys,
                CHECK_ROWS,
                CHECK_COLUMNS,
                TRANSPOSED,
            )
            logits = logits + mask.to(tl.float32)
        exponents = (logits - by_query(row_max, TRANSPOSED)) * LOG2_E - by_query(log2_sum, TRANSPOSED)
    else:
        exponents = products * (logit_scale * LOG2_E) - by_query(log2_sum, TRANSPOSED)
    if MASK == "bool":
        mask = load_mask_tile(
            mask_base,
            mask_strides,
            rows,
            columns,
            first_query,
            first_key,
            queries,
            keys,
            CHECK_ROWS,
            CHECK_COLUMNS,
            TRANSPOSED,
        )
        exponents = tl.where(mask != 0, exponents, float("-inf"))
    if KEY_MASK == "bool":
        exponents = tl.where(by_key(allowed != 0.0, TRANSPOSED), exponents, float("-inf"))
    if DROP_COLUMNS:
        valid = by_key(columns < keys - first_key, TRANSPOSED)
        if CAUSAL:
            valid = valid & (by_key(first_key + columns, TRANSPOSED) <= by_query(first_query + rows, TRANSPOSED))
        exponents = tl.where(valid, exponents, float("-inf"))
    return exponents


@triton.jit
def load_mask_tile(
    mask_base,
    mask_strides,
    rows,
    columns,
    first_query,
    first_key,
    queries,
    keys,
    CHECK_ROWS: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The mask of a tile, 0 outside: of a bool mask that is "masked"."""
    base = advance(advance(mask_base, first_query, mask_strides[2]), first_key, mask_strides[3])
    pointers = (
        base + by_query(rows * mask_strides[2], TRANSPOSED) + by_key(columns * mask_strides[3], TRANSPOSED)
    )  # a tile
    inside_rows = by_query(rows < queries - first_query, TRANSPOSED)
    inside_columns = by_key(columns < keys - first_key, TRANSPOSED)
    if CHECK_ROWS and CHECK_COLUMNS:
        mask = tl.load(pointers, mask=inside_rows & inside_columns, other=0)
    elif CHECK_ROWS:
        mask = tl.load(pointers, mask=inside_rows, other=0)
    elif CHECK_COLUMNS:
        mask = tl.load(pointers, mask=inside_columns, other=0)
    else:
        mask = tl.load(pointers)
    return mask


@triton.jit
def logit_gradients(
    probabilities,
    exponents,
    output_products,
    weight,
    delta,
    grads,
    rows,
    columns,
    keys,
    data,
    GRADIENTS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_KEY_SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """p * (dP - delta), a tile: the gradient of the logits.

    `output_products` are grad_output . value, `weight` their factor; `rows` and `columns` are absolute here.
    """
    if HAS_OUTPUT:
        if HAS_KEY_SCALE:
            inner = output_products * by_key(weight, TRANSPOSED) - by_query(delta, TRANSPOSED)
        elif HAS_GATE:
            inner = output_products * weight - by_query(delta, TRANSPOSED)
        else:
            inner = output_products - by_query(delta, TRANSPOSED)
    else:
        inner = tl.broadcast_to(-by_query(delta, TRANSPOSED), probabilities.shape)
    if len(GRADIENTS) > 0:
        log_probabilities = exponents * LN2  # a tile
        if MASKED:
            log_probabilities = tl.maximum(log_probabilities, LOWEST_EXPONENT)
        if TRANSPOSED:
            log_probabilities = tl.trans(log_probabilities)  # [queries, keys]
        for index in tl.static_range(len(GRADIENTS)):
            gradient = GRADIENTS[index](
                grads[index], log_probabilities, rows, columns, keys, data[index], entry(CONSTANTS, index)
            )  # [queries, keys]
            if TRANSPOSED:
                gradient = tl.trans(gradient)
            inner = inner + gradient
    return probabilities * inner


@triton.jit
def add_weighted(result, weights, tiles, DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """result + weights . tile for every chunk of result; the weights are rounded to the tiles' type."""
    sums = ()
    for index in tl.static_range(len(result)):
        rounded = weights.to(tiles[index].dtype).to(DTYPE)
        sums = sums + (tl.dot(rounded, tiles[index].to(DTYPE), result[index], input_precision=INPUT_PRECISION),)
    return sums
