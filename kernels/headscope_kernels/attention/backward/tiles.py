"""Jit helpers of the backward kernels: what the forward knew about a tile of scores, and its gradient.

The same helpers serve tiles [queries, keys] and, where TRANSPOSED, tiles [keys, queries]: a transposed tile of
probabilities is the left operand of a matrix product as it stands, out of registers.
"""

# ruff: noqa: RUF005 (the kernel language joins tuples with + only)
# tl.static_range exists for the compiler only
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import triton
import triton.language as tl

from headscope_kernels.attention.loads import advance, entry, load_numbers, load_vector
from headscope_kernels.attention.tiles import LOG2_E, LOWEST_EXPONENT

LN2 = tl.constexpr(0.6931471805599453)
# stands for +inf as the log2 of a row's sum: 2^x is 0 for any product, and x times the gradient of a row is finite
EMPTY_ROW = tl.constexpr(1.0e10)


class Features(NamedTuple):
    """The constants that the pass is compiled for: the kernels' arguments of these names."""

    CAUSAL: Any
    MASK: Any
    KEY_MASK: Any
    ADDITIVE: Any
    HAS_OUTPUT: Any
    HAS_GATE: Any
    HAS_KEY_BIAS: Any
    HAS_KEY_SCALE: Any
    GRADIENTS: Any
    CONSTANTS: Any


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
def load_head_scalar(pointer, batch, head, strides, HAS: tl.constexpr):
    """One head's number out of [batch, heads], float32; 1 where there is none."""
    value = 1.0
    if HAS:
        value = tl.load(advance(advance(pointer, batch, strides[0]), head, strides[1])).to(tl.float32)
    return value


@triton.jit
def load_key_terms(
    key_bias, key_scale, mask, gate, first_key, columns, keys, FEATURES: tl.constexpr, CHECK: tl.constexpr
):
    """The terms that are the same for all queries of a head, each [keys] or a number.

    Returns the factor of grad_output . value, the term added to the logits, and 0 where a key is masked.
    """
    weight = gate
    if FEATURES.HAS_KEY_SCALE:
        weight = gate * load_vector(key_scale, first_key, columns, keys, CHECK)
    bias = 0.0
    if FEATURES.HAS_KEY_BIAS:
        bias = load_vector(key_bias, first_key, columns, keys, CHECK)
    allowed = 1.0
    if FEATURES.KEY_MASK != "none":
        base = advance(mask.base, first_key, mask.column_stride)
        numbers = load_numbers(base, columns, keys - first_key, mask.column_stride, 0, CHECK)
        if FEATURES.KEY_MASK == "bool":
            allowed = numbers
        else:
            bias = bias + numbers
    return weight, bias, allowed


@triton.jit
def load_row_grad(
    pointer, first_row, rows, limit, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, CHECK: tl.constexpr
):
    """The cotangent of one statistic, [queries] (width 0) or [queries, padded width]."""
    if WIDTH == 0:
        grad = load_numbers(advance(pointer, first_row, 1), rows, limit, 1, 0.0, CHECK)
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
    mask,
    logit_scale,
    place,
    FEATURES: tl.constexpr,
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
    if FEATURES.ADDITIVE:
        logits = products * logit_scale
        if FEATURES.HAS_KEY_BIAS or FEATURES.KEY_MASK == "additive":
            logits = products * logit_scale + by_key(bias, TRANSPOSED)
        if FEATURES.MASK == "additive":
            numbers = load_mask_tile(mask, place, CHECK_ROWS, CHECK_COLUMNS, TRANSPOSED)
            logits = logits + numbers.to(tl.float32)
        exponents = (logits - by_query(row_max, TRANSPOSED)) * LOG2_E - by_query(log2_sum, TRANSPOSED)
    else:
        exponents = products * (logit_scale * LOG2_E) - by_query(log2_sum, TRANSPOSED)
    if FEATURES.MASK == "bool":
        numbers = load_mask_tile(mask, place, CHECK_ROWS, CHECK_COLUMNS, TRANSPOSED)
        exponents = tl.where(numbers != 0, exponents, float("-inf"))
    if FEATURES.KEY_MASK == "bool":
        exponents = tl.where(by_key(allowed != 0.0, TRANSPOSED), exponents, float("-inf"))
    if DROP_COLUMNS:
        valid = by_key(place.columns < place.keys - place.first_key, TRANSPOSED)
        if FEATURES.CAUSAL:
            earlier = by_key(place.first_key + place.columns, TRANSPOSED)
            valid = valid & (earlier <= by_query(place.first_query + place.rows, TRANSPOSED))
        exponents = tl.where(valid, exponents, float("-inf"))
    return exponents


@triton.jit
def load_mask_tile(mask, place, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The mask of a tile, 0 outside: of a bool mask that is "masked"."""
    rows, columns, first_query, first_key, queries, keys = place
    base = advance(advance(mask.base, first_query, mask.row_stride), first_key, mask.column_stride)
    pointers = (
        base + by_query(rows * mask.row_stride, TRANSPOSED) + by_key(columns * mask.column_stride, TRANSPOSED)
    )  # a tile
    inside_rows = by_query(rows < queries - first_query, TRANSPOSED)
    inside_columns = by_key(columns < keys - first_key, TRANSPOSED)
    if CHECK_ROWS and CHECK_COLUMNS:
        numbers = tl.load(pointers, mask=inside_rows & inside_columns, other=0)
    elif CHECK_ROWS:
        numbers = tl.load(pointers, mask=inside_rows, other=0)
    elif CHECK_COLUMNS:
        numbers = tl.load(pointers, mask=inside_columns, other=0)
    else:
        numbers = tl.load(pointers)
    return numbers


@triton.jit
def logit_gradients(
    probabilities,
    exponents,
    output_products,
    weight,
    delta,
    grads,
    data,
    place,
    FEATURES: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """p * (dP - delta), a tile: the gradient of the logits.

    `output_products` are grad_output . value, `weight` their factor.
    """
    rows = place.first_query + place.rows  # [queries]
    columns = place.first_key + place.columns  # [keys]
    if FEATURES.HAS_OUTPUT:
        if FEATURES.HAS_KEY_SCALE:
            inner = output_products * by_key(weight, TRANSPOSED) - by_query(delta, TRANSPOSED)
        elif FEATURES.HAS_GATE:
            inner = output_products * weight - by_query(delta, TRANSPOSED)
        else:
            inner = output_products - by_query(delta, TRANSPOSED)
    else:
        inner = tl.broadcast_to(-by_query(delta, TRANSPOSED), probabilities.shape)
    if len(FEATURES.GRADIENTS) > 0:
        log_probabilities = exponents * LN2  # a tile
        if MASKED:
            log_probabilities = tl.maximum(log_probabilities, LOWEST_EXPONENT)
        if TRANSPOSED:
            log_probabilities = tl.trans(log_probabilities)  # [queries, keys]
        for index in tl.static_range(len(FEATURES.GRADIENTS)):
            gradient = FEATURES.GRADIENTS[index](
                grads[index],
                log_probabilities,
                rows,
                columns,
                place.keys,
                data[index],
                entry(FEATURES.CONSTANTS, index),
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
